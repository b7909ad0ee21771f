"""A*-PO, Stage 2: one completion per prompt, one step of regression.   (arXiv 2505.20686)

π is the policy, the model that learns; π_ref the model at the start; x a prompt, y a completion, r its
reward. Why a regression? Of all policies, the one that maximises E_π[r] − β KL(π‖π_ref) on a prompt x is

    π*(y|x) = π_ref(y|x) exp( r(x,y)/β ) / Z(x),       where Z(x) = E_ref[exp(r/β)],

and the maximum is V*(x) = β ln Z(x). Take the logarithm:

    β ln π*(y|x)/π_ref(y|x)  =  r(x,y) − V*(x)       for EVERY y.

On the left stands what the network says. On the right stands a number, once V* is known, and for V* only
completions of π_ref are needed: Stage 1 (vstar.py) has estimated it, V̂*(x). So one completion gives one
equation, and the loss is its squared error:

    ( β2 ln π(y|x)/π_ref(y|x)  −  (r(x,y) − V̂*(x)) )²

A step samples ONE y to each prompt from the current policy π, grades it, and goes down this gradient. y is
data: no gradient flows through its sampling. Constant are π_ref(y|x), r and V̂*. There is no critic, no group
of completions, no clipping of ratios, no importance weight and no entropy bonus.

A number: where 3 of 8 completions were right, V̂* is 0.61 at β1 = 0.5 (the mean reward is 0.375, the best 1).
A right completion is 1 − 0.61 = 0.39 better than that (r − V̂* is its advantage), so its ln π should rise; a
wrong one has −0.61.

The equation holds exactly only if V̂* is the V* of β2. It need not be: β1, of V̂*, need not be β2, of the
loss. For y ~ π the mean of ∇ ln π(y|x) is 0, so a number that depends on x alone changes the gradient's
noise, not its mean. The loss's mean gradient is −2 β2 ∇(E[r] − β2 KL), whatever V̂* is, and training ends at
the π* of β2. V̂* then serves as a baseline: it says what is usual for this prompt, which GRPO samples a group
to know. So the loss falls, but not to 0: at this π* every y, right or wrong, leaves the residual V̂* −
V*(β2). With the numbers above and β2 = 1e-3 V*(β2) is 1.00, and the loss ends near (0.61 − 1.00)² = 0.15.
(test_apo.py shows these claims: test_loss_is_zero_at_the_optimum, test_gradient_is_that_of_reward_minus_kl.)

    python train.py                                                     the embedded world, on any CPU
    torchrun --nproc_per_node 8 train.py --vstar out/vstar.jsonl        a real model (experiments/recipes/)
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 train.py …
                                                                        (run on each of two nodes)

It writes into out/run/: metrics.jsonl (a line a step), curves.png, samples/ (000020.jsonl has a step's
completions, 000020.held_out.jsonl those of the evaluation after it), checkpoint/, and model/, which
transformers and vLLM load as it is. A killed run is resumed by the same command. A line of metrics.jsonl:

    {"step": 1, "loss": 0.284, "entropy": 0.247, "mismatch": 9e-08, "reference_mismatch": 9e-08, "kl": 0.0,
     "log_ratio_abs": 0.0, "length": 15.96, "grad_norm": 0.819, "grad_clipped": 0.0, "lr": 6e-05,
     "reward": 0.445, "vstar": 0.589, "advantage": -0.144, "finished": 1.0, "unsolved": 0.0625,
     "tokens_per_second": 792, "memory_gb": 0.428, "seconds": {"push": 0.0, "sampling": 1.156, …}}
"""

import importlib.util
import json
import math
import os
import resource
import shutil
import signal
import time
from collections import Counter
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

# before torch, which reads it: vstar.py says why
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import cached_file

from rewards import DATASETS, fail, load_problems, readable
from vstar import (
    RANK,
    WORLD,
    Completion,
    Flags,
    add_machine_flags,
    add_prompts,
    atomic_write,
    barrier,
    batched,
    estimate_vstar,
    fingerprint,
    first_process_first,
    grade,
    guard_settings,
    hash_of,
    hash_of_ids,
    load_model,
    make_sampler,
    mean_and_interval,
    picture,
    prompt_seed,
    read_flags,
    read_rows,
    remove,
    run_script,
    start_process,
    write_rows,
)

# -----------------------------------------------------------------------------------------------------------
# the algorithm. Read this section, then Policy and rollout. The rest is machinery.


def apo_loss(log_pi, log_pi_ref, reward, vstar, beta2):
    """Regress the scaled log-ratio onto the optimal advantage. Tensors: (sequences,) fp32, also the result.

    Not −advantage · ln π, as in policy gradients, and no KL term beside it: the gradient of the square holds
    both. log_pi is of the whole completion, a sum over its tokens. A mean would make β2 depend on the length.
    """
    advantage = reward - vstar  # A*(x, y): r is seen now, V̂* was estimated once, offline
    return (beta2 * (log_pi - log_pi_ref) - advantage) ** 2


class APO:
    """What makes the loop below A*-PO.

    experiments/baselines.py puts PPO, GRPO or REBEL in its place; sampler, grader, optimizer, restart and
    logging stay, which makes the comparison fair. A subclass may rely on this: in `samples` the completions
    of a prompt are neighbours, and a process may have none; `constants` are in the order of `samples`; the
    rows of a micro-batch are in that of `chosen`, where per_loss neighbours stay together.
    """

    name, out = "apo", Path("out/run")
    completions = 1  # for each prompt of a batch
    passes = 1  # of the optimizer over a batch
    per_loss = 1  # completions that one loss compares: REBEL's takes pairs
    most_reward = 1.0  # the largest that a policy can gain; `diagnose` warns of a KL above most_reward / β2

    def __init__(self, args):
        self.args = args

    @classmethod
    def add_flags(cls, add):
        add("--beta2", 1e-3, "β2: how strongly the policy is held at π_ref")

    def networks(self, make):
        """[(network, its learning rate)] of what is trained beside the policy: PPO's critic.

        make(Kind) loads the model as a Kind of Policy and shards it.
        """
        return []

    def constants(self, run, samples):
        """What is constant in the loss: {name: (samples,), or (samples, columns) if each token has a value}

        Column t holds the value of token t + 1; it is 0 where that token is not of the completion. Prompt
        [5 6 7], completion [8 9]: ref_logp is [0, 0, ln π_ref(8|5 6 7), ln π_ref(9|5 6 7 8)].
        """
        vector = lambda values: torch.tensor(values, dtype=torch.float32, device=run.device)
        return dict(ref_logp=token_logps(run.reference, samples, self.args, run.device),
                    reward=vector([sample.reward for sample in samples]),
                    vstar=vector([sample.problem["vstar"] for sample in samples]))

    def count(self, samples):
        """What the summed losses are divided by: sequences; for REBEL pairs, for PPO tokens."""
        return len(samples)

    def losses(self, logp, constants, completion_mask, inputs):
        """Yields (name, a loss for each row, or for REBEL each pair of rows) of a micro-batch.

        logp, completion_mask: (rows, columns); `constants`: of these rows. `update` runs the backward pass
        after each loss, so that the graphs of two networks never exist together. A second network reads
        `inputs`.
        """
        log_pi, log_pi_ref = logp.sum(-1), constants["ref_logp"].sum(-1)  # (rows,): ln π of whole completions
        yield "loss", apo_loss(log_pi, log_pi_ref, constants["reward"], constants["vstar"], self.args.beta2)


