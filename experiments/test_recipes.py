"""The recipes parse, say what the authors' release says, and run both stages with a tiny model put in."""

import shutil

import pytest
import transformers

import train
import vstar
from tests.helpers import HERE, inside, read_jsonl, whole

FOLDER = HERE / "experiments/recipes"
NAMES = ("gsm8k", "math", "deepseek16k")


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_says_what_the_release_says(name):
    long = name == "deepseek16k"  # its data are not known
    put_in = "--data=my.jsonl" if long else "--model=Qwen/Qwen2.5-3B"
    first = vstar.make_parser().parse_args([f"@{FOLDER}/{name}.vstar.args", put_in])
    assert (first.samples, first.beta1) == (8, 0.5)
    assert (first.temperature, first.prompt) == (1, None)
    assert (first.max_new_tokens, first.chat) == (16384 if long else 1024, long)
    assert first.model == "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B" if long else first.data == name
    second = train.make_parser(train.APO).parse_args([f"@{FOLDER}/{name}.train.args"])
    assert (second.beta2, second.lr, second.warmup) == (1e-3, 1e-6, 0)
    assert (second.weight_decay, second.max_grad_norm) == (0.01, 1)
    assert (second.batch_size, second.minibatches, second.steps) == (256, 2, None)
    assert long or second.epochs == 25


@whole
@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_runs(name, tmp_path):
    model = shutil.copytree(HERE / "tiny/model", tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(model)
    inside("vstar.py", f"@{FOLDER}/{name}.vstar.args", f"--model={model}", "--data=tiny/train.jsonl",
           "--prompt={question}", "--limit=16", "--max_new_tokens=48", "--engine=transformers",
           f"--out={tmp_path}/vstar.jsonl")
    inside("train.py", f"@{FOLDER}/{name}.train.args", f"--vstar={tmp_path}/vstar.jsonl",
           "--eval_data=tiny/test.jsonl", "--eval_limit=8", "--batch_size=8", "--steps=2",
           "--engine=transformers", f"--out={tmp_path}/run")
    rows = read_jsonl(tmp_path / "run/metrics.jsonl")
    assert [row["lr"] for row in rows if row["step"]] == [1e-6, 1e-6]
