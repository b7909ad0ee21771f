"""A*-PO, Stage 2: one answer per prompt, one regression step.   (arXiv 2505.20686)

Stage 1 (vstar.py) left V̂*(x), the value of the optimal policy, for every prompt. Now, step after step: sample ONE answer y
to each prompt from the current policy π, grade it r ∈ {0, 1}, and go down the gradient of

    ( β2 ln π(y|x)/π_ref(y|x)  −  (r − V̂*(x)) )²

whose minimum is the optimal policy π* ∝ π_ref exp(r/β2). What the textbook has and this has not: a critic, groups of
answers, clipping, importance weights, an entropy bonus. On-policy the gradient is that of −E[r] + β2 KL(π‖π_ref), times
2 β2, for any V̂*; a good V̂* takes the noise out.

    python train.py                                                     the embedded world, on any CPU
    torchrun --nproc_per_node 8 train.py --vstar out/vstar.jsonl        a real model, the paper's settings
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 train.py --vstar …   on each node

Written into out/run/: metrics.jsonl (a row a step), curves.png, checkpoint/, and model/, which transformers and vLLM load as
it is. Killed at any moment, the same command goes on where it stopped.
"""

import argparse
import gc
import importlib.util
import json
import math
import os
import resource
import shutil
import signal
import time
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict, set_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from rewards import DATASETS, encode, fail, load_problems, reward
from vstar import (
    RANK,
    WORLD,
    Completion,
    Help,
    TransformersSampler,
    VLLMSampler,
    add_model_flags,
    ask,
    contents,
    estimate_vstar,
    load_model,
    load_tokenizer,
    mean_and_interval,
    meet,
    own_devices,
    pick_engine,
    prompt_seed,
    read_flags,
    read_rows,
    run_script,
    write_whole,
)

# ---------------------------------------------------------------------------------------------------------------------
# settings

FROM_STAGE1 = ("model", "revision", "suffix", "chat", "temperature", "max_new_tokens")  # V̂* holds for these alone
MAY_CHANGE = {"out", "steps", "epochs", "save_every", "eval_every", "show_every", "wandb", "tokens_per_microbatch", "batch",
              "gpu_memory", "checkpoint_activations", "offload_reference", "vstar", "overwrite", "plan"}  # between two starts
GROUP = dict(apo=1, ppo=1, rebel=2, grpo=8)  # answers a prompt


def parse_args():
    parser = argparse.ArgumentParser(description="A*-PO, Stage 2: train with one answer per prompt.",
                                     formatter_class=Help, fromfile_prefix_chars="@")
    add_model_flags(parser)
    parser.set_defaults(gpu_memory=0.4, **dict.fromkeys(FROM_STAGE1))
    for action in parser._actions:
        if action.dest in FROM_STAGE1:
            action.required, action.help = False, "taken from Stage 1; another value is refused"
        if action.dest == "dtype":  # no float16: it would need loss scaling
            action.choices, action.help = ["auto", "float32", "bfloat16"], (
                "the precision of all computation (the master weights are float32); auto: bfloat16 on a GPU, float32 on a CPU")
    add = parser.add_argument
    add("--vstar", type=Path, default=Path("out/vstar.jsonl"), help="what Stage 1 wrote; its settings lie beside it")
    add("--beta1", type=float, help="β1 of V̂*; default: Stage 1's; another is computed from the stored rewards")
    add("--n", "--samples", type=int, help="use only the first so many of Stage 1's rewards per prompt")
    add("--beta2", type=float, default=1e-3, help="β2: how strongly the policy is held at π_ref")
    add("--filter_unsolved", action="store_true", help="leave out prompts that π_ref never solved in Stage 1")
    add("--batch_size", type=int, default=256, help="prompts, and so answers, a step")
    add("--minibatches", type=int, default=1, help="optimizer steps a batch of answers is split into")
    add("--epochs", type=float, default=10, help="passes over the prompts")
    add("--steps", type=int, help="instead of --epochs")
    add("--lr", type=float, default=1e-6, help="AdamW's rate")
    add("--betas", type=float, nargs=2, default=[0.9, 0.999], help="AdamW's")
    add("--weight_decay", type=float, default=0.0, help="AdamW's")
    add("--warmup", type=int, default=0, help="steps over which the rate rises")
    add("--schedule", choices=["constant", "cosine"], default="constant", help="cosine: down to a tenth at the last step")
    add("--clip", type=float, default=1.0, help="bound on the gradient's global norm")
    add("--tokens_per_microbatch", type=int, default=16384, help="padded tokens per forward pass; bounds the memory")
    add("--checkpoint_activations", choices=["auto", "yes", "no"], default="auto", help="recompute blocks; auto: on a GPU")
    add("--offload_reference", action="store_true", help="π_ref waits in CPU memory between uses")
    add("--algo", choices=GROUP, default="apo", help="the objective; the others are what the paper sets A*-PO against")
    add("--eval_data", help="held-out problems; default: Stage 1's data set if it has a test split")
    add("--eval_split", default="test", help="of a data set on the hub")
    add("--eval_limit", type=int, default=512, help="only the first so many of them")
    add("--eval_every", type=int, default=20, help="steps between measurements of their accuracy")
    add("--save_every", type=int, default=50, help="steps between checkpoints; the last two are kept")
    add("--show_every", type=int, default=20, help="steps between printed answers; 0: none")
    add("--out", type=Path, default=Path("out/run"), help="the folder of this run")
    add("--overwrite", action="store_true", help="throw away what an earlier run left there")
    add("--wandb", metavar="PROJECT", help="also log to Weights & Biases")
    add("--plan", nargs="?", const="", metavar="8xH100", help="only print what it would need there (default: here)")
    add = parser.add_argument_group("only the baselines read these (β2 is the weight of their KL to π_ref too)").add_argument
    add("--group", type=int, help="GRPO: answers a prompt; default: 8, as in TRL")
    add("--dr_grpo", action="store_true", help="GRPO: neither divide by the answer's length nor by the rewards' deviation")
    add("--eta", type=float, default=1.0, help="REBEL: η, its release's")
    add("--passes", type=int, help="times that a batch of answers is gone over; default: 1 (verl), REBEL: 4 (its release)")
    add("--clip_ratio", type=float, default=0.2, help="PPO, GRPO: how far π/π_old may go from 1 (verl)")
    add("--critic_lr", type=float, default=1e-5, help="PPO: the critic's rate (verl)")
    add("--value_clip", type=float, default=0.5, help="PPO: how far a value may go from what it was (verl)")
    add("--gamma", type=float, default=1.0, help="PPO: γ, by which later rewards are discounted (verl)")
    add("--lam", type=float, default=1.0, help="PPO: λ of the advantage estimate; 1: rewards alone, 0: the critic alone (verl)")
    args = read_flags(parser, "train", "batch_size", "minibatches", "steps", "n", "tokens_per_microbatch", "batch", "save_every",
                      "eval_every", "eval_limit", "epochs", "beta1", "lr", "clip", "eta", "passes", "clip_ratio", "critic_lr",
                      "value_clip")
    if not args.beta2 >= 0 or (args.beta2 == 0 and args.algo == "apo"):
        fail(f"--beta2 {args.beta2} is too small")
    if args.group is not None and (args.algo != "grpo" or args.group < 2):
        fail(f"--group {args.group}: only GRPO compares a group of answers, of two or more")
    args.group, args.passes = args.group or GROUP[args.algo], args.passes or (4 if args.algo == "rebel" else 1)
    if args.batch_size < args.minibatches:
        fail(f"--minibatches {args.minibatches} is more than --batch_size {args.batch_size}")
    if args.wandb and importlib.util.find_spec("wandb") is None:
        fail("--wandb: it is not installed (pip install wandb)")
    return args


