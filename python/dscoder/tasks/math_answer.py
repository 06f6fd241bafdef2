"""Whether two answers to a question of mathematics are the same, as DeepSeek-Coder's PAL evaluation has it.

In turn: as numbers, with a relative tolerance of 1e-4 and regardless of a factor of 100 either way (a
percentage); as text without brackets; element by element, where both are lists; as expressions. The published
rule gives expressions to sympy, which evaluates text that a model wrote, and may not come back. Here a small
reader takes arithmetic, roots, pi and names of one letter, and compares values: of constants to 1e-3, of
expressions in letters at fixed points.
"""

import ast
import cmath
import math
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType

_NUMBER_TOLERANCE = 1e-4
_CONSTANT_TOLERANCE = 1e-3
_LETTER_TOLERANCE = 1e-9
_MAX_EXPRESSION = 200  # characters
_NUM_POINTS = 3  # at which expressions in letters must agree

_OPERATIONS: Mapping[type[ast.operator], Callable[[complex, complex], complex]] = MappingProxyType(
    {
        ast.Add: lambda a, b: a + b,
        ast.Sub: lambda a, b: a - b,
        ast.Mult: lambda a, b: a * b,
        ast.Div: lambda a, b: a / b,
        ast.Pow: lambda a, b: a**b,
    }
)
# LaTeX to Python, in this order; the fractions first have braces given to single characters.
_LATEX = (
    (re.compile(r"\\[dt]frac"), r"\\frac"),
    (re.compile(r"\\frac([^{\\])"), r"\\frac{\1}"),
    (re.compile(r"(\\frac\{[^{}]*\})([^{\\])"), r"\1{\2}"),
    (re.compile(r"\\frac\{([^{}]*)\}\{([^{}]*)\}"), r"((\1)/(\2))"),
    (re.compile(r"\\sqrt\{([^{}]*)\}"), r"sqrt(\1)"),
    (re.compile(r"\\sqrt(\w)"), r"sqrt(\1)"),
    (re.compile(r"\\pi\b"), "pi"),
    (re.compile(r"\\(cdot|times)"), "*"),
    (re.compile(r"\^"), "**"),
    (re.compile(r"\{"), "("),
    (re.compile(r"\}"), ")"),
    (re.compile(r"(?<=[\d)])\s*(?=[A-Za-z(])"), "*"),  # 2x, 2(x + 1)
)
# What an answer may carry that is no part of its value.
_DRESSING = (
    (re.compile(r"\s+"), " "),
    (re.compile(r"\\left|\\right|\\[!$%]|[$%]|\^\{?\\circ\}?"), ""),
    (re.compile(r"(?<=.)\\text\{[^{}]*\}$"), ""),
    (re.compile(r"\\text\{([^{}]*)\}"), r"\1"),
    (re.compile(r"(\d)\.0+(?=\D|$)"), r"\1"),
    (re.compile(r"(?<![\d])\.(?=\d)"), "0."),
    (re.compile(r"^\w{1,2} ?= ?"), ""),
    (re.compile(r" "), ""),
)


def strip_answer(answer: str) -> str:
    """An answer without units, currency signs, percent signs, spaces and the zeros of a whole number."""
    answer = answer.strip().rstrip(".")
    for pattern, replacement in _DRESSING:
        answer = pattern.sub(replacement, answer)
    return answer


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def _same_number(found: float, wanted: float) -> bool:
    return any(
        math.isclose(value, found, rel_tol=_NUMBER_TOLERANCE)
        for value in (wanted / 100, wanted, wanted * 100)
    )


def _without_brackets(text: str) -> str:
    return re.sub(r"[\[\](){}]", "", text)


def _parts(text: str) -> list[str] | None:
    """The elements of a list or tuple; None if the text is neither."""
    if len(text) >= 2 and (text[0], text[-1]) in (("[", "]"), ("(", ")")):
        return text[1:-1].split(",")
    return None


def _letter_value(letter: str, point: int) -> complex:
    """An unremarkable number for a letter, another at each point."""
    return complex(0.6 + 0.137 * (ord(letter) % 31) + 0.71 * point)


def _value(node: ast.expr, point: int) -> complex:
    """The value of an expression; ValueError for whatever is not arithmetic."""
    if isinstance(node, ast.Constant):
        return _constant(node.value)
    if isinstance(node, ast.Name):
        return complex(math.pi) if node.id == "pi" else _letter_value(_one_letter(node.id), point)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _value(node.operand, point)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_value(node.left, point), _value(node.right, point))
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "sqrt" and len(node.args) == 1:
        return cmath.sqrt(_value(node.args[0], point))
    raise ValueError(f"math_equal: an expression must be arithmetic, got {type(node).__name__}")


def _constant(value: object) -> complex:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"math_equal: a constant must be a number, got {value!r}")
    return complex(value)


def _one_letter(name: str) -> str:
    if len(name) != 1:
        raise ValueError(f"math_equal: a name must be one letter, got {name!r}")
    return name


def _parse(text: str) -> ast.expr:
    if len(text) > _MAX_EXPRESSION:
        raise ValueError(
            f"math_equal: an expression must have <= {_MAX_EXPRESSION} characters, got {len(text)}"
        )
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    return ast.parse(text, mode="eval").body


def _same_expression(found: str, wanted: str) -> bool:
    try:
        trees = [_parse(found), _parse(wanted)]
        has_letters = any(isinstance(n, ast.Name) and n.id != "pi" for t in trees for n in ast.walk(t))
        values = [[_value(tree, point) for tree in trees] for point in range(_NUM_POINTS)]
    except (ValueError, SyntaxError, ArithmeticError, RecursionError, MemoryError):
        return False
    tolerance = _LETTER_TOLERANCE if has_letters else _CONSTANT_TOLERANCE
    return all(cmath.isclose(a, b, rel_tol=tolerance) for a, b in values)


def math_equal(found: str, wanted: str) -> bool:
    """Whether an answer is the one wanted; text that is no mathematics is equal only to itself."""
    found, wanted = found.strip(), wanted.strip()
    number, wanted_number = _number(found), _number(wanted)
    if number is not None and wanted_number is not None:
        return _same_number(number, wanted_number)
    if not found:
        return False
    if _without_brackets(found) == _without_brackets(wanted):
        return True
    parts, wanted_parts = _parts(found), _parts(wanted)
    if parts is not None and wanted_parts is not None and found[0] == wanted[0]:
        return len(parts) == len(wanted_parts) and all(map(math_equal, parts, wanted_parts))
    return _same_expression(found, wanted)
