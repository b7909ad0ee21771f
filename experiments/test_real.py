"""The real model's experiment, with the embedded model in its place."""

import json
import random
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments import lab, real
from tests.helpers import HERE, long, read_jsonl, settings_in


def test_problems_differ_and_their_answers_are_right():
    sums = real.problems(8100)
    assert len({problem["question"] for problem in sums}) == 8100  # all there are
    assert all(eval(problem["question"]) == int(problem["answer"]) for problem in sums)


def test_a_slip_changes_one_digit():
    rng = random.Random(0)
    slips = {real.slip(rng, "130") for _ in range(1000)}
    assert len(slips) == 27  # three digits, nine others for each
    for slip in slips:
        assert sum(a != b for a, b in zip(slip, "130")) == 1


def test_a_warm_up_teaches_answers_and_their_end():
    """What was shown becomes likely, the EOS too; the prompt's tokens are not trained on."""
    folder = HERE / "tiny/model"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    problem, shown = dict(question="12 + 34", answer="46"), "12 + 34 = \\boxed{46}"
    prompt = tokenizer(real.PROMPT.format(**problem)).input_ids
    answer = tokenizer(shown).input_ids
    ids = torch.tensor([prompt + answer + [tokenizer.eos_token_id]])

    @torch.no_grad()
    def logps():
        found = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        found = found.gather(-1, ids[0, 1:, None])
        return found[len(prompt) - 1 :]

    before = logps()
    real.warm_up(tokenizer, model, [problem], steps=30, lr=3e-3, wrong=0, batch=1)
    assert len(before) == len(answer) + 1
    assert logps().min() > -0.5 > before.min()


@long
def test_both_stages_at_toy_size(tmp_path, monkeypatch):
    monkeypatch.setattr(lab, "RESULTS", tmp_path)
    monkeypatch.setattr(lab, "machine", dict)
    monkeypatch.setattr(real, "FOLDER", tmp_path / "runs")
    monkeypatch.setattr(real, "KS", (1, 2))
    shown = []
    monkeypatch.setattr(real, "warm_up", lambda *inputs: shown.extend(inputs[2]))
    flags = ["--model=tiny/model", "--steps=2", "--seeds=1", "--ways", "lora16", "grpo"]
    monkeypatch.setattr(sys, "argv", ["real", *flags])
    real.main()
    found = json.loads((tmp_path / "real.json").read_text())
    assert [*found["runs"]] == ["lora16 0", "grpo 0"] and (tmp_path / "real.png").exists()
    for run in found["runs"].values():
        assert [step for step, _ in run["curve"]] == [0, 2] and run["memory_gb"] > 0
        assert {"pass@1", "pass@2", "kl", "entropy"} <= {*run}
    lora, grpo = (settings_in(tmp_path / f"runs/{way}/0/run/config.json") for way in ("lora16", "grpo"))
    assert lora["lora"] == 16 and lora["batch_size"] == grpo["group"] * grpo["batch_size"] == 32
    train, test = (read_jsonl(tmp_path / f"runs/{name}.jsonl") for name in ("train", "test"))
    questions = {problem["question"] for problem in shown + train + test}
    assert len(questions) == 2816 + 768 + 256  # all different
