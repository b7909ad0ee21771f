"""The four algorithms at a real model's shape with random weights: seconds by phase, tokens a second, peak memory.

    python experiments/phases.py --shape 1.5B                                        → experiments/phases-1.5B.json     (a GPU)
    python experiments/phases.py --shape toy --batch_size 4 --prompts 8 --tokens 16  to try the script on a CPU

Random weights earn nothing, so a coin is tossed for each reward. Nearly all answers are as long as they may be. No checkpoint is
written, and the first step, which warms up, is left out. Restartable: what is in out/phases/ already is not run again.
"""

import argparse
import sys

import numpy as np
from lab import NAMES, ROOT, add_flags, random_model, save, stage1, toss, train


def main():
    if "--child" in sys.argv:
        return child(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_flags(parser, steps=3, seeds=1)
    add = parser.add_argument
    add("--shape", default="1.5B", help="toy, or Qwen2.5's 0.5B, 1.5B, 7B")
    add("--prompts", type=int, default=256, help="of Stage 1")
    add("--batch_size", type=int, default=64, help="prompts a step")
    add("--tokens", type=int, default=512, help="of an answer")
    add("--only", nargs="+", choices=NAMES, default=list(NAMES))
    args = parser.parse_args()
    args.launch += f" {__file__} --child"
    out = f"out/phases/{args.shape}"
    first = stage1(args, f"{out}/stage1", f"--model={random_model(args.shape)}", f"--limit={args.prompts}", "--samples=2",
                   f"--max_new_tokens={args.tokens}")
    results = {}
    print(f"{'':10s}{'sampling':>10s}{'reference':>10s}{'update':>10s}{'a step':>10s}{'tokens/s':>10s}{'peak GB':>10s}")
    for algo in args.only:
        rows = train(args, f"{out}/{algo}", first, f"--algo={algo}", f"--batch_size={args.batch_size}", "--eval_data=",
                     "--tokens_per_microbatch=16384")
        rows = [row for row in rows if row["step"] > 1]
        mean = lambda values: float(np.mean(list(values)))
        phases = {phase: mean(row["seconds"][phase] for row in rows) for phase in ("sampling", "reference", "update")}
        step, tokens = sum(phases.values()), mean(row["tokens"] for row in rows)
        results[NAMES[algo]] = dict(phases, step=step, tokens_per_second=tokens / step,
                                    peak_gb=max(row["memory_gb"] for row in rows))
        print(f"{NAMES[algo]:10s}" + "".join(f"{value:10,.2f}" for value in results[NAMES[algo]].values()), flush=True)
        save(f"phases-{args.shape}", settings=dict(prompts=args.batch_size, answer=args.tokens, steps=args.steps), results=results)


def child(script, *flags):
    """vstar.py or train.py with two things changed."""
    sys.path.insert(0, str(ROOT))
    import train
    import vstar

    vstar.reward = train.reward = toss
    train.save_checkpoint = lambda *_: None
    sys.argv = [script, *flags]
    (vstar if script == "vstar.py" else train).main()


if __name__ == "__main__":
    main()
