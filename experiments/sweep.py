"""Some ways to train, each from several seeds: a table, a picture, and results/NAME.json.

    python -m experiments.sweep seeds --seeds 5 --steps 120
    python -m experiments.sweep lora --ways apo 'apo --lora=16 --lr=1.5e-3' 'grpo --group=4'
    python -m experiments.sweep long --ways apo 'apo --filter=unsolved after --data=long.jsonl'

A way is an algorithm (apo, or one of experiments/baselines.py) and its flags of Stage 2. A way that needs a
Stage 1 of its own names flags for that behind the word `after`; all others share one per seed. With
--evaluate '--data test.jsonl --samples 8', evaluate.py measures π_ref and every model. What an earlier start
has finished in out/NAME/ is not run again.
"""

import json
import re
import shlex
from itertools import product
from pathlib import Path

import numpy as np

from experiments import lab
from experiments.compare import stage1_cost
from vstar import batched

MEANS = ("reward", "loss", "kl", "entropy", "length")  # in the table: those of the last ten steps


def main():
    parser = make_parser()
    parser.add_argument("name", help="of the results, and of the folder in out/")
    sweep(parser.parse_args())


def make_parser(description=__doc__):
    parser = lab.make_parser(description, steps=40, seeds=3)
    add = parser.add_argument
    add("--ways", nargs="+", default=["apo"], help="each: ALGORITHM FLAGS [after FLAGS]")
    add("--evaluate", help="evaluate.py's flags, but --model and --out: measure π_ref and each model")
    return parser


def sweep(args):
    runs = list(product(args.ways, range(args.seeds)))
    firsts = {(first_flags(way), seed) for way, seed in runs}  # several ways share one
    lab.side_by_side(args, stage1, firsts)
    before = {}
    if args.evaluate:
        config = lab.ROOT / folder(args, f"stage1 {first_flags(args.ways[0])}", 0) / "vstar.config.json"
        model = json.loads(config.read_text())["settings"]["model"]
        before = evaluated(args, folder(args, "before", 0), model)
    found = lab.side_by_side(args, stage2, runs)

    table, seeds_of, rows = {}, {}, []
    for way, seeds in zip(args.ways, batched(found, args.seeds)):
        table[way], seeds_of[way] = lab.over_seeds(seeds), seeds
        rows.append([f"`{way}`", *map(lab.pm, table[way].values())])
    lab.save(args.name, steps=args.steps, before=before, table=table, runs=seeds_of)
    lab.show(["", *table[way]], rows)
    print("π_ref:", before)
    with lab.picture(args.name) as (axis,):
        for way, seeds in seeds_of.items():
            curves = [run["curve"] for run in seeds]
            lab.draw_seeds(axis, *np.transpose(curves), way)  # steps and accuracies, (points, seeds) each
        axis.set_xlabel("steps")


def first_flags(way):
    return way.partition(" after ")[2]


def folder(args, name, seed):
    """The flags are the name, so that a later start may have other ways, in another order."""
    return Path("out", args.name, re.sub(r"[\s/]+", "_", name), str(seed))


def stage1(args, flags, seed):
    out = folder(args, f"stage1 {flags}", seed)
    return lab.stage1(args, out, f"--seed={seed}", *shlex.split(flags), **lab.ONE_THREAD)


def stage2(args, way, seed):
    """→ what the table and the picture hold of one run"""
    algorithm, *flags = shlex.split(way.partition(" after ")[0])
    vstar = stage1(args, first_flags(way), seed)  # already there
    out = folder(args, way, seed)
    rows = lab.train(args, out, vstar, f"--seed={seed}", *flags, algorithm=algorithm, **lab.ONE_THREAD)
    late = {key: lab.mean(key, rows[-10:]) for key in MEANS}
    seconds = sum(map(lab.seconds_of, rows))
    if algorithm == "apo":  # the others need no Stage 1
        seconds += stage1_cost(vstar.parent)[1]
    memory = max(row.get("memory_gb", 0) for row in rows)
    measured = evaluated(args, out, lab.ROOT / out / "run/model") if args.evaluate else {}
    return dict(accuracy=rows[-1]["accuracy"], **late, seconds=seconds, memory_gb=memory, **measured,
                curve=lab.curve(rows))


def evaluated(args, out, model):
    """{"DATA accuracy": …, "DATA pass@k": …, "DATA majority": …} by evaluate.py"""
    out = lab.ROOT / out / "eval"
    flags = [f"--model={model}", *shlex.split(args.evaluate), f"--out={out}", "--overwrite"]
    lab.run(args, "evaluate", out, "results.json", *flags, **lab.ONE_THREAD)
    (results,) = json.loads((out / "results.json").read_text()).values()
    found = {}
    for data, result in results.items():
        name = Path(data).stem
        found[f"{name} accuracy"] = result["accuracy"]
        found |= {f"{name} pass@{k}": result["pass"][k] for k in result["pass"] if k in ("2", "4", "8")}
        found |= {f"{name} {key}": result[key] for key in ("majority", "reward") if key in result}
    return found


if __name__ == "__main__":
    main()
