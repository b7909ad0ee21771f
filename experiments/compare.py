"""The paper's comparison: A*-PO, GRPO, REBEL and PPO on the same prompts, from the same π_ref, in the same loop.

    python -m experiments.compare            → experiments/results/compare.json, .png          (the embedded world)
    python -m experiments.compare --launch 'torchrun --nproc_per_node 8' --jobs 1 --rates 1e-6 3e-6 \\
        --betas 1e-3 1e-4 --seeds 3 --steps 300 --stage1 '--model Qwen/Qwen2.5-1.5B --data math' \\
        --train '--eval_data math500'        (a real model)
    python -m experiments.compare --name compare-tictactoe --rates 1e-4 3e-4 1e-3 --betas 0.01 --steps 25 \\
        --reach 0.80 0.85 --stage1 '--samples 2 \\
        --model out/tasks/tictactoe/world --data out/tasks/tictactoe/train.jsonl --prompt {question} \\
        --reward experiments/tasks/tictactoe.py:reward --max_new_tokens 48 --decode_rows 1024' \\
        --train '@tiny/train.args --eval_data out/tasks/tictactoe/test.jsonl'      (a task, after its own script)

First each algorithm's rate and KL weight are chosen by the same sweep: one seed of its own, the highest mean reward
over the run. (The reward is that of the training prompts; the held-out problems take no part.) Then every seed is run,
one at a time, and timed. A*-PO's seconds include its Stage 1. What is in out/NAME/ is not run again.
"""

import json
import re
from itertools import product

import numpy as np

from experiments import lab

# A*-PO paper, table 2. Qwen2.5-1.5B, 3B, 7B on MATH, 4 × H100: hours, GPU memory in %, KL to the base model, MATH500
PAPER = dict(ppo=[(10.84, 42.64, .151, 57.0), (13.59, 54.95, .111, 65.8), (20.53, 92.81, .133, 74.4)],
             grpo=[(15.01, 42.19, .091, 58.0), (18.26, 49.75, .102, 66.0), (20.15, 77.82, .172, 73.2)],
             rebel=[(10.33, 63.34, .098, 57.8), (12.88, 74.32, .099, 67.0), (14.67, 98.77, .124, 74.6)],
             apo=[(6.92, 41.59, .069, 57.8), (8.78, 49.28, .082, 66.2), (11.01, 76.57, .078, 76.2)])


def main():
    parser = lab.make_parser(__doc__, steps=50)
    parser.set_defaults(stage1="@tiny/vstar.args --samples=2")  # what vstar.py says to be cheapest for one pass
    add = parser.add_argument
    add("--name", default="compare", help="of the results, and of the folder in out/")
    add("--rates", nargs="+", default=["3e-5", "1e-4", "3e-4", "1e-3", "3e-3"], help="the sweep's")
    add("--betas", nargs="+", default=["0.01", "0.1"], help="the sweep's weights of the KL")
    add("--keep_sweep", action="store_true", help="take rates and weights of the KL from results/compare.json")
    add("--reach", type=float, nargs="+", default=[0.80, 0.90], help="accuracies to which the time is taken")
    args = parser.parse_args()

    def one(algorithm, rate, beta, seed, eval_every, **keywords):
        first = lab.stage1(args, f"out/{args.name}/stage1/{seed}", f"--seed={seed}", **keywords)
        return lab.train(args, f"out/{args.name}/{algorithm}/{rate}-{beta}-{seed}", first, f"--lr={rate}",
                         f"--beta2={beta}", f"--seed={seed}", f"--eval_every={eval_every}", "--decode_rows=1024",
                         algorithm=algorithm, **keywords)

    if args.keep_sweep:
        sweep = json.loads((lab.RESULTS / "compare.json").read_text())["sweep"]
    else:
        tries = list(product(lab.NAMES, args.rates, args.betas))
        lab.stage1(args, f"out/{args.name}/stage1/100", "--seed=100")
        tried = lab.side_by_side(args, [lambda t=t: one(*t, 100, 100000, threads=1) for t in tries])
        sweep = {" ".join(t): [round(lab.mean("reward", rows[1:]), 4), lab.accuracies(rows)[-1]]
                 for t, rows in zip(tries, tried)}
    chosen = {}
    for algorithm in lab.NAMES:
        best = max((key for key in sweep if key.startswith(algorithm)), key=lambda key: sweep[key][0])
        chosen[algorithm] = best.split()[1:]

    runs = {algorithm: [] for algorithm in lab.NAMES}
    for seed, algorithm in product(range(args.seeds), lab.NAMES):
        rows = one(algorithm, *chosen[algorithm], seed, 2)
        offline = stage1_cost(lab.ROOT / f"out/{args.name}/stage1/{seed}") if algorithm == "apo" else (0, 0.0)
        runs[algorithm].append(dict(rows=rows, **measures(rows, *offline, args.reach)))
    table = {}
    for algorithm, some in runs.items():
        table[algorithm] = dict(lab.over_seeds(some), **{
            "seconds a step": lab.over_seeds([run["phases"] for run in some]),
            "final accuracies": [run["accuracy"] for run in some],
        })
    curves = {f"{algorithm} {seed}": curve(run["rows"])
              for algorithm, some in runs.items() for seed, run in enumerate(some)}
    for goal in args.reach:  # which of the four comes there first?
        times = {name: [run[f"seconds to {goal:.2f}"] for run in runs[name]] for name in runs}
        first = [min(times, key=lambda name: np.nan_to_num(times[name][seed], nan=np.inf))
                 for seed in range(args.seeds)]
        print(f"first to {goal:.2f}: {', '.join(first)}")
        table["apo"][f"first to {goal:.2f}"] = first.count("apo")
    lab.save(args.name, budget=dict(steps=args.steps, seeds=args.seeds, stage1=args.stage1), sweep=sweep,
             chosen=chosen, table=table, paper=PAPER, curves=curves)
    draw(runs, args)
    show(table, chosen, args)


