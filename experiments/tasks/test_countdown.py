"""Countdown's reward, its problems, and both stages at toy size."""

import json
import random
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import transformers

from experiments import lab
from experiments.baselines import ALGORITHMS
from experiments.tasks import countdown
from experiments.tasks.countdown import reward
from experiments.tasks.small import train_small, write
from rewards import load_problems, load_reward
from test_apo import HERE, HOSTILE, inside, long, read_jsonl

ROW = dict(nums=[4, 7, 9, 4], target=37)


@pytest.mark.parametrize("answer", [
    "7*4+9", "9 + 4 × 7", r"4 \times 7 + 9", r"\left(4\cdot7\right)+9", "(4)(7)+9", "9-(-4)*7", "+4·7+9", "$7*4+9$.",
    "7*4+9 = 37", r"7 \times 4 + 9 = 28 + 9 = 37",
])
def test_right_in_many_forms(answer):
    assert reward(f"so \\boxed{{{answer}}}", ROW, True) == 1
    assert reward(f"\\boxed{{1}}, no, \\boxed{{{answer}}}", ROW, True) == 1  # the last box counts
    assert reward(f"so \\boxed{{{answer}}}", ROW, False) == 0  # cut off
    assert reward(f"so {answer}", ROW, True) == 0  # no box
    assert reward(f"\\boxed{{{answer}}}, no, \\boxed{{1}}", ROW, True) == 0


@pytest.mark.parametrize("nums, target, answer", [
    ([4, 7, 9, 4], 37, "7*4+9"),  # a 4 is left over
    ([4, 7, 9, 4], 24, "7+4+9+4"),  # each 4 once
    ([8, 3, 8, 3], 24, r"\frac{8}{3-\frac{8}{3}}"), ([8, 3, 8, 3], 24, "8/(3-8/3)"),
    ([8, 3, 8, 3], 24, "8 ÷ (3 - 8:3)"), ([25, 3], 75, r"25 \times 3"), ([5], 5, "5"), ([0, 5], 5, "5-0"),
    ([3, 8], 5, "-3+8"), ([3, 8], -5, "3-8"),
])
def test_right_numbers(nums, target, answer):
    assert reward(f"\\boxed{{{answer}}}", dict(nums=nums, target=target), True) == 1


@pytest.mark.parametrize("answer", [
    "7*4+4", "9*4", "37", "7*4+9=36",  # another value
    "7*4+9+7-7", "9+9+9+4+4+1+1", "4*4*4-9*4+9",  # a number too often
    "7*4+8+1", "7*5+2", "7*4+9+0", "7*4+9*1",  # a number that was not given
    "74-37", "47-9-1", "(4+4)!/7", "7*4+9!/9!", "2^4+9+4+7+1", r"\sqrt{9}*4*4-7-4", "|7*4+9|", "7*4+9%", r"\pm 7*4+9",
    "37 = 7*4+9", "x = 7*4+9", "7*4+9 = 37 = 38", "7*4+9 = x", "7*4+9, 7*4+9", "7*4+9 > 36", "[7*4]+9",
    r"7*4+9\text{ cm}", "9/0", "9/(4-4)", "7*4+9+1/(4-4)", "", "(7*4+9", "7**4", "none", "__import__('os')",
])
def test_wrong(answer):
    assert reward(f"so \\boxed{{{answer}}}", ROW, True) == 0


def test_its_value_must_be_exact():
    row = dict(nums=[1, 3, 10**9], target=1)
    assert reward(r"\boxed{3/3}", row, True) == 0
    assert reward(r"\boxed{1/3*3}", dict(nums=[1, 3, 3], target=1), True) == 1
    assert reward(r"\boxed{1+1/1000000000}", dict(nums=[1, 1, 10**9], target=1), True) == 0


@pytest.mark.parametrize("text", [*HOSTILE, "1+" * 199 + "1", "(" * 190 + "1" + ")" * 190, "-(" * 30 + "1" + ")" * 30,
                                  "7*4+9=10^{2000}", "7*4+9=9^{9^9}", "7*4+9" + "=37" * 100])
def test_hostile_text_earns_nothing_and_raises_nothing(text):
    for response in (text, f"\\boxed{{{text}}}", f"\\boxed{{7*4+9=\\boxed{{{text}", f"#### {text}"):
        assert reward(response, ROW, True) in (0, 1)
    assert reward(f"\\boxed{{{text}}}", ROW, True) == (text.startswith("7*4+9=37"))


def test_nothing_is_computed_before_all_numbers_are_known_to_be_given(monkeypatch):
    monkeypatch.setattr(countdown, "value", lambda tree: pytest.fail("computed"))
    for answer in ("9^9", "4*4*4*4", "200!", "7*4+8"):
        assert reward(f"\\boxed{{{answer}}}", ROW, True) == 0


