"""Problems and verdicts: where the problems come from, how they are asked, and whether an answer is right.

A problem is {"id", "question", "answer"}. A verdict is 1.0 or 0.0, and every script asks the one function `reward` for
it: a V* estimated with one grader and a policy trained with another is a regression onto the wrong target.

What a model wrote is untrusted text: it is parsed by the small parser below, never evaluated.

    python rewards.py 'so \\boxed{\\frac12}' 0.5        how both sides are read, and the verdict
"""

import cmath
import json
import math
import operator
import random
import re
import sys
import unicodedata
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import mpmath  # comes with sympy, which comes with torch
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------------------------
# the verdict


def reward(response, answer, finished):
    """The one grader. An answer that was cut off before EOS earns nothing, whatever it says."""
    found = final_answers(response) if finished else []
    if not found:
        return 0.0
    if is_correct(found[-1], answer):
        return 1.0
    # where the gold is a list, each of its items may stand in a box of its own
    wanted = len(read(answer).items)
    return float(1 < wanted <= len(found) and is_correct(", ".join(found[-wanted:]), answer))


def final_answers(text):
    """What the balanced \\boxed{…} hold, or the last #### line, whichever comes later; the last is the answer.

    Nothing else counts: 'any number in the text' would pay a policy for babbling. One pass, whatever the text.
    """
    text = text.rsplit("</think>", 1)[-1]
    hashes = text.rfind("####")
    boxes, opened = [], []  # per open brace the place where its \boxed{ starts, or -1 for a plain brace
    for token in re.finditer(r"\\f?boxed\s*\{|\\f?boxed +(?=[^\s{])|\\[{}]|[{}]", text):
        if token[0] == "}" and opened:
            box, start = opened.pop()
            if box >= 0:
                boxes.append((box, text[start : token.start()]))
        elif token[0][-1] == "{" and token[0] != "\\{":
            opened.append((token.start() if len(token[0]) > 1 else -1, token.end()))
        elif token[0][-1] == " ":  # \boxed 5
            boxes.append((token.start(), re.match(r"[^\s$.,]*", text[token.end() : token.end() + LONGEST])[0]))
    boxes = [inside.strip() for box, inside in sorted(boxes) if box > hashes]
    return boxes or ([text[hashes + 4 :].strip().split("\n", 1)[0].strip()] if hashes >= 0 else [])


def final_answer(text):
    return (final_answers(text) or [None])[-1]


def is_correct(answer, gold):
    """Does the answer say the same as the gold? From cheap to dear: as text, then as numbers, structures, expressions."""
    if max(len(answer), len(gold)) > LONGEST:
        return answer.strip() == gold.strip()
    answer, gold = read(answer), read(gold)
    if answer.text == gold.text != "":
        return answer.unit == gold.unit or not (answer.unit and gold.unit)
    if answer.unit and gold.unit and answer.unit != gold.unit:
        return False
    if not answer.items or not gold.items:
        return False
    try:
        if same_items(answer.items, gold.items):
            return True
        # 50 % is 50, and 1/2 as well, but only where the sign is there to say so
        return (answer.unit == "%") != (gold.unit == "%") and len(answer.items) == len(gold.items) == 1 and same(
            *(("/", tree, ("number", Fraction(100))) if side.unit == "%" else tree
              for side in (answer, gold) for tree in side.items))
    except (Unreadable, ArithmeticError, ValueError, RecursionError, TypeError):
        return False


# ---------------------------------------------------------------------------------------------------------------------
# problems and prompts

BOXED = " Let's think step by step and output the final answer within \\boxed{}."  # the paper's two suffixes
GSM8K = ' Let\'s think step by step and output the final answer after "####".'
DATASETS = {  # name: hub id, config, its only split (None: the split that was asked for), question, answer, suffix
    "gsm8k": ("openai/gsm8k", "main", None, "question", "answer", GSM8K),
    "math": ("DigitalLearningGmbH/MATH-lighteval", None, None, "problem", "solution", BOXED),
    "math500": ("HuggingFaceH4/MATH-500", None, "test", "problem", "answer", BOXED),
    "aime24": ("HuggingFaceH4/aime_2024", None, "train", "problem", "answer", BOXED),
    "aime25": ("MathArena/aime_2025", None, "train", "problem", "answer", BOXED),
    "amc23": ("math-ai/amc23", None, "test", "question", "answer", BOXED),
    "minerva": ("math-ai/minervamath", None, "test", "question", "answer", BOXED),
    "olympiad": ("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train", "question", "final_answer", BOXED),
    "hmmt25": ("MathArena/hmmt_feb_2025", None, "train", "problem", "answer", BOXED),
}


