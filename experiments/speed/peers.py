"""This code beside TRL: the same model, problems, prompts a step, answer length and optimizer settings.

    pip install trl==1.16.0          (for this script alone)
    python -m experiments.speed.peers                   → experiments/results/peers.json (the embedded world)
    python -m experiments.speed.peers --shape 0.5B --rounds 1 --steps 5      (random weights, a GPU)
    python -m experiments.speed.peers --model M --data D.jsonl --test T.jsonl --prompt TEMPLATE --name mine

A*-PO against trl.experimental.a2po.A2POTrainer, GRPO against trl.GRPOTrainer. Each run is a process of its
own, and in every round the order changes. Seconds are those of the work alone (no imports, no loading):
Stage 1, and Stage 2 a step, the first step left out. The memory is what an update needs beyond what was
there when it began: on a GPU the growth of the peak allocation, on a CPU that of the peak RSS, in a short
run of its own whose malloc gives back at once what is freed. Accuracy: evaluate.py on the finished model.
What is in out/peers/ is not run again.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

import rewards
import train
from experiments import baselines, lab
from experiments.compare import stage1_cost

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
    add("--test", default="tiny/test.jsonl")
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
    for turn in range(args.rounds):
        for peer in args.only if turn % 2 == 0 else args.only[::-1]:
            found[peer].append(one(args, peer, turn))
    middle = {}
    for peer, runs in found.items():
        middle[peer] = {key: float(np.median([run[key] for run in runs])) for key in runs[0]}
        if not torch.cuda.is_available():
            frugal = one(args, peer, "memory", "--steps=4", MALLOC_MMAP_THRESHOLD_="65536")
            middle[peer]["update_memory_mb"] = frugal["update_memory_mb"]
    ratios = {}
    for algorithm in ("apo", "grpo"):
        ours, theirs = (middle.get(f"{code} {algorithm}") for code in ("ours", "trl"))
        if ours and theirs:
            both = [key for key in ours if key in theirs and ours[key]]
            ratios[algorithm] = {key: round(theirs[key] / ours[key], 3) for key in both}
    lab.save(args.name, medians=middle, trl_over_ours=ratios)
    for algorithm, row in ratios.items():
        print(f"TRL over ours, {algorithm}: " + ", ".join(f"{key} {value:.2f}" for key, value in row.items()))


def one(args, peer, turn, *flags, **environment):
    out = lab.ROOT / f"out/peers/{args.name}/{peer.replace(' ', '-')}-{turn}"
    if not (out / "result.json").exists():
        out.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", __spec__.name, *sys.argv[1:], *flags, "--child", peer, str(out)]
        environment = {**os.environ, **environment}
        with open(out / "log", "w") as log:
            run = subprocess.run(command, env=environment, stdout=log, stderr=log)
        if run.returncode:
            sys.exit(f"{peer} failed; see {out}/log")
    result = json.loads((out / "result.json").read_text())
    print(turn, peer, {key: float(f"{value:.3g}") for key, value in result.items()}, flush=True)
    return result


def child(args, peer, out):
    """One peer, measured from inside its process."""
    code, algorithm = peer.split()
    if args.shape:
        args.model = lab.random_model(args.shape)
    result = (ours if code == "ours" else theirs)(args, algorithm, out)
    if not args.shape:
        model = out / ("run/model" if code == "ours" else "model")
        flags = [f"--model={model}", f"--data={args.test}", f"--prompt={args.prompt}", "--limit=512",
                 "--samples=4", f"--max_new_tokens={args.tokens}", "--decode_rows=1024", f"--out={out}/eval"]
        lab.run(args, "evaluate", out, "eval/results.json", *flags)
        (found,) = json.loads((out / "eval/results.json").read_text()).values()
        result["accuracy"] = next(iter(found.values()))["accuracy"]
    (out / "result.json").write_text(json.dumps(result))


class Peak:
    """The most memory that an update needs beyond what was there when it began. (The first is left out: it
    allocates the optimizer's states.)"""

    def __init__(self):
        self.before, self.found, step = None, [], torch.optim.AdamW.step

        def ends(*args, **keywords):
            now = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident("VmHWM")
            self.found.append((now - self.before) / 2**20)
            self.before = None
            return step(*args, **keywords)

        torch.optim.AdamW.step = ends

    def begins_with(self, function):
        def wrapped(*args, **keywords):
            if self.before is None:
                self.before = self.start()
            return function(*args, **keywords)

        return wrapped

    def start(self):
        if torch.cuda.is_available():
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
    generated = lab.mean("length", rows) * args.batch_size * (8 if algorithm == "grpo" else 1)
    tokens, seconds = stage1_cost(out)
    step = mean(*lab.PHASES)
    return dict(stage1_seconds=seconds, stage1_seconds_per_token=seconds / tokens,
                sampling_seconds_a_step=mean("sampling", "reference"), update_seconds_a_step=mean("update"),
                step_seconds=step, step_seconds_per_token=step / generated,
                update_memory_mb=max(peak.found[1:]))


def timed(function, seconds):
    def wrapped(*args, **keywords):
        began = time.perf_counter()
        result = function(*args, **keywords)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
        return result

    return wrapped


def theirs(args, algorithm, out):
    """TRL, measured at the corresponding places."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import transformers
    import trl  # noqa: F401

    trainer = (trl_a2po if algorithm == "apo" else trl_grpo)(args, str(out))
    tokens, sampling, steps, marks, peak = [], [], [], [], Peak()
    decode = trainer.processing_class.batch_decode
    trainer._prepare_inputs = timed(trainer._prepare_inputs, sampling)
    trainer.training_step = timed(trainer.training_step, steps)
    trainer.compute_loss = peak.begins_with(trainer.compute_loss)

    def counted(ids, **keywords):
        if isinstance(ids, torch.Tensor):  # up to and including the first EOS
            eos = (ids == trainer.processing_class.eos_token_id).int()
            tokens.append(int((eos.cumsum(-1) - eos == 0).sum()))
        else:
            tokens.append(sum(map(len, ids)))
        return decode(ids, **keywords)

    trainer.processing_class.batch_decode = counted
    result = {}
    if algorithm == "apo":
        began = time.perf_counter()
        trainer._estimate_optimal_values()
        result["stage1_seconds"] = time.perf_counter() - began
        result["stage1_seconds_per_token"] = result["stage1_seconds"] / sum(tokens)
        tokens.clear()

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            marks.append(time.perf_counter())

    trainer.add_callback(Clock())
    trainer.train()
    trainer.model.save_pretrained(f"{out}/model")
    trainer.processing_class.save_pretrained(f"{out}/model")
    per_step = float(np.mean(np.diff(marks)))
    sampled = sum(sampling[len(steps) // args.steps :]) / (args.steps - 1)  # without the first step
    return dict(result, sampling_seconds_a_step=sampled, update_seconds_a_step=per_step - sampled,
                step_seconds=per_step, step_seconds_per_token=per_step * args.steps / sum(tokens),
                update_memory_mb=max(peak.found[1:]))


def problems_of(args):
    from datasets import Dataset

    return Dataset.from_list([
        dict(prompt=args.prompt.replace("{question}", problem["question"]), answer=problem["answer"])
        for problem in lab.read(lab.ROOT / args.data)[: args.limit]])


def tossed(completions, **_):
    return [lab.toss() for _ in completions]


def right(completions, answer, **_):
    return [rewards.reward(text, gold, True) for text, gold in zip(completions, answer)]


def settings(args, out, answers):
    """What TRL's two trainers are told alike."""
    gpu, micro = torch.cuda.is_available(), args.microbatch
    if not micro:
        micro = answers if answers == args.batch_size else min(answers, 256 if args.shape else 64)
    return dict(output_dir=out, learning_rate=args.lr, lr_scheduler_type="constant_with_warmup",
                warmup_steps=5, max_grad_norm=1.0, weight_decay=0.0, max_steps=args.steps,
                per_device_train_batch_size=micro, gradient_accumulation_steps=answers // micro,
                max_completion_length=args.tokens, temperature=1.0, bf16=gpu, gradient_checkpointing=gpu,
                report_to="none", save_strategy="no", use_cpu=not gpu, logging_steps=1000, seed=0,
                remove_unused_columns=False)


def load(args):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # fp32 masters, computed in bf16 on a GPU: as here
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(args.model, padding_side="left")


def trl_a2po(args, out):
    from trl.experimental.a2po import A2POConfig, A2POTrainer

    model, tokenizer = load(args)
    config = A2POConfig(**settings(args, out, args.batch_size), num_value_samples=8, beta1=0.5, beta2=0.1,
                        filter_all_incorrect=False)
    reward = tossed if args.shape else right
    return A2POTrainer(model, reward, config, problems_of(args), processing_class=tokenizer)


def trl_grpo(args, out):
    from trl import GRPOConfig, GRPOTrainer

    model, tokenizer = load(args)
    answers = args.batch_size * 8
    config = GRPOConfig(**settings(args, out, answers), num_generations=8, beta=0.1, loss_type="grpo")
    reward = tossed if args.shape else right
    return GRPOTrainer(model, reward, config, problems_of(args), processing_class=tokenizer)


if __name__ == "__main__":
    main()
