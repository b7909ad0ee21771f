"""Is V̂* from one or two answers better if answers of the average prompt are counted with them (train.py --prior)?

    python -m experiments.prior              → experiments/results/prior.json, .png            (the embedded world)

Few answers say little of their own prompt, and the average says something of each. For N = 1, 2 and 8, without and with
two such answers: E[(r − V̂*)²], on answers that V̂* has not seen; then a training, with its accuracy and its KL. Where
β2 holds the policy less, noise in V̂* lets it drift off. What is in out/prior/ is not run again.
"""

import numpy as np

import train
from experiments import lab

CHOICES = [(n, prior) for n in (1, 2, 8) for prior in (0, 2)]
BETA1, SEEN = 0.5, 8  # Stage 1 samples twice as many: the second half is for measuring


def main():
    parser = lab.make_parser(__doc__, steps=25)
    parser.add_argument("--name", default="prior", help="of the results")
    parser.add_argument("--beta2", default="0.01")
    args = parser.parse_args()
    out = lab.ROOT / "out" / args.name

    def reference(seed):
        return lab.stage1(args, out / f"stage1/{seed}", f"--samples={2 * SEEN}", f"--seed={seed}", threads=1)

    def one(n, prior, seed):
        return lab.train(args, out / f"{n}-{prior}/{seed}", reference(seed), f"--samples={n}", f"--prior={prior}",
                         f"--beta2={args.beta2}", f"--seed={seed}", "--eval_every=5", threads=1)

    firsts = lab.side_by_side(args, [lambda s=s: reference(s) for s in range(args.seeds)])
    rewards = np.concatenate([[row["rewards"] for row in lab.read(first)] for first in firsts])
    calls = [(*choice, seed) for choice in CHOICES for seed in range(args.seeds)]
    runs = dict(zip(calls, lab.side_by_side(args, [lambda c=c: one(*c) for c in calls])))
    table, curves = {}, {}
    for n, prior in CHOICES:
        some, key = [runs[n, prior, seed] for seed in range(args.seeds)], f"{n} {prior}"
        ends = [dict(accuracy=lab.accuracies(rows)[-1], kl=rows[-1]["kl"]) for rows in some]
        table[key] = found = dict(second_moment=round(second_moment(rewards, n, prior), 4), **lab.over_seeds(ends),
                                  accuracies=[end["accuracy"] for end in ends])
        curves[key] = [[(row["step"], row["accuracy"]) for row in train.evaluated(rows)] for rows in some]
        print(f"N {n}, prior {prior}: E[(r − V̂*)²] {found['second_moment']:.3f}, "
              f"accuracy {lab.pm(found['accuracy'])}, KL {lab.pm(found['kl'], 2)}")
    lab.save(args.name, settings=dict(stage1=args.stage1, train=args.train, beta2=args.beta2, steps=args.steps,
                                      seeds=args.seeds), table=table, curves=curves)
    draw(args.name, curves)


def second_moment(rewards, n, prior):
    """E[(r − V̂*)²] of π_ref's answers beyond the first SEEN, V̂* being made of the first n"""
    vstar = train.estimate_with_prior(rewards[:, :n], BETA1, prior)
    return float(((rewards[:, SEEN:] - vstar[:, None]) ** 2).mean())


def draw(name, curves):
    """Accuracy over steps, a panel for each N: each seed thin, their mean thick."""
    with lab.picture(name, 1, 3, (12, 3.3), sharey=True) as axes:
        for (n, prior), axis in zip(CHOICES, np.repeat(axes[0], 2)):
            colour, lines = ("tab:red", "0.4")[prior == 0], curves[f"{n} {prior}"]
            for line in lines:
                axis.plot(*zip(*line), color=colour, linewidth=0.5, alpha=0.5)
            axis.plot(*np.mean(lines, axis=0).T, color=colour, linewidth=2, label=f"--prior {prior}")
            axis.set(xlabel="steps", title=f"N = {n}")
            axis.legend(frameon=False)
        axes[0, 0].set_ylabel("held-out accuracy")


if __name__ == "__main__":
    main()
