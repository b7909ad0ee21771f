"""The memory traffic of the head, ln π from the last hidden states, as it was and as it is. Without a GPU.

    python -m experiments.speed.head         10,752 tokens, a vocabulary of 152k and 1,536 dimensions, in bf16

Counted are the bytes that every operation but the matrix products reads and writes, forward and backward, on
tensors without data. A GPU that moves 4 TB/s takes a second for 4,000 GB.
"""

from types import SimpleNamespace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from train import Policy


class Traffic(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        size = lambda tree: sum(t.nbytes for t in tree_leaves(tree) if isinstance(t, torch.Tensor))
        name = func.overloadpacket.__name__
        if name in ("gather", "nll_loss_forward"):  # they read what they pick out
            self.bytes += 2 * size(out)
        elif name == "logsumexp":  # largest, difference, exp, sum: six passes
            self.bytes += 6 * size(args)
        elif name not in ("mm", "device") and not func.is_view:
            self.bytes += size((args, kwargs)) + size(out)
        return out


def head_as_it_was(self, states, targets, temperature):
    logits = self.model.get_output_embeddings()(states).float().div_(temperature)
    return logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)


def main():
    for label, head in (("before", head_as_it_was), ("now", Policy.head)):
        with FakeTensorMode(), Traffic() as traffic:
            linear = torch.nn.Linear(1536, 151936, bias=False, dtype=torch.bfloat16)
            policy = SimpleNamespace(model=SimpleNamespace(get_output_embeddings=lambda of=linear: of))
            states = torch.empty(10752, 1536, dtype=torch.bfloat16, requires_grad=True)
            targets = torch.zeros(10752, dtype=torch.long)
            traffic.bytes = 0
            parts = [checkpoint(head, policy, *part, 1.0, use_reentrant=False)
                     for part in zip(states.split(883), targets.split(883))]
            torch.cat(parts).sum().backward()
        print(f"{label:8s}{traffic.bytes / 1e9:6.0f} GB")


if __name__ == "__main__":
    main()
