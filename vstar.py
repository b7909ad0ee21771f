r"""A*-PO, Stage 1: how well could one do on each prompt?   (arXiv 2505.20686)

For every prompt x the reference policy π_ref writes N completions y_i. Each earns a reward r_i, 0 or 1. Then

    V̂*(x) = β1 ln( 1/N Σ_i exp( r_i / β1 ) )

estimates the value of the *optimal* KL-regularised policy, offline and once. PPO's critic and GRPO's groups
estimate a value over and over while they train. Here that is done beforehand, so Stage 2 (train.py, which
says why this is the right number) needs one completion per prompt.

    python vstar.py                                                          the embedded world, on any CPU
    python vstar.py --model Qwen/Qwen2.5-1.5B --data math --out out/1.5B/vstar.jsonl           a real model
    torchrun --nproc_per_node 8 vstar.py --model …                           the same file from eight GPUs

It writes out/vstar.jsonl, out/vstar.config.json (the settings) and out/vstar.png. A line of vstar.jsonl is a
problem with all its fields, its prompt, and lists over its N completions (here N = 2):

    {"id": "7", "question": "2+2=", "answer": "4", "prompt": "2+2=", "rewards": [1.0, 0.0], "lengths": [5, 7],
     "finished": [true, true], "responses": ["\\boxed{4}", "2+2=5;\\boxed{5}"], "vstar": 0.717,
     "graded_by": "5f0c3e1ad92b7746"}

A killed run is resumed by the same command. With an edited or another --reward the same command grades the
completions that exist again, and samples nothing: `graded_by` is a hash of the reward's code.
"""

import argparse
import ctypes
import hashlib
import importlib.util
import json
import math
import os
import platform
import re
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from itertools import groupby, islice, product
from pathlib import Path
from threading import Event, Thread
from typing import NamedTuple

# OpenMP's threads should not spin long for a core that another program has. It is read as torch loads
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import numpy as np
import torch
import torch.distributed as dist
import transformers
from safetensors import SafetensorError
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from rewards import (
    BOXED,
    GSM8K,
    encode,
    fail,
    final_answers,
    load_problems,
    load_reward,
    make_prompt,
    read,
    readable,
)

# torchrun sets them
RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))

# -----------------------------------------------------------------------------------------------------------
# Stage 1


def estimate_vstar(rewards, beta1):
    """V̂* = β1 ln( 1/N Σ exp(r_i/β1) ) over the last axis: (…, N) → (…)

    With 3 of 8 right and β1 = 0.5 it is ½ ln((5 + 3 e²) / 8) = 0.61: above the mean reward 0.375, as a policy
    that may leave π_ref can do better, and below the best, 1, as leaving costs KL.
    β1 → 0 gives the best of the N, β1 = inf their mean.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    if math.isinf(beta1):
        return rewards.mean(-1)
    # the best is subtracted first, or exp overflows for a small β1; expm1 and log1p keep the digits of a
    # large β1, where this is ln(1 + something tiny)
    best = rewards.max(-1, keepdims=True)
    return best[..., 0] + beta1 * np.log1p(np.expm1((rewards - best) / beta1).mean(-1))


def make_parser():
    parser = Flags("A*-PO, Stage 1: estimate V*(x) from N completions per prompt by π_ref.")
    add_policy_flags(parser)
    add = parser.group("algorithm")
    add("--samples", 8, "N, the completions per prompt; a later run with more keeps those that exist")
    add("--beta1", 0.5, "β1 of V̂*; inf is the mean reward, towards 0 the best of the N")
    add_machine_flags(parser)
    add = add_problem_flags(parser, split="train")
    add("--out", Path("out/vstar.jsonl"), "the file to write; settings and picture go beside it")
    return parser


def main():
    with first_process_first("flags"):
        args = read_flags(make_parser(), "vstar")
    device = start_process(args)
    with first_process_first("prepared"):
        problems, tokenizer, eos = prepare(args)
        if RANK == 0:
            guard_completions(args, problems)
            print(f"Stage 1: {len(problems)} problems of {args.data}, N = {args.samples} completions each by "
                  f"{args.model}, {args.engine}, {WORLD} × {device.type} {args.dtype}")
    speed = sample_all(args, problems, tokenizer, eos, device, args.beta1)
    if RANK == 0:
        rows, png = read_rows(args.out, args.samples), args.out.with_suffix(".png")
        print(summary(rows, args.beta1, speed, args.reward))
        histogram(rows, png)
        print(f"→ {args.out}, {png}")


def prepare(args):
    """→ the problems that `args` names, with prompts; the tokenizer; the token ids that end a completion"""
    fields = args.question_field, args.answer_field
    problems = load_problems(args.data, args.split, *fields, args.reward)[: args.limit]
    args.prompt = args.prompt or (GSM8K if args.data == "gsm8k" else BOXED)
    return problems, *add_prompts(problems, args)


def sample_all(args, problems, tokenizer, eos, device, beta1=None, keep_tokens=False):
    """Writes N graded completions of each problem into args.out, a row each, by id; with beta1 also V̂*.

    All processes share the work, in chunks of problems; a chunk is a file that appears whole. Completions
    that exist are kept, those of a killed run and those of a run with other --samples: the random numbers of
    a problem's i-th completion do not depend on N.
    → tokens per second of all processes, or None
    """
    n, parts = args.samples, parts_of(args.out)
    with first_process_first(f"graded {args.out}"):
        rows = existing_rows(args)
        if RANK == 0:
            grade_again(args, problems, rows, beta1)
    tokens_in = lambda rows: sum(sum(row["lengths"]) for row in rows.values())
    tokens_before = tokens_in(rows)
    count = lambda problem: len(rows.get(problem["id"], {}).get("rewards", []))
    chunks = split_into_chunks(problems, count, args)[RANK::WORLD]
    for problem in problems:
        if count(problem) >= n:
            del rows[problem["id"]]  # it is done, and all that are done may be gigabytes
    barrier(f"read {args.out}")  # before anyone writes
    speed, start = None, time.perf_counter()
    if chunks:
        sampler = make_sampler(args, eos, problems, device)
        start, tokens = time.perf_counter(), 0  # the model is loaded
        requests = []
        for chunk in chunks:
            seeds = [prompt_seed(args.seed, problem["id"]) for problem in chunk]
            requests.append(([problem["tokens"] for problem in chunk], seeds, count(chunk[0])))
        label = "sampling" if WORLD == 1 else f"sampling (1 of {WORLD} shares)"
        total = sum(len(chunk) for chunk in chunks)
        bar = tqdm(desc=label, total=total, unit="prompt", disable=RANK > 0)
        for index, completions in sampler.stream(requests, n):
            chunk = chunks[index]
            pairs = [(problem, completion) for problem, group in zip(chunk, completions)
                     for completion in group]
            for (problem, completion), graded in zip(pairs, grade(args, tokenizer, pairs)):
                fields = {key: value for key, value in problem.items() if key != "tokens"}
                append_completion(rows.setdefault(problem["id"], fields), completion, *graded)
                tokens += len(completion.tokens)
            done = [rows.pop(problem["id"]) for problem in chunk]
            for row in done:
                complete(row, args, beta1)
                if not keep_tokens:
                    del row["tokens"]
            write_rows(parts / f"{prompt_seed(n, chunk[0]['id'])}.jsonl", done)
            of_share = tokens / (time.perf_counter() - start)
            bar.set_postfix_str(f"{of_share:,.0f} tokens/s", refresh=False)
            bar.update(len(chunk))
        bar.close()
        sampler.close()
    barrier(f"sampled {args.out}")
    seconds = time.perf_counter() - start  # of the slowest process, too
    if RANK == 0 and parts.exists():
        rows = existing_rows(args)  # which count() reads
        if any(count(problem) < n for problem in problems):
            fail(f"{parts}: completions of other processes do not appear there; do all nodes share the "
                 "folder? The same command resumes from here")
        write_rows(args.out, sorted(rows.values(), key=lambda row: row["id"]))
        remove(parts)
        speed = (tokens_in(rows) - tokens_before) / seconds
    barrier(f"merged {args.out}")
    return speed


def append_completion(row, completion, response, reward):
    """To a row's lists over its completions. (Tokens stay only with `keep_tokens`: a response that is encoded
    again could give others.)"""
    row.setdefault("rewards", []).append(reward)
    row.setdefault("lengths", []).append(len(completion.tokens))
    row.setdefault("finished", []).append(completion.finished)
    row.setdefault("responses", []).append(response)
    row.setdefault("tokens", []).append(completion.tokens)


def complete(row, args, beta1):
    """What a row says of its rewards."""
    if beta1:
        row["vstar"] = estimate_vstar(row["rewards"], beta1)
    _, row["graded_by"] = load_reward(args.reward)


def existing_rows(args):
    """{id: row} of all completions that exist: those of the file, and those of a run that was killed."""
    paths = [args.out] * args.out.exists() + list(parts_of(args.out).glob("*.jsonl"))
    rows = [row for path in paths for row in read_rows(path)]
    _, today = load_reward(args.reward)
    # of two rows of a problem the later one stays: it has more completions, or as many with today's rewards
    rows.sort(key=lambda row: (len(row["rewards"]), row.get("graded_by") == today))
    return {row["id"]: row for row in rows}


def grade_again(args, problems, rows, beta1):
    """Those of `rows` whose rewards are of other code than today's. A chunk is a part, as in sample_all."""
    _, today = load_reward(args.reward)
    problem_of, changed = {problem["id"]: problem for problem in problems}, []
    old = [row for row in rows.values() if row.get("graded_by") != today]
    for chunk in tqdm(batched(old, 256), desc="grading again", disable=not old):
        answers = [(row, *answer) for row in chunk
                   for answer in zip(row["responses"], row["finished"], row["rewards"])]
        rewards = rewards_of(args, [(problem_of[row["id"]], response, finished)
                                    for row, response, finished, _ in answers])
        changed += [(row["prompt"], response, before, now)
                    for (row, response, _, before), now in zip(answers, rewards) if now != before]
        rewards = iter(rewards)
        for row in chunk:
            row["rewards"] = [*islice(rewards, len(row["rewards"]))]
            complete(row, args, beta1)
        write_rows(parts_of(args.out) / f"{prompt_seed(today, chunk[0]['id'])}.jsonl", chunk)
    if old:
        print(f"{args.out}: the completions of {len(old)} problems are graded again; {len(changed)} rewards "
              "changed")
    for prompt, response, before, now in changed[:3]:
        print(f"── {readable(prompt)}\n{readable(response)}\n── reward {before:g}, now {now:g}")


