"""The tests of the four scripts. (Those of experiments/ stand beside their code.)

    pytest                      six minutes on two cores; what needs vLLM or the benchmark files is skipped without
    pytest -m "not whole"       while one edits: starts no process and runs no stage, two minutes
    pytest -m long              the rest: more ranks and nodes, kills at random (LONG=1: fifty, and a thousand steps)
"""

import ast
import importlib
import importlib.util
import io
import json
import math
import os
import platform
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from itertools import combinations, product
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import mpmath
import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers

import evaluate
import rewards
import train
import vstar
from vstar import Completion, TransformersSampler, estimate_vstar, pass_at_k, prompt_seed, vstar_error

HERE = Path(__file__).parent
REAL = HERE.parent / "shared" / "data"  # real benchmark files, where somebody put them
LONG = bool(os.environ.get("LONG"))  # more kills, more steps
TINY = ["--model=tiny/model", "--data=tiny/train.jsonl", "--prompt={question}", "--max_new_tokens=64",
        "--engine=transformers"]

# one thread a process: for so small a model as quick as two, and ten times quicker where the cores have other work
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# ---------------------------------------------------------------------------------------------------------------------
# helpers: which tests run when

needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="no benchmark files in ../shared/data")
whole = pytest.mark.whole  # starts processes, runs a stage, or takes seconds


def long(test):
    """Not in the plain `pytest`. It is `whole` as well, because a -m of one's own replaces the one in .pytest.ini."""
    return pytest.mark.long(whole(test))


# ---------------------------------------------------------------------------------------------------------------------
# helpers: commands. Each is a list, such as ["vstar.py", "--samples=2"], for `run`, `torchrun`, `inside` or `start`


def stage1(out, *more):
    """Six chunks of prompts, each of 256 answers."""
    return ["vstar.py", *TINY, "--limit=768", "--samples=2", f"--out={out}", *more]


def stage2(rows, out, *more):
    return ["train.py", f"--vstar={rows}", f"--out={out}", "--engine=transformers", "--eval_data=tiny/test.jsonl",
            "--lr=3e-4", "--beta2=0.1", "--batch_size=25", "--eval_limit=40", "--eval_every=2", "--save_every=2",
            "--steps=6", "--show_every=3", "--tokens_per_microbatch=300", *more]


def evaluation(out, *more, models=("tiny/model",)):
    return ["evaluate.py", "--model", *models, "--data=tiny/test.jsonl", "--prompt={question}", "--max_new_tokens=64",
            "--samples=4", "--limit=160", "--engine=transformers", f"--out={out}", *more]  # two chunks of prompts


def run(*command, check=True, **env):
    """A script as a user runs it."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=HERE, text=True, capture_output=True,
                          env={**os.environ, **env})
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def torchrun(count, *command, **keywords):
    return run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", count, *command, **keywords)


def inside(*command, check=True):
    """The same script's main() in this process, which saves the seconds of a start."""
    if dist.is_initialized():  # by vLLM's engine, which lives in this process
        return run(*command, check=check)
    name, *flags = command[1:] if command[0] == "-m" else command
    script, code, said, errors = importlib.import_module(name.removesuffix(".py")), 0, io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    argv = mock.patch.object(sys, "argv", [name, *map(str, flags)])
    with argv, chdir(HERE), redirect_stdout(said), redirect_stderr(errors):
        try:
            vstar.run_script(script.main)
        except SystemExit as stop:
            code = stop.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            if dist.is_initialized():
                dist.destroy_process_group()
    done = subprocess.CompletedProcess(command, code, said.getvalue(), errors.getvalue())
    assert not check or code == 0, done.stdout + done.stderr
    return done


def start(*command, **more):
    """A process that goes on while the test does. Its output is not kept, unless `more` says so."""
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=HERE, text=True, **{**quiet, **more})


def wait_until(happened, *processes):
    while not happened() and all(process.poll() is None for process in processes):
        time.sleep(0.002)


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.wait()


def nodes(count, each, *command):
    """Several machines, as far as the processes can tell: an agent for each, with its own share of the cores. They meet
    at an address."""
    cores = sorted(os.sched_getaffinity(0))
    pin = lambda node: lambda: os.sched_setaffinity(0, cores[node::count] or cores)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    agent = ["-m", "torch.distributed.run", f"--nnodes={count}", f"--nproc_per_node={each}", "--rdzv_backend=c10d",
             f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=test", "--local_addr=127.0.0.1"]
    return [start(*agent, *command, start_new_session=True, preexec_fn=pin(node)) for node in range(count)]


def descendants(parent):
    """The ids of a process's children, and of theirs."""
    pairs = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            pairs.append((int(stat.parent.name), int(stat.read_text().rsplit(")", 1)[1].split()[1])))
        except OSError:
            continue  # it has just ended
    children = [child for child, its_parent in pairs if its_parent == parent]
    return children + [below for child in children for below in descendants(child)]


@contextmanager
def full_disk(kilobytes):
    """No file may grow beyond so much."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes * 1024, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# ---------------------------------------------------------------------------------------------------------------------
# helpers: what a command left behind


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
    return [{key: value for key, value in row.items() if key not in ("seconds", "tokens_per_second", "memory_gb")}
            for row in read_jsonl(out / "metrics.jsonl")]


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


MADE = {}  # the files of the three fixtures below, which are made once for all files of tests


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """Stage 1 in one go, over some problems. → its rows, and what it said"""
    if "undisturbed" not in MADE:
        out = tmp_path_factory.mktemp("stage1") / "vstar.jsonl"
        MADE["undisturbed"] = out, run(*stage1(out))
    return MADE["undisturbed"]


@pytest.fixture(scope="session")
def all_rows(tmp_path_factory):
    """Stage 1's rows for the whole embedded world, N = 8."""
    if "all_rows" not in MADE:
        MADE["all_rows"] = tmp_path_factory.mktemp("rows") / "vstar.jsonl"
        inside("vstar.py", *TINY, "--decode_rows=1024", f"--out={MADE['all_rows']}")
    return MADE["all_rows"]


@pytest.fixture(scope="session")
def trained(all_rows, tmp_path_factory):
    """Six steps of Stage 2 in one go. → its folder, and what it said"""
    if "trained" not in MADE:
        out = tmp_path_factory.mktemp("train") / "run"
        MADE["trained"] = out, run(*stage2(all_rows, out))
    return MADE["trained"]


# ---------------------------------------------------------------------------------------------------------------------
# helpers: models, samplers, samples


def tiny_tokenizer():
    return transformers.AutoTokenizer.from_pretrained(HERE / "tiny/model")


def tiny_model():
    return transformers.AutoModelForCausalLM.from_pretrained(HERE / "tiny/model").eval()


def small_model(vocabulary=11, kind="Qwen2", seed=0, hidden=32, layers=2):
    """A random model of a few thousand parameters; scaled up, so that its distribution is far from uniform."""
    torch.manual_seed(seed)
    sizes = dict(vocab_size=vocabulary, bos_token_id=None, eos_token_id=0, pad_token_id=0)
    if kind == "GPT2":
        config = transformers.GPT2Config(n_embd=hidden, n_layer=layers, n_head=2, n_positions=128, **sizes)
    else:
        config = getattr(transformers, f"{kind}Config")(
            hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    return model.eval()


def adapted(model, rank=3, dtype=torch.float32, recompute=False):
    """A Policy of the model with additions that have learned something: B is not 0."""
    policy = train.Policy(model, recompute).adapt(rank, dtype, seed=0)
    for name, parameter in policy.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    return policy


class TwoTokens(torch.nn.Module):
    """A 'language model' that always gives EOS (token 0) with chance p, token 1 otherwise."""

    def __init__(self, p):
        super().__init__()
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=2))
        self._no_split_modules, self.dtype = [], torch.float32
        self.table = torch.nn.Linear(1, 2, bias=False)
        self.table.weight.data = torch.tensor([[math.log(p)], [math.log(1 - p)]])

    def base_model(self, input_ids, use_cache):
        return SimpleNamespace(last_hidden_state=torch.ones(*input_ids.shape, 1))

    def get_output_embeddings(self):
        return self.table

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.table(torch.ones(*input_ids.shape, 1)))


def sampler_of(model, limit=20, temperature=1.0, rows=64, eos=(0,)):
    return TransformersSampler(model, list(eos), limit, temperature, rows)


