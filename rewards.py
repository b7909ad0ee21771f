"""Is a response right? The grader of all scripts, the problems they ask, and how a final answer is read.

A problem is {"id", "question", "answer"}; its answer is the gold. Stage 1, Stage 2 and evaluation all call `reward`.
With two graders V* would be the value of one reward, and the policy would be trained on another.

What a model wrote is untrusted text. A small parser reads it; nothing is ever evaluated as code.

    python rewards.py 'so \\boxed{\\frac12}' 0.5        how both sides are read, or why not, and the verdict
"""

import cmath
import json
import math
import operator
import random
import re
import runpy
import sys
import unicodedata
from decimal import Decimal, localcontext
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise, repeat
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------------------------
# the grader


def reward(response, answer, finished):
    """1.0 if the response ends in the answer, else 0.0. One that was cut off before EOS earns 0, whatever it says."""
    found = final_answers(response) if finished else []
    if found and is_correct(found[-1], answer):
        return 1.0
    # a gold that is a list may be answered in several boxes, one for each item
    wanted = len(read(answer).items)
    return float(1 < wanted <= len(found) and is_correct(", ".join(found[-wanted:]), answer))


@lru_cache  # a file is run once: a batch should not connect to its server anew, nor be graded by what was edited since
def load_reward(named):
    """'FILE.py:FUNCTION' → that function of (response, row, finished); None → the one above."""
    if named is None:
        return lambda response, row, finished: reward(response, row["answer"], finished)
    path, _, name = named.rpartition(":")
    if not path.endswith(".py") or not Path(path).is_file():
        fail(f"--reward {named}: no such file; it should be FILE.py:FUNCTION")
    try:  # not an import, which may take a .pyc for an edited file
        function = runpy.run_path(path, run_name="own_reward").get(name)
    except (Exception, SystemExit) as error:  # the user's own code
        fail(f"--reward {named}: {type(error).__name__}: {error}")
    if not callable(function):
        fail(f"--reward {named}: no function {name!r} in it")
    return function


def final_answers(text):
    """The contents of each \\boxed{…} behind the last ####; without such a box, the line behind ####.

    The last one is what the response claims. Nothing else counts: a grader that takes any number in the text pays the
    policy for babbling. One pass over the text, however it is nested.
    """
    _, hashes, text = text.rsplit("</think>", 1)[-1].rpartition("####")
    boxes, opened = {}, []  # the start of each box: its content; the opening braces that wait for their }
    for brace in re.finditer(
            r"(\\f?boxed\s*)?(?<!\\)\{|(?<!\\)\}"
            # \boxed 5; it only looks ahead at the content, for a brace in it counts too
            rf"|\\f?boxed +(?=[^\s{{])(?=([^\s$]{{0,{LONGEST}}}))", text):
        if brace[0] == "}":
            if opened and (box := opened.pop())[1]:
                boxes[box.start()] = text[box.end() : brace.start()]
        elif brace[2] is None:
            opened.append(brace)
        else:  # \boxed 5
            boxes[brace.start()] = brace[2]
    boxes = [content.strip() for start, content in sorted(boxes.items())]
    return boxes or ([text.strip().partition("\n")[0].strip()] if hashes else [])


def is_correct(claim, gold):
    r"""Does the claim say what the gold says? A ladder: the first rung that can tell decides, the cheap come first.

        rung                           the same                  not the same       function
        a unit may be missing          5\text{ cm}   5           5 cm    5 m        split_unit
        the text, in one spelling      \dfrac12   \frac{1}{2}    east    seat       respell
        a list, in any order           2, 1       1 or 2         1, 2    1          same_items
        but one with names, in theirs  p=2, q=3   (2,3)          x=1,y=2 2, 1       named, in_order
        what an equation says          x = 2+3=5  5              2x = 5  5          is_label, meant
        structures, part by part       (1,1/2)    (1,0.5)        (1,2)   (2,1)      same
        sets of numbers, by their ends x > 5      (5,\infty)     x > 5   [5,\infty) same_sets, SETS
        numbers, to 40 digits          2\sqrt3    \sqrt{12}      50      0.5        value, near
        a decimal, rightly rounded     0.3333     1/3            0.33    1/3        rounded
        formulas, at five points       (x+1)^2    x^2+2x+1       e^x     e^{2x}     at_points, near
        % and degrees as numbers       50\%       1/2            50      1/2        SCALES
    """
    claim, gold = read(claim), read(gold)
    if claim.unit and gold.unit and claim.unit != gold.unit:
        return False
    if claim.text == gold.text != "":
        return True
    if not claim.items or not gold.items:
        return False
    try:
        with localcontext(prec=64):  # each thread has its own
            if same_items(claim.items, gold.items):
                return True
            if claim.unit == gold.unit:
                return False
            scaled, other = (claim, gold) if claim.unit else (gold, claim)
            return same_items([("*", *read(SCALES[scaled.unit]).items, meant(tree)[-1]) for tree in scaled.items],
                              other.items)
    except REFUSALS:
        return False


# ---------------------------------------------------------------------------------------------------------------------
# problems and prompts

# the authors' two templates, and one for multiple choice
BOXED = "{question} Let's think step by step and output the final answer within \\boxed{}."
GSM8K = '{question} Let\'s think step by step and output the final answer after "####".'
LETTER = "{question} Let's think step by step and output the letter of the right choice within \\boxed{}."

DATASETS = {  # name: hub id, config, its only split (None: the split that was asked for), question, answer, template
    "gsm8k": ("openai/gsm8k", "main", None, "question", "answer", GSM8K),
    "math": ("DigitalLearningGmbH/MATH-lighteval", None, None, "problem", "solution", BOXED),
    "math500": ("HuggingFaceH4/MATH-500", None, "test", "problem", "answer", BOXED),
    "aime24": ("HuggingFaceH4/aime_2024", None, "train", "problem", "answer", BOXED),
    "aime25": ("MathArena/aime_2025", None, "train", "problem", "answer", BOXED),
    "amc23": ("math-ai/amc23", None, "test", "question", "answer", BOXED),
    "minerva": ("math-ai/minervamath", None, "test", "question", "answer", BOXED),
    "olympiad": ("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train", "question", "final_answer", BOXED),
    "hmmt25": ("MathArena/hmmt_feb_2025", None, "train", "problem", "answer", BOXED),
    "hellaswag": ("Rowan/hellaswag", None, None, "ctx", "label", LETTER),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", None, "question", "answerKey", LETTER),
    "commonsense_qa": ("tau/commonsense_qa", None, None, "question", "answerKey", LETTER),
}


