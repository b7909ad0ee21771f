"""A*-PO, Stage 1: how well could one do on each prompt?   (arXiv 2505.20686)

For every prompt x the reference policy π_ref writes N answers. Each is graded with a reward r, 0 or 1. Then

    V̂*(x) = β1 ln( 1/N Σ_i exp( r_i / β1 ) )

estimates the value of the *optimal* KL-regularised policy, offline and once. PPO's critic and GRPO's groups estimate a
value over and over while they train. Here that is done beforehand, so Stage 2 (train.py) needs one answer per prompt.

    python vstar.py                                                                   the embedded world, on any CPU
    python vstar.py --model Qwen/Qwen2.5-1.5B --data math --out out/1.5B/vstar.jsonl  a real model
    torchrun --nproc_per_node 8 vstar.py --model …                                    the same file from eight GPUs

It writes out/vstar.jsonl (a row a prompt), out/vstar.config.json (the settings) and out/vstar.png. When it was killed,
the same command goes on where it stopped.
"""

import argparse
import ctypes
import hashlib
import importlib.util
import json
import math
import os
import platform
import shutil
import sys
import time
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from itertools import product
from pathlib import Path
from tempfile import TemporaryFile
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import transformers
from safetensors import SafetensorError
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from rewards import encode, fail, final_answers, load_problems, load_reward, make_prompt, read, readable, template_of

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets them

# ---------------------------------------------------------------------------------------------------------------------
# Stage 1


def estimate_vstar(rewards, beta1):
    """V̂* = β1 ln( 1/N Σ exp(r_i/β1) ) over the last axis.   A*-PO, eq. for V̂*; (…, N) → (…)

    It is exact from β1 → 0 (the best of the N) to β1 = inf (their mean). The best is subtracted first, or exp would
    overflow for a small β1. expm1 and log1p keep the digits of a large β1, where it is ln(1 + something tiny).
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    if math.isinf(beta1):
        return rewards.mean(-1)
    best = rewards.max(-1, keepdims=True)
    return best[..., 0] + beta1 * np.log1p(np.expm1((rewards - best) / beta1).mean(-1))


def make_parser():
    parser = Flags("A*-PO, Stage 1: estimate V*(x) from N answers per prompt by π_ref.")
    add_policy_flags(parser)
    add = parser.group("algorithm")
    add("--samples", 8, "N, the answers per prompt")
    add("--beta1", 0.5, "β1 of V̂*; inf is the mean reward, towards 0 the best of the N")
    add_machine_flags(parser)
    add = add_problem_flags(parser, split="train")
    add("--out", Path("out/vstar.jsonl"), "the file of rows; settings and picture go beside it")
    return parser


def main():
    with first_process_first("flags"):
        args = read_flags(make_parser(), "vstar")
    device = start_process(args, args.tensor_parallel)
    with first_process_first("prepared"):
        problems, tokenizer, eos = prepare(args)
        args.engine, why = pick_engine(args.engine)
        if RANK == 0:
            guard_rows(args, problems)
            print(f"Stage 1: {len(problems)} problems of {args.data}, N = {args.samples} answers each from "
                  f"{args.model}, {args.engine} ({why}), {WORLD} × {device.type} {args.dtype}")
    speed = sample_all(args, problems, tokenizer, eos, device, args.beta1)
    if RANK == 0:
        rows, png = read_rows(args.out, args.samples), args.out.with_suffix(".png")
        print(summary(rows, args.beta1, speed, args.reward))
        histogram(rows, png)
        print(f"→ {args.out}, {png}")


def prepare(args):
    """The problems that `args` names, with their prompts in tokens; the tokenizer; the ids that end an answer."""
    problems = load_problems(args.data, args.split, args.question_field, args.answer_field, args.reward)[: args.limit]
    if args.prompt is None:
        args.prompt = template_of(args.data)
    return problems, *ask(problems, args)


def sample_all(args, problems, tokenizer, eos, device, beta1=math.inf, keep_tokens=False):
    """N graded completions of each prompt, by all processes together, as one file of rows sorted by id, args.out.

    The prompts are sampled in chunks, and a chunk is a file that appears whole. Answers that exist are kept: what a
    killed run has saved, and those of a run with other --samples, for a copy's random numbers are a function of its
    number. All prompts of a chunk have equally many.
    Returns the tokens per second, if all processes are as quick as this one, or None where nothing was left to do.
    """
    # the longest prompts first: what does not fit into memory fails at once, and a chunk's prompts are of like length
    problems = sorted(problems, key=lambda problem: (-len(problem["tokens"]), problem["id"]))
    n, out, parts, rows, work = args.samples, args.out, parts_of(args.out), answered(args.out), []
    for first in range(n):  # those that have so many answers already
        some = [problem for problem in problems if len(rows.get(problem["id"], NO_ANSWERS)["rewards"]) == first]
        work += batched(some, max(1, min(args.decode_rows // (n - first), -(-len(some) // WORLD))))
    work = [[(problem, rows.get(problem["id"], NO_ANSWERS)) for problem in chunk] for chunk in work[RANK::WORLD]]
    del rows
    barrier(f"read {out}")  # before anyone writes
    speed = None
    if work:
        sampler = make_sampler(args, eos, problems, device)
        speed = WORLD * sample_chunks(args, sampler, tokenizer, work, beta1, keep_tokens)
        sampler.close()
    barrier(f"sampled {out}")
    if RANK == 0 and parts.exists():
        rows = answered(out)
        if any(len(rows.get(problem["id"], NO_ANSWERS)["rewards"]) < n for problem in problems):
            fail(f"{parts}: answers of other processes do not appear there; do all nodes share the folder? The same "
                 "command goes on from here")
        write_rows(out, sorted(rows.values(), key=lambda row: row["id"]))
    barrier(f"merged {out}")
    remove(parts)
    return speed


NO_ANSWERS = dict(rewards=[], lengths=[], finished=[], responses=[], tokens=[])  # of a row: a list over its copies


def answered(out):
    """{id: row}, all answers that exist: those of the file, and those of a run that was killed."""
    paths = [path for path in (out, *parts_of(out).glob("*.jsonl")) if path.exists()]
    rows = [row for path in paths for row in read_rows(path)]
    return {row["id"]: row for row in sorted(rows, key=lambda row: len(row["rewards"]))}  # the most of each prompt


def sample_chunks(args, sampler, tokenizer, work, beta1, keep_tokens):
    """Sample, grade and save this process's chunks, [[(problem, the row that it has)]]. Returns tokens per second."""
    start, tokens, graded = time.time(), 0, []
    bar = tqdm(total=sum(map(len, work)), unit="prompt", disable=RANK > 0,
               desc="sampling" if WORLD == 1 else f"sampling (1 of {WORLD} shares)")
    asked = [([problem["tokens"] for problem, _ in chunk],
              [prompt_seed(args.seed, problem["id"]) for problem, _ in chunk], len(chunk[0][1]["rewards"]))
             for chunk in work]
    for index, completions in sampler.stream(asked, args.samples):
        chunk, rows = work[index], []
        pairs = [(problem, copy) for (problem, _), copies in zip(chunk, completions) for copy in copies]
        judged = batched(grade(args, tokenizer, pairs), len(completions[0]))
        for (problem, old), copies, said in zip(chunk, completions, judged):
            responses, rewards = map(list, zip(*said))
            written = [copy.tokens for copy in copies]
            row = {key: value for key, value in problem.items() if key != "tokens"}
            row |= dict(rewards=old["rewards"] + rewards, vstar=estimate_vstar(old["rewards"] + rewards, beta1),
                        lengths=old["lengths"] + [len(some) for some in written],
                        finished=old["finished"] + [copy.finished for copy in copies],
                        responses=old["responses"] + responses)
            if keep_tokens:  # text that is encoded again need not give the same tokens
                row["tokens"] = old["tokens"] + written
            rows.append(row)
            tokens += sum(map(len, written))
            graded += [reward >= 1 for reward in rewards]
        write_rows(parts_of(args.out) / f"{prompt_seed(args.samples, chunk[0][0]['id'])}.jsonl", rows)
        speed = tokens / (time.time() - start)
        bar.set_postfix_str(f"accuracy {np.mean(graded):.3f}, {speed:,.0f} tokens/s", refresh=False)
        bar.update(len(chunk))
    bar.close()
    return speed


