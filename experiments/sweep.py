"""Some ways to train, each from several seeds: a table, a picture, and results/NAME.json.

    python -m experiments.sweep seeds --seeds 5 --steps 120
    python -m experiments.sweep lora --ways apo 'apo --lora=16 --lr=1.5e-3' 'grpo --group=4'
    python -m experiments.sweep long --ways apo 'apo --filter=unsolved after --data=long.jsonl'

A way is an algorithm (apo, grpo, rebel or ppo) and its flags of Stage 2. A way that needs a Stage 1 of its
own names flags for that behind the word `after`; all others share one per seed. What an earlier start has
finished in out/NAME/ is not run again.
"""

import re
import shlex
from itertools import product
from pathlib import Path

import numpy as np

from experiments import lab
from vstar import batched

MEANS = ("reward", "loss", "kl", "length")  # in the table: those of the last ten steps


def main():
    parser = lab.make_parser(__doc__, steps=40, seeds=3)
    parser.add_argument("name", help="of the results, and of the folder in out/")
    parser.add_argument("--ways", nargs="+", default=["apo"], help="each: ALGORITHM FLAGS [after FLAGS]")
    args = parser.parse_args()
    runs = list(product(args.ways, range(args.seeds)))
    firsts = {(first_flags(way), seed) for way, seed in runs}  # several ways share one
    lab.side_by_side(args, stage1, firsts)
    found = lab.side_by_side(args, stage2, runs)

    table, curves, rows = {}, {}, []
    for way, seeds in zip(args.ways, batched(found, args.seeds)):
        table[way] = lab.over_seeds(seeds)
        curves[way] = [run["curve"] for run in seeds]
        rows.append([f"`{way}`", *map(lab.pm, table[way].values())])
    lab.save(args.name, steps=args.steps, table=table, curves=curves)
    lab.show(["", *table[way]], rows)
    with lab.picture(args.name) as (axis,):
        for way, seeds in curves.items():
            lab.draw_seeds(axis, *np.transpose(seeds), way)  # steps and accuracies, (points, seeds) each
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
    seconds, curve = sum(map(lab.seconds_of, rows)), lab.curve(rows)
    return dict(accuracy=rows[-1]["accuracy"], **late, seconds=seconds, curve=curve)


if __name__ == "__main__":
    main()