def load_problems(source, split="train", question_field="question", answer_field="answer", custom_reward=None):
    """A .jsonl, .json or .parquet file, a name in DATASETS, or any hub id → [{"id", "question", "answer"}].
    A row's other fields stay, for --prompt and --reward, but for those that Stage 1 writes. `own`: --reward, which may
    need no answer."""
    path, split = Path(source), split_of(source, split)
    if path.suffix in (".jsonl", ".json", ".parquet"):
        rows, name = file_rows(path), path.stem
    elif source in DATASETS or source.count("/") == 1 and not path.is_file():
        default = (source, None, None, question_field, answer_field, BOXED)
        hub_id, config, only_split, question_field, answer_field, _ = DATASETS.get(source, default)
        rows, name = hub_rows(hub_id, config, only_split or split), f"{source}/{only_split or split}"
    else:
        fail(f"unknown data set {source!r}: give a .jsonl, .json or .parquet file, a hub id (owner/name), "
             f"or one of {', '.join(DATASETS)}")
    problems = {}
    for number, where, row in rows:
        question = text_of(row, question_field, where)
        lacks = custom_reward and answer_field == "answer" and row.get("answer") in (None, "")
        answer = "" if lacks else text_of(row, answer_field, where)
        key = str(row.get("id", f"{name}/{number}"))
        if key in problems:
            fail(f"{where}: the id {key!r} was used before")
        if template_of(source) is LETTER:
            question, answer = lettered(row, question, answer)
        # the answer field of GSM8K and MATH holds a whole solution: the gold is its final answer
        gold = ["", *final_answers(answer)][-1] or answer.strip()
        # as JSON has them, so that both stages' rewards see the same: a file of Stage 1 lies between
        fields = {field: value for field, value in json.loads(json.dumps(row, default=str)).items()
                  if field not in ("rewards", "vstar", "lengths", "finished", "responses")}
        problems[key] = {**fields, "id": key, "question": question, "answer": gold}
    if not problems:
        fail(f"{source}: no problems in it")
    return list(problems.values())


def split_of(source, split):
    """Two data sets keep the answers of their test split to themselves; their validation split stands for it."""
    return "validation" if split == "test" and source in ("hellaswag", "commonsense_qa") else split


def lettered(row, question, answer):
    """Multiple choice: the choices with letters behind the question, and the right one's letter."""
    # HellaSwag's answer is the number of an ending
    choices = row.get("choices") or {"text": row["endings"], "label": "0123"}
    letters = "ABCDEFGHIJ"
    return (question + "".join(f"\n{letter}. {text}" for letter, text in zip(letters, choices["text"])) + "\n",
            letters[list(choices["label"]).index(answer)])


def text_of(row, field, where):
    """A field of a row as text. A row without it ends the run."""
    content = row.get(field)
    if isinstance(content, list):  # OlympiadBench keeps a list of final answers
        content = ", ".join(map(str, content))
    text = "" if content is None else str(content)
    if not text.strip():
        fail(f"{where}: no {field!r} (the row has: {', '.join(map(str, row)) or 'nothing'})")
    return text


def file_rows(path):
    """Yields (number, where, row) from a local file; `where` names the place in error messages."""
    if path.suffix == ".parquet":
        import pyarrow.parquet  # comes with datasets

        try:
            table = pyarrow.parquet.read_table(path).to_pylist()
        except (OSError, pyarrow.ArrowException) as error:
            fail(f"{path}: {error}")
        for number, row in enumerate(table, 1):
            yield number, f"{path}, row {number}", row
        return
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        fail(f"{path}: {error.strerror}")
    except UnicodeDecodeError as error:
        fail(f"{path}: not UTF-8 at byte {error.start}")
    one_document = path.suffix == ".json"  # a list of rows; in .jsonl each line is a row
    for number, line in enumerate([text] if one_document else text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except (ValueError, RecursionError) as error:
            fail(f"{path}, line {getattr(error, 'lineno', number) if one_document else number}: not JSON ({error})")
        rows = content if one_document and isinstance(content, list) else [content]
        for index, row in enumerate(rows, number):
            where = f"{path}, {'row' if one_document else 'line'} {index}"
            if not isinstance(row, dict):
                fail(f'{where}: not an object like {{"id": …, "question": …, "answer": …}}')
            yield index, where, row


def hub_rows(hub_id, config, split):
    import datasets

    try:
        rows = datasets.load_dataset(hub_id, config, split=split)
    except Exception as error:  # a hub fails in a dozen libraries' ways; the user needs the reason in one line
        fail(f"cannot load the data set {hub_id} (split {split}): {type(error).__name__}: {str(error)[:300]}")
    return ((number, f"{hub_id}, row {number}", row) for number, row in enumerate(rows))


def template_of(source):
    """How this data set is asked; GSM8K for ####, multiple choice for a letter, all else for a box."""
    return DATASETS[source][-1] if source in DATASETS else BOXED


def make_prompt(tokenizer, problem, template, chat, chat_args=None):
    """The text that the policy continues: plain for base models, in the tokenizer's own template for chat models.
    {field} in `template` is a field of the problem; other braces stand for themselves."""

    def field(match):
        if problem.get(match[1]) is None:  # so the hub fills what a row lacks
            fail(f"--prompt: problem {problem['id']} has no field {match[1]!r} (it has: {', '.join(problem)})")
        return str(problem[match[1]])

    text, fields = re.subn(r"\{([A-Za-z_]\w*)\}", field, template)
    if not fields:
        fail(f"--prompt {template!r}: it asks all the same, for it has no field in braces such as {{question}}")
    if not chat:
        if chat_args:
            fail("--chat_args: they are for the template that --chat asks in")
        return text
    if not tokenizer.chat_template:
        fail("--chat: this tokenizer has no chat template")
    try:
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True, **(chat_args or {}))
    except Exception as error:  # the template is the model's, the arguments are the user's
        fail(f"--chat: its template fails with --chat_args {json.dumps(chat_args)}: {type(error).__name__}: {error}")


def encode(tokenizer, prompt, chat):
    """Prompt → tokens, the same way in all scripts. A template writes its own BOS; plain text gets the tokenizer's."""
    return tokenizer(prompt, add_special_tokens=not chat)["input_ids"]


def fail(message):
    """End on an error that the user can mend: one line that says what and where, exit code 2."""
    # not into the middle of a progress bar
    tqdm.write("error: " + readable(" ".join(str(message).split())), file=sys.stderr)
    raise SystemExit(2)


def readable(text):
    """The text of a model or data set may hold a terminal's codes."""
    return "".join(c if c.isprintable() or c == "\n" else "�" for c in text)


# ---------------------------------------------------------------------------------------------------------------------
# how an answer is read: spelled in one way, split from its unit, cut into tokens, parsed into trees
#
# Every size is bounded before anything is computed. What cannot be read is compared as text.

LONGEST = 400  # characters; the benchmarks' longest gold has 210
DEEPEST = 38  # levels of nesting; a bracket counts as three
# the items of a list, the digits of a number, its exponent, the n of n!, the bits of an exact result
MOST_ITEMS, DIGITS, EXPONENT, FACTORIAL, BITS = 99, 60, 2000, 200, 10_000


class Unreadable(ValueError):
    """Not mathematics that the parser knows, or too large."""


# Unreadable is a ValueError; the last two come from a letter, or an i, where only a number will do
REFUSALS = (ValueError, ArithmeticError, RecursionError, LookupError, TypeError)


class Reading(NamedTuple):
    text: str  # in one spelling and without its unit
    items: list  # a tree for each item of a list, mostly one; [] where there is only text
    unit: str  # 'cm', 'degree', '%', …; '' where there is none
    trouble: str = ""  # why there is only text


