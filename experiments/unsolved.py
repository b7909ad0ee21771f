"""What the theory assumes and practice breaks: prompts that π_ref never solves (v_ref ≈ 0), and other problems than the trained.

    python experiments/hard.py               → experiments/hard.json, hard.png               (on a CPU; makes its own π_ref)

First part: of 1,024 training prompts a growing share is replaced by sums of seven and eight digits, which the embedded π_ref
(two to four digits) practically never solves; with and without --filter_unsolved, and with a weaker pull to π_ref; equally many
steps, the same held-out problems.
Second part: a π_ref that adds and subtracts two to six digits learns from additions of two to four alone, by A*-PO and by GRPO;
what becomes of longer sums and of subtraction, with V̂* from N answers, and (in place of it) the mean reward, β1 = inf?
Restartable: what is in out/hard/ already is not run again.
"""

import argparse
import json
import random
import shlex
import subprocess
import sys
from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from lab import HERE, ROOT, accuracies, add_flags, mean_sd, pm, run, save, side_by_side, stage1, train

SHARES = [0.0, 0.25, 0.5, 0.75, 0.95]
VARIANTS = {"all prompts": [], "β2 = 0.01": ["--beta2=0.01"], "filtered": ["--filter_unsolved"]}  # β2 is 0.1 otherwise
WORLD = "--operators + - --digits 2 3 4 5 6 --hidden 128 --steps 4000"


def problems(path, count, digits, operator, seed, but=()):
    """A file of different problems, none of which is in the files `but`."""
    rng, rows = random.Random(seed), {}
    seen = {json.loads(line)["question"] for other in but for line in other.read_text().splitlines()}
    while len(rows) < count:
        length = rng.choice(digits)
        a, b = (rng.randint(10 ** (length - 1), 10**length - 1) for _ in range(2))
        a, b = (max(a, b), min(a, b)) if operator == "-" else (a, b)
        if f"{a}{operator}{b}=" not in seen:
            rows[f"{a}{operator}{b}="] = str(a + b if operator == "+" else a - b)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [dict(id=f"{path.stem}/{i}", question=question, answer=answer) for i, (question, answer) in enumerate(rows.items())]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_flags(parser, steps=40, seeds=3)
    args = parser.parse_args()
    folder = ROOT / "out/hard"
    unsolvable = unsolved_prompts(args, folder)
    transfer = other_problems(args, folder)
    save("hard", settings=dict(steps=args.steps, seeds=args.seeds, world=WORLD), unsolvable=unsolvable, transfer=transfer)
    picture(unsolvable, transfer)


