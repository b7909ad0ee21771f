"""PPO, GRPO and REBEL against the papers' formulas, by hand and by autograd; and in train.py's own loop."""

import json
import math
import shutil
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
    kill,
    learns,
    long,
    metrics,
    refused,
    run,
    run_of,
    small_model,
    some_args,
    some_samples,
    stage2,
    start,
    torchrun,
    wait_until,
    weights,
    whole,
)

all_rows, trained = test_apo.all_rows, test_apo.trained  # fixtures


def baseline(name, rows, out, *more):
    return ["-m", "experiments.baselines", name, *stage2(rows, out, *more)[1:]]


def baseline_args(**more):
    own = dict(group=8, dr_grpo=False, eta=0.5, clip_ratio=0.2, value_clip=0.1, gamma=0.9, lam=0.8)
    return some_args(**{**own, **more})


# ---------------------------------------------------------------------------------------------------------------------
# the losses, by hand


def test_rebel_by_hand():
    # two answers, one right: log-ratios 0.3 and −0.1 over η = 2 make 0.2, the rewards differ by 1: (0.2 − 1)²
    logp, old_logp = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.3, -1.9]])
    loss = baselines.rebel_loss(logp, old_logp, torch.tensor([[1.0, 0.0]]), 2.0)
    assert loss.tolist() == pytest.approx([0.64])


def test_grpo_by_hand():
    # one right of four: mean 1/4, deviation (n − 1) 1/2 → advantages 3/2 and −1/2
    advantage = baselines.group_advantage(torch.tensor([[1.0, 0, 0, 0]]))
    assert advantage[0].tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], rel=1e-5)
    undivided = baselines.group_advantage(torch.tensor([[1.0, 0, 0, 0]]), divide=False)
    assert undivided[0].tolist() == [0.75, -0.25, -0.25, -0.25]
    # two tokens: ratio 1 (gain 3/2) and ratio 2, clipped to 1.2 (gain 1.8); π_ref gives the second half as much as π:
    # its KL estimate is 1/2 + ln 2 − 1; a third column is no token
    logp, old = torch.tensor([[-1.0, math.log(0.5), -9.0]]), torch.tensor([[-1.0, math.log(0.25), 0.0]])
    ref, response = torch.tensor([[-1.0, math.log(0.25), 0.0]]), torch.tensor([[True, True, False]])
    expected = -(1.5 + 1.8) + 0.1 * (0.5 + math.log(2) - 1)
    grpo = lambda **more: baselines.grpo_loss(logp, old, ref, torch.tensor([1.5]), response, 0.1, 0.2, **more).item()
    assert grpo() == pytest.approx(expected / 2) and grpo(length=10) == pytest.approx(expected / 10)
    # a worse answer whose ratio has grown is not spared: the minimum takes the unclipped
    worse = baselines.clipped(torch.tensor(math.log(2)), torch.tensor(0.0), torch.tensor(-1.0), 0.2)
    assert worse.item() == pytest.approx(2)


def test_a_group_of_equals_teaches_nothing():
    for r in (0.0, 1.0):
        logp = torch.full((8, 3), -1.0, requires_grad=True)
        advantage = baselines.group_advantage(torch.full((1, 8), r)).flatten()
        given = logp.detach(), logp.detach(), advantage, torch.ones(8, 3)
        baselines.grpo_loss(logp, *given, 0.1, 0.2).sum().backward()
        assert torch.equal(advantage, torch.zeros(8)) and torch.equal(logp.grad, torch.zeros(8, 3))


@pytest.mark.parametrize("given,lr,rate", [(None, 3e-4, 3e-3), (1e-5, 3e-4, 1e-5), (None, None, 1e-5)])
def test_the_critic_is_ten_times_as_fast(given, lr, rate):
    (_, found), = PPO(test_apo.some_args(critic_lr=given, lr=lr)).networks(lambda kind: None)
    assert found == pytest.approx(rate)


def test_gae_against_the_double_sum():
    rng = np.random.default_rng(0)
    for gamma, lam in product((1.0, 0.9), (1.0, 0.7, 0.0)):
        reward, value = rng.normal(size=(3, 6)), rng.normal(size=(3, 6))
        for row, length in enumerate((6, 4, 1)):
            reward[row, length:] = value[row, length:] = 0
        got = baselines.gae(torch.tensor(reward), torch.tensor(value), gamma, lam).numpy()
        for row, length in enumerate((6, 4, 1)):
            v = [*value[row, :length], 0.0]
            for t in range(length):
                # λ-weighted mean of the k-step estimates, the last of which takes all that is left
                steps = [sum(gamma**j * reward[row, t + j] for j in range(k)) + gamma**k * v[t + k] - v[t]
                         for k in range(1, length - t + 1)]
                share = [(1 - lam) * lam**k for k in range(len(steps) - 1)] + [lam ** (len(steps) - 1)]
                assert got[row, t] == pytest.approx(np.dot(share, steps))
    # γ = λ = 1, reward 1 at the end, values 0.2 and 0.6: 0.8 and 0.4
    advantage = baselines.gae(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.2, 0.6]]), 1.0, 1.0)
    assert advantage[0].tolist() == pytest.approx([0.8, 0.4])