# Some characters mark what the next steps need: \x01 and \x02 the ends of \text{…}, \x03 a \\, \x04 a dollar, ¶ a ①.
SIGNS = str.maketrans("−⁻–—×·⋅∗÷⁄’′∶\u00a0", "----****//'': ") | str.maketrans({
    "π": r"\pi ", "∞": r"\infty ", "°": r"^\circ ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "√": " sqrt ",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ", "±": r"\pm ", "∈": r"\in ",
    "≈": r"\approx ", "½": " 1/2", "¼": " 1/4", "¾": " 3/4", "①": "1¶", "②": "2¶", "③": "3¶", "④": "4¶", "⑤": "5¶",
    "⑥": "6¶", "⑦": "7¶", "⑧": "8¶", "⑨": "9¶", "\u200b": "", "″": "''"})
WORDS = (  # what is counted; but three hundreds are not 3
    r"(?![a-z]*(?:less|gross|eds|ands|lions|zens|tens|scores|halves|thirds|quarters|(?<!pa)ths)\b)"
    r"([a-z]{3,}s|men|women|children|mice)")
SPELLINGS = [(key, re.compile(pattern), spelling) for key, pattern, spelling in [
    # if the first is in a text, what matches the second is spelled as the third; \001 to \004 are the marks
    ("", r"[\s.,;]+$|^\s+", ""),
    ("¶", r"¶(?=\s*[,}]|\s*$)", ""),
    ("¶", "¶", ","),  # ①③
    ("}", r"^\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*+\})*+)\}$|^((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*+\})*+)\}$",
     r"\1\2"),  # {5}, 5}
    ("{,}", r"\{,\}(?!\d{3}(?!\d))", "."),  # 3{,}5
    (",", r",\s*\\!\s*|\{,\}", ","),  # 11,\! 111, 1{,}234
    # out of the way: the second \ of a \\ is not the \ of a \, or a \;
    (r"\\", r"\\\\", r"\003"),
    (r"\%", r"\\%", "%"),
    (r"\$", r"\\\$", r"\004"),  # the dollars that are left stand around formulas
    ("$", r"\$", ""),
    ("(", r"(?<=\d\.)\(\d+\)", r"?\g<0>"),  # 0.(3) is no product
    ("~", r"\\?~", " "),
    ("\\", r"\\[!,]", ""),
    ("\\", r"\\(?:(?:left|right|middle|[bB]igg?[lr]?|displaystyle|limits|quad|qquad)(?![a-zA-Z])|[;:> ()\[\]])", " "),
    ("", r"\003", r"\\\\"),
    ("\\", r"\\[dtc](frac|binom)(?![a-zA-Z])", r"\\\1"),
    ("frac", r"\\frac\s*(\d)(\d)(?=\d)", r"\\frac{\1}{\2}"),  # \frac123 is \frac{1}{2}3
    ("boxed", r"\\f?boxed\s*\{", "{"),  # a box in a box
    (",0", r"^([-+]?\d+),(?=0\d+(?![\d.,]))(?!\d{3}(?!\d))", r"\1."),  # 0,05 is no list
    ("math", r"\\in\s*\\math(?:bf|rm)\s*\{([RZNQ])\}", r"\\in \\mathbb{\1}"),
    ("choose", r"\{([^{}]*)\\choose([^{}]*)\}|^([^{}]*)\\choose([^{}]*)$", r"\\binom{\1\3}{\2\4}"),
    ("{", r"\\(?:text(?:rm|bf|it|normal)?|math(?:rm|bf|it)|mbox|rm|operatorname)\s*\{([^{}]*)\}", r"\001\1\002"),
    ("", r"(?<![\d.,])(\d{1,3}) (?=(?:\d{3} )*\d{3}(?![\d/]))", r"\1"),  # 10 000
    ("p", r"\s*\001?\s*\b(?:per ?cent(?:age)?|pct)\b\s*\002?", "%"),
    ("", r"(?:(?<=1)(?=\W*st)|(?<=2)(?=\W*nd)|(?<=3)(?=\W*rd)|(?<=\d)(?=\W*th))[\s^{\001]*..\b\s*\002?\s*\}?",
     ""),  # 7^{\text{th}}
    ("circled", r"\\(?:text)?circled\s*\{(\d+)\}", r"\1"),
    ("infinite", r"\001?\s*\binfinite(?:ly many)?(?: solutions?| values| points)?\s*\002?$", r"\\infty"),
    ("", r"\001\s*(max|min|(?:arc?)?(?:sin|cos|tan|cot|sec|csc)h?|ln|log|lg|exp)\s*\002", r"\\\1 "),
    ("_{m", r"_\{(?=max|min)", r"_{\\"),
    ("prime", r"\^\s*\{?\s*\\prime\s*\}?", "'"),
    ("^", r"(?<=\b[fgh])\^\s*\{\s*-\s*1\s*\}(?=\s*\()", "_{-1}"),  # f^{-1} is a name
    ("circ", r"\^\s*\{?\s*\\circ\s*\}?", r"\\degree "),
    ("degree", r"\\degree\s*\001?\s*([CF])\s*\002?$", r"\001\1\002"),  # °C
    ("degree", r"""(\d+)\s*\\degree\s*(\d+)\s*'(?!')\s*(\d+)\s*(?:''|")""",
     r"(\1+\2/60+\3/3600)\\degree"),  # 30^\circ 15' 36''
    ("degree", r"(\d+)\s*\\degree\s*(\d+)\s*'(?!')", r"(\1+\2/60)\\degree"),
    ("degree", r"((?:sin|cos|tan|cot|sec|csc)[^,=]*?)\s*\\degree", r"\1\\frac{\\pi}{180}"),  # \sin 30^\circ
    ("degree", r"((?:sin|cos|tan|cot|sec|csc)[^,=]*?)\s*\\degree", r"\1\\frac{\\pi}{180}"),  # and a second degree in it
    ("degree", r"\\degree\s*(?=[,)\]<>+=-]|\\[lg]|[kmn]\b|\001?\s*(?:and|or)\b)", ""),  # 0^\circ < x < 90^\circ
    ("sq", r"\b(?:sq|square)\b\.?\s*(\w+)(\s*\002)?$", r"\1\2^2"),  # 5 square cm
    ("cu", r"\b(?:cu|cubic)\b\.?\s*(\w+)(\s*\002)?$", r"\1\2^3"),
    ("langle", r"\\langle(.*?)\\rangle", r"(\1)"),
    (r"\lim", r"^\\lim(?![a-z])[^=]*=(?=[^=]*$)", ""),  # \lim_{x \to 0} f(x) = 1
    (":", r"([\w.]+)\s*:\s*([\w.]+)\s*:\s*([\w.]+)", r"(\1,\2,\3)"),  # 1:2:3
    (":", r"([a-zA-Z]{3,})\s*\002?\s*:\s*\002?", r"\1="),  # Largest: 5
    ("infty", r"\[(?=\s*-\s*\\infty)|(?<=\\infty)\s*\]", "?"),  # no number is infinite
    ("integer", r"\001?\s*\bis (?:an|any)(?: arbitrary)? integer\b\s*\002?", r"\\in Z"),
    ("integer", r"(?:\b(?:an|any|all|every|each)\s+)?\bintegers?\b\s*\002?\s*([a-zA-Z])\b", r"\1\\in Z"),
    (r"\{", r"\\\{(?:\s*\w\s*(?:\\mid|[|:]))?(.*?)(?:\\mid|[|:,])\s*(\w\s*\\in\s*(?:\\mathbb\s*)?\{?Z\}?)\s*\\\}$",
     r"\1,\2"),  # \{2k \mid k \in Z\}
    (r"\{", r"\\\{\s*\w\s*(?:\\in\s*(?:\\mathbb\s*)?\{?R\}?)?\s*(?:\\mid|:|\|)",
     r"\\{\\mid "),  # \{x \in R : x > 2\}
    ("mathbb", r"\\mathbb\s*(?:R\b|\{R\})", r"(-\\infty,\\infty)"),
    ("infty", r"(\(-\\infty,\\infty\))\s*(?:-|/|\\backslash)\s*(?=\\\{)", r"\1\\setminus "),
    ("|", r"\|\s*\\(?:vec|overrightarrow|overline)\s*\{(\w\w)\}\s*\|", r"|\1|"),
    ("(", r"(?<![\w\\])([A-Z])\s*(?=\([^()=]*,[^()=]*\)\s*(?:,|$))", r"\1="),  # A(1,2)
    ("\\", r"\\(?:lor|vee)(?![a-z])", "∨"),
    ("\\", r"\\(?:land|wedge)(?![a-z])", ","),
    ("and", r"\001?\s*\band\b\s*\002?", ","),
    ("or", r"\001?\s*\bor\b\s*\002?", "∨"),
    (",", rf"(\d+)\s*\001?\s*{WORDS}\s*\002?(?=\s*,)", r"\2=\1"),  # 3 apples, 5 pears
    (",", rf"(?<=,)\s*(\d+)\s*\001?\s*{WORDS}\s*\002?$", r"\2=\1"),
    ("", r"^\s*(?:\\approx|=)|\\+$|[\s.,;]+$|^\s+", ""),
]]
# a condition that takes nothing from the answer before it; there, and in f(x) = …, a letter that may have any name
TAIL = re.compile(
    r"(?<=[\w)}\]\x02'!])(?:"
    r"(?:[\s,;(\x01]+(?:where|with|for)\b[^=<>\d\\]*?|[\s,;(\x01]*[,;(]|[\s,;(\x01]*\\forall)\s*\x02?\s*"
    r"(?:([a-zA-Z])\s*\\in\s*(?:\\mathbb\s*)?\{?Z\}?|[a-zA-Z]\s*\\in\s*(?:\(-\\infty,\\infty\)|R))[\s\x02)]*"
    r"|[\s,;(\x01]+(?:where|for (?:all|any|some|every|each))\b(?!.*\b(?:odd|even)\b)[^=<>\d\\]*)$")
