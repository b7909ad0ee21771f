"""The real model's experiment at toy size, with the embedded model in its place."""

import json
import sys

from experiments import lab, real
from tests.helpers import long, settings_in

ROWS = [dict(id=f"{a}+{b}", question=f"{a}+{b}=", answer=str(a + b), chain=f"{a}+{b}={a + b}")
        for a in range(10, 20) for b in range(10, 20)]


@long
def test_cold_start_both_stages_and_evaluation(tmp_path, monkeypatch):
    monkeypatch.setattr(lab, "RESULTS", tmp_path)
    monkeypatch.setattr(lab, "machine", dict)
    files = {"--demonstrations": ROWS[:40], "--data": ROWS[30:80], "--eval_data": ROWS[70:]}
    flags = []
    for flag, rows in files.items():
        path = tmp_path / f"{flag[2:]}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        flags += [flag, str(path)]
    flags += ["--model=tiny/model", "--steps=2", "--seeds=1", f"--name={tmp_path}/real"]
    flags += ["--cold=--steps=3", "--ways", "apo --lora=16", "grpo --group=4 --batch_size=8"]
    flags += ["--train=--batch_size=8 --eval_every=1", "--evaluate=--samples=2"]
    monkeypatch.setattr(sys, "argv", ["real", *flags])
    real.main()
    found = json.loads((tmp_path / "real.json").read_text())
    assert (tmp_path / "real.png").exists()
    assert {"eval_data accuracy", "eval_data pass@2", "eval_data majority"} == {*found["before"]}
    for (run,) in found["runs"].values():
        assert [step for step, _ in run["curve"]] == [0, 1, 2] and run["memory_gb"] > 0
        assert {"eval_data accuracy", "kl", "entropy", "seconds"} <= {*run}
    settings = settings_in(tmp_path / "real/apo_--lora=16/0/run/config.json")
    assert settings["lora"] == 16
    # what was trained on stands neither among the demonstrations nor among the held-out problems
    assert settings["stage1"]["data"] == str(tmp_path / "real/data/2/data.jsonl")
    assert len((tmp_path / "real/data/2/data.jsonl").read_text().splitlines()) == 30
