"""From demonstrations to a π_ref: what to do where a model earns nothing yet.

    python -m experiments.cold_start --model HuggingFaceTB/SmolLM2-135M-Instruct --chat --max_new_tokens 64 \\
        --data demonstrations.jsonl --response '{chain};\\boxed{{answer}}' --out out/cold
    python vstar.py --model out/cold/model --chat --max_new_tokens 64 --data train.jsonl \\
        --out out/cold/vstar.jsonl

Reinforcement learning only makes likelier what π_ref sometimes does. Where Stage 1 finds nothing right, show
the model some hundred demonstrations first, and train it on other problems. This is supervised: it minimises
−ln π of the demonstrated completions, a mean over their tokens; the prompt's tokens do not count.

A demonstration is a problem as vstar.py reads it, with the same flags for its prompt. Its completion is made
of its fields by --response, and must earn 1 from the grader. With --wrong 0.25 a quarter of them give a wrong
number at once, without steps: π_ref then imitates both kinds, and there is something to find out.

A killed run is resumed by the same command. It writes config.json, checkpoint/ and model/ into --out.
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from rewards import fail, fill, is_correct
from train import (
    Policy,
    Run,
    Sample,
    checkpoints,
    fail_together,
    full_tensor,
    last_checkpoint,
    load_checkpoint,
    microbatches,
    prompts_of_step,
    save_checkpoint,
    save_model,
    shard,
    sum_over_ranks,
)
from vstar import (
    RANK,
    WORLD,
    Completion,
    Flags,
    add_machine_flags,
    add_policy_flags,
    add_problem_flags,
    first_process_first,
    grade,
    guard_settings,
    hash_of,
    load_model,
    prepare,
    read_flags,
    run_script,
    start_process,
)


def make_parser():
    parser = Flags("Supervised training on demonstrations, before Stage 1. The prompt's flags are those "
                   "of vstar.py.")
    add_policy_flags(parser)
    add = parser.group("demonstrations")
    add("--response", "{chain};\\boxed{{answer}}", "the completion, with fields of the problem in braces",
        metavar="TEMPLATE")
    add("--wrong", 0.0, "the share of demonstrations that give a wrong number at once, in a box")
    add("--steps", 160, "supervised steps")
    add("--batch_size", 16, "demonstrations a step")
    add("--lr", 5e-5, "AdamW's learning rate: it rises over ten steps, and then falls to 0")
    add = add_machine_flags(parser)
    add("--tokens_per_microbatch", 16384, "padded tokens a forward pass; bounds the memory")
    add = add_problem_flags(parser, split="train")
    add("--save_every", 50, "steps between checkpoints; the last two are kept")
    add("--out", Path("out/cold"), "the folder of this run")
    return parser


def main():
    if len(sys.argv) < 2:
        fail("say which: python -m experiments.cold_start --model … --data … (--help lists the flags)")
    with first_process_first("flags"):
        args = read_flags(make_parser(), "cold_start")
    device = start_process(args, group=True)
    with first_process_first("prepared"):
        problems, tokenizer, _ = prepare(args)
        check(args, tokenizer, problems)
        if RANK == 0:
            model = args.out / "model"
            outputs, precious = [args.out / "checkpoint", model], [*checkpoints(args.out), model]
            guard_settings(args, args.out / "config.json", outputs, precious,
                           ["save_every", "tokens_per_microbatch"], demonstrations=hash_of(problems))
            first = problems[0]
            print(f"cold start: {args.steps} steps of {args.batch_size} of {len(problems)} demonstrations, "
                  f"such as {first['prompt']!r} → {fill(args.response, first)!r}")
    args.lora = None  # save_model asks
    model = load_model(args.model, args.revision, "auto", "cpu")
    policy = shard(Policy(model, device.type == "cuda"), device, getattr(torch, args.dtype), master=True)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0)
    trained = torch.nn.ModuleList([policy])
    run = Run(args, None, tokenizer, policy, None, trained, optimizer, None, device)
    start = int(sum_over_ranks(last_checkpoint(args.out) if RANK == 0 else 0))
    if start > 0:
        load_checkpoint(run, start)
    train(run, problems, start)
    save_model(run)
    if RANK == 0:
        print(f"→ {args.out}/model; now Stage 1: python vstar.py --model {args.out}/model …")
    if dist.is_initialized():
        dist.destroy_process_group()


def train(run, problems, start):
    """A step depends on its number, --seed and the weights alone, so that a restart repeats it."""
    args = run.args
    bar = tqdm(desc="cold start", total=args.steps, initial=start, disable=RANK > 0)
    for step in range(start, args.steps):
        samples = [demonstrate(*prompt, run) for prompt in prompts_of_step(problems, step, args)]
        tokens = sum_over_ranks(sum(len(sample.completion.tokens) for sample in samples))
        loss = 0.0
        for chosen, ids, completion_mask in microbatches(samples, args, run.device):
            logp = run.policy(input_ids=ids, completion_mask=completion_mask)[: len(chosen)]
            part = -logp.sum() / tokens
            (part * WORLD).backward()  # FSDP averages gradients over processes
            loss += part.item()
        norm = full_tensor(clip_grad_norm_(run.policy.parameters(), 1.0)).item()
        if not math.isfinite(norm):
            fail_together(f"the gradient's norm is {norm}; lower --lr")
        warm, left = min(1, (step + 1) / 10), 1 - step / args.steps
        run.optimizer.param_groups[0]["lr"] = args.lr * warm * left
        run.optimizer.step()
        run.optimizer.zero_grad()
        done, loss = step + 1, sum_over_ranks(loss)
        bar.update()
        if done % 10 == 0 or done == args.steps:
            bar.write(f"step {done:4d}  −ln π {loss:.3f} a token")
        if done % args.save_every == 0 or done == args.steps:
            save_checkpoint(run, done)
    bar.close()


def demonstrate(serial, problem, run):
    """A sample as the rollout would give it, but written by us."""
    rng = np.random.default_rng([run.args.seed, serial])
    response = fill(run.args.response, problem)
    if rng.random() < run.args.wrong:
        response = f"\\boxed{{{slip(rng, problem['answer'])}}}"
    return Sample(problem, completion_of(run.tokenizer, response), response, 0.0, serial)


def completion_of(tokenizer, response):
    tokens = tokenizer(response, add_special_tokens=False).input_ids
    return Completion([*tokens, tokenizer.eos_token_id], True, [])


def slip(rng, answer):
    """One of its digits is another: 504 → 502."""
    position = rng.choice([i for i, character in enumerate(answer) if character.isdigit()])
    digit = rng.choice([digit for digit in "0123456789" if digit != answer[position]])
    return answer[:position] + digit + answer[position + 1 :]


def check(args, tokenizer, problems):
    """Every demonstration is right: each step of its chain, and the whole by the grader."""
    if tokenizer.eos_token_id is None:
        fail(f"--model {args.model}: its tokenizer has no EOS to end a demonstration with")
    pairs = [(problem, completion_of(tokenizer, fill(args.response, problem, "--response")))
             for problem in problems]
    for (problem, _), (response, reward) in zip(pairs, grade(args, tokenizer, pairs)):
        where = f"{args.data}, problem {problem['id']}"
        if args.wrong > 0 and not any(character.isdigit() for character in problem["answer"]):
            fail(f"{where}: --wrong needs a digit in the answer {problem['answer']!r}")
        if reward < 1:
            fail(f"{where}: the demonstration {response!r} earns {reward:g}; the answer is "
                 f"{problem['answer']!r}")
        if "{chain}" in args.response:  # 56*9=504;504/2=252
            result = ""
            for step in problem["chain"].split(";"):
                worked, _, result = step.partition("=")
                if not is_correct(worked, result):
                    fail(f"{where}: the chain's step {step!r} is wrong")
            if not is_correct(result, problem["answer"]):
                fail(f"{where}: the chain {problem['chain']!r} does not end in the answer "
                     f"{problem['answer']!r}")


if __name__ == "__main__":
    run_script(main)
