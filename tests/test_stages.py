"""The stages' machinery: chunks, what a person sees, rewards and tasks of one's own, other architectures,
W&B."""

import json
import os
import re
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import transformers

import evaluate
import train
import vstar
from tests.helpers import (
    ends_in_one_line,
    evaluation,
    inside,
    long,
    long_value,
    metrics,
    own_reward,
    read_jsonl,
    sampler_of,
    small_model,
    some_args,
    stage1,
    stage2,
    tiny_model,
    tiny_tokenizer,
    torchrun,
    whole,
)
from vstar import Completion

# ---------------------------------------------------------------------------------------------------------
# chunks


@pytest.mark.parametrize("rows,n,sizes",
                         [(8, 3, [6, 6, 3]), (2, 5, [2, 2, 1] * 5), (5, 5, [5] * 5)])
def test_decode_rows_bounds_the_batch(rows, n, sizes, monkeypatch):
    """Also where one prompt has more copies than that."""
    seen, decode = [], vstar.TransformersSampler.decode

    def counted(self, prompts, copies, seeds):
        seen.append(len(prompts) * len(copies))
        return decode(self, prompts, copies, seeds)

    monkeypatch.setattr(vstar.TransformersSampler, "decode", counted)
    sampler = sampler_of(small_model(), rows=rows)
    completions = sampler.generate([[1, 2]] * 5, n, range(5))
    assert seen == sizes and [len(copies) for copies in completions] == [n] * 5


class Counter:
    """A sampler whose answer to prompt [i] is i, right for an even i; `asked`: (prompts, first copy) of each
    chunk."""

    def __init__(self):
        self.asked = []

    def stream(self, chunks, n):
        for index, (prompts, _, first) in enumerate(chunks):
            self.asked.append((len(prompts), first))
            yield index, [[Completion(prompt, True, [])] * (n - first) for prompt in prompts]

    def close(self):
        pass