def load_problems(source, split="train", question_field="question", answer_field="answer"):
    """A local .jsonl, .json or .parquet file, a name in DATASETS, or any hub id → [{"id", "question", "answer"}]."""
    if Path(source).suffix in (".jsonl", ".json", ".parquet"):
        rows, name = read_rows(Path(source)), Path(source).stem
    else:
        if source not in DATASETS and source.count("/") != 1:
            fail(f"unknown data set {source!r}: give a .jsonl, .json or .parquet file, a hub id (owner/name), "
                 f"or one of {', '.join(DATASETS)}")
        default = (source, None, None, question_field, answer_field, BOXED)
        hub_id, config, only_split, question_field, answer_field, _ = DATASETS.get(source, default)
        rows, name = hub_rows(hub_id, config, only_split or split), f"{source}/{only_split or split}"
    problems = {}
    for number, where, row in rows:
        question, answer = as_text(row.get(question_field)), as_text(row.get(answer_field))
        for field, value in ((question_field, question), (answer_field, answer)):
            if not value.strip():
                fail(f"{where}: no {field!r} (the row has: {', '.join(map(str, row)) or 'nothing'})")
        key = str(row.get("id", f"{name}/{number}"))
        if key in problems:
            fail(f"{where}: the id {key!r} was used before")
        # an answer that is a whole solution (GSM8K, MATH) is cut down to its final answer
        problems[key] = {"id": key, "question": question, "answer": final_answer(answer) or answer.strip()}
    if not problems:
        fail(f"{source}: no problems in it")
    return list(problems.values())


def read_rows(path):
    """Yields (number, where, row) from a local file; `where` is what an error message points at."""
    if path.suffix == ".parquet":
        import pyarrow.parquet  # comes with datasets

        try:
            table = pyarrow.parquet.read_table(path).to_pylist()
        except (OSError, pyarrow.ArrowException) as error:
            fail(f"{path}: {error}")
        yield from ((number, f"{path}, row {number}", row) for number, row in enumerate(table, 1))
        return
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        fail(f"{path}: {error.strerror}")
    except UnicodeDecodeError as error:
        fail(f"{path}: not UTF-8 at byte {error.start}")
    whole = path.suffix == ".json"  # one list of rows; .jsonl holds one row a line
    for number, line in enumerate([text] if whole else text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            fail(f"{path}, line {error.lineno if whole else number}: not JSON ({error})")
        for index, row in enumerate(value, 1) if whole and isinstance(value, list) else [(number, value)]:
            where = f"{path}, {'row' if whole else 'line'} {index}"
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


def as_text(value):
    if isinstance(value, list):  # OlympiadBench keeps a list of final answers
        return ", ".join(map(str, value))
    return "" if value is None else str(value)


def suffix_of(source):
    """What is appended to a question of this data set; GSM8K asks for ####, all else for a box."""
    return DATASETS[source][-1] if source in DATASETS else BOXED


def make_prompt(tokenizer, question, suffix, chat):
    """The text that the policy continues: plain for base models, in the tokenizer's own template for chat models."""
    if not chat:
        return question + suffix
    if not tokenizer.chat_template:
        fail("--chat: this tokenizer has no chat template")
    message = [{"role": "user", "content": question + suffix}]
    return tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)


def encode(tokenizer, prompt, chat):
    """Prompt → tokens, the same way in all scripts. A template writes its own BOS; plain text gets the tokenizer's."""
    return tokenizer(prompt, add_special_tokens=not chat)["input_ids"]


def fail(message):
    """End on an error that the user can mend: one line that says what and where, exit code 2."""
    tqdm.write("error: " + " ".join(str(message).split()), file=sys.stderr)  # not into the middle of a progress bar
    raise SystemExit(2)


# ---------------------------------------------------------------------------------------------------------------------
# how an answer is read

# How an answer is read: respelled in one way, cut into tokens, parsed by recursive descent into a small tree. Nothing is
# ever evaluated as Python or by sympy's parser, and all sizes are bounded before anything is computed; what lies
# beyond a bound, or cannot be read, is compared as text.
LONGEST, DEEPEST, DIGITS, EXPONENT, FACTORIAL = 400, 40, 60, 2000, 200  # the benchmarks' longest gold has 210 characters


class Unreadable(Exception):
    """Not mathematics that this parser knows, or too large."""


class Answer(NamedTuple):
    text: str  # respelled, for the comparison as text
    items: list  # the trees of a top-level list, [] where it cannot be read
    unit: str  # 'cm', 'degree', '%', …; '' without


