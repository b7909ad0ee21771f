"""Countdown's reward, and multiple choice as problem files."""

import subprocess
import sys

import datasets
import pytest

from experiments.tasks import choices
from experiments.tasks.countdown import reward
from rewards import load_problems
from rewards import reward as ordinary
from tests.helpers import HERE

ROW = dict(nums=[4, 7, 9, 4], target=37)


@pytest.mark.parametrize("answer", [
    "7*4+9", "9 + 4 × 7", r"4 \times 7 + 9", r"\left(4\cdot7\right)+9", "(4)(7)+9", "9-(-4)*7", "+4·7+9",
    "$7*4+9$.", "7*4+9 = 37", r"7 \times 4 + 9 = 28 + 9 = 37",
])
def test_right_in_many_forms(answer):
    assert reward(f"so \\boxed{{{answer}}}", ROW, True) == 1
    assert reward(f"\\boxed{{1}}, no, \\boxed{{{answer}}}", ROW, True) == 1  # the last box counts
    assert reward(f"so \\boxed{{{answer}}}", ROW, False) == 0  # cut off
    assert reward(f"so {answer}", ROW, True) == 0  # no box
    assert reward(f"\\boxed{{{answer}}}, no, \\boxed{{1}}", ROW, True) == 0


@pytest.mark.parametrize("nums, target, answer", [
    ([4, 7, 9, 4], 24, "7+4+9+4"),  # each 4 once
    ([8, 3, 8, 3], 24, r"\frac{8}{3-\frac{8}{3}}"),
    ([8, 3, 8, 3], 24, "8 ÷ (3 - 8/3)"),
    ([1, 2, 8], 16, r"8/\frac{1}{2}"),
    ([8, 4, 2], 1, "8/4/2"),
    ([8, 4, 2], 2, "8-4-2"),
    ([5], 5, "5"),
    ([0, 5], 5, "5-0"),
    ([3, 8], -5, "3-8"),
    ([1, 3, 3], 1, "1/3*3"),
])
def test_right_numbers(nums, target, answer):
    assert reward(f"\\boxed{{{answer}}}", dict(nums=nums, target=target), True) == 1


@pytest.mark.parametrize("answer", [
    "7*4+4", "9*4", "37", "7*4+9=36",  # another value
    "7*4+9+7-7", "9+9+9+4+4+1+1", "4*4*4-9*4+9",  # a number too often
    "7*4+8+1", "7*5+2", "7*4+9+0", "7*4+9*1",  # a number that was not given
    "74-37", "47-9-1", "7*4+9!/9!", "2^4+9+4+7+1", r"\sqrt{9}*4*4-7-4", "|7*4+9|", "7*4+9%", r"\pm 7*4+9",
    "37 = 7*4+9", "7*4+9 = 37 = 38", "7*4+9 = x", "7*4+9, 7*4+9", "7*4+9 > 36", "[7*4]+9", "7*4+9)", "(7*4+9",
    r"7*4+9\text{ cm}", "9/0", "7*4+9+1/(4-4)", "", "7**4", "7*4+", "none", "__import__('os')",
])
def test_wrong(answer):
    assert reward(f"so \\boxed{{{answer}}}", ROW, True) == 0


def test_its_value_must_be_exact():
    assert reward(r"\boxed{1+1/1000000000}", dict(nums=[1, 1, 10**9], target=1), True) == 0


@pytest.mark.parametrize("text", [
    "", "}" * 99, "\\boxed{" * 5000, "\\boxed{\\boxed{7}", "\ud800", "٣", "9" * 5000, "1+" * 199 + "1",
    "(" * 149 + "1", "(" * 74 + "1" + ")" * 74, "-" * 149 + "1",
])
def test_hostile_text_earns_nothing_and_raises_nothing(text):
    for response in (text, f"\\boxed{{{text}}}", f"\\boxed{{7*4+9=\\boxed{{{text}", f"#### {text}"):
        assert reward(response, ROW, True) == 0


def test_loading_a_reward_brings_no_torch():
    for task in ("countdown", "tictactoe"):
        named = f"experiments/tasks/{task}.py:reward"
        code = f"import sys, rewards; rewards.load_reward({named!r}); sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], cwd=HERE).returncode == 0


@pytest.mark.parametrize("name, hub, row", [
    ("hellaswag", ("Rowan/hellaswag", None),
     dict(ctx="He runs", endings=["and", "or", "but", "so"], label="2")),
    ("arc_challenge", ("allenai/ai2_arc", "ARC-Challenge"),
     dict(question="He runs", choices=dict(text=["and", "or", "but"], label=["1", "2", "3"]), answerKey="3")),
    ("commonsense_qa", ("tau/commonsense_qa", None),
     dict(question="He runs", choices=dict(label=["A", "B", "C"], text=["and", "or", "but"]), answerKey="C")),
])
def test_multiple_choice(name, hub, row, tmp_path, monkeypatch):
    asked, out = [], tmp_path / "new/file.jsonl"
    load = lambda *source, split: asked.append((*source, split)) or datasets.Dataset.from_list([row])
    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(sys, "argv", ["choices", name, "--split=validation", f"--out={out}"])
    choices.main()
    assert asked == [(*hub, "validation")]
    (problem,) = load_problems(str(out))
    assert problem["question"].startswith("He runs\nA. and\nB. or\nC. but\n") and problem["answer"] == "C"
    assert ordinary(r"so \boxed{C}", problem["answer"], True) == 1
    assert ordinary(r"so \boxed{B}", problem["answer"], True) == 0