@pytest.mark.parametrize("n,decode_rows,chunks,more_chunks", [
    (8, 256, [32] * 3 + [4], [32] * 3 + [4]),
    (1, 256, [100], [32] * 3 + [4]),
    (8, 4, [1] * 100, [1] * 100),
])
def test_a_chunk_is_counted_in_answers(n, decode_rows, chunks, more_chunks, tmp_path, monkeypatch):
    """--decode_rows of them; and each process has work, where there are fewer chunks than processes."""
    sampler, exist = Counter(), vstar.existing_rows
    monkeypatch.setattr(vstar, "make_sampler", lambda *_: sampler)
    monkeypatch.setattr(vstar, "barrier", lambda *_: None)
    args = some_args(samples=n, decode_rows=decode_rows, out=tmp_path / "v.jsonl", seed=0)
    tokenizer = SimpleNamespace(decode=lambda tokens, **_: f"\\boxed{{{tokens[0]}}}")
    problems = [dict(id=f"{i:03d}", question="", answer=str(i // 2 * 2),
                     tokens=[i]) for i in range(100)]

    def sample_all(samples):
        args.samples, sampler.asked = samples, []
        vstar.sample_all(args, problems, tokenizer, [0], "cpu")
        return sampler.asked

    assert sample_all(n) == [(size, 0) for size in chunks]
    graded = [row["rewards"] for row in read_jsonl(args.out)]
    assert graded == [[1.0] * n, [0.0] * n] * 50  # each has its own
    assert sample_all(n + 8) == [(size, n) for size in more_chunks]  # the 8 that are new
    assert {len(row["responses"]) for row in read_jsonl(args.out)} == {n + 8}
    assert {len(row["responses"]) for row in vstar.read_rows(args.out, n)} == {n}
    monkeypatch.setattr(vstar, "existing_rows", lambda out: {})  # as if other nodes' files were not here
    with pytest.raises(SystemExit):
        sample_all(n + 9)
    assert list(tmp_path.glob("v.parts/*.jsonl")) and len(read_jsonl(args.out)) == 100

    # all of eight processes read what exists before one writes; the first merges in the end
    args.out, reads, asked = tmp_path / "w.jsonl", [], []
    monkeypatch.setattr(vstar, "remove", lambda path: None)
    monkeypatch.setattr(vstar, "existing_rows",
                        lambda out: reads.append(out) or (exist(out) if len(reads) == 9 else {}))
    monkeypatch.setattr(vstar, "WORLD", 8)
    for rank in reversed(range(8)):
        monkeypatch.setattr(vstar, "RANK", rank)
        asked += sample_all(n)
    assert len(asked) >= 8
    assert min(size for size, _ in asked) >= (9 if n == 1 else 1)
    ids = [problem["id"] for problem in problems]
    assert [row["id"] for row in read_jsonl(args.out)] == ids  # not as the parts lie there


def test_tokens_a_second_are_those_of_all_processes(tmp_path, monkeypatch):
    """Of what this run wrote, in the time of the slowest."""
    clock, stamp = [0.0], vstar.load_reward(None)[1]
    args = some_args(samples=1, decode_rows=4, out=tmp_path / "v.jsonl", seed=0)
    problems = [dict(id=name, answer="1", tokens=[5] * 3) for name in "abc"]
    row = lambda name: dict(row_of([1.0], id=name, responses=[""], graded_by=stamp), lengths=[30])
    vstar.write_rows(args.out, [row("c")])  # an earlier run's

    def barrier(label):
        if label.startswith("sampled"):
            vstar.write_rows(vstar.parts_of(args.out) / "1.jsonl", [row("b")])  # the other process's
            clock[0] = 4.0

    def tick():
        clock[0] += 1e-6
        return clock[0]

    monkeypatch.setattr(vstar, "WORLD", 2)
    monkeypatch.setattr(vstar, "barrier", barrier)
    monkeypatch.setattr(vstar, "make_sampler", lambda *_: Counter())
    monkeypatch.setattr(vstar, "time", SimpleNamespace(perf_counter=tick, time=tick))
    tokenizer = SimpleNamespace(decode=lambda tokens, **_: "")
    assert vstar.sample_all(args, problems, tokenizer, [0], "cpu") == pytest.approx((3 + 30) / 4)


@whole
def test_ctrl_c_says_how_to_resume(undisturbed, tmp_path, monkeypatch):
    out, write = tmp_path / "vstar.jsonl", vstar.write_rows

    def interrupted(path, rows):
        write(path, rows)
        raise KeyboardInterrupt

    monkeypatch.setattr(vstar, "write_rows", interrupted)
    done = inside(*stage1(out), check=False)
    assert done.returncode == 130 and "the same command resumes from here" in done.stderr
    assert "Traceback" not in done.stderr and len(list(tmp_path.glob("*/*.jsonl"))) == 1
    monkeypatch.undo()
    inside(*stage1(out))
    assert out.read_bytes() == undisturbed[0].read_bytes()


# ---------------------------------------------------------------------------------------------------------
# what a person sees


def row_of(rewards, finished=True, **more):
    n = len(rewards)
    return dict(rewards=rewards, vstar=0.0,
                lengths=[3] * n, finished=[finished] * n, **more)


def test_summary_warns():
    mixed = [row_of([float(i < k) for i in range(8)])
             for k in range(9)] * 10
    text = vstar.summary(mixed, 0.5)
    assert "0/8 right         11.1%" in text and "8/8 right  11.1%" in text
    assert "accuracy          0.500 ± 0.067 (95 %)" in text  # over prompts: 1.96 · 0.3245 / √90
    assert "warning" not in text
    assert "no right response" in vstar.summary([row_of([0.0] * 8)] * 19 + mixed[8:9], 0.5)
    assert "cut off" in vstar.summary([row_of(row["rewards"], False) for row in mixed], 0.5)
    assert "nan" not in vstar.summary([row_of(row["rewards"][:1]) for row in mixed], 0.5)


def test_wrong_answers_are_shown():
    """Where all are wrong: some, spread over the problems, as the checker reads them; what they hold is
    escaped."""
    texts = ["cut", "so 3", "so \\boxed{see )(}\x1b"]
    rows = [row_of([0.0] * 3, id=str(i), answer="\x1b", prompt="why?\x1b",
                   responses=texts[:2] if i else texts[::2]) for i in range(31)]
    for row in rows:
        row["finished"] = [False, True, True]
    shown = vstar.summary(rows, 0.5).split("── ")[1:]
    assert [text.split(":")[0] for text in shown] == ["0", "10", "20"]
    assert "it is words" in shown[0] and r"no \boxed{} and no ####" in shown[1] and "so 3" in shown[1]
    assert all("why?" in text and "\x1b" not in text and "… cut" not in text for text in shown)
    shown = vstar.summary(rows, 0.5, custom_reward="mine.py:judge")
    assert shown.count("reward 0 by mine.py:judge") == 3 and "####" not in shown


def side_by_side(count, *models, reward=None):
    """What is shown of so many problems. A letter: a model's response is right, wrong or cut off."""
    kinds = dict(r=(1.0, True, "so \\boxed{7}"), w=(0.0, True, "so \\boxed{8}"), c=(0.0, False, "so"))
    rows_of_models = []
    for letters in models:
        rows = [row_of([kinds[letter][0], 1.0], kinds[letter][1], responses=[kinds[letter][2], "another"],
                       id=f"p{i}", prompt="3+4=\x1b", answer="7") for i, letter in enumerate(letters)]
        rows_of_models.append(rows)
    args = some_args(show=count, model=["one", "other"][: len(models)], reward=reward)
    return list(evaluate.side_by_side(rows_of_models, args))


def test_evaluation_shows_the_models_responses_to_a_problem():
    """Prompt, and each model's response, right, wrong or cut off; those first on which the models differ."""
    shown = side_by_side(3, "rwrwwrrrrr", "rrrwrrrcrr")
    assert [text.split()[1] for text in shown if text.startswith("\n── p")] == ["p1", "p4", "p7"]
    assert shown[:3] == ["\n── p1\n3+4=�", "── one: wrong, read as '8'; the answer '7' as '7'\nso \\boxed{8}",
                         "── other: right, read as '7'; the answer '7' as '7'\nso \\boxed{7}"]
    assert shown[-1] == "── other: cut off\nso"
    ids = [text.split()[1] for text in side_by_side(4, "rwrwwrrrrr", "rrrwwrrrrr") if text[0] == "\n"]
    assert ids == ["p1", "p0", "p4", "p7"]  # then others, spread over the set
    assert len(side_by_side(99, "rwr")) == 6  # all there are, of one model
    assert side_by_side(1, "c", reward="mine.py:judge")[1] == "── one: reward 0 by mine.py:judge, cut off\nso"


def test_few_problems_get_no_verdict(tmp_path, capsys):
    """Below twenty the interval of a bootstrap is too narrow to say what is noise."""
    for count, words in ((19, "no verdict on fewer than 20 problems"), (20, "more than noise")):
        args = some_args(samples=1, model=["0", "1"], data=["d"], reference=None, show=0, out=tmp_path)
        rows = {(name, "d"): [row_of([float(name)], responses=["\\boxed{1}"])] * count for name in "01"}
        results = {name: {"d": evaluate.measure(rows[name, "d"])} for name in "01"}
        evaluate.report(args, results, rows)
        assert capsys.readouterr().out.count(words) == 1


def test_completions_of_held_out_problems_are_kept(tmp_path, monkeypatch):
    """Those of all processes, at each evaluation; none where none are shown."""
    log = object.__new__(train.Log)
    samples = [train.Sample(dict(id=name, prompt=f"{name}="), None, name.upper(), 1.0, train.HELD_OUT)
               for name in "cab"]
    vars(log).update(args=some_args(out=tmp_path, show_every=0))
    log.keep_held_out(20, samples)
    assert not os.listdir(tmp_path)
    log.args.show_every = 7
    log.keep_held_out(20, samples)
    rows = [dict(id=name, prompt=f"{name}=", response=name.upper(), reward=1.0) for name in "abc"]
    assert read_jsonl(tmp_path / "samples/000020.held_out.jsonl") == rows

    def gather(parts, own):
        parts[:] = [own, rows[:1]]

    monkeypatch.setattr(train, "WORLD", 2)
    monkeypatch.setattr(train.dist, "all_gather_object", gather)
    log.keep_held_out(40, [samples[0], samples[2]])
    assert read_jsonl(tmp_path / "samples/000040.held_out.jsonl") == rows


def test_what_is_shown_of_a_step(tmp_path):
    """samples/ has each answer with its own reward, V̂* and log-ratio; the first is printed, with what it
    tells."""
    args = some_args(out=tmp_path, show_every=2, steps=5)
    log = object.__new__(train.Log)
    vars(log).update(args=args, bar=mock.MagicMock(), already_warned=set(), history=[], zero_one=True)
    log.run = SimpleNamespace(objective=train.APO(args))
    a, b = (dict(id=name, prompt=f"{name}=", answer="7", rewards=[0.0, 1.0]) for name in "ab")
    seven, eight = Completion([1, 2], True, [-1.0, -0.5]), Completion([3], False, [-2.0])
    samples = [train.Sample(dict(a, vstar=0.25), seven, "seven", 1.0, 0),
               train.Sample(dict(b, vstar=0.5), eight, "eight", 0.0, 1)]
    constants = dict(ref_logp=torch.tensor([[-2.0, -0.75], [-1.5, 0.0]]))
    numbers = dict(reward=0.5, kl=0.0)
    show = lambda step, samples: log.show(dict(numbers, step=step), samples, constants)
    for step in (1, 2, 3):
        show(step, samples)
    assert sorted(os.listdir(tmp_path / "samples")) == ["000001.jsonl", "000002.jsonl"]
    assert read_jsonl(tmp_path / "samples/000002.jsonl") == [
        dict(id="a", prompt="a=", response="seven", reward=1.0, vstar=0.25, log_ratio=1.25),
        dict(id="b", prompt="b=", response="eight", reward=0.0, vstar=0.5, log_ratio=-0.5)]
    text = log.bar.write.call_args[0][0]
    assert "a=" in text and "seven\n" in text and "right, the answer is 7; V̂* 0.25, advantage +0.75" in text
    args.reward = "mine.py:judge"  # right and wrong are the checker's words
    show(4, samples[1:])
    assert "── reward 0; V̂* 0.50, advantage -0.50" in log.bar.write.call_args[0][0] and log.zero_one
    show(5, [samples[0]._replace(reward=0.5)])
    assert not log.zero_one
    assert (tmp_path / "samples/000005.jsonl").exists()  # the last step's


@whole
def test_wandb_gets_every_row(all_rows, tmp_path, monkeypatch):
    (tmp_path / "wandb.py").write_text(
        "def init(project, config):\n    print('project', project, config['beta2'])\n"
        "def log(row, step):\n    print('logged', step, row['step'])\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    done = inside(*stage2(all_rows, tmp_path / "run", "--wandb=mine", "--steps=2"))
    monkeypatch.delitem(sys.modules, "wandb")
    logged = [line for line in done.stdout.splitlines() if line.startswith(("project", "logged"))]
    assert logged == ["project mine 0.1", "logged 0 0", "logged 1 1", "logged 2 2"]


# ---------------------------------------------------------------------------------------------------------
# rewards and tasks of one's own


def test_any_float_is_a_reward():
    """At least 1 is right; V̂* and comparisons take the number."""
    boxes = ["\\boxed{1}", "\\boxed{2}"]
    rows = [row_of([2.0, 0.5], responses=boxes),
            row_of([-1.0, 0.0], responses=boxes)]
    text = vstar.summary(rows, 1.0)
    assert "accuracy          0.250" in text and "reward            0.375" in text
    assert "0/2 right         50.0%" in text
    found = evaluate.measure(rows)
    assert (found["accuracy"], found["majority"], found["pass"][2]) == (0.25, 0.5, 0.5)
    # whose answers may agree in ways that the checker does not see
    found = evaluate.measure(rows, "mine.py:judge")
    assert (found["accuracy"], found["reward"]) == (0.25, 0.375) and "majority" not in found
    assert evaluate.scores(rows, "mine.py:judge").tolist() == [1.25, -0.5]  # by which models are compared
    assert evaluate.scores(rows, None).tolist() == [0.5, 0.0]


def test_held_out_accuracy_counts_rewards_of_one(monkeypatch):
    """Half a reward is not half right; two are not twice."""
    graded = [SimpleNamespace(reward=reward) for reward in (2.0, 1.0, 0.5, 0.0)]
    monkeypatch.setattr(train, "rollout", lambda run, prompts: [graded[row] for _, row in prompts])
    for reward, more in ((None, {}), ("mine.py:judge", dict(held_out_reward=0.875))):
        run = SimpleNamespace(args=some_args(reward=reward), sampler=mock.MagicMock(), policy=None)
        assert train.held_out_metrics(run, range(4), mock.MagicMock(), 1) == dict(accuracy=0.5, **more)


def test_a_reward_that_cannot_read_held_out_problems(tmp_path, capsys):
    """…is said with the file that they are of."""
    args = some_args(reward=own_reward(tmp_path, "return row['nums'][0]"), eval_data="test.jsonl", seed=0)
    sampler = SimpleNamespace(wake=lambda _: None,
                              generate=lambda prompts, n, _: [[Completion([1], True, [])] for _ in prompts])
    run = SimpleNamespace(args=args, policy=None, sampler=sampler,
                          tokenizer=SimpleNamespace(decode=lambda tokens, **_: "x"))
    problem = dict(id="7", tokens=[1], nums=[1.0])
    assert train.rollout(run, [(0, problem)])[0].reward == 1
    held_out = lambda: train.held_out_metrics(run, [dict(id="7", tokens=[1])], mock.MagicMock(), 0)
    ends_in_one_line(capsys, held_out, "mine.py:judge, line 2: KeyError: 'nums'; problem 7 of test.jsonl, ")


@whole
def test_the_gradients_norm_is_that_of_all_updates(all_rows, tmp_path, monkeypatch):
    norms, update = [], train.update
    monkeypatch.setattr(train, "update", lambda *some: norms.append(update(*some)) or norms[-1])
    more = ["--steps=1", "--minibatches=3", "--eval_limit=1", "--max_grad_norm=0.01"]
    inside(*stage2(all_rows, tmp_path, *more))
    row, mean = metrics(tmp_path)[1], sum(numbers["grad_norm"] for numbers in norms) / 3
    assert row["grad_norm"] == pytest.approx(mean) != norms[0]["grad_norm"] and row["grad_clipped"] == 1


@whole
def test_ones_own_task_end_to_end(tmp_path):
    """A reward, a template and a stop of one's own go from Stage 1 to Stage 2; such a reward needs no
    answers."""
    named = own_reward(tmp_path, "return row['weight'] * finished + len(response) / 100")
    problems = [dict(id=str(i), question="?", prompt="1",
                     a=i, b=7, weight=2) for i in range(1, 17)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    out, more = tmp_path / "v.jsonl", [f"--data={tmp_path}/p.jsonl", f"--reward={named}", "--stop", ";"]
    inside(*stage1(out, *more, "--prompt={prompt}{a}+{b}=", "--max_new_tokens=20"))
    rows = read_jsonl(out)
    assert rows[0]["prompt"] == f"1{rows[0]['a']}+7=" and rows[0]["weight"] == 2
    for row in rows:
        ends = zip(row["responses"], row["finished"])
        assert row["rewards"] == [2 * finished + len(text) / 100 for text, finished in ends]
    command = ["train.py", f"--vstar={out}", f"--out={tmp_path}/run", "--steps=1", "--batch_size=8"]
    inside(*command, "--engine=transformers")
    shown = read_jsonl(tmp_path / "run/samples/000001.jsonl")
    assert len(shown) == 8 and all(abs(row["log_ratio"]) < 1e-4 for row in shown)  # π is π_ref still
    assert all(row["reward"] >= 2 for row in shown if row["response"].endswith(";"))
    assert {row["prompt"] for row in shown} < {row["prompt"] for row in rows}  # as Stage 1 asked
    done = inside(*evaluation(tmp_path / "e", *more, "--prompt={a}+{b}=", "--max_new_tokens=3", "--show=2"))
    assert "right: a reward of at least 1" in done.stdout
    assert len(re.findall(f"── tiny/model: reward .* by {named}", done.stdout)) == 2
    assert "pass@4  reward  finished" in done.stdout and "maj@" not in done.stdout
    own_reward(tmp_path, "return 1.0")
    done = inside(*command, "--engine=transformers", check=False)
    assert done.returncode == 2 and "reward's file changed" in done.stderr, done.stderr


@pytest.mark.filterwarnings("error")
def test_long_names_have_room_in_the_picture(tmp_path):
    name = "problems  " + "/a/folder/within" * 6
    points = [{"accuracy": share, name: name} for share in (0.4, 0.5, 0.6)]  # or matplotlib warns
    vstar.picture(tmp_path / "accuracy.png", points, ["accuracy"], [[name]])


# ---------------------------------------------------------------------------------------------------------
# other models


@whole
@pytest.mark.parametrize("kind", ["Llama", long_value("GPT2")])
def test_other_architectures_end_to_end(kind, tmp_path):
    command = inside if kind == "Llama" else lambda *flags: torchrun(2, *flags)
    small_model(vocabulary=19, kind=kind).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    path = tmp_path / "vstar.jsonl"
    command(*stage1(path, f"--model={tmp_path}/model", "--limit=16", "--max_new_tokens=20"))
    # a random model is never right; say it was, so that there is something to learn
    path.write_text(path.read_text().replace('"rewards": [0.0, 0.0]', '"rewards": [1.0, 0.0]'))
    command(*stage2(path, tmp_path / "run", "--steps=2", "--batch_size=8", "--eval_limit=8"))
    rows = metrics(tmp_path / "run")
    assert rows[1]["log_ratio_abs"] == 0
    assert rows[2]["log_ratio_abs"] > 0
    assert rows[1]["mismatch"] < 1e-4
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")


@long
def test_lora_in_bf16(all_rows, tmp_path):
    """The base is frozen in bf16, the additions learn in fp32. On two ranks FSDP holds both."""
    more = ["--lora=4", "--dtype=bfloat16", "--steps=2", "--recompute=yes"]
    inside(*stage2(all_rows, tmp_path / "one", *more))
    torchrun(2, *stage2(all_rows, tmp_path / "two", *more))
    for rows in (metrics(tmp_path / "one"), metrics(tmp_path / "two")):
        assert rows[1]["log_ratio_abs"] == 0 < rows[2]["log_ratio_abs"]
        assert rows[1]["mismatch"] < 0.01
    state = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "one/model").state_dict()
    for name, reference in tiny_model().state_dict().items():
        change = (state[name] - reference.bfloat16().float()).abs().max()
        assert state[name].dtype == torch.float32 and (change > 0) == name.endswith("proj.weight")


@long
def test_a_healthy_engine_is_not_accused(all_rows, tmp_path):
    """Of a long run whose numbers round."""
    more = ["--dtype=bfloat16", "--steps=300", "--batch_size=16", "--tokens_per_microbatch=4096"]
    inside(*stage2(all_rows, tmp_path, *more, "--save_every=999", "--eval_every=150"))
    rows = metrics(tmp_path)
    assert len(rows) == 301
    assert rows[-1]["accuracy"] > 0.6
    assert max(row["mismatch"] for row in rows[1:]) < 0.05
