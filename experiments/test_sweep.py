"""A sweep at toy size: what it runs, what it leaves, and what a second start does not run again."""

import json
import math
import sys

import pytest

from experiments import lab, sweep
from test_apo import inside

APO, GRPO = "apo --lora=4 --lr=1e-3", "grpo --group=2 after --samples=3"
TRAIN = "@tiny/train.args --batch_size=4 --eval_limit=8 --eval_every=1"
MEASURE = "--data tiny/test.jsonl --prompt {question} --max_new_tokens 64 --limit 8 --samples 2"
FLAGS = ["--seeds=2", "--steps=2", "--stage1=@tiny/vstar.args --samples=1 --limit=8", f"--train={TRAIN}"]
FLAGS += [f"--evaluate={MEASURE}"]


@pytest.mark.whole
def test_two_ways_from_two_seeds(tmp_path, monkeypatch):
    ran = []

    def in_this_process(command, stdout, **_):
        ran.append(command)
        done = inside(*command[1:])
        stdout.write(done.stdout)
        return done

    def start(*ways_and_flags):
        name = str(tmp_path / "toy")  # not a name in out/
        monkeypatch.setattr(sys, "argv", ["sweep", name, *FLAGS, "--ways", *ways_and_flags])
        sweep.main()
        return json.loads((tmp_path / "toy.json").read_text(), parse_constant=pytest.fail)

    monkeypatch.setattr(lab, "machine", dict)
    one_by_one = lambda args, call, choices: [call(args, *choice) for choice in choices]
    monkeypatch.setattr(lab, "side_by_side", one_by_one)
    monkeypatch.setattr(lab.subprocess, "run", in_this_process)
    found = start(APO, GRPO)
    # both stages and the evaluation, twice for each way; and π_ref's
    assert len(ran) == 13 and (tmp_path / "toy.png").exists()
    for way in APO, GRPO:
        one, other = found["runs"][way]
        assert [step for step, _ in one["curve"]] == [0, 1, 2] and one["curve"][-1][1] == one["accuracy"]
        for key in ("accuracy", "test pass@2"):
            assert found["table"][way][key][0] == pytest.approx((one[key] + other[key]) / 2, abs=1e-4)
    assert found["before"]["test accuracy"] <= found["before"]["test pass@2"]
    for folder, samples in {"stage1_": 1, "stage1_--samples=3": 3}.items():  # GRPO has its own
        rows = lab.read(tmp_path / "toy" / folder / "1/vstar.jsonl")
        assert len(rows) == 8 and len(rows[0]["rewards"]) == samples
    settings = json.loads((tmp_path / "toy/apo_--lora=4_--lr=1e-3/1/run/config.json").read_text())["settings"]
    assert (settings["lora"], settings["lr"], settings["seed"]) == (4, 1e-3, 1)

    # the same ways in another order: nothing is run
    assert start(GRPO, APO)["table"] == found["table"] and len(ran) == 13
    # with other flags nothing old is taken for it: Stage 2 runs again, and so does the evaluation after it
    start(APO, "--steps=1")
    assert len(ran) == 17


def test_results_are_json(tmp_path, monkeypatch):
    """JSON has no NaN: what was never reached is null."""
    kept = list(lab.RESULTS.glob("*.json"))
    monkeypatch.setattr(lab, "RESULTS", tmp_path)
    monkeypatch.setattr(lab, "machine", dict)
    lab.save("new", seconds=math.nan, table=dict(apo=[1.5, math.nan]))
    for path in (*kept, tmp_path / "new.json"):
        found = json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert found == dict(machine={}, seconds=None, table=dict(apo=[1.5, None]))
