"""This code beside TRL: the same model, problems, prompts a step, answer length and optimizer settings.

    pip install trl==1.16.0          (for this script alone)
    python -m experiments.speed.peers                   → experiments/results/peers.json (the embedded world)
    python -m experiments.speed.peers --shape 0.5B --rounds 1 --steps 5      (random weights, a GPU)
    python -m experiments.speed.peers --model M --data D.jsonl --prompt TEMPLATE --name mine

A*-PO against trl.experimental.a2po.A2POTrainer, GRPO against trl.GRPOTrainer. Each run is a process of its
own, in turns. Seconds are those of the work alone (no imports, no loading):
Stage 1, and Stage 2 a step, the first step left out. The memory is what an update needs beyond what was
there when it began: on a GPU the growth of the peak allocation, on a CPU that of the peak RSS, in a short
run of its own whose malloc gives back at once what is freed. The finished models lie in out/peers/, for
evaluate.py. What is there is not run again.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import numpy as np
import torch

import rewards
import train
from experiments import baselines, lab
from experiments.compare import stage1_cost
from experiments.speed.limits import GPU, timed

PEERS = ["ours apo", "trl apo", "ours grpo", "trl grpo"]


def main():
    parser = lab.make_parser(__doc__)
    add = parser.add_argument
    add("--rounds", type=int, default=3)
    add("--steps", type=int, default=25)
    add("--batch_size", type=int, default=128, help="prompts a step")
    add("--tokens", type=int, default=64, help="new tokens at most")
    add("--lr", type=float, default=3e-4)
    add("--limit", type=int, default=1024, help="prompts of Stage 1")
    add("--model", default="tiny/model")
    add("--data", default="tiny/train.jsonl")
    add("--prompt", default="{question}")
    add("--name", help="of the results; default: peers, with --shape peers-SHAPE")
    add("--shape", choices=lab.SHAPES, help="instead of --model: random weights in the shape of this Qwen2.5")
    add("--microbatch", type=int, help="TRL's per_device_train_batch_size; default: for A*-PO, which samples "
        "as many at a time, the whole batch; for GRPO 64, with --shape 256, as in this code's micro-batches")
    add("--only", nargs="+", default=PEERS, choices=PEERS)
    add("--child", nargs=2, metavar=("PEER", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.launch = sys.executable
    if args.child:
        return child(args, args.child[0], Path(args.child[1]))
    args.name = args.name or "peers" + (f"-{args.shape}" if args.shape else "")
    found = {peer: [] for peer in args.only}
    for turn, peer in product(range(args.rounds), args.only):
        found[peer].append(one(args, peer, turn))
    middle = {}
    for peer, runs in found.items():
        middle[peer] = {}
        for key in runs[0]:
            middle[peer][key] = float(np.median([run[key] for run in runs]))
        if not GPU:
            frugal = one(args, peer, "memory", "--steps=4", MALLOC_MMAP_THRESHOLD_="65536")
            middle[peer]["update_memory_mb"] = frugal["update_memory_mb"]
    ratios = {}
    for algorithm in ("apo", "grpo"):
        ours, theirs = (middle.get(f"{code} {algorithm}", {}) for code in ("ours", "trl"))
        both = [key for key in ours if ours[key] and theirs.get(key)]
        ratios[algorithm] = {key: round(theirs[key] / ours[key], 3) for key in both}
        print(f"TRL over ours, {algorithm}:", ratios[algorithm])
    lab.save(args.name, medians=middle, trl_over_ours=ratios)


def one(args, peer, turn, *flags, **environment):
    out = lab.ROOT / f"out/peers/{args.name}/{peer.replace(' ', '-')}-{turn}"
    if not (out / "result.json").exists():
        out.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", __spec__.name, *sys.argv[1:]]
        command += [*flags, "--child", peer, str(out)]
        with open(out / "log", "w") as log:
            run = subprocess.run(command, env=os.environ | environment, stdout=log, stderr=log)
        if run.returncode:
            sys.exit(f"{peer} failed; see {out}/log")
    result = json.loads((out / "result.json").read_text())
    print(turn, peer, result, flush=True)
    return result


def child(args, peer, out):
    """One peer, measured from inside its process."""
    code, algorithm = peer.split()
    if args.shape:
        args.model = lab.random_model(args.shape)
    measure = ours if code == "ours" else theirs
    result = measure(args, algorithm, out)
    (out / "result.json").write_text(json.dumps(result))


class Peak:
    """The most memory that an update needs beyond what was there when it began. (The first is left out: it
    allocates the optimizer's states.)"""

    def __init__(self):
        self.before, self.found, self.ends = None, [], []
        step = torch.optim.AdamW.step

        def ends(*args, **keywords):
            now = torch.cuda.max_memory_allocated() if GPU else resident("VmHWM")
            self.found.append((now - self.before) / 2**20)
            self.before = None
            result = step(*args, **keywords)
            self.ends.append(time.perf_counter())
            return result

        torch.optim.AdamW.step = ends

    def begins_with(self, function):
        def wrapped(*args, **keywords):
            if self.before is None:
                self.before = self.start()
            return function(*args, **keywords)

        return wrapped

    def start(self):
        if GPU:
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak
        return resident("VmRSS")


def resident(field):
    status = Path("/proc/self/status").read_text()
    return int(re.search(field + r":\s+(\d+)", status)[1]) * 1024


def ours(args, algorithm, out):
    """What `python vstar.py … && python train.py …` does."""
    peak = Peak()
    train.update = peak.begins_with(train.update)
    if "MALLOC_MMAP_THRESHOLD_" in os.environ:  # start_process would keep what is freed, which hides it
        platform.libc_ver = lambda: ("", "")
    engine = ["--decode_rows=1024", "--engine=transformers"]
    first = [f"--model={args.model}", f"--data={args.data}", f"--prompt={args.prompt}",
             f"--limit={args.limit}", f"--max_new_tokens={args.tokens}", f"--out={out}/vstar.jsonl"]
    if args.shape:
        first.append("--reward=experiments/lab.py:toss")
    second = [f"--vstar={out}/vstar.jsonl", f"--out={out}/run", "--beta2=0.1", f"--lr={args.lr}",
              "--warmup=5", f"--steps={args.steps}", f"--batch_size={args.batch_size}", "--save_every=100000",
              f"--tokens_per_microbatch={16384 if args.shape else 2048}"]
    lab.run(args, "vstar", out, "vstar.jsonl", *first, *engine)
    sys.argv = [algorithm, *[algorithm] * (algorithm != "apo"), *second, *engine]
    (train if algorithm == "apo" else baselines).main()
    rows = [row for row in lab.read(out / "run/metrics.jsonl") if row["step"] > 1]
    mean = lambda *phases: float(np.mean([lab.seconds_of(row, phases) for row in rows]))
    return dict(stage1_seconds=stage1_cost(out)[1],
                sampling_seconds_a_step=mean("sampling", "reference"),
                update_seconds_a_step=mean("update"),
                step_seconds=mean(*lab.PHASES),
                update_memory_mb=max(peak.found[1:]))


def theirs(args, algorithm, out):
    """TRL, measured at the corresponding places."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    trainer, sampling, peak = trl_trainer(args, algorithm, out), [], Peak()
    trainer._prepare_inputs = timed(trainer._prepare_inputs, sampling)
    trainer.compute_loss = peak.begins_with(trainer.compute_loss)
    first = []
    if algorithm == "apo":
        timed(trainer._estimate_optimal_values, first)()
    trainer.train()
    trainer.model.save_pretrained(out / "model")
    trainer.processing_class.save_pretrained(out / "model")
    step = float(np.mean(np.diff(peak.ends)))
    sampled = sum(sampling[len(sampling) // args.steps :]) / (args.steps - 1)  # without the first step
    return dict(stage1_seconds=sum(first), sampling_seconds_a_step=sampled,
                update_seconds_a_step=step - sampled, step_seconds=step,
                update_memory_mb=max(peak.found[1:]))


def trl_trainer(args, algorithm, out):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer
    from trl.experimental.a2po import A2POConfig, A2POTrainer

    # fp32 masters, computed in bf16 on a GPU: as here
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    problems = lab.read(lab.ROOT / args.data)[: args.limit]
    for problem in problems:
        problem["prompt"] = args.prompt.replace("{question}", problem["question"])
    if algorithm == "apo":
        Config, Trainer, answers = A2POConfig, A2POTrainer, args.batch_size
        more = dict(num_value_samples=8, beta1=0.5, beta2=0.1, filter_all_incorrect=False)
        micro = answers
    else:
        Config, Trainer, answers = GRPOConfig, GRPOTrainer, args.batch_size * 8
        more = dict(num_generations=8, beta=0.1, loss_type="grpo")
        micro = min(answers, 256 if args.shape else 64)
    micro = args.microbatch or micro
    config = Config(
        output_dir=str(out), learning_rate=args.lr, lr_scheduler_type="constant_with_warmup",
        warmup_steps=5, max_grad_norm=1.0, weight_decay=0.0, max_steps=args.steps,
        per_device_train_batch_size=micro, gradient_accumulation_steps=answers // micro,
        max_completion_length=args.tokens, temperature=1.0, bf16=GPU, gradient_checkpointing=GPU,
        report_to="none", save_strategy="no", use_cpu=not GPU, logging_steps=1000, seed=0,
        remove_unused_columns=False, **more,
    )
    reward = tossed if args.shape else right
    return Trainer(model, reward, config, Dataset.from_list(problems), processing_class=tokenizer)


def tossed(completions, **_):
    return [lab.toss() for _ in completions]


def right(completions, answer, **_):
    return [rewards.reward(text, gold, True) for text, gold in zip(completions, answer)]


if __name__ == "__main__":
    main()