def split_into_chunks(problems, count, args):
    """Lists of problems that lack equally many completions; one decode batch holds all that a list lacks."""
    todo = [problem for problem in problems if count(problem) < args.samples]
    # the longest prompts first: if memory does not suffice, it shows at once, and a chunk has little padding
    todo.sort(key=lambda problem: (count(problem), -len(problem["tokens"]), problem["id"]))
    chunks = []
    for existing, group in groupby(todo, key=count):
        group = list(group)
        fits = max(1, args.decode_rows // (args.samples - existing))
        fair = math.ceil(len(group) / WORLD)  # no process stays idle
        chunks += batched(group, min(fits, fair))
    return chunks


# what Stage 1 says of its completions


def between_prompts(rewards):
    """The share of the rewards' variance that lies between prompts: what V̂*(x) can know. (prompts, N) → ()

    The total is the variance between prompts plus that within them. The unbiased variance of a prompt's N
    rewards estimates the latter.
    """
    within = rewards.var(axis=1, ddof=1).mean()
    return max(0.0, 1 - within / rewards.var())


def pass_at_k(rewards, k):
    """The chance that at least one of k completions is right, from N ≥ k of them: (…, N) → (…)

    1 - C(wrong, k) / C(N, k) (Chen et al. 2021, eq. 1), as a product: the chance that k draws are all wrong.
    """
    right = np.asarray(rewards) >= 1
    n, wrong = right.shape[-1], (~right).sum(-1)
    all_wrong = [np.clip(wrong - i, 0, None) / (n - i) for i in range(k)]
    return 1 - np.prod(all_wrong, axis=0)


def mean_and_interval(values):
    """The mean and half of its 95 % interval. (Of prompts: completions of one prompt are not independent.)"""
    deviation = values.std(ddof=1) if len(values) > 1 else math.nan
    return values.mean(), 1.96 * deviation / math.sqrt(len(values))


def summary(rows, beta1, speed=None, custom_reward=None):
    """What Stage 1 found, as text. A completion is right if its reward is at least 1."""
    rewards = np.array([row["rewards"] for row in rows])  # (prompts, N)
    n, right = rewards.shape[1], (rewards >= 1).sum(1)
    accuracy, half = mean_and_interval((rewards >= 1).mean(1))
    finished = np.mean([row["finished"] for row in rows])
    unsolved = np.mean(right == 0)
    ks = [k for k in [2**i for i in range(7)] if k < n] + [n]
    zero_or_one = np.isin(rewards, (0, 1)).all()
    lines = [f"prompts {len(rows)}, N {n}, β1 {beta1:g}",
             f"accuracy          {accuracy:.3f} ± {half:.3f} (95 %)"]
    if not zero_or_one:
        lines.append(f"reward            {rewards.mean():.3f} on average; right is what earns at least 1")
    lines += ["pass@k            " + "  ".join(f"{k}: {pass_at_k(rewards, k).mean():.3f}" for k in ks),
              f"0/{n} right         {unsolved:.1%} of the prompts"
              f"      {n}/{n} right  {np.mean(right == n):.1%}",
              f"finished          {finished:.1%} of the completions",
              f"mean length       {np.mean([row['lengths'] for row in rows]):.1f} tokens"]
    if speed:
        lines[-1] += f"      {speed:,.0f} tokens/s"
    lines.append(f"mean V̂*           {estimate_vstar(rewards, beta1).mean():.3f}")
    if n > 1 and rewards.var() > 0:
        lines.append(f"between prompts   {between_prompts(rewards):.0%} of the rewards' variance: V̂*(x) can "
                     "know so much, the rest is luck within a prompt.\n" + 18 * " " + "Where it is much, "
                     "V̂* = 0 on prompts that are never solved is what counts (experiments/)")
    if unsolved == 1 and finished > 0.5:
        lines += wrong_responses(rows, 3, custom_reward)
    if unsolved > 0.9 and zero_or_one:
        lines.append(f"warning: {unsolved:.0%} of the prompts have no right response, so there is little to "
                     "learn from. Look at some responses. Does the result stand where the grader looks "
                     "(--prompt, --chat)? If so, the model is too weak for these problems: take easier ones "
                     "or a stronger model, or show it demonstrations first (experiments/cold_start.py).")
    if finished < 0.9:
        cost = "" if custom_reward else " and earn 0"
        lines.append(f"warning: {1 - finished:.0%} of the completions were cut off{cost}. Raise "
                     "--max_new_tokens. If they ramble on, the model does not know when to stop: try --chat, "
                     "another --prompt, or --stop.")
    return "\n".join(lines)


def wrong_responses(rows, count, custom_reward=None):
    """Some wrong responses, with what the grader reads in them: the quickest way to find its false 'wrong'.

    One of a problem, finished if possible, and of problems spread over the file.
    """
    wrong = []
    for row in rows:
        indices = [i for i, reward in enumerate(row["rewards"]) if reward < 1]
        if indices:
            wrong.append((row, max(indices, key=row["finished"].__getitem__)))
    end = lambda text: readable(text[-300:]).strip()
    for row, i in spread(wrong, count):
        yield (f"── {readable(row['id'])}: {verdict_of(row, i, custom_reward)}\n"
               f"   prompt    … {end(row['prompt'])}\n   response  … {end(row['responses'][i])}")


def verdict_of(row, i, custom_reward=None):
    """Of completion i: right, wrong or cut off, and how the grader reads it."""
    reward, finished = row["rewards"][i], row["finished"][i]
    if custom_reward:
        return f"reward {reward:g} by {custom_reward}" + ("" if finished else ", cut off")
    if not finished:
        return "cut off"
    claims = [read(claim) for claim in final_answers(row["responses"][i])[-1:]]
    found = "".join(f"read as {claim.text!r} {claim.trouble}" for claim in claims).strip()
    found = found or "no \\boxed{} and no ####"
    right = "right" if reward >= 1 else "wrong"
    return f"{right}, {found}; the answer {row['answer']!r} as {read(row['answer']).text!r}"


def spread(items, count):
    """So many of them, or all, at equal distances."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def histogram(rows, path):
    right = [sum(reward >= 1 for reward in row["rewards"]) for row in rows]
    counts = np.bincount(right, minlength=len(rows[0]["rewards"]) + 1)
    points = [{"right of N": k, "prompts": count} for k, count in enumerate(counts)]
    picture(path, points, ["right of N"], [["prompts"]])


# -----------------------------------------------------------------------------------------------------------
# the sampler, with two engines: generate(prompts, n, seeds), stream(requests, n), close(). In training it
# samples between wake(policy), which gives it the weights as they are then, and rest(), which frees memory
# for the update. A request is (prompts, seeds, first): of each prompt `first` completions exist already, of a
# smaller N, and the completions `first` to n - 1 are wanted. Each has random numbers of its own.


class Completion(NamedTuple):
    tokens: list  # what was sampled, up to and including the EOS
    finished: bool  # did it end with EOS, or was it cut off?
    logps: list  # ln π of each token at the sampling temperature (with vLLM only in Stage 2)


def make_sampler(args, eos, problems, device, training=False):
    """A sampler for these problems. In training, `wake` says whose weights it samples from."""
    if args.engine == "vllm":
        longest = max(len(problem["tokens"]) for problem in problems)
        return VLLMSampler(args, eos, longest + args.max_new_tokens, training)
    model = None if training else load_model(args.model, args.revision, args.dtype, device)
    return TransformersSampler(model, eos, args.max_new_tokens, args.temperature, args.decode_rows)


def grade(args, tokenizer, pairs, source=""):
    """[(problem, completion)] → [(response, reward)]; an error names the problem and its `source`"""
    responses = [tokenizer.decode(completion.tokens, skip_special_tokens=True) for _, completion in pairs]
    answers = [(problem, response, completion.finished)
               for (problem, completion), response in zip(pairs, responses)]
    return [*zip(responses, rewards_of(args, answers, source))]


def rewards_of(args, answers, source=""):
    """[(problem, response, finished)] → [reward]"""
    judge, _ = load_reward(args.reward)

    def reward_of(answer):
        problem, response, finished = answer
        try:
            value = judge(response, problem, finished)
        except SystemExit as end:  # of the user's code, not of a signal
            raise RuntimeError(f"SystemExit({end.code})").with_traceback(end.__traceback__) from None
        if not math.isfinite(value):  # what is no number raises a TypeError
            raise ValueError(f"a reward of {value}")
        return float(value)

    rewards = []
    # threads, so that a custom reward which waits for a process or a server does not hold up the others
    with ThreadPoolExecutor(32 if args.reward else 1) as pool:
        waiting = pool.map(reward_of, answers)
        for problem, response, _ in answers:
            try:
                rewards.append(next(waiting))
            except Exception as error:  # of the user's code; a 0 instead would be trained on
                path = str(args.reward).rpartition(":")[0]
                trace = traceback.extract_tb(error.__traceback__)
                lines = [f", line {frame.lineno}" for frame in trace if frame.filename == path]
                fail(f"--reward {args.reward}{''.join(lines[-1:])}: {type(error).__name__}: {error}; "
                     f"problem {problem['id']}{source}, response {response[:80]!r}")
    return rewards


def prompt_seed(seed, key):
    """A hash of both alone: the seed is --seed, in Stage 2 "--seed/serial"; the key is the problem's id."""
    text = f"{seed}/{key}".encode("utf-8", "replace")
    return int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "big")


