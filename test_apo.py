"""The story: what the README and the paper claim, each claim a test, in the order of the README's 'Read it'.

    pytest                      this, tests/ and experiments/; about three minutes on two cores
    pytest -m "not whole"       while one edits: starts no process and runs no stage; half a minute
    pytest -m long              the rest: more ranks and nodes, kills at random, long runs (LONG=1: longer)

It begins with the naive version: all of A*-PO in twenty lines, for who wants to see it without
micro-batches, shards and checkpoints. What train.py does instead is then compared with it, to the last
digits of fp32.
"""

import json
import math
import os
import random
import re
import signal
import subprocess
import time
from itertools import combinations, product
from types import SimpleNamespace
from unittest import mock

import mpmath
import numpy as np
import pytest
import torch
import transformers

import evaluate
import rewards
import train
import vstar
from tests.helpers import (
    HERE,
    adapted,
    close,
    copy_rows,
    ends_in_one_line,
    evaluation,
    full_disk,
    inside,
    kill,
    learns,
    long,
    long_value,
    metrics,
    read_jsonl,
    refused,
    run_of,
    sampler_of,
    settings_in,
    sgd,
    small_model,
    some_args,
    some_samples,
    stage1,
    stage2,
    start,
    tiny_model,
    tiny_tokenizer,
    torchrun,
    wait_until,
    weights,
    whole,
)
from vstar import Completion, estimate_vstar, pass_at_k, prompt_seed

# ---------------------------------------------------------------------------------------------------------
# the naive version: a sequence at a time, without a thought of memory


def naive_logits(model, prompt, tokens):
    """(tokens, vocabulary). Prompt [5 6 7], completion [8 9]: the logits at 7 and 8, which predict 8 and
    9."""
    return model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]


def naive_logps(model, prompt, tokens, temperature=1.0):
    """(tokens,): ln π of each token of the completion, its EOS included."""
    logps = (naive_logits(model, prompt, tokens) / temperature).log_softmax(-1)
    return logps.gather(-1, torch.tensor(tokens)[:, None])[:, 0]


def naive_apo(args, samples, known):
    """The mean over sequences of ( β2 ln π/π_ref − (r − V̂*) )². → (the policy's loss, a critic's)"""
    loss = 0.0
    for sample, logp, ref_logp in zip(samples, known.logp, known.ref_logp):
        log_ratio = logp.sum() - ref_logp.sum()
        advantage = sample.reward - sample.problem["vstar"]
        loss += (args.beta2 * log_ratio - advantage) ** 2
    return loss / len(samples), torch.tensor(0.0)


# ---------------------------------------------------------------------------------------------------------
# why it is a regression


def test_loss_is_zero_at_the_optimum():
    """β ln π*(y)/π_ref(y) = r(y) − V* for every y: with V* = β ln E_ref exp(r/β), π* ∝ π_ref exp(r/β) solves
    the regression exactly, answer by answer."""
    beta2, r = 0.5, torch.tensor([1.0, 0.0, 0.0, 1.0])
    ref_logp = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    best = (beta2 * torch.logsumexp(ref_logp + r / beta2, 0)).item()
    logp = ref_logp + (r - best) / beta2
    assert logp.exp().sum() == pytest.approx(1)  # it is a distribution: V* is what normalises it
    assert train.apo_loss(logp, ref_logp, r, best, beta2).max() < 1e-12
    value = (logp.exp() * (r - beta2 * (logp - ref_logp))).sum()
    assert value.item() == pytest.approx(best)  # and what it attains


@pytest.mark.parametrize("vstar_value", [0.0, 0.3, 7.0])
def test_gradient_is_that_of_reward_minus_kl(vstar_value):
    """On-policy, E[∇ℓ] = −2 β2 ∇( E_π[r] − β2 KL(π‖π_ref) ), whatever V̂* is: exact on a softmax over seven
    answers."""
    torch.manual_seed(0)
    beta2, theta = 0.3, torch.randn(7, dtype=torch.double, requires_grad=True)
    ref_logp = torch.randn(7, dtype=torch.double).log_softmax(0)
    r = torch.tensor([1.0, 0, 0, 1, 0, 1, 0], dtype=torch.double)
    logp = theta.log_softmax(0)
    losses = train.apo_loss(logp, ref_logp, r, vstar_value, beta2)
    ours = (logp.exp().detach() * losses).sum()
    objective = (logp.exp() * (r - beta2 * (logp - ref_logp))).sum()
    (gradient,) = torch.autograd.grad(ours, theta, retain_graph=True)
    (expected,) = torch.autograd.grad(-2 * beta2 * objective, theta)
    torch.testing.assert_close(gradient, expected)
    assert gradient.abs().max() > 0.01


def test_apo_loss_by_hand():
    logp = torch.tensor([-3.0, -1.0])
    ref_logp = torch.tensor([-5.0, -1.0])
    loss = train.apo_loss(logp, ref_logp, torch.tensor([1.0, 0.0]),
                          torch.tensor([0.25, 0.5]), beta2=0.1)
    torch.testing.assert_close(loss, torch.tensor([(0.2 - 0.75) ** 2, 0.25]))


# ---------------------------------------------------------------------------------------------------------
# V̂*


def test_vstar_by_hand():
    # 3 of 8 right at β1 = 1/2:  ½ ln( (5 + 3 e²) / 8 )
    by_hand = 0.5 * math.log((5 + 3 * math.e**2) / 8)
    assert by_hand == pytest.approx(0.61, abs=0.005)
    three_of_eight = [1, 0, 0, 1, 0, 0, 1, 0]
    assert estimate_vstar(three_of_eight, 0.5) == pytest.approx(by_hand)
    assert estimate_vstar(three_of_eight, math.inf) == 3 / 8
    assert estimate_vstar([0, 0, 0, 0], 0.5) == 0
    assert estimate_vstar([1, 1], 0.5) == 1
    assert estimate_vstar(np.ones((5, 7, 3)), 0.5).shape == (5, 7)


@pytest.mark.parametrize("beta1", [1e-6, 1e-3, 0.1, 0.5, 1.0, 1e3, 1e6, 1e12])
@pytest.mark.parametrize("n", [1, 2, 3, 8, 64])
def test_vstar_against_high_precision(beta1, n):
    """From the best of the N (β1 → 0) to their mean (β1 → ∞)."""
    rng = np.random.default_rng(n)
    for values in (rng.integers(0, 2, n).astype(float),
                   rng.normal(0, 3, n), rng.normal(-50, 1e-3, n)):
        with mpmath.workdps(60):
            # the formula as it stands; the shift only because exp(1e6) has too many digits even for mpmath
            shift = mpmath.mpf(max(values))
            total = mpmath.fsum(mpmath.exp((mpmath.mpf(v) - shift) / mpmath.mpf(beta1))
                                for v in values)
            exact = float(shift + mpmath.mpf(beta1) * mpmath.log(total / n))
        assert estimate_vstar(values, beta1) == pytest.approx(exact, rel=1e-12, abs=1e-12)


def test_between_prompts_is_what_vstar_can_know():
    """Prompts that are solved with chance 0.2 or 0.8: 0.09 of the variance 0.25 lies between them."""
    rng, chance = np.random.default_rng(0), np.repeat([0.2, 0.8], 20_000)[:, None]
    for n in (2, 8):
        share = vstar.between_prompts((rng.random((40_000, n)) < chance) * 1.0)
        assert share == pytest.approx(0.36, abs=0.02)  # for any N
    assert vstar.between_prompts(np.array([[1.0, 1.0], [0.0, 0.0]])) == 1
    assert vstar.between_prompts(np.array([[1.0, 0.0], [0.0, 1.0]])) == 0


def test_pass_at_k_counts_subsets():
    for row in product([0, 1], repeat=5):
        for k in range(1, 6):
            best = [max(subset) for subset in combinations(row, k)]
            assert pass_at_k(row, k) == pytest.approx(np.mean(best))


# ---------------------------------------------------------------------------------------------------------
# one update is the naive version's


