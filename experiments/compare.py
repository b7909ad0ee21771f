"""The paper's comparison: A*-PO, GRPO, REBEL and PPO on the same prompts, from the same π_ref, in one loop.

    python -m experiments.compare                                              the embedded world
    python -m experiments.compare --name compare-math --launch 'torchrun --nproc_per_node 8' --jobs 1 \\
        --lrs 1e-6 3e-6 --betas 1e-3 1e-4 --seeds 3 --steps 300 \\
        --stage1 '--model Qwen/Qwen2.5-1.5B --data math' --train '--eval_data math500'    a real model

First a search gives each algorithm its lr and its β2, the weight of the KL. All pairs are tried on one seed
of its own; the highest mean reward wins. (That is the reward of the training prompts; the held-out problems
take no part.) Then each seed is run by itself and timed. A*-PO's seconds and tokens include its Stage 1.
What an earlier start has finished in out/NAME/ is not run again. → experiments/results/NAME.json, NAME.png
"""

import re
from itertools import product

import numpy as np

from experiments import lab

SEARCH_SEED = 100
NAMES = dict(apo="A*-PO", grpo="GRPO", rebel="REBEL", ppo="PPO")
PANELS = {"step": "steps",
          "all_tokens": "tokens (A*-PO: with Stage 1)",
          "clock": "seconds (A*-PO: with Stage 1)",
          "kl": "KL to π_ref (nats per completion)"}


def main():
    parser = lab.make_parser(__doc__, steps=50)
    parser.set_defaults(stage1="@tiny/vstar.args --samples=2")
    add = parser.add_argument
    add("--name", default="compare", help="of the results, and of the folder in out/")
    add("--lrs", nargs="+", default=["3e-5", "1e-4", "3e-4", "1e-3", "3e-3"], help="the search's")
    add("--betas", nargs="+", default=["0.01", "0.1"], help="the search's β2")
    add("--reach", type=float, nargs="+", default=[0.80, 0.90], help="accuracies to which costs are counted")
    args = parser.parse_args()

    stage1(args, SEARCH_SEED, **lab.ONE_THREAD)
    tries = list(product(NAMES, args.lrs, args.betas))
    rewards = lab.side_by_side(args, search, tries)
    searched = {" ".join(choice): reward for choice, reward in zip(tries, rewards)}
    chosen = {}
    for _, (algorithm, *best) in sorted(zip(rewards, tries)):
        chosen[algorithm] = best  # the last, whose reward is the highest, stays

    runs = {algorithm: [] for algorithm in NAMES}
    for seed, algorithm in product(range(args.seeds), NAMES):
        rows = train(args, algorithm, *chosen[algorithm], seed, "--eval_every=2")
        tokens, seconds = 0, 0.0
        if algorithm == "apo":
            tokens, seconds = stage1_cost(stage1(args, seed).parent)
        add_costs(rows, tokens, seconds)
        runs[algorithm].append(measures(rows, args.reach))
    table = {algorithm: lab.over_seeds(seeds) for algorithm, seeds in runs.items()}
    lab.save(args.name, search=searched, chosen=chosen, table=table, runs=runs)
    draw(args.name, runs)
    header, rows = ["", "lr", "β2", *table["apo"]], []
    for algorithm, row in table.items():
        rows.append([NAMES[algorithm], *chosen[algorithm], *map(lab.pm, row.values())])
    lab.show(header, rows)


def stage1(args, seed, **environment):
    return lab.stage1(args, f"out/{args.name}/stage1/{seed}", f"--seed={seed}", **environment)


def train(args, algorithm, lr, beta, seed, *flags, **environment):
    out = f"out/{args.name}/{algorithm}/{lr}-{beta}-{seed}"
    vstar = stage1(args, seed, **environment)
    flags += f"--lr={lr}", f"--beta2={beta}", f"--seed={seed}", "--decode_rows=1024"
    return lab.train(args, out, vstar, *flags, algorithm=algorithm, **environment)


def search(args, *choice):
    rows = train(args, *choice, SEARCH_SEED, "--eval_every=100000", **lab.ONE_THREAD)
    return lab.mean("reward", rows)


def stage1_cost(out):
    """Tokens and seconds of Stage 1's sampling."""
    tokens = sum(sum(row["lengths"]) for row in lab.read(out / "vstar.jsonl"))
    speeds = re.findall(r"([\d,]+) tokens/s", (out / "vstar.log").read_text(encoding="utf-8"))
    return tokens, tokens / float(speeds[-1].replace(",", ""))


def add_costs(rows, tokens, seconds):
    """What was spent up to each row. The clock counts the phases of the steps, not the evaluations."""
    for row in rows:
        took = lab.seconds_of(row)
        tokens += took * row.get("tokens_per_second", 0)
        seconds += took
        row.update(all_tokens=tokens, clock=seconds)


def measures(rows, reach):
    """What the table and the picture hold of one run. NaN: it never came so far."""
    found = {key: rows[-1][key] for key in ("clock", "memory_gb", "kl", "accuracy")}
    evaluated = [row for row in rows if "accuracy" in row]
    for goal in reach:
        there = next((row for row in evaluated if row["accuracy"] >= goal), {})
        for key in ("step", "clock", "all_tokens"):
            found[f"{key} to {goal}"] = there.get(key, np.nan)
    # a column for each panel, then the accuracy
    found["curve"] = [[row.get(key, 0) for key in (*PANELS, "accuracy")] for row in evaluated]
    return found


def draw(name, runs):
    """Held-out accuracy over steps, tokens, seconds and the KL."""
    with lab.picture(name, len(PANELS)) as axes:
        for algorithm, seeds in runs.items():
            *columns, accuracy = np.transpose([run["curve"] for run in seeds])  # (points, seeds) each
            for axis, x in zip(axes, columns):
                lab.draw_seeds(axis, x, accuracy, NAMES[algorithm])
        for axis, label in zip(axes, PANELS.values()):
            axis.set_xlabel(label)


if __name__ == "__main__":
    main()
