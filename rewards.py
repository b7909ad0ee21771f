"""Is a response right? The grader of all scripts, the problems they ask, and how a final answer is read.

A problem is {"id", "question", "answer"}; its answer is the gold. Stage 1, Stage 2 and evaluation all call
`reward`. With two graders V* would be the value of one reward, and the policy would be trained on another.

What a model wrote is untrusted text. A small parser reads it; nothing is ever evaluated as code.

    python rewards.py 'so \\boxed{\\frac12}' 0.5        how both sides are read, or why not, and the verdict
"""

import hashlib
import json
import math
import operator
import os
import random
import re
import runpy
import sys
import threading
import unicodedata
from fractions import Fraction
from functools import lru_cache
from itertools import chain, pairwise, product
from pathlib import Path
from typing import NamedTuple

import mpmath
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------------------
# the grader


def reward(response, answer, finished):
    """1.0 if the response ends in the answer, else 0.0. One that was cut off before EOS earns 0."""
    found = final_answers(response) if finished else []
    # a gold that is a list may be answered in several boxes, one for each item
    for count in (1, len(read(answer).items)):
        if 0 < count <= len(found) and is_correct(", ".join(found[-count:]), answer):
            return 1.0
    return 0.0


@lru_cache  # a file is read once: a batch should not be graded by what was edited since
def load_reward(named):
    """'FILE.py:FUNCTION' → that function of (response, problem, finished), and a hash of its code.

    None → the one above.
    """
    path, _, name = (named or f"{__file__}:reward").rpartition(":")
    if not path:
        fail(f"--reward {named}: which function of it? It should be FILE.py:FUNCTION")
    try:  # not an import, which may take a .pyc for an edited file
        code = hashlib.blake2b(Path(path).read_bytes() + name.encode(), digest_size=8).hexdigest()
        functions = runpy.run_path(path, run_name="custom_reward") if named else {}
    except (Exception, SystemExit) as error:  # the user's own code
        fail(f"--reward {named}, which should be FILE.py:FUNCTION: {type(error).__name__}: {error}")
    if named is None:
        return lambda response, problem, finished: reward(response, problem["answer"], finished), code
    if name not in functions:
        fail(f"--reward {named}: no function {name!r} in it")
    return functions[name], code


def final_answers(text):
    """The contents of each \\boxed{…} behind the last ####; without such a box, the line behind ####.

    The last one is what the response claims. Nothing else counts: a grader that takes any number in the text
    pays the policy for babbling. One pass over the text, however it is nested.
    """
    _, hashes, text = text.rsplit("</think>", 1)[-1].rpartition("####")
    text = re.sub(r"(\\f?boxed +)(?!\\f?boxed)([^\s{$][^\s$]*)", r"\1{\2 }", text)  # \boxed 5
    boxes, opened = [], []  # where each box begins and ends; the opening braces that wait for their }
    for brace in re.finditer(r"(\\f?boxed\s*)?(?<!\\)\{|(?<!\\)\}", text):
        if brace[0] != "}":
            opened.append(brace)
        elif opened and (box := opened.pop())[1]:
            boxes.append((box.end(), brace.start()))
    if hashes and not boxes:
        return [text.strip().partition("\n")[0].strip()]
    last = sorted(boxes)[-MOST_ITEMS:]
    return [text[start:end].strip() for start, end in last]


