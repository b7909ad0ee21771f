"""The real vLLM, where it can run."""

import json
import os
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import rewards
import train
import vstar
from test_apo import naive_logps
from tests.helpers import (
    HERE,
    TINY,
    long,
    metrics,
    read_jsonl,
    refused,
    run,
    sampler_of,
    stage2,
    tiny_model,
    tiny_tokenizer,
    torchrun,
    whole,
)

pytestmark = whole


@pytest.fixture(scope="module")
def engine():
    """vLLM's sampler, the prompts of 128 problems, and `push`: gives it other weights."""
    platforms = pytest.importorskip("vllm.platforms", reason="vLLM is not installed")
    if platforms.current_platform.is_unspecified():
        pytest.skip("there is no GPU, and this is not vLLM's CPU build")
    args = SimpleNamespace(model=str(HERE / "tiny/model"),
                           revision=None, dtype="float32", seed=0, gpu_memory=0.3,
                           temperature=1.0, max_new_tokens=64)
    with mock.patch.dict(os.environ):  # into which vLLM writes what other processes should not find
        sampler = vstar.VLLMSampler(args, [0], 128, training=True)
    if sampler.sleeps:
        sampler.llm.wake_up()

    def push(weights):
        sampler.load(weights)
        sampler.llm.reset_prefix_cache()

    problems = read_jsonl(HERE / "tiny/test.jsonl")[:128]
    prompts = [rewards.encode(tiny_tokenizer(), problem["question"], False) for problem in problems]
    return SimpleNamespace(sampler=sampler, prompts=prompts, push=push)


def off(model, prompt, copy):
    """The largest difference between the engine's ln π of a token and a plain forward pass's."""
    naive = naive_logps(model, prompt, copy.tokens)
    return (naive - torch.tensor(copy.logps)).abs().max()


def tokens_of(completions):
    return [[copy.tokens for copy in copies] for copies in completions]


def test_vllm_greedy_completions_are_transformers(engine):
    greedy = sampler_of(tiny_model(), 64, temperature=0)
    theirs = greedy.generate(engine.prompts, 1, [0] * 128)
    with mock.patch.dict(engine.sampler.sampling, temperature=0.0):
        ours = engine.sampler.generate(engine.prompts, 1, [0] * 128)
    assert tokens_of(ours) == tokens_of(theirs)
    assert all(copy.finished and copy.tokens[-1] == 0 for copies in ours for copy in copies)


def test_vllm_logps_are_a_forward_pass(engine):
    model = tiny_model()
    completions = engine.sampler.generate(engine.prompts, 2, list(range(128)))
    assert len({tuple(tokens) for copies in tokens_of(completions) for tokens in copies}) > 200
    for prompt, copies in zip(engine.prompts, completions):
        assert all(off(model, prompt, copy) < 1e-3 for copy in copies)


def test_vllm_completions_are_functions_of_their_seeds(engine):
    """In whatever chunks they stand, all in one queue, and from whichever copy on."""
    prompts = engine.prompts[:16]
    one, other = (engine.sampler.generate(prompts, 3, seeds)
                  for seeds in (range(16), range(100, 116)))
    chunks = [(prompts[:10], range(10), 0),
              (prompts[10:], range(10, 16), 1)]
    done = dict(engine.sampler.stream(chunks, 3))
    assert tokens_of(done[0]) == tokens_of(one[:10]) != tokens_of(other[:10])
    assert tokens_of(done[1]) == tokens_of(copies[1:] for copies in one[10:])


def test_vllm_takes_new_weights(engine):
    """All of them, as train.py gives them: under vLLM's names, a tied head twice."""
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) * parameter.std())
    engine.push(train.Policy(model).checkpoint_weights(torch.float32))
    completions = engine.sampler.generate(engine.prompts[:32], 1, range(32))
    for prompt, (copy,) in zip(engine.prompts, completions):
        assert off(model, prompt, copy) < 1e-4 < off(tiny_model(), prompt, copy)
    engine.push(tiny_model().state_dict().items())