def train(run, problems, held_out, start):
    """Steps start … args.steps - 1. → None, or the exit code of a run that a signal stopped

    Steps count from 0 here; metrics.jsonl and checkpoints count those that are done. A step depends only on
    the weights, AdamW's state and its number: prompts are ordered by (--seed, epoch), and a completion's
    random numbers follow from (--seed, serial, problem id), where serial = step · batch_size + index in the
    batch. No global generator is used, so none is saved, and a restart repeats what a kill cut off.
    """
    args, objective, log = run.args, run.objective, Log(run, start)
    if start == 0 and held_out:
        log(dict(step=0, **held_out_metrics(run, held_out, log, 0)))
    for step in range(start, args.steps):
        # 1. one completion of each prompt, by the policy as it is now, graded
        with log.phase("push"):
            run.sampler.wake(run.policy)
        with log.phase("sampling"):
            samples = rollout(run, prompts_of_step(problems, step, args), objective.completions)
            samples = deal(samples, objective.completions, args)
        with log.phase("push"):
            run.sampler.rest()  # the update needs the memory

        # 2. what has no gradient in the loss: ln π_ref(y|x) and r, new for each batch, and Stage 1's V̂*(x)
        with log.phase("reference"):
            constants = objective.constants(run, samples)

        # 3. down the gradient of the loss. Loss, KL and mismatch are logged of the first update, the only one
        #    that is on-policy; reward and length of the whole batch, the gradient's norm of all updates
        with log.phase("update"):
            set_lr(run.optimizer, step, args)
            parts = minibatches(samples, constants, args, objective.passes)
            updates = [update(run, *part) for part in parts]
            check_numbers(updates[0], step, args, run.policy.mixture)
        if step == start + 1:  # a step has had all that it needs
            use_free_memory(run, samples)

        # 4. measure, log, save
        done, last = step + 1, step + 1 == args.steps
        metrics = {"step": done, **updates[0], **batch_metrics(samples, constants)}
        for name in ("grad_norm", "grad_clipped"):
            metrics[name] = sum(numbers[name] for numbers in updates) / len(updates)
        if held_out and (last or done % args.eval_every == 0):
            metrics |= held_out_metrics(run, held_out, log, done)
        log(metrics, samples, constants)
        stop = log.asked_to_stop()  # a signal ends the run after this step, on all processes alike
        if last or stop or done % args.save_every == 0:
            with log.phase("saving"):
                run.sampler.rest()
                save_checkpoint(run, done)
                log.draw_curves()
        if stop and not last:
            return log.stopped(done)
    save_model(run)
    log.report(len(held_out))


def update(run, samples, constants):
    """One optimizer step down the mean loss of all processes' samples. → what it saw of π before the step"""
    args, objective, optimizer = run.args, run.objective, run.optimizer
    count = sum_over_ranks(objective.count(samples))
    logp, sums = torch.zeros_like(constants["ref_logp"]), Counter()
    for chosen, ids, completion_mask in microbatches(samples, args, run.device, objective.per_loss):
        inputs = dict(input_ids=ids, completion_mask=completion_mask, temperature=args.temperature)
        # (rows, columns) fp32. Where a process has no samples left, `chosen` is empty and its gradient 0
        part_logp = run.policy(**inputs)[: len(chosen)]
        columns = part_logp.shape[1]
        part_constants = take(constants, chosen, columns)
        part_mask = completion_mask[: len(chosen), 1:]
        for name, losses in objective.losses(part_logp, part_constants, part_mask, inputs):
            # FSDP averages gradients over processes: times WORLD and over the global count, one batch's mean
            (losses.sum() * WORLD / count).backward()
            sums[name] += losses.sum().item() / count
        logp[chosen, :columns] = part_logp.detach()
    norms = [full_tensor(clip_grad_norm_(group["params"], args.max_grad_norm)).item()
             for group in optimizer.param_groups]
    if not math.isfinite(sum(norms)):  # of all processes' gradients: one loss that is NaN makes them so
        fail_together(f"the gradient's norm is {sum(norms)}; the last checkpoint is whole. Lower --lr, or "
                      "look at this step's completions")
    optimizer.step()
    optimizer.zero_grad()
    numbers = {name: sum_over_ranks(loss) for name, loss in sums.items()}
    numbers |= policy_metrics(samples, logp, constants)
    numbers |= dict(grad_norm=norms[0], grad_clipped=norms[0] > args.max_grad_norm)
    return numbers | dict(lr=optimizer.param_groups[0]["lr"])


# -----------------------------------------------------------------------------------------------------------
# the policy's log-probabilities


