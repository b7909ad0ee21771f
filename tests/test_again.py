"""Completions whose reward was edited, or is another, are graded again; none is sampled anew."""

import json
import shutil
from types import SimpleNamespace

import pytest

import rewards
import vstar
from tests.helpers import (
    HERE,
    ends_in_one_line,
    evaluation,
    inside,
    own_reward,
    read_jsonl,
    refused,
    some_args,
    stage1,
    stage2,
    whole,
)
from vstar import Completion


@pytest.fixture
def sample(tmp_path, monkeypatch):
    """sample(count, n, named) → how many completions Stage 1's sampler wrote: a prompt's number, and then an
    "a" for each completion before."""
    written = []

    def stream(chunks, n):
        for index, (prompts, _, first) in enumerate(chunks):
            written.extend(range(len(prompts) * (n - first)))
            yield index, [[Completion([*prompt, *"a" * i], i % 2 == 0, []) for i in range(first, n)]
                          for prompt in prompts]

    sampler = SimpleNamespace(stream=stream, close=lambda: None)
    monkeypatch.setattr(vstar, "make_sampler", lambda *_: sampler)
    tokenizer = SimpleNamespace(decode=lambda tokens, **_: "".join(tokens))

    def sample_all(count, n, named, out="v.jsonl", beta1=0.5):
        written.clear()
        args = some_args(samples=n, decode_rows=64, out=tmp_path / out, seed=0, reward=named)
        problems = [dict(id=f"{i:04d}", prompt=f"{i}=", answer=str(i), weight=i % 3, tokens=[str(i)])
                    for i in range(count)]
        vstar.sample_all(args, problems, tokenizer, [0], "cpu", beta1)
        return len(written)

    return sample_all


def test_an_edited_reward_grades_again(sample, tmp_path, capsys):
    """…with the problem's fields, and says what it changed. What --samples adds is the only thing sampled."""
    out, fresh = tmp_path / "v.jsonl", tmp_path / "fresh.jsonl"
    assert sample(4, 2, own_reward(tmp_path, "return 1.0")) == 8
    assert sample(4, 2, own_reward(tmp_path, "return 1.0  # the same")) == 0
    assert "of 4 problems are graded again; 0 rewards changed\n" in capsys.readouterr().out
    named = own_reward(tmp_path, "return row['weight'] * finished + len(response)")
    assert sample(4, 2, named) == 0
    text = capsys.readouterr().out
    assert "4 problems are graded again; 6 rewards changed" in text and text.count("── reward 1, now ") == 3
    assert "── 0=\n0a\n── reward 1, now 2\n" in text
    assert sample(4, 2, named, "fresh.jsonl") == 8 and out.read_bytes() == fresh.read_bytes()
    assert sample(4, 2, named) == 0 and "graded again" not in capsys.readouterr().out
    named = own_reward(tmp_path, "return -1.0 * finished")
    assert sample(4, 5, named) == 12
    fresh.unlink()
    assert sample(4, 5, named, "fresh.jsonl") == 20 and out.read_bytes() == fresh.read_bytes()
    fresh.write_text("".join(
        json.dumps({key: value for key, value in row.items() if key != "graded_by"}) + "\n"
        for row in read_jsonl(out)))  # an earlier version's
    assert sample(4, 5, named, "fresh.jsonl") == 0 and fresh.read_bytes() == out.read_bytes()
    assert [list(row)[-2:] for row in read_jsonl(out)] == [["vstar", "graded_by"]] * 4
    assert sample(4, 2, named, "eval.jsonl", beta1=None) == 8  # an evaluation's have no V̂*
    assert all("vstar" not in row for row in read_jsonl(tmp_path / "eval.jsonl"))


def test_a_killed_grading_is_resumed(sample, tmp_path, monkeypatch):
    """Of 600 problems no more is graded twice than the chunk that the kill cut off."""
    sample(600, 1, own_reward(tmp_path, "return 0.0"))
    named, graded, write = own_reward(tmp_path, "return float(len(response))"), [], vstar.write_rows
    judge = vstar.rewards_of
    counted = lambda args, answers: graded.append(len(answers)) or judge(args, answers)
    monkeypatch.setattr(vstar, "rewards_of", counted)

    def killed(path, rows):
        if len(graded) == 2:
            raise KeyboardInterrupt
        write(path, rows)

    monkeypatch.setattr(vstar, "write_rows", killed)
    with pytest.raises(KeyboardInterrupt):
        sample(600, 1, named)
    monkeypatch.setattr(vstar, "write_rows", write)
    assert sample(600, 1, named) == 0 and graded == [256, 256, 256, 88]
    assert [row["rewards"] for row in read_jsonl(tmp_path / "v.jsonl")] == [
        [float(len(str(i)))] for i in range(600)]
    # an edit between a kill and the next start: nothing of the first edit stays
    graded.clear()
    own_reward(tmp_path, "return 2.0")
    monkeypatch.setattr(vstar, "write_rows", killed)
    with pytest.raises(KeyboardInterrupt):
        sample(600, 1, named)
    monkeypatch.setattr(vstar, "write_rows", write)
    own_reward(tmp_path, "return 3.0")
    assert sample(600, 1, named) == 0
    assert {row["rewards"][0] for row in read_jsonl(tmp_path / "v.jsonl")} == {3}


