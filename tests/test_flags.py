"""Flags, recipes, settings of the machine, tokenizers: what a script does before its first token."""

import ast
import importlib.util
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
import torch
import transformers

import evaluate
import rewards
import train
import vstar
from tests.helpers import (
    HERE,
    ends_in_one_line,
    evaluation,
    inside,
    refused,
    small_model,
    stage1,
    stage2,
    tiny_tokenizer,
    whole,
)

SCRIPTS = ("rewards", "vstar", "train", "evaluate")  # each may import those before it


@pytest.mark.parametrize("name", SCRIPTS)
def test_imports_run_one_way(name):
    """…and stand at the top, so that none hides a circle."""
    tree = ast.parse((HERE / f"{name}.py").read_text())
    before = SCRIPTS[: SCRIPTS.index(name)]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in SCRIPTS:
            assert node.module in before and node in tree.body
        assert not isinstance(node, ast.Import) or not {alias.name for alias in node.names} & {*SCRIPTS}


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

    default = dict(many=8, share=0.5, seed=0, temperature=1.0,
                   limit=None, kind="auto", out=Path("out"), loud=False)
    assert parse("--many=8") == default
    found = parse("--many=3", "--seed", "0",
                  "--temperature=0", "--limit=1", "--kind=one", "--out=a", "--share=inf")
    others = dict(many=3, temperature=0, limit=1,
                  kind="one", out=Path("a"), share=math.inf)
    assert found == default | others and parse("--loud")["loud"] is True
    for flag in ("many=0", "many=-1", "share=0", "share=nan", "seed=-1", "limit=0", "temperature=-0.1"):
        name = flag.split("=")[0]
        ends_in_one_line(capsys, lambda flag=flag: parse(f"--{flag}"), f"--{name}", "is too small")
    for flag in ("--many=2.5", "--kind=two", "--man=2", "--loud=yes", "--many"):
        ends_in_one_line(capsys, lambda flag=flag: parse(flag), flag.split("=")[0])


@pytest.mark.parametrize("flag,words", [
    ("--beta1=nan", ["--beta1", "is too small"]),
    ("--engine=tensorrt", ["--engine", "tensorrt", "transformers"]),
    ("@nowhere.args", ["nowhere.args"]),
    ("--n=2", ["unrecognized arguments", "--n=2"]),  # a flag has one name, which is written out
    ("--temperature=0", ["--temperature 0", "--samples 1"]),
    # what is asked for is not there
    ("--model=./nowhere", ["./nowhere", "no such folder"]),
    ("--model=out/nowhere/model", ["--model out/nowhere/model: no such folder"]),
    ("--model=tiny/nowhere", ["--model tiny/nowhere: no such folder, and as a name on the hub: "]),
    ("--reward=rewards.py", ["--reward rewards.py: which function of it?", "FILE.py:FUNCTION"]),
    ("--chat", ["chat template"]),
    ("--chat_args=[]", ["--chat_args", "[]"]),
    ("--prompt={nums}", ["train/00000", "no field 'nums'"]),
    ("--stop=12", ["--stop '12'", "['1', '2']"]),
    ("--out=tiny", ["--out tiny would take the place of --model"]),
    ("--reward=nowhere.py:judge", ["--reward nowhere.py:judge"]),
    ("--max_new_tokens=510", ["train/00000", "window of 512"]),
    ("--data=nonsense", ["unknown data set 'nonsense'"]),
    ("--engine=vllm", ["--engine vllm"]),
])
def test_bad_flags_of_stage1(flag, words, tmp_path):
    if flag == "--engine=vllm" and importlib.util.find_spec("vllm"):
        pytest.skip("vLLM is installed")
    refused(inside(*stage1(tmp_path / "out/vstar.jsonl", flag), check=False), *words)
    assert not (tmp_path / "out").exists()  # nothing half-written


@pytest.mark.parametrize("flag,words", [
    ("--batch=25", ["unrecognized arguments: --batch=25"]),  # not taken for --batch_size
    ("--algo=ppo", ["unrecognized arguments: --algo=ppo"]),
    ("--lr=-1", ["--lr", "is too small"]),
    ("--dtype=float16", ["argument --dtype", "float16"]),
    ("--vstar=nowhere.jsonl", ["nowhere.jsonl", "vstar.py"]),
    # V̂* holds for Stage 1's settings, so they cannot be changed here
    *((f"--{name}=1", ["unrecognized arguments"]) for name in train.FROM_STAGE1),
])
def test_bad_flags_of_stage2(flag, words, tmp_path):
    refused(inside(*stage2(tmp_path / "v.jsonl", tmp_path / "run", flag), check=False), *words)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("more,words", [
    (["--temperature=0"], ["--samples 1"]),
    (["--temperature=0", "--samples=1", "--reference=tiny/model"], ["--temperature 0", "no --reference"]),
    # one file of answers for two
    (["--model", "tiny/model", "./tiny/model"], ["./tiny/model", "named before"]),
    (["--stop=12"], ["--stop '12'"]),
])
def test_bad_flags_of_evaluation(more, words, tmp_path):
    refused(inside(*evaluation(tmp_path / "o", *more), check=False), *words)
    assert not (tmp_path / "o").exists()