def unsolved_prompts(args, folder):
    easy = [json.loads(line) for line in (ROOT / "tiny/train.jsonl").read_text().splitlines()]
    hard = [json.loads(line) for line in problems(folder / "long.jsonl", len(easy), [7, 8], "+", 0).read_text().splitlines()]
    for share in SHARES:
        count = round(share * len(easy))
        rows = hard[:count] + easy[count:]
        (folder / f"share-{share}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def reference(share, seed):
        return stage1(args, folder / f"stage1/{share}-{seed}", f"--data={folder}/share-{share}.jsonl", "--max_new_tokens=96",
                      f"--seed={seed}", threads=1)

    def one(share, variant, seed):
        out = folder / f"share-{share}-{variant.replace(' ', '')}-{seed}"
        rows = train(args, out, reference(share, seed), *VARIANTS[variant], f"--seed={seed}", "--eval_every=5", threads=1)
        mean = lambda key, some=rows[-10:]: float(np.mean([row[key] for row in some]))
        return dict(accuracy=accuracies(rows)[-1], unsolved=mean("unsolved"), vstar=mean("vstar"), reward=mean("reward"),
                    loss=mean("loss"), loss_first=mean("loss", rows[1:11]), kl=mean("kl"), length=mean("length"),
                    seconds=sum(row["seconds"][phase] for row in rows for phase in ("sampling", "reference", "update")),
                    curve=[[row["step"], row["accuracy"]] for row in rows if "accuracy" in row])

    side_by_side(args, [lambda x=x: reference(*x) for x in product(SHARES, range(args.seeds))])
    runs = list(product(SHARES, VARIANTS, range(args.seeds)))
    found = dict(zip(runs, side_by_side(args, [lambda r=r: one(*r) for r in runs])))
    results = {}
    for share in SHARES:
        for variant in VARIANTS:
            some = [found[share, variant, seed] for seed in range(args.seeds)]
            row = {key: mean_sd([one[key] for one in some]) for key in some[0] if key != "curve"}
            label = f"{share:.0%} long, {variant}"
            results[label] = dict(row, curve=np.mean([one["curve"] for one in some], axis=0).round(4).tolist())
            print(f"{label:22s} accuracy {pm(row['accuracy'])}   V̂* {pm(row['vstar'])}   loss {pm(row['loss_first'])} → "
                  f"{pm(row['loss'])}   KL {pm(row['kl'], 2)}   length {pm(row['length'], 1)}   {row['seconds'][0]:.0f} s")
    return results


def other_problems(args, folder):
    world = folder / "world"
    if not (world / "vstar.args").exists():
        subprocess.run([sys.executable, "tiny/make.py", *shlex.split(WORLD), f"--out={world}"], cwd=ROOT, check=True)
    data = problems(folder / "plus.jsonl", 1024, [2, 3, 4], "+", 1)
    tests = dict(trained=problems(folder / "trained.jsonl", 512, [2, 3, 4], "+", 2, but=[data]),
                 longer=problems(folder / "longer.jsonl", 512, [5, 6], "+", 3),
                 minus=problems(folder / "minus.jsonl", 512, [2, 3, 4], "-", 4))
    length = ["--max_new_tokens=96"]

    def one(kind, seed):
        first = stage1(args, folder / f"stage1/world-{seed}", f"--model={world}/model", f"--data={data}", *length, f"--seed={seed}",
                       threads=1)
        out = folder / f"{kind}-{seed}"
        if kind != "before":
            more = dict(apo=[], mean=["--beta1=inf"], grpo=["--algo=grpo", "--batch=1024"])[kind]
            train(args, out, first, f"--eval_data={tests['trained']}", f"--seed={seed}", *more, threads=1)
        model = world / "model" if kind == "before" else out / "run/model"
        run(args, "evaluate", out, "eval/results.json", f"--model={model}", "--data", *tests.values(), "--suffix=", *length,
            "--samples=4", "--batch=1024", f"--out={out}/eval", f"--seed={seed}", threads=1)
        (found,) = json.loads((out / "eval/results.json").read_text()).values()
        return {name: found[key]["accuracy"] for name, path in tests.items() for key in found if Path(key).name == path.name}

    side_by_side(args, [lambda s=s: one("before", s) for s in range(args.seeds)])
    runs = [(kind, seed) for kind in ("before", "apo", "mean", "grpo") for seed in range(args.seeds)]
    found = dict(zip(runs, side_by_side(args, [lambda r=r: one(*r) for r in runs])))
    results = {}
    for kind in ("before", "apo", "mean", "grpo"):
        results[kind] = {name: mean_sd([found[kind, seed][name] for seed in range(args.seeds)]) for name in tests}
        print(f"{kind:8s}" + "".join(f"   {name} {pm(pair)}" for name, pair in results[kind].items()))
    return results


def picture(unsolvable, transfer):
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.6), layout="constrained")
    for variant, style in zip(VARIANTS, ("o-", "^:", "s--")):
        rows = [unsolvable[f"{share:.0%} long, {variant}"] for share in SHARES]
        titles = dict(accuracy="held-out accuracy", vstar="mean V̂* of the prompts used", loss="loss, last ten steps")
        for axis, (key, title) in zip(axes, titles.items()):
            means, deviations = zip(*(row[key] for row in rows))
            axis.errorbar(SHARES, means, [deviation or 0 for deviation in deviations], fmt=style, capsize=3, label=variant)
            axis.set(title=title, xlabel="share of prompts with v_ref ≈ 0")
    for axis in axes[:3]:
        axis.set_ylim(bottom=0)
    axes[0].legend(frameon=False)
    names, kinds = dict(trained="+, 2–4 digits\n(trained on)", longer="+, 5–6 digits", minus="−, 2–4 digits"), dict(
        before="π_ref", apo="A*-PO", mean="A*-PO, β1 = inf", grpo="GRPO")
    for i, (kind, label) in enumerate(kinds.items()):
        axes[3].bar(np.arange(3) + 0.2 * i - 0.3, [transfer[kind][name][0] for name in names], 0.2, label=label,
                    yerr=[transfer[kind][name][1] or 0 for name in names])
    axes[3].set_xticks(range(3), names.values())
    axes[3].set(title="accuracy on other problems", ylim=(0, 1.35))
    axes[3].legend(frameon=False, ncols=2, fontsize=8)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE / "hard.png", dpi=110)


if __name__ == "__main__":
    main()
