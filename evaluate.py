"""How good is a model, and is another one better?

It samples K completions of each problem at one temperature and grades them as the training does. Per model
and data set it says:

    avg@K     the mean accuracy, with a 95 % interval from a bootstrap over problems
    pass@k    the chance that one of k completions is right, unbiased (Chen et al. 2021)
    maj@K     the accuracy of the claim that most of the K make; claims are alike where the checker says so
              (with --reward: the mean reward in its place, by which two models are compared then)
    KL        of the model to --reference, per completion and per token, from the trainer's log-probabilities

    python evaluate.py                                    the embedded world: π_ref against the trained policy
    python evaluate.py --model Qwen/Qwen2.5-1.5B out/run/model --data math500 aime24 amc23 --samples 8
    python evaluate.py --model out/run/model --data gsm8k --temperature 0 --show 20

It writes into out/eval/: all completions with their rewards (a .jsonl per model and data set), results.json,
accuracy.png. A killed run is resumed by the same command, which grades again what another reward, or an
edited one, has graded. torchrun splits the problems over GPUs.
"""

import gc
import json
import re
from copy import copy
from pathlib import Path

import numpy as np

from rewards import fail, final_answers, is_correct, readable
from train import Policy, Sample, check_head, token_logps
from vstar import (
    RANK,
    WORLD,
    Completion,
    Flags,
    add_machine_flags,
    add_policy_flags,
    add_problem_flags,
    collect,
    first_process_first,
    guard_completions,
    load_model,
    pass_at_k,
    picture,
    prepare,
    read_flags,
    read_rows,
    run_script,
    sample_all,
    spread,
    start_process,
    verdict_of,
    write_text,
)


def main():
    with first_process_first("flags"):
        args = read_flags(make_parser(), "evaluate")
        if args.temperature == 0 and args.reference:
            fail("--temperature 0: a greedy completion has no log-probability, so no --reference")
    device = start_process(args)
    keep_tokens = bool(args.reference)
    with first_process_first("prepared"):
        tasks = tasks_of(args)
        if RANK == 0:
            for task, problems, *_ in tasks:
                guard_completions(task, problems, ["show", "reference", "tokens_per_microbatch"],
                                  keep_tokens=keep_tokens)
            print(f"{len(args.model)} model(s), {len(args.data)} data set(s), {args.samples} completion(s) "
                  f"each at temperature {args.temperature}, {args.engine}")
    results, completions = {}, {}
    for task, problems, tokenizer, eos in tasks:
        sample_all(task, problems, tokenizer, eos, device, keep_tokens=keep_tokens)
        gc.collect()  # this sampler's memory goes before the next one's comes
        rows = read_rows(task.out, args.samples) if RANK == 0 or args.reference else []
        kl = divergence(rows, problems, task, device) if args.reference else {}
        if RANK == 0:
            completions[task.model, task.data] = rows
            result = measure(rows, args.reward) | kl
            results.setdefault(task.model, {})[task.data] = result
    if RANK == 0:
        report(args, results, completions)


def make_parser():
    parser = Flags("Accuracy, pass@k, maj@k and KL of one or several models.")
    add = add_policy_flags(parser, models="+")
    add("--samples", 1, "K, the completions per problem")
    add("--reference", str, "also the KL to this model (at --revision, if it is on the hub)")
    add = add_machine_flags(parser)
    add("--tokens_per_microbatch", 16384, "padded tokens a forward pass for the KL")
    add = add_problem_flags(parser, split="test", files="+")
    add("--show", 0, "print so many problems, spread over the set, with each model's first response and how "
        "it was graded; those first on which the models differ. It samples nothing anew")
    add("--out", Path("out/eval"), "the folder for completions, results and the picture")
    return parser


def tasks_of(args):
    """[(args of one model and one data set, its problems, tokenizer, EOS ids)]"""
    tasks = []
    for model in args.model:
        for data in args.data:
            task = copy(args)
            task.model, task.data = model, data
            name = re.sub(r"[^\w.-]+", "_", f"{model}--{data}").strip("_.")
            task.out = args.out / f"{name}.jsonl"
            if task.out in [other.out for other, *_ in tasks]:
                fail(f"--model, --data: {model} and {data} were named before, perhaps in another way")
            tasks.append((task, *prepare(task)))
    return tasks


def report(args, results, completions):
    k, first, *others = args.samples, *args.model
    agreed = "reward" if args.reward else "majority"
    heads = ["accuracy (95 %)      ", f"pass@{k}", "reward" if args.reward else f"maj@{k}"]
    heads += ["finished", "length"]
    if args.reference:
        heads += ["KL/completion", "KL/token"]
    names = {key: f"{key[1]}  {key[0]}" for key in completions}  # (model, data): how the table calls them
    width = max(len(name) for name in names.values())
    print(f"\n{'':{width}s}", *heads, "(right: a reward of at least 1)" if args.reward else "", sep="  ")
    points = []
    for data in args.data:
        for model in args.model:
            result, name = results[model][data], names[model, data]
            cells = [f"{result['accuracy']:.3f} ({result['low']:.3f} – {result['high']:.3f})",
                     f"{result['pass'][k]:.3f}", f"{result[agreed]:.3f}",
                     f"{result['finished']:.1%}", f"{result['length']:.1f}"]
            if args.reference:
                cells += [f"{result['kl']:.3f}", f"{result['kl_per_token']:.4f}"]
            cells = [cell.rjust(len(head)) for cell, head in zip(cells, heads)]
            print(f"{name:{width}s}", *cells, sep="  ")
            # low, mean and high of each model and data set, on a line of its own
            points += [{"accuracy": result[key], name: name} for key in ("low", "accuracy", "high")]
        for model in others:
            one, other = (scores(completions[name, data], args.reward) for name in (first, model))
            mean, low, high = results[model][data]["difference"] = paired(one, other)
            verdict = "more than noise" if low > 0 or high < 0 else "within noise"
            if len(one) < 20:  # a bootstrap of so few problems gives too narrow an interval
                verdict = "no verdict on fewer than 20 problems"
            what = "reward " if args.reward else ""
            print(f"   {model} against {first}: {what}{mean:+.3f} ({low:+.3f} – {high:+.3f}), {verdict}")
    if args.show:
        for data in args.data:
            print(f"\nsome problems of {data}, each with every model's first completion")
            print(*side_by_side([completions[model, data] for model in args.model], args), sep="\n")
    write_text(args.out / "results.json", json.dumps(results, indent=1) + "\n")
    picture(args.out / "accuracy.png", points, ["accuracy"], [[*names.values()]])
    print(f"→ {args.out}/results.json, {args.out}/accuracy.png and the completions beside them")


