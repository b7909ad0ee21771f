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
from functools import partial
from itertools import product

import numpy as np

from experiments import lab

SEARCH_SEED = 100
COLOURS = dict(apo="tab:red", grpo="tab:blue", rebel="tab:green", ppo="tab:orange")
PANELS = dict(step="steps", all_tokens="tokens (A*-PO: with Stage 1)", clock="seconds (A*-PO: with Stage 1)",
              kl="KL to π_ref (nats per completion)")


def main():
    parser = lab.make_parser(__doc__, steps=50)
    parser.set_defaults(stage1="@tiny/vstar.args --samples=2")
    add = parser.add_argument
    add("--name", default="compare", help="of the results, and of the folder in out/")
    add("--lrs", nargs="+", default=["3e-5", "1e-4", "3e-4", "1e-3", "3e-3"], help="the search's")
    add("--betas", nargs="+", default=["0.01", "0.1"], help="the search's β2")
    add("--reach", type=float, nargs="+", default=[0.80, 0.90], help="accuracies to which costs are counted")
    args = parser.parse_args()

    stage1(args, SEARCH_SEED, threads=1)
    tries = list(product(lab.NAMES, args.lrs, args.betas))
    rewards = lab.side_by_side(args, [partial(search, args, *choice) for choice in tries])
    chosen = {}
    for _, choice in sorted(zip(rewards, tries)):
        chosen[choice[0]] = choice[1:]  # the last, which is the best, stays

    runs = {algorithm: [] for algorithm in lab.NAMES}
    for seed, algorithm in product(range(args.seeds), lab.NAMES):
        rows = train(args, algorithm, *chosen[algorithm], seed, "--eval_every=2")
        first = stage1_cost(stage1(args, seed).parent) if algorithm == "apo" else (0, 0)
        add_costs(rows, *first)
        runs[algorithm].append(dict(measures(rows, args.reach), curve=points(rows)))
    table = {algorithm: lab.over_seeds(seeds) for algorithm, seeds in runs.items()}
    searched = {" ".join(choice): reward for choice, reward in zip(tries, rewards)}
    lab.save(args.name, search=searched, chosen=chosen, table=table, runs=runs)
    draw(args.name, runs)
    digits = {key: 0 if "tokens" in key else 2 for key in table["apo"]}
    digits["accuracy"] = 3
    rows = []
    for algorithm, row in table.items():
        numbers = [lab.pm(pair, digits[key]) for key, pair in row.items()]
        rows.append([lab.NAMES[algorithm], ", ".join(chosen[algorithm]), *numbers])
    lab.show(["", "lr, β2", *digits], rows)


def stage1(args, seed, **keywords):
    return lab.stage1(args, f"out/{args.name}/stage1/{seed}", f"--seed={seed}", **keywords)


def train(args, algorithm, lr, beta, seed, *flags, **keywords):
    out = f"out/{args.name}/{algorithm}/{lr}-{beta}-{seed}"
    vstar = stage1(args, seed, **keywords)
    flags = f"--lr={lr}", f"--beta2={beta}", f"--seed={seed}", "--decode_rows=1024", *flags
    return lab.train(args, out, vstar, *flags, algorithm=algorithm, **keywords)


def search(args, *choice):
    rows = train(args, *choice, SEARCH_SEED, "--eval_every=100000", threads=1)
    return lab.mean("reward", rows)


def stage1_cost(out):
    """Tokens and seconds of Stage 1's sampling."""
    tokens = sum(sum(row["lengths"]) for row in lab.read(out / "vstar.jsonl"))
    speeds = re.findall(r"([\d,]+) tokens/s", (out / "vstar.log").read_text(encoding="utf-8"))
    return tokens, tokens / float(speeds[-1].replace(",", ""))


def add_costs(rows, tokens, seconds):
    """What was spent up to each row. The clock counts the phases of the steps, not the evaluations."""
    for row in rows:
        tokens += row["tokens"]
        seconds += lab.seconds_of(row)
        row.update(all_tokens=tokens, clock=seconds)


def measures(rows, reach):
    """What the table holds of one run. NaN: it never came so far."""
    found = dict(seconds=rows[-1]["clock"])
    for goal in reach:
        there = next((row for row in rows if row.get("accuracy", 0) >= goal), {})
        for name, key in dict(steps="step", seconds="clock", tokens="all_tokens").items():
            found[f"{name} to {goal:.2f}"] = there.get(key, np.nan)
    found.update(memory_gb=rows[-1]["memory_gb"], kl=rows[-1]["kl"])
    return dict(found, accuracy=lab.accuracies(rows)[-1])


def points(rows):
    """A column for each panel, then the accuracy."""
    evaluated = [row for row in rows if "accuracy" in row]
    return [[row.get(key, 0) for key in (*PANELS, "accuracy")] for row in evaluated]


def draw(name, runs):
    """Held-out accuracy over steps, tokens, seconds and the KL: each seed thin, their mean thick."""
    with lab.picture(name, 1, len(PANELS), (14, 3.3), sharey=True) as (axes,):
        for algorithm, seeds in runs.items():
            *columns, accuracy = np.transpose([run["curve"] for run in seeds])  # (points, seeds) each
            colour = COLOURS[algorithm]
            for axis, x in zip(axes, columns):
                axis.plot(x, accuracy, color=colour, linewidth=0.5, alpha=0.4)
                axis.plot(x.mean(1), accuracy.mean(1), color=colour, label=lab.NAMES[algorithm])
        for axis, label in zip(axes, PANELS.values()):
            axis.set(xlabel=label)
        axes[0].set(ylabel="held-out accuracy", ylim=(0, 1))
        axes[0].legend(frameon=False)


if __name__ == "__main__":
    main()