HEAD = re.compile(r"\s*[a-zA-Z](?:_\{?-?\w\}?|')*\s*\(\s*([a-z])\s*\)\s*=(?=.*\1)")
MONEY = {"\x04": "dollar", "€": "euro", "£": "lb"}
UNITS = {  # another name of a unit: its own
    "centimeter": "cm", "centimetre": "cm", "millimeter": "mm", "millimetre": "mm", "meter": "m", "metre": "m",
    "kilometer": "km", "kilometre": "km", "inch": "in", "foot": "ft", "feet": "ft", "yard": "yd", "mile": "mi",
    "gram": "g", "kilogram": "kg", "milligram": "mg", "pound": "lb", "ounce": "oz", "sec": "s", "second": "s",
    "minute": "min", "hr": "h", "hour": "h", "yr": "year", "l": "L", "liter": "L", "litre": "L", "mL": "ml",
    "milliliter": "ml", "gal": "gallon", "USD": "dollar", "deg": "degree", "rad": "radian", "mile per hour": "mph",
    "miles per hour": "mph", "kmh": "km/h", "joule": "J", "newton": "N", "watt": "W", "volt": "V", "people": "person"}
UNIT = (rf"({'|'.join([*UNITS, *UNITS.values()])}|day|week|month|quart|cup|cent|euro|m/s|cm/s|ft/s|kJ|eV|A|K|C|F|Hz|Pa|"
        "mol|unit|student|apple|marble|book|way|point|time|side|edge|face|block|page|ticket|coin)"
        r"(?:(?<=\w\w)e?s)?")
UNIT_AT_END = re.compile(
    # (?<=[\s\S]) wants something before the unit: a lone cm is no number
    r"\s*(?:\\(degree)\s*|(%)"
    rf"|(?<=[\s\S])(?:\x01\s*{UNIT}\.?\s*\x02"  # in \text{…}
    rf"|(?<=[\d\s}}])(?=[\w/]{{3}}|cm|mm|km|kg|mg|ft|lb|oz|hr){UNIT}\.?"  # bare: but the m of 5m is a variable
    rf"|(?<=\d)\s*\x01?\s*{WORDS}\s*\x02?)"
    r"\s*(?:\^\s*\{?([23])\}?)?)$")
WORDS_ALONE = re.compile(  # no formula, and three letters in a row, four beside a number, that name no function
    r"(?!.*[\\^_=<>+*/|])(?:(?!.*\d)|(?=.*[a-zA-Z]{4}|.*\x01\s*[a-zA-Z]{2}))"
    r".*(?:(?<![a-zA-Z])(?!sin|cos|tan|log|exp|sqrt|arc|sec|csc|cot|pi|inf|ln)[a-zA-Z]{3}|\x01)", re.DOTALL)


@lru_cache(maxsize=4096)
def read(text):
    """What a text says: formulas as trees, anything else as text."""
    if len(text) > LONGEST:
        return Reading(text.strip(), [], "", f"longer than {LONGEST} characters")
    text = respell(text)
    bound = TAIL.search(text)
    if bound and not (bound[1] and re.search(r"[<>]|\\[lg]e", text)):  # 0 < x < 4, x ∈ Z is no interval
        text = text[: bound.start()]
    text, unit = split_unit(text)
    bare = re.sub("[\x01\x02]", " ", text)
    plain = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", bare).replace("∨", ",")
    plain = re.sub(r"\{([a-zA-Z0-9])\}", r"\1", plain)  # x_{5} is x_5
    items, trouble = [], ""
    if re.fullmatch(r"[(\s\x01]+[A-Za-j][)\s\x02]+|[a-dA-D]\)?", text):
        plain = plain.strip("()").upper()  # the letter of a choice
    elif WORDS_ALONE.match(text):
        plain, trouble = plain.casefold(), "it is words"
    if not trouble:
        try:
            items = Parser(bare, bound or HEAD.match(bare)).everything()
        except REFUSALS as error:
            trouble = str(error)
    if re.search(r"(?<![\\a-zA-Z])[a-zA-Z][a-z]{3}|\x01\s*[a-zA-Z]{2}", text):
        plain = plain.casefold()
    return Reading(plain, items, unit, trouble)


