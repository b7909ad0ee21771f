"""Multiple choice: problem files of HellaSwag, ARC and CommonsenseQA, for the ordinary grader.

    python -m experiments.tasks.choices hellaswag --split train --out out/hellaswag.jsonl
    python vstar.py --model Qwen/Qwen2.5-1.5B --data out/hellaswag.jsonl \\
        --prompt '{question} Think step by step, then write the letter of the right choice in \\boxed{}.'

Behind the question stand the choices with letters; the answer is the right one's letter. HellaSwag and
CommonsenseQA keep the answers of their test split to themselves: measure on --split validation.
"""

import argparse
from pathlib import Path

import datasets

from vstar import write_rows

SOURCES = {  # name: hub id, config
    "hellaswag": ("Rowan/hellaswag", None),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy"),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge"),
    "commonsense_qa": ("tau/commonsense_qa", None),
}


def problem(row):
    """A row of the hub → {"question", "answer"}"""
    if "endings" in row:  # HellaSwag, whose label is the number of an ending
        question, texts, right = row["ctx"], row["endings"], int(row["label"])
    else:
        question, texts = row["question"], row["choices"]["text"]
        right = row["choices"]["label"].index(row["answerKey"])
    letters = "ABCDEFGHIJ"
    choices = "".join(f"\n{letter}. {text}" for letter, text in zip(letters, texts))
    return dict(question=f"{question}{choices}\n", answer=letters[right])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=SOURCES)
    parser.add_argument("--split", default="train")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rows = datasets.load_dataset(*SOURCES[args.name], split=args.split)
    write_rows(args.out, map(problem, rows))


if __name__ == "__main__":
    main()
