"""Files appear whole, go on only with the settings that made them, and are refused in one line where they
are broken."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch

import train
import vstar
from tests.helpers import (
    HERE,
    all_of_stage1,
    copy_rows,
    ends_in_one_line,
    evaluation,
    full_disk,
    inside,
    metrics,
    own_reward,
    read_jsonl,
    refused,
    settings_in,
    stage1,
    stage2,
    whole,
)

# ---------------------------------------------------------------------------------------------------------
# whole or not at all


@pytest.mark.parametrize("name", ["file.jsonl", "folder"])
def test_what_others_read_appears_whole(name, tmp_path, capsys, monkeypatch):
    path, done, fsync, replace = tmp_path / name, [], os.fsync, os.replace
    inner = "in/file" if name == "folder" else ""
    # in this order, or after a power cut the new name may stand before empty pages
    monkeypatch.setattr(os, "fsync", lambda file: done.append("fsync") or fsync(file))
    monkeypatch.setattr(os, "replace", lambda *paths: done.append("replace") or replace(*paths))

    def write(text, error=None, **more):
        with vstar.atomic_write(path, **more) as aside:
            (aside / inner).parent.mkdir(parents=True, exist_ok=True)
            (aside / inner).write_text(text)
            if error:
                raise error

    write("one")
    assert (path / inner).read_text() == "one" and done == ["fsync", "replace"]
    for stop in (KeyboardInterrupt, SystemExit, RuntimeError):
        with pytest.raises(stop):
            write("half", stop())
        assert (path / inner).read_text() == "one"
    full = lambda: write("half", OSError(28, "No space left on device"))
    ends_in_one_line(capsys, full, f"cannot write {path}: No space left", "Is the disk full?")
    assert (path / inner).read_text() == "one" and os.listdir(tmp_path) == [name]
    write("two", mine=False)  # another process's to rename
    assert (path / inner).read_text() == "one"
    with vstar.atomic_write(path):
        pass
    assert (path / inner).read_text() == "two" and os.listdir(tmp_path) == [name]


# ---------------------------------------------------------------------------------------------------------
# settings


def test_guard_settings(tmp_path, capsys):
    """A run goes on only with the settings that it was begun with, but for those that may change."""
    made, config = tmp_path / "rows.jsonl", tmp_path / "rows.config.json"

    def guard(algorithm="apo", **more):
        flags = dict(model="m", samples=8, engine="transformers", revision=None)
        flags |= dict(out=made, overwrite=False, decode_rows=1, show=3)
        args = SimpleNamespace(**flags | more)
        vstar.guard_settings(args, config, [made], [made], ["show"], algorithm=algorithm)

    guard()
    saved = json.loads(config.read_text())
    kept = dict(model="m", samples=8, engine="transformers", revision=None, algorithm="apo")
    assert saved["settings"] == kept
    assert saved["samples"] == 8 and saved["versions"]["torch"] == torch.__version__
    made.write_text("rows")
    guard(decode_rows=2, show=4, out=tmp_path)
    changed = "--samples (was 8, now 4), algorithm (was apo, now ppo); --overwrite throws it away"
    others = f"{config}: the run was begun with other settings: {changed}"
    ends_in_one_line(capsys, lambda: guard("ppo", samples=4), others)
    ends_in_one_line(capsys, lambda: guard(new=1), "--new (was None, now 1)")  # a flag that there was not
    config.write_text(json.dumps(dict(saved, settings=saved["settings"] | dict(gone=1))))
    ends_in_one_line(capsys, guard, "gone (was 1, now None)")  # or is no more
    # the third: an earlier version's
    for broken in ("{", "[]", json.dumps(saved["settings"]), '{"settings": 3}'):
        config.write_text(broken)
        ends_in_one_line(capsys, guard, "rows.config.json", "--overwrite")
    config.unlink()
    ends_in_one_line(capsys, guard, "rows.jsonl is there", "rows.config.json", "--overwrite")
    guard(overwrite=True, samples=4)
    assert not made.exists() and settings_in(config)["samples"] == 4
    guard(samples=2, temperature=3)  # nothing is lost by that
    assert settings_in(config)["temperature"] == 3


def test_what_follows_from_other_settings_is_compared_one_by_one():
    args = SimpleNamespace(lr=1, out="run")
    old, new = (dict(lr=lr, algorithm="apo", stage1={"seed": lr, "model": "m", "model's files": lr})
                for lr in (1, 2))
    assert [*vstar.differences(args, old, new)] == [
        "--lr (was 1, now 2)", "Stage 1's --seed (was 1, now 2)", "Stage 1's model's files (was 1, now 2)"]
    assert [*vstar.differences(args, old, new | dict(stage1=old["stage1"]), ["lr"])] == []


def test_overwrite_takes_what_a_run_made(trained, tmp_path, capsys):
    """A user's file in one of its folders is named, and nothing is touched; beside them it stays."""
    out = shutil.copytree(trained[0], tmp_path / "run")
    (out / "notes.txt").write_text("mine")
    names = ["checkpoint", "metrics.jsonl", "curves.png", "samples", "model"]
    args = SimpleNamespace(overwrite=True, out=out)
    guard = lambda: vstar.guard_settings(args, out / "config.json", [out / name for name in names], [])
    for name in ("samples/notes.txt", "samples/best.jsonl", "checkpoint/old/notes.md", "model/notes.txt",
                 "checkpoint/00000006/mine.py"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
        before = sorted(out.rglob("*"))
        ends_in_one_line(capsys, guard, f"{out}/{name}", "move it")
        assert sorted(out.rglob("*")) == before
        (out / name).unlink()
    torn = out / "samples/000009.jsonl.tmp", out / "samples/000003.held_out.jsonl"
    for path in torn:
        path.write_text("")
    guard()
    assert sorted(os.listdir(out)) == ["config.json", "notes.txt"]


@pytest.mark.parametrize("name", [
    "model-00001-of-00002.safetensors", "model.safetensors.index.json", "generation_config.json",
    "vocab.json", "merges.txt", "tokenizer.model", "special_tokens_map.json", "chat_template.jinja"])
def test_what_transformers_saves_is_a_runs(name):
    assert vstar.MADE.fullmatch(name)


@whole
def test_a_run_of_which_nothing_was_kept_is_not_refused(trained, all_rows, tmp_path):
    """Neither Stage 1 before its first chunk nor Stage 2 before its first checkpoint."""
    out = tmp_path / "v.jsonl"
    inside(*stage1(out, "--limit=4"))
    out.unlink()
    torn = vstar.parts_of(out) / "1.jsonl.tmp"  # as a kill leaves it
    torn.parent.mkdir()
    torn.write_text("{")
    inside(*stage1(out, "--limit=4", "--seed=3"))
    assert settings_in(tmp_path / "v.config.json")["seed"] == 3
    refused(inside(*stage1(out, "--limit=4", "--seed=4"), check=False), "--seed (was 3, now 4)")

    run = shutil.copytree(trained[0], tmp_path / "run")
    shutil.rmtree(run / "model")
    command = stage2(all_rows, run, "--lr=1e-3", "--steps=1", "--eval_limit=1", "--show_every=9")
    refused(inside(*command, check=False), "--lr (was 0.0003, now 0.001)")
    shutil.rmtree(run / "checkpoint")
    inside(*command)
    assert [row["step"] for row in metrics(run)] == [0, 1]
    assert not list(run.glob("samples/000006*"))  # none of the other settings


@whole
def test_lost_rows_are_noticed(trained, all_rows, undisturbed, tmp_path):
    """Stage 2 says how many there are, and the command that brings them back; it does, to the byte."""
    lines = undisturbed[0].read_text().splitlines()
    out = copy_rows(undisturbed[0], tmp_path / "v.jsonl", lines[:100] + lines[104:])
    refused(inside(*stage2(out, tmp_path / "run"), check=False),
            f"{out}: 380 rows, and Stage 1 had 384 problems", "the same vstar.py command samples")
    inside(*stage1(out))
    assert out.read_bytes() == undisturbed[0].read_bytes()


def test_out_spares_the_model_and_the_problems(tmp_path, capsys):
    """A second round, whose --out is the first one's by default: π_ref lies in what would be thrown away."""
    model, rows = tmp_path / "model", tmp_path / "metrics.jsonl"
    model.mkdir()
    rows.write_text("rows")
    args = SimpleNamespace(model=str(model), overwrite=True, out="run")
    guard = lambda: vstar.guard_settings(args, tmp_path / "config.json", [rows, model], [])
    ends_in_one_line(capsys, guard, "--out run would take the place of --model", "name another")
    args.model, args.data = "tiny/model", str(rows)  # nor one's own problems
    ends_in_one_line(capsys, guard, "--out run would take the place of --data", "name another")
    assert model.exists() and rows.exists()


def test_what_stands_behind_the_names(tmp_path):
    """The prints of a model, a reward and problems differ where the files' content does."""
    seen = set()
    for content in (b"one", b"two"):
        for name in ("model.safetensors",
                     "pytorch_model.bin", "tokenizer_config.json", "chat_template.jinja"):
            (tmp_path / name).write_bytes(content)
            seen.add(vstar.fingerprint(tmp_path)["model's files"])
    assert len(seen) == 8
    named = lambda line: vstar.fingerprint("tiny/model", reward=own_reward(tmp_path, line))
    assert named("return 1") != named("return 0")
    problem = dict(id="1", prompt="a", answer="1", target=1, tokens=[1])
    target, dated = dict(problem, target=2), dict(problem, prompt="on Monday: a")
    first, other, later = (vstar.hash_of([one]) for one in (problem, target, dated))
    assert first == later != other  # a chat template may tell the date


@whole
def test_what_stands_behind_the_names_may_not_change(tmp_path):
    """A model trained anew in the same folder, or an edited file of problems: old rows are not taken for
    theirs."""
    shutil.copytree(HERE / "tiny/model", tmp_path / "model")
    data, out = tmp_path / "data.jsonl", tmp_path / "v.jsonl"
    data.write_text("".join((HERE / "tiny/train.jsonl").read_text().splitlines(keepends=True)[:4]))
    command = stage1(out, f"--model={tmp_path}/model", f"--data={data}")
    inside(*command)
    before, text = out.read_bytes(), data.read_text()
    refused(inside(*command, "--seed=4", "--beta1=1", check=False), "was begun with other settings: "
            "--beta1 (was 0.5, now 1.0), --seed (was 0, now 4); --overwrite throws it away")
    data.write_text(text.replace('"answer": "', '"answer": "1', 1))
    refused(inside(*command, check=False), "data's problems (was", "--overwrite")
    data.write_text(text)
    path = tmp_path / "model/model.safetensors"
    path.write_bytes(path.read_bytes()[:-3000] + bytes(3000))
    refused(inside(*command, check=False), "model's files (was", "--overwrite")
    refused(inside(*stage2(out, tmp_path / "run"), check=False), "files changed since Stage 1", "vstar.py")
    shutil.rmtree(tmp_path / "model")
    done = inside(*stage2(out, tmp_path / "run"), check=False)
    refused(done, f"--model {tmp_path}/model", "no such folder")
    assert out.read_bytes() == before


@whole
@pytest.mark.parametrize("more,words", [
    (["--lr=1e-3", "--beta2=0.5"],
     ["--lr (was 0.0003, now 0.001)", "--beta2 (was 0.1, now 0.5)", "--overwrite"]),
    (["--beta1=2"], ["--beta1 (was 0.5, now 2.0)"]),
    (["--lora=4"], ["--lora (was None, now 4)"]),
    (["--minibatches=99"], ["--minibatches 99", "--batch_size 25"]),
    (["--wandb=x"], ["--wandb", "not installed"]),
    (["--samples=4"], ["--samples (was 8, now 4)"]),
    (["--samples=9"], ["8 completions per prompt, not --samples 9"]),
    (["--eval_data=nowhere.jsonl"], ["nowhere.jsonl"]),
    # accuracy before and after is of the same
    (["--eval_data=tiny/train.jsonl"], ["eval_data's problems (was"]),
    (["--steps=4"], ["is at step 6 already, beyond --steps 4"]),
])
def test_stage2_refuses(more, words, trained, all_rows):
    refused(inside(*stage2(all_rows, trained[0], *more), check=False), *words)


@whole
def test_an_evaluation_resumes_only_with_its_settings(tmp_path):
    """All but what is shown, and --reference where the tokens were kept."""
    command = lambda *more: evaluation(tmp_path, "--limit=8", "--samples=2", *more)
    inside(*command("--reference=tiny/model"))
    refused(inside(*command("--reference=tiny/model", "--temperature=0.5"), check=False),
            "--temperature (was 1.0, now 0.5)")
    refused(inside(*command(), check=False), " keep_tokens (was True, now False)")
    inside(*command("--reference=tiny/model", "--show=1", "--tokens_per_microbatch=99"))
    (path,) = tmp_path.glob("*test.jsonl.jsonl")
    path.write_text(path.read_text()[:-40])
    refused(inside(*command("--reference=tiny/model"), check=False), path.name, "line 8", "remove this line")


def test_a_stage1_of_an_earlier_version_is_refused(tmp_path, capsys):
    """Nothing that stood under another name is misread, or taken for a default."""
    args = train.make_parser(train.APO).parse_args([f"--vstar={tmp_path}/v.jsonl"])
    (tmp_path / "v.jsonl").write_text("")
    settings = {**dict.fromkeys(train.FROM_STAGE1), "beta1": 0.5}
    settings |= {"number of problems": 3, "problems' ids": ""}
    for gone in ("temperature", "number of problems"):
        missing = {key: value for key, value in settings.items() if key != gone}
        for old in (dict(settings=settings), dict(settings=missing, samples=8), settings):
            (tmp_path / "v.config.json").write_text(json.dumps(old))
            ends_in_one_line(capsys, lambda: train.read_stage1(args), "v.config.json", "run it again")
    (tmp_path / "v.config.json").write_text(json.dumps(dict(settings=settings, samples=8)))
    words = "v.jsonl: 0 rows, and Stage 1 had 3 problems", "the same vstar.py command samples"
    ends_in_one_line(capsys, lambda: train.read_stage1(args), *words)
    args.temperature = 0
    ends_in_one_line(capsys, lambda: train.settle(args, {}, 8, []), "greedy completions")


# ---------------------------------------------------------------------------------------------------------
# checkpoints


def test_a_restart_finds_the_last_whole_checkpoint_and_its_rows(tmp_path):
    for name in ("00000002", "00000004", "00000006.tmp", "notes"):
        (tmp_path / "checkpoint" / name).mkdir(parents=True)
    assert train.last_checkpoint(tmp_path) == 4 and train.last_checkpoint(tmp_path / "new") == 0
    assert sorted(os.listdir(tmp_path / "checkpoint")) == ["00000002", "00000004", "notes"]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(dict(step=step)) + "\n"
                            for step in range(7)) + '{"step"')
    kept = train.read_metrics(path, 4)
    assert kept == read_jsonl(path) == [dict(step=step) for step in range(5)]
    assert train.read_metrics(path, 0) == [] and path.read_text() == ""