def respell(text):
    """One spelling where LaTeX, Unicode and people have several."""
    if not text.isascii():
        text = re.sub("[⁻⁰¹²³⁴-⁹]+", r"^{\g<0>}", re.sub("[₀-₉]+", r"_{\g<0>}", text))
        text = unicodedata.normalize("NFKC", text.translate(SIGNS))  # NFKC: fullwidth digits
    for key, pattern, spelling in SPELLINGS:
        if key in text:
            text = pattern.sub(spelling, text)
    return text


def split_unit(text):
    r"""'5 cm' → ('5', 'cm'), '90^\circ' → ('90', 'degree'), '\$18' → ('18', 'dollar')."""
    unit = ""
    if match := UNIT_AT_END.search(text):
        text = text[: match.start()].replace(match[0] + ",", ",")  # 5 cm, 6 cm
        *names, power = match.groups("")
        name = "".join(names)  # one of them
        unit = UNITS.get(name, name) + power
    if text[:1] in MONEY:
        text, unit = text[1:].strip(), unit or MONEY[text[0]]
    return text.replace("\x04", ""), unit


# ---------------------------------------------------------------------------------------------------------------------
# from text to trees
#
# A tree is a tuple: its kind and its members. The members are trees, unless the table says otherwise.
#
#     kind                     members                          read from          compared by
#     number                   a Fraction                       5, 1,234           value
#                              and its digits, if a decimal     0.50               value, or rounded
#     variable                 its name                         x, a_1, \pi        value or at_points
#     + - * / ^ binom          two                              \frac12            value or at_points
#     root                     a tree and the degree            \sqrt[3]{2}        value or at_points
#     ! abs floor sin ln …     one                              5!, |x|, \sin x    value or at_points
#     tuple                    its brackets, then its items     (1,2), [0,1)       same
#     set                      its items                        \{1,2\}            same_sets
#     where                    its conditions                   \{x \mid x>2\}     same_sets
#     \cup \cap \setminus      two                              [0,1]\cup[2,3]     same_sets
#     relation                 its signs, then its sides        a < b \le c        same_relations, meant or same_sets
#
# A matrix is a tuple of tuples with the brackets \\ and &, and 1011_2 is (1011, 2) with the brackets __.

FUNCTIONS = set("sin cos tan sec csc cot arcsin arccos arctan sinh cosh tanh arcsinh arccosh arctanh "
                "log ln lg exp".split())
GREEK = set("alpha beta gamma delta epsilon varepsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau phi "
            "varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell hbar min max angle "
            "triangle".split())
TOKEN = re.compile(
    r"\d{1,3}(?:,\d{3})+(?![\d,])(?:\.\d+)?|\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+"  # 1,234.5   8.7e8   .5
    r"|\\(?:begin|end)\{(?:[pbv]?matrix|smallmatrix|array)\}"
    r"|\\(?:overline|vec|hat|bar|widehat|overrightarrow|math\w+|boldsymbol)\s*\{\w+\}"
    r"|\\\\|\\[a-zA-Z]+|\\[{}|]"
    r"|arc(?:sin|cos|tan)h?|sinh?|cosh?|tanh?|sec|csc|cot|log|ln|exp|sqrt|pi|infinity|inf"
    r"|<=|>=|!=|\*\*|\S")
TOKENS = {  # another way to write a token: as the parser knows it
    "\\infty": "infinity", "inf": "infinity", "\\inf": "\\infinity", "\\varnothing": "\\emptyset", ";": ",",
    "\\cdot": "*", "\\times": "*", "\\div": "/", ":": "/", "**": "^", "\\in": "∈",
    "\\lvert": "|", "\\rvert": "|", "\\vert": "|", "\\|": "|", "\\lt": "<", "\\gt": ">", "\\ne": "!=", "\\neq": "!=",
    "\\le": "<=", "\\leq": "<=", "\\leqslant": "<=", "\\ge": ">=", "\\geq": ">=", "\\geqslant": ">=", "\\approx": "=",
} | {"\\" + name: name for name in (*FUNCTIONS, *GREEK)}
ZERO, INFINITY = ("number", Fraction(0)), ("variable", "infinity")


def tokens_of(text, bound):
    """1,234 is a number, but (1,234) is a pair and 1,23 a list. A bound letter may have any name, so it is an iota."""
    tokens, brackets, names = [], 0, {**TOKENS, bound and bound[1]: "iota"}
    for token in TOKEN.findall(text):
        brackets += (token in ("(", "[", "\\{")) - (token in (")", "]", "\\}"))
        if "," in token[1:]:
            tokens += re.split("(,)", token) if brackets else [token.replace(",", "")]
        else:
            tokens.append(names.get(token, token))
    return tokens


