"""PPO, GRPO and REBEL, which the paper sets A*-PO against, and OAPL, in train.py's own loop.

    python -m experiments.baselines grpo                                    the embedded world, on any CPU
    torchrun --nproc_per_node 8 -m experiments.baselines ppo --vstar out/1.5B/vstar.jsonl
    python -m experiments.baselines rebel --help                            train.py's flags, and REBEL's own

Prompts, sampler, grader, optimizer, restart and logging are those of A*-PO, because the loop is. What differs
is a subclass of train.APO: how many completions a prompt gets, what the loss takes as constants, and the
loss. What an algorithm does not need (a critic, groups, the old policy's log-probabilities) is not made for
it. Without flags a run takes those of tiny/train.args, and it lies in out/NAME. The defaults are those of
verl, TRL (GRPO's group) and REBEL's release. `constant` is the control: A*-PO without Stage 1's V̂*.
"""

import math
import sys
from pathlib import Path

import torch

import train
from train import APO, Policy, apo_loss, on_tokens, sum_over_ranks, token_logps
from vstar import estimate_vstar, run_script


class Constant(APO):
    """A*-PO with one number in V̂*'s place: what is V̂*(x) worth?"""

    name, out = "constant", Path("out/constant")

    @classmethod
    def add_flags(cls, add):
        super().add_flags(add)
        add("--constant", float, "the number; default: the batch's mean reward", zero=True)
        add("--where", ["all", "solved", "unsolved"], "the prompts on which it stands: all, or those that "
            "π_ref solved in Stage 1, or those that it did not. Elsewhere V̂* stays")

    def constants(self, run, samples):
        constants = super().constants(run, samples)
        number = self.args.constant
        if number is None:
            total, count = sum_over_ranks([constants["reward"].sum(), len(samples)])
            number = total / count
        kinds = ["solved" if max(sample.problem["rewards"]) >= 1 else "unsolved" for sample in samples]
        chosen = torch.tensor([self.args.where in ("all", kind) for kind in kinds], device=run.device)
        return dict(constants, vstar=constants["vstar"].masked_fill(chosen, number))


class Baseline(APO):
    """What the others share: several updates may follow one batch. β2 is the weight of the KL to π_ref (but
    for OAPL)."""

    always_old_logp = False

    @classmethod
    def add_flags(cls, add):
        add("--beta2", 1e-3, "the weight of the KL to π_ref", zero=True)
        add("--passes", cls.passes, "times that a batch is gone over")

    def __init__(self, args):
        super().__init__(args)
        self.passes = args.passes

    def constants(self, run, samples):
        constants = super().constants(run, samples)
        del constants["vstar"]  # reward − V̂* is not their advantage
        # with several updates a batch π is no longer what wrote the completions: its first ln π are kept
        if self.args.minibatches * self.passes > 1 or self.always_old_logp:
            constants["old_logp"] = token_logps(run.policy, samples, self.args, run.device)
        return constants


# -----------------------------------------------------------------------------------------------------------
# REBEL


def rebel_loss(logp, old_logp, reward, eta):
    """Of two completions of a prompt, regress the difference of their log-ratios, against the policy that
    wrote them, onto the difference of their rewards. All (pairs, 2) → (pairs,)"""
    log_ratio = (logp - old_logp)[:, 0] - (logp - old_logp)[:, 1]
    better = reward[:, 0] - reward[:, 1]
    return (log_ratio / eta - better) ** 2  # arXiv 2404.16767, Alg. 1


