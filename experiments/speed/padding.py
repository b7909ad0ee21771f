"""How much of an update on several GPUs is padding and waiting? Counted, without a GPU.

    python -m experiments.speed.padding                       lengths as on MATH, and of up to 16,384 tokens
    python -m experiments.speed.padding out/run/samples/000020.jsonl out/vstar.jsonl        lengths of yours

Of all processes' micro-batches the slowest counts, as FSDP makes the others wait for it. Their padded tokens,
over the real tokens of a process, minus 1: +52 % means that half as much again goes to padding and waiting.
`before` is the dealing as it was: each process trains on what it has sampled, and fills its micro-batches.
"""

import numpy as np

import train
from experiments import lab
from vstar import batched

# new tokens of a completion: their bound, and the median and spread of a lognormal distribution
SETTINGS = {"as on MATH": (1024, 400, 0.6), "up to 16,384": (16384, 4000, 0.9)}


def main():
    parser = lab.make_parser(__doc__)
    add = parser.add_argument
    add("files", nargs="*", help="rows with `lengths`, as vstar.py writes them")
    add("--processes", type=int, default=8)
    add("--batch_size", type=int, default=256, help="completions of a step, of all processes")
    add("--tokens_per_microbatch", type=int, default=16384)
    add("--prompt", type=int, nargs=2, default=[60, 250], help="tokens of a prompt, from … to …")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    drawn = {name: np.minimum(bound, rng.lognormal(np.log(median), spread, 60 * args.batch_size))
             for name, (bound, median, spread) in SETTINGS.items()}
    for file in args.files:
        lengths = [length for row in lab.read(lab.ROOT / file) for length in row["lengths"]]
        drawn[file] = rng.choice(lengths, 60 * args.batch_size)
    for name, lengths in drawn.items():
        lengths = (lengths + rng.integers(*args.prompt, len(lengths))).astype(int).tolist()
        steps = batched(lengths, args.batch_size)
        for label, share, groups in (("before", undealt, uncut), ("now", dealt, train.groups_of_like_length)):
            waste = np.mean([wasted(share(step, args), groups, args) for step in steps])
            print(f"{name:20s}{label:8s}{waste:+.0%}")


def undealt(lengths, args):
    return [lengths[rank :: args.processes] for rank in range(args.processes)]


def dealt(lengths, args):
    """As train.deal does it."""
    return undealt(sorted(lengths), args)


def uncut(lengths, tokens):
    """train.groups_of_like_length without its second condition"""
    groups = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def wasted(shares, groups, args):
    padded = []  # of each process, the padded tokens of each of its micro-batches
    for lengths in shares:
        found = groups(lengths, args.tokens_per_microbatch)
        padded.append([len(group) * max(lengths[i] for i in group) for group in found])
    count = max(map(len, padded))
    slowest = np.array([row + [0] * (count - len(row)) for row in padded]).max(0).sum()
    return slowest / np.mean([sum(lengths) for lengths in shares]) - 1


if __name__ == "__main__":
    main()
