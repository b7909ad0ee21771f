"""Word problems: chains from equations, and no question in two files."""

import json
from pathlib import Path

import pytest

from experiments import real, words
from rewards import is_correct
from tests.helpers import REAL, inside, needs_real, read_jsonl, refused

CSV = """Question,Numbers,Equation,Answer
"Haley had number0 , her mother number1 . number2 were good .",39.0 38.0 64.0,- + number0 number1 number2,13.0
haley had number0 her mother number1 number2 were good,39.0 38.0 64.0,- + number0 number1 number2,13.0
Half of number0 ?,5.0 2.0,/ number0 number1,2.5
A third of number0 ?,10.0 3.0,/ number0 number1,3.33
More than number0 ?,1.0 2.0,+ number0 number1,4.0
"""
SVAMP = [{"ID": "chal-1", "Body": "A pack costs 76 dollars.", "Question": "And 2?", "Answer": 152.0}]


def test_svamps_files_become_problems(tmp_path):
    (tmp_path / "data/mawps-asdiv-a_svamp").mkdir(parents=True)
    (tmp_path / "data/mawps-asdiv-a_svamp/train.csv").write_text(CSV)
    (tmp_path / "SVAMP.json").write_text(json.dumps(SVAMP))
    parts = words.svamp(tmp_path)
    # once, and not what is not whole, has no end, or is not what its equation gives
    question = "Haley had 39, her mother 38. 64 were good."
    expected = dict(id="mawps/0", question=question, answer="13", chain="39+38=77;77-64=13")
    assert parts["demonstrations"] == [expected]
    assert parts["test"] == parts["train"] == []
    assert parts["svamp"] == [dict(id="chal-1", question="A pack costs 76 dollars. And 2?", answer="152")]


def test_gsm8ks_marks_become_chains(tmp_path):
    solutions = ["48/2=<<48/2=24>>24, so 48+24=<<48+24=72>>72\n#### 72",
                 "<<1+1=2>> <<2+1=3>> <<3+1=4>> <<4+1=5>>\n#### 5",  # four steps
                 "<<1+1=3>>\n#### 3",  # wrong
                 "no marks\n#### 1,000"]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(dict(question=f"q{i}", answer=text)) + "\n"
                            for i, text in enumerate(solutions)))
    inside("-m", "experiments.words", path, f"--out={tmp_path}/out")
    (shown,), rest = (read_jsonl(tmp_path / f"out/{name}.jsonl") for name in ("demonstrations", "train"))
    assert shown == dict(id="gsm8k/0", question="q0", answer="72", chain="48/2=24;48+24=72")
    assert [problem["answer"] for problem in rest] == ["5", "3", "1000"]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_other_files_are_refused(text, tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text(text)
    for source in (path, tmp_path):
        done = inside("-m", "experiments.words", source, f"--out={tmp_path}/out", check=False)
        refused(done, "not the files of")


@needs_real
def test_no_question_stands_in_two_files(tmp_path):
    """As they come they do: 41 of the held-out questions are among those to train on."""
    names = ("test", "svamp", "demonstrations", "train")
    files = [REAL / f"word_{name}.jsonl" for name in names]
    texts = lambda paths: [[words.letters(row["question"]) for row in read_jsonl(path)] for path in paths]
    test, _, _, train = texts(files)
    assert len({*test} & {*train}) == 41
    found = texts(map(Path, real.disjoint(tmp_path, files)))
    every = [text for file in found for text in file]
    assert len(every) == len({*every}) == 2992
    assert [len(file) for file in found] == [256, 500, 928, 1308]


@needs_real
def test_the_demonstrations_chains_are_right():
    for name in ("demonstrations", "train", "test"):
        for row in read_jsonl(REAL / f"word_{name}.jsonl"):
            for step in row["chain"].split(";"):
                assert is_correct(*step.rpartition("=")[::2])
