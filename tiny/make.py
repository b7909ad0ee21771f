r"""Makes the embedded world: a small reference policy, its problems and its recipes, from nothing.

The task is addition. The model has seen two kinds of demonstrations:

    482+795=\boxed{1277}                           at once: for so small a model nearly always wrong
    482+795=2+5=7;8+9=17;4+7+1=12;\boxed{1277}     worked digit by digit from the right: mostly right

and imitates both. Reinforcement learning can find out that writing the steps pays (accuracy and length rise
together), and then that the demonstrations' slips do not. Long sums were rarely worked, so some prompts are
never solved.

    python tiny/make.py                                    the files beside this one, < 2 minutes on 2 cores
    python tiny/make.py --digits 3 4 5 6 --hidden 256 --layers 4 --steps 20000 --out harder    another world

`--operators + -` adds subtraction: 482-295=12-5=7;17-9=8;3-2=1;\boxed{187}.

A world of one's own, such as numbers to be written backwards, is a file beside train.py:

    from random import Random
    from tiny.make import make_world

    def demonstration(rng, args, progress):
        n = str(rng.randrange(10**4, 10**5))
        return f"{n}>", f"\\boxed{{{rng.choice([n, n[::-1]])}}}"

    numbers = Random(0).sample(range(10**4, 10**5), 1536)
    problems = [{"question": f"{n}>", "answer": str(n)[::-1]} for n in numbers]
    make_world("out/backwards", problems[:1024], problems[1024:], demonstration, "0123456789>}")
"""

import argparse
import json
import math
import random
import sys
from pathlib import Path

import torch
from transformers import AddedToken, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

CHARACTERS = "0123456789+-*=;}"

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                 formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--digits", type=int, nargs="+", default=[2, 3, 4], help="how long the two numbers are")
parser.add_argument("--operators", nargs="+", choices=["+", "-"], default=["+"])
parser.add_argument("--worked", type=float, nargs=2, default=[0.65, 0.25],
                    help="the share of worked demonstrations, for the shortest and the longest sums")
parser.add_argument("--slips", type=float, default=0.04,
                    help="the share of wrong digits in worked demonstrations")
parser.add_argument("--train", type=int, default=1024, help="problems to train on")
parser.add_argument("--test", type=int, default=512, help="problems to test on, none of them among the first")
parser.add_argument("--hidden", type=int, default=96)
parser.add_argument("--layers", type=int, default=2)
parser.add_argument("--steps", type=int, default=2400, help="supervised steps")
parser.add_argument("--batch", type=int, default=32, help="demonstrations a step")
parser.add_argument("--lr", type=float, default=2e-3)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--device", default="cpu")
parser.add_argument("--out", type=Path, default=Path("tiny"),
                    help="the folder; the recipes name it, so run from above")


def problem(rng, args):
    length = rng.choice(args.digits)
    smallest = 10 ** (length - 1)
    a, b = (rng.randint(smallest, 10 * smallest - 1) for _ in range(2))
    operator = rng.choice(args.operators) if len(args.operators) > 1 else args.operators[0]
    if operator == "-":
        a, b = max(a, b), min(a, b)
    return a, operator, b


def worked(rng, a, operator, b, slips):
    """482+795= → 2+5=7;8+9=17;4+7+1=12;\\boxed{1277}, with slips here and there that the rest builds on."""
    steps, carry, result = [], 0, ""
    for x, y in zip(reversed(str(a)), reversed(str(b))):
        if operator == "-":
            x = int(x) - carry
            carry = x < int(y)  # borrowed from the next digit
            total = x + 10 * carry - int(y)
            if rng.random() < slips:
                total = (total + rng.choice([-1, 1])) % 10
            steps.append(f"{x + 10 * carry}-{y}={total};")
            result = str(total) + result
            continue
        total = int(x) + int(y) + carry
        if rng.random() < slips:
            total = max(0, total + rng.choice([-1, 1]))
        steps.append(f"{x}+{y}{'+1' if carry else ''}={total};")
        carry, result = total // 10, str(total % 10) + result
    result = ("1" if carry else "") + result if operator == "+" else result.lstrip("0") or "0"
    return "".join(steps) + "\\boxed{" + result + "}"


def solution(a, operator, b):
    return a + b if operator == "+" else a - b


def demonstration(rng, args, progress):
    """Prompt and answer. The first half of the lessons is all worked, or it would not learn to carry."""
    a, operator, b = problem(rng, args)
    short, long = min(args.digits), max(args.digits)
    share = args.worked[0] + (args.worked[1] - args.worked[0]) * (len(str(a)) - short) / max(1, long - short)
    worked_out = progress < 0.5 or rng.random() < share
    answer = f"\\boxed{{{solution(a, operator, b)}}}"
    if worked_out:
        answer = worked(rng, a, operator, b, args.slips)
    return f"{a}{operator}{b}=", answer


def make_tokenizer(characters=CHARACTERS):
    """One token a character, and one for \\boxed{. <eos> also pads, as in many real tokenizers."""
    for character in characters:
        if characters.count(character) > 1:
            fail(f"the character {character!r} is given twice")
        if not " " <= character <= "~":
            fail(f"the character {character!r}: take one of ASCII's that can be printed")
    # this kind of tokenizer writes a space as Ġ
    vocabulary = ["<eos>", "<unk>", *characters.replace(" ", "Ġ")]
    numbered = {token: i for i, token in enumerate(vocabulary)}
    tokenizer = Qwen2Tokenizer(vocab=numbered, merges=[], eos_token="<eos>",
                               pad_token="<eos>", unk_token="<unk>")
    tokenizer.add_tokens([AddedToken("\\boxed{", normalized=False)])
    return tokenizer