# ---------------------------------------------------------------------------------------------------------------------
# the mathematics: A*-PO's objective, then the three that --algo puts in its place. Only the first is needed to read on.


def apo_loss(logp, ref_logp, reward, vstar, beta2):
    """A*-PO: regress the scaled log-ratio onto the optimal advantage. All arguments and the result (sequences,) fp32."""
    advantage = reward - vstar  # A*(x, y), estimated once, offline
    return (beta2 * (logp - ref_logp) - advantage) ** 2  # A*-PO, eq. for ℓ_t


def rebel_loss(logp, old_logp, reward, eta):
    """REBEL: of two answers to a prompt, regress the difference of the log-ratios against the policy that wrote them onto the
    difference of the rewards. All (pairs, 2) → (pairs,)"""
    log_ratio = logp - old_logp
    return ((log_ratio[:, 0] - log_ratio[:, 1]) / eta - (reward[:, 0] - reward[:, 1])) ** 2  # arXiv 2404.16767, Algorithm 1


def clipped(logp, old_logp, advantage, clip_ratio):
    """PPO's surrogate as a loss per token: no gain from moving π/π_old further than clip_ratio. All alike in shape."""
    ratio = (logp - old_logp).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip_ratio, 1 + clip_ratio) * advantage)  # arXiv 1707.06347, eq. 7


def group_advantage(reward, divide=True):
    """GRPO: how much better than its group is an answer? (prompts, group) → alike; 0 in a group of equals."""
    advantage = reward - reward.mean(-1, keepdim=True)
    return advantage / (reward.std(-1, keepdim=True) + 1e-6) if divide else advantage  # arXiv 2402.03300, 4.1.2; verl's 1e-6


def grpo_loss(logp, old_logp, ref_logp, advantage, response, beta, clip_ratio, length=None):
    """GRPO: tokens (sequences, tokens), of which `response` counts; advantage (sequences,) → (sequences,)

    A mean over each answer's tokens; Dr. GRPO (arXiv 2503.20783) divides by the same `length` for all."""
    kl = (ref_logp - logp).exp() - (ref_logp - logp) - 1  # arXiv 2402.03300, eq. 4: an estimate that is never negative
    losses = clipped(logp, old_logp, advantage[:, None], clip_ratio) + beta * kl  # eq. 3
    return (losses * response).sum(-1) / (length or response.sum(-1))


def gae(reward, value, gamma, lam):
    """PPO: Σ_l (γλ)^l δ_{t+l} with δ_t = r_t + γ V_{t+1} − V_t; all (sequences, tokens), zero after the answer's end."""
    advantage, later = torch.zeros_like(value), torch.zeros_like(value[:, 0])
    following = torch.cat([value[:, 1:], later[:, None]], dim=1)
    for t in reversed(range(value.shape[1])):  # arXiv 1506.02438, eq. 16
        later = reward[:, t] + gamma * following[:, t] - value[:, t] + gamma * lam * later
        advantage[:, t] = later
    return advantage


def value_loss(value, old_value, returns, value_clip):
    """PPO: the critic's squared error per token, without gain from moving further than value_clip. All alike in shape."""
    near = old_value + (value - old_value).clamp(-value_clip, value_clip)
    return 0.5 * torch.maximum((value - returns) ** 2, (near - returns) ** 2)  # verl's and TRL's


def learning_rate(step, args):
    """The share of the peak rate that step 0, 1, … takes."""
    rate = min(1.0, (step + 1) / max(1, args.warmup))
    if args.schedule == "cosine":
        rate *= 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / args.steps))
    return rate


# ---------------------------------------------------------------------------------------------------------------------
# the policy's log-probabilities