SIGNS = dict(pair.split(" ", 1) for pair in (
    "− -|– -|— -|× *|· *|⋅ *|∗ *|÷ /|⁄ /|π \\pi |∞ \\infty |° ^\\circ |≤ \\le |≥ \\ge |≠ \\ne |∪ \\cup |∩ \\cap |± \\pm |∈ \\in |"
    "θ \\theta |α \\alpha |β \\beta |√ \\sqrt |² ^2|³ ^3|½  1/2|¼  1/4|¾  3/4|’ '|\u00a0  |\u200b ").split("|"))
UNITS = {}  # every spelling → the first of its line; ~ is a space
for _line in """cm centimeter centimetre|mm millimeter millimetre|m meter metre|km kilometer kilometre|in inch|ft foot feet|yd yard
    mi mile|g gram|kg kilogram|mg milligram|lb pound|oz ounce|s sec second|min minute|h hr hour|day|week|month|year yr
    L l liter litre|ml mL milliliter|gallon gal|quart|cup|dollar USD|cent|euro|degree deg|radian rad|percent|unit
    mph mile~per~hour miles~per~hour
    km/h kmh|m/s|cm/s|ft/s|J joule|N newton|W watt|V volt|A|K|Hz|Pa|kJ|eV|mol|person people|student|apple|marble|book|way|point
    time|side|edge|face|block|page|ticket|coin|square~unit sq~unit|cubic~unit|square~inch sq~in|cubic~inch
    square~foot square~feet sq~ft
    cubic~foot cubic~feet|square~meter|cubic~meter|square~cm square~centimeter|cubic~cm cubic~centimeter|square~mile|square~yard
    """.strip().replace("\n", "|").split("|"):
    _spellings = [name.replace("~", " ") for name in _line.split()]
    for _name in _spellings:
        UNITS[_name] = UNITS[_name + "s"] = UNITS[_name + "es"] = _spellings[0]
UNIT = "|".join(sorted(map(re.escape, UNITS), key=len, reverse=True))
TEXTED = re.compile(r"\\(?:text|mathrm|mbox|textrm|rm|textbf|textit|operatorname|mathbf|mathit|textnormal)\s*\{([^{}]*)\}")
LONG = "|".join(name for name in UNIT.split("|") if len(name) > 2 or name in ("cm", "mm", "km", "kg", "mg", "ft", "lb", "oz", "hr"))
UNIT_AT_END = re.compile(rf"\s*(?:\x01\s*({UNIT})\.?\s*\x02|(?<=[\d\s}}])({LONG})\.?)\s*(?:\^\s*\{{?([23])\}}?)?$")
WORD = re.compile(r"(?<![\\a-zA-Z])(?!sin|cos|tan|log|exp|sqrt|arc|sec|csc|cot|pi|inf|ln)[a-zA-Z]{3,}")


@lru_cache(maxsize=4096)
def read(text):
    """Text → Answer."""
    if len(text) > LONGEST:
        return Answer(text.strip(), [], "")
    text, unit = respell(text), ""
    if match := re.search(r"\s*\^\s*\{?\s*\\circ\s*\}?\s*$|\s*\\degree\s*$|\s*\x01\s*°\s*\x02$", text):
        text, unit = text[: match.start()], "degree"
    elif match := re.search(r"\s*%$", text):
        text, unit = text[: match.start()], "%"
    elif (match := UNIT_AT_END.search(text)) and match.start() > 0:
        text, unit = text[: match.start()], UNITS[match[1] or match[2]] + (match[3] or "")
    if text[:1] in ("\x04", "€", "£"):
        text, unit = text[1:].strip(), unit or {"\x04": "dollar", "€": "euro", "£": "pound"}[text[0]]
    text = text.replace("\x04", "")
    plain = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", re.sub(r"[\x01\x02]", "", text))
    plain = re.sub(r"\{([a-zA-Z0-9])\}", r"\1", plain)  # _{5} and _5
    if re.fullmatch(r"\(?[A-Za-z]\)?", plain) and ("\x01" in text or "(" in plain):
        return Answer(plain.strip("()").upper(), [], unit)  # a choice
    if "\x01" in text or WORD.search(re.sub(r"\\(begin|end)\{\w+\}", "", text)):
        return Answer(plain.casefold(), [], unit)  # words are compared as words
    try:
        return Answer(plain, Parser(text).answer(), unit)
    except (Unreadable, RecursionError, ValueError, ArithmeticError):
        return Answer(plain, [], unit)


