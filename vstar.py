"""A*-PO, Stage 1: how well could one do on each prompt?   (arXiv 2505.20686)

For every prompt x the reference policy π_ref writes N answers, each is graded r ∈ {0, 1}, and

    V̂*(x) = β1 ln( 1/N Σ_i exp( r_i / β1 ) )

estimates the value of the *optimal* KL-regularised policy, offline and once. That is what PPO's critic and GRPO's groups
estimate over and over while they train; Stage 2 (train.py) then needs a single answer per prompt.

    python vstar.py                                            the embedded world, on any CPU
    python vstar.py --model Qwen/Qwen2.5-1.5B --data math      a real model, the paper's settings
    torchrun --nproc_per_node 8 vstar.py --model …             the same file from eight GPUs

Written: out/vstar.jsonl (a row a prompt), out/vstar.config.json (the settings), out/vstar.png. Killed at any moment, the
same command goes on where it stopped.
"""

import argparse
import hashlib
import importlib.util
import json
import math
import os
import shutil
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from tqdm import tqdm

from rewards import encode, fail, load_problems, make_prompt, reward, suffix_of

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets them
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))


# ---------------------------------------------------------------------------------------------------------------------
# Stage 1: settings, the estimate, the answers that it needs


def parse_args():
    parser = argparse.ArgumentParser(description="A*-PO, Stage 1: estimate V*(x) with N answers a prompt from π_ref.",
                                     formatter_class=Help, fromfile_prefix_chars="@")
    add_model_flags(parser)
    add = parser.add_argument
    add("--data", required=True, help="problems: .jsonl, .json or .parquet, a name (gsm8k, math, …), or a hub id")
    add("--split", default="train", help="of a data set on the hub")
    add("--question_field", default="question", help="the field of a row that holds the question")
    add("--answer_field", default="answer", help="the field that holds the answer")
    add("--limit", type=int, help="only the first so many problems")
    add("--n", "--samples", type=int, default=8, help="N, the answers per prompt (torchrun takes --n for one of its own)")
    add("--beta1", type=float, default=0.5, help="β1 of V̂*: inf is the mean reward, towards 0 the best of the N")
    add("--tensor_parallel", type=int, default=1, help="GPUs that one vLLM engine is spread over")
    add("--chunk", type=int, default=128, help="prompts that are sampled and saved at a time")
    add("--out", type=Path, default=Path("out/vstar.jsonl"), help="where the rows go; settings and picture beside it")
    add("--overwrite", action="store_true", help="throw away what an earlier run with other settings left there")
    add("--plan", nargs="?", const="", metavar="8xH100", help="only print what it would need there (default: here)")
    return read_flags(parser, "vstar", "n", "beta1", "chunk", "batch", "max_new_tokens", "limit")


