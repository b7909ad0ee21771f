"""What a run will hold in memory and how long it takes at least, before a GPU is asked for.   (--plan of vstar.py and train.py)

From the model's config alone: no weights are loaded. The weights, gradients and optimizer states of each GPU are counted; the
activations are not a formula but this code run on fake tensors, so they hold for any architecture. Times are floors, from the
bytes and the floating-point operations that cannot be avoided and the GPU's data sheet: a real run takes longer.

    python train.py --model Qwen/Qwen2.5-7B --plan 8xH100
"""

import argparse
import math
import re
import weakref
from dataclasses import dataclass
from functools import cache

import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rewards import fail
from vstar import WORLD, pick_engine

# memory in GiB, dense bf16 FLOP/s, bytes/s of memory, and to other GPUs of the node (one way), from the makers' data sheets
GPUS = {"A100": (80, 312e12, 2.04e12, 300e9), "H100": (80, 989e12, 3.35e12, 450e9), "H200": (141, 989e12, 4.8e12, 450e9),
        "B200": (180, 2250e12, 8.0e12, 900e9)}
NETWORK, NODE = 50e9, 8  # bytes/s of a GPU's card to other nodes (400 Gb/s), GPUs of a node
OVERHEAD = 2.0  # GiB that CUDA, its libraries and NCCL take, and what fragments


class Live(TorchDispatchMode):
    """The bytes of the tensors that were made while it is active and still live: now, and at the most."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.seen = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self.seen:
                storage = tensor.untyped_storage()
                self.seen[storage] = size = storage.nbytes()
                self.now += size
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.gone, size)
        return out

    def gone(self, size):
        self.now -= size


@dataclass(eq=False)
class Shape:
    config: transformers.PretrainedConfig
    total: int  # parameters
    block: int  # of the largest block
    rest: int  # of what lies in no block: embeddings, head, last norm
    read: int  # of what a token's step reads: all but a table of embeddings that is not the head too


def load_shape(args):
    try:
        config = transformers.AutoConfig.from_pretrained(args.model, revision=args.revision)
    except (OSError, ValueError) as error:
        fail(f"--model {args.model}: {error}")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    count = lambda module: sum(p.numel() for p in module.parameters())
    blocks = [count(m) for m in model.modules() if type(m).__name__ in set(model._no_split_modules or [])]
    total, table = count(model), model.get_input_embeddings().weight
    read = total - (0 if model.get_output_embeddings().weight is table else table.numel())
    return Shape(config, total, max(blocks, default=0), total - sum(blocks), read)


@cache
def activations(shape, dtype, rows, width, recompute, gpu):
    """Bytes that a micro-batch's forward and backward pass add at the most to weights and gradients; and of these what is kept
    from the forward pass for the backward pass, and what the head's chunk adds to that."""
    from train import Policy, checkpoint

    with FakeTensorMode(), Live() as live:
        policy = Policy(transformers.AutoModelForCausalLM.from_config(shape.config, dtype=dtype), recompute)
        for parameter in policy.parameters():  # each gradient leaves as soon as it is whole; gradients are counted elsewhere
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        for block in policy.blocks:
            block.training = recompute
        held, ids = live.now, torch.zeros(rows, width, dtype=torch.long)
        hidden = policy.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        kept = live.now - held
        live.most = live.now
        leaf = hidden.detach().reshape(-1, hidden.shape[-1]).requires_grad_()
        targets, chunk = ids.reshape(-1), policy.chunk(gpu)
        torch.cat([checkpoint(policy.head, s, t, 1.0, use_reentrant=False)
                   for s, t in zip(leaf.split(chunk), targets.split(chunk))]).sum().backward()
        head = live.most - held - kept
        live.most, gradient = live.now, leaf.grad
        hidden.backward(gradient.view_as(hidden))
        return max(kept + head, live.most - held), kept, head


def sampler_bytes(shape, dtype, rows, width):
    """The transformers engine: keys and values of all rows at their longest, one layer's once more, for each head (that is how
    transformers attends where rows are padded), and two steps' logits."""
    text = shape.config.get_text_config()
    one_layer = 2 * text.num_attention_heads * head_size(text) * dtype.itemsize
    return rows * (width * (cache_per_token(shape, dtype) + one_layer) + text.vocab_size * (3 * dtype.itemsize + 4))