def is_correct(claim, gold):
    r"""Does the claim say what the gold says? A ladder: the first rung that can tell decides.

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
        with LOCK:
            if same_items(claim.items, gold.items):
                return True
            if claim.unit == gold.unit:
                return False
            with_unit, other = (claim, gold) if claim.unit else (gold, claim)
            (scale,) = read(SCALES[with_unit.unit]).items
            scaled = [("*", scale, meant(tree)[-1]) for tree in with_unit.items]
            return same_items(scaled, other.items)
    except REFUSALS:
        return False


# ------------------------------------------------------------------------------------------------------------
# problems and prompts

# the authors' two templates
BOXED = "{question} Let's think step by step and output the final answer within \\boxed{}."
GSM8K = '{question} Let\'s think step by step and output the final answer after "####".'

DATASETS = {  # name: hub id, config, its only split (None: the split that was asked for), question, answer
    "gsm8k": ("openai/gsm8k", "main", None, "question", "answer"),
    "math": ("DigitalLearningGmbH/MATH-lighteval", None, None, "problem", "solution"),
    "math500": ("HuggingFaceH4/MATH-500", None, "test", "problem", "answer"),
    "aime24": ("HuggingFaceH4/aime_2024", None, "train", "problem", "answer"),
    "aime25": ("MathArena/aime_2025", None, "train", "problem", "answer"),
    "amc23": ("math-ai/amc23", None, "test", "question", "answer"),
    "minerva": ("math-ai/minervamath", None, "test", "question", "answer"),
    "olympiad": ("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train", "question", "final_answer"),
    "hmmt25": ("MathArena/hmmt_feb_2025", None, "train", "problem", "answer"),
}


def load_problems(
        source, split="train", question_field="question", answer_field="answer", custom_reward=None):
    """A .jsonl, .json or .parquet file, a name in DATASETS, or any hub id → [{"id", "question", "answer"}].

    Other fields stay, for --prompt and --reward, but those that Stage 1 writes. A `custom_reward` may need no
    answer.
    """
    path, problems = Path(source), {}
    try:
        if path.suffix in (".jsonl", ".json", ".parquet"):
            name, first, rows = path.stem, 1, file_rows(path)
        elif source in DATASETS or source.count("/") == 1 and not path.is_file():
            import datasets

            default = (source, None, None, question_field, answer_field)
            hub_id, config, only_split, question_field, answer_field = DATASETS.get(source, default)
            split = only_split or split
            rows = datasets.load_dataset(hub_id, config, split=split)
            name, first = f"{source}/{split}", 0
        else:
            fail(f"unknown data set {source!r}: give a .jsonl, .json or .parquet file, "
                 f"a hub id (owner/name), or one of {', '.join(DATASETS)}")
    except Exception as error:  # files and hubs fail in a dozen libraries' ways; the user needs the reason
        fail(f"cannot load {source}: {type(error).__name__}: {str(error)[:300]}")
    for number, row in enumerate(rows, first):
        where = f"{source}, {'line' if isinstance(row, str) else 'row'} {number}"
        if isinstance(row, str):  # a line of a .jsonl
            if not row.strip():
                continue
            try:
                row = json.loads(row)
            except (ValueError, RecursionError) as error:
                fail(f"{where}: not JSON ({error})")
        if not isinstance(row, dict):
            fail(f'{where}: not an object like {{"id": …, "question": …, "answer": …}}')
        question = text_of(row, question_field, where)
        lacks = custom_reward and answer_field == "answer" and row.get("answer") in (None, "")
        hint = "" if custom_reward else "; or did you mean to give a --reward?"
        answer = "" if lacks else text_of(row, answer_field, where, hint)
        key = str(row.get("id", f"{name}/{number}"))
        if key in problems:
            fail(f"{where}: the id {key!r} was used before")
        # the answer field of GSM8K and MATH holds a whole solution: the gold is its final answer
        gold = ["", *final_answers(answer)][-1] or answer.strip()
        # as JSON has them, so that both stages' rewards see the same: a file of Stage 1 lies between
        fields = json.loads(json.dumps(row, default=str))
        for field in ("rewards", "vstar", "lengths", "finished", "responses", "graded_by"):
            fields.pop(field, None)
        problems[key] = {**fields, "id": key, "question": question, "answer": gold}
    if not problems:
        fail(f"{source}: no problems in it")
    return list(problems.values())


def file_rows(path):
    """The rows of a file. Those of a .jsonl are its lines as they are, so that an error can name one."""
    if path.suffix == ".parquet":
        import pyarrow.parquet  # comes with datasets

        return pyarrow.parquet.read_table(path).to_pylist()
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        return text.split("\n")
    content = json.loads(text)
    return content if isinstance(content, list) else [content]


def text_of(row, field, where, hint=""):
    """A field of a row as text. A row without it ends the run."""
    content = row.get(field)
    if isinstance(content, list):  # OlympiadBench keeps a list of final answers
        content = ", ".join(map(str, content))
    if content is None or not str(content).strip():
        fail(f"{where}: no {field!r} (the row has: {', '.join(map(str, row)) or 'nothing'}){hint}")
    return str(content)


def fill(template, problem, flag="--prompt"):
    """{field} in `template` is a field of the problem; other braces stand for themselves."""

    def field(match):
        if problem.get(match[1]) is None:  # so the hub fills what a row lacks
            fail(f"{flag}: problem {problem['id']} has no field {match[1]!r} "
                 f"(it has: {', '.join(problem)})")
        return str(problem[match[1]])

    text, fields = re.subn(r"\{([A-Za-z_]\w*)\}", field, template)
    if not fields:
        fail(f"{flag} {template!r}: it is the same for all problems, "
             "for it has no field in braces such as {question}")
    return text


def make_prompt(tokenizer, problem, template, chat, chat_args=None):
    """The text that the policy continues: plain for base models, for chat models in the tokenizer's
    template."""
    text = fill(template, problem)
    if not chat:
        if chat_args:
            fail("--chat_args: they are for the template that --chat asks in")
        return text
    if not tokenizer.chat_template:
        fail("--chat: this tokenizer has no chat template")
    message = {"role": "user", "content": text}
    try:
        return tokenizer.apply_chat_template(
            [message], tokenize=False, add_generation_prompt=True, **(chat_args or {}))
    except Exception as error:  # the template is the model's, the arguments are the user's
        fail(f"--chat: its template fails with --chat_args {json.dumps(chat_args)}: "
             f"{type(error).__name__}: {error}")


def encode(tokenizer, prompt, chat):
    """Prompt → tokens, the same way in all scripts. A template writes its own BOS; plain text gets one."""
    return tokenizer(prompt, add_special_tokens=not chat)["input_ids"]


def fail(message):
    """End on an error that the user can mend: one line that says what and where, exit code 2."""
    line = " ".join(str(message).split())
    tqdm.write("error: " + readable(line), file=sys.stderr)  # not into the middle of a progress bar
    raise SystemExit(2)


def readable(text):
    """The text of a model or data set may hold a terminal's codes."""
    return "".join(c if c.isprintable() or c == "\n" else "�" for c in text)


# ------------------------------------------------------------------------------------------------------------
# how an answer is read: spelled in one way, split from its unit, cut into tokens, parsed into trees
#
# Every size is bounded before anything is computed. What cannot be read is compared as text.

LONGEST = 400  # characters; the benchmarks' longest gold has 210
DEEPEST = 38  # levels of nesting
MOST_ITEMS = 99  # of a list
MOST_CHOICES = 5  # the ± of a text
DIGITS = 60  # of a number
FACTORIAL = 200  # the n of n!
BITS = 10_000  # of a result, before its point and, if it is exact, behind it


class Unreadable(ValueError):
    """Not mathematics that the parser knows, or too large."""


# Unreadable is a ValueError; the last two come from a letter, or an i, where only a number will do
REFUSALS = (ValueError, ArithmeticError, RecursionError, LookupError, TypeError)


class Reading(NamedTuple):
    text: str  # in one spelling and without its unit
    items: list  # a tree for each item of a list, mostly one; [] where there is only text
    unit: str  # 'cm', 'degree', '%', …; '' where there is none
    trouble: str = ""  # why there is only text


