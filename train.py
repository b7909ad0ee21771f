"""A*-PO, Stage 2: one answer per prompt, one regression step.   (arXiv 2505.20686)

Stage 1 (vstar.py) left V̂*(x), the value of the optimal policy, for every prompt x. Now, step after step: sample ONE
answer y to each prompt from the current policy π, grade it with a reward r, and go down the gradient of

    ( β2 ln π(y|x)/π_ref(y|x)  −  (r − V̂*(x)) )²

What the textbook has and this has not: a critic, groups of answers, clipping, importance weights, an entropy bonus.
On-policy the gradient is that of −E[r] + β2 KL(π‖π_ref), times 2 β2, for any V̂*, also one of another β1. So it ends
at the policy that is optimal for β2, π* ∝ π_ref exp(r/β2), and a good V̂* takes the noise out.

    python train.py                                                     the embedded world, on any CPU
    torchrun --nproc_per_node 8 train.py --vstar out/vstar.jsonl        a real model (experiments/recipes/)
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 train.py …    on each node

It writes into out/run/: metrics.jsonl (a row a step), curves.png, checkpoint/, and model/, which transformers and vLLM
load as it is. When it was killed, the same command goes on where it stopped.
"""

import importlib.util
import json
import math
import os
import resource
import signal
import time
from collections import Counter
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from rewards import DATASETS, fail, load_problems, load_reward, readable, split_of
from vstar import (
    RANK,
    WORLD,
    Completion,
    Flags,
    add_machine_flags,
    ask,
    barrier,
    batched,
    estimate_vstar,
    fingerprint,
    first_process_first,
    grade,
    guard_settings,
    hash_of,
    load_model,
    make_sampler,
    mean_and_interval,
    pick_engine,
    picture,
    prompt_seed,
    read_flags,
    read_rows,
    remove,
    run_script,
    start_process,
    write_rows,
    written_whole,
)

# ---------------------------------------------------------------------------------------------------------------------
# the algorithm. Read this section, then Policy and rollout. The rest is machinery.


def apo_loss(logp, ref_logp, reward, vstar, beta2):
    """Regress the scaled log-ratio onto the optimal advantage. All arguments and the result: (sequences,) fp32.

    Not −advantage · logp, as in policy gradients, and no KL term beside it: the gradient of the square holds both.
    `logp` is ln π of the whole answer, a sum over its tokens. A mean would make β2 depend on the length.
    """
    advantage = reward - vstar  # A*(x, y): r is seen now, V̂* was estimated once, offline
    return (beta2 * (logp - ref_logp) - advantage) ** 2  # A*-PO, eq. for ℓ_t


class APO:
    """What makes the loop below A*-PO. experiments/baselines.py puts PPO, GRPO or REBEL in its place; sampler, grader,
    optimizer, restart and logging stay, which makes the comparison fair."""

    name, out = "apo", Path("out/run")
    completions = 1  # answers to each prompt of a batch
    passes = 1  # of the optimizer over a batch
    per_loss = 1  # completions that one loss compares: REBEL's takes pairs
    most_reward = 1.0  # the largest that a policy can gain; a KL above most_reward / β2 is ill, says `diagnose`

    def __init__(self, args):
        self.args = args

    @classmethod
    def add_flags(cls, add):
        add("--beta2", 1e-3, "β2: how strongly the policy is held at π_ref")

    def networks(self, make):
        """[(network, its learning rate)] of what is trained beside the policy: PPO's critic. make(Kind) loads the model
        as a Kind of Policy and shards it."""
        return []

    def given(self, run, samples):
        """What the loss takes as given: {name: (samples,), or (samples, tokens) for what has a value for each token}

        Column t of (samples, tokens) is about token t + 1 of prompt and completion. It is 0 where that is not the
        completion's.
        """
        vector = lambda values: torch.tensor(values, dtype=torch.float32, device=run.device)
        return dict(ref_logp=by_token(run.reference, samples, self.args, run.device),
                    reward=vector([sample.reward for sample in samples]),
                    vstar=vector([sample.row["vstar"] for sample in samples]))

    def count(self, samples):
        """The sum of the losses is divided by this: here sequences, for REBEL pairs, for PPO tokens."""
        return len(samples)

    def losses(self, logp, given, mask, inputs):
        """Yields (name, a loss for each row, or pair of them for REBEL) of a micro-batch; logp, mask: (rows, tokens),
        `given`: of these rows.

        `update` runs the backward pass after each, so the graphs of two networks never exist together. A second network
        reads `inputs`.
        """
        log_pi, log_pi_ref = logp.sum(-1), given["ref_logp"].sum(-1)  # (rows,): ln π of whole answers
        yield "loss", apo_loss(log_pi, log_pi_ref, given["reward"], given["vstar"], self.args.beta2)


def train(run, rows, held_out, start):
    """A step and its random numbers are functions of (--seed, step): a restart repeats what a kill cut off. → None, or
    the exit code of a run that a signal stopped"""
    args, objective, log = run.args, run.objective, Log(run, start)
    if start == 0 and held_out:
        log(dict(step=0, **held_out_metrics(run, held_out, log)))
    for step in log.bar:
        # 1. one completion of each prompt, by the policy as it is now, graded
        with log.phase("sampling"):
            samples = rollout(run, prompts_of_step(rows, step, args), objective.completions)

        # 2. what the regression takes as given: ln π_ref(y|x), r and V̂*
        with log.phase("reference"):
            given = objective.given(run, samples)

        # 3. down the gradient of the regression. Only a batch's first update is on-policy: its numbers are logged (with
        #    --minibatches, those of the first part of the batch)
        with log.phase("update"):
            set_rate(run.optimizer, step, args)
            numbers = [update(run, *part) for part in minibatches(samples, given, args, objective.passes)]
            check_numbers(numbers[0], step, log.first_mismatch, args)

        # 4. measure, log, save
        done, last = step + 1, step + 1 == args.steps
        metrics = {"step": done, **numbers[0], **batch_metrics(samples),
                   "clipped": sum(some["clipped"] for some in numbers) / len(numbers)}
        if held_out and (last or done % args.eval_every == 0):
            metrics |= held_out_metrics(run, held_out, log)
        log(metrics, samples, given)
        stop = log.asked_to_stop()  # a signal to stop ends the run after this step, on all processes alike
        if last or stop or done % args.save_every == 0:
            with log.phase("saving"):
                save_checkpoint(run, done)
                if RANK == 0:
                    curves(log.history, args.out / "curves.png")
        if stop and not last:
            return log.stopped(done)
    save_model(run)
    log.report(len(held_out))


