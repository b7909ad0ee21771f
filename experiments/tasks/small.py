"""What small tasks share: π_ref, a tiny Qwen2 that imitates demonstrations as in tiny/make.py; and both stages."""

import json
import shlex
from pathlib import Path

from experiments import lab
from tiny import make

# ---------------------------------------------------------------------------------------------------------------------
# π_ref


def train_small(folder, characters, demonstration, sums, **flags):
    """A Hugging Face folder with a model that imitates demonstration(rng, progress) → (prompt, answer), with a token a
    character. `progress` rises from 0 to 1: a demonstration may show the hard things first.

    A share `sums` of the demonstrations are the embedded world's: what becomes of a skill that the task does not train?
    flags: those of tiny/make.py.
    """
    args = make.parser.parse_args(shlex.split(" ".join(f"--{name} {flag}" for name, flag in flags.items())))

    def either(rng, args, progress):
        return make.demonstration(rng, args, progress) if rng.random() < sums else demonstration(rng, progress)

    # Ġ is how this kind of tokenizer writes a space
    model, tokenizer = make.make_model(args, either, characters.replace(" ", "Ġ"))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ---------------------------------------------------------------------------------------------------------------------
# both stages over seeds


def make_parser(description, folder, script, steps, asked):
    """FOLDER holds world/, train.jsonl and test.jsonl; the script, its function `reward`. asked: vstar.py's flags that
    say how. Rates are tiny/'s."""
    parser = lab.make_parser(description, steps=steps)
    script = Path(script).relative_to(lab.ROOT)
    parser.set_defaults(
        stage1=shlex.join([f"--model={folder}/world", f"--data={folder}/train.jsonl", f"--reward={script}:reward",
                           *asked, "--decode_rows=1024"]),
        train=f"@tiny/train.args --eval_data={folder}/test.jsonl --eval_every=5")
    return parser


def write(path, rows):
    """Problems, with ids."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(dict(id=f"{path.stem}/{i:04d}", **row)) + "\n" for i, row in enumerate(rows)))


def experiment(args, name, folder, others=()):
    """Both stages from each seed, and what becomes of sums and of `others` → experiments/results/NAME.json, .png

    others: {what: evaluate.py's flags}, other problems on which the task does not train
    """
    others = dict(others, sums=["--data=tiny/test.jsonl", "--prompt={question}", "--max_new_tokens=64", "--samples=4"])
    before = untrained(args, folder / "before", folder / "world", others)
    calls = [lambda seed=seed: one(args, folder / str(seed), seed, others) for seed in range(args.seeds)]
    runs = lab.side_by_side(args, calls)
    settings = {key: value for key, value in vars(args).items() if key not in ("launch", "jobs")}
    lab.save(name, settings=settings, before=before, runs=dict(enumerate(runs)))
    draw(name, runs, before)
    for seed, run in enumerate(runs):
        print(f"seed {seed}: held-out accuracy {run['before']:.3f} → {run['after']:.3f} in {run['seconds']:.0f} s; "
              + ", ".join(f"{other} {before[other]['accuracy']:.3f} → {run['untrained'][other]['accuracy']:.3f}"
                          for other in others))


def one(args, out, seed, others):
    first = lab.stage1(args, out, f"--seed={seed}", threads=1)
    curve = [{key: round(row[key], 4) for key in ("step", "accuracy", "reward", "length", "kl") if key in row}
             for row in lab.train(args, out, first, f"--seed={seed}", threads=1)]
    seconds = sum(lab.took(out, script) for script in ("vstar", "train"))
    return dict(before=curve[0]["accuracy"], after=curve[-1]["accuracy"], seconds=round(seconds, 1),  # with evaluations
                untrained=untrained(args, out, out / "run/model", others), curve=curve)


def untrained(args, out, model, others):
    """Each of the others, measured; of sums for each number of digits also the share of answers that are worked, and
    how many of those are right."""
    measured = {}
    for other, flags in others.items():
        folder = lab.ROOT / out / f"eval-{other}"
        lab.run(args, "evaluate", folder, "results.json", f"--model={model}", *flags, "--decode_rows=1024",
                f"--out={folder}", threads=1)
        ((found,),) = (sets.values() for sets in json.loads((folder / "results.json").read_text()).values())
        measured[other] = {key: round(found[key], 4) for key in ("accuracy", "length", "finished")}
    (rows,) = map(lab.read, folder.glob("*.jsonl.jsonl"))  # of the sums, which are the last
    for digits in sorted({row["question"].index("+") for row in rows}):
        answers = [pair for row in rows if row["question"].index("+") == digits
                   for pair in zip(row["rewards"], row["responses"])]
        right, worked = [right for right, _ in answers], [right for right, response in answers if ";" in response]
        measured[other][digits] = dict(accuracy=round(sum(right) / len(right), 4),
                                       worked=round(len(worked) / len(right), 4),
                                       worked_accuracy=round(sum(worked) / max(1, len(worked)), 4))
    return measured


def draw(name, runs, before):
    titles = dict(accuracy="held-out accuracy, temperature 1", length="tokens per answer", kl="KL to π_ref")
    with lab.picture(name, 1, 4, (13, 3)) as axes:
        for axis, (key, title) in zip(axes[0], titles.items()):
            for run in runs:
                axis.plot(*zip(*((row["step"], row[key]) for row in run["curve"] if key in row)), linewidth=1)
            axis.set(title=title, xlabel="step")
        for found, style in ((before, "ko"), *((run["untrained"], "x") for run in runs)):
            axes[0, 3].plot([*found], [other["accuracy"] for other in found.values()], style)
        axes[0, 3].set(title="what is not trained on (●: before)", xlim=(-0.5, len(before) - 0.5))
        for axis in axes[0, [0, 3]]:
            axis.set_ylim(0, 1)