def stage1_cost(out):
    """Tokens and seconds of Stage 1's sampling."""
    tokens = sum(sum(row["lengths"]) for row in lab.read(out / "vstar.jsonl"))
    rates = re.findall(r"([\d,]+) tokens/s", (out / "vstar.log").read_text(encoding="utf-8"))
    return tokens, tokens / float(rates[-1].replace(",", ""))


def measures(rows, offline_tokens, offline, reach):
    """What the table holds of one run; the clock counts the phases of the steps (and Stage 1), not the evaluations."""
    clock, at = offline, {}  # the first row with such an accuracy
    for row, tokens in zip(rows, offline_tokens + np.cumsum([row["tokens"] for row in rows])):
        clock += lab.seconds_of(row)
        row.update(clock=clock, all_tokens=tokens)
        for goal in reach:
            if row.get("accuracy", 0) >= goal:
                at.setdefault(goal, row)
    phases = {phase: float(np.mean([lab.seconds_of(row, [phase]) for row in rows[1:]])) for phase in lab.PHASES}
    return dict(accuracy=lab.accuracies(rows)[-1], seconds=clock, online_seconds=clock - offline,
                memory_gb=rows[-1]["memory_gb"], kl=rows[-1]["kl"], phases=phases,
                **{f"{name} to {goal:.2f}": at.get(goal, {}).get(key, np.nan) for goal in reach
                   for name, key in dict(seconds="clock", steps="step", tokens="all_tokens", KL="kl").items()})


def curve(rows):
    return [[row["step"], row["accuracy"], round(row["clock"], 2), round(row["all_tokens"])] for row in rows
            if "accuracy" in row]


def draw(runs, args):
    """Accuracy over steps, prompts, generated tokens, seconds and the KL: each seed thin, their mean thick."""
    panels = dict(step="steps", prompts="prompts", all_tokens="tokens (A*-PO: with Stage 1)",
                  clock="seconds (A*-PO: with Stage 1)", kl="KL to π_ref (nats per answer)")
    with lab.picture(args.name, 1, 5, (17, 3.3)) as axes:
        for axis, (key, label) in zip(axes[0], panels.items()):
            for algorithm, some in runs.items():
                colour = lab.COLOURS[algorithm]
                lines = [[(row[key], row["accuracy"]) for row in run["rows"] if key in row and "accuracy" in row]
                         for run in some]
                for line in lines * (key != "kl"):
                    axis.plot(*zip(*line), color=colour, linewidth=0.5, alpha=0.4)
                axis.plot(*np.mean(lines, axis=0).T, color=colour, linewidth=2, label=lab.NAMES[algorithm])
            for goal in args.reach * (key != "kl"):
                axis.axhline(goal, color="0.8", linewidth=0.8, zorder=0)
            axis.set(xlabel=label, ylim=(0, 1), title="held-out accuracy" if key in ("step", "kl") else None)
        axes[0, 2].set_xscale("log")
        axes[0, 0].legend(frameon=False)


def show(table, chosen, args):
    """The table in the form of the paper's, as Markdown."""
    print(f"\n{args.seeds} seeds, {args.steps} steps; the mean and the deviation over the seeds\n")
    reached = {f"{name} to {goal:.2f}": digits for name, digits in dict(seconds=1, tokens=0, KL=2).items()
               for goal in args.reach}
    columns = dict(seconds=1, **reached, memory_gb=2, kl=2, accuracy=3)
    print(f"| | rate, β2 | {' | '.join(columns)} |\n" + "|---" * (len(columns) + 2) + "|")
    for algorithm, name in lab.NAMES.items():
        print(f"| {name} | {', '.join(chosen[algorithm])} | "
              + " | ".join(lab.pm(table[algorithm][key], count) for key, count in columns.items()) + " |")
    print("\n| the paper, MATH | hours | GPU memory (%) | KL | MATH500 |\n|---|---|---|---|---|")
    for algorithm, name in lab.NAMES.items():
        columns = (" / ".join(f"{number:g}" for number in numbers) for numbers in zip(*PAPER[algorithm]))
        print(f"| {name} | {' | '.join(columns)} |")


if __name__ == "__main__":
    main()
