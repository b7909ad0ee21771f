"""A real pretrained model, SmolLM2-135M-Instruct, learns word problems on two cores.

    git clone https://github.com/arkilpatel/SVAMP out/SVAMP && python -m experiments.words out/SVAMP
    python -m experiments.real                   π_ref, then five seeds → experiments/results/real.json, .png
    python -m experiments.real --seeds 1 --ways apo 'apo --lora=16 --lr=1e-4' 'grpo --group=4 --batch_size=8'

The problems are files of {"question", "answer"}, and for the demonstrations {"chain"}, 56*9=504;504/2=252. As
it comes the model earns nothing, for nothing in the prompt asks for \\boxed{}. So it is shown a thousand
demonstrations first (`experiments/cold_start.py`), a quarter of them a wrong number without steps, and that
is π_ref. Then come both stages on other problems, and evaluate.py on problems that no run trains on: held-out
ones of the same source, and SVAMP, which is harder by design. (MAWPS repeats itself. What stands in several
of these files, by its letters and digits, is kept in one: first in the held-out ones, then among the
demonstrations.)

This is `experiments.sweep` with a cold start before it: --ways, --seeds, --stage1 and --train are its flags.
What an earlier start has finished in out/real/ is not run again.
"""

import shlex
from pathlib import Path

from experiments import lab, sweep
from experiments.words import letters
from rewards import load_problems
from vstar import write_rows

# SmolLM2's own template without its system message, which would be a third of all tokens
PROMPT = "--prompt=<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
ASK = [PROMPT, "--max_new_tokens=64"]


def main():
    parser = sweep.make_parser(__doc__)
    add = parser.add_argument
    add("--name", default="real", help="of the results, and of the folder in out/")
    add("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="a hub id or a folder")
    add("--demonstrations", default="out/words/demonstrations.jsonl", help="problems with a chain")
    add("--data", default="out/words/train.jsonl", help="the problems to train on")
    add("--eval_data", nargs="+", help="held-out problems, one file or several; the first gives the curve",
        default=["out/words/test.jsonl", "out/words/svamp.jsonl"])
    add("--cold", default="--wrong=0.25 --steps=96 --lr=1e-4", help="cold_start.py's flags")
    parser.set_defaults(
        seeds=5, steps=24, stage1="--samples=4 --limit=640",
        train="--filter=unsolved --batch_size=32 --lr=1e-5 --warmup=3 --beta2=0.03 "
        "--eval_limit=128 --eval_every=12",
        evaluate="--samples=8 --limit=128")
    args = parser.parse_args()
    out = lab.ROOT / "out" / args.name
    *held_out, demonstrations, data = disjoint(out, [*args.eval_data, args.demonstrations, args.data])
    cold = [f"--model={args.model}", f"--data={demonstrations}", *ASK, *shlex.split(args.cold)]
    small = "--tokens_per_microbatch=512"  # little padding
    lab.run(args, "experiments.cold_start", out, "cold/model/config.json", *cold, small, f"--out={out}/cold")
    args.stage1 = shlex.join([f"--model={out}/cold/model", f"--data={data}", *ASK]) + f" {args.stage1}"
    args.train = shlex.join([small, f"--eval_data={held_out[0]}"]) + f" {args.train}"
    args.evaluate = shlex.join(["--data", *held_out, *ASK, "--dtype=float32"]) + f" {args.evaluate}"
    sweep.sweep(args)


def disjoint(out, files):
    """The problems of each file whose text stands in no file before it, and once. → the files of these"""
    seen, paths = set(), []
    for file in files:
        problems = []
        for problem in load_problems(file):
            text = letters(problem["question"])
            if text not in seen:
                problems.append(problem)
            seen.add(text)
        path = out / f"data/{len(paths)}/{Path(file).stem}.jsonl"
        write_rows(path, problems)
        paths.append(str(path))
        print(f"{file}: {len(problems)} problems that stand in no file before")
    return paths


if __name__ == "__main__":
    main()
