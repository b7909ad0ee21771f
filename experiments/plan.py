"""What a run will hold in memory and how long it takes at least, before a GPU is asked for.

    python -m experiments.plan 8xH100 --model Qwen/Qwen2.5-7B                           Stage 2, with train.py's flags
    python -m experiments.plan 8xH100 --model Qwen/Qwen2.5-7B --stage 1 --data math     Stage 1, with vstar.py's flags
    python -m experiments.plan 8xH100 --model Qwen/Qwen2.5-7B --algorithm grpo          a baseline, with its flags too
    python -m experiments.plan --vstar out/vstar.jsonl             on this machine; model and lengths are Stage 1's

It reads the model's config alone and loads no weights. The weights, gradients and optimizer states of each GPU are
counted. The activations are not a formula but this code run on fake tensors, so they hold for any architecture. Times
are floors, from the bytes and operations that cannot be avoided and the GPU's data sheet: a real run takes longer.
Without a machine it plans for this one, and without any flags for `python train.py`.
"""

import argparse
import math
import re
import weakref
from argparse import Namespace
from dataclasses import dataclass
from functools import cache

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
from rewards import encode, fail
from train import APO, Policy, Sample
from vstar import WORLD, Completion, run_script

# memory in GiB, dense bf16 FLOP/s, bytes/s of memory, and (one way) to other GPUs of the node; the makers' data sheets
GPUS = {"A100": (80, 312e12, 2.04e12, 300e9), "H100": (80, 989e12, 3.35e12, 450e9),
        "H200": (141, 989e12, 4.8e12, 450e9), "B200": (180, 2250e12, 8.0e12, 900e9),
        "A2": (16, 18e12, 200e9, 16e9), "L4": (24, 121e12, 300e9, 32e9), "L40S": (48, 362e12, 864e9, 32e9)}  # by PCIe
NETWORK, NODE = 50e9, 8  # bytes/s of a GPU's card to other nodes (400 Gb/s), GPUs of a node
OVERHEAD = 2.0  # GiB that CUDA, its libraries and NCCL take, and what fragments
OBJECTIVES = {APO.name: APO, **ALGORITHMS}


def main():
    args = parse_args()
    prompt, completion = 200, None
    if args.stage == 2 and args.model is None:
        prompt, completion = lengths_of_stage1(args)
    prompt, completion = args.prompt_tokens or prompt, args.answer_tokens or completion or args.max_new_tokens / 2
    if args.stage == 1:
        plan_stage1(args, args.limit or 1000, prompt, completion)
    else:
        plan_training(args, OBJECTIVES[args.algorithm](args), prompt, completion)


def parse_args():
    """The flags of the script that is planned; what Stage 2 would take from Stage 1; and what is asked of the plan."""

    def add_choice(parser):
        add = parser.add_argument
        add("machine", nargs="?", default="", metavar="8xH100", help=f"{', '.join(GPUS)} or CPU; default: this machine")
        add("--stage", type=int, choices=[1, 2], default=2)
        add("--algorithm", choices=OBJECTIVES, default="apo", help="of Stage 2")
        return parser

    first = add_choice(argparse.ArgumentParser(add_help=False, allow_abbrev=False))
    first.error = fail
    chosen, _ = first.parse_known_args()
    parser = vstar.make_parser() if chosen.stage == 1 else train.make_parser(OBJECTIVES[chosen.algorithm])
    add_choice(parser)
    parser.prog, parser.description = "python -m experiments.plan", __doc__.splitlines()[0]
    add = parser.group("the plan")
    if chosen.stage == 2:
        add("--model", str, "a Hugging Face model folder or hub id; default: Stage 1's, as all that follows")
        add("--revision", str, "branch, tag or commit on the hub")
        add("--max_new_tokens", 1024, "of an answer, at the most")
        parser.set_defaults(temperature=1.0)
    add("--prompt_tokens", float, "mean tokens of a prompt; default: 200, where --model is given")
    add("--answer_tokens", float, "mean tokens of an answer; default: half of --max_new_tokens, where --model is given")
    parser.parse_args = parser.parse_intermixed_args  # the machine may stand anywhere among the flags
    return vstar.read_flags(parser, "vstar" if chosen.stage == 1 else "train")


