"""plan.py's numbers for Qwen2.5 1.5B to 72B on 1 to 512 H100s: what fits, and where communication begins to dominate.

    python experiments/sizes.py              → experiments/sizes.json, and the README's tables      (no weights, no GPU)
"""

import sys
from argparse import Namespace

import torch
import transformers
from lab import ROOT, save

sys.path.insert(0, str(ROOT))
import plan  # noqa: E402

# hidden size, layers, heads, heads of keys and values, inner size, vocabulary, tied (the models' config.json)
MODELS = {"1.5B": (1536, 28, 12, 2, 8960, 151936, True), "7B": (3584, 28, 28, 4, 18944, 152064, False),
          "32B": (5120, 64, 40, 8, 27648, 152064, False), "72B": (8192, 80, 64, 8, 29568, 152064, False)}
COUNTS = [1, 2, 4, 8, 16, 32, 64]


def main():
    args = Namespace(algo="apo", group=1, passes=1, minibatches=1, batch_size=256, batch=256, tokens_per_microbatch=16384,
                     max_new_tokens=1024, checkpoint_activations="auto", offload_reference=False, engine="vllm", revision=None)
    fits, floors = {}, {}
    for name, (hidden, layers, heads, kv, inner, vocabulary, tied) in MODELS.items():
        folder = ROOT / f"out/sizes/{name}"
        transformers.Qwen2Config(hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv,
                                 intermediate_size=inner, vocab_size=vocabulary, tie_word_embeddings=tied).save_pretrained(folder)
        shape = plan.load_shape(Namespace(model=str(folder), revision=None))
        for gpu in ("H100", "H200"):
            room = plan.GPUS[gpu][0]
            args.gpu_memory = plan.vllm_share(shape, gpu, torch.bfloat16)
            for count in COUNTS:
                parts = plan.memory(shape, args, count, gpu, torch.bfloat16, 1224)
                fits[f"{name} {count}x{gpu}"] = dict(update_gib=round(plan.peak(dict(parts, sampling=0)), 1),
                                                     fits=plan.peak(parts) + plan.OVERHEAD <= room)
        for count in (8, 64, 512):
            batch = Namespace(**{**vars(args), "batch_size": max(256, 4 * count)})
            floors[f"{name} {count}xH100"] = {key: round(value, 2) for key, value in plan.step_floor(
                shape, batch, count, "H100", torch.bfloat16, 200, 512, 1024).items()}
    save("sizes", fits=fits, step_floors=floors)
    for gpu in ("H100", "H200"):
        print(f"| Qwen2.5, {gpu} | " + " | ".join(map(str, COUNTS)) + " |\n" + "|---" * (len(COUNTS) + 1) + "|")
        for name in MODELS:
            cells = [fits[f"{name} {count}x{gpu}"] for count in COUNTS]
            print(f"| {name} | " + " | ".join(f"{cell['update_gib']:.0f}{'' if cell['fits'] else ' ✗'}" for cell in cells) + " |")
    print("| floors, seconds a step | answers | sampling | reference + update | communication |\n|---|---|---|---|---|")
    for label, floor in floors.items():
        answers = max(256, 4 * int(label.split()[1].split("x")[0]))
        compute = round(floor["reference"] + floor["update"], 2)
        print(f"| {label} | {answers} | {floor['sampling']} | {compute} | {floor['communication']} |")


if __name__ == "__main__":
    main()