def estimate_vstar(rewards, beta1):
    """V̂* = β1 ln( 1/N Σ exp(r_i/β1) ) over the last axis.   A*-PO, eq. for V̂*; (…, N) → (…)

    Shifted by the maximum, and with expm1/log1p because a large β1 asks for ln(1 + something tiny): exact from
    β1 → 0 (the best of the N) to β1 = inf (their mean).
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    if math.isinf(beta1):
        return rewards.mean(-1)
    best = rewards.max(-1, keepdims=True)
    return best[..., 0] + beta1 * np.log1p(np.expm1((rewards - best) / beta1).mean(-1))


def main():
    args = parse_args()
    if args.plan is not None:
        from plan import plan_stage1

        return plan_stage1(args, args.limit or 1000, 200)
    device = own_devices(args.tensor_parallel)
    if args.dtype == "auto":
        args.dtype = "bfloat16" if device.type == "cuda" else "float32"
    if RANK > 0:
        meet("files")  # the first process reports what is wrong, downloads and prepares; the others follow
    problems = load_problems(args.data, args.split, args.question_field, args.answer_field)[: args.limit]
    suffix = suffix_of(args.data) if args.suffix is None else args.suffix
    tokenizer, eos, window = load_tokenizer(args)
    ask(problems, tokenizer, window, suffix, args)
    engine, why = pick_engine(args.engine)
    # the settings that decide what the rows say, as opposed to those that decide how fast they come
    settings = dict(model=args.model, revision=args.revision, dtype=args.dtype, data=args.data, split=args.split,
                    question_field=args.question_field, answer_field=args.answer_field, limit=args.limit,
                    suffix=suffix, chat=args.chat, temperature=args.temperature, max_new_tokens=args.max_new_tokens,
                    n=args.n, beta1=args.beta1, seed=args.seed, engine=engine, chunk=args.chunk,
                    **contents(args.model, problems))
    if RANK == 0:
        check_settings(args.out, settings, args.overwrite)
        print(f"Stage 1: {len(problems)} problems of {args.data}, N = {args.n} answers each from {args.model}, "
              f"{engine} ({why}), {WORLD} × {device.type} {args.dtype}")
        meet("files")
    longest = max(len(problem["tokens"]) for problem in problems)
    rate = sample_all(args, args.out, problems, tokenizer,
                      lambda: make_sampler(args, engine, eos, longest + args.max_new_tokens, device))
    if RANK == 0:
        rows = read_rows(args.out)
        print(summary(rows, args.beta1, rate))
        histogram(rows, args.out.with_suffix(".png"))
        print(f"→ {args.out}, {args.out.with_suffix('.png')}")


def sample_all(args, out, problems, tokenizer, start_sampler):
    """N graded answers to each problem, by all processes together, as one file of rows sorted by id. What a killed run saved is
    kept. Returns the tokens per second of all processes, None where nothing was left to do."""
    parts, done = out.with_suffix(".parts"), out.exists()
    # longest first: what does not fit into memory fails at once, and a chunk's prompts are of one length
    problems = sorted(problems, key=lambda problem: (-len(problem["tokens"]), problem["id"]))
    chunks = [problems[start : start + args.chunk] for start in range(0, len(problems), args.chunk)]
    paths = [parts / f"{index:06d}.jsonl" for index in range(len(chunks))]
    mine = [] if done else list(zip(chunks, paths))[RANK::WORLD]
    rate = None
    if not all(path.exists() for _, path in mine):
        sampler = start_sampler()
        rate = WORLD * sample_chunks(args, sampler, tokenizer, mine)
        sampler.close()
    meet(f"sampled {out}")
    if RANK == 0:
        if not done:
            lines = []
            for path in paths:
                try:
                    lines += [(json.loads(line)["id"], line) for line in path.read_text(encoding="utf-8").splitlines()]
                except (ValueError, KeyError):
                    fail(f"{path} is not readable; remove it, and the same command samples these answers again")
            write_whole(out, "".join(line + "\n" for _, line in sorted(lines)))
        shutil.rmtree(parts)
    meet(f"merged {out}")
    return rate


def sample_chunks(args, sampler, tokenizer, mine):
    """Sample, grade and save chunk after chunk; a chunk is a file that appears whole. Returns tokens per second."""
    work = [(chunk, path) for chunk, path in mine if not path.exists()]
    total, left = (sum(len(chunk) for chunk, _ in some) for some in (mine, work))
    bar = tqdm(total=total, initial=total - left, unit="prompt", disable=RANK > 0,
               desc=f"sampling (1 of {WORLD} shares)" if WORLD > 1 else "sampling")
    start, tokens, right, answers = time.time(), 0, 0.0, 0
    asked = [([problem["tokens"] for problem in chunk], [prompt_seed(args.seed, problem["id"]) for problem in chunk])
             for chunk, _ in work]
    for number, completions in sampler.stream(asked, args.n):
        (chunk, path), lines = work[number], []
        for problem, copies in zip(chunk, completions):
            responses = [tokenizer.decode(copy.tokens, skip_special_tokens=True) for copy in copies]
            rewards = [reward(text, problem["answer"], copy.finished) for text, copy in zip(responses, copies)]
            row = {
                "id": problem["id"], "prompt": problem["prompt"], "answer": problem["answer"], "rewards": rewards,
                "vstar": float(estimate_vstar(rewards, args.beta1)), "lengths": [len(copy.tokens) for copy in copies],
                "finished": [copy.finished for copy in copies], "responses": responses,
            }
            if getattr(args, "keep_tokens", False):  # decoding and encoding again would not give the same
                row["tokens"] = [copy.tokens for copy in copies]
            lines.append(json.dumps(row))
            tokens += sum(len(copy.tokens) for copy in copies)
            right, answers = right + sum(rewards), answers + args.n
        write_whole(path, "\n".join(lines) + "\n")
        bar.set_postfix_str(f"accuracy {right / answers:.3f}, {tokens / (time.time() - start):,.0f} tokens/s", refresh=False)
        bar.update(len(chunk))
    bar.close()
    return tokens / (time.time() - start)


def vstar_error(rewards, beta1, n, draws=200, seed=0):
    """The standard error of V̂* from n answers a prompt, as a root mean square over prompts; rewards (prompts, N).

    A bootstrap: draw n of a prompt's N rewards with replacement, again and again, and see how V̂* scatters. The N seen
    scatter less than the truth by (N-1)/N, which is put back. Good to a tenth for β1 ≥ 0.5 and N ≥ 8; for a smaller β1
    it says too little, because a rare right answer that was never seen cannot be drawn.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    prompts, seen = rewards.shape
    if seen < 2:
        return math.nan  # one answer says nothing of its own scatter
    rng = np.random.default_rng(seed)
    total = np.zeros(prompts)
    squares = np.zeros(prompts)
    for _ in range(draws):
        drawn = np.take_along_axis(rewards, rng.integers(seen, size=(prompts, n)), axis=1)
        vstar = estimate_vstar(drawn, beta1)
        total += vstar
        squares += vstar**2
    variance = (squares - total**2 / draws) / (draws - 1) * seen / (seen - 1)
    return math.sqrt(max(variance.mean(), 0.0))