def head_size(text):
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def cache_per_token(shape, dtype):
    text = shape.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * head_size(text) * dtype.itemsize


def forward_flops(shape, rows, prompt, answer):
    """Two per token and weight of the blocks, two per token of an answer and weight of the head, and the attention."""
    text, width = shape.config.get_text_config(), prompt + answer
    inner = text.num_attention_heads * head_size(text)
    attention = 2 * text.num_hidden_layers * inner * width**2  # scores and values, of half the square each
    return rows * (2 * (shape.total - shape.rest) * width + 2 * text.vocab_size * text.hidden_size * answer + attention)


def memory(shape, args, ranks, gpu, dtype, width):
    """GiB on each process in Stage 2: {part: GiB}; `gpu` is a name in GPUS or None."""
    total, block, rest = shape.total, shape.block, shape.rest
    sharded, recompute = dtype != torch.float32 or ranks > 1, args.checkpoint_activations == "yes" or (
        args.checkpoint_activations == "auto" and gpu is not None)
    learners = 2 if args.algo == "ppo" else 1
    rows = max(1, args.tokens_per_microbatch // width)
    most, kept, head = activations(shape, dtype, rows, width, recompute, gpu is not None)
    b = dtype.itemsize
    # FSDP: a block and the next are gathered, and what lies in no block; their gradients wait in `dtype` and fp32 for the sum
    gathered = (b * (2 * block + rest) + (b + 4) * (block + rest)) if sharded else 0
    if gpu and args.engine != "transformers":  # vLLM, asleep during the update
        sampling = args.gpu_memory * GPUS[gpu][0] * 2**30
    else:
        sampling = (b * total if sharded else 0) + sampler_bytes(shape, dtype, args.batch, width)
    parts = {"weights (fp32)": 4 * total * learners / ranks, "gradients (fp32)": 4 * total * learners / ranks,
             "AdamW (fp32)": 8 * total * learners / ranks,
             "reference": 0 if args.offload_reference and gpu else b * total / ranks,
             "gathered by FSDP": gathered, "kept activations": kept, "head's chunk, or a block at work": most - kept,
             "sampling": sampling}
    return {name: size / 2**30 for name, size in parts.items()}


def peak(parts):
    """Nothing of the update is there while sampling, nor the other way round."""
    update = sum(parts[name] for name in ("gradients (fp32)", "gathered by FSDP", "kept activations",
                                          "head's chunk, or a block at work"))
    always = sum(parts[name] for name in ("weights (fp32)", "AdamW (fp32)", "reference"))
    return always + max(update, parts["sampling"])


def step_floor(shape, args, ranks, gpu, dtype, prompt, answer, longest):
    """Seconds that a step takes at least on each of `ranks` GPUs: {phase: seconds}"""
    from train import needs_old_logp

    _, flops, bandwidth, nvlink = GPUS[gpu]
    answers = args.batch_size * args.group / ranks
    waves = math.ceil(answers / args.batch) if args.engine == "transformers" else 1
    cache = cache_per_token(shape, dtype)
    # beyond a node the ring runs through all of its network cards at a time
    link = nvlink if ranks <= NODE else min(nvlink, NODE * NETWORK)
    ring = shape.total * (ranks - 1) / ranks / link  # seconds in which every GPU gets all weights, if they had one byte each
    # each token's step reads the weights once for all rows, and each row's keys and values; before that they are gathered
    sampling = (waves * longest * dtype.itemsize * shape.read + answers * answer * cache * (prompt + answer / 2)) / bandwidth
    sampling += (dtype.itemsize if args.engine == "transformers" else 4) * ring
    tokens = answers * (prompt + answer)
    forward = forward_flops(shape, answers, prompt, answer) / flops
    learners = 2 if args.algo == "ppo" else 1  # a critic of the policy's size
    known = needs_old_logp(args) + (args.algo == "ppo")  # old_logp; the critic's values
    passes = 4 if args.checkpoint_activations != "no" else 3  # forward, again for the backward pass, and that is twice a forward
    micro = math.ceil(max(1.0, tokens / args.tokens_per_microbatch))
    # FSDP: weights gathered for the forward and for the backward pass, fp32 gradients summed and spread; π_ref's weights too
    traffic = micro * (args.passes * learners * (2 * dtype.itemsize + 4) + (1 + known) * dtype.itemsize) * ring
    return {"sampling": sampling, "reference": (1 + known) * forward, "update": args.passes * learners * passes * forward,
            "communication": traffic}


def read_machine(text):
    """'8xH100' → (8, 'H100'); '' is this machine."""
    if not text:
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        text = f"{WORLD}x{next((gpu for gpu in GPUS if gpu in name), 'CPU')}"
    found = re.fullmatch(r"(?:(\d+)x)?(\w+)", text)
    if not found or found[2].upper() not in {*GPUS, "CPU"} or found[1] == "0":
        fail(f"--plan {text}: say how many of which, as in 8xH100 (known: {', '.join(GPUS)}, CPU)")
    return int(found[1] or 1), found[2].upper()


def plan_training(args, prompt, answer):
    """Prints what train.py will need; prompt and answer: mean tokens."""
    ranks, gpu = read_machine(args.plan)
    shape, on_gpu = load_shape(args), gpu != "CPU"
    if args.engine == "auto":
        args.engine = ("vllm" if on_gpu else "transformers") if args.plan else pick_engine("auto")[0]
    dtype = torch.bfloat16 if args.dtype == "auto" and on_gpu else getattr(torch, args.dtype.replace("auto", "float32"))
    width = math.ceil(prompt) + args.max_new_tokens
    parts = memory(shape, args, ranks, gpu if on_gpu else None, dtype, width)
    print(f"{args.model}: {shape.total:,} parameters, --algo {args.algo}, {ranks} × {gpu}, computed in {str(dtype)[6:]}, "
          f"--engine {args.engine}; planned, not measured\n\non each " + ("GPU" if on_gpu else "process"))
    for name, size in parts.items():
        print(f"  {name:34s}{size:9.2f} GiB")
    print(f"  {'at the most at a time':34s}{peak(parts):9.2f} GiB" + (
        f" and about {OVERHEAD:g} for CUDA and NCCL, of {GPUS[gpu][0]}" if on_gpu else ""))
    if on_gpu:
        print(remedy(shape, args, ranks, gpu, dtype, width))
        floor = step_floor(shape, args, ranks, gpu, dtype, prompt, answer, args.max_new_tokens)
        seconds = sum(value for name, value in floor.items() if name != "communication")
        print(f"\na step of {args.batch_size * args.group} answers ({prompt:.0f} + {answer:.0f} tokens), at least: " + ", ".join(
            f"{name} {value:.2f} s" for name, value in floor.items()))
        compute = floor["reference"] + floor["update"]
        if ranks > 1:
            print(f"communication is {'hidden behind' if floor['communication'] < compute else 'more than'} the computing"
                  f" ({floor['communication'] / compute:.1f} of it)")
        if args.steps:
            hours = args.steps * max(seconds, floor["sampling"] + floor["communication"]) / 3600
            print(f"{args.steps} steps: at least {hours:.2f} h, {hours * ranks:.1f} GPU hours")


def vllm_share(shape, gpu, dtype):
    """The least --gpu_memory: the model and a tenth for keys and values."""
    return math.ceil(110 * dtype.itemsize * shape.total / 2**30 / GPUS[gpu][0]) / 100


def remedy(shape, args, ranks, gpu, dtype, width):
    """Does it fit, and up to which --tokens_per_microbatch? If not, what would make it fit?"""

    room, vllm, weights = GPUS[gpu][0], args.engine != "transformers", dtype.itemsize * shape.total / 2**30

    def parts(count=ranks, **changes):
        return memory(shape, argparse.Namespace(**{**vars(args), **changes}), count, gpu, dtype, width)

    def fits(count=ranks, **changes):
        share = changes.get("gpu_memory", args.gpu_memory)
        return peak(parts(count, **changes)) + OVERHEAD <= room and (not vllm or share * room >= 1.05 * weights)

    if weights + OVERHEAD > room:
        return f"it does not fit: for sampling each GPU holds the whole model, which is {weights:.0f} GiB"
    if fits():
        update = lambda budget: peak(dict(parts(tokens_per_microbatch=budget), sampling=0)) + OVERHEAD
        slope = (update(4 * args.tokens_per_microbatch) - update(args.tokens_per_microbatch)) / 3 / args.tokens_per_microbatch
        budget = args.tokens_per_microbatch + (room - update(args.tokens_per_microbatch)) / slope if slope else math.inf
        return "it fits" + (f"; so would about --tokens_per_microbatch {budget:,.0f}" if budget < 2**20 else "")
    smaller = dict(tokens_per_microbatch=width)
    other = dict(gpu_memory=vllm_share(shape, gpu, dtype)) if vllm else dict(batch=max(1, args.batch // 8))
    cheapest_first = [dict(checkpoint_activations="yes"), smaller, other, {**smaller, **other}, dict(offload_reference=True),
                      {**smaller, **other, "offload_reference": True}]
    more = [(count, changes) for count in (2**k for k in range(1, 11)) if count > ranks for changes in ({}, other)]
    for count, changes in [(ranks, changes) for changes in cheapest_first] + more:
        if fits(count, **changes):
            named = [f"--{key}" + (f" {value}" if value is not True else "") for key, value in changes.items()]
            return "it does not fit; it would with " + " ".join([f"{count} GPUs" + " and" * bool(named)] * (count > ranks) + named)
    return "it does not fit, on any number of GPUs: what is gathered at a time is too large. A smaller model or larger GPUs"


def plan_stage1(args, count, prompt):
    """Prints what vstar.py will need for `count` problems."""
    ranks, gpu = read_machine(args.plan)
    shape = load_shape(args)
    dtype = torch.bfloat16 if args.dtype == "auto" and gpu != "CPU" else getattr(torch, args.dtype.replace("auto", "float32"))
    total, width, answer = shape.total, math.ceil(prompt) + args.max_new_tokens, args.max_new_tokens / 2
    weights = dtype.itemsize * total / 2**30 / args.tensor_parallel
    work = sampler_bytes(shape, dtype, args.batch, width) / 2**30
    print(f"{args.model}: {total:,} parameters, {ranks} × {gpu}, {str(dtype)[6:]}; planned, not measured\n\non each\n"
          f"  {'weights':34s}{weights:9.2f} GiB\n  {f'transformers: --batch {args.batch} at work':34s}{work:9.2f} GiB")
    if gpu == "CPU":
        return
    room = args.gpu_memory * GPUS[gpu][0] - weights
    at_once = int(room * 2**30 / (width * cache_per_token(shape, dtype) / args.tensor_parallel))
    print(f"  {'left to vLLM for keys and values':34s}{room:9.2f} GiB   ({max(0, at_once):,} answers of full length at a time)")
    if room <= 0:
        need = 2 ** math.ceil(math.log2(weights * args.tensor_parallel / (args.gpu_memory * GPUS[gpu][0])))
        print(f"it does not fit; it would with --tensor_parallel {need}")
        return
    print("it fits" if weights + work + OVERHEAD <= GPUS[gpu][0] else "it fits with vLLM; for transformers lower --batch")
    engines, answers = max(1, ranks // args.tensor_parallel), count * args.n
    at_once = max(1, min(at_once, 1024))  # vLLM's bound on GPUs of this size
    # as one ends the next takes its place, and no answer is shorter than itself
    steps = max(args.max_new_tokens, answers / engines * answer / at_once)
    cache, read = cache_per_token(shape, dtype) / args.tensor_parallel, dtype.itemsize * shape.read / args.tensor_parallel
    read = steps * read + answers / engines * answer * cache * (prompt + answer / 2)
    compute = forward_flops(shape, answers / engines, 0, answer) / args.tensor_parallel
    hours = max(read / GPUS[gpu][2], compute / GPUS[gpu][1]) / 3600
    print(f"\n{answers:,} answers of {answer:.0f} tokens, {at_once:,} at a time: at least {60 * hours:.1f} minutes, "
          f"{hours * ranks:.2f} GPU hours")
