"""What the experiments share: runs that are not done twice, the rows they leave, pictures and results."""

import json
import os
import platform
import random
import re
import shlex
import shutil
import subprocess
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import transformers
from matplotlib.figure import Figure

from experiments.baselines import ALGORITHMS
from train import STEP as PHASES  # of a step: evaluations and checkpoints do not count

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments/results"
ONE_THREAD = dict(OMP_NUM_THREADS="1")


def make_parser(description, steps=None, seeds=5):
    """A parser; with `steps` it has the flags of runs, which are those of the embedded world by default."""
    parser = ArgumentParser(formatter_class=ArgumentDefaultsHelpFormatter)
    parser.description = description.splitlines()[0]
    add = parser.add_argument
    if steps is not None:
        add("--stage1", default="@tiny/vstar.args", help="vstar.py's flags")
        add("--train", default="@tiny/train.args", help="train.py's flags, before those that are varied")
        add("--launch", default=sys.executable, help="what starts a script: 'torchrun --nproc_per_node 8'")
        add("--steps", type=int, default=steps)
        add("--seeds", type=int, default=seeds)
        add("--jobs", type=int, default=2, help="untimed runs at a time, each with one thread (1 on GPUs)")
    return parser


# ----------------------------------------------------------------------------------------------------------
# runs


def run(args, script, out, done, *flags, **environment):
    """A script, a module or a baseline, unless an earlier start ran it to its end with these flags."""
    command, finished = shlex.join(flags), out / f"{script}.finished"
    if finished.exists() and finished.read_text() == command:
        return
    out.mkdir(parents=True, exist_ok=True)
    for stale in out.rglob("*.finished"):  # what lies below was made from what is made anew now
        stale.unlink()
    started = ["-m", script] if "." in script else [f"{script}.py"]
    if script in ALGORITHMS:
        started = ["-m", "experiments.baselines", script]
    with open(out / f"{script}.log", "w") as log:
        process = subprocess.run([*shlex.split(args.launch), *started, *flags],
                                 cwd=ROOT, env=os.environ | environment, stdout=log, stderr=log)
    if process.returncode or not (out / done).exists():
        sys.exit(f"{script} {command} failed; see {log.name}")
    finished.write_text(command)


def stage1(args, out, *flags, **environment):
    """→ the file with V̂*"""
    vstar = ROOT / out / "vstar.jsonl"
    first = shlex.split(args.stage1)
    run(args, "vstar", vstar.parent, vstar.name, *first, f"--out={vstar}", *flags, **environment)
    return vstar


def train(args, out, vstar, *flags, algorithm="apo", **environment):
    """→ the rows of metrics.jsonl"""
    out = ROOT / out
    script = "train" if algorithm == "apo" else algorithm
    first = shlex.split(args.train)
    first += [f"--vstar={vstar}", f"--out={out}/run", f"--steps={args.steps}"]
    first += ["--show_every=0", "--save_every=100000"]
    run(args, script, out, "run/model", *first, *flags, **environment)
    shutil.rmtree(out / "run/checkpoint", ignore_errors=True)  # 18 GB a run at 1.5B
    return read(out / "run/metrics.jsonl")


def side_by_side(args, function, choices):
    """Untimed work, --jobs at a time: [function(args, *choice) for choice in choices]"""
    with ThreadPoolExecutor(args.jobs) as pool:
        return list(pool.map(lambda choice: function(args, *choice), choices))


def read(path):
    """A .jsonl"""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ----------------------------------------------------------------------------------------------------------
# models of a shape, with random weights

# as in the config.json of each Qwen2.5, in the order of `config_of`
SHAPES = {
    "toy": (64, 2, 2, 1, 128, 151936, True),  # to try a script
    "0.5B": (896, 24, 14, 2, 4864, 151936, True),
    "1.5B": (1536, 28, 12, 2, 8960, 151936, True),
    "3B": (2048, 36, 16, 2, 11008, 151936, True),
    "7B": (3584, 28, 28, 4, 18944, 152064, False),
    "32B": (5120, 64, 40, 8, 27648, 152064, False),
    "72B": (8192, 80, 64, 8, 29568, 152064, False),
}


