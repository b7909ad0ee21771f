"""First contact with a GPU: what holds on a CPU, does it hold there? And how quick is it?

    python -m experiments.gpu                 → experiments/results/gpu.json and a table       (a CUDA GPU)
    python -m experiments.gpu --toy           → out/gpu-toy/gpu.json: every part at toy size, on any CPU

bf16, fp32           the embedded world from start to end; both should reach the same accuracy
restart              the run of bf16 goes on from its last checkpoint but one, in another process: the same numbers?
transformers, vllm   each engine's log-probabilities against the trainer's, before and after real updates; its greedy
                     answers against those of the decode loop, one prompt at a time; what vLLM's sleep gives back
apo, grpo, rebel, ppo   random weights in the shape of Qwen2.5-1.5B, sampled by transformers: seconds by phase, tokens a
                     second, the update's MFU (3 × forward FLOPs, with LoRA 2; recomputation not counted), peak memory
                     and the plan's
apo-lora, apo-vllm   the same with --lora 16, and sampled by vLLM (Stage 1 is sampled once for each engine)
decode               how near the decode loop comes to its floor (speed/limits.py), alone and under FSDP; and the same
                     loop as a CUDA graph over a cache of fixed size, and with attention that copies no keys

Each part is a process of its own and leaves out/gpu/PART.json and PART.log. What is there is not run again; to repeat a
part, remove its file. A part that was skipped is tried again at the next start.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import train
import vstar
from experiments import lab, plan
from experiments.compare import stage1_cost
from experiments.speed import limits, phases
from rewards import fail
from vstar import Completion, TransformersSampler, draw, remove, run_script

GPU = torch.cuda.is_available()


def main():
    parser = lab.make_parser(__doc__)
    parser.add_argument("--out", type=Path, help="the folder of the parts; default: out/gpu, with --toy out/gpu-toy")
    parser.add_argument("--toy", action="store_true", help="toy size, on a CPU too; the numbers mean nothing")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out = (args.out or lab.ROOT / ("out/gpu-toy" if args.toy else "out/gpu")).resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.part:
        return one(args)
    found = {}
    for part in PARTS:
        found[part] = finished(args, part) or why_not(args, part) or start(args, part)
        print(line(part, found[part]), flush=True)
    if all("accuracy" in found[part] for part in ("bf16", "fp32")):
        found["difference"] = difference(found["bf16"], found["fp32"])
        print(line("difference", found["difference"]))
    if GPU or args.toy:
        lab.save(args.out / "gpu" if args.toy else "gpu", **found)
    if any("failed" in result or not result.get("holds", True) for result in found.values()):
        fail("not all of it holds")


# ---------------------------------------------------------------------------------------------------------------------
# parts, each in its own process


def finished(args, part):
    """What an earlier start has left of a part, unless it was skipped."""
    path = args.out / f"{part}.json"
    result = json.loads(path.read_text()) if path.exists() else None
    return result if result and "skipped" not in result else None


def why_not(args, part):
    """What a part lacks on this machine. (Whether it has room, and a run to go on with, it sees for itself.)"""
    if not GPU and not args.toy:
        return dict(skipped="no CUDA GPU (--toy runs every part at toy size on a CPU)")
    if part.endswith("vllm"):
        found, why = vstar.pick_engine("auto")
        return None if found == "vllm" else dict(skipped=why)


def start(args, part):
    command = [sys.executable, "-m", __spec__.name, "--part", part, "--out", args.out, *["--toy"] * args.toy]
    with open(args.out / f"{part}.log", "w") as log:
        code = subprocess.run(command, cwd=lab.ROOT, stdout=log, stderr=subprocess.STDOUT).returncode
    return dict(failed=f"see {log.name}") if code else json.loads((args.out / f"{part}.json").read_text())


def one(args):
    began = time.perf_counter()
    result = PARTS[args.part](args)
    result["part_seconds"] = time.perf_counter() - began
    vstar.write_whole(args.out / f"{args.part}.json", json.dumps(result))


def line(part, result):
    """A row of the table; what has numbers of its own gets a line each."""
    result = dict(result)
    verdict = {True: "holds", False: "DOES NOT HOLD", None: ""}[result.pop("holds", None)]
    numbers = lambda some: ", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                                     for name, value in some.items() if not isinstance(value, dict))
    inner = [f"\n{'':29s}{name}: {numbers(some)}" for name, some in result.items() if isinstance(some, dict)]
    return f"{part:14s}{verdict:15s}{numbers(result)}" + "".join(inner)


def script(module, *flags):
    """A script's main() in this process."""
    sys.argv = [module.__name__, *map(str, flags)]
    module.main()


