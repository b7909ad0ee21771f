"""What do a second and a third round bring, against as many more steps of the first?

    python -m experiments.rounds             → experiments/results/rounds.json, .png           (makes its own π_ref)

A round is vstar.py with the latest policy as its model, and train.py from there: π_ref becomes the latest policy, and
V̂* is measured anew. The π_ref of this world works out short sums, seldom longer ones, and those of six digits hardly
ever. So many prompts have no right answer among N = 8. One round of all steps is set beside three rounds of a third of
them each, with all prompts and without those on which π_ref was always wrong (--filter both: or always right).
Seconds and tokens are those of the steps and of every round's Stage 1. Restartable: what is in out/rounds/ is not run
again.
"""

import numpy as np

from experiments import lab
from experiments.compare import stage1_cost

WORLD = "out/rounds/world"
WAYS = {"one round": (1, []), "one round, unsolved left out": (1, ["--filter=unsolved"]), "three rounds": (3, []),
        "three rounds, both left out": (3, ["--filter=both"])}


def main():
    parser = lab.make_parser(__doc__, steps=90)
    parser.set_defaults(stage1=f"@{WORLD}/vstar.args", train=f"@tiny/train.args --eval_data={WORLD}/test.jsonl")
    parser.add_argument("--world", default="--digits 2 3 4 5 6 --worked 0.4 0.01 --steps 3600",
                        help="tiny/make.py's flags")
    args = parser.parse_args()
    if WORLD in args.stage1 and not (lab.ROOT / WORLD / "vstar.args").exists():
        lab.make_world(args.world, WORLD)

    def reference(seed):
        return lab.stage1(args, f"out/rounds/stage1/{seed}", f"--seed={seed}", threads=1)

    def one(way, seed):
        (rounds, flags), first, model, curve = WAYS[way], reference(seed), [], []
        steps, found, step, spent = args.steps // rounds, {}, 0, np.zeros(2)
        for number in range(1, rounds + 1):
            out = lab.ROOT / f"out/rounds/{way.replace(' ', '-').replace(',', '')}/{seed}/{number}"
            if number > 1:
                first = lab.stage1(args, out, f"--seed={seed}", *model, threads=1)
            found[f"unsolved {number}"] = np.mean([not any(row["rewards"]) for row in lab.read(first)])
            found[f"solved {number}"] = np.mean([all(row["rewards"]) for row in lab.read(first)])
            spent += stage1_cost(first.parent)[::-1]
            for row in lab.train(args, out, first, f"--seed={seed}", f"--steps={steps}", "--eval_every=5", *flags,
                                 threads=1):
                spent += lab.seconds_of(row), row["tokens"]
                if "accuracy" in row:
                    curve.append([step + row["step"], row["accuracy"], *spent])
            model, step = [f"--model={out}/run/model"], step + steps
            found[f"accuracy {number}"] = curve[-1][1]
        return dict({key: float(value) for key, value in found.items()}, accuracy=curve[-1][1], seconds=spent[0],
                    tokens=spent[1], curve=curve)

    lab.side_by_side(args, [lambda s=s: reference(s) for s in range(args.seeds)])
    runs = [(way, seed) for way in WAYS for seed in range(args.seeds)]
    found = dict(zip(runs, lab.side_by_side(args, [lambda r=r: one(*r) for r in runs])))
    results = {}
    for way in WAYS:
        some = [found[way, seed] for seed in range(args.seeds)]
        row = results[way] = lab.over_seeds(some)
        row["curve"] = np.mean([one["curve"] for one in some], axis=0).round(4).tolist()
        after = [f"{lab.pm(row[f'accuracy {n}'])}, unsolved before {row[f'unsolved {n}'][0]:.0%}"
                 for n in range(1, WAYS[way][0] + 1)]
        print(f"{way:32s} {lab.pm(row['seconds'], 0)} s   accuracy " + "   ".join(after))
    lab.save("rounds", settings=dict(steps=args.steps, seeds=args.seeds, world=args.world), results=results)
    draw(results)


def draw(results):
    with lab.picture("rounds", 1, 2, (10, 3.8), sharey=True) as axes:
        for (way, row), style in zip(results.items(), ("k-", "k:", "r-", "r:")):
            steps, accuracy, seconds, _ = zip(*row["curve"])
            for axis, x in zip(axes[0], (steps, seconds)):
                axis.plot(x, accuracy, style, linewidth=1.2, label=way)
        axes[0, 0].set(xlabel="steps of all rounds", title="held-out accuracy")
        axes[0, 1].set(xlabel="seconds, each round's Stage 1 among them", title="the same")
        axes[0, 0].legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    main()
