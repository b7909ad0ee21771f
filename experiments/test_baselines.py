"""The baselines against the papers' formulas, by hand and by autograd; and in train.py's own loop."""

import math
import sys

import numpy as np
import pytest
import torch
from torch import tensor

import train
from experiments import baselines
from experiments.baselines import ALGORITHMS, GRPO, OAPL, PPO, REBEL, Constant
from test_apo import compare_with_autograd
from tests.helpers import (
    close,
    inside,
    learns,
    long,
    metrics,
    refused,
    run_of,
    small_model,
    some_args,
    some_samples,
    stage2,
    torchrun,
    weights,
    whole,
)
from vstar import batched, read_flags


def baseline(name, rows, out, *more):
    return ["-m", "experiments.baselines", name, *stage2(rows, out, *more)[1:]]


# ------------------------------------------------------------------------------------------------------------
# the losses, by hand


def test_rebel_by_hand():
    # log-ratios of 0.3 and −0.1, over η = 2, differ by 0.2; the rewards differ by 1: (0.2 − 1)²
    logp, old_logp = tensor([[-1.0, -2.0]]), tensor([[-1.3, -1.9]])
    loss = baselines.rebel_loss(logp, old_logp, tensor([[1.0, 0.0]]), 2.0)
    assert loss.tolist() == pytest.approx([0.64])


def test_a_group_compares_its_completions():
    # one right of four: mean 1/4, deviation (n − 1) 1/2 → advantages 3/2 and −1/2
    advantage = baselines.group_advantage(tensor([[1.0, 0, 0, 0]]))
    assert advantage[0].tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], rel=1e-5)
    # equals teach nothing
    assert not baselines.group_advantage(torch.ones(1, 8)).any()


@pytest.mark.parametrize("critic_lr,expected", [(None, 3e-3), (1e-5, 1e-5)])
def test_the_critic_is_ten_times_as_fast(critic_lr, expected):
    ppo = PPO(some_args(critic_lr=critic_lr, lr=3e-4))
    ((_, lr),) = ppo.networks(lambda kind: None)
    assert lr == pytest.approx(expected)


def test_gae_and_value_loss_by_hand():
    # γ = λ = 1, reward 1 at the end, values 0.2 and 0.6: 0.8 and 0.4
    advantage = baselines.gae(tensor([[0.0, 1.0]]), tensor([[0.2, 0.6]]), 1.0, 1.0)
    assert advantage[0].tolist() == pytest.approx([0.8, 0.4])
    # from 0 to 0.9 with a clip of 0.5, the return is 1: ½ max(0.1², 0.5²); which moved less, the plain square
    loss = baselines.value_loss(tensor([0.9, 0.3]), torch.zeros(2), torch.ones(2), 0.5)
    assert loss.tolist() == pytest.approx([0.125, 0.245])


@pytest.mark.parametrize("constant,where,expected", [
    (None, "all", [0.25, 0.25, 0.25, 0.25]),  # one right of four
    (None, "solved", [0.25, 0.25, 0, 0]),
    (None, "unsolved", [0.9, 0.6, 0.25, 0.25]),
    (0.5, "all", [0.5, 0.5, 0.5, 0.5]),
    (0.0, "all", [0, 0, 0, 0]),
])
def test_a_constant_stands_where_it_is_said(constant, where, expected):
    samples = some_samples(4)
    stored = [([1.0, 1.0], 0.9), ([0.0, 1.0], 0.6), ([0.0, 0.0], 0.0), ([0.0, 0.0], 0.0)]
    for i, (sample, (rewards, vstar)) in enumerate(zip(samples, stored)):
        sample.problem.update(rewards=rewards, vstar=vstar)
        samples[i] = sample._replace(reward=float(i == 3))
    objective = Constant(some_args(constant=constant, where=where))
    reference = train.Policy(small_model())
    constants = objective.constants(run_of(objective, None, reference), samples)
    vstar, logged = constants["vstar"], train.batch_metrics(samples, constants)
    assert logged["advantage"] == pytest.approx(logged["reward"] - vstar.mean().item(), abs=1e-6)
    assert vstar.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("beta1,vstar", [(0.5, 0.716890), (math.inf, 0.5)])
def test_oapl_knows_its_own_group(beta1, vstar):
    """One right of two: ½ ln((1 + e²)/2) = 0.717, or the mean. Of none right it is 0, of all right 1."""
    rewards = [1.0, 0, 0, 0, 1, 1]
    samples = [sample._replace(reward=reward) for sample, reward in zip(some_samples(6), rewards)]
    objective = OAPL(some_args(group=2, beta1=beta1))
    reference = train.Policy(small_model())
    constants = objective.constants(run_of(objective, None, reference), samples)
    assert constants["vstar"].tolist() == pytest.approx([vstar, vstar, 0, 0, 1, 1], abs=1e-6)
    assert "old_logp" not in constants  # with one update a batch it is ln π itself