# ---------------------------------------------------------------------------------------------------------------------
# the embedded world


def stage1(args):
    """The same V̂* for all parts. Sampled once."""
    path = args.out / "world/vstar.jsonl"
    toy = ["--limit=256", "--samples=2"] if args.toy else []
    script(vstar, "@tiny/vstar.args", "--engine=transformers", "--dtype=float32", f"--out={path}", *toy)
    return path


def train_world(args, dtype, out):
    toy = ["--steps=4", "--batch_size=32", "--save_every=2", "--eval_every=2", "--eval_limit=64"] if args.toy else []
    script(train, "@tiny/train.args", "--engine=transformers", f"--dtype={dtype}", f"--vstar={stage1(args)}",
           f"--out={out}", "--show_every=0", *toy)
    return lab.read(out / "metrics.jsonl")


def world(args, dtype):
    rows = train_world(args, dtype, args.out / "world" / dtype)
    measured = lab.accuracies(rows)
    steps = [row for row in rows if row["step"] > 1]
    return dict(accuracy=measured[-1], accuracy_before=measured[0], mismatch=max(row["mismatch"] for row in steps),
                seconds_a_step=float(np.mean([lab.seconds_of(row) for row in steps])))


def difference(bf16, fp32):
    """Twice as far apart as two of five seeds were (0.02) would be too far."""
    apart = bf16["accuracy"] - fp32["accuracy"]
    return dict(holds=abs(apart) < 0.04, bf16_minus_fp32=apart)


def restart(args):
    first, again = args.out / "world/bfloat16", args.out / "world/again"
    if not (first / "model").exists():
        return dict(skipped="it goes on with the run of part bf16, which is not there")
    remove(again)
    shutil.copytree(first, again)
    remove(train.saved(again)[-1])
    remove(again / "model")
    before, old = train.last_checkpoint(again), lab.read(first / "metrics.jsonl")
    new = train_world(args, "bfloat16", again)
    # the next step is a function of the checkpoint alone; later ones also of how a GPU's sums happen to be ordered
    own = [[{key: value for key, value in row.items() if key not in ("seconds", "tokens_per_second", "memory_gb")}
            for row in rows if row["step"] > before] for rows in (old, new)]
    off = max(abs(own[0][0][key] - own[1][0][key]) / (abs(own[0][0][key]) + 1e-3) for key in own[0][0])
    return dict(holds=len(own[0]) == len(own[1]) and off < 0.01, went_on_after=before, next_step_off_by=off,
                steps=len(own[0]), steps_alike_to_the_bit=sum(one == other for one, other in zip(*own)))


# ---------------------------------------------------------------------------------------------------------------------
# the engines


def engine(args, name):
    flags = [f"--vstar={stage1(args)}", f"--engine={name}", "--dtype=bfloat16", "--lr=3e-3", "--gpu_memory=0.3"]
    settings = train.make_parser(train.APO).parse_args(flags)
    device = vstar.start_process(settings, group=True)
    rows, _ = train.read_stage1(settings)
    tokenizer, eos = vstar.ask(rows, settings)
    rows = rows[:64]
    run = train.make_run(settings, train.APO(settings), tokenizer, eos, rows, device)
    result = dict(dtype=settings.dtype, greedy_answers_alike=greedy_alike(run, rows, eos))
    for push in range(3):
        result[f"after {push} updates"] = pushed(run, rows, push)
    if getattr(run.sampler, "sleeps", False):
        free = lambda: torch.cuda.mem_get_info()[0] / 2**30  # of the whole GPU, whoever holds the rest
        with run.sampler.holding(run.policy):
            awake = free()
        result["gib_free_awake"], result["gib_free_asleep"] = awake, free()
    run.sampler.close()
    if dist.is_initialized():
        dist.destroy_process_group()
    tolerance = 1e-3 if settings.dtype == "float32" else 0.1  # check_numbers'
    holds = [numbers["off_the_trainer"] < min(tolerance, numbers["off_if_stale"] / 5)
             for numbers in result.values() if isinstance(numbers, dict)]
    return dict(result, holds=all(holds) and result["greedy_answers_alike"] > 0.8)


