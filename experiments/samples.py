"""How many answers should Stage 1 take?

    python -m experiments.samples            → experiments/results/samples.json, .png          (the embedded world)

More answers cost time in Stage 1, fewer make V̂* noisier and Stage 2 longer. vstar.py's `advise` says what is cheapest,
if the steps needed grow as the gradient's variance, and that as E[(r − V̂*)²] = σ² + b² + noise. Both are tried here.

First the variance. The gradient of an answer is (r − V̂*) ∇ ln π, up to a factor. It is taken for one answer of each
prompt, so that E[(r − V̂*)² |∇ ln π|²] can be summed over the noise of V̂* exactly, for π_ref and for a trained policy.

Then the cost: N answers to each of P prompts, and steps up to an accuracy. P is chosen so that this takes about 1,
3, 10 or 30 passes. Seconds are counts times the seconds of one answer in Stage 1 and one in Stage 2, medians over all
runs of a pace: a busy machine does not move the optimum. What is in out/samples/ is not run again.
"""

import json
import math
import random
import shutil
from types import SimpleNamespace

import numpy as np
import torch

import train
import vstar
from experiments import lab
from experiments.compare import stage1_cost

BETA1 = 0.5  # Stage 1's default
MOST = 32  # answers; every run takes the first N of these
CHOICES = (1, 2, 8, 32)
PACES = {  # batch and rate: the accuracy to which steps are counted, steps, and those between evaluations
    "128 3e-4": (0.8, ["--steps=14", "--eval_every=1"]),
    "16 1e-4": (0.8, ["--steps=54", "--eval_every=6"]),  # a step moves little, and Adam averages over ten
    "16 5e-4": (0.7, ["--steps=32", "--eval_every=2"]),  # too fast for so small a batch: here noise should cost most
}


def main():
    parser = lab.make_parser(__doc__, steps=0)
    add = parser.add_argument
    add("--world", help="tiny/make.py's flags, of a world to be made for these")
    add("--name", default="samples", help="of the results")
    add("--reach", type=float, help="the accuracy to which steps are counted, instead of each pace's own")
    add("--passes", type=int, nargs="+", default=[1, 3, 10, 30])
    add("--paces", nargs="+", default=list(PACES), choices=PACES)
    args = parser.parse_args()
    args.steps, out = 0, lab.ROOT / "out" / args.name  # each batch size has its own number of steps
    if args.world and not (out / "world/vstar.args").exists():
        lab.make_world(args.world, out / "world")

    def reference(seed):
        return lab.stage1(args, out / f"stage1/{seed}", f"--samples={MOST}", f"--seed={seed}", threads=1)

    def run(pace, prompts, n, seed):
        """→ steps to the accuracy, and the seconds of an answer"""
        batch, rate = pace.split()
        rows = lab.train(args, out / f"runs/{batch}-{rate}-{prompts}-{n}/{seed}",
                         first_prompts(reference(seed), prompts), f"--samples={n}", f"--batch_size={batch}",
                         f"--lr={rate}", f"--seed={seed}", *PACES[pace][1], "--eval_limit=256", threads=1)
        seconds = np.median([lab.seconds_of(row) / int(batch) for row in rows[1:]])
        return steps_to(args.reach or PACES[pace][0], rows), seconds

    def runs(pace, prompts, choices):
        """→ (steps, seconds), each (choices, seeds)"""
        calls = [lambda c=(n, seed): run(pace, prompts, *c) for n in choices for seed in range(args.seeds)]
        return np.array(lab.side_by_side(args, calls)).reshape(len(choices), args.seeds, 2).transpose(2, 0, 1)

    firsts = lab.side_by_side(args, [lambda s=s: reference(s) for s in range(args.seeds)])
    rewards = np.concatenate([[row["rewards"] for row in lab.read(first)] for first in firsts])
    everything = len(lab.read(firsts[0]))
    stage1 = float(np.median([stage1_cost(first.parent)[1] for first in firsts])) / everything / MOST
    moments = {n: float(vstar.second_moment(rewards, BETA1, n)[0]) for n in CHOICES}
    table = {}
    for pace in args.paces:
        batch = int(pace.split()[0])
        base = np.nanmean(runs(pace, everything, [MOST])[0])  # steps, with all prompts and all answers
        many = {passes: max(8, min(everything, round(base * batch / passes))) for passes in args.passes}
        found = {passes: runs(pace, prompts, CHOICES) for passes, prompts in many.items()}
        stage2 = float(np.median([seconds for _, seconds in found.values()]))
        for passes, (steps, _) in found.items():
            row = table[f"{pace} {passes}"] = dict(pace=pace, batch=batch, passes=passes, prompts=many[passes],
                                                   stage2=round(stage2, 6), steps=steps.round(2).tolist())
            mean = steps.mean(1)  # NaN, unless every seed gets there
            predicted = mean[-1] * np.array([moments[n] / moments[MOST] for n in CHOICES])
            for name, some in dict(seconds=mean, predicted=predicted).items():
                row[name] = (np.array(CHOICES) * many[passes] * stage1 + some * batch * stage2).round(3).tolist()
                known = [(seconds, n) for seconds, n in zip(row[name], CHOICES) if seconds == seconds]
                row[f"cheapest by {name}"] = min(known)[1] if known else None
    for key, row in table.items():
        print(f"batch, rate, passes {key:12s} {row['prompts']:5d} prompts, cheapest N {row['cheapest by seconds']}, "
              f"predicted {row['cheapest by predicted']}; steps "
              + ", ".join(lab.pm(lab.mean_sd(some), 1) for some in row["steps"]))
    trained = max((out / "runs").glob(f"128-*-{everything}-{MOST}/0")) / "run/model"
    gradients = {"π_ref": gradient(firsts[0]), "trained": gradient(firsts[0], trained)}
    settings = {key: value for key, value in vars(args).items() if key not in ("launch", "jobs", "steps")}
    lab.save(args.name, settings=settings, stage1=round(stage1, 6), choices=CHOICES,
             moments=moments, gradients=gradients, table=table)
    draw(args.name, table)