# ------------------------------------------------------------------------------------------------------------
# the losses again, token by token as the papers write them; → (policy's, critic's)


def clip(x, around, by):
    return min(max(x, around - by), around + by)


def surrogate(args, logp, old_logp, advantage):
    ratio = (logp - old_logp).exp()
    return -min(ratio * advantage, clip(ratio, 1, args.clip_ratio) * advantage)


def naive_rebel(args, samples, known):
    """Log-ratio over η minus gain, of each of the two completions by itself."""
    off = []
    for i, sample in enumerate(samples):
        new, old, ref = known.logp[i], known.old_logp[i], known.ref_logp[i]
        gain = sample.reward - args.beta2 * (old - ref).sum()
        off.append((new - old).sum() / args.eta - gain)
    losses = [(one - other) ** 2 for one, other in batched(off, 2)]
    return sum(losses) / len(losses), tensor(0.0)


def naive_grpo(args, samples, known):
    loss = 0.0
    for i, sample in enumerate(samples):
        first = i - i % args.group
        rewards = [other.reward for other in samples[first : first + args.group]]
        advantage = sample.reward - np.mean(rewards)
        length = len(known.logp[i])
        if args.dr_grpo:
            length = args.max_new_tokens
        else:
            advantage /= np.std(rewards, ddof=1) + 1e-6
        for new, old, ref in zip(known.logp[i], known.old_logp[i], known.ref_logp[i]):
            kl = (ref - new).exp() - (ref - new) - 1
            loss += (surrogate(args, new, old, advantage) + args.beta2 * kl) / length
    return loss / len(samples), tensor(0.0)


def naive_ppo(args, samples, known):
    advantages = []
    for i, sample in enumerate(samples):
        rewards = -args.beta2 * (known.old_logp[i] - known.ref_logp[i])
        rewards[-1] += sample.reward
        value = [*known.old_value[i].tolist(), 0.0]
        deltas = []
        for t, reward in enumerate(rewards.tolist()):
            deltas.append(reward + args.gamma * value[t + 1] - value[t])
        decay = (args.gamma * args.lam) ** np.arange(len(deltas))
        advantages.append([decay[: len(deltas) - t] @ deltas[t:] for t in range(len(deltas))])
    every = np.concatenate(advantages)
    loss, critic_loss = 0.0, 0.0
    for per_token in zip(known.logp, known.old_logp, known.value, known.old_value, advantages):
        for new, old, value, old_value, advantage in zip(*per_token):
            whitened = (advantage - every.mean()) / math.sqrt(every.var() + 1e-8)
            loss += surrogate(args, new, old, whitened)
            returns = advantage + old_value
            near = clip(value, old_value, args.value_clip)
            critic_loss += max((value - returns) ** 2, (near - returns) ** 2) / 2
    return loss / len(every), critic_loss / len(every)


def naive_oapl(args, samples, known):
    loss = 0.0
    for i, sample in enumerate(samples):
        first = i - i % args.group
        rewards = [other.reward for other in samples[first : first + args.group]]
        vstar = args.beta1 * math.log(np.mean([math.exp(reward / args.beta1) for reward in rewards]))
        log_ratio = (known.logp[i] - known.old_logp[i]).sum()
        loss += (args.beta2 * log_ratio - (sample.reward - vstar)) ** 2
    return loss / len(samples), tensor(0.0)


def naive_constant(args, samples, known):
    mean = np.mean([sample.reward for sample in samples])
    loss = 0.0
    for sample, logp, ref_logp in zip(samples, known.logp, known.ref_logp):
        loss += (args.beta2 * (logp - ref_logp).sum() - (sample.reward - mean)) ** 2
    return loss / len(samples), tensor(0.0)


def make_critic(kind, recompute, seed):
    critic = baselines.Critic(small_model(kind=kind, seed=seed), recompute)
    head = critic.model.get_output_embeddings().weight.data
    head.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    return critic


