"""How close to the machine's limit? The floors of the decode loop and of the update, and how near they come.

    python -m experiments.speed.limits              → experiments/results/limits.json     (the embedded model)
    python -m experiments.speed.limits --shape 1.5B --decode_rows 256 --prompt 128 --tokens 512    (for a GPU)

decode floor    each step reads the weights once (not a table of embeddings that is no head), and the keys and
                values of every row: (steps × weights + Σ rows × context × 2 × layers × KV heads × head size)
                × bytes, over the bandwidth
update floor    forward FLOPs (2 × weights of the blocks × tokens + 2 × vocabulary × hidden × answers' tokens
                + 2 × layers × heads × head size × Σ length² for the attention), times 3 with the backward
                pass, over the peak; recomputation counts as none
overhead        what the decode loop takes beyond the model's forward passes

Bandwidth and peak are a GPU's data sheet (plan.py's table), or what a large copy and a large product of
matrices reach.
"""

import random
import re
import time
from types import SimpleNamespace

import numpy as np
import torch

import train
from experiments import lab, plan
from vstar import Completion, TransformersSampler, load_model, start_process

GPU = torch.cuda.is_available()


def main():
    parser = lab.make_parser(__doc__)
    add = parser.add_argument
    add("--model", default="tiny/model")
    add("--shape", choices=lab.SHAPES, help="instead of --model: random weights in the shape of this Qwen2.5")
    add("--decode_rows", type=int, default=512, help="of the decode loop")
    add("--prompt", type=int, default=8, help="tokens of a prompt; in the decode loop at the most")
    add("--tokens", type=int, default=64, help="tokens of an answer")
    add("--tokens_per_microbatch", type=int, default=16384, help="of the update")
    add("--rows", type=int, default=1024, help="answers of the update")
    add("--rounds", type=int, default=5, help="the median of so many counts, after one to warm up")
    add("--name", default="limits")
    args = parser.parse_args()
    # what a run has
    vars(args).update(dtype="auto", engine="transformers")
    vars(args).update(temperature=1.0, beta2=0.1, max_grad_norm=1.0)
    device = start_process(args, group=True)
    path = lab.random_model(args.shape) if args.shape else args.model
    dtype = getattr(torch, args.dtype)
    model = load_model(path, None, dtype, device).eval()
    shape = plan.load_shape(path)
    flops, bandwidth = limits()
    limit = dict(tflops=flops / 1e12, gb_per_second=bandwidth / 1e9)
    decoding = decode(args, model, shape, dtype, bandwidth)
    updating = update(args, model, shape, dtype, flops, device)
    print("decode", decoding, "\nupdate", updating)
    lab.save(args.name, machine_limit=limit, decode=decoding, update=updating)


def timed(call, taken):
    """The same function, which appends the seconds that it took."""

    def wrapped(*inputs, **keywords):
        began = time.perf_counter()
        result = call(*inputs, **keywords)
        if GPU:
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
        return result

    return wrapped


def seconds_of(call, rounds):
    """The median of so many calls, after one to warm up."""
    taken = []
    for _ in range(rounds + 1):
        timed(call, taken)()
    return float(np.median(taken[1:]))


def limits():
    """FLOP/s and bytes/s: a known GPU's data sheet, or what a large product and a large copy reach."""
    words = re.findall(r"\w+", torch.cuda.get_device_name()) if GPU else []  # L4 is not L40S
    for name, (_, flops, bandwidth, _) in plan.GPUS.items():
        if name in words:
            return flops, bandwidth
    size, many, dtype = 2048, 1 << 26, torch.float32
    if GPU:
        size, many, dtype = 8192, 1 << 28, torch.bfloat16
    with torch.device("cuda" if GPU else "cpu"):
        one, other = torch.randn(2, size, size, dtype=dtype)
        block, target = torch.zeros(2, many)  # 256 MB each, or 1 GB
    flops = 2 * size**3 / seconds_of(lambda: one @ other, 5)
    return flops, 2 * block.nbytes / seconds_of(lambda: target.copy_(block), 5)


def decode(args, model, shape, dtype, bandwidth):
    """All rows write all tokens, so that the work is known."""
    rng = random.Random(0)
    # of unlike length, as in training: padding needs a mask, and attention with one is slower
    lengths = rng.choices(range(args.prompt // 2, args.prompt + 1), k=args.decode_rows)
    prompts = [rng.choices(range(1, 19), k=length) for length in lengths]
    sampler = TransformersSampler(model, [-1], args.tokens, 1.0, args.decode_rows)
    call = lambda: sampler.generate(prompts, 1, list(range(args.decode_rows)))
    whole = seconds_of(call, args.rounds)
    # again, now with the forward passes timed one by one
    every, forwards, forward = [], [], model.forward
    model.forward = timed(forward, forwards)
    for _ in range(args.rounds):
        timed(call, every)()
    model.forward = forward
    context = sum(len(prompt) + t for prompt in prompts for t in range(1, args.tokens))
    weights = args.tokens * shape.read * dtype.itemsize
    floor = (weights + context * plan.cache_per_token(shape, dtype.itemsize)) / bandwidth
    return dict(seconds=whole, tokens_per_second=args.decode_rows * args.tokens / whole,
                floor_seconds=floor, share_of_floor=floor / whole,
                overhead_over_forward=sum(every) / sum(forwards) - 1)


def update(args, model, shape, dtype, flops, device):
    completion = Completion([2] * args.tokens, True, [-1.0] * args.tokens)
    problem = dict(id="0", tokens=[1] * args.prompt, vstar=0.5, rewards=[1.0])
    samples = [train.Sample(problem, completion, "", 1.0, i) for i in range(args.rows)]
    # fp32 masters, and on a GPU bf16 compute: FSDP2's code on a mesh of one, as in train.py
    policy = train.shard(train.Policy(model.float(), GPU), device, dtype, master=True)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, fused=GPU)
    objective = train.APO(args)
    run = SimpleNamespace(args=args, objective=objective, policy=policy, reference=policy,
                          optimizer=optimizer, device=device)
    constants = objective.constants(run, samples)
    call = lambda: train.update(run, samples, constants)
    seconds = seconds_of(call, args.rounds)
    tokens = args.rows * (args.prompt + args.tokens)
    forward = plan.forward_flops(shape, args.rows, args.prompt, args.tokens)
    return dict(seconds=seconds, tokens_per_second=tokens / seconds,
                share_of_peak=3 * forward / flops / seconds)


if __name__ == "__main__":
    main()
