"""Two ideas that would save completions, and a doubt, each tried as train.py with one function replaced.

    python -m experiments.ideas reuse @tiny/train.args --out out/reuse      REUSE=3 sets how many steps
    python -m experiments.ideas near @tiny/train.args --out out/near
    python -m experiments.ideas luck @tiny/train.args --samples 4 --filter unsolved --out out/luck

reuse: Stage 1 has paid for completions of π_ref, and at step 1 π is π_ref. So the first steps take those, one
of each prompt, and sample nothing. From step 2 on they are off-policy, and no importance weight says so.
near: a prompt that π_ref always or never solves teaches little. So the prompts are taken in the order of
|p̂ − ½|, p̂ the share of Stage 1's completions that were right.
luck: a filter keeps lucky prompts, and V̂* comes from the same N completions, so it is too high. Here V̂* comes
from the N completions after those that the filter has seen.
"""

import os
import sys

import numpy as np

import train
from rewards import fail
from vstar import RANK, WORLD, Completion, estimate_vstar, read_rows, run_script

STEPS = int(os.environ.get("REUSE", 1))
sample_of_step, check, settle = train.rollout, train.check_numbers, train.settle


def reuse(run, prompts, n=1):
    """Stage 1's completion number `epoch` of each prompt in the first steps, then the rollout as it is."""
    serial = prompts[0][0]
    if serial == train.HELD_OUT or serial >= STEPS * run.args.batch_size:
        return sample_of_step(run, prompts, n)
    rows = {row["id"]: row for row in read_rows(run.args.vstar)}
    samples = []
    for serial, problem in prompts:
        row = rows[problem["id"]]
        i = serial // len(rows) % len(row["responses"])
        tokens = run.tokenizer(row["responses"][i], add_special_tokens=False).input_ids
        tokens += [run.tokenizer.eos_token_id] * row["finished"][i]
        completion = Completion(tokens, row["finished"][i], [0.0] * len(tokens))
        samples.append(train.Sample(problem, completion, row["responses"][i], row["rewards"][i], serial))
    return samples


def check_sampled(numbers, step, *more):
    if step >= STEPS:  # before, no engine has sampled
        check(numbers, step, *more)


def near(problems, step, args):
    """In the order of |p̂ − ½|, of equals at random; from the front again when all had their turn."""
    shuffled = train.order_of(args.seed, 0, len(problems))
    apart = [abs(np.mean(problems[i]["rewards"]) - 0.5) for i in shuffled]
    order = shuffled[np.argsort(apart, kind="stable")]
    first = step * args.batch_size
    serials = range(first, first + args.batch_size)[RANK::WORLD]
    return [(serial, problems[order[serial % len(order)]]) for serial in serials]


def luck(args, stage1, n, rows):
    stored = {row["id"]: row["rewards"] for row in rows}
    rows = settle(args, stage1, n, rows)
    for row in rows:
        others = stored[row["id"]][args.samples : 2 * args.samples]
        row["vstar"] = float(estimate_vstar(others, args.beta1))
    return rows


IDEAS = dict(reuse=("rollout", reuse), near=("prompts_of_step", near), luck=("settle", luck))


def main():
    found = [flag for flag in sys.argv[1:] if flag in IDEAS]
    if len(found) != 1:
        fail(f"say which: python -m experiments.ideas {'|'.join(IDEAS)}, and then train.py's flags")
    sys.argv.remove(found[0])
    setattr(train, *IDEAS[found[0]])
    if found == ["reuse"]:
        train.check_numbers = check_sampled
    train.main()


if __name__ == "__main__":
    run_script(main)
