"""How many answers Stage 1 needs: what is counted and measured."""

import json
import math
import shutil

import numpy as np
import pytest

import test_apo
import vstar
from experiments import lab, prior, samples
from test_apo import HERE, read_jsonl, whole

all_rows = test_apo.all_rows  # a fixture


def test_steps_between_two_evaluations():
    rows = [dict(step=0, accuracy=0.4), dict(step=1), dict(step=4, accuracy=0.6), dict(step=8, accuracy=1.0)]
    assert samples.steps_to(0.8, rows) == 6 and samples.steps_to(0.6, rows) == 4
    assert math.isnan(samples.steps_to(0.8, rows[:3]))


def test_the_prior_by_hand():
    """A prompt that is always solved and one that never is, each beside two answers of the mean exp(r/β1)."""
    rewards, both = np.repeat([[1.0], [0.0]], prior.SEEN + 3, 1), (math.exp(1 / prior.BETA1) + 1) / 2
    high, low = (prior.BETA1 * math.log((math.exp(r / prior.BETA1) + 2 * both) / 3) for r in (1, 0))
    assert prior.second_moment(rewards, 1, 2) == pytest.approx(((1 - high) ** 2 + low**2) / 2)
    assert prior.second_moment(rewards, 8, 0) == pytest.approx(0)


@whole
def test_every_n_gets_the_same_prompts(all_rows, tmp_path):
    first = tmp_path / "vstar.jsonl"
    for suffix in (".jsonl", ".config.json"):
        shutil.copy(all_rows.with_suffix(suffix), first.with_suffix(suffix))
    few, more = (read_jsonl(samples.first_prompts(first, count)) for count in (10, 20))
    assert len(few) == 10 and few == more[:10] and few != read_jsonl(first)[:10]


def test_the_second_moment_of_the_advantage():
    """By hand: half of the prompts always right, half right every other time; the mean of n answers."""
    rewards = np.tile([[1.0, 1.0], [1.0, 0.0]], (50, 1))
    for n in (1, 4):
        assert vstar.second_moment(rewards, math.inf, n)[0] == pytest.approx(0.25 + 0.25 / n)


@whole
def test_a_gradients_variance(all_rows, monkeypatch):
    """With answers alike, or all gradients as long, the measured and the simple product are one."""
    monkeypatch.setattr(samples, "CHOICES", (1, 8))
    monkeypatch.setattr(samples, "MOST", 8)
    found = samples.gradient(all_rows, count=16)
    assert found["8"] == [1, 1] and 0 <= found["accuracy"] <= 1 and found["squares"]["wrong"] > 0
    assert found["1"][1] > 1 and found["1"][0] > 0


def test_results_are_json(tmp_path, monkeypatch):
    """Which has no NaN. What never came to its accuracy is null."""
    monkeypatch.setattr(lab, "RESULTS", tmp_path)
    monkeypatch.setattr(lab, "machine", dict)
    lab.save("some", table=dict(steps=[1.5, math.nan], pair=(math.nan, 2)), seconds=np.float64(math.nan))
    for path in (*(HERE / "experiments/results").glob("*.json"), tmp_path / "some.json"):
        found = json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert found == dict(machine={}, table=dict(steps=[1.5, None], pair=[None, 2]), seconds=None)