def respell(text):
    r"""One way of writing where LaTeX, unicode and people have several. \text{…} becomes \x01…\x02."""
    for sign, spelling in SIGNS.items():
        text = text.replace(sign, spelling)
    text = unicodedata.normalize("NFKC", text)  # fullwidth digits
    text = re.sub(r",\s*\\!\s*|\{,\}", ",", text)
    for sign, spelling in (("\\\\", "\x03"), ("\\%", "%"), ("\\$", "\x04"), ("$", ""), ("~", " "), ("\\!", ""), ("\\,", "")):
        text = text.replace(sign, spelling)
    text = re.sub(r"\\(?:(?:left|right|[bB]igg?[lr]?|displaystyle|limits|quad|qquad)(?![a-zA-Z])|[;:> ()\[\]])", " ", text)
    text = text.replace("\x03", "\\\\")
    text = re.sub(r"\\[dtc]?frac(?![a-zA-Z])", r"\\frac", text)
    text = re.sub(r"\\[dt]binom(?![a-zA-Z])", r"\\binom", text)
    text = re.sub(r"\\f?boxed\s*\{", "{", text)
    text = TEXTED.sub("\x01\\1\x02", text)
    text = re.sub(r"\x01?\s*\b(?:and|or)\b\s*\x02?", ",", text)
    text = text.strip().rstrip(".,; ")
    while text.startswith("{") and matching(text) == len(text) - 1:
        text = text[1:-1].strip().rstrip(".,; ")
    return text


def matching(text):
    """Where the brace closes that opens the text."""
    depth = 0
    for place, sign in enumerate(text):
        depth += (sign == "{") - (sign == "}")
        if depth == 0:
            return place


# ---------------------------------------------------------------------------------------------------------------------
# from text to a tree

TOKEN = re.compile(
    r"\s*(\d{1,3}(?:,\d{3})+(?![\d,])(?:\.\d+)?|\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+"  # 1,234.5   8.7e8   .5
    r"|\\begin\{\w+\}|\\end\{\w+\}|\\\\|\\[a-zA-Z]+|\\[{}|]"
    r"|arc(?:sin|cos|tan)|sinh?|cosh?|tanh?|sec|csc|cot|log|ln|exp|sqrt|pi|infinity|inf"
    r"|<=|>=|!=|\*\*|[a-zA-Z]|[-+*/^_!|()\[\]{}=<>,;:&'])")
FUNCTIONS = set("sin cos tan sec csc cot arcsin arccos arctan sinh cosh tanh log ln lg exp".split())
RELATIONS = {"\\le": "<=", "\\leq": "<=", "\\leqslant": "<=", "\\ge": ">=", "\\geq": ">=", "\\geqslant": ">=",
             "\\lt": "<", "\\gt": ">", "\\ne": "!=", "\\neq": "!=", "\\in": "in",
             **{sign: sign for sign in ("=", "<", ">", "<=", ">=", "!=")}}
GREEK = set("alpha beta gamma delta epsilon varepsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau phi varphi chi "
            "psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell hbar".split())
CLOSING = {"(": ")", "[": "]", "\\{": "\\}", "{": "}", "|": "|"}


