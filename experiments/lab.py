"""What the experiments share: run a stage once, read what it logged, name the machine, write the results."""

import json
import os
import platform
import random
import shlex
import shutil
import subprocess
import sys
import time
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
import transformers

from experiments.baselines import ALGORITHMS
from train import APO, evaluated

matplotlib.use("Agg")
ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments/results"
COLOURS = dict(apo="tab:red", grpo="tab:blue", rebel="tab:green", ppo="tab:orange")
NAMES = dict(apo="A*-PO", grpo="GRPO", rebel="REBEL", ppo="PPO")
PHASES = ("sampling", "reference", "update")  # of a step; evaluations and checkpoints do not count


def make_parser(description, steps=None, seeds=5):
    """A parser, and with `steps` the flags of runs: toy size by default; --stage1, --train and --launch make it a real
    model on real GPUs. 0: the script has steps of its own, so there is no such flag."""
    parser = ArgumentParser(description=description.splitlines()[0], formatter_class=ArgumentDefaultsHelpFormatter)
    if steps is not None:
        add = parser.add_argument
        add("--stage1", default="@tiny/vstar.args", help="vstar.py's flags")
        add("--train", default="@tiny/train.args", help="train.py's flags, before those that the experiment varies")
        add("--launch", default=sys.executable, help="what starts a script, for example 'torchrun --nproc_per_node 8'")
        if steps:
            add("--steps", type=int, default=steps)
        add("--seeds", type=int, default=seeds)
        add("--jobs", type=int, default=2, help="untimed runs at a time, each with one thread (1 on GPUs)")
    return parser


# ---------------------------------------------------------------------------------------------------------------------
# runs


def run(args, script, out, done, *flags, threads=None):
    """A script, or a baseline by its name, unless an earlier start has run it to its end."""
    if not (out / f"{script}.seconds").exists():
        out.mkdir(parents=True, exist_ok=True)
        began = time.perf_counter()
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)} if threads else None
        started = ["-m", "experiments.baselines", script] if script in ALGORITHMS else [f"{script}.py"]
        with open(out / f"{script}.log", "w") as log:
            command = [*shlex.split(args.launch), *started, *map(str, flags)]
            code = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT).returncode
        if code or not (out / done).exists():
            sys.exit(f"{shlex.join(command)} failed; see {log.name}")
        (out / f"{script}.seconds").write_text(f"{time.perf_counter() - began:.2f}\n")


def took(out, script):
    """The wall-clock seconds of a `run`, evaluations and start included."""
    return float((ROOT / out / f"{script}.seconds").read_text())


def stage1(args, out, *flags, **keywords):
    out = ROOT / out
    run(args, "vstar", out, "vstar.png", *shlex.split(args.stage1), f"--out={out}/vstar.jsonl", *flags, **keywords)
    return out / "vstar.jsonl"


def train(args, out, vstar, *flags, algorithm="apo", **keywords):
    """→ the rows of metrics.jsonl"""
    out = ROOT / out
    run(args, "train" if algorithm == "apo" else algorithm, out, "run/model", *shlex.split(args.train),
        f"--vstar={vstar}", f"--out={out}/run", f"--steps={args.steps}", "--show_every=0", "--save_every=100000",
        *flags, **keywords)
    shutil.rmtree(out / "run/checkpoint", ignore_errors=True)  # 18 GB a run at 1.5B
    settings = json.loads((out / "run/config.json").read_text())["settings"]
    completions = settings.get("group") or ALGORITHMS.get(algorithm, APO).completions
    rows = read(out / "run/metrics.jsonl")
    for row in rows:
        row["prompts"] = row["step"] * settings["batch_size"]
        row["tokens"] = row.get("length", 0) * settings["batch_size"] * completions  # generated in this step
    return rows


def side_by_side(args, calls):
    """Untimed work, some at a time: [function] → [result]"""
    with ThreadPoolExecutor(args.jobs) as pool:
        return list(pool.map(lambda call: call(), calls))


def read(path):
    """A .jsonl"""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def make_world(flags, out):
    """A world of its own, by tiny/make.py's flags."""
    subprocess.run([sys.executable, "tiny/make.py", *shlex.split(flags), f"--out={out}"], cwd=ROOT, check=True)


def problems(path, count, digits, operator, seed, but=()):
    """A file of different problems, none of which is in the files `but`."""
    rng, found = random.Random(seed), {}
    seen = {row["question"] for other in but for row in read(other)}
    while len(found) < count:
        length = rng.choice(digits)
        a, b = (rng.randint(10 ** (length - 1), 10**length - 1) for _ in range(2))
        a, b = (max(a, b), min(a, b)) if operator == "-" else (a, b)
        if f"{a}{operator}{b}=" not in seen:
            found[f"{a}{operator}{b}="] = str(a + b if operator == "+" else a - b)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(dict(id=f"{path.stem}/{i}", question=question, answer=answer)) + "\n"
                            for i, (question, answer) in enumerate(found.items())))
    return path


