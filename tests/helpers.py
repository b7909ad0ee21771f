"""What the tests share: commands, what a command leaves behind, files that are made once, small models and
samples.

pytest loads this file as a plugin (.pytest.ini), so that its fixtures are there for all tests of the project.
"""

import importlib
import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import transformers

import rewards
import train
import vstar
from vstar import Completion, TransformersSampler

HERE = Path(__file__).parents[1]
REAL = HERE.parent / "shared" / "data"  # real benchmark files, where somebody put them
LONG = bool(os.environ.get("LONG"))  # more kills, more steps
TINY = ["--model=tiny/model", "--data=tiny/train.jsonl", "--prompt={question}", "--max_new_tokens=64"]
TINY += ["--engine=transformers"]

# one thread a process: for so small a model as quick as two, and ten times quicker where the cores have
# other work
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# ---------------------------------------------------------------------------------------------------------
# which tests run when

needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="no benchmark files in ../shared/data")
whole = pytest.mark.whole  # starts processes, runs a stage, or takes seconds


def long(test):
    """Not in the plain `pytest`. It is `whole` as well, because a -m of one's own replaces .pytest.ini's."""
    return pytest.mark.long(whole(test))


def long_value(value):
    """Of a parameter: the test with it is long."""
    values = value if isinstance(value, tuple) else (value,)
    return pytest.param(*values, marks=[pytest.mark.long, whole])


# ---------------------------------------------------------------------------------------------------------
# commands. Each is a list, such as ["vstar.py", "--samples=2"], for `run`, `torchrun`, `inside` or `start`


def stage1(out, *more):
    """Three chunks of prompts, each of 256 answers."""
    return ["vstar.py", *TINY, "--limit=384", "--samples=2", f"--out={out}", *more]


def stage2(rows, out, *more):
    sizes = ["--steps=6", "--batch_size=25", "--tokens_per_microbatch=300", "--lr=3e-4", "--beta2=0.1"]
    when = ["--eval_every=2", "--save_every=2", "--show_every=3"]
    held_out = ["--eval_data=tiny/test.jsonl", "--eval_limit=40"]
    files = [f"--vstar={rows}", f"--out={out}", "--engine=transformers"]
    return ["train.py", *files, *sizes, *when, *held_out, *more]


def evaluation(out, *more, models=("tiny/model",)):
    """Two chunks of problems."""
    what = ["--data=tiny/test.jsonl", "--prompt={question}", "--limit=160", "--samples=4"]
    how = ["--max_new_tokens=64", "--engine=transformers"]
    return ["evaluate.py", "--model", *models, *what, *how, f"--out={out}", *more]


def run(*command, check=True, **env):
    """A script as a user runs it."""
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, cwd=HERE, text=True,
                          capture_output=True, env={**os.environ, **env})
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def torchrun(count, *command, **keywords):
    return run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", count, *command, **keywords)


def inside(*command, check=True):
    """The same script's main() in this process, which saves the seconds of a start."""
    if dist.is_initialized():  # by vLLM's engine, which lives in this process
        return run(*command, check=check)
    name, *flags = command[1:] if command[0] == "-m" else command
    script = importlib.import_module(name.removesuffix(".py"))
    code, output, errors = 0, io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    argv = mock.patch.object(sys, "argv", [name, *map(str, flags)])
    with argv, chdir(HERE), redirect_stdout(output), redirect_stderr(errors):
        try:
            vstar.run_script(script.main)
        except SystemExit as stop:
            code = stop.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            if dist.is_initialized():
                dist.destroy_process_group()
    done = subprocess.CompletedProcess(command, code, output.getvalue(), errors.getvalue())
    assert not check or code == 0, done.stdout + done.stderr
    return done


def start(*command, **more):
    """A process that goes on while the test does. Its output is not kept, unless `more` says so."""
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    command = [sys.executable, *map(str, command)]
    return subprocess.Popen(command, cwd=HERE, text=True, **{**quiet, **more})


def wait_until(happened, *processes):
    while not happened() and all(process.poll() is None for process in processes):
        time.sleep(0.002)


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.wait()


@contextmanager
def full_disk(kilobytes):
    """No file may grow beyond so much."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes * 1024, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# ---------------------------------------------------------------------------------------------------------
# what a command left behind


def refused(done, *words, alone=True):
    """It ended with code 2 and one line that holds these words, `alone` unless there was a progress bar."""
    lines = done.stderr.strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1 and "Traceback" not in done.stderr, done.stderr
    assert len(lines) == 1 or not alone, done.stderr
    for word in words:
        assert word in errors[0], errors[0]


def ends_in_one_line(capsys, call, *words):
    with pytest.raises(SystemExit) as stop:
        call()
    refused(SimpleNamespace(returncode=stop.value.code, stderr=capsys.readouterr().err), *words)


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def metrics(out):
    """metrics.jsonl without what is a time or the machine's."""
    machine = ("seconds", "tokens_per_second", "memory_gb")
    rows = read_jsonl(out / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key not in machine} for row in rows]


def settings_in(config):
    return json.loads(config.read_text())["settings"]


def weights(out):
    return (out / "model/model.safetensors").read_bytes()