def test_recipes(monkeypatch):
    """With no flags a script reads its recipe, from wherever it is started; with any, the defaults hold."""
    def read(*flags):
        monkeypatch.setattr(sys, "argv", ["vstar.py", *flags])
        return vstar.read_flags(vstar.make_parser(), "vstar")

    assert read().decode_rows == 1024 and read("--model=a", "--data=b").decode_rows == 256
    monkeypatch.chdir(HERE)
    assert read("@tiny/vstar.args", "--max_new_tokens=9").max_new_tokens == 9  # the later flag counts
    for more in ([], ["--overwrite"]):
        monkeypatch.setattr(sys, "argv", ["train.py", *more])
        args = vstar.read_flags(train.make_parser(train.APO), "train")
        assert (args.steps, args.lr, args.overwrite) == (120, 3e-4, bool(more))
    monkeypatch.setattr(sys, "argv", ["evaluate.py"])
    assert vstar.read_flags(evaluate.make_parser(), "evaluate").samples == 8


@pytest.mark.parametrize("data,split,held_out", [
    ("math", "train", "math"),
    ("math", "test", None),  # it is trained on
    ("math500", "test", None),  # it has no other split
    ("mine.jsonl", "train", None),
])
def test_settings_that_follow_from_others(data, split, held_out, monkeypatch, tmp_path):
    files = {"model's files": "", "reward's file": ""}
    monkeypatch.setattr(train, "fingerprint", lambda *_: files)
    settings = {**dict.fromkeys(train.FROM_STAGE1), **files, "number of problems": 1,
                "temperature": 1, "beta1": 1, "data": data, "split": split}
    (tmp_path / "v.jsonl").write_text(json.dumps(dict(id="a", rewards=[0.0], graded_by="")))
    settings["problems' ids"] = vstar.hash_of_ids([dict(id="a")])
    (tmp_path / "v.config.json").write_text(json.dumps(dict(settings=settings, samples=1)))
    for flags, lr in (([], 1e-6), (["--lora=8"], 5e-6), (["--lora=8", "--lr=1e-4"], 1e-4)):
        args = train.make_parser(train.APO).parse_args([f"--vstar={tmp_path}/v.jsonl", *flags])
        train.settle(args, *train.read_stage1(args))
        assert args.eval_data == held_out and args.lr == lr


# ---------------------------------------------------------------------------------------------------------
# tokenizers


def test_what_ends_a_completion(tmp_path):
    """The ids of the generation config and the tokenizer's; where the first names none, config.json's; and
    --stop."""
    shutil.copytree(HERE / "tiny/model", tmp_path / "model")
    args = SimpleNamespace(model=str(tmp_path / "model"), revision=None, stop=None, max_new_tokens=8)
    config, own = tmp_path / "model/config.json", tiny_tokenizer().eos_token_id
    config.write_text(json.dumps(json.loads(config.read_text()) | dict(eos_token_id=3)))
    for written, eos in (("null", [own, 3]), ("[5, 7]", [own, 5, 7]), ("9", [own, 9])):
        (tmp_path / "model/generation_config.json").write_text(f'{{"eos_token_id": {written}}}')
        assert vstar.add_prompts([], args)[1] == eos
    args.stop = ["="]
    assert {*vstar.add_prompts([], args)[1]} == {own, 9, tiny_tokenizer().vocab["="]}


