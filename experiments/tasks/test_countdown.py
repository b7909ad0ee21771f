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
    assert reward(f"so \\boxed{{{answer}}}", ROW, False) == 0  # cut off


def test_the_last_box_counts():
    right, wrong = r"\boxed{7*4+9}", r"\boxed{1}"
    assert reward(f"{wrong}, no, {right}", ROW, True) == 1
    assert reward(f"{right}, no, {wrong}", ROW, True) == reward("so 7*4+9", ROW, True) == 0


@pytest.mark.parametrize("nums, target, answer", [
    ([4, 7, 9, 4], 24, "7+4+9+4"),  # each 4 once
    ([8, 3, 8, 3], 24, r"\frac{8}{3-\frac{8}{3}}"),
    ([8, 3, 8, 3], 24, "8 ÷ (3 - 8/3)"),
    ([1, 2, 8], 16, r"8/\frac{1}{2}"),
    ([8, 4, 2], 1, "8/4/2"),
    ([8, 4, 2], 2, "8-4-2"),
    ([0, 5], 5, "5-0"),
    ([1, 3, 3], 1, "1/3*3"),
])
def test_right_numbers(nums, target, answer):
    assert reward(f"\\boxed{{{answer}}}", dict(nums=nums, target=target), True) == 1


@pytest.mark.parametrize("answer", [
    "7*4+4", "37", "7*4+9=36",  # another value
    "7*4+9+7-7", "4*4*4-9*4+9",  # a number too often
    "7*4+8+1", "7*4+9+0",  # a number that was not given
    "74-37", r"\sqrt{9}*4*4-7-4", "7*4+9%", r"\pm 7*4+9",
    "37 = 7*4+9", "7*4+9 = 37 = 38", "7*4+9 = x", "7*4+9, 7*4+9", "7*4+9)", "(7*4+9",
    r"7*4+9\text{ cm}", "9/0", "7*4+9+1/(4-4)", "", "7**4", "7*4+",
])
def test_wrong(answer):
    assert reward(f"so \\boxed{{{answer}}}", ROW, True) == 0


def test_its_value_must_be_exact():
    assert reward(r"\boxed{1+1/1000000000}", dict(nums=[1, 1, 10**9], target=1), True) == 0


@pytest.mark.parametrize("text", [
    "}" * 99, "\\boxed{" * 5000, "\\boxed{\\boxed{7}", "\ud800", "٣", "9" * 5000, "1+" * 199 + "1",
    "(" * 149 + "1", "(" * 74 + "1" + ")" * 74, "-" * 149 + "1",
])
def test_hostile_text_earns_nothing_and_raises_nothing(text):
    for response in (text, f"\\boxed{{{text}}}", f"\\boxed{{7*4+9=\\boxed{{{text}", f"#### {text}"):
        assert reward(response, ROW, True) == 0


def test_loading_a_reward_brings_no_torch():
    tasks = "from experiments.tasks import countdown, tictactoe"
    code = f"{tasks}; import sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=HERE).returncode == 0


TEXTS = ["and", "or", "but"]
ENDINGS = dict(ctx="He runs", endings=TEXTS, label="2")
CHOICES = dict(question="He runs", choices=dict(text=TEXTS, label=["1", "2", "3"]), answerKey="3")


@pytest.mark.parametrize("name, hub, row", [
    ("hellaswag", ("Rowan/hellaswag", None), ENDINGS),
    ("arc_challenge", ("allenai/ai2_arc", "ARC-Challenge"), CHOICES),
    ("commonsense_qa", ("tau/commonsense_qa", None), CHOICES),
])
def test_multiple_choice(name, hub, row, tmp_path, monkeypatch):
    def load(*source, split):
        assert (source, split) == (hub, "validation")
        return datasets.Dataset.from_list([row])

    out = tmp_path / "new/file.jsonl"
    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(sys, "argv", ["choices", name, "--split=validation", f"--out={out}"])
    choices.main()
    (problem,) = load_problems(str(out))
    assert problem["question"] == "He runs\nA. and\nB. or\nC. but\n"
    assert ordinary(r"so \boxed{C}", problem["answer"], True) == 1
