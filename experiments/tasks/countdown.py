"""Countdown: reach a target from given numbers with + - * /, each number used at most once. Many answers are right.

    python -m experiments.tasks.countdown    → experiments/results/countdown.json, .png        (makes its own π_ref)

The small world is an easy one, for a π_ref of 0.2M parameters: two of the three numbers make the target. π_ref has
seen three kinds of demonstrations, and imitates all:

    [4, 7, 9] 36=\\boxed{9-7}                        a guess, mostly wrong
    [4, 7, 9] 36=7+4=11:36,7-4=03:36,7*4=28:36,9+4=13:36,9-4=05:36,9*4=36:36;\\boxed{9*4}      tried out
    482+795=2+5=7;8+9=17;4+7+1=12;\\boxed{1277}      sums as in tiny/

Both stages then see Countdown alone. evaluate.py measures what became of the rest: four numbers and larger numbers
(never demonstrated), and sums.

A real model and the hub's problems, by the names of their fields; Stage 2 takes all of it from Stage 1:

    python vstar.py --model Qwen/Qwen2.5-3B --data Jiayi-Pan/Countdown-Tasks-3to4 --limit 10000 \\
        --question_field nums --answer_field target --reward experiments/tasks/countdown.py:reward --out out/c.jsonl \\
        --prompt 'Make {target} of {nums} with + - * /, each number at most once. Think, then write it in \\boxed{}.'
"""

import random
from collections import Counter
from fractions import Fraction
from functools import partial
from itertools import combinations
from pathlib import Path

from rewards import REFUSALS, ZERO, final_answers, read, value


def reward(response: str, row: dict, finished: bool) -> float:
    """1.0 if the last \\boxed{…} is made of `nums`, each at most as often as given, and its exact value is `target`.

    Nothing is computed before the left side was seen to hold + - * / and given numbers alone. An equation, 7*4+9 = 37,
    counts by its left side, and all its sides must be the target.
    """
    try:
        answer = read(final_answers(response)[-1] if finished else "")
        (tree,) = answer.items
        sides = tree[2:] if tree[:2] == ("relation", ("=",)) else (tree,)
        own = Counter(numbers_of(sides[0])) <= Counter(map(Fraction, row["nums"]))
        return float(own and not answer.unit and all(value(side) == row["target"] for side in sides))
    except REFUSALS:  # no box, no formula, a division by zero, …
        return 0.0


def numbers_of(tree):
    """All numbers in an expression. What is no + - * / of numbers has none."""
    kind, *members = tree
    if kind == "number":
        return members[:1]
    if kind not in "+-*/":
        raise ValueError(kind)
    # the sign of -4 is read as ZERO - 4; a 0 that somebody wrote is another object
    return [number for member in members if member is not ZERO for number in numbers_of(member)]


# ---------------------------------------------------------------------------------------------------------------------
# the small world

FOLDER, NAMED = Path("out/tasks/countdown"), "experiments/tasks/countdown.py:reward"
ASK = ["--prompt={nums} {target}=", "--question_field=nums", "--answer_field=target", "--max_new_tokens=136"]
RESULT = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b,
          "/": lambda a, b: 0 if a % b else a // b}  # 0: not allowed


def pairs(nums):
    """What two of the numbers make, from 1 to 99: [("7+4", 11), …]"""
    made = [(f"{max(pair)}{sign}{min(pair)}", result(max(pair), min(pair)))
            for pair in combinations(nums, 2) for sign, result in RESULT.items()]
    return [(expression, result) for expression, result in made if 0 < result < 100]


def problem(rng, size=3, low=1, high=12):
    """Numbers, and a target that two of them make."""
    nums = [rng.randint(low, high) for _ in range(size)]
    return nums, rng.choice(pairs(nums))[1]


def worked(rng, nums, target, slips=0.0):
    """Each pair in turn, with a slip here and there, until the target appears. It is written beside each result: a
    model so small learns to compare neighbours, and hardly ever to look up the prompt."""
    text = ""
    for expression, result in pairs(nums):
        result += rng.choice([-1, 1]) if rng.random() < slips else 0
        text += f",{expression}={result:02d}:{target:02d}"
        if result == target:
            break
    return f"{text[1:]};\\boxed{{{expression}}}"


def demonstration(rng, progress, but, slips=0.03, share=0.35):
    """Prompt and answer. The first lessons are all worked, or the small model would never learn to."""
    nums, target = problem(rng)
    while key(nums, target) in but:
        nums, target = problem(rng)
    tried = progress < 0.6 or rng.random() < share
    answer = worked(rng, nums, target, slips) if tried else f"\\boxed{{{rng.choice(pairs(nums))[0]}}}"
    return f"{nums} {target}=", answer


def key(nums, target):
    """The same for every order of the numbers."""
    return *sorted(nums), target


def problems(count, seed, **which):
    """Of TinyZero's form, {key: row}: no two have the same numbers and target, in any order."""
    rng, found = random.Random(seed), {}
    while len(found) < count:
        nums, target = problem(rng, **which)
        found.setdefault(key(nums, target), dict(nums=nums, target=target))
    return found


def make_world(folder, steps, train=1024, test=512):
    """The problems, and a π_ref that has seen none of those to train on and to test on."""
    from experiments.tasks.small import train_small, write  # torch

    asked = problems(train + test, seed=1)
    write(folder / "train.jsonl", list(asked.values())[:train])
    write(folder / "test.jsonl", list(asked.values())[train:])
    write(folder / "four.jsonl", problems(test, seed=2, size=4).values())
    write(folder / "large.jsonl", problems(test, seed=3, low=13, high=30).values())
    if not (folder / "world/tokenizer_config.json").exists():
        train_small(folder / "world", "0123456789+-*/=;}()[], :", partial(demonstration, but=asked), sums=0.2,
                    steps=steps)


def main():
    from experiments import lab  # here, because --reward runs this file: matplotlib, say, is not for it
    from experiments.tasks import small

    parser = small.make_parser(__doc__, FOLDER, __file__, 60, ASK)
    parser.add_argument("--lessons", type=int, default=2400, help="supervised steps of π_ref")
    args = parser.parse_args()
    make_world(lab.ROOT / FOLDER, args.lessons)
    others = {name: [*ASK, f"--reward={NAMED}", "--max_new_tokens=256", f"--data={FOLDER}/{name}.jsonl"]
              for name in ("four", "large")}
    small.experiment(args, "countdown", FOLDER, others)


if __name__ == "__main__":
    main()
