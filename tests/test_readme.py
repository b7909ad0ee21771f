"""The READMEs keep their word: flags exist, links lead somewhere, line numbers point at what they name."""

import re
import shlex

import pytest

import evaluate
import train
import vstar
from experiments import baselines
from tests.helpers import HERE, inside, long, metrics, read_jsonl

FILES = [HERE / name for name in ("README.md", "AGENTS.md", "experiments/README.md",
                                  "experiments/recipes/README.md")]
of_train = lambda: train.make_parser(train.APO)
PARSERS = {"vstar.py": vstar.make_parser, "evaluate.py": evaluate.make_parser, "train.py": of_train,
           "reinforce.py": of_train}


def text_of(path):
    return path.read_text(encoding="utf-8")


def anchors_of(text):
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.strip().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(HERE)))
def test_every_link_leads_somewhere(path):
    text = text_of(path)
    for name, target in re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        found = path.parent / file if file else path
        assert found.exists(), target
        if re.fullmatch(r"L\d+", anchor):
            line = text_of(found).splitlines()[int(anchor[1:]) - 1]
            assert re.match(rf"(def|class) {name.strip('`')}\b", line), (target, line)
        elif anchor:
            assert anchor in anchors_of(text_of(found)), target


@pytest.mark.parametrize("path", FILES[:3], ids=lambda path: str(path.relative_to(HERE)))
def test_every_file_that_is_named_exists(path):
    """(The recipes name files of the authors' release, too.)"""
    own = {"mine.py", "reinforce.py"}  # the reader's
    for name in re.findall(r"`([\w./]+\.(?:py|args|md|txt))`", text_of(path)):
        places = [HERE / name, path.parent / name, HERE / "experiments" / name]
        assert name in own or any(place.exists() for place in places), name


def commands(text):
    """Those of the four scripts, in blocks and in the running text: [(script, flags)]"""
    text = text.replace("\\\n", " ")
    scripts = "|".join(map(re.escape, PARSERS)) + r"|-m experiments\.\w[\w.]*"
    for line in re.split(r"`|\n(?=\w)|&&|\|\s", re.sub(r"(?<=\w)\n(?=[@-])", " ", text)):
        found = re.match(rf"\s*(?:python|torchrun[^`]*?)\s+({scripts})\s*(.*)", line, re.S)
        if found:
            try:
                yield found[1], shlex.split(found[2].split(" →")[0].split("   ")[0], comments=True)
            except ValueError:
                continue  # prose


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(HERE)))
def test_every_flag_of_a_command_exists(path):
    count = 0
    for script, flags in commands(text_of(path)):
        if script in PARSERS:
            known = PARSERS[script]()._option_string_actions
        elif script == "-m experiments.baselines" and flags and flags[0] in baselines.ALGORITHMS:
            known = train.make_parser(baselines.ALGORITHMS[flags[0]])._option_string_actions
        else:
            continue
        for flag in flags:
            name = flag.partition("=")[0]
            if name.startswith("--"):
                assert name in known, (script, flag)
                count += 1
            elif flag.startswith(("@tiny", "@experiments")):
                assert (HERE / flag[1:]).exists(), flag
    assert count > 10 or path.name != "README.md" or path.parent != HERE


def test_the_readme_is_short():
    text = re.sub(r"```.*?```", "", text_of(HERE / "README.md"), flags=re.S)
    prose = [line for line in text.splitlines() if not line.strip().startswith("|")]
    assert len(" ".join(prose).split()) <= 1600
    assert len(text_of(HERE / "AGENTS.md").splitlines()) <= 25


def test_the_exercises_name_tests():
    found = re.findall(r"`pytest test_apo\.py -k \"?([\w ]+)\"?`", text_of(HERE / "README.md"))
    tests = re.findall(r"^def (test_\w+)", text_of(HERE / "test_apo.py"), re.M)
    words = [word for line in found for word in line.split(" or ")]
    assert len(found) == 4 and all(any(word in test for test in tests) for word in words), words


@long
def test_the_reference_run_is_what_the_code_writes(tmp_path):
    """Its first rows; on another processor a completion or two may differ."""
    inside("vstar.py", "@tiny/vstar.args", f"--out={tmp_path}/vstar.jsonl")
    inside("train.py", "@tiny/train.args", f"--vstar={tmp_path}/vstar.jsonl", f"--out={tmp_path}/run",
           "--steps=2", "--show_every=0")
    reference = read_jsonl(HERE / "experiments/results/metrics.jsonl")
    assert len(reference) == 121
    for ours, row in zip(metrics(tmp_path / "run"), reference[:2]):
        for key in ("accuracy", "loss", "entropy", "length", "reward", "vstar", "grad_norm"):
            if key in ours:
                assert ours[key] == pytest.approx(row[key], rel=0.02), key
