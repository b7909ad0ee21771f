"""First contact with a GPU: what holds on a CPU, does it hold there? And how quick is it?

    python -m experiments.gpu            → experiments/results/gpu.json                        (a CUDA GPU)
    python -m experiments.gpu --toy      → out/gpu-toy/gpu.json: every part at toy size, on any CPU

bf16, fp32           the embedded world from start to end; both should reach the same accuracy
cudnn                bf16 with cuDNN's attention, which vstar.py switches off: is that quicker?
restart              the run of bf16 again from its last checkpoint but one, in another process: same numbers?
transformers, vllm   each engine's log-probabilities against the trainer's, before and after real updates;
                     what vLLM's sleep gives back
phases               speed/phases.py in the shape of Qwen2.5-1.5B, full and with --lora 16: seconds, and the
                     memory beside the plan's; with --recompute auto and yes, and --lora in both engines

Each part is a process of its own and leaves out/gpu/PART.json and PART.log. What is there is not run again.
To repeat a part, remove its file.
"""

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import train
import vstar
from experiments import lab
from experiments.speed import phases
from rewards import fail
from vstar import remove, run_script


def main():
    parser = lab.make_parser(__doc__)
    parser.add_argument("--out", type=Path, help="default: out/gpu, with --toy out/gpu-toy")
    parser.add_argument("--toy", action="store_true", help="toy size, on a CPU too; the numbers mean nothing")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    default = lab.ROOT / ("out/gpu-toy" if args.toy else "out/gpu")
    args.out = (args.out or default).resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    if not torch.cuda.is_available() and not args.toy:
        fail("no CUDA GPU (--toy runs every part at toy size on a CPU)")
    if args.part:
        (args.out / f"{args.part}.json").write_text(json.dumps(PARTS[args.part](args)))
        return
    found = {part: result_of(args, part) for part in PARTS}
    if all("accuracy" in found[part] for part in ("bf16", "fp32")):
        found["difference"] = difference(found["bf16"], found["fp32"])
    lab.save(args.out / "gpu" if args.toy else "gpu", **found)
    for part, result in found.items():
        if "failed" in result or not result.get("holds", True):
            fail(f"{part} does not hold")


def result_of(args, part):
    """What a part found, now or at an earlier start. Each is a process of its own."""
    path, log = args.out / f"{part}.json", args.out / f"{part}.log"
    if part == "vllm" and not importlib.util.find_spec("vllm"):
        result = dict(skipped="vLLM is not installed")
    else:
        if not path.exists():
            command = [sys.executable, "-m", __spec__.name, "--part", part, "--out", args.out]
            if args.toy:
                command.append("--toy")
            with open(log, "w") as file:
                subprocess.run(command, cwd=lab.ROOT, stdout=file, stderr=file)
        result = json.loads(path.read_text()) if path.exists() else dict(failed=f"see {log}")
    print(part, result, flush=True)
    return result


def script(module, *flags):
    """A script's main() in this process."""
    sys.argv = [module.__name__, *map(str, flags)]
    module.main()


# ------------------------------------------------------------------------------------------------------------
# the embedded world


def stage1(args):
    """The same V̂* for all parts. Sampled once."""
    path = args.out / "world/vstar.jsonl"
    toy = ["--limit=256", "--samples=2"] if args.toy else []
    script(vstar, "@tiny/vstar.args", "--engine=transformers", "--dtype=float32", f"--out={path}", *toy)
    return path


def train_world(args, dtype, out):
    toy = "--steps=4 --batch_size=32 --save_every=2 --eval_every=2 --eval_limit=64" if args.toy else ""
    script(train, "@tiny/train.args", "--engine=transformers", f"--dtype={dtype}", f"--vstar={stage1(args)}",
           f"--out={out}", "--show_every=0", *toy.split())
    return lab.read(out / "metrics.jsonl")


def world(args, dtype):
    rows = train_world(args, dtype, args.out / "world" / dtype)
    steps = [row for row in rows if row["step"] > 1]
    return dict(accuracy=rows[-1]["accuracy"], accuracy_before=rows[0]["accuracy"],
                mismatch=max(row["mismatch"] for row in steps),
                seconds_a_step=float(np.mean([lab.seconds_of(row) for row in steps])))


