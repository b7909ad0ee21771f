"""First contact at toy size: every part that a CPU can run, and what each is there to notice."""

import importlib.util
import json
import shutil
import sys
from contextlib import chdir
from types import SimpleNamespace

import pytest
import torch

import train
import vstar
from experiments import gpu
from tests.helpers import HERE, long, refused, run

on_cpu = dict(CUDA_VISIBLE_DEVICES="")


@pytest.fixture(scope="module")
def contact(tmp_path_factory):
    """→ the folder of all parts, and what was said"""
    out = tmp_path_factory.mktemp("gpu")
    return out, run("-m", "experiments.gpu", "--toy", f"--out={out}", **on_cpu).stdout


@long
def test_every_part_runs_at_toy_size(contact):
    out, said = contact
    found = json.loads((out / "gpu.json").read_text())
    assert set(found) == {"machine", "difference", *gpu.PARTS}
    skipped = [] if importlib.util.find_spec("vllm") else ["vllm"]
    assert [part for part in gpu.PARTS if "skipped" in found[part]] == skipped
    assert all(found[part]["holds"] for part in ("difference", "restart", "transformers"))
    assert found["restart"]["steps_alike_to_the_bit"] == found["restart"]["steps"] == 2
    full, lora = (found["phases"][way] for way in ("apo", "apo --lora=16"))
    measured = ("sampling", "update", "tokens_per_second", "mfu", "peak_gib")
    assert min(way[key] for way in (full, lora) for key in measured) > 0
    assert lora["planned_gib"] < full["planned_gib"]
    # what is there is not run again
    when = {path: path.stat().st_mtime_ns for path in out.glob("*.log")}
    assert run("-m", "experiments.gpu", "--toy", f"--out={out}", **on_cpu).stdout == said
    assert all(path.stat().st_mtime_ns == time for path, time in when.items())


@long
def test_a_restart_that_forgets_does_not_hold(contact, tmp_path, monkeypatch):
    out = shutil.copytree(contact[0], tmp_path / "forgot")
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(train, "load_checkpoint", lambda *_: None)  # π is π_ref again
    with chdir(HERE):
        assert not gpu.restart(SimpleNamespace(out=out, toy=True))["holds"]


@long
@pytest.mark.skipif(torch.cuda.is_available(), reason="toy size is meant for a CPU")
def test_an_engine_with_old_weights_does_not_hold(contact, tmp_path, monkeypatch):
    """Its log-probabilities stay those of the first weights."""
    out = shutil.copytree(contact[0], tmp_path / "stale")
    monkeypatch.setattr(sys, "argv", sys.argv)
    first = train.Policy(vstar.load_model(str(HERE / "tiny/model"), None, "bfloat16", "cpu"))

    monkeypatch.setattr(vstar.TransformersSampler, "wake", lambda self, _: setattr(self, "model", first))
    with chdir(HERE):
        found = gpu.engine(SimpleNamespace(out=out, toy=True), "transformers")
    assert not found["holds"] and not torch.distributed.is_initialized()
    assert found["after 0 updates"]["off_the_trainer"] < 0.01  # π is π_ref still
    last = found["after 2 updates"]
    assert last["off_the_trainer"] > 10 * last["off_the_first_weights"]


def test_accuracies_that_differ_do_not_hold():
    accuracies = lambda bf16: gpu.difference(dict(accuracy=bf16), dict(accuracy=0.95))
    assert accuracies(0.93)["holds"] and not accuracies(0.88)["holds"]


@long
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_gpu_it_says_so(tmp_path):
    refused(run("-m", "experiments.gpu", f"--out={tmp_path}", check=False), "no CUDA GPU", "--toy")