# marks for the next steps: \034 and \035 are the ends of \text{…}, and space to \s; \003 is a \\, \004 a \$
SIGNS = str.maketrans("−⁻–—×·⋅∗÷⁄’′∶", "----****//'':") | str.maketrans(dict(zip(
    "π∞°θαβ√≤≥≠∪∩±∈≈½¼¾″\u200b",
    r"\pi |\infty |^\circ |\theta |\alpha |\beta | sqrt |\le |\ge |\ne |\cup |\cap |\pm |\in |\approx |"
    " 1/2| 1/4| 3/4|''|".split("|"))))
FUNCTIONS = """arcsinh arccosh arctanh arcsin arccos arctan sinh cosh tanh sin cos tan sec csc cot
log exp ln""".split()
TRIG, NAMES = "sin|cos|tan|cot|sec|csc", "|".join(FUNCTIONS)
INTEGER = r"([a-zA-Z])\s*\\in\s*(?:\\mathbb\s*)?\{?Z\}?"
WORDS = (  # what is counted; but three hundreds are not 3
    r"(?![a-z]*(?:less|gross|eds|ands|lions|zens|tens|scores|halves|thirds|quarters|(?<!pa)ths)\b)"
    r"([a-z]{3,}s|men|women|children|mice)")
SPELLINGS = [(re.compile(pattern), spelling) for pattern, spelling in [
    (r"[\s.,;]+$|^\s+", ""),
    (r"^\{((?:[^{}]|\{[^{}]*\})*)\}$", r"\1"),  # {5}
    (r"\{,\}(?!\d{3}(?!\d))", "."),  # 3{,}5
    (r",\s*\\!\s*|\{,\}", ","),  # 11,\! 111, 1{,}234
    (r"\\\\", r"\003"),  # out of the way: the second \ of a \\ is not the \ of a \, or a \;
    (r"\\%", "%"),
    (r"\\\$", r"\004"),  # the dollars that are left stand around formulas
    (r"(?<=\d\.)\(\d+\)", r"?\g<0>"),  # 0.(3) is no product
    (r"\$|\\[!,]", ""),
    (r"\\(?:left|right|middle|[bB]igg?[lr]?|displaystyle|limits|q?quad)(?![a-zA-Z])|\\[;:> ()\[\]~]|~", " "),
    (r"\003", r"\\\\"),
    (r"\\[dtc](frac|binom)(?![a-zA-Z])", r"\\\1"),
    (r"\\frac\s*(\d)(\d)(?=\d)", r"\\frac{\1}{\2}"),  # \frac123 is \frac{1}{2}3
    (r"\\f?boxed\s*\{", "{"),  # a box in a box
    (r"^([-+]?\d+),(?=0\d+(?![\d.,]))(?!\d{3}(?!\d))", r"\1."),  # 0,05 is no list
    (r"\\in\s*\\math(?:bf|rm)\s*\{([RZNQ])\}", r"\\in \\mathbb{\1}"),
    (r"\{([^{}]*)\\choose([^{}]*)\}|^([^{}]*)\\choose([^{}]*)$", r"\\binom{\1\3}{\2\4}"),
    (r"\\(?:text(?:rm|bf|it|normal)?|math(?:rm|bf|it)|mbox|rm|operatorname)\s*\{([^{}]*)\}", r"\034\1\035"),
    (r"(?<![\d.,])(\d{1,3}) (?=(?:\d{3} )*\d{3}(?![\d/]))", r"\1"),  # 10 000
    (r"\s*\b(?:per ?cent(?:age)?|pct)\b\s*", "%"),
    (r"(1(?=\W*st)|2(?=\W*nd)|3(?=\W*rd)|\d(?=\W*th))[\s^{]*..\b\s*\}?", r"\1"),  # 7^{\text{th}}
    (r"\\(?:text)?circled\s*\{(\d+)\}", r"\1"),
    (r"\s*\binfinite(?:ly many)?(?: solutions?| values| points)?\s*$", r"\\infty"),
    (rf"\034\s*(max|min|lg|{NAMES})\s*\035", r"\\\1 "),
    (r"\\lg(?![a-z])", r"\\log_{10}"),
    (r"_\{(?=max|min)", r"_{\\"),
    (r"\^\s*\{?\s*\\prime\s*\}?", "'"),
    (r"(?<=\b[fgh])\^\s*\{\s*-\s*1\s*\}(?=\s*\()", "_{-1}"),  # f^{-1} is a name
    (r"\^\s*\{?\s*\\circ\s*\}?", r"\\degree "),
    (r"\\degree\s*([CF])\s*$", r"\034\1\035"),  # °C
    # 30^\circ 15' 36''
    (r"""(\d+)\s*\\degree\s*(\d+)\s*'(?:\s*(\d+)\s*(?:''|"))?(?!')""", r"(\1+\2/60+0\3/3600)\\degree"),
    *[(rf"((?:{TRIG})[^,=]*?)\s*\\degree", r"\1\\frac{\\pi}{180}")] * 2,  # \sin 30^\circ, and a second in it
    (r"\\degree\s*(?=[,)\]<>+=-]|\\[lg]|[kmn]\b|and\b|or\b)", ""),  # 0^\circ < x < 90^\circ
    (r"\bsq(?:uare)?\b\.?\s*(\w+\s*)$", r"\1^2"),  # 5 square cm
    (r"\bcu(?:bic)?\b\.?\s*(\w+\s*)$", r"\1^3"),
    (r"\\langle(.*?)\\rangle", r"(\1)"),
    (r"^\\lim(?![a-z])[^=]*=(?=[^=]*$)", ""),  # \lim_{x \to 0} f(x) = 1
    (r"([\w.]+)\s*:\s*([\w.]+)\s*:\s*([\w.]+)", r"(\1,\2,\3)"),  # 1:2:3
    (r"([a-zA-Z]{3,})\s*:\s*", r"\1="),  # Largest: 5
    (r"\[(?=\s*-\s*\\infty)|(?<=\\infty)\s*\]", "?"),  # no number is infinite
    (r"\s*\bis any?(?: arbitrary)? integer\b\s*", r"\\in Z"),
    (r"\b(?:(?:any?|all|every|each)\s+)?integers?\s+([a-zA-Z])\b", r"\1\\in Z"),
    # \{2k \mid k \in Z\}
    (rf"\\\{{(?:\s*\w\s*(?:\\mid|[|:]))?(.*?)(?:\\mid|[|:,])\s*({INTEGER})\s*\\\}}$", r"\1,\2"),
    # \{x \in R : x > 2\}
    (r"\\\{\s*\w\s*(?:\\in\s*(?:\\mathbb\s*)?\{?R\}?)?\s*(?:\\mid|:|\|)", r"\\{\\mid "),
    (r"\\mathbb\s*(?:R\b|\{R\})", r"(-\\infty,\\infty)"),
    (r"(\(-\\infty,\\infty\))\s*(?:-|/|\\backslash)\s*(?=\\\{)", r"\1\\setminus "),
    (r"\|\s*\\[vo]\w+\s*\{(\w\w)\}\s*\|", r"|\1|"),  # |\vec{AB}|
    (r"(?<![\w\\])([A-Z])\s*(?=\([^()=]*,[^()=]*\)\s*(?:,|$))", r"\1="),  # A(1,2)
    (r"\\(?:land|wedge)(?![a-z])|\s*\band\b\s*", ","),
    (r"\\(?:lor|vee)(?![a-z])|\s*\bor\b\s*", "∨"),
    (rf"(\d+)\s*{WORDS}(?=\s*,)|(?<=,)\s*(\d+)\s*{WORDS}\s*$", r"\2\4=\1\3"),  # 3 apples, 5 pears
    (r"^[ \n]*(?:\\approx|=)|\\+$|[ \n.,;]+$|^[ \n]+", ""),
]]
# a condition that takes nothing from the answer before it; there, and in f(x) = …, a letter may have any name
TAIL = re.compile(
    r"(?<=[\w)}\]\035'!])[\s,;(]*(?:"
    rf"(?:\b(?:where|with|for)\b[^=<>\d\\]*?|(?<=[,;(])|\\forall)\s*"
    rf"(?:{INTEGER}|[a-zA-Z]\s*\\in\s*(?:\(-\\infty,\\infty\)|R))[\s)]*"
    r"|\b(?:where|for (?:all|any|some|every|each))\b(?!.*\b(?:odd|even)\b)[^=<>\d\\]*)$")