class Parser:
    """Recursive descent over LaTeX and plain notation. A tree is a tuple whose first member names its kind."""

    def __init__(self, text):
        # 1,234 is a number, but (1,234) is a pair and 1,23 a list
        self.tokens, place, groups = [], 0, []
        while place < len(text.rstrip()):
            match = TOKEN.match(text, place)
            if not match:
                raise Unreadable(text[place:])
            token, place = match[1], match.end()
            if token in ("(", "[", "\\{"):
                groups.append(token)
            elif token in (")", "]", "\\}") and groups:
                groups.pop()
            if "," in token and len(token) > 1:
                if groups:
                    first, *rest = token.split(",")
                    self.tokens += [first, *(t for part in rest for t in (",", part))]
                    continue
                token = token.replace(",", "")
            self.tokens.append(token)
        self.place, self.depth, self.sign, self.saw_sign = 0, 0, 1, False

    def next(self):
        return self.tokens[self.place] if self.place < len(self.tokens) else ""

    def take(self, *wanted):
        token = self.next()
        if token and (not wanted or token in wanted):
            self.place += 1
            return token
        if not wanted:
            raise Unreadable("ends too early")
        return ""

    def expect(self, token):
        if not self.take(token):
            raise Unreadable(f"no {token}")

    def answer(self):
        items = self.list()
        if self.next() or not items:
            raise Unreadable(self.next())
        return items

    def list(self, signs=True):
        """Items between commas; one with ± counts twice (in brackets that is left to the item which holds them)."""
        self.depth += 1
        if self.depth > DEEPEST:
            raise Unreadable("too deep")
        items = []
        while True:
            start, outer = self.place, (self.sign, self.saw_sign)
            if signs:
                self.sign, self.saw_sign = 1, False
            items.append(self.relation())
            if signs and self.saw_sign:
                self.place, self.sign = start, -1
                items.append(self.relation())
            if signs:
                self.sign, self.saw_sign = outer
            if len(items) > 64:
                raise Unreadable("too many")
            if not self.take(",", ";"):
                break
        self.depth -= 1
        return items

    def relation(self):
        """a, a = b, a < x ≤ b, x ∈ S"""
        sides, signs = [self.sum()], []
        while self.next() in RELATIONS:
            signs.append(RELATIONS[self.take()])
            sides.append(self.sum())
        return ("relation", tuple(signs), *sides) if signs else sides[0]

    def sum(self):
        self.depth += 1
        if self.depth > DEEPEST:
            raise Unreadable("too deep")
        tree = ("number", Fraction(0)) if self.next() in ("+", "-", "\\pm", "\\mp") else self.product()
        while operator := self.take("+", "-", "\\pm", "\\mp", "\\cup", "\\cap", "\\setminus"):
            if operator in ("\\pm", "\\mp"):
                self.saw_sign = True
                operator = "+" if (operator == "\\pm") == (self.sign == 1) else "-"
            tree = (operator, tree, self.product())
        self.depth -= 1
        return tree

    def product(self):
        tree = self.power()
        while True:
            if self.take("*", "\\cdot", "\\times"):
                tree = ("*", tree, self.signed())
            elif self.take("/", "\\div"):
                tree = ("/", tree, self.signed())
            elif self.starts():
                mixed = tree[0] == "number" and tree[1].denominator == 1 and self.next() == "\\frac"
                if tree[0] == "number" and self.next()[0].isdigit():  # 3 1/2 is a mixed number, 3 1 is nothing
                    tree = ("+", tree, ("/", self.power(), (self.expect("/"), self.power())[1]))
                    continue
                factor = self.power()
                # 1\frac{1}{2} is a mixed number, 2\frac{a}{b} a product
                mixed = mixed and factor[0] == "/" and all(part[0] == "number" for part in factor[1:])
                tree = ("+" if mixed else "*", tree, factor)
            else:
                return tree

    def signed(self):
        if self.take("-"):
            return ("-", ("number", Fraction(0)), self.power())
        self.take("+")
        return self.power()

    def starts(self):
        """Does the next token begin a factor (of a product without a sign)?"""
        token = self.next()
        return bool(token) and (token[0].isalnum() or token in ("(", "{", "\\frac", "\\sqrt", "\\binom", "\\pi", "\\infty", "[") or
                                token[0] == "\\" and (token[1:] in GREEK or token[1:] in FUNCTIONS))

    def power(self):
        tree = self.base()
        while True:
            if self.take("!"):
                tree = ("!", tree)
            elif self.take("'"):
                tree = ("*", tree, ("variable", "'"))
            elif self.take("^", "**"):
                tree = ("^", tree, self.exponent())
            else:
                return tree

    def exponent(self):
        if self.next() == "{":
            return self.base()
        if self.take("-"):
            return ("-", ("number", Fraction(0)), self.base())
        return self.base(short=True)

    def group(self):
        """{…} or a single token, as LaTeX takes an argument: \frac12 is 1/2."""
        return self.base(short=True)

    def base(self, short=False):
        self.depth += 1
        if self.depth > DEEPEST:
            raise Unreadable("too deep")
        tree = self.atom(short)
        self.depth -= 1
        return tree

    def atom(self, short):
        token = self.take()
        if token[0].isdigit() or token[0] == ".":
            if short and self.tokens[self.place - 2] in ("\\frac", "\\sqrt", "}") and len(token) > 1 and token.isdigit():
                self.tokens[self.place - 1 : self.place] = [token[0], token[1:]]  # \frac12, \sqrt23
                token = token[0]
            if len(token) > DIGITS or abs(int(re.split("[eE]", token + "e0")[1])) > EXPONENT:
                raise Unreadable("too many digits")
            number = ("number", Fraction(token))
            if "." in token and "e" not in token.lower():
                number += (token,)  # a decimal remembers its digits, for `rounded`
            if self.next() == "_":
                self.take()
                return ("based", number, self.group())
            return number
        if token == "\\{" and self.take("\\}"):
            return ("set",)
        if token in CLOSING and token != "|":
            items = self.list(signs=token == "\\{")
            close = self.take()
            if token == "{" or (close == CLOSING[token] == ")" and len(items) == 1):
                if close != CLOSING[token] or len(items) > 1:
                    raise Unreadable("unbalanced")
                return items[0]
            if token == "\\{" and close == "\\}":
                return ("set", *items)
            if token in "([" and close in (")", "]"):
                return ("tuple", token + close, *items)
            raise Unreadable("unbalanced")
        if token in ("|", "\\lvert", "\\|"):
            tree = self.sum()
            self.expect({"|": "|", "\\lvert": "\\rvert", "\\|": "\\|"}[token])
            return ("abs", tree)
        if token == "\\frac":
            return ("/", self.group(), self.group())
        if token == "\\binom":
            return ("binom", self.group(), self.group())
        if token in ("\\sqrt", "sqrt"):
            degree = ("number", Fraction(2))
            if self.take("["):
                degree = self.sum()
                self.expect("]")
            return ("root", self.group(), degree)
        if token.startswith("\\begin"):
            return self.matrix(token)
        name = token.lstrip("\\")
        if name in FUNCTIONS:
            return self.function(name)
        if name in ("pi", "infty", "infinity", "inf"):
            return ("pi",) if name == "pi" else ("variable", "infinity")
        if name in ("emptyset", "varnothing"):
            return ("set",)
        if name == "mathbb" and self.take("{"):
            name = "set of " + self.take()
            self.expect("}")
            return ("variable", name)
        if len(name) == 1 and name.isalpha() or name in GREEK:
            if self.take("_"):
                index = self.group()
                return ("variable", f"{name}_{index[1] if index[0] in ('number', 'variable') else index}")
            return ("variable", name)
        raise Unreadable(token)

    def function(self, name):
        power = base = None
        while mark := self.take("^", "_"):
            if mark == "^":
                power = self.exponent()
            else:
                base = self.group()
        if self.next() in ("(", "{", "|", "["):
            argument = self.base()
        else:  # \sin 2x takes the product behind it
            argument = self.power()
            while self.starts() and self.next().lstrip("\\") not in FUNCTIONS:
                argument = ("*", argument, self.power())
        if argument[0] in ("tuple", "set"):
            raise Unreadable("a function of a list")
        if power == ("-", ("number", Fraction(0)), ("number", Fraction(1))):
            name, power = "arc" + name, None
        tree = ("function", name, argument) if base is None else ("/", ("function", "ln", argument), ("function", "ln", base))
        return tree if power is None else ("^", tree, power)

    def matrix(self, begin):
        if begin[7:-1] not in ("pmatrix", "bmatrix", "matrix", "vmatrix", "array", "smallmatrix"):
            raise Unreadable(begin)
        if begin[7:-1] == "array" and self.take("{"):
            while self.take() != "}":
                pass
        rows, row = [], []
        while True:
            row.append(self.relation())
            mark = self.take()
            if mark != "&":
                rows.append(tuple(row))
                row = []
            if mark == "\\\\" and self.next() == begin.replace("begin", "end"):
                mark = self.take()
            if mark == begin.replace("begin", "end"):
                break
            if mark not in ("&", "\\\\") or len(rows) > 10 or len(row) > 10:
                raise Unreadable("a matrix")
        return ("matrix", *rows)


