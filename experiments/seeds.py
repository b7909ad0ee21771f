"""The embedded world from five seeds, both stages: does it always learn?

    python experiments/seeds.py            → experiments/seeds.json, experiments/seeds.png   (about 4 minutes on two cores)

Restartable: what is in out/seeds/ already is not run again.
"""

import argparse

import matplotlib.pyplot as plt
from lab import HERE, add_flags, save, stage1, train


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_flags(parser, steps=120)
    args = parser.parse_args()
    curves = {}
    for seed in range(args.seeds):
        first = stage1(args, f"out/seeds/{seed}", f"--seed={seed}")
        spent, curves[seed] = 0.0, []
        for row in train(args, f"out/seeds/{seed}", first, f"--seed={seed}"):
            spent += sum(row["seconds"].values())
            kept = {key: round(row[key], 4) for key in ("step", "accuracy", "reward", "length", "kl") if key in row}
            curves[seed].append(dict(kept, seconds=round(spent, 1)))
    save("seeds", curves=curves)
    figure, axes = plt.subplots(1, 4, figsize=(13, 3), layout="constrained")
    for axis, (x, y, label) in zip(axes, (("step", "accuracy", "held-out accuracy, temperature 1"),
                                          ("seconds", "accuracy", "the same, over seconds of Stage 2"),
                                          ("step", "length", "tokens per answer"), ("step", "kl", "KL to π_ref"))):
        for curve in curves.values():
            axis.plot(*zip(*((point[x], point[y]) for point in curve if y in point)), linewidth=1)
        axis.set(title=label, xlabel=x)
        axis.spines[["top", "right"]].set_visible(False)
        if y == "accuracy":
            axis.set_ylim(0, 1)
            axis.axhline(0.9, color="0.8", linewidth=0.8, zorder=0)
    figure.savefig(HERE / "seeds.png", dpi=110)
    print("after:", "  ".join(f"seed {seed}: {curve[-1]['accuracy']:.3f}" for seed, curve in curves.items()))


if __name__ == "__main__":
    main()