def cudnn(args):
    torch.backends.cuda.enable_cudnn_sdp = lambda on: None
    rows = train_world(args, "bfloat16", args.out / "world/cudnn")
    return dict(seconds_a_step=float(np.mean([lab.seconds_of(row) for row in rows if row["step"] > 1])))


def difference(bf16, fp32):
    """Twice as far apart as two of five seeds were (0.02) would be too far."""
    apart = bf16["accuracy"] - fp32["accuracy"]
    return dict(holds=abs(apart) < 0.04, bf16_minus_fp32=apart)


def restart(args):
    first, again = args.out / "world/bfloat16", args.out / "world/again"
    remove(again)
    shutil.copytree(first, again)
    remove(train.checkpoints(again)[-1])
    remove(again / "model")
    before, old = train.last_checkpoint(again), lab.read(first / "metrics.jsonl")
    new = train_world(args, "bfloat16", again)
    for row in old + new:
        for key in ("seconds", "tokens_per_second", "memory_gb"):
            row.pop(key, None)
    pairs = [(one, other) for one, other in zip(old, new) if one["step"] > before]
    # the next step is a function of the checkpoint alone; later ones also of the order of a GPU's sums
    one, other = ([*row.values()] for row in pairs[0])
    return dict(holds=len(old) == len(new) and np.allclose(one, other, rtol=0.01),
                steps=len(pairs), steps_alike_to_the_bit=sum(one == other for one, other in pairs))


# ------------------------------------------------------------------------------------------------------------
# the engines


def engine(args, name):
    flags = [f"--vstar={stage1(args)}", f"--engine={name}", "--dtype=bfloat16", "--lr=3e-3"]
    settings = train.make_parser(train.APO).parse_args(flags)
    device = vstar.start_process(settings, group=True)
    problems = train.settle(settings, *train.read_stage1(settings))[:64]
    tokenizer, eos = vstar.add_prompts(problems, settings)
    run = train.make_run(settings, train.APO(settings), tokenizer, eos, problems, device)
    result = {f"after {push} updates": pushed(run, problems, push) for push in range(3)}
    holds = [numbers["off_the_trainer"] < min(0.1, numbers["off_if_stale"] / 5)
             for numbers in result.values()]
    if getattr(run.sampler, "sleeps", False):
        free = lambda: torch.cuda.mem_get_info()[0] / 2**30  # of the whole GPU, whoever has the rest
        run.sampler.wake(run.policy)
        result["gib_free_awake"] = free()
        run.sampler.rest()
        result["gib_free_asleep"] = free()
    run.sampler.close()
    if dist.is_initialized():
        dist.destroy_process_group()
    return dict(result, holds=all(holds))


def pushed(run, problems, push):
    """An update between two pushes. How far (nats a token) are the engine's log-probabilities off the weights
    that it should have, off π_ref's, and off the weights after the update, as if the next push failed?"""
    run.sampler.wake(run.policy)
    samples = train.rollout(run, [*enumerate(problems, push * len(problems))])
    run.sampler.rest()
    constants = run.objective.constants(run, samples)
    train.set_lr(run.optimizer, push, run.args)
    numbers = train.update(run, samples, constants)
    after = train.token_logps(run.policy, samples, run.args, run.device)
    engines = train.on_tokens(samples, [sample.completion.logps for sample in samples], after)
    tokens = sum(len(sample.completion.tokens) for sample in samples)
    off = lambda logp: ((engines - logp).abs().sum() / tokens).item()
    return dict(off_the_trainer=numbers["mismatch"], off_the_first_weights=off(constants["ref_logp"]),
                off_if_stale=off(after))


# ------------------------------------------------------------------------------------------------------------
# a real model's shape


def speed(args):
    size = "--shape=toy --batch_size=4 --prompts=8 --tokens=16 --steps=3" if args.toy else ""
    script(phases, *size.split(), "--ways", *phases.WAYS[:4], f"--name={args.out}/phases-results")
    return json.loads((args.out / "phases-results.json").read_text())["results"]


PARTS = {"bf16": partial(world, dtype="bfloat16"),
         "fp32": partial(world, dtype="float32"),
         "cudnn": cudnn,
         "restart": restart,
         "transformers": partial(engine, name="transformers"),
         "vllm": partial(engine, name="vllm"),
         "phases": speed}

if __name__ == "__main__":
    run_script(main)