HEAD = re.compile(r"\s*[a-zA-Z](?:_\{?-?\w\}?|')*\s*\(\s*([a-z])\s*\)\s*=(?=.*\1)")
MONEY = {"\x04": "dollar", "€": "euro", "£": "lb"}
# a unit a line, and its other names
UNITS = {name: names.split(", ")[0] for names in """\
cm, centimeter, centimetre
mm, millimeter, millimetre
m, meter, metre
km, kilometer, kilometre
in, inch
ft, foot, feet
yd, yard
mi, mile
g, gram
kg, kilogram
mg, milligram
lb, pound
oz, ounce
s, sec, second
min, minute
h, hr, hour
year, yr
L, l, liter, litre
ml, mL, milliliter
gallon, gal
dollar, USD
degree, deg
radian, rad
mph, mile per hour, miles per hour
km/h, kmh
J, joule
N, newton
W, watt
V, volt
person, people""".splitlines() for name in names.split(", ")}
MORE_UNITS = """day week month quart cup cent euro m/s cm/s ft/s kJ eV A K C F Hz Pa mol unit student apple
marble book way point time side edge face block page ticket coin""".split()
UNIT = "|".join([*UNITS, *MORE_UNITS])
UNIT = rf"({UNIT})(?:(?<=\w\w)e?s)?"
UNIT_AT_END = re.compile(
    # (?<=[\s\S]) wants something before the unit: a lone cm is no number
    r"\s*(?:\\(degree)\s*|(%)"
    rf"|(?<=[\s\S])(?:\034\s*{UNIT}\.?\s*\035"  # in \text{{…}}
    rf"|(?<=[\d\s}}])(?=[\w/]{{3}}|cm|mm|km|kg|mg|ft|lb|oz|hr){UNIT}\.?"  # bare: but the m of 5m is a letter
    rf"|(?<=\d)\s*{WORDS}\s*)"
    r"\s*(?:\^\s*\{?([23])\}?)?)$")
# no formula, and three letters in a row, four beside a number, that name no function
WORDS_ALONE = re.compile(
    r"(?!.*[\\^_=<>+*/|])(?:(?!.*\d)|(?=.*[a-zA-Z]{4}|.*\034\s*[a-zA-Z]{2}))"
    rf".*(?:(?<![a-zA-Z])(?!{TRIG}|log|exp|sqrt|arc|pi|inf|ln)[a-zA-Z]{{3}}|\034)", re.DOTALL)


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
    plain = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text).replace("∨", ",")
    plain = re.sub(r"\{([a-zA-Z0-9])\}", r"\1", plain)  # x_{5} is x_5
    items, trouble = [], ""
    if re.fullmatch(r"[(\s]+[A-Za-j][)\s]+|[a-dA-D]\)?", text):
        plain = plain.strip("()").upper()  # the letter of a choice
    elif WORDS_ALONE.match(text):
        plain, trouble = plain.casefold(), "it is words"
    if not trouble:
        try:
            items = all_items(text, (bound or HEAD.match(text) or " " * 2)[1])
        except REFUSALS as error:
            trouble = str(error)
    if re.search(r"(?<![\\a-zA-Z])[a-zA-Z][a-z]{3}|\034\s*[a-zA-Z]{2}", text):
        plain = plain.casefold()
    return Reading(plain, items, unit, trouble)


