"""The checker: the pairs of checker.tsv, hostile text, mutated answers, the golds of real benchmarks."""

import multiprocessing
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import rewards
from tests.helpers import REAL, needs_real, run, whole

TABLE = Path(__file__).with_name("checker.tsv").read_text(encoding="utf-8")
ROWS = [line.split("\t") for line in TABLE.splitlines() if line and line[0] != "#"]
PIECES = [*"0123456789xyen+-*/^_!|()[]{}=<>,.;$%", "\\frac", "\\sqrt", "\\pm ", "\\sin ", "\\log_", "\\cup ",
          "\\text{", "\x00", "é", "\ud800", "\n", "\\", "\\boxed{", "####", "</think>"]


@pytest.fixture
def work(monkeypatch):
    """[how many nodes of a tree the checker has evaluated]"""
    count, value = [0], rewards.value

    def counted(*arguments):
        count[0] += 1
        return value(*arguments)

    monkeypatch.setattr(rewards, "value", counted)
    return count


@pytest.mark.parametrize("verdict", ["right", "wrong", "same", "different"])
def test_table(verdict):
    rows = [row[1:3] for row in ROWS if row[0] == verdict]
    assert len(rows) > 20
    for claim, gold in rows:
        if verdict in ("same", "different"):
            for one, other in ((claim, gold), (gold, claim)):
                readings = rewards.read(one), rewards.read(other)
                assert rewards.is_correct(one, other) == (verdict == "same"), (one, other, readings)
        else:
            response = claim.replace("⏎", "\n")
            assert rewards.reward(response, gold, True) == (verdict == "right"), (response, gold)
            assert rewards.reward(response, gold, False) == 0.0  # cut off


def test_several_boxes():
    for gold, verdict in {"2, 1": 1.0, "2": 1.0, "1": 0.0, "1, 2, 3": 0.0}.items():
        assert rewards.reward(r"\boxed{1} and \boxed{2}", gold, True) == verdict


HOSTILE = [
    # numbers without end
    "9**9**9**9", "10^{10^{10}}", "1" * 1_000_000, "1e999999", r"\sin(1e999999)", "((((5!)!)!)!)!", "5!!!!!!",
    "201!", "99999999!",
    "200!^200!", "2^{2^{2^{2^{2^2}}}}", "e^{e^{e^{e^{e}}}}", "exp(exp(100))", r"\sin(10^{300})",
    r"\binom{200}{100}^{100}", "9" * 60 + "^{1000}", r"(\sin 1)^{9^{3000}}", "(9^{3000}x)!",
    "(1+10^{-60})^{10^{60}}",
    # no numbers
    r"\frac{1}{0}", "nan", "inf", "0^0", "0^{-1}", r"\log_{1}2", r"\log 0", "1/(x-x)", r"\tan(\pi/2)",
    r"\sqrt[0]{5}", r"\sqrt[\pi]{-2}", r"\sqrt[i]{-2}", "i^i", "(-8)^{1/3}", r"\pi!", r"\lfloor i \rfloor",
    # deep, long, many
    "{" * 100_000, "\\boxed{" * 50_000 + "}" * 50_000, "\\boxed " * 50_000, "-" * 300 + "1",
    "(1," * 100, "1," * 200, r"\sqrt{" * 50 + "2" + "}" * 50, r"\sin(" * 30 + "1" + ")" * 30,
    r"\begin{pmatrix}" + "1&" * 100, r"\pm" * 20 + "1", r"\pm1" * 64, r"\cup" * 60, "<" * 99,
    "*".join(f"(x+{i})" for i in range(60)), "(x+1)^{1000}", "(((((x^x)^x)^x)^x)^x)^x", "x" * 399,
    # not mathematics
    "__import__('os').system('x')", "\x00", "\ud800", "\x1ccm\x1d", r"\text{", "a=b=c", "=",
]


def test_hostile_text_costs_little(work):
    """Bounded work, not bounded seconds: the nodes that are evaluated for any pair of nasty texts."""
    for text in HOSTILE:
        assert len(rewards.final_answers(text)) < 100
        for gold in ("5", "x+1", "(1,2)", text):
            work[0] = 0
            verdict = rewards.is_correct(text, gold)
            assert work[0] < 5000 and (not verdict or text == gold), (text[:50], gold[:50])
            rewards.is_correct(gold, text)
            assert rewards.reward("\\boxed{" + text + "}", gold, True) in (0.0, 1.0)
    many, work[0] = [str(number) for number in range(100)], 0
    rewards.is_correct(",".join(many), ",".join(many[::-1]))
    assert work[0] < 5000


def mutated(rng, text):
    for _ in range(rng.randint(1, 5)):
        position = rng.randint(0, len(text))
        text = text[:position] + rng.choice(PIECES) + text[position + rng.randint(0, 2) :]
    return text


@needs_real
def test_mutated_real_answers(work):
    """Real golds with a few characters changed: no exception, bounded work."""
    rng, golds = random.Random(0), []
    for name in ("math_test", "minerva_math", "olympiadbench_oe_to_maths_en"):
        golds += [problem["answer"] for problem in rewards.load_problems(str(REAL / f"{name}.jsonl"))]
    for _ in range(5_000):
        gold = rng.choice(golds)
        text, work[0] = mutated(rng, gold), 0
        assert rewards.is_correct(text, gold) in (True, False)
        assert rewards.reward(f"so \\boxed{{{text}}}", gold, True) in (0.0, 1.0)
        assert work[0] < 5000, text


@whole
@needs_real
def test_real_golds_and_their_respellings():
    for file in sorted(REAL.glob("*.jsonl")):
        for gold in {problem["answer"] for problem in rewards.load_problems(str(file))}:
            respelled = [gold, f" {gold} ", gold + ".", f"${gold.strip('$')}$"]
            respelled.append(gold.replace("\\frac", "\\dfrac"))
            respelled.append(gold.replace("(", "\\left(").replace(")", "\\right)"))
            respelled.append(gold.replace("\\left", "").replace("\\right", ""))
            for text in respelled:
                assert rewards.is_correct(text, gold) and rewards.is_correct(gold, text), (text, gold)
            assert rewards.reward(f"so \\boxed{{{gold}}}.", gold, True) == 1.0, gold
            assert rewards.reward(f"so \\boxed{{7+{gold}}}.", gold, True) == 0.0, gold


def test_threads_and_forks():
    """mpmath is for one thread at a time; and a process may be born while another thread is at it."""
    pairs = [row[1:3] for row in ROWS if row[0] == "same"] * 3
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda pair: rewards.is_correct(*pair), pairs))
    rewards.LOCK.acquire()
    threading.Timer(0.2, rewards.LOCK.release).start()
    child = multiprocessing.get_context("fork").Process(target=rewards.is_correct, args=("\\sqrt4", "2"))
    child.start()
    child.join(5)
    child.kill()
    assert child.exitcode == 0


@whole
def test_command_line():
    output = run("rewards.py", r"so \boxed{\frac12}", "0.5").stdout
    assert "reward   1.0" in output and r"\frac12" in output
    assert "in a box it would earn 1.0" in run("rewards.py", "x > 3", r"(3,\infty)").stdout
