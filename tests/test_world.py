"""tiny/: the embedded world."""

import random

import numpy as np

import rewards
from tests.helpers import HERE, long, start


def test_tiny_world():
    taught, tested = (rewards.load_problems(str(HERE / f"tiny/{split}.jsonl")) for split in ("train", "test"))
    assert len(taught) >= 1024 and len(tested) == 512
    assert not {problem["question"] for problem in taught} & {problem["question"] for problem in tested}
    for problem in taught + tested:
        a, b = problem["question"].rstrip("=").split("+")
        assert int(a) + int(b) == int(problem["answer"])
    files = [path for path in (HERE / "tiny").rglob("*") if "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 2_000_000


def test_worked_demonstrations(monkeypatch):
    monkeypatch.syspath_prepend(HERE / "tiny")
    import make

    worked = lambda *sum: make.worked(random.Random(0), *sum, 0)
    assert worked(482, "+", 795) == "2+5=7;8+9=17;4+7+1=12;\\boxed{1277}"
    assert worked(55, "+", 45) == "5+5=10;5+4+1=10;\\boxed{100}"
    assert worked(482, "-", 295) == "12-5=7;17-9=8;3-2=1;\\boxed{187}"
    assert worked(500, "-", 499) == "10-9=1;9-9=0;4-4=0;\\boxed{1}"
    rng = random.Random(0)
    right = [make.worked(rng, 482, "+", 795, 0.04).endswith("{1277}")
             for _ in range(3000)]
    assert abs(np.mean(right) - 0.96**3) < 0.02


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
