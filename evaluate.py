"""How good is a model, and is another one better?

K answers to each problem at one temperature, graded by the same function as in training. Per model and data set:

    avg@K     the mean accuracy, with a 95 % interval from a bootstrap over problems
    pass@k    the chance that one of k answers is right, unbiased (Chen et al. 2021)
    maj@K     the accuracy of the answer that most of the K agree on; they agree where the checker calls them equal
    KL        of the model to --reference, per answer and per token, with the trainer's log-probabilities

    python evaluate.py                                                        the embedded world: π_ref against the trained
    python evaluate.py --model Qwen/Qwen2.5-1.5B out/run/model --data math500 aime24 amc23 --n 8
    python evaluate.py --model out/run/model --data gsm8k --temperature 0 --n 1 --show 20

Written into out/eval/: all answers with verdicts (a .jsonl per model and data set), results.json, accuracy.png. Killed at any
moment, the same command goes on where it stopped. torchrun splits the problems over GPUs.
"""

import argparse
import gc
import json
import math
import re
from pathlib import Path

import numpy as np
import torch

from rewards import fail, final_answers, is_correct, load_problems, read, suffix_of
from train import Policy, Sample, by_token, readable
from vstar import (
    RANK,
    Completion,
    Help,
    add_model_flags,
    ask,
    check_settings,
    contents,
    load_model,
    load_tokenizer,
    make_sampler,
    meet,
    own_devices,
    pass_at_k,
    pick_engine,
    read_flags,
    read_rows,
    run_script,
    sample_all,
    write_whole,
)

# ---------------------------------------------------------------------------------------------------------------------
# settings


def parse_args():
    parser = argparse.ArgumentParser(description="Accuracy, pass@k, maj@k and KL of one or several models.",
                                     formatter_class=Help, fromfile_prefix_chars="@")
    add_model_flags(parser)
    for action in parser._actions:
        if action.dest == "model":
            action.nargs, action.help = "+", "one or several Hugging Face model folders or hub ids"
    add = parser.add_argument
    add("--data", required=True, nargs="+", help="problem files, names (math500, aime24, …) or hub ids")
    add("--split", default="test", help="of a data set on the hub")
    add("--question_field", default="question", help="the field of a row that holds the question")
    add("--answer_field", default="answer", help="the field that holds the answer")
    add("--limit", type=int, help="only the first so many problems of each")
    add("--n", "--samples", type=int, default=1, help="K, the answers per problem (torchrun takes --n for one of its own)")
    add("--reference", help="also the KL to this model")
    add("--tokens_per_microbatch", type=int, default=16384, help="padded tokens per forward pass for the KL")
    add("--show", type=int, default=0, help="print so many wrong answers, with the checker's reading of both sides")
    add("--tensor_parallel", type=int, default=1, help="GPUs that one vLLM engine is spread over")
    add("--chunk", type=int, default=128, help="problems that are sampled and saved at a time")
    add("--out", type=Path, default=Path("out/eval"), help="the folder for answers, results and the picture")
    add("--overwrite", action="store_true", help="throw away what an earlier run with other settings left there")
    args = read_flags(parser, "evaluate", "n", "limit", "chunk", "batch", "max_new_tokens", "tokens_per_microbatch")
    if args.temperature == 0 and (args.n > 1 or args.reference):
        fail("--temperature 0 gives one greedy answer: it goes with --n 1 and without --reference")
    args.beta1, args.keep_tokens = math.inf, bool(args.reference)
    return args


# ---------------------------------------------------------------------------------------------------------------------
# the mathematics


def bootstrap(values, draws=2000, seed=0):
    """The 95 % interval of the mean of independent problems' values: draw the problems again, with replacement."""
    values, rng = np.asarray(values, dtype=np.float64), np.random.default_rng(seed)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(draws)]
    return tuple(np.quantile(means, [0.025, 0.975]).tolist())


