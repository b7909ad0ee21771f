"""What becomes of problems that are not trained on?

    python -m experiments.transfer           → experiments/results/transfer.json, .png         (makes its own π_ref)

A π_ref that adds and subtracts two to six digits learns from additions of two to four alone: by A*-PO, by A*-PO with
the mean reward in V̂*'s place (β1 = inf), and by GRPO. Then evaluate.py measures all three and π_ref, on new problems
of the trained kind, on longer sums and on subtraction. Restartable: what is in out/transfer/ is not run again.
"""

import json
from pathlib import Path

import numpy as np

from experiments import lab

KINDS = dict(before="π_ref", apo="A*-PO", mean="A*-PO, β1 = inf", grpo="GRPO")
TESTS = dict(trained="+, 2–4 digits\n(trained on)", longer="+, 5–6 digits", minus="−, 2–4 digits")


def main():
    parser = lab.make_parser(__doc__, steps=40, seeds=3)
    parser.add_argument("--world", default="--operators + - --digits 2 3 4 5 6 --hidden 128 --steps 4000",
                        help="tiny/make.py's flags")
    args = parser.parse_args()
    folder = lab.ROOT / "out/transfer"
    world = folder / "world"
    if not (world / "vstar.args").exists():
        lab.make_world(args.world, world)
    data = lab.problems(folder / "plus.jsonl", 1024, [2, 3, 4], "+", 1)
    tests = dict(trained=lab.problems(folder / "trained.jsonl", 512, [2, 3, 4], "+", 2, but=[data]),
                 longer=lab.problems(folder / "longer.jsonl", 512, [5, 6], "+", 3),
                 minus=lab.problems(folder / "minus.jsonl", 512, [2, 3, 4], "-", 4))

    def one(kind, seed):
        out, common = folder / f"{kind}-{seed}", ["--max_new_tokens=96", f"--seed={seed}"]
        first = lab.stage1(args, folder / f"stage1/{seed}", f"--model={world}/model", f"--data={data}", *common,
                           threads=1)
        if kind != "before":
            more = dict(apo=[], mean=["--beta1=inf"], grpo=["--decode_rows=1024"])[kind]
            lab.train(args, out, first, f"--eval_data={tests['trained']}", f"--seed={seed}", *more,
                      algorithm="grpo" if kind == "grpo" else "apo", threads=1)
        model = world / "model" if kind == "before" else out / "run/model"
        lab.run(args, "evaluate", out, "eval/results.json", f"--model={model}", "--data", *tests.values(),
            "--prompt={question}", "--samples=4", "--decode_rows=1024", f"--out={out}/eval", *common, threads=1)
        (found,) = json.loads((out / "eval/results.json").read_text()).values()
        return {Path(path).stem: measured["accuracy"] for path, measured in found.items()}

    lab.side_by_side(args, [lambda s=s: one("before", s) for s in range(args.seeds)])
    runs = [(kind, seed) for kind in KINDS for seed in range(args.seeds)]
    found = dict(zip(runs, lab.side_by_side(args, [lambda r=r: one(*r) for r in runs])))
    results = {kind: lab.over_seeds([found[kind, seed] for seed in range(args.seeds)]) for kind in KINDS}
    lab.save("transfer", settings=dict(steps=args.steps, seeds=args.seeds, world=args.world), results=results)
    draw(results)
    for kind, row in results.items():
        print(f"{kind:8s}" + "".join(f"   {name} {lab.pm(row[name])}" for name in TESTS))


def draw(results):
    with lab.picture("transfer", 1, 1, (5.5, 3.6)) as axes:
        axis = axes[0, 0]
        for i, (kind, label) in enumerate(KINDS.items()):
            means, deviations = zip(*(results[kind][name] for name in TESTS))
            deviations = [deviation or 0 for deviation in deviations]
            axis.bar(np.arange(3) + 0.2 * i - 0.3, means, 0.2, label=label, yerr=deviations)
        axis.set_xticks(range(3), TESTS.values())
        axis.set(title="accuracy on other problems", ylim=(0, 1.35))
        axis.legend(frameon=False, ncols=2, fontsize=8)


if __name__ == "__main__":
    main()