# ---------------------------------------------------------------------------------------------------------
# what is broken: one clear line, and nothing is lost


@whole
def test_broken_files_of_stage1(tmp_path):
    model = shutil.copytree(HERE / "tiny/model", tmp_path / "model")
    command = stage1(tmp_path / "m.jsonl", f"--model={model}", "--limit=4", "--overwrite")
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    refused(inside(*command, check=False), str(model), alone=False)
    path.write_bytes(b"")
    refused(inside(*command, check=False), str(model), alone=False)
    path.unlink()
    refused(inside(*evaluation(tmp_path / "o", models=[model]), check=False),
            str(model), "model.safetensors")
    shutil.copy(HERE / "tiny/model/model.safetensors", path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    refused(inside(*command, check=False), "tokenizer")
    refused(inside(*stage1("/proc/out/vstar.jsonl"), check=False), "/proc/out")  # nobody may write there
    with full_disk(kilobytes=10):
        done = inside(*stage1(tmp_path / "full.jsonl", "--limit=128"), check=False)
    refused(done, "cannot write", ".jsonl: File too large", alone=False)


@whole
def test_a_torn_part_of_stage1(tmp_path):
    out, torn = tmp_path / "p.jsonl", tmp_path / "p.parts/1.jsonl"
    inside(*stage1(out, "--limit=4"))
    before = out.read_bytes()
    out.unlink()
    torn.parent.mkdir()
    torn.write_text("{}")
    refused(inside(*stage1(out, "--limit=4"), check=False), "1.jsonl, line 1", "remove this line")
    torn.unlink()
    inside(*stage1(out, "--limit=4"))
    assert out.read_bytes() == before


@whole
def test_broken_files_of_stage2(trained, all_rows, tmp_path):
    lines = all_rows.read_text().splitlines()
    broken = copy_rows(all_rows, tmp_path / "vstar.jsonl",
                       [*lines[:500], lines[500][:40], *lines[501:]])
    refused(inside(*stage2(broken, tmp_path / "r"), check=False), "vstar.jsonl", "line 501")
    broken.write_bytes(broken.read_bytes().replace(lines[500][:40].encode(),
                                                   b"\xff" + lines[500].encode()))
    refused(inside(*stage2(broken, tmp_path / "r"), check=False), "vstar.jsonl", "line 501")

    # after another Stage 1: what differs, and no more
    other = copy_rows(all_rows, tmp_path / "other.jsonl")
    config = tmp_path / "other.config.json"
    text = config.read_text().replace('"limit": null', '"limit": 9').replace('"seed": 0', '"seed": 7')
    config.write_text(text)
    done = inside(*stage2(other, trained[0]), check=False)
    refused(done, "settings: Stage 1's --seed (was 0, now 7), Stage 1's --limit (was None, now 9); --over")

    out = shutil.copytree(trained[0], tmp_path / "torn")
    for shard in (out / "checkpoint/00000006").glob("*.distcp"):
        shard.write_bytes(shard.read_bytes()[:1000])
    done = inside(*stage2(all_rows, out, "--steps=8"), check=False)
    refused(done, "00000006", "cannot be read (EOFError()", alone=False)
    assert (out / "checkpoint/00000004").is_dir()

    out = shutil.copytree(trained[0], tmp_path / "metrics")
    rows = (out / "metrics.jsonl").read_text().splitlines()
    (out / "metrics.jsonl").write_text("\n".join([*rows[:3], "\x00" * 9, *rows[4:]]) + "\n")
    assert "line 4: not readable" in inside(*stage2(all_rows, out)).stdout
    assert [row["step"] for row in metrics(out)] == [0, 1, 2, 4, 5, 6]  # one is lost, and no other


@whole
def test_rewards_that_are_not_finite_stop_the_run(all_rows, tmp_path):
    rows = read_jsonl(all_rows)[:24]
    rows[5]["rewards"] = [float("nan")] * 8
    path = all_of_stage1(copy_rows(all_rows, tmp_path / "v.jsonl", map(json.dumps, rows)))
    done = inside(*stage2(path, tmp_path / "run"), check=False)
    refused(done, "the gradient's norm is nan", alone=False)