# what Stage 1 says of its answers


def vstar_scatter(rewards, beta1, n):
    """Mean and variance of V̂* from n answers, for each prompt; rewards (prompts, N) → (prompts,), (prompts,)

    Where rewards are 0 or 1 it is an exact bootstrap, without dice. Of n answers drawn from the N seen, Binomial(n,
    share of right ones) are right, so both are sums over 0 … n. The variance within N seen answers is too small by the
    factor (N-1)/N, and is divided by it. For β1 ≥ 0.5 and N ≥ 8 its root is within a tenth of the truth, over prompts
    of all difficulties. For a smaller β1, or where nearly all are hard, it is too low (by a quarter, where 2 % are
    right): what was never seen cannot be drawn.
    """
    seen, share, right = rewards.shape[1], rewards.mean(1, keepdims=True), np.arange(n + 1)
    more = seen / (seen - 1) if seen > 1 else math.nan  # one answer says nothing of its own scatter
    if n > 500 or not np.isin(rewards, (0, 1)).all():  # or the ways are more than a float holds
        dice = np.random.default_rng(0)
        draw_again = lambda: np.take_along_axis(rewards, dice.integers(seen, size=(len(rewards), n)), 1)
        drawn = [estimate_vstar(draw_again(), beta1) for _ in range(200)]
        return np.mean(drawn, axis=0), np.var(drawn, axis=0) * more
    vstar = estimate_vstar(np.arange(n) < right[:, None], beta1)  # (n + 1,) if 0, 1, … n of the n are right
    ways = np.array([math.comb(n, k) for k in right], dtype=np.float64)
    chance = ways * share**right * (1 - share) ** (n - right)  # (prompts, n + 1)
    return chance @ vstar, np.maximum(chance @ vstar**2 - (chance @ vstar) ** 2, 0) * more


def vstar_error(rewards, beta1, n):
    """The standard error of V̂* from n answers, as a root mean square over prompts."""
    return math.sqrt(vstar_scatter(rewards, beta1, n)[1].mean())


# Stage 2 spends about so many times as long on an answer as Stage 1: it also scores it under π_ref, trains on it, and
# samples smaller batches
STAGE2 = 5


def second_moment(rewards, beta1, n):
    """E[(r − V̂*)²] = σ² + b² + noise for π_ref and n answers, and the noise alone: σ² is the variance of r, b how far
    V̂* lies on average from the mean reward, and noise the variance of V̂*."""
    mean, noise = vstar_scatter(rewards, beta1, n)
    return rewards.var(1, ddof=1).mean() + ((mean - rewards.mean(1)) ** 2).mean() + noise.mean(), noise.mean()


def advise(rewards, beta1):
    """How many answers are cheapest? → the share of the gradient's variance that is V̂*'s noise, {passes: N}

    On-policy a wrong V̂* makes no bias, however often it is used, because E[∇ ln π] = 0. But it makes variance: that of
    the gradient grows with the second moment m(N) of r − V̂*, here as training begins. Were the steps needed in
    proportion to m, a prompt would cost N + STAGE2 · passes · m(N) / m(today's N) answers, and that is least at the N
    returned. It is an upper limit: a large batch, or a small learning rate, averages noise away, and then fewer answers
    will do (experiments/samples.py).
    """
    (total, noise), choices = second_moment(rewards, beta1, len(rewards[0])), [1 << k for k in range(7)]
    moments = {n: second_moment(rewards, beta1, n)[0] / total for n in choices}
    cost = lambda n, passes: n + STAGE2 * passes * moments[n]
    return noise / total, {passes: min(choices, key=lambda n: cost(n, passes)) for passes in (1, 10, 25)}


