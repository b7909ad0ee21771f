"""PPO, GRPO and REBEL against the papers' formulas, by hand and by autograd; and in train.py's own loop."""

import math
import sys
from itertools import product

import numpy as np
import pytest
import torch

import test_apo
import train
from experiments import baselines
from experiments.baselines import ALGORITHMS, GRPO, PPO, REBEL
from test_apo import (
    close,
    compare_with_autograd,
    inside,
    learns,
    long,
    metrics,
    refused,
    small_model,
    some_args,
    stage2,
    torchrun,
    weights,
    whole,
)

all_rows, trained = test_apo.all_rows, test_apo.trained  # fixtures


def baseline(name, rows, out, *more):
    return ["-m", "experiments.baselines", name, *stage2(rows, out, *more)[1:]]


# ------------------------------------------------------------------------------------------------------------
# the losses, by hand


def test_rebel_by_hand():
    # two answers, one right: log-ratios 0.3 and −0.1 over η = 2 make 0.2, the rewards differ by 1: (0.2 − 1)²
    logp, old_logp = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.3, -1.9]])
    loss = baselines.rebel_loss(logp, old_logp, torch.tensor([[1.0, 0.0]]), 2.0)
    assert loss.tolist() == pytest.approx([0.64])


def test_grpo_by_hand():
    # one right of four: mean 1/4, deviation (n − 1) 1/2 → advantages 3/2 and −1/2
    group = torch.tensor([[1.0, 0, 0, 0]])
    assert baselines.group_advantage(group)[0].tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], rel=1e-5)
    assert baselines.group_advantage(group, divide=False)[0].tolist() == [0.75, -0.25, -0.25, -0.25]
    # two tokens: ratio 1 (gain 3/2) and ratio 2, clipped to 1.2 (gain 1.8); a third column is no token
    # π_ref gives the second half as much as π: its KL estimate is 1/2 + ln 2 − 1
    logp, old = torch.tensor([[-1.0, math.log(0.5), -9.0]]), torch.tensor([[-1.0, math.log(0.25), 0.0]])
    known = logp, old, old, torch.tensor([1.5]), torch.tensor([[True, True, False]]), 0.1, 0.2
    expected = -(1.5 + 1.8) + 0.1 * (0.5 + math.log(2) - 1)
    assert baselines.grpo_loss(*known).item() == pytest.approx(expected / 2)
    assert baselines.grpo_loss(*known, length=10).item() == pytest.approx(expected / 10)
    # a worse answer whose ratio has grown is not spared: the minimum takes the unclipped
    worse = baselines.clipped(torch.tensor(math.log(2)), torch.tensor(0.0), torch.tensor(-1.0), 0.2)
    assert worse.item() == pytest.approx(2)


@pytest.mark.parametrize("r", [0.0, 1.0])
def test_a_group_of_equals_teaches_nothing(r):
    logp = torch.full((8, 3), -1.0, requires_grad=True)
    advantage = baselines.group_advantage(torch.full((1, 8), r)).flatten()
    loss = baselines.grpo_loss(logp, logp.detach(), logp.detach(), advantage, torch.ones(8, 3), 0.1, 0.2)
    loss.sum().backward()
    assert not advantage.any() and not logp.grad.any()


@pytest.mark.parametrize("critic_lr,lr,expected", [(None, 3e-4, 3e-3), (1e-5, 3e-4, 1e-5), (None, None, 1e-5)])
def test_the_critic_is_ten_times_as_fast(critic_lr, lr, expected):
    (_, found), = PPO(some_args(critic_lr=critic_lr, lr=lr)).networks(lambda kind: None)
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("gamma,lam", product((1.0, 0.9), (1.0, 0.7, 0.0)))
def test_gae_against_the_double_sum(gamma, lam):
    """The λ-weighted mean of the k-step estimates, the last of which takes all that is left; rows of unlike length."""
    reward, value = np.random.default_rng(0).normal(size=(2, 3, 6))
    lengths = (6, 4, 1)
    for row, length in enumerate(lengths):
        reward[row, length:] = value[row, length:] = 0
    found = baselines.gae(torch.tensor(reward), torch.tensor(value), gamma, lam).numpy()
    for r, v, advantage, length in zip(reward, [[*row, 0.0] for row in value], found, lengths):
        for t in range(length):
            expected = 0.0
            for k in range(1, length - t + 1):
                estimate = sum(gamma**j * r[t + j] for j in range(k)) + gamma**k * v[t + k] - v[t]
                expected += estimate * lam ** (k - 1) * (1 - lam if t + k < length else 1)
            assert advantage[t] == pytest.approx(expected)