def side_by_side(rows_of_models, args):
    """--show problems, spread over the set, those first on which the models differ. Right responses are shown
    as well as wrong ones, because a reward may err either way."""
    alike, differ = [], []
    for rows in zip(*rows_of_models):
        rewards = {row["rewards"][0] for row in rows}
        (alike if len(rewards) == 1 else differ).append(rows)
    chosen = spread(differ, args.show)
    chosen += spread(alike, args.show - len(chosen))
    for rows in chosen:
        yield f"\n── {readable(rows[0]['id'])}\n{readable(rows[0]['prompt'])}"
        for model, row in zip(args.model, rows):
            yield f"── {model}: {verdict_of(row, 0, args.reward)}\n{readable(row['responses'][0])}"


def scores(rows, custom_reward):
    """What two models are compared by, for each problem: the accuracy, or the mean of a custom reward."""
    rewards = np.array([row["rewards"] for row in rows])
    return (rewards if custom_reward else rewards >= 1).mean(1)


# -----------------------------------------------------------------------------------------------------------
# what is measured


def measure(rows, custom_reward=None):
    """All that is said of one model on one data set. With a custom reward no responses are known to agree."""
    rewards = np.array([row["rewards"] for row in rows])
    right, n = rewards >= 1, rewards.shape[1]
    low, high = bootstrap(right.mean(1))
    result = {
        "problems": len(rows),
        "n": n,
        "accuracy": right.mean(),
        "low": low,
        "high": high,
        "pass": {k: pass_at_k(rewards, k).mean() for k in range(1, n + 1)},
        "finished": np.mean([row["finished"] for row in rows]),
        "length": np.mean([row["lengths"] for row in rows]),
    }
    if custom_reward:
        return result | {"reward": rewards.mean()}
    votes = [majority(row["responses"], row["finished"], row["rewards"]) for row in rows]
    return result | {"majority": np.mean(np.array(votes) >= 1)}


def bootstrap(values, draws=2000, seed=0):
    """The 95 % interval of the mean over independent problems: draw the problems again, with replacement."""
    rng = np.random.default_rng(seed)
    means = [rng.choice(values, len(values)).mean() for _ in range(draws)]
    return np.quantile(means, [0.025, 0.975])


def paired(one, other):
    """The mean difference of two models on the same problems, and its interval."""
    difference = np.asarray(other) - np.asarray(one)
    return difference.mean(), *bootstrap(difference)


def majority(responses, finished, rewards):
    """Is the claim that most responses agree on right? Those that were cut off or have no box do not vote. Of
    equally many votes the first wins."""
    groups = []  # [votes, claim, reward]
    for response, whole, reward in zip(responses, finished, rewards):
        claims = final_answers(response) if whole else []
        if claims:
            for group in groups:
                if is_correct(claims[-1], group[1]):
                    group[0] += 1
                    break
            else:
                groups.append([1, claims[-1], reward])
    return max(groups, key=lambda group: group[0])[2] if groups else 0.0


def divergence(rows, problems, args, device):
    """KL(model ‖ reference): the mean of ln π/π_ref over completions that π sampled, in nats per completion
    and per token. Each process takes its share of the problems."""
    problem_of, samples = {problem["id"]: problem for problem in problems}, []
    for row in rows[RANK::WORLD]:
        samples += [Sample(problem_of[row["id"]], Completion(tokens, True, []), "", 0.0, 0)
                    for tokens in row["tokens"]]

    def logp(model):  # one model after the other: its memory goes when this ends
        policy = Policy(load_model(model, args.revision, args.dtype, device))
        check_head(policy, device, model)
        logps = token_logps(policy, samples, args, device)
        return logps.sum(-1).double().cpu().numpy()

    ratios = (logp(args.model) - logp(args.reference)).reshape(-1, args.samples).mean(1)  # (problems,)
    ratios = np.array(collect(f"ratios {args.out}", ratios.tolist()))
    tokens = [len(sample.completion.tokens) for sample in samples]
    tokens = sum(collect(f"tokens {args.out}", [sum(tokens)]))
    if RANK == 0:
        low, high = bootstrap(ratios)
        per_token = ratios.sum() * args.samples / tokens
        return dict(kl=ratios.mean(), kl_low=low, kl_high=high, kl_per_token=per_token)


if __name__ == "__main__":
    run_script(main)