def greedy_alike(run, rows, eos):
    """The share of the engine's greedy answers that the decode loop gives too, one prompt at a time."""
    prompts, zeros = [row["tokens"] for row in rows], [0] * len(rows)
    loop = TransformersSampler(None, eos, run.args.max_new_tokens, 0.0, 1)
    with loop.holding(run.policy):
        alone = loop.generate(prompts, 1, zeros)
    greedily = vars(run.sampler) if run.args.engine == "transformers" else run.sampler.sampling
    usual, greedily["temperature"] = greedily["temperature"], 0.0
    with run.sampler.holding(run.policy):
        engines = run.sampler.generate(prompts, 1, zeros)
    greedily["temperature"] = usual
    return float(np.mean([one.tokens == other.tokens for (one,), (other,) in zip(alone, engines)]))


def pushed(run, rows, push):
    """An update between two pushes. How far (nats a token) are the engine's log-probabilities off the weights that it
    should hold, off π_ref's, and off the weights after the update, as they would be if the next push failed?"""
    samples = train.rollout(run, [(push * len(rows) + place, row) for place, row in enumerate(rows)])
    given = run.objective.given(run, samples)
    train.set_rate(run.optimizer, push, run.args)
    numbers = train.update(run, samples, given)
    after = train.by_token(run.policy, samples, run.args, run.device)
    said = train.on_tokens(samples, [sample.completion.logps for sample in samples], after)
    off = lambda logp: ((said - logp).abs().sum() / sum(len(sample.completion.tokens) for sample in samples)).item()
    return dict(off_the_trainer=numbers["mismatch"], off_the_first_weights=off(given["ref_logp"]),
                off_if_stale=off(after))


# ---------------------------------------------------------------------------------------------------------------------
# a real model's shape


def model_of(args):
    return "tiny/model" if args.toy else lab.random_model("1.5B")


def room(need):
    """What keeps so many GiB from fitting, if anything does."""
    has = torch.cuda.get_device_properties(0).total_memory / 2**30 if GPU else need
    return dict(skipped=f"it needs {need:.0f} GiB, the GPU has {has:.0f}") if need > has else None


def algorithm(args, name, lora=(), engine="transformers"):
    prompts, tokens, batch = (8, 16, 4) if args.toy else (128, 256, 64)
    out, model = args.out / "phases" / engine, model_of(args)
    flags = [f"--vstar={out}/vstar.jsonl", f"--out={out}/{name}", f"--batch_size={batch}", "--steps=3", "--eval_data=",
             "--show_every=0", f"--engine={engine}", "--overwrite", *lora]
    Objective = plan.OBJECTIVES[name]
    settings = train.make_parser(Objective).parse_args(flags)
    vars(settings).update(model=model, revision=None, temperature=1.0, max_new_tokens=tokens)
    shape, objective, prompt = plan.load_shape(settings), Objective(settings), 128
    dtype = torch.bfloat16 if GPU else torch.float32
    if GPU:  # as much memory as it has, whatever it is
        plan.GPUS["this"] = (torch.cuda.get_device_properties(0).total_memory / 2**30, *[None] * 3)
    planned = plan.peak(plan.memory(shape, settings, objective, 1, "this" if GPU else None, dtype, prompt + tokens))
    if skipped := room(planned + plan.OVERHEAD):
        return skipped
    # the embedded world's problems are short: so it is asked with more behind them, about 128 tokens
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "vstar.log", "a", encoding="utf-8") as log, redirect_stdout(log):  # for stage1_cost
        phases.child("vstar.py", f"--model={model}", "--data=tiny/train.jsonl", f"--limit={prompts}", "--samples=2",
                     f"--max_new_tokens={tokens}", f"--prompt={{question}}{'1+1=' * 30}", f"--engine={engine}",
                     f"--out={out}/vstar.jsonl")
    os.environ.pop("LOCAL_WORLD_SIZE", None)  # vLLM's CPU build leaves it, and it would stand for torchrun
    if GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    phases.child(*(["train.py"] if name == "apo" else ["-m", "experiments.baselines", name]), *flags)
    rows = [row for row in lab.read(out / f"{name}/metrics.jsonl") if row["step"] > 1]  # the first warms up
    remove(out / name / "model")
    seconds = {phase: float(np.mean([row["seconds"][phase] for row in rows])) for phase in lab.PHASES}
    length, answers = lab.mean("length", rows), batch * objective.completions
    trained, _ = plan.networks_of(objective)
    # frozen weights need no gradient of their own, which is a third
    flops = (2 if lora else 3) * trained * objective.passes * plan.forward_flops(shape, answers, prompt, length)
    written, spent = stage1_cost(out)  # tokens, seconds
    return dict(seconds, step=sum(seconds.values()), tokens_per_second=lab.mean("tokens_per_second", rows),
                stage1_tokens_per_second=written / spent,
                mfu=flops / seconds["update"] / limits.limits()[0], peak_gib=max(row["memory_gb"] for row in rows),
                planned_gib=planned)