def fail(message):
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def make_model(args, demonstration=demonstration, characters=CHARACTERS):
    """→ π_ref, which imitates the demonstrations, and its tokenizer.

    demonstration(rng, args, progress) → a prompt and a completion; `progress` goes from 0 to 1.
    """
    tokenizer, rng = make_tokenizer(characters), random.Random(args.seed)
    torch.manual_seed(args.seed)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=args.hidden, intermediate_size=args.hidden * 8 // 3,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 32, num_key_value_heads=args.hidden // 32,
        # short texts
        max_position_embeddings=512, rope_parameters=dict(rope_type="default", rope_theta=100.0),
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )).to(args.device)
    adam = dict(lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    optimizer = torch.optim.AdamW(model.parameters(), **adam)
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / 50) * (1 - step / args.steps)
        pairs = [demonstration(rng, args, step / args.steps) for _ in range(args.batch)]
        loss = loss_of(model, tokenizer, pairs, characters)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 200 == 0 or step == args.steps - 1:
            print(f"step {step:5d}  loss {loss.item():.3f}", flush=True)
    rng = random.Random(args.seed + 2)
    with torch.no_grad():
        loss = loss_of(model, tokenizer, [demonstration(rng, args, 1.0) for _ in range(256)], characters)
    print(f"of 256 new demonstrations −ln π is {loss.item():.3f} a token "
          f"(with all tokens equally likely: {math.log(len(tokenizer)):.3f})")
    return model, tokenizer


def loss_of(model, tokenizer, pairs, characters):
    """The mean −ln π of the completions' tokens, EOS included."""
    missing = {*"".join(map("".join, pairs)).replace("\\boxed{", "")} - {*characters}
    if missing:
        fail(f"the demonstrations hold {', '.join(map(repr, sorted(missing)))}, not among the characters "
             f"{characters!r}")
    prompts, answers = (tokenizer(list(texts))["input_ids"] for texts in zip(*pairs))
    width = max(len(p) + len(a) for p, a in zip(prompts, answers)) + 1
    ids = torch.zeros(len(pairs), width, dtype=torch.long)  # right-padded with EOS, which is token 0
    labels = torch.full_like(ids, -100)  # no loss on the prompt, nor behind the first EOS
    for row, (p, a) in enumerate(zip(prompts, answers)):
        ids[row, : len(p) + len(a)] = torch.tensor(p + a)
        labels[row, len(p) : len(p) + len(a) + 1] = torch.tensor(a + [0])
    return model(input_ids=ids.to(model.device), labels=labels.to(model.device)).loss


def make_world(folder, train, test, demonstration, characters, steps=1600, stage1=(), stage2=()):
    """Writes π_ref, problems, and files of flags into `folder`.

    train, test: problems, {"question", "answer"}; demonstration: as make_model takes it, right or not;
    stage1, stage2: more flags, or others.
    """
    folder, args = Path(folder), parser.parse_args([f"--steps={steps}"])
    for part in make_model(args, demonstration, characters):  # the model and its tokenizer
        part.save_pretrained(folder / "world")
    for name, problems in ("train", train), ("test", test):
        lines = [json.dumps(problem) + "\n" for problem in problems]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    first = [f"--model={folder}/world", f"--data={folder}/train.jsonl", "--prompt={question}",
             "--max_new_tokens=64", "--decode_rows=1024", f"--out={folder}/vstar.jsonl", *stage1]
    second = ["@tiny/train.args", f"--vstar={folder}/vstar.jsonl", f"--eval_data={folder}/test.jsonl",
              f"--out={folder}/run", *stage2]
    for name, flags in ("vstar", first), ("train", second):
        (folder / f"{name}.args").write_text("\n".join(flags) + "\n")
    print(f"now: python vstar.py @{folder}/vstar.args && python train.py @{folder}/train.args")


def write_problems(path, pairs):
    with open(path, "w") as file:
        for i, (a, operator, b) in enumerate(pairs):
            row = dict(id=f"{path.stem}/{i:05d}", question=f"{a}{operator}{b}=")
            print(json.dumps(dict(row, answer=str(solution(a, operator, b)))), file=file)


def main():
    args = parser.parse_args()
    torch.use_deterministic_algorithms(True)
    world = sum(10 ** (2 * d) * 0.81 for d in set(args.digits))
    if args.train + args.test > world / 2:
        parser.error("so many different problems do not exist with so few --digits")
    rng, pairs = random.Random(args.seed + 1), {}
    while len(pairs) < args.train + args.test:  # all different
        pairs[problem(rng, args)] = None
    args.out.mkdir(parents=True, exist_ok=True)
    write_problems(args.out / "train.jsonl", list(pairs)[: args.train])
    write_problems(args.out / "test.jsonl", list(pairs)[args.train :])
    model, tokenizer = make_model(args)
    model.cpu().save_pretrained(args.out / "model")
    tokenizer.save_pretrained(args.out / "model")
    longest = math.ceil((10 * max(args.digits) + 20) / 8) * 8  # the longest worked answer and some room
    flags = f"--max_new_tokens={longest} --prompt={{question}} --decode_rows=1024"
    recipes = {"vstar": f"--data={args.out}/train.jsonl {flags}"}
    for name, flags in recipes.items():
        lines = f"--model={args.out}/model {flags}".replace(" --", "\n--")
        (args.out / f"{name}.args").write_text(f"{lines}\n")
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters → {args.out}")


if __name__ == "__main__":
    main()