class Parser:
    r"""Recursive descent: each rule of the grammar is a method. […] may be missing, {…} may come any number of times.

        items     relation {"," relation}                     one with ± in it counts once for each choice of signs
        relation  sum {("=" | "<" | "<=" | "∈" | …) sum}
        sum       ["+" | "-" | "±"] product {("+" | "-" | "±" | "∪" | "∩" | "∖") product}
        product   power {("*" | "/") ["-"] power | power}     2x is a product, 1\frac12 and 3 1/2 are mixed numbers
        power     atom {"!" | "^" ["-"] argument}
        argument  atom                                        of a number only the first digit: \frac12 is 1/2
        atom      number | bracket | function | matrix | symbol
        number    digits ["_" argument]                       1011_2 is a number to the base 2
        bracket   ("(" | "[" | "{" | "\{" ["\mid"]) items (")" | "]" | "}" | "\}")
        function  name {"^" ["-"] argument | "_" argument} (bracket | product)
        matrix    \begin{…} relation {("&" | "\\") relation} \end{…}
        symbol    \frac argument argument | \sqrt ["[" sum "]"] argument | "|" sum "|" | name {"_" argument | "'"} | …
    """

    def __init__(self, text, bound):
        self.tokens = [*tokens_of(text, bound), ""]  # "" is the end
        self.place = self.depth = 0
        # a bit for each ± of a relation that is a minus in this pass over it; how many there were; relations so far
        self.flipped = self.signs = self.passes = 0

    @property
    def next(self):
        return self.tokens[self.place]

    def take(self, *wanted):
        """Takes the next token and returns it, if it is wanted; else returns "". take() takes any."""
        token = self.next
        if wanted and token not in wanted:
            return ""
        if not token:
            raise Unreadable("it ends too early")
        self.place += 1
        return token

    def expect(self, wanted):
        if not self.take(wanted):
            raise Unreadable(f"{self.next or 'the end'!r} where {wanted!r} should be")

    def everything(self):
        items = self.items()
        if self.next:
            raise Unreadable(f"{self.next!r} where nothing should follow")
        return items

    def items(self, double=True):
        """A ± in a set doubles the member, a ± in a tuple doubles the tuple: (1, ±2) is (1, 2), (1, -2)."""
        items, outer = [], (self.flipped, self.signs)
        while not items or self.take(",", "∨"):
            start = self.place
            if double:
                self.flipped = self.signs = 0
            items.append(self.relation())
            while double and self.flipped + 1 < 2**self.signs:  # once more from its start
                self.place, self.signs, self.flipped = start, 0, self.flipped + 1
                items.append(self.relation())
        if double:
            self.flipped, self.signs = outer
        return items

    def relation(self):
        self.passes += 1
        if self.passes > MOST_ITEMS:
            raise Unreadable(f"more than {MOST_ITEMS} items")
        sides, signs = [self.sum()], ()
        while sign := self.take(*"= < > <= >= != ∈".split()):
            signs += (sign,)
            sides.append(self.sum())
        if signs and set(signs) <= {">", ">="}:  # it is written from left to right
            signs, sides = tuple(sign.replace(">", "<") for sign in reversed(signs)), sides[::-1]
        if {*signs} == {"="}:
            signs = ("=",)
            if is_label(sides[-1]) and not variables(sides[0]):  # 5 = x
                sides.reverse()
        if signs == ("∈",) and is_label(sides[0]):
            return sides[1]
        if not signs:
            return sides[0]
        tree = ("relation", signs, *sides)
        # x < 1 or x > 2 is one set; x = 1 or x = 2 is a list
        return ("\\cup", tree, self.relation()) if signs != ("=",) and self.take("∨") else tree

    def sum(self):
        tree = ZERO if self.next in ("+", "-", "\\pm", "\\mp") else self.product()
        while sign := self.take("+", "-", "\\pm", "\\mp", "\\cup", "\\cap", "\\setminus"):
            if sign in ("\\pm", "\\mp"):
                # each ± goes its own way, but where there is a ∓, all go together
                place = 0 if "\\mp" in self.tokens else self.signs
                self.signs = place + 1
                sign = "+" if (sign == "\\mp") == self.flipped >> place & 1 else "-"
            tree = (sign, tree, self.product())
        return tree

    def product(self):
        tree = self.power()
        while True:
            if sign := self.take("*", "/"):
                tree = (sign, tree, self.signed(self.power, "+"))
            elif not self.starts_factor():
                return tree
            elif tree[0] == "number" and self.next[0].isdigit():  # 3 1/2; and 3 1 is nothing
                above = self.power()
                self.expect("/")
                tree = ("+", tree, ("/", above, self.power()))
            else:  # 1\frac{1}{2} is 3/2, but 2\frac{a}{b} a product
                integer = tree[0] == "number" and tree[1].denominator == 1
                fraction = self.next == "\\frac"
                factor = self.power()
                mixed = integer and fraction and factor[0] == "/" and factor[1][0] == factor[2][0] == "number"
                tree = ("+" if mixed else "*", tree, factor)

    def starts_factor(self):
        if "{" in self.next:  # \vec{a}
            return "\\end" not in self.next
        return self.next[:1].isalnum() or self.next in "( { [ \\frac \\sqrt \\binom \\lfloor \\lceil".split()

    def signed(self, rule, *harmless):
        """2*-3, 2^-3: a minus where the grammar has no sum."""
        return ("-", ZERO, rule()) if self.take("-", *harmless) == "-" else rule()

    def power(self):
        tree = self.atom()
        while mark := self.take("!", "^"):
            if mark == "!":
                tree = ("!", tree)
            else:
                tree = ("^", tree, self.signed(self.argument))
                if self.next == "^":
                    raise Unreadable("a power of a power without brackets")
        return tree

    def argument(self):
        # LaTeX takes one digit: \frac12, \frac{1}2, \sqrt23
        token = self.next
        if len(token) > 1 and token.isdigit() and self.tokens[self.place - 1] in ("\\frac", "\\sqrt", "}"):
            self.tokens[self.place : self.place + 1] = token[0], token[1:]
        return self.atom()

    def atom(self):
        self.depth += 1
        if self.depth > DEEPEST:
            raise Unreadable("nested too deep")
        token = self.take()
        if token[0].isdigit() or token[0] == ".":
            rule = self.number
        elif token in ("(", "[", "{", "\\{"):
            rule = self.bracket
        elif token in FUNCTIONS:
            rule = self.function
        elif token.startswith("\\begin{"):
            rule = self.matrix
        else:
            rule = self.symbol
        tree = rule(token)
        self.depth -= 1
        return tree

    def number(self, token):
        if len(token) > DIGITS or abs(Decimal(token).adjusted()) > EXPONENT:
            raise Unreadable("a number of too many digits")
        number = ("number", Fraction(token))
        if "." in token and "e" not in token.lower():
            number += (token,)  # a decimal remembers its digits, for `rounded`
        return ("tuple", "__", number, self.argument()) if self.take("_") else number

    def bracket(self, opened):
        self.depth += 2  # brackets weigh more: each set in a set can double the work, by a ±
        kind = "where" if self.take("\\mid") else "set"
        items = [] if opened + self.next == "\\{\\}" else self.items(double=opened == "\\{")
        self.depth -= 2
        both = opened + self.take()
        if both in ("{}", "()") and len(items) == 1:
            return items[0]
        if both == "\\{\\}":
            return kind, *items
        if both in ("()", "(]", "[)", "[]"):
            return ("tuple", both, *items)
        raise Unreadable(f"{both!r} do not belong together")

    def symbol(self, token):
        name = token.lstrip("\\")
        if token in ("\\frac", "\\binom"):
            return ("/" if token == "\\frac" else "binom", self.argument(), self.argument())
        if name == "sqrt":
            degree = ("number", Fraction(2))
            if self.take("["):
                degree = self.sum()
                self.expect("]")
            return ("root", self.argument(), degree)
        if token in "| \\lfloor \\lceil".split():
            tree = self.sum()
            self.expect(token.replace("\\l", "\\r"))
            return token[2:] or "abs", tree
        if name == "infinity":
            return INFINITY
        if name == "emptyset":
            return ("set",)
        if not (re.fullmatch("[a-zA-Z]", name) or name in GREEK or "{" in token):
            raise Unreadable(f"{token!r} is not known")
        while mark := self.take("_", "'"):
            if mark == "_":
                index = self.argument()
                mark += str(index[1] if index[0] in ("number", "variable") else index)
            name += mark
        return ("variable", name)

    def function(self, name):
        exponent = base = None
        while mark := self.take("^", "_"):
            if mark == "^":
                exponent = self.signed(self.argument)
            else:
                base = self.argument()
        if self.next in ("(", "{", "|", "["):
            argument = self.atom()
        else:  # \sin 2x takes the product behind it
            argument = self.power()
            while self.starts_factor() and self.next not in FUNCTIONS:
                argument = ("*", argument, self.power())
        if argument[0] in ("tuple", "set"):
            raise Unreadable("a function of a list")
        if exponent == ("-", ZERO, ("number", Fraction(1))):  # \sin^{-1} is arcsin
            name, exponent = "arc" + name, None
        tree = ("/", ("ln", argument), ("ln", base)) if base else (name, argument)
        return ("^", tree, exponent) if exponent else tree

    def matrix(self, begin):
        end = begin.replace("begin", "end")
        if "array" in begin and self.take("{"):
            while self.take() != "}":
                pass
        rows = []
        while not rows or not self.take(end):
            row = ("tuple", "&", self.relation())
            while self.take("&"):
                row += (self.relation(),)
            rows.append(row)
            if self.next != end:
                self.expect("\\\\")
        if {*map(len, rows)} == {3}:  # a column
            return ("tuple", "()", *[row[2] for row in rows])
        return ("tuple", "\\\\", *rows)