def test_weights_that_have_not_changed_are_not_pushed_again(engine, monkeypatch):
    """As where an evaluation comes right before a step."""
    pushes, sampler, policy = [], engine.sampler, train.Policy(tiny_model())
    load = lambda self, weights, load=vstar.VLLMSampler.load: pushes.append(1) or load(self, weights)
    monkeypatch.setattr(vstar.VLLMSampler, "load", load)
    for count in (2, 2, 2):  # the first push is proved by a second one
        sampler.wake(policy)
        assert len(pushes) == count
    for count in (3, 4):
        sampler.rest()
        sampler.wake(policy)
        assert len(pushes) == count
    sampler.rest()


def test_vllm_is_asked_for_fp32_with_lora(engine, monkeypatch):
    """In bf16 an addition that is smaller than half the distance to the next number would be gone."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    asked = []
    monkeypatch.setattr("vllm.LLM", lambda *_, dtype, **__: asked.append(dtype) or mock.MagicMock())
    sizes = dict(model="", revision=None, seed=0, gpu_memory=0.3, temperature=1.0, max_new_tokens=64)
    for lora in (4, None):
        args = SimpleNamespace(dtype="bfloat16", lora=lora, **sizes)
        vstar.VLLMSampler(args, [0], 128, training=True)
    assert asked == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("arrive,kept,words", [
    (0, "''", "8 of its 8 tensors keep their numbers"),
    (99, "'layers.1.'", "3 of its 8 tensors keep their numbers after a push, such as model.layers.1."),
    (2, "''", "does it still hold old weights")])
def test_vllm_with_old_weights_is_noticed(engine, all_rows, tmp_path, arrive, kept, words):
    """Where no push arrives, or a layer's weights do not, in the engine's own tensors before a first step;
    where all but the first two get lost, by the log-probabilities."""
    load = (f"lambda self, weights, load=vstar.VLLMSampler.load, left=[0] * {arrive}: load(self, "
            f"((n, w) for n, w in weights if {kept} not in n or not {kept})) "
            "if left and not left.pop() else list(weights)")
    stale = (f"import runpy, vstar; vstar.VLLMSampler.load = {load}; "
             "runpy.run_path('train.py', run_name='__main__')")
    more = ["--steps=10", "--batch_size=128", "--eval_every=99", "--engine=vllm"]
    done = run("-c", stale, *stage2(all_rows, tmp_path, *more)[1:], check=False)
    refused(done, words, alone=False)


@long
@pytest.mark.parametrize("ranks", [1, 2])
def test_vllm_trains_like_transformers(engine, all_rows, tmp_path, ranks):
    """After each update the engine samples from the new weights, or `mismatch` would say so."""
    more = ["--steps=6", "--batch_size=64", "--decode_rows=512", "--tokens_per_microbatch=16384"]
    more += ["--eval_limit=128", "--eval_every=6", "--save_every=99"]
    torchrun(ranks, *stage2(all_rows, tmp_path / "v", *more, "--engine=vllm"))
    rows = metrics(tmp_path / "v")
    assert all(0 < row["mismatch"] < 1e-4 for row in rows[1:])
    assert all(row["reference_mismatch"] > 10 * row["mismatch"] for row in rows[2:])
    assert rows[-1]["log_ratio_abs"] > 0.1  # so old weights would be off by far more than that
    if ranks == 1:  # the final model loads in vLLM as it is
        model = ["evaluate.py", f"--model={tmp_path}/v/model", "--data=tiny/test.jsonl", "--limit=128"]
        run(*model, *TINY[2:-1], "--engine=vllm", f"--out={tmp_path}/e")
        (again,) = json.loads((tmp_path / "e/results.json").read_text()).values()
        assert abs(again["tiny/test.jsonl"]["accuracy"] - rows[-1]["accuracy"]) < 0.2  # three standard errors


@long
def test_vllm_samples_with_lora_in_bf16(engine, all_rows, tmp_path):
    """The base is frozen in bf16, and vLLM holds the merged weights in fp32."""
    more = ["--steps=4", "--lora=4", "--lr=1e-3", "--dtype=bfloat16", "--engine=vllm"]
    run(*stage2(all_rows, tmp_path, *more))
    rows = metrics(tmp_path)
    assert all(0 < row["mismatch"] < 0.01 for row in rows[1:])
    assert rows[-1]["reference_mismatch"] > 3 * rows[-1]["mismatch"]
