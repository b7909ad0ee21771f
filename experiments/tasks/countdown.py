"""Countdown: make a target of some numbers with + - * /, each number at most once. Many answers are right.

The reward for a real model and the hub's problems, by the names of their fields:

    python vstar.py --model Qwen/Qwen2.5-3B --data Jiayi-Pan/Countdown-Tasks-3to4 --limit 10000 \\
        --question_field nums --answer_field target --reward experiments/tasks/countdown.py:reward \\
        --prompt 'Make {target} of {nums} with + - * /, each at most once. Write it in \\boxed{}.'
"""

import operator
import re
from collections import Counter
from fractions import Fraction

from rewards import final_answers

OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
SPELLINGS = {r"\dfrac": r"\frac", r"\frac{": "((", "}{": ")/(", "}": "))", r"\left": "", r"\right": "",
             r"\times": "*", r"\cdot": "*", r"\div": "/", "$": "", " ": "", ")(": ")*("}
SIGNS = str.maketrans("×·÷", "**/")
LONGEST = 150  # characters of a formula; so nothing takes long, and brackets are not too deep for Python


def reward(response: str, row: dict, finished: bool) -> float:
    """1.0 if the last box is made of `nums`, each at most as often as given, and its exact value is `target`.

    An equation, 7*4+9 = 37, counts by its left side, and all its sides must be the target.
    """
    boxes = final_answers(response) if finished else []
    text = boxes[-1].rstrip(".").translate(SIGNS) if boxes else ""
    for spelling, plain in SPELLINGS.items():
        text = text.replace(spelling, plain)
    if len(text) > LONGEST:
        return 0.0
    sides = text.split("=")
    used = Counter(map(int, re.findall("[0-9]+", sides[0])))
    try:
        right = all(value(side) == row["target"] for side in sides)
        return float(right and used <= Counter(row["nums"]))
    except (ValueError, IndexError, ZeroDivisionError):  # no formula, one that breaks off, a division by zero
        return 0.0


def value(text):
    """What a formula comes to, exactly."""
    tokens = re.findall(r"[0-9]+|[-+*/()]", text)
    result = take(tokens)
    if tokens or not re.fullmatch(r"[-+*/()0-9]*", text):
        raise ValueError(text)
    return result


def take(tokens, signs=("+-", "*/")):
    """Takes a sum off the head of the tokens; without its signs a product; without those a number, or what
    stands in brackets. → its value"""
    if signs:
        result = take(tokens, signs[1:])
        while tokens and tokens[0] in signs[0]:
            result = OPERATORS[tokens.pop(0)](result, take(tokens, signs[1:]))
        return result
    token = tokens.pop(0)
    if token in ("+", "-"):
        return OPERATORS[token](0, take(tokens, ()))
    if token != "(":
        return Fraction(token)
    inside = take(tokens)
    if tokens.pop(0) != ")":
        raise ValueError("a bracket is open")
    return inside