def test_gae_and_value_loss_by_hand():
    # γ = λ = 1, reward 1 at the end, values 0.2 and 0.6: 0.8 and 0.4
    advantage = baselines.gae(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.2, 0.6]]), 1.0, 1.0)
    assert advantage[0].tolist() == pytest.approx([0.8, 0.4])
    # from 0 to 0.9 with a clip of 0.5, the return is 1: ½ max(0.1², 0.5²); where it moved less, the plain square
    loss = baselines.value_loss(torch.tensor([0.9, 0.3]), torch.zeros(2), torch.ones(2), 0.5)
    assert loss.tolist() == pytest.approx([0.125, 0.245])


# ------------------------------------------------------------------------------------------------------------
# the losses again, token by token as the papers write them; → (policy's, critic's)


def clip(x, around, by):
    return min(max(x, around - by), around + by)


def surrogate(args, logp, old_logp, advantage):
    ratio = (logp - old_logp).exp()
    return -min(ratio * advantage, clip(ratio, 1, args.clip_ratio) * advantage)


def naive_rebel(args, samples, known):
    log_ratio = [(new - old).sum() for new, old in zip(known.logp, known.old_logp)]
    gain = [sample.reward - args.beta2 * (old - ref).sum()
            for sample, old, ref in zip(samples, known.old_logp, known.ref_logp)]
    losses = [((log_ratio[i] - log_ratio[i + 1]) / args.eta - (gain[i] - gain[i + 1])) ** 2
              for i in range(0, len(samples), 2)]
    return sum(losses) / len(losses), torch.tensor(0.0)


def naive_grpo(args, samples, known):
    loss = 0.0
    rewards = np.array([sample.reward for sample in samples]).reshape(-1, args.group)
    advantages = rewards - rewards.mean(1, keepdims=True)
    if not args.dr_grpo:
        advantages /= rewards.std(1, ddof=1, keepdims=True) + 1e-6
    for a, *answer in zip(advantages.flat, known.logp, known.old_logp, known.ref_logp):
        length = args.max_new_tokens if args.dr_grpo else len(answer[0])
        for new, old, ref in zip(*answer):
            kl = (ref - new).exp() - (ref - new) - 1
            loss += (surrogate(args, new, old, a) + args.beta2 * kl) / length / len(samples)
    return loss, torch.tensor(0.0)


def naive_ppo(args, samples, known):
    loss, critic_loss, tokens, advantages = 0.0, 0.0, sum(len(s.completion.tokens) for s in samples), []
    for sample, old_logp, ref_logp, old_value in zip(samples, known.old_logp, known.ref_logp, known.old_value):
        gains = (-args.beta2 * (old_logp - ref_logp)).tolist()
        gains[-1] += sample.reward
        v = [*old_value.tolist(), 0.0]
        delta = [gain + args.gamma * v[t + 1] - v[t] for t, gain in enumerate(gains)]
        advantages.append([sum((args.gamma * args.lam) ** k * d for k, d in enumerate(delta[t:]))
                           for t in range(len(delta))])
    every = np.concatenate(advantages)
    for per_token in zip(known.logp, known.old_logp, known.value, known.old_value, advantages):
        for new, old, v, old_v, a in zip(*per_token):
            loss += surrogate(args, new, old, (a - every.mean()) / math.sqrt(every.var() + 1e-8)) / tokens
            target = a + old_v
            worst = max((v - target) ** 2, (clip(v, old_v, args.value_clip) - target) ** 2)
            critic_loss = critic_loss + worst / 2 / tokens
    return loss, critic_loss


def make_critic(kind, recompute, seed):
    critic = baselines.Critic(small_model(kind=kind, seed=seed), recompute)
    with torch.no_grad():
        critic.model.get_output_embeddings().weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    return critic