def respell(text):
    """One spelling where LaTeX, Unicode and people have several."""
    text = re.sub("[⁻⁰¹²³⁴-⁹]+", r"^{\g<0>}", re.sub("[₀-₉]+", r"_{\g<0>}", text))
    text = re.sub(r"(?<=[①-⑨])\s*(?=[①-⑨])", ",", text)
    text = unicodedata.normalize("NFKC", text.translate(SIGNS))  # NFKC: fullwidth digits
    if text.count("}") > text.count("{"):  # 5}
        text = text.strip().removesuffix("}")
    for pattern, spelling in SPELLINGS:
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


# ------------------------------------------------------------------------------------------------------------
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
#     relation                 its signs, then its sides        a < b \le c        same_relations or same_sets
#     \pm                      two                              1 \pm 2            its two `choices`
#
# A matrix is a tuple of tuples with the brackets \\ and &, and 1011_2 is (1011, 2) with the brackets __.

GREEK = """alpha beta gamma delta epsilon varepsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma
tau phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell hbar min max angle
triangle""".split()
TOKEN = re.compile(
    r"\d{1,3}(?:,\d{3})+(?![\d,])(?:\.\d+)?|\d+\.?\d*(?:[eE][+-]?\d{1,4})?|\.\d+"  # 1,234.5   8.7e8   .5
    r"|\\(?:begin|end)\{(?:[pbv]?matrix|smallmatrix|array)\}"
    r"|\\(?:overline|vec|hat|bar|widehat|overrightarrow|math\w+|boldsymbol)\s*\{\w+\}"
    r"|\\\\|\\[a-zA-Z]+|\\[{}|]"
    rf"|{NAMES}|sqrt|pi|infinity|inf"
    r"|<=|>=|!=|\*\*|\S")
COMMANDS = """infty=infinity inf=infinity cdot=* times=* div=/ in=∈ lvert=| rvert=| vert=| |=| lt=< gt=> ne=!=
neq=!= le=<= leq=<= leqslant=<= ge=>= geq=>= geqslant=>= approx== varnothing=emptyset""".split()
TOKENS = {  # another way to write a token: as the parser knows it
    ";": ",", ":": "/", "**": "^", "inf": "infinity",
    **{"\\" + name: name for name in FUNCTIONS + GREEK},
    **dict(("\\" + command).split("=", 1) for command in COMMANDS),
}
ZERO, INFINITY = ("number", Fraction(0)), ("variable", "infinity")
EQUATION = ("relation", ("=",))  # how a tree begins that is one
SUMS = dict.fromkeys(["+", "-", "\\pm", "\\mp", "\\cup", "\\cap", "\\setminus"], 1)
FACTORS = ("(", "[", "\\frac", "\\sqrt", "\\binom", "\\lfloor", "\\lceil")
BINDS = SUMS | {"*": 2, "/": 2, "!": 3, "^": 3}  # how strongly a sign binds


def all_items(text, letter):
    """The items of a list. Each ± goes its own way, but where there is a ∓, all go together."""
    if text.count("\\pm") > MOST_CHOICES:
        raise Unreadable("too many ±")
    ways = [("+", "-"), ("-", "+")] if "\\mp" in text else [("+-", "")]
    parser, items = Parser(text, letter), []
    for item in parser.items():
        items += dict.fromkeys(tree for way in ways for tree in choices(item, *way))
    parser.expect("")
    return items


def choices(tree, plus_minus, minus_plus):
    """A tree for each choice of its ±: (1, ±2) is (1, 2), (1, -2). But a set has all of them as members."""
    if tree is ZERO or not isinstance(tree, tuple):  # that of a sign stays the same object
        return [tree]
    kind, *members = tree
    parts = [choices(member, plus_minus, minus_plus) for member in members]
    if kind == "set":
        return [("set", *chain(*parts))]
    kinds = {"\\pm": plus_minus, "\\mp": minus_plus}.get(kind, [kind])
    return [*product(kinds, *parts)]


