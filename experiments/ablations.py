"""What each choice in A*-PO is worth: N, β1, β2, and leaving out the prompts that π_ref never solved.

    python experiments/ablations.py          → experiments/ablations.json, ablations.png     (the embedded world, on a CPU)

One choice at a time is varied around N = 8, β1 = 0.5, β2 = 0.1. Stage 1 samples 32 answers a prompt once per seed; a smaller N
takes the first of them. Every run has as many steps, except that filtering takes fewer where it leaves fewer prompts, so that
each remaining prompt is seen equally often. Restartable: what is in out/ablations/ already is not run again.
"""

import argparse
import json

import matplotlib.pyplot as plt
import numpy as np
from lab import HERE, accuracies, add_flags, mean_sd, pm, save, side_by_side, stage1, train

BASE = dict(samples=8, beta1=0.5, beta2=0.1, filter=0)
VARY = dict(samples=[1, 2, 4, 8, 16, 32], beta1=["inf", 2, 1, 0.5, 0.25, 0.125], beta2=[1e-3, 1e-2, 1e-1, 1, 10], filter=[0, 1])
LABELS = dict(samples="N", beta1="β1", beta2="β2", filter="--filter_unsolved")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_flags(parser, steps=40, seeds=3)
    args = parser.parse_args()
    side_by_side(args, [lambda s=s: stage1(args, f"out/ablations/stage1/{s}", "--samples=32", f"--seed={s}", threads=1)
                        for s in range(args.seeds)])

    def one(name, value, seed):
        choice = {**BASE, name: value}
        first = stage1(args, f"out/ablations/stage1/{seed}")
        steps = args.steps
        if choice["filter"]:
            rewards = [json.loads(line)["rewards"][: choice["samples"]] for line in first.read_text(encoding="utf-8").splitlines()]
            steps = round(steps * np.mean([any(r) for r in rewards]))
        out = "out/ablations/" + (f"{name}-{value}" if value != BASE[name] else "base") + f"/{seed}"
        rows = train(args, out, first, f"--samples={choice['samples']}", f"--beta1={choice['beta1']}", f"--beta2={choice['beta2']}",
                     *["--filter_unsolved"] * choice["filter"], f"--seed={seed}", f"--steps={steps}", threads=1)
        mean = lambda key, some: float(np.mean([row[key] for row in some]))
        spent = sum(row["seconds"][phase] for row in rows for phase in ("sampling", "reference", "update"))
        return dict(accuracy=accuracies(rows)[-1], reward=mean("reward", rows[1:]), loss=mean("loss", rows[-10:]),
                    kl=mean("kl", rows[-10:]), vstar=mean("vstar", rows[1:]), seconds=spent, steps=steps)

    side_by_side(args, [lambda s=s: one("samples", BASE["samples"], s) for s in range(args.seeds)])  # all share these
    runs = [(name, value, seed) for name, values in VARY.items() for value in values for seed in range(args.seeds)]
    found = side_by_side(args, [lambda r=r: one(*r) for r in runs])
    results = {}
    for (name, value, _), result in zip(runs, found):
        results.setdefault(f"{LABELS[name]} {value}", []).append(result)
    results = {label: {key: mean_sd([run[key] for run in some]) for key in some[0]} for label, some in results.items()}
    save("ablations", base=dict(steps=args.steps, seeds=args.seeds, **BASE), results=results)
    picture(results)
    for label, row in results.items():
        print(f"{label:20s} accuracy {pm(row['accuracy'])}   mean reward {pm(row['reward'])}   loss {pm(row['loss'], 4)}   KL "
              f"{pm(row['kl'], 2)}   {row['seconds'][0]:.0f} s")


def picture(results):
    """Held-out accuracy at the end and mean reward over the run above, the loss at the end below; bars: deviation over seeds."""
    figure, axes = plt.subplots(2, 4, figsize=(14, 5), layout="constrained", sharey="row",
                                gridspec_kw=dict(width_ratios=[6, 6, 5, 2]))
    for column, (name, values) in enumerate(VARY.items()):
        some, ticks = [results[f"{LABELS[name]} {value}"] for value in values], range(len(values))
        for axis, keys in zip(axes[:, column], (("accuracy", "reward"), ("loss",))):
            for key in keys:
                axis.errorbar(ticks, [row[key][0] for row in some], [row[key][1] or 0 for row in some], fmt="o-", markersize=4,
                              linewidth=1, capsize=3, label=dict(accuracy="held-out accuracy", reward="mean reward over the run",
                                                                 loss="loss, last ten steps")[key])
            axis.set_xticks(ticks, ["off", "on"] if name == "filter" else [str(value) for value in values])
            axis.spines[["top", "right"]].set_visible(False)
        axes[1, column].set_xlabel(LABELS[name])
    for axis in axes[:, 0]:
        axis.legend(frameon=False)
    axes[1, 0].set_yscale("log")
    figure.savefig(HERE / "ablations.png", dpi=110)


if __name__ == "__main__":
    main()
