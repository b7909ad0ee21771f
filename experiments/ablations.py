"""What each choice in A*-PO is worth: N, β1, β2, and leaving out the prompts that π_ref never solved.

    python -m experiments.ablations          → experiments/results/ablations.json, .png        (the embedded world)

One choice at a time is varied around N = 8, β1 = 0.5, β2 = 0.1. Stage 1 samples 32 answers a prompt once per seed; a
smaller N takes the first of them. Every run has as many steps, except that filtering takes fewer where it leaves fewer
prompts, so that each remaining prompt is seen equally often. Restartable: what is in out/ablations/ is not run again.
"""

import numpy as np

from experiments import lab

BASE = dict(samples=8, beta1=0.5, beta2=0.1, filter=0)
VARY = dict(samples=[1, 2, 4, 8, 16, 32], beta1=["inf", 2, 1, 0.5, 0.25, 0.125], beta2=[1e-3, 1e-2, 1e-1, 1, 10],
            filter=[0, 1])
LABELS = dict(samples="N", beta1="β1", beta2="β2", filter="--filter unsolved")
LINES = dict(accuracy="held-out accuracy", reward="mean reward over the run", loss="loss, last ten steps")


def main():
    args = lab.make_parser(__doc__, steps=40, seeds=3).parse_args()

    def reference(seed):
        return lab.stage1(args, f"out/ablations/stage1/{seed}", "--samples=32", f"--seed={seed}", threads=1)

    def one(name, value, seed):
        choice, first = {**BASE, name: value}, reference(seed)
        steps = args.steps
        if choice["filter"]:
            steps = round(steps * np.mean([any(row["rewards"][: choice["samples"]]) for row in lab.read(first)]))
        out = "out/ablations/" + (f"{name}-{value}" if value != BASE[name] else "base") + f"/{seed}"
        rows = lab.train(args, out, first, f"--samples={choice['samples']}", f"--beta1={choice['beta1']}",
                     f"--beta2={choice['beta2']}", *["--filter=unsolved"] * choice["filter"], f"--seed={seed}",
                     f"--steps={steps}", threads=1)
        return dict(accuracy=lab.accuracies(rows)[-1], reward=lab.mean("reward", rows[1:]),
                    loss=lab.mean("loss", rows[-10:]), kl=lab.mean("kl", rows[-10:]), vstar=lab.mean("vstar", rows[1:]),
                    seconds=sum(map(lab.seconds_of, rows)), steps=steps)

    # Stage 1 and the base are run first: two runs at a time would both make what they share
    lab.side_by_side(args, [lambda s=s: reference(s) for s in range(args.seeds)])
    lab.side_by_side(args, [lambda s=s: one("samples", BASE["samples"], s) for s in range(args.seeds)])
    runs = [(name, value, seed) for name, values in VARY.items() for value in values for seed in range(args.seeds)]
    found = lab.side_by_side(args, [lambda r=r: one(*r) for r in runs])
    results = {}
    for (name, value, _), result in zip(runs, found):
        results.setdefault(f"{LABELS[name]} {value}", []).append(result)
    results = {label: lab.over_seeds(some) for label, some in results.items()}
    lab.save("ablations", base=dict(steps=args.steps, seeds=args.seeds, **BASE), results=results)
    draw(results)
    for label, row in results.items():
        print(f"{label:20s} accuracy {lab.pm(row['accuracy'])}   mean reward {lab.pm(row['reward'])}   "
              f"loss {lab.pm(row['loss'], 4)}   KL {lab.pm(row['kl'], 2)}   {row['seconds'][0]:.0f} s")


def draw(results):
    """Accuracy at the end and mean reward over the run above, the loss at the end below; bars: deviation over seeds."""
    with lab.picture("ablations", 2, 4, (14, 5), sharey="row", width_ratios=[6, 6, 5, 2]) as axes:
        for column, (name, values) in enumerate(VARY.items()):
            some, ticks = [results[f"{LABELS[name]} {value}"] for value in values], range(len(values))
            for axis, keys in zip(axes[:, column], (("accuracy", "reward"), ("loss",))):
                for key in keys:
                    means, deviations = zip(*(row[key] for row in some))
                    axis.errorbar(ticks, means, [deviation or 0 for deviation in deviations], fmt="o-", markersize=4,
                                  linewidth=1, capsize=3, label=LINES[key])
                axis.set_xticks(ticks, ["off", "on"] if name == "filter" else [str(value) for value in values])
            axes[1, column].set_xlabel(LABELS[name])
        for axis in axes[:, 0]:
            axis.legend(frameon=False)
        axes[1, 0].set_yscale("log")


if __name__ == "__main__":
    main()
