"""Word problems as files of {"question", "answer", "chain"}, from two public sources.

    git clone https://github.com/arkilpatel/SVAMP out/SVAMP
    python -m experiments.words out/SVAMP --out out/words       MAWPS and ASDiv in three parts, and SVAMP
    python -m experiments.words gsm8k.jsonl --out out/gsm8k     GSM8K with its <<48/2=24>> in two parts

A chain is a solution's equations, step by step: 39+38=77;77-64=13. Problems whose answer is not whole, or not
what the equations give, are left out. The parts are drawn at random, and no question stands in two of them:
demonstrations.jsonl is for experiments/cold_start.py, train.jsonl for both stages, test.jsonl is held out.
SVAMP, which is MAWPS made harder, is for evaluation alone. Of GSM8K, problems of at most three steps are the
demonstrations, and the rest is train.jsonl; its test split is the data set's own.

Licences: SVAMP's repository and GSM8K MIT, but ASDiv within the former CC BY-NC 4.0.
"""

import argparse
import csv
import json
import operator
import random
import re
from fractions import Fraction
from pathlib import Path

from rewards import fail, is_correct
from vstar import write_rows

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="a checkout of arkilpatel/SVAMP, or GSM8K's train.jsonl")
    parser.add_argument("--out", type=Path, default=Path("out/words"))
    args = parser.parse_args()
    try:
        parts = svamp(args.source) if args.source.is_dir() else gsm8k(args.source)
        first = next(row for rows in parts.values() for row in rows)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        fail(f"{args.source}: not the files of SVAMP or GSM8K ({error!r})")
    for name, rows in parts.items():
        write_rows(args.out / f"{name}.jsonl", rows)
        print(f"{args.out}/{name}.jsonl: {len(rows)} problems")
    print(f"such as {json.dumps(first)}")


def svamp(folder):
    mawps = {}
    with open(folder / "data/mawps-asdiv-a_svamp/train.csv", encoding="utf-8") as file:
        for number, row in enumerate(csv.DictReader(file)):
            question, equation = row["Question"], row["Equation"]
            for i, text in reversed([*enumerate(row["Numbers"].split())]):  # number12 before number1
                question, equation = (part.replace(f"number{i}", plain(Fraction(text)))
                                      for part in (question, equation))
            question = re.sub(r" ([.,?!;:'])", r"\1", question.strip())
            try:
                chain = worked(equation.split())
            except (ValueError, IndexError, ZeroDivisionError):
                continue  # an equation that is no number, or that none can write down
            answer = plain(Fraction(row["Answer"]))
            if answer.lstrip("-").isdigit() and chain and chain.endswith(f"={answer}"):
                problem = dict(id=f"mawps/{number}", question=question, answer=answer, chain=chain)
                mawps.setdefault(letters(question), problem)
    mawps = random.Random(0).sample([*mawps.values()], len(mawps))
    harder = []
    for row in json.loads((folder / "SVAMP.json").read_text(encoding="utf-8")):
        answer = plain(Fraction(row["Answer"]))
        question = f"{row['Body'].strip().rstrip('.')}. {row['Question'].strip()}"
        harder.append(dict(id=row["ID"], question=question, answer=answer))
    return dict(demonstrations=mawps[:1000], test=mawps[1000:1256], train=mawps[1256:], svamp=harder)


def letters(question):
    """What two questions have in common if they are one: MAWPS repeats itself with other commas."""
    return re.sub(r"\W", "", question.lower())


def plain(number):
    """56.0 → '56', 12.5 → '12.5'; a ValueError where it never ends"""
    if number.denominator == 1:
        return str(number.numerator)
    text = str(float(number))
    if Fraction(text) != number:
        raise ValueError(f"{number} has no end")
    return text


def worked(prefix):
    """['-', '+', '39', '38', '64'] → '39+38=77;77-64=13'"""
    steps = []

    def value(tokens):
        token = tokens.pop(0)
        if token not in OPERATIONS:
            return Fraction(token)
        one, other = value(tokens), value(tokens)
        result = OPERATIONS[token](one, other)
        steps.append(f"{plain(one)}{token}{plain(other)}={plain(result)}")
        return result

    value([*prefix])
    return ";".join(steps)


def gsm8k(path):
    short, rest = [], []
    for number, line in enumerate(path.open(encoding="utf-8")):
        row = json.loads(line)
        solution = row.get("solution") or row["answer"]  # the original has all in its `answer`
        answer = solution.rpartition("####")[2].strip().replace(",", "")
        steps = re.findall("<<(.*?)>>", solution)
        problem = dict(id=f"gsm8k/{number}", question=row["question"], answer=answer, chain=";".join(steps))
        good = all(is_correct(*step.rpartition("=")[::2]) for step in steps)
        ends = steps and is_correct(steps[-1].rpartition("=")[2], answer)
        (short if good and ends and len(steps) <= 3 else rest).append(problem)
    return dict(demonstrations=short, train=rest)


if __name__ == "__main__":
    main()
