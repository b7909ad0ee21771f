"""Problems from files and hubs, prompts, and rewards of one's own."""

import datetime
import json
from types import SimpleNamespace

import datasets
import pyarrow.parquet
import pytest
import transformers
from tokenizers.processors import TemplateProcessing

import rewards
import vstar
from tests.helpers import HERE, ends_in_one_line, own_reward
from vstar import Completion


@pytest.fixture
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(HERE / "tiny/model")


def parquet(path, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def test_files(tmp_path):
    rows = [{"id": "a", "question": "1+1", "answer": "2"},
            {"id": 7, "question": "1+2", "answer": 3},
            {"id": "c", "question": "GSM", "answer": "1+1=<<1+1=2>>2\n#### 1,002"},
            {"id": "d", "question": "MATH", "answer": "we see \\boxed{x} and so $\\boxed{\\frac{1}{2}}$."}]
    expected = [dict(row, id=str(row["id"])) for row in rows]
    for problem, gold in zip(expected, ("2", "3", "1,002", "\\frac{1}{2}")):
        problem["answer"] = gold
    (tmp_path / "p.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "p.json").write_text(json.dumps(rows, indent=1))
    parquet(tmp_path / "p.parquet", [dict(zip(row, map(str, row.values()))) for row in rows])
    for ending in ("jsonl", "json", "parquet"):
        assert rewards.load_problems(str(tmp_path / f"p.{ending}")) == expected
    (tmp_path / "q.json").write_text('{"problem": "1+1", "solution": ["2", "-2"]}')
    (found,) = rewards.load_problems(str(tmp_path / "q.json"), "train", "problem", "solution")
    assert found == dict(id="q/1", question="1+1", answer="2, -2", problem="1+1", solution=["2", "-2"])


def test_both_stages_rewards_see_the_same_fields(tmp_path):
    """Those that a file of JSON can hold, but for the names that Stage 1 writes itself."""
    row = dict(question="a", answer="1", day=datetime.date(2026, 1, 2), nums=[1, 2])
    parquet(tmp_path / "p.parquet", [dict(row, rewards=[9], responses="mine")])
    found = rewards.load_problems(str(tmp_path / "p.parquet"))
    assert found == [dict(row, id="p/1", day="2026-01-02")]


def test_hub(monkeypatch, capsys):
    calls, row = [], dict.fromkeys(("question", "problem"), "1+1")
    row |= dict(answer="#### 2", solution="\\boxed{2}", final_answer=["2"])

    def load_dataset(*which, split):
        calls.append((*which, split))
        return datasets.Dataset.from_list([row])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in [*rewards.DATASETS, "some/where"]:
        (problem,) = rewards.load_problems(name, "test")
        assert (problem["question"], problem["answer"]) == ("1+1", "2")
        assert problem["id"] == f"{name}/{calls[-1][-1]}/0"
    assert calls[0] == ("openai/gsm8k", "main", "test") and calls[1][2] == "test"
    assert calls[3] == ("HuggingFaceH4/aime_2024", None, "train")  # it has no other split
    assert calls[-1] == ("some/where", None, "test")

    def no_network(*_, **__):
        raise ConnectionError("Couldn't reach\nthe Hub")

    monkeypatch.setattr(datasets, "load_dataset", no_network)
    load = lambda: rewards.load_problems("gsm8k")
    ends_in_one_line(capsys, load, "gsm8k", "Couldn't reach the Hub")


@pytest.mark.parametrize("name,content,words", [
    ("p.jsonl", None, ["No such file"]),
    ("p.jsonl", "", ["no problems"]),
    ("p.jsonl", '{"question": "1+1"}\n', ["line 1", "'answer'", "the row has: question", "give a --reward?"]),
    ("p.jsonl", '\n{"question": "a", "answer": "1"}\n{"question": " ", "answer": "2"}\n',
     ["line 3", "'question'"]),
    ("p.jsonl", '{"id": 1, "question": "a", "answer": 1}\n{"id": "1", "question": "b", "answer": 2}\n',
     ["line 2", "'1'", "before"]),
    ("p.jsonl", '{"question": "a", "answer": "1"}\n{"question"\n', ["line 2", "JSON"]),
    ("p.jsonl", "[" * 100_000, ["line 1", "JSON"]),
    ("p.jsonl", "[1, 2]\n", ["line 1", "object"]),
    ("p.json", "[1, 2]", ["row 1", "object"]),
    ("p.json", '[\n{"question" 1}]', ["JSON", "line 2"]),
    ("p.jsonl", "\udcff", ["utf-8"]),
    ("p.parquet", "no", ["arquet"]),
    ("p.csv", "", ["unknown", ".jsonl, .json or .parquet", "gsm8k"]),
])
def test_bad_files(name, content, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine" / name
    path.parent.mkdir()
    if content is not None:
        path.write_bytes(content.encode("utf-8", "surrogateescape"))
    ends_in_one_line(capsys, lambda: rewards.load_problems(f"mine/{name}"), name, *words)


def test_a_reward_of_ones_own_needs_no_answer(tmp_path, capsys):
    path = tmp_path / "p.jsonl"
    path.write_text('{"question": "a"}\n{"question": "b", "answer": null}\n{"question": "c", "answer": 0}\n')
    found = rewards.load_problems(str(path), custom_reward="mine.py:judge")
    assert [problem["answer"] for problem in found] == ["", "", "0"]
    another_field = lambda: rewards.load_problems(str(path), "", "question", "gold", "mine.py:judge")
    ends_in_one_line(capsys, another_field, "no 'gold'")


def test_prompts(tokenizer, capsys):
    what = dict(id="file/3", question="{level}", level=3, hint=None)
    ask = lambda template, chat=False, *more: rewards.make_prompt(tokenizer, what, template, chat, *more)
    rest = r" {} \boxed{} {0} \frac{1}{2} {a.b}"
    assert ask("{level}: {question}" + rest) == "3: {level}" + rest
    think = "3 Let's think step by step and output the final answer "
    assert ask(rewards.GSM8K.replace("question", "level")) == think + 'after "####".'
    assert ask(rewards.BOXED.replace("question", "level")) == think + "within \\boxed{}."
    tokenizer.chat_template = None
    for call, *words in [
            (lambda: ask("{nums}"), "file/3", "'nums'"),
            (lambda: ask("{hint}{question}"), "file/3", "'hint'"),  # the hub fills what is not there
            (lambda: ask(rest), "no field in braces"),
            (lambda: ask("{level}", False, dict(a=1)), "--chat asks in"),
            (lambda: ask("{level}", True), "no chat template")]:
        ends_in_one_line(capsys, call, *words)
    tokenizer.chat_template = ("{% for m in messages %}<eos>{{ m.content }}{% endfor %}"
                               "{{ '=' if add_generation_prompt }}")
    assert ask("{level}+2", True) == "<eos>3+2="
    tokenizer.chat_template = "{{ 'think' if enable_thinking else 'answer' }}"
    assert ask("{level}", True, dict(enable_thinking=False)) == "answer"
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    for more in (None, dict(tokenize=True)):
        call = lambda more=more: ask("{level}", True, more)
        ends_in_one_line(capsys, call, "--chat_args " + json.dumps(more))


def test_bos_is_written_once(tokenizer):
    """Plain text gets the tokenizer's BOS, a chat template writes its own."""
    bos, one = tokenizer.vocab["="], tokenizer.vocab["1"]
    with_bos = TemplateProcessing(single="= $A", special_tokens=[("=", bos)])
    tokenizer.backend_tokenizer.post_processor = with_bos
    assert rewards.encode(tokenizer, "1", chat=False) == [bos, one]
    assert rewards.encode(tokenizer, "1", chat=True) == [one]


def judged(named, problems, responses=("a", "b")):
    tokenizer = SimpleNamespace(decode=lambda tokens, skip_special_tokens: tokens)
    pairs = [(problem, Completion(text, True, [])) for problem, text in zip(problems, responses)]
    return vstar.grade(SimpleNamespace(reward=named), tokenizer, pairs)


PROBLEMS = [dict(id="1", answer="", worth=2.5), dict(id="2", answer="", worth=True)]


def test_ones_own_reward(tmp_path):
    slow = own_reward(tmp_path, "import time; time.sleep(row['id'] == '1'); return row['worth'] + finished")
    assert judged(slow, PROBLEMS) == [("a", 3.5), ("b", 2.0)]  # in order
    (graded,) = judged(None, [dict(id="1", answer="5")], ["\\boxed{5}"])
    assert graded == ("\\boxed{5}", 1.0)


@pytest.mark.parametrize("body,words", [
    ("return None", ["TypeError"]), ("return float('nan')", ["nan"]), ("return '1'", ["TypeError"]),
    ("raise SystemExit(0)", ["line 2", "SystemExit"]),
    ("raise ValueError('\\x1b' + response)", ["line 2", "ValueError: �a", "problem 1, response 'a'"]),
    ("return row['nums']", ["line 2", "KeyError"]),
    ("return 1 if row['id'] < '2' else 1 / 0", ["line 2", "problem 2", "ZeroDivisionError"]),
])
def test_a_reward_that_fails(body, words, tmp_path, capsys):
    named = own_reward(tmp_path, body)
    ends_in_one_line(capsys, lambda: judged(named, PROBLEMS), "mine.py:judge", *words, "response")


@pytest.mark.parametrize("named,text,words", [
    ("none.py:judge", "", ["FILE.py:FUNCTION", "No such file"]), ("judge", "", ["FILE.py:FUNCTION"]),
    ("mine.py:other", "", ["no function 'other'"]), ("mine.py:judge", "def judge(:\n", ["SyntaxError"]),
    ("mine.py:judge", "import nothing_like_it\n", ["ModuleNotFoundError"]),
    ("mine.py:judge", "raise SystemExit(0)\n", ["SystemExit"]),
])
def test_a_reward_that_cannot_be_loaded(named, text, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(text)
    rewards.load_reward.cache_clear()
    ends_in_one_line(capsys, lambda: rewards.load_reward(named), named, *words)


def test_ones_own_reward_is_loaded_once(tmp_path, capsys, monkeypatch):
    """By a path from here, too. Another text of the file counts for the next run."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "mine.py"
    file.write_text("from __future__ import annotations\nimport dataclasses\nloaded = [1]\n"
                    "@dataclasses.dataclass\nclass Kept:\n    number: int\n"
                    "def judge(response, problem, finished):\n    return len(loaded)\n")
    rewards.load_reward.cache_clear()
    judge = lambda: judged("mine.py:judge", PROBLEMS[:1])
    for _ in range(2):
        assert judge() == [("a", 1.0)]
        file.write_text("def judge(*_):\n    return 1 / 0\n")
    rewards.load_reward.cache_clear()
    ends_in_one_line(capsys, judge, "--reward mine.py:judge, line 2: Zero")
