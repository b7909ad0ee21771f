"""Other architectures: models that could see, mixtures of experts, names that transformers changes."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file

import train
from tests.helpers import TINY, inside, metrics, own_reward, small_model, tiny_tokenizer, weights, whole

TEXT = dict(vocab_size=19, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, max_position_embeddings=256, pad_token_id=0, bos_token_id=None,
            eos_token_id=0)


def make(kind, **more):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **more))


@pytest.fixture
def seeing(tmp_path):
    """The folder of a tiny Gemma 3 with its eyes; only its text's own config names the EOS."""
    layers = ["sliding_attention", "full_attention"]
    eyes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                image_size=28, patch_size=14)
    model = make("gemma3", text_config=dict(TEXT, sliding_window=8, layer_types=layers), vision_config=eyes)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "preprocessor_config.json").write_text("{}")
    return folder


@whole
@pytest.mark.parametrize("more", [[], ["--lora=4"]])
def test_a_model_that_could_see_learns_from_text_and_restarts(seeing, more, tmp_path):
    judge = own_reward(tmp_path, "return float(len(response) % 2)")
    world = [f"--model={seeing}", *TINY[1:], "--max_new_tokens=8", f"--reward={judge}", "--limit=16"]
    inside("vstar.py", *world, "--samples=2", f"--out={tmp_path}/vstar.jsonl")
    stage2 = ["train.py", f"--vstar={tmp_path}/vstar.jsonl", "--batch_size=8", "--save_every=2", "--lr=1e-3",
              "--engine=transformers", "--eval_data=tiny/test.jsonl", "--eval_limit=4", "--eval_every=2",
              *more]
    inside(*stage2, f"--out={tmp_path}/whole", "--steps=4")
    for steps in (2, 4):
        inside(*stage2, f"--out={tmp_path}/again", f"--steps={steps}")
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "again")
    assert weights(tmp_path / "whole") == weights(tmp_path / "again")
    first, last = (load_file(folder / "model.safetensors") for folder in (seeing, tmp_path / "whole/model"))
    assert {*first} == {*last} and (tmp_path / "whole/model/preprocessor_config.json").exists()
    learned = {name for name in first if not torch.equal(first[name], last[name])}
    assert learned and not any("vision" in name or "projector" in name for name in learned)


KINDS = dict(mixtral=dict(num_local_experts=2, num_experts_per_tok=1),
             qwen3_moe=dict(num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16),
             qwen2=dict(tie_word_embeddings=True))


@pytest.mark.parametrize("kind", KINDS)
def test_the_push_and_the_saved_folder_have_the_names_of_the_models_files(kind, tmp_path):
    """transformers holds Mixtral's experts in one tensor, under another name."""
    make(kind, **TEXT, **KINDS[kind]).save_pretrained(tmp_path / "first")
    first = load_file(tmp_path / "first/model.safetensors")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    policy = train.Policy(model)
    assert kind == "qwen2" or {*first} != {*model.state_dict()}
    pushed = dict(policy.checkpoint_weights(torch.float32))
    tied = {"lm_head.weight"} & {*pushed} - {*first}  # vLLM gets both
    assert {*pushed} - tied == {*first}
    assert all(torch.equal(pushed[name], first[name]) for name in first)
    args = SimpleNamespace(out=tmp_path, lora=None, dtype="float32", model=str(tmp_path / "first"),
                           revision=None)
    train.save_model(SimpleNamespace(policy=policy, args=args, tokenizer=tiny_tokenizer()))
    saved = load_file(tmp_path / "model/model.safetensors")
    assert {*saved} == {*first} and all(torch.equal(saved[name], first[name]) for name in first)


def test_half_precision_is_pushed_in_half(tmp_path):
    policy = train.Policy(small_model())
    whole_weights, halves = (dict(policy.checkpoint_weights(dtype))
                             for dtype in (torch.float32, torch.bfloat16))
    assert {*whole_weights} == {*halves}
    assert all(torch.equal(halves[name], tensor.bfloat16()) for name, tensor in whole_weights.items())