def close(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other):
        assert a.keys() == b.keys()
        assert a == pytest.approx(b, rel=2e-3, abs=1e-4)


def copy_rows(rows, path, lines=None):
    """Stage 1's files under another name, perhaps with other rows."""
    path.write_text(rows.read_text() if lines is None else "\n".join(lines) + "\n")
    path.with_suffix(".config.json").write_text(rows.with_suffix(".config.json").read_text())
    return path


def all_of_stage1(path):
    """Its settings say that the rows that are there are all."""
    config = path.with_suffix(".config.json")
    content = json.loads(config.read_text())
    content["settings"] |= {"problems' ids": vstar.hash_of_ids(read_jsonl(path))}
    config.write_text(json.dumps(content))
    return path


def learns(command, out):
    """From less than half right to more than 80 %, by writing the steps."""
    sizes = ["--batch_size=128", "--decode_rows=1024", "--tokens_per_microbatch=16384", "--warmup=5"]
    inside(*command, *sizes, "--eval_limit=256", "--eval_every=25", "--save_every=99")
    rows = metrics(out)
    assert rows[0]["accuracy"] < 0.5 and rows[-1]["accuracy"] > 0.8
    assert rows[-1]["length"] > 1.5 * rows[1]["length"]  # it has found out that writing the steps pays
    return rows


def own_reward(folder, body):
    """A file with a reward of one's own: what --reward takes."""
    (folder / "mine.py").write_text(f"def judge(response, row, finished):\n    {body}\n")
    rewards.load_reward.cache_clear()  # a process runs a file once
    return f"{folder}/mine.py:judge"


# ---------------------------------------------------------------------------------------------------------
# files that are made once


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """Stage 1 in one go, over some problems. → its rows, and what it said"""
    out = tmp_path_factory.mktemp("stage1") / "vstar.jsonl"
    return out, inside(*stage1(out))


@pytest.fixture(scope="session")
def all_rows(tmp_path_factory):
    """Stage 1's rows for the whole embedded world, N = 8."""
    out = tmp_path_factory.mktemp("rows") / "vstar.jsonl"
    inside("vstar.py", *TINY, "--decode_rows=1024", f"--out={out}")
    return out


@pytest.fixture(scope="session")
def trained(all_rows, tmp_path_factory):
    """Six steps of Stage 2 in one go. → its folder, and what it said"""
    out = tmp_path_factory.mktemp("train") / "run"
    return out, inside(*stage2(all_rows, out))


# ---------------------------------------------------------------------------------------------------------
# models, samplers, samples


def tiny_tokenizer():
    return transformers.AutoTokenizer.from_pretrained(HERE / "tiny/model")


def tiny_model():
    return transformers.AutoModelForCausalLM.from_pretrained(HERE / "tiny/model").eval()


def small_model(vocabulary=11, kind="Qwen2", seed=0, hidden=32, layers=2):
    """A random model of a few thousand parameters; scaled up, so that its distribution is far from
    uniform."""
    torch.manual_seed(seed)
    sizes = dict(vocab_size=vocabulary, bos_token_id=None, eos_token_id=0, pad_token_id=0)
    if kind == "GPT2":
        sizes |= dict(n_embd=hidden, n_layer=layers, n_head=2, n_positions=128)
    else:
        sizes |= dict(hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers)
        sizes |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)
    config = getattr(transformers, f"{kind}Config")(**sizes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    return model.eval()


def adapted(model, rank=3, dtype=torch.float32, recompute=False):
    """A Policy of the model with additions that have learned something: B is not 0."""
    policy = train.LoraPolicy(model, rank, dtype, 0, recompute)
    for name, parameter in policy.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    return policy


def sampler_of(model, limit=20, temperature=1.0, rows=64, eos=(0,)):
    return TransformersSampler(model, list(eos), limit, temperature, rows)


def some_samples(count, seed=0, vocabulary=11):
    rng = random.Random(seed)
    samples = []
    for i in range(count):
        prompt = [rng.randrange(vocabulary) for _ in range(rng.randint(1, 9))]
        # EOS, which also pads
        tokens = [rng.randrange(1, vocabulary)
                  for _ in range(rng.randint(0, 12))] + [0]
        problem = dict(id=str(i), tokens=prompt,
                       vstar=rng.random(), rewards=[1.0])
        completion = Completion(tokens, True, [-1.0] * len(tokens))
        samples.append(train.Sample(problem, completion, "", float(rng.random() < 0.5), i))
    return samples


def some_args(**more):
    sizes = dict(tokens_per_microbatch=100_000, minibatches=1, batch_size=24, passes=1, max_new_tokens=13)
    return SimpleNamespace(**sizes | dict(temperature=1.0, beta2=0.1, max_grad_norm=1e9, lora=None) | dict(
        reward=None, samples=8) | more)


def run_of(objective, policy, reference, optimizer=None):
    """What an update needs of a run."""
    return train.Run(objective.args, objective, None, policy,
                     reference, None, optimizer, None, torch.device("cpu"))


def sgd(policy, lr=1.0):
    """Plain gradient descent: at a rate of 1 the step is the gradient."""
    return torch.optim.SGD(policy.parameters(), lr)