class Policy(torch.nn.Module):
    """Any transformers causal language model that, told which tokens are a response, gives their log-probabilities.

    Without `response` it is the model itself, for sampling. The log-probabilities are computed in here because FSDP gathers
    the head's weights around this forward and nowhere else.
    """

    def __init__(self, model, checkpoint_activations=False):
        super().__init__()
        self.model, self.config, self.checkpointed = model, model.config, checkpoint_activations
        self.blocks = [m for m in model.modules() if type(m).__name__ in set(model._no_split_modules or [])]
        if checkpoint_activations:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
        model.eval()  # no dropout: π is a function of the weights

    def forward(self, response=None, temperature=1.0, **inputs):
        # transformers recomputes a block where its `training` is set, which while sampling would drop the cache
        for block in self.blocks:
            block.training = self.checkpointed and response is not None and torch.is_grad_enabled()
        if response is None:
            return self.model(**inputs)
        ids = inputs["input_ids"]  # (rows, width), prompt + response, padded on the right: causal attention needs no mask
        hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (rows, width, hidden)
        where = response[:, 1:]  # (rows, width - 1): position t predicts token t + 1
        states, targets = hidden[:, :-1][where], ids[:, 1:][where]  # (tokens, hidden), (tokens,): the head skips the rest
        chunk = self.chunk(ids.is_cuda)
        logps = [checkpoint(self.head, s, t, temperature, use_reentrant=False)
                 for s, t in zip(states.split(chunk), targets.split(chunk))]
        # back into place: (rows, width - 1) fp32, 0 where there is no response
        return torch.zeros(where.shape, device=ids.device).masked_scatter(where, torch.cat(logps))

    def chunk(self, gpu):
        """The tokens whose logits exist at one time, whatever the batch: 0.5 GB of them, 883 tokens of a vocabulary of 152k. On a
        CPU 32 MB, because larger blocks of memory are new to malloc each time, and that takes longer than the arithmetic."""
        return max(1, (1 << 27 if gpu else 1 << 23) // self.model.get_output_embeddings().weight.shape[0])

    def head(self, states, targets, temperature):
        """ln π(target | state) for a chunk of tokens, fp32; recomputed in the backward pass instead of kept."""
        logits = self.model.get_output_embeddings()(states).float().div_(temperature)  # as in sampling
        return logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)


class Critic(Policy):
    """PPO's: the policy's network, whose head gives one number, the reward still to come, before each token."""

    def __init__(self, model, checkpoint_activations=False):
        head = torch.nn.Linear(model.get_output_embeddings().weight.shape[1], 1)
        for parameter in head.parameters():
            torch.nn.init.zeros_(parameter)
        model.set_output_embeddings(head)
        super().__init__(model, checkpoint_activations)

    def head(self, states, targets, temperature):
        return self.model.get_output_embeddings()(states)[:, 0].float()


# ---------------------------------------------------------------------------------------------------------------------
# the rollout, the loop and its step


class Sample(NamedTuple):
    row: dict  # the prompt: a row of Stage 1 and its tokens
    answer: Completion
    text: str
    reward: float


def rollout(sampler, policy, tokenizer, rows, seeds, n=1):
    """One answer to each prompt from the current policy, graded (n for the baselines that compare answers)."""
    prompts = [row["tokens"] for row in rows]
    if isinstance(sampler, VLLMSampler):
        sampler.wake()
        # the state dict, unlike named_parameters, names tied weights twice; vLLM keeps a head of its own
        sampler.load((name.removeprefix("model."), whole(tensor)) for name, tensor in policy.state_dict().items())
        answers = sampler.generate(prompts, n, seeds)
        sampler.sleep()
    else:
        with gathered(policy):
            answers = sampler.generate(prompts, n, seeds)
    decoded = [(row, answer, tokenizer.decode(answer.tokens, skip_special_tokens=True))
               for row, copies in zip(rows, answers) for answer in copies]
    return [Sample(row, answer, text, reward(text, row["answer"], answer.finished)) for row, answer, text in decoded]


