"""Every test. `pytest` takes a few minutes on two CPU cores; what needs vLLM or the benchmark files is skipped without."""

import importlib.util
import json
import math
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from itertools import combinations, product
from pathlib import Path
from types import SimpleNamespace

import mpmath
import numpy as np
import pytest
import torch
import transformers

import evaluate
import plan
import rewards
import train
import vstar
from vstar import Completion, TransformersSampler, estimate_vstar, pass_at_k, prompt_seed, vstar_error

HERE = Path(__file__).parent
REAL = HERE.parent / "shared" / "data"  # real benchmark files, where somebody put them
LONG = bool(os.environ.get("LONG"))  # more kills, more steps
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="no benchmark files in ../shared/data")
TINY = ["--model=tiny/model", "--data=tiny/train.jsonl", "--suffix=", "--max_new_tokens=64", "--engine=transformers"]


def run(*command, check=True, **env):
    """A script as a user runs it."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=HERE, text=True, capture_output=True,
                          env={**os.environ, **env})
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def torchrun(count, *command, **keywords):
    return run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", count, *command, **keywords)


def ends_in_one_line(capsys, call, *words):
    with pytest.raises(SystemExit) as stop:
        call()
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0], lines[0]


# ---------------------------------------------------------------------------------------------------------------------
# V̂* and what is said of it


@pytest.mark.parametrize("beta1", [1e-6, 1e-3, 0.1, 0.5, 1.0, 10.0, 1e3, 1e6, 1e12])
@pytest.mark.parametrize("n", [1, 2, 3, 8, 64])
def test_vstar_against_high_precision(beta1, n):
    rng = np.random.default_rng(n)
    for values in (rng.integers(0, 2, n).astype(float), rng.normal(0, 3, n), rng.normal(-50, 1e-3, n)):
        with mpmath.workdps(60):
            # the formula as it stands; the shift only because exp(1e6) has too many digits even for mpmath
            shift = mpmath.mpf(max(values))
            total = mpmath.fsum(mpmath.exp((mpmath.mpf(v) - shift) / mpmath.mpf(beta1)) for v in values)
            exact = float(shift + mpmath.mpf(beta1) * mpmath.log(total / n))
        assert estimate_vstar(values, beta1) == pytest.approx(exact, rel=1e-12, abs=1e-12)


def test_vstar_by_hand():
    # 3 of 8 right at β1 = 1/2:  ½ ln( (5 + 3 e²) / 8 )
    assert estimate_vstar([1, 0, 0, 1, 0, 0, 1, 0], 0.5) == pytest.approx(0.5 * math.log((5 + 3 * math.e**2) / 8))
    assert estimate_vstar([0, 0, 0, 0], 0.5) == 0 and estimate_vstar([1, 1], 0.5) == 1
    assert estimate_vstar(np.ones((5, 7, 3)), 0.5).shape == (5, 7)


def test_vstar_limits_and_order():
    values = np.random.default_rng(0).normal(size=(100, 8))
    assert np.array_equal(estimate_vstar(values, math.inf), values.mean(-1))
    np.testing.assert_allclose(estimate_vstar(values, 1e9), values.mean(-1), atol=1e-8)
    np.testing.assert_allclose(estimate_vstar(values, 1e-9), values.max(-1), atol=1e-8)
    curve = np.array([estimate_vstar(values, b) for b in (1e-6, 1e-2, 0.1, 0.5, 2, 10, 1e4, math.inf)])
    assert (np.diff(curve, axis=0) <= 1e-12).all()  # the larger β1, the more careful the value
    np.testing.assert_allclose(estimate_vstar(values + 7, 0.5), estimate_vstar(values, 0.5) + 7)


@pytest.mark.parametrize("beta1,seen,n", [*product([0.5, 1.0, 2.0], [8, 16], [4, 8, 16]),
                                              *product([0.5, 2.0], [4], [2, 4])])
def test_vstar_error_against_brute_force(beta1, seen, n):
    """The exact scatter of V̂* over all numbers of right answers, for prompts of every difficulty."""
    rng = np.random.default_rng(0)
    chance = rng.beta(1.0, 1.5, 3000)
    right = np.arange(n + 1)
    vstar_of = estimate_vstar((np.arange(n) < right[:, None]).astype(float), beta1)  # (n+1,)
    weight = np.array([math.comb(n, k) for k in right]) * chance[:, None] ** right * (1 - chance[:, None]) ** (n - right)
    truth = math.sqrt(((weight * vstar_of**2).sum(1) - (weight * vstar_of).sum(1) ** 2).mean())
    seen_rewards = rng.random((3000, seen)) < chance[:, None]
    assert vstar_error(seen_rewards, beta1, n) == pytest.approx(truth, rel=0.1)


def test_vstar_error_without_scatter():
    assert vstar_error(np.ones((10, 4)), 0.5, 4) == 0
    assert math.isnan(vstar_error(np.ones((10, 1)), 0.5, 1))


def test_pass_at_k_counts_subsets():
    for row in product([0, 1], repeat=5):
        for k in range(1, 6):
            subsets = list(combinations(row, k))
            assert pass_at_k(row, k) == pytest.approx(np.mean([max(subset) for subset in subsets]))


# ---------------------------------------------------------------------------------------------------------------------
# problems and verdicts

RIGHT = [
    (r"\boxed{72}", "72"), ("so #### 1,000", "1000"), ("####72", "72"), ("#### $72.00", "72"), ("####  72.", "72"),
    (r"\boxed{1,234,567}", "1234567"), (r"\boxed{-1,234.50}", "-1234.5"), (r"\boxed{033}", "33"), (r"\boxed{+7}", "7"),
    (r"\boxed{\frac{1}{2}}", "0.5"), (r"\boxed{\dfrac{1}{2}}", r"\frac12".replace("12", "{1}{2}")), (r"\boxed{1/2}", ".5"),
    (r"\boxed{-\frac{3}{4}}", "-0.75"), (r"\boxed{\$18}", "18"), (r"\boxed{50\%}", "50"), (r"\boxed{50%}", "50"),
    (r"\boxed{\text{Tuesday}}", "Tuesday"), (r"\boxed{ yes }", "Yes"), (r"\boxed{3.}", "3"), (r"\boxed{x^{2}}", "x^{2}"),
    (r"first \boxed{5}, no: \boxed{6}", "6"), (r"\boxed{5} and \boxed{6", "5"), (r"\boxed{5} #### 6", "6"),
    (r"#### 6 so \boxed{5}", "5"), (r"<think>\boxed{1}</think> \boxed{2}", "2"), ("#### 7\nbecause", "7"),
    (r"{\boxed{\{1\}}", r"\{1\}"), (r"\boxed {5}", "5"), (r"\boxed{\left(1,2\right)}", "(1, 2)"),
]
WRONG = [
    ("72", "72"), ("the answer is 72", "72"), (r"\boxed{}", "0"), (r"\boxed{73}", "72"), (r"\boxed{-72}", "72"),
    (r"\boxed{6} then \boxed{5}", "6"), (r"\boxed{(1,234)}", "1234"), (r"\boxed{1,23}", "123"), (r"\boxed{1,2345}", "12345"),
    (r"\boxed{0.333}", r"\frac{1}{3}"), (r"\boxed{\frac{1}{0}}", "0"), (r"\boxed{5 or 6}", "5"), (r"\boxed{72", "72"),
    (r"\boxed{72}</think>", "72"), ("####", "0"), (r"\boxed{\text{Monday}}", "Tuesday"), (r"\boxed{1/2}", "12"),
]


def test_reward():
    for response, gold in RIGHT:
        assert rewards.reward(response, gold, True) == 1.0, (response, gold)
        assert rewards.reward(response, gold, False) == 0.0  # cut off
    for response, gold in WRONG:
        assert rewards.reward(response, gold, True) == 0.0, (response, gold)


EQUAL = [  # both ways round
    (r"\dfrac12", "1/2"), (r"\frac12", "0.5"), (r"\tfrac{1}{2}", r"\frac 12"), (r"1\frac12", "1.5"),
    (r"1\frac{1}{2}", r"\frac32"), ("1,234", "1234"), (r"\sqrt2", r"\sqrt{2}"), (r"\sqrt[3]{x}", "x^{1/3}"),
    (r"2\sqrt{3}", r"\sqrt{12}"), (r"\pi/2", r"\frac{\pi}{2}"), ("e^{2}", "e^2"), ("3+2i", "2i+3"), (r"\ln 4", r"2\ln 2"),
    (r"\log_2 8", "3"), (r"\sin \frac{\pi}{6}", "1/2"), ("5!", "120"), (r"\binom{5}{2}", "10"), ("(x+1)^2", "x^2+2x+1"),
    (r"\frac{x^2-1}{x-1}", "x+1"), ("2x+y=3", "3=y+2x"), ("4x+2y=6", "y+2x=3"), ("x=5", "5"), ("x = 5", "x=5"),
    (r"1\pm\sqrt5", r"1+\sqrt5,1-\sqrt5"), (r"\{1,2,3\}", r"\{3,2,1\}"), ("1,2", "2,1"), (r"\{1,2\}", "1,2"),
    (r"(-\infty,2)\cup(3,\infty)", r"(3,\infty)\cup(-\infty,2)"), ("x>5", r"(5,\infty)"), (r"-1<x\le 3", "(-1,3]"),
    (r"x \in [1,2]", "[1,2]"), ("(1, 2)", "(1,2)"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    (r"\begin{bmatrix}1&2\\3&4\end{bmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"), (r"50\%", "50"), (r"50\%", r"\frac12"),
    (r"5\text{ cm}", "5"), ("5 cm", "5"), (r"5\text{ cm}", r"5 \mathrm{~cm}"), (r"90^\circ", "90"),
    (r"90^{\circ}", r"90^\circ"), (r"\$18", "18"), ("$18$", "18"), (r"\text{Tuesday}", "Tuesday"), ("(C)", "C"),
    (r"\text{(B)}", "B"), (r"\text{(B)}", "(B)"), (r"\text{B}", "B"), ("yes", "Yes"), ("1011_2", "1011_{2}"),
    ("8.7e8", r"8.7\times10^8"), (r"8.7 \cdot 10^{8}", "870000000"), (r"\boxed{5}", "5"), (r"\left(1,2\right)", "(1,2)"),
    (r"x^2 \, + 1", "1+x^2"), (r"\(5\)", "5"), ("5.", "5"), ("−5", "-5"), ("３", "3"), ("2×3", "6"), ("√2", r"\sqrt{2}"),
    ("π", r"\pi"), ("033", "33"), ("0.3333", "1/3"), ("1.4142", r"\sqrt{2}"), ("f(x)=2x+1", "2x+1"), ("y = -2x", "-2x"),
    (r"5 \text{ or } 6", "5,6"), (r"x=1 \text{ or } x=2", "1,2"), (r"11,\! 111,\! 111,\! 100", "11111111100"),
    (r"\frac{270}7\text{ degrees}", r"\frac{270}{7}"), (r"\sin^2 x+\cos^2 x", r"1*(\sin^2 x+\cos^2 x)"),
    ("2^{1009}", r"2\cdot2^{1008}"), (r"\frac{-1}{1997}", r"-\frac{1}{1997}"), ("(3,2),(-3,2)", "(-3,2),(3,2)"),
    (r"\pm 2", "2,-2"), (r"x=\pm2", "-2,2"), ("1/2004!", "1/2004!"), (r"10\%", "0.1"), (r"\frac{1}{2}x", "x/2"),
    (r"0,\pm i\sqrt6", r"0, i\sqrt{6}, -i\sqrt{6}"), ("|x|", "|x|"), (r"\text{5}", "5"), (r"5\text{ cm}^2", "5"),
    ("12 square units", "12"), (r"\mathbb{R}", r"\mathbb{R}"), ("-1./3", "-1/3"), (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt3}"),
    ("3:45", "3:45"), (r"\{x \mid x>1\}", r"\{x \mid x > 1\}"), (r"10\sqrt{2}\text{ cm}", r"10\sqrt2"), (r"2 \pi r", r"2\pi r"),
    (r"18.8^{\circ}", "18.8"), ("a_1+a_2", "a_{2}+a_{1}"), (r"\cos^{-1} \frac{1}{2}", r"\arccos(1/2)"),
    (r"13 \text{ and } 7", "7,13"), ("(2, 3]", "(2,3]"), (r"\tan(\pi/4)", "1"), ("3 1/2", "7/2"), ("4^{3/2}", "8"),
    (r"x \ge 2", r"[2,\infty)"), ("2<x", "x>2"), ("2<=x<3", r"2 \leq x < 3"), ("sqrt(2)/2", r"\frac{1}{\sqrt{2}}"),
    ("8 feet", "8"), (r"6\text{ inches}", "6"), (r"2+\sqrt[3]{4}", r"\sqrt[3]{4}+2"),
    (r"(-\infty, -3] \cup [3, \infty)", r"[3,\infty)\cup(-\infty,-3]"),
    (r"x \le -3 \text{ or } x \ge 3", r"(-\infty,-3]\cup[3,\infty)"), (r"\frac{x}{2}+\frac{y}{3}=1", "3x+2y=6"),
    ("y=2x+3", "2x-y+3=0"), (r"\left\{ 1, 2 \right\}", r"\{2,1\}"), (r"\{ \}", r"\emptyset"), ("2^{10}", "1024"),
    ("10!/(8!2!)", "45"), (r"\frac{1+\sqrt{5}}{2}", r"\frac{\sqrt5+1}{2}"), (r"\sqrt{8}", r"2\sqrt{2}"),
    (r"\frac{2}{\sqrt2}", r"\sqrt2"), ("(x-1)(x+1)", "x^2-1"), ("a^2+2ab+b^2", "(a+b)^2"),
    (r"\frac{1}{x}+\frac{1}{y}", r"\frac{x+y}{xy}"), (r"\frac{3}{4}\pi", r"\frac{3\pi}{4}"), ("3i+4", "4+3i"),
    (r"e^{i\pi}", "-1"), (r"\cos\frac{\pi}{3}", r"\frac12"), (r"\sin(2x)", r"2\sin x\cos x"), (r"\log_{10} 100", "2"),
    (r"\ln e", "1"), ("1.5e3", "1500"), (r"6.02\times 10^{23}", "6.02e23"), (r"12\%", "12%"), (r"12 \text{ percent}", "12"),
    (r"60 \text{ degrees}", r"60^\circ"), (r"\$1,000", "1000"), ("1,000,000", "1000000"), (r"3\text{ m}^2", "3"),
    ("p = 7", "7"), ("P(x)=x^2", "x^2"), ("f(x) = 3x+1, g(x)=2", "g(x)=2, f(x)=3x+1"), ("(1,2,3)", "( 1, 2, 3 )"),
    (r"\langle 1,2\rangle", r"\langle 1, 2 \rangle"), (r"\begin{array}{c}1\\2\end{array}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    (r"\frac{\pi}{2}+2\pi k", r"2\pi k+\frac{\pi}{2}"), ("n(n+1)/2", r"\frac{n^2+n}{2}"), (r"\mathrm{C}", "C"),
    (r"\textbf{(A)}", "A"), (r"(\text{A})", "A"), ("A.", "A"), ("true", "True"), (r"\text{Yes}", "yes"),
    (r"-\frac{1}{2}", r"\frac{-1}{2}"), (r"-\frac{1}{2}", r"\frac{1}{-2}"), ("+5", "5"), ("5.0", "5"), ("007", "7"),
    ("x_1=1, x_2=2", "x_1=1,x_2=2"), (r"\sqrt[3]{8}", "2"), ("27^{1/3}", "3"), ("|-5|", "5"), (r"5\cdot 3", "15"),
    (r"5\times3", "15"), ("5*3", "15"), ("6/3", "2"), (r"6\div3", "2"), ("x^{2}y", "yx^2"), (r"\left[0,1\right]", "[0,1]"),
    (r"0\le x<1", "[0,1)"), (r"x\in(0,1)", "0<x<1"), ("(x,y)=(1,2)", "(1,2)"), (r"\boxed{\frac{1}{2}}", "0.5"),
    ("0.1667", "1/6"), ("1.732", r"\sqrt3"), (r"\infty", r"\infty"), (r"+\infty", r"\infty"), (r"-\infty", r"-\infty"),
    (r"10 \text{ hours}", "10 hours"), ("10 hr", "10 hours"), (r"\{(1,2),(3,4)\}", "(3,4),(1,2)"),
    ("1 + 2i, 1 - 2i", r"1 \pm 2i"), (r"\frac{-b\pm\sqrt{b^2-4c}}{2}", r"-\frac{b}{2}\pm\frac{\sqrt{b^2-4c}}{2}"),
    ("3:2", "3 : 2"), (r"2\frac{1}{3}", "7/3"), (r"-1\frac12", "-1.5"), (r"2\pi", "6.283"), ("x=2,y=3", "y=3, x=2"),
    (r"5\,\mathrm{cm}", "5cm"), (r"45\text{ }^\circ", "45"), ("1{,}234", "1234"), (r"1\,000", "1000"),
    (r"\dfrac{ 3 }{ 4 }", "0.75"), (r"\tfrac34", "3/4"), ("x+y=5", "5=x+y"), (r"\lfloor x \rfloor", r"\lfloor x\rfloor"),
    (r"\overline{AB}", r"\overline{AB}"), ("a_{n}=2^n", "2^n"), ("a_n=2^n", "a_{n} = 2^{n}"),
    (r"\theta=\frac{\pi}{4}", r"\frac{\pi}{4}"), ("２+３", "5"), ("½", "0.5"), ("2½", "2.5"), ("90°", "90"), ("x²+1", "x^2+1"),
    ("5%", r"5\%"), (r"\{x|x>2\}", r"\{x | x>2\}"), ("e", "2.718"),
]
DIFFERENT = [  # both ways round
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrx}"),
    ("0.33", "1/3"), ("(1,2)", "(2,1)"), ("(1,2)", "[1,2]"), ("(1,2]", "(1,2)"), ("-5", "5"), ("2", r"\pm2"), ("1", "1,2"),
    ("5 cm", "5 m"), (r"5\text{ cm}", r"5\text{ m}"), ("(1,234)", "1234"), ("1,23", "123"), (r"5 \text{ or } 6", "5"),
    (r"5 \text{ or } 6", "6"), (r"\neq 5", "5"), (r"x \neq 5", "5"), ("1011_2", "1011"), ("1011_2", "1011_3"),
    ("x>5", r"[5,\infty)"), ("x<5", r"(5,\infty)"), ("1/2004!", "1/2034!"), ("Tuesday", "Monday"), ("(C)", "D"), ("x+1", "x-1"),
    ("x+1", "y+1"), ("2x=3", "2x=4"), ("50", "0.5"), ("east", "seat"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"), ("12", "1"), ("the answer is 5", "5"),
    ("5 apples and 3", "5"), ("", "0"), ("9**9**9**9", "5"), (r"\frac{1}{0}", "0"), ("nan", "0"), ("inf", "0"),
    ("1.41", r"\sqrt2"), ("0.5", "0.52"), ("5.44", "5.4"), (r"\{1,2\}", r"\{1,2,3\}"),
    (r"(-\infty,2)\cup(3,\infty)", r"(-\infty,2]\cup(3,\infty)"), ("3:45", "3:46"), ("2,3", "(2,3)"), ("x=5", "y=5*x"),
    ("1 2", "12"), (r"\sqrt{3}", r"\sqrt{2}"), ("6!", "5!"), (r"\log_2 8", r"\log_2 4"), ("e^x", "e^{2x}"), ("sin x", "cos x"),
    ("AB", "AC"), (r"-1\frac12", "-0.5"), ("y=2x+3", "y=2x-3"), ("[0,1]", "[0,1)"), (r"\{1,2\}", "(1,2)"),
    ("f(x)=x", "g(y)=y+1"), ("1.73", r"\sqrt3"), ("5 km", "5 cm"), (r"60^\circ", "60 cm"), (r"\$5", "5 cm"),
    (r"\frac{1}{2}", r"\frac{2}{1}"), ("x^2", "x^3"), ("2^x", "x^2"), ("ab", "a+b"), ("1,2,3", "1,2"), ("1,1,2", "1,2,2"),
    ("(1,2),(3,4)", "(1,2,3,4)"), (r"\sin x", r"\sin 2x"), ("-3", "3"), ("i", "-i"), ("1+i", "1-i"), ("5", "5.1"),
    ("10", "100"), (r"\infty", r"-\infty"), ("A", "B"), ("AB", "BC"), ("yes", "no"), ("3:2", "2:3"), (r"5 \text{ or } 7", "7"),
    ("x=5", "x=6"), ("x>5", "x<5"), ("x>5", r"x\ge5"), ("2,000", "2"), ("1,234", "1.234"), (r"\sqrt{x}", "x"),
    ("log x", "ln y"), (r"\lfloor x \rfloor", r"\lceil x\rceil"), ("n", "m"), ("0", r"\emptyset"), ("0.999", "1"),
    ("3.14", r"\pi"), ("1e5", "1e6"), ("5!", "5"), ("", "5"), (r"\boxed{}", "5"), ("5", "5x"), ("{5}", "{6}"),
    (r"100\%", "100.5"), (r"x\ne 3", "x=3"), ("(1;2)", "(2;1)"), ("not 5", "5"), ("5 cats and 6 dogs", "5"),
    ("5, 6, or 7", "5"), ("5 cents", "5 dollars"), (r"5^\circ C", "5 dollars"),
]
HOSTILE = [
    "9**9**9**9", "10^{10^{10}}", "{" * 100_000, "1" * 1_000_000, r"\frac{1}{0}", "nan", "inf", "\x00", "\ud800",
    "__import__('os').system('x')", "((((5!)!)!)!)!", "5!!!!!!", "200!^200!", "(x+1)^{1000}", r"\sqrt{" * 50 + "2" + "}" * 50,
    r"\sin(" * 30 + "1" + ")" * 30, "e^{e^{e^{e^{e}}}}", "2^{2^{2^{2^{2^2}}}}",
    "*".join(f"(x+{i})" for i in range(60)), r"\tan(\pi/2)",
    r"\sin(10^{300})", "0^0", "0^{-1}", "(-8)^{1/3}", "i^i", "1e999999", r"\binom{200}{100}^{100}", "-" * 300 + "1", "(1," * 100,
    r"\begin{pmatrix}" + "1&" * 100, r"\log_{1}2", r"\log 0", "1/(x-x)", r"\pm" * 20 + "1", r"\pm1" * 64,
    "9" * 60 + "^{1000}", "exp(exp(100))", "x" * 399,
    "201!", "(((((x^x)^x)^x)^x)^x)^x", r"\sqrt[0]{5}", r"\cup" * 60, "<" * 99, "a=b=c", "=", r"\text{", "\x01cm\x02", "1," * 200,
]


def test_equal_and_different_answers():
    for one, other in EQUAL:
        for a, b in ((one, other), (other, one)):
            assert rewards.is_correct(a, b), (a, b, rewards.read(a), rewards.read(b))
    for one, other in DIFFERENT:
        for a, b in ((one, other), (other, one)):
            assert not rewards.is_correct(a, b), (a, b, rewards.read(a), rewards.read(b))


def test_several_boxes():
    assert rewards.reward(r"\boxed{1} and \boxed{2}", "2, 1", True) == 1.0
    assert rewards.reward(r"\boxed{1} and \boxed{2}", "2", True) == 1.0  # the last
    assert rewards.reward(r"\boxed{1} and \boxed{2}", "1", True) == 0.0
    assert rewards.reward(r"\boxed{2}", "1, 2", True) == 0.0


@pytest.fixture
def work(monkeypatch):
    """[how many nodes of a tree the checker has evaluated]"""
    count, evaluate_node = [0], rewards.value

    def counted(*arguments):
        count[0] += 1
        return evaluate_node(*arguments)

    monkeypatch.setattr(rewards, "value", counted)
    return count


def test_hostile_text_costs_little(work):
    """Bounded work, not bounded seconds: the nodes that are evaluated for any pair of a hundred nasty texts."""
    for text in HOSTILE:
        for gold in ("5", "x+1", "(1,2)", text):
            work[0] = 0
            verdict = rewards.is_correct(text, gold)
            assert work[0] < 5000 and (not verdict or text == gold), (text[:50], gold[:50])
            rewards.is_correct(gold, text)
            assert rewards.reward("\\boxed{" + text + "}", gold, True) in (0.0, 1.0)
    assert not rewards.is_correct("1/2004!", "1/2034!")


@needs_real
def test_fuzz_with_mutated_real_answers(work):
    """Ten thousand golds with a few characters changed: no exception, bounded work."""
    rng = random.Random(0)
    golds = [p["answer"] for name in ("math_test", "minerva_math", "olympiadbench_oe_to_maths_en")
             for p in rewards.load_problems(str(REAL / f"{name}.jsonl"))]
    pieces = [*"0123456789xyen+-*/^_!|()[]{}=<>,.;$%",
              "\\frac", "\\sqrt", "\\pm ", "\\sin ", "\\log_", "\\cup ", "\\text{", "\x00", "é"]
    for _ in range(10_000):
        gold = text = rng.choice(golds)
        for _ in range(rng.randint(1, 5)):
            place = rng.randint(0, len(text))
            text = text[:place] + rng.choice(pieces) + text[place + rng.randint(0, 2) :]
        work[0] = 0
        assert rewards.is_correct(text, gold) in (True, False)
        assert work[0] < 5000, text


@needs_real
@pytest.mark.parametrize("name", sorted(path.stem for path in REAL.glob("*.jsonl")))
def test_real_golds_and_their_respellings(name):
    for gold in {p["answer"] for p in rewards.load_problems(str(REAL / f"{name}.jsonl"))}:
        for respelled in (gold, f" {gold} ", gold + ".", gold.replace("\\frac", "\\dfrac"), f"${gold.strip('$')}$",
                          gold.replace("(", "\\left(").replace(")", "\\right)"), gold.replace("\\left", "").replace("\\right", "")):
            assert rewards.is_correct(respelled, gold) and rewards.is_correct(gold, respelled), (respelled, gold)


def test_rewards_command_line():
    done = run("rewards.py", r"so \boxed{\frac12}", "0.5")
    assert "reward   1.0" in done.stdout and r"\frac12" in done.stdout
    assert "in a box it would earn 1.0" in run("rewards.py", "x > 3", r"(3,\infty)").stdout


def test_reward_survives_any_text():
    rng = random.Random(0)
    pieces = ["\\boxed{", "{", "}", "####", "\\", "$", "9", ",", "\\frac", "\x00", "\ud800", "é", "\n", "%", "(", "</think>"]
    texts = ["".join(rng.choices(pieces, k=rng.randint(0, 40))) for _ in range(5000)]
    texts += ["\\boxed{" * 100_000, "{" * 1_000_000, "\\boxed{" + "9" * 1_000_000 + "}", "\\boxed{9**9**9**9}"]
    for text in texts:
        assert rewards.reward(text, "5", True) in (0.0, 1.0)


@needs_real
@pytest.mark.parametrize("name", ["gsm8k_test", "math500", "aime2024", "amc23", "minerva_math", "olympiadbench_oe_to_maths_en"])
def test_real_golds_equal_themselves(name):
    problems = rewards.load_problems(str(REAL / f"{name}.jsonl"))
    assert len(problems) >= 30
    for problem in problems:
        assert rewards.reward(f"so \\boxed{{{problem['answer']}}}.", problem["answer"], True) == 1.0, problem
        assert rewards.reward(f"so \\boxed{{7+{problem['answer']}}}.", problem["answer"], True) == 0.0, problem


def test_load_problems(tmp_path):
    rows = [{"id": "a", "question": "1+1", "answer": "2"}, {"id": 7, "question": "1+2", "answer": 3},
            {"id": "c", "question": "GSM", "answer": "1+1=<<1+1=2>>2\n#### 1,002"},
            {"id": "d", "question": "MATH", "answer": "we see \\boxed{x} and so $\\boxed{\\frac{1}{2}}$."}]
    expected = [{"id": "a", "question": "1+1", "answer": "2"}, {"id": "7", "question": "1+2", "answer": "3"},
                {"id": "c", "question": "GSM", "answer": "1,002"}, {"id": "d", "question": "MATH", "answer": "\\frac{1}{2}"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "p.json").write_text(json.dumps(rows, indent=1))
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{**row, "id": str(row["id"]), "answer": str(row["answer"])}
                                                           for row in rows]), tmp_path / "p.parquet")
    for ending in ("jsonl", "json", "parquet"):
        assert rewards.load_problems(str(tmp_path / f"p.{ending}")) == expected
    (tmp_path / "q.jsonl").write_text('{"problem": "1+1", "solution": ["2", "-2"]}\n')
    assert rewards.load_problems(str(tmp_path / "q.jsonl"), question_field="problem", answer_field="solution") == [
        {"id": "q/1", "question": "1+1", "answer": "2, -2"}]


def test_hub_problems(monkeypatch):
    import datasets

    asked = []

    def load_dataset(hub_id, config, split):
        asked.append((hub_id, config, split))
        return datasets.Dataset.from_list([{"question": "1+1", "problem": "1+1", "answer": "#### 2", "solution": "\\boxed{2}",
                                            "final_answer": ["2"]}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in [*rewards.DATASETS, "some/where"]:
        (problem,) = rewards.load_problems(name, "test")
        assert problem["question"] == "1+1" and problem["answer"] == "2" and problem["id"].startswith(name)
    assert asked[0] == ("openai/gsm8k", "main", "test") and asked[1][2] == "test"
    assert asked[3] == ("HuggingFaceH4/aime_2024", None, "train")  # it has no other split
    assert asked[-1] == ("some/where", None, "test")


@pytest.mark.parametrize("content,words", [
    (None, ["No such file"]), ("", ["no problems"]), ('{"question": "1+1"}\n', ["line 1", "'answer'"]),
    ('{"question": "a", "answer": "1"}\n{"question": " ", "answer": "2"}\n', ["line 2", "'question'"]),
    ('{"id": 1, "question": "a", "answer": 1}\n{"id": "1", "question": "b", "answer": 2}\n', ["line 2", "'1'", "before"]),
    ('{"question": "a", "answer": "1"}\n{"question"\n', ["line 2", "JSON"]), ("[1, 2]\n", ["line 1", "object"]),
    ("\udcff", ["UTF-8"]),
])
def test_bad_problem_files(tmp_path, capsys, content, words):
    path = tmp_path / "p.jsonl"
    if content is not None:
        path.write_bytes(content.encode("utf-8", "surrogateescape"))
    ends_in_one_line(capsys, lambda: rewards.load_problems(str(path)), "p.jsonl", *words)


def test_bad_data_names(tmp_path, capsys, monkeypatch):
    ends_in_one_line(capsys, lambda: rewards.load_problems("gsm9k"), "gsm9k", "unknown", "gsm8k")
    (tmp_path / "p.parquet").write_text("no")
    ends_in_one_line(capsys, lambda: rewards.load_problems(str(tmp_path / "p.parquet")), "p.parquet")
    import datasets

    def no_network(*_, **__):
        raise ConnectionError("Couldn't reach\nthe Hub")

    monkeypatch.setattr(datasets, "load_dataset", no_network)
    ends_in_one_line(capsys, lambda: rewards.load_problems("gsm8k"), "openai/gsm8k", "Couldn't reach the Hub")


def test_prompts():
    tokenizer = transformers.AutoTokenizer.from_pretrained(HERE / "tiny/model")
    ask = lambda name: rewards.make_prompt(tokenizer, "What?", rewards.suffix_of(name), False)
    assert ask("gsm8k") == 'What? Let\'s think step by step and output the final answer after "####".'
    assert ask("math500") == ask("my/own.jsonl") == (
        "What? Let's think step by step and output the final answer within \\boxed{}.")
    text = "482+795=2+5=7;\\boxed{1277}"
    assert tokenizer.decode(rewards.encode(tokenizer, text, False)) == text
    assert len(rewards.encode(tokenizer, "\\boxed{1277}", False)) == 6
    tokenizer.chat_template = "{% for m in messages %}<eos>{{ m.content }}{% endfor %}{{ '=' if add_generation_prompt }}"
    chat = rewards.make_prompt(tokenizer, "1", "+2", True)
    assert chat == "<eos>1+2="


def test_bos_is_written_once():
    """Plain text gets the tokenizer's BOS, a chat template writes its own."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(HERE / "tiny/model")
    from tokenizers.processors import TemplateProcessing

    bos, one = tokenizer.vocab["="], tokenizer.vocab["1"]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="= $A", special_tokens=[("=", bos)])
    assert rewards.encode(tokenizer, "1", chat=False) == [bos, one]
    assert rewards.encode(tokenizer, "1", chat=True) == [one]