def config_of(shape):
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
             "intermediate_size", "vocab_size", "tie_word_embeddings")
    sizes = dict(zip(names, SHAPES[shape]))
    tokens = dict(eos_token_id=0, pad_token_id=0, bos_token_id=None)  # the embedded world's
    return transformers.Qwen2Config(**sizes, **tokens, max_position_embeddings=32768)


def random_model(shape):
    """A Hugging Face folder with random weights of this shape and the embedded world's tokenizer."""
    folder = ROOT / f"out/random-{shape}"
    if not (folder / "tokenizer_config.json").exists():
        torch.manual_seed(0)
        model = transformers.Qwen2ForCausalLM(config_of(shape))
        model.to(torch.bfloat16).save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(ROOT / "tiny/model").save_pretrained(folder)
    return str(folder)


def toss(*_):
    """The reward of random weights. They earn nothing, and GPUs multiply gradients of zeros faster."""
    return float(random.random() < 0.5)


# ----------------------------------------------------------------------------------------------------------
# numbers


def seconds_of(row, phases=PHASES):
    """What a step took."""
    return sum(row["seconds"].get(phase, 0) for phase in phases)  # older rows have no "push"


def curve(rows):
    """[(step, held-out accuracy)]"""
    return [(row["step"], row["accuracy"]) for row in rows if "accuracy" in row]


def mean(key, rows):
    return float(np.mean([row[key] for row in rows if key in row]))  # step 0 has an accuracy alone


def over_seeds(runs):
    """[{key: number}], one a seed → {key: [mean, standard deviation]}; what is no number is left out"""
    table = {}
    for key, value in runs[0].items():
        if isinstance(value, (int, float)):
            values = [run[key] for run in runs]
            deviation = np.std(values, ddof=1) if len(runs) > 1 else np.nan
            table[key] = np.round([np.mean(values), deviation], 4).tolist()
    return table


def pm(pair):
    """[mean, deviation] → mean ± deviation; of one seed the mean alone"""
    return " ± ".join(f"{number:g}" for number in pair if number == number)


def show(header, rows):
    """A table in Markdown."""
    for cells in (header, ["---"] * len(header), *rows):
        print("|", " | ".join(cells), "|")


@contextmanager
def picture(name, columns=1):
    """Axes side by side, to draw held-out accuracy on. Saved as experiments/results/NAME.png."""
    figure = Figure(figsize=(3 + 3 * columns, 4), layout="constrained")
    axes = figure.subplots(1, columns, sharey=True, squeeze=False)[0]
    axes[0].set(ylabel="held-out accuracy", ylim=(0, 1))
    yield axes
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.savefig(RESULTS / f"{name}.png", dpi=110)


def draw_seeds(axis, x, y, label):
    """(points, seeds) each: their mean, and every seed as a thin line"""
    (line,) = axis.plot(x.mean(1), y.mean(1), label=label)
    axis.plot(x, y, color=line.get_color(), linewidth=0.5, alpha=0.4)


def machine():
    """What a number was measured with."""
    script = sys.modules["__main__"].__spec__.name
    names = re.findall("model name.*: (.*)", Path("/proc/cpuinfo").read_text())
    if torch.cuda.is_available():
        names.append(torch.cuda.get_device_name())
    return dict(command=shlex.join(["python", "-m", script, *sys.argv[1:]]),
                processors=Counter(names),  # {CPU: cores, GPU: 1}
                python=platform.python_version(),
                torch=torch.__version__,
                transformers=transformers.__version__)


def save(name, **results):
    """experiments/results/NAME.json. JSON has no NaN, which becomes null."""
    text = json.dumps(dict(machine=machine(), **results))
    results = json.loads(text, parse_constant=lambda _: None)
    (RESULTS / f"{name}.json").write_text(in_lines(results, 2) + "\n")


def in_lines(value, depth):
    """JSON, with a line for each entry down to this depth."""
    if depth == 0 or not isinstance(value, dict):
        return json.dumps(value)
    lines = [f"{json.dumps(key)}: {in_lines(inner, depth - 1)}" for key, inner in value.items()]
    return "{\n" + ",\n".join(lines) + "\n}"
