"""What small tasks share: π_ref, a tiny Qwen2 that imitates demonstrations as in tiny/make.py; and both stages."""

import json
import random
from pathlib import Path

import torch
from transformers import AddedToken, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from experiments import lab
from tiny import make

# ---------------------------------------------------------------------------------------------------------------------
# π_ref


def make_tokenizer(characters):
    """One token a character, and one for \\boxed{. <eos> also pads, as in many real tokenizers."""
    vocabulary = {token: i for i, token in enumerate(["<eos>", "<unk>", *characters])}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], eos_token="<eos>", pad_token="<eos>", unk_token="<unk>")
    tokenizer.add_tokens([AddedToken("\\boxed{", normalized=False)])
    return tokenizer


def train_small(folder, characters, demonstration, steps, hidden=96, layers=2, batch=32, lr=2e-3, seed=0):
    """A Hugging Face folder with a model that imitates demonstration(rng, progress) → (prompt, answer).

    `progress` goes from 0 to 1: a demonstration may show the hard things first.
    """
    tokenizer, rng = make_tokenizer(characters), random.Random(seed)
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=hidden * 8 // 3, num_hidden_layers=layers,
        num_attention_heads=hidden // 32, num_key_value_heads=hidden // 32, max_position_embeddings=512,
        rope_parameters=dict(rope_type="default", rope_theta=100.0),  # short texts
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=0, pad_token_id=0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 50) * (1 - step / steps)
        pairs = [demonstration(rng, step / steps) for _ in range(batch)]
        prompts, answers = (tokenizer(list(texts))["input_ids"] for texts in zip(*pairs))
        width = max(len(p) + len(a) for p, a in zip(prompts, answers)) + 1
        ids = torch.zeros(batch, width, dtype=torch.long)  # right-padded with EOS, which is token 0
        labels = torch.full_like(ids, -100)  # no loss on the prompt, nor behind the first EOS
        for row, (p, a) in enumerate(zip(prompts, answers)):
            ids[row, : len(p) + len(a)] = torch.tensor(p + a)
            labels[row, len(p) : len(p) + len(a) + 1] = torch.tensor(a + [0])
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 200 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {loss.item():.3f}", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def with_sums(demonstration, share):
    """A share of the embedded world's demonstrations among those of a task."""
    args = make.parser.parse_args([])
    return lambda rng, progress: (make.demonstration(rng, args, progress) if rng.random() < share
                                  else demonstration(rng, progress))


# ---------------------------------------------------------------------------------------------------------------------
# both stages over seeds


def make_parser(description, folder, script, steps, max_new_tokens):
    """FOLDER holds world/, train.jsonl and test.jsonl; the script, its function `reward`. Rates are tiny/'s."""
    parser = lab.make_parser(description, steps=steps)
    script = Path(script).relative_to(lab.ROOT)
    parser.set_defaults(
        stage1=f"--model={folder}/world --data={folder}/train.jsonl --reward={script}:reward --prompt={{question}} "
               f"--max_new_tokens={max_new_tokens} --decode_rows=1024",
        train=f"@tiny/train.args --eval_data={folder}/test.jsonl --eval_every=5")
    return parser


def write(path, rows):
    """Problems, with ids."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(dict(id=f"{path.stem}/{i:04d}", **row)) + "\n" for i, row in enumerate(rows)))


def experiment(args, name, folder):
    """Both stages from each seed, and what becomes of sums → experiments/results/NAME.json, .png"""
    before = sums(args, folder / "before", folder / "world")
    runs = lab.side_by_side(args, [lambda seed=seed: one(args, folder / str(seed), seed) for seed in range(args.seeds)])
    settings = {key: value for key, value in vars(args).items() if key not in ("launch", "jobs")}
    lab.save(name, settings=settings, sums_before=before, runs=dict(enumerate(runs)))
    draw(name, runs, before)
    for seed, run in enumerate(runs):
        print(f"seed {seed}: held-out accuracy {run['before']:.3f} → {run['after']:.3f} in {run['seconds']:.0f} s; "
              f"sums {before['accuracy']:.3f} → {run['sums']['accuracy']:.3f}")


def one(args, out, seed):
    first = lab.stage1(args, out, f"--seed={seed}", threads=1)
    curve = [{key: round(row[key], 4) for key in ("step", "accuracy", "reward", "length", "kl") if key in row}
             for row in lab.train(args, out, first, f"--seed={seed}", threads=1)]
    seconds = sum(float((lab.ROOT / out / f"{script}.seconds").read_text()) for script in ("vstar", "train"))
    return dict(before=curve[0]["accuracy"], after=curve[-1]["accuracy"], seconds=round(seconds, 1),  # with evaluations
                sums=sums(args, out, out / "run/model"), curve=curve)


def sums(args, out, model):
    """The embedded world's held-out problems, on which no task trains. For each number of digits also the share of
    answers that are worked, and how many of those are right."""
    flags = ["--prompt={question}", "--samples=4", "--max_new_tokens=64", "--decode_rows=1024", f"--out={out}/eval"]
    lab.run(args, "evaluate", lab.ROOT / out, "eval/results.json", f"--model={model}", "--data=tiny/test.jsonl", *flags,
            threads=1)
    ((found,),) = (sets.values() for sets in json.loads((lab.ROOT / out / "eval/results.json").read_text()).values())
    found = {key: round(found[key], 4) for key in ("accuracy", "length", "finished")}
    (rows,) = map(lab.read, (lab.ROOT / out / "eval").glob("*.jsonl.jsonl"))
    for digits in sorted({row["question"].index("+") for row in rows}):
        answers = [pair for row in rows if row["question"].index("+") == digits
                   for pair in zip(row["rewards"], row["responses"])]
        right, worked = [right for right, _ in answers], [right for right, response in answers if ";" in response]
        found[digits] = dict(accuracy=round(sum(right) / len(right), 4), worked=round(len(worked) / len(right), 4),
                             worked_accuracy=round(sum(worked) / max(1, len(worked)), 4))
    return found


def draw(name, runs, before):
    titles = dict(accuracy="held-out accuracy, temperature 1", length="tokens per answer", kl="KL to π_ref")
    with lab.picture(name, 1, 4, (13, 3)) as axes:
        for axis, (key, title) in zip(axes[0], titles.items()):
            for run in runs:
                axis.plot(*zip(*((row["step"], row[key]) for row in run["curve"] if key in row)), linewidth=1)
            axis.set(title=title, xlabel="step")
        labels = ["π_ref", *(f"seed {seed}" for seed in range(len(runs)))]
        axes[0, 3].bar(labels, [found["accuracy"] for found in (before, *(run["sums"] for run in runs))], color="0.6")
        axes[0, 3].tick_params(axis="x", rotation=45)
        axes[0, 3].set_title("accuracy on sums, not trained on")
        for axis in axes[0, [0, 3]]:
            axis.set_ylim(0, 1)
