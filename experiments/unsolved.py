"""What theory assumes and practice breaks, v_ref > 0: what harm do prompts do that π_ref never solves?

    python -m experiments.unsolved           → experiments/results/unsolved.json, .png         (the embedded world)

Of 1,024 training prompts a growing share is replaced by sums of seven and eight digits. The embedded π_ref, which adds
two to four, practically never solves them. There are four ways to train: on all prompts; on all with a tenth of β2,
which is a weaker pull to π_ref; with --filter unsolved; and with --filter both, which leaves out what π_ref always
solves too. Each takes as many steps, and the held-out problems are the same. `at_equal_seconds` (or tokens) is the
accuracy when the quickest of the four had taken all its steps. Restartable: what is in out/unsolved/ is not run again.
"""

import json
from itertools import product

import numpy as np

from experiments import lab

SHARES = [0.0, 0.1, 0.25, 0.5, 0.75]
VARIANTS = {"all prompts": [], "β2 = 0.01": ["--beta2=0.01"], "unsolved": ["--filter=unsolved"],
            "both": ["--filter=both"]}  # β2 is 0.1 otherwise


def main():
    args = lab.make_parser(__doc__, steps=40, seeds=3).parse_args()
    folder = lab.ROOT / "out/unsolved"
    easy = lab.read(lab.ROOT / "tiny/train.jsonl")
    hard = lab.read(lab.problems(folder / "long.jsonl", len(easy), [7, 8], "+", 0))
    for share in SHARES:
        count = round(share * len(easy))
        (folder / f"{share}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in hard[:count] + easy[count:]))

    def reference(share, seed):
        return lab.stage1(args, folder / f"stage1/{share}-{seed}", f"--data={folder}/{share}.jsonl",
                          "--max_new_tokens=96", f"--seed={seed}", threads=1)

    def one(share, variant, seed):
        out = folder / f"{share}-{variant.replace(' ', '')}-{seed}"
        rows = lab.train(args, out, reference(share, seed), *VARIANTS[variant], f"--seed={seed}", "--eval_every=5",
                         threads=1)
        late = {key: lab.mean(key, rows[-10:]) for key in ("unsolved", "vstar", "reward", "loss", "kl", "length")}
        spent = np.cumsum([[lab.seconds_of(row), row["tokens"]] for row in rows], axis=0)
        return dict(late, accuracy=lab.accuracies(rows)[-1], loss_first=lab.mean("loss", rows[1:11]),
                    seconds=spent[-1][0], curve=[[row["step"], row["accuracy"], *cost]
                           for row, cost in zip(rows, spent) if "accuracy" in row])

    lab.side_by_side(args, [lambda x=x: reference(*x) for x in product(SHARES, range(args.seeds))])
    runs = list(product(SHARES, VARIANTS, range(args.seeds)))
    found = dict(zip(runs, lab.side_by_side(args, [lambda r=r: one(*r) for r in runs])))
    for share, seed in product(SHARES, range(args.seeds)):
        curves = np.array([found[share, variant, seed]["curve"] for variant in VARIANTS])  # (variants, points, 4)
        for variant, curve in zip(VARIANTS, curves):
            for column, unit in ((2, "seconds"), (3, "tokens")):
                least = curves[:, -1, column].min()
                found[share, variant, seed][f"at_equal_{unit}"] = float(np.interp(least, curve[:, column], curve[:, 1]))
    results = {}
    for share, variant in product(SHARES, VARIANTS):
        some = [found[share, variant, seed] for seed in range(args.seeds)]
        row = results[label_of(share, variant)] = lab.over_seeds(some)
        row["curve"] = np.mean([one["curve"] for one in some], axis=0).round(4).tolist()
        print(f"{label_of(share, variant):22s} accuracy {lab.pm(row['accuracy'])}, at equal seconds "
              f"{lab.pm(row['at_equal_seconds'])}, tokens {lab.pm(row['at_equal_tokens'])}   "
              f"V̂* {lab.pm(row['vstar'])}   loss {lab.pm(row['loss_first'])} → {lab.pm(row['loss'])}   "
              f"KL {lab.pm(row['kl'], 2)}   length {lab.pm(row['length'], 1)}   {row['seconds'][0]:.0f} s")
    lab.save("unsolved", settings=dict(steps=args.steps, seeds=args.seeds), results=results)
    draw(results)


def label_of(share, variant):
    return f"{share:.0%} long, {variant}"


def draw(results):
    titles = dict(accuracy="held-out accuracy", vstar="mean V̂* of the prompts used", loss="loss, last ten steps")
    with lab.picture("unsolved", 1, 3, (11.5, 3.6)) as axes:
        for variant, style in zip(VARIANTS, ("o-", "^:", "s--", "x-.")):
            for axis, (key, title) in zip(axes[0], titles.items()):
                means, deviations = zip(*(results[label_of(share, variant)][key] for share in SHARES))
                axis.errorbar(SHARES, means, [deviation or 0 for deviation in deviations], fmt=style, capsize=3,
                              label=variant)
                axis.set(title=title, xlabel="share of prompts with v_ref ≈ 0")
        for axis in axes[0]:
            axis.set_ylim(bottom=0)
        axes[0, 0].legend(frameon=False)


if __name__ == "__main__":
    main()