def tokenizer_of(kind):
    """Of words, or of their pieces; the token of what is unknown is BOS, too."""
    known = {token: i for i, token in enumerate("<unk> what is 2 w ##e".split())}
    tokenizer = tokenizers.Tokenizer(getattr(tokenizers.models, kind)(known, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    bos = tokenizers.processors.TemplateProcessing("<unk> $A", special_tokens=[("<unk>", 0)])
    tokenizer.post_processor = bos
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.mark.parametrize("kind,prompts,said", [
    ("WordLevel", ["what is 2", "was é is 2 é", "is é <unk>"], "2 of 3 prompts hold 'é', 'was'"),
    ("WordPiece", ["we is 2", "wé"], "1 of 2 prompts hold 'wé'"),
    ("tiny", ["12+34=", "12 + 34=", "7×8=?\n"], "1 of 3 prompts hold '?', '×'"),
    ("tiny", ["7gfedcba", "a"], "2 of 2 prompts hold 'a', 'b', 'c', 'd', 'e'"),  # five at the most
    ("WordLevel", ["what <unk> is 2"], None),
    ("tiny", ["12 + 34="], None),
])
def test_what_the_tokenizer_does_not_know_is_named(kind, prompts, said, capsys):
    """It drops characters (the embedded world's), or puts <unk> for them or for their word."""
    tokenizer = tiny_tokenizer() if kind == "tiny" else tokenizer_of(kind)
    problems = [dict(prompt=prompt, tokens=rewards.encode(tokenizer, prompt, False)) for prompt in prompts]
    vstar.warn_of_unknown(problems, tokenizer, "M")
    text = capsys.readouterr().out
    assert text.startswith(f"warning: {said}, which the tokenizer of M does not know. ") if said else not text


@whole
def test_unknown_characters_are_named_before_stage1_samples(tmp_path):
    """And healthy problems are not remarked upon."""
    (tmp_path / "p.jsonl").write_text('{"question": "1+?=", "answer": "2"}')
    for data, said in ((tmp_path / "p.jsonl", ["?"]), ("tiny/train.jsonl", [])):
        done = inside(*stage1(tmp_path / "v.jsonl", f"--data={data}", "--limit=2", "--overwrite"))
        assert re.findall("warning: 1 of 1 prompts hold '(.)'", done.stdout) == said
        assert ("does not know" in done.stdout.split("Stage 1:")[0]) == bool(said)


@whole
def test_a_batch_larger_than_the_problems_is_remarked_upon(undisturbed, tmp_path):
    more = ["--steps=1", "--eval_limit=2", "--filter=unsolved"]
    for size, said in ((300, 1), (200, 0)):
        done = inside(*stage2(undisturbed[0], tmp_path / str(size), *more, f"--batch_size={size}"))
        kept = int(re.search(r"Stage 2: (\d+) prompts", done.stdout)[1])
        assert 200 < kept < 300 and done.stdout.count(f"more than the {kept} prompts") == said


def test_lora_needs_linear_layers(capsys):
    """GPT-2's are transformers' Conv1D."""
    make = lambda: train.LoraPolicy(small_model(kind="GPT2"), 4, torch.float32, 0)
    ends_in_one_line(capsys, make, "--lora", "GPT2LMHeadModel", "torch.nn.Linear")


# ---------------------------------------------------------------------------------------------------------
# the machine


def test_a_full_gpu_is_one_line(capsys):
    def raises(error):
        raise error

    for error in (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
                  RuntimeError("CUDA Error: out of memory at cumem_allocator.cpp"),
                  ValueError("Free memory on device cuda:0 (3.1/79.1 GiB) on startup is less than desired")):
        failing = lambda error=error: vstar.run_script(lambda: raises(error))
        ends_in_one_line(capsys, failing, "lower --decode_rows")
    with pytest.raises(SystemExit, match="1"):
        vstar.run_script(lambda: raises(RuntimeError("another")))
    assert "RuntimeError: another" in capsys.readouterr().err  # with its traceback


@pytest.mark.parametrize("name", ["vstar", "train", "evaluate", "experiments.baselines"])
def test_threads_spin_briefly(name):
    """The variable is there before torch loads and reads it; the user's own stays."""
    code = f"""if True:
        import os, sys
        class Finder:
            def find_spec(name, *_):
                if name == "torch":
                    print(os.environ["GOMP_SPINCOUNT"])
                    os._exit(sys.stdout.flush() or 0)
        sys.meta_path.insert(0, Finder)
        import {name}"""
    free = {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"}
    for env, count in ((free, "3000"), (free | dict(GOMP_SPINCOUNT="7"), "7")):
        fresh = subprocess.run([sys.executable, "-c", code], cwd=HERE, env=env, text=True,
                               capture_output=True)
        assert fresh.stdout.strip() == count, fresh.stderr


@pytest.mark.parametrize("processes,threads", [(1, "3"), (1, None), (2, "1"), (2, None)])
def test_threads_of_a_process_under_torchrun(processes, threads, monkeypatch):
    """One process keeps the user's; several share the cores, as torchrun itself says 1 there."""
    chosen = []
    for key in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):
        monkeypatch.setenv(key, "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    if threads:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    else:
        monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    vstar.start_process(SimpleNamespace(dtype="float32", engine="transformers"))
    assert chosen == ([] if processes == 1 and threads else [8 // processes])


@pytest.mark.parametrize("native,dtype", [(True, "bfloat16"), (False, "float32")])
def test_precision_of_a_gpu(native, dtype, monkeypatch):
    """A T4 says that it knows bf16, and emulates it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    says = lambda including_emulation: native or including_emulation
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", says)
    args = SimpleNamespace(dtype="auto", engine="transformers")
    assert vstar.start_process(args).type == "cuda" and args.dtype == dtype


@whole
@pytest.mark.skipif(torch.cuda.is_available()
                    or platform.libc_ver()[0] != "glibc", reason="for CPUs with glibc")
def test_freed_memory_is_kept():
    """A large block that is taken again and again costs no page faults (but for a few misfits at the
    start)."""
    code = """if True:
        import resource, torch, types, vstar
        vstar.start_process(types.SimpleNamespace(dtype="auto", engine="transformers"))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(20):
            torch.ones(1 << 24)  # 64 MB, 16,384 pages
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"""
    fresh = subprocess.run([sys.executable, "-c", code],
                           cwd=HERE, capture_output=True, text=True, check=True)
    assert int(fresh.stdout) < 10 * 16_384
