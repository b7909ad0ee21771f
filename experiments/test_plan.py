"""The plan against what an update allocates, against sums by hand, and as a user asks for it."""

import numpy as np
import pytest
import torch
import transformers

import train
from experiments import lab, plan
from experiments.baselines import GRPO, PPO, REBEL
from tests.helpers import (
    HERE,
    inside,
    long,
    read_jsonl,
    refused,
    run_of,
    small_model,
    some_args,
    tiny_model,
    whole,
)
from vstar import Completion


def settled(**more):
    """What Stage 2's plan works with."""
    usual = dict(recompute="auto", engine="transformers", decode_rows=1, width=128)
    usual |= dict(tokens_per_microbatch=1024, lr=1e-6, critic_lr=1e-5, gamma=1, lam=1)
    return some_args(**usual | more)


@whole
@pytest.mark.parametrize("kind,recompute,lora", [
    ("Qwen2", "yes", None),
    ("Llama", "no", 4),
    pytest.param("Qwen2", "no", None, marks=pytest.mark.long),
    pytest.param("GPT2", "yes", None, marks=pytest.mark.long),
    pytest.param("Qwen2", "yes", 4, marks=pytest.mark.long),
])
def test_plan_is_what_an_update_allocates(kind, recompute, lora):
    """Weights, gradients, optimizer, reference, activations: two real updates of two micro-batches each, and
    every allocation counted. With --lora there is one model; gradients and Adam are the additions' alone."""
    args = settled(recompute=recompute, lora=lora, ranks=1, gpu="CPU", dtype="float32")
    objective = train.APO(args)
    make = lambda: small_model(4000, kind, hidden=128, layers=4)
    completion = Completion([*range(1000, 1120)], True, [-1.0] * 120)
    sample = train.Sample(dict(tokens=[*range(8)], vstar=0.5), completion, "", 1.0, 0)
    config, total = make().config, make().num_parameters()
    with plan.Live() as live:
        if lora:
            policy = train.LoraPolicy(make(), lora, torch.float32, 0, recompute == "yes")
        else:
            policy = train.Policy(make(), recompute == "yes")
        reference = policy.unadapted if lora else train.Policy(make()).requires_grad_(False)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
        run = run_of(objective, policy, reference, optimizer)
        policy.block_bytes = 1  # or the first micro-batch would measure them
        for _ in range(2):
            train.update(run, [sample] * 16, objective.constants(run, [sample] * 16))
    learned = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    parts = plan.memory(plan.Shape(config, total, 0, 0, 0, 0), args, objective)
    assert plan.peak(parts) * 2**30 == pytest.approx(live.most, rel=0.15)
    assert parts["AdamW (fp32)"] * 2**30 == 8 * learned and parts["gathered by FSDP"] == 0
    assert parts["activations"] > 0.2 * plan.peak(parts)  # not only weights


@whole
def test_plan_of_shards_by_hand(tmp_path):
    """Each of four GPUs has a quarter; bf16 gathers two bytes a weight, and gradients are summed in four."""
    small_model(4000, hidden=128, layers=4).config.save_pretrained(tmp_path)  # the config alone, no weights
    args = settled(engine="vllm", gpu_memory=0.5, ranks=4, gpu="H100", dtype="bfloat16")
    shape = plan.load_shape(str(tmp_path))
    assert shape.rest == 2 * 4000 * 128 + 128  # embedding, head and the last norm
    # 4 attention matrices, 3 biases, 3 matrices of the MLP, 2 norms
    matrices = 2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 256
    assert shape.block == matrices + (128 + 64 + 64) + 2 * 128
    assert shape.total == shape.rest + 4 * shape.block
    assert shape.read == shape.total - 4000 * 128

    def parts(objective):
        found = plan.memory(shape, args, objective(args))
        return {name: size * 2**30 for name, size in found.items()}

    ours, both = parts(train.APO), parts(PPO)
    assert ours["weights (fp32)"] == ours["gradients (fp32)"] == shape.total
    assert ours["AdamW (fp32)"] == 2 * shape.total
    assert ours["reference"] == shape.total / 2 and ours["sampling"] == 40 * 2**30
    weights = 2 * (2 * shape.block + shape.rest)
    assert ours["gathered by FSDP"] == weights + 6 * (shape.block + shape.rest)
    assert both["weights (fp32)"] == 2 * shape.total  # a critic learns too
    args.lora = 8  # the base in bf16, additions of rank 8 to seven layers of four blocks; no gradients wait
    ours, both = parts(train.APO), parts(PPO)
    added = 4 * 8 * (2 * (128 + 128) + 2 * (128 + 64) + 3 * (128 + 256))
    assert ours["weights (fp32)"] == ours["gradients (fp32)"] == added and ours["AdamW (fp32)"] == 2 * added
    assert ours["reference"] == shape.total / 2
    assert ours["gathered by FSDP"] == weights
    assert both["weights (fp32)"] == added + shape.total  # a critic is trained whole


