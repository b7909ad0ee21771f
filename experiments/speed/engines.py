"""Both engines in Stage 1, over the length of answers: which is quicker where?

    python -m experiments.speed.engines --model HuggingFaceTB/SmolLM2-135M-Instruct
                                                        → experiments/results/engines.json

The answers are stories, most of which go on until they are cut off. Tokens per second are those of the
sampling alone; the seconds of the whole script stand beside them, for vLLM starts slowly. What is in
out/engines/ is not run again.
"""

import sys

from experiments import lab
from experiments.compare import stage1_cost


def main():
    parser = lab.make_parser(__doc__)
    add = parser.add_argument
    add("--model", required=True)
    add("--data", default="tiny/train.jsonl")
    add("--prompt", default="Tell a long story about somebody who wants to know {question}")
    add("--lengths", type=int, nargs="+", default=[20, 60, 150, 500])
    add("--prompts", type=int, default=64)
    add("--dtype", default="float32")
    args = parser.parse_args()
    args.launch, found = sys.executable, {}
    for length in args.lengths:
        for engine in ("transformers", "vllm"):
            out = lab.ROOT / f"out/engines/{args.dtype}-{length}-{engine}"
            lab.run(args, "vstar", out, "vstar.jsonl", f"--model={args.model}", f"--data={args.data}",
                    "--chat", f"--prompt={args.prompt}", f"--limit={args.prompts}", "--samples=1",
                    f"--max_new_tokens={length}", f"--engine={engine}", f"--dtype={args.dtype}",
                    f"--out={out}/vstar.jsonl")
            tokens, seconds = stage1_cost(out)
            row = found[f"{engine} {length}"] = dict(tokens=tokens, tokens_per_second=round(tokens / seconds),
                                                     whole_seconds=lab.took(out, "vstar"))
            print(f"{engine:12s} {length:4d} new tokens: {row['tokens_per_second']:,} tokens/s, "
                  f"{row['whole_seconds']:.0f} s with the start", flush=True)
    lab.save("engines", settings=vars(args), engines=found)


if __name__ == "__main__":
    main()