def chi_square(counts, probabilities):
    """(statistic - degrees of freedom) in standard deviations; cells that expect fewer than 5 are pooled."""
    expected = probabilities * counts.sum()
    small = expected < 5
    counts = np.append(counts[~small], counts[small].sum())
    expected = np.append(expected[~small], max(expected[small].sum(), 1e-9))
    freedom = len(counts) - 1
    return (((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)


def some_samples(count, seed=0, vocabulary=11):
    rng = random.Random(seed)
    samples = []
    for i in range(count):
        prompt = [rng.randrange(vocabulary) for _ in range(rng.randint(1, 9))]
        tokens = [rng.randrange(1, vocabulary) for _ in range(rng.randint(0, 12))] + [0]  # ends in EOS, which also pads
        row = dict(id=str(i), tokens=prompt, vstar=rng.random(), rewards=[1.0])
        completion = Completion(tokens, True, [-1.0] * len(tokens))
        samples.append(train.Sample(row, completion, "", float(rng.random() < 0.5), i))
    return samples


def some_args(**more):
    return SimpleNamespace(**{**dict(tokens_per_microbatch=100_000, temperature=1.0, beta2=0.1, max_grad_norm=1e9,
                                     minibatches=1, batch_size=24, passes=1, max_new_tokens=13, lora=None,
                                     reward=None, samples=8), **more})


def run_of(objective, policy, reference, optimizer=None):
    """What an update needs of a run."""
    return train.Run(objective.args, objective, None, policy, reference, None, optimizer, None, torch.device("cpu"))


# ---------------------------------------------------------------------------------------------------------------------
# helpers: an update again, as one would write it without a thought of memory


def naive_states(model, sample):
    """One row at a time, no padding: what the model makes of the completion's tokens, before the head."""
    prompt, tokens = sample.row["tokens"], sample.completion.tokens
    return model.base_model(torch.tensor([prompt + tokens])).last_hidden_state[0, len(prompt) - 1 : -1]


def naive_logps(model, samples, temperature):
    """[(tokens of the completion,)], from full logits."""
    return [(model.lm_head(naive_states(model, s)) / temperature).log_softmax(-1).gather(
        -1, torch.tensor(s.completion.tokens)[:, None])[:, 0] for s in samples]


def naive_apo(args, samples, known):
    """A*-PO's objective again, sequence by sequence. → (policy's, critic's)"""
    loss = sum((args.beta2 * (logp.sum() - ref_logp.sum()) - (s.reward - s.row["vstar"])) ** 2 / len(samples)
               for logp, ref_logp, s in zip(known.logp, known.ref_logp, samples))
    return loss, torch.tensor(0.0)


def compare_with_autograd(objective, naive_loss, kind, recompute, make_critic=None):
    """Chunked head, recomputation, packing, any token budget: the loss and the step of one undivided batch. The policy
    is not the one that wrote the completions, so ratios are clipped."""
    args, samples = objective.args, some_samples(24)
    naive, old, reference = (small_model(kind=kind, seed=seed) for seed in range(3))
    for parameter, near in zip(old.parameters(), naive.parameters()):
        parameter.data.lerp_(near.data, 0.8)  # near, so that some ratios are clipped and some not
    critic, old_critic = (make_critic(kind, recompute, seed) if make_critic else None for seed in (3, 4))
    values = lambda critic: critic and [critic.model.get_output_embeddings()(naive_states(critic.model, s))[:, 0]
                                        for s in samples]
    with torch.no_grad():
        known = dict(old_logp=naive_logps(old, samples, args.temperature), old_value=values(old_critic),
                     ref_logp=naive_logps(reference, samples, args.temperature))
    known = SimpleNamespace(logp=naive_logps(naive, samples, args.temperature), value=values(critic), **known)
    logp = torch.cat(known.logp)
    ratios = (logp - torch.cat(known.old_logp)).exp()
    assert 0.1 < ((ratios - 1).abs() > 0.2).float().mean() < 0.9
    loss, critic_loss = naive_loss(args, samples, known)
    (loss + critic_loss).backward()
    expected = {name: p.grad for name, p in naive.named_parameters()}
    expected_critic = {name: p.grad for name, p in critic.named_parameters()} if critic else {}
    log_ratio = torch.stack([a.sum() - b.sum() for a, b in zip(known.logp, known.ref_logp)])
    for budget in (1, 40, 100_000):
        args.tokens_per_microbatch = budget
        objective.critic = old_critic
        given = objective.given(run_of(objective, train.Policy(old), train.Policy(reference)), samples)
        ref_logp = torch.stack([x.sum() for x in known.ref_logp])
        torch.testing.assert_close(given["ref_logp"].sum(-1), ref_logp, atol=2e-4, rtol=1e-5)
        learners = [train.Policy(small_model(kind=kind), recompute)]
        if critic:
            objective.critic = make_critic(kind, recompute, 3)
            learners.append(objective.critic)
        before = [{name: p.detach().clone() for name, p in learner.named_parameters()} for learner in learners]
        optimizer = torch.optim.SGD([dict(params=learner.parameters()) for learner in learners], lr=1.0)
        numbers = train.update(run_of(objective, learners[0], None, optimizer), samples, given)
        assert numbers["loss"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-6)
        assert numbers["entropy"] == pytest.approx(-logp.mean().item(), rel=1e-5)
        assert numbers["kl"] == pytest.approx(log_ratio.mean().item(), rel=1e-4)
        assert numbers["log_ratio_abs"] == pytest.approx(log_ratio.abs().mean().item(), rel=1e-4)
        assert numbers["length"] == len(logp) / len(samples)
        assert numbers["mismatch"] == pytest.approx((logp + 1).abs().mean().item(), rel=1e-4)  # sampled at -1 each
        off = (given["ref_logp"] + (given["ref_logp"] != 0)).abs().sum() / (given["ref_logp"] != 0).sum()
        assert numbers["reference_mismatch"] == pytest.approx(off.item(), rel=1e-4)
        for name, p in learners[0].model.named_parameters():
            torch.testing.assert_close(before[0]["model." + name] - p, expected[name], atol=2e-4, rtol=2e-3)
        norm = math.sqrt(sum((gradient**2).sum().item() for gradient in expected.values()))
        assert numbers["grad_norm"] == pytest.approx(norm, rel=1e-3)
        if critic:
            assert numbers["critic_loss"] == pytest.approx(critic_loss.item(), rel=1e-4) and critic_loss > 0.01
            for name, p in learners[1].named_parameters():
                if expected_critic[name] is not None:  # a tied head was replaced; nothing is left of it
                    torch.testing.assert_close(before[1][name] - p, expected_critic[name], atol=2e-4, rtol=2e-3)


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The most elements that any tensor had."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.size = max(self.size, tensor.numel())
        return out


# ---------------------------------------------------------------------------------------------------------------------
# helpers: illnesses, work of the checker


def healthy(steps=60):
    """Metrics of a run that goes well: 0.4 → 0.9."""
    return [dict(step=i + 1, reward=0.9 - 0.5 * math.exp(-i / 15), finished=1.0, length=20.0 + i / 10, unsolved=0.1,
                 kl=0.02 * i, log_ratio_abs=0.05 + 0.02 * i) for i in range(steps)]


@pytest.fixture
def work(monkeypatch):
    """[how many nodes of a tree the checker has evaluated]"""
    count, evaluate_node = [0], rewards.value

    def counted(*arguments):
        count[0] += 1
        return evaluate_node(*arguments)

    monkeypatch.setattr(rewards, "value", counted)
    return count


@pytest.fixture(scope="module")
def vllm_engine():
    pytest.importorskip("vllm", reason="vLLM is not installed")
    engine, why = vstar.pick_engine("auto")
    if engine != "vllm":
        pytest.skip(why)
    args = SimpleNamespace(model=str(HERE / "tiny/model"), revision=None, dtype="float32", seed=0, gpu_memory=0.3,
                           temperature=1.0, max_new_tokens=64)
    with mock.patch.dict(os.environ):  # into which vLLM writes what other processes should not find
        sampler = vstar.VLLMSampler(args, [0], 128, training=True)
    if sampler.sleeps:
        sampler.llm.wake_up()
    prompts = [rewards.encode(tiny_tokenizer(), p["question"], False)
               for p in rewards.load_problems(str(HERE / "tiny/test.jsonl"))[:128]]
    return SimpleNamespace(sampler=sampler, prompts=prompts)

# ---------------------------------------------------------------------------------------------------------------------
# the house

SCRIPTS = ("rewards", "vstar", "train", "evaluate")  # each may import those before it


@pytest.mark.parametrize("name", SCRIPTS)
def test_imports_run_one_way(name):
    """…and stand at the top, so that none hides a circle."""
    tree = ast.parse((HERE / f"{name}.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            for module in modules:
                ours = module in SCRIPTS or module.startswith(("experiments", "test_apo", "tiny"))
                assert not ours or (module in SCRIPTS[: SCRIPTS.index(name)] and node in tree.body), (name, module)


def test_no_line_is_too_wide():
    for path in (*HERE.glob("*.py"), *HERE.glob("experiments/**/*.py"), *HERE.glob("tiny/*.py")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert len(line) <= 120, (path, number)


def test_train_knows_no_other_algorithm():
    """Outside of docstrings and comments, which ast.unparse drops."""
    tree = ast.parse((HERE / "train.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            node.body[0] = ast.Pass()
    code = ast.unparse(tree)
    assert "apo_loss" in code and not re.search("PPO|GRPO|REBEL", code, re.IGNORECASE)


# ---------------------------------------------------------------------------------------------------------------------
# vstar.py: V̂* and what is said of it


@pytest.mark.parametrize("beta1", [1e-6, 1e-3, 0.1, 0.5, 1.0, 10.0, 1e3, 1e6, 1e12])
@pytest.mark.parametrize("n", [1, 2, 3, 8, 64])
def test_vstar_against_high_precision(beta1, n):
    rng = np.random.default_rng(n)
    for values in (rng.integers(0, 2, n).astype(float), rng.normal(0, 3, n), rng.normal(-50, 1e-3, n)):
        with mpmath.workdps(60):
            # the formula as it stands; the shift only because exp(1e6) has too many digits even for mpmath
            shift = mpmath.mpf(max(values))
            total = mpmath.fsum(mpmath.exp((mpmath.mpf(v) - shift) / mpmath.mpf(beta1)) for v in values)
            exact = float(shift + mpmath.mpf(beta1) * mpmath.log(total / n))
        assert estimate_vstar(values, beta1) == pytest.approx(exact, rel=1e-12, abs=1e-12)


def test_vstar_by_hand():
    # 3 of 8 right at β1 = 1/2:  ½ ln( (5 + 3 e²) / 8 )
    assert estimate_vstar([1, 0, 0, 1, 0, 0, 1, 0], 0.5) == pytest.approx(0.5 * math.log((5 + 3 * math.e**2) / 8))
    assert estimate_vstar([0, 0, 0, 0], 0.5) == 0 and estimate_vstar([1, 1], 0.5) == 1
    assert estimate_vstar(np.ones((5, 7, 3)), 0.5).shape == (5, 7)


def test_vstar_limits_and_order():
    values = np.random.default_rng(0).normal(size=(100, 8))
    assert np.array_equal(estimate_vstar(values, math.inf), values.mean(-1))
    np.testing.assert_allclose(estimate_vstar(values, 1e9), values.mean(-1), atol=1e-8)
    np.testing.assert_allclose(estimate_vstar(values, 1e-9), values.max(-1), atol=1e-8)
    curve = np.array([estimate_vstar(values, b) for b in (1e-6, 1e-2, 0.1, 0.5, 2, 10, 1e4, math.inf)])
    assert (np.diff(curve, axis=0) <= 1e-12).all()  # the larger β1, the more careful the value
    np.testing.assert_allclose(estimate_vstar(values + 7, 0.5), estimate_vstar(values, 0.5) + 7)


@pytest.mark.parametrize("beta1,seen,n", [*product([0.5, 1.0, 2.0], [8, 16], [4, 8, 16]),
                                          *product([0.5, 2.0], [4], [2, 4])])
def test_vstar_error_against_brute_force(beta1, seen, n):
    """The exact scatter of V̂* over all numbers of right answers, for prompts of every difficulty."""
    rng = np.random.default_rng(0)
    chance = rng.beta(1.0, 1.5, 3000)[:, None]
    right = np.arange(n + 1)
    vstar_of = estimate_vstar((np.arange(n) < right[:, None]).astype(float), beta1)  # (n+1,)
    weight = np.array([math.comb(n, k) for k in right]) * chance**right * (1 - chance) ** (n - right)
    truth = math.sqrt(((weight * vstar_of**2).sum(1) - (weight * vstar_of).sum(1) ** 2).mean())
    seen_rewards = rng.random((3000, seen)) < chance
    assert vstar_error(seen_rewards, beta1, n) == pytest.approx(truth, rel=0.1)


@pytest.mark.parametrize("beta1,seen,n", [(0.5, 8, 8), (0.5, 8, 4), (2.0, 4, 16), (0.1, 16, 8), (math.inf, 2, 3)])
def test_vstar_error_is_the_bootstrap(beta1, seen, n):
    """Draw n of each prompt's answers with replacement, many times: the scatter that the sum over binomials says."""
    rng, draws = np.random.default_rng(1), 20_000
    answers = (rng.random((20, seen)) < rng.random((20, 1))).astype(float)
    drawn = np.array([estimate_vstar(row[rng.integers(seen, size=(draws, n))], beta1).var() for row in answers])
    bootstrapped = math.sqrt(drawn.mean() * seen / (seen - 1))
    assert vstar_error(answers, beta1, n) == pytest.approx(bootstrapped, rel=0.005)


@pytest.mark.parametrize("beta1,right,best,good", [
    (math.inf, (1.0, 1.5), {1: 2, 10: 8, 25: 8}, 0.15),  # noise σ²/N, 1/(N + 1) of all: √(5 passes), roughly
    (0.5, (1.0, 1.5), {1: 2, 10: 8, 25: 8}, 0.15),
    (0.5, (1.0, 30.0), {1: 1, 10: 8, 25: 16}, 0.35),  # seldom solved: what was never seen cannot be drawn
])
def test_advice_on_n(beta1, right, best, good):
    """Against the gradient's variance by brute force: (r − V̂*)² over fresh answers and fresh V̂*."""
    rng = np.random.default_rng(0)
    chance = rng.beta(*right, (3000, 1))
    answer = lambda n: (rng.random((3000, n)) < chance).astype(float)
    share, found = vstar.advise(answer(8), beta1)
    moments = {}
    for n in (1, 2, 4, 8, 16, 32, 64):
        drawn = [estimate_vstar(answer(n), beta1) for _ in range(100)]
        moments[n] = np.mean([(answer(1)[:, 0] - values) ** 2 for values in drawn])
        if n == 8:
            assert share == pytest.approx(np.var(drawn, axis=0).mean() / moments[8], rel=good)
            assert math.isfinite(beta1) or share == pytest.approx(1 / 9, rel=1e-6)
    cost = lambda n, passes: n + vstar.STAGE2 * passes * moments[n] / moments[8]
    assert found == best == {passes: min(moments, key=lambda n: cost(n, passes)) for passes in best}


def test_vstar_error_of_more_answers_than_a_float_counts():
    """C(2000, 1000) is beyond 1e308; the variance still falls as 1 / n."""
    few, many = (vstar_error(np.array([[1.0, 0.0] * 8] * 50), 0.5, n) for n in (400, 2000))
    assert many == pytest.approx(few / 5**0.5, rel=0.1)


def test_vstar_error_without_scatter():
    assert vstar_error(np.ones((10, 4)), 0.5, 4) == 0
    assert math.isnan(vstar_error(np.ones((10, 1)), 0.5, 1))


def test_pass_at_k_counts_subsets():
    for row in product([0, 1], repeat=5):
        for k in range(1, 6):
            subsets = list(combinations(row, k))
            assert pass_at_k(row, k) == pytest.approx(np.mean([max(subset) for subset in subsets]))


def test_summary_warns():
    row = lambda right, finished=True: dict(rewards=right, vstar=0.0, lengths=[3] * len(right),
                                            finished=[finished] * len(right))
    mixed = [row([float(i < k) for i in range(8)]) for k in range(9)] * 10
    assert "warning" not in vstar.summary(mixed, 0.5)
    assert "no right answer" in vstar.summary([row([0.0] * 8)] * 19 + mixed[8:9], 0.5)
    assert "cut off" in vstar.summary([row(r["rewards"], False) for r in mixed], 0.5)
    one = vstar.summary([row(r["rewards"][:1]) for r in mixed], 0.5)  # of its own scatter it says nothing, nor a nan
    assert "warning" not in one and "nan" not in one and "standard error" not in one
    assert "at the most: 2 for 1, 8 for 10, 8 for 25 epochs of" in vstar.summary(mixed, 0.5)
    many = [dict(row([0.0] * 8), id=str(i), answer=r"\frac12", finished=[False] + [True] * 7,
                 responses=["cut"] + [r"so \boxed{see )(}" if i else "so 3"] * 7) for i in range(31)]
    read = vstar.summary(many, 0.5).split("── ")[1:]
    assert [text.split(",")[0] for text in read] == ["0", "10", "20"]
    assert r"no \boxed{} and no ####" in read[0] and "'see)(' it is words; the gold" in read[1]
    assert "so 3" in read[0] and "cut" not in read[0]
    own = vstar.summary(many, 0.5, own="mine.py:judge").split("── ")
    assert len(own) == 4 and "read by mine.py:judge" in own[1] and "####" not in own[1]
    text = vstar.summary(mixed, 0.5)
    assert "0/8 right         11.1%" in text and "8/8 right  11.1%" in text and "0.500 ±" in text


# ---------------------------------------------------------------------------------------------------------------------
# vstar.py: the sampler


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_samples_follow_the_softmax(temperature):
    model, prompt = small_model(), [3, 1, 4]
    (completions,) = sampler_of(model, 2, temperature, 30_000).generate([prompt], 30_000, [5])
    first = np.array([completion.tokens[0] for completion in completions])

    def softmax(ids):
        return (model(torch.tensor([ids])).logits[0, -1] / temperature).softmax(-1).detach().double().numpy()

    assert softmax(prompt).max() < 0.9
    assert chi_square(np.bincount(first, minlength=11), softmax(prompt)) < 4
    likely = np.bincount(first[first > 0]).argmax()  # and the second token, given the likeliest first
    second = np.array([completion.tokens[1] for completion in completions if completion.tokens[0] == likely])
    assert chi_square(np.bincount(second, minlength=11), softmax([*prompt, likely])) < 4
    assert chi_square(np.bincount(first, minlength=11), np.full(11, 1 / 11)) > 20  # the test can fail


@pytest.mark.parametrize("vocabulary", [3, 128, 1000, pytest.param(151936, marks=whole)])
def test_draw_is_the_inverse_cdf(vocabulary):
    """In two steps it finds what one running sum of probabilities finds; tokens without probability never come."""
    torch.manual_seed(0)
    rows = 500 if vocabulary < 10_000 else 100
    logits = 3 * torch.randn(rows, vocabulary)
    logits[:, torch.randperm(vocabulary)[: vocabulary // 2]] = -math.inf
    uniform = torch.rand(rows, dtype=torch.float64)
    uniform[:4] = torch.tensor([0.0, 0.0, 1 - 1e-12, 1 - 1e-12], dtype=torch.float64)
    for temperature in (1.0, 0.5):
        token, logp = vstar.draw(logits, uniform, temperature)
        exact = (logits.double() / temperature).log_softmax(-1)
        torch.testing.assert_close(logp.double(), exact.gather(-1, token[:, None])[:, 0], atol=1e-5, rtol=0)
        cdf = exact.exp().cumsum(-1)
        before = torch.where(token > 0, cdf.gather(-1, (token[:, None] - 1).clamp(min=0))[:, 0], 0)
        assert (before - 1e-6 <= uniform).all() and (uniform <= cdf.gather(-1, token[:, None])[:, 0] + 1e-6).all()
        naive = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True)[:, 0]
        assert (naive == token).float().mean() > 0.98  # sums in fp32 move the borders by about 1e-7
    greedy, logp = vstar.draw(logits, uniform, 0)
    assert greedy.equal(logits.argmax(-1))
    torch.testing.assert_close(logp.double(), logits.double().log_softmax(-1).amax(-1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["Qwen2", "Llama", "GPT2"])
def test_batch_equals_one_by_one(kind):
    """Left padding, positions, rows that leave: a completion does not depend on its neighbours or their order."""
    model, rng = small_model(kind=kind), random.Random(0)
    prompts = [[rng.randint(1, 10) for _ in range(rng.randint(1, 12))] for _ in range(20)]
    seeds = [prompt_seed(0, i) for i in range(20)]
    together = sampler_of(model, rows=1000).generate(prompts, 4, seeds)
    alone = [sampler_of(model, rows=1).generate([p], 4, [s])[0] for p, s in zip(prompts, seeds)]
    backwards = sampler_of(model, rows=28).generate(prompts[::-1], 4, seeds[::-1])[::-1]
    tokens = lambda completions: [[c.tokens for c in copies] for copies in completions]
    assert tokens(together) == tokens(alone) == tokens(backwards)
    assert len({tuple(c.tokens) for copies in together for c in copies}) > 60
    assert {c.finished for copies in together for c in copies} == {True, False}
    # a smaller N is a prefix of a larger one
    assert tokens(sampler_of(model).generate(prompts, 2, seeds)) == [copies[:2] for copies in tokens(together)]
    assert tokens(sampler_of(model).generate(prompts, 4, seeds, 2)) == [copies[2:] for copies in tokens(together)]
    for prompt, copies in zip(prompts, together):  # the log-probs are those of a plain forward pass without padding
        for copy in copies:
            logits = model(torch.tensor([prompt + copy.tokens])).logits[0, len(prompt) - 1 : -1]
            plain = logits.log_softmax(-1).gather(-1, torch.tensor(copy.tokens)[:, None])[:, 0]
            torch.testing.assert_close(plain, torch.tensor(copy.logps), atol=2e-4, rtol=0)


@pytest.mark.parametrize("rows,n,sizes", [(8, 3, [6, 6, 3]), (2, 5, [2, 2, 1] * 5), (5, 5, [5] * 5)])
def test_decode_rows_bounds_the_batch(rows, n, sizes, monkeypatch):
    """Also where one prompt has more copies than that."""
    seen, decode = [], vstar.TransformersSampler.decode

    def counted(self, prompts, copies, seeds):
        seen.append(len(prompts) * len(copies))
        return decode(self, prompts, copies, seeds)

    monkeypatch.setattr(vstar.TransformersSampler, "decode", counted)
    completions = sampler_of(small_model(), rows=rows).generate([[1, 2]] * 5, n, range(5))
    assert seen == sizes and [len(copies) for copies in completions] == [n] * 5


def test_completions_end_with_the_first_eos():
    model = small_model()
    for eos in ([0], [0, 7]):  # 0 is also the padding token
        for copies in sampler_of(model, 12, eos=eos).generate([[1, 2], [5], [0, 3, 0]], 50, [1, 2, 3]):
            for tokens, finished, logps in copies:
                assert len(tokens) == len(logps) and 1 <= len(tokens) <= 12
                assert finished == (tokens[-1] in eos)
                assert not set(tokens[:-1]) & set(eos)
                assert finished or len(tokens) == 12


def test_greedy():
    model, ids = small_model(), [3, 1, 4]
    ((completion,),) = sampler_of(model, 10, temperature=0, eos=[99]).generate([ids], 1, [0])
    for token in completion.tokens:
        assert token == model(torch.tensor([ids])).logits[0, -1].argmax().item()
        ids = [*ids, token]


def test_seeds_differ_by_run_prompt_and_copy():
    assert len({prompt_seed(s, i) for s in range(50) for i in ("a", "b", 1, 11, "1/1")}) == 250
    assert prompt_seed(0, "train/00000") == prompt_seed(0, "train/00000") < 2**63
    (completions,) = sampler_of(small_model()).generate([[1]], 8, [3])
    assert len({tuple(completion.tokens) for completion in completions}) == 8


# ---------------------------------------------------------------------------------------------------------------------
# vstar.py: flags, processes, files


def test_flags(monkeypatch, capsys):
    def parse(*flags):
        parser = vstar.Flags("a test")
        add = parser.group("a group")
        add("--many", 8, "above 0")
        add("--share", 0.5, "above 0")
        add("--seed", 0, "0 or more, as its default is")
        add("--temperature", 1.0, "0 or more, as is said", zero=True)
        add("--limit", int, "without a default")
        add("--kind", ["auto", "one"], "the first is the default")
        add("--out", Path("out"), "of the default's type")
        add("--loud", False, "on or off")
        monkeypatch.setattr(sys, "argv", ["test", *flags])
        return vars(vstar.read_flags(parser, "no recipe"))

    default = dict(many=8, share=0.5, seed=0, temperature=1.0, limit=None, kind="auto", out=Path("out"), loud=False)
    assert parse("--many=8") == default
    found = parse("--many=3", "--seed", "0", "--temperature=0", "--limit=1", "--kind=one", "--out=a", "--share=inf")
    assert found == default | dict(many=3, temperature=0, limit=1, kind="one", out=Path("a"), share=math.inf)
    assert parse("--loud")["loud"] is True
    for name, value in (("many", "0"), ("many", "-1"), ("share", "0"), ("share", "nan"), ("seed", "-1"), ("limit", "0"),
                        ("temperature", "-0.1")):
        ends_in_one_line(capsys, lambda name=name, value=value: parse(f"--{name}={value}"), f"--{name}", "is too small")
    for flag in ("--many=2.5", "--kind=two", "--man=2", "--loud=yes", "--many"):
        ends_in_one_line(capsys, lambda flag=flag: parse(flag), flag.split("=")[0])


@pytest.mark.parametrize("flag,words", [
    ("--samples=0", ["--samples", "0 is too small"]),
    ("--beta1=0", ["--beta1", "is too small"]),
    ("--beta1=-1", ["--beta1", "is too small"]),
    ("--beta1=nan", ["--beta1", "is too small"]),
    ("--limit=0", ["--limit", "0 is too small"]),
    ("--temperature=-1", ["--temperature", "is too small"]),
    ("--samples=2.5", ["--samples", "2.5"]),
    ("--engine=tensorrt", ["--engine", "tensorrt", "transformers"]),
    ("@nowhere.args", ["nowhere.args"]),
    # a flag has one name, which is written out
    ("--sample=2", ["unrecognized arguments", "--sample=2"]),
    ("--n=2", ["unrecognized arguments", "--n=2"]),
    ("--batch=2", ["unrecognized arguments", "--batch=2"]),
    ("--chunk=2", ["unrecognized arguments", "--chunk=2"]),
    ("--plan=8xH100", ["unrecognized arguments", "--plan=8xH100"]),
    # what is asked for is not there
    ("--model=./nowhere", ["./nowhere", "no such folder"]),
    ("--chat", ["chat template"]),
    ("--chat_args=[]", ["--chat_args", "[]"]),
    ("--prompt=Think!", ["--prompt 'Think!'", "no field in braces"]),
    ("--prompt={nums}", ["train/00000", "no field 'nums'"]),
    ("--stop=12", ["--stop '12'", "['1', '2']"]),
    ("--out=tiny", ["--out tiny", "should end in .jsonl"]),
    ("--reward=nowhere.py:judge", ["nowhere.py", "no such file"]),
    ("--suffix=?", ["unrecognized arguments: --suffix=?"]),
    ("--max_new_tokens=510", ["train/00000", "window of 512"]),
    ("--data=nowhere.jsonl", ["nowhere.jsonl"]),
    ("--data=nonsense", ["unknown data set 'nonsense'"]),
    ("--engine=vllm", ["--engine vllm"]),
])
def test_bad_flags_of_stage1(flag, words, tmp_path):
    if flag == "--engine=vllm" and importlib.util.find_spec("vllm"):
        pytest.skip("vLLM is installed")
    refused(inside(*stage1(tmp_path / "out/vstar.jsonl", flag), check=False), *words)
    assert not (tmp_path / "out").exists()  # nothing half-written


def test_a_later_flag_goes_before_a_recipe(monkeypatch):
    monkeypatch.chdir(HERE)
    parse = lambda *flags: vstar.make_parser().parse_args(flags)
    assert parse("@tiny/vstar.args").model == "tiny/model" and parse("@tiny/vstar.args").max_new_tokens == 64
    assert parse("@tiny/vstar.args", "--max_new_tokens=9").max_new_tokens == 9
    # with no flags a script reads its recipe, from wherever it is started; with any, only what is said holds
    monkeypatch.setattr(sys, "argv", ["vstar.py"])
    assert vstar.read_flags(vstar.make_parser(), "vstar").decode_rows == 1024
    monkeypatch.setattr(sys, "argv", ["vstar.py", "--model=a", "--data=b"])
    assert vstar.read_flags(vstar.make_parser(), "vstar").decode_rows == 256


def test_a_full_gpu_is_one_line(capsys):
    def raises(error):
        raise error

    for error in (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
                  RuntimeError("CUDA Error: out of memory at cumem_allocator.cpp"),
                  ValueError("Free memory on device cuda:0 (3.1/79.1 GiB) on startup is less than desired")):
        ends_in_one_line(capsys, lambda error=error: vstar.run_script(lambda: raises(error)), "lower --decode_rows")
    with pytest.raises(RuntimeError, match="another"):
        vstar.run_script(lambda: raises(RuntimeError("another")))


def test_each_process_sees_its_own_gpus():
    assert [vstar.own_gpus(None, rank, 1) for rank in range(3)] == ["0", "1", "2"]
    assert [vstar.own_gpus("4,5,6,7", rank, 2) for rank in range(3)] == ["4,5", "6,7", ""]
    assert vstar.own_gpus("GPU-a,GPU-b", 1, 1) == "GPU-b" and vstar.own_gpus("", 0, 1) == ""


@pytest.mark.parametrize("native,dtype", [(True, "bfloat16"), (False, "float32")])
def test_precision_of_a_gpu(native, dtype, monkeypatch):
    """A T4 says that it knows bf16, and emulates it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native or including_emulation)
    args = SimpleNamespace(dtype="auto")
    assert vstar.start_process(args).type == "cuda" and args.dtype == dtype


@whole
@pytest.mark.skipif(torch.cuda.is_available() or platform.libc_ver()[0] != "glibc", reason="for CPUs with glibc")
def test_freed_memory_is_kept():
    """A large block that is taken again and again costs no page faults (but for a few misfits at the start)."""
    code = """if True:
        import resource, torch, types, vstar
        vstar.start_process(types.SimpleNamespace(dtype="auto"))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(20):
            torch.ones(1 << 24)  # 64 MB, 16,384 pages
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"""
    fresh = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, check=True)
    assert int(fresh.stdout) < 10 * 16_384


def fill(path, text):
    """A file, or a folder with a file in a folder."""
    if path.suffix.startswith(".json"):
        path.write_text(text)
    else:
        (path / "in").mkdir(parents=True)
        (path / "in/file").write_text(text)


def text_in(path):
    return path.read_text() if path.is_file() else (path / "in/file").read_text()


@pytest.mark.parametrize("name", ["file.jsonl", "folder"])
def test_what_others_read_appears_whole(name, tmp_path, capsys, monkeypatch):
    path, done, fsync, replace = tmp_path / name, [], os.fsync, os.replace
    # in this order, or after a power cut the new name may stand before empty pages
    monkeypatch.setattr(os, "fsync", lambda file: done.append("fsync") or fsync(file))
    monkeypatch.setattr(os, "replace", lambda *paths: done.append("replace") or replace(*paths))
    with vstar.written_whole(path) as aside:
        fill(aside, "one")
        assert not path.exists()
    assert text_in(path) == "one" and done == ["fsync", "replace"]
    for stop in (KeyboardInterrupt, SystemExit, RuntimeError):  # in the midst of writing
        with pytest.raises(stop), vstar.written_whole(path) as aside:
            fill(aside, "half")
            raise stop
        assert text_in(path) == "one"
        vstar.remove(aside)

    def disk_is_full():
        with vstar.written_whole(path) as aside:
            fill(aside, "half")
            raise OSError(28, "No space left on device")

    ends_in_one_line(capsys, disk_is_full, f"cannot write {path}: No space left on device", "Is the disk full?")
    assert text_in(path) == "one" and os.listdir(tmp_path) == [name]
    with vstar.written_whole(path, mine=False) as aside:  # another process's to rename
        fill(aside, "two")
    assert text_in(path) == "one" and text_in(aside) == "two"
    with vstar.written_whole(path):
        pass
    assert text_in(path) == "two" and os.listdir(tmp_path) == [name]


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    vstar.write_whole(tmp_path / "rows.jsonl", "old")
    if os.fork() == 0:  # a process that ends in the middle, without a word
        try:
            with vstar.written_whole(tmp_path / "rows.jsonl") as aside:
                aside.write_text("ha")
                os._exit(0)
        finally:
            os._exit(1)
    assert os.wait()[1] == 0
    assert (tmp_path / "rows.jsonl").read_text() == "old"
    vstar.write_whole(tmp_path / "rows.jsonl", "new")
    assert (tmp_path / "rows.jsonl").read_text() == "new" and os.listdir(tmp_path) == ["rows.jsonl"]


def test_guard_settings(tmp_path, capsys):
    """A run goes on only with the settings that it was begun with, but for those that are free."""
    made, config = tmp_path / "rows.jsonl", tmp_path / "rows.config.json"

    def guard(algorithm="apo", **more):
        flags = dict(model="m", samples=8, out=made, overwrite=False, decode_rows=1, engine="transformers", show=3,
                     revision=None)
        vstar.guard_settings(config, SimpleNamespace(**{**flags, **more}), [made], ["show"], algorithm=algorithm)

    guard()
    saved = json.loads(config.read_text())
    assert saved["settings"] == dict(model="m", samples=8, engine="transformers", revision=None, algorithm="apo")
    assert saved["samples"] == 8  # those asked for last, also where they are free
    assert set(saved["versions"]) == {"python", "torch", "transformers"}
    made.write_text("rows")
    guard(decode_rows=2, show=4, out=tmp_path)  # free to change
    ends_in_one_line(capsys, lambda: guard("ppo", samples=4), f"{config}: the run was begun with other settings: "
                     "--samples (was 8, now 4), algorithm (was apo, now ppo); --overwrite throws it away")
    ends_in_one_line(capsys, lambda: guard(revision="v2"), "--revision (was None, now v2)")
    ends_in_one_line(capsys, lambda: guard(new=1), "--new (was None, now 1)")  # a flag that there was not
    config.write_text(json.dumps(dict(saved, settings={**saved["settings"], "gone": 1})))
    ends_in_one_line(capsys, guard, "gone (was 1, now None)")  # or is no more
    for broken in ("{", "[]", "3", json.dumps(saved["settings"]), '{"settings": 3}'):
        config.write_text(broken)
        ends_in_one_line(capsys, guard, "rows.config.json", "--overwrite")
        assert made.exists()
    config.unlink()
    ends_in_one_line(capsys, guard, "rows.jsonl exists without its rows.config.json", "--overwrite")
    guard(overwrite=True, samples=4)
    assert not made.exists() and json.loads(config.read_text())["settings"]["samples"] == 4


# ---------------------------------------------------------------------------------------------------------------------
# vstar.py: Stage 1 as a whole


@whole
def test_stage1_rows(undisturbed):
    out, done = undisturbed
    rows = read_jsonl(out)
    problems = {p["id"]: p for p in rewards.load_problems(str(HERE / "tiny/train.jsonl"))[:768]}
    assert [row["id"] for row in rows] == sorted(problems)
    for row in rows:
        assert list(row) == ["id", "question", "answer", "prompt", "rewards", "vstar", "lengths", "finished",
                             "responses"]
        assert row["prompt"] == problems[row["id"]]["question"] and row["answer"] == problems[row["id"]]["answer"]
        assert row["rewards"] == [rewards.reward(response, row["answer"], finished)
                                  for response, finished in zip(row["responses"], row["finished"])]
        assert len(row["rewards"]) == len(row["lengths"]) == 2
        assert row["vstar"] == pytest.approx(0.5 * math.log(np.mean(np.exp(np.array(row["rewards"]) / 0.5))))
    accuracy = np.mean([row["rewards"] for row in rows])
    assert 0.3 < accuracy < 0.5
    assert f"accuracy          {accuracy:.3f} ±" in done.stdout and "N = 4" in done.stdout
    saved = json.loads(out.with_suffix(".config.json").read_text())
    assert saved["settings"]["model"] == "tiny/model" and saved["samples"] == 2
    assert saved["settings"]["dtype"] == "float32" and saved["versions"]["torch"] == torch.__version__
    assert out.with_suffix(".png").stat().st_size > 5000
    assert sorted(p.name for p in out.parent.iterdir()) == ["vstar.config.json", "vstar.jsonl", "vstar.png"]


@whole
@pytest.mark.parametrize("times", [1, pytest.param(4, marks=pytest.mark.long)])
def test_stage1_killed_and_restarted(times, undisturbed, tmp_path):
    out, rng, seen = tmp_path / "vstar.jsonl", random.Random(0), set()

    def has_saved_more():
        before = len(seen)
        seen.update(out.with_suffix(".parts").glob("*.jsonl"))
        return len(seen) > before

    for _ in range(times):
        process = start(*stage1(out))
        wait_until(has_saved_more, process)
        time.sleep(rng.random() * 0.1)
        kill(process)
    assert times <= len(seen) <= times + 2
    inside(*stage1(out))
    assert out.read_bytes() == undisturbed[0].read_bytes()
    assert sorted(p.name for p in out.parent.iterdir()) == ["vstar.config.json", "vstar.jsonl", "vstar.png"]
    again = inside(*stage1(out))  # nothing left to do
    assert "tokens/s" not in again.stdout and "accuracy" in again.stdout


@long
def test_answers_are_kept_for_another_n(undisturbed, tmp_path):
    """Up, killed on the way, and down again: as if each N had been asked for at once. Stage 2 takes N from here."""
    out = tmp_path / "vstar.jsonl"
    inside(*stage1(out))
    assert out.read_bytes() == undisturbed[0].read_bytes()
    process = start(*stage1(out, "--samples=4"))
    wait_until(lambda: list(out.with_suffix(".parts").glob("*.jsonl")), process)
    kill(process)
    refused(inside(*stage2(out, tmp_path / "run"), check=False), "2 answers per prompt, not --samples 4")
    inside(*stage1(out, "--samples=3"))  # some prompts have 4 by now
    assert {len(row["rewards"]) for row in read_jsonl(out)} == {3, 4}
    up = inside(*stage1(out, "--samples=4"))
    inside(*stage1(tmp_path / "four.jsonl", "--samples=4"))
    assert out.read_bytes() == (tmp_path / "four.jsonl").read_bytes() and "N 4," in up.stdout
    down = inside(*stage1(out))
    assert out.read_bytes() == (tmp_path / "four.jsonl").read_bytes()
    words = lambda done: re.findall("(?:prompts .*N|accuracy|mean V̂).*", done.stdout)
    assert words(down) == words(undisturbed[1]) and len(words(down)) == 3
    inside(*stage2(out, tmp_path / "run", "--steps=2"))
    assert json.loads((tmp_path / "run/config.json").read_text())["settings"]["samples"] == 2


@pytest.mark.parametrize("n,chunks", [(8, [32] * 3 + [4]), (1, [100]), pytest.param(300, [1] * 100, marks=whole)])
def test_a_chunk_is_counted_in_answers(n, chunks, tmp_path, monkeypatch):
    """--decode_rows of them. Each process has work where there are fewer chunks than processes: as in a small
    evaluation on many GPUs."""
    asked, real = [], vstar.answered

    class Sampler:
        def stream(self, chunks, n):
            asked.extend((len(prompts), first) for prompts, _, first in chunks)
            for index, (prompts, _, first) in enumerate(chunks):
                yield index, [[Completion(prompt, True, [])] * (n - first) for prompt in prompts]

        def close(self):
            pass

    monkeypatch.setattr(vstar, "make_sampler", lambda *_: Sampler())
    monkeypatch.setattr(vstar, "barrier", lambda *_: None)
    args = some_args(samples=n, decode_rows=256, out=tmp_path / "v.jsonl", seed=0, reward=None)
    tokenizer = SimpleNamespace(decode=lambda tokens, **_: f"\\boxed{{{tokens[0]}}}")
    rows = [dict(id=f"{i:03d}", question="", answer=str(i // 2 * 2), tokens=[i]) for i in range(100)]
    vstar.sample_all(args, rows, tokenizer, [0], "cpu")
    assert asked == [(size, 0) for size in chunks]
    assert [row["id"] for row in read_jsonl(args.out)] == [row["id"] for row in rows]
    assert [row["rewards"] for row in read_jsonl(args.out)] == [[1.0] * n, [0.0] * n] * 50  # each has its own
    args.samples, asked[:] = n + 8, []
    vstar.sample_all(args, rows, tokenizer, [0], "cpu")
    assert asked == [(32, n)] * 3 + [(4, n)] and {len(row["rewards"]) for row in read_jsonl(args.out)} == {n + 8}
    assert {len(row[key]) for row in vstar.read_rows(args.out, n) for key in ("rewards", "lengths", "responses")} == {n}
    monkeypatch.setattr(vstar, "answered", lambda out: {})  # as if other nodes' files did not appear here
    args.samples = n + 9
    with pytest.raises(SystemExit):
        vstar.sample_all(args, rows, tokenizer, [0], "cpu")
    assert list(tmp_path.glob("v.parts/*.jsonl")) and len(read_jsonl(args.out)) == 100
    monkeypatch.setattr(vstar, "answered", real)
    args.samples = n
    args.out, asked[:], read = tmp_path / "w.jsonl", [], []
    monkeypatch.setattr(vstar, "remove", lambda path: None)
    monkeypatch.setattr(vstar, "WORLD", 8)  # all read what exists before one writes; the first merges in the end
    monkeypatch.setattr(vstar, "answered", lambda out: read.append(out) or (real(out) if len(read) == 9 else {}))
    for rank in reversed(range(8)):
        monkeypatch.setattr(vstar, "RANK", rank)
        vstar.sample_all(args, rows, tokenizer, [0], "cpu")
    assert len(asked) >= 8 and min(size for size, _ in asked) >= (9 if n == 1 else 1)
    assert [row["id"] for row in read_jsonl(args.out)] == [row["id"] for row in rows]  # not as the parts lie there


@long
def test_two_processes_equal_one(undisturbed, tmp_path):
    torchrun(2, *stage1(tmp_path / "vstar.jsonl"))
    assert (tmp_path / "vstar.jsonl").read_bytes() == undisturbed[0].read_bytes()


@whole
def test_ctrl_c_says_how_to_go_on(undisturbed, tmp_path):
    out = tmp_path / "vstar.jsonl"
    # a shell's background job does not listen, nor do its children
    listens = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    process = start(*stage1(out), stderr=subprocess.PIPE, preexec_fn=listens)
    wait_until(lambda: list(tmp_path.glob("*/*.jsonl")), process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on from here" in said and "Traceback" not in said
    inside(*stage1(out))
    assert out.read_bytes() == undisturbed[0].read_bytes()


def test_out_spares_the_model_and_the_problems(tmp_path, capsys):
    """A second round, whose --out is the first one's by default: π_ref lies in what would be thrown away."""
    model = shutil.copytree(HERE / "tiny/model", tmp_path / "model")
    args, rows = SimpleNamespace(model=str(model), overwrite=True, out="run"), tmp_path / "metrics.jsonl"
    rows.write_text("rows")
    guard = lambda: vstar.guard_settings(tmp_path / "config.json", args, [rows, model])
    ends_in_one_line(capsys, guard, "--out run would take the place of --model", "give another")
    args.model, args.data = "tiny/model", str(rows)  # nor one's own problems
    ends_in_one_line(capsys, guard, "--out run would take the place of --data", "give another")
    assert len(list(model.iterdir())) > 3 and rows.exists()


def test_overwrite_alone_leaves_the_recipe(monkeypatch):
    for more in ([], ["--overwrite"]):
        monkeypatch.setattr(sys, "argv", ["train.py", *more])
        args = train.parse_args(train.APO)
        assert (args.steps, args.lr, args.overwrite) == (120, 3e-4, bool(more))


def test_a_greedy_stage1_takes_one_answer(tmp_path):
    refused(inside(*stage1(tmp_path / "v.jsonl", "--temperature=0"), check=False), "--temperature 0", "--samples 1")


@whole
def test_changed_settings_are_refused_by_name(undisturbed):
    out = undisturbed[0]
    before = out.read_bytes()
    refused(inside(*stage1(out, "--seed=4", "--beta1=1"), check=False), "was begun with other settings: "
            "--beta1 (was 0.5, now 1.0), --seed (was 0, now 4); --overwrite throws it away")
    assert out.read_bytes() == before


@whole
def test_what_stands_behind_the_names_may_not_change(tmp_path):
    """A model trained anew in the same folder, or an edited file of problems: old rows are not taken for theirs."""
    shutil.copytree(HERE / "tiny/model", tmp_path / "model")
    data, out = tmp_path / "data.jsonl", tmp_path / "v.jsonl"
    data.write_text("".join((HERE / "tiny/train.jsonl").read_text().splitlines(keepends=True)[:4]))
    command = stage1(out, f"--model={tmp_path}/model", f"--data={data}")
    inside(*command)
    before, text = out.read_bytes(), data.read_text()
    data.write_text(text.replace('"answer": "', '"answer": "1', 1))
    assert data.read_text() != text
    refused(inside(*command, check=False), "data's problems (was", "--overwrite")
    data.write_text(text)
    path = tmp_path / "model/model.safetensors"
    model = bytearray(path.read_bytes())
    model[-3000:] = bytes(3000)
    path.write_bytes(model)
    refused(inside(*command, check=False), "model's files (was", "--overwrite")
    refused(inside(*stage2(out, tmp_path / "run"), check=False), "files changed since Stage 1", "vstar.py")
    assert out.read_bytes() == before


@whole
def test_overwrite_starts_afresh(tmp_path):
    for n in (1, 2):
        inside(*stage1(tmp_path / "v.jsonl", "--limit=4", f"--samples={n}", *["--overwrite"] * (n - 1)))
        assert len(read_jsonl(tmp_path / "v.jsonl")[0]["rewards"]) == n


@whole
def test_files_of_an_earlier_version_are_refused(tmp_path):
    """It wrote `n` for `samples`, among the settings, and Stage 2's settings without a name around them."""
    out = tmp_path / "v.jsonl"
    inside(*stage1(out, "--limit=4"))
    now = json.loads(out.with_suffix(".config.json").read_text())
    old = now["settings"] | dict(n=2)
    config = tmp_path / "run/config.json"
    inside(*stage2(out, tmp_path / "run", "--steps=1", "--batch_size=4", "--eval_limit=1"))
    config.write_text(json.dumps(json.loads(config.read_text())["settings"]))
    refused(inside(*stage2(out, tmp_path / "run"), check=False), str(config), "--overwrite")
    out.with_suffix(".config.json").write_text(json.dumps(dict(settings=old, versions=now["versions"])))
    refused(inside(*stage1(out, "--limit=4"), check=False), " n (was 2, now None)", "--overwrite")
    refused(inside(*stage2(out, tmp_path / "another"), check=False), "v.config.json", "vstar.py", "again")
    inside(*evaluation(tmp_path / "e", "--limit=2", "--samples=1"))
    (path,) = (tmp_path / "e").glob("*.config.json")
    saved = json.loads(path.read_text())
    for changed in ({**saved, "settings": {**saved["settings"], "n": 1}}, saved["settings"]):
        path.write_text(json.dumps(changed))
        refused(inside(*evaluation(tmp_path / "e", "--limit=2", "--samples=1"), check=False), path.name, "--overwrite")


def test_model_without_tokenizer(tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(HERE / "tiny/model" / name)
    refused(inside(*stage1(tmp_path / "o/v.jsonl", f"--model={tmp_path}"), check=False), "tokenizer")


@whole
def test_unwritable_folder_and_broken_files(tmp_path):
    (tmp_path / "file").write_text("")
    refused(inside(*stage1(tmp_path / "file/vstar.jsonl"), check=False), str(tmp_path / "file"))
    with full_disk(kilobytes=10):
        done = inside(*stage1(tmp_path / "full.jsonl", "--limit=128"), check=False)
    refused(done, "cannot write", ".jsonl: File too large", alone=False)
    (tmp_path / "v.config.json").write_text("{")
    refused(inside(*stage1(tmp_path / "v.jsonl"), check=False), "v.config.json")

# ---------------------------------------------------------------------------------------------------------------------
# train.py: the mathematics


def test_apo_loss_by_hand():
    loss = train.apo_loss(torch.tensor([-3.0, -1.0]), torch.tensor([-5.0, -1.0]), torch.tensor([1.0, 0.0]),
                          torch.tensor([0.25, 0.5]), beta2=0.1)
    torch.testing.assert_close(loss, torch.tensor([(0.2 - 0.75) ** 2, 0.25]))


@pytest.mark.parametrize("vstar_value", [0.0, 0.3, 7.0])
def test_gradient_is_that_of_reward_minus_kl(vstar_value):
    """On-policy, E[∇ℓ] = −2 β2 ∇( E_π[r] − β2 KL(π‖π_ref) ), whatever V̂* is: exact on a softmax over seven answers."""
    torch.manual_seed(0)
    beta2, theta = 0.3, torch.randn(7, dtype=torch.double, requires_grad=True)
    ref_logp = torch.randn(7, dtype=torch.double).log_softmax(0)
    r = torch.tensor([1.0, 0, 0, 1, 0, 1, 0], dtype=torch.double)
    logp = theta.log_softmax(0)
    ours = (logp.exp().detach() * train.apo_loss(logp, ref_logp, r, vstar_value, beta2)).sum()
    objective = (logp.exp() * (r - beta2 * (logp - ref_logp))).sum()
    (gradient,) = torch.autograd.grad(ours, theta, retain_graph=True)
    (expected,) = torch.autograd.grad(-2 * beta2 * objective, theta)
    torch.testing.assert_close(gradient, expected)
    assert gradient.abs().max() > 0.01


def test_loss_is_zero_at_the_optimum():
    """π* ∝ π_ref exp(r/β2) with V* = β2 ln E_ref exp(r/β2) solves the regression exactly."""
    beta2, r = 0.5, torch.tensor([1.0, 0.0, 0.0, 1.0])
    ref_logp = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    best = (beta2 * torch.logsumexp(ref_logp + r / beta2, 0)).item()
    logp = ref_logp + (r - best) / beta2
    assert logp.exp().sum() == pytest.approx(1)
    assert train.apo_loss(logp, ref_logp, r, best, beta2).max() < 1e-12


@pytest.mark.parametrize("kind,temperature,recompute", [
    ("Qwen2", 1.0, True), ("Qwen2", 0.7, False), ("Llama", 1.3, True), ("GPT2", 1.0, True)])
def test_update_is_naive_autograd_on_one_big_batch(kind, temperature, recompute, monkeypatch):
    monkeypatch.setattr(train.Policy, "chunk", lambda *_: 7)
    compare_with_autograd(train.APO(some_args(temperature=temperature)), naive_apo, kind, recompute)


def test_an_update_starts_from_no_gradient():
    """A rate of 0 moves nothing, so the same update twice says the same."""
    objective, samples, policy = train.APO(some_args()), some_samples(12), train.Policy(small_model())
    a_run = run_of(objective, policy, train.Policy(small_model(seed=1)), torch.optim.SGD(policy.parameters(), lr=0.0))
    given = objective.given(a_run, samples)
    one, two = (train.update(a_run, samples, given) for _ in range(2))
    assert one == two and one["grad_norm"] > 0


def test_the_gradient_is_clipped_to_a_global_norm():
    """A step at rate 1 is as long as the bound; what is logged is the norm before."""
    lengths, norms, clipped = [], [], []
    for bound in (1e9, 0.01):
        objective, policy = train.APO(some_args(max_grad_norm=bound)), train.Policy(small_model())
        optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
        a_run = run_of(objective, policy, train.Policy(small_model(seed=1)), optimizer)
        before = torch.cat([p.detach().flatten() for p in policy.parameters()])
        samples = some_samples(12)
        seen = train.update(a_run, samples, objective.given(a_run, samples))
        norms, clipped = [*norms, seen["grad_norm"]], [*clipped, seen["clipped"]]
        lengths.append((torch.cat([p.detach().flatten() for p in policy.parameters()]) - before).norm().item())
    assert norms[0] == norms[1] == pytest.approx(lengths[0], rel=1e-3) and norms[0] > 1
    assert clipped == [False, True]
    assert lengths[1] == pytest.approx(0.01, rel=1e-2)


def test_apo_asks_only_the_reference(monkeypatch):
    """What the loss takes as given costs one pass of π_ref, none of the policy."""
    asked, samples = [], some_samples(24)
    monkeypatch.setattr(train, "by_token", lambda model, *_: asked.append(model) or torch.zeros(24, 30))
    given = train.APO(some_args()).given(run_of(train.APO(some_args()), "policy", "ref"), samples)
    assert asked == ["ref"] and set(given) == {"ref_logp", "reward", "vstar"}
    assert given["reward"].tolist() == [s.reward for s in samples]
    assert given["vstar"].tolist() == pytest.approx([s.row["vstar"] for s in samples])


def test_rate():
    optimizer = SimpleNamespace(param_groups=[dict(peak=1.0), dict(peak=4.0)])
    rates = []
    for step in range(6):
        train.set_rate(optimizer, step, SimpleNamespace(warmup=4))
        rates.append([group["lr"] for group in optimizer.param_groups])
    assert rates == [[0.25, 1.0], [0.5, 2.0], [0.75, 3.0], [1, 4], [1, 4], [1, 4]]
    train.set_rate(optimizer, 0, SimpleNamespace(warmup=0))
    assert optimizer.param_groups[1]["lr"] == 4


# ---------------------------------------------------------------------------------------------------------------------
# train.py: batches and tokens


def test_microbatches_hold_every_response_once():
    samples = some_samples(40)
    for budget, per_loss in product((1, 60, 10_000), (1, 2)):
        batches = list(train.microbatches(samples, some_args(tokens_per_microbatch=budget), "cpu", per_loss))
        assert sorted(i for rows, _, _ in batches for i in rows) == list(range(40))
        for rows, ids, response in batches:
            assert len(rows) == per_loss or ids.numel() <= budget
            assert all(i ^ 1 in rows for i in rows) or per_loss == 1
            for row, i in enumerate(rows):
                # up to and including the EOS, not the padding, which is the same token
                assert ids[row][response[row]].tolist() == samples[i].completion.tokens
                assert not response[row, : len(samples[i].row["tokens"])].any()


def test_what_another_rank_has_more_of_counts_for_nothing(monkeypatch):
    """Micro-batches without rows fill up where another process has more; they change neither loss nor gradient."""
    samples, objective = some_samples(6), train.APO(some_args())
    reference = train.Policy(small_model(seed=1))

    def updated():
        policy = train.Policy(small_model())
        a_run = run_of(objective, policy, reference, torch.optim.SGD(policy.parameters(), lr=1.0))
        numbers = train.update(a_run, samples, objective.given(a_run, samples))
        return numbers, torch.cat([p.detach().flatten() for p in policy.parameters()])

    alone, moved = updated()
    monkeypatch.setattr(train.dist, "is_initialized", lambda: True)
    two_more = lambda tensor, op=None: tensor.add_(2) if op else tensor  # the count of micro-batches has an `op`
    monkeypatch.setattr(train.dist, "all_reduce", two_more)
    made_up = [rows for rows, _, _ in train.microbatches(samples, objective.args, "cpu")][1:]
    assert made_up == [[], []]
    again, moved_again = updated()
    assert again == alone and torch.equal(moved, moved_again)


def test_minibatches_part_a_batch_by_place():
    """Each sample once a pass, with what is given for it; the copies of a prompt stay together."""
    samples = [s._replace(place=48 + i // 2) for i, s in enumerate(some_samples(20))]
    given = dict(flat=torch.arange(20), by_token=torch.arange(20)[:, None].expand(20, 5))
    parts = list(train.minibatches(samples, given, some_args(batch_size=10, minibatches=3), passes=2))
    assert len(parts) == 6 and [p[0] for p in parts[:3]] == [p[0] for p in parts[3:]]
    for index, (some, their_given) in enumerate(parts[:3]):
        rows = [i for i in range(20) if (48 + i // 2) % 10 * 3 // 10 == index]
        assert some == [samples[i] for i in rows] and their_given["flat"].tolist() == rows
        assert their_given["by_token"][:, 0].tolist() == rows
    (everything,) = train.minibatches(samples, given, some_args(batch_size=10), passes=1)
    assert everything[0] == samples and torch.equal(everything[1]["flat"], given["flat"])


def test_numbers_stand_on_their_tokens():
    """on_tokens puts the n-th number where by_token has the n-th token of the response."""
    samples, policy = some_samples(12), train.Policy(small_model())
    logp = train.by_token(policy, samples, some_args(tokens_per_microbatch=40), "cpu")
    plain = [x.tolist() for x in naive_logps(policy.model, samples, 1.0)]
    placed = train.on_tokens(samples, plain, logp)
    torch.testing.assert_close(placed, logp, atol=1e-4, rtol=1e-5)
    assert (placed != 0).sum() == sum(len(s.completion.tokens) for s in samples)


def test_prompts_of_a_step(monkeypatch):
    """Pass after pass over all prompts, each in an order of its own; the ranks' shares are one process's."""
    rows, args = [dict(id=str(i)) for i in range(10)], SimpleNamespace(batch_size=4, seed=3)
    steps = [train.prompts_of_step(rows, step, args) for step in range(10)]
    places, ids = zip(*[(place, row["id"]) for step in steps for place, row in step])
    assert list(places) == list(range(40))
    passes = [ids[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(one) == sorted(str(i) for i in range(10)) for one in passes) and len(set(passes)) == 4
    monkeypatch.setattr(train, "WORLD", 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(train, "RANK", rank)
        shares += train.prompts_of_step(rows, 2, args)
    assert sorted(shares, key=lambda share: share[0]) == steps[2]


def test_a_rollout_keeps_the_tokens_and_grades_the_text():
    """Seeds are a function of (seed, place, id); what was cut off earns nothing."""
    tokenizer = tiny_tokenizer()
    right = rewards.encode(tokenizer, "5+7=12;\\boxed{12}", False) + [0]
    copies = [Completion(right, True, []), Completion(right[:-1], False, []), Completion(right[:5] + [0], True, [])]
    rows = [dict(id="a", tokens=[2, 3], answer="12"), dict(id="b", tokens=[4], answer="13")]
    sampler = mock.MagicMock()
    sampler.generate.return_value = [copies, copies]
    args = SimpleNamespace(seed=7, reward=None)
    a_run = SimpleNamespace(args=args, sampler=sampler, policy="policy", tokenizer=tokenizer)
    samples = train.rollout(a_run, [(40, rows[0]), (41, rows[1])], 3)
    sampler.holding.assert_called_once_with("policy")
    sampler.generate.assert_called_once_with([[2, 3], [4]], 3, [prompt_seed("7/40", "a"), prompt_seed("7/41", "b")])
    assert [s.reward for s in samples] == [1, 0, 0, 0, 0, 0] and [s.place for s in samples] == [40] * 3 + [41] * 3
    assert [s.completion for s in samples] == 2 * copies and samples[3].ids == [4, *right]
    assert samples[0].response == samples[1].response == "5+7=12;\\boxed{12}"


def test_a_restart_finds_the_last_whole_checkpoint_and_its_rows(tmp_path):
    for name in ("00000002", "00000004", "00000006.tmp", "notes"):
        (tmp_path / "checkpoint" / name).mkdir(parents=True)
    assert train.last_checkpoint(tmp_path) == 4 and train.last_checkpoint(tmp_path / "new") == 0
    assert sorted(os.listdir(tmp_path / "checkpoint")) == ["00000002", "00000004", "notes"]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(dict(step=step)) + "\n" for step in range(7)) + '{"step"')
    assert [row["step"] for row in train.read_metrics(path, 4)] == [0, 1, 2, 3, 4]
    assert [row["step"] for row in read_jsonl(path)] == [0, 1, 2, 3, 4]
    assert train.read_metrics(path, 0) == [] and path.read_text() == ""


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_holds_weights_and_moments(tmp_path):
    """Two steps, with the first's state loaded in between by another run, end where two steps of one run do."""
    def begin(seed):
        policy = train.Policy(small_model(seed=seed))
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
        args, trained = some_args(out=tmp_path), torch.nn.ModuleList([policy])
        return train.Run(args, train.APO(args), None, policy, None, trained, optimizer, None, "cpu")

    def step(run):
        _, ids, mask = next(train.microbatches(some_samples(4), some_args(), "cpu"))
        run.policy(input_ids=ids, mask=mask).square().sum().backward()
        run.optimizer.step()
        run.optimizer.zero_grad()

    one, other = begin(0), begin(1)
    step(one)
    train.save_checkpoint(one, 1)
    step(one)
    train.load_checkpoint(other, 1)
    step(other)
    assert all(a.equal(b) for a, b in zip(one.policy.parameters(), other.policy.parameters()))
    for number in (2, 3):
        train.save_checkpoint(one, number)
    assert sorted(os.listdir(tmp_path / "checkpoint")) == ["00000002", "00000003"]  # the two newest


def test_what_is_shown_of_a_step(tmp_path):
    """samples/ has each answer with its own reward, V̂* and log-ratio; the first is printed, with what it tells."""
    args = some_args(out=tmp_path, show_every=2)
    log = object.__new__(train.Log)
    log.args, log.bar, log.told, log.history, log.zero_one = args, mock.MagicMock(), set(), [], True
    log.run = SimpleNamespace(objective=train.APO(args))
    rows = [dict(id=name, prompt=f"{name}=", answer="7", vstar=value, rewards=[0.0, 1.0])
            for name, value in dict(a=0.25, b=0.5).items()]
    samples = [train.Sample(rows[0], Completion([1, 2], True, [-1.0, -0.5]), "seven", 1.0, 0),
               train.Sample(rows[1], Completion([3], False, [-2.0]), "eight", 0.0, 1)]
    given = dict(ref_logp=torch.tensor([[-2.0, -0.75], [-1.5, 0.0]]))
    for step in (1, 2, 3):
        log.show(dict(step=step, reward=0.5, kl=0.0, tokens_per_second=9), samples, given)
    assert sorted(os.listdir(tmp_path / "samples")) == ["000001.jsonl", "000002.jsonl"]
    assert read_jsonl(tmp_path / "samples/000002.jsonl") == [
        dict(id="a", prompt="a=", response="seven", reward=1.0, vstar=0.25, log_ratio=1.25),
        dict(id="b", prompt="b=", response="eight", reward=0.0, vstar=0.5, log_ratio=-0.5)]
    said = log.bar.write.call_args[0][0]
    assert "a=" in said and "seven\n" in said and "right, the answer is 7; V̂* 0.25, advantage +0.75" in said
    args.reward = "mine.py:judge"  # right and wrong are the checker's words
    log.show(dict(step=4, reward=0.5, kl=0.0, tokens_per_second=9), samples[1:], given)
    assert "── reward 0; V̂* 0.50, advantage -0.50" in log.bar.write.call_args[0][0] and log.zero_one
    log.show(dict(step=5, reward=0.5, kl=0.0, tokens_per_second=9), [samples[0]._replace(reward=0.5)], given)
    assert not log.zero_one
    log.zero_one, rows[0]["rewards"] = True, [0.0, 5.0]  # in Stage 1 there were others
    log.show(dict(step=6, reward=0.5, kl=0.0, tokens_per_second=9), samples, given)
    assert not log.zero_one


def test_a_sleeping_engine_takes_no_memory(monkeypatch):
    """But torch counts it: 85 are 29 in the update and 56 of a sleeping engine; awake, it lies beside 20 others."""
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 85)
    run = SimpleNamespace(device=torch.device("cuda"), sampler=SimpleNamespace(given_back=56, awake=76))
    assert train.peak_memory(run) == 76
    run.sampler.awake = 20
    assert train.peak_memory(run) == 29
    run.sampler = sampler_of(None, 1)
    assert train.peak_memory(run) == 85
    run.device = torch.device("cpu")
    assert train.peak_memory(run) > 1 << 20


def test_a_difference_is_the_others_gain():
    mean, low, high = evaluate.paired([0.0, 0.5, 0.5, 0.0], [1.0, 0.5, 1.0, 0.5])
    assert mean == 0.5 and 0 < low <= mean <= high <= 1


@pytest.mark.parametrize("own,difference", [(None, "+0.000 (+0.000 – +0.000), within noise"),
                                            ("mine.py:judge", "reward +0.250 (+0.250 – +0.250), more than noise")])
def test_models_are_compared_by_rewards_of_ones_own(own, difference, tmp_path, capsys):
    rows = [dict(id=str(i), rewards=[0.25], responses=[""], finished=[True], lengths=[1]) for i in range(9)]
    answers = {("a", "d"): rows, ("b", "d"): [dict(row, rewards=[0.5]) for row in rows]}
    results = {model: {"d": evaluate.measure(some, own)} for (model, _), some in answers.items()}
    args = SimpleNamespace(model=["a", "b"], data=["d"], samples=1, reward=own, reference=None, show=0, out=tmp_path)
    evaluate.report(args, results, answers)
    assert f"b against a: {difference}" in capsys.readouterr().out


def test_held_out_accuracy_counts_rewards_of_one(monkeypatch):
    """Half a reward is not half right; two are not twice."""
    graded = [SimpleNamespace(reward=reward) for reward in (2.0, 1.0, 0.5, 0.0)]
    monkeypatch.setattr(train, "rollout", lambda run, prompts: [graded[row] for _, row in prompts])
    for own, found in ((None, {}), ("mine.py:judge", dict(held_out_reward=0.875))):
        run = SimpleNamespace(args=some_args(reward=own))
        assert train.held_out_metrics(run, range(4), mock.MagicMock()) == dict(accuracy=0.5, **found)


def test_dropout_is_off_and_recomputation_on():
    policy = train.Policy(small_model(kind="GPT2").train(), recompute=True)
    assert not any(m.training for m in policy.modules() if isinstance(m, torch.nn.Dropout))
    _, ids, mask = next(train.microbatches(some_samples(4), some_args(), "cpu"))
    one, two = (policy(input_ids=ids, mask=mask) for _ in range(2))
    assert torch.equal(one, two) and len(policy.blocks) == 2 and all(block.training for block in policy.blocks)
    with torch.no_grad():
        policy(input_ids=ids, use_cache=True)
    assert not any(block.training for block in policy.blocks)


@pytest.mark.parametrize("kind,recompute", [("Qwen2", True), ("Llama", False)])
def test_gradient_of_the_additions_is_autograd_on_merged_weights(kind, recompute):
    """Qwen2's linear layers have biases, Llama's have none."""
    objective, samples = train.APO(some_args()), some_samples(12)
    policy, naive = adapted(small_model(kind=kind), recompute=recompute), small_model(kind=kind)
    leaves = {name: p.detach().clone().requires_grad_() for name, p in policy.model.named_parameters()
              if "lora" in name}
    assert len(leaves) == 2 * 2 * 7  # A and B, two blocks, four layers of the attention and three of the MLP
    for name in {name.rpartition(".")[0] for name in leaves}:
        layer = naive.get_submodule(name)
        weight = layer.weight.detach() + 32 / 3 * leaves[f"{name}.lora_B"] @ leaves[f"{name}.lora_A"]
        del layer.weight
        layer.weight = weight
    known = SimpleNamespace(logp=naive_logps(naive, samples, 1.0),
                            ref_logp=[logp.detach() for logp in naive_logps(small_model(kind=kind), samples, 1.0)])
    naive_apo(objective.args, samples, known)[0].backward()
    a_run = run_of(objective, policy, policy.unadapted, torch.optim.SGD(policy.parameters(), lr=1.0))
    given = objective.given(a_run, samples)
    torch.testing.assert_close(given["ref_logp"].sum(-1), torch.stack([logp.sum() for logp in known.ref_logp]))
    train.update(a_run, samples, given)
    after = dict(policy.model.named_parameters())
    for name, leaf in leaves.items():
        assert leaf.grad.norm() > 1e-3
        torch.testing.assert_close(leaf - after[name], leaf.grad, atol=2e-4, rtol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_additions_switched_off_are_the_base_to_the_bit(dtype):
    _, ids, mask = next(train.microbatches(some_samples(8), some_args(), "cpu"))
    both = dict(input_ids=ids, mask=mask)
    base, policy = train.Policy(small_model()), adapted(small_model(), dtype=dtype)
    fresh = train.Policy(small_model()).adapt(3, dtype, seed=0)
    for parameter in base.parameters():  # not the module, whose rotary buffers stay fp32
        parameter.data = parameter.data.to(dtype)
    with torch.no_grad():
        expected = base(**both)
        assert torch.equal(policy.unadapted(**both), expected) and torch.equal(fresh(**both), expected)
        assert (policy(**both) - expected).abs().max() > 0.1  # and afterwards they are on again
    learning = {name: p.dtype for name, p in policy.named_parameters() if p.requires_grad}
    assert set(learning.values()) == {torch.float32} and all("lora" in name for name in learning)


@pytest.mark.parametrize("tied,dtype", [(True, "float32"), (False, "float32"), (True, "bfloat16")])
def test_the_merged_folder_is_the_adapted_policy(tied, dtype, tmp_path):
    """A plain folder, in fp32: in bf16 it would lose the additions. An engine that has read π_ref gets the adapted
    layers alone."""
    model = tiny_model() if tied else small_model(19)
    for parameter in model.parameters():  # (not the buffers, of which the rotations' would lose digits)
        parameter.data = parameter.data.to(getattr(torch, dtype))
    policy = adapted(model)
    assert policy.config.tie_word_embeddings == tied
    args = SimpleNamespace(out=tmp_path, lora=4, dtype=dtype)
    train.save_model(SimpleNamespace(policy=policy, args=args, tokenizer=tiny_tokenizer()))
    policy.float()
    saved, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(info.values()) and saved.dtype == torch.float32
    ids = torch.arange(1, 13)[None]
    with torch.no_grad():
        ours, theirs = (model(input_ids=ids).logits for model in (policy, saved))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    frozen = {"embed_tokens", "lm_head", "norm", "input_layernorm", "post_attention_layernorm"}
    named = lambda weights: {name.split(".")[-2] for name, _ in weights}
    assert named(policy.full_weights(frozen=True)) == named(saved.state_dict().items()) > frozen
    assert named(policy.full_weights()) == named(saved.state_dict().items()) - frozen


def test_the_saved_precision_is_the_wider_one(tmp_path):
    """A step of 1e-6 would be lost in bf16, so a bf16 π_ref that is trained in fp32 is saved in fp32."""
    for dtype in ("bfloat16", "float32"):
        policy = train.Policy(tiny_model().bfloat16())
        policy.model.float()  # the masters
        args = SimpleNamespace(out=tmp_path / dtype, lora=None, dtype=dtype)
        train.save_model(SimpleNamespace(policy=policy, args=args, tokenizer=tiny_tokenizer()))
        saved = transformers.AutoModelForCausalLM.from_pretrained(args.out / "model", dtype="auto")
        assert saved.dtype == getattr(torch, dtype)


@pytest.mark.parametrize("lora,dtype,asked,taken", [
    (4, "bfloat16", "auto", "transformers"), (4, "bfloat16", "vllm", "vllm"), (4, "float32", "auto", "auto"),
    (None, "bfloat16", "auto", "auto"),
])
def test_lora_in_bf16_samples_with_vllm_only_if_asked(lora, dtype, asked, taken):
    """Its weights are fp32 then."""
    assert train.wanted_engine(SimpleNamespace(lora=lora, dtype=dtype, engine=asked)) == taken


def test_lora_needs_linear_layers(capsys):
    """GPT-2's are transformers' Conv1D."""
    policy = train.Policy(small_model(kind="GPT2"))
    ends_in_one_line(capsys, lambda: policy.adapt(4, torch.float32, 0), "--lora", "GPT2LMHeadModel", "torch.nn.Linear")


@pytest.mark.parametrize("flags,rate", [([], 1e-6), (["--lora=8"], 5e-6), (["--lora=8", "--lr=1e-4"], 1e-4)])
def test_the_default_rate(flags, rate, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--beta2=0.1", *flags])
    assert train.parse_args(train.APO).lr == rate


def test_memory_does_not_grow_with_vocabulary_times_batch(monkeypatch):
    monkeypatch.setattr(train.Policy, "chunk", lambda *_: 16)
    vocabulary, samples = 150_000, some_samples(64, vocabulary=150_000)
    policy, objective = train.Policy(small_model(vocabulary)), train.APO(some_args())
    a_run = run_of(objective, policy, policy, torch.optim.SGD(policy.parameters(), lr=1.0))
    given = objective.given(a_run, samples)
    with Largest() as largest:
        train.update(a_run, samples, given)
    embedding = vocabulary * 32  # its gradient is as large
    assert sum(len(s.completion.tokens) for s in samples) * vocabulary > 10 * embedding  # full logits would be seen
    assert largest.size <= max(embedding, 16 * vocabulary)


# ---------------------------------------------------------------------------------------------------------------------
# train.py: what it says is wrong


def test_stale_weights_and_a_wrong_reference_are_noticed(capsys):
    args = SimpleNamespace(dtype="float32", engine="transformers")
    good = dict(log_ratio_abs=0.0, mismatch=1e-5, reference_mismatch=1e-5, length=20.0)
    check = lambda step, first=1e-5, **other: train.check_numbers({**good, **other}, step, first, args)
    check(0)
    ends_in_one_line(capsys, lambda: check(0, 0, mismatch=0.05, reference_mismatch=0.05), "old weights")  # at once
    check(5, log_ratio_abs=1.0)  # only at step 0 it must be 0
    check(5, mismatch=9e-4, reference_mismatch=0.3)  # rounding
    ends_in_one_line(capsys, lambda: check(5, mismatch=0.05, reference_mismatch=0.3), "old weights")
    ends_in_one_line(capsys, lambda: check(5, mismatch=math.nan), "old weights")
    check(5, 6e-3, mismatch=0.05, reference_mismatch=0.3)  # but not where step 0 had as much noise
    ends_in_one_line(capsys, lambda: check(1, mismatch=5e-4, reference_mismatch=2e-4), "old weights")  # nearer to π_ref
    args.dtype = "bfloat16"
    check(1, mismatch=9e-5, reference_mismatch=3e-5)  # few tokens, rounded by chance to one side
    ends_in_one_line(capsys, lambda: check(1, mismatch=4e-3, reference_mismatch=1e-3), "old weights")
    args.dtype = "float32"
    ends_in_one_line(capsys, lambda: check(0, log_ratio_abs=1.0), "agree", "0.05 per token")


def test_each_pass_has_an_order_of_its_own():
    args = some_args(batch_size=8, seed=3)
    passes = [[row for step in (2 * epoch, 2 * epoch + 1) for _, row in train.prompts_of_step(range(16), step, args)]
              for epoch in range(3)]
    assert all(sorted(some) == list(range(16)) for some in passes) and len({*map(tuple, passes)}) == 3


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_each_process_has_its_share_of_each_minibatch(ranks):
    for rank in range(ranks):
        samples = [s._replace(place=32 + rank + ranks * i) for i, s in enumerate(some_samples(32 // ranks))]
        dealt = [len(some) for some, _ in train.minibatches(samples, {}, some_args(batch_size=32, minibatches=4), 1)]
        assert dealt == [8 // ranks] * 4


def test_blocks_that_drop_out_by_their_own_flag_are_refused(capsys):
    kind = transformers.OPTConfig(vocab_size=32, hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2,
                                  word_embed_proj_dim=16, max_position_embeddings=32, dropout=0.5)
    model = transformers.OPTForCausalLM(kind)
    train.check_head(train.Policy(model), "cpu", "m")
    ends_in_one_line(capsys, lambda: train.check_head(train.Policy(model, recompute=True), "cpu", "m"), "drop out",
                     "--recompute no")


def test_an_eos_of_null_is_the_configs(tmp_path):
    shutil.copytree(HERE / "tiny/model", tmp_path / "model")
    (tmp_path / "model/generation_config.json").write_text('{"eos_token_id": null}')
    assert vstar.load_tokenizer(str(tmp_path / "model"), None)[1] == vstar.load_tokenizer("tiny/model", None)[1]


def test_weights_and_tokenizer_are_fingerprinted(tmp_path):
    seen = set()
    for content in (b"one", b"two"):
        for name in ("pytorch_model.bin", "tokenizer_config.json", "chat_template.jinja"):
            (tmp_path / name).write_bytes(content)
            seen.add(vstar.fingerprint(tmp_path)["model's files"])
    assert len(seen) == 6


def test_what_a_data_set_wrote_is_printed_escaped(capsys):
    ends_in_one_line(capsys, lambda: rewards.fail("problem \x1b[31m7"), "problem �[31m7")
    (said,) = vstar.wrong_answers([dict(id="\x1b[2J", answer="\x1b", responses=["\x1b"], finished=[1], rewards=[0])], 1)
    assert "\x1b" not in said and "�[2J" in said


def after_stage1(rows, monkeypatch, folder, **settings):
    """Stage 2's flags, behind a Stage 1 of these rows and settings."""
    monkeypatch.setattr(train, "read_rows", lambda path: rows)
    monkeypatch.setattr(train, "fingerprint", lambda *_, **__: {})
    settings = {**dict.fromkeys(train.FROM_STAGE1), "temperature": 1, "beta1": 1, **settings}
    (folder / "v.jsonl").write_text("")
    (folder / "v.config.json").write_text(json.dumps(dict(settings=settings, samples=2)))
    return some_args(vstar=folder / "v.jsonl", beta1=None, samples=None, filter="none", steps=1, eval_data=None,
                     eval_split="test", prior=0)


@pytest.mark.parametrize("data,split,held_out", [
    ("math", "train", "math"), ("mine.jsonl", "train", None), ("math500", "test", None),  # with no other split
    ("math", "test", None), ("hellaswag", "validation", None),  # it is trained on
])
def test_the_default_held_out_problems(data, split, held_out, monkeypatch, tmp_path):
    args = after_stage1([dict(id="a", rewards=[0.0, 1], vstar=0.0)], monkeypatch, tmp_path, data=data, split=split)
    train.read_stage1(args)
    assert args.eval_data == held_out


def test_an_empty_stage1_is_refused(monkeypatch, tmp_path, capsys):
    args = after_stage1([], monkeypatch, tmp_path, data="d")
    ends_in_one_line(capsys, lambda: train.read_stage1(args), "v.jsonl: no rows in it", "--overwrite")


@pytest.mark.parametrize("choice,kept", [("none", "abc"), ("unsolved", "ab"), ("both", "a")])
def test_filter(choice, kept, monkeypatch, tmp_path):
    rows = [dict(id=name, rewards=some, vstar=0.0) for name, some in dict(a=[0.0, 1], b=[1, 1], c=[0.0, 0.5]).items()]
    args = after_stage1(rows, monkeypatch, tmp_path, data="d")
    args.filter = choice
    found = train.read_stage1(args)[0]
    assert "".join(row["id"] for row in found) == kept
    assert found[0]["vstar"] == pytest.approx(math.log((1 + math.e) / 2))  # computed again, from the rewards
    args.samples, args.filter = 1, "none"
    found = train.read_stage1(args)[0]
    assert [row["vstar"] for row in found] == [0, 1, 0] and found[0]["rewards"] == [0]  # from the first alone


@pytest.mark.parametrize("beta1,prior,vstar_of_1,vstar_of_0", [
    (math.inf, 0, 1, 0), (math.inf, 2, (1 + 2 / 4) / 3, (2 / 4) / 3),  # one of four right, twice, beside one's own
    (1.0, 2, math.log((math.e + 2 * (math.e + 3) / 4) / 3), math.log((1 + 2 * (math.e + 3) / 4) / 3)),
])
def test_prior_answers_of_the_average_prompt(beta1, prior, vstar_of_1, vstar_of_0, monkeypatch, tmp_path):
    rows = [dict(id=name, rewards=[float(name == "a")], vstar=0.0) for name in "abcd"]
    args = after_stage1(rows, monkeypatch, tmp_path, data="d")
    args.beta1, args.samples, args.prior = beta1, 1, prior
    found = [row["vstar"] for row in train.read_stage1(args)[0]]
    assert found == pytest.approx([vstar_of_1, *[vstar_of_0] * 3])
    assert train.read_stage1(args)[0][0]["rewards"] == [1.0]  # what was seen stays apart from it


def old_weights(lag, times):
    """train.py whose sampler has the policy's weights as they were `lag` steps ago (at the run's start, if fewer), or
    never had: `times` them."""
    return f"""
import copy, runpy, vstar
kept, hold = [], vstar.TransformersSampler.holding
def holding(self, policy):
    kept.append(copy.deepcopy(policy.state_dict()))
    old = copy.deepcopy(policy)
    old.load_state_dict({{name: tensor * {times} for name, tensor in kept[max(0, len(kept) - 1 - {lag})].items()}})
    return hold(self, old)
vstar.TransformersSampler.holding = holding
runpy.run_path("train.py", run_name="__main__")
"""


@whole
@pytest.mark.parametrize("lag,times,steps", [(0, 1.1, 5), *[
    pytest.param(*others, marks=pytest.mark.long) for others in [(1, 1, 20), (999, 1, 20), (0, 1, 5)]]])
def test_an_engine_with_old_weights_is_noticed(lag, times, steps, all_rows, tmp_path):
    """At a tenth of the embedded world's rate, so that a step moves the policy little."""
    flags = [f"--steps={steps}", "--eval_every=99", "--lr=3e-5", "--batch_size=64", "--eval_limit=8"]
    done = run("-c", old_weights(lag, times), *stage2(all_rows, tmp_path, *flags)[1:], check=False)
    if (lag, times) == (0, 1):
        assert done.returncode == 0, done.stderr[-2000:]
    else:
        assert done.returncode == 2 and "does it still hold old weights" in done.stderr, done.stderr[-2000:]


@long
def test_a_healthy_engine_is_not_accused(all_rows, tmp_path):
    """Of a long run whose numbers round."""
    flags = ["--dtype=bfloat16", "--steps=300", "--batch_size=16", "--save_every=999", "--eval_every=150"]
    inside(*stage2(all_rows, tmp_path, *flags, "--tokens_per_microbatch=4096"))
    rows = metrics(tmp_path)
    assert len(rows) == 301 and rows[-1]["accuracy"] > 0.6 and max(row["mismatch"] for row in rows[1:]) < 0.05


def test_a_restart_remembers_the_first_mismatch(tmp_path, monkeypatch):
    monkeypatch.setattr(train.signal, "signal", lambda *_: None)
    args = SimpleNamespace(out=tmp_path, steps=3, wandb=None)
    kept = [dict(step=0), dict(step=1, mismatch=0.25), dict(step=2, mismatch=9.0)]
    train.write_rows(tmp_path / "metrics.jsonl", kept)
    assert train.Log(SimpleNamespace(args=args), 2).first_mismatch == 0.25
    log = train.Log(SimpleNamespace(args=args), 0)
    assert log.first_mismatch == 0  # before the first step nothing is known, and the tolerance alone counts
    monkeypatch.setattr(train, "RANK", 1)
    log(dict(step=0, accuracy=0.5))
    log(dict(step=1, mismatch=7.0))
    log(dict(step=2, mismatch=8.0))
    assert log.first_mismatch == 7.0


ILL = {
    "unsolved": lambda i: dict(unsolved=0.2),
    "still": lambda i: dict(log_ratio_abs=1e-4, kl=1e-5, reward=0.4),
    "runaway": lambda i: dict(kl=0.5 * i),
    "collapse": lambda i: dict(reward=0.6 if i < 30 else 0.2),
    "cut off": lambda i: dict(finished=1.0 - i / 60, length=20.0 + 5 * i),
    "no EOS": lambda i: dict(finished=0.01, reward=0.0),
    "saturated": lambda i: dict(reward=0.99),
}


@pytest.mark.parametrize("name", ILL)
def test_illness_is_named(name):
    args, remedies = some_args(), ("--", "harder")
    found = train.diagnose([{**row, **ILL[name](i)} for i, row in enumerate(healthy())], args)
    assert name in found and any(word in found[name] for word in remedies), found
    assert set(found) <= {name, "collapse"}, found


def test_rewards_of_another_scale_have_fewer_alarms():
    for name in ("unsolved", "saturated", "runaway"):
        rows = [{**row, **ILL[name](i)} for i, row in enumerate(healthy())]
        assert name in train.diagnose(rows, some_args()) and name not in train.diagnose(rows, some_args(), None)
    rows = [dict(row, unsolved=0.6) for row in healthy()]  # of one answer most are wrong
    assert train.diagnose(rows, some_args(samples=1)) == {}


def test_health_is_not_remarked_upon():
    rows = [dict(step=0, accuracy=0.4), *healthy()]
    for count in range(len(rows)):
        assert train.diagnose(rows[:count], some_args()) == {}


@pytest.mark.parametrize("flag,words", [
    ("--batch=25", ["unrecognized arguments: --batch=25"]),  # not taken for --batch_size
    ("--n=4", ["unrecognized arguments: --n=4"]),
    ("--clip=1", ["unrecognized arguments: --clip=1"]),
    ("--algo=ppo", ["unrecognized arguments: --algo=ppo"]),
    ("--group=4", ["unrecognized arguments: --group=4"]),
    ("--passes=4", ["unrecognized arguments: --passes=4"]),
    ("--plan=8xH100", ["unrecognized arguments: --plan=8xH100"]),
    # V̂* holds for Stage 1's settings, so they cannot be changed here
    ("--model=tiny/model", ["unrecognized arguments: --model=tiny/model"]),
    ("--revision=main", ["unrecognized arguments: --revision=main"]),
    ("--prompt=?", ["unrecognized arguments: --prompt=?"]),
    ("--chat", ["unrecognized arguments: --chat"]),
    ("--chat_args={}", ["unrecognized arguments: --chat_args={}"]),
    ("--stop=;", ["unrecognized arguments: --stop=;"]),
    ("--reward=a.py:b", ["unrecognized arguments: --reward=a.py:b"]),
    ("--temperature=0.5", ["unrecognized arguments: --temperature=0.5"]),
    ("--max_new_tokens=9", ["unrecognized arguments: --max_new_tokens=9"]),
    ("--batch_size=0", ["--batch_size", "is too small"]),
    ("--beta2=0", ["--beta2", "is too small"]),
    ("--lr=-1", ["--lr", "is too small"]),
    ("--minibatches=99", ["--minibatches 99", "--batch_size 25"]),
    ("--dtype=float16", ["argument --dtype", "float16"]),
    ("--recompute=maybe", ["argument --recompute", "maybe"]),
    ("--wandb=x", ["--wandb", "not installed"]),
    ("--vstar=nowhere.jsonl", ["nowhere.jsonl", "vstar.py"]),
])
def test_bad_flags_of_stage2(flag, words, tmp_path):
    refused(inside(*stage2(tmp_path / "v.jsonl", tmp_path / "run", flag), check=False), *words)
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------------------------------------------------------------
# train.py: Stage 2 as a whole


@whole
def test_stage2_files(trained):
    out, done = trained
    rows = metrics(out)
    assert [row["step"] for row in rows] == list(range(7))
    assert [row["step"] for row in rows if "accuracy" in row] == [0, 2, 4, 6]
    assert set(rows[1]) >= {"loss", "reward", "vstar", "advantage", "kl", "entropy", "length", "finished", "unsolved",
                            "grad_norm", "mismatch", "lr"}
    assert rows[1]["kl"] == 0 and rows[1]["log_ratio_abs"] == 0  # the same code on the same tokens: exactly
    assert all(0 < row["mismatch"] < 1e-5 for row in rows[1:])  # and the sampler's own log-probs agree
    assert rows[1]["loss"] == pytest.approx(rows[1]["advantage"] ** 2, abs=0.3) and rows[2]["log_ratio_abs"] > 0
    assert rows[1]["advantage"] == pytest.approx(rows[1]["reward"] - rows[1]["vstar"]) and rows[1]["lr"] == 3e-4
    assert sorted(p.name for p in (out / "checkpoint").iterdir()) == ["00000004", "00000006"]
    assert sorted(os.listdir(out)) == ["checkpoint", "config.json", "curves.png", "metrics.jsonl", "model",
                                       "samples"]
    assert (out / "curves.png").stat().st_size > 10_000
    settings = json.loads((out / "config.json").read_text())["settings"]
    assert settings["algorithm"] == "apo" and settings["model"] == "tiny/model" and settings["samples"] == 8
    for words in ("before  held-out accuracy", "after   held-out accuracy", "── step 3: ", "(95 %, 40 problems)"):
        assert words in done.stdout


@whole
def test_final_model_is_the_trained_policy(trained):
    """transformers loads it as it is, and it scores exactly what the last row says."""
    out, rows = trained[0], metrics(trained[0])
    model = transformers.AutoModelForCausalLM.from_pretrained(out / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "model")
    assert model.dtype == torch.float32 and model.generation_config.eos_token_id == 0
    problems = rewards.load_problems(str(HERE / "tiny/test.jsonl"))[:40]
    prompts = [rewards.encode(tokenizer, p["question"], False) for p in problems]
    seeds = [prompt_seed("0/held out", p["id"]) for p in problems]
    completions = sampler_of(model.eval(), 64).generate(prompts, 1, seeds)
    right = [rewards.reward(tokenizer.decode(copy.tokens, skip_special_tokens=True), p["answer"], copy.finished)
             for p, (copy,) in zip(problems, completions)]
    assert np.mean(right) == pytest.approx(rows[-1]["accuracy"])
    assert rows[0]["accuracy"] != rows[-1]["accuracy"]


@whole
@pytest.mark.parametrize("times", [2, pytest.param(4, marks=pytest.mark.long)])
def test_stage2_killed_and_restarted(times, trained, all_rows, tmp_path):
    """kill -9 at random moments and while a checkpoint is being written: the same bits in the end."""
    out, rng = tmp_path / "run", random.Random(1)
    for attempt in range(times):
        process, saved = start(*stage2(all_rows, out)), set(out.glob("checkpoint/0*[0-9]"))
        if attempt % 2:
            wait_until(lambda: list(out.glob("checkpoint/*.tmp")), process)  # it is saving
        else:
            wait_until(lambda saved=saved: set(out.glob("checkpoint/0*[0-9]")) - saved, process)
            time.sleep(rng.random() * 0.3)  # it has saved, and goes on for a moment
        kill(process)
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')  # and a torn line
    inside(*stage2(all_rows, out))
    assert metrics(out) == metrics(trained[0])
    assert weights(out) == weights(trained[0])
    assert not list(out.glob("**/*.tmp"))
    for name in ("000001.jsonl", "000003.jsonl", "000006.jsonl"):
        assert (out / "samples" / name).read_bytes() == (trained[0] / "samples" / name).read_bytes()


@whole
def test_sigterm_saves_and_says_how_to_go_on(trained, all_rows, tmp_path):
    out, command = tmp_path / "run", stage2(all_rows, tmp_path / "run", "--save_every=100")
    process = start(*command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    path = out / "metrics.jsonl"
    wait_until(lambda: path.exists() and len(path.read_text()) > 1500, process)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "the same command goes on from here" in said, said
    assert "stopping after this step\n" in said, said  # at once: a step may take a minute
    assert 1 <= len(list((out / "checkpoint").iterdir())) <= 2
    inside(*command)
    assert metrics(out) == metrics(trained[0]) and weights(out) == weights(trained[0])


@whole
def test_two_ranks_train_like_one(trained, all_rows, tmp_path):
    """The same completions, and the same metrics but for rounding. 25 prompts: their shares differ."""
    torchrun(2, *stage2(all_rows, tmp_path))
    close(metrics(tmp_path), metrics(trained[0]))


@long
@pytest.mark.parametrize("counts", [(2, 1, 2), (4, 1, 2)])
def test_checkpoints_between_one_two_and_four_ranks(counts, trained, all_rows, tmp_path):
    for count, steps in zip(counts, (2, 4, 6)):
        torchrun(count, *stage2(all_rows, tmp_path, f"--steps={steps}"))
    close(metrics(tmp_path), metrics(trained[0]))


@long
def test_two_nodes_train_like_one(trained, all_rows, undisturbed, tmp_path):
    """Both stages on two nodes; one dies in the middle of Stage 2, and the same commands go on to the same result."""
    for node in nodes(2, 1, *stage1(tmp_path / "vstar.jsonl")):
        assert node.wait(timeout=300) == 0
    assert (tmp_path / "vstar.jsonl").read_bytes() == undisturbed[0].read_bytes()
    both = nodes(2, 1, *stage2(all_rows, tmp_path / "run"))
    wait_until(lambda: (tmp_path / "run/checkpoint/00000002").exists(), *both)
    ranks = descendants(both[0].pid) + descendants(both[1].pid)
    kill(both[1])  # a node is gone; the other's agent gives up after five minutes, or a scheduler ends it
    time.sleep(1)
    for rank in ranks:
        os.kill(rank, signal.SIGKILL)
    assert both[0].wait(timeout=60) != 0 and not (tmp_path / "run/model").exists()
    for node in nodes(2, 1, *stage2(all_rows, tmp_path / "run")):
        assert node.wait(timeout=300) == 0
    close(metrics(tmp_path / "run"), metrics(trained[0]))


@long
def test_random_kills_over_both_stages(undisturbed, tmp_path):
    """kill -9 at random moments (five; LONG=1: fifty); the same command, until it ends by itself: the same bits."""
    rng, kills = random.Random(2), 50 if LONG else 5
    rows = lambda name: tmp_path / name / "vstar.jsonl"
    more = ["--steps=60", "--batch_size=64", "--eval_every=20", "--tokens_per_microbatch=8000"]
    both = lambda name: " && ".join(shlex.join([sys.executable, *map(str, command)]) for command in (
        stage1(rows(name)), stage2(rows(name), tmp_path / name / "run", *more)))
    quiet = dict(shell=True, cwd=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    subprocess.run(both("whole"), check=True, **quiet)
    for _ in range(kills):
        process = subprocess.Popen(both("killed"), start_new_session=True, **quiet)
        time.sleep(rng.uniform(4, 12))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(both("killed"), check=True, **quiet)
    assert rows("killed").read_bytes() == rows("whole").read_bytes() == undisturbed[0].read_bytes()
    one, other = (tmp_path / name / "run" for name in ("killed", "whole"))
    assert metrics(one) == metrics(other) and weights(one) == weights(other)


@long
def test_a_long_run_stays_as_small_as_it_began(all_rows, tmp_path):
    """Memory and open files from outside, over 80 steps (LONG=1: a thousand)."""
    process = start(*stage2(all_rows, tmp_path, f"--steps={1000 if LONG else 80}", "--batch_size=64",
                            "--tokens_per_microbatch=8000", "--eval_every=1000", "--save_every=20"))
    resident, files, path = [], [], tmp_path / "metrics.jsonl"
    while process.poll() is None:
        if path.exists() and path.read_text().count("\n") > 10:  # it has begun
            try:
                resident.append(int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]))
                files.append(len(os.listdir(f"/proc/{process.pid}/fd")))
            except OSError:
                break  # it has just ended
        time.sleep(0.1)
    assert process.wait() == 0 and len(resident) > 20
    fifth = len(resident) // 5
    assert np.median(resident[-fifth:]) < 1.1 * np.median(resident[fifth : 2 * fifth])
    assert np.median(files[-fifth:]) <= np.median(files[2 * fifth : 3 * fifth])  # the first save opens some for good
    seconds = [sum(row["seconds"][key] for key in ("sampling", "reference", "update")) / row["length"]
               for row in read_jsonl(path) if row["step"]]
    fifth = len(seconds) // 5
    print("seconds a token, last fifth over second:",
          np.median(seconds[-fifth:]) / np.median(seconds[fifth : 2 * fifth]))  # pytest -s


@whole
def test_broken_files_each_end_in_one_line(trained, all_rows, tmp_path):
    """A broken line, a torn checkpoint, half a model, a read-only folder: one clear line, and nothing is lost."""
    lines = all_rows.read_text().splitlines()
    broken = copy_rows(all_rows, tmp_path / "vstar.jsonl", [*lines[:500], lines[500][:40], *lines[501:]])
    refused(inside(*stage2(broken, tmp_path / "r"), check=False), "vstar.jsonl", "line 501")
    broken.write_bytes(broken.read_bytes().replace(lines[500][:40].encode(), b"\xff" + lines[500].encode()))
    refused(inside(*stage2(broken, tmp_path / "r"), check=False), "vstar.jsonl", "line 501")

    out = shutil.copytree(trained[0], tmp_path / "torn")
    for shard in (out / "checkpoint/00000006").glob("*.distcp"):
        shard.write_bytes(shard.read_bytes()[:1000])
    done = inside(*stage2(all_rows, out, "--steps=8"), check=False)
    refused(done, "00000006", "cannot be read (EOFError()", alone=False)
    assert (out / "checkpoint/00000004").is_dir()

    out = shutil.copytree(trained[0], tmp_path / "metrics")
    rows = (out / "metrics.jsonl").read_text().splitlines()
    (out / "metrics.jsonl").write_text("\n".join([*rows[:3], "\x00" * 9, *rows[4:]]) + "\n")
    assert "line 4: not readable" in inside(*stage2(all_rows, out)).stdout
    assert [row["step"] for row in metrics(out)] == [0, 1, 2, 4, 5, 6]  # one is lost, and no other

    model = shutil.copytree(HERE / "tiny/model", tmp_path / "model")
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:5000])
    refused(inside(*stage1(tmp_path / "m.jsonl", f"--model={model}"), check=False), str(model), alone=False)
    (model / "model.safetensors").write_bytes(b"")
    refused(inside(*stage1(tmp_path / "m.jsonl", f"--model={model}"), check=False), "model.safetensors is empty")
    refused(run(*stage2(all_rows, "/proc/out"), check=False), "/proc/out")  # nobody may write there

    parts = tmp_path / "p.parts"
    process = start(*stage1(tmp_path / "p.jsonl"))
    wait_until(lambda: len(list(parts.glob("*.jsonl"))) >= 2, process)
    kill(process)
    torn = next(parts.glob("*.jsonl"))
    torn.write_text("{}")
    refused(inside(*stage1(tmp_path / "p.jsonl"), check=False), torn.name, "remove this line", alone=False)
    torn.unlink()
    inside(*stage1(tmp_path / "p.jsonl"))


@long
def test_extending_a_run_is_one_long_run(trained, all_rows, tmp_path):
    inside(*stage2(all_rows, tmp_path, "--steps=4"))
    inside(*stage2(all_rows, tmp_path, "--eval_every=2"))
    assert weights(tmp_path) == weights(trained[0])


@whole
@pytest.mark.parametrize("more,words", [
    (["--lr=1e-3", "--beta2=0.5"], ["--lr (was 0.0003, now 0.001)", "--beta2 (was 0.1, now 0.5)", "--overwrite"]),
    (["--beta1=2"], ["--beta1 (was 0.5, now 2.0)"]),
    (["--samples=4"], ["--samples (was 8, now 4)"]),
    (["--samples=9"], ["8 answers per prompt, not --samples 9"]),
    (["--eval_data=nowhere.jsonl"], ["nowhere.jsonl"]),
    (["--steps=4"], ["is at step 6 already, beyond --steps 4"]),
])
def test_stage2_refuses(more, words, trained, all_rows):
    refused(inside(*stage2(all_rows, trained[0], *more), check=False), *words)


@whole
def test_other_held_out_problems_are_refused(all_rows, tmp_path):
    """Under the same name, for accuracy before and after is of the same problems."""
    for question in ("1+2=", "2+1="):
        (tmp_path / "p.jsonl").write_text(json.dumps(dict(id="1", question=question, answer="3")))
        done = inside(*stage2(all_rows, tmp_path / "run", f"--eval_data={tmp_path}/p.jsonl", "--steps=1"), check=False)
    refused(done, "eval_data's problems (was", "--overwrite")


@whole
def test_full_disk_keeps_the_last_checkpoint(trained, all_rows, tmp_path):
    """No file may grow beyond 300 KB: metrics fit, a checkpoint does not."""
    inside(*stage2(all_rows, tmp_path, "--steps=2"))
    with full_disk(kilobytes=300):
        done = inside(*stage2(all_rows, tmp_path), check=False)
    refused(done, f"cannot write {tmp_path}/checkpoint/00000004", "disk", alone=False)
    assert [p.name for p in (tmp_path / "checkpoint").iterdir()] == ["00000002"]
    inside(*stage2(all_rows, tmp_path))
    assert metrics(tmp_path) == metrics(trained[0]) and weights(tmp_path) == weights(trained[0])


@whole
def test_numbers_that_are_not_finite_stop_the_run(all_rows, tmp_path):
    rows = read_jsonl(all_rows)[:24]
    rows[5]["rewards"] = [math.nan] * 8
    path = copy_rows(all_rows, tmp_path / "v.jsonl", map(json.dumps, rows))
    done = inside(*stage2(path, tmp_path / "run"), check=False)
    refused(done, f"error: the loss of {rows[5]['id']} is not finite", alone=False)


@whole
def test_beta1_and_samples_are_recomputed_from_the_rewards(all_rows, tmp_path, monkeypatch):
    monkeypatch.chdir(HERE)
    monkeypatch.setattr(sys, "argv", stage2(all_rows, tmp_path, "--beta1=2", "--samples=4", "--filter=unsolved"))
    args = train.parse_args(train.APO)
    rows, settings = train.read_stage1(args)
    assert 600 < len(rows) < 1024 and settings["beta1"] == 0.5 and args.model == "tiny/model"
    for row in rows:
        assert any(row["rewards"][:4]) and len(row["rewards"]) == 4
        assert row["vstar"] == pytest.approx(2 * math.log(np.mean(np.exp(np.array(row["rewards"][:4]) / 2))))


def learns(command, out):
    """From less than half right to more than 80 %, by writing the steps."""
    inside(*command, "--batch_size=128", "--eval_limit=256", "--eval_every=25", "--warmup=5", "--save_every=99",
           "--decode_rows=1024", "--tokens_per_microbatch=16384")
    rows = metrics(out)
    assert rows[0]["accuracy"] < 0.5 and rows[-1]["accuracy"] > 0.8
    assert rows[-1]["length"] > 1.5 * rows[1]["length"]  # it has found out that writing the steps pays
    return rows


@whole
def test_it_learns(all_rows, tmp_path):
    rows = learns(stage2(all_rows, tmp_path, "--steps=25"), tmp_path)
    assert train.diagnose(rows, some_args()) == {}


@long
def test_lora_killed_stopped_and_on_two_ranks(all_rows, tmp_path):
    """The same bits as undisturbed, and two ranks like one. Checkpoints hold the additions and their Adam alone."""
    command = lambda name, *more: stage2(all_rows, tmp_path / name, "--lora=4", "--lr=3e-3", *more)
    inside(*command("one"))
    rows = metrics(tmp_path / "one")
    assert rows[1]["kl"] == 0 and rows[1]["log_ratio_abs"] == 0 < 0.01 < rows[2]["log_ratio_abs"]
    assert all(0 < row["mismatch"] < 1e-5 for row in rows[1:])
    saved = torch.distributed.checkpoint.FileSystemReader(tmp_path / "one/checkpoint/00000006").read_metadata()
    tensors = [name for name, kept in saved.state_dict_metadata.items() if hasattr(kept, "size")]
    assert len(tensors) == 4 * 28 and all("lora" in name for name in tensors)  # weight, two moments, and a count
    for sign in (signal.SIGKILL, signal.SIGTERM):
        process = start(*command("two"))
        saved = set((tmp_path / "two").glob("checkpoint/0*[0-9]"))
        wait_until(lambda saved=saved: set((tmp_path / "two").glob("checkpoint/0*[0-9]")) - saved, process)
        process.send_signal(sign)
        process.wait()
    inside(*command("two"))
    assert metrics(tmp_path / "two") == rows and weights(tmp_path / "two") == weights(tmp_path / "one")
    torchrun(2, *command("three"))
    close(metrics(tmp_path / "three"), rows)
    refused(inside(*stage2(all_rows, tmp_path / "one", "--lr=3e-3"), check=False), "--lora (was 4, now None)")


@long
def test_lora_in_bf16(all_rows, tmp_path):
    """The base is frozen in bf16, the additions learn in fp32. On two ranks FSDP holds both."""
    command = lambda name: stage2(all_rows, tmp_path / name, "--lora=4", "--dtype=bfloat16", "--steps=2",
                                  "--recompute=yes")
    inside(*command("one"))
    torchrun(2, *command("two"))
    for rows in (metrics(tmp_path / "one"), metrics(tmp_path / "two")):
        assert rows[1]["log_ratio_abs"] == 0 < rows[2]["log_ratio_abs"] and rows[1]["mismatch"] < 0.01
    state = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "one/model").state_dict()
    for name, reference in tiny_model().state_dict().items():
        change = (state[name] - reference.bfloat16().float()).abs().max()
        assert state[name].dtype == torch.float32 and (change > 0) == name.endswith("proj.weight")


@long
def test_lora_learns(all_rows, tmp_path):
    learns(stage2(all_rows, tmp_path, "--steps=25", "--lora=16", "--lr=1.5e-3"), tmp_path)


@whole
def test_wandb_gets_every_row(all_rows, tmp_path, monkeypatch):
    (tmp_path / "wandb.py").write_text(
        "def init(project, config):\n    print('project', project, config['beta2'])\n"
        "def log(row, step):\n    print('logged', step, row['step'])\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    done = inside(*stage2(all_rows, tmp_path / "run", "--wandb=mine", "--steps=2"))
    monkeypatch.delitem(sys.modules, "wandb")
    assert [line for line in done.stdout.splitlines() if line.startswith(("project", "logged"))] == [
        "project mine 0.1", "logged 0 0", "logged 1 1", "logged 2 2"]


@whole
def test_minibatches_and_bf16(all_rows, tmp_path):
    """fp32 masters with bf16 compute, FSDP's code on a mesh of one, two optimizer steps per batch."""
    inside(*stage2(all_rows, tmp_path, "--dtype=bfloat16", "--minibatches=2", "--steps=3", "--recompute=yes"))
    rows = metrics(tmp_path)
    assert rows[1]["log_ratio_abs"] < 1e-3  # bf16 rounds, and a part has other micro-batches than the reference pass
    assert rows[2]["log_ratio_abs"] > 1e-2 and 1e-6 < rows[1]["mismatch"] < 0.01
    state = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    reference = tiny_model().state_dict()
    moved = {name: (state[name] - reference[name]).abs().max().item() for name in state}
    assert all(0 < change < 1e-2 for change in moved.values()), moved  # smaller than a bf16 step, and not lost


@whole
@pytest.mark.parametrize("kind,ranks", [("Llama", 1), pytest.param("GPT2", 2, marks=pytest.mark.long)])
def test_other_architectures_end_to_end(kind, ranks, tmp_path):
    command = inside if ranks == 1 else lambda *flags: torchrun(ranks, *flags)
    small_model(vocabulary=19, kind=kind).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    path = tmp_path / "vstar.jsonl"
    command(*stage1(path, f"--model={tmp_path}/model", "--limit=16", "--max_new_tokens=20"))
    # a random model is never right; say it was, so that there is something to learn
    path.write_text(path.read_text().replace('"rewards": [0.0, 0.0]', '"rewards": [1.0, 0.0]'))
    command(*stage2(path, tmp_path / "run", "--steps=2", "--batch_size=8", "--eval_limit=8"))
    rows = metrics(tmp_path / "run")
    assert rows[1]["log_ratio_abs"] == 0 and rows[2]["log_ratio_abs"] > 0 and rows[1]["mismatch"] < 1e-4
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")

# ---------------------------------------------------------------------------------------------------------------------
# rewards.py: verdicts

RIGHT = [
    # where the answer stands
    (r"\boxed{72}", "72"),
    ("so #### 1,000", "1000"),
    ("####72", "72"),
    ("####  72.", "72"),
    (r"\boxed 5", "5"),
    (r"\boxed 5.", "5"),
    (r"\boxed 5.5", "5.5"),
    (r"\boxed {5}", "5"),  # one token without braces, of braces too
    (r"first \boxed{5}, no: \boxed{6}", "6"),  # the last box counts
    (r"\boxed{5} and \boxed{6", "5"),  # a box that is left open is none
    (r"\boxed{5} #### 6", "6"),  # whichever comes later
    (r"#### 6 so \boxed{5}", "5"),
    (r"<think>\boxed{1}</think> \boxed{2}", "2"),  # after the thinking
    ("#### 7\nbecause", "7"),
    (r"{\boxed{\{1\}}", r"\{1\}"),  # an escaped brace opens nothing
    # numbers
    ("#### $72.00", "72"),
    (r"\boxed{1,234,567}", "1234567"),
    (r"\boxed{-1,234.50}", "-1234.5"),
    (r"\boxed{033}", "33"),
    (r"\boxed{+7}", "7"),
    (r"\boxed{1/2}", ".5"),
    (r"\boxed{3.}", "3"),
    # fractions
    (r"\boxed{\frac{1}{2}}", "0.5"),
    (r"\boxed{\dfrac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed{-\frac{3}{4}}", "-0.75"),
    # signs and units
    (r"\boxed{\$18}", "18"),
    (r"\boxed{50\%}", "50"),
    (r"\boxed{50%}", "50"),
    # words, letters, pairs
    (r"\boxed{\text{Tuesday}}", "Tuesday"),
    (r"\boxed{ yes }", "Yes"),
    (r"\boxed{x^{2}}", "x^{2}"),
    (r"\boxed{\left(1,2\right)}", "(1, 2)"),
]
WRONG = [
    (r"\boxed{(1,2,3]}", "(1,2,3)"),  # brackets count wherever they do more than group
    (r"\boxed{[1,2,3]}", "(1,2,3)"),
    (r"\boxed{x \cdot 2 = 6}", "6"),  # no f(2)
    (r"\boxed{[1,2,3)}", "[1,2,3]"),
    # no answer where one is looked for
    ("72", "72"),
    ("the answer is 72", "72"),  # 'any number in the text' would pay a policy for babbling
    (r"\boxed{}", "0"),
    (r"\boxed{72", "72"),  # never closed
    (r"\boxed{72}</think>", "72"),  # still within the thinking
    ("####", "0"),
    # another answer
    (r"\boxed{73}", "72"),
    (r"\boxed{-72}", "72"),
    (r"\boxed 5.5", "5"),
    (r"\boxed{6} then \boxed{5}", "6"),  # the last box counts
    (r"\boxed{0.333}", r"\frac{1}{3}"),  # too few digits
    (r"\boxed{1/2}", "12"),
    (r"\boxed{\text{Monday}}", "Tuesday"),
    (r"\boxed{5 or 6}", "5"),  # two answers are not one
    # not what it looks like
    (r"\boxed{(1,234)}", "1234"),  # a pair, not a number
    (r"\boxed{1,23}", "123"),  # commas part thousands, so groups of three
    (r"\boxed{1,2345}", "12345"),
    (r"\boxed{\frac{1}{0}}", "0"),  # no number at all
]


def test_reward():
    for response, gold in RIGHT:
        assert rewards.reward(response, gold, True) == 1.0, (response, gold)
        assert rewards.reward(response, gold, False) == 0.0  # cut off
    for response, gold in WRONG:
        assert rewards.reward(response, gold, True) == 0.0, (response, gold)


EQUAL = [  # both ways round
    # fractions and mixed numbers
    (r"\dfrac12", "1/2"),
    (r"\frac12", "0.5"),
    (r"\tfrac{1}{2}", r"\frac 12"),
    (r"\dfrac{ 3 }{ 4 }", "0.75"),
    (r"\tfrac34", "3/4"),
    (r"\frac{-1}{1997}", r"-\frac{1}{1997}"),
    (r"-\frac{1}{2}", r"\frac{-1}{2}"),
    (r"-\frac{1}{2}", r"\frac{1}{-2}"),
    (r"1\frac{1}{2}", r"\frac32"),
    (r"1\frac12", "1.5"),
    (r"-1\frac12", "-1.5"),
    ("3 1/2", "7/2"),
    (r"2\frac{1}{3}", "7/3"),
    ("-1./3", "-1/3"),
    # numbers: signs, zeros, thousands, powers of ten
    ("+5", "5"),
    ("5.0", "5"),
    ("5.", "5"),
    ("033", "33"),
    ("007", "7"),
    ("1,234", "1234"),
    ("1{,}234", "1234"),
    (r"1\,000", "1000"),
    ("1,000,000", "1000000"),
    (r"11,\! 111,\! 111,\! 100", "11111111100"),
    ("8.7e8", r"8.7\times10^8"),
    (r"8.7 \cdot 10^{8}", "870000000"),
    ("1.5e3", "1500"),
    (r"6.02\times 10^{23}", "6.02e23"),
    # decimals: four significant digits are enough, rounded
    ("0.3333", "1/3"),
    ("1.4142", r"\sqrt{2}"),
    ("0.1667", "1/6"),
    ("1.732", r"\sqrt3"),
    (r"2\pi", "6.283"),
    ("e", "2.718"),
    # roots and powers
    (r"\sqrt2", r"\sqrt{2}"),
    (r"\sqrt[3]{x}", "x^{1/3}"),
    (r"2\sqrt{3}", r"\sqrt{12}"),
    (r"\sqrt{8}", r"2\sqrt{2}"),
    (r"\frac{2}{\sqrt2}", r"\sqrt2"),
    (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt3}"),
    ("sqrt(2)/2", r"\frac{1}{\sqrt{2}}"),
    (r"2+\sqrt[3]{4}", r"\sqrt[3]{4}+2"),
    ("e^{2}", "e^2"),
    ("2^{10}", "1024"),
    ("2^{1009}", r"2\cdot2^{1008}"),
    ("4^{3/2}", "8"),
    (r"\sqrt[3]{8}", "2"),
    ("27^{1/3}", "3"),
    ("|-5|", "5"),
    (r"\frac{1+\sqrt{5}}{2}", r"\frac{\sqrt5+1}{2}"),
    # constants and functions
    (r"\pi/2", r"\frac{\pi}{2}"),
    (r"\frac{3}{4}\pi", r"\frac{3\pi}{4}"),
    (r"\frac{\pi}{2}+2\pi k", r"2\pi k+\frac{\pi}{2}"),
    (r"2 \pi r", r"2\pi r"),
    (r"e^{i\pi}", "-1"),
    (r"\ln 4", r"2\ln 2"),
    (r"\log_2 8", "3"),
    (r"\log_{10} 100", "2"),
    (r"\ln e", "1"),
    (r"\sin \frac{\pi}{6}", "1/2"),
    (r"\cos\frac{\pi}{3}", r"\frac12"),
    (r"\tan(\pi/4)", "1"),
    (r"\cos^{-1} \frac{1}{2}", r"\arccos(1/2)"),
    (r"\sin(2x)", r"2\sin x\cos x"),
    (r"\sin^2 x+\cos^2 x", r"1*(\sin^2 x+\cos^2 x)"),
    ("5!", "120"),
    (r"\binom{5}{2}", "10"),
    ("10!/(8!2!)", "45"),
    ("1/2004!", "1/2004!"),  # too large to multiply out: compared as text
    # polynomials and letters
    ("(x+1)^2", "x^2+2x+1"),
    (r"\frac{x^2-1}{x-1}", "x+1"),
    ("(x-1)(x+1)", "x^2-1"),
    ("a^2+2ab+b^2", "(a+b)^2"),
    (r"\frac{1}{x}+\frac{1}{y}", r"\frac{x+y}{xy}"),
    ("n(n+1)/2", r"\frac{n^2+n}{2}"),
    (r"\frac{1}{2}x", "x/2"),
    ("x^{2}y", "yx^2"),
    (r"x^2 \, + 1", "1+x^2"),
    ("a_1+a_2", "a_{2}+a_{1}"),
    ("|x|", "|x|"),
    (r"\lfloor x \rfloor", r"\lfloor x\rfloor"),
    # products and quotients
    (r"5\cdot 3", "15"),
    (r"5\times3", "15"),
    ("5*3", "15"),
    ("6/3", "2"),
    (r"6\div3", "2"),
    # complex numbers
    ("3+2i", "2i+3"),
    ("3i+4", "4+3i"),
    ("1 + 2i, 1 - 2i", r"1 \pm 2i"),
    (r"0,\pm i\sqrt6", r"0, i\sqrt{6}, -i\sqrt{6}"),
    # equations: each side, all of it times a number
    ("2x+y=3", "3=y+2x"),
    ("x+y=5", "5=x+y"),
    ("4x+2y=6", "y+2x=3"),
    (r"\frac{x}{2}+\frac{y}{3}=1", "3x+2y=6"),
    ("y=2x+3", "2x-y+3=0"),
    # 'x = 5' answers with 5
    ("x=5", "5"),
    ("x = 5", "x=5"),
    ("p = 7", "7"),
    ("f(x)=2x+1", "2x+1"),
    ("y = -2x", "-2x"),
    ("P(x)=x^2", "x^2"),
    ("f(x) = 3x+1, g(x)=2", "g(x)=2, f(x)=3x+1"),
    ("a_{n}=2^n", "2^n"),
    ("a_n=2^n", "a_{n} = 2^{n}"),
    (r"\theta=\frac{\pi}{4}", r"\frac{\pi}{4}"),
    ("(x,y)=(1,2)", "(1,2)"),
    ("x_1=1, x_2=2", "x_1=1,x_2=2"),
    ("x=2,y=3", "y=3, x=2"),
    # ± is two values
    (r"\pm 2", "2,-2"),
    (r"x=\pm2", "-2,2"),
    (r"1\pm\sqrt5", r"1+\sqrt5,1-\sqrt5"),
    (r"\frac{-b\pm\sqrt{b^2-4c}}{2}", r"-\frac{b}{2}\pm\frac{\sqrt{b^2-4c}}{2}"),
    # lists and sets have no order
    (r"\{1,2,3\}", r"\{3,2,1\}"),
    ("1,2", "2,1"),
    (r"\{1,2\}", "1,2"),
    (r"\left\{ 1, 2 \right\}", r"\{2,1\}"),
    (r"\{(1,2),(3,4)\}", "(3,4),(1,2)"),
    ("(3,2),(-3,2)", "(-3,2),(3,2)"),
    (r"\{ \}", r"\emptyset"),
    (r"5 \text{ or } 6", "5,6"),
    (r"x=1 \text{ or } x=2", "1,2"),
    (r"13 \text{ and } 7", "7,13"),
    # pairs, vectors, matrices have one
    ("(1, 2)", "(1,2)"),
    ("(1,2,3)", "( 1, 2, 3 )"),
    (r"\left(1,2\right)", "(1,2)"),
    (r"\langle 1,2\rangle", r"\langle 1, 2 \rangle"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    (r"\begin{bmatrix}1&2\\3&4\end{bmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
    (r"\begin{array}{c}1\\2\end{array}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    # intervals and inequalities
    (r"\left[0,1\right]", "[0,1]"),
    ("(2, 3]", "(2,3]"),
    ("x>5", r"(5,\infty)"),
    (r"x \ge 2", r"[2,\infty)"),
    ("2<x", "x>2"),
    (r"-1<x\le 3", "(-1,3]"),
    (r"0\le x<1", "[0,1)"),
    ("2<=x<3", r"2 \leq x < 3"),
    (r"x\in(0,1)", "0<x<1"),
    (r"x \in [1,2]", "[1,2]"),
    (r"(-\infty,2)\cup(3,\infty)", r"(3,\infty)\cup(-\infty,2)"),
    (r"(-\infty, -3] \cup [3, \infty)", r"[3,\infty)\cup(-\infty,-3]"),
    (r"x \le -3 \text{ or } x \ge 3", r"(-\infty,-3]\cup[3,\infty)"),
    (r"\infty", r"\infty"),
    (r"+\infty", r"\infty"),
    (r"-\infty", r"-\infty"),
    # units: one side may leave them out
    (r"5\text{ cm}", "5"),
    ("5 cm", "5"),
    (r"5\text{ cm}", r"5 \mathrm{~cm}"),
    (r"5\,\mathrm{cm}", "5cm"),
    (r"10\sqrt{2}\text{ cm}", r"10\sqrt2"),
    ("8 feet", "8"),
    (r"6\text{ inches}", "6"),
    (r"5\text{ cm}^2", "5"),  # squared, too
    (r"3\text{ m}^2", "3"),
    ("12 square units", "12"),
    (r"10 \text{ hours}", "10 hours"),
    ("10 hr", "10 hours"),
    (r"90^\circ", "90"),
    (r"90^{\circ}", r"90^\circ"),
    (r"18.8^{\circ}", "18.8"),
    (r"45\text{ }^\circ", "45"),
    (r"60 \text{ degrees}", r"60^\circ"),
    (r"\frac{270}7\text{ degrees}", r"\frac{270}{7}"),
    # percent: 50, or a half where the sign stands
    (r"50\%", "50"),
    (r"50\%", r"\frac12"),
    (r"10\%", "0.1"),
    ("5%", r"5\%"),
    (r"12\%", "12%"),
    (r"12 \text{ percent}", "12"),
    # money and dollar signs
    (r"\$18", "18"),
    (r"\$1,000", "1000"),
    ("$18$", "18"),
    (r"\(5\)", "5"),
    (r"\boxed{5}", "5"),
    (r"\boxed{\frac{1}{2}}", "0.5"),
    # words and choices
    (r"\text{Tuesday}", "Tuesday"),
    ("yes", "Yes"),
    (r"\text{Yes}", "yes"),
    ("true", "True"),
    (r"\mathrm{C}", "C"),
    ("(C)", "C"),
    (r"\text{(B)}", "B"),
    (r"\text{(B)}", "(B)"),
    (r"\text{B}", "B"),
    (r"\textbf{(A)}", "A"),
    (r"(\text{A})", "A"),
    ("A.", "A"),
    (r"\text{5}", "5"),
    # notation that is compared as text
    (r"\mathbb{R}", r"\mathbb{R}"),
    (r"\overline{AB}", r"\overline{AB}"),
    ("3:45", "3:45"),
    ("3:2", "3 : 2"),
    (r"\{x \mid x>1\}", r"\{x \mid x > 1\}"),
    (r"\{x|x>2\}", r"\{x | x>2\}"),
    ("1011_2", "1011_{2}"),
    # unicode
    ("−5", "-5"),
    ("３", "3"),
    ("２+３", "5"),
    ("2×3", "6"),
    ("√2", r"\sqrt{2}"),
    ("π", r"\pi"),
    ("½", "0.5"),
    ("2½", "2.5"),
    ("90°", "90"),
    ("x²+1", "x^2+1"),
    # sets of numbers: by a condition, an interval, an inequality, a union
    (r"\{t \mid 0<t<4\}", "(0,4)"),
    (r"\left\{x \in \mathbb{R} \,\middle|\, x\ge 2\right\}", r"[2,\infty)"),
    (r"\{x : x<1 \text{ or } x>2\}", r"(-\infty,1)\cup(2,\infty)"),
    (r"x \neq 2", r"(-\infty,2)\cup(2,\infty)"),
    (r"\mathbb{R} \setminus \{1,2\}", r"x \ne 1, x \ne 2"),
    (r"\mathbb{R} - \{0\}", r"\{x \mid x \neq 0\}"),
    (r"x \in \mathbb{R}", r"(-\infty,\infty)"),
    (r"x<-1 \lor x>1", "x<-1 or x>1"),
    (r"x=0 \text{ or } x\ge1", r"\{0\}\cup[1,\infty)"),
    ("x>1, x<4", "(1,4)"),
    (r"-1<x<1, x\ne0", r"(-1,0)\cup(0,1)"),
    (r"(0,1)\cup[1,2)", "(0,2)"),
    (r"[-1,1]\setminus\{0\}", r"[-1,0)\cup(0,1]"),
    ("2<g(x)<3", "(2,3)"),
    (r"y \in [a,b]", r"a \le y \le b"),
    ("-x<-5", "x>5"),
    (r"-x+2y \ge 3", r"x-2y \le -3"),
    # an approximation, a chain
    (r"\sqrt{5} \approx 2.236", r"\sqrt5"),
    (r"x = \frac53 \approx 1.67", r"\frac53"),
    (r"x = \frac53 \approx 1.67", "1.67"),
    (r"A = \pi r^2 = 9\pi", r"9\pi"),
    (r"\frac{10}{2} = 5", "5"),
    # degrees and radians
    (r"60^\circ", r"\frac{\pi}{3}"),
    (r"x = 30^\circ, 150^\circ", r"\frac{\pi}{6}, \frac{5\pi}{6}"),
    (r"30^\circ 15'", r"30.25^\circ"),
    (r"30^\circ 15' 36''", r"30.26^\circ"), ("30°15′36″", r"30.26^\circ"),
    (r"\sin 30^\circ", r"\frac12"),
    (r"\sin(30^\circ+60^\circ)", "1"),
    (r"(30^\circ, 60^\circ)", "(30,60)"),
    # ratios
    ("4:1", "4"),
    ("2:7", r"\frac27"),
    ("A : B = 2:7", r"\frac{2}{7}"),
    ("a:b:c = 1:2:3", "1:2:3"),
    # names: of functions and their arguments, of what was asked for, of the items of a list
    ("g(t)=t^2+1", "g(x)=x^2+1"),
    (r"\Psi(u,v) = u+2v", "u+2v"),
    (r"r_{\min} = 3", "3"),
    (r"r_{\text{min}} = 3", r"r_{\min} = 3"),
    ("2r_{min}", r"r_{\min}\cdot2"),
    (r"|\vec{AB}| = 5", "5"),
    ("|PQ| = 5", "5"),
    (r"\angle ABC = 60^\circ", "60"),
    (r"P(X=2) = \frac38", r"\frac38"),
    ("f^{-1}(x) = x-1", "f^{-1}(t) = t-1"),
    (r"\text{Area} = 12\pi", r"12\pi"),
    ("Largest: 5, Smallest: 3", "5, 3"),
    ("p = 2, q = 3", "2, 3"),
    ("q = 3, p = 2", "(2, 3)"),
    ("(p,q) = (2,3)", "2, 3"),
    ("(p,q) = (2,3)", "q=3, p=2"),
    ("A(1,2)", "(1,2)"),
    # a letter that stands for any integer, a condition that takes nothing away
    (r"x=\frac{\pi}{2}+2\pi k, k\in\mathbb{Z}", r"\frac{\pi}{2}+2n\pi, n \in Z"),
    (r"\{k\pi \mid k \in \mathbb{Z}\}", r"n\pi, \text{ where } n \text{ is any integer}"),
    (r"k\pi \text{ where } k \text{ is an integer}", r"n\pi \text{ where } n \text{ is any integer}"),
    (r"k\pi \text{ for any integer } k", r"n\pi \text{ for all integers } n"),
    (r"3^n \text{ (where } n \text{ is an integer)}", "3^n"),
    (r"x=k\pi, k\in\mathbf{Z}", r"k\pi"),
    (r"f(x) = 2x \text{ for all } x", "2x"),
    (r"Ce^x \text{ where } C \text{ is a constant}", "Ce^x"),
    (r"2x+1, x \in \mathbb{R}", "2x+1"),
    (r"k\pi, \forall k \in \mathbb{Z}", r"n\pi"),
    (r"\text{for all } x", "for all x"),
    # products and names
    (r"\frac12mgh", r"\frac{m g h}{2}"),
    ("PV = nRT", "nRT = PV"),
    (r"f'(x)", r"f^{\prime}(x)"),
    (r"\frac{\hbar}{2}\sqrt{\frac{\ell}{g}}", r"0.5\hbar\sqrt{\ell/g}"),
    (r"\overline{AB}+2\vec{c}", r"\vec{c}\cdot2+\overline{AB}"),
    # factorials, steps and functions of letters
    (r"\binom{n}{2}", r"\frac{n(n-1)}{2}"),
    (r"{n \choose 2}", r"\binom{n}{2}"),
    ("(n+1)!", "(n+1)n!"),
    (r"\left\lfloor \frac{n}{2} \right\rfloor+1", r"1+\lfloor n/2 \rfloor"),
    (r"\lceil 3.2 \rceil", "4"),
    (r"\sinh^{-1} x", r"\operatorname{arcsinh} x"),
    (r"\ln 10^7", r"7\ln 10"),
    (r"\cos(\pi/2)", "0"),
    # each ± goes its own way, but not where there is a ∓
    (r"(\pm1, \pm2)", "(1,2),(1,-2),(-1,2),(-1,-2)"),
    (r"(\pm1, \mp2)", "(1,-2),(-1,2)"),
    (r"\pm1\pm\sqrt2", r"1+\sqrt2, 1-\sqrt2, -1+\sqrt2, -1-\sqrt2"),
    # other ways to write a number
    (r"12\%", "12 percent"),
    ("12 pct", "12%"),
    ("10 000", "10000"),
    ("3{,}5", "3.5"),
    ("0,05", "0.05"),
    (r"7^{\mathrm{th}}", "7th"),
    ("3rd", "3"),
    ("①③", "1, 3"),
    ("①, ③", "1, 3"),
    (r"\textcircled{2}", "②"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", "(1,2)"),
    (r"\langle 1,2\rangle", "(1,2)"),
    ("5\\", "5"),
    (r"\frac{1}{2}}", "0.5"),
    # words
    ("3 apples and 5 pears", "3, 5"),
    (r"3 \text{ apples and } 5 \text{ pears}", "3 apples, 5 pears"),
    ("15 balloons", "15"),
    ("infinitely many", r"\infty"),
    (r"\text{The ratio is } 3:2", "the ratio is 3:2"),
    ("b", "(B)"),
    ("B)", "B"),
    (r"\text{c}", r"\textbf{(C)}"),
    ("b", "B"),
    (r"5\text{ cm}^2", "5 square cm."),
    (r"5\text{ cm}^3", "5 cubic centimeters"),
    ("£5", "5 pounds"),
    (r"25^\circ\text{C}", "25"),
    # a unit behind each item of a list
    ("5 cm, 6 cm", "5, 6"),
    (r"5 \text{ cm}, 6 \text{ cm}", "6 cm and 5 cm"),
    (r"5\%, 6\%", "0.05, 0.06"),
    # the name behind the sign, or a limit before it
    ("5 = x", "5"),
    (r"\frac12 = y", "y = 0.5"),
    ("2 = x, 3 = y", "(2,3)"),
    (r"\lim_{x \to 0} \frac{\sin x}{x} = 1", "1"),
    # all numbers but some
    (r"x \ne -2, 2", r"x \ne \pm 2"),
    (r"x \ne -2, 2", r"(-\infty,-2)\cup(-2,2)\cup(2,\infty)"),
    # raised and lowered digits, and the sign of the root
    ("2⁴", "16"),
    ("2¹⁰", "1024"),
    ("10⁻³", "0.001"),
    ("x⁴ + x²", "x^4 + x^2"),
    ("x₁₂", "x_{12}"),
    ("√12", r"2\sqrt3"),
    ("3√2", r"3\sqrt{2}"),
    # 'or' between inequalities joins sets, between equations it makes a list
    ("x < 1 or x > 3", r"(-\infty,1)\cup(3,\infty)"),
    (r"x > 2 \text{ or } x > 5", r"(2,\infty)"),
    (r"x \le -2 \lor x = 5", r"(-\infty,-2]\cup\{5\}"),
    ("x = 1 or x = 2", "1, 2"),
    (r"x > 1 \text{ and } x < 4", "(1,4)"),
    # ordinals, counts
    ("1st", "1"),
    (r"22^{\text{nd}}", "22"),
    ("3rd", "3"),
    ("11th", "11"),
    ("20 paths", "20"),
    # rules that stand nowhere else
    (r"\pm1, \pm2", "1, -1, 2, -2"),
    ("-0.3333", "-1/3"),
    (r"\sqrt[3]{-8}", "-2"),
    (r"\sqrt0", "0"),
    ("f(2) = 5", "5"),
    (r"\sin(x)y", r"y\sin x"),
    (r"\cot x", r"\frac{\cos x}{\sin x}"),
    (r"5 > x \ge 2", "[2,5)"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix}1&\frac42\\3&4\end{bmatrix}"),
]
DIFFERENT = [  # both ways round
    # signs and sizes
    ("-5", "5"),
    ("-3", "3"),
    ("2", r"\pm2"),
    ("10", "100"),
    ("12", "1"),
    ("1 2", "12"),
    ("5", "5.1"),
    (r"\frac{1}{2}", r"\frac{2}{1}"),
    (r"-1\frac12", "-0.5"),
    (r"\frac{1}{0}", "0"),
    ("nan", "0"),
    ("inf", "0"),
    # thousands and decimals
    ("2,000", "2"),
    ("1,234", "1.234"),
    ("(1,234)", "1234"),  # a pair
    ("1,23", "123"),  # a list
    ("1e5", "1e6"),
    # decimals that are rounded too far
    ("0.33", "1/3"),
    ("1.41", r"\sqrt2"),
    ("1.73", r"\sqrt3"),
    ("3.14", r"\pi"),
    ("5.44", "5.4"),
    ("0.5", "0.52"),
    ("0.999", "1"),
    # powers, roots, functions
    ("x^2", "x^3"),
    ("2^x", "x^2"),
    (r"\sqrt{3}", r"\sqrt{2}"),
    (r"\sqrt{x}", "x"),
    ("6!", "5!"),
    ("5!", "5"),
    ("1/2004!", "1/2034!"),
    ("9**9**9**9", "5"),  # far too large
    (r"\log_2 8", r"\log_2 4"),
    ("e^x", "e^{2x}"),
    ("sin x", "cos x"),
    (r"\sin x", r"\sin 2x"),
    ("log x", "ln y"),
    (r"\lfloor x \rfloor", r"\lceil x\rceil"),
    ("1011_2", "1011"),  # other bases
    ("1011_2", "1011_3"),
    # letters and products
    ("x+1", "x-1"),
    ("x+1", "y+1"),
    ("n", "m"),
    ("ab", "a+b"),
    ("AB", "AC"),
    ("AB", "BC"),
    ("5", "5x"),
    ("i", "-i"),
    ("1+i", "1-i"),
    # equations
    ("x=5", "x=6"),
    ("2x=3", "2x=4"),
    ("y=2x+3", "y=2x-3"),
    ("x=5", "y=5*x"),
    ("f(x)=x", "g(y)=y+1"),
    (r"x \neq 5", "5"),
    (r"\neq 5", "5"),
    (r"x\ne 3", "x=3"),
    # intervals and inequalities
    ("x>5", "x<5"),
    ("x>5", r"[5,\infty)"),
    ("x<5", r"(5,\infty)"),
    ("x>5", r"x\ge5"),
    ("[0,1]", "[0,1)"),
    (r"(-\infty,2)\cup(3,\infty)", r"(-\infty,2]\cup(3,\infty)"),
    (r"\infty", r"-\infty"),
    # lists, sets, pairs
    ("1", "1,2"),
    ("1,2,3", "1,2"),
    ("1,1,2", "1,2,2"),
    (r"\{1,2\}", r"\{1,2,3\}"),
    (r"\{1,2\}", "(1,2)"),
    ("(1,2)", "(2,1)"),
    ("(1,2)", "[1,2]"),
    ("(1,2]", "(1,2)"),
    ("2,3", "(2,3)"),
    ("(1,2),(3,4)", "(1,2,3,4)"),
    ("(1;2)", "(2;1)"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrx}"),  # cannot be read, so compared as text
    # more than one answer is not one
    (r"5 \text{ or } 6", "5"),
    (r"5 \text{ or } 6", "6"),
    (r"5 \text{ or } 7", "7"),
    ("5, 6, or 7", "5"),
    ("5 apples and 3", "5"),
    ("5 cats and 6 dogs", "5"),
    # units
    ("5 cm", "5 m"),
    (r"5\text{ cm}", r"5\text{ m}"),
    ("5 km", "5 cm"),
    (r"60^\circ", "60 cm"),
    (r"\$5", "5 cm"),
    ("5 cents", "5 dollars"),
    (r"5^\circ C", "5 dollars"),
    ("50", "0.5"),  # no sign of percent
    (r"100\%", "100.5"),
    # words, choices, times
    ("Tuesday", "Monday"),
    ("east", "seat"),
    ("yes", "no"),
    ("A", "B"),
    ("(C)", "D"),
    ("the answer is 5", "5"),
    ("not 5", "5"),
    ("3:45", "3:46"),
    ("3:2", "2:3"),
    # nothing
    ("", "0"),
    ("", "5"),
    (r"\boxed{}", "5"),
    ("0", r"\emptyset"),
    ("{5}", "{6}"),
    # the brackets of longer tuples
    ("(1,2,3]", "(1,2,3)"),
    ("[1,2,3]", "(1,2,3)"),
    # sets of numbers: the other end, bracket, letter, a point too few
    (r"\{t \mid 0<t\le4\}", "(0,4)"),
    (r"\{t \mid 0<t<4\}", "(0,5)"),
    (r"\{x \in \mathbb{Z} \mid 0<x<4\}", "(0,4)"),
    (r"\{x \mid x>2\}", "2"),
    (r"x \neq 2", r"(-\infty,2]\cup(2,\infty)"),
    (r"x \neq 2", r"\mathbb{R}"),
    (r"x=0 \text{ or } x\ge1", r"[0,\infty)"),
    (r"x=0 \text{ or } x\ge1", r"\{0\}\cup(1,\infty)"),
    ("x>1, x<4", r"\mathbb{R}"),
    ("x>1, y<4", "(1,4)"),
    (r"-1<x<1, x\ne0", "(-1,1)"),
    (r"(0,1)\cup(1,2)", "(0,2)"),
    ("(1,3),(2,4)", "(1,4),(2,3)"),
    (r"(1,2)\cup[3,\infty)", r"(1,2)\cup[3,\infty]"),
    ("2<g(x)<3", "[2,3)"),
    ("2<x^2<3", "(2,3)"),
    ("f(2)<f(1)<f(4)", "f(2)<f(3)<f(4)"),
    (r"y \in [a,b]", r"a < y \le b"),
    (r"y \in [a,b]", r"b \le y \le a"),
    (r"7+x \in [-2,7]", r"x \in [-2,7]"),
    ("3<x<2", "(2,1)"),
    (r"(\{(1,3),(2,4)\}, 5)", r"(\{(1,4),(2,3)\}, 5)"),
    ("-x<-5", "x<5"),
    ("-x<-5", "x>-5"),
    (r"-x+2y \ge 3", r"x-2y \ge -3"),
    (r"x \le y", r"y \le x"),
    (r"x \le q", r"x \le y"),
    # an approximation that is none, an equation that is no answer
    (r"\sqrt{5} \approx 2.236", "2.24"),
    (r"\sqrt{5} \approx 2.5", "2.5"),
    (r"5 \approx 6", "5"),
    ("x = 5 = 6", "5"),
    ("2+2 = 5", "5"),
    ("2x = 6", "6"),
    ("x^2 = 4", "4"),
    # degrees
    (r"60^\circ", r"\frac{\pi}{6}"),
    ("60", r"\frac{\pi}{3}"),
    ("60 degrees", "60 radians"),
    (r"30^\circ 15'", r"30.15^\circ"),
    (r"30^\circ 15' 36''", r"30.85^\circ"),  # seconds, no minutes
    (r"\sin 30^\circ", r"\sin 30"),
    (r"\sin(x+30^\circ)", r"\sin(x+30)"),
    # ratios upside down, of other things
    ("4:1", "1:4"),
    ("2:7", r"\frac72"),
    ("A : B = 2:7", "B : A = 2:7"),
    ("A : B = 2:7", "7:2"),
    ("1:2:3", r"\frac16"),
    ("a:b:c = 1:2:3", "a:c:b = 1:2:3"),
    # other names, swapped names
    ("x=5", "y=5"),
    ("g(t)=t^2+1", "h(t)=t^2+1"),
    ("g(t)=t^2+1", "g(x)=t^2+1"),
    ("P(A)=1/2", "P(B)=1/2"),
    ("f'(x)=2x", "f(x)=2x"),
    (r"r_{\min} = 3", r"r_{\max} = 3"),
    ("|PQ| = 5", "|PR| = 5"),
    ("Largest: 5, Smallest: 3", "3, 5"),
    ("Largest: 5, Smallest: 3", "Largest: 3, Smallest: 5"),
    ("p = 2, q = 3", "3, 2"),
    ("q = 3, p = 2", "(3, 2)"),
    ("(p,q) = (2,3)", "p=3, q=2"),
    ("(p,q) = (2,3)", "(q,p) = (2,3)"),
    ("x=1, y=2", r"x=1 \text{ or } x=2"),
    # another integer, a condition that takes something away
    (r"2\pi k, k\in\mathbb{Z}", r"\pi n, n \in\mathbb{Z}"),
    (r"k\pi, k \in \mathbb{Z}", r"k\pi, k \in \mathbb{N}"),
    (r"2\pi k", r"2\pi n"),
    (r"x \text{ where } x>5", "x"),
    (r"x^2+C, C \in \mathbb{R}", "y^2+C"),
    # other products and functions
    ("mgh", "mgk"),
    ("2abc", "2abC"),
    (r"\hbar", "h"),
    (r"\frac112", r"\frac{1}{12}"),
    ("0c", "0"),
    (r"\binom{n}{2}", r"\frac{n(n+1)}{2}"),
    (r"\binom{n}{k}", r"\binom{k}{n}"),
    ("n!", "(n+1)!"),
    (r"\lfloor \frac{n}{2} \rfloor", r"\lceil n/2 \rceil"),
    (r"\lfloor x \rfloor", r"\lfloor x+0.01 \rfloor"),
    (r"\tan^{-1} x", r"\frac{1}{\tan x}"),
    (r"\cos(\pi/2)", "0.0001"),
    (r"(\pm1, \pm2)", "(1,2),(-1,-2)"),
    (r"(\pm1, \mp1)", "(1,1),(-1,-1)"),
    # other numbers
    (r"12\%", "13 percent"),
    (r"50\%", r"0.5\%"),
    ("10 00", "1000"),
    ("3,14", "3.14"),
    ("(2,04)", "2.04"),
    ("61,,328", "61,328"),
    ("3rd", "3d"),
    ("①③", "13"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", "(2,1)"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}"),
    # other things that are counted
    ("3 apples and 5 pears", "5, 3"),
    ("3 apples and 5 pears", "5 apples and 3 pears"),
    ("15 balloons", "15 candies"),
    ("5 pears", "5 apples"),
    ("5 dozens", "5"),
    ("5 less", "5"),
    ("5 million", "5"),
    ("infinitely many", "many"),
    ("b", "(C)"),
    ("n", "N"),
    (r"5\text{ cm}^2", "5 cubic cm"),
    (r"25^\circ\text{C}", r"25^\circ\text{F}"),
    ("5 m, 6 cm", "5, 6"),
    ("5 cm, 6 cm", "5 cm, 6 m"),
    (r"5\%, 6", r"5, 6\%"),
    ("5 = x", "6"),
    ("5 = x", "x = 6"),
    ("3 = 4", "4"),
    ("x + y = z", "x + y"),
    (r"\lim_{x \to 0} f(x) = 2", "1"),
    (r"x \ne 2, 3", "2, 3"),
    (r"x \ne 2, 3", r"x \ne 2"),
    (r"x \ne 2, 3", r"x \ne 2, x = 3"),
    # raised and lowered digits, and the sign of the root
    ("2⁴", "24"),
    ("x⁴", "4x"),
    ("2¹⁰", "210"),
    ("x₁", "x"),
    ("√12", "2"),
    ("2^3^2", "64"),  # nobody can say which is meant
    # 'or' is not 'and'
    ("x > 1 or x < 4", "(1,4)"),
    ("x > 2 or x > 5", r"(5,\infty)"),
    # the letter matters, and so does it that it is an integer, or odd
    ("x > 5", "y > 5"),
    ("x < 1, x > 3", "y < 1, y > 3"),
    ("[a,b]", r"a \le y \le a+1"),
    (r"0 < x < 4, x \in \mathbb{Z}", "(0,4)"),
    (r"n^2 \text{ for all odd } n", "n^2"),
    ("x = x", "x = 5"),
    # numbers near 0
    (r"1.38 \times 10^{-23} T", r"6.63 \times 10^{-34} T"),
    # ordinals, counts, units, words
    ("4st", "4"),
    ("12rd", "12"),
    ("3 fourths", "3"),
    ("2 thirteenths", "2"),
    ("5 gross", "5"),
    (r"5 \text{ ms}", r"5 \text{ m}"),
    ("5 east", "5 seat"),
    (r"\text{(n)}", "m"),
    ("0.(3)", "0"),
    ("0.(3)", "0.3"),
    # rules that stand nowhere else
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&5\\3&4\end{pmatrix}"),
    (r"\begin{pmatrix}1&2\end{pmatrix}", "(1,2)"),
    ("1011_2", "[1011,2]"),
    ("x'y", "xy'"),
    (r"e^{\pi\sqrt{163}}", "262537412640768744"),
    ("0.3333", "0.33334"),
    ("0^0", "1"),
    (r"\sin(10^8)", r"\sin(10^8+1)"),
]


def test_equal_and_different_answers():
    for one, other in EQUAL:
        for a, b in ((one, other), (other, one)):
            assert rewards.is_correct(a, b), (a, b, rewards.read(a), rewards.read(b))
    for one, other in DIFFERENT:
        for a, b in ((one, other), (other, one)):
            assert not rewards.is_correct(a, b), (a, b, rewards.read(a), rewards.read(b))


def test_several_boxes():
    assert rewards.reward(r"\boxed{1} and \boxed{2}", "2, 1", True) == 1.0
    assert rewards.reward(r"\boxed{1} and \boxed{2}", "2", True) == 1.0  # the last
    assert rewards.reward(r"\boxed{1} and \boxed{2}", "1", True) == 0.0
    assert rewards.reward(r"\boxed{2}", "1, 2", True) == 0.0


HOSTILE = [
    # numbers without end
    "9**9**9**9",
    "10^{10^{10}}",
    "1" * 1_000_000,
    "1e999999",
    "((((5!)!)!)!)!",
    "5!!!!!!",
    "201!",
    "200!^200!",
    "2^{2^{2^{2^{2^2}}}}",
    "e^{e^{e^{e^{e}}}}",
    "exp(exp(100))",
    r"\sin(10^{300})",
    r"\binom{200}{100}^{100}",
    "9" * 60 + "^{1000}",
    # no numbers
    r"\frac{1}{0}",
    "nan",
    "inf",
    "0^0",
    "0^{-1}",
    r"\log_{1}2",
    r"\log 0",
    "1/(x-x)",
    r"\tan(\pi/2)",
    r"\sqrt[0]{5}",
    "i^i",
    "(-8)^{1/3}",
    # deep, long, many
    "{" * 100_000,
    "-" * 300 + "1",
    "(1," * 100,
    "1," * 200,
    r"\sqrt{" * 50 + "2" + "}" * 50,
    r"\sin(" * 30 + "1" + ")" * 30,
    r"\begin{pmatrix}" + "1&" * 100,
    r"\pm" * 20 + "1",
    r"\pm1" * 64,
    r"\cup" * 60,
    "<" * 99,
    "*".join(f"(x+{i})" for i in range(60)),
    "(x+1)^{1000}",
    "(((((x^x)^x)^x)^x)^x)^x",
    "x" * 399,
    # not mathematics
    "__import__('os').system('x')",
    "\x00",
    "\ud800",
    "\x01cm\x02",
    r"\text{",
    "a=b=c",
    "=",
]


def test_hostile_text_costs_little(work):
    """Bounded work, not bounded seconds: the nodes that are evaluated for any pair of a hundred nasty texts."""
    for text in HOSTILE:
        for gold in ("5", "x+1", "(1,2)", text):
            work[0] = 0
            verdict = rewards.is_correct(text, gold)
            assert work[0] < 5000 and (not verdict or text == gold), (text[:50], gold[:50])
            rewards.is_correct(gold, text)
            assert rewards.reward("\\boxed{" + text + "}", gold, True) in (0.0, 1.0)
    assert not rewards.is_correct("1/2004!", "1/2034!")


@needs_real
def test_fuzz_with_mutated_real_answers(work):
    """Ten thousand golds with a few characters changed: no exception, bounded work."""
    rng = random.Random(0)
    golds = [p["answer"] for name in ("math_test", "minerva_math", "olympiadbench_oe_to_maths_en")
             for p in rewards.load_problems(str(REAL / f"{name}.jsonl"))]
    pieces = [*"0123456789xyen+-*/^_!|()[]{}=<>,.;$%",
              "\\frac", "\\sqrt", "\\pm ", "\\sin ", "\\log_", "\\cup ", "\\text{", "\x00", "é"]
    for _ in range(10_000):
        gold = text = rng.choice(golds)
        for _ in range(rng.randint(1, 5)):
            place = rng.randint(0, len(text))
            text = text[:place] + rng.choice(pieces) + text[place + rng.randint(0, 2) :]
        work[0] = 0
        assert rewards.is_correct(text, gold) in (True, False)
        assert work[0] < 5000, text


@whole
@needs_real
@pytest.mark.parametrize("name", sorted(path.stem for path in REAL.glob("*.jsonl")))
def test_real_golds_and_their_respellings(name):
    for gold in {p["answer"] for p in rewards.load_problems(str(REAL / f"{name}.jsonl"))}:
        for respelled in (gold, f" {gold} ", gold + ".", f"${gold.strip('$')}$", gold.replace("\\frac", "\\dfrac"),
                          gold.replace("(", "\\left(").replace(")", "\\right)"),
                          gold.replace("\\left", "").replace("\\right", "")):
            assert rewards.is_correct(respelled, gold) and rewards.is_correct(gold, respelled), (respelled, gold)


@whole
def test_reward_survives_any_text():
    rng = random.Random(0)
    pieces = ["\\boxed{", "{", "}", "####", "\\", "$", "9", ",", "\\frac", "\x00", "\ud800", "é", "\n", "%", "(",
              "</think>"]
    texts = ["".join(rng.choices(pieces, k=rng.randint(0, 40))) for _ in range(5000)]
    texts += ["\\boxed{" * 100_000, "{" * 1_000_000, "\\boxed{" + "9" * 1_000_000 + "}", "\\boxed{9**9**9**9}"]
    for text in texts:
        assert rewards.reward(text, "5", True) in (0.0, 1.0)


@needs_real
@pytest.mark.parametrize("name", ["gsm8k_test", "math500", "aime2024", "amc23", "minerva_math",
                                  "olympiadbench_oe_to_maths_en"])
def test_real_golds_equal_themselves(name):
    problems = rewards.load_problems(str(REAL / f"{name}.jsonl"))
    assert len(problems) >= 30
    for problem in problems:
        assert rewards.reward(f"so \\boxed{{{problem['answer']}}}.", problem["answer"], True) == 1.0, problem
        assert rewards.reward(f"so \\boxed{{7+{problem['answer']}}}.", problem["answer"], True) == 0.0, problem


def test_rewards_command_line():
    done = run("rewards.py", r"so \boxed{\frac12}", "0.5")
    assert "reward   1.0" in done.stdout and r"\frac12" in done.stdout
    assert "in a box it would earn 1.0" in run("rewards.py", "x > 3", r"(3,\infty)").stdout


# ---------------------------------------------------------------------------------------------------------------------
# rewards.py: problems and prompts

def test_load_problems(tmp_path):
    rows = [{"id": "a", "question": "1+1", "answer": "2"},
            {"id": 7, "question": "1+2", "answer": 3},
            {"id": "c", "question": "GSM", "answer": "1+1=<<1+1=2>>2\n#### 1,002"},
            {"id": "d", "question": "MATH", "answer": "we see \\boxed{x} and so $\\boxed{\\frac{1}{2}}$."}]
    expected = [{"id": "a", "question": "1+1", "answer": "2"},
                {"id": "7", "question": "1+2", "answer": "3"},
                {"id": "c", "question": "GSM", "answer": "1,002"},
                {"id": "d", "question": "MATH", "answer": "\\frac{1}{2}"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "p.json").write_text(json.dumps(rows, indent=1))
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{**row, "id": str(row["id"]), "answer": str(row["answer"])}
                                                           for row in rows]), tmp_path / "p.parquet")
    for ending in ("jsonl", "json", "parquet"):
        assert rewards.load_problems(str(tmp_path / f"p.{ending}")) == expected
    (tmp_path / "q.jsonl").write_text('{"problem": "1+1", "solution": ["2", "-2"]}\n')
    assert rewards.load_problems(str(tmp_path / "q.jsonl"), question_field="problem", answer_field="solution") == [
        {"id": "q/1", "question": "1+1", "answer": "2, -2", "problem": "1+1", "solution": ["2", "-2"]}]


def test_both_stages_rewards_see_the_same_fields(tmp_path):
    """Those that a file of JSON can hold, but for the names that Stage 1 writes itself."""
    import datetime

    import pyarrow.parquet

    row = dict(question="a", answer="1", day=datetime.date(2026, 1, 2), nums=[1, 2], rewards=[9], responses="mine")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "p.parquet")
    assert rewards.load_problems(str(tmp_path / "p.parquet")) == [
        dict(id="p/1", question="a", answer="1", day="2026-01-02", nums=[1, 2])]


def test_a_changed_field_is_another_problem():
    problem = dict(id="1", prompt="a", answer="1", target=1, tokens=[1])
    first, same, target, dated = problem, dict(problem), dict(problem, target=2), dict(problem, prompt="on Monday: a")
    for chat in (False, True):  # a chat template may tell the date
        prints = [vstar.hash_of([one], chat) for one in (first, same, target, dated)]
        assert prints[0] == prints[1] != prints[2] and (prints[0] == prints[3]) == chat


def test_an_edited_reward_is_another_reward(tmp_path):
    prints = [vstar.fingerprint("tiny/model", reward=own_reward(tmp_path, line)) for line in ("return 1", "return 0")]
    assert prints[0] != prints[1] and vstar.fingerprint("tiny/model")["reward's file"] is None


def test_hub_problems(monkeypatch):
    import datasets

    asked = []

    def load_dataset(hub_id, config, split):
        asked.append((hub_id, config, split))
        return datasets.Dataset.from_list([{"question": "1+1", "problem": "1+1", "answer": "#### 2",
                                            "solution": "\\boxed{2}", "final_answer": ["2"]}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in [name for name in rewards.DATASETS if rewards.template_of(name) is not rewards.LETTER] + ["some/where"]:
        (problem,) = rewards.load_problems(name, "test")
        assert problem["question"] == "1+1" and problem["answer"] == "2" and problem["id"].startswith(name)
    assert asked[0] == ("openai/gsm8k", "main", "test") and asked[1][2] == "test"
    assert asked[3] == ("HuggingFaceH4/aime_2024", None, "train")  # it has no other split
    assert asked[-1] == ("some/where", None, "test")


@pytest.mark.parametrize("content,words", [
    (None, ["No such file"]),
    ("", ["no problems"]),
    ('{"question": "1+1"}\n', ["line 1", "'answer'"]),
    ('{"question": "a", "answer": "1"}\n{"question": " ", "answer": "2"}\n', ["line 2", "'question'"]),
    ('{"id": 1, "question": "a", "answer": 1}\n{"id": "1", "question": "b", "answer": 2}\n',
     ["line 2", "'1'", "before"]),
    ('{"question": "a", "answer": "1"}\n{"question"\n', ["line 2", "JSON"]),
    ("[1, 2]\n", ["line 1", "object"]),
    ("\udcff", ["UTF-8"]),
])
def test_bad_problem_files(tmp_path, capsys, content, words):
    path = tmp_path / "p.jsonl"
    if content is not None:
        path.write_bytes(content.encode("utf-8", "surrogateescape"))
    ends_in_one_line(capsys, lambda: rewards.load_problems(str(path)), "p.jsonl", *words)


def test_a_reward_of_ones_own_needs_no_answer(tmp_path, capsys):
    path = tmp_path / "p.jsonl"
    path.write_text('{"question": "a"}\n{"question": "b", "answer": null}\n{"question": "c", "answer": 0}\n')
    found = rewards.load_problems(str(path), own="mine.py:judge")
    assert [problem["answer"] for problem in found] == ["", "", "0"]
    named = lambda: rewards.load_problems(str(path), "", "question", "gold", "mine.py:judge")
    ends_in_one_line(capsys, named, "no 'gold'")


def test_bad_data_names(tmp_path, capsys, monkeypatch):
    ends_in_one_line(capsys, lambda: rewards.load_problems("gsm9k"), "gsm9k", "unknown", "gsm8k")
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    Path("mine/a.csv").write_text("")  # a file, and no hub id
    ends_in_one_line(capsys, lambda: rewards.load_problems("mine/a.csv"), "mine/a.csv", ".jsonl, .json or .parquet")
    (tmp_path / "p.parquet").write_text("no")
    ends_in_one_line(capsys, lambda: rewards.load_problems(str(tmp_path / "p.parquet")), "p.parquet")
    import datasets

    def no_network(*_, **__):
        raise ConnectionError("Couldn't reach\nthe Hub")

    monkeypatch.setattr(datasets, "load_dataset", no_network)
    ends_in_one_line(capsys, lambda: rewards.load_problems("gsm8k"), "openai/gsm8k", "Couldn't reach the Hub")


def test_prompts(capsys):
    tokenizer = transformers.AutoTokenizer.from_pretrained(HERE / "tiny/model")
    what = dict(id="1", question="What?", level=3)
    ask = lambda name: rewards.make_prompt(tokenizer, what, rewards.template_of(name), False)
    assert ask("gsm8k") == 'What? Let\'s think step by step and output the final answer after "####".'
    assert ask("math500") == ask("my/own.jsonl") == (
        "What? Let's think step by step and output the final answer within \\boxed{}.")
    text = "482+795=2+5=7;\\boxed{1277}"
    assert tokenizer.decode(rewards.encode(tokenizer, text, False)) == text
    assert len(rewards.encode(tokenizer, "\\boxed{1277}", False)) == 6
    tokenizer.chat_template = ("{% for m in messages %}<eos>{{ m.content }}{% endfor %}"
                               "{{ '=' if add_generation_prompt }}")
    chat = rewards.make_prompt(tokenizer, dict(question="1"), "{question}+2", True)
    assert chat == "<eos>1+2="
    tokenizer.chat_template = "{{ 'think' if enable_thinking else 'answer' }}"
    assert rewards.make_prompt(tokenizer, what, "{question}", True, dict(enable_thinking=False)) == "answer"
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    for more in (None, dict(tokenize=True)):
        ends_in_one_line(capsys, lambda more=more: rewards.make_prompt(tokenizer, what, "{level}", True, more),
                         "--chat_args " + json.dumps(more))
    alone = lambda: rewards.make_prompt(tokenizer, what, "{level}", False, dict(a=1))
    ends_in_one_line(capsys, alone, "--chat asks in")


def test_a_template_takes_any_field_of_a_problem(capsys):
    row = dict(id="file/3", question="{level}", level=3, answer="7", hint=None)
    ask = lambda template: rewards.make_prompt(None, row, template, False)
    rest = r" {} \boxed{} {0} \frac{1}{2} {a.b}"
    assert ask("{level}: {question}" + rest) == "3: {level}" + rest
    ends_in_one_line(capsys, lambda: ask("{nums}"), "file/3", "'nums'")
    ends_in_one_line(capsys, lambda: ask("{hint}{question}"), "file/3", "'hint'")  # the hub fills what is not there
    ends_in_one_line(capsys, lambda: ask(rest), "no field in braces")


def test_multiple_choice(monkeypatch):
    import datasets

    rows = dict(hellaswag=dict(ctx="He runs", endings=["and", "or", "but", "so"], label="2"),
                arc_challenge=dict(question="He runs", choices=dict(text=["and", "or", "but"], label=["1", "2", "3"]),
                                   answerKey="3"),
                commonsense_qa=dict(question="He runs", choices=dict(label=["A", "B", "C"], text=["and", "or", "but"]),
                                    answerKey="C"))
    asked = []
    suffix = " Let's think step by step and output the letter of the right choice within \\boxed{}."
    for name, row in rows.items():
        monkeypatch.setattr(datasets, "load_dataset", lambda *which, split, row=row: asked.append((*which, split))
                            or datasets.Dataset.from_list([row]))
        (problem,) = rewards.load_problems(name, "test")
        prompt = rewards.make_prompt(None, problem, rewards.template_of(name), False)
        assert prompt == problem["question"] + suffix
        assert problem["question"].startswith("He runs\nA. and\nB. or\nC. but\n") and problem["answer"] == "C"
        assert rewards.reward(r"so \boxed{C}", problem["answer"], True) == 1
        assert rewards.reward(r"so \boxed{B}", problem["answer"], True) == 0
    # two of them do not tell the answers of their test split
    assert asked == [("Rowan/hellaswag", None, "validation"), ("allenai/ai2_arc", "ARC-Challenge", "test"),
                     ("tau/commonsense_qa", None, "validation")]


def own_reward(tmp_path, body):
    (tmp_path / "mine.py").write_text(f"def judge(response, row, finished):\n    {body}\n")
    rewards.load_reward.cache_clear()  # a process runs a file once
    return f"{tmp_path}/mine.py:judge"


def judged(named, rows, responses=("a", "b")):
    tokenizer = SimpleNamespace(decode=lambda tokens, skip_special_tokens: tokens)
    return vstar.grade(SimpleNamespace(reward=named), tokenizer,
                       [(row, Completion(text, True, [])) for row, text in zip(rows, responses)])


def test_ones_own_reward(tmp_path, capsys):
    rows = [dict(id="1", answer="", worth=2.5), dict(id="2", answer="", worth=True)]
    slow = own_reward(tmp_path, "import time; time.sleep(row['id'] == '1'); return row['worth'] + finished")
    assert judged(slow, rows) == [("a", 3.5), ("b", 2.0)]  # in order
    for body, words in {"return None": ["TypeError"], "return float('nan')": ["nan"], "return '1'": ["TypeError"],
                        "raise SystemExit(0)": ["line 2", "SystemExit"],
                        "raise ValueError('\\x1b' + response)": ["line 2", "ValueError: �a", "problem 1, response 'a'"],
                        "return row['nums']": ["line 2", "KeyError"],
                        "return 1 if row['id'] < '2' else 1 / 0": ["line 2", "problem 2", "ZeroDivisionError"]}.items():
        named = own_reward(tmp_path, body)
        ends_in_one_line(capsys, lambda named=named: judged(named, rows), "mine.py:judge", *words, "response")
    for named, words in {"none.py:judge": "no such file", f"{tmp_path}/mine.py:other": "no function 'other'",
                         "judge": "no such file", f"{tmp_path}/mine.py:__name__": "no function '__name__'"}.items():
        ends_in_one_line(capsys, lambda named=named: rewards.load_reward(named), words)
    for text, words in {"def judge(:\n": "SyntaxError", "import nothing_like_it\n": "ModuleNotFoundError",
                        "raise SystemExit(0)\n": "SystemExit"}.items():
        (tmp_path / "mine.py").write_text(text)
        rewards.load_reward.cache_clear()
        ends_in_one_line(capsys, lambda: rewards.load_reward(f"{tmp_path}/mine.py:judge"), words)


def test_ones_own_reward_is_loaded_once(tmp_path, capsys, monkeypatch):
    """By a path from here, too. Another text of the file counts for the next run."""
    monkeypatch.chdir(tmp_path)
    own_reward(tmp_path, "return len(loaded)")
    with open("mine.py", "a") as file:
        file.write("from __future__ import annotations\nimport dataclasses\nloaded = [1]\n"
                   "@dataclasses.dataclass\nclass Kept:\n    number: int\n")
    lines = Path("mine.py").read_text().splitlines()
    Path("mine.py").write_text("\n".join([lines[2], *lines[:2], *lines[3:]]))
    for _ in range(2):
        assert judged("mine.py:judge", [dict(id="1")]) == [("a", 1.0)]
        Path("mine.py").write_text("def judge(*_):\n    return 1 / 0\n")
    rewards.load_reward.cache_clear()
    ends_in_one_line(capsys, lambda: judged("mine.py:judge", [dict(id="1")]), "--reward mine.py:judge, line 2: Zero")


@whole
def test_what_was_graded_before_a_reward_failed_is_whole(tmp_path):
    """And with the reward mended, --overwrite starts afresh."""
    data = [problem["id"] for problem in rewards.load_problems(str(HERE / "tiny/train.jsonl"))[:768]]
    named, out = own_reward(tmp_path, f"return 1.0 if row['id'] != {data[-1]!r} else None"), tmp_path / "v.jsonl"
    done = inside(*stage1(out, f"--reward={named}"), check=False)
    refused(done, "mine.py:judge", "TypeError", f"problem {data[-1]}, response", alone=False)
    assert not out.exists() and not list(tmp_path.glob("**/*.tmp"))
    for part in (tmp_path / "v.parts").glob("*"):
        assert all(row["rewards"] == [1.0, 1.0] for row in read_jsonl(part)) and part.suffix == ".jsonl"
    named = own_reward(tmp_path, "return 0.5")
    refused(inside(*stage1(out, f"--reward={named}"), check=False), "reward's file (was", "--overwrite")
    inside(*stage1(out, f"--reward={named}", "--overwrite"))
    assert all(row["rewards"] == [0.5, 0.5] and row["vstar"] == 0.5 for row in read_jsonl(out))


def test_a_stop_is_one_token_and_ends_an_answer(capsys):
    args = SimpleNamespace(model="tiny/model", revision=None, stop=["="], max_new_tokens=8)
    tokenizer, eos = vstar.ask([], args)
    assert eos == sorted([tokenizer.eos_token_id, tokenizer.vocab["="]])
    args.stop = ["12"]
    ends_in_one_line(capsys, lambda: vstar.ask([], args), "--stop '12'", "['1', '2']")


def test_any_float_is_a_reward():
    rows = [dict(id="a", rewards=[2.0, 0.5], vstar=0.0, finished=[1, 1], lengths=[3, 3]),
            dict(id="b", rewards=[-1.0, 0.0], vstar=0.0, finished=[1, 1], lengths=[3, 3])]
    said = vstar.summary(rows, 1.0)
    assert "accuracy          0.250" in said and "reward            0.375" in said and "0/2 right         50.0%" in said
    assert pass_at_k([[2.0, 0.5]], 1).tolist() == [0.5]
    # the scatter of the mean of two draws from {2, 0.5}: variance 0.5625 / 2, with (N-1)/N put back
    some = np.tile([[2.0, 0.5]], (50, 1))
    assert vstar.vstar_error(some, math.inf, 2) == pytest.approx(0.75, rel=0.02)
    rows = [dict(row, responses=["\\boxed{1}", "\\boxed{2}"], rewards=[2 * r for r in row["rewards"]]) for row in rows]
    found = evaluate.measure(rows)
    assert (found["accuracy"], found["majority"], found["pass"][2]) == (0.5, 0.5, 0.5)
    found = evaluate.measure(rows, "mine.py:judge")  # whose answers may agree in ways that the checker does not see
    assert (found["accuracy"], found["reward"]) == (0.5, 0.75) and "majority" not in found


@whole
def test_ones_own_task_end_to_end(tmp_path):
    """A reward, a template and a stop of one's own go from Stage 1 to Stage 2; another reward is refused. Such a reward
    needs no answers."""
    named = own_reward(tmp_path, "return row['weight'] * finished + len(response) / 100")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(
        dict(id=str(i), question="?", prompt="1", a=i, b=7, weight=2)) + "\n" for i in range(1, 17)))
    out = tmp_path / "v.jsonl"
    inside("vstar.py", "--model=tiny/model", f"--data={tmp_path}/p.jsonl", "--prompt={prompt}{a}+{b}=", "--stop", ";",
           f"--reward={named}", "--samples=2", "--max_new_tokens=20", "--engine=transformers", f"--out={out}")
    rows = read_jsonl(out)
    assert rows[0]["prompt"] == f"1{rows[0]['a']}+7=" and rows[0]["weight"] == 2
    for row in rows:
        assert row["rewards"] == [2 * ended + len(text) / 100 for text, ended in zip(row["responses"], row["finished"])]
    command = ["train.py", f"--vstar={out}", f"--out={tmp_path}/run", "--steps=2", "--batch_size=8",
               "--engine=transformers"]
    inside(*command)
    shown = read_jsonl(tmp_path / "run/samples/000001.jsonl")
    assert len(shown) == 8 and all(abs(row["log_ratio"]) < 1e-4 for row in shown)  # π is π_ref still
    assert all(row["reward"] >= 2 for row in shown if row["response"].endswith(";"))
    assert {row["prompt"] for row in shown} < {row["prompt"] for row in rows}  # as Stage 1 asked
    said = inside(*evaluation(tmp_path / "e", f"--data={tmp_path}/p.jsonl", "--prompt={a}+{b}=", "--stop", ";",
                              "--max_new_tokens=3", f"--reward={named}", "--show=2")).stdout
    assert "right: a reward of at least 1" in said and said.count(", wrong, read cut off\n") == 2
    assert "pass@4  reward  finished" in said and "maj@" not in said
    own_reward(tmp_path, "return 1.0")
    done = run(*command, check=False)  # in this process the file has been read
    assert done.returncode == 2 and "reward's file changed" in done.stderr, done.stderr


def test_bos_is_written_once():
    """Plain text gets the tokenizer's BOS, a chat template writes its own."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(HERE / "tiny/model")
    from tokenizers.processors import TemplateProcessing

    bos, one = tokenizer.vocab["="], tokenizer.vocab["1"]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="= $A", special_tokens=[("=", bos)])
    assert rewards.encode(tokenizer, "1", chat=False) == [bos, one]
    assert rewards.encode(tokenizer, "1", chat=True) == [one]


# ---------------------------------------------------------------------------------------------------------------------
# evaluate.py


def test_majority_by_hand():
    box = lambda *answers: [f"so \\boxed{{{a}}}" if a is not None else "no idea" for a in answers]
    grade = lambda responses, gold: [rewards.reward(r, gold, True) for r in responses]
    for answers, gold, expected in (
        (("1", "2", "2"), "2", 1.0),
        (("1", "2", "2"), "1", 0.0),
        (("1", "2"), "1", 1.0),
        (("0.5", "3", r"\frac12", "3", "1/2"), "0.5", 1.0),  # the checker's groups, not the strings'
        ((None, None, "7"), "7", 1.0),
        ((None,), "7", 0.0),
    ):
        responses = box(*answers)
        assert evaluate.majority(responses, [True] * len(answers), grade(responses, gold)) == expected
    # cut-off responses do not vote
    assert evaluate.majority(box("1", "1", "2"), [False, False, True], [0.0, 0.0, 1.0]) == 1.0


@whole
def test_bootstrap_interval_covers(monkeypatch):
    """In 95 of 100 simulated experiments the interval holds the truth; paired differences too."""
    monkeypatch.setattr(evaluate.bootstrap, "__defaults__", (200, 0))  # draws, seed
    rng, covered, held = np.random.default_rng(0), 0, 0
    for trial in range(300):
        chance = rng.beta(2, 2, 150)
        one, other = (rng.binomial(4, chance) / 4 for _ in range(2))
        low, high = evaluate.bootstrap(one, seed=trial)
        covered += low <= 0.5 <= high
        _, low, high = evaluate.paired(one, other)
        held += low <= 0 <= high
    assert 0.91 < covered / 300 < 0.98 and 0.91 < held / 300 < 0.98


def test_measure_by_hand():
    rows = [dict(rewards=[1.0, 0.0], responses=["\\boxed{1}", "\\boxed{2}"], finished=[True, True], lengths=[3, 5]),
            dict(rewards=[0.0, 0.0], responses=["\\boxed{4}", "…"], finished=[True, False], lengths=[3, 9])]
    found = evaluate.measure(rows)
    assert (found["accuracy"], found["pass"], found["majority"]) == (0.25, {1: 0.25, 2: 0.5}, 0.5)
    assert (found["finished"], found["length"], found["problems"]) == (0.75, 5.0, 2)


@whole
def test_kl_is_the_closed_form(monkeypatch):
    """Completions of length 1 + Geometric(p): KL(p ‖ q) per completion = KL of one token / p; and 0 to itself."""
    p, q, rng = 0.4, 0.7, random.Random(0)
    written = []
    for _ in range(20_000):
        tokens = []
        while not tokens or tokens[-1] != 0:
            tokens.append(0 if rng.random() < p else 1)
        written.append(tokens)
    rows = [dict(id=str(i), tokens=written[i * 20 : i * 20 + 20], finished=[True] * 20) for i in range(1000)]
    monkeypatch.setattr(evaluate, "load_model", lambda model, revision, dtype, device: TwoTokens(model))
    args = SimpleNamespace(model=p, reference=q, revision=None, dtype="float32", temperature=1.0,
                           tokens_per_microbatch=4096)
    prompts = {str(i): [1, 1] for i in range(1000)}
    one_token = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    found = evaluate.divergence(rows, prompts, args, "cpu")
    assert found["kl_low"] < one_token / p < found["kl_high"]
    assert found["kl"] == pytest.approx(one_token / p, rel=0.03)
    assert found["kl_per_token"] == pytest.approx(one_token, rel=0.03)
    args.reference = p
    assert evaluate.divergence(rows, prompts, args, "cpu")["kl"] == 0


@whole
def test_evaluation_end_to_end(trained, tmp_path):
    both = ["tiny/model", str(trained[0] / "model")]
    done = inside(*evaluation(tmp_path, "--reference=tiny/model", "--show=2", models=both))
    results = json.loads((tmp_path / "results.json").read_text())
    before, after = (results[model]["tiny/test.jsonl"] for model in both)
    assert before["kl"] == 0 and after["kl"] > 0.01
    assert 0.25 < before["low"] < before["accuracy"] < before["high"] < 0.55
    assert after["difference"][0] == pytest.approx(after["accuracy"] - before["accuracy"])
    for words in ("pass@4", "maj@4", "KL/token", "against tiny/model", "wrong answers of tiny/model", "the gold"):
        assert words in done.stdout
    assert (tmp_path / "accuracy.png").stat().st_size > 3000


@pytest.mark.filterwarnings("error")
def test_long_names_have_room_in_the_picture(tmp_path):
    name = "problems  " + "/a/folder/within" * 6
    points = [{"accuracy": share, name: name} for share in (0.4, 0.5, 0.6)]  # or matplotlib warns
    vstar.picture(tmp_path / "accuracy.png", points, ["accuracy"], [[name]])


@long
def test_evaluation_by_two_processes_and_killed(trained, tmp_path):
    """Two processes, and one that is killed and started again, write the same files as one."""
    both = ["tiny/model", str(trained[0] / "model")]
    command = lambda name: evaluation(tmp_path / name, "--reference=tiny/model", models=both)
    inside(*command("a"))
    torchrun(2, *command("b"))
    process = start(*command("c"))
    wait_until(lambda: list((tmp_path / "c").glob("*.parts/*.jsonl")), process)
    kill(process)
    assert list((tmp_path / "c").glob("*.parts")) and not (tmp_path / "c/results.json").exists()
    inside(*command("c"))
    for name in [path.name for path in (tmp_path / "a").glob("*.json*")]:
        one, two, three = ((tmp_path / folder / name).read_bytes() for folder in "abc")
        assert one == two == three


@whole
def test_greedy_evaluation(tmp_path):
    same_name = tmp_path / "test.jsonl"
    same_name.write_text(json.dumps(dict(question="2+2=", answer="4")))
    said = inside(*evaluation(tmp_path, "--temperature=0", "--samples=1", "--limit=96", "--data", "tiny/test.jsonl",
                              same_name)).stdout
    found, other = json.loads((tmp_path / "results.json").read_text())["tiny/model"].values()
    assert found["n"] == 1 and found["finished"] == 1.0 and (found["problems"], other["problems"]) == (96, 1)
    assert "\ntiny/test.jsonl  tiny/model " in said and f"\n{same_name}  tiny/model " in said  # not twice 'test'


@pytest.mark.parametrize("more,words", [
    (["--samples=0"], ["--samples", "0 is too small"]),
    (["--data=nonsense"], ["unknown data set 'nonsense'"]),
    (["--temperature=0"], ["--samples 1"]),
    (["--temperature=0", "--samples=1", "--reference=tiny/model"], ["--temperature 0", "no --reference"]),
    (["--limit=0"], ["--limit", "0 is too small"]),
    (["--model=./nowhere"], ["./nowhere", "no such folder"]),
    (["--model", "tiny/model", "./tiny/model"], ["./tiny/model", "named before"]),  # one file of answers for two
    (["--reward=nowhere.py:judge"], ["nowhere.py", "no such file"]),
    (["--prompt={nums}"], ["test/00000", "no field 'nums'"]),
    (["--stop=12"], ["--stop '12'"]),
    (["--n=2"], ["unrecognized arguments: --n=2"]),
])
def test_evaluation_refuses(more, words, tmp_path):
    refused(inside(*evaluation(tmp_path / "o", *more), check=False), *words)
    assert not (tmp_path / "o").exists()


@whole
def test_an_evaluation_goes_on_only_with_its_settings(tmp_path):
    """All but what is shown, and --reference where the tokens were kept."""
    command = lambda *more: evaluation(tmp_path, "--limit=8", "--samples=2", *more)
    inside(*command("--reference=tiny/model"))
    refused(inside(*command("--reference=tiny/model", "--temperature=0.5"), check=False),
            "--temperature (was 1.0, now 0.5)")
    refused(inside(*command(), check=False), " keeps_tokens (was True, now False)")
    inside(*command("--reference=tiny/model", "--show=1", "--tokens_per_microbatch=99"))


@whole
def test_model_without_weights_and_torn_answers(tmp_path):
    (tmp_path / "model").mkdir()
    for path in (HERE / "tiny/model").glob("*.json"):
        (tmp_path / "model" / path.name).symlink_to(path)
    refused(inside(*evaluation(tmp_path / "o", models=[tmp_path / "model"]), check=False), str(tmp_path / "model"),
            "model.safetensors")
    command = evaluation(tmp_path / "p", "--limit=96", "--samples=1")
    inside(*command)
    (path,) = (tmp_path / "p").glob("*test.jsonl.jsonl")
    path.write_text(path.read_text()[:-40])
    refused(inside(*command, check=False), path.name, "line 96", "remove this line")


# ---------------------------------------------------------------------------------------------------------------------
# tiny/: the embedded world


def test_tiny_world():
    taught, tested = (rewards.load_problems(str(HERE / f"tiny/{split}.jsonl")) for split in ("train", "test"))
    assert len(taught) >= 1024 and len(tested) == 512
    assert not {p["question"] for p in taught} & {p["question"] for p in tested}
    for problem in taught + tested:
        a, b = problem["question"].rstrip("=").split("+")
        assert int(a) + int(b) == int(problem["answer"])
    assert sum(f.stat().st_size for f in (HERE / "tiny").rglob("*") if "__pycache__" not in f.parts) < 2_000_000


@pytest.mark.parametrize("name,parser", [("vstar", vstar.make_parser()), ("train", train.make_parser(train.APO)),
                                         ("evaluate", evaluate.make_parser())])
def test_recipes_are_read(name, parser, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    assert vstar.read_flags(parser, name).decode_rows >= 512


@long
def test_make_makes_the_same_files_twice(tmp_path):
    small = ["--steps=3", "--train=20", "--test=10", "--digits", 2, 5, "--hidden=64"]
    both = [start("tiny/make.py", *small, f"--out={tmp_path / name}") for name in "ab"]
    assert [process.wait() for process in both] == [0, 0]
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert {"train.jsonl", "test.jsonl", "vstar.args"} <= {str(f) for f in files}
    for file in files:
        left, right = ((tmp_path / name / file).read_bytes() for name in "ab")
        assert left == right.replace(bytes(tmp_path / "b"), bytes(tmp_path / "a")), file


def test_worked_demonstrations(monkeypatch):
    monkeypatch.syspath_prepend(HERE / "tiny")
    import make

    assert make.worked(random.Random(0), 482, "+", 795, 0) == "2+5=7;8+9=17;4+7+1=12;\\boxed{1277}"
    assert make.worked(random.Random(0), 55, "+", 45, 0) == "5+5=10;5+4+1=10;\\boxed{100}"
    assert make.worked(random.Random(0), 482, "-", 295, 0) == "12-5=7;17-9=8;3-2=1;\\boxed{187}"
    assert make.worked(random.Random(0), 500, "-", 499, 0) == "10-9=1;9-9=0;4-4=0;\\boxed{1}"
    rng = random.Random(0)
    right = [make.worked(rng, 482, "+", 795, 0.04).endswith("{1277}") for _ in range(3000)]
    assert np.mean(right) == pytest.approx(0.96**3, abs=0.02)


# ---------------------------------------------------------------------------------------------------------------------
# the real vLLM, where it can run


@whole
def test_vllm_greedy_completions_are_transformers(vllm_engine):
    theirs = sampler_of(tiny_model(), 64, temperature=0).generate(vllm_engine.prompts, 1, [0] * 128)
    with mock.patch.dict(vllm_engine.sampler.sampling, temperature=0.0):
        ours = vllm_engine.sampler.generate(vllm_engine.prompts, 1, [0] * 128)
    assert [c[0].tokens for c in ours] == [c[0].tokens for c in theirs]
    assert all(c[0].finished and c[0].tokens[-1] == 0 for c in ours)


@whole
def test_vllm_logps_are_a_forward_pass(vllm_engine):
    model = tiny_model()
    completions = vllm_engine.sampler.generate(vllm_engine.prompts, 2, list(range(128)))
    assert len({tuple(c.tokens) for copies in completions for c in copies}) > 200
    assert any(copies[0].tokens != copies[1].tokens for copies in completions)
    for prompt, copies in zip(vllm_engine.prompts, completions):
        for copy in copies:
            logits = model(torch.tensor([prompt + copy.tokens])).logits[0, len(prompt) - 1 : -1]
            plain = logits.log_softmax(-1).gather(-1, torch.tensor(copy.tokens)[:, None])[:, 0]
            torch.testing.assert_close(plain, torch.tensor(copy.logps), atol=1e-3, rtol=0)


@whole
def test_vllm_same_seed_same_completion(vllm_engine):
    written = [vllm_engine.sampler.generate(vllm_engine.prompts[:16], 2, seeds)
               for seeds in (range(16), range(16), range(100, 116))]
    tokens = [[[copy.tokens for copy in copies] for copies in completions] for completions in written]
    assert tokens[0] == tokens[1] != tokens[2]


@whole
def test_vllm_takes_new_weights(vllm_engine):
    model = tiny_model()
    old = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) * parameter.std())
    # as train.py gives them: under vLLM's names, the tied head twice
    vllm_engine.sampler.load(train.Policy(model).full_weights())
    vllm_engine.sampler.llm.reset_prefix_cache()
    completions = vllm_engine.sampler.generate(vllm_engine.prompts[:32], 1, range(32))
    for copies, prompt in zip(completions, vllm_engine.prompts):
        tokens, logps = copies[0].tokens, torch.tensor(copies[0].logps)
        for some_model, agree in ((model, True), (tiny_model(), False)):
            logits = some_model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
            plain = logits.log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0]
            assert ((plain - logps).abs().max() < 1e-4) == agree  # the new weights, and not the old
    vllm_engine.sampler.load(old.items())
    vllm_engine.sampler.llm.reset_prefix_cache()


@whole
def test_vllm_takes_merged_layers_alone(vllm_engine):
    """What is frozen it has read itself."""
    policy, prompt = adapted(tiny_model()), vllm_engine.prompts[0]
    vllm_engine.sampler.load(policy.full_weights())
    copies, = vllm_engine.sampler.generate([prompt], 4, [0])
    for copy in copies:
        ids = torch.tensor([prompt + copy.tokens])
        mask = torch.arange(ids.shape[1])[None] >= len(prompt)
        with torch.no_grad():
            new, old = (model(input_ids=ids, mask=mask)[0, len(prompt) - 1 :] for model in (policy, policy.unadapted))
        assert (new - torch.tensor(copy.logps)).abs().max() < 1e-4 < 1e-2 < (new - old).abs().max()
    vllm_engine.sampler.load(tiny_model().state_dict().items())


@whole
def test_vllm_is_asked_for_fp32_with_lora(vllm_engine, monkeypatch):
    """In bf16 an addition that is smaller than half the distance to the next number would be gone."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    made = []
    monkeypatch.setattr("vllm.LLM", lambda *_, dtype, **__: made.append(dtype) or mock.MagicMock())
    args = SimpleNamespace(model="", revision=None, dtype="bfloat16", seed=0, gpu_memory=0.3, temperature=1.0,
                           max_new_tokens=64)
    for lora in (4, None):
        vstar.VLLMSampler(SimpleNamespace(**vars(args), lora=lora), [0], 128, training=True)
    assert made == ["float32", "bfloat16"]


@whole
def test_vllm_stage1_accuracy(vllm_engine, all_rows, tmp_path):
    said = run("vstar.py", *TINY[:-1], "--engine=vllm", f"--out={tmp_path / 'v.jsonl'}").stderr
    assert not any(word in said for word in ("Warning", "Triton", "NUMA", "Loading")), said
    v, t = (np.array([row["rewards"] for row in read_jsonl(path)]).mean(1) for path in (tmp_path / "v.jsonl", all_rows))
    assert abs((v - t).mean()) < 4 * (v - t).std() / math.sqrt(len(v))  # the same prompts: a paired difference


@long
@pytest.mark.parametrize("ranks", [1, 2])
def test_vllm_trains_like_transformers(vllm_engine, all_rows, tmp_path, ranks):
    """Ten steps; after each update the engine samples from the new weights, or `mismatch` would say so."""
    more = ["--steps=10", "--batch_size=128", "--eval_limit=256", "--eval_every=10", "--save_every=99",
            "--decode_rows=512", "--warmup=3", "--tokens_per_microbatch=16384"]
    torchrun(ranks, *stage2(all_rows, tmp_path / "v", *more, "--engine=vllm"))
    rows = metrics(tmp_path / "v")
    assert all(0 < row["mismatch"] < 1e-4 for row in rows[1:])
    assert all(row["reference_mismatch"] > 10 * row["mismatch"] for row in rows[2:])
    assert rows[-1]["log_ratio_abs"] > 0.1  # so old weights would be off by far more than that
    if ranks == 1:
        # the finished model loads in vLLM as it is
        out = tmp_path / "again.jsonl"
        run("vstar.py", f"--model={tmp_path / 'v/model'}", *TINY[1:-1], "--engine=vllm", "--limit=128", f"--out={out}")
        again = np.mean([row["rewards"] for row in read_jsonl(out)])
        assert abs(again - rows[-1]["accuracy"]) < 0.12
        torchrun(ranks, *stage2(all_rows, tmp_path / "t", *more))
        theirs = metrics(tmp_path / "t")[-1]["accuracy"]
        assert abs(rows[-1]["accuracy"] - theirs) < 0.12  # 256 problems: 3 standard errors


@long
def test_vllm_samples_with_lora_in_bf16(vllm_engine, all_rows, tmp_path):
    """The base is frozen in bf16, and vLLM holds the merged weights in fp32."""
    run(*stage2(all_rows, tmp_path, "--steps=4", "--lora=4", "--lr=1e-3", "--dtype=bfloat16", "--engine=vllm"))
    rows = metrics(tmp_path)
    assert all(0 < row["mismatch"] < 0.01 for row in rows[1:])
    assert rows[-1]["reference_mismatch"] > 3 * rows[-1]["mismatch"]


@whole
@pytest.mark.parametrize("arrive,words", [(0, "does not take the policy's weights"),
                                          (2, "does it still hold old weights")])
def test_vllm_with_old_weights_is_noticed(vllm_engine, all_rows, tmp_path, arrive, words):
    """Where no push arrives, in the engine's own weights before a first step; where all but the first two get lost (the
    one that is read back, and π_ref), by the log-probabilities."""
    load = (f"lambda self, weights, load=vstar.VLLMSampler.load, left=[0] * {arrive}: "
            "load(self, weights) if left and not left.pop() else list(weights)")
    stale = (f"import runpy, vstar; vstar.VLLMSampler.load = {load}; "
             "runpy.run_path('train.py', run_name='__main__')")
    more = ["--steps=10", "--batch_size=128", "--eval_every=99", "--engine=vllm"]
    done = run("-c", stale, *stage2(all_rows, tmp_path, *more)[1:], check=False)
    assert done.returncode == 2 and words in done.stderr, done.stderr[-2000:]
    assert "Traceback" not in done.stderr


@long
def test_vllm_evaluates_two_models(vllm_engine, trained, tmp_path):
    models = ["tiny/model", str(trained[0] / "model")]
    run(*evaluation(tmp_path / "v", "--engine=vllm", "--limit=128", models=models))
    run(*evaluation(tmp_path / "t", "--limit=128", models=models))
    v, t = (json.loads((tmp_path / name / "results.json").read_text()) for name in "vt")
    for model in models:
        (ours,), (theirs,) = v[model].values(), t[model].values()
        assert abs(ours["accuracy"] - theirs["accuracy"]) < 0.1  # 128 problems × 4 completions