def compare_with_autograd(objective, naive_loss, kind, recompute, make_critic=None):
    """`update`, with its chunked head, recomputation, packing and any budget of tokens, takes the step of one
    undivided batch. The policy is not the one that wrote the completions, so that ratios are clipped."""
    args, samples = objective.args, some_samples(24)
    naive, old, reference = (small_model(kind=kind, seed=seed) for seed in range(3))
    for parameter, near in zip(old.parameters(), naive.parameters()):
        parameter.data.lerp_(near.data, 0.8)  # near, so that some ratios are clipped and some not
    critic, old_critic = (make_critic(kind, recompute, seed) if make_critic else None for seed in (3, 4))
    texts = [(sample.problem["tokens"], sample.completion.tokens) for sample in samples]
    logps = lambda model: [naive_logps(model, *text, args.temperature) for text in texts]
    values = lambda critic: critic and [naive_logits(critic.model, *text)[:, 0] for text in texts]
    with torch.no_grad():
        known = dict(old_logp=logps(old), old_value=values(old_critic), ref_logp=logps(reference))
    known = SimpleNamespace(logp=logps(naive), value=values(critic), **known)
    logp, ref_logp = torch.cat(known.logp), torch.cat(known.ref_logp)
    ratios = (logp - torch.cat(known.old_logp)).exp()
    assert 0.1 < ((ratios - 1).abs() > 0.2).float().mean() < 0.9

    loss, critic_loss = naive_loss(args, samples, known)
    (loss + critic_loss).backward()
    teachers = [naive, critic] if critic else [naive]
    norm = torch.cat([p.grad.flatten() for p in naive.parameters()]).norm()
    log_ratio = torch.stack([a.sum() - b.sum()
                             for a, b in zip(known.logp, known.ref_logp)])
    expected = dict(loss=loss, entropy=-logp.mean(),
                    kl=log_ratio.mean(), log_ratio_abs=log_ratio.abs().mean(),
                    grad_norm=norm, length=len(logp) / len(samples))
    # the engine's own are −1 for each token
    expected |= dict(mismatch=(logp + 1).abs().mean(),
                     reference_mismatch=(ref_logp + 1).abs().mean())
    if critic:
        expected["critic_loss"] = critic_loss
        assert critic_loss > 0.01
    for budget in (1, 40, 100_000):
        args.tokens_per_microbatch, objective.critic = budget, old_critic
        run = run_of(objective, train.Policy(old), train.Policy(reference))
        constants = objective.constants(run, samples)
        learners = [train.Policy(small_model(kind=kind), recompute)]
        if critic:
            objective.critic = make_critic(kind, recompute, 3)
            learners.append(objective.critic)
        before = [[p.detach().clone() for p in learner.parameters()] for learner in learners]
        groups = [dict(params=learner.parameters()) for learner in learners]
        run = run_of(objective, learners[0], None, torch.optim.SGD(groups, lr=1.0))
        numbers = train.update(run, samples, constants)
        for name, number in expected.items():
            assert numbers[name] == pytest.approx(torch.as_tensor(number).item(), rel=1e-3, abs=1e-6), name
        for learner, teacher, was in zip(learners, teachers, before):
            for p, taught, old_p in zip(learner.parameters(), teacher.parameters(), was):
                if taught.grad is not None:  # a critic's tied head was replaced; nothing is left of it
                    torch.testing.assert_close(old_p - p, taught.grad, atol=2e-4, rtol=2e-3)


@pytest.mark.parametrize("kind,temperature,recompute", [
    ("Qwen2", 1.0, True), ("Qwen2", 0.7, False), ("Llama", 1.3, True), ("GPT2", 1.0, True)])
def test_update_is_naive_autograd_on_one_big_batch(kind, temperature, recompute, monkeypatch):
    monkeypatch.setattr(train.Policy, "chunk", lambda *_: 7)
    compare_with_autograd(train.APO(some_args(temperature=temperature)), naive_apo, kind, recompute)


def updated(policy, reference, objective, samples, lr=1.0):
    """One update by plain gradient descent. → what it says, and how far the weights went, as one vector"""
    flat = lambda: torch.cat([p.detach().flatten() for p in policy.parameters()])
    run, before = run_of(objective, policy, reference, sgd(policy, lr)), flat()
    numbers = train.update(run, samples, objective.constants(run, samples))
    return numbers, flat() - before


def test_an_update_starts_from_no_gradient():
    """A rate of 0 moves nothing, so the same update twice says the same."""
    policy, reference = train.Policy(small_model()), train.Policy(small_model(seed=1))
    update = lambda: updated(policy, reference, train.APO(some_args()), some_samples(12), lr=0.0)[0]
    one, two = update(), update()
    assert one == two and one["grad_norm"] > 0


def test_the_gradient_is_clipped_to_a_global_norm():
    """A step at rate 1 is as long as the bound; what is logged is the norm before."""
    reference = train.Policy(small_model(seed=1))

    def step(bound):
        objective = train.APO(some_args(max_grad_norm=bound))
        return updated(train.Policy(small_model()), reference, objective, some_samples(12))

    (free, far), (bound, near) = step(1e9), step(0.01)
    assert free["grad_norm"] == bound["grad_norm"] == pytest.approx(far.norm().item(), rel=1e-3)
    assert near.norm().item() == pytest.approx(0.01, rel=1e-2)
    assert (free["grad_clipped"], bound["grad_clipped"]) == (False, True)


@pytest.mark.parametrize("network", ["policy", "critic"])
def test_nan_stops_all(network, capsys):
    """In the loss of one answer, or in the gradient of what learns beside the policy."""

    class Broken(train.APO):
        def losses(self, logp, constants, completion_mask, inputs):
            yield "loss", logp.sum(-1) / (constants["reward"] if network == "policy" else 1)

    samples = [sample._replace(reward=float(i != 2))
               for i, sample in enumerate(some_samples(4))]
    policy = train.Policy(small_model())
    beside = torch.nn.Parameter(torch.ones(1))
    beside.grad = torch.tensor([math.nan if network == "critic" else 0.0])
    groups = [dict(params=policy.parameters()), dict(params=[beside])]
    run = run_of(Broken(some_args()), policy, policy, torch.optim.SGD(groups, 1.0))
    call = lambda: train.update(run, samples, run.objective.constants(run, samples))
    ends_in_one_line(capsys, call, "the gradient's norm is nan", "the last checkpoint is whole")


def test_apo_asks_only_the_reference(monkeypatch):
    """What is constant in the loss costs one pass of π_ref, none of the policy."""
    asked, samples = [], some_samples(24)
    monkeypatch.setattr(train, "token_logps",
                        lambda model, *_: asked.append(model) or torch.zeros(24, 30))
    objective = train.APO(some_args())
    constants = objective.constants(run_of(objective, "policy", "ref"), samples)
    assert asked == ["ref"] and set(constants) == {"ref_logp", "reward", "vstar"}
    assert constants["reward"].tolist() == [sample.reward for sample in samples]
    assert constants["vstar"].tolist() == pytest.approx([sample.problem["vstar"] for sample in samples])


def test_the_learning_rate_warms_up_and_weights_decay():
    """AdamW without a gradient: only --weight_decay moves the weights, by lr · decay of each."""
    args = train.make_parser(train.APO).parse_args(["--weight_decay=0.5", "--lr=0.01", "--warmup=4"])
    vars(args).update(model="tiny/model", revision=None, dtype="float32", temperature=1.0, max_new_tokens=8)
    args.engine, args.model = "transformers", str(HERE / "tiny/model")
    run = train.make_run(args, train.APO(args),
                         None, [0], [], torch.device("cpu"))
    weight = next(run.policy.parameters())
    for step, rate in enumerate((0.0025, 0.005, 0.0075, 0.01, 0.01)):
        train.set_lr(run.optimizer, step, args)
        weight.grad, before = torch.zeros_like(weight), weight.detach().clone()
        run.optimizer.step()
        torch.testing.assert_close(weight.detach(), before * (1 - 0.5 * rate))
    args.warmup = 0
    train.set_lr(run.optimizer, 0, args)
    assert [group["lr"] for group in run.optimizer.param_groups] == [0.01]


# ---------------------------------------------------------------------------------------------------------
# batches, tokens, ranks


def test_microbatches_hold_every_response_once():
    samples = some_samples(40)
    for budget, per_loss in product((1, 60, 10_000), (1, 2)):
        args = some_args(tokens_per_microbatch=budget)
        batches = list(train.microbatches(samples, args, "cpu", per_loss))
        assert sorted(i for chosen, _, _ in batches for i in chosen) == list(range(40))
        for chosen, ids, mask in batches:
            assert len(chosen) == per_loss or ids.numel() <= budget
            assert per_loss == 1 or all(i ^ 1 in chosen for i in chosen)  # pairs stay together
            for row, i in enumerate(chosen):
                # up to and including the EOS, not the padding, which is the same token
                assert ids[row][mask[row]].tolist() == samples[i].completion.tokens
                assert not mask[row, : len(samples[i].problem["tokens"])].any()