# ---------------------------------------------------------------------------------------------------------------------
# from trees to a verdict


def same_items(some, others):
    """Lists of solutions are equal in any order, but p = 2, q = 3 is 2, 3 or (2, 3) in this one."""
    some, others = solutions(some, others), solutions(others, some)
    names = named(some), named(others)
    if min(names) < 1 < max(names):
        some, others = in_order(some), in_order(others)
    left = list(others)
    for tree in some:
        partner = next((other for other in left if same(tree, other)), None)
        if not partner:
            return False
        left.remove(partner)
    return not left


def solutions(items, others):
    r"""\{1, 2\} is the list 1, 2, and (p, q) = (2, 3) the list p = 2, q = 3. x < 1, x > 2 is one set of numbers."""
    match items:
        case [("set", *members)]:
            return members
        case [("relation", ("=",), ("tuple", "()", *names), ("tuple", "()", *numbers))] if len(others) > 1:
            return [("relation", ("=",), *pair) for pair in zip(names, numbers)]
        case [("relation", ("!=",), name, _) as first, *more] if more and not any(map(variables, more)):
            return [("where", first, *(("relation", ("!=",), name, number) for number in more))]  # x ≠ -2, 2
        case [_, _, *_] if {tree[0] for tree in items} == {"relation"} and {tree[1] for tree in items} != {("=",)} and (
                len(variables(("where", *items, *others)) - {"infinity"}) == 1):
            return [("where", *items)]
    return items


def named(items):
    """Of how many names does a list say what they are?"""
    return len({tree[2] for tree in items if tree[:2] == ("relation", ("=",)) and is_label(tree[2])})


def in_order(items):
    """As one tuple: by the alphabet if letters name its parts, else as it is written."""
    if named(items):
        items = sorted(items, key=lambda tree: tree[2][1] * (len(tree[2]) == 2))
    return [("tuple", "()", *(meant(tree)[-1] for tree in items))] if len(items) > 1 else items


def same(one, other):
    """Do two trees mean the same?"""
    kinds = {one[0], other[0]}
    if kinds > {"relation"} and ("=",) in one[1:2] + other[1:2]:
        return any(same(a, b) for a in meant(one) for b in meant(other) if (a, b) != (one, other))
    if kinds & SETS.keys() or kinds > {"relation"}:
        return same_sets(one, other)
    if "tuple" in kinds:  # the brackets count: (0,1) is not [0,1]
        return one[:2] == other[:2] and same_parts(one[1:], other[1:])
    if kinds == {"relation"}:
        return same_relations(one, other)
    # two formulas are the same if they have the same variables and the same values
    names, others = variables(one), variables(other)
    renamed = names ^ others
    if renamed and (len(renamed) != 2 or "iota" not in renamed):
        return False
    if names:
        return all(near(*pair) for pair in at_points(one, other, names & others, renamed))
    a, b = alike(value(one), value(other))
    # of a sine that is 0, rounding leaves a little
    return near(a, b, PART[type(a)], least=type(a) is complex and 0.1) or rounded(one, other) or rounded(other, one)


def same_parts(one, other):
    return len(one) == len(other) and all(map(same, one[1:], other[1:]))


def same_relations(one, other):
    names = variables(one)
    if names != variables(other):
        return False
    if one[1] == other[1]:
        if same_parts(one[1:], other[1:]):
            return True
        # 4x + 2y = 6 is 3 = y + 2x: the differences of their sides are in proportion, a / b is the same at every point
        pairs = [*at_points(("-", *one[2:]), ("-", *other[2:]), names)] if names else [(0, 0)]
        first, second = pairs[0]
        # 0 = 0 is in proportion to nothing; and x < 1 is not x > 1
        if abs(first) > 1e-6 < abs(second) and all(near(a * second, b * first) for a, b in pairs) and (
                one[1] == ("=",) or first.real * second.real > 0):
            return True
    return ("=",) not in (one[1], other[1]) and len(names) == 1 and same_sets(one, other)


SETS = {  # a set of numbers: which of some points are in it, from those that are in its members
    "\\cup": set.union, "\\cap": set.intersection, "\\setminus": set.difference, "set": set.union,
    # conditions hold together, x > 0, x ≠ 1, or, if they never can, one of them holds: x < 0, x > 1
    "where": lambda *members: set.intersection(*members) or set.union(*members),
}
HOLDS = {"<": operator.lt, "<=": operator.le, "=": operator.eq, "!=": operator.ne}


def same_sets(one, other):
    """By their members; or by the numbers at which they begin and end, and one between each two of these."""
    if one[0] == other[0] == "set":
        return same_items(one[1:], other[1:])
    # a letter is some number, and infinity a large one
    env = CONSTANTS | {name: 1.618 * 1.37**n for n, name in enumerate(sorted(variables(one) | variables(other)))}
    env["infinity"] = 1e12
    ends = {-1e12, 1e12}

    def inside(tree, points):
        """Those of the points that are in a set of numbers."""
        kind, *members = tree
        if kind in SETS:
            return SETS[kind](*(inside(member, points) for member in members))
        signs, name = ["="], 0  # a number is what is = it
        if kind == "relation":
            signs, *members = members
            names = [*map(is_label, members)]
            name = names[1] or names.index(True)  # the y of a < y < b
            del members[name]
        elif kind == "tuple":
            brackets, low, high = members  # low < x <= high
            signs, members, name = ["<" if bracket in "()" else "<=" for bracket in brackets], [low, high], 1
        else:
            members = [tree]
        numbers = [round(complex(value(member, env)).real, 9) for member in members]
        ends.update(numbers)
        return {x for x in points if all(
            HOLDS[sign](*pair) for sign, pair in zip(signs, pairwise([*numbers[:name], x, *numbers[name:]])))}

    inside(one, ()), inside(other, ())  # they collect the ends
    points = {(a + b) / 2 for a, b in pairwise(sorted(ends))} | ends - {-1e12, 1e12}
    return inside(one, points) == inside(other, points) != set()


def is_label(tree):
    """A name for what stands on the other side of the sign: x, f(2), |PQ|, (p, q), A : B."""
    match tree:
        case ("variable", _):
            return tree != INFINITY
        case ("*" | "/" as sign, one, other):
            if other[0] == "number":  # f(2) has a name; x(2) is x times 2
                return sign == "*" and is_label(one) and one[1] not in [*"abcdkmnrtuvwxyz"]
            return is_label(one) and (is_label(other) or sign == "*" and other[0] in ("tuple", "relation"))
        case ("abs", ("*", *_) as other):
            return is_label(other)
        case ("tuple", _, *names):
            return all(map(is_label, names))
    return False


def meant(tree):
    """5 of x = 5, 2x of f(x) = 2x, 9 of A = 3 * 3 = 9; √5 and 2.236 of √5 ≈ 2.236. Any other tree stays as it is."""
    if tree[:2] == ("relation", ("=",)):
        named = is_label(tree[2])
        sides = tree[2 + named :]
        if all(same(a, b) or rounded(b, a, 1) for a, b in pairwise(sides)):
            return sides
        if named:
            return sides[-1:]
    return (tree,)