def test_value_loss_by_hand():
    # from 0 to 0.9 with a clip of 0.5, the return is 1: ½ max(0.1², 0.5²); where it moved less, the plain square
    loss = baselines.value_loss(torch.tensor([0.9, 0.3]), torch.zeros(2), torch.ones(2), 0.5)
    assert loss.tolist() == pytest.approx([0.125, 0.245])


# ---------------------------------------------------------------------------------------------------------------------
# the losses again, token by token as the papers write them; → (policy's, critic's)


def clip(x, around, by):
    return min(max(x, around - by), around + by)


def surrogate(args, logp, old_logp, advantage):
    ratio = (logp - old_logp).exp()
    return -min(ratio * advantage, clip(ratio, 1, args.clip_ratio) * advantage)


def naive_rebel(args, samples, known):
    loss, r = 0.0, [s.reward for s in samples]
    for i in range(0, len(samples), 2):
        ratio = [known.logp[j].sum() - known.old_logp[j].sum() for j in (i, i + 1)]
        gain = [r[j] - args.beta2 * (known.old_logp[j].sum() - known.ref_logp[j].sum()) for j in (i, i + 1)]
        loss += ((ratio[0] - ratio[1]) / args.eta - (gain[0] - gain[1])) ** 2 / (len(samples) / 2)
    return loss, torch.tensor(0.0)


def naive_grpo(args, samples, known):
    loss, r = 0.0, [s.reward for s in samples]
    for i in range(len(samples)):
        first = i // args.group * args.group
        group = np.array(r[first : first + args.group])
        a = r[i] - group.mean()
        a = a if args.dr_grpo else a / (group.std(ddof=1) + 1e-6)
        for new, old, ref in zip(known.logp[i], known.old_logp[i], known.ref_logp[i]):
            kl = (ref - new).exp() - (ref - new) - 1
            length = args.max_new_tokens if args.dr_grpo else len(known.logp[i])
            loss += (surrogate(args, new, old, a) + args.beta2 * kl) / length / len(samples)
    return loss, torch.tensor(0.0)


def naive_ppo(args, samples, known):
    loss, critic_loss, tokens, advantages = 0.0, 0.0, sum(len(s.completion.tokens) for s in samples), []
    for sample, old_logp, ref_logp, old_value in zip(samples, known.old_logp, known.ref_logp, known.old_value):
        gains = [(-args.beta2 * (old - ref)).item() for old, ref in zip(old_logp, ref_logp)]
        gains[-1] += sample.reward
        v = [*old_value.tolist(), 0.0]
        delta = [gains[t] + args.gamma * v[t + 1] - v[t] for t in range(len(gains))]
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
    objective = algorithm(baseline_args(temperature=temperature, passes=2, dr_grpo=dr_grpo))
    critic = dict(make_critic=make_critic) if algorithm is PPO else {}
    compare_with_autograd(objective, naive_loss, kind, recompute, **critic)


def test_without_passes_the_old_policy_costs_nothing(monkeypatch):
    """GRPO and REBEL with one step a batch ask only π_ref for log-probabilities before the update, as A*-PO does."""
    asked = []
    for module in (train, baselines):
        monkeypatch.setattr(module, "by_token", lambda model, *_: asked.append(model) or torch.zeros(24, 30))
    for algorithm, passes, models in ((GRPO, 1, ["ref"]), (REBEL, 1, ["ref"]), (PPO, 1, ["ref", "policy", "critic"]),
                                      (GRPO, 2, ["ref", "policy"]), (REBEL, 2, ["ref", "policy"])):
        objective = algorithm(baseline_args(passes=passes))
        objective.critic = "critic"
        objective.given(run_of(objective, "policy", "ref"), some_samples(24))
        assert asked == models
        asked.clear()


# ---------------------------------------------------------------------------------------------------------------------
# in train.py's loop


SHORT = {"rebel": [], "grpo": ["--group=4", "--minibatches=2"], "ppo": ["--critic_lr=1e-3"]}