def test_plan_of_seconds_by_hand():
    """Eight H100s and a model of 10⁹ weights: two layers, 16 heads of 64, keys and values too."""
    config = transformers.Qwen2Config(hidden_size=1024, num_hidden_layers=2, num_attention_heads=16,
                                      num_key_value_heads=16, vocab_size=1000)
    shape = plan.Shape(config, 10**9, 2, 5 * 10**8, 0, 10**9)
    args = settled(batch_size=128, decode_rows=256, tokens_per_microbatch=2400, max_new_tokens=400, ranks=8,
                   gpu="H100", dtype="bfloat16", recompute="yes")
    floor = lambda objective: plan.step_floor(shape, args, objective(args), 100, 200)
    found, ring = floor(train.APO), 1e9 * 7 / 8 / 450e9
    cache = 2 * 2 * 1024 * 2  # bytes a token: keys and values, layers, width, bf16
    # each GPU: 16 answers; 400 times all weights; 200 times the keys and values of 100 to 300 tokens
    read = (400 * 2e9 + 16 * 200 * cache * 200) / 3.35e12
    assert found["sampling"] == pytest.approx(read + 2 * ring)
    forward = 16 * (2e9 * 300 + 2 * 1000 * 1024 * 200 + 2 * 2 * 1024 * 300**2) / 989e12
    assert [found["reference"], found["update"]] == pytest.approx([forward, 4 * forward])
    # two micro-batches: the policy's weights twice in bf16 and their gradients in fp32, π_ref's weights once
    assert found["communication"] == pytest.approx(2 * (2 + 2 + 4 + 2) * ring)
    args.lora = 8  # frozen weights get no gradient: neither its third of the backward pass nor its sum
    less = floor(train.APO)
    assert [less["update"], less["communication"]] == pytest.approx([3 * forward, 2 * 6 * ring])
    args.engine = "vllm"  # which holds the merged weights in fp32, and keys and values too
    assert floor(train.APO)["sampling"] == pytest.approx(2 * read + 2 * ring)
    args.lora, args.engine = None, "transformers"
    # a critic learns too; its values and the old log-probabilities are two passes more
    both = floor(PPO)
    assert [both["update"], both["reference"]] == pytest.approx([8 * forward, 3 * forward])


def test_plan_of_kept_activations():
    """As many blocks as fit into nine tenths of the memory, beside a vLLM that stays awake where it fits."""
    config = transformers.Qwen2Config(hidden_size=1024, num_hidden_layers=4, num_attention_heads=16,
                                      num_key_value_heads=16, intermediate_size=4096, vocab_size=1000)
    shape = plan.Shape(config, 10**8, 4, 2 * 10**7, 0, 10**8)
    kept = {}
    for share in (0.2, 0.4, 0.9):
        args = settled(tokens_per_microbatch=2**18, width=2**10, ranks=1, gpu="H100", dtype="bfloat16",
                       engine="vllm", gpu_memory=share)
        kept[share] = plan.kept_blocks(shape, args, train.APO(args))
    # 43 bytes for each dimension of each token are 10.7 GiB a block; an update takes 24.1 GiB, and of the 80
    # 8 and OVERHEAD are left: room for 45.9, 16 or 32 of it for vLLM
    assert kept == {0.2: (2, True), 0.4: (1, True), 0.9: (4, False)}