@dataclass
class TransformersSampler:
    """A decode loop over any transformers causal language model, without a second copy of the weights.

    Each completion draws from its own random numbers, so it does not depend on its neighbours. The loop is
    twice as quick as transformers' own `generate`, because rows that are finished leave the batch.
    """

    model: torch.nn.Module  # in training only between `wake` and `rest`
    eos: list
    max_new_tokens: int
    temperature: float
    max_rows: int  # completions decoded at once

    def generate(self, prompts, n, seeds, first=0):
        """Prompts as token lists → for each the Completions first … n - 1."""
        longest_first = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # little padding
        groups = []
        for batch in batched(longest_first, max(1, self.max_rows // (n - first))):
            batch_prompts, batch_seeds = [prompts[i] for i in batch], [seeds[i] for i in batch]
            # in one part, unless one prompt has more completions than fit; parts[j][i] is prompt i's part j
            parts = [self.decode(batch_prompts, range(i, min(i + self.max_rows, n)), batch_seeds)
                     for i in range(first, n, self.max_rows)]
            groups += [sum(parts_of_prompt, []) for parts_of_prompt in zip(*parts)]
        return [group for _, group in sorted(zip(longest_first, groups))]

    @torch.no_grad()  # not inference_mode: FSDP would keep buffers that autograd may not touch
    def decode(self, prompts, indices, seeds):
        """The completions with these `indices` (0 … n - 1) of each prompt, all at once."""
        device = next(self.model.parameters()).device
        limit, n = self.max_new_tokens, len(indices)
        count = len(prompts) * n
        eos = torch.tensor(self.eos, device=device)
        # a uniform number for each token that could be sampled, each completion's from a stream of its own
        keys = [[seed, index] for seed in seeds for index in indices]
        streams = [np.random.Generator(np.random.Philox(key=key)) for key in keys]
        uniforms = np.stack([stream.random(limit) for stream in streams])
        uniforms = torch.from_numpy(uniforms).to(device)  # (count, limit) fp64
        # left-padded: every prompt ends in the last column; padding is masked and takes no position
        pad = lambda tensors: pad_sequence(tensors, batch_first=True, padding_side="left").to(device)
        ids = pad([torch.tensor(prompt) for prompt in prompts])  # (prompts, width)
        attention_mask = pad([torch.ones(len(prompt), dtype=torch.long) for prompt in prompts])
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        cache = transformers.DynamicCache(config=self.model.config)
        tokens = ids.new_zeros(count, limit)
        logps = tokens.float()
        active = torch.arange(count, device=device)  # row i of the batch writes completion active[i]
        ended = torch.zeros(count, dtype=torch.bool, device=device)  # has row i written its EOS?
        for t in range(limit):
            logits = self.model(input_ids=ids, attention_mask=attention_mask, position_ids=positions,
                                past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
            if t == 0:  # the n completions of a prompt share the pass over it
                cache.batch_repeat_interleave(n)
                logits = logits.repeat_interleave(n, 0)
                attention_mask = attention_mask.repeat_interleave(n, 0)
                positions = positions.repeat_interleave(n, 0)
            token, logps[active, t] = draw(logits, uniforms[active, t], self.temperature)
            tokens[active, t] = token
            ended |= torch.isin(token, eos)
            writing = (~ended).nonzero()[:, 0]
            if len(writing) == 0:
                break
            if len(writing) <= 0.75 * len(active):  # finished rows leave in groups: leaving copies the cache
                cache.batch_select_indices(writing)
                active, token, ended = active[writing], token[writing], ended[writing]
                attention_mask, positions = attention_mask[writing], positions[writing]
            ids, positions = token[:, None], positions[:, -1:] + 1
            attention_mask = torch.nn.functional.pad(attention_mask, (0, 1), value=1)
        is_eos = torch.isin(tokens, eos)
        finished = is_eos.any(-1)
        # the first EOS is part of the completion
        lengths = torch.where(finished, is_eos.int().argmax(-1) + 1, limit)
        columns = [tensor.tolist() for tensor in (tokens, finished, logps, lengths)]
        completions = [Completion(written[:length], end, logp[:length])
                       for written, end, logp, length in zip(*columns)]
        return batched(completions, n)

    def stream(self, requests, n):
        """Yields (a request's index, its completions) as they are done.

        A waiting prompt does not take a finished row's place: all rows would be as wide as the longest one.
        """
        for index, (prompts, seeds, first) in enumerate(requests):
            yield index, self.generate(prompts, n, seeds, first)

    def wake(self, policy):
        """It samples from the very module that is trained, whose shards are whole meanwhile: no copy."""
        if self.model is None:
            self.model = policy
            policy.gather()

    def rest(self):
        if self.model is not None:
            self.model.scatter()
        self.model = None

    def close(self):
        self.model = None


def draw(logits, uniform, temperature):
    """A token for each row and its ln π; logits (rows, vocabulary), uniform (rows,) fp64 in [0, 1).

    Inverse CDF: the first token at which the running sum of probabilities passes the row's number.
    """
    logps = (logits.float() / (temperature or 1.0)).log_softmax(-1)
    if temperature == 0:
        token = logits.argmax(-1, keepdim=True)
    else:
        cdf = logps.exp().cumsum(-1, dtype=torch.float64)
        total = cdf[:, -1:]  # 1, but for rounding
        token = torch.searchsorted(cdf, uniform[:, None] * total, right=True)
    return token[:, 0], logps.gather(-1, token)[:, 0]


class VLLMSampler:
    """vLLM in this process: paged attention and continuous batching, for real models on GPUs."""

    def __init__(self, args, eos, window, training=False):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process, where we reach it
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # it would report to its makers at every start
        import vllm
        from vllm.platforms import current_platform

        gpu, threads = torch.cuda.is_available(), torch.get_num_threads()
        if current_platform.is_unspecified():
            fail("--engine vllm: there is no GPU, and this is not vLLM's CPU build")
        self.sleeps, self.asleep = training and gpu, False
        self.fresh, self.proved = False, False  # does it hold the weights of now? Does a push arrive?
        # LoRA's small additions, merged into bf16 weights, would be rounded away
        self.dtype = torch.float32 if getattr(args, "lora", None) else getattr(torch, args.dtype)
        self.llm = vllm.LLM(
            args.model,
            revision=args.revision,
            seed=args.seed,  # each request has a seed of its own
            dtype=self.dtype,
            max_model_len=window,
            enforce_eager=not gpu,
            enable_sleep_mode=self.sleeps,
            gpu_memory_utilization=args.gpu_memory,
            kv_cache_memory_bytes=None if gpu else 1 << 30,
            generation_config="vllm",  # not the model's own top-k and top-p: they would make ln π/π_ref a lie
            logprobs_mode="processed_logprobs",  # after the temperature, as in the loss
            disable_log_stats=True,
            use_tqdm_on_load=False,
            language_model_only=True,  # no part that sees, of which Stage 2 may have no weights to push
        )
        torch.set_num_threads(threads)  # vLLM leaves one, too few for the update on a CPU
        self.sampling = dict(
            temperature=args.temperature,
            top_p=1.0,
            top_k=-1,
            max_tokens=args.max_new_tokens,
            stop_token_ids=eos,
            detokenize=False,
            logprobs=0 if training else None,
            flat_logprobs=True,
        )
        self.rest()

    def generate(self, prompts, n, seeds):
        for _, completions in self.stream([(prompts, seeds, 0)], n):
            return completions
        return []  # a process without prompts

    def stream(self, requests, n):
        """Yields (a request's index, its completions) as they are done. All wait in one queue, so that the
        engine's batch is full until the end."""
        import vllm

        engine = self.llm.llm_engine
        completions = [[None] * len(prompts) for prompts, *_ in requests]
        for index, (prompts, seeds, first) in enumerate(requests):
            for position, (prompt, seed) in enumerate(zip(prompts, seeds)):
                params = vllm.SamplingParams(
                    n=n - first, seed=seed + first,  # vLLM gives completion i the seed + i
                    output_kind=vllm.sampling_params.RequestOutputKind.FINAL_ONLY, **self.sampling)
                engine.add_request(f"{index} {position}", {"prompt_token_ids": prompt}, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    index, position = map(int, output.request_id.split())
                    completions[index][position] = [self.completion(written) for written in output.outputs]
                    if all(completions[index]):
                        yield index, completions[index]
                        completions[index] = None  # Stage 1's completions may be gigabytes

    @staticmethod
    def completion(written):
        logps = written.logprobs.logprobs if written.logprobs else []  # of the tokens themselves alone
        return Completion(list(written.token_ids), written.finish_reason == "stop", logps)

    def wake(self, policy):
        if self.fresh:
            return
        if self.asleep:
            self.llm.wake_up(["weights"])
        if self.proved:
            self.load(policy.checkpoint_weights(self.dtype))
        else:
            self.prove_push(policy)
        if self.asleep:
            self.llm.wake_up(["kv_cache"])
        self.llm.reset_prefix_cache()  # or old keys and values answer for the new weights
        self.fresh, self.asleep = True, False

    def rest(self):
        """Until then the weights may not change. It gives its memory back, unless it may stay awake."""
        self.fresh = False
        if self.sleeps and not self.asleep:
            before, _ = torch.cuda.mem_get_info()
            self.llm.sleep(level=2)  # nothing waits in CPU memory: the next push brings all weights
            self.size, self.asleep = torch.cuda.mem_get_info()[0] - before, True

    def load(self, named_tensors):
        # without an iterator reload_weights reads the *old* checkpoint from disk
        self.llm.collective_rpc("reload_weights", kwargs=dict(weights_iterator=iter(named_tensors)))

    def prove_push(self, policy):
        """Does all that vLLM holds follow a push? The policy's weights plus 1 come, then they themselves: the
        sum of each of vLLM's own tensors, whatever its name there, must change."""

        def sums(worker):
            tensors = worker.get_model().named_parameters()
            return {name: tensor.sum(dtype=torch.float64).item() for name, tensor in tensors
                    if tensor.numel()}  # the CPU build has moved some elsewhere

        weights = lambda: policy.checkpoint_weights(self.dtype)
        self.load((name, tensor + 1) for name, tensor in weights())
        (moved,) = self.llm.collective_rpc(sums)
        self.load(weights())
        (now,) = self.llm.collective_rpc(sums)
        stuck = [name for name in now if not abs(now[name] - moved[name]) > 0]  # NaN is one, too
        if stuck:
            fail(f"vLLM does not take all of the policy's weights: {len(stuck)} of its {len(now)} tensors "
                 f"keep their numbers after a push, such as {stuck[0]}; try --engine transformers")
        self.proved = True

    def close(self):
        """Gives everything back, so that another model's engine can start in this process."""
        from vllm.distributed import cleanup_dist_env_and_memory
        from vllm.platforms import current_platform

        if self.asleep:
            self.llm.wake_up()  # what sleeps cannot be freed
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        cleanup_dist_env_and_memory()
        # the next engine's CUDA graphs need a pool of their own
        type(current_platform)._global_graph_pool = None


# -----------------------------------------------------------------------------------------------------------
# what all scripts share: flags


class Flags(argparse.ArgumentParser):
    """Flags in groups. A recipe, @FILE, stands for the flags in that file. An error is one line."""

    def __init__(self, description):
        super().__init__(description=description, fromfile_prefix_chars="@", allow_abbrev=False)
        self.may_be_zero = set()

    def group(self, title):
        """→ add(name, default, help)

        The default tells the type. A type in its place means that there is no default; a list holds the
        choices, of which the first is the default. Numbers are above 0, or with `zero` not below it.
        """
        group = self.add_argument_group(title)

        def add(name, default, help, zero=False, **more):
            if zero or default == 0:
                self.may_be_zero.add(name)
            if isinstance(default, list):
                more["choices"], default = default, default[0]
            if default is False:
                more["action"] = "store_true"
            elif isinstance(default, type):
                more.setdefault("type", default)
            else:
                more |= dict(type=type(default), default=default)
                help += f" (default: {default})"
            group.add_argument(name, help=help, **more)

        return add

    def error(self, message):
        fail(f"{message} (--help lists the flags)")


def read_flags(parser, recipe):
    """Without flags, or with --overwrite alone, a script reads its recipe in tiny/: the embedded world."""
    flags, world = sys.argv[1:], Path(__file__).parent / f"tiny/{recipe}.args"
    if world.exists():
        parser.epilog = f"The embedded world's: {' '.join(world.read_text().split())} (@tiny/{world.name})"
    if not {*flags} - {"--overwrite"}:
        flags.append(f"@{world}")
    args = parser.parse_args(flags)
    if getattr(args, "temperature", 1) == 0 and getattr(args, "samples", 1) > 1:
        fail("--temperature 0 gives one greedy completion: it goes with --samples 1")
    load_reward(getattr(args, "reward", None))  # what is wrong with it is said before a model is loaded
    for name, value in vars(args).items():
        if type(value) in (int, float):
            zero = value == 0 and f"--{name}" in parser.may_be_zero
            if not (value > 0 or zero):  # NaN is not above 0 either
                fail(f"--{name} {value} is too small")
    return args


def add_policy_flags(parser, models=None):
    """The flags that decide what a completion is: the model, its prompt, how it samples."""
    add = parser.group("policy and sampling")
    add("--model", str, "a Hugging Face model folder or hub id; in Stage 1 it is π_ref", required=True,
        nargs=models)
    add("--revision", str, "branch, tag or commit on the hub")
    add("--prompt", str, "with fields of the problem in braces: '{question} Answer in \\boxed{}.'; default: "
        "the authors', which asks for \\boxed{} (GSM8K: for ####)", metavar="TEMPLATE")
    add("--chat", False, "put the prompt into the tokenizer's chat template; default: plain text, for base "
        "models")
    add("--chat_args", str, "more for that template, as in '{\"enable_thinking\": false}'", metavar="JSON",
        type=json_object)
    add("--stop", str, "more tokens that end a completion, for base models; they stay in its text", nargs="+",
        metavar="TOKEN")
    add("--reward", str, "your own: def reward(response: str, row: dict, finished: bool) -> float; row is "
        "the problem with all its fields", metavar="FILE.py:FUNCTION")
    add("--temperature", 1.0, "divides the logits, here and in the loss; 0: greedy", zero=True)
    add("--max_new_tokens", 1024, "a longer completion is cut off; it earns 0, unless --reward is your own")
    return add


def json_object(text):
    return {**json.loads(text)}


def add_machine_flags(parser, training=False):
    add = parser.group("memory and machine")
    add("--seed", 0, "the random numbers of a completion follow from this, its problem's id and its number; "
        "in Stage 2 from the step, too")
    add("--dtype", ["auto", "float32", "bfloat16"], "the precision of all computing; auto: bfloat16 on a GPU "
        "that multiplies in it, else float32")
    note = "; with --lora it holds the merged weights in fp32" if training else ""
    add("--engine", ["auto", "vllm", "transformers"], "auto: vLLM where it is installed and there is a GPU"
        + note)
    add("--decode_rows", 256, "completions saved at once, and with transformers decoded at once; bounds the "
        "memory")
    add("--gpu_memory", 0.4 if training else 0.9, "vLLM: the share of each GPU's memory that it takes")
    return add


def add_problem_flags(parser, split, files=None):
    add = parser.group("files and output")
    add("--data", str, "problems: .jsonl, .json or .parquet, a name (gsm8k, math, …), or a hub id",
        required=True, nargs=files)
    add("--split", split, "of a data set on the hub")
    add("--question_field", "question", "the field of a problem that holds the question")
    add("--answer_field", "answer", "the field that holds the answer; with --reward 'answer' may be missing")
    add("--limit", int, "only the first so many problems")
    add("--overwrite", False, "throw away what an earlier run with other settings left there")
    return add


# -----------------------------------------------------------------------------------------------------------
# what all scripts share: processes


def run_script(main):
    """main(), with what a user can mend said in one line. Where one of several processes fails, all end."""
    code = exit_code(main) if WORLD == 1 else exit_code_among_others(main)
    if code and "vllm" in sys.modules:  # an engine that is torn down would print errors behind ours
        end_now(code)
    if code:
        raise SystemExit(code)


def exit_code(main):
    try:
        with_short_errors(main)
    except SystemExit as end:
        return end.code
    except Exception:
        if WORLD > 1:  # perhaps because of another process, which then ends this one without a word
            time.sleep(2 * BEAT)
        traceback.print_exc()
        return 1
    return 0


def exit_code_among_others(main):
    if os.environ.get("TORCHELASTIC_MAX_RESTARTS") != "0":  # a restart would find the old store
        fail("several processes are started by torchrun, under srun and mpirun too, and without "
             "--max_restarts: the same command resumes")
    torchrun_store().add(f"count {RANK}", 1)
    over = Event()
    watch = Thread(target=watch_the_others, args=[over], daemon=True)
    watch.start()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    code = exit_code(main)
    over.set()
    watch.join()  # a thread that is within the store when Python ends aborts the process
    with suppress(RuntimeError):  # the store is gone, with its machine
        torchrun_store().set("failed" if code else f"ended {RANK}", "yes")
    if code:  # that the others see it before torchrun takes the store away
        time.sleep(2 * BEAT)
    return code


BEAT, SILENCE = 1, 300  # seconds from one count to the next, and until a process that stands still is gone


def watch_the_others(over):
    """A thread that ends this process, wherever it waits: when another one has failed, which says why itself,
    or when a neighbour's count has stood still for long, as its machine is gone."""
    store, trouble = torchrun_store(), None
    neighbour, last, since = (RANK + 1) % WORLD, 0, time.monotonic()
    while not trouble and not over.wait(BEAT):
        try:
            store.add(f"count {RANK}", 1)
            count = store.add(f"count {neighbour}", 0)
            if count > last or store.check([f"ended {neighbour}"]):
                last, since = count, time.monotonic()
            if store.check(["failed"]):
                end_now(2)
            if last > 0 and time.monotonic() - since > SILENCE:
                trouble = f"process {neighbour} of {WORLD} has been silent for {SILENCE} seconds"
                store.set("failed", "yes")
        except RuntimeError as error:
            trouble = f"torchrun's store is gone, and perhaps its machine ({error})"
    if trouble:
        print(f"error: {trouble}; the same command resumes", file=sys.stderr)
        end_now(2)


def end_now(code):
    """Also in the midst of a collective, and of what Python does at its end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def with_short_errors(main):
    try:
        main()
    except OSError as error:
        fail(f"{error.filename or 'writing'}: {error.strerror or error}")
    except (RuntimeError, ValueError) as error:
        signs = "out of memory", "Free memory on device"  # torch's, and vLLM's
        if any(sign in str(error) for sign in signs):
            fail("out of GPU memory: lower --decode_rows (transformers), --gpu_memory (vLLM) or, in "
                 "training, --tokens_per_microbatch")
        if WORLD == 1 or not ("by peer" in str(error) or isinstance(error, dist.DistError)):
            raise
        time.sleep(2 * BEAT)  # if another process knows why, it has said so, and this one ends here
        fail(f"another process is gone, or cannot be reached ({error}); the same command resumes")
    except KeyboardInterrupt:
        tqdm.write("stopped; the same command resumes from here", file=sys.stderr)
        raise SystemExit(130) from None


def start_process(args, group=False):
    """Settles GPU and cores, --dtype and --engine; with `group`, joins the process group. → the device

    Under torchrun each process sees its own GPU alone (so that is cuda:0) and takes its share of the cores.
    """
    if "LOCAL_WORLD_SIZE" in os.environ:
        local_rank, local_world = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = [*map(str, range(local_world))] if visible is None else visible.split(",")
        # before anything asks CUDA for its devices: it reads this once
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[local_rank : local_rank + 1])
        on_gpus = visible != "" and torch.backends.cuda.is_built() and shutil.which("nvidia-smi")
        if on_gpus and torch.cuda.device_count() == 0:
            fail(f"process {local_rank} of this node finds no GPU left: lower --nproc_per_node")
        # torchrun would leave each process one core; a scheduler may have given this node a part of the
        # machine
        cores = os.cpu_count() or 1
        if hasattr(os, "sched_getaffinity"):
            cores = len(os.sched_getaffinity(0))
        # of one process the cores may be the user's choice
        if local_world > 1 or "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, cores // local_world))
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.init()  # or a device mesh picks GPU number LOCAL_RANK, though this process sees only one
        # cuDNN's attention is wrong on B200 (pytorch#193893), and makes a plan for each new shape. vLLM, too,
        # switches it off
        torch.backends.cuda.enable_cudnn_sdp(False)
    elif platform.libc_ver()[0] == "glibc":  # keep freed memory: asking for it anew is a tenth of an update
        for option, value in ((-4, 0), (-1, 2**31 - 1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(option, value)
    if args.dtype == "auto":  # older GPUs emulate bf16, slowly
        bf16 = gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        args.dtype = "bfloat16" if bf16 else "float32"
    settle_engine(args, gpu)
    if group:
        warnings.filterwarnings("ignore", module="torch.distributed|torch.storage|torch.utils._pytree")
        backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
        if WORLD > 1:
            # a process whose completions are short waits for the others; watch_the_others sees failures
            dist.init_process_group(backend, timeout=timedelta(days=1))
        elif args.dtype != "float32" or gpu:  # FSDP on one process: it keeps the fp32 masters
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return torch.device("cuda" if gpu else "cpu")


def settle_engine(args, gpu):
    installed = getattr(importlib.util.find_spec("vllm"), "origin", None)  # (a folder of that name has none)
    if args.engine == "vllm" and not installed:
        fail("--engine vllm: vLLM is not installed")
    if args.engine == "auto":
        args.engine = "vllm" if installed and gpu else "transformers"


def barrier(label):
    """Every process waits here for all others. It needs no process group, so nothing on the GPU."""
    if WORLD > 1:
        if torchrun_store().add(label, 1) == WORLD:
            torchrun_store().set(f"{label}: all here", "yes")
        while not torchrun_store().check([f"{label}: all here"]):
            time.sleep(0.1)  # a wait inside the store would hear no signal


def collect(label, values):
    """The lists of all processes → on the first one list, in the order of the processes"""
    if WORLD == 1:
        return values
    torchrun_store().set(f"{label} of {RANK}", json.dumps(values))
    barrier(label)
    parts = [torchrun_store().get(f"{label} of {rank}") for rank in range(WORLD if RANK == 0 else 0)]
    return [value for part in parts for value in json.loads(part)]


@cache
def torchrun_store():
    return next(dist.rendezvous("env://"))[0]


@contextmanager
def first_process_first(label):
    """The first process reports what is wrong, downloads and prepares. The others do the same after it."""
    if RANK > 0:
        barrier(label)
    try:
        yield
    except SystemExit as end:
        if RANK == 0 and not end.code:  # --help, which the others print, too
            barrier(label)
        raise
    if RANK == 0:
        barrier(label)


# -----------------------------------------------------------------------------------------------------------
# what all scripts share: models and prompts


def load_tokenizer(args):
    """→ the tokenizer, the ids that end a completion, and how many tokens the model can see"""
    model, revision = args.model, args.revision
    is_path = model.startswith(("/", ".", "~")) or model.count("/") > 1  # a hub id is owner/name
    if is_path and not Path(model).is_dir():
        fail(f"--model {model}: no such folder")
    transformers.utils.logging.disable_progress_bar()
    config = from_pretrained(transformers.AutoConfig, model, revision)
    tokenizer = from_pretrained(transformers.AutoTokenizer, model, revision)
    if not tokenizer("1 + 1").input_ids:  # where its files are missing, transformers makes an empty one
        fail(f"--model {model}: no tokenizer in it")
    eos = None
    with suppress(OSError):  # not every model has a generation config
        eos = transformers.GenerationConfig.from_pretrained(model, revision=revision).eos_token_id
    eos = getattr(config.get_text_config(), "eos_token_id", None) if eos is None else eos
    eos = set(eos if isinstance(eos, list) else [eos]) | {tokenizer.eos_token_id}
    eos.discard(None)
    if not eos:
        fail(f"--model {model}: neither its tokenizer nor its generation config names an EOS token")
    for stop in args.stop or []:
        ids = tokenizer(stop, add_special_tokens=False).input_ids
        if len(ids) != 1:
            fail(f"--stop {stop!r}: it should be one token, and is {tokenizer.convert_ids_to_tokens(ids)}")
        eos.update(ids)
    window = getattr(config.get_text_config(), "max_position_embeddings", None)
    return tokenizer, sorted(eos), window or 1 << 30


def load_model(model, revision, dtype, device):
    return from_pretrained(transformers.AutoModelForCausalLM, model, revision, dtype=dtype).to(device)


def from_pretrained(kind, model, revision, **more):
    try:
        return kind.from_pretrained(model, revision=revision, **more)
    except Exception as error:  # a broken folder fails in as many ways as there are models and tokenizers
        folder = "" if Path(model).is_dir() else "no such folder, and as a name on the hub: "
        fail(f"--model {model}: {folder}no {kind.__name__} loads from it ({error})")


def add_prompts(problems, args):
    """Gives each problem its "prompt" and the "tokens" of it, encoded once, and alike in all scripts.

    → the tokenizer, and the ids that end a completion
    """
    tokenizer, eos, window = load_tokenizer(args)
    for problem in problems:
        if "vstar" not in problem:  # keep Stage 1's prompt: a chat template may insert today's date
            problem["prompt"] = make_prompt(tokenizer, problem, args.prompt, args.chat, args.chat_args)
        problem["tokens"] = encode(tokenizer, problem["prompt"], args.chat)
        if not 0 < len(problem["tokens"]) <= window - args.max_new_tokens:
            fail(f"problem {problem['id']}: a prompt of {len(problem['tokens'])} tokens and --max_new_tokens "
                 f"{args.max_new_tokens} do not fit the model's window of {window}")
    if RANK == 0:
        warn_of_unknown(problems, tokenizer, args.model)
    return tokenizer, eos


def warn_of_unknown(problems, tokenizer, model):
    """Names what of the prompts the model does not see: the tokenizer makes its unknown token of it, or
    nothing. Of a word that is unknown as a whole it names the word, else its unknown characters."""
    unknown = tokenizer.unk_token_id
    if unknown is None:
        return
    ids = cache(lambda text: tokenizer(text, add_special_tokens=False).input_ids)
    characters = set("".join(problem["prompt"] for problem in problems))
    dropped = {character for character in characters if not character.isspace() and not ids(character)}
    prompts, named = 0, Counter()
    for problem in problems:
        lost = dropped & {*problem["prompt"]}
        if unknown in problem["tokens"]:  # which may stand for BOS, too, or in a template
            for word in problem["prompt"].replace(tokenizer.unk_token, " ").split():
                if unknown in ids(word):
                    parts = {character for character in word if unknown in ids(character)}
                    lost |= parts if parts and {*ids(word)} != {unknown} else {word}
        prompts += bool(lost)
        named.update(sorted(lost))
    if prompts:
        some = ", ".join(repr(text) for text, _ in named.most_common(5))
        print(f"warning: {prompts} of {len(problems)} prompts hold {some}, which the tokenizer of {model} "
              "does not know. The model will not see it. Spell it in another way, or take another model.")


# -----------------------------------------------------------------------------------------------------------
# what all scripts share: files


@contextmanager
def atomic_write(path, mine=True):
    """A file or folder that others read appears whole or not at all: it is written aside, synced and renamed.

    Where all processes write into one folder, it is `mine` on the first alone, which renames it.
    """
    aside = path.with_name(path.name + ".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield aside
        if mine:
            for file in (aside, *aside.rglob("*")):
                if file.is_file():
                    with open(file, "rb") as synced:
                        os.fsync(synced.fileno())
            if path.is_dir():
                remove(path)
            os.replace(aside, path)
    except (OSError, SafetensorError) as error:
        remove(aside)
        fail(f"cannot write {path}: {getattr(error, 'strerror', None) or error}. Is the disk full? What was "
             "there is whole, and the same command resumes from it")


def write_text(path, text):
    with atomic_write(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_rows(path, rows):
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def remove(path):
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def parts_of(out):
    return out.with_suffix(".parts")


def guard_completions(args, problems, may_change=(), **more):
    """guard_settings for what sample_all writes."""
    more |= fingerprint(args.model, args.reward) | {"data's problems": hash_of(problems)}
    more |= {"number of problems": len(problems), "problems' ids": hash_of_ids(problems)}
    config, parts = args.out.with_suffix(".config.json"), parts_of(args.out)
    # another reward grades again
    kept = ["reward", "reward's file", "number of problems", "problems' ids"]
    guard_settings(args, config, [args.out, parts], [args.out, *parts.glob("*.jsonl")],
                   ["samples", *may_change], kept, **more)


def guard_settings(args, config, outputs, precious, may_change=(), kept=(), **more):
    """May this run resume from `outputs`? Only if a run with the same settings made them.

    The settings are all flags and `more`, and `config` keeps them. `may_change` names those that leave
    earlier results usable, `kept` those that are only written down. Where nothing `precious` exists, a run
    with other settings starts afresh.
    """
    may_change = {"out", "overwrite", "decode_rows", "gpu_memory", *may_change}
    settings = json.loads(json.dumps(vars(args) | more, default=str))
    settings = {key: value for key, value in settings.items() if key not in may_change}
    for flag in ("model", "data"):
        source = Path(str(getattr(args, flag, "")))  # Stage 2 has no --data; "" is in no output
        if any(source.resolve().is_relative_to(path.resolve()) for path in outputs):
            fail(f"--out {args.out} would take the place of --{flag} {source}; name another")
    existing = [path for path in (config, *outputs) if path.exists()]
    afresh = args.overwrite
    if existing and not afresh:
        try:
            old = dict(json.loads(config.read_text(encoding="utf-8"))["settings"])
        except (OSError, ValueError, KeyError, TypeError):
            fail(f"{existing[0]} is there, but not with a run's settings in {config.name}; --overwrite "
                 "starts afresh")
        afresh = [*differences(args, old, settings, kept)]
        if afresh and any(path.exists() for path in precious):
            fail(f"{config}: the run was begun with other settings: {', '.join(afresh)}; --overwrite throws "
                 "it away")
    if afresh:
        strange = [file for path in outputs for file in path.rglob("*")
                   if file.is_file() and not MADE.fullmatch(file.name)]
        if strange:
            fail(f"{strange[0]}: no run wrote this, and a new start would throw it away; move it")
        for path in existing:
            remove(path)
    versions = dict(torch=torch.__version__, transformers=transformers.__version__)
    content = dict(settings=settings, samples=getattr(args, "samples", None), versions=versions)
    write_text(config, json.dumps(content, indent=1) + "\n")


MADE = re.compile(  # the files in a run's folders: completions, checkpoints, and what transformers saves
    r"(\d+(\.held_out)?\.jsonl|\.metadata|.*\.(distcp|safetensors|bin|model|jinja|tiktoken)|merges\.txt|"
    r"vocab\.txt|((generation_|tokenizer_|(video_)?(pre)?processor_)?config|tokenizer|vocab|added_tokens|"
    r"special_tokens_map|"
    r"chat_template|.*\.index)\.json)(\.tmp)?")


def differences(args, old, new, kept=(), of=""):
    """What two runs' settings do not share, in words; those of Stage 1 one by one."""
    for key in new | old:
        was, now = old.get(key), new.get(key)
        if key == "stage1":
            yield from differences(args, was or {}, now or {}, of="Stage 1's ")
        elif was != now and key not in kept:
            dashes = "--" if hasattr(args, key) or of and " " not in key else ""
            yield f"{of}{dashes}{key} (was {was}, now {now})"


def fingerprint(model, reward=None):
    """Hashes of the model's files and the reward's code, so that an edit under the same name is noticed.

    Of each file in a local model's folder it reads 4 KB in 256 places. (--revision names the hub's.)
    """
    weights = hashlib.blake2b(digest_size=8)
    kinds = {".safetensors", ".bin", ".json", ".txt", ".model", ".jinja"}
    for path in sorted(Path(model).glob("*")):
        if path.suffix not in kinds:
            continue
        with open(path, "rb") as file:
            for part in range(256):
                file.seek(path.stat().st_size * part // 256)
                weights.update(file.read(4096))
    return {"model's files": weights.hexdigest(), "reward's file": load_reward(reward)[1]}


def hash_of(problems):
    """Of all their fields, as a reward may read any. The prompts follow from these and from --prompt."""
    digest = hashlib.blake2b(digest_size=8)
    for problem in problems:
        fields = problem | dict(prompt=None, tokens=None)
        digest.update(json.dumps(fields, sort_keys=True).encode())
    return digest.hexdigest()


def hash_of_ids(problems):
    return hash_of([dict(id=key) for key in sorted({problem["id"] for problem in problems})])


def read_rows(path, n=None, without=None):
    """The rows that sample_all wrote, with the first n completions of each; `without` names a field."""
    rows = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                for key in {"rewards", *row} & {"rewards", "lengths", "finished", "responses", "tokens"}:
                    row[key] = row[key][:n]
                row.pop(without, None)
                rows.append(row)
            except (ValueError, KeyError, TypeError):
                fail(f"{path}, line {number}: torn, or not a row of completions; remove this line, and the "
                     "command that made the file samples its completions again")
    return rows


def batched(items, size):
    """Slices of so many. (itertools has it from Python 3.12 on.)"""
    return [items[first : first + size] for first in range(0, len(items), size)]


def picture(path, rows, xs, panels):
    """Columns of `rows` against each other, as a .png: a line of panels for each x, a panel for each ys."""
    from matplotlib.figure import Figure

    # values that are text, evaluate.py's models, are the axis' labels: they want width, and no legend
    values = [row.get(y) for row in rows for ys in panels for y in ys]
    texts = [len(value) for value in values if isinstance(value, str)]
    width = 2 + 3 * len(panels) + 0.09 * max(texts, default=0)
    figure = Figure(figsize=(width, 3 * len(xs)), layout="constrained")
    axes = figure.subplots(len(xs), len(panels), squeeze=False)
    for axis, (x, ys) in zip(axes.flat, product(xs, panels)):
        for y in ys:
            points = [(row[x], row[y]) for row in rows if y in row]
            if points:
                style = "o-" if len(points) < 50 else "-"
                axis.plot(*zip(*points), style, label=y, markersize=4, linewidth=1)
        axis.set_xlabel(x)
        if not texts:
            axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    with atomic_write(path) as aside:
        figure.savefig(aside, dpi=130, format="png")


if __name__ == "__main__":
    run_script(main)