@pytest.mark.parametrize("body,words", [
    ("return 1.0 / (row['id'] < '0300')", ["line 2", "ZeroDivisionError", "problem 0300"]),
    ("return float('nan')", ["nan", "problem 0000"]),
    ("return row['nothing']", ["KeyError", "problem 0000"]),
])
def test_a_reward_that_fails_at_grading_again_costs_nothing(body, words, sample, tmp_path, capsys):
    out, fresh = tmp_path / "v.jsonl", tmp_path / "fresh.jsonl"
    sample(400, 2, own_reward(tmp_path, "return 1.0"))
    before, named = out.read_bytes(), own_reward(tmp_path, body)
    with pytest.raises(SystemExit) as stop:
        sample(400, 2, named)
    done = SimpleNamespace(returncode=stop.value.code, stderr=capsys.readouterr().err)
    refused(done, f"--reward {named}", *words, alone=False)
    assert out.read_bytes() == before
    own_reward(tmp_path, "return 0.5")
    assert sample(400, 2, named) == 0 and sample(400, 2, named, "fresh.jsonl") == 800
    assert out.read_bytes() == fresh.read_bytes()
    torn = vstar.parts_of(out) / "1.jsonl"
    torn.parent.mkdir()
    torn.write_text('{"id": ')
    own_reward(tmp_path, "return 1.0")
    capsys.readouterr()
    ends_in_one_line(capsys, lambda: sample(400, 2, named), "1.jsonl, line 1", "remove this line")
    assert out.read_bytes() == fresh.read_bytes()


def test_more_completions_by_an_older_reward_are_kept(sample, tmp_path, monkeypatch):
    """Graded, then sampled on by a reward that is edited back before the parts are merged."""
    named = own_reward(tmp_path, "return 1.0")
    sample(3, 2, named)
    own_reward(tmp_path, "return 2.0")
    monkeypatch.setattr(vstar, "remove", lambda path: 1 / 0)  # the merge is the last that it does
    merged, write = tmp_path / "v.jsonl", vstar.write_rows
    monkeypatch.setattr(vstar, "write_rows", lambda path, rows: path != merged and write(path, rows))
    with pytest.raises(ZeroDivisionError):
        sample(3, 4, named)
    monkeypatch.undo()
    assert {len(row["rewards"]) for row in read_jsonl(merged)} == {2}
    own_reward(tmp_path, "return 1.0")
    args = some_args(samples=4, out=merged, reward=named)
    assert {len(row["rewards"]) for row in vstar.existing_rows(args).values()} == {4}


def test_the_grader_itself_is_a_reward_that_can_change(sample, tmp_path, monkeypatch):
    assert sample(3, 1, None) == 3
    stamps = {row["graded_by"] for row in read_jsonl(tmp_path / "v.jsonl")}
    newer = tmp_path / "rewards.py"
    newer.write_text((HERE / "rewards.py").read_text() + "\n# newer\n")
    monkeypatch.setattr(rewards, "__file__", str(newer))
    rewards.load_reward.cache_clear()
    assert sample(3, 1, None) == 0
    assert stamps.isdisjoint(row["graded_by"] for row in read_jsonl(tmp_path / "v.jsonl"))
    monkeypatch.undo()
    rewards.load_reward.cache_clear()


@whole
def test_both_stages_and_an_evaluation_after_an_edit(tmp_path, monkeypatch):
    """train.py names the way out, takes what it gives, and refuses it for a run with the earlier reward."""
    named, out = own_reward(tmp_path, "return 1.0 * finished"), tmp_path / "v.jsonl"
    first = lambda name: stage1(out, "--limit=12", f"--reward={name}")
    again = lambda name: evaluation(tmp_path / "e", "--limit=8", f"--reward={name}")
    train_on = stage2(out, tmp_path / "run", "--steps=1", "--batch_size=8", "--eval_limit=8")
    for command in (first(named), again(named), train_on):
        inside(*command)
    shutil.copy(tmp_path / "mine.py", tmp_path / "other.py")
    with open(tmp_path / "other.py", "a") as file:
        file.write("\ndef judge(response, row, finished):\n    return 3.0\n")
    monkeypatch.setattr(vstar, "make_sampler", None)  # nothing is sampled
    own_reward(tmp_path, "return 2.0 * finished")
    refused(inside(*train_on, check=False), "reward's file changed since Stage 1",
            "the same vstar.py command grades its completions again")
    assert "problems are graded again" in inside(*first(named)).stdout
    other = f"{tmp_path}/other.py:judge"
    done = inside(*first(other))
    assert "12 problems are graded again; 24 rewards changed" in done.stdout and "tokens/s" not in done.stdout
    assert {reward for row in read_jsonl(out) for reward in row["rewards"]} == {3}
    assert "mean V̂*           3.000" in done.stdout
    done = inside(*again(other))
    assert "8 problems are graded again; 32 rewards changed" in done.stdout
    (results,) = json.loads((tmp_path / "e/results.json").read_text())["tiny/model"].values()
    assert results["reward"] == 3
    (path,) = (tmp_path / "e").glob("*.jsonl")
    assert len(read_jsonl(path)) == 8 and not any("vstar" in row for row in read_jsonl(path))
    monkeypatch.undo()
    refused(inside(*train_on, check=False), f"Stage 1's --reward (was {named}, now {other})",
            "Stage 1's reward's file (was ", "--overwrite")
    inside(*train_on, "--overwrite")
