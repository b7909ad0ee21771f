"""The recipes parse, say what the authors' release says, and run both stages with a tiny model put in."""

import json
import shutil

import pytest
import transformers

import train
import vstar
from test_apo import HERE, inside, read_jsonl, whole

FOLDER = HERE / "experiments/recipes"
NAMES = ("gsm8k", "math", "deepseek16k")


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_says_what_the_release_says(name):
    long = name == "deepseek16k"
    first = vstar.make_parser().parse_args(
        [f"@{FOLDER}/{name}.vstar.args", "--data=my.jsonl" if long else "--model=Qwen/Qwen2.5-3B"])
    assert (first.samples, first.beta1, first.temperature) == (8, 0.5, 1)
    assert (first.max_new_tokens, first.chat, first.prompt) == ((16384, True, None) if long else (1024, False, None))
    assert (first.model, first.data) == (
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", "my.jsonl") if long else ("Qwen/Qwen2.5-3B", name))
    second = train.make_parser(train.APO).parse_args([f"@{FOLDER}/{name}.train.args"])
    assert (second.beta2, second.lr, second.warmup) == (1e-3, 1e-6, 0)
    assert (second.weight_decay, second.max_grad_norm) == (0.01, 1)
    assert (second.batch_size, second.minibatches, second.steps) == (256, 2, None)
    assert long or second.epochs == 25


def test_every_recipe_is_tested():
    assert {path.name for path in FOLDER.glob("*.args")} == {
        f"{name}.{script}.args" for name in NAMES for script in ("vstar", "train")}


@whole
@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_runs(name, tmp_path):
    model, rows = tmp_path / "model", tmp_path / "vstar.jsonl"
    shutil.copytree(HERE / "tiny/model", model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(model)
    inside("vstar.py", f"@{FOLDER}/{name}.vstar.args", f"--model={model}", "--data=tiny/train.jsonl",
           "--prompt={question}",
           "--limit=16", "--max_new_tokens=48", "--engine=transformers", f"--out={rows}")
    inside("train.py", f"@{FOLDER}/{name}.train.args", f"--vstar={rows}", "--eval_data=tiny/test.jsonl",
           "--eval_limit=8", "--batch_size=8", "--steps=2", "--engine=transformers", f"--out={tmp_path}/run")
    assert all(len(row["rewards"]) == 8 for row in read_jsonl(rows))
    kept = json.loads((tmp_path / "run/config.json").read_text())["settings"]
    assert kept["minibatches"] == 2 and kept["weight_decay"] == 0.01 and kept["chat"] is (name == "deepseek16k")
    assert [row["lr"] for row in read_jsonl(tmp_path / "run/metrics.jsonl") if row["step"]] == [1e-6, 1e-6]
