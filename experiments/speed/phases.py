"""A step at a real model's shape with random weights: seconds by phase, and the memory beside the plan's.

    python -m experiments.speed.phases --shape 1.5B        → experiments/results/phases-1.5B.json      (a GPU)
    python -m experiments.speed.phases --shape toy --batch_size 4 --prompts 8 --tokens 16        (to try it)

Random weights earn nothing, so a coin is tossed for each reward. Nearly all answers are as long as they may
be. The first two steps, which warm up, are left out. mfu is the update's share of the peak FLOP/s: three
times the forward pass (with LoRA two), recomputation not counted. Restartable: what is in out/phases/ is not
run again.
"""

import torch

import train
from experiments import lab, plan
from experiments.compare import stage1_cost
from experiments.speed.limits import limits

WAYS = ["apo", "apo --recompute=yes", "apo --lora=16", "apo --lora=16 --engine=transformers", "ppo", "grpo",
        "rebel"]
PROMPT = 128  # tokens: the embedded world's problems are short, so more is put behind them


def main():
    parser = lab.make_parser(__doc__, steps=5, seeds=1)
    add = parser.add_argument
    add("--shape", choices=lab.SHAPES, default="1.5B", help="Qwen2.5's; or toy")
    add("--prompts", type=int, default=256, help="of Stage 1")
    add("--batch_size", type=int, default=64, help="prompts a step")
    add("--tokens", type=int, default=256, help="of an answer")
    add("--engine", default="auto")
    add("--ways", nargs="+", default=WAYS, help="each: ALGORITHM FLAGS")
    add("--name", help="of the results; default: phases-SHAPE")
    args = parser.parse_args()
    args.name = args.name or f"phases-{args.shape}"
    out = lab.ROOT / "out/phases" / args.name
    model, long = lab.random_model(args.shape), "1+1=" * (PROMPT // 4 - 2)
    first = lab.stage1(args, out, f"--model={model}", f"--limit={args.prompts}", "--samples=2",
                       f"--max_new_tokens={args.tokens}", f"--prompt={{question}}{long}",
                       "--reward=experiments/lab.py:toss", f"--engine={args.engine}")
    tokens, seconds = stage1_cost(out)
    results = dict(stage1_tokens_per_second=round(tokens / seconds))
    for way in args.ways:
        results[way] = one(args, way, out / way.replace(" ", "_"), first, model)
        print(way, results[way], flush=True)
        lab.save(args.name, results=results)


def one(args, way, out, first, model):
    algorithm, *more = way.split()
    flags = [f"--batch_size={args.batch_size}", "--eval_data=", "--tokens_per_microbatch=16384",
             f"--engine={args.engine}", *more]
    Objective, shape = plan.OBJECTIVES[algorithm], plan.load_shape(model)
    settings = train.make_parser(Objective).parse_args(flags)
    vars(settings).update(ranks=1, gpu="CPU", temperature=1.0, max_new_tokens=args.tokens)
    flops, bandwidth = limits()
    if torch.cuda.is_available():  # as much memory as it has, whatever it is
        memory = torch.cuda.get_device_properties(0).total_memory
        plan.GPUS["this"], settings.gpu = (memory / 2**30, flops, bandwidth, None), "this"
    plan.settle(settings, PROMPT)
    objective = Objective(settings)

    rows = lab.train(args, out, first, *flags, algorithm=algorithm)
    rows = [row for row in rows if row["step"] > 2]
    seconds = [row["seconds"] for row in rows]
    found = {phase: lab.mean(phase, seconds) for phase in lab.PHASES}
    answers, length = args.batch_size * objective.completions, lab.mean("length", rows)
    trained, _ = plan.networks_of(objective)
    passes = objective.passes * trained * (2 if settings.lora else 3)
    useful = passes * plan.forward_flops(shape, answers, PROMPT, length)
    return dict(found, step=sum(found.values()), tokens_per_second=lab.mean("tokens_per_second", rows),
                mfu=useful / found["update"] / flops, peak_gib=max(row["memory_gb"] for row in rows),
                planned_gib=plan.peak(plan.memory(shape, settings, objective)))


if __name__ == "__main__":
    main()