def update(run, samples, given):
    """One optimizer step down the mean loss of all processes' samples. → what it saw of π before the step"""
    args, objective, optimizer = run.args, run.objective, run.optimizer
    count = sum_over_ranks(objective.count(samples))
    logp, sums, broken = torch.zeros_like(given["ref_logp"]), Counter(), []
    for chosen, ids, mask in microbatches(samples, args, run.device, objective.per_loss):
        inputs = dict(input_ids=ids, mask=mask, temperature=args.temperature)
        # (rows, width - 1) fp32. Where a process has no samples left, `chosen` is empty and its gradient 0
        part_logp = run.policy(**inputs)[: len(chosen)]
        columns = part_logp.shape[1]
        for name, losses in objective.losses(part_logp, take(given, chosen, columns), mask[: len(chosen), 1:], inputs):
            # FSDP averages over processes; times WORLD over the global count makes that the mean of one big batch
            (losses.sum() * WORLD / count).backward()
            sums[name] += losses.sum().item() / count
            bad = (~losses.isfinite()).nonzero()[:, 0] * objective.per_loss
            broken += [samples[chosen[i]].row["id"] for i in bad]
        logp[chosen, :columns] = part_logp.detach()
    norms = [full_tensor(clip_grad_norm_(group["params"], args.max_grad_norm)).item()
             for group in optimizer.param_groups]
    refuse_infinite(broken, norms)
    optimizer.step()
    optimizer.zero_grad()
    means = {name: sum_over_ranks(loss) for name, loss in sums.items()}
    own = dict(grad_norm=norms[0], clipped=norms[0] > args.max_grad_norm, lr=optimizer.param_groups[0]["lr"])
    return means | policy_metrics(samples, logp, given) | own


# ---------------------------------------------------------------------------------------------------------------------
# the policy's log-probabilities