class Parser:
    r"""Recursive descent: a method for each rule of the grammar. […] may be missing, {…} may be repeated.

        items     relation {"," relation}
        relation  sum {("=" | "<" | "<=" | "∈" | …) sum}
        sum       ["+" | "-" | "±"] product {("+" | "-" | "±" | "∪" | "∩" | "∖") product}
        product   power {("*" | "/") ["-"] power | power}     2x is a product, 1\frac12 is a mixed number
        power     atom {"!" | "^" argument}
        argument  ["-"] atom                                  of a number only the first digit: \frac12 is 1/2
        atom      number | bracket | function | matrix | symbol
        number    digits ["_" argument]                       1011_2 is a number to the base 2
        bracket   ("(" | "[" | "{" | "\{" ["\mid"]) items (")" | "]" | "}" | "\}")
        function  name {"^" argument | "_" argument} (bracket | product)
        matrix    \begin{…} relation {("&" | "\\") relation} \end{…}
        symbol    \frac argument argument | \sqrt ["[" sum "]"] argument | "|" sum "|" | …

    Sums, products and powers are one method, `formula`.
    """

    def __init__(self, text, letter):
        """The letter, if any, may have any name, so it is an iota."""
        self.tokens, brackets, names = [], 0, {**TOKENS, letter: "iota"}
        for token in TOKEN.findall(text):
            brackets += (token in ("(", "[", "\\{")) - (token in (")", "]", "\\}"))
            if "," in token[1:]:  # 1,234 is a number, but (1,234) is a pair and 1,23 a list
                self.tokens += re.split("(,)", token) if brackets else [token.replace(",", "")]
            else:
                self.tokens.append(names.get(token, token))
        self.tokens.append("")  # the end
        self.position = self.depth = 0

    @property
    def next(self):
        return self.tokens[self.position]

    def take(self, *wanted):
        """Takes the next token and returns it, if it is wanted; else returns "". take() takes any."""
        token = self.next
        if wanted and token not in wanted:
            return ""
        if not token:
            raise Unreadable("it ends too early")
        self.position += 1
        return token

    def expect(self, wanted):
        if self.next != wanted:
            raise Unreadable(f"{self.next or 'the end'!r} where {wanted or 'the end'!r} should be")
        self.position += 1

    def items(self):
        items = [self.relation()]
        while self.take(",", "∨"):
            items.append(self.relation())
        if len(items) > MOST_ITEMS:
            raise Unreadable(f"more than {MOST_ITEMS} items")
        return items

    def relation(self):
        sides, signs = [self.formula()], ()
        while sign := self.take("=", "<", ">", "<=", ">=", "!=", "∈"):
            signs += (sign,)
            sides.append(self.formula())
        if signs and set(signs) <= {">", ">="}:  # it is written from left to right
            signs = tuple(sign.replace(">", "<") for sign in reversed(signs))
            sides.reverse()
        if {*signs} == {"="}:
            signs = ("=",)
            if is_label(sides[-1]) and not variables(sides[0]):  # 5 = x
                sides.reverse()
        if signs == ("∈",) and is_label(sides[0]):
            return sides[1]
        if not signs:
            return sides[0]
        tree = ("relation", signs, *sides)
        if signs != ("=",) and self.take("∨"):  # x < 1 or x > 2 is one set; x = 1 or x = 2 is a list
            return ("\\cup", tree, self.relation())
        return tree

    def formula(self, level=1):
        """A sum (level 1), a product (2) or a power (3): all signs that bind at least so strongly."""
        if level != 2 and (sign := self.take("+", "-", "\\pm", "\\mp")):  # 2*-3, but not 2+-3
            tree = (sign, ZERO, self.formula(max(level, 2)))
        else:
            tree = self.atom()
        while (strength := BINDS.get(self.next, 2 * self.starts_factor())) >= level:
            sign = self.take(*BINDS)
            if not sign:
                tree = self.times_factor(tree)
            elif sign == "!":
                tree = ("!", tree)
            elif sign == "^":
                tree = ("^", tree, self.argument())
                if self.next == "^":
                    raise Unreadable("a power of a power without brackets")
            else:
                tree = (sign, tree, self.formula(strength + 1))
        return tree

    def starts_factor(self):
        if "{" in self.next:  # \vec{a}
            return "\\end" not in self.next
        return self.next[:1].isalnum() or self.next in FACTORS

    def times_factor(self, tree):
        """A product without a sign, or a mixed number."""
        number, fraction = tree[0] == "number", self.next == "\\frac"
        if number and self.next[0].isdigit():  # 3 1/2; and 3 1 is nothing
            above = self.formula(3)
            self.expect("/")
            return ("+", tree, ("/", above, self.formula(3)))
        factor = self.formula(3)
        if number and fraction and tree[1].denominator == 1:
            match factor:
                case ("/", ("number", *_), ("number", *_)):  # 1\frac{1}{2} is 3/2, but 2\frac{a}{b} a product
                    return ("+", tree, factor)
        return ("*", tree, factor)

    def argument(self):
        if self.take("-"):
            return ("-", ZERO, self.argument())
        # LaTeX takes one digit: \frac12, \frac{1}2, \sqrt23
        before, token = self.tokens[self.position - 1 : self.position + 1]
        if len(token) > 1 and token.isdigit() and before in ("\\frac", "\\sqrt", "}"):
            self.tokens[self.position : self.position + 1] = token[0], token[1:]
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
        if len(token) > DIGITS:
            raise Unreadable("a number of too many digits")
        number = ("number", Fraction(token))
        if "." in token and "e" not in token.lower():
            number += (token,)  # a decimal remembers its digits, for `rounded`
        return ("tuple", "__", number, self.argument()) if self.take("_") else number

    def bracket(self, opened):
        kind = "where" if self.take("\\mid") else "set"
        items = [] if opened + self.next == "\\{\\}" else self.items()
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
                degree = self.formula()
                self.expect("]")
            return ("root", self.argument(), degree)
        if token in ("|", "\\lfloor", "\\lceil"):
            tree = self.formula()
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
        marks = {}
        while mark := self.take("^", "_"):
            marks[mark] = self.argument()
        if self.next in ("(", "{", "|", "["):
            argument = self.atom()
        else:  # \sin 2x takes the product behind it
            argument = self.formula(3)
            while self.starts_factor() and self.next not in FUNCTIONS:
                argument = ("*", argument, self.formula(3))
        if marks.get("^") == ("-", ZERO, ("number", Fraction(1))):  # \sin^{-1} is arcsin
            name = "arc" + name
            del marks["^"]
        tree = (name, argument)
        if "_" in marks:
            tree = ("/", ("ln", argument), ("ln", marks["_"]))
        return ("^", tree, marks["^"]) if "^" in marks else tree

    def matrix(self, begin):
        end = begin.replace("begin", "end")
        if "array" in begin and self.take("{"):
            while self.take() != "}":
                pass
        rows = [()]
        while not self.take(end):
            if self.take("\\\\"):
                rows.append(())
            else:
                rows[-1] += (self.relation(),)
                self.take("&")
        rows = [row for row in rows if row]  # a \\ at the end begins none
        if {*map(len, rows)} == {1}:  # a column
            return ("tuple", "()", *chain(*rows))
        return ("tuple", "\\\\", *[("tuple", "&", *row) for row in rows])


# ------------------------------------------------------------------------------------------------------------
# from trees to a verdict


def same_items(one, other):
    """Lists of solutions are equal in any order, but p = 2, q = 3 is 2, 3 or (2, 3) in this one."""
    one, other = solutions(one, other), solutions(other, one)
    names = named(one), named(other)
    if min(names) < 1 < max(names):
        one, other = in_order(one), in_order(other)
    left = list(other)
    for tree in one:
        partner = next((candidate for candidate in left if same(tree, candidate)), None)
        if not partner:
            return False
        left.remove(partner)
    return not left