def lengths_of_stage1(args):
    """Mean tokens of a prompt and of a completion. `args` gets the rest from Stage 1, as in training."""
    if not args.vstar.exists():
        fail(f"{args.vstar}: no such file; say --model, or where Stage 1's rows are (--vstar)")
    rows, _ = train.read_stage1(args)
    tokenizer, *_ = vstar.load_tokenizer(args.model, args.revision)
    return (np.mean([len(encode(tokenizer, row["prompt"], args.chat)) for row in rows]),
            np.mean([row["lengths"] for row in rows]))


def read_machine(text):
    """'8xH100' → (8, 'H100'); '' is this machine."""
    if not text:
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        known = [gpu for gpu in (*GPUS, "CPU") if gpu in re.findall(r"\w+", name)]  # L4 is not L40S
        if not known:
            fail(f"{name} is not in the plan's table; name a GPU that is like it: {', '.join(GPUS)}")
        text = f"{WORLD}x{known[0]}"
    found = re.fullmatch(r"(?:(\d+)x)?(\w+)", text)
    if not found or found[2].upper() not in {*GPUS, "CPU"} or found[1] == "0":
        fail(f"{text}: say how many of which, as in 8xH100 (known: {', '.join(GPUS)}, CPU)")
    return int(found[1] or 1), found[2].upper()