def prompts_of_step(rows, step, args):
    """This process's [(place, row)] of a step: pass after pass over all prompts, each in an order of its own. The place counts
    the answers since the run began; order and seeds are functions of it and --seed, so nothing needs to be remembered."""
    places = range(step * args.batch_size, (step + 1) * args.batch_size)
    orders = {epoch: np.random.default_rng([args.seed, epoch]).permutation(len(rows))
              for epoch in {place // len(rows) for place in places}}
    return [(place, rows[orders[place // len(rows)][place % len(rows)]]) for place in places[RANK::WORLD]]


def train(args, rows, held_out, tokenizer, policy, reference, critic, trained, optimizer, sampler, start, device):
    history = read_metrics(args, start)
    seconds = dict.fromkeys(("sampling", "reference", "update", "evaluation", "saving"), 0.0)
    timed = lambda phase: stopwatch(seconds, phase, device)
    stopping, told, mismatches = [], set(), []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: stopping.append(number))
    wandb = start_wandb(args)

    def evaluate():
        """The share of held-out problems answered rightly: each time the same problems and random numbers."""
        with timed("evaluation"):
            mine = held_out[RANK::WORLD]
            seeds = [prompt_seed(f"{args.seed}/held out", row["id"]) for row in mine]
            right = sum(s.reward for s in rollout(sampler, policy, tokenizer, mine, seeds))
            return total(right=right)["right"] / len(held_out)

    if start == 0 and held_out:
        log(dict(step=0, accuracy=evaluate()), history, seconds, args, wandb)
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, desc="Stage 2", disable=RANK > 0)
    for step in bar:  # so many steps have been taken
        mine, first = prompts_of_step(rows, step, args), None
        with timed("sampling"):
            seeds = [prompt_seed(f"{args.seed}/{place}", row["id"]) for place, row in mine]
            samples = rollout(sampler, policy, tokenizer, [row for _, row in mine], seeds, args.group)
        with timed("reference"):
            known = targets(policy, reference, critic, samples, args, device)
        with timed("update"):
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * learning_rate(step, args)
            for part in [*range(args.minibatches)] * args.passes:
                chosen = [i for i in range(len(samples))
                          if mine[i // args.group][0] % args.batch_size % args.minibatches == part]
                tokens = total(tokens=sum(len(samples[i].answer.tokens) for i in chosen))["tokens"]
                count = len(range(part, args.batch_size, args.minibatches)) * args.group  # sequences of all processes
                over = dict(ppo=tokens, rebel=count / 2).get(args.algo, count)  # the loss is a mean over tokens, pairs, sequences
                sums, norm = update(policy, optimizer, [samples[i] for i in chosen],
                                    {name: tensor[chosen] for name, tensor in known.items()}, over, args, device, critic)
                if first is None:  # until the first update of this batch, π is what sampled it
                    first = {key: value / count for key, value in total(**sums).items()}
                    first.update(loss=first["loss"] * count / over, tokens=tokens / count)
                    check_numbers(first, step, mismatches, args)

        done = step + 1
        means = total(reward=sum(s.reward for s in samples), vstar=sum(s.row["vstar"] for s in samples),
                      length=sum(len(s.answer.tokens) for s in samples), finished=sum(s.answer.finished for s in samples),
                      unsolved=sum(not any(s.row["rewards"][: args.n]) for s in samples))
        means = {key: value / args.batch_size / args.group for key, value in means.items()}
        metrics = dict(
            step=done, loss=first["loss"], **means, advantage=means["reward"] - means["vstar"],
            kl=first["log_ratio"], log_ratio_abs=first["log_ratio_abs"],
            entropy=-first["logp"] / first["tokens"],  # on-policy: the mean of -ln π of what was sampled
            mismatch=first["mismatch"] / first["tokens"], grad_norm=norm, lr=args.lr * learning_rate(step, args),
        )
        if held_out and (done % args.eval_every == 0 or done == args.steps):
            metrics["accuracy"] = evaluate()
        spent = seconds["sampling"] + seconds["reference"] + seconds["update"]
        metrics["tokens_per_second"] = round(means["length"] * args.batch_size * args.group / spent)
        metrics["memory_gb"] = round(torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda"
                                     else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)
        log(metrics, history, seconds, args, wandb)
        if RANK == 0:
            show(bar, metrics, history, samples, told, args)

        stop = total(stop=float(bool(stopping)))["stop"] > 0  # all processes stop after the same step
        if done % args.save_every == 0 or done == args.steps or stop:
            with timed("saving"):
                save_checkpoint(args, done, trained, optimizer)
                if RANK == 0:
                    curves(history, args.out / "curves.png")
        if stop and done < args.steps:
            bar.close()
            if RANK == 0:
                print(f"stopped and saved after step {done}; the same command goes on from here")
            return
    bar.close()
    save_model(args, policy, tokenizer)
    if RANK == 0:
        report(args, history, len(held_out))


@torch.no_grad()
def targets(policy, reference, critic, samples, args, device):
    """What the update takes as given: {name: (samples,) or, by token, (samples, tokens)}."""
    vector = lambda values: torch.tensor(values, dtype=torch.float32, device=device)
    known = dict(reward=vector([s.reward for s in samples]), vstar=vector([s.row["vstar"] for s in samples]),
                 ref_logp=by_token(reference, samples, args, device))
    if needs_old_logp(args):
        known["old_logp"] = by_token(policy, samples, args, device)
    if args.algo == "grpo":
        known["advantage"] = group_advantage(known["reward"].view(-1, args.group), not args.dr_grpo).flatten()
    if args.algo == "ppo":
        first = vector([len(s.row["tokens"]) - 1 for s in samples])[:, None]  # position t predicts token t + 1
        last = first + vector([len(s.answer.tokens) - 1 for s in samples])[:, None]
        place = torch.arange(known["ref_logp"].shape[1], device=device)
        answer = (first <= place) & (place <= last)
        reward = known["reward"][:, None] * (place == last) - args.beta2 * (known["old_logp"] - known["ref_logp"])
        known["value"] = by_token(critic, samples, args, device)
        advantage = gae(reward, known["value"], args.gamma, args.lam)
        known["returns"] = advantage + known["value"]
        # whitened over the tokens of all processes, as verl and TRL do
        sums = total(tokens=answer.sum(), advantage=advantage[answer].sum(), squares=(advantage[answer] ** 2).sum())
        mean = sums["advantage"] / sums["tokens"]
        known["advantage"] = (advantage - mean) / math.sqrt(sums["squares"] / sums["tokens"] - mean**2 + 1e-8)
    return known


def needs_old_logp(args):
    """PPO's reward holds it; the others need it where several updates follow, after the first of which π is no longer what wrote
    the answers."""
    return args.algo == "ppo" or (args.algo != "apo" and args.minibatches * args.passes > 1)


def objective(logp, response, known, args):
    """The algorithm's losses, one a sequence (REBEL: a pair); logp, response (sequences, tokens), `known` these rows of the
    targets."""
    old_logp, ref_logp = known.get("old_logp", logp.detach()), known["ref_logp"]
    if args.algo == "apo":
        return apo_loss(logp.sum(-1), ref_logp.sum(-1), known["reward"], known["vstar"], args.beta2)
    if args.algo == "rebel":
        reward = known["reward"] - args.beta2 * (old_logp - ref_logp).sum(-1)
        return rebel_loss(*(x.view(-1, 2) for x in (logp.sum(-1), old_logp.sum(-1), reward)), args.eta)
    if args.algo == "grpo":
        return grpo_loss(logp, old_logp, ref_logp, known["advantage"], response, args.beta2, args.clip_ratio,
                         args.max_new_tokens if args.dr_grpo else None)
    return (clipped(logp, old_logp, known["advantage"], args.clip_ratio) * response).sum(-1)


def update(policy, optimizer, samples, known, count, args, device, critic=None):
    """One optimizer step on the loss of all processes' samples, a mean over `count`. → sums over this process's samples."""
    sums = dict(loss=0.0, log_ratio=0.0, log_ratio_abs=0.0, logp=0.0, mismatch=0.0)
    bad = []
    for group, ids, response in microbatches(samples, args.tokens_per_microbatch, device, 2 if args.algo == "rebel" else 1):
        inputs = dict(input_ids=ids, response=response, temperature=args.temperature)
        logp = policy(**inputs)  # (rows, width - 1) fp32
        if not group:
            (0.0 * logp.sum()).backward()
            if critic:
                (0.0 * critic(**inputs).sum()).backward()
            continue
        response = response[:, 1:]
        rows = {name: tensor[group, ..., : logp.shape[1]] if tensor.dim() > 1 else tensor[group] for name, tensor in known.items()}
        losses = objective(logp, response, rows, args)
        # FSDP averages over processes; times WORLD over the global count makes that the mean of one big batch
        (losses.sum() * WORLD / count).backward()
        if critic:
            errors = value_loss(critic(**inputs), rows["value"], rows["returns"], args.value_clip)
            ((errors * response).sum() * WORLD / count).backward()
        logp = logp.detach()
        log_ratio = logp.sum(-1) - rows["ref_logp"].sum(-1)
        sampled = torch.tensor([x for i in group for x in samples[i].answer.logps], device=device)  # by the engine
        sums["loss"] += losses.sum().item()
        sums["log_ratio"] += log_ratio.sum().item()
        sums["log_ratio_abs"] += log_ratio.abs().sum().item()
        sums["logp"] += logp.sum().item()
        sums["mismatch"] += (logp[response] - sampled).abs().sum().item()
        bad += [samples[i].row["id"] for i, fine in zip(group[:: len(group) // len(losses)], losses.isfinite()) if not fine]
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), args.clip)
    norm = float(whole(norm))
    if critic:
        torch.nn.utils.clip_grad_norm_(critic.parameters(), args.clip)
    if total(bad=len(bad))["bad"] or not math.isfinite(norm):
        where = f"the loss of {', '.join(bad[:8])}" if bad else f"the gradient's norm ({norm})"
        if bad or RANK == 0:
            fail(f"{where} is not finite; the last checkpoint is whole. Lower --lr, or look at these prompts")
        raise SystemExit(2)
    optimizer.step()
    optimizer.zero_grad()
    return sums, norm


def check_numbers(means, step, mismatches, args):
    """What silently ruins runs: π is not π_ref at the start, or the engine samples with other weights than π's."""
    tolerance = 1e-3 if args.dtype == "float32" else 0.1  # nats per token; bf16 rounds
    off, mismatch = means["log_ratio_abs"] / means["tokens"], means["mismatch"] / means["tokens"]
    if step == 0 and off > tolerance:
        fail(f"at step 0 π and π_ref should agree, but their log-probabilities differ by {off:.3g} per token")
    if mismatch > max(tolerance, 10 * float(np.median(mismatches or [0]))):
        fail(f"the sampler's log-probabilities are off the trainer's by {mismatch:.3g} per token: does it still hold old weights?")
    mismatches.append(mismatch)


# ---------------------------------------------------------------------------------------------------------------------
# the start


def main():
    args = parse_args()
    if args.plan is not None:
        return show_plan(args)
    warnings.filterwarnings("ignore", module="torch.distributed|torch.storage|torch.utils._pytree")
    device = own_devices()
    if args.dtype == "auto":
        args.dtype = "bfloat16" if device.type == "cuda" else "float32"
    dtype = getattr(torch, args.dtype)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if WORLD > 1:
        dist.init_process_group(backend)
    elif dtype != torch.float32 or device.type == "cuda":  # a mesh of one: the same code keeps fp32 masters, computes in bf16
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if RANK > 0:
        meet("files")  # the first process reports what is wrong, downloads and prepares; the others follow
    rows, held_out, tokenizer, eos, stage1 = prepare(args)
    engine, why = pick_engine(args.engine)
    args.engine = engine
    settings = run_settings(args, stage1, sum(row["vstar"] for row in rows))
    settings = json.loads(json.dumps(settings, default=str))
    if RANK == 0:
        start = check_run(args, settings)
        print(f"Stage 2: {len(rows)} prompts of {stage1['data']}, {args.steps} steps of {args.batch_size} from {args.model}, "
              f"{engine} ({why}), {WORLD} × {device.type} {args.dtype}")
        if not held_out:
            print("no --eval_data: no held-out accuracy")
        meet("files")
    if WORLD > 1:
        box = [start if RANK == 0 else None]
        dist.broadcast_object_list(box)
        start = box[0]

    # the engine first, while the memory is free; then π with fp32 masters, then π_ref
    longest = max(len(row["tokens"]) for row in rows + held_out)
    sampler = None
    if engine == "vllm":
        sampler = VLLMSampler(args.model, args.revision, args.dtype, eos, args.max_new_tokens, args.temperature, args.seed + RANK,
                              longest + args.max_new_tokens, args.gpu_memory, logps=True, sleep=device.type == "cuda")
        sampler.sleep()
    recompute = args.checkpoint_activations == "yes" or (args.checkpoint_activations == "auto" and device.type == "cuda")
    policy = Policy(load_model(args, "cpu", "auto"), recompute)
    policy.checkpoint_dtype = policy.model.dtype  # what the finished model is saved in
    shard(policy, device, dtype, master=True)
    reference = Policy(load_model(args, "cpu", dtype)).requires_grad_(False)
    shard(reference, device, dtype, offload=args.offload_reference)
    groups, critic, trained = [dict(params=policy.parameters(), peak=args.lr)], None, policy
    if args.algo == "ppo":
        critic = shard(Critic(load_model(args, "cpu", "auto"), recompute), device, dtype, master=True)
        groups.append(dict(params=critic.parameters(), peak=args.critic_lr))
        trained = torch.nn.ModuleList([policy, critic])
    optimizer = torch.optim.AdamW(groups, betas=tuple(args.betas), weight_decay=args.weight_decay, fused=device.type == "cuda")
    if sampler is None:
        sampler = TransformersSampler(policy, eos, args.max_new_tokens, args.temperature, args.batch)
    check_head(policy, device, args)
    if start > 0:
        load_checkpoint(args, start, trained, optimizer)
        if RANK == 0:
            print(f"going on after step {start}")
    train(args, rows, held_out, tokenizer, policy, reference, critic, trained, optimizer, sampler, start, device)
    sampler.wake()  # what sleeps cannot be freed
    del sampler
    gc.collect()
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def prepare(args):
    """Stage 1's rows with V̂*, the tokenizer, and the held-out problems; refuses what does not fit together."""
    config = args.vstar.with_suffix(".config.json")
    for path in (args.vstar, config):
        if not path.exists():
            fail(f"{path}: no such file; run vstar.py first (or name its output with --vstar)")
    rows, stage1 = read_rows(args.vstar), json.loads(config.read_text(encoding="utf-8"))["settings"]
    changed = [f"--{key} {getattr(args, key)} (Stage 1: {stage1[key]})" for key in FROM_STAGE1
               if getattr(args, key) not in (None, stage1[key])]
    if changed:
        fail(f"{args.vstar} holds V̂* for other settings: {', '.join(changed)}")
    for key in FROM_STAGE1:
        setattr(args, key, stage1[key])
    if contents(args.model)["model's weights"] != stage1.get("model's weights"):
        fail(f"{args.model} has changed since Stage 1: {args.vstar} holds the V̂* of other weights; run vstar.py again")
    if args.temperature == 0:
        fail("--temperature 0: greedy answers have no log-probability to train on; run Stage 1 at temperature 1")
    args.beta1, args.n = args.beta1 or stage1["beta1"], args.n or stage1["n"]
    if args.n > stage1["n"]:
        fail(f"--n {args.n}: Stage 1 kept {stage1['n']} rewards per prompt")
    for row, vstar in zip(rows, estimate_vstar([row["rewards"][: args.n] for row in rows], args.beta1).tolist()):
        row["vstar"] = vstar
    if args.filter_unsolved:
        rows = [row for row in rows if any(row["rewards"][: args.n])]
        if not rows:
            fail("--filter_unsolved leaves no prompt: π_ref solved none of them")
    if args.steps is None:
        args.steps = math.ceil(args.epochs * len(rows) / args.batch_size)
    if args.eval_data is None and DATASETS.get(stage1["data"], [1] * 3)[2] is None:
        args.eval_data = stage1["data"]
    held_out = load_problems(args.eval_data, args.eval_split)[: args.eval_limit] if args.eval_data else []
    tokenizer, eos, window = load_tokenizer(args)
    ask(held_out, tokenizer, window, args.suffix, args)
    for row in rows:
        row["tokens"] = encode(tokenizer, row["prompt"], args.chat)
    return rows, held_out, tokenizer, eos, stage1


@torch.no_grad()
def check_head(policy, device, args):
    """Is 'the last hidden state through the head' this architecture's logits? (Some scale or cap them afterwards.)"""
    ids = torch.arange(1, 9, device=device)[None] % policy.config.get_text_config().vocab_size
    response = torch.ones_like(ids, dtype=torch.bool)
    ours = policy(input_ids=ids, response=response, temperature=args.temperature)
    logits = policy(input_ids=ids, use_cache=False).logits.float() / args.temperature
    theirs = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    if (ours - theirs).abs().mean() > 0.1:  # one alone may be off by the step from one bf16 number to the next
        fail(f"--model {args.model}: this architecture changes its logits after the head, which Policy.head does not know")


def show_plan(args):
    """What this run would need, from Stage 1's rows or, without them, from the config of --model."""
    from plan import plan_training

    prompt, answer = 200, None
    if args.model is None:
        rows, *_ = prepare(args)
        prompt = np.mean([len(row["tokens"]) for row in rows])
        answer = np.mean([row["lengths"] for row in rows])
    args.max_new_tokens = args.max_new_tokens or 1024
    plan_training(args, prompt, answer or args.max_new_tokens / 2)


# ---------------------------------------------------------------------------------------------------------------------
# the machine: shards, micro-batches, sums over processes


def shard(policy, device, dtype, master=False, offload=False):
    """Spread the weights over all processes (FSDP2): a group of its own for each block, one for what is left (tied
    embeddings stay together). The policy keeps fp32 masters, computes in `dtype` and sums gradients in fp32."""
    if not dist.is_initialized():
        return policy.to(device, torch.float32)
    mesh = dist.device_mesh.init_device_mesh(device.type, (WORLD,))
    options = dict(mesh=mesh)
    if master and dtype != torch.float32:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    if not master:  # no backward pass will come, until which FSDP would leave embeddings and head gathered
        options["reshard_after_forward"] = True
    if offload and device.type == "cuda":
        options["offload_policy"] = CPUOffloadPolicy()
    for module in (*policy.blocks, policy):
        # block by block, so that no GPU ever holds the whole model
        module.to("cpu" if "offload_policy" in options else device, torch.float32 if master else None)
        fully_shard(module, **options)
    return policy


@contextmanager
def gathered(policy):
    """All weights whole on every process, gathered once for a rollout and not once for every token."""
    groups = [module for module in policy.modules() if isinstance(module, FSDPModule)]
    for module in groups:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    yield
    for module in groups:
        module.set_reshard_after_forward(module is not policy, recurse=False)
        module.reshard()


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def total(**values):
    """Sums over all processes."""
    sums = torch.tensor(list(values.values()), dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(sums)
    return dict(zip(values, sums.tolist()))


def microbatches(samples, budget, device, together=1):
    """Rows of like length, together at most `budget` padded tokens: [(indices, ids, response)]. All processes get equally
    many (FSDP's collectives must pair up); the ones made up for that have no index and count for nothing. `together`
    neighbours (REBEL's pairs) are not parted."""
    length = [len(sample.row["tokens"]) + len(sample.answer.tokens) for sample in samples]
    longest = [max(length[i : i + together]) for i in range(0, len(samples), together)]
    groups, width = [], 0
    for unit in sorted(range(len(longest)), key=lambda unit: -longest[unit]):
        if not groups or (len(groups[-1]) + together) * width > budget:
            groups.append([])
            width = longest[unit]
        groups[-1] += range(unit * together, (unit + 1) * together)
    count = torch.tensor(len(groups))
    if dist.is_initialized():
        dist.all_reduce(count, dist.ReduceOp.MAX)
    batches = []
    for group in groups:
        width = max(length[i] for i in group)
        ids = torch.zeros(len(group), width, dtype=torch.long)
        response = torch.zeros(len(group), width, dtype=torch.bool)
        for row, i in enumerate(group):
            prompt, answer = samples[i].row["tokens"], samples[i].answer.tokens
            ids[row, : length[i]] = torch.tensor(prompt + answer)
            response[row, len(prompt) : length[i]] = True  # up to and including the first EOS, and nothing after it
        batches.append((group, ids.to(device), response.to(device)))
    made_up = ([], torch.zeros(1, 2, dtype=torch.long, device=device), torch.tensor([[False, True]], device=device))
    return batches + [made_up] * (int(count) - len(groups))


@torch.no_grad()
def by_token(model, samples, args, device):
    """What a model gives each token: (samples, longest - 1) fp32, 0 outside the answers. By the same code and the same
    micro-batches as the update."""
    widest = max((len(sample.row["tokens"]) + len(sample.answer.tokens) for sample in samples), default=2)
    values = torch.zeros(len(samples), widest - 1, device=device)
    for group, ids, response in microbatches(samples, args.tokens_per_microbatch, device):
        found = model(input_ids=ids, response=response, temperature=args.temperature)
        values[group, : ids.shape[1] - 1] = found[: len(group)]
    return values


# ---------------------------------------------------------------------------------------------------------------------
# files


def run_settings(args, stage1, vstar_hash):
    settings = {key: value for key, value in vars(args).items() if key not in MAY_CHANGE}
    if args.schedule == "cosine":
        settings["steps"] = args.steps  # the rate depends on it
    return {**settings, "stage1": stage1, "vstar_sum": vstar_hash}


def check_run(args, settings):
    """May this run go on with what lies in --out? Only if it was made with the same settings. → the last whole step."""
    config, folder = args.out / "config.json", args.out / "checkpoint"
    if args.overwrite:
        shutil.rmtree(args.out, ignore_errors=True)
    if config.exists():
        try:
            old = json.loads(config.read_text(encoding="utf-8"))
        except ValueError:
            fail(f"{config}: not readable as the settings of a run; --overwrite starts afresh")
        changed = [f"--{key} (was {old.get(key)}, now {now})" for key, now in settings.items() if old.get(key) != now]
        if changed:
            fail(f"{args.out} was begun with other settings: {', '.join(changed)}; --overwrite throws it away")
    folder.mkdir(parents=True, exist_ok=True)
    if not config.exists():
        write_whole(config, json.dumps(settings, indent=1) + "\n")
    for torn in folder.glob("*.tmp"):
        shutil.rmtree(torn)
    return max((int(path.name) for path in folder.iterdir()), default=0)


def save_checkpoint(args, step, trained, optimizer):
    """A folder with every process's shards. Written aside and renamed whole; the two newest stay."""
    folder = args.out / "checkpoint"
    aside = folder / f"{step:08d}.tmp"
    model, optim = get_state_dict(trained, optimizer)
    try:
        dcp.save(dict(model=model, optimizer=optim), checkpoint_id=aside)
    except (OSError, dcp.CheckpointException) as error:
        shutil.rmtree(aside, ignore_errors=True)
        first = next(iter(getattr(error, "failures", {0: (error,)}).values()))[0]
        fail(f"cannot write the checkpoint of step {step} to {aside} ({first}). Is the disk full? The one before it is whole")
    if RANK == 0:
        os.rename(aside, folder / f"{step:08d}")
        for old in sorted(folder.iterdir())[:-2]:
            shutil.rmtree(old)
    meet(f"saved {step}")


def load_checkpoint(args, step, trained, optimizer):
    model, optim = get_state_dict(trained, optimizer)
    try:
        dcp.load(dict(model=model, optimizer=optim), checkpoint_id=args.out / "checkpoint" / f"{step:08d}")
    except (OSError, ValueError, dcp.CheckpointException) as error:
        fail(f"{args.out}/checkpoint/{step:08d} cannot be read ({str(error).strip().splitlines()[0]}); remove it to go on "
             "from the one before")
    set_state_dict(trained, optimizer, model_state_dict=model, optim_state_dict=optim)


def save_model(args, policy, tokenizer):
    """The finished model as a Hugging Face folder, in π_ref's own dtype."""
    whole = get_model_state_dict(policy, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if RANK == 0:
        aside, final = args.out / "model.tmp", args.out / "model"
        shutil.rmtree(aside, ignore_errors=True)
        dtype = policy.checkpoint_dtype
        weights = {name.removeprefix("model."): tensor.to(dtype) for name, tensor in whole.items()}
        policy.model.config.dtype = dtype
        try:
            policy.model.save_pretrained(aside, state_dict=weights)
            tokenizer.save_pretrained(aside)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(aside, ignore_errors=True)
            fail(f"cannot write the model to {final} ({error}); the checkpoint is whole, and the same command tries again")
        shutil.rmtree(final, ignore_errors=True)
        os.rename(aside, final)
    meet("model saved")


def read_metrics(args, start):
    """The rows of metrics.jsonl up to the checkpoint; what was logged after it will be logged again."""
    if RANK > 0:
        return []
    path, history = args.out / "metrics.jsonl", []
    if start and path.exists():
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            try:
                history.append(json.loads(line))
            except ValueError:  # the torn last line of a killed run, or a broken disk
                tqdm.write(f"{path}, line {number}: not readable, left out")
    history = [row for row in history if row["step"] <= start]
    write_whole(path, "".join(json.dumps(row) + "\n" for row in history))
    return history


def log(row, history, seconds, args, wandb):
    if RANK > 0:
        return
    row["seconds"] = {phase: round(value, 3) for phase, value in seconds.items()}
    seconds.update(dict.fromkeys(seconds, 0.0))
    history.append(row)
    with open(args.out / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    if wandb:
        wandb.log(row, step=row["step"])


def start_wandb(args):
    if args.wandb and RANK == 0:
        import wandb

        return wandb.init(project=args.wandb, config=json.loads(json.dumps(vars(args), default=str)))


@contextmanager
def stopwatch(seconds, phase, device):
    began = time.perf_counter()
    yield
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds[phase] += time.perf_counter() - began


# ---------------------------------------------------------------------------------------------------------------------
# what a person sees


def diagnose(rows, args):
    """The known illnesses that the metrics so far show: {name: cause and remedy}."""
    rows = [row for row in rows if row["step"] > 0]
    found = {}
    if len(rows) < 10:
        return found
    first, last = rows[:10], rows[-10:]
    mean = lambda some, key: sum(row[key] for row in some) / len(some)
    best = max(mean(rows[i : i + 10], "reward") for i in range(len(rows) - 9))
    if mean(last, "unsolved") > 0.7:
        found["unsolved"] = (f"{mean(last, 'unsolved'):.0%} of the prompts have V̂* = 0: π_ref never solved them, so there is "
                             "little to learn from and the loss stays. A checker that misreads the answers (look at some), too "
                             "weak a reference or too hard problems; --filter_unsolved leaves them out.")
    if mean(first, "finished") < 0.2 and mean(last, "finished") < 0.2:
        found["no EOS"] = ("nearly no answer ends with EOS, so all earn 0. Does the prompt fit the model (--chat for chat "
                           "models)? Otherwise raise --max_new_tokens in both stages.")
    elif mean(last, "finished") < min(0.8, mean(first, "finished") - 0.15) and mean(last, "length") > mean(first, "length"):
        found["cut off"] = (f"answers grow until they are cut off: {mean(first, 'finished'):.0%} ended with EOS, now "
                            f"{mean(last, 'finished'):.0%}. Raise --max_new_tokens in both stages, or --beta2.")
    if mean(first, "reward") > 0.95:
        found["saturated"] = f"π_ref already earns {mean(first, 'reward'):.2f}: nothing is left to learn. Take harder problems."
    elif len(rows) >= 30 and mean(last, "log_ratio_abs") < 0.01:
        found["still"] = (f"the policy does not move: after {rows[-1]['step']} steps |ln π/π_ref| is "
                          f"{mean(last, 'log_ratio_abs'):.1g}. Raise --lr, or lower --beta2 if it is large.")
    # π* ∝ π_ref exp(r/β2) trades at most 1 of reward, so KL ≤ 1/β2; beyond it the policy is worse than π_ref
    if args.algo != "grpo" and mean(last, "kl") * args.beta2 > 1:
        found["runaway"] = (f"the KL to π_ref runs away: {mean(last, 'kl'):.1f}, and no reward is worth more than 1/β2 = "
                            f"{1 / args.beta2:g}. Lower --lr, or use more --warmup.")
    if best > 0.1 and mean(last, "reward") < 0.6 * best:
        found["collapse"] = (f"the reward fell from {best:.2f} to {mean(last, 'reward'):.2f}. Lower --lr, raise --beta2 or "
                             "--batch_size.")
    return found


def curves(rows, path):
    """Reward and accuracy, KL, loss, length: over steps above, over seconds below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 4, figsize=(14, 5.5), layout="constrained", sharey="col")
    seconds = np.cumsum([sum(row["seconds"].values()) for row in rows])
    for line, (x, label) in zip(axes, (([row["step"] for row in rows], "step"), (seconds, "seconds"))):
        for axis, keys in zip(line, (("reward", "accuracy"), ("kl",), ("loss",), ("length",))):
            for key, style in zip(keys, ("-", "o-")):
                points = [(a, row[key]) for a, row in zip(x, rows) if key in row]
                axis.plot(*zip(*points), style, label=key, markersize=3, linewidth=1)
            title = dict(reward="reward, held-out accuracy", kl="KL to π_ref (nats per answer)", length="length (tokens)")
            axis.set(title=title.get(keys[0], keys[0]) if label == "step" else None, xlabel=label)
            axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(frameon=False)
    aside = path.with_name(path.name + ".tmp")
    figure.savefig(aside, dpi=120, format="png")
    plt.close(figure)
    os.replace(aside, path)


def readable(text):
    return "".join(c if c.isprintable() or c == "\n" else "�" for c in text)  # a model's text may hold terminal codes


def show(bar, metrics, history, samples, told, args):
    """The bar's figures, now and then an answer, and each illness once."""
    step, accuracy = metrics["step"], next((row["accuracy"] for row in reversed(history) if "accuracy" in row), math.nan)
    bar.set_postfix_str(f"reward {metrics['reward']:.3f}, held-out {accuracy:.3f}, KL {metrics['kl']:.2f}, "
                        f"{metrics['tokens_per_second']:,} tokens/s", refresh=False)
    if args.show_every and (step == 1 or step % args.show_every == 0):
        row, answer, text, earned = samples[0]
        bar.write(f"── step {step}: {readable(row['prompt'])}\n{readable(text)}{'' if answer.finished else ' … (cut off)'}\n"
                  f"── {'right' if earned else 'wrong'}, the answer is {row['answer']}; V̂* {row['vstar']:.2f}, "
                  f"advantage {earned - row['vstar']:+.2f}")
    for name, text in diagnose(history, args).items():
        if name not in told:
            told.add(name)
            bar.write(f"warning: {text}")


def report(args, history, count):
    """Accuracy before and after, and where the model lies."""
    measured = [row for row in history if "accuracy" in row]
    for label, row in (("before", measured[0]), ("after", measured[-1])) if measured else ():
        right = np.arange(count) < round(row["accuracy"] * count)
        print(f"{label:7s} held-out accuracy {row['accuracy']:.3f} ± {mean_and_interval(right)[1]:.3f} (95 %, {count} problems)")
    if history[1:]:
        phases = {phase: sum(row["seconds"][phase] for row in history) for phase in history[-1]["seconds"]}
        print("seconds " + ", ".join(f"{phase} {value:.0f}" for phase, value in phases.items()))
    print(f"→ {args.out}/curves.png, {args.out}/metrics.jsonl and the model:\n"
          f"  AutoModelForCausalLM.from_pretrained(\"{args.out}/model\")   or   vllm serve {args.out}/model")


if __name__ == "__main__":
    run_script(main)