@pytest.mark.parametrize("algorithm,naive_loss,kind,temperature,recompute,dr_grpo", [
    (REBEL, naive_rebel, "Qwen2", 0.7, True, False),
    (GRPO, naive_grpo, "Qwen2", 0.7, True, False),
    (GRPO, naive_grpo, "Llama", 1.0, False, True),
    (PPO, naive_ppo, "Qwen2", 0.7, True, False),
    (PPO, naive_ppo, "GPT2", 1.0, False, False),
])
def test_update_is_naive_autograd(algorithm, naive_loss, kind, temperature, recompute, dr_grpo, monkeypatch):
    monkeypatch.setattr(train.Policy, "chunk", lambda *_: 7)
    args = some_args(group=8, eta=0.5, clip_ratio=0.2, value_clip=0.1, gamma=0.9, lam=0.8, passes=2, dr_grpo=dr_grpo,
                     temperature=temperature)
    critic = dict(make_critic=make_critic) if algorithm is PPO else {}
    compare_with_autograd(algorithm(args), naive_loss, kind, recompute, **critic)


# ------------------------------------------------------------------------------------------------------------
# in train.py's loop. 11 prompts: two ranks' shares differ

SHORT = {"grpo": ["--batch_size=11", "--group=4", "--minibatches=2"],
         "ppo": ["--batch_size=11", "--critic_lr=1e-3"],
         "rebel": ["--batch_size=11"]}


@whole
@pytest.mark.parametrize("name,lora", [
    ("grpo", []), ("ppo", ["--lora=4"]), pytest.param("ppo", [], marks=pytest.mark.long),
    pytest.param("rebel", [], marks=pytest.mark.long)])
def test_each_runs_and_resumes(name, lora, all_rows, tmp_path):
    """Four steps in one go are two and two, the critic's and the optimizer's state included."""
    command = lambda out, steps: baseline(name, all_rows, tmp_path / out, *SHORT[name], *lora, f"--steps={steps}")
    inside(*command("one", 4))
    rows = metrics(tmp_path / "one")
    assert [row["step"] for row in rows] == list(range(5))
    assert rows[1]["log_ratio_abs"] < 1e-5 < rows[2]["log_ratio_abs"]
    assert ("critic_loss" in rows[1]) == (name == "ppo")
    for steps in (2, 4):
        inside(*command("two", steps))
    assert metrics(tmp_path / "two") == rows and weights(tmp_path / "two") == weights(tmp_path / "one")
    if lora:  # a checkpoint has the policy's additions, and all of the critic
        saved = torch.distributed.checkpoint.FileSystemReader(tmp_path / "one/checkpoint/00000004").read_metadata()
        networks = [name.partition(".model.")[0] for name in saved.state_dict_metadata if "embed_tokens" in name]
        assert networks and all(network.endswith("1") for network in networks)


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
@pytest.mark.parametrize("name,steps", [("rebel", 15), ("grpo", 15), ("ppo", 25)])
def test_it_learns(name, steps, all_rows, tmp_path):
    more = ["--critic_lr=1e-3"] if name == "ppo" else []
    rows = learns(baseline(name, all_rows, tmp_path, f"--steps={steps}", *more), tmp_path)
    assert train.diagnose(rows, some_args(), ALGORITHMS[name].most_reward) == {}


@pytest.mark.parametrize("command,words", [
    ([], ["ppo|grpo|rebel"]),
    (["apo"], ["ppo|grpo|rebel"]),
    (["grpo", "--passes=0"], ["--passes", "0 is too small"]),
    (["rebel", "--group=4"], ["unrecognized arguments: --group=4"]),
    (["ppo", "--clip_ratio=0"], ["--clip_ratio", "is too small"]),
])
def test_bad_flags(command, words):
    refused(inside("-m", "experiments.baselines", *command, check=False), *words)


@whole
def test_what_would_spoil_a_run_is_refused(trained, all_rows, tmp_path):
    refused(inside(*baseline("grpo", all_rows, tmp_path / "run", "--group=1"), check=False), "--group 1", "GRPO")
    assert not (tmp_path / "run").exists()  # or the command, mended, would be refused for its other settings
    other = inside(*baseline("ppo", all_rows, trained[0]), check=False)
    refused(other, "algorithm (was apo, now ppo)", "--overwrite")


def test_a_kl_weight_of_nothing_is_allowed(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["", "--beta2=0", "--lam=0", "--gamma=0"])
    args = train.parse_args(PPO)
    assert args.beta2 == args.lam == args.gamma == 0 and PPO(args).passes == 1
