"""Full training and --lora 16 on the embedded world, five seeds each: does LoRA reach what full training reaches?

    python -m experiments.lora              → experiments/results/lora.json              (10 minutes on one core)

The rate with --lora is five times the full one's. Restartable: what is in out/lora/ is not run again.
"""

from experiments import lab
from train import accuracies

VARIANTS = {"full": [], "lora16": ["--lora=16", "--lr=1.5e-3"]}


def main():
    args = lab.make_parser(__doc__, steps=120).parse_args()
    runs = {name: [] for name in VARIANTS}
    for seed in range(args.seeds):
        first = lab.stage1(args, f"out/lora/{seed}", f"--seed={seed}", threads=1)
        for name, flags in VARIANTS.items():
            rows = lab.train(args, f"out/lora/{seed}/{name}", first, f"--seed={seed}", *flags, threads=1)
            runs[name].append(dict(accuracy=rows[-1]["accuracy"], kl=rows[-1]["kl"],
                                   curve=[round(accuracy, 4) for accuracy in accuracies(rows)]))
    found = {name: lab.over_seeds(some) for name, some in runs.items()}
    lab.save("lora", seeds=args.seeds, steps=args.steps, mean_and_deviation=found, runs=runs)
    for name, numbers in found.items():
        print(f"{name:8s}" + ", ".join(f"{key} {lab.pm(pair)}" for key, pair in numbers.items()))


if __name__ == "__main__":
    main()
