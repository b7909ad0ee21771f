"""A real pretrained model, SmolLM2-135M-Instruct, learns to add on two cores.

    python -m experiments.real                              → experiments/results/real.json, .png
    python -m experiments.real --ways full --seeds 1        both stages once, and the evaluation

The prompt is `What is 12 + 34?`; nothing in it asks for \\boxed{}. So the model is shown a few
demonstrations first, `12 + 34 = \\boxed{46}` (`warm_up`), a quarter of them wrong, and that is π_ref: half
of its answers are right. Then come both stages: for each seed full training and --lora 16, and if --ways
asks also the baselines, which get as many answers a step and the same learning rate (it was not tuned for
them). evaluate.py measures pass@k. Restartable: what is in out/real/ is not run again. `--jobs 6` puts six
runs on one GPU at a time.
"""

import random
import shlex
from itertools import product

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments import lab
from experiments.compare import stage1_cost
from train import Policy
from vstar import pass_at_k, write_rows

FOLDER = lab.ROOT / "out/real"
# SmolLM2's own template without its system message, which would be half of all tokens
PROMPT = "<|im_start|>user\nWhat is {question}?<|im_end|>\n<|im_start|>assistant\n"
ASK = [f"--prompt={PROMPT}", "--max_new_tokens=24", "--engine=transformers"]
WAYS = {"full": ("apo", []),
        "lora16": ("apo", ["--lora=16", "--lr=1e-4"]),
        "grpo": ("grpo", ["--group=4", "--batch_size=8"]),
        "rebel": ("rebel", ["--batch_size=16", "--passes=1"]),
        "ppo": ("ppo", [])}
KS = (1, 2, 4, 8)

# ------------------------------------------------------------------------------------------------------------
# π_ref


def problems(count):
    """Different sums of two numbers of two digits."""
    every = [*product(range(10, 100), repeat=2)]
    pairs = random.Random(0).sample(every, count)
    return [dict(question=f"{a} + {b}", answer=str(a + b)) for a, b in pairs]


def slip(rng, answer):
    """One of its digits is another."""
    position = rng.randrange(len(answer))
    another = rng.choice([digit for digit in "0123456789" if digit != answer[position]])
    return answer[:position] + another + answer[position + 1 :]


def warm_up(tokenizer, model, problems, steps, lr=5e-5, wrong=0.25, batch=16):
    """Supervised: down −ln π of the demonstrations, of which a share is wrong."""
    rng, policy = random.Random(0), Policy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(steps):
        warm = min(1, (step + 1) / 10)
        optimizer.param_groups[0]["lr"] = lr * warm * (1 - step / steps)
        ids, mask = [], []
        for problem in rng.sample(problems, batch):
            prompt = tokenizer(PROMPT.format(**problem)).input_ids
            answer = slip(rng, problem["answer"]) if rng.random() < wrong else problem["answer"]
            shown = tokenizer(f"{problem['question']} = \\boxed{{{answer}}}").input_ids
            ids.append(torch.tensor(prompt + shown + [tokenizer.eos_token_id]))
            mask.append(torch.arange(len(ids[-1])) >= len(prompt))
        ids, mask = (pad_sequence(rows, batch_first=True).to(model.device) for rows in (ids, mask))
        loss = -policy(input_ids=ids, completion_mask=mask).sum() / mask.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"warm-up {step:4d}  loss {loss.item():.3f}", flush=True)


def make_world(args):
    """The problems, and a π_ref that was shown none of those to train on and to test on."""
    sums = problems(4096)
    write_rows(FOLDER / "train.jsonl", sums[:768])
    write_rows(FOLDER / "test.jsonl", sums[1024:1280])
    if (FOLDER / "reference/tokenizer_config.json").exists():
        return
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    warm_up(tokenizer, model, sums[1280:], args.lessons)
    model.save_pretrained(FOLDER / "reference")
    tokenizer.save_pretrained(FOLDER / "reference")


# ------------------------------------------------------------------------------------------------------------
# both stages


def main():
    parser = lab.make_parser(__doc__, steps=24, seeds=3)
    first = [f"--model={FOLDER}/reference", f"--data={FOLDER}/train.jsonl", *ASK, "--samples=2"]
    held_out = f"--eval_data={FOLDER}/test.jsonl --eval_limit=128 --eval_every=6"
    second = f"--engine=transformers {held_out} --batch_size=32 --lr=1e-5 --warmup=3 --beta2=0.1"
    parser.set_defaults(jobs=1, stage1=shlex.join(first), train=second)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="a hub id or a folder")
    parser.add_argument("--lessons", type=int, default=64, help="supervised steps")
    parser.add_argument("--ways", nargs="+", default=["full", "lora16"], choices=WAYS)
    args = parser.parse_args()
    args.environment = lab.ONE_THREAD if args.jobs > 1 else {}
    make_world(args)
    before = measured(args, FOLDER / "before", FOLDER / "reference")
    lab.side_by_side(args, stage1, [(seed,) for seed in range(args.seeds)])
    tries = [*product(args.ways, range(args.seeds))]
    found = lab.side_by_side(args, one, tries)
    runs = {f"{way} {seed}": run for (way, seed), run in zip(tries, found)}
    lab.save("real", before=before, runs=runs)
    print("π_ref", before)
    with lab.picture("real") as (axis,):
        for name, run in runs.items():
            axis.plot(*zip(*run.pop("curve")), label=name)
            print(name, run)
        axis.set_xlabel("steps")


def stage1(args, seed):
    return lab.stage1(args, FOLDER / f"stage1/{seed}", f"--seed={seed}", **args.environment)


def one(args, way, seed):
    """Both stages and the evaluation."""
    algorithm, flags = WAYS[way]
    out, first = FOLDER / way / str(seed), stage1(args, seed)
    flags = [f"--seed={seed}", *flags]
    rows = lab.train(args, out, first, *flags, algorithm=algorithm, **args.environment)
    seconds = sum(map(lab.seconds_of, rows))
    if algorithm == "apo":  # the others do not need Stage 1
        seconds += stage1_cost(first.parent)[1]
    keys = ("reward", "kl", "entropy", "length")
    last = {key: lab.mean(key, rows[-5:]) for key in keys}
    memory = max(row["memory_gb"] for row in rows[1:])
    passes = measured(args, out / "eval", out / "run/model")
    return dict(passes, **last, minutes=seconds / 60, memory_gb=memory, curve=lab.curve(rows))


def measured(args, folder, model):
    """{pass@k} on problems that no run trains on; fp32 on a GPU too: bf16 would round LoRA's additions."""
    flags = [f"--model={model}", f"--data={FOLDER}/test.jsonl", *ASK, "--limit=128", f"--samples={KS[-1]}",
             "--dtype=float32", f"--out={folder}"]
    lab.run(args, "evaluate", folder, "results.json", *flags, **args.environment)
    (answers,) = folder.glob("*.jsonl.jsonl")
    rewards = np.array([row["rewards"] for row in lab.read(answers)])
    return {f"pass@{k}": float(pass_at_k(rewards, k).mean()) for k in KS}


if __name__ == "__main__":
    main()
