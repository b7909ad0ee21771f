"""The gradient's noise, by hand."""

import json

import numpy as np
import pytest
import torch

from experiments import lab, noise
from tests.helpers import inside, whole


def test_noise_by_hand():
    # gradients 3 and 1 along one axis: E = (9 + 1)/2 = 5; |g|² = 3 · 1 from the one pair; (5 − 3) / 3
    found = noise.noise_of(np.array([1.0, 1.0]), np.array([9.0, 1.0]), torch.tensor([4.0, 0.0]))
    assert found == pytest.approx(dict(moment=1, square=5, noise=2 / 3))


def test_noise_is_the_covariance_over_the_mean():
    """Of normal gradients with mean (2, 0) and deviation 1 in both: tr Σ / |g|² = 2/4."""
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(100_000, 2)) + [2, 0]
    total = torch.tensor(gradients.sum(0))
    found = noise.noise_of(np.ones(100_000), (gradients**2).sum(1), total)
    assert found["noise"] == pytest.approx(0.5, rel=0.02)


def test_what_stands_for_vstar():
    first = np.zeros((3, 8))
    first[0, 0] = first[1, :] = 1
    rewards = np.array([0.0, 1.0, 0.0])
    choices = noise.baselines_of(first, rewards, first.max(1) >= 1, 0.5)
    assert choices["N = 1"].tolist() == [1, 1, 0] and choices["a constant"].tolist() == [1 / 3] * 3
    assert choices["a constant where solved"].tolist() == [1 / 3, 1 / 3, 0]
    assert choices["a constant where unsolved"][[1, 2]].tolist() == pytest.approx([1, 1 / 3])


@whole
def test_at_toy_size(all_rows, tmp_path, monkeypatch):
    monkeypatch.setattr(lab, "RESULTS", tmp_path)
    monkeypatch.setattr(lab, "machine", dict)
    inside("-m", "experiments.noise", f"--vstar={all_rows}", "--prompts=48", "--name=toy")
    found = json.loads((tmp_path / "toy.json").read_text())
    assert 0 < found["accuracy"] < 1 and found["noise"]["N = 2"]["moment"] < found["noise"]["N = 1"]["moment"]
    for choice in found["noise"]:
        assert sum(part[choice] for part in found["shares"].values()) == pytest.approx(1)
