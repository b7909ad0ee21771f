"""The four algorithms at a real model's shape with random weights: seconds by phase, tokens a second, peak memory.

    python -m experiments.speed.phases --shape 1.5B          → experiments/results/phases-1.5B.json     (a GPU)
    python -m experiments.speed.phases --shape toy --batch_size 4 --prompts 8 --tokens 16       (to try it on a CPU)

Random weights earn nothing, so a coin is tossed for each reward. Nearly all answers are as long as they may be. No
checkpoint is written, and the first step, which warms up, is left out. Restartable: what is in out/phases/ is not run
again.
"""

import sys

import numpy as np

import rewards
import train
import vstar
from experiments import baselines, lab


def main():
    if "--child" in sys.argv:
        return child(*sys.argv[2:])
    parser = lab.make_parser(__doc__, steps=3, seeds=1)
    add = parser.add_argument
    add("--shape", choices=lab.SHAPES, default="1.5B", help="Qwen2.5's; or toy")
    add("--prompts", type=int, default=256, help="of Stage 1")
    add("--batch_size", type=int, default=64, help="prompts a step")
    add("--tokens", type=int, default=512, help="of an answer")
    add("--only", nargs="+", choices=lab.NAMES, default=list(lab.NAMES))
    args = parser.parse_args()
    args.launch += f" -m {__spec__.name} --child"
    out = f"out/phases/{args.shape}"
    first = lab.stage1(args, f"{out}/stage1", f"--model={lab.random_model(args.shape)}", f"--limit={args.prompts}",
                       "--samples=2", f"--max_new_tokens={args.tokens}")
    results = {}
    print(f"{'':10s}{'sampling':>10s}{'reference':>10s}{'update':>10s}{'a step':>10s}{'tokens/s':>10s}{'peak GB':>10s}")
    for algorithm in args.only:
        rows = lab.train(args, f"{out}/{algorithm}", first, f"--batch_size={args.batch_size}", "--eval_data=",
                         "--tokens_per_microbatch=16384", algorithm=algorithm)
        rows = [row for row in rows if row["step"] > 1]
        phases = {phase: float(np.mean([lab.seconds_of(row, [phase]) for row in rows])) for phase in lab.PHASES}
        step = sum(phases.values())
        results[lab.NAMES[algorithm]] = dict(phases, step=step, tokens_per_second=lab.mean("tokens", rows) / step,
                                             peak_gb=max(row["memory_gb"] for row in rows))
        numbers = results[lab.NAMES[algorithm]].values()
        print(f"{lab.NAMES[algorithm]:10s}" + "".join(f"{value:10,.2f}" for value in numbers), flush=True)
        settings = dict(prompts=args.batch_size, answer=args.tokens, steps=args.steps)
        lab.save(f"phases-{args.shape}", settings=settings, results=results)


def child(*command):
    """vstar.py, train.py or `-m experiments.baselines NAME` with two things changed."""
    rewards.reward = lab.toss
    train.save_checkpoint = lambda *_: None
    script, *flags = command[1:] if command[0] == "-m" else command
    sys.argv = [script, *flags]
    {"vstar.py": vstar, "train.py": train, "experiments.baselines": baselines}[script].main()


if __name__ == "__main__":
    main()