# ---------------------------------------------------------------------------------------------------------------------
# models of a shape, without their weights

# hidden size, layers, heads, heads of keys and values, inner size, vocabulary, tied: as in the config.json of each
# Qwen2.5; and one for trying the scripts
SHAPES = {"toy": (64, 2, 2, 1, 128, 151936, True), "0.5B": (896, 24, 14, 2, 4864, 151936, True),
          "1.5B": (1536, 28, 12, 2, 8960, 151936, True), "3B": (2048, 36, 16, 2, 11008, 151936, True),
          "7B": (3584, 28, 28, 4, 18944, 152064, False), "32B": (5120, 64, 40, 8, 27648, 152064, False),
          "72B": (8192, 80, 64, 8, 29568, 152064, False)}


def config_of(shape, **more):
    hidden, layers, heads, kv, inner, vocabulary, tied = SHAPES[shape]
    return transformers.Qwen2Config(hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
                                    num_key_value_heads=kv, intermediate_size=inner, vocab_size=vocabulary,
                                    tie_word_embeddings=tied, max_position_embeddings=32768, **more)


def random_model(shape):
    """A Hugging Face folder with random weights in the shape of a Qwen2.5 and the embedded world's tokenizer."""
    folder = ROOT / f"out/random-{shape}"
    if not (folder / "tokenizer_config.json").exists():
        torch.manual_seed(0)
        model = transformers.Qwen2ForCausalLM(config_of(shape, eos_token_id=0, pad_token_id=0, bos_token_id=None))
        model.to(torch.bfloat16).save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(ROOT / "tiny/model").save_pretrained(folder)
    return str(folder)


def toss(*_):
    """The reward of random weights, which earn nothing. Zeros alone would make gradients of zeros, which GPUs multiply
    faster."""
    return float(random.random() < 0.5)


# ---------------------------------------------------------------------------------------------------------------------
# numbers


def seconds_of(row, phases=PHASES):
    """What a step took."""
    return sum(row["seconds"][phase] for phase in phases)


def accuracies(rows):
    return [row["accuracy"] for row in evaluated(rows)]


def mean(key, rows):
    return float(np.mean([row[key] for row in rows if key in row]))  # step 0 has an accuracy alone


def mean_sd(values):
    """(mean, standard deviation) over seeds, rounded"""
    values = np.asarray(values, dtype=float)
    return [round(float(values.mean()), 4), round(float(values.std(ddof=1)), 4) if len(values) > 1 else None]


def over_seeds(runs):
    """[{key: number}], one a seed → {key: (mean, standard deviation)}; what is no number is left out"""
    numbers = [key for key, value in runs[0].items() if isinstance(value, (int, float))]
    return {key: mean_sd([run[key] for run in runs]) for key in numbers}


def pm(pair, digits=3):
    """(mean, deviation) → mean ± deviation"""
    return f"{pair[0]:.{digits}f}" + (f" ± {pair[1]:.{digits}f}" if pair[1] is not None else "")


@contextmanager
def picture(name, rows, columns, size, **more):
    """Axes to draw on, saved as experiments/results/NAME.png."""
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **more)
    yield axes
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(RESULTS / f"{name}.png", dpi=110)
    plt.close(figure)


def cpu():
    """Model and number of the cores."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} × {names[0]}" if names else platform.processor()


def machine():
    gpu = dict(gpu=f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}") if torch.cuda.is_available() else {}
    command = shlex.join(["python", "-m", sys.modules["__main__"].__spec__.name, *sys.argv[1:]])
    return dict(command=command, cpu=cpu(), **gpu, threads=torch.get_num_threads(), python=platform.python_version(),
                torch=torch.__version__, transformers=transformers.__version__)


def null_for_nan(value):
    """For JSON, which has no NaN."""
    if isinstance(value, dict):
        return {key: null_for_nan(some) for key, some in value.items()}
    if isinstance(value, (list, tuple)):
        return [null_for_nan(some) for some in value]
    return None if value != value else value


def save(name, **results):
    """experiments/results/NAME.json, a line per entry."""
    results = null_for_nan(dict(machine=machine(), **results))
    lines = []
    for key, value in results.items():
        if isinstance(value, dict) and key != "machine":
            inner = ",\n".join(f"  {json.dumps(str(k), ensure_ascii=False)}: {json.dumps(v, ensure_ascii=False)}"
                               for k, v in value.items())
            lines.append(f"{json.dumps(key)}: {{\n{inner}\n}}")
        else:
            lines.append(f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}")
    (RESULTS / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
