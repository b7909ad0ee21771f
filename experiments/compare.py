"""A*-PO, GRPO, REBEL and PPO on the same prompts, from the same reference policy, in the same loop: the paper's comparison.

    python experiments/compare.py            → experiments/compare.json, compare.png        (the embedded world, on a CPU)
    python experiments/compare.py --launch 'torchrun --nproc_per_node 8' --jobs 1 --rates 1e-6 3e-6 --betas 1e-3 1e-4 --seeds 3 \\
        --steps 300 --stage1 '--model Qwen/Qwen2.5-1.5B --data math' --train '--eval_data math500'                on GPUs

First each algorithm's rate and KL weight are chosen by the same sweep: one seed of its own, the highest mean reward over the
run (the training prompts' reward; the held-out problems take no part). Then every seed, one run at a time, timed. A*-PO's
seconds include its Stage 1. Restartable: what is in out/compare/ already is not run again.
"""

import argparse
import json
import re
from itertools import product

import matplotlib.pyplot as plt
import numpy as np
from lab import COLOURS, HERE, NAMES, accuracies, add_flags, mean_sd, pm, save, side_by_side, stage1, train

# Qwen2.5-1.5B, 3B and 7B on MATH, 4 × H100: hours, GPU memory in %, KL to the base model, MATH500 (A*-PO paper, table 2)
PAPER = dict(ppo=[(10.84, 42.64, .151, 57.0), (13.59, 54.95, .111, 65.8), (20.53, 92.81, .133, 74.4)],
             grpo=[(15.01, 42.19, .091, 58.0), (18.26, 49.75, .102, 66.0), (20.15, 77.82, .172, 73.2)],
             rebel=[(10.33, 63.34, .098, 57.8), (12.88, 74.32, .099, 67.0), (14.67, 98.77, .124, 74.6)],
             apo=[(6.92, 41.59, .069, 57.8), (8.78, 49.28, .082, 66.2), (11.01, 76.57, .078, 76.2)])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_flags(parser, steps=50)
    parser.add_argument("--rates", nargs="+", default=["3e-5", "1e-4", "3e-4", "1e-3", "3e-3"],
                        help="the sweep's (a critic's is ten times that)")
    parser.add_argument("--betas", nargs="+", default=["0.01", "0.1"], help="the sweep's weights of the KL")
    parser.add_argument("--reach", type=float, default=0.80, help="the accuracy to which the time is taken")
    args = parser.parse_args()

    def one(algo, rate, beta, seed, eval_every, **keywords):
        first = stage1(args, f"out/compare/stage1/{seed}", f"--seed={seed}", **keywords)
        return train(args, f"out/compare/{algo}/{rate}-{beta}-{seed}", first, f"--algo={algo}", f"--lr={rate}", f"--beta2={beta}",
                     f"--critic_lr={10 * float(rate)}", f"--seed={seed}", f"--eval_every={eval_every}", "--batch=1024", **keywords)

    tries = list(product(NAMES, args.rates, args.betas))
    stage1(args, "out/compare/stage1/100", "--seed=100")
    tried = side_by_side(args, [lambda t=t: one(*t, 100, 100000, threads=1) for t in tries])
    sweep = {f"{algo} {rate} {beta}": [round(np.mean([row["reward"] for row in rows[1:]]).item(), 4), accuracies(rows)[-1]]
             for (algo, rate, beta), rows in zip(tries, tried)}
    best = lambda algo: max((key for key in sweep if key.startswith(algo)), key=lambda key: sweep[key][0])
    chosen = {algo: best(algo).split()[1:] for algo in NAMES}

    runs = {algo: [] for algo in NAMES}
    for seed, algo in product(range(args.seeds), NAMES):
        rows = one(algo, *chosen[algo], seed, 2)
        offline = stage1_cost(f"out/compare/stage1/{seed}") if algo == "apo" else (0, 0.0)
        runs[algo].append(dict(rows=rows, **measures(rows, *offline, args.reach)))
    table = {algo: {key: mean_sd([run[key] for run in some]) for key in some[0] if key not in ("rows", "phases")}
             for algo, some in runs.items()}
    for algo, some in runs.items():
        table[algo]["seconds a step"] = {phase: mean_sd([run["phases"][phase] for run in some]) for phase in some[0]["phases"]}
        table[algo]["final accuracies"] = [run["accuracy"] for run in some]
    curve = lambda rows: [[row["step"], row["accuracy"], round(row["clock"], 2), round(row["all_tokens"])] for row in rows
                          if "accuracy" in row]
    save("compare", budget=dict(steps=args.steps, seeds=args.seeds, reach=args.reach), sweep=sweep, chosen=chosen, table=table,
         paper=PAPER, curves={f"{algo} {seed}": curve(run["rows"]) for algo, some in runs.items() for seed, run in enumerate(some)})
    picture(runs, args)
    show(table, chosen, args)


