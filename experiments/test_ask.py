"""Both models' answers to typed questions."""

import json
import os
import shutil

import pytest

from tests.helpers import inside, refused, whole


@pytest.fixture
def ask(trained, monkeypatch):
    def through_a_pipe(text, run=trained[0]):
        end, start = os.pipe()
        os.write(start, text.encode())
        os.close(start)
        with os.fdopen(end) as pipe, monkeypatch.context() as patch:
            patch.setattr("sys.stdin", pipe)
            return inside("-m", "experiments.ask", run, check=False)

    return through_a_pipe


@whole
def test_questions_from_a_pipe(ask):
    """Labelled, in order, the same again for the same question; an empty line is none; the end is quiet."""
    done = ask("2+3=\n\n12+34=\n2+3=")
    assert done.returncode == 0 and not done.stderr
    parts = done.stdout.split("── ")[1:]
    assert [part.split("\n")[0] for part in parts] == ["π_ref", "π"] * 3
    assert parts[:2] == parts[4:] != parts[2:4]
    assert all("\\boxed{" in part for part in parts)


@whole
def test_what_cannot_be_asked(ask, trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "run")
    path = tmp_path / "run/config.json"
    content = json.loads(path.read_text())
    content["settings"]["prompt"] = "{context} {question}"
    path.write_text(json.dumps(content))
    refused(ask("2+3=\n", tmp_path / "run"), "no field 'context'")
    shutil.rmtree(tmp_path / "run/model")
    refused(ask("2+3=\n", tmp_path / "run"), "run/model: no such folder", "at its end")
    refused(ask("2+3=\n", tmp_path / "none"), "none/config.json: No such file")
    refused(ask("2+3=\n", "--help"), "python -m experiments.ask out/run")