# ---------------------------------------------------------------------------------------------------------------------
# from trees to a verdict

MP = mpmath.MPContext()  # a context of its own: its precision is nobody else's, in any thread
MP.dps = 60
ALIKE = ("tuple", "set", "matrix", "relation")


def same_items(some, others):
    """Lists of solutions: equal in any order. A single set is the list of its members; a tuple keeps its order."""
    some, others = ([*tree[0][1:]] if len(tree) == 1 and tree[0][0] == "set" else tree for tree in (some, others))
    if len(some) != len(others):  # x < 1 or x > 2 is a union
        some, others = (flat(tree[0]) if len(tree) == 1 and all(t[0] == "relation" for t in far) else tree
                        for tree, far in ((some, others), (others, some)))
    if len(some) != len(others):
        return False
    left = list(others)
    for tree in some:
        match = next((i for i, other in enumerate(left) if same(tree, other)), None)
        if match is None:
            return False
        left.pop(match)
    return True


def same(one, other):
    """Do two trees mean the same?"""
    one, other = bounds(one), bounds(other)
    if one[0] == "relation" and other[0] != "relation":
        one = value_of(one)
    elif other[0] == "relation" and one[0] != "relation":
        other = value_of(other)
    if one is None or other is None:
        return False
    if one[0] in ("\\cup", "\\cap", "\\setminus") or other[0] in ("\\cup", "\\cap", "\\setminus"):
        if one[0] != other[0]:
            return False
        if one[0] == "\\setminus":
            return same(one[1], other[1]) and same(one[2], other[2])
        return same_items(flat(one), flat(other))
    if one[0] in ALIKE or other[0] in ALIKE or "based" in (one[0], other[0]):
        if one[0] != other[0]:
            return False
        if one[0] == "set":
            return same_items(list(one[1:]), list(other[1:]))
        if one[0] == "based":
            return one[1:] == other[1:]
        if one[0] == "matrix":
            return [len(row) for row in one[1:]] == [len(row) for row in other[1:]] and all(
                same(a, b) for mine, yours in zip(one[1:], other[1:]) for a, b in zip(mine, yours))
        if one[0] == "tuple":
            a, b = one[2:], other[2:]
            return len(a) == len(b) and (one[1] == other[1] or len(a) > 2) and all(map(same, a, b))
        return same_relations(one, other)
    return same_expressions(one, other)


