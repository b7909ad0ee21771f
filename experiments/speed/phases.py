"""A step at a real model's shape with random weights: seconds by phase, and the memory beside the plan's.

    python -m experiments.speed.phases --shape 1.5B          → experiments/results/phases-1.5B.json     (a GPU)
    python -m experiments.speed.phases --shape toy --batch_size 4 --prompts 8 --tokens 16       (to try it on a CPU)

Random weights earn nothing, so a coin is tossed for each reward. Nearly all answers are as long as they may be. The
first step, which warms up, is left out. mfu is the update's share of the peak FLOP/s: three times the forward pass
(with LoRA two), recomputation not counted. Restartable: what is in out/phases/ is not run again.
"""

import torch

import train
from experiments import lab, plan
from experiments.compare import stage1_cost
from experiments.speed.limits import limits

WAYS = {name: (name, []) for name in plan.OBJECTIVES} | {"apo-lora": ("apo", ["--lora=16"])}
PROMPT = 128  # tokens: the embedded world's problems are short, so more is put behind them


def main():
    parser = lab.make_parser(__doc__, steps=3, seeds=1)
    add = parser.add_argument
    add("--shape", choices=lab.SHAPES, default="1.5B", help="Qwen2.5's; or toy")
    add("--prompts", type=int, default=256, help="of Stage 1")
    add("--batch_size", type=int, default=64, help="prompts a step")
    add("--tokens", type=int, default=256, help="of an answer")
    add("--engine", default="auto")
    add("--only", nargs="+", choices=WAYS, default=list(WAYS))
    add("--name", help="of the results; default: phases-SHAPE")
    args = parser.parse_args()
    args.name = args.name or f"phases-{args.shape}"
    out, results = lab.ROOT / "out/phases" / args.name, {}
    model = lab.random_model(args.shape)
    first = lab.stage1(args, out, f"--model={model}", f"--limit={args.prompts}", "--samples=2",
                       f"--max_new_tokens={args.tokens}", f"--prompt={{question}}{'1+1=' * (PROMPT // 4 - 2)}",
                       "--reward=experiments/lab.py:toss", f"--engine={args.engine}")
    tokens, seconds = stage1_cost(out)
    settings = dict(prompts=args.batch_size, answer=args.tokens, steps=args.steps)
    settings["stage1_tokens_per_second"] = round(tokens / seconds)
    for way in args.only:
        results[way] = one(args, way, out / way, first, model)
        print(f"{way:10s}" + "".join(f"{key} {value:.3g}  " for key, value in results[way].items()), flush=True)
        lab.save(args.name, settings=settings, results=results)


def one(args, way, out, first, model):
    algorithm, more = WAYS[way]
    flags = [f"--batch_size={args.batch_size}", "--eval_data=", "--tokens_per_microbatch=16384",
             f"--engine={args.engine}", *more]
    objective, shape, planned = as_planned(args, algorithm, flags, model)
    rows = lab.train(args, out, first, *flags, algorithm=algorithm)
    rows = [row for row in rows if row["step"] > 1]
    seconds = {phase: lab.mean(phase, [row["seconds"] for row in rows]) for phase in lab.PHASES}
    answers = args.batch_size * objective.completions
    trained, _ = plan.networks_of(objective)
    passes = objective.passes * trained * (2 if "--lora=16" in flags else 3)
    flops = passes * plan.forward_flops(shape, answers, PROMPT, lab.mean("length", rows))
    return dict(seconds, step=sum(seconds.values()), tokens_per_second=lab.mean("tokens_per_second", rows),
                mfu=flops / seconds["update"] / limits()[0], peak_gib=max(row["memory_gb"] for row in rows),
                planned_gib=planned)


def as_planned(args, algorithm, flags, model):
    """→ the objective, the model's shape, and the GiB that the plan foresees for them on this machine"""
    Objective = plan.OBJECTIVES[algorithm]
    settings = train.make_parser(Objective).parse_args(flags)
    vars(settings).update(stage=2, temperature=1.0, max_new_tokens=args.tokens, ranks=1, gpu="CPU")
    if torch.cuda.is_available():  # as much memory as it has, whatever it is
        plan.GPUS["this"] = (torch.cuda.get_device_properties(0).total_memory / 2**30, *limits(), None)
        settings.gpu = "this"
    plan.settle(settings, PROMPT)
    objective, shape = Objective(settings), plan.load_shape(model)
    return objective, shape, plan.peak(plan.memory(shape, settings, objective))


if __name__ == "__main__":
    main()