def test_a_microbatch_ends_where_padding_would_begin():
    """From a quarter of its tokens on, at what is shorter than 0.8 of its longest; with few tokens not."""
    groups = lambda *lengths, tokens: train.groups_of_like_length(lengths, tokens)
    assert groups(10, 10, 9, 8, 7, 7, tokens=100) == [[0, 1, 2, 3], [4, 5]]
    assert groups(10, 10, 9, 8, 7, 7, tokens=400) == [[0, 1, 2, 3, 4, 5]]
    assert groups(10, 10, 9, tokens=20) == [[0, 1], [2]]
    assert groups(tokens=20) == []


def test_samples_are_dealt_out_by_length(monkeypatch):
    """Two processes, pairs of samples of a prompt, two minibatches: each process has its share of each, and
    the longest pairs are not all with one."""
    def sample(serial, length):
        return train.Sample(dict(tokens=[1]), Completion([2] * length, True, []), "", 0.0, serial)

    lengths = {0: 9, 1: 8, 2: 1, 3: 2, 4: 5, 5: 7, 6: 6, 7: 5}
    drawn = [[sample(serial, lengths[serial]) for serial in range(rank, 8, 2) for _ in range(2)]
             for rank in range(2)]
    monkeypatch.setattr(train, "WORLD", 2)
    monkeypatch.setattr(train.dist, "all_gather_object", lambda into, mine: into.__setitem__(slice(2), drawn))
    shares = []
    for rank in range(2):
        monkeypatch.setattr(train, "RANK", rank)
        dealt = train.deal(drawn[rank], 2, some_args(batch_size=8, minibatches=2))
        shares.append([sample.serial for sample in dealt])
    assert shares == [[1, 1, 2, 2, 4, 4, 6, 6], [0, 0, 3, 3, 5, 5, 7, 7]]
    # of the first minibatch 2, 3, 1, 0 from the shortest on; of the second 4, 7, 6, 5


def test_what_another_rank_has_more_of_counts_for_nothing(monkeypatch):
    """Micro-batches without rows fill up where another process has more; they change neither loss nor
    gradient."""
    samples, objective = some_samples(6), train.APO(some_args())
    reference = train.Policy(small_model(seed=1))
    alone, moved = updated(train.Policy(small_model()), reference, objective, samples)
    monkeypatch.setattr(train.dist, "is_initialized", lambda: True)
    # the count of micro-batches has an `op`
    two_more = lambda tensor, op=None: tensor.add_(2) if op else tensor
    monkeypatch.setattr(train.dist, "all_reduce", two_more)
    made_up = [chosen for chosen, _, _ in train.microbatches(samples, objective.args, "cpu")][1:]
    assert made_up == [[], []]
    again, moved_again = updated(train.Policy(small_model()), reference, objective, samples)
    assert again == alone and torch.equal(moved, moved_again)


def test_the_mean_is_over_the_samples_of_all_ranks(monkeypatch):
    """FSDP averages gradients over processes: with WORLD = 2 and as many samples elsewhere, the step is the
    same."""
    samples, objective = some_samples(6), train.APO(some_args())
    reference = train.Policy(small_model(seed=1))
    _, moved = updated(train.Policy(small_model()), reference, objective, samples)
    monkeypatch.setattr(train, "WORLD", 2)
    twice = lambda values: (2 * torch.tensor(values, dtype=torch.float64)).tolist()
    monkeypatch.setattr(train, "sum_over_ranks", twice)
    numbers, moved_again = updated(train.Policy(small_model()), reference, objective, samples)
    torch.testing.assert_close(moved, moved_again)