# ---------------------------------------------------------------------------------------------------------------------
# the sampler


def small_model(vocabulary=11, kind="Qwen2", seed=0, hidden=32, layers=2):
    """A random model of a few thousand parameters; scaled up, so that its distribution is far from uniform."""
    torch.manual_seed(seed)
    sizes = dict(vocab_size=vocabulary, bos_token_id=None, eos_token_id=0, pad_token_id=0)
    if kind == "GPT2":
        config = transformers.GPT2Config(n_embd=hidden, n_layer=layers, n_head=2, n_positions=128, **sizes)
    else:
        config = getattr(transformers, f"{kind}Config")(
            hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    return model.eval()


def sampler(model, limit=20, temperature=1.0, batch=64, eos=(0,)):
    return TransformersSampler(model, list(eos), limit, temperature, batch)


def chi_square(counts, probabilities):
    """(statistic - degrees of freedom) in standard deviations; cells that expect fewer than 5 are pooled."""
    expected = probabilities * counts.sum()
    small = expected < 5
    counts = np.append(counts[~small], counts[small].sum())
    expected = np.append(expected[~small], max(expected[small].sum(), 1e-9))
    freedom = len(counts) - 1
    return (((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_samples_follow_the_softmax(temperature):
    model, prompt = small_model(), [3, 1, 4]
    (answers,) = sampler(model, 2, temperature, 30_000).generate([prompt], 30_000, [5])
    first = np.array([answer.tokens[0] for answer in answers])

    def softmax(ids):
        return (model(torch.tensor([ids])).logits[0, -1] / temperature).softmax(-1).detach().double().numpy()

    assert softmax(prompt).max() < 0.9
    assert chi_square(np.bincount(first, minlength=11), softmax(prompt)) < 4
    likely = np.bincount(first[first > 0]).argmax()  # and the second token, given the likeliest first
    second = np.array([answer.tokens[1] for answer in answers if answer.tokens[0] == likely])
    assert chi_square(np.bincount(second, minlength=11), softmax([*prompt, likely])) < 4
    assert chi_square(np.bincount(first, minlength=11), np.full(11, 1 / 11)) > 20  # the test can fail


@pytest.mark.parametrize("vocabulary", [3, 128, 1000, 151936])
def test_draw_is_the_inverse_cdf(vocabulary):
    """In two steps it finds what one running sum over all probabilities finds; tokens without probability never come."""
    torch.manual_seed(0)
    rows = 500 if vocabulary < 10_000 else 100
    logits = 3 * torch.randn(rows, vocabulary)
    logits[:, torch.randperm(vocabulary)[: vocabulary // 2]] = -math.inf
    uniform = torch.rand(rows, dtype=torch.float64)
    uniform[:4] = torch.tensor([0.0, 0.0, 1 - 1e-12, 1 - 1e-12], dtype=torch.float64)
    for temperature in (1.0, 0.5):
        token, logp = vstar.draw(logits, uniform, temperature)
        exact = (logits.double() / temperature).log_softmax(-1)
        torch.testing.assert_close(logp.double(), exact.gather(-1, token[:, None])[:, 0], atol=1e-5, rtol=0)
        cdf = exact.exp().cumsum(-1)
        before = torch.where(token > 0, cdf.gather(-1, (token[:, None] - 1).clamp(min=0))[:, 0], 0)
        assert (before - 1e-6 <= uniform).all() and (uniform <= cdf.gather(-1, token[:, None])[:, 0] + 1e-6).all()
        naive = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True)[:, 0]
        assert (naive == token).float().mean() > 0.98  # sums in fp32 move the borders by about 1e-7
    greedy, logp = vstar.draw(logits, uniform, 0)
    assert greedy.equal(logits.argmax(-1))
    torch.testing.assert_close(logp, logits.log_softmax(-1).amax(-1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["Qwen2", "Llama", "GPT2"])
def test_batch_equals_one_by_one(kind):
    """Left padding, positions, rows that leave: an answer does not depend on its neighbours or their order."""
    model, rng = small_model(kind=kind), random.Random(0)
    prompts = [[rng.randint(1, 10) for _ in range(rng.randint(1, 12))] for _ in range(20)]
    seeds = [prompt_seed(0, i) for i in range(20)]
    together = sampler(model, batch=1000).generate(prompts, 4, seeds)
    alone = [sampler(model, batch=1).generate([p], 4, [s])[0] for p, s in zip(prompts, seeds)]
    backwards = sampler(model, batch=28).generate(prompts[::-1], 4, seeds[::-1])[::-1]
    tokens = lambda answers: [[c.tokens for c in copies] for copies in answers]
    assert tokens(together) == tokens(alone) == tokens(backwards)
    assert len({tuple(c.tokens) for copies in together for c in copies}) > 60
    assert {c.finished for copies in together for c in copies} == {True, False}
    # a smaller N is a prefix of a larger one
    assert tokens(sampler(model).generate(prompts, 2, seeds)) == [copies[:2] for copies in tokens(together)]
    for prompt, copies in zip(prompts, together):  # the log-probs are those of a plain forward pass without padding
        for copy in copies:
            logits = model(torch.tensor([prompt + copy.tokens])).logits[0, len(prompt) - 1 : -1]
            plain = logits.log_softmax(-1).gather(-1, torch.tensor(copy.tokens)[:, None])[:, 0]
            torch.testing.assert_close(plain, torch.tensor(copy.logps), atol=2e-4, rtol=0)


def test_answers_end_with_the_first_eos():
    model = small_model()
    for eos in ([0], [0, 7]):  # 0 is also the padding token
        for copies in sampler(model, 12, eos=eos).generate([[1, 2], [5], [0, 3, 0]], 50, [1, 2, 3]):
            for tokens, finished, logps in copies:
                assert len(tokens) == len(logps) and 1 <= len(tokens) <= 12
                assert finished == (tokens[-1] in eos)
                assert not set(tokens[:-1]) & set(eos)
                assert finished or len(tokens) == 12


def test_greedy():
    model, ids = small_model(), [3, 1, 4]
    ((answer,),) = sampler(model, 10, temperature=0, eos=[99]).generate([ids], 1, [0])
    for token in answer.tokens:
        assert token == model(torch.tensor([ids])).logits[0, -1].argmax().item()
        ids = [*ids, token]


def test_seeds_differ_by_run_prompt_and_copy():
    assert len({prompt_seed(s, i) for s in range(50) for i in ("a", "b", 1, 11, "1/1")}) == 250
    assert prompt_seed(0, "train/00000") == prompt_seed(0, "train/00000") < 2**63
    (answers,) = sampler(small_model()).generate([[1]], 8, [3])
    assert len({tuple(a.tokens) for a in answers}) == 8


# ---------------------------------------------------------------------------------------------------------------------
# Stage 1 as a whole


def stage1(out, *flags, command=run, **keywords):
    return command("vstar.py", *TINY, "--limit=192", "--chunk=32", f"--out={out}", *flags, **keywords)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("stage1") / "vstar.jsonl"
    return out, stage1(out)


def test_stage1_rows(undisturbed):
    out, done = undisturbed
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    problems = {p["id"]: p for p in rewards.load_problems(str(HERE / "tiny/train.jsonl"))[:192]}
    assert [row["id"] for row in rows] == sorted(problems)
    for row in rows:
        assert list(row) == ["id", "prompt", "answer", "rewards", "vstar", "lengths", "finished", "responses"]
        assert row["prompt"] == problems[row["id"]]["question"] and row["answer"] == problems[row["id"]]["answer"]
        assert row["rewards"] == [rewards.reward(*a) for a in zip(row["responses"], [row["answer"]] * 8, row["finished"])]
        assert row["vstar"] == pytest.approx(0.5 * math.log(np.mean(np.exp(np.array(row["rewards"]) / 0.5))))
    accuracy = np.mean([row["rewards"] for row in rows])
    assert 0.3 < accuracy < 0.5
    assert f"accuracy          {accuracy:.3f} ±" in done.stdout and "N = 16" in done.stdout
    settings = json.loads(out.with_suffix(".config.json").read_text())["settings"]
    assert settings["model"] == "tiny/model" and settings["n"] == 8 and settings["dtype"] == "float32"
    assert out.with_suffix(".png").stat().st_size > 5000
    assert sorted(p.name for p in out.parent.iterdir()) == ["vstar.config.json", "vstar.jsonl", "vstar.png"]


def test_stage1_killed_and_restarted(undisturbed, tmp_path):
    out, rng = tmp_path / "vstar.jsonl", random.Random(0)
    seen = set()
    for _ in range(4):
        process = subprocess.Popen([sys.executable, "vstar.py", *TINY, "--limit=192", "--chunk=32", f"--out={out}"],
                                   cwd=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        parts, before = out.with_suffix(".parts"), len(seen)
        while process.poll() is None and len(seen) <= before:  # until it has saved something more
            seen |= set(parts.glob("*.jsonl"))
            time.sleep(0.002)
        time.sleep(rng.random() * 0.1)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert 4 <= len(seen) <= 6
    stage1(out)
    assert out.read_bytes() == undisturbed[0].read_bytes()
    assert sorted(p.name for p in out.parent.iterdir()) == ["vstar.config.json", "vstar.jsonl", "vstar.png"]
    again = stage1(out)  # nothing left to do
    assert "tokens/s" not in again.stdout and "accuracy" in again.stdout


def test_two_processes_equal_one(undisturbed, tmp_path):
    stage1(tmp_path / "vstar.jsonl", command=lambda *c: torchrun(2, *c))
    assert (tmp_path / "vstar.jsonl").read_bytes() == undisturbed[0].read_bytes()


def test_a_full_gpu_is_one_line(capsys):
    def raises(error):
        raise error

    for error in (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
                  RuntimeError("CUDA Error: out of memory at cumem_allocator.cpp"),
                  ValueError("Free memory on device cuda:0 (3.1/79.1 GiB) on startup is less than desired")):
        ends_in_one_line(capsys, lambda error=error: vstar.run_script(lambda: raises(error)), "lower --batch")
    with pytest.raises(RuntimeError, match="another"):
        vstar.run_script(lambda: raises(RuntimeError("another")))


def test_each_process_sees_its_own_gpus():
    assert [vstar.own_gpus(None, rank, 1) for rank in range(3)] == ["0", "1", "2"]
    assert [vstar.own_gpus("4,5,6,7", rank, 2) for rank in range(3)] == ["4,5", "6,7", ""]
    assert vstar.own_gpus("GPU-a,GPU-b", 1, 1) == "GPU-b" and vstar.own_gpus("", 0, 1) == ""


def main(*flags, monkeypatch):
    monkeypatch.chdir(HERE)
    monkeypatch.setattr(sys, "argv", ["vstar.py", *TINY, *flags])
    vstar.main()


def test_changed_settings_are_refused_by_name(undisturbed, monkeypatch, capsys):
    out = undisturbed[0]
    before = out.read_bytes()
    flags = ["--limit=192", "--chunk=32", f"--out={out}", "--n=4", "--beta1=1"]
    ends_in_one_line(capsys, lambda: main(*flags, monkeypatch=monkeypatch),
                     "--n (was 8, now 4)", "--beta1 (was 0.5, now 1.0)", "--overwrite")
    assert out.read_bytes() == before


def test_what_stands_behind_the_names_may_not_change(tmp_path, monkeypatch, capsys):
    """A model that was trained anew in the same folder, or an edited file of problems: old answers are not taken for theirs."""
    shutil.copytree(HERE / "tiny/model", tmp_path / "model")
    data = tmp_path / "data.jsonl"
    data.write_text("".join((HERE / "tiny/train.jsonl").read_text().splitlines(keepends=True)[:4]))
    stage1 = lambda: main(f"--model={tmp_path}/model", f"--data={data}", f"--out={tmp_path}/v.jsonl", monkeypatch=monkeypatch)
    stage1()
    before = (tmp_path / "v.jsonl").read_bytes()
    capsys.readouterr()
    text = data.read_text()
    data.write_text(text.replace('"answer": "', '"answer": "1', 1))
    assert data.read_text() != text
    ends_in_one_line(capsys, stage1, "data's problems (was", "--overwrite")
    data.write_text(text)
    path = tmp_path / "model/model.safetensors"
    whole = bytearray(path.read_bytes())
    whole[-3000:] = bytes(3000)
    path.write_bytes(whole)
    ends_in_one_line(capsys, stage1, "model's weights (was", "--overwrite")
    monkeypatch.setattr(sys, "argv", ["train.py", f"--vstar={tmp_path}/v.jsonl", f"--out={tmp_path}/run"])
    ends_in_one_line(capsys, train.main, "has changed since Stage 1", "vstar.py")
    assert (tmp_path / "v.jsonl").read_bytes() == before


def test_overwrite_starts_afresh(tmp_path, monkeypatch):
    for n in (1, 2):
        main("--limit=4", f"--n={n}", f"--out={tmp_path / 'v.jsonl'}", *["--overwrite"] * (n - 1), monkeypatch=monkeypatch)
        assert len(json.loads((tmp_path / "v.jsonl").read_text().splitlines()[0])["rewards"]) == n


@pytest.mark.parametrize("flags,words", [
    (["--n=0"], ["--n 0"]), (["--beta1=0"], ["--beta1 0"]), (["--beta1=-1"], ["--beta1"]), (["--limit=0"], ["--limit"]),
    (["--model=./nowhere"], ["./nowhere", "no such folder"]), (["--chat"], ["chat template"]),
    (["--max_new_tokens=510"], ["train/00000", "window of 512"]), (["--data=nowhere.jsonl"], ["nowhere.jsonl"]),
    (["--data=nonsense"], ["unknown data set 'nonsense'"]), (["--engine=vllm"], ["--engine vllm"]),
])
def test_bad_flags(flags, words, tmp_path, monkeypatch, capsys):
    if flags == ["--engine=vllm"] and importlib.util.find_spec("vllm"):
        pytest.skip("vLLM is installed")
    out = tmp_path / "out" / "vstar.jsonl"
    ends_in_one_line(capsys, lambda: main(f"--out={out}", *flags, monkeypatch=monkeypatch), *words)
    assert not out.parent.exists()  # nothing half-written


def test_model_without_tokenizer(tmp_path, monkeypatch, capsys):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(HERE / "tiny/model" / name)
    ends_in_one_line(capsys, lambda: main(f"--model={tmp_path}", f"--out={tmp_path / 'o/v.jsonl'}", monkeypatch=monkeypatch),
                     "tokenizer")


def test_ctrl_c_says_how_to_go_on(undisturbed, tmp_path):
    command = [sys.executable, "vstar.py", *TINY, "--limit=192", "--chunk=32", f"--out={tmp_path / 'vstar.jsonl'}"]
    listens = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job does not, nor do its children
    process = subprocess.Popen(command, cwd=HERE, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, preexec_fn=listens)
    while process.poll() is None and not list(tmp_path.glob("*/*.jsonl")):
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on from here" in said and "Traceback" not in said
    stage1(tmp_path / "vstar.jsonl")
    assert (tmp_path / "vstar.jsonl").read_bytes() == undisturbed[0].read_bytes()


def test_unwritable_folder_and_broken_files(tmp_path):
    (tmp_path / "file").write_text("")
    done = stage1(tmp_path / "file" / "vstar.jsonl", check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    limited = ["bash", "-c", 'ulimit -f 30; exec "$0" "$@"', sys.executable, "vstar.py", *TINY, f"--out={tmp_path / 'full.jsonl'}"]
    done = subprocess.run(limited, cwd=HERE, text=True, capture_output=True)  # as on a full disk
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "cannot write" in done.stderr and "000000.jsonl: File too large" in done.stderr
    (tmp_path / "v.config.json").write_text("{")
    done = stage1(tmp_path / "v.jsonl", check=False)
    assert done.returncode == 2 and "v.config.json" in done.stderr and done.stderr.count("\n") == 1


def test_summary_warns():
    row = lambda rewards, finished=True: dict(rewards=rewards, vstar=0.0, lengths=[3] * len(rewards),
                                              finished=[finished] * len(rewards))
    mixed = [row([float(i < k) for i in range(8)]) for k in range(9)] * 10
    assert "warning" not in vstar.summary(mixed, 0.5)
    assert "no right answer" in vstar.summary([row([0.0] * 8)] * 19 + mixed[8:9], 0.5)
    assert "cut off" in vstar.summary([row(r["rewards"], False) for r in mixed], 0.5)
    assert "too small for β1" in vstar.summary([row(r["rewards"][3:5]) for r in mixed[4:5]], 0.25)
    assert "too small for β1" in vstar.summary([row(r["rewards"][:1]) for r in mixed], 0.5)
    text = vstar.summary(mixed, 0.5)
    assert "0/8 right         11.1%" in text and "8/8 right  11.1%" in text and "0.500 ±" in text


# ---------------------------------------------------------------------------------------------------------------------
# Stage 2: the mathematics


def test_apo_loss_by_hand():
    loss = train.apo_loss(torch.tensor([-3.0, -1.0]), torch.tensor([-5.0, -1.0]), torch.tensor([1.0, 0.0]),
                          torch.tensor([0.25, 0.5]), beta2=0.1)
    torch.testing.assert_close(loss, torch.tensor([(0.2 - 0.75) ** 2, 0.25]))


@pytest.mark.parametrize("vstar_value", [0.0, 0.3, 7.0])
def test_gradient_is_that_of_reward_minus_kl(vstar_value):
    """On-policy, E[∇ℓ] = −2 β2 ∇( E_π[r] − β2 KL(π‖π_ref) ), whatever V̂* is: exact on a softmax over seven answers."""
    torch.manual_seed(0)
    beta2, theta = 0.3, torch.randn(7, dtype=torch.double, requires_grad=True)
    ref_logp, r = torch.randn(7, dtype=torch.double).log_softmax(0), torch.tensor([1.0, 0, 0, 1, 0, 1, 0], dtype=torch.double)
    logp = theta.log_softmax(0)
    ours = (logp.exp().detach() * train.apo_loss(logp, ref_logp, r, vstar_value, beta2)).sum()
    objective = (logp.exp() * (r - beta2 * (logp - ref_logp))).sum()
    (gradient,) = torch.autograd.grad(ours, theta, retain_graph=True)
    (expected,) = torch.autograd.grad(-2 * beta2 * objective, theta)
    torch.testing.assert_close(gradient, expected)
    assert gradient.abs().max() > 0.01


def test_loss_is_zero_at_the_optimum():
    """π* ∝ π_ref exp(r/β2) with V* = β2 ln E_ref exp(r/β2) solves the regression exactly."""
    beta2, r = 0.5, torch.tensor([1.0, 0.0, 0.0, 1.0])
    ref_logp = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    best = (beta2 * torch.logsumexp(ref_logp + r / beta2, 0)).item()
    logp = ref_logp + (r - best) / beta2
    assert logp.exp().sum() == pytest.approx(1)
    assert train.apo_loss(logp, ref_logp, r, best, beta2).max() < 1e-12


def test_learning_rate():
    args = SimpleNamespace(warmup=4, schedule="constant", steps=10)
    assert [train.learning_rate(s, args) for s in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    args = SimpleNamespace(warmup=0, schedule="cosine", steps=10)
    assert [train.learning_rate(s, args) for s in (0, 5, 10)] == pytest.approx([1, 0.55, 0.1])


def some_samples(count, seed=0, vocabulary=11):
    rng = random.Random(seed)
    samples = []
    for i in range(count):
        prompt = [rng.randrange(vocabulary) for _ in range(rng.randint(1, 9))]
        answer = [rng.randrange(1, vocabulary) for _ in range(rng.randint(0, 12))] + [0]  # ends in EOS, which also pads
        row = dict(id=str(i), tokens=prompt, vstar=rng.random(), rewards=[1.0])
        samples.append(train.Sample(row, Completion(answer, True, [-1.0] * len(answer)), "", float(rng.random() < 0.5)))
    return samples


def settings(algo="apo", **more):
    return SimpleNamespace(**{**dict(algo=algo, group=train.GROUP[algo], tokens_per_microbatch=100_000, temperature=1.0, beta2=0.1,
                                     clip=1e9, minibatches=1, passes=1, dr_grpo=False, eta=0.5, clip_ratio=0.2, value_clip=0.1,
                                     gamma=0.9, lam=0.8, max_new_tokens=13), **more})


def naive_states(model, sample):
    """One row at a time, no padding: what the model makes of the answer's tokens, before the head."""
    prompt, answer = sample.row["tokens"], sample.answer.tokens
    return model.base_model(torch.tensor([prompt + answer])).last_hidden_state[0, len(prompt) - 1 : -1]


def naive_logps(model, samples, temperature):
    """[(tokens of the answer,)], from full logits."""
    return [(model.lm_head(naive_states(model, s)) / temperature).log_softmax(-1).gather(
        -1, torch.tensor(s.answer.tokens)[:, None])[:, 0] for s in samples]


def naive_loss(args, samples, new, old, ref, value, old_value):
    """The four objectives again, answer by answer and token by token, as the papers write them; → (policy's, critic's)"""
    r, tokens = [s.reward for s in samples], sum(len(s.answer.tokens) for s in samples)
    loss, critic_loss = 0.0, torch.tensor(0.0)
    clip = lambda x, around, by: min(max(x, around - by), around + by)
    surrogate = lambda new, old, a: -min((new - old).exp() * a, clip((new - old).exp(), 1, args.clip_ratio) * a)
    if args.algo == "apo":
        for i, s in enumerate(samples):
            loss += (args.beta2 * (new[i].sum() - ref[i].sum()) - (r[i] - s.row["vstar"])) ** 2 / len(samples)
    elif args.algo == "rebel":
        for i in range(0, len(samples), 2):
            ratio = [new[j].sum() - old[j].sum() for j in (i, i + 1)]
            gain = [r[j] - args.beta2 * (old[j].sum() - ref[j].sum()) for j in (i, i + 1)]
            loss += ((ratio[0] - ratio[1]) / args.eta - (gain[0] - gain[1])) ** 2 / (len(samples) / 2)
    elif args.algo == "grpo":
        for i in range(len(samples)):
            start = i // args.group * args.group
            group = np.array(r[start : start + args.group])
            a = r[i] - group.mean()
            a = a if args.dr_grpo else a / (group.std(ddof=1) + 1e-6)
            for n, o, q in zip(new[i], old[i], ref[i]):
                kl = (q - n).exp() - (q - n) - 1
                length = args.max_new_tokens if args.dr_grpo else len(new[i])
                loss += (surrogate(n, o, a) + args.beta2 * kl) / length / len(samples)
    else:
        advantages = []
        for i in range(len(samples)):
            gains = [(-args.beta2 * (o - q)).item() for o, q in zip(old[i], ref[i])]
            gains[-1] += r[i]
            v = [*old_value[i].tolist(), 0.0]
            delta = [gains[t] + args.gamma * v[t + 1] - v[t] for t in range(len(gains))]
            advantages.append([sum((args.gamma * args.lam) ** k * d for k, d in enumerate(delta[t:])) for t in range(len(delta))])
        every = np.concatenate(advantages)
        for i in range(len(samples)):
            for n, o, v, w, a in zip(new[i], old[i], value[i], old_value[i], advantages[i]):
                loss += surrogate(n, o, (a - every.mean()) / math.sqrt(every.var() + 1e-8)) / tokens
                target = a + w
                critic_loss = critic_loss + max((v - target) ** 2, (clip(v, w, args.value_clip) - target) ** 2) / 2 / tokens
    return loss, critic_loss


@pytest.mark.parametrize("algo,kind,temperature,recompute,more", [
    ("apo", "Qwen2", 1.0, True, {}), ("apo", "Qwen2", 0.7, False, {}), ("apo", "Llama", 1.3, True, {}),
    ("apo", "GPT2", 1.0, True, {}),
    ("rebel", "Qwen2", 0.7, True, {}), ("grpo", "Qwen2", 0.7, True, {}), ("grpo", "Llama", 1.0, False, dict(dr_grpo=True)),
    ("ppo", "Qwen2", 0.7, True, {}), ("ppo", "GPT2", 1.0, False, {})])
def test_update_is_naive_autograd_on_one_big_batch(algo, kind, temperature, recompute, more, monkeypatch):
    """Chunked head, recomputation, packing, any token budget: the loss and the step of one undivided batch. The policy is
    not the one that wrote the answers, so ratios are clipped."""
    monkeypatch.setattr(train.Policy, "chunk", lambda *_: 7)
    samples = some_samples(24)
    args = settings(algo, temperature=temperature, passes=2, **more)
    naive, old, reference = small_model(kind=kind), small_model(kind=kind, seed=1), small_model(kind=kind, seed=2)
    for parameter, start in zip(old.parameters(), naive.parameters()):
        parameter.data.lerp_(start.data, 0.8)  # near, so that some ratios are clipped and some not

    def critic_of(seed):
        critic = train.Critic(small_model(kind=kind, seed=seed), recompute)
        with torch.no_grad():
            critic.model.get_output_embeddings().weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
        return critic

    critic, old_critic = critic_of(3), critic_of(4)
    values = lambda critic: [critic.model.get_output_embeddings()(naive_states(critic.model, s))[:, 0] for s in samples]
    with torch.no_grad():
        before = [naive_logps(model, samples, temperature) for model in (old, reference)]
        old_value = values(old_critic)
    new = naive_logps(naive, samples, temperature)
    ratios = (torch.cat(new) - torch.cat(before[0])).exp()
    assert 0.1 < ((ratios - 1).abs() > 0.2).float().mean() < 0.9
    loss, critic_loss = naive_loss(args, samples, new, *before, values(critic), old_value)
    (loss + critic_loss).backward()
    expected = {name: p.grad for name, p in naive.named_parameters()}
    expected_critic = {name: p.grad for name, p in critic.named_parameters()}
    for budget in (1, 40, 100_000):
        args.tokens_per_microbatch = budget
        known = train.targets(train.Policy(old), train.Policy(reference), old_critic, samples, args, "cpu")
        torch.testing.assert_close(known["ref_logp"].sum(-1), torch.stack([x.sum() for x in before[1]]), atol=2e-4, rtol=1e-5)
        learners = [train.Policy(small_model(kind=kind), recompute)] + [critic_of(3)] * (algo == "ppo")
        starts = [{name: p.detach().clone() for name, p in learner.named_parameters()} for learner in learners]
        optimizer = torch.optim.SGD([p for learner in learners for p in learner.parameters()], lr=1.0)
        over = dict(ppo=sum(len(s.answer.tokens) for s in samples), rebel=12).get(algo, 24)
        sums, norm = train.update(learners[0], optimizer, samples, known, over, args, "cpu", *learners[1:])
        assert sums["loss"] / over == pytest.approx(loss.item(), rel=1e-4, abs=1e-6)
        assert sums["logp"] == pytest.approx(sum(x.sum().item() for x in new), rel=1e-5)
        for name, p in learners[0].model.named_parameters():
            torch.testing.assert_close(starts[0]["model." + name] - p, expected[name], atol=2e-4, rtol=2e-3)
        assert norm == pytest.approx(math.sqrt(sum((g**2).sum().item() for g in expected.values())), rel=1e-3)
        if algo == "ppo":
            assert critic_loss > 0.01
            for name, p in learners[1].named_parameters():
                if expected_critic[name] is not None:  # a tied head was replaced; nothing is left of it
                    torch.testing.assert_close(starts[1][name] - p, expected_critic[name], atol=2e-4, rtol=2e-3)


def test_rebel_by_hand():
    # two answers, one right: log-ratios 0.3 and −0.1 over η = 2 make 0.2, the rewards differ by 1: (0.2 − 1)²
    loss = train.rebel_loss(torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.3, -1.9]]), torch.tensor([[1.0, 0.0]]), 2.0)
    assert loss.tolist() == pytest.approx([0.64])


def test_grpo_by_hand():
    # one right of four: mean 1/4, deviation (n − 1) 1/2 → advantages 3/2 and −1/2
    advantage = train.group_advantage(torch.tensor([[1.0, 0, 0, 0]]))
    assert advantage[0].tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], rel=1e-5)
    assert train.group_advantage(torch.tensor([[1.0, 0, 0, 0]]), divide=False)[0].tolist() == [0.75, -0.25, -0.25, -0.25]
    # two tokens: ratio 1 (gain 3/2) and ratio 2, clipped to 1.2 (gain 1.8); π_ref gives the second half as much as π: its
    # KL estimate is 1/2 + ln 2 − 1; a third column is no token
    logp, old = torch.tensor([[-1.0, math.log(0.5), -9.0]]), torch.tensor([[-1.0, math.log(0.25), 0.0]])
    ref, response = torch.tensor([[-1.0, math.log(0.25), 0.0]]), torch.tensor([[True, True, False]])
    expected = -(1.5 + 1.8) + 0.1 * (0.5 + math.log(2) - 1)
    grpo = lambda **more: train.grpo_loss(logp, old, ref, torch.tensor([1.5]), response, 0.1, 0.2, **more).item()
    assert grpo() == pytest.approx(expected / 2) and grpo(length=10) == pytest.approx(expected / 10)
    # a worse answer whose ratio has grown is not spared: the minimum takes the unclipped
    assert train.clipped(torch.tensor(math.log(2)), torch.tensor(0.0), torch.tensor(-1.0), 0.2).item() == pytest.approx(2)


def test_a_group_of_equals_teaches_nothing():
    for r in (0.0, 1.0):
        logp = torch.full((8, 3), -1.0, requires_grad=True)
        advantage = train.group_advantage(torch.full((1, 8), r)).flatten()
        train.grpo_loss(logp, logp.detach(), logp.detach(), advantage, torch.ones(8, 3), 0.1, 0.2).sum().backward()
        assert torch.equal(advantage, torch.zeros(8)) and torch.equal(logp.grad, torch.zeros(8, 3))


def test_gae_against_the_double_sum():
    rng = np.random.default_rng(0)
    for gamma, lam in product((1.0, 0.9), (1.0, 0.7, 0.0)):
        reward, value = rng.normal(size=(3, 6)), rng.normal(size=(3, 6))
        for row, length in enumerate((6, 4, 1)):
            reward[row, length:] = value[row, length:] = 0
        got = train.gae(torch.tensor(reward), torch.tensor(value), gamma, lam).numpy()
        for row, length in enumerate((6, 4, 1)):
            v = [*value[row, :length], 0.0]
            for t in range(length):
                # λ-weighted mean of the k-step estimates, the last of which takes all that is left
                steps = [sum(gamma**j * reward[row, t + j] for j in range(k)) + gamma**k * v[t + k] - v[t]
                         for k in range(1, length - t + 1)]
                weights = [(1 - lam) * lam**k for k in range(len(steps) - 1)] + [lam ** (len(steps) - 1)]
                assert got[row, t] == pytest.approx(np.dot(weights, steps))
    # γ = λ = 1, reward 1 at the end, values 0.2 and 0.6: 0.8 and 0.4
    assert train.gae(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.2, 0.6]]), 1.0, 1.0)[0].tolist() == pytest.approx([0.8, 0.4])


def test_value_loss_by_hand():
    # from 0 to 0.9 with a clip of 0.5, the return is 1: ½ max(0.1², 0.5²); where it moved less, the plain square
    loss = train.value_loss(torch.tensor([0.9, 0.3]), torch.zeros(2), torch.ones(2), 0.5)
    assert loss.tolist() == pytest.approx([0.125, 0.245])


def test_without_passes_the_old_policy_costs_nothing(monkeypatch):
    """A*-PO, and GRPO and REBEL with one step a batch, ask only π_ref for log-probabilities before the update."""
    asked = []
    monkeypatch.setattr(train, "by_token", lambda model, samples, args, device: asked.append(model) or torch.zeros(24, 30))
    for algo, models in (("apo", ["ref"]), ("grpo", ["ref"]), ("rebel", ["ref"]), ("ppo", ["ref", "policy", "critic"])):
        train.targets("policy", "ref", "critic", some_samples(24), settings(algo), "cpu")
        assert asked == models
        asked.clear()


def test_microbatches_hold_every_response_once():
    samples = some_samples(40)
    for budget, together in product((1, 60, 10_000), (1, 2)):
        batches = train.microbatches(samples, budget, "cpu", together)
        assert sorted(i for group, _, _ in batches for i in group) == list(range(40))
        for group, ids, response in batches:
            assert len(group) == together or ids.numel() <= budget
            assert all(i ^ 1 in group for i in group) or together == 1
            for row, i in enumerate(group):
                # up to and including the EOS, not the padding, which is the same token
                assert ids[row][response[row]].tolist() == samples[i].answer.tokens
                assert not response[row, : len(samples[i].row["tokens"])].any()


def test_dropout_is_off_and_recomputation_on():
    policy = train.Policy(small_model(kind="GPT2").train(), checkpoint_activations=True)
    assert not any(m.training for m in policy.modules() if isinstance(m, torch.nn.Dropout))
    batch = train.microbatches(some_samples(4), 1000, "cpu")[0]
    one, two = (policy(input_ids=batch[1], response=batch[2]) for _ in range(2))
    assert torch.equal(one, two) and len(policy.blocks) == 2 and all(block.training for block in policy.blocks)
    with torch.no_grad():
        policy(input_ids=batch[1], use_cache=True)
    assert not any(block.training for block in policy.blocks)


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The most elements that any tensor had."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.size = max(self.size, tensor.numel())
        return out


def test_memory_does_not_grow_with_vocabulary_times_batch(monkeypatch):
    monkeypatch.setattr(train.Policy, "chunk", lambda *_: 16)
    vocabulary, samples = 150_000, some_samples(64, vocabulary=150_000)
    policy = train.Policy(small_model(vocabulary))
    args = settings()
    known = train.targets(policy, policy, None, samples, args, "cpu")
    with Largest() as largest:
        train.update(policy, torch.optim.SGD(policy.parameters(), lr=1.0), samples, known, 64, args, "cpu")
    weights = vocabulary * 32  # the embedding; its gradient is as large
    assert sum(len(s.answer.tokens) for s in samples) * vocabulary > 10 * weights  # full logits would be seen
    assert largest.size <= max(weights, 16 * vocabulary)


# ---------------------------------------------------------------------------------------------------------------------
# Stage 2: what it says is wrong


def healthy(steps=60):
    """Metrics of a run that goes well: 0.4 → 0.9."""
    return [dict(step=i + 1, reward=0.9 - 0.5 * math.exp(-i / 15), finished=1.0, length=20.0 + i / 10, unsolved=0.1, kl=0.02 * i,
                 log_ratio_abs=0.05 + 0.02 * i) for i in range(steps)]


ILL = {
    "unsolved": lambda i: dict(unsolved=0.9, reward=0.02),
    "still": lambda i: dict(log_ratio_abs=1e-4, kl=1e-5, reward=0.4),
    "runaway": lambda i: dict(kl=0.5 * i),
    "collapse": lambda i: dict(reward=0.6 if i < 30 else 0.2),
    "cut off": lambda i: dict(finished=1.0 - i / 60, length=20.0 + 5 * i),
    "no EOS": lambda i: dict(finished=0.01, reward=0.0),
    "saturated": lambda i: dict(reward=0.99),
}


@pytest.mark.parametrize("name", ILL)
def test_illness_is_named(name):
    args, remedies = settings(), ("--", "harder")
    found = train.diagnose([{**row, **ILL[name](i)} for i, row in enumerate(healthy())], args)
    assert name in found and any(word in found[name] for word in remedies), found
    assert set(found) <= {name, "collapse"}, found


def test_health_is_not_remarked_upon():
    rows = [dict(step=0, accuracy=0.4), *healthy()]
    for count in range(len(rows)):
        assert train.diagnose(rows[:count], settings()) == {}


# ---------------------------------------------------------------------------------------------------------------------
# Stage 2 as a whole


@pytest.fixture(scope="module")
def stage1_whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "vstar.jsonl"
    run("vstar.py", *TINY, "--batch=1024", f"--out={out}")
    return out


def flags(stage1_out, out, *more):
    return ["train.py", f"--vstar={stage1_out}", f"--out={out}", "--engine=transformers", "--eval_data=tiny/test.jsonl",
            "--lr=3e-4", "--beta2=0.1", "--batch_size=25", "--eval_limit=40", "--eval_every=2", "--save_every=2", "--steps=6",
            "--show_every=3", "--tokens_per_microbatch=300", *more]


def metrics(out):
    """metrics.jsonl without what is a time or the machine's."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second", "memory_gb")} for row in rows]


def weights(out):
    return (out / "model/model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def trained(stage1_whole, tmp_path_factory):
    out = tmp_path_factory.mktemp("train") / "run"
    return out, run(*flags(stage1_whole, out))


def test_stage2_files(trained, stage1_whole):
    out, done = trained
    rows = metrics(out)
    assert [row["step"] for row in rows] == list(range(7))
    assert [row["step"] for row in rows if "accuracy" in row] == [0, 2, 4, 6]
    assert set(rows[1]) >= {"loss", "reward", "vstar", "advantage", "kl", "entropy", "length", "finished", "grad_norm", "mismatch"}
    assert rows[1]["kl"] == 0 and rows[1]["log_ratio_abs"] == 0  # the same code on the same tokens: exactly
    assert all(0 < row["mismatch"] < 1e-5 for row in rows[1:])  # and the sampler's own log-probs agree
    assert rows[1]["loss"] == pytest.approx(rows[1]["advantage"] ** 2, abs=0.3) and rows[2]["log_ratio_abs"] > 0
    assert sorted(p.name for p in (out / "checkpoint").iterdir()) == ["00000004", "00000006"]
    assert (out / "curves.png").stat().st_size > 10_000
    for words in ("before  held-out accuracy", "after   held-out accuracy", "── step 3: "):
        assert words in done.stdout


def test_final_model_is_the_trained_policy(trained):
    """transformers loads it as it is, and it scores exactly what the last row says."""
    out, rows = trained[0], metrics(trained[0])
    model = transformers.AutoModelForCausalLM.from_pretrained(out / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "model")
    assert model.dtype == torch.float32 and model.generation_config.eos_token_id == 0
    problems = rewards.load_problems(str(HERE / "tiny/test.jsonl"))[:40]
    prompts = [rewards.encode(tokenizer, p["question"], False) for p in problems]
    answers = sampler(model.eval(), 64).generate(prompts, 1, [prompt_seed("0/held out", p["id"]) for p in problems])
    right = [rewards.reward(tokenizer.decode(a.tokens, skip_special_tokens=True), p["answer"], a.finished)
             for p, (a,) in zip(problems, answers)]
    assert np.mean(right) == pytest.approx(rows[-1]["accuracy"])
    assert rows[0]["accuracy"] != rows[-1]["accuracy"]


def test_stage2_killed_and_restarted(trained, stage1_whole, tmp_path):
    """kill -9 at random moments and while a checkpoint is being written: the same bits in the end."""
    out, rng = tmp_path / "run", random.Random(1)
    for attempt in range(5):
        process = subprocess.Popen([sys.executable, *flags(stage1_whole, out)], cwd=HERE, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        saved = set(out.glob("checkpoint/0*[0-9]"))
        while process.poll() is None:
            if attempt % 2 and list(out.glob("checkpoint/*.tmp")):  # it is saving
                break
            if not attempt % 2 and set(out.glob("checkpoint/0*[0-9]")) - saved:  # it has saved, and goes on for a moment
                time.sleep(rng.random() * 0.3)
                break
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')  # and a torn line
    run(*flags(stage1_whole, out))
    assert metrics(out) == metrics(trained[0])
    assert weights(out) == weights(trained[0])
    assert not list(out.glob("**/*.tmp"))


def test_sigterm_saves_and_says_how_to_go_on(trained, stage1_whole, tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen([sys.executable, *flags(stage1_whole, out, "--save_every=100")], cwd=HERE, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    while process.poll() is None and (not (out / "metrics.jsonl").exists() or len((out / "metrics.jsonl").read_text()) < 1500):
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "the same command goes on from here" in said, said
    assert 1 <= len(list((out / "checkpoint").iterdir())) <= 2
    run(*flags(stage1_whole, out, "--save_every=100"))
    assert metrics(out) == metrics(trained[0]) and weights(out) == weights(trained[0])


def close(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other):
        assert a.keys() == b.keys()
        assert a == pytest.approx(b, rel=2e-3, abs=1e-4)


def test_two_ranks_train_like_one(trained, stage1_whole, tmp_path):
    """The same answers, and the same metrics but for rounding; a checkpoint of two ranks goes on on one, and back."""
    two = tmp_path / "two"
    torchrun(2, *flags(stage1_whole, two))
    close(metrics(two), metrics(trained[0]))
    mixed = tmp_path / "mixed"
    torchrun(2, *flags(stage1_whole, mixed, "--steps=2"))
    run(*flags(stage1_whole, mixed, "--steps=4"))
    torchrun(2, *flags(stage1_whole, mixed))
    close(metrics(mixed), metrics(trained[0]))


def nodes(count, each, *command):
    """Several machines, as far as the processes can tell: an agent for each, with its own share of the cores, which meet at an
    address."""
    cores = sorted(os.sched_getaffinity(0))
    pin = lambda node: os.sched_setaffinity(0, cores[node::count] or cores)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    agent = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={count}", f"--nproc_per_node={each}", "--rdzv_backend=c10d",
             f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=test", "--local_addr=127.0.0.1"]
    return [subprocess.Popen([*agent, *map(str, command)], cwd=HERE, start_new_session=True, stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL, preexec_fn=lambda node=node: pin(node)) for node in range(count)]


def test_two_nodes_train_like_one(trained, stage1_whole, undisturbed, tmp_path):
    """Both stages on two nodes; one dies in the middle of Stage 2, and the same commands go on to the same result."""
    for node in nodes(2, 1, *stage1(tmp_path / "vstar.jsonl", command=lambda *c: c)):
        assert node.wait(timeout=300) == 0
    assert (tmp_path / "vstar.jsonl").read_bytes() == undisturbed[0].read_bytes()
    both = nodes(2, 1, *flags(stage1_whole, tmp_path / "run"))
    while not (tmp_path / "run/checkpoint/00000002").exists() and all(node.poll() is None for node in both):
        time.sleep(0.01)
    os.killpg(both[1].pid, signal.SIGKILL)  # a node is gone; the other's agent gives up after five minutes, or a scheduler ends it
    time.sleep(1)
    subprocess.run(["pkill", "-9", "-f", f"{tmp_path}/run"], check=True)
    assert both[0].wait(timeout=60) != 0 and not (tmp_path / "run/model").exists()
    for node in nodes(2, 1, *flags(stage1_whole, tmp_path / "run")):
        assert node.wait(timeout=300) == 0
    close(metrics(tmp_path / "run"), metrics(trained[0]))


def test_checkpoints_between_one_two_and_four_ranks(trained, stage1_whole, tmp_path):
    for count, steps in ((4, 2), (1, 4), (2, 6)):
        torchrun(count, *flags(stage1_whole, tmp_path, f"--steps={steps}"))
    close(metrics(tmp_path), metrics(trained[0]))


def test_random_kills_over_both_stages(undisturbed, tmp_path):
    """kill -9 at random moments (five; LONG=1: fifty); the same command, until it ends by itself, leaves the same bits."""
    rng, kills = random.Random(2), 50 if LONG else 5
    out = lambda name: tmp_path / name / "vstar.jsonl"
    both = lambda name: " && ".join(shlex.join([sys.executable, *map(str, command)]) for command in (
        stage1(out(name), command=lambda *c: c), flags(out(name), tmp_path / name / "run", "--steps=60", "--batch_size=64",
                                                       "--eval_every=20", "--tokens_per_microbatch=8000")))
    run("-c", f"import os; os.system({both('whole')!r})")
    for _ in range(kills):
        process = subprocess.Popen(both("killed"), shell=True, cwd=HERE, start_new_session=True, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(4, 12))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    run("-c", f"import os; os.system({both('killed')!r})")
    assert out("killed").read_bytes() == out("whole").read_bytes() == undisturbed[0].read_bytes()
    one, other = (tmp_path / name / "run" for name in ("killed", "whole"))
    assert metrics(one) == metrics(other) and weights(one) == weights(other)


def test_a_long_run_stays_as_small_as_it_began(stage1_whole, tmp_path):
    """Memory and open files from outside, over 80 steps (LONG=1: a thousand)."""
    process = subprocess.Popen([sys.executable, *flags(stage1_whole, tmp_path, f"--steps={1000 if LONG else 80}", "--batch_size=64",
                                                       "--tokens_per_microbatch=8000", "--eval_every=1000", "--save_every=20")],
                               cwd=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    resident, files, path = [], [], tmp_path / "metrics.jsonl"
    while process.poll() is None:
        if path.exists() and path.read_text().count("\n") > 10:  # it has begun
            try:
                resident.append(int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]))
                files.append(len(os.listdir(f"/proc/{process.pid}/fd")))
            except OSError:
                break  # it has just ended
        time.sleep(0.1)
    assert process.wait() == 0 and len(resident) > 20
    fifth = len(resident) // 5
    assert np.median(resident[-fifth:]) < 1.1 * np.median(resident[fifth : 2 * fifth])
    assert np.median(files[-fifth:]) <= np.median(files[2 * fifth : 3 * fifth])  # the first save opens some for good
    seconds = [sum(row["seconds"][key] for key in ("sampling", "reference", "update")) / row["length"] for row in map(
        json.loads, path.read_text().splitlines()) if row["step"]]
    print("seconds a token, last fifth over second:", np.median(seconds[-(len(seconds) // 5) :]) / np.median(
        seconds[len(seconds) // 5 : 2 * len(seconds) // 5]))  # pytest -s


def test_broken_files_each_end_in_one_line(trained, stage1_whole, tmp_path):
    """A corrupted line in the middle, a torn checkpoint, a truncated model, a read-only folder: one clear line, nothing lost."""
    def refused(words, *command):
        done = run(*command, check=False)
        errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
        assert done.returncode == 2 and "Traceback" not in done.stderr and len(errors) == 1, done.stderr
        assert all(word in errors[0] for word in words), errors

    lines = stage1_whole.read_text().splitlines()
    broken = tmp_path / "vstar.jsonl"
    broken.write_text("\n".join([*lines[:500], lines[500][:40], *lines[501:]]) + "\n")
    (tmp_path / "vstar.config.json").write_text(stage1_whole.with_suffix(".config.json").read_text())
    refused(["vstar.jsonl", "line 501"], *flags(broken, tmp_path / "r"))
    run_of = lambda name: subprocess.run(["cp", "-r", trained[0], tmp_path / name], check=True) and tmp_path / name
    out = run_of("torn")
    for shard in (out / "checkpoint/00000006").glob("*.distcp"):
        shard.write_bytes(shard.read_bytes()[:1000])
    refused(["00000006", "cannot be read"], *flags(stage1_whole, out, "--steps=8"))
    assert (out / "checkpoint/00000004").is_dir()
    out = run_of("metrics")
    rows = (out / "metrics.jsonl").read_text().splitlines()
    (out / "metrics.jsonl").write_text("\n".join([*rows[:3], "\x00" * 9, *rows[4:]]) + "\n")
    assert "line 4: not readable" in run(*flags(stage1_whole, out)).stdout
    assert [row["step"] for row in metrics(out)] == [0, 1, 2, 4, 5, 6]  # one is lost, and no other
    model = tmp_path / "model"
    subprocess.run(["cp", "-r", HERE / "tiny/model", model], check=True)
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:5000])
    refused([str(model)], "vstar.py", f"--model={model}", *TINY[1:], f"--out={tmp_path / 'm.jsonl'}")
    refused(["/proc/out"], *flags(stage1_whole, "/proc/out"))  # nobody may write there
    parts = tmp_path / "p.parts"
    process = subprocess.Popen([sys.executable, *stage1(tmp_path / "p.jsonl", command=lambda *c: map(str, c))], cwd=HERE,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(parts.glob("*.jsonl"))) < 2:
        time.sleep(0.002)
    process.kill()
    process.wait()
    (parts / "000000.jsonl").write_text("{}")
    refused(["000000.jsonl", "remove it"], *stage1(tmp_path / "p.jsonl", command=lambda *c: c))
    (parts / "000000.jsonl").unlink()
    stage1(tmp_path / "p.jsonl")


@pytest.mark.parametrize("more", [("--algo=rebel",), ("--algo=grpo", "--group=4", "--minibatches=2"),
                                  ("--algo=ppo", "--critic_lr=1e-3")])
def test_baselines_restart_and_shard(more, stage1_whole, tmp_path):
    """Killed and restarted to the bit, two ranks like one, and a checkpoint of one goes on on two: the critic too."""
    more = [*more, "--steps=4", "--batch_size=11"]  # 11 prompts: the two ranks' shares differ
    run(*flags(stage1_whole, tmp_path / "one", *more))
    process = subprocess.Popen([sys.executable, *flags(stage1_whole, tmp_path / "two", *more)], cwd=HERE,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (tmp_path / "two/checkpoint/00000002").exists():
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "two/checkpoint/00000004").exists()
    subprocess.run(["cp", "-r", tmp_path / "two", tmp_path / "three"], check=True)
    run(*flags(stage1_whole, tmp_path / "two", *more))
    assert metrics(tmp_path / "one") == metrics(tmp_path / "two") and weights(tmp_path / "one") == weights(tmp_path / "two")
    torchrun(2, *flags(stage1_whole, tmp_path / "three", *more))
    close(metrics(tmp_path / "one"), metrics(tmp_path / "three"))
    torchrun(2, *flags(stage1_whole, tmp_path / "four", *more))
    close(metrics(tmp_path / "one"), metrics(tmp_path / "four"))


def test_extending_a_run_is_one_long_run(trained, stage1_whole, tmp_path):
    run(*flags(stage1_whole, tmp_path, "--steps=4"))
    run(*flags(stage1_whole, tmp_path, "--eval_every=2"))
    assert weights(tmp_path) == weights(trained[0])


@pytest.mark.parametrize("more,words", [
    (["--lr=1e-3", "--beta2=0.5"], ["--lr (was 0.0003, now 0.001)", "--beta2 (was 0.1, now 0.5)", "--overwrite"]),
    (["--beta1=2"], ["--beta1 (was 0.5, now 2.0)"]), (["--temperature=0.5"], ["--temperature 0.5 (Stage 1: 1.0)"]),
    (["--n=9"], ["--n 9", "8"]), (["--vstar=nowhere.jsonl"], ["nowhere.jsonl", "vstar.py"]), (["--batch_size=0"], ["--batch_size"]),
    (["--minibatches=99"], ["--minibatches"]), (["--eval_data=nowhere.jsonl"], ["nowhere.jsonl"]), (["--wandb=x"], ["wandb"]),
    (["--group=4"], ["--group 4", "GRPO"]), (["--algo=grpo", "--group=1"], ["--group 1"]), (["--beta2=0"], ["--beta2 0"]),
    (["--algo=ppo"], ["--algo (was apo, now ppo)"]),
])
def test_stage2_refuses(more, words, trained, stage1_whole, monkeypatch, capsys):
    monkeypatch.chdir(HERE)
    monkeypatch.setattr(sys, "argv", flags(stage1_whole, trained[0], *more))
    ends_in_one_line(capsys, train.main, *words)


def test_full_disk_keeps_the_last_checkpoint(trained, stage1_whole, tmp_path):
    """No file may grow beyond 300 KB: metrics fit, a checkpoint does not."""
    run(*flags(stage1_whole, tmp_path, "--steps=2"))
    limited = ["bash", "-c", 'ulimit -f 300; exec "$0" "$@"', sys.executable, *flags(stage1_whole, tmp_path)]
    done = subprocess.run(limited, cwd=HERE, text=True, capture_output=True)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert done.returncode == 2 and len(errors) == 1 and "Traceback" not in done.stderr, done.stderr
    assert "cannot write the checkpoint of step 4" in errors[0] and "disk" in errors[0]
    assert [p.name for p in (tmp_path / "checkpoint").iterdir()] == ["00000002"]
    run(*flags(stage1_whole, tmp_path))
    assert metrics(tmp_path) == metrics(trained[0]) and weights(tmp_path) == weights(trained[0])


def test_numbers_that_are_not_finite_stop_the_run(stage1_whole, tmp_path):
    rows = [json.loads(line) for line in stage1_whole.read_text().splitlines()][:24]
    rows[5]["rewards"] = [math.nan] * 8
    (tmp_path / "v.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (tmp_path / "v.config.json").write_text(stage1_whole.with_suffix(".config.json").read_text())
    done = run(*flags(tmp_path / "v.jsonl", tmp_path / "run"), check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"error: the loss of {rows[5]['id']} is not finite" in done.stderr


def test_stale_weights_and_a_wrong_reference_are_noticed(capsys):
    args = SimpleNamespace(dtype="float32")
    good = dict(log_ratio_abs=0.0, mismatch=0.01, tokens=1000)
    seen = []
    for step in range(5):
        train.check_numbers(good, step, seen, args)
    ends_in_one_line(capsys, lambda: train.check_numbers({**good, "mismatch": 50.0}, 5, seen, args), "old weights")
    ends_in_one_line(capsys, lambda: train.check_numbers({**good, "log_ratio_abs": 50.0}, 0, [], args), "agree")


def test_beta1_and_n_are_recomputed_from_the_rewards(stage1_whole, tmp_path, monkeypatch):
    monkeypatch.chdir(HERE)
    monkeypatch.setattr(sys, "argv", flags(stage1_whole, tmp_path, "--beta1=2", "--n=4", "--filter_unsolved"))
    rows, held_out, *_ = train.prepare(train.parse_args())
    assert len(held_out) == 40 and 600 < len(rows) < 1024
    for row in rows:
        assert any(row["rewards"][:4])
        assert row["vstar"] == pytest.approx(2 * math.log(np.mean(np.exp(np.array(row["rewards"][:4]) / 2))))


@pytest.mark.parametrize("algo,steps", [("apo", 25), ("rebel", 15), ("grpo", 15), ("ppo", 25)])
def test_it_learns(algo, steps, stage1_whole, tmp_path):
    run(*flags(stage1_whole, tmp_path, "--batch_size=128", f"--steps={steps}", "--eval_limit=256", "--eval_every=25", "--warmup=5",
               "--save_every=99", "--batch=1024", "--tokens_per_microbatch=16384", f"--algo={algo}", "--critic_lr=1e-3"))
    rows = metrics(tmp_path)
    assert rows[0]["accuracy"] < 0.5 and rows[-1]["accuracy"] > 0.8
    assert rows[-1]["length"] > 1.5 * rows[1]["length"]  # it has found out that writing the steps pays
    assert train.diagnose(rows, settings()) == {}


def test_wandb_gets_every_row(stage1_whole, tmp_path):
    (tmp_path / "wandb.py").write_text(
        "def init(project, config):\n    print('project', project, config['beta2'])\n    import wandb\n    return wandb\n"
        "def log(row, step):\n    print('logged', step, row['step'])\n")
    done = run(*flags(stage1_whole, tmp_path / "run", "--wandb=mine", "--steps=2"), PYTHONPATH=str(tmp_path))
    assert [line for line in done.stdout.splitlines() if line.startswith(("project", "logged"))] == [
        "project mine 0.1", "logged 0 0", "logged 1 1", "logged 2 2"]


def test_minibatches_and_bf16(stage1_whole, tmp_path):
    """fp32 masters with bf16 compute, FSDP's code on a mesh of one, two optimizer steps per batch."""
    run(*flags(stage1_whole, tmp_path, "--dtype=bfloat16", "--minibatches=2", "--steps=3", "--checkpoint_activations=yes"))
    rows = metrics(tmp_path)
    assert rows[1]["log_ratio_abs"] == 0 and rows[2]["log_ratio_abs"] > 0 and 1e-6 < rows[1]["mismatch"] < 0.01
    state = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    reference = tiny_model().state_dict()
    moved = {name: (state[name] - reference[name]).abs().max().item() for name in state}
    assert all(0 < change < 1e-2 for change in moved.values()), moved  # smaller than a bf16 step, and not lost


def test_other_architectures_end_to_end(tmp_path):
    for kind, command in (("Llama", run), ("GPT2", lambda *c: torchrun(2, *c))):
        model, out = tmp_path / kind, tmp_path / f"{kind}-out"
        small_model(vocabulary=19, kind=kind).save_pretrained(model)
        tiny_tokenizer().save_pretrained(model)
        small = ["--limit=16", "--samples=2", "--max_new_tokens=20", f"--out={out}/vstar.jsonl"]
        command("vstar.py", f"--model={model}", *TINY[1:], *small)
        path = out / "vstar.jsonl"  # a random model is never right; say it was, so that there is something to learn
        path.write_text(path.read_text().replace('"rewards": [0.0, 0.0]', '"rewards": [1.0, 0.0]'))
        command(*flags(path, out / "run", "--steps=2", "--batch_size=8", "--eval_limit=8"))
        rows = metrics(out / "run")
        assert rows[1]["log_ratio_abs"] == 0 and rows[2]["log_ratio_abs"] > 0 and rows[1]["mismatch"] < 1e-4
        transformers.AutoModelForCausalLM.from_pretrained(out / "run/model")


# ---------------------------------------------------------------------------------------------------------------------
# evaluation


def test_majority_by_hand():
    box = lambda *answers: [f"so \\boxed{{{a}}}" if a is not None else "no idea" for a in answers]
    grade = lambda responses, gold: [rewards.reward(r, gold, True) for r in responses]
    for answers, gold, expected in ((("1", "2", "2"), "2", 1.0), (("1", "2", "2"), "1", 0.0), (("1", "2"), "1", 1.0),
                                    (("0.5", "3", r"\frac12", "3", "1/2"), "0.5", 1.0),  # the checker's groups, not the strings'
                                    ((None, None, "7"), "7", 1.0), ((None,), "7", 0.0)):
        responses = box(*answers)
        assert evaluate.majority(responses, [True] * len(answers), grade(responses, gold)) == expected
    assert evaluate.majority(box("1", "1", "2"), [False, False, True], [0.0, 0.0, 1.0]) == 1.0  # cut-off answers do not vote


def test_bootstrap_interval_covers():
    """In 95 of 100 simulated experiments the interval holds the truth; paired differences too."""
    rng, covered, held = np.random.default_rng(0), 0, 0
    for trial in range(300):
        chance = rng.beta(2, 2, 150)
        one, other = (rng.binomial(4, chance) / 4 for _ in range(2))
        low, high = evaluate.bootstrap(one, draws=400, seed=trial)
        covered += low <= 0.5 <= high
        _, low, high = evaluate.paired(one, other)
        held += low <= 0 <= high
    assert 0.91 < covered / 300 < 0.98 and 0.91 < held / 300 < 0.98


def test_measure_by_hand():
    rows = [dict(rewards=[1.0, 0.0], responses=["\\boxed{1}", "\\boxed{2}"], finished=[True, True], lengths=[3, 5]),
            dict(rewards=[0.0, 0.0], responses=["\\boxed{4}", "…"], finished=[True, False], lengths=[3, 9])]
    found = evaluate.measure(rows)
    assert (found["accuracy"], found["pass"], found["majority"]) == (0.25, {1: 0.25, 2: 0.5}, 0.5)
    assert (found["finished"], found["length"], found["problems"]) == (0.75, 5.0, 2)


class TwoTokens(torch.nn.Module):
    """A 'language model' that always gives EOS (token 0) with chance p, token 1 otherwise."""

    def __init__(self, p):
        super().__init__()
        self.config, self._no_split_modules = SimpleNamespace(), []
        self.table = torch.nn.Linear(1, 2, bias=False)
        self.table.weight.data = torch.tensor([[math.log(p)], [math.log(1 - p)]])

    def base_model(self, input_ids, use_cache):
        return SimpleNamespace(last_hidden_state=torch.ones(*input_ids.shape, 1))

    def get_output_embeddings(self):
        return self.table


def test_kl_is_the_closed_form(monkeypatch):
    """Answers of length 1 + Geometric(p): KL(p ‖ q) per answer = KL of one token / p; and 0 to itself."""
    p, q, rng = 0.4, 0.7, random.Random(0)
    tokens = []
    for _ in range(20_000):
        answer = []
        while not answer or answer[-1] != 0:
            answer.append(0 if rng.random() < p else 1)
        tokens.append(answer)
    rows = [dict(id=str(i), tokens=tokens[i * 20 : i * 20 + 20], finished=[True] * 20) for i in range(1000)]
    monkeypatch.setattr(evaluate, "load_model", lambda args, device, dtype: TwoTokens(args.model))
    args = SimpleNamespace(model=p, reference=q, dtype="float32", temperature=1.0, tokens_per_microbatch=4096)
    prompts = {str(i): [1, 1] for i in range(1000)}
    one_token = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    found = evaluate.divergence(rows, p, args, prompts, "cpu")
    assert found["kl_low"] < one_token / p < found["kl_high"]
    assert found["kl"] == pytest.approx(one_token / p, rel=0.03)
    assert found["kl_per_token"] == pytest.approx(one_token, rel=0.03)
    args.reference = p
    assert evaluate.divergence(rows, p, args, prompts, "cpu")["kl"] == 0


def evaluation(out, *more, command=run, models=("tiny/model",), **keywords):
    return command("evaluate.py", "--model", *models, "--data=tiny/test.jsonl", "--suffix=", "--max_new_tokens=64", "--samples=4",
                   "--limit=96", "--chunk=16", "--engine=transformers", f"--out={out}", *more, **keywords)


def test_evaluation_end_to_end(trained, tmp_path):
    both = ["tiny/model", str(trained[0] / "model")]
    done = evaluation(tmp_path / "a", "--reference=tiny/model", "--show=2", models=both)
    results = json.loads((tmp_path / "a/results.json").read_text())
    before, after = (results[model]["tiny/test.jsonl"] for model in both)
    assert before["kl"] == 0 and after["kl"] > 0.01 and 0.25 < before["low"] < before["accuracy"] < before["high"] < 0.55
    assert after["difference"][0] == pytest.approx(after["accuracy"] - before["accuracy"])
    for words in ("pass@4", "maj@4", "KL/token", "against tiny/model", "wrong answers of tiny/model", "the gold"):
        assert words in done.stdout
    assert (tmp_path / "a/accuracy.png").stat().st_size > 3000
    # two processes, and one that is killed and started again, write the same
    evaluation(tmp_path / "b", "--reference=tiny/model", command=lambda *c: torchrun(2, *c), models=both)
    process = subprocess.Popen([sys.executable, *evaluation(tmp_path / "c", "--reference=tiny/model", models=both,
                                                            command=lambda *c: map(str, c))],
                               cwd=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list((tmp_path / "c").glob("*.parts/*.jsonl"))) < 2:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    evaluation(tmp_path / "c", "--reference=tiny/model", models=both)
    for name in [path.name for path in (tmp_path / "a").glob("*.json*")]:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()


def test_greedy_evaluation(tmp_path):
    evaluation(tmp_path, "--temperature=0", "--samples=1")
    (found,) = json.loads((tmp_path / "results.json").read_text())["tiny/model"].values()
    assert found["n"] == 1 and found["finished"] == 1.0


@pytest.mark.parametrize("more,words", [
    (["--samples=0"], ["--n 0"]), (["--data=nonsense"], ["unknown data set 'nonsense'"]), (["--temperature=0"], ["--n 1"]),
    (["--limit=0"], ["--limit"]), (["--model=./nowhere"], ["./nowhere", "no such folder"]),
])
def test_evaluation_refuses(more, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(HERE)
    monkeypatch.setattr(sys, "argv", evaluation(tmp_path / "o", *more, command=lambda *c: list(map(str, c))))
    ends_in_one_line(capsys, evaluate.main, *words)
    assert not (tmp_path / "o").exists()


def test_model_without_weights_and_torn_answers(tmp_path, monkeypatch, capsys):
    for path in (HERE / "tiny/model").iterdir():
        if path.suffix == ".json":
            (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(HERE)
    argv = evaluation(tmp_path / "o", models=(tmp_path,), command=lambda *c: list(map(str, c)))
    monkeypatch.setattr(sys, "argv", argv)
    ends_in_one_line(capsys, evaluate.main, str(tmp_path), "model.safetensors")
    monkeypatch.setattr(sys, "argv", evaluation(tmp_path / "p", command=lambda *c: list(map(str, c))))
    evaluate.main()
    (path,) = (tmp_path / "p").glob("*test.jsonl.jsonl")
    path.write_text(path.read_text()[:-40])
    capsys.readouterr()
    ends_in_one_line(capsys, evaluate.main, path.name, "line 96", "--overwrite")


# ---------------------------------------------------------------------------------------------------------------------
# the plan


@pytest.mark.parametrize("kind,recompute,budget", [("Qwen2", "yes", 4096), ("Qwen2", "no", 4096), ("Llama", "yes", 1024),
                                                   ("GPT2", "yes", 2048)])
def test_plan_is_what_an_update_allocates(kind, recompute, budget):
    """Weights, gradients, optimizer, reference, activations: two real updates, every allocation counted."""
    args = settings(tokens_per_microbatch=budget, checkpoint_activations=recompute, engine="transformers", batch=1,
                    offload_reference=False)
    make = lambda: small_model(4000, kind, hidden=128, layers=4)
    rng = random.Random(0)
    samples = [train.Sample(dict(id=str(i), tokens=[rng.randrange(4000) for _ in range(20)], vstar=0.5, rewards=[1.0]),
                            Completion([rng.randrange(4000) for _ in range(108)], True, [-1.0] * 108), "", 1.0) for i in range(64)]
    config = make().config
    with plan.Live() as live:
        policy, reference = train.Policy(make(), recompute == "yes"), train.Policy(make()).requires_grad_(False)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
        for _ in range(2):
            known = train.targets(policy, reference, None, samples, args, torch.device("cpu"))
            train.update(policy, optimizer, samples, known, 64, args, torch.device("cpu"))
    shape = plan.Shape(config, sum(p.numel() for p in policy.parameters()), 0, 0, 0)
    parts = plan.memory(shape, args, 1, None, torch.float32, 128)
    assert plan.peak(parts) * 2**30 == pytest.approx(live.most, rel=0.15)
    assert parts["AdamW (fp32)"] * 2**30 == 8 * shape.total and parts["gathered by FSDP"] == 0
    assert parts["kept activations"] + parts["head's chunk, or a block at work"] > 0.2 * plan.peak(parts)  # not only weights


def test_plan_of_shards_by_hand(tmp_path):
    """Four GPUs hold a quarter of everything that is sharded; bf16 gathers two bytes a weight and sums gradients in four."""
    small_model(4000, hidden=128, layers=4).config.save_pretrained(tmp_path)  # the config alone, no weights
    args = settings(tokens_per_microbatch=1024, checkpoint_activations="auto", engine="vllm", batch=1, offload_reference=False,
                    model=str(tmp_path), revision=None, gpu_memory=0.5)
    shape = plan.load_shape(args)
    # embedding and head of 4000 × 128, and the last norm; a block: 4 attention matrices, 3 biases, 3 of the MLP, 2 norms
    assert shape.rest == 2 * 4000 * 128 + 128
    assert shape.block == (2 * 128 * 128 + 2 * 128 * 64) + (128 + 64 + 64) + 3 * 128 * 256 + 2 * 128
    assert shape.total == shape.rest + 4 * shape.block and shape.read == shape.total - 4000 * 128
    parts = {name: size * 2**30 for name, size in plan.memory(shape, args, 4, "H100", torch.bfloat16, 128).items()}
    assert parts["weights (fp32)"] == parts["gradients (fp32)"] == shape.total and parts["AdamW (fp32)"] == 2 * shape.total
    assert parts["reference"] == shape.total / 2 and parts["sampling"] == 40 * 2**30
    assert parts["gathered by FSDP"] == 2 * (2 * shape.block + shape.rest) + 6 * (shape.block + shape.rest)
    assert plan.cache_per_token(shape, torch.bfloat16) == 2 * 4 * 64 * 2  # keys and values, layers, a head of two, bytes


def test_plan_of_seconds_by_hand():
    """16 H100s on two nodes and a model of 10⁹ weights: two layers, 16 heads of 64, keys and values too."""
    config = transformers.Qwen2Config(hidden_size=1024, num_hidden_layers=2, num_attention_heads=16, num_key_value_heads=16,
                                      vocab_size=1000)
    shape = plan.Shape(config, 10**9, 5 * 10**8, 0, 10**9)
    args = settings(batch_size=256, engine="transformers", batch=256, checkpoint_activations="auto",
                    tokens_per_microbatch=2400)
    found = plan.step_floor(shape, args, 16, "H100", torch.bfloat16, 100, 200, 400)
    ring = 1e9 * 15 / 16 / (8 * 50e9)  # eight cards leave a node, NVLink within it is quicker
    cache = 2 * 2 * 1024 * 2  # bytes a token: keys and values, layers, width, bf16
    # each GPU: 16 answers; 400 times all weights, and the keys and values of 100 to 300 tokens, 200 on average, 200 times
    assert found["sampling"] == pytest.approx((400 * 2e9 + 16 * 200 * cache * 200) / 3.35e12 + 2 * ring)
    forward = 16 * (2e9 * 300 + 2 * 1000 * 1024 * 200 + 2 * 2 * 1024 * 300**2) / 989e12
    assert found["reference"] == pytest.approx(forward) and found["update"] == pytest.approx(4 * forward)
    # two micro-batches: the policy's weights twice in bf16 and their gradients in fp32, π_ref's weights once
    assert found["communication"] == pytest.approx(2 * (2 + 2 + 4 + 2) * ring)
    args.algo = "ppo"  # a critic learns too; its values and the old log-probabilities are two passes more
    both = plan.step_floor(shape, args, 16, "H100", torch.bfloat16, 100, 200, 400)
    assert both["update"] == pytest.approx(8 * forward) and both["reference"] == pytest.approx(3 * forward)


def test_plan_says_what_would_fit(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(dict(
        model_type="qwen2", hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
        intermediate_size=18944, vocab_size=152064, tie_word_embeddings=False)))
    planned = lambda *more: run("train.py", f"--model={tmp_path}", *more).stdout
    said = planned("--plan=8xH100")
    assert "7,615,616,512 parameters" in said and "it fits" in said
    assert "it would with 4 GPUs\n" in planned("--plan=1xH100")
    assert "it would with --gpu_memory 0.2\n" in planned("--plan=8xH100", "--gpu_memory=0.1")
    largest = int(said.split("about --tokens_per_microbatch ")[1].split()[0].replace(",", ""))
    for tokens, words in ((0.97 * largest, "it fits"), (1.03 * largest, "it does not fit; it would with --tokens_per_microbatch")):
        assert words in planned("--plan=8xH100", f"--tokens_per_microbatch={int(tokens)}")
    stage1 = run("vstar.py", f"--model={tmp_path}", "--data=math", "--plan=8xH100").stdout
    assert "14.19 GiB" in stage1 and "it fits" in stage1  # 7.6 billion weights of two bytes
    # a GPU's 1,000 answers of 512 tokens: 1,024 times 7.07 billion weights (no embeddings), and keys and values of 57,344 bytes a
    # token, 456 tokens on average, are 27.9 TB, read in 8.3 s; the products of 2 × 7.07 billion × 512,000 take 7.3 s
    assert "at least 0.1 minutes, 0.02 GPU hours" in stage1
    assert "--plan 8xT800" in run("train.py", f"--model={tmp_path}", "--plan=8xT800", check=False).stderr


# ---------------------------------------------------------------------------------------------------------------------
# the embedded world


def test_tiny_world():
    train, test = (rewards.load_problems(str(HERE / f"tiny/{split}.jsonl")) for split in ("train", "test"))
    assert len(train) >= 1024 and len(test) == 512
    assert not {p["question"] for p in train} & {p["question"] for p in test}
    for problem in train + test:
        a, b = problem["question"].rstrip("=").split("+")
        assert int(a) + int(b) == int(problem["answer"])
    assert sum(f.stat().st_size for f in (HERE / "tiny").rglob("*") if "__pycache__" not in f.parts) < 2_000_000


def test_make_makes_the_same_files_twice(tmp_path):
    for name in ("a", "b"):
        run("tiny/make.py", "--steps=3", "--train=20", "--test=10", "--digits", 2, 5, "--hidden=64", f"--out={tmp_path / name}")
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert {"train.jsonl", "test.jsonl", "vstar.args"} <= {str(f) for f in files}
    for file in files:
        left, right = ((tmp_path / name / file).read_bytes() for name in ("a", "b"))
        assert left == right.replace(bytes(tmp_path / "b"), bytes(tmp_path / "a")), file


def test_worked_demonstrations():
    sys.path.insert(0, str(HERE / "tiny"))
    import make

    assert make.worked(random.Random(0), 482, "+", 795, 0) == "2+5=7;8+9=17;4+7+1=12;\\boxed{1277}"
    assert make.worked(random.Random(0), 55, "+", 45, 0) == "5+5=10;5+4+1=10;\\boxed{100}"
    assert make.worked(random.Random(0), 482, "-", 295, 0) == "12-5=7;17-9=8;3-2=1;\\boxed{187}"
    assert make.worked(random.Random(0), 500, "-", 499, 0) == "10-9=1;9-9=0;4-4=0;\\boxed{1}"
    rng = random.Random(0)
    right = [make.worked(rng, 482, "+", 795, 0.04).endswith("{1277}") for _ in range(3000)]
    assert np.mean(right) == pytest.approx(0.96**3, abs=0.02)


# ---------------------------------------------------------------------------------------------------------------------
# the real vLLM, where it can run


@pytest.fixture(scope="module")
def vllm_engine():
    pytest.importorskip("vllm", reason="vLLM is not installed")
    engine, why = vstar.pick_engine("auto")
    if engine != "vllm":
        pytest.skip(why)
    make = lambda temperature: vstar.VLLMSampler(str(HERE / "tiny/model"), None, "float32", [0], 64, temperature, 0, 128,
                                                 0.3, logps=True)
    one = make(1.0)
    return SimpleNamespace(sampler=one, prompts=[rewards.encode(tiny_tokenizer(), p["question"], False) for p in
                                                 rewards.load_problems(str(HERE / "tiny/test.jsonl"))[:128]])


def tiny_tokenizer():
    return transformers.AutoTokenizer.from_pretrained(HERE / "tiny/model")


def tiny_model():
    return transformers.AutoModelForCausalLM.from_pretrained(HERE / "tiny/model").eval()


def test_vllm_greedy_answers_are_transformers(vllm_engine):
    theirs = sampler(tiny_model(), 64, temperature=0).generate(vllm_engine.prompts, 1, [0] * 128)
    sampling = vllm_engine.sampler.sampling
    vllm_engine.sampler.sampling = {**sampling, "temperature": 0.0}
    ours = vllm_engine.sampler.generate(vllm_engine.prompts, 1, [0] * 128)
    vllm_engine.sampler.sampling = sampling
    assert [c[0].tokens for c in ours] == [c[0].tokens for c in theirs]
    assert all(c[0].finished and c[0].tokens[-1] == 0 for c in ours)


def test_vllm_logps_are_a_forward_pass(vllm_engine):
    model = tiny_model()
    answers = vllm_engine.sampler.generate(vllm_engine.prompts, 2, list(range(128)))
    assert len({tuple(c.tokens) for copies in answers for c in copies}) > 200
    assert any(copies[0].tokens != copies[1].tokens for copies in answers)
    for prompt, copies in zip(vllm_engine.prompts, answers):
        for copy in copies:
            logits = model(torch.tensor([prompt + copy.tokens])).logits[0, len(prompt) - 1 : -1]
            plain = logits.log_softmax(-1).gather(-1, torch.tensor(copy.tokens)[:, None])[:, 0]
            torch.testing.assert_close(plain, torch.tensor(copy.logps), atol=1e-3, rtol=0)


def test_vllm_same_seed_same_answer(vllm_engine):
    tokens = [[[c.tokens for c in copies] for copies in vllm_engine.sampler.generate(vllm_engine.prompts[:16], 2, seeds)]
              for seeds in (range(16), range(16), range(100, 116))]
    assert tokens[0] == tokens[1] != tokens[2]


def test_vllm_takes_new_weights(vllm_engine):
    model = tiny_model()
    old = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) * parameter.std())
    vllm_engine.sampler.load(model.state_dict().items())
    for copies, prompt in zip(vllm_engine.sampler.generate(vllm_engine.prompts[:32], 1, range(32)), vllm_engine.prompts):
        tokens, logps = copies[0].tokens, torch.tensor(copies[0].logps)
        for weights, agree in ((model, True), (tiny_model(), False)):
            logits = weights(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
            plain = logits.log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0]
            assert ((plain - logps).abs().max() < 1e-4) == agree  # the new weights, and not the old
    vllm_engine.sampler.load(old.items())


def test_vllm_stage1_accuracy(vllm_engine, tmp_path):
    run("vstar.py", *TINY[:-1], "--engine=vllm", f"--out={tmp_path / 'v.jsonl'}")
    run("vstar.py", *TINY, "--batch=1024", f"--out={tmp_path / 't.jsonl'}")
    v, t = (np.array([json.loads(line)["rewards"] for line in (tmp_path / name).read_text().splitlines()]).mean(1)
            for name in ("v.jsonl", "t.jsonl"))
    assert abs((v - t).mean()) < 4 * (v - t).std() / math.sqrt(len(v))  # the same prompts: a paired difference


@pytest.mark.parametrize("ranks", [1, 2])
def test_vllm_trains_like_transformers(vllm_engine, stage1_whole, tmp_path, ranks):
    """Ten steps; after each update the engine samples from the new weights, or `mismatch` would say so."""
    more = ["--steps=10", "--batch_size=128", "--eval_limit=256", "--eval_every=10", "--save_every=99", "--batch=512", "--warmup=3",
            "--tokens_per_microbatch=16384"]
    torchrun(ranks, *flags(stage1_whole, tmp_path / "v", *more, "--engine=vllm"))
    rows = metrics(tmp_path / "v")
    assert all(0 < row["mismatch"] < 1e-4 for row in rows[1:])
    assert rows[-1]["log_ratio_abs"] > 0.1  # so old weights would be off by far more than that
    if ranks == 1:
        # the finished model loads in vLLM as it is
        out = tmp_path / "again.jsonl"
        run("vstar.py", f"--model={tmp_path / 'v/model'}", *TINY[1:-1], "--engine=vllm", "--limit=128", f"--out={out}")
        again = np.mean([row["rewards"] for row in map(json.loads, out.read_text().splitlines())])
        assert abs(again - rows[-1]["accuracy"]) < 0.12
        torchrun(ranks, *flags(stage1_whole, tmp_path / "t", *more))
        assert abs(rows[-1]["accuracy"] - metrics(tmp_path / "t")[-1]["accuracy"]) < 0.12  # 256 problems: 3 standard errors


def test_vllm_with_old_weights_is_noticed(vllm_engine, stage1_whole, tmp_path):
    stale = "import runpy, sys, vstar; vstar.VLLMSampler.load = lambda *_: None; runpy.run_path('train.py', run_name='__main__')"
    more = ["--steps=10", "--batch_size=128", "--eval_every=99", "--engine=vllm"]
    done = run("-c", stale, *flags(stage1_whole, tmp_path, *more)[1:], check=False)
    assert done.returncode == 2 and "does it still hold old weights" in done.stderr, done.stderr[-2000:]


def test_vllm_evaluates_two_models(vllm_engine, trained, tmp_path):
    models = ["tiny/model", str(trained[0] / "model")]
    evaluation(tmp_path / "v", "--engine=vllm", "--limit=128", "--overwrite", models=models)
    evaluation(tmp_path / "t", "--limit=128", models=models)
    v, t = (json.loads((tmp_path / name / "results.json").read_text()) for name in "vt")
    for model in models:
        (ours,), (theirs,) = v[model].values(), t[model].values()
        assert abs(ours["accuracy"] - theirs["accuracy"]) < 0.1  # 128 problems × 4 answers