def flat(tree):
    return flat(tree[1]) + flat(tree[2]) if tree[0] in ("\\cup", "\\cap") else [bounds(tree)]


def bounds(tree):
    """-1 < x ≤ 3 is the interval (-1, 3], x > 5 is (5, ∞), x ∈ S is S."""
    if tree[0] != "relation":
        return tree
    signs, sides = tree[1], tree[2:]
    if signs == ("in",) and sides[0][0] == "variable":
        return bounds(sides[1])
    infinity = ("variable", "infinity")
    if set(signs) <= {"<", "<="} or set(signs) <= {">", ">="}:
        if signs[0][0] == ">":
            signs, sides = tuple(s.replace(">", "<") for s in reversed(signs)), tuple(reversed(sides))
        variables = [side[0] == "variable" and side != infinity for side in sides]
        if variables == [False, True, False]:
            return ("tuple", "[("[signs[0] == "<"] + "])"[signs[1] == "<"], sides[0], sides[2])
        if variables == [True, False]:
            return ("tuple", "(" + "])"[signs[0] == "<"], ("-", ("number", Fraction(0)), infinity), sides[1])
        if variables == [False, True]:
            return ("tuple", "[("[signs[0] == "<"] + ")", sides[0], infinity)
    return tree


def value_of(relation):
    """x = 5 against 5, f(x) = 2x against 2x: what stands right of a name."""
    signs, sides = relation[1], relation[2:]
    if set(signs) != {"="}:
        return None
    first = sides[0]
    named = first[0] == "variable" or (first[0] == "*" and first[1][0] == "variable" and first[2][0] in ("variable", "tuple")) or (
        first[0] == "tuple" and all(part[0] == "variable" for part in first[2:]))  # (x, y) = (1, 2)
    return sides[-1] if named else None


def same_relations(one, other):
    if one[1] != other[1] or len(one) != len(other):
        return False
    if all(map(same, one[2:], other[2:])):
        return True
    if one[1] == ("=",):  # up to side and scale
        a, b = (("-", tree[2], tree[3]) for tree in (one, other))
        return proportional(a, b)
    return False


def names(tree):
    if not isinstance(tree, tuple):
        return set()
    if tree[0] == "variable":
        return {tree[1]} - {"e", "i"}
    return set().union(*map(names, tree[1:])) if len(tree) > 1 else set()


def same_expressions(one, other):
    variables = names(one)
    if variables != names(other):
        return False
    if not variables:
        a, b = value(one), value(other)
        if isinstance(a, Fraction) and isinstance(b, Fraction):
            return a == b or rounded(one, b) or rounded(other, a)
        a, b = alike(a, b)
        return bool(abs(a - b) <= MP.mpf(10) ** -40 * max(abs(a), abs(b))) or rounded(one, b) or rounded(other, a)
    return all(near(*pair) for pair in at_points((one, other), variables))