def test_minibatches_part_a_batch_by_place():
    """Each sample once a pass, with its own constants; the completions of a prompt stay together."""
    samples = [sample._replace(serial=48 + i // 2) for i, sample in enumerate(some_samples(20))]
    constants = dict(flat=torch.arange(20),
                     of_tokens=torch.arange(20)[:, None].expand(20, 5))
    parts = list(train.minibatches(samples, constants, some_args(batch_size=10, minibatches=3), passes=2))
    assert len(parts) == 6
    drawn = [chosen for chosen, _ in parts]
    assert drawn[:3] == drawn[3:]
    for number, (chosen, part) in enumerate(parts[:3]):
        rows = [i for i in range(20) if (48 + i // 2) % 10 * 3 // 10 == number]
        assert chosen == [samples[i] for i in rows]
        assert part["flat"].tolist() == part["of_tokens"][:, 0].tolist() == rows
    (everything,) = train.minibatches(samples, constants, some_args(batch_size=10), passes=1)
    assert everything[0] == samples and torch.equal(everything[1]["flat"], constants["flat"])


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_each_process_has_its_share_of_each_minibatch(ranks):
    for rank in range(ranks):
        samples = [s._replace(serial=32 + rank + ranks * i)
                   for i, s in enumerate(some_samples(32 // ranks))]
        parts = train.minibatches(samples, {}, some_args(batch_size=32, minibatches=4), 1)
        assert [len(chosen) for chosen, _ in parts] == [8 // ranks] * 4


def test_prompts_of_a_step(monkeypatch):
    """Pass after pass over all prompts, each in an order of its own; the ranks' shares are one process's."""
    rows = [dict(id=str(i)) for i in range(10)]
    args = SimpleNamespace(batch_size=4, seed=3)
    steps = [train.prompts_of_step(rows, step, args) for step in range(10)]
    serials, ids = zip(*[(serial, row["id"]) for step in steps for serial, row in step])
    assert list(serials) == list(range(40))
    passes = [ids[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(one) == sorted(map(str, range(10))) for one in passes)
    assert len(set(passes)) == 4
    monkeypatch.setattr(train, "WORLD", 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(train, "RANK", rank)
        shares += train.prompts_of_step(rows, 2, args)
    assert sorted(shares, key=lambda share: share[0]) == steps[2]


def test_a_rollout_keeps_the_tokens_and_grades_the_text():
    """Seeds are a function of (seed, serial, id); what was cut off earns nothing."""
    tokenizer = tiny_tokenizer()
    right = rewards.encode(tokenizer, "5+7=12;\\boxed{12}", False) + [0]
    copies = [Completion(right, True, []),
              Completion(right[:-1], False, []), Completion(right[:5] + [0], True, [])]
    rows = [dict(id="a", tokens=[2, 3], answer="12"),
            dict(id="b", tokens=[4], answer="13")]
    sampler = mock.MagicMock()
    sampler.generate.return_value = [copies, copies]
    args = SimpleNamespace(seed=7, reward=None)
    run = SimpleNamespace(args=args, sampler=sampler, policy="policy", tokenizer=tokenizer)
    samples = train.rollout(run, [*zip((40, 41), rows)], 3)
    seeds = [prompt_seed("7/40", "a"), prompt_seed("7/41", "b")]
    sampler.generate.assert_called_once_with([[2, 3], [4]], 3, seeds)
    assert [sample.reward for sample in samples] == [1, 0, 0, 0, 0, 0]
    assert [sample.serial for sample in samples] == [40] * 3 + [41] * 3
    assert [sample.completion for sample in samples] == 2 * copies
    assert samples[3].ids == [4, *right]
    assert samples[0].response == samples[1].response == "5+7=12;\\boxed{12}"


# ---------------------------------------------------------------------------------------------------------
# the policy


def test_numbers_stand_on_their_tokens():
    """on_tokens puts the n-th number where token_logps has the n-th token of the response."""
    samples, policy = some_samples(12), train.Policy(small_model())
    logp = train.token_logps(policy, samples, some_args(tokens_per_microbatch=40), "cpu")
    texts = [(sample.problem["tokens"], sample.completion.tokens) for sample in samples]
    naive = [naive_logps(policy.model, *text).tolist() for text in texts]
    placed = train.on_tokens(samples, naive, logp)
    torch.testing.assert_close(placed, logp, atol=1e-4, rtol=1e-5)
    assert (placed != 0).sum() == sum(len(sample.completion.tokens) for sample in samples)


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The most elements that any tensor had."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.size = max([self.size, *(tensor.numel() for tensor in tensors)])
        return out


def test_memory_does_not_grow_with_vocabulary_times_batch(monkeypatch):
    """No tensor of all logits, not even for a moment."""
    monkeypatch.setattr(train.Policy, "chunk", lambda *_: 16)
    vocabulary, samples = 50_000, some_samples(64, vocabulary=50_000)
    policy, objective = train.Policy(small_model(vocabulary)), train.APO(some_args())
    run = run_of(objective, policy, policy, sgd(policy))
    constants = objective.constants(run, samples)
    with Largest() as largest:
        train.update(run, samples, constants)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        policy(**a_microbatch())
    assert max(kept) < 16 * vocabulary  # nor is a chunk's kept for the backward pass
    embedding = vocabulary * 32  # its gradient is as large
    # full logits would be seen
    assert sum(len(s.completion.tokens) for s in samples) * vocabulary > 10 * embedding
    assert largest.size <= max(embedding, 16 * vocabulary)


def a_microbatch(count=8):
    """The policy's inputs."""
    _, ids, mask = next(train.microbatches(some_samples(count), some_args(), "cpu"))
    return dict(input_ids=ids, completion_mask=mask)


def test_dropout_is_off_and_recomputation_on():
    policy = train.Policy(small_model(kind="GPT2").train(), recompute=True)
    inputs = a_microbatch()
    assert not any(module.training for module in policy.modules() if isinstance(module, torch.nn.Dropout))
    passes = []
    for block in policy.blocks:
        block.ln_1.register_forward_hook(lambda *_: passes.append(1))
    policy(**inputs).sum().backward()
    assert len(passes) == 3  # of the two blocks one again: the first was measured
    logp = policy(**inputs)
    assert len(passes) == 5
    logp.sum().backward()
    assert len(passes) == 7  # each of them again
    with torch.no_grad():
        assert torch.equal(policy(**inputs), logp) and len(passes) == 9


def test_activations_are_kept_where_they_fit():
    """The same bits, however many blocks compute theirs again."""
    gradients, passes = [], []
    for free, again in ((0, 2), (60, 1), (1e9, 0)):
        policy = train.Policy(small_model(), recompute=True)
        for block in policy.blocks:
            block.input_layernorm.register_forward_hook(lambda *_: passes.append(1))
        policy.block_bytes = 5
        policy.keep(free, tokens=10)  # a block keeps 50 bytes
        passes.clear()
        policy(**a_microbatch()).sum().backward()
        gradients.append([parameter.grad for parameter in policy.parameters()])
        assert len(passes) == 2 + again
    for others in gradients[1:]:
        assert all(map(torch.equal, gradients[0], others))


def test_what_a_block_keeps_is_measured():
    """Of a linear layer and a ReLU on six tokens of four numbers: the layer keeps its input and its weights,
    which do not count, the ReLU its output. So 2 · 4 numbers of 4 bytes a token."""
    policy, layer = train.Policy(small_model()), torch.nn.Linear(4, 4)
    states = torch.randn(2, 3, 4, requires_grad=True)
    policy.measure(layer, lambda: layer(states).relu(), states)
    assert policy.block_bytes == 32


# ---------------------------------------------------------------------------------------------------------
# LoRA


def test_additions_are_cast_once_for_a_rollout():
    """The same logits; and after it A and B are those that learn."""
    policy, inputs = adapted(small_model(), dtype=torch.bfloat16), dict(input_ids=torch.arange(1, 9)[None])
    with torch.no_grad():
        before = policy(**inputs).logits
        policy.gather()
        cast = policy.layers[0].lora_A.to(torch.bfloat16)
        assert torch.equal(policy.cast[policy.layers[0]][0], cast) and len(policy.cast) == 14
        assert torch.equal(policy(**inputs).logits, before)
        policy.scatter()
        policy.layers[0].lora_B.data += 1
        assert not policy.cast and not torch.equal(policy(**inputs).logits, before)


@pytest.mark.parametrize("kind,recompute", [("Qwen2", True), ("Llama", False)])
def test_gradient_of_the_additions_is_autograd_on_merged_weights(kind, recompute):
    """Qwen2's linear layers have biases, Llama's have none."""
    objective, samples = train.APO(some_args()), some_samples(12)
    policy, naive = adapted(small_model(kind=kind), recompute=recompute), small_model(kind=kind)
    leaves = {name: p.detach().clone().requires_grad_()
              for name, p in policy.model.named_parameters()
              if "lora" in name}
    assert len(leaves) == 2 * 2 * 7  # A and B, two blocks, four layers of the attention and three of the MLP
    for name in {name.rpartition(".")[0] for name in leaves}:
        layer = naive.get_submodule(name)
        weight = layer.weight.detach() + 32 / 3 * leaves[f"{name}.lora_B"] @ leaves[f"{name}.lora_A"]
        del layer.weight
        layer.weight = weight
    logps = lambda model: [naive_logps(model, s.problem["tokens"], s.completion.tokens) for s in samples]
    known = SimpleNamespace(logp=logps(naive),
                            ref_logp=[x.detach() for x in logps(small_model(kind=kind))])
    naive_apo(objective.args, samples, known)[0].backward()
    run = run_of(objective, policy, policy.unadapted, sgd(policy))
    constants = objective.constants(run, samples)
    torch.testing.assert_close(constants["ref_logp"].sum(-1),
                               torch.stack([x.sum() for x in known.ref_logp]))
    train.update(run, samples, constants)
    after = dict(policy.model.named_parameters())
    for name, leaf in leaves.items():
        assert leaf.grad.norm() > 1e-3
        torch.testing.assert_close(leaf - after[name], leaf.grad, atol=2e-4, rtol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_additions_switched_off_are_the_base_to_the_bit(dtype):
    """So π_ref costs no second model, and π starts as π_ref exactly."""
    inputs = a_microbatch()
    base = train.Policy(small_model())
    policy = adapted(small_model(), dtype=dtype)
    fresh = train.LoraPolicy(small_model(), 3, dtype, seed=0)
    for parameter in base.parameters():  # not the module, whose rotary buffers stay fp32
        parameter.data = parameter.data.to(dtype)
    with torch.no_grad():
        expected = base(**inputs)
        assert torch.equal(policy.unadapted(**inputs), expected)
        assert torch.equal(fresh(**inputs), expected)
        assert (policy(**inputs) - expected).abs().max() > 0.1  # and afterwards they are on again
    learning = {name: p.dtype for name, p in policy.named_parameters() if p.requires_grad}
    assert set(learning.values()) == {torch.float32}
    assert all("lora" in name for name in learning)


@pytest.mark.parametrize("tied,dtype",
                         [(True, "float32"), (False, "float32"), (True, "bfloat16")])
def test_the_merged_folder_is_the_adapted_policy(tied, dtype, tmp_path):
    """A plain folder, in fp32: in bf16 it would lose the additions."""
    model = tiny_model() if tied else small_model(19)
    for parameter in model.parameters():  # (not the buffers, of which the rotations' would lose digits)
        parameter.data = parameter.data.to(getattr(torch, dtype))
    policy = adapted(model)
    assert policy.config.tie_word_embeddings == tied
    args = SimpleNamespace(out=tmp_path, lora=4, dtype=dtype, model="tiny/model", revision=None)
    train.save_model(SimpleNamespace(policy=policy, args=args, tokenizer=tiny_tokenizer()))
    policy.float()
    load = transformers.AutoModelForCausalLM.from_pretrained
    saved, info = load(tmp_path / "model", output_loading_info=True)
    assert not any(info.values()) and saved.dtype == torch.float32
    ids = torch.arange(1, 13)[None]
    with torch.no_grad():
        ours, theirs = (model(input_ids=ids).logits for model in (policy, saved))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    weights_of_policy = dict(policy.full_weights(torch.float32))
    # an engine is constants all of them, and tied ones twice
    assert {*weights_of_policy} == {*saved.state_dict()}


def test_the_saved_precision_is_the_wider_one(tmp_path):
    """A step of 1e-6 would be lost in bf16, so a bf16 π_ref that is trained in fp32 is saved in fp32."""
    for dtype in ("bfloat16", "float32"):
        policy = train.Policy(tiny_model().bfloat16())
        policy.model.float()  # the masters
        args = SimpleNamespace(out=tmp_path / dtype, lora=None, dtype=dtype, model="tiny/model",
                               revision=None)
        train.save_model(SimpleNamespace(policy=policy, args=args, tokenizer=tiny_tokenizer()))
        saved = transformers.AutoModelForCausalLM.from_pretrained(args.out / "model", dtype="auto")
        assert saved.dtype == getattr(torch, dtype)
        assert {name for name, _ in policy.full_weights(torch.float32)} == {*saved.state_dict()}


# ---------------------------------------------------------------------------------------------------------
# the reward


@pytest.mark.parametrize("response,answer,verdict", [
    (r"\boxed{72}", "72", 1),
    ("so #### 1,000", "1000", 1),
    (r"first \boxed{5}, no: \boxed{6}", "6", 1),  # the last box counts
    (r"first \boxed{5}, no: \boxed{6}", "5", 0),
    (r"<think>\boxed{1}</think> \boxed{2}", "2", 1),  # after the thinking
    (r"<think>\boxed{72}</think>", "72", 0),
    ("the answer is 72", "72", 0),  # 'any number in the text' would pay a policy for babbling
    (r"\boxed{\frac12}", "0.5", 1),
    (r"\boxed{0.33}", r"\frac{1}{3}", 0),  # too few digits
    (r"\boxed{0.3333}", r"\frac{1}{3}", 1),
    (r"\boxed{2,1}", "1,2", 1),  # a list of solutions has no order
    (r"\boxed{(2,1)}", "(1,2)", 0),  # a pair has
    (r"\boxed{x > 5}", r"(5,\infty)", 1),
    (r"\boxed{x \ge 5}", r"(5,\infty)", 0),
    (r"\boxed{50\%}", r"\frac12", 1),
    (r"\boxed{60^\circ}", r"\frac{\pi}{3}", 1),
    (r"\boxed{5\text{ cm}}", "5", 1),  # a unit may be left out
    (r"\boxed{5\text{ cm}}", r"5\text{ m}", 0),  # but not contradict
    (r"\boxed{5 \text{ or } 6}", "5", 0),
    (r"\boxed{(x+1)^2}", "x^2+2x+1", 1),
    (r"\boxed{\text{(B)}}", "B", 1),
    (r"\boxed{9**9**9**9}", "5", 0),  # of bounded cost
])
def test_reward(response, answer, verdict):
    assert rewards.reward(response, answer, True) == verdict
    assert rewards.reward(response, answer, False) == 0  # cut off


# ---------------------------------------------------------------------------------------------------------
# the sampler


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_samples_follow_the_softmax(temperature):
    """The first token, and the second after the likeliest first, each as often as it should be."""
    model, prompt, n = small_model(), [3, 1, 4], 20_000
    (completions,) = sampler_of(model, 2, temperature, n).generate([prompt], n, [5])

    def off(tokens, ids):
        """The largest deviation, in standard errors."""
        logits = model(torch.tensor([ids])).logits[0, -1].detach().double() / temperature
        chance = logits.softmax(-1).numpy()
        share = np.bincount(tokens, minlength=11) / len(tokens)
        return np.max(np.abs(share - chance) / np.sqrt(chance * (1 - chance) / len(tokens) + 1e-6))

    first = np.array([completion.tokens[0] for completion in completions])
    likely = np.bincount(first[first > 0]).argmax()
    second = [completion.tokens[1] for completion in completions if completion.tokens[0] == likely]
    assert off(first, prompt) < 4 and off(second, [*prompt, likely]) < 4
    assert off(first, [*prompt, likely]) > 20  # the test can fail


@pytest.mark.parametrize("vocabulary", [3, 128, 1000, pytest.param(151936, marks=whole)])
def test_draw_is_the_inverse_cdf(vocabulary):
    """The first token at which the running sum passes the row's number; what has no probability never
    comes."""
    torch.manual_seed(0)
    logits = 3 * torch.randn(100, vocabulary)
    logits[:, torch.randperm(vocabulary)[: vocabulary // 2]] = -math.inf
    uniform = torch.rand(100, dtype=torch.float64)
    uniform[:4] = torch.tensor([0.0, 0.0, 1 - 1e-12, 1 - 1e-12],
                               dtype=torch.float64)
    for temperature in (1.0, 0.5):
        token, logp = vstar.draw(logits, uniform, temperature)
        exact = (logits.double() / temperature).log_softmax(-1)
        chosen = exact[torch.arange(100), token]
        torch.testing.assert_close(logp.double(), chosen, atol=3e-5, rtol=0)  # fp32, sums of 152k
        until = exact.exp().cumsum(-1)[torch.arange(100), token]
        assert chosen.isfinite().all()
        assert (until - chosen.exp() - 1e-6 <= uniform).all()
        assert (uniform <= until + 1e-6).all()
    greedy, logp = vstar.draw(logits, uniform, 0)
    assert greedy.equal(logits.argmax(-1))
    torch.testing.assert_close(logp.double(),
                               logits.double().log_softmax(-1).amax(-1), atol=3e-5, rtol=0)


@pytest.mark.parametrize("kind", ["Qwen2", "Llama", "GPT2"])
def test_batch_equals_one_by_one(kind):
    """Left padding, positions, rows that leave: a completion does not depend on its neighbours or their
    order."""
    model, rng = small_model(kind=kind), random.Random(0)
    prompts = [rng.choices(range(1, 11), k=rng.randint(1, 12)) for _ in range(12)]
    seeds = [prompt_seed(0, i) for i in range(12)]
    together = sampler_of(model, rows=1000).generate(prompts, 4, seeds)
    tokens = lambda completions: [[copy.tokens for copy in copies] for copies in completions]
    one_row = sampler_of(model, rows=1)
    alone = [one_row.generate([prompt], 4, [seed])[0] for prompt, seed in zip(prompts, seeds)]
    backwards = sampler_of(model, rows=28).generate(prompts[::-1], 4, seeds[::-1])
    backwards.reverse()
    assert tokens(together) == tokens(alone) == tokens(backwards)
    every = [copy for copies in together for copy in copies]
    assert len({tuple(copy.tokens) for copy in every}) > 36
    assert {copy.finished for copy in every} == {True, False}
    # a smaller N is a prefix of a larger one, so that answers are kept when N changes
    two, others = (sampler_of(model).generate(prompts, *how) for how in ((2, seeds), (4, seeds, 2)))
    assert tokens(two) == [copies[:2] for copies in tokens(together)]
    assert tokens(others) == [copies[2:] for copies in tokens(together)]
    for prompt, copies in zip(prompts, together):
        for copy in copies:
            naive = naive_logps(model, prompt, copy.tokens)
            torch.testing.assert_close(naive, torch.tensor(copy.logps), atol=2e-4, rtol=0)


def test_completions_end_with_the_first_eos():
    model = small_model()
    for eos in ([0], [0, 7]):  # 0 is also the padding token
        completions = sampler_of(model, 12, eos=eos).generate([[1, 2], [5], [0, 3, 0]], 50, [1, 2, 3])
        for tokens, finished, logps in sum(completions, []):
            assert len(tokens) == len(logps) and 1 <= len(tokens) <= 12
            assert finished == (tokens[-1] in eos)
            assert not set(tokens[:-1]) & set(eos)
            assert finished or len(tokens) == 12


def test_seeds_differ_by_run_prompt_and_copy():
    assert len({prompt_seed(s, i) for s in range(50)
                for i in ("a", "b", 1, 11, "1/1")}) == 250
    assert prompt_seed(0, "train/00000") == prompt_seed(0, "train/00000") < 2**63
    (completions,) = sampler_of(small_model()).generate([[1]], 8, [3])
    assert len({tuple(completion.tokens) for completion in completions}) == 8


# ---------------------------------------------------------------------------------------------------------
# Stage 1


@whole
def test_stage1_rows(undisturbed):
    """A row a prompt: N graded answers, and V̂* of their rewards."""
    out, done = undisturbed
    rows = read_jsonl(out)
    problems = {problem["id"]: problem for problem in read_jsonl(HERE / "tiny/train.jsonl")[:384]}
    assert [row["id"] for row in rows] == sorted(problems)
    for row in rows:
        names = "id question answer prompt rewards vstar lengths finished responses graded_by"
        assert {*row} == {*names.split()}
        assert row["prompt"] == problems[row["id"]]["question"]
        assert row["rewards"] == [rewards.reward(text, row["answer"], finished)
                                  for text, finished in zip(row["responses"], row["finished"])]
        assert len(row["rewards"]) == len(row["lengths"]) == 2
        by_hand = 0.5 * math.log(np.mean(np.exp(np.array(row["rewards"]) / 0.5)))
        assert row["vstar"] == pytest.approx(by_hand)
    accuracy = np.mean([row["rewards"] for row in rows])
    assert 0.3 < accuracy < 0.5 and f"accuracy          {accuracy:.3f} ±" in done.stdout
    settings = settings_in(out.with_suffix(".config.json"))
    assert settings["model"] == "tiny/model" and settings["dtype"] == "float32"
    assert sorted(os.listdir(out.parent)) == ["vstar.config.json", "vstar.jsonl", "vstar.png"]


@whole
@pytest.mark.parametrize("times", [1, long_value(4)])
def test_stage1_killed_and_restarted(times, undisturbed, tmp_path):
    """kill -9; the same command goes on to the same bytes."""
    out, rng, seen = tmp_path / "vstar.jsonl", random.Random(0), set()

    def has_saved_more():
        before = len(seen)
        seen.update(out.with_suffix(".parts").glob("*.jsonl"))
        return len(seen) > before

    for _ in range(times):
        process = start(*stage1(out))
        wait_until(has_saved_more, process)
        time.sleep(rng.random() * 0.1)
        kill(process)
    assert len(seen) > 0
    inside(*stage1(out))
    assert out.read_bytes() == undisturbed[0].read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["vstar.config.json", "vstar.jsonl", "vstar.png"]
    again = inside(*stage1(out))  # nothing left to do
    assert "tokens/s" not in again.stdout and "accuracy" in again.stdout


@whole
def test_answers_are_kept_for_another_n(undisturbed, tmp_path):
    """Up and down again: as if each N had been asked for at once. Stage 2 takes N from what was asked
    last."""
    out = copy_rows(undisturbed[0], tmp_path / "vstar.jsonl")
    inside(*stage1(out, "--samples=3"))
    inside(*stage1(tmp_path / "three.jsonl", "--samples=3"))
    assert out.read_bytes() == (tmp_path / "three.jsonl").read_bytes()
    for row in read_jsonl(out):  # each answer with its own reward: the old ones first
        assert row["vstar"] == pytest.approx(estimate_vstar(row["rewards"], 0.5))
        graded = zip(row["responses"], row["rewards"], row["finished"])
        assert all(reward == rewards.reward(text, row["answer"], finished)
                   for text, reward, finished in graded)
    down = inside(*stage1(out))
    assert out.read_bytes() == (tmp_path / "three.jsonl").read_bytes()  # what exists is not thrown away
    words = lambda done: re.findall("^(?:accuracy|mean V̂).*", done.stdout, re.M)
    assert words(down) == words(undisturbed[1]) and len(words(down)) == 2
    inside(*stage2(out, tmp_path / "run", "--steps=1", "--eval_limit=1"))
    assert settings_in(tmp_path / "run/config.json")["samples"] == 2
    done = inside(*stage2(out, tmp_path / "four", "--samples=4"), check=False)
    refused(done, "3 completions per prompt, not --samples 4")


# ---------------------------------------------------------------------------------------------------------
# from Stage 1 to Stage 2


def read_stage1(rewards, folder, monkeypatch, *flags):
    """What Stage 2 reads of a Stage 1 with these rewards, {id: its rewards}, and β1 = 1."""
    rows = [dict(id=name, rewards=numbers, graded_by="") for name, numbers in rewards.items()]
    monkeypatch.setattr(train, "read_rows", lambda path, without: rows)
    files = {"model's files": "", "reward's file": ""}
    monkeypatch.setattr(train, "fingerprint", lambda *_: files)
    settings = {**dict.fromkeys(train.FROM_STAGE1), **files, "temperature": 1, "beta1": 1, "data": "d",
                "split": "train", "number of problems": len(rows), "problems' ids": vstar.hash_of_ids(rows)}
    config = dict(settings=settings, samples=len(rows[0]["rewards"]))
    (folder / "v.config.json").write_text(json.dumps(config))
    (folder / "v.jsonl").touch()
    args = train.make_parser(train.APO).parse_args([f"--vstar={folder}/v.jsonl", *flags])
    return train.settle(args, *train.read_stage1(args))


@pytest.mark.parametrize("choice,kept", dict(none="abc", unsolved="ab", both="a").items())
def test_filter(choice, kept, monkeypatch, tmp_path):
    """Prompts that were never solved, or always; and V̂* is computed again from as many rewards as are asked
    for."""
    answers = dict(a=[0.0, 1], b=[1, 1], c=[0.0, 0.5])
    stage1 = lambda *flags: read_stage1(answers, tmp_path, monkeypatch, *flags)
    rows = stage1(f"--filter={choice}")
    assert "".join(row["id"] for row in rows) == kept
    assert rows[0]["vstar"] == pytest.approx(math.log((1 + math.e) / 2))  # β1 = 1, Stage 1's
    assert stage1("--beta1=inf")[0]["vstar"] == 0.5
    rows = stage1("--samples=1")
    assert [row["vstar"] for row in rows] == [0, 1, 0]
    assert rows[0]["rewards"] == [0]  # from the first alone


# ---------------------------------------------------------------------------------------------------------
# Stage 2


@whole
def test_stage2_files(trained):
    out, done = trained
    rows = metrics(out)
    assert [row["step"] for row in rows] == list(range(7))
    assert [row["step"] for row in rows if "accuracy" in row] == [0, 2, 4, 6]
    names = "loss reward vstar advantage kl entropy length finished unsolved grad_norm mismatch lr"
    assert set(rows[1]) >= {*names.split()}
    assert rows[1]["kl"] == 0 and rows[1]["log_ratio_abs"] == 0  # the same code on the same tokens: exactly
    assert all(0 < row["mismatch"] < 1e-5 for row in rows[1:])  # and the sampler's own log-probs agree
    assert rows[1]["advantage"] == pytest.approx(rows[1]["reward"] - rows[1]["vstar"])
    assert rows[1]["lr"] == 3e-4
    assert sorted(os.listdir(out / "checkpoint")) == ["00000004", "00000006"]
    files = ["checkpoint", "config.json", "curves.png", "metrics.jsonl", "model", "samples"]
    assert sorted(os.listdir(out)) == files
    kept = {1: "jsonl", 3: "jsonl", 6: "jsonl"}, dict.fromkeys((0, 2, 4, 6), "held_out.jsonl")
    names = [f"{step:06d}.{end}" for part in kept for step, end in part.items()]
    assert sorted(os.listdir(out / "samples")) == sorted(names)
    last = read_jsonl(out / "samples/000006.held_out.jsonl")
    assert rows[-1]["accuracy"] == np.mean([row["reward"] for row in last]) and len(last) == 40
    settings = settings_in(out / "config.json")
    assert settings["algorithm"] == "apo" and settings["model"] == "tiny/model" and settings["samples"] == 8
    for words in ("before  held-out accuracy", "after   held-out accuracy", "── step 3: ", "40 problems"):
        assert words in done.stdout


@whole
def test_final_model_is_the_trained_policy(trained):
    """transformers loads it as it is, and it scores exactly what the last row says."""
    out, rows = trained[0], metrics(trained[0])
    model = transformers.AutoModelForCausalLM.from_pretrained(out / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "model")
    assert model.dtype == torch.float32 and model.generation_config.eos_token_id == 0
    problems = read_jsonl(HERE / "tiny/test.jsonl")[:40]
    prompts = [rewards.encode(tokenizer, problem["question"], False) for problem in problems]
    seeds = [prompt_seed("0/held out", problem["id"]) for problem in problems]
    right = 0
    completions = sampler_of(model, 64).generate(prompts, 1, seeds)
    for problem, (copy,) in zip(problems, completions):
        text = tokenizer.decode(copy.tokens, skip_special_tokens=True)
        right += rewards.reward(text, problem["answer"], copy.finished)
    assert right / 40 == pytest.approx(rows[-1]["accuracy"])
    assert rows[0]["accuracy"] != rows[-1]["accuracy"]


@whole
@pytest.mark.parametrize("lora", [[], long_value(["--lora=4", "--lr=3e-3"])])
def test_stage2_killed_stopped_and_restarted(lora, trained, all_rows, tmp_path):
    """kill -9 while a checkpoint is being written, and a SIGTERM, which saves: the same bits in the end."""
    out, undisturbed = tmp_path / "run", trained[0]
    command, path = stage2(all_rows, out, *lora), out / "metrics.jsonl"
    if lora:
        undisturbed = tmp_path / "undisturbed"
        inside(*stage2(all_rows, undisturbed, *lora))
        folder = torch.distributed.checkpoint.FileSystemReader(undisturbed / "checkpoint/00000006")
        saved = folder.read_metadata().state_dict_metadata
        tensors = [name for name, kept in saved.items() if hasattr(kept, "size")]
        # weight, two moments, a count
        assert len(tensors) == 4 * 28 and all("lora" in name for name in tensors)
    process = start(*command)
    wait_until(lambda: list(out.glob("checkpoint/00000002*")), process)  # it is saving
    kill(process)
    with open(path, "a") as file:
        file.write('{"step": 7, "lo')  # a torn line

    process = start(*command, "--save_every=100", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_until(lambda: path.read_text().count("\n") > 3, process)  # the next step is done
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "the same command resumes from here" in output
    assert "stopping after this step\n" in output  # at once: a step may take a minute
    inside(*command)
    assert metrics(out) == metrics(undisturbed)
    assert weights(out) == weights(undisturbed)
    assert not list(out.glob("**/*.tmp"))
    for name in ("000001.jsonl", "000003.jsonl", "000006.jsonl", "000002.held_out.jsonl"):
        assert (out / "samples" / name).read_bytes() == (undisturbed / "samples" / name).read_bytes()


@whole
def test_two_ranks_train_like_one(trained, all_rows, tmp_path):
    """The same completions, and the same metrics but for rounding. 25 prompts: their shares differ."""
    torchrun(2, *stage2(all_rows, tmp_path, "--steps=2"))
    close(metrics(tmp_path), metrics(trained[0])[:3])
    one, two = (out / "samples/000000.held_out.jsonl" for out in (trained[0], tmp_path))
    assert one.read_bytes() == two.read_bytes()  # of both processes' problems


@whole
def test_it_learns(all_rows, tmp_path):
    rows = learns(stage2(all_rows, tmp_path, "--steps=16"), tmp_path)
    assert train.diagnose(rows, some_args()) == train.nothing_learned(rows, 256) == {}


@long
def test_lora_learns(all_rows, tmp_path):
    learns(stage2(all_rows, tmp_path, "--steps=25", "--lora=16", "--lr=1.5e-3"), tmp_path)


@whole
def test_minibatches_and_bf16(all_rows, tmp_path):
    """fp32 masters with bf16 compute, FSDP's code on a mesh of one, two optimizer steps per batch."""
    more = ["--dtype=bfloat16", "--minibatches=2", "--steps=3", "--recompute=yes"]
    inside(*stage2(all_rows, tmp_path, *more))
    rows = metrics(tmp_path)
    # bf16 rounds, and a part has other micro-batches than π_ref's pass
    assert rows[1]["log_ratio_abs"] < 5e-3
    assert rows[2]["log_ratio_abs"] > 1e-2 and 1e-6 < rows[1]["mismatch"] < 0.01
    state = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    reference = tiny_model().state_dict()
    moved = {name: (state[name] - reference[name]).abs().max().item()
             for name in state}
    # smaller than a bf16 step, and not lost
    assert all(0 < change < 1e-2 for change in moved.values()), moved


# ---------------------------------------------------------------------------------------------------------
# alarms: what silently ruins runs is noticed


def test_stale_weights_and_a_wrong_reference_are_noticed(capsys):
    args = SimpleNamespace(dtype="float32", engine="transformers")
    good = dict(log_ratio_abs=0.0, mismatch=1e-5, reference_mismatch=1e-5, length=20.0)
    check = lambda step, **other: train.check_numbers({**good, **other}, step, args)
    stale = lambda step, **other: ends_in_one_line(capsys, lambda: check(step, **other), "old weights")
    check(0)
    stale(0, mismatch=0.05, reference_mismatch=0.05)
    check(5, log_ratio_abs=1.0)  # only at step 0 it must be 0
    check(5, mismatch=9e-4, reference_mismatch=0.3)  # rounding
    stale(5, mismatch=0.05, reference_mismatch=0.3)
    stale(5, mismatch=math.nan)
    stale(1, mismatch=5e-4, reference_mismatch=2e-4)  # nearer to π_ref
    args.dtype = "bfloat16"
    check(1, mismatch=9e-5, reference_mismatch=3e-5)  # few tokens, rounded by chance to one side
    stale(1, mismatch=4e-3, reference_mismatch=1e-3)
    train.check_numbers({**good, "mismatch": 0.2, "reference_mismatch": 0.3}, 5, args, mixture=True)
    stale(5, mismatch=0.2, reference_mismatch=0.3)
    args.dtype = "float32"
    wrong = lambda: check(0, log_ratio_abs=1.0)
    ends_in_one_line(capsys, wrong, "π and π_ref should agree", "0.05 per token")


@whole
@pytest.mark.parametrize("stale,lag,lr", [
    ("", 999, 3e-4), ("", 2, 3e-4), ("layers.1.", 999, 3e-4), ("", 1, 3e-5), ("nothing", 1, 3e-5)])
def test_an_engine_with_old_weights_is_noticed(stale, lag, lr, all_rows, tmp_path, monkeypatch):
    """Those whose name holds `stale` are the policy's of `lag` rollouts ago, or the first; also where it
    moves slowly."""
    seen, wake = [], vstar.TransformersSampler.wake

    def hold_old(self, policy):
        seen.append({name: tensor.clone() for name, tensor in policy.state_dict().items()})
        engine = train.Policy(tiny_model())
        old = seen[max(0, len(seen) - 1 - lag)]
        engine.load_state_dict({name: old[name] if stale in name else seen[-1][name]
                                for name in old})
        wake(self, engine)

    monkeypatch.setattr(vstar.TransformersSampler, "wake", hold_old)
    sizes = ["--batch_size=32", "--steps=6", "--eval_limit=8", "--tokens_per_microbatch=2000"]
    done = inside(*stage2(all_rows, tmp_path, *sizes, f"--lr={lr}"), check=False)
    if stale == "nothing":
        assert done.returncode == 0, done.stderr
    else:
        refused(done, "does it still hold old weights", alone=False)


@whole
@pytest.mark.parametrize("dtype,old", [
    ("bfloat16", "second"), long_value(("bfloat16", "block")), long_value(("float32", "second"))])
def test_an_engine_that_takes_a_part_of_a_push_is_noticed(dtype, old, all_rows, tmp_path, monkeypatch):
    """Every second tensor, or all of the last block, keeps its first weights: in bf16 this is far below what
    rounding may do, and is remarked upon; in fp32 it ends the run."""
    first, wake = {}, vstar.TransformersSampler.wake

    def take_a_part(self, policy):
        now = {name: train.full_tensor(tensor).clone() for name, tensor in policy.state_dict().items()}
        stays = {"second": [*now][1::2], "block": [name for name in now if "layers.1." in name]}[old]
        first.update({name: tensor for name, tensor in now.items() if name not in first})
        engine = train.Policy(tiny_model())
        engine.load_state_dict({name: first[name] if name in stays else now[name] for name in now})
        wake(self, engine.to(getattr(torch, dtype)))

    monkeypatch.setattr(vstar.TransformersSampler, "wake", take_a_part)
    sizes = ["--batch_size=32", "--steps=20", "--eval_limit=8", "--lr=1e-4", "--tokens_per_microbatch=2000"]
    done = inside(*stage2(all_rows, tmp_path, *sizes, f"--dtype={dtype}"), check=dtype == "bfloat16")
    if dtype == "bfloat16":
        assert "a part of its weights stays old" in done.stdout + done.stderr
    else:
        refused(done, "does it still hold old weights", alone=False)


@whole
def test_a_wrong_reference_stops_the_run(all_rows, tmp_path, monkeypatch):
    load = train.load_model

    def other_reference(model, revision, dtype, device):
        loaded = load(model, revision, dtype, device)
        if dtype != "auto":  # π is loaded as it was saved, π_ref in the precision of computing
            loaded.get_output_embeddings().weight.data *= 1.1
        return loaded

    monkeypatch.setattr(train, "load_model", other_reference)
    done = inside(*stage2(all_rows, tmp_path, "--steps=1"), check=False)
    refused(done, "π and π_ref should agree", alone=False)


@whole
def test_a_full_disk_keeps_the_last_checkpoint(trained, all_rows, tmp_path):
    """No file may grow beyond 300 KB: metrics fit, a checkpoint does not."""
    inside(*stage2(all_rows, tmp_path, "--steps=2"))
    with full_disk(kilobytes=300):
        done = inside(*stage2(all_rows, tmp_path), check=False)
    refused(done, f"cannot write {tmp_path}/checkpoint/00000004", "disk", alone=False)
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == ["00000002"]
    inside(*stage2(all_rows, tmp_path))
    assert metrics(tmp_path) == metrics(trained[0])
    assert weights(tmp_path) == weights(trained[0])


def healthy(steps=60):
    """Metrics of a run that goes well: 0.4 → 0.9."""
    steady = dict(finished=1.0, unsolved=0.1)
    return [dict(steady, step=i + 1,
                 reward=0.9 - 0.5 * math.exp(-i / 15), length=20.0 + i / 10, kl=0.02 * i,
                 log_ratio_abs=3e-5 * i**2, mismatch=1e-3 + 2e-5 * i,
                 reference_mismatch=1e-3 + 5e-4 * i) for i in range(steps)]


ILL = {
    "unsolved": lambda i: dict(unsolved=0.2),
    "still": lambda i: dict(log_ratio_abs=1e-4, kl=1e-5, reward=0.4),
    "runaway": lambda i: dict(kl=0.5 * i),
    "collapse": lambda i: dict(reward=0.6 if i < 30 else 0.2),
    "cut off": lambda i: dict(finished=1.0 - i / 60, length=20.0 + 5 * i),
    "no EOS": lambda i: dict(finished=0.01, reward=0.0),
    "saturated": lambda i: dict(reward=0.99),
    "stale": lambda i: dict(mismatch=1e-3 + 3e-4 * i),
}


@pytest.mark.parametrize("name", ILL)
def test_illness_is_named(name):
    """With a remedy: a flag, or harder problems."""
    rows = [{**row, **ILL[name](i)} for i, row in enumerate(healthy())]
    found = train.diagnose(rows, some_args())
    assert name in found and ("--" in found[name] or "harder" in found[name]), found
    assert set(found) <= {name, "collapse"}, found
    needs_0_and_1 = name in ("unsolved", "saturated", "runaway")
    assert (name in train.diagnose(rows, some_args(), None)) == (not needs_0_and_1)


def test_health_is_not_remarked_upon():
    rows = [dict(step=0, accuracy=0.4), *healthy()]
    for count in range(len(rows)):
        assert train.diagnose(rows[:count], some_args()) == {}
    assert train.nothing_learned(rows, 512) == {}
    mostly_wrong = [dict(row, unsolved=0.6) for row in healthy()]  # of one answer most are
    assert train.diagnose(mostly_wrong, some_args(samples=1)) == {}


@pytest.mark.parametrize("name,runs,curve", [
    ("seeds", "curves", None), ("tictactoe", "runs", "curve"), ("countdown", "runs", "curve")])
def test_runs_that_learned_are_not_said_to_have_learned_nothing(name, runs, curve):
    """Also if they had ended after 30 steps."""
    found = json.loads((HERE / f"experiments/results/{name}.json").read_text())[runs]
    for run in found.values():
        rows = [dict(row, log_ratio_abs=row.get("kl")) for row in (run[curve] if curve else run)]
        for steps in (30, len(rows)):
            assert train.nothing_learned(rows[: steps + 1], 512) == {}


def test_a_run_that_came_to_nothing_says_so():
    """Of any length. Flat is what rises by no more than its noise, in training and held-out."""
    rng = np.random.default_rng(0)
    rows = [dict(step=i + 1, reward=rng.binomial(64, 0.4) / 64, log_ratio_abs=0.1) for i in range(40)]
    to = lambda accuracy: [dict(step=0, accuracy=0.4), *rows[:-1], dict(rows[-1], accuracy=accuracy)]
    flat = train.nothing_learned(to(0.44), 500)["flat"]  # of 500 problems: within 0.06
    assert "held-out accuracy 0.400 → 0.440" in flat and "noise" in flat and "samples/" in flat
    assert train.nothing_learned(to(0.48), 500) == {}
    assert {*train.nothing_learned(to(0.48), 64)} == {"flat"}  # of 64: within 0.17
    for count in (2, 3, 20, 40):
        assert {*train.nothing_learned(rows[:count], 0)} == {"flat"}  # nothing held out
        still = [*rows[: count - 1], dict(rows[count - 1], log_ratio_abs=0.009)]
        assert {*train.nothing_learned(still, 0)} == {"still"}
    better = [dict(row, reward=row["reward"] + 0.004 * row["step"]) for row in rows]
    assert train.nothing_learned(better, 0) == {}
    assert train.nothing_learned([dict(step=0, accuracy=0.4)], 512) == {}  # no step's row is left


@pytest.mark.parametrize("warned,said", [((), 1), (("still",), 0), (("saturated",), 0), (("unsolved",), 1)])
def test_it_is_said_once(warned, said, tmp_path, capsys):
    log = object.__new__(train.Log)
    history = [dict(step=i, reward=0.4, log_ratio_abs=1e-4) for i in range(1, 40)]
    vars(log).update(bar=mock.MagicMock(), history=history, already_warned={*warned})
    log.args = some_args(out=tmp_path)
    log.report(0)
    assert capsys.readouterr().out.count("warning: the policy did not move") == said


# ---------------------------------------------------------------------------------------------------------
# how good it is: evaluate.py


@pytest.mark.parametrize("answers,gold,right", [
    (("1", "2", "2"), "2", 1),
    (("1", "2", "2"), "1", 0),
    (("1", "2"), "1", 1),  # of equally many votes the first wins
    (("0.5", "3", r"\frac12", "3", "1/2"), "0.5", 1),  # the checker's groups, not the strings'
    ((None, None, "7"), "7", 1),  # no box, no vote
    ((None,), "7", 0),
    (("1", "1 cut off", "1 cut off", "2", "2"), "2", 1),  # nor has what was cut off
])
def test_majority_by_hand(answers, gold, right):
    texts = [f"so \\boxed{{{answer.split()[0]}}}" if answer else "no idea" for answer in answers]
    finished = ["cut" not in str(answer) for answer in answers]
    graded = [rewards.reward(text, gold, True) for text in texts]
    assert evaluate.majority(texts, finished, graded) == right


def test_measure_by_hand():
    rows = [dict(rewards=[1.0, 0.0], responses=["\\boxed{1}", "\\boxed{2}"],
                 finished=[True, True], lengths=[3, 5]),
            dict(rewards=[0.0, 0.0], responses=["\\boxed{4}", "…"], finished=[True, False], lengths=[3, 9])]
    found = evaluate.measure(rows)
    assert found["accuracy"] == 0.25 and found["pass"] == {1: 0.25, 2: 0.5} and found["majority"] == 0.5
    assert (found["finished"], found["length"], found["problems"]) == (0.75, 5.0, 2)


@whole
def test_bootstrap_interval_covers(monkeypatch):
    """In 95 of 100 simulated experiments the interval holds the truth; paired differences too."""
    monkeypatch.setattr(evaluate.bootstrap, "__defaults__", (200, 0))  # draws, seed
    rng, covered, paired = np.random.default_rng(0), 0, 0
    for trial in range(300):
        chance = rng.beta(2, 2, 150)
        one, other = (rng.binomial(4, chance) / 4 for _ in range(2))
        low, high = evaluate.bootstrap(one, seed=trial)
        covered += low <= 0.5 <= high
        _, low, high = evaluate.paired(one, other)
        paired += low <= 0 <= high
    assert 0.91 < covered / 300 < 0.98 and 0.91 < paired / 300 < 0.98
    assert evaluate.paired([0.0, 0.5], [1.0, 0.5])[0] == 0.5  # the gain of the second


def test_kl_is_the_mean_log_ratio_of_what_the_model_wrote(monkeypatch):
    """Sums over the tokens of an answer, at the sampling temperature; and 0 to itself."""
    prompts = {str(i): [1 + i % 10, 2] for i in range(40)}
    sampler = sampler_of(small_model(), 8, temperature=0.8)
    texts = sampler.generate([*prompts.values()], 3, range(40))
    rows = [dict(id=key, tokens=[copy.tokens for copy in copies])
            for key, copies in zip(prompts, texts)]
    monkeypatch.setattr(evaluate, "load_model", lambda seed, *_: small_model(seed=seed))
    args = some_args(model=0, reference=1, revision=None, dtype="float32", temperature=0.8, samples=3,
                     out=None)
    problems = [dict(id=key, tokens=prompt) for key, prompt in prompts.items()]
    found = evaluate.divergence(rows, problems, args, "cpu")
    pairs = [(prompts[row["id"]], tokens) for row in rows for tokens in row["tokens"]]
    log_ratio = 0.0
    for pair in pairs:
        logp, ref_logp = (naive_logps(small_model(seed=seed), *pair, 0.8).sum() for seed in (0, 1))
        log_ratio += (logp - ref_logp).item()
    assert found["kl"] == pytest.approx(log_ratio / 120, rel=1e-4) and found["kl"] > 1
    count = sum(len(tokens) for _, tokens in pairs)
    assert found["kl_per_token"] == pytest.approx(log_ratio / count, rel=1e-4)
    assert found["kl_low"] < found["kl"] < found["kl_high"]
    args.reference = 0
    assert evaluate.divergence(rows, problems, args, "cpu")["kl"] == 0


@whole
def test_evaluation_lays_two_models_side_by_side(trained, tmp_path):
    both = ["tiny/model", str(trained[0] / "model")]
    done = inside(*evaluation(tmp_path, "--reference=tiny/model", "--show=2", models=both))
    results = json.loads((tmp_path / "results.json").read_text())
    before, after = (results[model]["tiny/test.jsonl"] for model in both)
    assert before["kl"] == 0 and after["kl"] > 0.01
    assert 0.25 < before["low"] < before["accuracy"] < before["high"] < 0.55
    assert after["difference"][0] == pytest.approx(after["accuracy"] - before["accuracy"])
    for words in ("pass@4", "maj@4", "KL/token", "against tiny/model", "── tiny/model: ", "; the answer"):
        assert words in done.stdout
    # the same command with another --show: nothing is sampled
    done = inside(*evaluation(tmp_path, "--reference=tiny/model", "--show=3", models=both))
    assert done.stdout.count(f"── {both[1]}: ") == 3 and "sampling" not in done.stderr
    assert (tmp_path / "accuracy.png").stat().st_size > 3000
