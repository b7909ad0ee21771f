"""What Stage 2 will hold in memory and how long a step takes at least, before a GPU is asked for.

    python -m experiments.plan 8xH100 --model Qwen/Qwen2.5-7B                           with train.py's flags
    python -m experiments.plan 8xH100 --algorithm grpo --model Qwen/Qwen2.5-7B          with a baseline's, too
    python -m experiments.plan --vstar out/vstar.jsonl     on a CPU; model and lengths are Stage 1's

It needs a model's config: --model, and then --prompt_tokens and --answer_tokens say how long texts are; or
--vstar, what Stage 1 wrote. There is no plan of Stage 1: it holds the model once, and what --decode_rows or
--gpu_memory lets it take.

It reads the model's config alone and loads no weights. The weights, gradients and optimizer states of each
GPU are counted. The activations are not a formula but this code run on fake tensors, so they hold for any
architecture. Times are floors, from the bytes and operations that cannot be avoided and the GPU's data sheet.
A real run takes longer, and several nodes communicate more slowly than one.
"""

import argparse
import math
import re
import sys
from argparse import Namespace
from dataclasses import dataclass
from functools import cache
from weakref import WeakSet, finalize

import numpy as np
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import train
import vstar
from experiments.baselines import ALGORITHMS
from rewards import fail
from train import APO, LoraPolicy, Policy, Sample
from vstar import Completion, run_script

# memory in GiB, dense bf16 FLOP/s, bytes/s of memory, and (one way) to other GPUs of the node, by the makers'
# data sheets
GPUS = {"A100": (80, 312e12, 2.04e12, 300e9),
        "H100": (80, 989e12, 3.35e12, 450e9),
        "H200": (141, 989e12, 4.8e12, 450e9),
        "B200": (180, 2250e12, 8.0e12, 900e9),
        "A2": (16, 18e12, 200e9, 16e9),  # this one and those below are on PCIe
        "L4": (24, 121e12, 300e9, 32e9),
        "L40S": (48, 362e12, 864e9, 32e9)}
OVERHEAD = 2.0  # GiB that CUDA, its libraries and NCCL take, and what fragments
OBJECTIVES = {APO.name: APO, **ALGORITHMS}


def main():
    args = parse_args()
    if args.model is None and not args.vstar.exists():
        fail(f"which model? Name it with --model, or what Stage 1 wrote with --vstar ({args.vstar}: no such "
             "file)")
    if args.model is None:
        prompt, completion = lengths_of_stage1(args)
    else:
        prompt, completion = 200, args.max_new_tokens / 2
    prompt = args.prompt_tokens or prompt
    completion = args.answer_tokens or completion
    settle(args, prompt)
    show(args, OBJECTIVES[args.algorithm](args), prompt, completion)


def parse_args():
    """The machine, the algorithm, and the flags of train.py or of a baseline."""
    named = len(sys.argv) > 1 and sys.argv[1][0] != "-"
    ranks, gpu = read_machine(sys.argv.pop(1) if named else "CPU")
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--algorithm", choices=OBJECTIVES, default="apo")
    first.error = fail
    chosen, sys.argv[1:] = first.parse_known_args()
    parser = train.make_parser(OBJECTIVES[chosen.algorithm])
    parser.description = ("What Stage 2 will hold in memory and how long a step takes at least. It needs "
                          "--model, or what Stage 1 wrote (--vstar). The flags are those of training.")
    parser.prog = f"python -m experiments.plan [8xH100] [--algorithm {'|'.join(OBJECTIVES)}]"
    parser.set_defaults(temperature=1.0)
    add = parser.group("the plan")
    add("--model", str, "a Hugging Face model folder or hub id; default: Stage 1's, as all that follows")
    add("--revision", str, "branch, tag or commit on the hub")
    add("--max_new_tokens", 1024, "of an answer, at the most")
    add("--prompt_tokens", float, "mean tokens of a prompt; default: 200, where --model is given")
    add("--answer_tokens", float, "mean tokens of an answer; default: half of --max_new_tokens, likewise")
    args = vstar.read_flags(parser, "train")
    vars(args).update(vars(chosen), ranks=ranks, gpu=gpu)
    return args


def lengths_of_stage1(args):
    """Mean tokens of a prompt and of a completion. `args` gets the rest from Stage 1, as in training."""
    problems = train.settle(args, *train.read_stage1(args))
    vstar.add_prompts(problems, args)
    prompts = [len(problem["tokens"]) for problem in problems]
    return np.mean(prompts), np.mean([problem["lengths"] for problem in problems])


