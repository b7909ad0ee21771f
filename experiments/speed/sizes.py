"""The plan's numbers for Qwen2.5 1.5B to 72B on 1 to 512 H100s: what fits, and where communication begins to dominate.

    python -m experiments.speed.sizes        → experiments/results/sizes.json, and tables    (no weights, no GPU)
"""

from argparse import Namespace

import torch

from experiments import lab, plan
from train import APO, make_parser

MODELS = ["1.5B", "7B", "32B", "72B"]
COUNTS = [1, 2, 4, 8, 16, 32, 64]


def main():
    args = make_parser(APO).parse_args(["--engine=vllm"])
    args.temperature = 1.0  # Stage 1's
    objective, bf16 = APO(args), torch.bfloat16
    fits, floors = {}, {}
    for name in MODELS:
        folder = lab.ROOT / f"out/sizes/{name}"
        lab.config_of(name).save_pretrained(folder)
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
    lab.save("sizes", fits=fits, step_floors=floors)
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


if __name__ == "__main__":
    main()