def pass_at_k(rewards, k):
    """The chance that at least one of k answers is right, unbiased from N ≥ k (Chen et al. 2021, eq. 1); (…, N) → (…)

    1 - C(wrong, k) / C(N, k), as a product: the chance that k answers drawn without replacement are all wrong.
    """
    right = np.asarray(rewards) >= 1
    n, wrong = right.shape[-1], (~right).sum(-1)
    return 1 - np.prod([np.clip(wrong - i, 0, None) / (n - i) for i in range(k)], axis=0)


def mean_and_interval(values):
    """The mean and half of its 95 % interval, over prompts (not answers: those of one prompt are not independent)."""
    return values.mean(), 1.96 * values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def summary(rows, beta1, speed=None, own=None):
    """Right is what earns at least 1. `own`: --reward"""
    rewards = np.array([row["rewards"] for row in rows])  # (prompts, N)
    n, right = rewards.shape[1], (rewards >= 1).sum(1)
    accuracy, half = mean_and_interval((rewards >= 1).mean(1))
    finished, length = (np.mean([row[key] for row in rows]) for key in ("finished", "lengths"))
    none, every = np.mean(right == 0), np.mean(right == n)
    ks = [*[k for k in (1, 2, 4, 8, 16, 32, 64) if k < n], n]
    lines = [
        f"prompts {len(rows)}, N {n}, β1 {beta1:g}",
        f"accuracy          {accuracy:.3f} ± {half:.3f} (95 %)",
        "pass@k            " + "  ".join(f"{k}: {pass_at_k(rewards, k).mean():.3f}" for k in ks),
        f"0/{n} right         {none:.1%} of the prompts      {n}/{n} right  {every:.1%}",
        f"finished          {finished:.1%} of the answers",
        f"mean length       {length:.1f} tokens" + (f"      {speed:,.0f} tokens/s" if speed else ""),
        f"mean V̂*           {np.mean(estimate_vstar(rewards, beta1)):.3f}",
    ]
    if (rewards != rewards[:, :1]).any():
        error = ", ".join(f"{vstar_error(rewards, beta1, k):.3f} at N = {k}" for k in (max(1, n // 2), n, 2 * n))
        share, best = advise(rewards, beta1)
        lines += [f"standard error    {error}  (of V̂*)",
                  f"N                 V̂*'s noise is {share:.0%} of the gradient's variance. Answers worth sampling, "
                  "at the most: " + ", ".join(f"{few} for {epochs}" for epochs, few in best.items())
                  + " epochs of Stage 2 (a larger --samples keeps those that exist)"]
    other = not np.isin(rewards, (0, 1)).all()
    if other:
        lines.insert(2, f"reward            {rewards.mean():.3f} on average; right is what earns at least 1")
    if none == 1 and finished > 0.5:
        lines += wrong_answers(rows, 3, own)
    if none > 0.9 and not other:
        lines.append(f"warning: {none:.0%} of the prompts have no right answer, so there is little to learn from. Look "
                     "at some responses. Does the answer stand where the grader looks (--prompt, --chat)? If so, the "
                     "model is too weak for these problems: take easier ones, a stronger model or more --samples.")
    if finished < 0.9:
        lines.append(f"warning: {1 - finished:.0%} of the answers were cut off{'' if own else ' and earn 0'}. Raise "
                     "--max_new_tokens. If they ramble on, the model does not know when to stop: try --chat, another "
                     "--prompt, or --stop.")
    return "\n".join(lines)


def wrong_answers(rows, count, own=None):
    """One of a problem, of problems spread over the set, and what the checker reads in both sides: the quickest way to
    find its false 'wrong'. `own`, another reward, reads in its own way."""
    wrong = []
    for row in rows:
        some = [pair for *pair, reward in zip(row["finished"], row["responses"], row["rewards"]) if reward < 1]
        wrong += [(row, *pair) for pair in sorted(some, key=lambda pair: not pair[0])[:1]]  # cut off only if all are
    count = min(count, len(wrong))
    for row, finished, response in (wrong[i * len(wrong) // count] for i in range(count)):
        found, gold = final_answers(response), read(row["answer"]).text
        said = f"as {read(found[-1]).text!r} {read(found[-1]).trouble}".strip() if found else "no \\boxed{} and no ####"
        said = "cut off" if not finished else f"by {own}" if own else f"{said}; the gold {row['answer']!r} as {gold!r}"
        yield f"── {readable(row['id'])}, wrong, read {said}\n   … {readable(response[-300:]).strip()}"


def histogram(rows, path):
    right = [sum(reward >= 1 for reward in row["rewards"]) for row in rows]
    counts = enumerate(np.bincount(right, minlength=len(rows[0]["rewards"]) + 1))
    picture(path, [{"right answers": k, "prompts": count} for k, count in counts], ["right answers"], [["prompts"]])


# ---------------------------------------------------------------------------------------------------------------------
# the sampler, with two engines: generate(prompts, n, seeds), stream(chunks, n), holding(policy), close()
# It can start at copy `first`: each copy has random numbers of its own, so those before it need not be drawn again.


class Completion(NamedTuple):
    tokens: list  # what was sampled, up to and including the EOS
    finished: bool  # did it end with EOS, or was it cut off?
    logps: list  # ln π of each token at the sampling temperature (vLLM: in training alone)


def make_sampler(args, eos, prompts, device, training=False):
    """A sampler for these prompts. In training, `holding` says which weights to sample from."""
    if args.engine == "vllm":
        longest = max(len(prompt["tokens"]) for prompt in prompts)
        return VLLMSampler(args, eos, longest + args.max_new_tokens, training)
    model = None if training else load_model(args.model, args.revision, args.dtype, device)
    return TransformersSampler(model, eos, args.max_new_tokens, args.temperature, args.decode_rows)


def grade(args, tokenizer, pairs):
    """[(row, completion)] → [(the completion as text, its reward)]"""
    judge = load_reward(args.reward)
    texts = [tokenizer.decode(completion.tokens, skip_special_tokens=True) for _, completion in pairs]
    if args.reward is None:
        return [(text, judge(text, row, completion.finished)) for text, (row, completion) in zip(texts, pairs)]
    # threads, so that a reward which waits for a process or a server does not hold up the others
    pool, graded = ThreadPoolExecutor(32), []
    calls = [pool.submit(judge, text, row, completion.finished) for text, (row, completion) in zip(texts, pairs)]
    for call, text, (row, _) in zip(calls, texts, pairs):
        try:
            if not math.isfinite(value := call.result()):  # what is no number raises a TypeError
                raise ValueError(f"a reward of {value}")
            graded.append((text, float(value)))
        except (Exception, SystemExit) as error:  # the user's own code; 0 in its place would train a policy on it
            pool.shutdown(wait=False, cancel_futures=True)
            own = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
                   if frame.filename == args.reward.rpartition(":")[0]]
            fail(f"--reward {args.reward}{f', line {own[-1]}' if own else ''}: {type(error).__name__}: {error}; "
                 f"problem {row['id']}, response {text[:80]!r}")
    pool.shutdown()
    return graded


def pick_engine(wanted):
    """→ the engine and why. vLLM's CUDA wheel also installs where there is no GPU, and cannot run there."""
    if wanted == "transformers":
        return wanted, "as the flags say"
    why = "vLLM is not installed"
    if getattr(importlib.util.find_spec("vllm"), "origin", None):  # (a folder of that name has none)
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        with quiet():
            from vllm.platforms import current_platform

        if torch.cuda.is_available() or current_platform.is_cpu():
            return "vllm", "as the flags say" if wanted == "vllm" else "installed and can run here"
        why = "vLLM is installed, but there is no GPU and this is not its CPU build"
    if wanted == "vllm":
        fail(f"--engine vllm: {why}")
    return "transformers", why


@contextmanager
def quiet():
    """Keeps back what libraries print while they start, also from C++. It is shown if they fail."""
    sys.stderr.flush()
    with TemporaryFile() as aside, os.fdopen(os.dup(2), "wb") as screen:
        os.dup2(aside.fileno(), 2)
        try:
            yield
        except BaseException:
            aside.seek(0)
            screen.write(aside.read())
            raise
        finally:
            os.dup2(screen.fileno(), 2)


def prompt_seed(seed, key):
    """The seed of one prompt's completions, from the run's seed and the prompt's id: its neighbours play no part."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{key}".encode("utf-8", "replace"), digest_size=7).digest(), "big")


@dataclass
class TransformersSampler:
    """A decode loop over any transformers causal language model: no second copy of the weights, no second process.

    Each row draws from its own random numbers, so a completion does not depend on the rows beside it. The loop is twice
    as quick as transformers' own `generate`, because rows that are finished leave the batch.
    """

    model: torch.nn.Module  # None until `holding` says which
    eos: list
    max_new_tokens: int
    temperature: float
    rows: int  # completions decoded at once
    given_back = awake = 0  # bytes; this one never sleeps

    def generate(self, prompts, n, seeds, first=0):
        """Token lists → the Completions first … n - 1 of each."""
        longest_first = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # like lengths: little padding
        completions = []
        for some in batched(longest_first, max(1, self.rows // (n - first))):
            # in one part, unless one prompt has more copies than fit
            parts = [self.decode([prompts[i] for i in some], range(copy, min(copy + self.rows, n)),
                                 [seeds[i] for i in some]) for copy in range(first, n, self.rows)]
            completions += [sum(copies, []) for copies in zip(*parts)]
        return [copies for _, copies in sorted(zip(longest_first, completions))]

    @torch.no_grad()  # not inference_mode: FSDP would keep buffers that autograd may not touch
    def decode(self, prompts, copies, seeds):
        device, limit, n = next(self.model.parameters()).device, self.max_new_tokens, len(copies)
        count = len(prompts) * n
        eos = torch.tensor(self.eos, device=device)
        # one uniform number per token that could be sampled, each row from a stream of its own
        uniforms = torch.from_numpy(np.stack([
            np.random.Generator(np.random.Philox(key=[seed, copy])).random(limit) for seed in seeds for copy in copies
        ])).to(device)  # (count, limit) fp64
        # left-padded, so that every prompt ends in the last column; the padding is masked and takes no position
        pad = lambda rows: pad_sequence([torch.tensor(row) for row in rows], True, padding_side="left").to(device)
        ids, mask = pad(prompts), pad([[1] * len(prompt) for prompt in prompts])  # (prompts, width)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache = transformers.DynamicCache(config=self.model.config)
        tokens = ids.new_zeros(count, limit)
        logps = tokens.float()
        rows = torch.arange(count, device=device)  # which completion each row of the batch is writing
        ended = torch.zeros(count, dtype=torch.bool, device=device)  # the rows of the batch that have written their EOS
        for t in range(limit):
            logits = self.model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache,
                                use_cache=True, logits_to_keep=1).logits[:, -1]
            if t == 0:  # the n completions of a prompt share the pass over it
                cache.batch_repeat_interleave(n)
                logits, mask, positions = (each.repeat_interleave(n, 0) for each in (logits, mask, positions))
            token, logps[rows, t] = draw(logits, uniforms[rows, t], self.temperature)
            tokens[rows, t] = token
            ended |= torch.isin(token, eos)
            writing = (~ended).nonzero()[:, 0]
            if len(writing) == 0:
                break
            if len(writing) <= 0.75 * len(rows):  # finished rows leave in groups, because leaving copies the cache
                cache.batch_select_indices(writing)
                rows, token, mask, ended, positions = (each[writing] for each in (rows, token, mask, ended, positions))
            ids, positions = token[:, None], positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        ends = torch.isin(tokens, eos)
        finished = ends.any(-1)
        lengths = torch.where(finished, ends.int().argmax(-1) + 1, limit)  # the EOS is part of the completion
        written = zip(*(tensor.tolist() for tensor in (tokens, finished, logps, lengths)))
        return batched([Completion(some[:length], end, logp[:length]) for some, end, logp, length in written], n)

    def stream(self, chunks, n):
        """[(prompts, seeds, first)] → (the chunk's index, its completions) as they are done. Waiting prompts do not
        take the place of finished rows: they would all share the longest row's width, which was measured and is
        slower."""
        for index, (prompts, seeds, first) in enumerate(chunks):
            yield index, self.generate(prompts, n, seeds, first)

    def holding(self, policy):
        """It samples from the very weights that are trained."""
        self.model = policy
        return policy.gathered()

    def close(self):
        self.model = None


def draw(logits, uniform, temperature, block=128):
    """A token for each row and its ln π; logits (rows, vocabulary), uniform (rows,) fp64 in [0, 1).

    Inverse CDF: the first token at which the running sum of probabilities passes the row's number. It is found in two
    steps, the block of tokens and then the token in it: one running sum over 152k tokens costs more than the model.
    """
    padding = (0, -logits.shape[-1] % block)
    scores = torch.nn.functional.pad(logits, padding, value=-math.inf).float().div_(temperature or 1.0)  # a copy
    # in place, so `scores` too is then exp(score − the largest); weights: (rows, blocks, block) fp32
    weights = scores.sub_(scores.amax(-1, keepdim=True)).exp_().unflatten(-1, (-1, block))
    of_block = weights.sum(-1).double()  # (rows, blocks)
    until = of_block.cumsum(-1)
    total = until[:, -1:]
    if temperature == 0:
        token = logits.argmax(-1, keepdim=True)
    else:
        wanted = uniform[:, None] * total
        which = torch.searchsorted(until, wanted, right=True)  # (rows, 1)
        inside = weights.take_along_dim(which[:, :, None], 1)[:, 0].double().cumsum(-1)  # (rows, block)
        # how far into the block, as a share of it: sums in fp32 and in fp64 differ in the last digits
        share = 1 - (until.gather(-1, which) - wanted) / of_block.gather(-1, which)
        token = which * block + torch.searchsorted(inside, share.clamp(min=0) * inside[:, -1:], right=True)
    return token[:, 0], (scores.gather(-1, token) / total).log().float()[:, 0]


class VLLMSampler:
    """vLLM in this process: paged attention and continuous batching, for real models on GPUs."""

    def __init__(self, args, eos, window, training=False):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process, reproducible and reachable
        gpu, threads = torch.cuda.is_available(), torch.get_num_threads()
        self.sleeps, self.proved = training and gpu, False
        self.given_back = self.awake = 0  # bytes: of the engine alone; of all, while it is awake
        with quiet():
            import vllm

            self.llm = vllm.LLM(
                args.model, revision=args.revision, seed=args.seed + RANK,
                dtype="float32" if getattr(args, "lora", None) else args.dtype,  # rounding would undo small additions
                max_model_len=window, tensor_parallel_size=getattr(args, "tensor_parallel", 1), enforce_eager=not gpu,
                enable_sleep_mode=self.sleeps, gpu_memory_utilization=args.gpu_memory,
                kv_cache_memory_bytes=None if gpu else 1 << 30,
                generation_config="vllm",  # not the model's own top-k and top-p: they would make ln π/π_ref a lie
                logprobs_mode="processed_logprobs",  # after the temperature, as in the loss
                disable_log_stats=True, use_tqdm_on_load=False,
            )
        torch.set_num_threads(threads)  # vLLM leaves one, too few for the update on a CPU
        self.sampling = dict(temperature=args.temperature, top_p=1.0, top_k=-1, max_tokens=args.max_new_tokens,
                             stop_token_ids=eos, detokenize=False, logprobs=0 if training else None)
        if self.sleeps:
            torch.cuda.empty_cache()  # falling asleep does it too
            free = torch.cuda.mem_get_info()[0]
            self.llm.sleep(level=2)
            self.given_back = torch.cuda.mem_get_info()[0] - free

    def generate(self, prompts, n, seeds):
        return next(self.stream([(prompts, seeds, 0)], n), (0, []))[1]

    def stream(self, chunks, n):
        """[(prompts, seeds, first)] → (the chunk's index, its completions) as they are done. All stand in one queue, so
        that the batch is full until the end."""
        import vllm

        engine, completions = self.llm.llm_engine, [[None] * len(prompts) for prompts, *_ in chunks]
        for index, (prompts, seeds, first) in enumerate(chunks):
            for place, (prompt, seed) in enumerate(zip(prompts, seeds)):
                engine.add_request(f"{index} {place}", {"prompt_token_ids": prompt}, vllm.SamplingParams(
                    n=n - first, seed=seed + first,  # vLLM gives copy i the seed + i
                    output_kind=vllm.sampling_params.RequestOutputKind.FINAL_ONLY, **self.sampling))
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    index, place = map(int, output.request_id.split())
                    completions[index][place] = [self.completion(copy) for copy in output.outputs]
                    if all(completions[index]):
                        yield index, completions[index]
                        completions[index] = None  # Stage 1's answers may be gigabytes

    @staticmethod
    def completion(copy):
        tokens = list(copy.token_ids)
        logps = [step[token].logprob for token, step in zip(tokens, copy.logprobs or [])]
        return Completion(tokens, copy.finish_reason == "stop", logps)

    @contextmanager
    def holding(self, policy):
        """It wakes, takes the policy's weights as they are now, and sleeps again: the update needs the GPU's memory."""
        if self.sleeps:
            self.llm.wake_up(["weights"])
        everything = self.sleeps or not self.proved  # what slept has forgotten also the weights that are frozen
        if not self.proved:
            self.prove(policy)
        self.load(policy.full_weights(frozen=everything))
        if self.sleeps:
            self.llm.wake_up(["kv_cache"])
            self.awake = torch.cuda.memory_allocated()
        self.llm.reset_prefix_cache()  # or old keys and values answer for the new weights
        yield
        if self.sleeps:
            self.llm.sleep(level=2)  # nothing waits in CPU memory: the next push brings all weights

    def load(self, named_tensors):
        # without an iterator reload_weights reads the *old* checkpoint from disk
        self.llm.collective_rpc("reload_weights", kwargs=dict(weights_iterator=iter(named_tensors)))

    def prove(self, policy):
        """Does a push arrive? In the first, the vectors (norms) are doubled, and read back out of the engine."""
        pushed = {}

        def doubled():
            for name, tensor in policy.full_weights(frozen=True):
                if tensor.dim() == 1:
                    tensor = pushed[name] = 2 * tensor
                yield name, tensor

        self.load(doubled())
        held = lambda worker: {name: tensor for name, tensor in worker.get_model().named_parameters() if name in pushed}
        (arrived,) = self.llm.collective_rpc(held)
        if not arrived or not all(tensor.equal(pushed[name].to(tensor)) for name, tensor in arrived.items()):
            fail("vLLM does not take the policy's weights: it holds others after a push; try --engine transformers")
        self.proved = True

    def close(self):
        """Gives everything back, so that another model's engine can start in this process."""
        from vllm.distributed import cleanup_dist_env_and_memory
        from vllm.platforms import current_platform

        if self.sleeps:
            self.llm.wake_up()  # what sleeps cannot be freed
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        cleanup_dist_env_and_memory()
        type(current_platform)._global_graph_pool = None  # the next engine's CUDA graphs need a pool of their own


# ---------------------------------------------------------------------------------------------------------------------
# what all scripts share: flags


class Flags(argparse.ArgumentParser):
    """Flags in groups. A recipe, @FILE, stands for the flags in that file. What is wrong is said in one line."""

    def __init__(self, description):
        super().__init__(description=description, fromfile_prefix_chars="@", allow_abbrev=False)
        self.may_be_zero = set()

    def group(self, title):
        """→ add(name, default, help). The default tells the type. A type in its place means that there is no default; a
        list holds the choices, the first of which is the default. Numbers are above 0, or `zero` as well."""
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
    """With no flags, or --overwrite alone, a script reads its own recipe in tiny/. With any other the defaults hold."""
    flags = sys.argv[1:]
    if not {*flags} - {"--overwrite"}:
        flags.append(f"@{Path(__file__).parent / 'tiny' / recipe}.args")
    args = parser.parse_args(flags)
    if getattr(args, "temperature", 1) == 0 and getattr(args, "samples", 1) > 1:
        fail("--temperature 0 gives one greedy answer: it goes with --samples 1")
    load_reward(getattr(args, "reward", None))  # what is wrong with it is said before a model is loaded
    for name, value in vars(args).items():
        if type(value) in (int, float) and not (value > 0 or (value == 0 and f"--{name}" in parser.may_be_zero)):
            fail(f"--{name} {value} is too small")
    return args


def add_policy_flags(parser, models=None):
    """The flags that decide what an answer is: the model, how it is asked, how it samples."""
    add = parser.group("policy and sampling")
    add("--model", str, "a Hugging Face model folder or hub id; in Stage 1 it is π_ref", required=True, nargs=models)
    add("--revision", str, "branch, tag or commit on the hub")
    add("--prompt", str, "what is asked, with fields of the problem in braces: '{question} Answer in \\boxed{}.'; "
        "default: the authors', which asks for \\boxed{} (GSM8K: for ####)", metavar="TEMPLATE")
    add("--chat", False, "ask in the tokenizer's chat template; default: plain text, for base models")
    add("--chat_args", str, "more for that template, as in '{\"enable_thinking\": false}'", metavar="JSON",
        type=json_object)
    add("--stop", str, "more tokens that end an answer, for base models; they stay in its text", nargs="+",
        metavar="TOKEN")
    add("--reward", str, "your own: def reward(response: str, row: dict, finished: bool) -> float; row is the problem "
        "with all its fields", metavar="FILE.py:FUNCTION")
    add("--temperature", 1.0, "divides the logits, here and in the loss; 0: greedy", zero=True)
    add("--max_new_tokens", 1024, "an answer that is longer is cut off, and earns 0 if --reward is not your own")
    return add


def json_object(text):
    return {**json.loads(text)}


def add_machine_flags(parser, training=False):
    add = parser.group("memory and machine")
    add("--seed", 0, "every answer is a function of this, the problem's id and the copy")
    add("--dtype", ["auto", "float32", "bfloat16"] + ["float16"] * (not training),  # training would need loss scaling
        "the precision of all computing; auto: bfloat16 on a GPU that multiplies in it, else float32")
    add("--engine", ["auto", "vllm", "transformers"], "auto: vLLM where it can run"
        + ", but transformers for --lora in bf16 (vLLM would hold fp32 weights)" * training)
    add("--decode_rows", 256, "answers saved at once, and with transformers decoded at once; bounds the memory")
    add("--gpu_memory", 0.4 if training else 0.9, "vLLM: the share of each GPU's memory that it takes")
    if not training:
        add("--tensor_parallel", 1, "vLLM: GPUs that one engine is spread over")
    return add


def add_problem_flags(parser, split, files=None):
    add = parser.group("files and output")
    add("--data", str, "problems: .jsonl, .json or .parquet, a name (gsm8k, math, …), or a hub id", required=True,
        nargs=files)
    add("--split", split, "of a data set on the hub")
    add("--question_field", "question", "the field of a row that holds the question")
    add("--answer_field", "answer", "the field that holds the answer; with --reward a problem may lack 'answer'")
    add("--limit", int, "only the first so many problems")
    add("--overwrite", False, "throw away what an earlier run with other settings left there")
    return add


# ---------------------------------------------------------------------------------------------------------------------
# what all scripts share: processes


def run_script(main):
    """main(), with what a user can mend said in one line."""
    try:
        in_one_line(main)
    except SystemExit as end:
        if end.code and "vllm" in sys.modules:  # torn down now, an engine (asleep, say) would print errors behind ours
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code)
        raise


def in_one_line(main):
    try:
        main()
    except OSError as error:
        fail(f"{error.filename or 'writing'}: {error.strerror or error}")
    except (RuntimeError, ValueError) as error:
        if "out of memory" not in str(error) and "Free memory on device" not in str(error):  # torch's, and vLLM's
            raise
        fail("out of GPU memory: lower --decode_rows (transformers), --gpu_memory (vLLM) or --tokens_per_microbatch")
    except KeyboardInterrupt:
        tqdm.write("stopped; the same command goes on from here", file=sys.stderr)
        raise SystemExit(130) from None


def start_process(args, gpus_each=1, group=False):
    """This process's GPUs and cores; settles `--dtype auto`; with `group`, joins the process group. → the device

    Under torchrun each process sees only its own GPUs (so its first is cuda:0) and takes its share of the cores.
    """
    if "LOCAL_WORLD_SIZE" in os.environ:
        seen, local_rank = os.environ.get("CUDA_VISIBLE_DEVICES"), int(os.environ["LOCAL_RANK"])
        # before anything asks CUDA for its devices: it reads this once
        os.environ["CUDA_VISIBLE_DEVICES"] = own_gpus(seen, local_rank, gpus_each)
        on_gpus = seen != "" and torch.backends.cuda.is_built() and shutil.which("nvidia-smi")
        if on_gpus and torch.cuda.device_count() < gpus_each:
            fail(f"process {local_rank} of this node finds no GPU left: lower --nproc_per_node or --tensor_parallel")
        # torchrun would leave each process one core; a scheduler may have given this node not all of the machine's
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ["LOCAL_WORLD_SIZE"])))
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.init()  # or a device mesh would choose GPU number LOCAL_RANK of the one that is left
    elif platform.libc_ver()[0] == "glibc":  # keep freed memory: to get large blocks anew takes a tenth of an update
        for option, value in ((-4, 0), (-1, 2**31 - 1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(option, value)
    if args.dtype == "auto":  # older GPUs emulate bf16, slowly
        args.dtype = "bfloat16" if gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if group:
        warnings.filterwarnings("ignore", module="torch.distributed|torch.storage|torch.utils._pytree")
        backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
        if WORLD > 1:
            dist.init_process_group(backend)
        elif args.dtype != "float32" or gpu:  # one process: the same code keeps fp32 masters
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return torch.device("cuda" if gpu else "cpu")


def own_gpus(seen, local_rank, each):
    """CUDA_VISIBLE_DEVICES of one process of a node: its share of those seen (None: of all, however many there are)."""
    first, end = local_rank * each, (local_rank + 1) * each
    return ",".join(map(str, range(first, end)) if seen is None else seen.split(",")[first:end])


def barrier(place):
    """Every process waits here for all others. It needs no process group, so nothing on the GPU."""
    if WORLD > 1:
        if torchrun_store().add(place, 1) == WORLD:
            torchrun_store().set(f"{place}: all here", "yes")
        torchrun_store().wait([f"{place}: all here"], timedelta(days=30))


@cache
def torchrun_store():
    return next(dist.rendezvous("env://"))[0]


@contextmanager
def first_process_first(place):
    """The first process reports what is wrong, downloads and prepares. The others do the same after it."""
    if RANK > 0:
        barrier(place)
    yield
    if RANK == 0:
        barrier(place)


# ---------------------------------------------------------------------------------------------------------------------
# what all scripts share: models and prompts


def load_tokenizer(model, revision):
    """→ the tokenizer, the ids that end an answer, and how many tokens the model can see"""
    if model.startswith(("/", ".", "~")) and not Path(model).is_dir():
        fail(f"--model {model}: no such folder")
    transformers.utils.logging.disable_progress_bar()
    config = from_pretrained(transformers.AutoConfig, model, revision)
    tokenizer = from_pretrained(transformers.AutoTokenizer, model, revision)
    if not tokenizer("1 + 1").input_ids:  # where its files are missing, transformers makes an empty one
        fail(f"--model {model}: no tokenizer in it")
    eos = None
    with suppress(OSError):  # not every model has a generation config
        eos = transformers.GenerationConfig.from_pretrained(model, revision=revision).eos_token_id
    eos = config.eos_token_id if eos is None else eos
    eos = {*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id} - {None}
    if not eos:
        fail(f"--model {model}: neither its tokenizer nor its generation config names an EOS token")
    return tokenizer, sorted(eos), getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 30


def load_model(model, revision, dtype, device):
    return from_pretrained(transformers.AutoModelForCausalLM, model, revision, dtype=dtype).to(device)


def from_pretrained(kind, model, revision, **more):
    try:
        return kind.from_pretrained(model, revision=revision, **more)
    except Exception as error:  # a broken folder fails in as many ways as there are models and tokenizers
        fail(f"--model {model}: no {kind.__name__} loads from it ({error})")


def ask(problems, args):
    """Adds each problem's prompt and its tokens, encoded once and for all scripts in the same way. → the tokenizer, and
    the ids that end an answer"""
    tokenizer, eos, window = load_tokenizer(args.model, args.revision)
    for stop in args.stop or []:
        ids = tokenizer(stop, add_special_tokens=False).input_ids
        if len(ids) != 1:
            fail(f"--stop {stop!r}: it should be one token, and is {tokenizer.convert_ids_to_tokens(ids)}")
        eos = sorted({*eos, *ids})
    for problem in problems:
        if "vstar" not in problem:  # Stage 1's rows have their prompt, and a template may tell the date
            problem["prompt"] = make_prompt(tokenizer, problem, args.prompt, args.chat, args.chat_args)
        problem["tokens"] = encode(tokenizer, problem["prompt"], args.chat)
        if not 0 < len(problem["tokens"]) <= window - args.max_new_tokens:
            fail(f"problem {problem['id']}: a prompt of {len(problem['tokens'])} tokens and --max_new_tokens "
                 f"{args.max_new_tokens} do not fit the model's window of {window}")
    return tokenizer, eos


# ---------------------------------------------------------------------------------------------------------------------
# what all scripts share: files


@contextmanager
def written_whole(path, mine=True):
    """A file or folder that others read appears whole or not at all: it is written aside, synced and renamed. Where all
    processes write into one folder, only the first has it as `mine`."""
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
        fail(f"cannot write {path}: {getattr(error, 'strerror', None) or error}. Is the disk full? What was there is "
             "whole, and the same command goes on from it")


def write_whole(path, text):
    with written_whole(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_rows(path, rows):
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


def remove(path):
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def parts_of(out):
    return out.with_suffix(".parts")


def guard_rows(args, problems, free=(), **more):
    """guard_settings for what sample_all writes."""
    if args.out.suffix != ".jsonl":  # settings, parts and picture have its name, and other endings
        fail(f"--out {args.out}: the name of a file of rows should end in .jsonl")
    guard_settings(args.out.with_suffix(".config.json"), args, [args.out, parts_of(args.out)], ["samples", *free],
                   **fingerprint(args.model, args.reward), **{"data's problems": hash_of(problems, args.chat)}, **more)


def guard_settings(config, args, made, free=(), **more):
    """May this run go on with the files `made`? Only if one with the same settings made them; it kept these in
    `config`. Settings are all flags and `more`; those that are `free` may change, as they change no result."""
    free = {"out", "overwrite", "decode_rows", "gpu_memory", "tensor_parallel", *free}
    settings = {key: value for key, value in {**vars(args), **more}.items() if key not in free}
    settings = json.loads(json.dumps(settings, default=str))
    for name in ("model", "data"):
        source = vars(args).get(name)  # Stage 2 has no data
        if source and any(Path(source).resolve().is_relative_to(path.resolve()) for path in made):
            fail(f"--out {args.out} would take the place of --{name} {source}; give another")
    if args.overwrite:
        for path in (config, *made):
            remove(path)
    if config.exists():
        try:
            old = dict(json.loads(config.read_text(encoding="utf-8"))["settings"])
        except (ValueError, KeyError, TypeError):
            fail(f"{config}: not readable as the settings of a run; --overwrite starts afresh")
        changed = [f"{'--' * (key in vars(args))}{key} (was {old.get(key)}, now {settings.get(key)})"
                   for key in {**settings, **old} if old.get(key) != settings.get(key)]
        if changed:
            fail(f"{config}: the run was begun with other settings: {', '.join(changed)}; --overwrite throws it away")
    for path in made:
        if path.exists() and not config.exists():
            fail(f"{path} exists without its {config.name}; --overwrite throws it away")
    versions = {name: importlib.import_module(name).__version__ for name in ("torch", "transformers", args.engine)}
    versions["python"] = sys.version.split()[0]
    write_whole(config, json.dumps(dict(settings=settings, samples=args.samples, versions=versions), indent=1) + "\n")


def fingerprint(model, reward=None):
    """What stands behind the names, so that no answers are taken for those of a model or file that has changed since.
    Of a local model's weights and tokenizer it reads 4 KB in 256 places of each file (--revision tells the hub's)."""
    weights = hashlib.blake2b(digest_size=8)
    kinds = ("*.safetensors", "*.bin", "tokenizer*", "vocab*", "merges.txt", "chat_template*", "generation_config.json")
    for path in sorted(path for kind in kinds for path in Path(model).glob(kind) if path.is_file()):
        if not path.stat().st_size:
            fail(f"{path} is empty")
        data = np.memmap(path, np.uint8, "r")
        for place in range(0, len(data), max(4096, len(data) // 256)):
            weights.update(data[place : place + 4096])
    own = hashlib.blake2b(Path(reward.rpartition(":")[0]).read_bytes(), digest_size=8).hexdigest() if reward else None
    return {"model's files": weights.hexdigest(), "reward's file": own}


def hash_of(problems, chat):
    """Of all fields, for a reward may read any. But a chat template may tell the date: tomorrow's prompt is another."""
    asked = hashlib.blake2b(digest_size=8)
    for problem in problems:
        same = dict(problem, tokens=0) | (dict(prompt=0) if chat else {})
        asked.update(json.dumps(same, sort_keys=True).encode())
    return asked.hexdigest()


def read_rows(path, n=None):
    """The rows that sample_all wrote, with the first n answers of each."""
    rows = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                rows.append(row | {key: row[key][:n] for key in NO_ANSWERS.keys() & row})
                row["vstar"]
            except (ValueError, KeyError, TypeError):
                fail(f"{path}, line {number}: torn or not a row of answers; remove this line, and the command that "
                     "made the file samples its answers again")
    return rows


def batched(items, size):
    """Slices of so many. (itertools has it from Python 3.12 on.)"""
    return [items[first : first + size] for first in range(0, len(items), size)]


def picture(path, rows, xs, panels):
    """Columns of `rows` against each other, as a .png: a line of panels for each x, a panel for each list of ys."""
    from matplotlib.figure import Figure

    # what is text, such as evaluate.py's models, names its own line; so it needs room, and no legend
    texts = [len(row[y]) for row in rows for ys in panels for y in ys if isinstance(row.get(y), str)]
    width = 2 + 3 * len(panels) + 0.09 * max(texts, default=0)
    figure = Figure(figsize=(width, 3 * len(xs)), layout="constrained")
    axes = figure.subplots(len(xs), len(panels), squeeze=False)
    for axis, (x, ys) in zip(axes.flat, product(xs, panels)):
        for y in ys:
            if points := [(row[x], row[y]) for row in rows if y in row]:
                style = "o-" if len(points) < 50 else "-"
                axis.plot(*zip(*points), style, label=y, markersize=4, linewidth=1)
        axis.set_xlabel(x)
        if not texts:
            axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    with written_whole(path) as aside:
        figure.savefig(aside, dpi=130, format="png")


if __name__ == "__main__":
    run_script(main)
