"""The four algorithms at a real model's shape with random weights: seconds by phase, tokens a second, peak memory.

    python experiments/phases.py --shape 1.5B                                        → experiments/phases-1.5B.json     (a GPU)
    python experiments/phases.py --shape toy --batch_size 4 --prompts 8 --tokens 16  to try the script on a CPU

Rewards are 0 and nothing is learned; all answers are as long as they may be. The first step, which warms up, is left out.
Restartable: what is in out/phases/ already is not run again.
"""

import argparse

import numpy as np
from lab import NAMES, add_flags, random_model, save, stage1, train


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_flags(parser, steps=4, seeds=1)
    add = parser.add_argument
    add("--shape", default="1.5B", help="toy, or Qwen2.5's 0.5B, 1.5B, 7B")
    add("--prompts", type=int, default=256, help="of Stage 1")
    add("--batch_size", type=int, default=64, help="prompts a step")
    add("--tokens", type=int, default=512, help="of an answer")
    args = parser.parse_args()
    out = f"out/phases/{args.shape}"
    first = stage1(args, f"{out}/stage1", f"--model={random_model(args.shape)}", f"--limit={args.prompts}", "--samples=2",
                   f"--max_new_tokens={args.tokens}")
    results = {}
    print(f"{'':10s}{'sampling':>10s}{'reference':>10s}{'update':>10s}{'a step':>10s}{'tokens/s':>10s}{'peak GB':>10s}")
    for algo, name in NAMES.items():
        rows = train(args, f"{out}/{algo}", first, f"--algo={algo}", f"--batch_size={args.batch_size}", "--eval_limit=1",
                     "--eval_every=100000")
        rows = [row for row in rows if row["step"] > 1]
        mean = lambda values: float(np.mean(list(values)))
        phases = {phase: mean(row["seconds"][phase] for row in rows) for phase in ("sampling", "reference", "update")}
        step, tokens = sum(phases.values()), mean(row["tokens"] for row in rows)
        results[name] = dict(phases, step=step, tokens_per_second=tokens / step, peak_gb=max(row["memory_gb"] for row in rows))
        print(f"{name:10s}" + "".join(f"{value:10,.2f}" for value in results[name].values()), flush=True)
    settings = dict(prompts=args.batch_size, answer=args.tokens, steps=args.steps)
    save(f"phases-{args.shape}", settings=settings, results=results)


if __name__ == "__main__":
    main()
