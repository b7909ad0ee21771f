"""How good is a model, and is another one better?

It samples K completions of each problem at one temperature and grades them as the training does. Per model and data set
it says:

    avg@K     the mean accuracy, with a 95 % interval from a bootstrap over problems
    pass@k    the chance that one of k answers is right, unbiased (Chen et al. 2021)
    maj@K     the accuracy of the answer that most of the K agree on; they agree where the checker calls them equal
              (with --reward: the mean reward in its place, by which two models are compared then)
    KL        of the model to --reference, per answer and per token, from the trainer's log-probabilities

    python evaluate.py                                                  the embedded world: π_ref against the trained
    python evaluate.py --model Qwen/Qwen2.5-1.5B out/run/model --data math500 aime24 amc23 --samples 8
    python evaluate.py --model out/run/model --data gsm8k --temperature 0 --show 20

It writes into out/eval/: all answers with verdicts (a .jsonl per model and data set), results.json, accuracy.png. When
it was killed, the same command goes on where it stopped. torchrun splits the problems over GPUs.
"""

import gc
import json
import re
from copy import copy
from pathlib import Path

import numpy as np

from rewards import fail, final_answers, is_correct
from train import Policy, Sample, by_token, check_head
from vstar import (
    RANK,
    Completion,
    Flags,
    add_machine_flags,
    add_policy_flags,
    add_problem_flags,
    first_process_first,
    guard_rows,
    load_model,
    pass_at_k,
    pick_engine,
    picture,
    prepare,
    read_flags,
    read_rows,
    run_script,
    sample_all,
    start_process,
    write_whole,
    wrong_answers,
)


def main():
    with first_process_first("flags"):
        args = read_flags(make_parser(), "evaluate")
        if args.temperature == 0 and args.reference:
            fail("--temperature 0: a greedy answer has no log-probability, so no --reference")
    device, work = start_process(args, args.tensor_parallel), []
    with first_process_first("prepared"):
        args.engine, why = pick_engine(args.engine)
        for model in args.model:
            for data in args.data:
                one = copy(args)
                one.model, one.data = model, data
                one.out = args.out / (re.sub(r"[^\w.-]+", "_", f"{model}--{data}").strip("_.") + ".jsonl")
                if one.out in [other.out for other, *_ in work]:
                    fail(f"--model, --data: {model} and {data} were named before, perhaps in another way")
                work.append((one, *prepare(one)))
        if RANK == 0:
            for one, problems, *_ in work:
                free = ["show", "reference", "tokens_per_microbatch"]
                guard_rows(one, problems, free, keeps_tokens=bool(args.reference))
            print(f"{len(args.model)} model(s), {len(args.data)} data set(s), {args.samples} answer(s) each at "
                  f"temperature {args.temperature}, {args.engine} ({why})")
    results, answers = {}, {}
    for one, problems, tokenizer, eos in work:
        sample_all(one, problems, tokenizer, eos, device, keep_tokens=bool(args.reference))
        gc.collect()  # this sampler's memory goes before the next one's comes
        if RANK == 0:
            answers[one.model, one.data] = rows = read_rows(one.out, args.samples)
            results.setdefault(one.model, {})[one.data] = found = measure(rows, args.reward)
            if args.reference:
                found |= divergence(rows, {problem["id"]: problem["tokens"] for problem in problems}, one, device)
    if RANK == 0:
        report(args, results, answers)


def make_parser():
    parser = Flags("Accuracy, pass@k, maj@k and KL of one or several models.")
    add = add_policy_flags(parser, models="+")
    add("--samples", 1, "K, the answers per problem")
    add("--reference", str, "also the KL to this model (at --revision, if it is on the hub)")
    add = add_machine_flags(parser)
    add("--tokens_per_microbatch", 16384, "padded tokens a forward pass for the KL")
    add = add_problem_flags(parser, split="test", files="+")
    add("--show", 0, "print so many wrong answers, of problems spread over the set, as the checker reads them")
    add("--out", Path("out/eval"), "the folder for answers, results and the picture")
    return parser


