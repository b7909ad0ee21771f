"""How close to the machine's limit? The floors of the decode loop and of the update, and the measured share of them.

    python experiments/limits.py                                  → experiments/limits.json        (the embedded model, on a CPU)
    python experiments/limits.py --shape 1.5B --batch 256 --prompt 128 --tokens 512 --name limits-1.5B            (a GPU)

decode floor    each step reads the weights once (not a table of embeddings that is no head), and the keys and values of
                every row: (steps × weights + Σ rows × context × 2 × layers × KV heads × head size) × bytes, over the bandwidth
update floor    forward FLOPs (2 × weights of the blocks × tokens + 2 × vocabulary × hidden × answers' tokens + 2 × layers ×
                heads × head size × Σ length² for the attention), times 3 with the backward pass, over the peak; where blocks and
                the head are recomputed, the hardware does it times 4
overhead        what the decode loop takes beyond the model's forward passes

Bandwidth and peak are a GPU's data sheet (plan.py's table), or on a CPU what a large copy and a large product of matrices reach.
"""

import argparse
import random
import sys
import time
from types import SimpleNamespace

import numpy as np
import torch
import transformers
from lab import ROOT, SHAPES, random_model, save

sys.path.insert(0, str(ROOT))
import plan  # noqa: E402
import train  # noqa: E402
import vstar  # noqa: E402

GPU = torch.cuda.is_available()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--model", default="tiny/model")
    add("--shape", choices=SHAPES, help="instead of --model: random weights in the shape of this Qwen2.5")
    add("--batch", type=int, default=512, help="rows of the decode loop")
    add("--prompt", type=int, default=8, help="tokens of a prompt; in the decode loop at the most")
    add("--tokens", type=int, default=64, help="tokens of an answer")
    add("--budget", type=int, default=16384, help="tokens per micro-batch of the update")
    add("--rows", type=int, default=1024, help="answers of the update")
    add("--rounds", type=int, default=5, help="the median of so many counts, after one to warm up")
    add("--profile", action="store_true", help="print the costliest operations too")
    add("--name", default="limits")
    args = parser.parse_args()
    device, dtype = torch.device("cuda" if GPU else "cpu"), torch.bfloat16 if GPU else torch.float32
    path = random_model(args.shape) if args.shape else args.model
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval()
    shape = plan.load_shape(SimpleNamespace(model=path, revision=None))
    flops, bandwidth = limits(device)
    results = dict(model=dict(path=args.shape or args.model, parameters=shape.total, dtype=str(dtype)[6:]),
                   machine_limit=dict(tflops=flops / 1e12, gb_per_second=bandwidth / 1e9),
                   decode=decode(args, model, shape, dtype, bandwidth), update=update(args, model, shape, dtype, flops))
    save(args.name, **results)
    for name in ("decode", "update"):
        print(name, {key: round(value, 4) for key, value in results[name].items()})


def seconds_of(call, rounds):
    taken = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        call()
        if GPU:
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return float(np.median(taken[1:]))


def limits(device):
    """FLOP/s and bytes/s."""
    if GPU:
        name = next(name for name in plan.GPUS if name in torch.cuda.get_device_name())
        return plan.GPUS[name][1:3]
    one, other = torch.randn(2, 2048, 2048)
    block, target = torch.zeros(2, 1 << 26)  # 256 MB each
    return 2 * 2048**3 / seconds_of(lambda: one @ other, 5), 2 * block.nbytes / seconds_of(lambda: target.copy_(block), 5)


def profiled(args, call):
    if args.profile:
        kinds = [torch.profiler.ProfilerActivity.CUDA] * GPU + [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=kinds) as profile:
            call()
        print(profile.key_averages().table(sort_by="self_cuda_time_total" if GPU else "self_cpu_time_total", row_limit=15))


def decode(args, model, shape, dtype, bandwidth):
    """All rows write all tokens, so that the work is known."""
    rng = random.Random(0)
    # of unlike length, as in training: padding needs a mask, and attention with one is slower
    prompts = [[rng.randrange(1, 19) for _ in range(rng.randint(args.prompt // 2, args.prompt))] for _ in range(args.batch)]
    sampler = vstar.TransformersSampler(model, [-1], args.tokens, 1.0, args.batch)
    call = lambda: sampler.generate(prompts, 1, list(range(args.batch)))
    whole, inside, forward = seconds_of(call, args.rounds), [], model.forward

    def timed(*inputs, **keywords):
        began = time.perf_counter()
        result = forward(*inputs, **keywords)
        if GPU:
            torch.cuda.synchronize()
        inside[-1] += time.perf_counter() - began
        return result

    model.forward = timed
    shares = []
    for _ in range(args.rounds + 1):
        inside.append(0.0)
        began = time.perf_counter()
        call()
        shares.append((time.perf_counter() - began) / inside[-1] - 1)
    model.forward = forward
    profiled(args, call)
    context = sum(len(prompt) + t for prompt in prompts for t in range(1, args.tokens))
    floor = (args.tokens * shape.read * dtype.itemsize + context * plan.cache_per_token(shape, dtype)) / bandwidth
    return dict(batch=args.batch, seconds=whole, tokens_per_second=args.batch * args.tokens / whole, floor_seconds=floor,
                share_of_floor=floor / whole, overhead_over_forward=float(np.median(shares[1:])))


def update(args, model, shape, dtype, flops):
    rng = random.Random(0)
    answer = vstar.Completion([rng.randrange(1, 19) for _ in range(args.tokens)], True, [-1.0] * args.tokens)
    samples = [train.Sample(dict(id=str(i), tokens=[1] * args.prompt, vstar=0.5, rewards=[1.0]), answer, "", 1.0)
               for i in range(args.rows)]
    settings = SimpleNamespace(algo="apo", tokens_per_microbatch=args.budget, temperature=1.0, beta2=0.1, clip=1.0)
    if GPU:  # fp32 masters, bf16 compute: FSDP2's code on a mesh of one, as in train.py
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl", store=torch.distributed.HashStore(), rank=0, world_size=1)
        torch.cuda.reset_peak_memory_stats()
    device = next(model.parameters()).device
    policy = train.shard(train.Policy(model.float(), GPU), device, dtype, master=True)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, fused=GPU)
    known = train.targets(policy, policy, None, samples, settings, device)
    call = lambda: train.update(policy, optimizer, samples, known, args.rows, settings, device)
    seconds = seconds_of(call, args.rounds)
    profiled(args, call)
    tokens, forward = args.rows * (args.prompt + args.tokens), plan.forward_flops(shape, args.rows, args.prompt, args.tokens)
    memory = dict(memory_gb=torch.cuda.max_memory_allocated() / 2**30) if GPU else {}
    return dict(tokens=tokens, seconds=seconds, tokens_per_second=tokens / seconds, share_of_peak=3 * forward / flops / seconds,
                share_with_recomputing=(4 if GPU else 3) * forward / flops / seconds, **memory)


if __name__ == "__main__":
    main()