def settle(args, prompt):
    """Sets args.dtype, args.engine, args.lr, and args.width: the tokens of the longest row."""
    if args.dtype == "auto":
        args.dtype = "bfloat16" if args.gpu in GPUS else "float32"
    args.width = math.ceil(prompt) + args.max_new_tokens
    args.lr = args.lr or 1e-6  # a baseline asks for it
    if args.engine == "auto":
        args.engine = "vllm" if args.gpu in GPUS else "transformers"


def read_machine(text):
    """'8xH100' → (8, 'H100'); 'CPU' → (1, 'CPU')"""
    found = re.fullmatch(r"(?:([1-9]\d*)x)?(\w+)", text)
    if not found or found[2] not in {*GPUS, "CPU"}:
        fail(f"{text}: say how many of which, as in 8xH100 (known: {', '.join(GPUS)}, CPU)")
    return int(found[1] or 1), found[2]


def show(args, objective, prompt, completion):
    """Prints what a run will need; prompt and completion: mean tokens."""
    shape = load_shape(args.model, args.revision)
    parts = memory(shape, args, objective)
    print(f"{args.model}: {shape.total:,} parameters, {args.ranks} × {args.gpu}, "
          f"--algorithm {objective.name}, {args.dtype}, --engine {args.engine}")
    print("planned, not measured, on each:")
    for name, size in parts.items():
        print(f"  {name:24s}{size:9.2f} GiB")
    print(f"  {'at the most at a time':24s}{peak(parts):9.2f} GiB")
    print(f"host memory: {2 * shape.total / 2**30:.1f} GiB a process, while it reads the model")
    if args.gpu not in GPUS:
        return
    print(verdict(shape, args, objective))
    if args.recompute == "auto" and shape.blocks:
        kept, awake = kept_blocks(shape, args, objective)
        print(f"of {shape.blocks} blocks {kept} keep their activations"
              + ", and vLLM stays awake" * awake + ": as far as nine tenths of the memory go")
    floor = step_floor(shape, args, objective, prompt, completion)
    answers = args.batch_size * objective.completions
    print(f"\na step of {answers} answers ({prompt:.0f} + {completion:.0f} tokens), at least: "
          + ", ".join(f"{name} {value:.2f} s" for name, value in floor.items()))
    # communication can hide behind the computing
    work = floor["sampling"] + max(floor["reference"] + floor["update"], floor["communication"])
    if args.steps:
        print(f"{args.steps} steps: at least {args.steps * work / 3600:.2f} h")


def networks_of(objective):
    """→ how many networks an objective trains, and how many it runs over the completions before the update.

    The objective itself is asked, with stand-ins for networks. So this holds for all of them.
    """
    asked = set()

    def stand_in(name):
        def network(input_ids, **_):
            asked.add(name)
            return torch.zeros(len(input_ids), input_ids.shape[1] - 1)

        return network

    trained = 1 + len(objective.networks(stand_in))
    sample = Sample(dict(tokens=[0], vstar=0.0), Completion([0], True, [0.0]), "", 0.0, 0)
    run = Namespace(policy=stand_in("policy"), reference=stand_in("reference"), device="cpu")
    objective.constants(run, [sample] * objective.completions)
    return trained, len(asked)