def precision(args, gpu):
    auto = "bfloat16" if gpu != "CPU" else "float32"
    return getattr(torch, auto if args.dtype == "auto" else args.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Stage 2


def plan_training(args, objective, prompt, completion):
    """Prints what train.py will need; prompt and completion: mean tokens."""
    ranks, gpu = read_machine(args.machine)
    shape, on_gpu = load_shape(args), gpu != "CPU"
    dtype, width = precision(args, gpu), math.ceil(prompt) + args.max_new_tokens
    args.dtype = str(dtype)[6:]
    args.engine = train.wanted_engine(args)
    if args.engine == "auto":
        args.engine = ("vllm" if on_gpu else "transformers") if args.machine else vstar.pick_engine("auto")[0]
    parts = memory(shape, args, objective, ranks, gpu if on_gpu else None, dtype, width)
    print(f"{args.model}: {shape.total:,} parameters, --algorithm {objective.name}, {ranks} × {gpu}, computed in "
          f"{str(dtype)[6:]}, --engine {args.engine}; planned, not measured\n")
    print("on each " + ("GPU" if on_gpu else "process"))
    for name, size in parts.items():
        print(f"  {name:34s}{size:9.2f} GiB")
    print(f"  {'at the most at a time':34s}{peak(parts):9.2f} GiB" + (
        f" and about {OVERHEAD:g} for CUDA and NCCL, of {GPUS[gpu][0]}" if on_gpu else ""))
    node = min(ranks, NODE)
    waiting = dtype.itemsize * shape.total * node / ranks if args.offload_reference and on_gpu else 0
    print(f"host memory per node: {(2 * node * shape.total + waiting) / 2**30:.1f} GiB; each process reads the model")
    if on_gpu:
        print(remedy(shape, args, objective, ranks, gpu, dtype, width))
        floor = step_floor(shape, args, objective, ranks, gpu, dtype, prompt, completion, args.max_new_tokens)
        seconds = sum(value for name, value in floor.items() if name != "communication")
        print(f"\na step of {args.batch_size * objective.completions} answers ({prompt:.0f} + {completion:.0f} tokens)"
              ", at least: " + ", ".join(f"{name} {value:.2f} s" for name, value in floor.items()))
        compute = floor["reference"] + floor["update"]
        if ranks > 1:
            share = floor["communication"] / compute
            print(f"communication is {'hidden behind' if share < 1 else 'more than'} the computing ({share:.1f} of it)")
        if args.steps:
            hours = args.steps * max(seconds, floor["sampling"] + floor["communication"]) / 3600
            print(f"{args.steps} steps: at least {hours:.2f} h, {hours * ranks:.1f} GPU hours")


def networks_of(objective):
    """→ how many networks an objective trains, and how many it runs over the completions before the update: π_ref, and
    what else it takes as given. The objective itself is asked, with stand-ins for networks. So this holds for all."""
    asked = set()

    def stand_in(name):
        return lambda input_ids, **_: asked.add(name) or torch.zeros(len(input_ids), input_ids.shape[1] - 1)

    trained = 1 + len(objective.networks(stand_in))
    sample = Sample(dict(tokens=[0], vstar=0.0), Completion([0], True, [0.0]), "", 0.0, 0)
    run = Namespace(policy=stand_in("policy"), reference=stand_in("reference"), device=torch.device("cpu"))
    objective.given(run, [sample] * objective.completions)
    return trained, len(asked)


def memory(shape, args, objective, ranks, gpu, dtype, width):
    """GiB on each process in Stage 2: {part: GiB}; `gpu` is a name in GPUS or None."""
    total, block, rest = shape.total, shape.block, shape.rest
    recompute = args.recompute == "yes" or (args.recompute == "auto" and gpu is not None)
    trained, _ = networks_of(objective)
    rows = max(1, args.tokens_per_microbatch // width)
    most, kept, head = activations(shape, dtype, rows, width, recompute, gpu is not None, args.lora)
    b, whole = dtype.itemsize, trained - bool(args.lora)  # networks that are trained whole: a critic is
    learned = total * whole + (additions(shape, args.lora) if args.lora else 0)
    sharded = ranks > 1 or ((gpu or dtype != torch.float32) and whole > 0)  # as start_process and make_run decide
    # FSDP gathers a block, the next one and what lies in no block; gradients wait in `dtype` and fp32 for their sum
    gathered = (b * (2 * block + rest) + (b + 4) * (block + rest) * (whole > 0)) if sharded else 0
    if gpu and args.engine != "transformers":  # vLLM, asleep during the update
        sampling = args.gpu_memory * GPUS[gpu][0] * 2**30
    else:
        sampling = (b * total if sharded else 0) + sampler_bytes(shape, dtype, args.decode_rows, width)
    # with --lora the reference is the frozen network that the additions stand on, at work all the time
    parts = {"weights (fp32)": 4 * learned / ranks, "gradients (fp32)": 4 * learned / ranks,
             "AdamW (fp32)": 8 * learned / ranks,
             "reference": 0 if args.offload_reference and gpu and not args.lora else b * total / ranks,
             "gathered by FSDP": gathered, "kept activations": kept, "head's chunk, or a block at work": most - kept,
             "sampling": sampling}
    return {name: size / 2**30 for name, size in parts.items()}


def peak(parts):
    """Nothing of the update is there while sampling, nor the other way round."""
    update = sum(parts[name] for name in ("gradients (fp32)", "gathered by FSDP", "kept activations",
                                          "head's chunk, or a block at work"))
    always = sum(parts[name] for name in ("weights (fp32)", "AdamW (fp32)", "reference"))
    return always + max(update, parts["sampling"])


def step_floor(shape, args, objective, ranks, gpu, dtype, prompt, completion, longest):
    """Seconds that a step takes at least on each of `ranks` GPUs: {phase: seconds}"""
    _, flops, bandwidth, nvlink = GPUS[gpu]
    rows = args.batch_size * objective.completions / ranks
    waves = math.ceil(rows / args.decode_rows) if args.engine == "transformers" else 1
    held = engine_precision(args, dtype)
    # beyond a node the ring runs through all of its network cards at a time
    link = nvlink if ranks <= NODE else min(nvlink, NODE * NETWORK)
    ring = shape.total * (ranks - 1) / ranks / link  # seconds in which every GPU gets all weights, at one byte each
    # a token's step reads the weights once for all rows, and each row's keys and values; before that they are gathered
    context = rows * completion * (prompt + completion / 2)
    bytes_read = waves * longest * held.itemsize * shape.read + context * cache_per_token(shape, held)
    whole = args.engine != "transformers" and not args.lora  # vLLM gets fp32 weights
    sampling = bytes_read / bandwidth + (4 if whole else dtype.itemsize) * ring
    tokens = rows * (prompt + completion)
    forward = forward_flops(shape, rows, prompt, completion) / flops
    trained, before = networks_of(objective)  # a critic is of the policy's size
    # forward, again for the backward pass, and that is twice a forward: once for the states, once for the weights
    per_pass = 4 if args.recompute != "no" else 3
    frozen = objective.passes if args.lora else 0  # backward passes of the policy that want no weights' gradient
    micro = math.ceil(max(1.0, tokens / args.tokens_per_microbatch))
    # FSDP gathers weights for the forward and the backward pass, π_ref's for its own, and sums fp32 gradients
    updates = objective.passes * trained
    traffic = micro * (updates * (2 * dtype.itemsize + 4) - 4 * frozen + before * dtype.itemsize) * ring
    return {"sampling": sampling, "reference": before * forward, "update": (updates * per_pass - frozen) * forward,
            "communication": traffic}


def engine_precision(args, dtype):
    """vLLM gets --lora's merged weights in fp32."""
    return torch.float32 if args.lora and args.engine != "transformers" else dtype


def vllm_share(shape, gpu, dtype):
    """The least --gpu_memory: the model and a tenth for keys and values."""
    return math.ceil(110 * dtype.itemsize * shape.total / 2**30 / GPUS[gpu][0]) / 100


def remedy(shape, args, objective, ranks, gpu, dtype, width):
    """Does it fit, and up to which --tokens_per_microbatch? If not, what would make it fit?"""

    held = engine_precision(args, dtype)
    room, vllm, weights = GPUS[gpu][0], args.engine != "transformers", held.itemsize * shape.total / 2**30

    def parts(count=ranks, **changes):
        return memory(shape, Namespace(**{**vars(args), **changes}), objective, count, gpu, dtype, width)

    def fits(count=ranks, **changes):
        share = changes.get("gpu_memory", args.gpu_memory)
        return peak(parts(count, **changes)) + OVERHEAD <= room and (
            not vllm or "engine" in changes or share * room >= 1.05 * weights)

    least = dtype.itemsize * shape.total / 2**30  # of the decode loop, which --lora in vLLM may have to go back to
    if least + OVERHEAD > room:
        return f"it does not fit: for sampling each GPU holds the whole model, which is {least:.0f} GiB"
    if fits():
        update = lambda budget: peak(dict(parts(tokens_per_microbatch=budget), sampling=0)) + OVERHEAD
        now = args.tokens_per_microbatch
        slope = (update(4 * now) - update(now)) / (3 * now)
        budget = now + (room - update(now)) / slope if slope else math.inf
        return "it fits" + (f"; so would about --tokens_per_microbatch {budget:,.0f}" if budget < 2**20 else "")
    smaller = dict(tokens_per_microbatch=width)
    other = dict(gpu_memory=vllm_share(shape, gpu, held)) if vllm else dict(decode_rows=max(1, args.decode_rows // 8))
    cheapest_first = [dict(recompute="yes"), smaller, other, {**smaller, **other}, dict(offload_reference=True),
                      {**smaller, **other, "offload_reference": True},
                      {"engine": "transformers", **smaller, "decode_rows": max(1, args.decode_rows // 8)}]
    more = [(count, changes) for count in (2**k for k in range(1, 11)) if count > ranks for changes in ({}, other)]
    for count, changes in [(ranks, changes) for changes in cheapest_first] + more:
        if fits(count, **changes):
            named = [f"--{key}" + (f" {value}" if value is not True else "") for key, value in changes.items()]
            gpus = [f"{count} GPUs" + " and" * bool(named)] * (count > ranks)
            return "it does not fit; it would with " + " ".join(gpus + named)
    return ("it does not fit, on any number of GPUs: what is gathered at a time is too large. "
            "A smaller model or larger GPUs")


# ---------------------------------------------------------------------------------------------------------------------
# Stage 1


def plan_stage1(args, count, prompt, completion):
    """Prints what vstar.py will need for `count` problems; prompt and completion: mean tokens."""
    ranks, gpu = read_machine(args.machine)
    shape, dtype = load_shape(args), precision(args, gpu)
    total, width = shape.total, math.ceil(prompt) + args.max_new_tokens
    weights = dtype.itemsize * total / 2**30 / args.tensor_parallel
    work = sampler_bytes(shape, dtype, args.decode_rows, width) / 2**30
    print(f"{args.model}: {total:,} parameters, {ranks} × {gpu}, {str(dtype)[6:]}; planned, not measured\n\non each\n"
          f"  {'weights':40s}{weights:9.2f} GiB\n"
          f"  {f'transformers: --decode_rows {args.decode_rows} at work':40s}{work:9.2f} GiB")
    if gpu == "CPU":
        return
    room = args.gpu_memory * GPUS[gpu][0] - weights
    at_once = int(room * 2**30 / (width * cache_per_token(shape, dtype) / args.tensor_parallel))
    print(f"  {'left to vLLM for keys and values':40s}{room:9.2f} GiB   "
          f"({max(0, at_once):,} answers of full length at a time)")
    if room <= 0:
        need = 2 ** math.ceil(math.log2(weights * args.tensor_parallel / (args.gpu_memory * GPUS[gpu][0])))
        print(f"it does not fit; it would with --tensor_parallel {need}")
        return
    print("it fits" if weights + work + OVERHEAD <= GPUS[gpu][0] else
          "it fits with vLLM; for transformers lower --decode_rows")
    engines, answers = max(1, ranks // args.tensor_parallel), count * args.samples
    # vLLM's own bounds, by the GPU's memory; an A100 counts as small
    at_once = max(1, min(at_once, 1024 if GPUS[gpu][0] >= 70 and gpu != "A100" else 256))
    # as one ends the next takes its place, and no answer is shorter than itself
    steps = max(args.max_new_tokens, answers / engines * completion / at_once)
    cached = answers / engines * completion * cache_per_token(shape, dtype) * (prompt + completion / 2)
    read = (steps * dtype.itemsize * shape.read + cached) / args.tensor_parallel
    compute = forward_flops(shape, answers / engines, 0, completion) / args.tensor_parallel
    hours = max(read / GPUS[gpu][2], compute / GPUS[gpu][1]) / 3600
    print(f"\n{answers:,} answers of {completion:.0f} tokens, {at_once:,} at a time: "
          f"at least {60 * hours:.1f} minutes, {hours * ranks:.2f} GPU hours")


# ---------------------------------------------------------------------------------------------------------------------
# the model: its parameters, its activations, its keys and values


@dataclass(eq=False)
class Shape:
    config: transformers.PretrainedConfig
    total: int  # parameters
    block: int  # of the largest block
    rest: int  # of what lies in no block: embeddings, head, last norm
    read: int  # of what a token's step reads: all but a table of embeddings that is not the head too


def load_shape(args):
    return shape_of(args.model, args.revision)


@cache
def shape_of(model, revision):
    try:
        config = transformers.AutoConfig.from_pretrained(model, revision=revision)
    except (OSError, ValueError) as error:
        fail(f"--model {model}: {error}")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    count = lambda module: sum(p.numel() for p in module.parameters())
    blocks = [count(m) for m in model.modules() if type(m).__name__ in set(model._no_split_modules or [])]
    total, table = count(model), model.get_input_embeddings().weight
    read = total - (0 if model.get_output_embeddings().weight is table else table.numel())
    return Shape(config, total, max(blocks, default=0), total - sum(blocks), read)


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


@cache
def additions(shape, rank):
    """The parameters that --lora adds."""
    with FakeTensorMode():
        policy = Policy(transformers.AutoModelForCausalLM.from_config(shape.config)).adapt(rank, torch.float32, 0)
        return sum(p.numel() for p in policy.parameters() if p.requires_grad)


@cache
def activations(shape, dtype, rows, width, recompute, gpu, rank):
    """Bytes that a micro-batch's forward and backward pass add at the most to weights and gradients; and of these what
    is kept from the forward pass for the backward pass, and what the head's chunk adds to that."""
    with FakeTensorMode(), Live() as live:
        policy = Policy(transformers.AutoModelForCausalLM.from_config(shape.config, dtype=dtype), recompute)
        if rank:
            policy.adapt(rank, dtype, 0)
        # a gradient leaves as soon as it is whole: they are counted elsewhere
        for parameter in (p for p in policy.parameters() if p.requires_grad):
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
    """The transformers engine: keys and values of all rows at their longest, one layer's once more, for each head (that
    is how transformers attends where rows are padded), and two steps' logits."""
    text = shape.config.get_text_config()
    one_layer = 2 * text.num_attention_heads * head_size(text) * dtype.itemsize
    return rows * (width * (cache_per_token(shape, dtype) + one_layer) + text.vocab_size * (3 * dtype.itemsize + 4))


def head_size(text):
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def cache_per_token(shape, dtype):
    text = shape.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * head_size(text) * dtype.itemsize


def forward_flops(shape, rows, prompt, completion):
    """Two per token and weight of the blocks, two per completion's token and weight of the head, and the attention."""
    text, width = shape.config.get_text_config(), prompt + completion
    inner = text.num_attention_heads * head_size(text)
    blocks, head = 2 * (shape.total - shape.rest), 2 * text.vocab_size * text.hidden_size
    attention = 2 * text.num_hidden_layers * inner * width**2  # scores and values, of half the square each
    return rows * (blocks * width + head * completion + attention)


if __name__ == "__main__":
    run_script(main)