def majority(responses, finished, rewards):
    """Is the answer that most responses agree on right? Cut-off answers and those without a box do not vote; of equally
    many votes the first wins."""
    groups = []  # [votes, answer, reward]
    for response, whole, reward in zip(responses, finished, rewards):
        found = final_answers(response) if whole else []
        if found:
            group = next((group for group in groups if is_correct(found[-1], group[1])), None)
            if group:
                group[0] += 1
            else:
                groups.append([1, found[-1], reward])
    return max(groups, key=lambda group: group[0])[2] if groups else 0.0


def paired(one, other):
    """The mean difference of two models on the same problems, and its interval."""
    difference = np.asarray(other) - np.asarray(one)
    return float(difference.mean()), *bootstrap(difference)


def measure(rows):
    """All that is said of one model on one data set."""
    rewards = np.array([row["rewards"] for row in rows])
    n = rewards.shape[1]
    low, high = bootstrap(rewards.mean(1))
    return {
        "problems": len(rows), "n": n, "accuracy": float(rewards.mean()), "low": low, "high": high,
        "pass": {k: float(pass_at_k(rewards, k).mean()) for k in range(1, n + 1)},
        "majority": float(np.mean([majority(row["responses"], row["finished"], row["rewards"]) for row in rows])),
        "finished": float(np.mean([row["finished"] for row in rows])), "length": float(np.mean([row["lengths"] for row in rows])),
    }


# ---------------------------------------------------------------------------------------------------------------------


def divergence(rows, model, args, tokenizer, device):
    """KL(model ‖ reference): the mean of ln π/π_ref over the answers that π sampled, in nats per answer and per token."""
    samples = [Sample(dict(tokens=tokenizer[row["id"]]), Completion(tokens, finished, []), "", 0.0)
               for row in rows for tokens, finished in zip(row["tokens"], row["finished"])]
    logps = []
    for name in (model, args.reference):
        args.model = name
        policy = Policy(load_model(args, device, getattr(torch, args.dtype)))
        logps.append(by_token(policy, samples, args, device).sum(-1).double().cpu())
        del policy
    ratio = (logps[0] - logps[1]).numpy()
    per_problem = ratio.reshape(len(rows), -1).mean(1)
    low, high = bootstrap(per_problem)
    return dict(kl=float(ratio.mean()), kl_low=low, kl_high=high,
                kl_per_token=float(ratio.sum() / sum(len(sample.answer.tokens) for sample in samples)))


def show(rows, count):
    """Wrong answers beside the gold: the quickest way to find a checker's false 'wrong'."""
    wrong = [(row, i) for row in rows for i, reward in enumerate(row["rewards"]) if not reward][:count]
    for row, i in wrong:
        response = row["responses"][i]
        found = final_answers(response) if row["finished"][i] else []
        said = repr(read(found[-1]).text) if found else "no answer" if row["finished"][i] else "cut off"
        print(f"── {row['id']}: read as {said}, the gold {row['answer']!r} as {read(row['answer']).text!r}\n   … "
              f"{readable(response[-300:]).strip()}")