class Policy(torch.nn.Module):
    """Any transformers causal language model, in two modes: π, π_ref and PPO's critic are each one.

    forward(completion_mask=…) gives the log-probabilities of the tokens that the mask marks; without it, it
    is the model itself, for sampling. The log-probabilities are computed in here, because FSDP gathers the
    head's weights around this forward and nowhere else.
    """

    def __init__(self, model, recompute=False):
        super().__init__()
        self.model, self.config, self.saved_dtype = model, model.config, model.dtype
        self.mixture = any("experts" in name for name, _ in model.named_parameters())
        text, names = model.get_decoder(), set(model._no_split_modules or [])
        self.blocks = [module for module in text.modules() if type(module).__name__ in names]
        reached = {*text.parameters(), *model.get_output_embeddings().parameters()}
        for parameter in model.parameters():
            if parameter not in reached:  # what sees images is not trained
                parameter.requires_grad_(False)
        self.kept = 0 if recompute else len(self.blocks)  # whose activations wait for the backward pass
        self.block_bytes = 0  # of activations for a token, once it is measured
        for index, block in enumerate(self.blocks):
            if recompute:
                block.forward = partial(self.run_block, index, block, block.forward)
        model.eval()  # for good: with dropout π would not be a function of the weights

    def forward(self, completion_mask=None, temperature=1.0, **inputs):
        if completion_mask is None:
            return self.model(**inputs)
        # (rows, width): prompt, completion, padding; so causal attention needs no mask
        ids = inputs["input_ids"]
        hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        mask = completion_mask[:, 1:]  # (rows, width - 1): position t predicts token t + 1
        states = hidden[:, :-1][mask]  # (tokens, hidden): of the completions' tokens alone
        targets = ids[:, 1:][mask]  # (tokens,)
        chunk = self.chunk(ids.is_cuda)
        logps = [checkpoint(self.head, *part, temperature, use_reentrant=False)
                 for part in zip(states.split(chunk), targets.split(chunk))]
        # back into place: (rows, width - 1) fp32, 0 where there is no completion
        empty = torch.zeros(mask.shape, device=ids.device)
        return empty.masked_scatter(mask, torch.cat(logps))

    def head(self, states, targets, temperature):
        """ln π(target | state) of a chunk of tokens, fp32. The backward pass computes the logits again."""
        logits = self.model.get_output_embeddings()(states).float()
        if temperature != 1:  # as in sampling, or π/π_ref is not the ratio of what was sampled from
            logits = logits / temperature
        return -F.cross_entropy(logits, targets, reduction="none")

    def chunk(self, gpu):
        """The tokens whose logits exist at one time: 0.5 GB of them, or 883 with a vocabulary of 152k.

        On a CPU 32 MB, which is enough to keep its cores busy.
        """
        vocabulary = self.model.get_output_embeddings().weight.shape[0]
        return max(1, (1 << 27 if gpu else 1 << 23) // vocabulary)

    def gather(self):
        """All weights whole on every process: once for a rollout, not once for every token. That would be
        slow, and hang where one process writes more tokens than another."""
        for module in self.sharded():
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()

    def scatter(self):
        for module in self.sharded():
            module.set_reshard_after_forward(module is not self, recurse=False)  # FSDP's default
            module.reshard()

    def sharded(self):
        return [module for module in self.modules() if isinstance(module, FSDPModule)]

    def full_weights(self, dtype):
        """(name, tensor), of floating-point numbers in `dtype`. Of tied weights there are both names."""
        for name, tensor in self.state_dict().items():
            yield name.removeprefix("model."), full_tensor(cast(tensor, dtype))  # half as much to gather

    def checkpoint_weights(self, dtype):
        """full_weights with the names of the model's files, which vLLM knows; transformers has its own."""
        for name, tensor in self.full_weights(dtype):
            yield from revert_weight_conversion(self.model, {name: tensor}).items()

    # what is kept for the backward pass, and what is computed again

    def run_block(self, index, block, forward, *inputs, **options):
        """The first `kept` blocks keep their activations; the others compute them again."""
        if torch.is_grad_enabled() and not self.block_bytes:
            return self.measure(block, partial(forward, *inputs, **options), inputs[0])
        if index < self.kept:
            return forward(*inputs, **options)
        return checkpoint(forward, *inputs, **options, use_reentrant=False, preserve_rng_state=False)

    def keep(self, free, tokens):
        """So many blocks keep their activations as fit into `free` bytes, for micro-batches of `tokens`."""
        size = self.block_bytes * tokens
        self.kept = min(len(self.blocks), int(max(0, free) // size)) if size else self.kept

    def measure(self, block, forward, states):
        """forward(), and how much memory it keeps for the backward pass, without the weights"""
        saved, pointer = {}, lambda tensor: tensor.untyped_storage().data_ptr()

        def note(tensor):
            saved[pointer(tensor)] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = forward()
        weights = {pointer(parameter) for parameter in block.parameters()}
        self.block_bytes = sum(saved[at] for at in saved.keys() - weights) / states.shape[:2].numel()
        return output


class LoraPolicy(Policy):
    """LoRA (arXiv 2106.09685): the linear layers of the blocks become (W + 32/rank · B A) x.

    A and B learn, in fp32; all else is frozen, in `dtype`. B starts at 0, so π starts as π_ref to the bit.
    """

    def __init__(self, model, rank, dtype, seed, recompute=False):
        super().__init__(model, recompute)
        for parameter in self.requires_grad_(False).parameters():
            parameter.data = parameter.data.to(dtype)
        self.scale, self.adapted, self.dtype = 32 / rank, True, dtype
        rng = torch.Generator().manual_seed(seed)  # all processes draw the same A
        modules = [module for block in self.blocks for module in block.modules()]
        self.layers = [module for module in modules if isinstance(module, torch.nn.Linear)]
        self.cast = {}  # {layer: its A and B in `dtype`}, while the policy samples
        if not self.layers:
            fail(f"--lora: the blocks of a {type(model).__name__} hold no torch.nn.Linear")
        for layer in self.layers:
            a = torch.empty(rank, layer.in_features)
            torch.nn.init.kaiming_uniform_(a, math.sqrt(5), generator=rng)
            layer.lora_A = torch.nn.Parameter(a)
            layer.lora_B = torch.nn.Parameter(torch.zeros(layer.out_features, rank))
            layer.register_forward_hook(self.add_lora)

    def add_lora(self, layer, inputs, output):
        if self.adapted:
            a, b = self.cast.get(layer) or (layer.lora_A.to(output.dtype), layer.lora_B.to(output.dtype))
            return output.add(inputs[0] @ a.T @ b.T, alpha=self.scale)

    def gather(self):
        super().gather()
        self.cast = {layer: (layer.lora_A.to(self.dtype), layer.lora_B.to(self.dtype))
                     for layer in self.layers}

    def scatter(self):
        super().scatter()
        self.cast = {}

    def unadapted(self, **inputs):
        """π_ref: the same network with the additions switched off. Not under a gradient: a block that is
        computed again in the backward pass would have them."""
        self.adapted = False
        logp = self(**inputs)
        self.adapted = True
        return logp

    def full_weights(self, dtype):
        """The additions are merged into the weights, in fp32."""
        state = self.state_dict()
        for name, tensor in state.items():
            layer, _, kind = name.rpartition(".")
            if kind in ("lora_A", "lora_B"):
                continue
            tensor = full_tensor(tensor)
            if kind == "weight" and f"{layer}.lora_A" in state:
                a, b = full_tensor(state[f"{layer}.lora_A"]), full_tensor(state[f"{layer}.lora_B"])
                tensor = tensor + self.scale * b @ a
            yield name.removeprefix("model."), cast(tensor, dtype)


# -----------------------------------------------------------------------------------------------------------
# the rollout


class Sample(NamedTuple):
    problem: dict  # with its prompt's tokens, and from Stage 1 "rewards" and "vstar"
    completion: Completion
    response: str  # the completion as text
    reward: float
    serial: int | str  # of its prompt, counted since the run began; or HELD_OUT

    @property
    def ids(self):  # laid out for training: prompt, completion, and then padding on the right
        return self.problem["tokens"] + self.completion.tokens


HELD_OUT = "held out"  # the serial of each held-out problem: at every evaluation the same random numbers


def prompts_of_step(problems, step, args):
    """This process's [(serial, problem)] of a step. Each epoch takes all problems, in a new order.

    With 3 processes and batches of 4, step 1 has the serials 4 … 7, of which process 1 takes 5. The order is
    a function of the serial and --seed, and so are a completion's random numbers (`rollout`).
    """
    first, count = step * args.batch_size, len(problems)
    prompts = []
    for serial in range(first, first + args.batch_size)[RANK::WORLD]:
        order = order_of(args.seed, serial // count, count)
        prompts.append((serial, problems[order[serial % count]]))
    return prompts


@lru_cache(2)
def order_of(seed, epoch, count):
    return np.random.default_rng([seed, epoch]).permutation(count)


def rollout(run, prompts, n=1):
    """n graded completions of each prompt, by the current policy; prompts: [(serial, problem)]"""
    seeds = [prompt_seed(f"{run.args.seed}/{serial}", problem["id"]) for serial, problem in prompts]
    completions = run.sampler.generate([problem["tokens"] for _, problem in prompts], n, seeds)
    pairs, serials = [], []
    for (serial, problem), group in zip(prompts, completions):
        pairs += [(problem, completion) for completion in group]
        serials += [serial] * n
    of_eval_data = f" of {run.args.eval_data}" if HELD_OUT in serials else ""
    graded = grade(run.args, run.tokenizer, pairs, of_eval_data)
    # the completion's tokens go into the loss as they are; the response encoded again could give others
    return [Sample(*pair, *result, serial) for pair, result, serial in zip(pairs, graded, serials)]


def held_out_metrics(run, held_out, log, step):
    """The share of held-out problems solved, and with --reward their mean reward too."""
    with log.phase("push"):
        run.sampler.wake(run.policy)  # and the next step's completions come from these weights, too
    with log.phase("evaluation"):
        samples = rollout(run, [(HELD_OUT, problem) for problem in held_out[RANK::WORLD]])
        log.keep_held_out(step, samples)
        rewards = [sample.reward for sample in samples]
        right, total = sum_over_ranks([sum(reward >= 1 for reward in rewards), sum(rewards)])
    metrics = dict(accuracy=right / len(held_out))
    if run.args.reward:
        metrics["held_out_reward"] = total / len(held_out)
    return metrics


# -----------------------------------------------------------------------------------------------------------
# settings and start

# settings that Stage 2 takes from Stage 1, as V̂* holds for these alone
FROM_STAGE1 = ("model", "revision", "prompt", "chat", "chat_args", "stop", "reward", "temperature",
               "max_new_tokens")


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
    parser = Flags(f"Stage 2 by {Objective.__name__}. The model, its prompts, the temperature and the length "
                   "of completions are Stage 1's, because V̂* holds for these alone.")
    add = parser.group("algorithm")
    add("--vstar", Path("out/vstar.jsonl"), "what Stage 1 wrote; its settings lie beside it")
    add("--beta1", float, "β1 of V̂*; default: Stage 1's; another is computed from the stored rewards")
    add("--samples", int, "use only the first so many of Stage 1's rewards per prompt")
    add("--filter", ["none", "unsolved", "both"], "leave out prompts that π_ref never solved in Stage 1 "
        "(unsolved), or never and always (both)")
    Objective.add_flags(add)
    add("--batch_size", 256, "prompts a step")
    add("--minibatches", 1, "optimizer steps that a batch is split into")
    add("--epochs", 10.0, "how often each prompt is used")
    add("--steps", int, "instead of --epochs")
    add = parser.group("optimizer")
    add("--lora", int, "train additions of this rank to the linear layers, not the weights: no second model "
        "for π_ref")
    add("--lr", float, "AdamW's learning rate; default: 1e-6, with --lora 5e-6")
    add("--weight_decay", 0.0, "AdamW's")
    add("--warmup", 0, "steps over which the learning rate rises")
    add("--max_grad_norm", 1.0, "bound on the gradient's norm, over all weights of a network. A*-PO's "
        "gradient carries a factor of 2 β2, so with β2 = 1e-3 the default hardly ever acts (metric: "
        "grad_clipped)")
    add = add_machine_flags(parser, training=True)
    add("--tokens_per_microbatch", 16384, "padded tokens a forward pass; bounds the memory")
    add("--recompute", ["auto", "yes", "no"], "compute activations again in the backward pass, not keep "
        "them; auto: on a GPU, of as many blocks as its memory asks for")
    add = parser.group("files and output")
    add("--eval_data", str, "held-out problems; default: the test split of a named data set (gsm8k, math, …)")
    add("--eval_split", "test", "of a data set on the hub")
    add("--eval_limit", 512, "only the first so many of them")
    add("--eval_every", 20, "steps between measurements of their accuracy")
    add("--save_every", 50, "steps between checkpoints; the last two are kept")
    add("--show_every", 20, "steps between printed completions; samples/ has all of such a step, of the last "
        "one, and of each evaluation; 0: none", zero=True)
    add("--out", Objective.out, "the folder of this run")
    add("--overwrite", False, "throw away what an earlier run left there")
    add("--wandb", str, "also log to Weights & Biases", metavar="PROJECT")
    return parser


def main(Objective=APO):
    with first_process_first("flags"):
        args = read_flags(make_parser(Objective), "train")
        objective = Objective(args)
    device = start_process(args, group=True)
    with first_process_first("prepared"):
        stage1, n, rows = read_stage1(args)
        problems = settle(args, stage1, n, rows)
        held_out = []
        if args.eval_data:
            fields = stage1["question_field"], stage1["answer_field"], args.reward
            held_out = load_problems(args.eval_data, args.eval_split, *fields)[: args.eval_limit]
        tokenizer, eos = add_prompts(problems + held_out, args)
        if RANK == 0:
            guard_run(args, objective, stage1, problems, held_out)
            print(f"Stage 2: {len(problems)} prompts of {stage1['data']}, {args.steps} steps of "
                  f"{args.batch_size} from {args.model}, N = {args.samples}, β1 {args.beta1:g}, lr "
                  f"{args.lr:g}, {args.engine}, {WORLD} × {device.type} {args.dtype}; accuracy on "
                  f"{len(held_out)} held-out problems (--eval_data)")
            if args.batch_size > len(problems):
                print(f"warning: --batch_size {args.batch_size} is more than the {len(problems)} prompts, so "
                      "a step takes a prompt several times, and is of fewer problems than it seems. Take "
                      f"more problems, or a --batch_size of {len(problems)} at the most.")
    if not (args.out / "config.json").exists():  # the first process has just written it
        fail(f"--out {args.out}: what the first process wrote does not appear here; all nodes must share it")
    # the first process looks, and a sum tells the others
    start = int(sum_over_ranks(last_checkpoint(args.out) if RANK == 0 else 0))
    if start > args.steps:
        fail_together(f"{args.out} is at step {start} already, beyond --steps {args.steps}")
    run = make_run(args, objective, tokenizer, eos, problems + held_out, device)
    if start > 0:
        load_checkpoint(run, start)
        if RANK == 0:
            print(f"resuming after step {start}")
    code = train(run, problems, held_out, start)
    barrier("trained")
    run.sampler.close()  # vLLM leaves the process group, and must do so before it is destroyed
    if dist.is_initialized():
        dist.destroy_process_group()
    if code:  # or what comes next in a shell script would look for a model
        raise SystemExit(code)


def read_stage1(args):
    """→ the settings of Stage 1, its N, and its rows"""
    config = args.vstar.with_suffix(".config.json")
    if not args.vstar.exists():
        fail(f"{args.vstar}: no such file; run vstar.py first (or name its output with --vstar)")
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
        stage1, n = content["settings"], content["samples"]
        count, ids = stage1["number of problems"], stage1["problems' ids"]
        vars(args).update({key: stage1[key] for key in FROM_STAGE1})
    except (OSError, ValueError, KeyError, TypeError):
        fail(f"{config}: not there, or not the settings that this vstar.py writes; run it again")
    rows = read_rows(args.vstar, without="responses")  # which may be gigabytes
    if hash_of_ids(rows) != ids:
        fail(f"{args.vstar}: {len(rows)} rows, and Stage 1 had {count} problems; the same vstar.py command "
             "samples again what is missing")
    now = fingerprint(args.model, args.reward)
    if now["model's files"] != stage1["model's files"]:
        if not Path(args.model).is_dir():
            fail(f"--model {args.model}, of which {args.vstar} is: no such folder any more")
        fail(f"model's files changed since Stage 1; {args.vstar} holds other V̂*: run vstar.py again, with "
             "--overwrite")
    if any(row.get("graded_by") != now["reward's file"] for row in rows):
        fail(f"{args.vstar}: the reward's file changed since Stage 1; the same vstar.py command grades its "
             "completions again")
    return stage1, n, rows


def settle(args, stage1, n, rows):
    """All settings that follow from others, in one place. → the problems to train on, with their V̂*"""
    if args.temperature == 0:
        fail("--temperature 0: greedy completions have no log-probability to train on; run Stage 1 at "
             "temperature 1")
    if args.batch_size < args.minibatches:
        fail(f"--minibatches {args.minibatches} is more than --batch_size {args.batch_size}")
    if args.wandb and importlib.util.find_spec("wandb") is None:
        fail("--wandb: it is not installed (pip install wandb)")
    args.lr = args.lr or (5e-6 if args.lora else 1e-6)
    args.beta1 = args.beta1 or stage1["beta1"]
    args.samples = args.samples or n
    stored = min(len(row["rewards"]) for row in rows)
    if args.samples > stored:
        fail(f"{args.vstar}: {stored} completions per prompt, not --samples {args.samples}; vstar.py can add "
             "the others")
    has_splits = stage1["data"] in DATASETS and DATASETS[stage1["data"]][2] is None
    if args.eval_data is None and has_splits and args.eval_split != stage1["split"]:
        args.eval_data = stage1["data"]  # unless it is the split that is trained on
    rewards = np.array([row["rewards"][: args.samples] for row in rows])  # (prompts, N)
    vstar = estimate_vstar(rewards, args.beta1)
    for i, row in enumerate(rows):
        row |= dict(rewards=rewards[i].tolist(), vstar=float(vstar[i]))
    if args.filter != "none":
        rows = [row for row in rows if max(row["rewards"]) >= 1]
    if args.filter == "both":
        rows = [row for row in rows if min(row["rewards"]) < 1]
    if not rows:
        fail(f"--filter {args.filter} leaves no prompt (solved is a reward of at least 1)")
    args.steps = args.steps or math.ceil(args.epochs * len(rows) / args.batch_size)
    return rows


def guard_run(args, objective, stage1, problems, held_out):
    outputs = [args.out / name for name in ("checkpoint", "metrics.jsonl", "curves.png", "samples", "model")]
    may_change = ["steps", "epochs", "save_every", "eval_every", "show_every", "wandb", "vstar",
                  "tokens_per_microbatch", "recompute"]
    total = round(sum(problem["vstar"] for problem in problems), 6)  # another CPU may round otherwise
    more = {"algorithm": objective.name, "stage1": stage1, "sum of V̂*": total}
    more["eval_data's problems"] = hash_of(held_out)
    precious = [*checkpoints(args.out), args.out / "model"]
    # FROM_STAGE1 is in `stage1`, too
    guard_settings(args, args.out / "config.json", outputs, precious, may_change, FROM_STAGE1, **more)


def make_run(args, objective, tokenizer, eos, prompts, device):
    """The engine first, while the memory is free; then π and what is trained beside it, and π_ref."""
    dtype = getattr(torch, args.dtype)
    recompute = args.recompute == "yes" or (args.recompute == "auto" and device.type == "cuda")
    load = lambda dtype: load_model(args.model, args.revision, dtype, "cpu")
    make = lambda kind: shard(kind(load("auto"), recompute), device, dtype, master=True)
    sampler = make_sampler(args, eos, prompts, device, training=True)
    if args.lora:
        policy = LoraPolicy(load("auto"), args.lora, dtype, args.seed, recompute)
        # one process needs no FSDP, which would gather a second copy to sample from
        policy = shard(policy, device, dtype) if WORLD > 1 else policy.to(device)
        reference = policy.unadapted
    else:
        policy = make(Policy)
        reference = shard(Policy(load(args.dtype)).requires_grad_(False), device, dtype)
    learners = [(policy, args.lr), *objective.networks(make)]
    optimizer = torch.optim.AdamW(
        [dict(params=network.parameters(), peak_lr=lr) for network, lr in learners],
        betas=(0.9, 0.999), weight_decay=args.weight_decay, fused=device.type == "cuda")
    if recompute and not policy.blocks and RANK == 0:
        print("nothing is recomputed: transformers does not say what this architecture's blocks are")
    check_head(policy, device, args.model)
    trained = torch.nn.ModuleList(network for network, _ in learners)
    return Run(args, objective, tokenizer, policy, reference, trained, optimizer, sampler, device)


# -----------------------------------------------------------------------------------------------------------
# the machine: shards, micro-batches, sums over processes


def shard(policy, device, dtype, master=False):
    """Spread the weights over all processes (FSDP2): one group for each block, one for the rest.

    `master`: the weights are fp32, computed with in `dtype`; gradients add up in fp32. In pure bf16 AdamW at
    a rate of 1e-6 would move about 2 % of the weights: the others round back to where they were.
    """
    if not dist.is_initialized():
        return policy.to(device, torch.float32)
    # None: FSDP's default, by which embeddings and head stay gathered until the backward pass; π_ref has none
    learns = any(parameter.requires_grad for parameter in policy.parameters())
    options = dict(mesh=dist.device_mesh.init_device_mesh(device.type, (WORLD,)),
                   mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32),
                   reshard_after_forward=None if learns else True)
    for module in (*policy.blocks, policy):
        # block by block, so that no GPU ever holds the whole model
        module.to(device, torch.float32 if master else None)
        fully_shard(module, **options)
    return policy


def use_free_memory(run, samples):
    """What a GPU has had to spare so far lets vLLM stay awake, and blocks keep their activations."""
    if run.device.type != "cuda" or run.args.recompute != "auto":
        return
    free, total = torch.cuda.mem_get_info()  # vLLM sleeps now, and torch gives nothing back that it needed
    free = -max_over_ranks(-(free - 0.1 * total))  # the least of all processes
    if getattr(run.sampler, "sleeps", False) and free > run.sampler.size:
        run.sampler.sleeps, free = False, free - run.sampler.size
    # a micro-batch may be one pair of the longest samples
    longest = max([len(sample.problem["tokens"]) for sample in samples] or [0]) + run.args.max_new_tokens
    longest = max_over_ranks(longest * run.objective.per_loss)
    run.policy.keep(free, max(longest, run.args.tokens_per_microbatch))


def max_over_ranks(value):
    most = torch.tensor(value)
    if dist.is_initialized():
        dist.all_reduce(most, dist.ReduceOp.MAX)
    return most.item()


def cast(tensor, dtype):
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


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


def minibatches(samples, constants, args, passes):
    """(samples, constants) of each optimizer step of a batch; with --minibatches 1 all of it.

    A minibatch is a block of neighbours: the second of two in a batch of 256 has the prompts 128 … 255. Of
    each, every process has its share (`deal`).
    """
    for number in [*range(args.minibatches)] * passes:
        chosen = [i for i, sample in enumerate(samples) if minibatch_of(sample, args) == number]
        yield [samples[i] for i in chosen], take(constants, chosen)


def minibatch_of(sample, args):
    index_in_batch = sample.serial % args.batch_size
    return index_in_batch * args.minibatches // args.batch_size


def deal(samples, n, args):
    """All processes' samples, dealt out anew by length: else all wait for the one that has the longest. The
    n completions of a prompt stay together, and every process has its share of each minibatch."""
    if WORLD == 1:
        return samples
    of_processes = [None] * WORLD
    dist.all_gather_object(of_processes, samples)
    groups = batched([sample for share in of_processes for sample in share], n)
    longest = lambda group: max(len(sample.ids) for sample in group)
    groups.sort(key=lambda group: (minibatch_of(group[0], args), longest(group), group[0].serial))
    mine = sorted(groups[RANK::WORLD], key=lambda group: group[0].serial)
    return [sample for group in mine for sample in group]


def take(constants, chosen, columns=None):
    """The constants of the chosen samples.

    Of what has a value for each token it gives the first `columns`, as many as the longest chosen sample has:
    padding is on the right.
    """
    return {name: tensor[chosen, :columns] if tensor.dim() > 1 else tensor[chosen]
            for name, tensor in constants.items()}


def microbatches(samples, args, device, per_loss=1):
    """Yields (indices of the chosen samples, ids, completion_mask): samples of like length, and of at most
    --tokens_per_microbatch padded tokens, but at least one.

    Prompts [5 6 7] and [5], completions [8 9] and [8 0], EOS 0:
        ids  [[5 6 7 8 9], [5 8 0 0 0]]      completion_mask  [[0 0 0 1 1], [0 1 1 0 0]]
    The mask ends with the EOS, because stopping is a choice of the policy; it leaves out the padding, even if
    that is EOS too. `per_loss` neighbours (REBEL's pairs) stay together. All processes get equally many
    micro-batches, because FSDP's collectives must pair up; a filler has no sample and adds 0.
    """
    length = [len(sample.ids) for sample in samples]
    groups = groups_of_like_length(length, args.tokens_per_microbatch, per_loss)
    count = max_over_ranks(len(groups))
    pad = lambda rows: pad_sequence(rows, batch_first=True).to(device)
    for chosen in groups:
        ids = pad([torch.tensor(samples[i].ids) for i in chosen])
        starts = [len(samples[i].problem["tokens"]) for i in chosen]
        mask = pad([torch.arange(length[i]) >= start for i, start in zip(chosen, starts)])
        yield chosen, ids, mask
    for _ in range(len(groups), count):
        yield [], pad([torch.tensor([0, 0])]), pad([torch.tensor([False, True])])


def groups_of_like_length(length, tokens, per_loss=1):
    """[indices of samples that go through the model together], from the longest to the shortest

    A group has at most so many tokens when all are padded to its longest; it ends before that where it holds
    a quarter of them and what comes next would be padding by a fifth or more.
    """
    longest = lambda unit: max(length[i] for i in unit)
    groups, width = [], math.inf
    for unit in sorted(batched(range(len(length)), per_loss), key=longest, reverse=True):
        padded = len(groups[-1]) * width if groups else math.inf
        fits = padded + per_loss * width <= tokens
        if fits and (padded < tokens / 4 or longest(unit) >= 0.8 * width):
            groups[-1] += unit
        else:
            groups.append([*unit])
            width = longest(unit)  # its first unit is its longest
    return groups


@torch.no_grad()
def token_logps(model, samples, args, device):
    """ln π, or a critic's value, of each token of the completions: (samples, longest - 1) fp32, 0 elsewhere.

    π_ref goes through the update's code and micro-batches: from other kernels ln π_ref would be off by more
    than a small log-ratio.
    """
    longest = max([len(sample.ids) for sample in samples] or [2])  # a process may have no sample
    values = torch.zeros(len(samples), longest - 1, device=device)
    for chosen, ids, completion_mask in microbatches(samples, args, device):
        part = model(input_ids=ids, completion_mask=completion_mask, temperature=args.temperature)
        values[chosen, : part.shape[1]] = part[: len(chosen)]
    return values


def on_tokens(samples, numbers, like):
    """Lists of a number for each token of the completions → the layout of `like`, which token_logps made."""
    placed = torch.zeros_like(like)
    for row, (sample, of_tokens) in enumerate(zip(samples, numbers)):
        first = len(sample.problem["tokens"]) - 1  # position t predicts token t + 1
        placed[row, first : first + len(of_tokens)] = torch.tensor(of_tokens)
    return placed


def set_lr(optimizer, step, args):
    """The learning rate rises over --warmup steps and stays."""
    share = min(1.0, (step + 1) / max(1, args.warmup))
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * share


# -----------------------------------------------------------------------------------------------------------
# what a step says of itself


def policy_metrics(samples, logp, constants):
    """logp: (samples, columns) of the policy before the update"""
    ref_logp = constants["ref_logp"]
    log_ratio = logp.sum(-1) - ref_logp.sum(-1)  # (samples,)
    sampled = on_tokens(samples, [sample.completion.logps for sample in samples], logp)  # the engine's own
    tokens = sum(len(sample.completion.tokens) for sample in samples)
    # on-policy the entropy is the mean of -ln π of what was sampled
    apart = lambda other: (other - sampled).abs().sum()
    per_token = mean_over_ranks(
        tokens, entropy=-logp.sum(), mismatch=apart(logp), reference_mismatch=apart(ref_logp))
    per_sample = mean_over_ranks(
        len(samples), kl=log_ratio.sum(), log_ratio_abs=log_ratio.abs().sum(), length=tokens)
    return per_token | per_sample


def batch_metrics(samples, constants):
    own = {}
    if "vstar" in constants:  # the loss takes it
        own["advantage"] = (constants["reward"] - constants["vstar"]).double().sum().item()
    return mean_over_ranks(
        len(samples),
        reward=sum(sample.reward for sample in samples),
        vstar=sum(sample.problem["vstar"] for sample in samples),
        **own,
        length=sum(len(sample.completion.tokens) for sample in samples),
        finished=sum(sample.completion.finished for sample in samples),
        unsolved=sum(max(sample.problem["rewards"]) < 1 for sample in samples))


def check_numbers(numbers, step, args, mixture=False):
    """What silently ruins runs: π is not π_ref at the start, or the engine samples with other weights.

    `mismatch` is how far the sampler's ln π of its own tokens is from the trainer's, in nats a token;
    `reference_mismatch` how far it is from π_ref's. A small lag, below the tolerance, passes. The tolerance
    is fixed: one that was fitted to past mismatches would follow an engine that drifts away.
    """
    tolerance = 1e-3 if args.dtype == "float32" else 0.1  # nats a token; bf16 rounds
    if mixture:  # rounding sends a token to another expert
        tolerance *= 3
    rounding = tolerance / 100
    per_token = numbers["log_ratio_abs"] / numbers["length"]
    if step == 0 and per_token > tolerance:
        fail_together("before the first update π and π_ref should agree, but ln π differs by "
                      f"{per_token:.3g} per token")
    if args.engine == "vllm":
        tolerance = max(tolerance, 0.01)  # its kernels may multiply fp32 as TF32
    mismatch, reference_mismatch = numbers["mismatch"], numbers["reference_mismatch"]
    follows_policy = mismatch <= tolerance  # False for NaN too
    # an engine that kept its first weights agrees with π_ref better than with π. A mismatch far below the
    # tolerance is rounding, which in a batch of few tokens may go to one side by chance
    kept_first_weights = mismatch > rounding and reference_mismatch < mismatch / 2
    if kept_first_weights or not follows_policy:
        fail_together(f"the sampler's log-probabilities are off the trainer's by {mismatch:.3g} per token, "
                      f"and off π_ref's by {reference_mismatch:.3g}: does it still hold old weights?")


def fail_together(message):
    """For what all processes find at once: the first says it, and so ends the others."""
    if RANK == 0:
        fail(message)
    time.sleep(60)
    raise SystemExit(2)


@torch.no_grad()
def check_head(policy, device, model):
    """Is 'the last hidden state through the head' this architecture's logits? (Some scale or cap them.)"""
    vocabulary = policy.config.get_text_config().vocab_size
    ids = torch.arange(1, 9, device=device)[None] % vocabulary
    ours = policy(input_ids=ids, completion_mask=ids >= 0)
    logits = policy(input_ids=ids, use_cache=False).logits[:, :-1].float()
    theirs = torch.distributions.Categorical(logits=logits).log_prob(ids[:, 1:])
    # one alone may be off by the step from one bf16 number to the next
    if (ours - theirs).abs().mean() > 0.1:
        fail_together(f"--model {model}: its logits are changed after the head, in a way that Policy.head "
                      "does not know")


# -----------------------------------------------------------------------------------------------------------
# files


def last_checkpoint(out):
    """The step of the last whole one, 0 if there is none. Half-written ones are removed."""
    for torn in out.glob("checkpoint/*.tmp"):
        remove(torn)
    return max((int(folder.name) for folder in checkpoints(out)), default=0)


def checkpoints(out):
    return sorted(out.glob("checkpoint/" + "[0-9]" * 8))


def state_of(run):
    """What has learned, each tensor once: with --lora the additions alone."""
    model, optimizer = get_state_dict(run.trained, run.optimizer)
    learned = [name for name, parameter in run.trained.named_parameters() if parameter.requires_grad]
    return dict(model={name: model[name] for name in learned}, optimizer=optimizer)


def save_checkpoint(run, step):
    """A folder with every process's shards. The two newest stay."""
    out, state = run.args.out, state_of(run)
    with atomic_write(out / f"checkpoint/{step:08d}", mine=RANK == 0) as aside:
        try:
            dcp.save(state, checkpoint_id=aside)
        except dcp.CheckpointException as error:
            reason = next(iter(error.failures.values()))[0]
            raise OSError(str(reason)) from error
    if RANK == 0:
        for old in checkpoints(out)[:-2]:
            remove(old)
    barrier(f"saved {step}")


def load_checkpoint(run, step):
    folder, state = run.args.out / f"checkpoint/{step:08d}", state_of(run)
    try:
        dcp.load(state, checkpoint_id=folder)
    except dcp.CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]
        fail(f"{folder} cannot be read ({reason!r}); remove it to resume from the one before")
    set_state_dict(run.trained, run.optimizer,
                   model_state_dict=state["model"], optim_state_dict=state["optimizer"],
                   options=StateDictOptions(strict=False))  # what is frozen is not there


def save_model(run):
    """The final model as a Hugging Face folder, in the precision of π_ref's file, or wider if --dtype is."""
    policy, args = run.policy, run.args
    dtype = torch.promote_types(policy.saved_dtype, getattr(torch, args.dtype))
    if args.lora:  # a weight and its small addition, summed in bf16, would be the weight again
        dtype = torch.float32
    # all processes go through full_weights, which gathers; the first one keeps the tensors
    weights = {name: tensor.cpu() for name, tensor in policy.full_weights(dtype) if RANK == 0}
    if RANK == 0:
        with atomic_write(args.out / "model") as aside:
            policy.model.save_pretrained(aside, state_dict=weights)
            policy.config.dtype = dtype  # save_pretrained wrote that of the masters, fp32
            policy.config.save_pretrained(aside)
            run.tokenizer.save_pretrained(aside)
            for name in FOR_IMAGES:  # without them vLLM does not load a model that could see
                source = None
                with suppress(OSError):
                    source = cached_file(args.model, name, revision=args.revision,
                                         _raise_exceptions_for_missing_entries=False)
                if source:
                    shutil.copyfile(source, aside / name)
    barrier("model saved")


FOR_IMAGES = "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"


def read_metrics(path, start):
    """The rows of metrics.jsonl up to the checkpoint; what was logged after it will be logged again."""
    history = []
    if start and path.exists():
        text = path.read_text(encoding="utf-8", errors="replace")
        for number, line in enumerate(text.splitlines(), 1):
            try:
                history.append(json.loads(line))
            except ValueError:  # the torn last line of a killed run, or a broken disk
                tqdm.write(f"{path}, line {number}: not readable, left out")
    history = [row for row in history if row["step"] <= start]
    write_rows(path, history)
    return history


# -----------------------------------------------------------------------------------------------------------
# what a person sees


STEP = ("push", "sampling", "reference", "update")  # push: the engine takes the weights, and rests
PHASES = (*STEP, "evaluation", "saving")


class Log:
    """What the loop need not know: seconds, metrics.jsonl, the bar, shown samples, warnings, signals."""

    def __init__(self, run, start):
        args = self.args = run.args
        self.run, self.seconds, self.memory = run, Counter(), 0
        self.signals, self.already_warned = [], set()
        self.zero_one = True  # are all rewards seen 0 or 1? Some warnings hold for these alone
        self.history = read_metrics(args.out / "metrics.jsonl", start) if RANK == 0 else []
        self.bar = tqdm(desc="Stage 2", total=args.steps, initial=start, disable=RANK > 0)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.on_signal)
        self.wandb = importlib.import_module("wandb") if args.wandb and RANK == 0 else None
        if self.wandb:
            self.wandb.init(project=args.wandb, config=vars(args))

    @contextmanager
    def phase(self, name):
        began = time.perf_counter()
        yield
        if self.run.device.type == "cuda":
            torch.cuda.synchronize()
            free, total = torch.cuda.mem_get_info()  # unlike torch's own count it sees that vLLM sleeps
            self.memory = max(self.memory, total - free)
        else:
            self.memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.seconds[name] += time.perf_counter() - began

    def on_signal(self, number, _):
        say = lambda text: os.write(2, text) if RANK == 0 else None  # not print: it may have interrupted one
        if not self.signals:
            say(b"\nstopping after this step\n")
        elif signal.SIGINT in (number, *self.signals):  # a second Ctrl-C; torchrun sends SIGTERM in its place
            say(b"\nended at once; the same command resumes from the last checkpoint\n")
            os._exit(128 + number)
        self.signals.append(number)

    def asked_to_stop(self):
        return sum_over_ranks(len(self.signals)) > 0

    def __call__(self, row, samples=(), constants=None):
        """A row of metrics.jsonl, and what a person sees of it."""
        if RANK > 0:
            return
        if samples:
            generated = row["length"] * self.args.batch_size * self.run.objective.completions
            seconds = sum(self.seconds[phase] for phase in STEP)
            row["tokens_per_second"] = round(generated / seconds)
            row["memory_gb"] = round(self.memory / 2**30, 3)
        # a checkpoint is saved after its step's row, so its seconds stand in the next
        row["seconds"] = {phase: round(self.seconds[phase], 3) for phase in PHASES}
        self.seconds.clear()
        self.history.append(row)
        with open(self.args.out / "metrics.jsonl", "a", encoding="utf-8") as file:
            print(json.dumps(row), file=file)
        if self.wandb:
            self.wandb.log(row, step=row["step"])
        if samples:
            self.show(row, samples, constants)

    def show(self, metrics, samples, constants):
        """The bar's figures; now and then a sample (all of the process go to samples/); each warning once."""
        step, evaluated = metrics["step"], [row for row in self.history if "accuracy" in row]
        figures = [f"reward {metrics['reward']:.3f}", f"KL {metrics['kl']:.2f}"]
        if evaluated:
            key = "held_out_reward" if self.args.reward else "accuracy"
            figures.insert(1, f"held-out {evaluated[-1][key]:.3f}")
        self.bar.set_postfix_str(", ".join(figures), refresh=False)
        self.bar.update()
        every = self.args.show_every
        if every and (step in (1, self.args.steps) or step % every == 0):
            self.show_sample(step, samples[0])
            rows = []
            for sample, ref_logp in zip(samples, constants["ref_logp"].sum(-1).tolist()):
                row = {key: sample.problem[key] for key in ("id", "prompt", "vstar")}
                row |= dict(response=sample.response, reward=sample.reward)
                # with the engine's ln π, good to `mismatch`
                rows.append(row | dict(log_ratio=sum(sample.completion.logps) - ref_logp))
            write_rows(self.args.out / f"samples/{step:06d}.jsonl", rows)
        for sample in samples:
            self.zero_one &= {sample.reward, *sample.problem["rewards"]} <= {0, 1}
        most_reward = self.run.objective.most_reward if self.zero_one else None
        for name, text in diagnose(self.history, self.args, most_reward).items():
            if name not in self.already_warned:
                self.already_warned.add(name)
                self.bar.write(f"warning: {text}")

    def keep_held_out(self, step, samples):
        """The completions of all processes, by the problems' ids."""
        if not self.args.show_every:
            return
        rows = [dict(id=sample.problem["id"], prompt=sample.problem["prompt"], response=sample.response,
                     reward=sample.reward) for sample in samples]
        of_processes = [rows] * WORLD
        if WORLD > 1:
            dist.all_gather_object(of_processes, rows)
        if RANK == 0:
            rows = sorted(sum(of_processes, []), key=lambda row: row["id"])
            write_rows(self.args.out / f"samples/{step:06d}.held_out.jsonl", rows)

    def show_sample(self, step, sample):
        problem, vstar = sample.problem, sample.problem["vstar"]
        cut = "" if sample.completion.finished else " … (cut off)"
        if self.args.reward:
            verdict = f"reward {sample.reward:g}"
        else:
            verdict = "right" if sample.reward >= 1 else "wrong"
            verdict += f", the answer is {readable(problem['answer'])}"
        self.bar.write(f"── step {step}: {readable(problem['prompt'])}\n{readable(sample.response)}{cut}\n"
                       f"── {verdict}; V̂* {vstar:.2f}, advantage {sample.reward - vstar:+.2f}")

    def draw_curves(self):
        """Over steps above, over seconds below."""
        if RANK == 0:
            seconds = [sum(row["seconds"].values()) for row in self.history]
            clock = np.cumsum(seconds)
            rows = [dict(row, seconds=seconds) for row, seconds in zip(self.history, clock)]
            panels = [["reward", "accuracy", "held_out_reward"], ["kl"], ["loss"], ["length"]]
            picture(self.args.out / "curves.png", rows, ["step", "seconds"], panels)

    def stopped(self, step):
        """→ the exit code, as of a process that a signal ended"""
        self.bar.close()
        if self.wandb:
            self.wandb.finish()  # run_script may end the process at once
        if RANK == 0:
            print(f"stopped and saved after step {step}; the same command resumes from here")
        return 128 + (self.signals or [signal.SIGTERM])[0]

    def report(self, problems):
        """Accuracy before and after, and where the model lies."""
        self.bar.close()
        if RANK > 0:
            return
        evaluated = [row for row in self.history if "accuracy" in row]
        for label, row in [("before", evaluated[0]), ("after", evaluated[-1])] if evaluated else []:
            share, half = accuracy_and_interval(row, problems)
            line = f"{label:7s} held-out accuracy {share:.3f} ± {half:.3f} (95 %, {problems} problems)"
            if "held_out_reward" in row:
                line += f"; right: a reward of at least 1; mean reward {row['held_out_reward']:.3f}"
            print(line)
        for name, text in nothing_learned(self.history, problems).items():
            if not {name, "saturated"} & self.already_warned:
                print(f"warning: {text}")
        out = self.args.out
        print(f"→ {out}/curves.png, {out}/metrics.jsonl and the model:\n"
              f"  AutoModelForCausalLM.from_pretrained(\"{out}/model\")   or   vllm serve {out}/model")


def accuracy_and_interval(row, problems):
    return mean_and_interval(np.arange(problems) < round(row["accuracy"] * problems))


def nothing_learned(rows, problems):
    """What a run that came to nothing says at its end: {name: cause and remedy}; problems: those held out"""
    steps = [row for row in rows if row["step"] > 0]
    evaluated = [row for row in rows if "accuracy" in row]
    if not steps:
        return {}
    if steps[-1]["log_ratio_abs"] < 0.01:
        return {"still": "the policy did not move: in the last step |ln π/π_ref| was still "
                         f"{steps[-1]['log_ratio_abs']:.1g}. Take more steps, raise --lr, or lower --beta2 "
                         "if it is large."}
    rewards = np.array([row["reward"] for row in steps])
    few = max(1, min(10, len(steps) // 2))
    compared = {"reward": [mean_and_interval(rewards[:few]), mean_and_interval(rewards[-few:])]}
    if len(evaluated) > 1:
        compared["held-out accuracy"] = [accuracy_and_interval(evaluated[i], problems) for i in (0, -1)]
    for (before, half), (after, other_half) in compared.values():
        if after - before > math.hypot(half, other_half):  # their difference's 95 % interval is above 0
            return {}
    numbers = ", ".join(f"{name} {before:.3f} → {after:.3f}"
                        for name, ((before, _), (after, _)) in compared.items())
    return {"flat": f"nothing rose by more than its noise ({numbers}). Does the reward see what is right? "
                    "Look at samples/. If so, take more steps or a larger --lr."}


def diagnose(rows, args, most_reward=1.0):
    """The known illnesses that the metrics so far show: {name: cause and remedy}.

    most_reward: the largest that can be gained; None: not known, as rewards are not 0 or 1
    """
    rows = [row for row in rows if row["step"] > 0]
    found = {}
    if len(rows) < 10:
        return found
    mean = lambda key, at: float(np.mean([row[key] for row in rows[at : at + 10]]))
    before = lambda key: mean(key, 0)
    now = lambda key: mean(key, len(rows) - 10)
    best = max(mean("reward", at) for at in range(len(rows) - 9))
    # above 15 % --filter pays (experiments/). Of fewer than 4 completions none is right too often
    if now("unsolved") > 0.15 and most_reward and args.samples >= 4:
        found["unsolved"] = (
            f"{now('unsolved'):.0%} of the prompts were never solved by π_ref in Stage 1, so there is little "
            "to learn from and the loss stays. Does the checker misread the responses (look at some)? "
            "Otherwise take easier problems, or leave these out: --filter unsolved.")
    first = lambda key: float(np.mean([row[key] for row in rows[:3]]))
    # the engine went away from π as π went away from π_ref; rounding grows far less
    moved = now("reference_mismatch") - first("reference_mismatch")
    if moved > 4 * first("reference_mismatch") and now("mismatch") - first("mismatch") > 0.4 * moved:
        found["stale"] = (
            f"the engine's log-probabilities leave the policy's ({first('mismatch'):.1g} → "
            f"{now('mismatch'):.1g} nats a token) nearly as fast as the policy leaves π_ref: a part of its "
            "weights stays old. Take --engine transformers.")
    grows = now("length") > before("length")
    if before("finished") < 0.2 and now("finished") < 0.2:
        found["no EOS"] = (
            "nearly no completion ends with EOS; without --reward such completions earn 0. Does the prompt "
            "fit the model (--chat for chat models)? Otherwise raise --max_new_tokens. Both are Stage 1's "
            "flags.")
    elif now("finished") < min(0.8, before("finished") - 0.15) and grows:
        found["cut off"] = (
            f"completions grow until they are cut off: {before('finished'):.0%} ended with EOS, now "
            f"{now('finished'):.0%}. Raise --beta2, or Stage 1's --max_new_tokens.")
    if before("reward") > 0.95 and most_reward:
        found["saturated"] = (
            f"π_ref already earns {before('reward'):.2f}: nothing is left to learn. Take harder problems.")
    elif len(rows) >= 30 and now("log_ratio_abs") < 0.01:
        found["still"] = (
            f"the policy does not move: after {rows[-1]['step']} steps |ln π/π_ref| is "
            f"{now('log_ratio_abs'):.1g}. Raise --lr, or lower --beta2 if it is large.")
    # π* ∝ π_ref exp(r/β2) trades at most so much of reward for KL; beyond it the policy is worse than π_ref
    if most_reward and now("kl") * args.beta2 > most_reward:
        found["runaway"] = (
            f"the KL to π_ref runs away: {now('kl'):.1f}, and no reward is worth more than "
            f"{most_reward:g}/β2 = {most_reward / args.beta2:g}. Lower --lr, or use more --warmup.")
    if best > 0.1 and now("reward") < 0.6 * best:
        found["collapse"] = (
            f"the reward fell from {best:.2f} to {now('reward'):.2f}. Lower --lr, or raise --beta2 or "
            "--batch_size.")
    return found


if __name__ == "__main__":
    run_script(main)
