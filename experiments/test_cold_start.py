"""A cold start: what it teaches, what it refuses, and its restart."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from experiments import cold_start
from tests.helpers import (
    ends_in_one_line,
    inside,
    long,
    refused,
    tiny_model,
    tiny_tokenizer,
    torchrun,
    weights,
    whole,
)
from vstar import Flags

CHAINS = [dict(id="a", question="82+18=", answer="100", chain="2+8=10;8+1+1=10;82+18=100"),
          dict(id="b", question="9*56=", answer="504", chain="9*56=504")]


def command(out, data, *more):
    start = ["-m", "experiments.cold_start", "--model=tiny/model", f"--data={data}", "--prompt={question}"]
    return [*start, "--max_new_tokens=64", "--batch_size=4", "--save_every=2", f"--out={out}", *more]


def write(folder, rows):
    path = folder / "demonstrations.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def logps_of(model, problem, response):
    tokenizer = tiny_tokenizer()
    prompt, shown = tokenizer(problem["question"]).input_ids, tokenizer(response).input_ids
    ids = torch.tensor([prompt + shown + [tokenizer.eos_token_id]])
    with torch.no_grad():
        logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return logps.gather(-1, ids[0, 1:, None])[:, 0], len(prompt) - 1


@whole
def test_it_teaches_completions_and_their_end(tmp_path):
    """What was shown becomes likely, with its EOS. The loss is over these tokens, not over the prompt's."""
    problem, response = CHAINS[1], "9*56=504;\\boxed{504}"
    before, start = logps_of(tiny_model(), problem, response)
    data = write(tmp_path, [problem])
    said = inside(*command(tmp_path / "one", data, "--steps=1")).stdout
    assert f"−ln π {-before[start:].mean():.3f} a token" in said
    inside(*command(tmp_path / "cold", data, "--steps=40", "--lr=3e-3"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "cold/model")
    after, _ = logps_of(model, problem, response)
    assert after[start:].min() > -0.3 and before[start:].min() < -2


def test_a_slip_changes_one_digit():
    rng = np.random.default_rng(0)
    slips = {cold_start.slip(rng, "-13.0") for _ in range(1000)}
    assert len(slips) == 27  # three digits, nine others for each
    for slip in slips:
        assert sum(a != b for a, b in zip(slip, "-13.0")) == 1


def test_a_share_is_wrong():
    class Run:
        args, tokenizer = Flags(""), tiny_tokenizer()

    Run.args.seed, Run.args.wrong, Run.args.response = 0, 0.25, "{chain};\\boxed{{answer}}"
    samples = [cold_start.demonstrate(serial, CHAINS[1], Run) for serial in range(1000)]
    shown = [sample.response for sample in samples]
    right = "9*56=504;\\boxed{504}"
    assert 200 < sum(text != right for text in shown) < 300
    assert all(text == right or text.startswith("\\boxed{") for text in shown)
    assert samples[0].completion.tokens[-1] == Run.tokenizer.eos_token_id


@whole
def test_a_killed_run_ends_as_an_undisturbed_one(tmp_path, monkeypatch):
    data = write(tmp_path, CHAINS)
    inside(*command(tmp_path / "one", data, "--steps=5", "--wrong=0.5"))
    prompts_of_step = cold_start.prompts_of_step

    def killed(problems, step, args):
        if step == 3:
            raise KeyboardInterrupt
        return prompts_of_step(problems, step, args)

    monkeypatch.setattr(cold_start, "prompts_of_step", killed)
    two = command(tmp_path / "two", data, "--steps=5", "--wrong=0.5")
    assert inside(*two, check=False).returncode != 0 and not (tmp_path / "two/model").exists()
    monkeypatch.undo()
    inside(*two)
    assert weights(tmp_path / "two") == weights(tmp_path / "one")
    # another schedule is another run
    refused(inside(*command(tmp_path / "two", data, "--steps=6"), check=False), "steps (was 5, now 6)")


@long
def test_two_ranks_are_like_one(tmp_path):
    data = write(tmp_path, CHAINS)
    inside(*command(tmp_path / "one", data, "--steps=5"))
    torchrun(2, *command(tmp_path / "two", data, "--steps=5"))
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / name / "model") for name in ("one", "two"))
    for parameter, other in zip(one.parameters(), two.parameters()):
        torch.testing.assert_close(parameter, other, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("row,words", [
    (dict(question="1+1=", answer="2"), ["--response", "problem demonstrations/1", "no field 'chain'"]),
    (dict(question="1+1=", answer="2", chain="1+1=3;3-1=2"), ["the chain's step '1+1=3' is wrong"]),
    (dict(question="1+1=", answer="2", chain="1+2=3"), ["'1+2=3' does not end in the answer '2'"]),
    (dict(question="1+1=", answer="2", chain="two"), ["the chain's step 'two' is wrong"]),
    (dict(question="1+1=", answer="x", chain="x=x"), ["--wrong needs a digit in the answer 'x'"]),
    (None, ["no problems in it"]),
])
def test_bad_demonstrations_are_refused_in_one_line(row, words, tmp_path):
    data = write(tmp_path, [row] if row else [])
    refused(inside(*command(tmp_path / "cold", data, "--wrong=0.5"), check=False), *words)
    assert not (tmp_path / "cold").exists()


def test_a_response_that_earns_nothing_is_refused(tmp_path):
    data = write(tmp_path, CHAINS)
    refused(inside(*command(tmp_path / "cold", data, "--response={answer}"), check=False),
            "problem a: the demonstration '100' earns 0")
    refused(inside(*command(tmp_path / "cold", data, "--response=none"), check=False), "--response 'none'")


def test_without_flags_it_says_what_it_needs(capsys, monkeypatch):
    monkeypatch.setattr(cold_start.sys, "argv", ["cold_start"])
    ends_in_one_line(capsys, cold_start.main, "--model", "--data")