def picture(results, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models, names = list(results), list(next(iter(results.values())))
    figure, axis = plt.subplots(figsize=(2 + 1.2 * len(names) * len(models) ** 0.5, 3.4), layout="constrained")
    for i, model in enumerate(models):
        found = [results[model][name] for name in names]
        x = np.arange(len(names)) + (i - (len(models) - 1) / 2) * 0.8 / len(models)
        error = [[f["accuracy"] - f["low"] for f in found], [f["high"] - f["accuracy"] for f in found]]
        axis.bar(x, [f["accuracy"] for f in found], 0.75 / len(models), yerr=error, capsize=3, label=model)
    axis.set(xticks=range(len(names)), xticklabels=[Path(name).stem for name in names], ylabel="accuracy", ylim=(0, 1))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def main():
    args = parse_args()
    device = own_devices(args.tensor_parallel)
    if args.dtype == "auto":
        args.dtype = "bfloat16" if device.type == "cuda" else "float32"
    if RANK > 0:
        meet("files")  # the first process reports what is wrong and prepares; the others follow
    engine, why = pick_engine(args.engine)
    models, work = args.model, []
    for model in models:
        args.model = model
        tokenizer, eos, window = load_tokenizer(args)
        for data in args.data:
            problems = load_problems(data, args.split, args.question_field, args.answer_field)[: args.limit]
            suffix = suffix_of(data) if args.suffix is None else args.suffix
            ask(problems, tokenizer, window, suffix, args)
            path = args.out / (re.sub(r"[^\w.-]+", "_", f"{model}--{data}").strip("_.") + ".jsonl")
            settings = dict(model=model, revision=args.revision, dtype=args.dtype, data=data, split=args.split, limit=args.limit,
                            suffix=suffix, chat=args.chat, temperature=args.temperature, max_new_tokens=args.max_new_tokens,
                            n=args.n, seed=args.seed, engine=engine, chunk=args.chunk, tokens=args.keep_tokens,
                            **contents(model, problems))
            work.append((model, data, path, problems, settings, tokenizer, eos))
    if RANK == 0:
        for *_, path, _, settings, _, _ in work:
            check_settings(path, settings, args.overwrite)
        print(f"{len(models)} model(s), {len(args.data)} data set(s), {args.n} answer(s) each at temperature {args.temperature}, "
              f"{engine} ({why})")
        meet("files")

    results, answers = {}, {}
    for model, data, path, problems, _, tokenizer, eos in work:
        args.model = model
        longest = max(len(problem["tokens"]) for problem in problems)
        sample_all(args, path, problems, tokenizer,
                   lambda eos=eos, longest=longest: make_sampler(args, engine, eos, longest + args.max_new_tokens, device))
        gc.collect()  # this sampler's memory goes before the next one's comes
        if RANK > 0:
            continue
        answers[model, data] = rows = read_rows(path)
        results.setdefault(model, {})[data] = found = measure(rows)
        if args.reference:
            found |= divergence(rows, model, args, {problem["id"]: problem["tokens"] for problem in problems}, device)
    if RANK > 0:
        return
    width = max(len(f"{Path(data).stem}  {model}") for model in models for data in args.data)
    print(f"\n{'':{width}s}  accuracy (95 %)         pass@{args.n}  maj@{args.n}  finished  length"
          + "  KL/answer  KL/token" * bool(args.reference))
    for data in args.data:
        for model in models:
            f = results[model][data]
            print(f"{Path(data).stem + '  ' + model:{width}s}  {f['accuracy']:.3f} ({f['low']:.3f} – {f['high']:.3f})  "
                  f"{f['pass'][args.n]:.3f}   {f['majority']:.3f}  {f['finished']:8.1%}  {f['length']:6.1f}"
                  + (f"  {f['kl']:9.3f}  {f['kl_per_token']:8.4f}" if args.reference else ""))
        for model in models[1:]:
            one, other = ([np.mean(row["rewards"]) for row in answers[name, data]] for name in (models[0], model))
            mean, low, high = results[model][data]["difference"] = paired(one, other)
            verdict = "more than noise" if low > 0 or high < 0 else "within noise"
            print(f"   {model} against {models[0]}: {mean:+.3f} ({low:+.3f} – {high:+.3f}), {verdict}")
    for model in models:
        for data in args.data:
            if args.show:
                print(f"\nwrong answers of {model} on {data}")
                show(answers[model, data], args.show)
    write_whole(args.out / "results.json", json.dumps(results, indent=1) + "\n")
    picture(results, args.out / "accuracy.png")
    print(f"→ {args.out}/results.json, {args.out}/accuracy.png and the answers beside them")


if __name__ == "__main__":
    run_script(main)
