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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib
import numpy as np
import torch
import transformers

matplotlib.use("Agg")
HERE, ROOT = Path(__file__).parent, Path(__file__).parents[1]
COLOURS = dict(apo="tab:red", grpo="tab:blue", rebel="tab:green", ppo="tab:orange")
NAMES = dict(apo="A*-PO", grpo="GRPO", rebel="REBEL", ppo="PPO")


def add_flags(parser, steps, seeds=5):
    """Toy size by default; --stage1, --train and --launch make it a real model on real GPUs."""
    add = parser.add_argument
    add("--stage1", default="@tiny/vstar.args", help="vstar.py's flags")
    add("--train", default="@tiny/train.args", help="train.py's flags, before those that the experiment varies")
    add("--launch", default=sys.executable, help="what starts a script, for example 'torchrun --nproc_per_node 8'")
    add("--steps", type=int, default=steps)
    add("--seeds", type=int, default=seeds)
    add("--jobs", type=int, default=2, help="untimed runs at a time, each with one thread (1 on GPUs)")


# hidden size, layers, heads, heads of keys and values, inner size, tied: Qwen2.5's, and one for trying the scripts
SHAPES = {"toy": (64, 2, 2, 1, 128, True), "0.5B": (896, 24, 14, 2, 4864, True), "1.5B": (1536, 28, 12, 2, 8960, True),
          "7B": (3584, 28, 28, 4, 18944, False)}


def random_model(shape):
    """A Hugging Face folder with random weights in the shape of a Qwen2.5 and the embedded world's tokenizer."""
    folder = ROOT / f"out/random-{shape}"
    if not (folder / "tokenizer_config.json").exists():
        hidden, layers, heads, kv, inner, tied = SHAPES[shape]
        torch.manual_seed(0)
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
            vocab_size=151936, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv,
            intermediate_size=inner, tie_word_embeddings=tied, max_position_embeddings=32768, eos_token_id=0, pad_token_id=0,
            bos_token_id=None))
        model.to(torch.bfloat16).save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(ROOT / "tiny/model").save_pretrained(folder)
    return str(folder)


def toss(*_):
    """The reward of random weights, which earn nothing: zeros alone would make the gradients zeros, which GPUs multiply faster."""
    return float(random.random() < 0.5)


def run(args, script, out, done, *flags, threads=None):
    """A script, unless an earlier start of the experiment has run it to its end. → wall-clock seconds"""
    took = out / f"{script}.seconds"
    if not took.exists():
        out.mkdir(parents=True, exist_ok=True)
        began = time.perf_counter()
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)} if threads else None
        with open(out / f"{script}.log", "w") as log:
            command = [*shlex.split(args.launch), f"{script}.py", *map(str, flags)]
            code = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT).returncode
        if code or not (out / done).exists():
            sys.exit(f"{shlex.join(command)} failed; see {log.name}")
        took.write_text(f"{time.perf_counter() - began:.2f}\n")
    return float(took.read_text())


def stage1(args, out, *flags, **keywords):
    out = Path(out).absolute()
    run(args, "vstar", out, "vstar.png", *shlex.split(args.stage1), f"--out={out}/vstar.jsonl", *flags, **keywords)
    return out / "vstar.jsonl"


def train(args, out, vstar, *flags, **keywords):
    """→ the rows of metrics.jsonl"""
    out = Path(out).absolute()
    run(args, "train", out, "run/model", *shlex.split(args.train), f"--vstar={vstar}", f"--out={out}/run", f"--steps={args.steps}",
        "--show_every=0", "--save_every=100000", *flags, **keywords)
    shutil.rmtree(out / "run/checkpoint", ignore_errors=True)  # 18 GB a run at 1.5B
    settings = json.loads((out / "run/config.json").read_text())
    rows = [json.loads(line) for line in (out / "run/metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row["prompts"] = row["step"] * settings["batch_size"]
        row["tokens"] = row.get("length", 0) * settings["batch_size"] * settings["group"]  # generated in this step
    return rows


def side_by_side(args, calls):
    """Untimed work, some at a time: [function] → [result]"""
    with ThreadPoolExecutor(args.jobs) as pool:
        return list(pool.map(lambda call: call(), calls))


def accuracies(rows):
    return [row["accuracy"] for row in rows if "accuracy" in row]


def mean_sd(values):
    """(mean, standard deviation) over seeds, rounded"""
    values = np.asarray(values, dtype=float)
    return [round(float(values.mean()), 4), round(float(values.std(ddof=1)), 4) if len(values) > 1 else None]


def pm(pair, digits=3):
    """(mean, deviation) → mean ± deviation"""
    return f"{pair[0]:.{digits}f}" + (f" ± {pair[1]:.{digits}f}" if pair[1] is not None else "")


def cpu():
    """Model and number of the cores."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} × {names[0]}" if names else platform.processor()


def machine():
    gpu = dict(gpu=f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}") if torch.cuda.is_available() else {}
    command = "python experiments/" + shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return dict(command=command, cpu=cpu(), **gpu, threads=torch.get_num_threads(), python=platform.python_version(),
                torch=torch.__version__, transformers=transformers.__version__)


def save(name, **results):
    """experiments/NAME.json, a line per entry."""
    results = dict(machine=machine(), **results)
    lines = []
    for key, value in results.items():
        if isinstance(value, dict) and key != "machine":
            inner = ",\n".join(f"  {json.dumps(str(k))}: {json.dumps(v, ensure_ascii=False)}" for k, v in value.items())
            lines.append(f"{json.dumps(key)}: {{\n{inner}\n}}")
        else:
            lines.append(f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}")
    (HERE / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
