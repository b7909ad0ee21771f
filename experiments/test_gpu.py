"""First contact at toy size: every part that a CPU can run, and what each is there to notice."""

import importlib.util
import json
import shutil
import signal
import sys
from contextlib import chdir, nullcontext
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import rewards
import train
import vstar
from experiments import gpu
from test_apo import HERE, dist, long, run, sampler_of, small_model

needs_no_gpu = pytest.mark.skipif(gpu.GPU, reason="toy size is meant for a CPU")
VLLM = [part for part in gpu.PARTS if part.endswith("vllm")]
MISSING = VLLM if importlib.util.find_spec("vllm") is None else []  # skipped where it is not installed


def start(out, *more):
    return run("-m", "experiments.gpu", f"--out={out}", *more, CUDA_VISIBLE_DEVICES="")


@pytest.fixture(scope="module")
def contact(tmp_path_factory):
    """All parts but one in this process, which saves their starts; then a start that finds them. → folder, its words"""
    out = tmp_path_factory.mktemp("gpu")
    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch, chdir(HERE):
        patch.setattr(sys, "argv", sys.argv)
        for module, name in ((rewards, "reward"), (train, "save_checkpoint")):
            patch.setattr(module, name, getattr(module, name))  # which the four algorithms' parts replace
        for part in gpu.PARTS:
            if part not in ["fp32", *VLLM]:
                gpu.one(SimpleNamespace(out=out, toy=True, part=part))
    for number, handler in signals.items():
        signal.signal(number, handler)
    when = {path: path.stat().st_mtime_ns for path in out.glob("*.json")}
    said = start(out, "--toy").stdout
    assert all(path.stat().st_mtime_ns == time for path, time in when.items())  # what is there is not run again
    return out, said


@long
def test_every_part_runs_at_toy_size(contact):
    out, said = contact
    merged = json.loads((out / "gpu.json").read_text())
    assert set(merged) == {"machine", "difference", *gpu.PARTS}
    assert [part for part in gpu.PARTS if "skipped" in merged[part]] == MISSING and "failed" not in said
    assert all(f"\n{part} " in f"\n{said}" for part in merged if part != "machine")
    held = {part for part in merged if merged[part].get("holds")}
    assert held >= {"difference", "restart", "transformers", "decode"} and "DOES NOT HOLD" not in said
    assert merged["restart"]["steps_alike_to_the_bit"] == merged["restart"]["steps"] == 2
    measured = ("sampling", "update", "tokens_per_second", "stage1_tokens_per_second", "mfu", "peak_gib")
    for part in ("apo", "ppo", "grpo", "rebel", "apo-lora", *["apo-vllm"] * (not MISSING)):
        assert min(merged[part][key] for key in measured) > 0
    # the masters and AdamW's states of a critic too
    assert merged["ppo"]["planned_gib"] > merged["apo"]["planned_gib"] == merged["grpo"]["planned_gib"]
    assert merged["apo-lora"]["planned_gib"] < merged["apo"]["planned_gib"]


@long
def test_a_restart_that_forgets_does_not_hold(contact, tmp_path, monkeypatch):
    out = shutil.copytree(contact[0], tmp_path / "forgot")
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(train, "load_checkpoint", lambda *_: None)  # π is π_ref again
    with chdir(HERE):
        assert not gpu.restart(SimpleNamespace(out=out, toy=True))["holds"]


@long
@needs_no_gpu
def test_without_a_gpu_every_part_says_so(tmp_path):
    said = start(tmp_path).stdout
    assert len(said.splitlines()) == len(gpu.PARTS) == said.count("skipped no CUDA GPU")
    assert not (tmp_path / "gpu.json").exists()


@long
@needs_no_gpu
def test_an_engine_with_old_weights_does_not_hold(contact, tmp_path, monkeypatch):
    """Its log-probabilities stay those of the first weights."""
    out = shutil.copytree(contact[0], tmp_path / "stale")
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(vstar.TransformersSampler, "holding", lambda self, policy: setattr(
        self, "model", self.model or train.Policy(vstar.load_model("tiny/model", None, "bfloat16", "cpu"))) or
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


class Recorded:
    """A CUDA graph as far as the loop can tell: what is recorded does not happen, and happens at each replay."""

    replayed = 0

    def __init__(self, *_):
        pass

    def replay(self):
        Recorded.replayed += 1
        Recorded.step()

    def __enter__(self):
        values = sys._getframe(1).f_locals
        Recorded.step = staticmethod(values["step"])
        tensors = [value for value in values.values() if isinstance(value, torch.Tensor)]
        tensors += [x for layer in values["cache"].layers for x in (layer.keys, layer.values, layer.cumulative_length)]
        self.kept = [(tensor, tensor.clone()) for tensor in tensors]

    def __exit__(self, *_):
        for tensor, before in self.kept:
            tensor.copy_(before)


def test_a_recorded_loop_writes_every_token(monkeypatch):
    for name, fake in dict(Stream=mock.MagicMock(), current_stream=mock.MagicMock(), stream=nullcontext, graph=Recorded,
                           CUDAGraph=Recorded).items():
        monkeypatch.setattr(torch.cuda, name, lambda *given, fake=fake: fake(*given))
    model, prompts, seeds = small_model(), [[1, 2, 3], [9]], [5, 6]
    expected = gpu.fixed_loop(model, prompts, seeds, 12, record=False)[:2]
    assert gpu.fixed_loop(model, prompts, seeds, 12, record=True)[:2] == expected
    assert Recorded.replayed == 12 - 3  # one token by the prompt's pass, two before the recording


def test_accuracies_that_differ_do_not_hold():
    accuracies = lambda bf16: gpu.difference(dict(accuracy=bf16), dict(accuracy=0.95))
    assert accuracies(0.93)["holds"] and not accuracies(0.88)["holds"]


def test_what_does_not_fit_is_skipped(monkeypatch):
    monkeypatch.setattr(gpu, "GPU", True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=24 << 30))
    assert gpu.room(23) is None and gpu.room(55) == dict(skipped="it needs 55 GiB, the GPU has 24")
