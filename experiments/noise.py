"""Which V̂* makes the gradient least noisy, and whose completions make the noise?

    python -m experiments.noise --vstar out/vstar.jsonl                       → experiments/results/noise.json
    python -m experiments.noise --vstar out/vstar.jsonl --model out/run/model --name noise-trained

A completion's gradient is (r − b) ∇ ln π, up to a factor and but for β2's pull to π_ref, with V̂* or some
other number for b. Its mean g is the same for every b that depends on the prompt alone. Its noise is not: the
trace of its covariance is E[(r − b)² |∇ ln π|²] − |g|². `noise` is this over |g|²: the mean of so many
completions' gradients has as much noise as signal (McCandlish et al. 2018, the simple noise scale). Where it
is far above --prompts, |g|² cannot be told from 0, and the estimate may come out negative. All b are measured
on the same completions, one of each prompt, and on gradients of all weights.

Then the parts: which share of E[(r − b)² |∇ ln π|²] comes from right and wrong completions, of prompts that
π_ref solved in Stage 1 (once among its first eight) and of those that it did not, and how long they are.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from experiments import lab
from train import Policy
from vstar import (
    TransformersSampler,
    add_prompts,
    between_prompts,
    estimate_vstar,
    grade,
    load_model,
    prompt_seed,
    read_rows,
)


def main():
    parser = lab.make_parser(__doc__)
    add = parser.add_argument
    add("--vstar", type=Path, required=True, help="what vstar.py wrote; of N 8 at the most")
    add("--model", help="a policy; default: π_ref")
    add("--prompts", type=int, default=512, help="one completion of each")
    add("--name", default="noise", help="of the results")
    args = parser.parse_args()
    stage1 = json.loads(args.vstar.with_suffix(".config.json").read_text())["settings"]
    rows = read_rows(args.vstar)[: args.prompts]
    model = args.model or stage1["model"]
    rewards, lengths, gradients = gradients_of(model, rows, SimpleNamespace(**stage1))
    first = np.array([row["rewards"][:8] for row in rows])
    solved, right = first.max(1) >= 1, rewards >= 1
    choices = baselines_of(first, rewards, solved, stage1["beta1"])
    squares, totals = np.zeros(len(rows)), dict.fromkeys(choices, 0.0)
    for i, gradient in enumerate(gradients):  # one at a time: of a real model each is half a gigabyte
        squares[i] = gradient.square().sum()
        for name, b in choices.items():
            totals[name] += (rewards[i] - b[i]) * gradient
    noise = {name: noise_of(rewards - b, squares, totals[name]) for name, b in choices.items()}

    parts = {"right, solved prompts": right & solved, "right, unsolved prompts": right & ~solved,
             "wrong, solved prompts": ~right & solved, "wrong, unsolved prompts": ~right & ~solved}
    shares = {}
    for name, chosen in parts.items():
        if chosen.any():
            kind = dict(completions=chosen, tokens=lengths[chosen], square=squares[chosen])
            shares[name] = {key: float(values.mean()) for key, values in kind.items()}
            for choice, b in choices.items():
                every = (rewards - b) ** 2 * squares
                shares[name][choice] = float(every[chosen].sum() / every.sum())
    every = np.array([row["rewards"] for row in rows])
    means = dict(accuracy=right.mean(), solved=solved.mean(), between_prompts=between_prompts(every))
    lab.save(args.name, model=str(model), **means, noise=noise, shares=shares)

    lab.show(["b", "E[(r − b)²]", "E[(r − b)² |∇ ln π|²]", "noise"],
             [[name, *(f"{number:.3g}" for number in row.values())] for name, row in noise.items()])
    for name, row in shares.items():
        print(name, {key: round(value, 3) for key, value in row.items()})


def gradients_of(model, rows, args):
    """One completion of each prompt by this policy → rewards, lengths, an iterator over ∇ ln π (weights,)"""
    tokenizer, eos = add_prompts(rows, args)
    policy = Policy(load_model(model, None, torch.float32, "cpu"))
    sampler = TransformersSampler(policy, eos, args.max_new_tokens, args.temperature, 256)
    seeds = [prompt_seed("noise", row["id"]) for row in rows]
    completions = [one for (one,) in sampler.generate([row["tokens"] for row in rows], 1, seeds)]
    graded = grade(args, tokenizer, [*zip(rows, completions)])

    def gradient_of(row, completion):
        ids = torch.tensor([row["tokens"] + completion.tokens])
        mask = torch.arange(ids.shape[1])[None] >= len(row["tokens"])
        logp = policy(input_ids=ids, completion_mask=mask, temperature=args.temperature).sum()
        each = torch.autograd.grad(logp, list(policy.parameters()))
        return torch.cat([gradient.flatten() for gradient in each])

    lengths = np.array([len(completion.tokens) for completion in completions])
    rewards = np.array([reward for _, reward in graded])
    return rewards, lengths, map(gradient_of, rows, completions)


def baselines_of(first, rewards, solved, beta1):
    """{name: b for each prompt}; first: (prompts, 8) of Stage 1's rewards"""
    mean = np.full(len(rewards), rewards.mean())
    pooled = np.full((len(first), 2), estimate_vstar(first.ravel(), beta1))
    vstar = {n: estimate_vstar(first[:, :n], beta1) for n in (1, 2, 4, 8) if n <= first.shape[1]}
    choices = {f"N = {n}": values for n, values in vstar.items()}
    choices["N = 1, two of the average prompt"] = estimate_vstar(np.hstack([first[:, :1], pooled]), beta1)
    every = max(vstar)
    choices[f"N = {every}, two of the average prompt"] = estimate_vstar(np.hstack([first, pooled]), beta1)
    choices["a constant"] = mean
    choices["a constant where solved"] = np.where(solved, mean, 0.0)
    choices["a constant where unsolved"] = np.where(solved, vstar[every], mean)
    choices["0"] = 0 * mean
    return choices


def noise_of(advantage, squares, total):
    """→ E[(r − b)²], E[(r − b)² |∇ ln π|²], and the noise, tr(covariance) / |mean|²; all without bias

    squares: |∇ ln π|² of each completion; total: the sum of (r − b) ∇ ln π
    """
    n = len(advantage)
    squares = (advantage**2 * squares).sum()
    # |g|²: pairs of different completions
    mean_square = (float(total.square().sum()) - squares) / (n * (n - 1))
    covariance = squares / n - mean_square
    return dict(moment=float((advantage**2).mean()), square=float(squares / n),
                noise=float(covariance / mean_square))


if __name__ == "__main__":
    main()