def solutions(items, others):
    r"""\{1, 2\} is the list 1, 2, and (p, q) = (2, 3) the list p = 2, q = 3. x < 1, x > 2 is one set."""
    match items:
        case [("set", *members)]:
            return members
        case [("relation", ("=",), ("tuple", "()", *names), ("tuple", "()", *numbers))]:
            if len(others) > 1:
                return [("relation", ("=",), *pair) for pair in zip(names, numbers)]
        case [("relation", ("!=",), name, _) as first, _, *_] if not any(map(variables, items[1:])):
            return [("where", first, *[("relation", ("!=",), name, tree) for tree in items[1:]])]  # x ≠ -2, 2
        case [("relation", *_), _, *_]:
            kinds = {tree[:2] for tree in items}
            letters = variables(("where", *items, *others)) - {"infinity"}
            if len(letters) == 1 and {kind for kind, _ in kinds} == {"relation"} and kinds != {EQUATION}:
                return [("where", *items)]
    return items


def named(items):
    """Of how many names does a list say what they are?"""
    return len({tree[2] for tree in items if tree[:2] == EQUATION and is_label(tree[2])})


def in_order(items):
    """As one tuple: by the alphabet if letters name its parts, else as it is written."""
    if named(items):
        items = sorted(items, key=lambda tree: tree[2][1] * (len(tree[2]) == 2))
    if len(items) < 2:
        return items
    return [("tuple", "()", *(meant(tree)[-1] for tree in items))]


def same(one, other):
    """Do two trees mean the same?"""
    kinds = {one[0], other[0]}
    if kinds > {"relation"} and EQUATION in (one[:2], other[:2]):
        pairs = product(meant(one), meant(other))
        return any(same(a, b) for a, b in pairs if (a, b) != (one, other))
    if kinds & SETS.keys() or kinds > {"relation"}:
        return same_sets(one, other)
    if "tuple" in kinds:  # the brackets count: (0,1) is not [0,1]
        return same_parts(one, other)
    if kinds == {"relation"}:
        return same_relations(one, other)
    # two formulas are the same if they have the same variables and the same values
    names, others = variables(one), variables(other)
    renamed = names ^ others
    if renamed and (len(renamed) != 2 or "iota" not in renamed):
        return False
    if names:
        return all(near(*pair) for pair in at_points(one, other, names & others, renamed))
    if near(value(one), value(other), 1e-40):
        return True
    return rounded(one, other) or rounded(other, one)


def same_parts(one, other):
    alike_so_far = one[:2] == other[:2] and len(one) == len(other)
    return alike_so_far and all(map(same, one[2:], other[2:]))


def same_relations(one, other):
    names = variables(one)
    if names != variables(other):
        return False
    if same_parts(one, other):
        return True
    if one[1] == other[1] and names:
        # 4x + 2y = 6 is 3 = y + 2x: the differences of their sides are in proportion, at every point the same
        pairs = [*at_points(("-", *one[2:]), ("-", *other[2:]), names)]
        first, second = pairs[0]
        if abs(first) > 1e-6 < abs(second):  # 0 = 0 is in proportion to nothing
            upright = one[1] == ("=",) or first.real * second.real > 0  # x < 1 is not x > 1
            if upright and all(near(a * second, b * first) for a, b in pairs):
                return True
    return ("=",) not in (one[1], other[1]) and len(names) == 1 and same_sets(one, other)


SETS = {  # a set of numbers: which of some points are in it, from those that are in its members
    "\\cup": set.union, "\\cap": set.intersection, "\\setminus": set.difference, "set": set.union,
    # conditions hold together, x > 0, x ≠ 1, or, if they never can, one of them holds: x < 0, x > 1
    "where": lambda *members: set.intersection(*members) or set.union(*members),
}
HOLDS = {
    "<": operator.lt, "<=": operator.le,
    "=": operator.eq, "!=": operator.ne,
}


def same_sets(one, other):
    """By their members; or by the numbers at which they begin and end, and one between each two of these."""
    if one[0] == other[0] == "set":
        return same_items(one[1:], other[1:])
    # a letter is some number, and infinity a large one
    letters = enumerate(sorted(variables(one) | variables(other)))
    env = CONSTANTS | {letter: 1.618 * 1.37**n for n, letter in letters} | {"infinity": 1e12}
    ends = {-1e12, 1e12}

    def inside(tree, points):
        """Those of the points that are in a set of numbers."""
        kind, *members = tree
        if kind in SETS:
            return SETS[kind](*(inside(member, points) for member in members))
        signs, index = ["="], 0  # a number is what is = it
        if kind == "relation":
            signs, *members = members
            labels = [*map(is_label, members)]
            index = labels[1] or labels.index(True)  # the y of a < y < b
            del members[index]
        elif kind == "tuple":
            brackets, low, high = members  # low < x <= high
            signs = ["<" if bracket in "()" else "<=" for bracket in brackets]
            members, index = [low, high], 1
        else:
            members = [tree]
        numbers = [round(complex(value(member, env)).real, 9) for member in members]
        ends.update(numbers)

        def holds(x):
            sides = [*numbers[:index], x, *numbers[index:]]
            return all(HOLDS[sign](*pair) for sign, pair in zip(signs, pairwise(sides)))

        return set(filter(holds, points))

    inside(one, ()), inside(other, ())  # they collect the ends
    points = {(a + b) / 2 for a, b in pairwise(sorted(ends))}
    points |= ends - {-1e12, 1e12}
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
    """5 of x = 5, 2x of f(x) = 2x, 9 of A = 3 * 3 = 9; √5 and 2.236 of √5 ≈ 2.236. Another tree stays so."""
    if tree[:2] == EQUATION:
        labelled = is_label(tree[2])
        sides = tree[2 + labelled :]
        if all(same(a, b) or rounded(b, a, 1) for a, b in pairwise(sides)):
            return sides
        if labelled:
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
        env = CONSTANTS | dict(zip(sorted(names), point))
        env |= dict.fromkeys(renamed, point[-1])
        yield value(one, env), value(other, env)