def test_loading_the_reward_brings_no_torch():
    named = countdown.NAMED
    code = f"import sys; from rewards import load_reward; load_reward({named!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=HERE).returncode == 0


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hub"])
def test_rows_of_tinyzeros_form(tmp_path, monkeypatch, kind):
    path, rows = tmp_path / f"rows.{kind}", [dict(target=98, nums=[44, 19, 35]), dict(target=64, nums=[63, 95, 96])]
    if kind == "jsonl":
        write(path, rows)
    elif kind == "hub":  # a stand-in: no network
        path = "Jiayi-Pan/Countdown-Tasks-3to4"
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(rows))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    found = load_problems(path, "train", "nums", "target")
    assert [(row["nums"], row["target"]) for row in found] == [([44, 19, 35], 98), ([63, 95, 96], 64)]
    assert load_reward(countdown.NAMED)(r"\boxed{44+19+35}", found[0], True) == 1
    assert load_reward(countdown.NAMED)(r"\boxed{44+19+36}", found[0], True) == 0


def test_a_worked_demonstration_is_right():
    rng = random.Random(0)
    for _ in range(500):
        nums, target = countdown.problem(rng)
        assert reward(countdown.worked(rng, nums, target), dict(nums=nums, target=target), True) == 1


def test_no_problem_to_test_on_is_demonstrated_or_trained_on(tmp_path, monkeypatch):
    kept = {}
    monkeypatch.setattr("experiments.tasks.small.train_small",
                        lambda folder, characters, demonstration, *_, **__: kept.update(shown=demonstration))
    countdown.make_world(tmp_path, 1, train=300, test=200)
    train, test = ([countdown.key(row["nums"], row["target"]) for row in read_jsonl(tmp_path / f"{name}.jsonl")]
                   for name in ("train", "test"))
    asked = {*train, *test}
    assert (len(train), len(test), len(asked)) == (300, 200, 500)  # in any order of the numbers
    rng = random.Random(0)
    for _ in range(2000):
        prompt, _ = kept["shown"](rng, rng.random())
        nums, target = prompt.removesuffix("=").split("] ")
        assert countdown.key(json.loads(nums + "]"), int(target)) not in asked


def runs_inside(monkeypatch, results):
    """An experiment's runs take place in this process, one after the other."""

    def run(args, script, out, done, *flags, threads=None):
        """A model that has learned nothing never ends an answer, so few problems are enough to evaluate it."""
        out.mkdir(parents=True, exist_ok=True)
        if not (out / f"{script}.seconds").exists():
            started = ["-m", "experiments.baselines", script] if script in ALGORITHMS else [f"{script}.py"]
            inside(*started, *map(str, flags), *(["--limit=8"] if script == "evaluate" else []))
            (out / f"{script}.seconds").write_text("1")
        assert (out / done).exists()

    monkeypatch.setattr(lab, "RESULTS", results)
    monkeypatch.setattr(lab, "machine", dict)
    monkeypatch.setattr(lab, "run", run)
    monkeypatch.setattr(lab, "side_by_side", lambda args, calls: [call() for call in calls])


def at_toy_size(task, tmp_path, monkeypatch):
    """A task's whole experiment, in this process. → its results"""
    name = Path(task.__file__).stem
    runs_inside(monkeypatch, tmp_path)
    monkeypatch.setattr(task, "FOLDER", tmp_path / "runs")
    monkeypatch.setattr(sys, "argv", [name, "--lessons=30", "--steps=2", "--seeds=1", "--jobs=1"])
    task.main()
    found = json.loads((tmp_path / f"{name}.json").read_text())
    assert [row["step"] for row in found["runs"]["0"]["curve"]] == [0, 1, 2] and (tmp_path / f"{name}.png").exists()
    stage1 = json.loads((tmp_path / "runs/0/vstar.config.json").read_text())["settings"]
    assert stage1["reward"] == f"experiments/tasks/{name}.py:reward" and stage1["model"] == f"{tmp_path}/runs/world"
    # the sums were put to π_ref before, and to the trained model after
    for out, model in ("before", "world"), ("0", "0/run/model"):
        results = json.loads((tmp_path / f"runs/{out}/eval-sums/results.json").read_text())
        assert [*results] == [f"{tmp_path}/runs/{model}"]
    return found


@long
def test_both_stages_at_toy_size(tmp_path, monkeypatch):
    """From TinyZero's fields, by the flags that the docstring names."""
    made = countdown.make_world
    monkeypatch.setattr(countdown, "make_world", lambda folder, steps: made(folder, steps, train=40, test=20))
    found = at_toy_size(countdown, tmp_path, monkeypatch)
    assert [*found["before"]] == [*found["runs"]["0"]["untrained"]] == ["four", "large", "sums"]
    (first, *_), (row, *_) = (read_jsonl(tmp_path / "runs" / name) for name in ("0/vstar.jsonl", "train.jsonl"))
    assert (first["id"], first["nums"], first["target"]) == (row["id"], row["nums"], row["target"])
    assert first["prompt"] == f"{row['nums']} {row['target']}="


def test_a_space_and_sums_are_learned_too(tmp_path):
    seen = []
    train_small(tmp_path, "a b0123456789+=;}", lambda rng, progress: seen.append(progress) or ("a b", "b"), sums=0.5,
                steps=4, batch=8)
    assert 0 < len(seen) < 32 and seen == sorted(seen) and max(seen) == 0.75
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.decode(tokenizer("a b")["input_ids"]) == "a b"
