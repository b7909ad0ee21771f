"""The plan's numbers for Qwen2.5 1.5B to 72B: what fits on 1 to 64 H100s, and on one small card.

    python -m experiments.speed.sizes     → experiments/results/sizes.json, and a list    (no weights, no GPU)
"""

from itertools import product

from experiments import lab, plan
from train import APO, make_parser

MODELS = ["1.5B", "7B", "32B", "72B"]
COUNTS = [1, 2, 4, 8, 16, 32, 64]
SMALL = ["1.5B", "3B", "7B"]
CARDS = ["A2", "L4", "L40S", "H100"]  # 16, 24, 48 and 80 GB


def main():
    fits, small = {}, {}
    for name, gpu, count in product(MODELS, ["H100", "H200"], COUNTS):
        fits[f"{name} {count}x{gpu}"] = asked(name, gpu, count)
    for name, lora, gpu in product(SMALL, [None, 16], CARDS):
        small[f"{name} {lora or 'full'} {gpu}"] = asked(name, gpu, 1, lora)["words"]
    lab.save("sizes", fits=fits, small_cards=small)
    for label, found in fits.items():
        print(f"{label:12s}{found['update_gib']:8.0f} GiB in the update, {found['words']}")
    for label, words in small.items():
        print(f"{label:16s}{words}")


def asked(name, gpu, ranks, lora=None):
    """The plan with the default flags and the least --gpu_memory."""
    folder = lab.ROOT / f"out/sizes/{name}"
    if not folder.exists():
        lab.config_of(name).save_pretrained(folder)
    shape, args = plan.load_shape(str(folder)), make_parser(APO).parse_args([])
    vars(args).update(ranks=ranks, gpu=gpu, lora=lora)
    vars(args).update(temperature=1.0, max_new_tokens=1024)
    plan.settle(args, 200)
    args.gpu_memory = plan.least_share(shape, args)
    parts = plan.memory(shape, args, APO(args))
    update = plan.peak(dict(parts, sampling=0))
    words = plan.verdict(shape, args, APO(args))
    return dict(update_gib=round(update, 1), words=words)


if __name__ == "__main__":
    main()
