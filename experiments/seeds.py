"""The embedded world from five seeds, both stages: does it always learn?

    python -m experiments.seeds              → experiments/results/seeds.json, .png            (4 minutes on two cores)

Restartable: what is in out/seeds/ is not run again.
"""

from experiments import lab


def main():
    args = lab.make_parser(__doc__, steps=120).parse_args()
    curves = {}
    for seed in range(args.seeds):
        first = lab.stage1(args, f"out/seeds/{seed}", f"--seed={seed}")
        spent, curves[seed] = 0.0, []
        for row in lab.train(args, f"out/seeds/{seed}", first, f"--seed={seed}"):
            spent += sum(row["seconds"].values())  # all of a run, its evaluations too
            kept = {key: round(row[key], 4) for key in ("step", "accuracy", "reward", "length", "kl") if key in row}
            curves[seed].append(dict(kept, seconds=round(spent, 1)))
    lab.save("seeds", curves=curves)
    draw(curves)
    print("after:", "  ".join(f"seed {seed}: {curve[-1]['accuracy']:.3f}" for seed, curve in curves.items()))


def draw(curves):
    panels = (("step", "accuracy", "held-out accuracy, temperature 1"),
              ("seconds", "accuracy", "the same, over seconds of Stage 2"),
              ("step", "length", "tokens per answer"), ("step", "kl", "KL to π_ref"))
    with lab.picture("seeds", 1, 4, (13, 3)) as axes:
        for axis, (x, y, title) in zip(axes[0], panels):
            for curve in curves.values():
                axis.plot(*zip(*((point[x], point[y]) for point in curve if y in point)), linewidth=1)
            axis.set(title=title, xlabel=x)
            if y == "accuracy":
                axis.set_ylim(0, 1)
                axis.axhline(0.9, color="0.8", linewidth=0.8, zorder=0)


if __name__ == "__main__":
    main()
