"""The plan's numbers for Qwen2.5 1.5B to 72B on 1 to 512 H100s: what fits, and where communication begins to dominate;
and what fits on one small card, trained whole or with --lora 16.

    python -m experiments.speed.sizes        → experiments/results/sizes.json, and tables    (no weights, no GPU)
"""

import re
from argparse import Namespace

import torch

from experiments import lab, plan
from train import APO, make_parser, wanted_engine

MODELS = ["1.5B", "7B", "32B", "72B"]
COUNTS = [1, 2, 4, 8, 16, 32, 64]


SMALL = ["1.5B", "3B", "7B"]
CARDS = ["A2", "L4", "L40S", "H100"]  # 16, 24, 48 and 80 GB


def main():
    args = make_parser(APO).parse_args(["--engine=vllm"])
    args.temperature = 1.0  # Stage 1's
    objective, bf16 = APO(args), torch.bfloat16
    fits, floors = {}, {}
    for name in {*MODELS, *SMALL}:
        lab.config_of(name).save_pretrained(lab.ROOT / f"out/sizes/{name}")
    for name in MODELS:
        folder = lab.ROOT / f"out/sizes/{name}"
        shape = plan.load_shape(Namespace(model=str(folder), revision=None))
        for gpu in ("H100", "H200"):
            args.gpu_memory = plan.vllm_share(shape, gpu, bf16)
            for count in COUNTS:
                parts = plan.memory(shape, args, objective, count, gpu, bf16, 1224)
                fits[f"{name} {count}x{gpu}"] = dict(update_gib=round(plan.peak(dict(parts, sampling=0)), 1),
                                                     fits=plan.peak(parts) + plan.OVERHEAD <= plan.GPUS[gpu][0])
        for count in (8, 64, 512):
            args.batch_size = max(256, 4 * count)
            floor = plan.step_floor(shape, args, objective, count, "H100", bf16, 200, 512, 1024)
            floors[f"{name} {count}xH100"] = {key: round(value, 2) for key, value in floor.items()}
    small = {f"{name} {lora or 'full'} {gpu}": on_one(args, name, lora, gpu)
             for name in SMALL for lora in (None, 16) for gpu in CARDS}
    lab.save("sizes", fits=fits, step_floors=floors, small_cards=small)
    for gpu in ("H100", "H200"):
        print(f"| Qwen2.5, {gpu} | " + " | ".join(map(str, COUNTS)) + " |\n" + "|---" * (len(COUNTS) + 1) + "|")
        for name in MODELS:
            cells = [fits[f"{name} {count}x{gpu}"] for count in COUNTS]
            texts = [f"{cell['update_gib']:.0f}{'' if cell['fits'] else ' ✗'}" for cell in cells]
            print(f"| {name} | {' | '.join(texts)} |")
    print("| floors, seconds a step | answers | sampling | reference + update | communication |\n|---|---|---|---|---|")
    for label, floor in floors.items():
        answers = max(256, 4 * int(label.split()[1].split("x")[0]))
        compute = round(floor["reference"] + floor["update"], 2)
        print(f"| {label} | {answers} | {floor['sampling']} | {compute} | {floor['communication']} |")
    print("| one GPU of | " + " | ".join(f"{plan.GPUS[gpu][0]} GB" for gpu in CARDS) + " |\n" + "|---" * 5 + "|")
    for name in SMALL:
        for lora in (None, 16):
            print(f"| {name}, {f'`--lora {lora}`' if lora else 'full'} | " + " | ".join(
                small[f"{name} {lora or 'full'} {gpu}"] for gpu in CARDS) + " |")


def on_one(args, name, lora, gpu):
    """What one GPU needs beside the least --gpu_memory, in the plan's words."""
    shape = plan.load_shape(Namespace(model=str(lab.ROOT / f"out/sizes/{name}"), revision=None))
    share = plan.vllm_share(shape, gpu, torch.bfloat16)
    args = Namespace(**{**vars(args), "lora": lora, "gpu_memory": share, "dtype": "bfloat16", "engine": "auto"})
    args.engine = wanted_engine(args)
    said = plan.remedy(shape, args, APO(args), 1, gpu, torch.bfloat16, 1224)
    return re.sub("^it does not fit; it would with |^it |; so would.*", "", said)


if __name__ == "__main__":
    main()