def near(a, b, part=1e-9):
    """Is their difference no more than a part of them?"""
    a, b = alike(a, b)
    if isinstance(a, Fraction):
        return a == b
    return abs(a - b) <= part * (abs(a) + abs(b))


def rounded(tree, exact, digits=4):
    """0.3333 agrees with 1/3, and 1.414 with √2: a decimal of at least four digits, rounded rightly.

    This holds only for numbers that no decimal can write: 0.3333 and 0.33334 are two different numbers.
    """
    size = tree
    while size[:2] == ("-", ZERO):
        size = size[2]
    if size[0] != "number" or len(size) < 3 or variables(exact):
        return False
    text, exact = size[2], value(exact)
    if len(text.replace(".", "").lstrip("0")) < digits:
        return False
    if isinstance(exact, Fraction) and pow(10, BITS, exact.denominator) == 0:  # a decimal can write it: 1/8
        return False
    number, exact = alike(value(tree), exact)
    unit = 10 ** len(text.partition(".")[2])
    return abs(number - exact) * unit * 2 <= 1


# With roots and sines a number has 60 digits, of which 40 must agree: the 16 of a float take e^{π√163} for a
# whole number.
MP = mpmath.mp.clone()
MP.dps = 60
LOCK = threading.Lock()  # mpmath is for one thread at a time
os.register_at_fork(before=LOCK.acquire, after_in_parent=LOCK.release, after_in_child=LOCK.release)
CONSTANTS = {"e": +MP.e, "pi": +MP.pi, "i": MP.j}
# five points: a positive number for each letter, which no formula is likely to single out. As complex numbers
RNGS = map(random.Random, range(5))
POINTS = [[MP.mpc(rng.uniform(0.3, 2.5)) for _ in range(LONGEST)] for rng in RNGS]
SCALES = {"%": "1/100", "degree": r"\pi/180"}  # units that are numbers


def value(tree, env=CONSTANTS):
    """A Fraction as long as possible, then a real or complex number of mpmath's; a letter's is complex."""
    kind, *members = tree
    if kind == "number":
        number = members[0]
    elif kind == "variable":
        number = env[members[0]]
    else:
        number = OPERATIONS[kind](*alike(*[value(member, env) for member in members]))
    if not bits(number) <= BITS:  # nor if it is NaN
        raise Unreadable("too large")
    return number


def alike(*numbers):
    """The numbers as they are, if all are Fractions; else all as mpmath's."""
    exact = all(isinstance(number, Fraction) for number in numbers)
    return numbers if exact else map(MP.convert, numbers)


def bits(x):
    if isinstance(x, Fraction):
        return max(x.numerator.bit_length(), x.denominator.bit_length())
    return abs(MP.mag(x)) + 1 if x else 0


def power(a, b):
    if a == b == 0 or bits(a) * abs(b) > BITS:
        raise Unreadable("too large a power, or 0^0")
    if isinstance(a, Fraction) and b.denominator == 1:
        return a**b
    return MP.power(a, b)


def root(a, degree):
    if not isinstance(a, MP.mpc) and a < 0 and degree % 2 == 1:  # the real root of a negative number
        return -power(-a, 1 / degree)
    return power(a, 1 / degree)


def factorial(x):
    if isinstance(x, MP.mpc):  # of a letter
        return MP.factorial(x)
    if x != int(x) or not 0 <= x <= FACTORIAL:
        raise Unreadable(f"a factorial or binomial of {x}")
    return Fraction(math.factorial(int(x)))


def floor(x):
    if isinstance(x, MP.mpc):  # any function that no formula names: two steps may agree at all points
        return MP.exp(1.1 * x)
    return x - x % 1


def cleaned(function):
    """Where a sine or a difference is 0, rounding leaves about 1e-60 of what it is made of."""

    def clean(*numbers):
        number = function(*numbers)
        if isinstance(number, Fraction):
            return number
        largest = max(abs(MP.convert(part)) for part in numbers)
        return MP.zero if abs(number) * 10**50 < largest else number

    return clean


OPERATIONS = {  # a kind of tree with a value: how it follows from the values of its members
    "+": cleaned(operator.add), "-": cleaned(operator.sub), "*": operator.mul, "/": operator.truediv,
    "^": power, "root": root, "abs": abs,
    "!": factorial, "binom": lambda n, k: factorial(n) / factorial(k) / factorial(n - k),
    "floor": floor, "ceil": lambda x: -floor(-x),
    **{name: cleaned(getattr(MP, name.replace("arc", "a"))) for name in FUNCTIONS},  # mpmath: asin
    "exp": MP.exp,
}


# ------------------------------------------------------------------------------------------------------------
# the command line


def main():
    """python rewards.py RESPONSE GOLD: how both are read, and the verdict."""
    if len(sys.argv) != 3:
        fail("usage: python rewards.py RESPONSE GOLD")
    _, response, gold = sys.argv
    found = final_answers(response)
    claim = [response, *found][-1]
    for name, text in (("read as ", claim), ("gold    ", gold)):
        reading = read(text)
        trees = "; ".join(map(str, reading.items))
        print(name, reading.text, reading.unit, "  ", trees or f"compared as text: {reading.trouble}")
    print("reward  ", reward(response, gold, True))
    if not found:
        print("it has no \\boxed{…} and no ####; in a box it would earn", float(is_correct(response, gold)))


if __name__ == "__main__":
    main()