@pytest.mark.parametrize("algorithm,naive_loss,kind,temperature,recompute,dr_grpo", [
    (REBEL, naive_rebel, "Qwen2", 0.7, True, False),
    (GRPO, naive_grpo, "Qwen2", 0.7, True, False),
    (GRPO, naive_grpo, "Llama", 1.0, False, True),
    (PPO, naive_ppo, "Qwen2", 0.7, True, False),
    (PPO, naive_ppo, "GPT2", 1.0, False, False),
    (OAPL, naive_oapl, "Qwen2", 0.7, True, False),
    (Constant, naive_constant, "Qwen2", 0.7, True, False),
])
def test_update_is_naive_autograd(algorithm, naive_loss, kind, temperature, recompute, dr_grpo, monkeypatch):
    monkeypatch.setattr(train.Policy, "chunk", lambda *_: 7)
    args = some_args(group=8, eta=0.5, passes=2, dr_grpo=dr_grpo, temperature=temperature)
    vars(args).update(clip_ratio=0.2, value_clip=0.1, gamma=0.9, lam=0.8)
    vars(args).update(beta1=0.5, constant=None, where="all")
    critic = make_critic if algorithm is PPO else None
    compare_with_autograd(algorithm(args), naive_loss, kind, recompute, critic)


# ------------------------------------------------------------------------------------------------------------
# in train.py's loop. 11 prompts: two ranks' shares differ

SHORT = {"grpo": ["--batch_size=11", "--group=4", "--minibatches=2"],
         "ppo": ["--batch_size=11", "--critic_lr=1e-3"],
         "rebel": ["--batch_size=11"],
         "oapl": ["--batch_size=11", "--group=4", "--minibatches=2"],
         "constant": ["--batch_size=25"]}


@whole
@pytest.mark.parametrize("name,lora", [
    ("grpo", []),
    ("ppo", ["--lora=4"]),
    pytest.param("ppo", [], marks=pytest.mark.long),
    pytest.param("rebel", [], marks=pytest.mark.long),
    pytest.param("oapl", [], marks=pytest.mark.long),
    pytest.param("constant", [], marks=pytest.mark.long),
])
def test_each_runs_and_resumes(name, lora, all_rows, tmp_path):
    """Four steps in one go are two and two, the critic's and the optimizer's state included."""
    more = [*SHORT[name], *lora]
    command = lambda out, steps: baseline(name, all_rows, tmp_path / out, *more, f"--steps={steps}")
    inside(*command("one", 4))
    rows = metrics(tmp_path / "one")
    assert [row["step"] for row in rows] == list(range(5))
    assert rows[1]["log_ratio_abs"] < 1e-5 < rows[2]["log_ratio_abs"]
    assert ("advantage" in rows[1]) == (name in ("oapl", "constant"))  # theirs is reward − V̂*
    for steps in (2, 4):
        inside(*command("two", steps))
    assert metrics(tmp_path / "two") == rows and weights(tmp_path / "two") == weights(tmp_path / "one")


@long
@pytest.mark.parametrize("name", SHORT)
def test_two_ranks_are_like_one(name, all_rows, tmp_path):
    """From the start, and from one's checkpoint: the critic's too."""
    command = lambda out, steps: baseline(name, all_rows, tmp_path / out, *SHORT[name], f"--steps={steps}")
    inside(*command("one", 4))
    inside(*command("on two", 2))
    for out in ("two", "on two"):
        torchrun(2, *command(out, 4))
        close(metrics(tmp_path / "one"), metrics(tmp_path / out))


@long
@pytest.mark.parametrize("name,more", [
    ("rebel", ["--steps=15"]),
    ("grpo", ["--steps=15"]),
    ("ppo", ["--steps=25", "--critic_lr=1e-3"]),
    ("oapl", ["--steps=15"]),
    ("constant", ["--steps=25"]),
])
def test_it_learns(name, more, all_rows, tmp_path):
    rows = learns(baseline(name, all_rows, tmp_path, *more), tmp_path)
    assert train.diagnose(rows, some_args(), ALGORITHMS[name].most_reward) == {}


@pytest.mark.parametrize("command,words", [
    ([], ["ppo|grpo|rebel|oapl|constant"]),
    (["grpo", "--passes=0"], ["--passes", "0 is too small"]),
    (["rebel", "--group=4"], ["unrecognized arguments: --group=4"]),
    (["ppo", "--clip_ratio=0"], ["--clip_ratio", "is too small"]),
])
def test_bad_flags(command, words):
    refused(inside("-m", "experiments.baselines", *command, check=False), *words)


@whole
def test_what_would_spoil_a_run_is_refused(trained, all_rows, tmp_path):
    alone = baseline("grpo", all_rows, tmp_path / "run", "--group=1")
    refused(inside(*alone, check=False), "--group 1", "GRPO")
    assert not (tmp_path / "run").exists()  # or the command, mended, would be refused for its other settings
    other = inside(*baseline("ppo", all_rows, trained[0]), check=False)
    refused(other, "algorithm (was apo, now ppo)", "--overwrite")


def test_a_kl_weight_of_nothing_is_allowed(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["", "--beta2=0", "--lam=0", "--gamma=0"])
    args = read_flags(train.make_parser(PPO), "train")
    assert args.beta2 == args.lam == args.gamma == 0 and PPO(args).passes == 1