class REBEL(Baseline):
    name, out, completions, passes, per_loss = "rebel", Path("out/rebel"), 2, 4, 2

    @classmethod
    def add_flags(cls, add):
        super().add_flags(add)
        add("--eta", 1.0, "η (its release's)")

    def count(self, samples):
        return len(samples) // 2

    def losses(self, logp, constants, completion_mask, inputs):
        old_logp = constants.get("old_logp", logp.detach())
        kl = (old_logp - constants["ref_logp"]).sum(-1)
        reward = constants["reward"] - self.args.beta2 * kl
        sequences = logp.sum(-1), old_logp.sum(-1), reward
        pairs = [values.unflatten(0, (len(values) // 2, 2)) for values in sequences]
        yield "loss", rebel_loss(*pairs, self.args.eta)


# -----------------------------------------------------------------------------------------------------------
# GRPO


def clipped_surrogate(logp, old_logp, advantage, clip_ratio):
    """PPO's surrogate as a loss per token: no gain from moving π/π_old further than clip_ratio."""
    ratio = (logp - old_logp).exp()
    bounded = ratio.clamp(1 - clip_ratio, 1 + clip_ratio)
    return -torch.minimum(ratio * advantage, bounded * advantage)  # arXiv 1707.06347, eq. 7


def group_advantage(reward, divide=True):
    """How much better than its group is a completion? (prompts, group) → alike; 0 in a group of equals."""
    advantage = reward - reward.mean(-1, keepdim=True)
    # arXiv 2402.03300, 4.1.2; 1e-6 is verl's
    return advantage / (reward.std(-1, keepdim=True) + 1e-6) if divide else advantage


def grpo_loss(logp, old_logp, ref_logp, advantage, mask, beta, clip_ratio, length=None):
    """Tokens (sequences, tokens), of which `mask` counts some; advantage (sequences,) → (sequences,)

    A mean over each completion's tokens; Dr. GRPO (arXiv 2503.20783) divides by the same `length` for all."""
    # arXiv 2402.03300, eq. 4: an estimate that is never negative
    kl = (ref_logp - logp).exp() - (ref_logp - logp) - 1
    losses = clipped_surrogate(logp, old_logp, advantage[:, None], clip_ratio) + beta * kl  # eq. 3
    return (losses * mask).sum(-1) / (length or mask.sum(-1))


class GRPO(Baseline):
    name, out, completions = "grpo", Path("out/grpo"), 8
    most_reward = math.inf  # divided by the group's deviation, a reward has no bound

    @classmethod
    def add_flags(cls, add):
        super().add_flags(add)
        add("--group", cls.completions, "completions a prompt (TRL's)")
        add("--dr_grpo", False, "divide neither by the completion's length nor by the rewards' deviation")
        add("--clip_ratio", 0.2, "how far π/π_old may go from 1 (verl's)")

    def __init__(self, args):
        super().__init__(args)
        self.completions = args.group
        if args.group < 2:
            train.fail(f"--group {args.group}: GRPO compares a group of completions, two or more")

    def constants(self, run, samples):
        constants = super().constants(run, samples)
        prompts = len(samples) // self.completions
        groups = constants["reward"].unflatten(0, (prompts, self.completions))
        return dict(constants, advantage=group_advantage(groups, not self.args.dr_grpo).flatten())

    def losses(self, logp, constants, completion_mask, inputs):
        old_logp = constants.get("old_logp", logp.detach())
        length = self.args.max_new_tokens if self.args.dr_grpo else None
        yield "loss", grpo_loss(logp, old_logp, constants["ref_logp"], constants["advantage"],
                                completion_mask, self.args.beta2, self.args.clip_ratio, length)


# -----------------------------------------------------------------------------------------------------------
# PPO


def gae(reward, value, gamma, lam):
    """Σ_l (γλ)^l δ_{t+l}, δ_t = r_t + γ V_{t+1} − V_t; all (sequences, tokens), 0 after the completion."""
    advantage, later = torch.zeros_like(value), torch.zeros_like(value[:, 0])
    following = torch.cat([value[:, 1:], later[:, None]], dim=1)
    for t in reversed(range(value.shape[1])):  # arXiv 1506.02438, eq. 16
        delta = reward[:, t] + gamma * following[:, t] - value[:, t]
        advantage[:, t] = later = delta + gamma * lam * later
    return advantage


def value_loss(value, old_value, returns, value_clip):
    """The critic's squared error per token, without gain from moving further than value_clip."""
    near = old_value + (value - old_value).clamp(-value_clip, value_clip)
    return 0.5 * torch.maximum((value - returns) ** 2, (near - returns) ** 2)  # verl's and TRL's


class Critic(Policy):
    """The policy's network, whose head gives one number, the reward still to come, before each token."""

    def __init__(self, model, recompute=False):
        head = torch.nn.Linear(model.get_output_embeddings().weight.shape[1], 1)
        for parameter in head.parameters():
            torch.nn.init.zeros_(parameter)
        model.set_output_embeddings(head)
        super().__init__(model, recompute)

    def head(self, states, targets, temperature):
        return self.model.get_output_embeddings()(states)[:, 0].float()


class PPO(Baseline):
    name, out, always_old_logp = "ppo", Path("out/ppo"), True  # the KL in the reward needs it

    @classmethod
    def add_flags(cls, add):
        super().add_flags(add)
        add("--critic_lr", float, "the critic's learning rate; default: ten times --lr, as in verl, whose "
            "values the other defaults are, too")
        add("--clip_ratio", 0.2, "how far π/π_old may go from 1")
        add("--value_clip", 0.5, "how far a value may go from what it was")
        add("--gamma", 1.0, "γ, by which later rewards are discounted", zero=True)
        add("--lam", 1.0, "λ of the advantage estimate; 1: rewards alone, 0: the critic alone", zero=True)

    def networks(self, make):
        self.critic = make(Critic)
        return [(self.critic, self.args.critic_lr or 10 * self.args.lr)]

    @torch.no_grad()
    def constants(self, run, samples):
        constants = super().constants(run, samples)
        ref_logp, old_logp = constants["ref_logp"], constants["old_logp"]
        lengths = [len(sample.completion.tokens) for sample in samples]
        completion = on_tokens(samples, [[1.0] * length for length in lengths], ref_logp) > 0
        last = on_tokens(samples, [[0.0] * (length - 1) + [1.0] for length in lengths], ref_logp)
        reward = constants["reward"][:, None] * last - self.args.beta2 * (old_logp - ref_logp)
        value = token_logps(self.critic, samples, self.args, run.device)
        advantage = gae(reward, value, self.args.gamma, self.args.lam)
        returns = advantage + value
        # whitened over the tokens of all processes, as verl and TRL do
        of_tokens = advantage[completion]
        sums = [completion.sum(), of_tokens.sum(), (of_tokens**2).sum()]
        tokens, first, second = sum_over_ranks(sums)
        mean = first / tokens
        advantage = (advantage - mean) / math.sqrt(second / tokens - mean**2 + 1e-8)
        return dict(constants, value=value, returns=returns, advantage=advantage)

    def count(self, samples):  # a mean over tokens
        return sum(len(sample.completion.tokens) for sample in samples)

    def losses(self, logp, constants, completion_mask, inputs):
        old_logp, advantage = constants["old_logp"], constants["advantage"]
        losses = clipped_surrogate(logp, old_logp, advantage, self.args.clip_ratio)
        yield "loss", (losses * completion_mask).sum(-1)
        # the critic runs only now, when the policy's graph is gone
        value = self.critic(**inputs)[: len(logp)]
        errors = value_loss(value, constants["value"], constants["returns"], self.args.value_clip)
        yield "critic_loss", (errors * completion_mask).sum(-1)


# -----------------------------------------------------------------------------------------------------------
# OAPL


class OAPL(Baseline):
    """A*-PO's regression, with the policy that wrote the batch in π_ref's place, and V̂* from the
    completion's own group (arXiv 2602.19362). So Stage 1's V̂* is not used, and nothing holds π at π_ref.

    --minibatches 4 takes four steps of a batch, the last three steps behind: the paper's lag. With --beta1
    inf V̂* is the group's mean reward, and this is PMD-mean (arXiv 2602.05933).
    """

    name, out, completions = "oapl", Path("out/oapl"), 8
    most_reward = math.inf  # the KL to π_ref has no bound here, so `diagnose` does not warn of it

    @classmethod
    def add_flags(cls, add):
        add("--beta2", 1e-3, "β2: how strongly the policy is held at the one that wrote the batch")
        add("--passes", cls.passes, "times that a batch is gone over")
        add("--group", cls.completions, "completions a prompt")

    def __init__(self, args):
        super().__init__(args)
        self.completions = args.group

    def constants(self, run, samples):
        constants = super().constants(run, samples)
        prompts = len(samples) // self.completions
        groups = constants["reward"].unflatten(0, (prompts, self.completions))
        vstar = torch.as_tensor(estimate_vstar(groups.cpu(), self.args.beta1)).to(groups)
        return dict(constants, vstar=vstar.repeat_interleave(self.completions))

    def losses(self, logp, constants, completion_mask, inputs):
        log_pi, old_logp = logp.sum(-1), constants.get("old_logp", logp.detach()).sum(-1)
        yield "loss", apo_loss(log_pi, old_logp, constants["reward"], constants["vstar"], self.args.beta2)


ALGORITHMS = {kind.name: kind for kind in (PPO, GRPO, REBEL, OAPL, Constant)}


def main():
    if len(sys.argv) < 2 or sys.argv[1] not in ALGORITHMS:
        train.fail(f"say which: python -m experiments.baselines {'|'.join(ALGORITHMS)}, and then flags")
    train.main(ALGORITHMS[sys.argv.pop(1)])


if __name__ == "__main__":
    run_script(main)