@whole
@pytest.mark.parametrize("name", ["grpo", "ppo", pytest.param("rebel", marks=pytest.mark.long)])
def test_each_runs_and_goes_on(name, all_rows, tmp_path):
    """Four steps in one go are two and two, the critic's and the optimizer's state included."""
    more = [*SHORT[name], "--batch_size=11"]
    inside(*baseline(name, all_rows, tmp_path / "one", *more, "--steps=4"))
    rows = metrics(tmp_path / "one")
    assert [row["step"] for row in rows] == list(range(5))
    assert rows[1]["log_ratio_abs"] < 1e-5 < 1e-3 < rows[2]["log_ratio_abs"]
    assert ("critic_loss" in rows[1]) == (name == "ppo")
    settings = json.loads((tmp_path / "one/config.json").read_text())["settings"]
    assert settings["algorithm"] == name
    for steps in (2, 4):
        inside(*baseline(name, all_rows, tmp_path / "two", *more, f"--steps={steps}"))
    assert metrics(tmp_path / "two") == rows and weights(tmp_path / "two") == weights(tmp_path / "one")


@long
def test_lora_trains_the_critic_whole(all_rows, tmp_path):
    """Four steps in one go are two and two; checkpoints hold the policy's additions, and all of the critic."""
    command = lambda folder, steps: baseline("ppo", all_rows, tmp_path / folder, "--critic_lr=1e-3", "--lora=4",
                                             "--batch_size=11", f"--steps={steps}")
    inside(*command("one", 4))
    for steps in (2, 4):
        inside(*command("two", steps))
    assert metrics(tmp_path / "two") == metrics(tmp_path / "one")
    assert weights(tmp_path / "two") == weights(tmp_path / "one")
    saved = torch.distributed.checkpoint.FileSystemReader(tmp_path / "one/checkpoint/00000004").read_metadata()
    for network, embedded in ((0, False), (1, True)):
        assert any(f"{network}.model.model.embed_tokens" in name for name in saved.state_dict_metadata) == embedded


@long
@pytest.mark.parametrize("name", SHORT)
def test_restart_and_shard(name, all_rows, tmp_path):
    """Killed and restarted to the bit, two ranks like one, and a checkpoint of one goes on on two: the critic too."""
    command = lambda folder: baseline(name, all_rows, tmp_path / folder, *SHORT[name], "--steps=4", "--batch_size=11")
    run(*command("one"))  # 11 prompts: the two ranks' shares differ
    process = start(*command("two"))
    wait_until(lambda: (tmp_path / "two/checkpoint/00000002").exists(), process)
    kill(process)
    assert not (tmp_path / "two/checkpoint/00000004").exists()
    shutil.copytree(tmp_path / "two", tmp_path / "three")
    run(*command("two"))
    assert metrics(tmp_path / "one") == metrics(tmp_path / "two")
    assert weights(tmp_path / "one") == weights(tmp_path / "two")
    torchrun(2, *command("three"))
    close(metrics(tmp_path / "one"), metrics(tmp_path / "three"))
    torchrun(2, *command("four"))
    close(metrics(tmp_path / "one"), metrics(tmp_path / "four"))


@long
@pytest.mark.parametrize("name,steps", [("rebel", 15), ("grpo", 15), ("ppo", 25)])
def test_it_learns(name, steps, all_rows, tmp_path):
    more = ["--critic_lr=1e-3"] if name == "ppo" else []
    rows = learns(baseline(name, all_rows, tmp_path, f"--steps={steps}", *more), tmp_path)
    assert train.diagnose(rows, some_args(), ALGORITHMS[name].most_reward) == {}


@pytest.mark.parametrize("command,words", [
    ([], ["ppo|grpo|rebel"]),
    (["apo"], ["ppo|grpo|rebel"]),
    (["--lr=1"], ["ppo|grpo|rebel"]),
    (["grpo", "--passes=0"], ["--passes", "0 is too small"]),
    (["rebel", "--group=4"], ["unrecognized arguments: --group=4"]),
    (["ppo", "--algo=grpo"], ["unrecognized arguments: --algo=grpo"]),
    (["ppo", "--clip_ratio=0"], ["--clip_ratio", "is too small"]),
])
def test_bad_flags(command, words):
    refused(inside("-m", "experiments.baselines", *command, check=False), *words)


@whole
def test_a_group_of_one_is_refused(all_rows, tmp_path):
    refused(inside(*baseline("grpo", all_rows, tmp_path / "run", "--group=1"), check=False), "--group 1", "GRPO")
    assert not (tmp_path / "run").exists()  # or the command, mended, would be refused for its other settings


@whole
def test_another_algorithm_in_the_same_folder_is_refused(trained, all_rows):
    refused(inside(*baseline("ppo", all_rows, trained[0]), check=False), "algorithm (was apo, now ppo)", "--overwrite")


def test_a_kl_weight_of_nothing_is_allowed(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["", "--beta2=0", "--lam=0", "--gamma=0"])
    args = train.parse_args(PPO)
    assert args.beta2 == args.lam == args.gamma == 0 and PPO(args).passes == 1