# ---------------------------------------------------------------------------------------------------------------------
# the decode loop


def grouped(module, query, key, value, attention_mask, scaling=None, **more):
    """Attention of one new token a row: the heads that share keys and values are queries of one head, so nothing is
    copied for each head. (With a mask transformers copies, twice a step and layer, because CUDA's kernels ask for it.)
    """
    rows, heads, width, size = query.shape
    if width > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **more)
    queries = query.reshape(rows, key.shape[1], -1, size)  # (rows, heads of keys, heads that share them, size)
    out = scaled_dot_product_attention(queries, key, value, attn_mask=attention_mask, scale=scaling)
    return out.reshape(rows, 1, heads, size), None


transformers.AttentionInterface.register("grouped", grouped)
transformers.AttentionMaskInterface.register("grouped", sdpa_mask)


@torch.no_grad()
def fixed_loop(model, prompts, seeds, limit, record):
    """The engine's decode loop over a cache of fixed size. Each token is then the same work at the same addresses, and
    `record` makes a CUDA graph of it. No row leaves, and no EOS ends one. → tokens, log-probabilities: (rows, limit);
    seconds without the recording, and of the recording"""
    clock = lambda: (GPU and torch.cuda.synchronize(), time.perf_counter())[1]
    began, count, device = clock(), len(prompts), model.device
    uniforms = torch.from_numpy(np.stack([np.random.Generator(np.random.Philox(key=[seed, 0])).random(limit)
                                          for seed in seeds])).to(device)
    pad = lambda rows: pad_sequence([torch.tensor(row) for row in rows], True, padding_side="left").to(device)
    ids, mask = pad(prompts), pad([[1] * len(prompt) for prompt in prompts])  # (rows, width)
    width = ids.shape[1]
    cache = transformers.StaticCache(config=model.config, max_cache_len=width + limit)
    # what changes from step to step lives in these tensors, and nothing in Python
    tokens, logps = ids.new_zeros(count, limit), torch.zeros(count, limit, device=device)
    now, position = ids.new_zeros(1), mask.sum(-1, keepdim=True)
    visible = torch.cat([mask, mask.new_zeros(count, limit)], 1).bool()[:, None, None]  # (rows, 1, 1, width + limit)

    def write(logits):
        token, logp = draw(logits[:, -1], uniforms.index_select(1, now)[:, 0], 1.0)
        tokens.index_copy_(1, now, token[:, None])
        logps.index_copy_(1, now, logp[:, None])

    def step():
        visible.index_fill_(3, now + width, True)
        logits = model(input_ids=tokens.index_select(1, now), attention_mask=visible, position_ids=position,
                       past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        position.add_(1)
        now.add_(1)
        write(logits)

    write(model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
                past_key_values=cache, use_cache=True, logits_to_keep=1).logits)
    left, recording = limit - 1, 0.0
    if record:
        side = torch.cuda.Stream()  # what CUDA loads at first use cannot be recorded: two steps go before
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph, left, before = torch.cuda.CUDAGraph(), left - 2, clock()
        with torch.cuda.graph(graph):
            step()
        step, recording = graph.replay, clock() - before
    for _ in range(left):
        step()
    return tokens.tolist(), logps.tolist(), clock() - began - recording, recording