def memory(shape, args, objective):
    """What each process holds: {part: GiB}"""
    total, block, rest = shape.total, shape.block, shape.rest
    dtype, on_gpu = getattr(torch, args.dtype), args.gpu in GPUS
    b = dtype.itemsize
    recompute = args.recompute == "yes" or (args.recompute == "auto" and on_gpu)
    rows = max(1, args.tokens_per_microbatch // args.width)
    added, additions = activations(shape, dtype, rows, args.width, recompute, on_gpu, args.lora)
    trained, _ = networks_of(objective)
    whole = trained - bool(args.lora)  # networks that are trained whole: a critic is
    learned = total * whole + additions
    # as start_process and make_run decide
    sharded = args.ranks > 1 or (whole > 0 and (on_gpu or dtype != torch.float32))
    gathered = 0
    # a block, the next one and what lies in no block; gradients wait in `dtype` and fp32 for their sum
    if sharded:
        gathered = b * (2 * block + rest) + (b + 4) * (block + rest) * (whole > 0)
    if on_gpu and args.engine == "vllm":  # asleep during the update
        sampling = args.gpu_memory * GPUS[args.gpu][0] * 2**30
    else:
        sampling = b * total * sharded + sampler_bytes(shape, args)
    parts = {"weights (fp32)": 4 * learned / args.ranks,
             "gradients (fp32)": 4 * learned / args.ranks,
             "AdamW (fp32)": 8 * learned / args.ranks,
             # with --lora the frozen network that the additions stand on
             "reference": b * total / args.ranks,
             "gathered by FSDP": gathered,
             "activations": added,
             "sampling": sampling}
    return {name: size / 2**30 for name, size in parts.items()}


def peak(parts):
    """Nothing of the update is there while sampling, nor the other way round."""
    always = sum(parts[name] for name in ("weights (fp32)", "AdamW (fp32)", "reference"))
    update = sum(parts.values()) - always - parts["sampling"]
    return always + max(update, parts["sampling"])


def kept_blocks(shape, args, objective):
    """→ how many blocks need not be computed again, and whether vLLM may stay awake, as
    train.use_free_memory decides"""
    parts = memory(shape, args, objective)
    free = 0.9 * GPUS[args.gpu][0] - OVERHEAD - peak(dict(parts, sampling=0))
    awake = args.engine == "vllm" and free > parts["sampling"]
    if awake:
        free -= parts["sampling"]
    if not shape.blocks:  # transformers does not say what they are
        return 0, awake
    rows = max(1, args.tokens_per_microbatch // args.width)
    sizes = [activations(shape, getattr(torch, args.dtype), rows, args.width, recompute, True, args.lora)[0]
             for recompute in (False, True)]
    block = (sizes[0] - sizes[1]) / shape.blocks / 2**30
    return min(shape.blocks, int(max(0, free) / block)), awake


def step_floor(shape, args, objective, prompt, completion):
    """Seconds that a step takes at least on each GPU: {phase: seconds}; prompt and completion: mean tokens"""
    _, flops, bandwidth, link = GPUS[args.gpu]
    b = getattr(torch, args.dtype).itemsize
    rows, vllm = args.batch_size * objective.completions / args.ranks, args.engine == "vllm"
    waves = 1 if vllm else math.ceil(rows / args.decode_rows)
    # seconds in which every GPU gets all weights, at one byte each
    ring = shape.total * (args.ranks - 1) / args.ranks / link
    # a token's step reads the weights once for all rows, and each row's keys and values
    context = rows * completion * (prompt + completion / 2)
    bytes_read = waves * args.max_new_tokens * engine_bytes(args) * shape.read
    bytes_read += context * cache_per_token(shape, engine_bytes(args))
    sampling = bytes_read / bandwidth
    sampling += b * ring  # before that they are gathered
    forward = forward_flops(shape, rows, prompt, completion) / flops
    trained, before = networks_of(objective)  # a critic is of the policy's size
    # forward, again for the backward pass, and that is twice a forward: once for the states, and once for
    # weights that are not frozen
    frozen = bool(args.lora)
    again = dict(no=0, yes=1).get(args.recompute)
    if again is None:
        again = 1 - kept_blocks(shape, args, objective)[0] / max(1, shape.blocks)
    update = trained * (3 + again) - frozen
    # FSDP gathers weights for the forward and the backward pass, π_ref's for its own, and sums fp32 gradients
    micro = math.ceil(max(1.0, rows * (prompt + completion) / args.tokens_per_microbatch))
    traffic = objective.passes * (trained * (2 * b + 4) - 4 * frozen) + before * b
    return {"sampling": sampling,
            "reference": before * forward,
            "update": objective.passes * update * forward,
            "communication": micro * traffic * ring}


def engine_bytes(args):
    """Of a weight while it samples. vLLM gets --lora's merged weights in fp32."""
    return 4 if args.lora and args.engine == "vllm" else getattr(torch, args.dtype).itemsize


def least_share(shape, args):
    """The least --gpu_memory: the model and a tenth for keys and values."""
    return math.ceil(110 * engine_bytes(args) * shape.total / 2**30 / GPUS[args.gpu][0]) / 100


def verdict(shape, args, objective):
    """Does it fit? If not, what would make it fit?"""
    room = GPUS[args.gpu][0] - OVERHEAD

    def need(**changes):
        changed = Namespace(**vars(args) | changes)
        if changed.engine == "vllm" and changed.gpu_memory < least_share(shape, changed):
            return math.inf
        return peak(memory(shape, changed, objective))

    if need() <= room:
        return f"it fits into {room:g} GiB ({OVERHEAD:g} are left to CUDA and NCCL)"
    smaller = dict(tokens_per_microbatch=args.width)
    fewer = dict(decode_rows=max(1, args.decode_rows // 8))
    remedies, sampling = [], fewer
    if args.engine == "vllm":
        sampling = dict(gpu_memory=least_share(shape, args))
        if args.lora:  # of which vLLM holds the merged weights in fp32
            loop = dict(engine="transformers")
            remedies = [loop, loop | fewer, loop | fewer | smaller]
    remedies += [smaller, sampling, smaller | sampling]
    remedies += [dict(ranks=2**k, **more) for k in range(1, 11) for more in ({}, sampling)]
    for changes in remedies:
        if need(**changes) <= room:
            named = " and ".join(f"--{key} {value}" for key, value in changes.items())
            return "it does not fit; it would with " + re.sub(r"--ranks (\d+)", r"\1 GPUs", named)
    return "it does not fit, on any number of GPUs: each samples with the whole model"


# ------------------------------------------------------------------------------------------------------------
# the model: its parameters, its activations, its keys and values


@dataclass(eq=False)
class Shape:
    config: transformers.PretrainedConfig
    total: int  # parameters
    blocks: int  # how many
    block: int  # of the largest block
    rest: int  # of what lies in no block: embeddings, head, last norm
    read: int  # of what a token's step reads: all but a table of embeddings that is not the head too


@cache
def load_shape(model, revision=None):
    config = vstar.from_pretrained(transformers.AutoConfig, model, revision)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    count = lambda module: sum(p.numel() for p in module.parameters())
    of_blocks = model._no_split_modules or []  # the names of their classes
    blocks = [count(module) for module in model.modules() if type(module).__name__ in of_blocks]
    total, table = count(model), model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is table
    read = total - (0 if tied else table.numel())
    return Shape(config, total, len(blocks), max(blocks, default=0), total - sum(blocks), read)


class Live(TorchDispatchMode):
    """The bytes of the tensors that were made while it is active and still live: now, and at the most."""

    def __init__(self):
        super().__init__()
        self.now, self.most, self.seen = 0, 0, WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self.seen:
                storage = tensor.untyped_storage()
                self.seen.add(storage)
                self.count(storage.nbytes())
                finalize(storage, self.count, -storage.nbytes())
        return out

    def count(self, size):
        self.now += size
        self.most = max(self.most, self.now)


@cache
def activations(shape, dtype, rows, width, recompute, gpu, rank):
    """→ the bytes that a micro-batch's forward and backward pass add at the most to weights and gradients,
    and the parameters that --lora adds"""
    with FakeTensorMode(), Live() as live:
        model = transformers.AutoModelForCausalLM.from_config(shape.config, dtype=dtype)
        policy = LoraPolicy(model, rank, dtype, 0, recompute) if rank else Policy(model, recompute)
        learned = [p for p in policy.parameters() if p.requires_grad]
        for parameter in learned:  # a gradient leaves as soon as it is whole: they are counted elsewhere
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        policy.block_bytes = 1  # fake tensors cannot be measured
        before = live.most = live.now
        ids = torch.zeros(rows, width, dtype=torch.long)
        hidden = policy.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        # the head, in chunks as in Policy.forward
        leaf = hidden.detach().reshape(-1, hidden.shape[-1]).requires_grad_()
        targets, chunk = ids.reshape(-1), policy.chunk(gpu)
        logps = [checkpoint(policy.head, s, t, 1.0, use_reentrant=False)
                 for s, t in zip(leaf.split(chunk), targets.split(chunk))]
        torch.cat(logps).sum().backward()
        # and then the blocks
        hidden.backward(leaf.grad.view_as(hidden))
        return live.most - before, sum(p.numel() for p in learned) if rank else 0


def sampler_bytes(shape, args):
    """The transformers engine: keys and values of all rows at their longest, one layer's once more, for each
    head (that is how transformers attends where rows are padded), and two steps' logits."""
    text, b = shape.config.get_text_config(), getattr(torch, args.dtype).itemsize
    one_layer = 2 * text.num_attention_heads * head_size(text) * b
    logits = text.vocab_size * (3 * b + 4)
    return args.decode_rows * (args.width * (cache_per_token(shape, b) + one_layer) + logits)


def head_size(text):
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def cache_per_token(shape, size):
    """The bytes of a token's keys and values, of `size` each."""
    text = shape.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * head_size(text) * size


def forward_flops(shape, rows, prompt, completion):
    """Two per token and weight of blocks, two per completion's token and weight of the head; attention"""
    text, width = shape.config.get_text_config(), prompt + completion
    inner = text.num_attention_heads * head_size(text)
    blocks, head = 2 * (shape.total - shape.rest), 2 * text.vocab_size * text.hidden_size
    attention = 2 * text.num_hidden_layers * inner * width**2  # scores and values, of half the square each
    return rows * (blocks * width + head * completion + attention)


if __name__ == "__main__":
    run_script(main)