def pass_at_k(rewards, k):
    """The chance that at least one of k answers is right, unbiased from N ≥ k (Chen et al. 2021, eq. 1); (…, N) → (…)

    1 - C(wrong, k) / C(N, k), as a product: the chance that k answers drawn without replacement are all wrong.
    """
    rewards = np.asarray(rewards) > 0
    n, wrong = rewards.shape[-1], (~rewards).sum(-1)
    return 1 - np.prod([np.clip(wrong - i, 0, None) / (n - i) for i in range(k)], axis=0)


def mean_and_interval(values):
    """The mean and half its 95 % interval; the values are independent prompts' (not answers: those share a prompt)."""
    values = np.asarray(values, dtype=np.float64)
    return values.mean(), 1.96 * values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def summary(rows, beta1, tokens_per_second=None):
    rewards = np.array([row["rewards"] for row in rows])  # (prompts, N)
    n = rewards.shape[1]
    accuracy, half = mean_and_interval(rewards.mean(1))
    right = rewards.sum(1)
    finished = np.mean([row["finished"] for row in rows])
    none, every = np.mean(right == 0), np.mean(right == n)
    length = np.mean([row["lengths"] for row in rows])
    error = {k: vstar_error(rewards, beta1, k) for k in (max(1, n // 2), n, 2 * n)}
    lines = [
        f"prompts {len(rows)}, N {n}, β1 {beta1:g}",
        f"accuracy          {accuracy:.3f} ± {half:.3f} (95 %)",
        "pass@k            " + "  ".join(f"{k}: {pass_at_k(rewards, k).mean():.3f}" for k in range(1, n + 1)),
        f"0/{n} right         {none:.1%} of the prompts      {n}/{n} right  {every:.1%}",
        f"finished          {finished:.1%} of the answers",
        f"mean length       {length:.1f} tokens" + (f"      {tokens_per_second:,.0f} tokens/s" if tokens_per_second else ""),
        f"mean V̂*           {np.mean([row['vstar'] for row in rows]):.3f}",
        "standard error    " + ", ".join(f"{e:.3f} at N = {k}" for k, e in error.items()) + "  (of V̂*, bootstrap)",
    ]
    if none > 0.9:
        lines.append(f"warning: {none:.0%} of the prompts have no right answer, so there is little to learn from. Look at some "
                     "responses: does the answer stand where the grader looks (--suffix, --chat)? If so the model is too "
                     "weak for these problems: take easier ones, a stronger model or a larger N.")
    if finished < 0.9:
        lines.append(f"warning: {1 - finished:.0%} of the answers were cut off and earn 0. Raise --max_new_tokens; if they "
                     "ramble on after the answer, the model does not know when to stop: try --chat or another --suffix.")
    if not error[n] < 0.25:
        lines.append(f"warning: N = {n} is too small for β1 = {beta1:g}: V̂* is off by {error[n]:.2f} where rewards are 0 or 1. "
                     "Raise --n or --beta1.")
    return "\n".join(lines)


def histogram(rows, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rewards = np.array([row["rewards"] for row in rows])
    n = rewards.shape[1]
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    counts = np.bincount((rewards > 0).sum(1), minlength=n + 1)
    axes.bar(range(n + 1), counts, color=["#b44"] + ["#48a"] * (n - 1) + ["#4a6"] * (n > 0))
    axes.set(xlabel=f"right answers of N = {n}", ylabel="prompts", xticks=range(0, n + 1, max(1, n // 8)),
             title=f"π_ref is right {rewards.mean():.1%} of the time")
    axes.spines[["top", "right"]].set_visible(False)
    aside = path.with_name(path.name + ".tmp")
    figure.savefig(aside, dpi=150, format="png")
    os.replace(aside, path)


# ---------------------------------------------------------------------------------------------------------------------
# the sampler: generate(prompts, n, seeds), load(named_tensors), sleep(), wake(), with two engines


class Completion(NamedTuple):
    tokens: list  # what was sampled, up to and including the EOS
    finished: bool  # did it end with EOS, or was it cut off?
    logps: list  # ln π of each token at the sampling temperature


def prompt_seed(seed, key):
    """The seed of one prompt's answers, from the run's seed and the prompt's id: the batch around it plays no part."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{key}".encode("utf-8", "replace"), digest_size=7).digest(), "big")


class TransformersSampler:
    """A decode loop over any transformers causal language model: no second copy of the weights, no second process.

    Row by row it draws from that row's own random numbers, so an answer does not depend on its neighbours. Twice as
    quick as `generate`, because rows that are finished leave the batch.
    """

    def __init__(self, model, eos, max_new_tokens, temperature, batch):
        self.model, self.max_new_tokens, self.temperature, self.batch = model, max_new_tokens, temperature, batch
        self.device = next(model.parameters()).device
        self.eos = torch.tensor(eos, device=self.device)

    def generate(self, prompts, n, seeds):
        """Token lists → for each prompt n Completions."""
        longest_first = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # alike lengths: little padding
        answers = [None] * len(prompts)
        step = max(1, self.batch // n)
        for start in range(0, len(prompts), step):
            some = longest_first[start : start + step]
            completions = self.decode([prompts[i] for i in some], n, [seeds[i] for i in some])
            for place, i in enumerate(some):
                answers[i] = completions[place * n : (place + 1) * n]
        return answers

    @torch.no_grad()  # not inference_mode: FSDP would keep buffers that autograd may not touch
    def decode(self, prompts, n, seeds):
        device, limit = self.device, self.max_new_tokens
        count, width = len(prompts) * n, max(map(len, prompts))
        # one uniform number per token that could be sampled, each row from a stream of its own
        uniforms = torch.from_numpy(np.stack([
            np.random.Generator(np.random.Philox(key=[seed, copy])).random(limit) for seed in seeds for copy in range(n)
        ])).to(device)  # (count, limit) fp64
        # left-padded, so that every prompt ends in the last column; the padding is masked and takes no position
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache = transformers.DynamicCache(config=self.model.config)
        logits = self.model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache,
                            use_cache=True, logits_to_keep=1).logits[:, -1]
        # the n answers of a prompt share its prefill
        if n > 1:
            cache.batch_repeat_interleave(n)
        logits, mask, positions = (t.repeat_interleave(n, 0) for t in (logits, mask, positions[:, -1:]))

        tokens = torch.zeros(count, limit, dtype=torch.long, device=device)
        logps = torch.zeros(count, limit, device=device)
        lengths = torch.full((count,), limit, device=device)  # until an EOS says otherwise
        finished = torch.zeros(count, dtype=torch.bool, device=device)
        rows = torch.arange(count, device=device)  # which answer each row of the batch is writing
        for t in range(limit):
            token, logps[rows, t] = draw(logits, uniforms[rows, t], self.temperature)
            tokens[rows, t] = token
            ends = torch.isin(token, self.eos) & ~finished[rows]
            lengths[rows[ends]] = t + 1
            finished[rows[ends]] = True
            writing = ~finished[rows]
            left = int(writing.sum())
            if left == 0 or t == limit - 1:
                break
            if left <= 0.75 * len(rows):  # finished rows leave in groups, because leaving copies the cache
                keep = writing.nonzero()[:, 0]
                cache.batch_select_indices(keep)
                rows, token, mask, positions = rows[keep], token[keep], mask[keep], positions[keep]
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            positions = positions + 1
            logits = self.model(input_ids=token[:, None], attention_mask=mask, position_ids=positions, past_key_values=cache,
                                use_cache=True, logits_to_keep=1).logits[:, -1]
        tokens, logps, lengths, finished = tokens.tolist(), logps.tolist(), lengths.tolist(), finished.tolist()
        return [Completion(tokens[i][: lengths[i]], finished[i], logps[i][: lengths[i]]) for i in range(count)]

    def stream(self, chunks, n):
        """[(prompts, seeds)] → (the chunk's number, its answers), as they are done. Finished rows leave, so no chunk has an idle
        tail; rows that take their place would all share the longest row's width, which was measured and is slower."""
        for number, (prompts, seeds) in enumerate(chunks):
            yield number, self.generate(prompts, n, seeds)

    def load(self, named_tensors): ...  # it samples from the model that is being trained

    def sleep(self): ...

    def wake(self): ...

    def close(self): ...


def draw(logits, uniform, temperature, block=128):
    """A token for each row and its ln π; logits (rows, vocabulary), uniform (rows,) fp64 in [0, 1).

    Inverse CDF: the first token at which the running sum of probabilities passes the row's number. It is found in two steps, the
    block of tokens and then the token in it, because running over 152k tokens in fp64 would cost more than the model.
    """
    padding = (0, -logits.shape[-1] % block)
    scores = torch.nn.functional.pad(logits, padding, value=-math.inf).float().div_(temperature or 1.0)  # a copy, changed in place
    weights = scores.sub_(scores.amax(-1, keepdim=True)).exp_().unflatten(-1, (-1, block))  # (rows, blocks, block) fp32
    of_block = weights.sum(-1).double()  # (rows, blocks)
    until = of_block.cumsum(-1)
    total = until[:, -1:]
    if temperature == 0:
        token = logits.argmax(-1, keepdim=True)
    else:
        wanted = uniform[:, None] * total
        which = torch.searchsorted(until, wanted, right=True)  # (rows, 1)
        inside = weights[torch.arange(len(weights), device=logits.device), which[:, 0]].double().cumsum(-1)  # (rows, block)
        # how far into the block, as a share of it: sums in fp32 and in fp64 differ in the last digits
        share = 1 - (until.gather(-1, which) - wanted) / of_block.gather(-1, which)
        token = which * block + torch.searchsorted(inside, share.clamp(min=0) * inside[:, -1:], right=True)
    return token[:, 0], (scores.gather(-1, token) / total).log().float()[:, 0]


class VLLMSampler:
    """vLLM in this process: paged attention and continuous batching, for real models on GPUs."""

    def __init__(self, model, revision, dtype, eos, max_new_tokens, temperature, seed, window, gpu_memory,
                 tensor_parallel=1, logps=False, sleep=False):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process, reproducible and reachable
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        import vllm

        gpu = torch.cuda.is_available()
        memory = dict(gpu_memory_utilization=gpu_memory) if gpu else dict(kv_cache_memory_bytes=1 << 30)
        self.llm = vllm.LLM(
            model, tokenizer=model, revision=revision, dtype=dtype, seed=seed, max_model_len=window,
            tensor_parallel_size=tensor_parallel, enforce_eager=not gpu, enable_sleep_mode=sleep, **memory,
            generation_config="vllm",  # no top-k or top-p of the model's own: a truncated sampler makes ln π/π_ref a lie
            logprobs_mode="processed_logprobs",  # after the temperature, as in the loss
            disable_log_stats=True,
        )
        self.sleeps = sleep
        self.sampling = dict(temperature=temperature, top_p=1.0, top_k=-1, max_tokens=max_new_tokens,
                             stop_token_ids=eos, detokenize=False, logprobs=0 if logps else None)

    def generate(self, prompts, n, seeds):
        return next(self.stream([(prompts, seeds)], n), (0, []))[1]

    def stream(self, chunks, n):
        """[(prompts, seeds)] → (the chunk's number, its answers), as they are done: all in one queue, so that the batch is full
        until the end."""
        import vllm

        engine, answers = self.llm.llm_engine, [[None] * len(prompts) for prompts, _ in chunks]
        left = [len(prompts) for prompts, _ in chunks]
        for number, (prompts, seeds) in enumerate(chunks):
            for place, (prompt, seed) in enumerate(zip(prompts, seeds)):
                engine.add_request(f"{number} {place}", {"prompt_token_ids": prompt}, vllm.SamplingParams(
                    n=n, seed=seed, output_kind=vllm.sampling_params.RequestOutputKind.FINAL_ONLY, **self.sampling))
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    number, place = map(int, output.request_id.split())
                    answers[number][place] = [self.completion(answer) for answer in output.outputs]
                    left[number] -= 1
                    if left[number] == 0:
                        yield number, answers[number]

    @staticmethod
    def completion(answer):
        tokens = list(answer.token_ids)
        logps = [step[token].logprob for token, step in zip(tokens, answer.logprobs or [])]
        return Completion(tokens, answer.finish_reason == "stop", logps)

    def load(self, named_tensors):
        # without an iterator reload_weights reads the *old* checkpoint from disk, without the reset old keys and values
        # answer for the new weights
        self.llm.collective_rpc("reload_weights", kwargs=dict(weights_iterator=iter(named_tensors)))
        self.llm.reset_prefix_cache()

    def sleep(self):
        if self.sleeps:
            self.llm.sleep(level=1)  # the weights wait in CPU memory, the cache is dropped

    def wake(self):
        if self.sleeps:
            self.llm.wake_up()

    def close(self):
        """Gives everything back, so that another model's engine can start in this process."""
        from vllm.distributed import cleanup_dist_env_and_memory
        from vllm.platforms import current_platform

        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        cleanup_dist_env_and_memory()
        type(current_platform)._global_graph_pool = None  # the next engine's CUDA graphs would be caught into this one's memory


def pick_engine(wanted):
    """The engine and why. vLLM's CUDA wheel also installs where there is no GPU, and cannot run there."""
    if wanted == "transformers":
        return wanted, "asked for"
    if getattr(importlib.util.find_spec("vllm"), "origin", None) is None:  # (a folder of that name has none)
        reason = "vLLM is not installed"
    else:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from vllm.platforms import current_platform

        if torch.cuda.is_available() or current_platform.is_cpu():
            return "vllm", "asked for" if wanted == "vllm" else "installed and can run here"
        reason = "vLLM is installed, but there is no GPU and this is not its CPU build"
    if wanted == "vllm":
        fail(f"--engine vllm: {reason}")
    return "transformers", reason


def make_sampler(args, engine, eos, window, device):
    if engine == "vllm":
        return VLLMSampler(args.model, args.revision, args.dtype, eos, args.max_new_tokens, args.temperature,
                           args.seed + RANK, window, args.gpu_memory, args.tensor_parallel)
    model = load_model(args, device, getattr(torch, args.dtype))
    return TransformersSampler(model, eos, args.max_new_tokens, args.temperature, args.batch)


# ---------------------------------------------------------------------------------------------------------------------
# what all scripts share: flags, prompts, models, files, several processes


class Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):  # a default of nothing is not worth a line
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


def add_model_flags(parser):
    """The flags that decide what an answer is: the model, how it is asked, how it samples. All scripts share them."""
    add = parser.add_argument
    add("--model", required=True, help="π_ref: a Hugging Face model folder or hub id")
    add("--revision", help="branch, tag or commit on the hub")
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto",
        help="the weights' precision while sampling; auto: bfloat16 on a GPU, float32 on a CPU")
    add("--suffix", help="appended to each question; default: the paper's, which asks for \\boxed{} (GSM8K: for ####)")
    add("--chat", action="store_true", help="ask in the tokenizer's chat template; default: plain text, for base models")
    add("--temperature", type=float, default=1.0, help="divides the logits, here and in the loss; 0 is greedy")
    add("--max_new_tokens", type=int, default=1024, help="an answer that is longer is cut off and earns 0")
    add("--seed", type=int, default=0, help="every answer is a function of this, the problem's id and the copy")
    add("--engine", choices=["auto", "vllm", "transformers"], default="auto", help="auto: vLLM where it can run")
    add("--batch", type=int, default=256, help="answers decoded at once by the transformers engine; bounds its memory")
    add("--gpu_memory", type=float, default=0.9, help="the share of each GPU's memory that vLLM takes")


def read_flags(parser, recipe, *positive):
    """With no arguments a script reads its own recipe in tiny/; given any, the defaults hold. The flags named must be positive."""
    args = parser.parse_args(sys.argv[1:] or [f"@{Path(__file__).parent / 'tiny' / recipe}.args"])
    for flag in positive:
        if getattr(args, flag) is not None and not getattr(args, flag) > 0:
            fail(f"--{flag} {getattr(args, flag)} is too small")
    if args.temperature is not None and not args.temperature >= 0:
        fail(f"--temperature {args.temperature} is too small")
    return args


def run_script(main):
    """main(), with what a user can mend said in one line."""
    try:
        main()
    except OSError as error:
        fail(f"{error.filename or 'writing'}: {error.strerror or error}")
    except (RuntimeError, ValueError) as error:
        if "out of memory" not in str(error) and "Free memory on device" not in str(error):  # torch's, and vLLM's
            raise
        fail("out of GPU memory: lower --batch (transformers), --gpu_memory (vLLM) or --tokens_per_microbatch (training)")
    except KeyboardInterrupt:
        tqdm.write("stopped; the same command goes on from here", file=sys.stderr)
        raise SystemExit(130) from None


def own_devices(gpus_each=1):
    """Under torchrun each process sees only its own GPUs (so its first is cuda:0) and takes its share of the cores."""
    if "LOCAL_WORLD_SIZE" in os.environ:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        # before anything asks CUDA for its devices: it reads this once
        os.environ["CUDA_VISIBLE_DEVICES"] = own_gpus(seen, LOCAL_RANK, gpus_each)
        if seen != "" and torch.backends.cuda.is_built() and shutil.which("nvidia-smi") and torch.cuda.device_count() < gpus_each:
            fail(f"process {LOCAL_RANK} of this node finds no GPU left: lower --nproc_per_node or --tensor_parallel")
        # torchrun would leave each process one core; a scheduler may have given this node not all of the machine's
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ["LOCAL_WORLD_SIZE"])))
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.init()  # or a device mesh would choose GPU number LOCAL_RANK of the one that is left
    return torch.device("cuda")


def own_gpus(seen, local_rank, each):
    """CUDA_VISIBLE_DEVICES of one process of a node: its share of those seen (None: of all, however many there are)."""
    names = map(str, range(local_rank * each, (local_rank + 1) * each)) if seen is None else (
        seen.split(",")[local_rank * each : (local_rank + 1) * each])
    return ",".join(names)


def meet(place, _store=[]):
    """Every process waits here for all others. The store is torchrun's own: no process group, so nothing on the GPU."""
    if WORLD == 1:
        return
    if not _store:
        _store.append(next(torch.distributed.rendezvous("env://"))[0])
    if _store[0].add(place, 1) == WORLD:
        _store[0].set(f"{place}: all here", "yes")
    _store[0].wait([f"{place}: all here"], timedelta(days=30))


def load_tokenizer(args):
    """The tokenizer, the ids that end an answer, and how many tokens the model can see."""
    if args.model.startswith(("/", ".", "~")) and not Path(args.model).is_dir():
        fail(f"--model {args.model}: no such folder")
    transformers.utils.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(args.model, revision=args.revision)
    except (OSError, ValueError) as error:
        fail(f"--model {args.model}: {error}")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.model, revision=args.revision)
    except Exception as error:  # a missing tokenizer fails in as many ways as there are tokenizers
        fail(f"--model {args.model}: no tokenizer that loads ({error})")
    if not tokenizer("1 + 1").input_ids:  # where its files are missing, transformers makes an empty one
        fail(f"--model {args.model}: no tokenizer in it")
    try:
        eos = transformers.GenerationConfig.from_pretrained(args.model, revision=args.revision).eos_token_id
    except OSError:
        eos = config.eos_token_id
    eos = {*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id} - {None}
    if not eos:
        fail(f"--model {args.model}: neither its tokenizer nor its generation config names an EOS token")
    return tokenizer, sorted(eos), getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 30


def load_model(args, device, dtype):
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(args.model, revision=args.revision, dtype=dtype)
    except (OSError, ValueError, SafetensorError) as error:
        fail(f"--model {args.model}: {error}")
    return model.to(device).eval()


def ask(problems, tokenizer, window, suffix, args):
    """Adds each problem's prompt and tokens."""
    for problem in problems:
        problem["prompt"] = make_prompt(tokenizer, problem["question"], suffix, args.chat)
        problem["tokens"] = encode(tokenizer, problem["prompt"], args.chat)
        if not 0 < len(problem["tokens"]) <= window - args.max_new_tokens:
            fail(f"problem {problem['id']}: a prompt of {len(problem['tokens'])} tokens and --max_new_tokens "
                 f"{args.max_new_tokens} do not fit the model's window of {window}")


def contents(model, problems=()):
    """What stands behind the names, so that no answers are taken for those of a model or a file that has changed since: of a local
    model's weights 4 KB in 256 places of each file (the hub's are told by --revision), and all problems."""
    weights, asked = hashlib.blake2b(digest_size=8), hashlib.blake2b(digest_size=8)
    for path in sorted(Path(model).glob("*.safetensors")):
        size = path.stat().st_size
        with open(path, "rb") as file:
            for place in range(0, size, max(4096, size // 256)):
                file.seek(place)
                weights.update(file.read(4096))
    for problem in problems:
        asked.update(json.dumps([problem["id"], problem["prompt"], problem["answer"]]).encode())
    return {"model's weights": weights.hexdigest(), "data's problems": asked.hexdigest()}


def check_settings(path, settings, overwrite):
    """May this run go on with the files at `path`? Only if they were made with the same settings."""
    config, parts = path.with_suffix(".config.json"), path.with_suffix(".parts")
    if overwrite:
        for old in (path, config):
            old.unlink(missing_ok=True)
        shutil.rmtree(parts, ignore_errors=True)
    if config.exists():
        try:
            old = json.loads(config.read_text(encoding="utf-8"))["settings"]
        except (ValueError, KeyError):
            fail(f"{config}: not readable as Stage 1's settings; --overwrite starts afresh")
        changed = [f"--{key} (was {old.get(key)}, now {now})" for key, now in settings.items() if old.get(key) != now]
        if changed:
            fail(f"{path} was begun with other settings: {', '.join(changed)}; --overwrite throws it away")
    elif path.exists():
        fail(f"{path} exists without its {config.name}; --overwrite throws it away")
    parts.mkdir(parents=True, exist_ok=True)
    versions = dict(python=sys.version.split()[0], torch=torch.__version__, transformers=transformers.__version__)
    if settings["engine"] == "vllm":
        import vllm

        versions["vllm"] = vllm.__version__
    if not config.exists():
        write_whole(config, json.dumps(dict(settings=settings, versions=versions), indent=1) + "\n")


def write_whole(path, text):
    """A file that others read appears whole or not at all."""
    aside = path.with_name(path.name + ".tmp")
    try:
        with open(aside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        aside.unlink(missing_ok=True)
        fail(f"cannot write {path}: {error.strerror}; what was there is whole, and the same command goes on from it")
    os.replace(aside, path)


def read_rows(path):
    """The rows that sample_all wrote."""
    rows = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                rows.append(json.loads(line))
                rows[-1]["vstar"]
            except (ValueError, KeyError, TypeError):
                fail(f"{path}, line {number}: torn or not a row of answers; --overwrite makes the file anew")
    return rows


if __name__ == "__main__":
    run_script(main)
