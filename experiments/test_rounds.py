"""A second round: Stage 1 of the latest policy, and Stage 2 from there."""

import json

import pytest

from test_apo import TINY, inside, long, metrics, read_jsonl, stage2, weights


@long
def test_a_second_round_starts_from_the_first_ones_policy(tmp_path):
    model, outs = [], []
    for number in (1, 2):
        rows, out = tmp_path / f"{number}.jsonl", tmp_path / str(number)
        inside("vstar.py", *TINY, *model, "--limit=100", "--samples=4", f"--out={rows}")
        inside(*stage2(rows, out, "--steps=4", "--eval_every=4"))
        model, outs = [f"--model={out}/model"], outs + [out]
    first, second = map(metrics, outs)
    kept = json.loads((outs[1] / "config.json").read_text())["settings"]
    assert kept["model"] == f"{outs[0]}/model"
    # same problems and random numbers: the second starts with the policy, and the accuracy, that the first ended with
    assert second[0]["accuracy"] == first[-1]["accuracy"] != first[0]["accuracy"]
    # π_ref is that policy, not the first round's π_ref: ln π/π_ref begins at 0
    assert first[-1]["log_ratio_abs"] > 0.01 and second[1]["log_ratio_abs"] == pytest.approx(0, abs=1e-3)
    # V̂* is its own: the policy answers anew
    one, other = (read_jsonl(tmp_path / f"{number}.jsonl") for number in (1, 2))
    assert [row["prompt"] for row in one] == [row["prompt"] for row in other]
    assert [row["responses"] for row in one] != [row["responses"] for row in other]
    assert weights(outs[0]) != weights(outs[1])
