"""The steps that generated problems are made of: how they are asked for, and the line that does them."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One step, or the last one, which returns.

    Attributes:
        kind: its name; pipelines of the same kinds in the same order are the same composition.
        wordings: ways to ask for it; {k} stands for the constant.
        code: one line of the program.
        constants: what {k} is drawn from; empty: it has none.
    """

    kind: str
    wordings: tuple[str, ...]
    code: str
    constants: tuple[int | str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """Pipelines over arguments of one kind.

    Attributes:
        parameters: of the function; start: its first line, where the steps need one.
        arguments: draws the arguments of one test.
    """

    name: str
    parameters: str
    start: str
    steps: tuple[Step, ...]
    ends: tuple[Step, ...]
    arguments: Callable[[random.Random], tuple[Any, ...]]


def _step(kind: str, code: str, *wordings: str, constants: Sequence[int | str] = ()) -> Step:
    return Step(kind=kind, wordings=wordings, code=code, constants=tuple(constants))


_SMALL = range(2, 6)
_LIST_STEPS = (
    _step(
        "above",
        "xs = [x for x in xs if x > {k}]",
        "keep numbers above {k}",
        "drop numbers up to {k}",
        constants=range(-3, 8),
    ),
    _step(
        "below",
        "xs = [x for x in xs if x < {k}]",
        "keep numbers below {k}",
        "drop numbers from {k} on",
        constants=range(0, 10),
    ),
    _step("even", "xs = [x for x in xs if x % 2 == 0]", "keep even numbers", "drop odd numbers"),
    _step("odd", "xs = [x for x in xs if x % 2 == 1]", "keep odd numbers", "drop even numbers"),
    _step(
        "multiples", "xs = [x for x in xs if x % {k} == 0]", "keep multiples of {k}", constants=range(3, 6)
    ),
    _step("without", "xs = [x for x in xs if x != {k}]", "remove every {k}", constants=range(0, 6)),
    _step(
        "add", "xs = [x + {k} for x in xs]", "add {k} to each", "raise each by {k}", constants=range(1, 10)
    ),
    _step(
        "subtract",
        "xs = [x - {k} for x in xs]",
        "subtract {k} from each",
        "lower each by {k}",
        constants=range(1, 10),
    ),
    _step("times", "xs = [x * {k} for x in xs]", "multiply each by {k}", constants=_SMALL),
    _step("remainder", "xs = [x % {k} for x in xs]", "take each modulo {k}", constants=range(3, 8)),
    _step("square", "xs = [x * x for x in xs]", "square each"),
    _step("negate", "xs = [-x for x in xs]", "negate each", "flip the sign of each"),
    _step("absolute", "xs = [abs(x) for x in xs]", "take absolute values", "drop the signs"),
    _step("at_least", "xs = [max(x, {k}) for x in xs]", "raise smaller ones to {k}", constants=range(-2, 6)),
    _step("at_most", "xs = [min(x, {k}) for x in xs]", "cap each at {k}", constants=range(2, 10)),
    _step("reverse", "xs = xs[::-1]", "reverse the list", "turn the order round"),
    _step("ascending", "xs = sorted(xs)", "sort ascending", "sort from small to large"),
    _step("descending", "xs = sorted(xs, reverse=True)", "sort descending", "sort from large to small"),
    _step("distinct", "xs = list(dict.fromkeys(xs))", "drop duplicates", "keep the first of equal ones"),
    _step("first", "xs = xs[:{k}]", "take the first {k}", constants=_SMALL),
    _step("last", "xs = xs[-{k}:]", "take the last {k}", constants=_SMALL),
    _step("skip", "xs = xs[{k}:]", "skip the first {k}", constants=range(1, 4)),
    _step("second", "xs = xs[::2]", "take every second one"),
    _step("differences", "xs = [b - a for a, b in zip(xs, xs[1:])]", "take differences of neighbours"),
)
_LIST_ENDS = (
    _step("list", "return xs", "return the list"),
    _step("sum", "return sum(xs)", "return the sum", "add them up"),
    _step("count", "return len(xs)", "return how many there are", "count them"),
    _step("largest", "return max(xs, default=0)", "return the largest or 0"),
    _step("smallest", "return min(xs, default=0)", "return the smallest or 0"),
    _step("squares", "return sum(x * x for x in xs)", "return the sum of squares"),
    _step("joined", 'return "{k}".join(str(x) for x in xs)', "join them by {k}", constants="+-/:"),
    _step("is_sorted", "return xs == sorted(xs)", "return whether they ascend"),
)
_TEXT_STEPS = (
    _step("upper", "s = s.upper()", "make it upper case", "turn it to capitals"),
    _step("lower", "s = s.lower()", "make it lower case", "turn it to small letters"),
    _step("swap", "s = s.swapcase()", "swap the case"),
    _step("reverse", "s = s[::-1]", "reverse it", "turn it round"),
    _step("first", "s = s[:{k}]", "take the first {k} characters", constants=range(3, 8)),
    _step("last", "s = s[-{k}:]", "take the last {k} characters", constants=range(3, 8)),
    _step("skip", "s = s[{k}:]", "skip the first {k} characters", constants=range(1, 5)),
    _step("second", "s = s[::2]", "take every second character"),
    _step("remove", 's = s.replace("{k}", "")', "remove every {k}", constants="aeotn"),
    _step("replace", 's = s.replace("{k}", "*")', "replace every {k} by *", constants="aeotn"),
    _step("before", 's = s.split("{k}")[0]', "take what is before the first {k}", constants="eotnr"),
    _step("words", 's = " ".join(s.split()[::-1])', "reverse the order of words"),
    _step("longest", 's = max(s.split(), key=len, default="")', "take the longest word"),
    _step("sorted", 's = "".join(sorted(s))', "sort the characters"),
    _step("double", "s = s + s", "write it twice", "repeat it once"),
    _step("letters", 's = "".join(c for c in s if c.isalpha())', "keep letters only"),
    _step("consonants", 's = "".join(c for c in s if c not in "aeiou")', "drop small vowels"),
)
_TEXT_ENDS = (
    _step("text", "return s", "return it"),
    _step("length", "return len(s)", "return its length", "count its characters"),
    _step("count", 'return s.count("{k}")', "count every {k}", constants="aeotn"),
    _step("vowels", 'return sum(c in "aeiou" for c in s)', "count small vowels"),
    _step("word_count", "return len(s.split())", "count the words"),
    _step("split", "return s.split()", "return its words"),
    _step("starts", 'return s.startswith("{k}")', "return whether it starts with {k}", constants="aeotn"),
    _step("distinct", "return len(set(s))", "count its distinct characters"),
)
_NUMBER_STEPS = (
    _step("add", "n = n + {k}", "add {k}", constants=range(2, 10)),
    _step("subtract", "n = n - {k}", "subtract {k}", constants=range(2, 10)),
    _step("times", "n = n * {k}", "multiply by {k}", constants=_SMALL),
    _step("divide", "n = n // {k}", "divide by {k} and round down", constants=_SMALL),
    _step("remainder", "n = n % {k}", "take it modulo {k}", constants=range(5, 12)),
    _step("square", "n = n * n", "square it"),
    _step("negate", "n = -n", "negate it", "flip its sign"),
    _step("absolute", "n = abs(n)", "take the absolute value", "drop its sign"),
    _step("at_least", "n = max(n, {k})", "raise it to {k} if smaller", constants=range(0, 10)),
    _step("at_most", "n = min(n, {k})", "cap it at {k}", constants=range(3, 20)),
    _step("plus_a", "n = n + a", "add a"),
    _step("minus_b", "n = n - b", "subtract b"),
    _step("times_a", "n = n * a", "multiply by a"),
    _step("times_b", "n = n * b", "multiply by b"),
    _step("larger", "n = max(n, b)", "take the larger of it and b"),
    _step("smaller", "n = min(n, a)", "take the smaller of it and a"),
)
_NUMBER_ENDS = (
    _step("number", "return n", "return it"),
    _step("is_even", "return n % 2 == 0", "return whether it is even"),
    _step("is_above", "return n > {k}", "return whether it is above {k}", constants=range(0, 20)),
    _step("digits", "return len(str(abs(n)))", "count its digits"),
    _step("text", "return str(n)", "return it as text"),
    _step("pair", "return [n, a, b]", "return it with a and b"),
)
_WORDS = (
    "apple",
    "banana",
    "stone",
    "River",
    "otter",
    "Nine",
    "green",
    "table",
    "Moon",
    "and",
    "the",
    "tree",
)


def _list_arguments(rng: random.Random) -> tuple[Any, ...]:
    return ([rng.randint(-9, 12) for _ in range(rng.randint(3, 8))],)


def _text_arguments(rng: random.Random) -> tuple[Any, ...]:
    return (" ".join(rng.choice(_WORDS) for _ in range(rng.randint(1, 4))),)


def _number_arguments(rng: random.Random) -> tuple[Any, ...]:
    return (rng.randint(-12, 20), rng.randint(-12, 20))


FAMILIES = (
    Family(
        name="list",
        parameters="xs",
        start="",
        steps=_LIST_STEPS,
        ends=_LIST_ENDS,
        arguments=_list_arguments,
    ),
    Family(
        name="text",
        parameters="s",
        start="",
        steps=_TEXT_STEPS,
        ends=_TEXT_ENDS,
        arguments=_text_arguments,
    ),
    Family(
        name="numbers",
        parameters="a, b",
        start="n = a + b",
        steps=_NUMBER_STEPS,
        ends=_NUMBER_ENDS,
        arguments=_number_arguments,
    ),
)
