"""First contact at toy size: every part that a CPU can run, and what each is there to notice."""

import importlib.util
import json
import shutil
from contextlib import chdir
from types import SimpleNamespace

import pytest
import torch

import train
import vstar
from experiments import gpu
from test_apo import HERE, dist, run, sampler_of, small_model, whole

needs_no_gpu = pytest.mark.skipif(gpu.GPU, reason="toy size is meant for a CPU")
VLLM = ["vllm"] if importlib.util.find_spec("vllm") is None else []  # skipped where it is not installed


def toy(out, *more, check=True):
    return run("-m", "experiments.gpu", f"--out={out}", *more, check=check, CUDA_VISIBLE_DEVICES="")


@pytest.fixture(scope="module")
def contact(tmp_path_factory):
    out = tmp_path_factory.mktemp("gpu")
    return out, toy(out, "--toy").stdout


@whole
@pytest.mark.long
def test_every_part_runs_at_toy_size(contact):
    out, said = contact
    merged = json.loads((out / "gpu.json").read_text())
    assert set(merged) == {"machine", "difference", *gpu.PARTS}
    assert [part for part in gpu.PARTS if "skipped" in merged[part]] == VLLM and "failed" not in said
    assert all(f"\n{part} " in f"\n{said}" for part in merged if part != "machine")
    held = {part for part in merged if merged[part].get("holds")}
    assert held >= {"difference", "restart", "transformers", "decode"} and "DOES NOT HOLD" not in said
    assert merged["restart"]["steps_alike_to_the_bit"] == merged["restart"]["steps"] == 2
    for part in ("apo", "ppo", "grpo", "rebel"):
        assert min(merged[part][key] for key in ("sampling", "update", "tokens_per_second", "mfu", "peak_gib")) > 0
    # the masters and AdamW's states of a critic too
    assert merged["ppo"]["planned_gib"] > merged["apo"]["planned_gib"] == merged["grpo"]["planned_gib"]


@whole
@pytest.mark.long
def test_only_what_is_missing_runs_again(contact, tmp_path):
    out = shutil.copytree(contact[0], tmp_path / "again")
    when = lambda folder: {part: (folder / f"{part}.json").stat().st_mtime_ns for part in gpu.PARTS}
    (out / "decode.json").unlink()
    before = {**when(contact[0]), "decode": 0}
    assert toy(out, "--toy").returncode == 0
    assert {part for part, time in when(out).items() if time != before[part]} == {"decode", *VLLM}


@whole
@pytest.mark.long
@needs_no_gpu
def test_without_a_gpu_every_part_says_so(tmp_path):
    said = toy(tmp_path).stdout
    assert len(said.splitlines()) == len(gpu.PARTS) == said.count("skipped no CUDA GPU")
    assert not (tmp_path / "gpu.json").exists()


@whole
@pytest.mark.long
@needs_no_gpu
def test_an_engine_with_old_weights_does_not_hold(contact, tmp_path, monkeypatch):
    """Its log-probabilities stay those of the first weights."""
    out = shutil.copytree(contact[0], tmp_path / "stale")
    monkeypatch.setattr(vstar.TransformersSampler, "holding", lambda self, policy: setattr(
        self, "model", self.model or train.Policy(gpu.vstar.load_model("tiny/model", None, "bfloat16", "cpu"))) or
        policy.gathered())
    with chdir(HERE):
        found = gpu.engine(SimpleNamespace(out=out, toy=True), "transformers")
    assert not found["holds"] and not dist.is_initialized()
    assert found["after 0 updates"]["off_the_trainer"] < 0.01  # π is π_ref still
    assert found["after 2 updates"]["off_the_trainer"] > 10 * found["after 2 updates"]["off_the_first_weights"]


@pytest.mark.parametrize("attention", ["sdpa", "grouped"])
def test_the_fixed_loop_writes_what_the_engine_writes(attention):
    """Prompts of unlike length, two heads of queries for each of keys."""
    model, prompts, seeds = small_model(), [[1, 2, 3], [4, 5, 6, 7, 8], [9]], [5, 6, 7]
    expected = [copies[0] for copies in sampler_of(model, 12, eos=(-1,)).generate(prompts, 1, seeds)]
    model.set_attn_implementation(attention)
    tokens, logps, *_ = gpu.fixed_loop(model, prompts, seeds, 12, record=False)
    assert tokens == [completion.tokens for completion in expected]
    torch.testing.assert_close(torch.tensor(logps), torch.tensor([completion.logps for completion in expected]))
    # the engine's own loop with this attention, too
    assert [copies[0].tokens for copies in sampler_of(model, 12, eos=(-1,)).generate(prompts, 1, seeds)] == tokens
    settings = SimpleNamespace(tokens_per_microbatch=100, temperature=1.0)
    assert gpu.off_the_trainer(settings, model, prompts, tokens, logps) < 1e-5
    assert gpu.off_the_trainer(settings, model, prompts, tokens, [[value - 1 for value in row] for row in logps]) > 0.99


def test_accuracies_that_differ_do_not_hold():
    accuracies = lambda bf16: gpu.difference(dict(accuracy=bf16), dict(accuracy=0.95))
    assert accuracies(0.93)["holds"] and not accuracies(0.88)["holds"]


def test_what_does_not_fit_is_skipped(monkeypatch):
    monkeypatch.setattr(gpu, "GPU", True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=24 << 30))
    assert gpu.room(23) is None and gpu.room(55) == dict(skipped="it needs 55 GiB, the GPU has 24")