def decode(args):
    prompt, tokens, counts = (8, 16, [4]) if args.toy else (128, 256, [32, 256])
    settings = SimpleNamespace(model=model_of(args), revision=None, dtype="auto", temperature=1.0, prompt=prompt,
                               tokens=tokens, tokens_per_microbatch=16384, rounds=1, profile=False)
    device = vstar.start_process(settings)
    dtype, shape = getattr(torch, settings.dtype), plan.load_shape(settings)
    need = (10 * shape.total + plan.sampler_bytes(shape, dtype, counts[-1], prompt + tokens)) / 2**30
    if skipped := room(need + plan.OVERHEAD):
        return skipped
    bandwidth = limits.limits(measured=True)[1]
    model, result, worst = vstar.load_model(settings.model, None, settings.dtype, device).eval(), {}, 0.0
    result["gb_per_second"], result["gb_per_second_used_by_the_plan"] = bandwidth / 1e9, limits.limits()[1] / 1e9
    for attention in ("sdpa", "grouped"):
        model.set_attn_implementation(attention)
        for count in counts:
            settings.decode_rows = count
            label, prompts = f"{count} rows, {attention}", limits.some_prompts(settings)
            found = limits.decode(settings, model, shape, dtype, bandwidth)
            floor = found["floor_seconds"]
            result[f"{label}, engine"] = dict(seconds=found["seconds"], share_of_floor=floor / found["seconds"],
                                              beyond_the_forward_passes=found["overhead_over_forward"])
            for _ in range(2):  # the first warms up
                written = fixed_loop(model, prompts, range(len(prompts)), tokens, record=GPU)
            off = off_the_trainer(settings, model, prompts, *written[:2])
            result[f"{label}, fixed cache{', CUDA graph' * GPU}"] = dict(
                seconds=written[2], share_of_floor=floor / written[2], recording=written[3], off_the_trainer=off)
            worst = max(worst, off)
    model.set_attn_implementation("sdpa")
    vstar.start_process(settings, group=True)  # only now: NCCL's own thread would disturb a recording
    policy = train.shard(train.Policy(model.float()), device, dtype, master=True)
    sampler = TransformersSampler(None, [-1], tokens, 1.0, count)
    with sampler.holding(policy):
        seconds = limits.seconds_of(lambda: sampler.generate(prompts, 1, list(range(len(prompts)))), 1)
    result[f"{count} rows, sdpa, engine under FSDP"] = dict(seconds=seconds, share_of_floor=floor / seconds)
    if dist.is_initialized():
        dist.destroy_process_group()
    return dict(result, holds=worst < (1e-3 if settings.dtype == "float32" else 0.1))


def off_the_trainer(settings, model, prompts, tokens, logps):
    """Nats a token between the log-probabilities that a loop gave and those of the trainer's forward pass."""
    samples = [train.Sample(dict(tokens=prompt), Completion(some, True, said), "", 0.0, 0)
               for prompt, some, said in zip(prompts, tokens, logps)]
    found = train.by_token(train.Policy(model), samples, settings, model.device)
    said = train.on_tokens(samples, logps, found)
    return ((said - found).abs().sum() / np.size(tokens)).item()


PARTS = {"bf16": partial(world, dtype="bfloat16"), "fp32": partial(world, dtype="float32"), "restart": restart,
         "transformers": partial(engine, name="transformers"), "vllm": partial(engine, name="vllm"),
         **{name: partial(algorithm, name=name) for name in plan.OBJECTIVES}, "decode": decode,
         "apo-lora": partial(algorithm, name="apo", lora=["--lora=16"]),
         "apo-vllm": partial(algorithm, name="apo", engine="vllm")}

if __name__ == "__main__":
    run_script(main)