def report(args, results, answers):
    stems = [Path(data).stem for data in args.data]
    short = {data: stem if stems.count(stem) == 1 else data for data, stem in zip(args.data, stems)}
    named = {f"{short[data]}  {model}": found for model in results for data, found in results[model].items()}
    width = max(map(len, named))
    k, first, *others = args.samples, *args.model
    agreed, key = ("reward", "reward") if args.reward else (f"maj@{k}", "majority")
    score = np.mean if args.reward else lambda rewards: np.mean(np.array(rewards) >= 1)
    print(f"\n{'':{width}s}  accuracy (95 %)         pass@{k}  {agreed}  finished  length"
          + "  KL/answer  KL/token" * bool(args.reference) + "   (right: a reward of at least 1)" * bool(args.reward))
    for data in args.data:
        for model in args.model:
            f = results[model][data]
            print(f"{short[data] + '  ' + model:{width}s}  {f['accuracy']:.3f} ({f['low']:.3f} – {f['high']:.3f})  "
                  f"{f['pass'][k]:.3f}   {f[key]:{len(agreed)}.3f}  "
                  f"{f['finished']:8.1%}  {f['length']:6.1f}"
                  + (f"  {f['kl']:9.3f}  {f['kl_per_token']:8.4f}" if args.reference else ""))
        for model in others:
            both = ([score(row["rewards"]) for row in answers[name, data]] for name in (first, model))
            mean, low, high = results[model][data]["difference"] = paired(*both)
            verdict = "more than noise" if low > 0 or high < 0 else "within noise"
            print(f"   {model} against {first}: {'reward ' * bool(args.reward)}{mean:+.3f} ({low:+.3f} – {high:+.3f}), "
                  + verdict)
    for (model, data), rows in answers.items():
        if args.show:
            print(f"\nwrong answers of {model} on {data}", *wrong_answers(rows, args.show, args.reward), sep="\n")
    write_whole(args.out / "results.json", json.dumps(results, indent=1) + "\n")
    # low, mean and high of each model and data set, on a line of its own
    points = [{"accuracy": found[key], name: name}
              for name, found in named.items() for key in ("low", "accuracy", "high")]
    picture(args.out / "accuracy.png", points, ["accuracy"], [named])
    print(f"→ {args.out}/results.json, {args.out}/accuracy.png and the answers beside them")


# ---------------------------------------------------------------------------------------------------------------------
# what is measured


def measure(rows, own=None):
    """All that is said of one model on one data set. `own`: --reward, for which no two answers are known to agree"""
    rewards = np.array([row["rewards"] for row in rows])
    right, n = rewards >= 1, rewards.shape[1]
    low, high = bootstrap(right.mean(1))
    found = {
        "problems": len(rows), "n": n, "accuracy": right.mean(), "low": low, "high": high,
        "pass": {k: pass_at_k(rewards, k).mean() for k in range(1, n + 1)},
        "finished": np.mean([row["finished"] for row in rows]),
        "length": np.mean([row["lengths"] for row in rows]),
    }
    if own:
        return found | {"reward": rewards.mean()}
    votes = [majority(row["responses"], row["finished"], some) for row, some in zip(rows, right)]
    return found | {"majority": np.mean(votes)}


def bootstrap(values, draws=2000, seed=0):
    """The 95 % interval of the mean of independent problems' values: draw the problems again, with replacement."""
    rng = np.random.default_rng(seed)
    means = [rng.choice(values, len(values)).mean() for _ in range(draws)]
    return np.quantile(means, [0.025, 0.975])


def paired(one, other):
    """The mean difference of two models on the same problems, and its interval."""
    difference = np.asarray(other) - np.asarray(one)
    return difference.mean(), *bootstrap(difference)


def majority(responses, finished, rewards):
    """Is the answer that most responses agree on right? Cut-off responses and those without a box do not vote. Of
    equally many votes the first wins."""
    groups = []  # [votes, claim, reward]
    for response, whole, reward in zip(responses, finished, rewards):
        found = final_answers(response) if whole else []
        if found:
            for group in groups:
                if is_correct(found[-1], group[1]):
                    group[0] += 1
                    break
            else:
                groups.append([1, found[-1], reward])
    return max(groups, key=lambda group: group[0])[2] if groups else 0.0


def divergence(rows, prompts, args, device):
    """KL(model ‖ reference): the mean of ln π/π_ref over the answers that π sampled, in nats per answer and per token.
    prompts: {id: tokens}"""
    samples = [Sample(dict(tokens=prompts[row["id"]]), Completion(tokens, True, []), "", 0.0, 0)
               for row in rows for tokens in row["tokens"]]

    def logp(model):  # one model after the other: its memory goes when this ends
        policy = Policy(load_model(model, args.revision, args.dtype, device))
        check_head(policy, device, model)
        return by_token(policy, samples, args, device).sum(-1).double().cpu().numpy()

    ratio = logp(args.model) - logp(args.reference)
    low, high = bootstrap(ratio.reshape(len(rows), -1).mean(1))
    return dict(kl=ratio.mean(), kl_low=low, kl_high=high,
                kl_per_token=ratio.sum() / sum(len(sample.completion.tokens) for sample in samples))


if __name__ == "__main__":
    run_script(main)
