"""Answers typed questions by π_ref and by the policy that a run has trained, one below the other.

    python -m experiments.ask out/run                        a question a line; Ctrl-D ends it
    echo '12+34=' | python -m experiments.ask out/run

Prompt, temperature and length are the run's, from its config.json. The random numbers follow from the run's
--seed and the question, and are the same for both models. So who asks the same again gets the same response.
"""

import json
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

from transformers.utils import logging

from rewards import fail, readable
from vstar import TransformersSampler, add_prompts, load_model, prompt_seed, run_script, start_process


def main():
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        fail("say which run: python -m experiments.ask out/run")
    run = Path(sys.argv[1])
    args = SimpleNamespace(**json.loads((run / "config.json").read_text(encoding="utf-8"))["settings"])
    if not (run / "model").is_dir():
        fail(f"{run}/model: no such folder; train.py writes it at its end")
    args.engine = "transformers"
    args.dtype = "float32" if args.lora else "auto"  # bf16 would round small additions away
    device = start_process(args)
    logging.disable_progress_bar()
    models = {"π_ref": load_model(args.model, args.revision, args.dtype, device),
              "π": load_model(str(run / "model"), None, args.dtype, device)}
    with suppress(KeyboardInterrupt):
        for line in sys.stdin:
            if line.strip():
                answer(models, line.strip(), args)


def answer(models, question, args):
    problem = dict(id="typed", question=question)
    tokenizer, eos = add_prompts([problem], args)
    for name, model in models.items():
        sampler = TransformersSampler(model, eos, args.max_new_tokens, args.temperature, 1)
        seed = prompt_seed(args.seed, question)
        ((completion,),) = sampler.generate([problem["tokens"]], 1, [seed])
        response = readable(tokenizer.decode(completion.tokens, skip_special_tokens=True))
        print(f"── {name}{'' if completion.finished else ' (cut off)'}\n{response}", flush=True)


if __name__ == "__main__":
    run_script(main)
