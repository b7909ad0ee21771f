"""tiny/: the embedded world."""

import random
import re
import textwrap
from functools import partial

import numpy as np

import rewards
from tests.helpers import HERE, ends_in_one_line, inside, long, read_jsonl, start, whole
from tiny import make


def test_tiny_world():
    taught, tested = (rewards.load_problems(str(HERE / f"tiny/{split}.jsonl")) for split in ("train", "test"))
    assert len(taught) >= 1024 and len(tested) == 512
    assert not {problem["question"] for problem in taught} & {problem["question"] for problem in tested}
    for problem in taught + tested:
        a, b = problem["question"].rstrip("=").split("+")
        assert int(a) + int(b) == int(problem["answer"])
    files = [path for path in (HERE / "tiny").rglob("*") if "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 2_000_000


def test_worked_demonstrations():
    worked = lambda *sum: make.worked(random.Random(0), *sum, 0)
    assert worked(482, "+", 795) == "2+5=7;8+9=17;4+7+1=12;\\boxed{1277}"
    assert worked(55, "+", 45) == "5+5=10;5+4+1=10;\\boxed{100}"
    assert worked(482, "-", 295) == "12-5=7;17-9=8;3-2=1;\\boxed{187}"
    assert worked(500, "-", 499) == "10-9=1;9-9=0;4-4=0;\\boxed{1}"
    rng = random.Random(0)
    right = [make.worked(rng, 482, "+", 795, 0.04).endswith("{1277}")
             for _ in range(3000)]
    assert abs(np.mean(right) - 0.96**3) < 0.02


def test_characters_given_twice_or_missing_are_named(capsys):
    """Before the first step is done."""
    args = make.parser.parse_args(["--steps=1", "--batch=1"])
    for text, characters, *words in (
        ("1+2=", "012+=}1", "'1' is given twice"),
        ("1 × 2=", "012=}", "the demonstrations hold ' ', '×', not among", "'012=}'"),
        ("1+2=", "012+=", "'}'"),
        ("1+2=", "012+=}é", "'é'", "ASCII"),
    ):
        demonstration = lambda *_, text=text: (text, "\\boxed{1}")
        ends_in_one_line(capsys, partial(make.make_model, args, demonstration, characters), *words)
    tokenizer = make.make_tokenizer("12 =}")
    ids = tokenizer("1  2 = \\boxed{1}").input_ids
    assert len(ids) == 10 and tokenizer.decode(ids) == "1  2 = \\boxed{1}"


@whole
def test_the_world_in_the_docstring(tmp_path, monkeypatch, capsys):
    """Pasted, and made with few steps; then both stages, by the files of flags that it writes."""
    text = make.__doc__.split("is a file beside train.py:")[1]
    monkeypatch.setattr(make, "make_world", partial(make.make_world, steps=2))
    monkeypatch.setattr("sys.argv", ["backwards"])
    exec(textwrap.dedent(text).replace("out/backwards", str(tmp_path)), {})
    words = capsys.readouterr().out
    loss = float(re.search(r"256 new demonstrations −ln π is (\d\.\d+) a token", words)[1])
    assert 2 < loss < 4 and "equally likely: 2.708" in words  # ln 15
    train, test = (read_jsonl(tmp_path / f"{name}.jsonl") for name in ("train", "test"))
    assert [len(train), len(test)] == [1024, 512]
    assert not {row["question"] for row in train} & {row["question"] for row in test}
    inside("vstar.py", f"@{tmp_path}/vstar.args", "--limit=8", "--samples=2", "--max_new_tokens=4")
    inside("train.py", f"@{tmp_path}/train.args", "--steps=1", "--batch_size=8", "--eval_limit=8")
    assert (tmp_path / "run/model").exists()


@long
def test_make_makes_the_same_files_twice(tmp_path):
    small = ["--steps=3", "--train=20", "--test=10", "--digits", 2, 5, "--hidden=64"]
    both = [start("tiny/make.py", *small, f"--out={tmp_path / name}") for name in "ab"]
    assert [process.wait() for process in both] == [0, 0]
    files = sorted(path.relative_to(tmp_path / "a")
                   for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert {"train.jsonl", "test.jsonl", "vstar.args"} <= {str(file) for file in files}
    for file in files:
        one, other = ((tmp_path / name / file).read_bytes() for name in "ab")
        assert one == other.replace(bytes(tmp_path / "b"), bytes(tmp_path / "a")), file