def variables(tree):
    match tree:
        case ("variable", name):
            return {name} - CONSTANTS.keys()
        case (_, *members):
            return set().union(*map(variables, members))
    return set()


def at_points(one, other, names, renamed=()):
    """The values of two formulas at five points; the renamed letters stand for the same number."""
    for point in POINTS:
        env = CONSTANTS | dict(zip(sorted(names), point)) | dict.fromkeys(renamed, point[-1])
        yield complex(value(one, env)), complex(value(other, env))


def near(a, b, part=1e-9, least=0):
    """Is their difference no more than a part of the larger one? Both may be 0, of which rounding leaves `least`."""
    return abs(a - b) <= part * max(abs(a), abs(b), least)


def rounded(tree, exact, digits=4):
    """0.3333 agrees with 1/3, and 1.414 with √2: a decimal of at least four digits, rounded rightly.

    This holds only for numbers that no decimal can write: 0.3333 and 0.33334 are two different numbers.
    """
    size = tree
    while size[:2] == ("-", ZERO):
        size = size[2]
    if size[0] != "number" or len(size) < 3 or len(size[2].replace(".", "").lstrip("0")) < digits or variables(exact):
        return False
    exact = value(exact)
    if isinstance(exact, Fraction) and pow(10, BITS, exact.denominator) == 0:  # a decimal can write it: 1/8
        return False
    number, exact = alike(value(tree), exact)
    return abs(number - exact) <= Fraction(1, 2 * 10 ** len(size[2].partition(".")[2]))


CONSTANTS = {"e": Decimal("2.718281828459045235360287471352662497757247093699959574966967627724077"),
             "pi": Decimal("3.141592653589793238462643383279502884197169399375105820974944592307816"), "i": 1j}
# five points: a positive number for each variable, which no formula is likely to single out
POINTS = [[complex(rng.uniform(0.3, 2.5)) for _ in range(LONGEST)] for rng in map(random.Random, range(5))]
SCALES = {"%": "1/100", "degree": r"\pi/180"}  # units that are numbers
# a part of the larger one, by which two equal numbers may differ
PART = {Fraction: 0, Decimal: Decimal("1e-40"), complex: 1e-12}


def value(tree, env=CONSTANTS):
    """A Fraction as long as possible; with roots, logarithms, e and π a Decimal; with i, sines and variables complex.

    Why not complex at once: its 16 digits take e^{π√163} for a whole number, and (√2 - 1)^12 for different from its
    expansion 19601 - 13860√2. The Decimals have 64 digits, of which 40 must agree.
    """
    kind, *members = tree
    if kind == "number":
        return members[0]
    if kind == "variable":
        return env[members[0]]
    numbers = alike(*map(value, members, repeat(env)))
    if kind in FUNCTIONS and "l" not in kind and abs(numbers[0]) > 1e6:
        raise Unreadable(f"{kind} of a number beyond a million")
    number = OPERATIONS[kind](*numbers)
    fits = bits(number) <= BITS if isinstance(number, Fraction) else number == 0 or 1e-300 < abs(number) < 1e300
    if not fits:
        raise Unreadable("too large")
    return number


def alike(*numbers):
    """The numbers, all of the type of the least exact one: Fraction, Decimal or complex."""
    kinds = {*map(type, numbers)}
    if kinds <= {Fraction}:
        return numbers
    return [*map(decimal if kinds <= {Fraction, Decimal} else complex, numbers)]


def decimal(x):
    return Decimal(x.numerator) / x.denominator if isinstance(x, Fraction) else x


def bits(x):
    return max(x.numerator.bit_length(), x.denominator.bit_length())


def power(a, b):
    if a == 0:
        if b.real <= 0:
            raise Unreadable("a power of zero")
        return a
    if isinstance(a, Fraction) and b.denominator == 1:
        if bits(a) * abs(b) > BITS:
            raise Unreadable("too large a power")
        return a ** int(b)
    # beyond this the result overflows, or its rounding error grows too large
    if float(abs(b)) * (abs(math.log(abs(a))) + 4) > 600:
        raise Unreadable("too large a power")
    if isinstance(a, complex) or a < 0 and b != int(b):
        return complex(a) ** complex(b)
    return decimal(a).sqrt() if b == 0.5 else decimal(a) ** decimal(b)


def root(a, degree):
    if isinstance(a, Fraction) and a < 0 and degree.numerator % 2:  # the real root of a negative number
        return -power(-a, 1 / degree)
    return power(a, 1 / degree)


def logarithm(function, otherwise):
    return lambda x: otherwise(x) if isinstance(x, complex) or x <= 0 else function(decimal(x))


def factorial(x):
    if isinstance(x, complex) and not x.imag:  # of a letter
        return math.gamma(x.real + 1)
    n = int(x.real)
    if x != n or not 0 <= n <= FACTORIAL:
        raise Unreadable(f"a factorial or binomial of {x}")
    return Fraction(math.factorial(n))


OPERATIONS = {  # a kind of tree with a value: how it follows from the values of its members
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv, "^": power, "root": root,
    "!": factorial, "binom": lambda n, k: factorial(n) / factorial(k) / factorial(n - k),
    "abs": abs,
    # of letters: any two functions that no formula is likely to name, for two steps may agree at all points
    "floor": lambda x: cmath.exp(1.1 * x) if isinstance(x, complex) else Fraction(math.floor(x)),
    "ceil": lambda x: cmath.exp(1.2 * x) if isinstance(x, complex) else Fraction(math.ceil(x)),
    # cmath calls arcsin asin
    **{name: getattr(cmath, name.replace("arc", "a"))
       for name in "sin cos tan sinh cosh tanh arcsin arccos arctan arcsinh arccosh arctanh".split()},
    "sec": lambda x: 1 / cmath.cos(x), "csc": lambda x: 1 / cmath.sin(x), "cot": lambda x: 1 / cmath.tan(x),
    **dict.fromkeys(("log", "ln"), logarithm(Decimal.ln, cmath.log)), "lg": logarithm(Decimal.log10, cmath.log10),
    "exp": lambda x: cmath.exp(x) if isinstance(x, complex) else decimal(x).exp(),
}


# ---------------------------------------------------------------------------------------------------------------------
# the command line


def main():
    """python rewards.py RESPONSE GOLD: how both are read, and the verdict."""
    if len(sys.argv) != 3:
        fail("usage: python rewards.py RESPONSE GOLD")
    _, response, gold = sys.argv
    found = final_answers(response)
    claim = [response, *found][-1]
    print("answer  ", claim if found else "none: no balanced \\boxed{…} and no ####")
    for name, text in (("read as ", claim), ("gold    ", gold)):
        reading = read(text)
        print(name, reading.text, f"[{reading.unit}]" if reading.unit else "", "  ",
              "; ".join(map(str, reading.items)) or f"compared as text: {reading.trouble}")
    print("reward  ", reward(response, gold, True))
    if not found:
        print("in a box it would earn", float(is_correct(response, gold)))


if __name__ == "__main__":
    main()