def test_each_objective_is_asked_for_its_networks():
    """(trained, run before the update): PPO's critic, and the old policy where several updates follow."""

    def networks(objective, **more):
        return plan.networks_of(objective(settled(group=4, dr_grpo=False, **more)))

    assert networks(train.APO) == networks(GRPO) == networks(REBEL) == (1, 1)
    assert networks(GRPO, passes=2) == networks(REBEL, minibatches=2) == (1, 2)
    assert networks(PPO) == (2, 3)


@pytest.fixture
def planned(tmp_path):
    """What is said of Qwen2.5-7B, of which the config is enough; perhaps with fewer layers."""

    def ask(*flags, layers=28, check=True):
        folder = tmp_path / str(layers)  # one each: the plan reads a folder's config once
        config = lab.config_of("7B")
        config.num_hidden_layers, config.layer_types = layers, None
        config.save_pretrained(folder)
        return inside("-m", "experiments.plan", *flags, f"--model={folder}", check=check)

    return ask


@long
def test_plan_says_what_would_fit(planned):
    words = planned("8xH100").stdout
    assert "7,615,616,512 parameters" in words and "it fits into 78 GiB" in words
    assert "it fits" in planned("1xH100", "--lora=16").stdout
    would = "it does not fit; it would with "
    assert f"{would}4 GPUs\n" in planned("1xH100").stdout
    assert f"{would}--gpu_memory 0.2\n" in planned("8xH100", "--gpu_memory=0.1").stdout
    small = planned("1xL4", "--lora=16").stdout
    assert f"{would}--engine transformers and --decode_rows 32 and --tokens_per_microbatch 1224\n" in small


@whole
def test_plan_of_a_short_model(planned):
    words = planned("8xH100", "--steps=10", layers=2).stdout
    assert "a step of 256 answers (200 + 512 tokens)" in words and "10 steps: at least" in words
    words = planned("8xH100", "--algorithm=grpo", "--group=4", "--batch_size=32", layers=2).stdout
    assert "--algorithm grpo" in words and "a step of 128 answers" in words


@whole
def test_plan_of_what_stage1_wrote(all_rows, monkeypatch):
    """Model and lengths are Stage 1's."""
    words = inside("-m", "experiments.plan", f"--vstar={all_rows}").stdout
    assert f"tiny/model: {tiny_model().num_parameters():,} parameters, 1 × CPU" in words
    monkeypatch.chdir(HERE)
    args = train.make_parser(train.APO).parse_args([f"--vstar={all_rows}"])
    prompt, completion = plan.lengths_of_stage1(args)
    rows = read_jsonl(all_rows)
    assert completion == np.mean([row["lengths"] for row in rows])
    assert prompt == np.mean([len(row["prompt"]) for row in rows])  # a token a character


def test_what_the_plan_needs(planned, tmp_path):
    """Either a model or what Stage 1 wrote; no problems, and no file."""
    words = inside("-m", "experiments.plan", "--help").stdout
    assert "What Stage 2 will hold" in words and "--prompt_tokens" in words and "V̂* holds" not in words
    done = inside("-m", "experiments.plan", "8xH100", f"--vstar={tmp_path}/v.jsonl", check=False)
    refused(done, "--model", "--vstar", f"{tmp_path}/v.jsonl: no such file")
    words = planned("8xH100", f"--vstar={tmp_path}/v.jsonl", "--prompt_tokens=90", layers=2).stdout
    assert "(90 + 512 tokens)" in words


def test_bad_machines(planned):
    refused(planned("8xT800", check=False), "8xT800", "H100")
    refused(planned("0xH100", check=False), "0xH100", "H100")
    refused(planned("8xH100", "--algorithm=dpo", check=False), "--algorithm", "dpo")
    refused(planned("8xH100", "--n=4", check=False), "unrecognized arguments: --n=4")
