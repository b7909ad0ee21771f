"""Full training and --lora 16 on the embedded world, five seeds each: does LoRA reach what full training reaches?

    python -m experiments.lora              → experiments/results/lora.json

The rate with --lora is five and ten times the full one's. Restartable: what is in out/lora/ is not run again.
"""

from experiments import lab

VARIANTS = {"full": [], "lora16": ["--lora=16", "--lr=1.5e-3"], "lora16, ten times": ["--lora=16", "--lr=3e-3"]}


def main():
    args = lab.make_parser(__doc__, steps=120).parse_args()

    def one(name, seed):
        rows = lab.train(args, f"out/lora/{seed}/{name}", firsts[seed], f"--seed={seed}", *VARIANTS[name], threads=1)
        return dict(accuracy=rows[-1]["accuracy"], kl=rows[-1]["kl"],
                    curve=[round(accuracy, 4) for accuracy in lab.accuracies(rows)])

    seeds = range(args.seeds)
    firsts = lab.side_by_side(
        args, [lambda s=seed: lab.stage1(args, f"out/lora/{s}", f"--seed={s}", threads=1) for seed in seeds])
    tries = [(name, seed) for name in VARIANTS for seed in seeds]
    found = iter(lab.side_by_side(args, [lambda t=t: one(*t) for t in tries]))
    runs = {name: [next(found) for _ in seeds] for name in VARIANTS}
    means = {name: lab.over_seeds(some) for name, some in runs.items()}
    lab.save("lora", seeds=args.seeds, steps=args.steps, mean_and_deviation=means, runs=runs)
    for name, numbers in means.items():
        print(f"{name:18s}" + ", ".join(f"{key} {lab.pm(pair)}" for key, pair in numbers.items()))


if __name__ == "__main__":
    main()