class Policy(torch.nn.Module):
    """Any transformers causal language model that gives the log-probabilities of the tokens which `mask` marks.

    Without `mask` it is the model itself, for sampling. The log-probabilities are computed in here, because FSDP
    gathers the head's weights around this forward and nowhere else.
    """

    def __init__(self, model, recompute=False):
        super().__init__()
        self.model, self.config, self.recompute, self.saved_dtype = model, model.config, recompute, model.dtype
        self.blocks = [m for m in model.modules() if type(m).__name__ in set(model._no_split_modules or [])]
        if recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
        model.eval()  # no dropout: π is a function of the weights
        self.scale, self.adapted = 0.0, True

    def adapt(self, rank, dtype, seed):
        """LoRA (arXiv 2106.09685): the linear layers of the blocks become (W + 32/rank · B A) x. A and B learn, in
        fp32; all else is frozen, in `dtype`. B starts at 0, so π starts as π_ref to the bit. → self"""
        for parameter in self.requires_grad_(False).parameters():
            parameter.data = parameter.data.to(dtype)
        self.scale, dice = 32 / rank, torch.Generator().manual_seed(seed)  # all processes draw the same A
        layers = [m for block in self.blocks for m in block.modules() if isinstance(m, torch.nn.Linear)]
        if not layers:
            fail(f"--lora: the blocks of a {type(self.model).__name__} hold no torch.nn.Linear")
        for layer in layers:
            a = torch.nn.init.kaiming_uniform_(torch.empty(rank, layer.in_features), math.sqrt(5), generator=dice)
            layer.lora_A = torch.nn.Parameter(a)
            layer.lora_B = torch.nn.Parameter(torch.zeros(layer.out_features, rank))
            layer.register_forward_hook(self.add)
        return self

    def add(self, layer, inputs, output):
        if self.adapted:
            a, b = layer.lora_A.to(output.dtype), layer.lora_B.to(output.dtype)
            return output.add(inputs[0] @ a.T @ b.T, alpha=self.scale)

    def unadapted(self, **inputs):
        """π_ref: the same network with the additions switched off. Not under a gradient: a block that is computed again
        in the backward pass would have them."""
        self.adapted = False
        logp = self(**inputs)
        self.adapted = True
        return logp

    def forward(self, mask=None, temperature=1.0, **inputs):
        # a block's own flag makes transformers recompute it (without a cache: not while sampling); dropout stays off
        for block in self.blocks:
            block.training = self.recompute and mask is not None and torch.is_grad_enabled()
        if mask is None:
            return self.model(**inputs)
        ids = inputs["input_ids"]  # (rows, width): prompt, response, padding; so causal attention needs no mask
        hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (rows, width, hidden)
        where = mask[:, 1:]  # (rows, width - 1): position t predicts token t + 1
        states, targets = hidden[:, :-1][where], ids[:, 1:][where]  # (tokens, hidden), (tokens,): prompts never count
        chunk = self.chunk(ids.is_cuda)
        logps = [checkpoint(self.head, s, t, temperature, use_reentrant=False)
                 for s, t in zip(states.split(chunk), targets.split(chunk))]
        # back into place: (rows, width - 1) fp32, 0 where there is no response
        return torch.zeros(where.shape, device=ids.device).masked_scatter(where, torch.cat(logps))

    def head(self, states, targets, temperature):
        """ln π(target | state) of a chunk of tokens, fp32. The backward pass computes the logits again."""
        # the temperature divides here as it did in sampling, or π/π_ref is not the ratio of what was sampled from
        logits = self.model.get_output_embeddings()(states).float().div_(temperature)
        return logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)

    def chunk(self, gpu):
        """The tokens whose logits exist at one time, whatever the batch: 0.5 GB, or 883 tokens of a vocabulary of 152k.
        On a CPU 32 MB, which is enough to keep its cores busy."""
        return max(1, (1 << 27 if gpu else 1 << 23) // self.model.get_output_embeddings().weight.shape[0])

    @contextmanager
    def gathered(self):
        """All weights whole on every process. They are gathered once for a rollout, not once for every token: that
        would be slow, and hang where one process writes more tokens than another."""
        sharded = [module for module in self.modules() if isinstance(module, FSDPModule)]
        for module in sharded:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        yield
        for module in sharded:
            module.set_reshard_after_forward(module is not self, recurse=False)  # FSDP's default
            module.reshard()

    def full_weights(self, frozen=False):
        """(name, tensor). The state dict, unlike named_parameters, names tied weights twice, and vLLM wants both.
        Additions are merged. Layers without them come only with `frozen`: an engine has read those itself."""
        state = self.state_dict()
        for name, tensor in state.items():
            a, b = (state.get(name.rpartition(".")[0] + factor) for factor in (".lora_A", ".lora_B"))
            if ".lora_" in name or (self.scale and a is None and not frozen):
                continue
            tensor = full_tensor(tensor)
            if a is not None and name.endswith(".weight"):
                tensor = tensor + self.scale * full_tensor(b) @ full_tensor(a)  # fp32
            yield name.removeprefix("model."), tensor


# ---------------------------------------------------------------------------------------------------------------------
# the rollout


class Sample(NamedTuple):
    row: dict  # the prompt: a row of Stage 1 and its tokens
    completion: Completion
    response: str  # the completion as text
    reward: float
    place: int  # of its prompt, counted since the run began (or 'held out')

    @property
    def ids(self):  # laid out for training: prompt, completion, and then padding on the right
        return self.row["tokens"] + self.completion.tokens


def prompts_of_step(rows, step, args):
    """This process's [(place, row)] of a step: epoch after epoch, all prompts in an order of its own. The place
    counts the prompts since the run began. Order and seeds are functions of it and --seed: nothing needs to be kept."""
    places = range(step * args.batch_size, (step + 1) * args.batch_size)[RANK::WORLD]
    return [(place, rows[order_of(args.seed, place // len(rows), len(rows))[place % len(rows)]]) for place in places]


@lru_cache(2)
def order_of(seed, epoch, count):
    return np.random.default_rng([seed, epoch]).permutation(count)


def rollout(run, prompts, n=1):
    """n graded completions of each prompt, by the current policy; prompts: [(place, row)]"""
    seeds = [prompt_seed(f"{run.args.seed}/{place}", row["id"]) for place, row in prompts]
    with run.sampler.holding(run.policy):
        completions = run.sampler.generate([row["tokens"] for _, row in prompts], n, seeds)
    # the completion's tokens go into the loss as they are; text encoded again could give others
    pairs = [(place, row, completion) for (place, row), copies in zip(prompts, completions) for completion in copies]
    graded = grade(run.args, run.tokenizer, [pair for _, *pair in pairs])
    return [Sample(row, completion, *said, place) for (place, row, completion), said in zip(pairs, graded)]


def held_out_metrics(run, held_out, log):
    """The share of held-out problems answered rightly, and with --reward their mean reward: each time of the same
    problems, with the same random numbers."""
    with log.phase("evaluation"):
        rewards = [sample.reward for sample in rollout(run, [("held out", row) for row in held_out[RANK::WORLD]])]
        right, total = sum_over_ranks([sum(reward >= 1 for reward in rewards), sum(rewards)])
    shades = dict(held_out_reward=total / len(held_out)) if run.args.reward else {}
    return dict(accuracy=right / len(held_out), **shades)


# ---------------------------------------------------------------------------------------------------------------------
# settings and start

# V̂* holds for these alone
FROM_STAGE1 = ("model", "revision", "prompt", "chat", "chat_args", "stop", "reward", "temperature", "max_new_tokens")


class Run(NamedTuple):  # what the loop works with
    args: object  # the flags, and FROM_STAGE1
    objective: APO
    tokenizer: object
    policy: Policy
    reference: Policy  # with --lora policy.unadapted
    trained: torch.nn.ModuleList  # the policy, and what the objective trains beside it
    optimizer: torch.optim.Optimizer
    sampler: object
    device: torch.device


def make_parser(Objective):
    parser = Flags(f"Stage 2 by {Objective.__name__}. The model, its prompts, the temperature and the length of "
                   "answers are Stage 1's, because V̂* holds for these alone.")
    add = parser.group("algorithm")
    add("--vstar", Path("out/vstar.jsonl"), "what Stage 1 wrote; its settings lie beside it")
    add("--beta1", float, "β1 of V̂*; default: Stage 1's; another is computed from the stored rewards")
    add("--samples", int, "use only the first so many of Stage 1's rewards per prompt")
    add("--prior", 0, "where N is small: count so many answers of the average prompt with each prompt's own (2, say)")
    add("--filter", ["none", "unsolved", "both"], "leave out prompts that π_ref never solved in Stage 1 (unsolved), or "
        "never and always (both)")
    Objective.add_flags(add)
    add("--batch_size", 256, "prompts a step")
    add("--minibatches", 1, "optimizer steps that a batch is split into")
    add("--epochs", 10.0, "how often each prompt is asked")
    add("--steps", int, "instead of --epochs")
    add = parser.group("optimizer")
    add("--lora", int, "train additions of this rank to the linear layers, not the weights: no second model for π_ref")
    add("--lr", float, "AdamW's rate; default: 1e-6, with --lora 5e-6")
    add("--weight_decay", 0.0, "AdamW's")
    add("--warmup", 0, "steps over which the rate rises")
    add("--max_grad_norm", 1.0, "bound on the gradient's global norm. A*-PO's gradient carries a factor of 2 β2, so "
        "with β2 = 1e-3 the default hardly ever acts (metric: clipped)")
    add = add_machine_flags(parser, training=True)
    add("--tokens_per_microbatch", 16384, "padded tokens a forward pass; bounds the memory")
    add("--recompute", ["auto", "yes", "no"], "compute activations again in the backward pass, not keep them; auto: on "
        "a GPU")
    add("--offload_reference", False, "π_ref waits in CPU memory between uses (--lora has no second model)")
    add = parser.group("files and output")
    add("--eval_data", str, "held-out problems; default: the test split of a named data set (gsm8k, math, …)")
    add("--eval_split", "test", "of a data set on the hub")
    add("--eval_limit", 512, "only the first so many of them")
    add("--eval_every", 20, "steps between measurements of their accuracy")
    add("--save_every", 50, "steps between checkpoints; the last two are kept")
    add("--show_every", 20, "steps between printed answers; 0: none", zero=True)
    add("--out", Objective.out, "the folder of this run")
    add("--overwrite", False, "throw away what an earlier run left there")
    add("--wandb", str, "also log to Weights & Biases", metavar="PROJECT")
    return parser


def rate_of(args):
    return args.lr or (5e-6 if args.lora else 1e-6)


def parse_args(Objective):
    args = read_flags(make_parser(Objective), "train")
    args.lr = rate_of(args)
    if args.batch_size < args.minibatches:
        fail(f"--minibatches {args.minibatches} is more than --batch_size {args.batch_size}")
    if args.wandb and importlib.util.find_spec("wandb") is None:
        fail("--wandb: it is not installed (pip install wandb)")
    return args


def main(Objective=APO):
    with first_process_first("flags"):
        args = parse_args(Objective)
    objective = Objective(args)
    device = start_process(args, group=True)
    with first_process_first("prepared"):
        rows, stage1 = read_stage1(args)
        fields = stage1["question_field"], stage1["answer_field"], args.reward
        held_out = load_problems(args.eval_data, args.eval_split, *fields) if args.eval_data else []
        held_out = held_out[: args.eval_limit]
        tokenizer, eos = ask(rows + held_out, args)
        wanted = wanted_engine(args)
        args.engine, why = (wanted, "--lora in bf16") if wanted != args.engine else pick_engine(wanted)
        if RANK == 0:
            made = [args.out / name for name in ("checkpoint", "metrics.jsonl", "curves.png", "samples", "model")]
            free = ["steps", "epochs", "save_every", "eval_every", "show_every", "wandb", "vstar",
                    "tokens_per_microbatch", "recompute", "offload_reference"]
            guard_settings(args.out / "config.json", args, made, free, algorithm=objective.name, stage1=stage1,
                           vstar_sum=round(sum(row["vstar"] for row in rows), 6),  # another CPU may round otherwise
                           **{"eval_data's problems": hash_of(held_out, args.chat)})
            print(f"Stage 2: {len(rows)} prompts of {stage1['data']}, {args.steps} steps of {args.batch_size} from "
                  f"{args.model}, {args.engine} ({why}), {WORLD} × {device.type} {args.dtype}; accuracy on "
                  f"{len(held_out)} held-out problems (--eval_data)")
    start = int(sum_over_ranks(last_checkpoint(args.out) if RANK == 0 else 0))
    if start > args.steps:
        fail_together(f"{args.out} is at step {start} already, beyond --steps {args.steps}")
    run = make_run(args, objective, tokenizer, eos, rows + held_out, device)
    if start > 0:
        load_checkpoint(run, start)
        if RANK == 0:
            print(f"going on after step {start}")
    code = train(run, rows, held_out, start)
    barrier("trained")
    run.sampler.close()  # vLLM leaves the process group, and must do so before it is destroyed
    if dist.is_initialized():
        dist.destroy_process_group()
    if code:  # or what comes next in a shell script would look for a model
        raise SystemExit(code)


def wanted_engine(args):
    """--engine; but --lora in bf16 takes the decode loop unless vLLM is named, which then holds fp32 weights."""
    return "transformers" if args.engine == "auto" and args.lora and args.dtype == "bfloat16" else args.engine


def read_stage1(args):
    """Stage 1's rows with their V̂*, and its settings, of which `args` takes those that V̂* holds for."""
    config = args.vstar.with_suffix(".config.json")
    if not args.vstar.exists():
        fail(f"{args.vstar}: no such file; run vstar.py first (or name its output with --vstar)")
    try:
        told = json.loads(config.read_text(encoding="utf-8"))
        stage1 = told["settings"]
        vars(args).update({key: stage1[key] for key in FROM_STAGE1})
        args.beta1, args.samples = args.beta1 or stage1["beta1"], args.samples or told["samples"]
    except (OSError, ValueError, KeyError, TypeError):
        fail(f"{config}: not there, or not the settings that this vstar.py writes; run it again")
    rows = read_rows(args.vstar)
    if not rows:
        fail(f"{args.vstar}: no rows in it; run vstar.py again, with --overwrite")
    load_reward(args.reward)
    for name, now in fingerprint(args.model, args.reward).items():
        if now != stage1.get(name):
            fail(f"{name} changed since Stage 1; {args.vstar} holds other V̂*: run vstar.py again, with --overwrite")
    if args.temperature == 0:
        fail("--temperature 0: greedy answers have no log-probability to train on; run Stage 1 at temperature 1")
    kept = min(len(row["rewards"]) for row in rows)
    if args.samples > kept:
        fail(f"{args.vstar}: {kept} answers per prompt, not --samples {args.samples}; vstar.py can add the others")
    for row in rows:
        row["rewards"] = row["rewards"][: args.samples]
    for row, vstar in zip(rows, estimate_with_prior([row["rewards"] for row in rows], args.beta1, args.prior)):
        row["vstar"] = float(vstar)
    if args.filter != "none":
        rows = [row for row in rows if max(row["rewards"]) >= 1 and (args.filter != "both" or min(row["rewards"]) < 1)]
        if not rows:
            fail(f"--filter {args.filter} leaves no prompt (solved is a reward of at least 1)")
    args.steps = args.steps or math.ceil(args.epochs * len(rows) / args.batch_size)
    data, split = stage1["data"], args.eval_split
    has_split = DATASETS.get(data, [1] * 3)[2] is None
    if args.eval_data is None and has_split and split_of(data, split) != split_of(data, stage1["split"]):
        args.eval_data = data  # but not what is trained on
    return rows, stage1


def estimate_with_prior(rewards, beta1, prior):
    """V̂* of each prompt, for which so many answers of the average prompt are counted with its own; (prompts, N) →
    (prompts,). With 0 it is estimate_vstar."""
    average = estimate_vstar(np.ravel(rewards), beta1)  # exp(average/β1) is the mean of exp(r/β1) over all answers
    return estimate_vstar(np.pad(rewards, [(0, 0), (0, prior)], constant_values=average), beta1)


def make_run(args, objective, tokenizer, eos, prompts, device):
    """The engine first, while the memory is free; then what is trained, with fp32 masters, and π_ref."""
    dtype = getattr(torch, args.dtype)
    recompute = args.recompute == "yes" or (args.recompute == "auto" and device.type == "cuda")
    load = lambda dtype: load_model(args.model, args.revision, dtype, "cpu")
    make = lambda kind: shard(kind(load("auto"), recompute), device, dtype, master=True)
    sampler = make_sampler(args, eos, prompts, device, training=True)
    if args.lora:
        policy = Policy(load("auto"), recompute).adapt(args.lora, dtype, args.seed)
        # one process needs no FSDP, which would gather a second copy to sample from
        policy = shard(policy, device, dtype) if WORLD > 1 else policy.to(device)
        reference = policy.unadapted
    else:
        policy = make(Policy)
        reference = shard(Policy(load(args.dtype)).requires_grad_(False), device, dtype, offload=args.offload_reference)
    learners = [(policy, args.lr), *objective.networks(make)]
    optimizer = torch.optim.AdamW([dict(params=network.parameters(), peak=rate) for network, rate in learners],
                                  betas=(0.9, 0.999), weight_decay=args.weight_decay, fused=device.type == "cuda")
    if recompute and not policy.blocks and RANK == 0:
        print("nothing is recomputed: transformers does not say what this architecture's blocks are")
    barrier("loaded")  # slow disks and engines must not run into the ten minutes of NCCL's first collective
    check_head(policy, device, args.model)
    trained = torch.nn.ModuleList(network for network, _ in learners)
    return Run(args, objective, tokenizer, policy, reference, trained, optimizer, sampler, device)


# ---------------------------------------------------------------------------------------------------------------------
# the machine: shards, micro-batches, sums over processes


def shard(policy, device, dtype, master=False, offload=False):
    """Spread the weights over all processes (FSDP2): one group for each block, one for the rest (tied embeddings stay
    together). `master`: the weights are fp32, computed with in `dtype`; gradients add up in fp32. In pure bf16 AdamW at
    a rate of 1e-6 would move about 2 % of the weights: the others round back to where they were."""
    if not dist.is_initialized():
        return policy.to(device, torch.float32)
    options = dict(mesh=dist.device_mesh.init_device_mesh(device.type, (WORLD,)),
                   mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32),
                   # by default embeddings and head stay gathered until the backward pass; π_ref has none
                   reshard_after_forward=None if any(p.requires_grad for p in policy.parameters()) else True)
    if offload and device.type == "cuda":
        options["offload_policy"] = CPUOffloadPolicy()
    for module in (*policy.blocks, policy):
        # block by block, so that no GPU ever holds the whole model
        module.to("cpu" if "offload_policy" in options else device, torch.float32 if master else None)
        fully_shard(module, **options)
    return policy


def full_tensor(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def sum_over_ranks(values):
    """A number, or each of a list of numbers, summed over all processes."""
    sums = torch.tensor(values, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(sums)
    return sums.tolist()


def mean_over_ranks(count, **sums):
    """Sums over this process's `count` samples or tokens → means over those of all processes."""
    count, *values = sum_over_ranks([count, *sums.values()])
    return {name: value / count for name, value in zip(sums, values)}


def minibatches(samples, given, args, passes):
    """(samples, given) of each optimizer step of a batch; with --minibatches 1 all of it."""
    for number in [*range(args.minibatches)] * passes:
        # by its place in the batch, in blocks: so each of many processes has its share of each part
        part = lambda sample: sample.place % args.batch_size * args.minibatches // args.batch_size
        chosen = [i for i, sample in enumerate(samples) if part(sample) == number]
        yield [samples[i] for i in chosen], take(given, chosen)


def take(given, chosen, columns=None):
    """`given` of the chosen samples; so many columns of what has a value for each token."""
    return {name: tensor[chosen, :columns] if tensor.dim() > 1 else tensor[chosen] for name, tensor in given.items()}


def microbatches(samples, args, device, per_loss=1):
    """(the chosen samples' indices, ids, mask): samples of like length, of at most --tokens_per_microbatch padded
    tokens, but at least one. `per_loss` neighbours (REBEL's pairs) are not parted. All processes get equally many,
    because FSDP's collectives must pair up; one made up for that has chosen no sample and counts for nothing."""
    length = [len(sample.ids) for sample in samples]
    longest = lambda unit: max(length[i] for i in unit)
    groups = []
    for unit in sorted(batched(range(len(samples)), per_loss), key=longest, reverse=True):
        if groups and (len(groups[-1]) + per_loss) * longest(groups[-1][:per_loss]) <= args.tokens_per_microbatch:
            groups[-1] += unit
        else:
            groups.append([*unit])
    count = torch.tensor(len(groups))
    if dist.is_initialized():
        dist.all_reduce(count, dist.ReduceOp.MAX)
    for chosen in groups:
        ids = pad_sequence([torch.tensor(samples[i].ids) for i in chosen], batch_first=True)
        # True from the answer's first token to its EOS: to stop is an action. False in the padding, also if that is EOS
        mask = [torch.arange(length[i]) >= len(samples[i].row["tokens"]) for i in chosen]
        yield chosen, ids.to(device), pad_sequence(mask, batch_first=True).to(device)
    for _ in range(len(groups), count):
        yield [], torch.zeros(1, 2, dtype=torch.long, device=device), torch.tensor([[False, True]], device=device)


@torch.no_grad()
def by_token(model, samples, args, device):
    """What a model gives each token of the answers: (samples, longest - 1) fp32, 0 elsewhere. Code and micro-batches
    are as in the update (of a whole batch): ln π_ref from other kernels would be off by more than a small log-ratio."""
    values = torch.zeros(len(samples), max([len(sample.ids) for sample in samples] or [2]) - 1, device=device)
    for chosen, ids, mask in microbatches(samples, args, device):
        found = model(input_ids=ids, mask=mask, temperature=args.temperature)
        values[chosen, : found.shape[1]] = found[: len(chosen)]
    return values


def on_tokens(samples, numbers, like):
    """A number for each token of the answers → the place where `like`, which came by_token, has it."""
    placed = torch.zeros_like(like)
    for row, (sample, some) in enumerate(zip(samples, numbers)):
        first = len(sample.row["tokens"]) - 1  # position t predicts token t + 1
        placed[row, first : first + len(some)] = torch.tensor(some)
    return placed


def set_rate(optimizer, step, args):
    """The rate rises over --warmup steps and stays."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * min(1.0, (step + 1) / max(1, args.warmup))


# ---------------------------------------------------------------------------------------------------------------------
# what a step says of itself


def policy_metrics(samples, logp, given):
    """logp: (samples, tokens) of the policy before the update"""
    log_ratio = logp.sum(-1) - given["ref_logp"].sum(-1)  # (samples,)
    sampled = on_tokens(samples, [sample.completion.logps for sample in samples], logp)  # the engine's own
    apart = lambda other: (other - sampled).abs().sum()
    tokens = sum(len(sample.completion.tokens) for sample in samples)
    # on-policy the entropy is the mean of -ln π of what was sampled
    return mean_over_ranks(tokens, entropy=-logp.sum(), mismatch=apart(logp),
                            reference_mismatch=apart(given["ref_logp"])) | mean_over_ranks(
        len(samples), kl=log_ratio.sum(), log_ratio_abs=log_ratio.abs().sum(), length=tokens)


def batch_metrics(samples):
    return mean_over_ranks(len(samples), reward=sum(sample.reward for sample in samples),
                           vstar=sum(sample.row["vstar"] for sample in samples),
                           advantage=sum(sample.reward - sample.row["vstar"] for sample in samples),
                           length=sum(len(sample.completion.tokens) for sample in samples),
                           finished=sum(sample.completion.finished for sample in samples),
                           unsolved=sum(max(sample.row["rewards"]) < 1 for sample in samples))


def check_numbers(numbers, step, first_mismatch, args):
    """What silently ruins runs: π is not π_ref at the start, or the engine samples with other weights than π's.

    `first_mismatch` is that of step 0, where even an engine that never gets new weights has the right ones (at step 0
    itself: 0, so that the tolerance alone counts). A bound that followed later steps would follow the drift, too.
    """
    tolerance = 1e-3 if args.dtype == "float32" else 0.1  # nats per token; bf16 rounds
    off, mismatch, rounding = numbers["log_ratio_abs"] / numbers["length"], numbers["mismatch"], tolerance / 100
    if step == 0 and off > tolerance:
        fail_together(f"at step 0 π and π_ref should agree, but their log-probabilities differ by {off:.3g} per token")
    if args.engine == "vllm":
        tolerance = max(tolerance, 0.01)  # its kernels may multiply fp32 as TF32
    # an engine that kept its first weights agrees with π_ref; where all is rounding, the two mismatches are alike, or
    # far below the tolerance: a batch of few tokens may round by chance to one side
    kept_first = numbers["reference_mismatch"] < mismatch / 2 and mismatch > rounding
    if not mismatch <= max(tolerance, 10 * first_mismatch) or kept_first:
        fail_together(f"the sampler's log-probabilities are off the trainer's by {mismatch:.3g} per token, and off "
                      f"π_ref's by {numbers['reference_mismatch']:.3g}: does it still hold old weights?")


def fail_together(message):
    """For what all processes find at once: the first says it."""
    if RANK == 0:
        fail(message)
    raise SystemExit(2)


def refuse_infinite(broken, norms):
    """Ends all processes where a loss (`broken`: the ids of its prompts) or a gradient's norm is not finite."""
    finite = math.isfinite(sum(norms))
    if sum_over_ranks(len(broken)) or not finite:
        where = f"the loss of {', '.join(broken[:8])}" if broken else f"the gradient's norm ({norms[0]})"
        if broken or (RANK == 0 and not finite):
            fail(f"{where} is not finite; the last checkpoint is whole. Lower --lr, or look at these prompts")
        raise SystemExit(2)


@torch.no_grad()
def check_head(policy, device, model):
    """Is 'the last hidden state through the head' this architecture's logits? (Some scale or cap them afterwards.)"""
    ids = torch.arange(1, 9, device=device)[None] % policy.config.get_text_config().vocab_size
    ours = policy(input_ids=ids, mask=ids >= 0)
    logits = policy(input_ids=ids, use_cache=False).logits[:, :-1].float()
    theirs = torch.distributions.Categorical(logits=logits).log_prob(ids[:, 1:])
    if (ours - theirs).abs().mean() > 0.1:  # one alone may be off by the step from one bf16 number to the next
        fail_together(f"--model {model}: its logits are changed after the head, in a way unknown to Policy.head")
    with torch.enable_grad():  # as in the update
        once, again = (policy(input_ids=ids, mask=ids >= 0) for _ in range(2))
    if not once.equal(again):
        fail_together(f"--model {model}: two passes in training differ, so its blocks drop out; --recompute no")


# ---------------------------------------------------------------------------------------------------------------------
# files


def last_checkpoint(out):
    """The step of the last whole one, 0 without; what a killed run left half-written goes."""
    for torn in out.glob("checkpoint/*.tmp"):
        remove(torn)
    return max((int(folder.name) for folder in saved(out)), default=0)


def saved(out):
    return sorted(out.glob("checkpoint/" + "[0-9]" * 8))


def state_of(run):
    """What has learned, each tensor once: with --lora the additions alone."""
    model, optimizer = get_state_dict(run.trained, run.optimizer)
    learned = [name for name, parameter in run.trained.named_parameters() if parameter.requires_grad]
    return dict(model={name: model[name] for name in learned}, optimizer=optimizer)


def save_checkpoint(run, step):
    """A folder with every process's shards. The two newest stay."""
    out, state = run.args.out, state_of(run)
    with written_whole(out / f"checkpoint/{step:08d}", mine=RANK == 0) as aside:
        try:
            dcp.save(state, checkpoint_id=aside)
        except dcp.CheckpointException as error:
            raise OSError(str(next(iter(error.failures.values()))[0])) from error
    if RANK == 0:
        for old in saved(out)[:-2]:
            remove(old)
    barrier(f"saved {step}")


def load_checkpoint(run, step):
    folder, state = run.args.out / f"checkpoint/{step:08d}", state_of(run)
    try:
        dcp.load(state, checkpoint_id=folder)
    except dcp.CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]
        fail(f"{folder} cannot be read ({reason!r}); remove it to go on from the one before")
    set_state_dict(run.trained, run.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"],
                   options=StateDictOptions(strict=False))  # what is frozen is not there


def save_model(run):
    """The finished model as a Hugging Face folder, in the precision of π_ref's own, or wider if π computes in that."""
    policy, args = run.policy, run.args
    # a weight and its small addition, summed in bf16, would be the weight again
    dtype = torch.float32 if args.lora else torch.promote_types(policy.saved_dtype, getattr(torch, args.dtype))
    # all gather each tensor, the first process keeps it
    weights = {name: tensor.to("cpu", dtype) for name, tensor in policy.full_weights(frozen=True) if RANK == 0}
    if RANK == 0:
        with written_whole(args.out / "model") as aside:
            policy.model.save_pretrained(aside, state_dict=weights)
            policy.config.dtype = dtype  # save_pretrained has named the fp32 masters'
            policy.config.save_pretrained(aside)
            run.tokenizer.save_pretrained(aside)
    barrier("model saved")


def read_metrics(path, start):
    """The rows of metrics.jsonl up to the checkpoint; what was logged after it will be logged again."""
    history = []
    if start and path.exists():
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            try:
                history.append(json.loads(line))
            except ValueError:  # the torn last line of a killed run, or a broken disk
                tqdm.write(f"{path}, line {number}: not readable, left out")
    history = [row for row in history if row["step"] <= start]
    write_rows(path, history)
    return history


# ---------------------------------------------------------------------------------------------------------------------
# what a person sees


PHASES = ("sampling", "reference", "update", "evaluation", "saving")


class Log:
    """What the loop need not know: seconds, metrics.jsonl, the bar, answers that are shown, warnings, signals."""

    def __init__(self, run, start):
        args = self.args = run.args
        self.run, self.seconds, self.signals, self.told = run, Counter(), [], set()
        self.zero_one = True  # are all rewards seen 0 or 1? Some warnings hold for these alone
        self.history = read_metrics(args.out / "metrics.jsonl", start) if RANK == 0 else []
        # the engine's mismatch at the run's first step, also after a restart; the first process alone has the history
        self.first_mismatch = sum_over_ranks(next((row["mismatch"] for row in self.history if "mismatch" in row), 0.0))
        self.bar = tqdm(range(start, args.steps), "Stage 2", args.steps, initial=start, disable=RANK > 0)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.hear)
        self.wandb = importlib.import_module("wandb") if args.wandb and RANK == 0 else None
        if self.wandb:
            self.wandb.init(project=args.wandb, config=vars(args))

    @contextmanager
    def phase(self, name):
        began = time.perf_counter()
        yield
        if self.run.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[name] += time.perf_counter() - began

    def hear(self, number, _):
        if RANK == 0 and not self.signals:
            os.write(2, b"\nstopping after this step\n")  # print may be at work just now, and is not re-entrant
        self.signals.append(number)

    def asked_to_stop(self):
        return sum_over_ranks(len(self.signals)) > 0

    def __call__(self, row, samples=(), given=None):
        """A row of metrics.jsonl, and what a person sees of it."""
        self.first_mismatch = self.first_mismatch or row.get("mismatch", 0.0)
        if RANK > 0:
            return
        if samples:
            generated = row["length"] * self.args.batch_size * self.run.objective.completions
            row["tokens_per_second"] = round(generated / sum(self.seconds[phase] for phase in PHASES[:3]))
            row["memory_gb"] = round(peak_memory(self.run) / 2**30, 3)
        # a checkpoint is saved after its step's row, so its seconds stand in the next
        row["seconds"] = {phase: round(self.seconds[phase], 3) for phase in PHASES}
        self.seconds.clear()
        self.history.append(row)
        with open(self.args.out / "metrics.jsonl", "a", encoding="utf-8") as file:
            print(json.dumps(row), file=file)
        if self.wandb:
            self.wandb.log(row, step=row["step"])
        if samples:
            self.show(row, samples, given)

    def show(self, metrics, samples, given):
        """The bar's figures, now and then an answer (and all of this process in samples/), and each illness once."""
        step, own = metrics["step"], self.args.reward
        measured = evaluated(self.history) or [dict(accuracy=math.nan)]
        held_out = measured[-1].get("held_out_reward", measured[-1]["accuracy"])
        self.bar.set_postfix_str(f"reward {metrics['reward']:.3f}, held-out {held_out:.3f}, "
                                 f"KL {metrics['kl']:.2f}, {metrics['tokens_per_second']:,} tokens/s", refresh=False)
        if self.args.show_every and (step == 1 or step % self.args.show_every == 0):
            row, completion, response, reward, _ = samples[0]
            cut, verdict = "" if completion.finished else " … (cut off)", "right" if reward >= 1 else "wrong"
            verdict = f"reward {reward:g}" if own else f"{verdict}, the answer is {readable(row['answer'])}"
            self.bar.write(f"── step {step}: {readable(row['prompt'])}\n{readable(response)}{cut}\n"
                           f"── {verdict}; V̂* {row['vstar']:.2f}, advantage {reward - row['vstar']:+.2f}")
            ref_logp = given["ref_logp"].sum(-1).tolist()  # the log-ratio below is the engine's, good to `mismatch`
            write_rows(self.args.out / f"samples/{step:06d}.jsonl", [
                dict(id=s.row["id"], prompt=s.row["prompt"], response=s.response, reward=s.reward,
                     vstar=s.row["vstar"], log_ratio=sum(s.completion.logps) - ref)
                for s, ref in zip(samples, ref_logp)])
        self.zero_one &= all(r in (0, 1) for sample in samples for r in (sample.reward, *sample.row["rewards"]))
        most_reward = self.run.objective.most_reward if self.zero_one else None
        for name, text in diagnose(self.history, self.args, most_reward).items():
            if name not in self.told:
                self.told.add(name)
                self.bar.write(f"warning: {text}")

    def stopped(self, step):
        """→ the exit code, as of a process that a signal ended"""
        self.bar.close()
        if self.wandb:
            self.wandb.finish()  # run_script may end the process at once
        if RANK == 0:
            print(f"stopped and saved after step {step}; the same command goes on from here")
        return 128 + (self.signals or [signal.SIGTERM])[0]

    def report(self, problems):
        """Accuracy before and after, and where the model lies."""
        if RANK > 0:
            return
        out, measured = self.args.out, evaluated(self.history)
        for label, row in zip(("before", "after"), measured[:1] + measured[-1:]):
            share = row["accuracy"]
            half = mean_and_interval(np.arange(problems) < round(share * problems))[1]
            print(f"{label:7s} held-out accuracy {share:.3f} ± {half:.3f} (95 %, {problems} problems)", end="")
            if "held_out_reward" in row:
                print(f"; right: a reward of at least 1; mean reward {row['held_out_reward']:.3f}", end="")
            print()
        total = Counter()
        for row in [*self.history, dict(seconds=self.seconds)]:  # of the last save
            total.update(row["seconds"])
        print("seconds " + ", ".join(f"{phase} {seconds:.0f}" for phase, seconds in total.items()))
        print(f"→ {out}/curves.png, {out}/metrics.jsonl and the model:\n"
              f"  AutoModelForCausalLM.from_pretrained(\"{out}/model\")   or   vllm serve {out}/model")


def evaluated(history):
    """The rows with an evaluation."""
    return [row for row in history if "accuracy" in row]


def peak_memory(run):
    """The largest so far, in bytes."""
    if run.device.type == "cuda":  # torch goes on to count what a sleeping engine has given back
        return max(torch.cuda.max_memory_allocated() - run.sampler.given_back, run.sampler.awake)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def curves(rows, path):
    """Over steps above, over seconds below."""
    clock = np.cumsum([sum(row["seconds"].values()) for row in rows])
    rows = [dict(row, seconds=seconds) for row, seconds in zip(rows, clock)]
    picture(path, rows, ["step", "seconds"], [["reward", "accuracy", "held_out_reward"], ["kl"], ["loss"],
                                               ["length"]])


def diagnose(rows, args, most_reward=1.0):
    """The known illnesses that the metrics so far show: {name: cause and remedy}. most_reward: the largest that can be
    gained; None: not known, as rewards are not 0 or 1"""
    rows = [row for row in rows if row["step"] > 0]
    found = {}
    if len(rows) < 10:
        return found
    mean = lambda some, key: sum(row[key] for row in some) / len(some)
    before, now = lambda key: mean(rows[:10], key), lambda key: mean(rows[-10:], key)
    best = max(mean(rows[i : i + 10], "reward") for i in range(len(rows) - 9))
    # where filtering began to pay in experiments/unsolved.py. With one to three answers none is right too often
    if now("unsolved") > 0.15 and most_reward and args.samples >= 4:
        found["unsolved"] = (f"{now('unsolved'):.0%} of the prompts were never solved by π_ref in Stage 1, so there is "
                             "little to learn from and the loss stays. Does the checker misread the answers "
                             "(look at some)? Otherwise take easier problems, or leave these out: --filter unsolved.")
    if before("finished") < 0.2 and now("finished") < 0.2:
        found["no EOS"] = ("nearly no answer ends with EOS; without --reward such answers earn 0. Does the prompt fit "
                           "the model (--chat for chat models)? Otherwise raise --max_new_tokens. Both are flags of "
                           "Stage 1.")
    elif now("finished") < min(0.8, before("finished") - 0.15) and now("length") > before("length"):
        found["cut off"] = (f"answers grow until they are cut off: {before('finished'):.0%} ended with EOS, now "
                            f"{now('finished'):.0%}. Raise --beta2, or Stage 1's --max_new_tokens.")
    if before("reward") > 0.95 and most_reward:
        found["saturated"] = (f"π_ref already earns {before('reward'):.2f}: nothing is left to learn. Take harder "
                              "problems.")
    elif len(rows) >= 30 and now("log_ratio_abs") < 0.01:
        found["still"] = (f"the policy does not move: after {rows[-1]['step']} steps |ln π/π_ref| is "
                          f"{now('log_ratio_abs'):.1g}. Raise --lr, or lower --beta2 if it is large.")
    # π* ∝ π_ref exp(r/β2) trades at most so much of reward for KL; beyond it the policy is worse than π_ref
    if most_reward and now("kl") * args.beta2 > most_reward:
        found["runaway"] = (f"the KL to π_ref runs away: {now('kl'):.1f}, and no reward is worth more than "
                            f"1/β2 = {most_reward / args.beta2:g}. Lower --lr, or use more --warmup.")
    if best > 0.1 and now("reward") < 0.6 * best:
        found["collapse"] = (f"the reward fell from {best:.2f} to {now('reward'):.2f}. Lower --lr, or raise "
                             "--beta2 or --batch_size.")
    return found


if __name__ == "__main__":
    run_script(main)