def rounded(tree, exact):
    """A decimal agrees with an exact value that no decimal can write (1/3, √2, π) if it is right to all its digits and has
    at least four of them. 0.33 is not 1/3; and 0.5 and 0.52 are two different decimals."""
    while tree[0] == "-" and tree[1] == ("number", Fraction(0)):
        tree, exact = tree[2], -exact
    if tree[0] != "number" or len(tree) < 3 or len(tree[2].replace(".", "").lstrip("0")) < 4:
        return False
    if isinstance(exact, Fraction):
        rest = exact.denominator
        for prime in (2, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return False
    places = len(tree[2].split(".")[1])
    return bool(abs(inexact(tree[1]) - alike(exact, MP.mpf(0))[0]) <= MP.mpf(10) ** -places / 2)


def at_points(trees, variables):
    """The values of both trees at five points; variables get positive numbers that no formula is likely to single out."""
    pairs = []
    for point in range(5):
        rng = random.Random(point)
        env = {name: complex(rng.uniform(0.3, 2.5)) for name in sorted(variables)}
        pairs.append(tuple(value(tree, env) for tree in trees))
    return pairs


def near(a, b):
    if a != a or b != b:
        raise Unreadable("not a number")
    return abs(a - b) <= 1e-9 * max(abs(a), abs(b), 1e-6)


def proportional(one, other):
    variables = names(one)
    if not variables or variables != names(other):
        return False
    pairs = at_points((one, other), variables)
    return all(near(a * pairs[0][1], b * pairs[0][0]) for a, b in pairs) and any(abs(a) > 1e-6 for a, _ in pairs)


def value(tree, env=None):
    """An exact Fraction as long as possible, then 60 digits; with variables, complex floating point. Bounded at each step."""
    kind = tree[0]
    if kind == "number":
        return tree[1] if env is None else complex(tree[1])
    if kind == "variable":
        if tree[1] in ("i", "e"):
            return {"i": 1j, "e": complex(math.e)}[tree[1]] if env is not None else {"i": MP.mpc(0, 1), "e": MP.e}[tree[1]]
        return env[tree[1]]
    if kind == "pi":
        return MP.pi if env is None else complex(math.pi)
    if kind in ("+", "-", "*", "/"):
        a, b = value(tree[1], env), value(tree[2], env)
        return small({"+": operator.add, "-": operator.sub, "*": operator.mul, "/": divide}[kind](*alike(a, b)))
    if kind in ("^", "root"):
        a, b = value(tree[1], env), value(tree[2], env)
        if kind == "root":
            b = divide(*alike(Fraction(1) if isinstance(b, Fraction) else 1, b))
            if isinstance(a, Fraction) and a < 0 and isinstance(b, Fraction) and b.denominator % 2:
                return -raised(-a, b)
        return raised(a, b)
    if kind == "!" or kind == "binom":
        numbers = [value(part, env) for part in tree[1:]]
        whole = [int(n.real) for n in numbers if n == int(n.real)]
        if len(whole) < len(numbers) or not all(0 <= n <= FACTORIAL for n in whole):
            raise Unreadable("a factorial")
        result = Fraction(math.factorial(whole[0]) if kind == "!" else math.comb(*whole))
        return result if env is None else complex(result)
    if kind == "abs":
        return abs(value(tree[1], env))
    if kind == "function":
        return applied(tree[1], value(tree[2], env))
    raise Unreadable(kind)


def alike(a, b):
    """Both exact, or both not."""
    if isinstance(a, Fraction) != isinstance(b, Fraction):
        a, b = (inexact(x) if isinstance(x, Fraction) else x for x in (a, b))
    return a, b


def inexact(x):
    return MP.mpf(x.numerator) / x.denominator


def divide(a, b):
    if b == 0:
        raise Unreadable("division by zero")
    return a / b


def small(x):
    """Refuses what grows without bound."""
    if isinstance(x, Fraction):
        if max(x.numerator.bit_length(), x.denominator.bit_length()) > 10_000:
            raise Unreadable("too large")
    elif x and not 1e-300 < abs(complex(x)) < 1e300:
        raise Unreadable("too large")
    return x


def raised(a, b):
    if isinstance(a, Fraction) and isinstance(b, Fraction) and b.denominator == 1:
        if abs(b) > EXPONENT or max(a.numerator.bit_length(), a.denominator.bit_length()) * abs(b) > 10_000 or (a == 0 and b <= 0):
            raise Unreadable("a power")
        return a ** int(b)
    a, b = (inexact(x) if isinstance(x, Fraction) else x for x in (a, b))
    if a == 0:
        if complex(b).real <= 0:
            raise Unreadable("a power of zero")
        return a
    if abs(complex(b)) * (abs(math.log(abs(complex(a)))) + 4) > 600:
        raise Unreadable("a power")
    return a**b


def applied(name, x):
    exact = not isinstance(x, complex)
    if isinstance(x, Fraction):
        x = inexact(x)
    if abs(complex(x)) > 1e6 or (x == 0 and name in ("log", "ln", "lg", "csc", "cot")):
        raise Unreadable("a function")
    library = MP if exact else cmath
    if name in ("sec", "csc", "cot"):
        return divide(1, getattr(library, {"sec": "cos", "csc": "sin", "cot": "tan"}[name])(x))
    if name == "lg":
        return library.log(x) / library.log(10)
    if name in ("exp", "sinh", "cosh") and abs(complex(x)) > 600:
        raise Unreadable("exp")
    return getattr(library, {"ln": "log", "arcsin": "asin", "arccos": "acos", "arctan": "atan"}.get(name, name))(x)


def main():
    """python rewards.py RESPONSE GOLD: how both are read, and the verdict."""
    if len(sys.argv) != 3:
        fail("usage: python rewards.py RESPONSE GOLD")
    response, gold = sys.argv[1:]
    found = final_answers(response)
    print("answer  ", found[-1] if found else "none: no balanced \\boxed{…} and no ####")
    for name, text in (("read as ", found[-1] if found else response), ("gold    ", gold)):
        answer = read(text)
        print(name, answer.text, f"[{answer.unit}]" if answer.unit else "", "  ", "; ".join(map(str, answer.items)) or "text")
    print("reward  ", reward(response, gold, True))
    if not found:
        print("in a box it would earn", float(is_correct(response, gold)))


if __name__ == "__main__":
    main()