def stage1_cost(out):
    """Tokens and seconds of Stage 1's sampling."""
    with open(f"{out}/vstar.jsonl", encoding="utf-8") as file:
        tokens = sum(sum(json.loads(line)["lengths"]) for line in file)
    with open(f"{out}/vstar.log", encoding="utf-8") as file:
        return tokens, tokens / float(re.findall(r"([\d,]+) tokens/s", file.read())[-1].replace(",", ""))


def measures(rows, offline_tokens, offline, reach):
    """What the table holds of one run; the clock counts sampling, reference and update (and Stage 1), not the evaluations."""
    clock, at = offline, None
    for row, tokens in zip(rows, offline_tokens + np.cumsum([row["tokens"] for row in rows])):
        clock += sum(row["seconds"][phase] for phase in ("sampling", "reference", "update"))
        row.update(clock=clock, all_tokens=tokens)
        if at is None and row.get("accuracy", 0) >= reach:
            at = row
    phases = {phase: np.mean([row["seconds"][phase] for row in rows[1:]]) for phase in ("sampling", "reference", "update")}
    at = at or {}
    return dict(accuracy=accuracies(rows)[-1], seconds=clock, online_seconds=clock - offline, memory_gb=rows[-1]["memory_gb"],
                seconds_to_reach=at.get("clock", np.nan), online_seconds_to_reach=at.get("clock", np.nan) - offline,
                steps_to_reach=at.get("step", np.nan), kl_at_reach=at.get("kl", np.nan), kl=rows[-1]["kl"], phases=phases)


def picture(runs, args):
    """Accuracy over steps, prompts, generated tokens and seconds: each seed thin, their mean thick."""
    figure, axes = plt.subplots(1, 5, figsize=(17, 3.3), layout="constrained")
    with_stage1 = [(key, f"{label} (A*-PO: with Stage 1)") for key, label in (("all_tokens", "tokens"), ("clock", "seconds"))]
    for axis, (key, label) in zip(axes, [("step", "steps"), ("prompts", "prompts"), *with_stage1]):
        for algo, some in runs.items():
            lines = [[(row[key], row["accuracy"]) for row in run["rows"] if "accuracy" in row] for run in some]
            for line in lines:
                axis.plot(*zip(*line), color=COLOURS[algo], linewidth=0.5, alpha=0.4)
            axis.plot(*np.mean(lines, axis=0).T, color=COLOURS[algo], linewidth=2, label=NAMES[algo])
        axis.axhline(args.reach, color="0.8", linewidth=0.8, zorder=0)
        axis.set(xlabel=label, ylim=(0, 1), title="held-out accuracy" if key == "step" else None)
        axis.spines[["top", "right"]].set_visible(False)
    axes[2].set_xscale("log")
    axes[0].legend(frameon=False)
    for algo, some in runs.items():
        lines = [[(row["kl"], row["accuracy"]) for row in run["rows"] if "accuracy" in row and "kl" in row] for run in some]
        axes[4].plot(*np.mean(lines, axis=0).T, color=COLOURS[algo], linewidth=2)
    axes[4].set(xlabel="KL to π_ref (nats per answer)", ylim=(0, 1), title="held-out accuracy")
    axes[4].spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE / "compare.png", dpi=110)


def show(table, chosen, args):
    """The table in the form of the paper's, as Markdown."""
    print(f"\n{args.seeds} seeds, {args.steps} steps; the mean and the deviation over the seeds\n")
    print(f"| | rate, β2 | seconds | … to {args.reach} | memory (GB) | KL at {args.reach} | KL | accuracy |\n" + "|---" * 8 + "|")
    for algo in NAMES:
        row = table[algo]
        print(f"| {NAMES[algo]} | {', '.join(chosen[algo])} | {pm(row['seconds'], 1)} | {pm(row['seconds_to_reach'], 1)} | "
              f"{pm(row['memory_gb'], 2)} | {pm(row['kl_at_reach'], 2)} | {pm(row['kl'], 2)} | {pm(row['accuracy'])} |")
    print("\n| the paper, MATH | hours | GPU memory (%) | KL | MATH500 |\n|---|---|---|---|---|")
    for algo in NAMES:
        print(f"| {NAMES[algo]} | " + " | ".join(" / ".join(f"{size[i]:g}" for size in PAPER[algo]) for i in range(4)) + " |")


if __name__ == "__main__":
    main()
