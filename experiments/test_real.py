"""The real model's experiment, with the embedded model in its place."""

import json
import random
import sys

import torch

from experiments import real
from experiments.tasks.test_countdown import runs_inside
from test_apo import HERE, long, read_jsonl


def test_problems_differ_and_their_answers_are_right():
    rows = real.problems(8100)
    assert len({row["question"] for row in rows}) == 8100  # all there are
    assert all(eval(row["question"]) == int(row["answer"]) for row in rows)


def test_a_slip_changes_one_digit():
    rng = random.Random(0)
    slips = [real.slip(rng, "130") for _ in range(1000)]
    assert {sum(a != b for a, b in zip(slip, "130")) for slip in slips} == {1} and len(set(slips)) == 27


def test_a_warm_up_teaches_answers_and_their_end():
    """What was shown becomes likely, the EOS too; the prompt's tokens are not trained on."""
    tokenizer, model = real.pretrained(str(HERE / "tiny/model"))
    row, shown = dict(question="12 + 34", answer="46"), "12 + 34 = \\boxed{46}"
    prompt, answer = (tokenizer(text).input_ids for text in (real.PROMPT.format(**row), shown))
    ids = torch.tensor([prompt + answer + [tokenizer.eos_token_id]])

    def logps():
        with torch.no_grad():
            found = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        return found[len(prompt) - 1 :]

    before = logps()
    real.warm_up(tokenizer, model, [row] * 2, steps=30, rate=3e-3, wrong=0, batch=2)
    assert len(before) == len(answer) + 1 and logps().min() > -0.5 > before.min()


@long
def test_both_stages_at_toy_size(tmp_path, monkeypatch):
    runs_inside(monkeypatch, tmp_path)
    monkeypatch.setattr(real, "FOLDER", tmp_path / "runs")
    monkeypatch.setattr(real, "KS", (1, 2))
    shown, warm_up = set(), real.warm_up
    monkeypatch.setattr(real, "warm_up", lambda tokenizer, model, rows, *more, **keywords: shown.update(
        row["question"] for row in rows) or warm_up(tokenizer, model, rows, *more, **keywords))
    flags = ["--weights=tiny/model", "--lessons=2", "--steps=2", "--seeds=2", "--ways", "lora16", "grpo", "beta1=inf",
             "--all_seeds", "lora16", "beta1=inf", "--jobs=2", "--name=another"]
    monkeypatch.setattr(sys, "argv", ["real", *flags])
    real.main()
    found = json.loads((tmp_path / "another.json").read_text())
    assert [*found["runs"]] == ["lora16 0", "grpo 0", "beta1=inf 0", "lora16 1", "beta1=inf 1"]
    for name, run in found["runs"].items():
        assert [step for step, _ in run["curve"]] == [0, 2] and run["memory_gb"] > 0
        assert {"pass@1", "pass@2", "kl", "entropy"} <= {*run} and len(run["minutes"]) == 2 - (name == "grpo 0")
    settings = {way: json.loads((tmp_path / f"another/{way}/0/run/config.json").read_text())["settings"]
                for way in ("lora16", "grpo")}
    assert [settings[way]["lora"] for way in settings] == [16, None]
    assert [settings[way].get("group", 1) * settings[way]["batch_size"] for way in settings] == [32, 32]
    train, test = ({row["question"] for row in read_jsonl(tmp_path / "runs" / name)}
                   for name in ("train.jsonl", "test.jsonl"))
    assert (len(train), len(test), len(shown)) == (768, 256, 2816) and (tmp_path / "another.png").exists()
    assert not train & test and not shown & (train | test)