def steps_to(reach, rows):
    """The step at which held-out accuracy gets there, on a line between two evaluations; NaN: never"""
    points = [(row["step"], row["accuracy"]) for row in rows if "accuracy" in row]
    for (before, low), (step, accuracy) in zip(points, points[1:]):
        if accuracy >= reach:
            return before + (step - before) * (reach - low) / (accuracy - low)
    return math.nan


def first_prompts(first, count):
    """The same prompts for every N: the first so many of a shuffled Stage 1."""
    out = first.parent / f"{count}.jsonl"
    rows = lab.read(first)
    random.Random(0).shuffle(rows)
    out.write_text("".join(json.dumps(row) + "\n" for row in rows[:count]))
    shutil.copy(first.with_suffix(".config.json"), out.with_suffix(".config.json"))
    return out


def gradient(first, model=None, count=256):
    """E[(r − V̂*)² |∇ ln π|²] over one answer of each of some prompts, beside E[(r − V̂*)²] · E[|∇ ln π|²], for each N:
    how many times what it is at the largest. The dice of V̂* are summed out. model: what answers, by default π_ref"""
    args = SimpleNamespace(**json.loads(first.with_suffix(".config.json").read_text())["settings"], out=first)
    args.decode_rows, rows = count, vstar.read_rows(first)[:count]
    tokenizer, eos = vstar.ask(rows, args)
    policy = train.Policy(vstar.load_model(str(model or args.model), None, "float32", "cpu"))
    sampler = vstar.TransformersSampler(policy, eos, args.max_new_tokens, args.temperature, count)
    answers = [copies[0] for copies in sampler.generate([row["tokens"] for row in rows], 1, range(count))]
    graded = vstar.grade(args, tokenizer, list(zip(rows, answers)))
    squares = []  # |∇ ln π|² of each answer
    for row, answer in zip(rows, answers):
        ids = torch.tensor([row["tokens"] + answer.tokens])
        mask = torch.arange(ids.shape[1])[None] >= len(row["tokens"])
        policy.zero_grad()
        policy(input_ids=ids, mask=mask, temperature=args.temperature).sum().backward()
        squares.append(sum(float((p.grad**2).sum()) for p in policy.parameters() if p.grad is not None))
    found = {}
    for n in CHOICES:
        mean, noise = vstar.vstar_scatter(np.array([row["rewards"] for row in rows]), BETA1, n)
        apart = (np.array([reward for _, reward in graded]) - mean) ** 2 + noise
        found[n] = np.mean(apart * squares), apart.mean() * np.mean(squares)
    shares = {str(n): [round(float(value / last), 4) for value, last in zip(found[n], found[MOST])] for n in CHOICES}
    right = np.array([reward for _, reward in graded]) >= 1
    squares = {name: round(float(np.mean(np.array(squares)[some])), 1)
               for name, some in dict(right=right, wrong=~right).items()}
    return dict(accuracy=float(right.mean()), squares=squares, **shares)


def draw(name, table):
    paces = [*dict.fromkeys(row["pace"] for row in table.values())]
    with lab.picture(name, 1, len(paces), (4.5 * len(paces), 4)) as axes:
        for pace, axis in zip(paces, axes[0]):
            some = [row for row in table.values() if row["pace"] == pace]
            for row, colour in zip(some, ("tab:blue", "tab:green", "tab:orange", "tab:red")):
                axis.plot(CHOICES, row["seconds"], "o-", color=colour, linewidth=1.2, label=row["passes"])
                axis.plot(CHOICES, row["predicted"], ":", color=colour, linewidth=1.2)
            axis.set(xscale="log", xticks=CHOICES, xticklabels=CHOICES, xlabel="N", ylim=0,
                     title="batch {}, rate {}".format(*pace.split()), ylabel="seconds (dotted: predicted)")
            axis.minorticks_off()
            axis.legend(frameon=False, fontsize=8, title="passes")


if __name__ == "__main__":
    main()
