"""From what a model wrote to code: stop strings, fenced blocks, and one function out of a block.

The rules for blocks are those of DeepSeek-Coder's evaluation of instruct models on HumanEval.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Dialect:
    """How answers in one language are read.

    Attributes:
        fence: the word that marks its fenced blocks.
        main: how a main function starts; everything from there on is dropped.
        indent: of the closing brace, where the signature is not found.
        adds_brace: whether the closing brace belongs to the answer; elsewhere the tests start with it.
    """

    fence: str
    main: str = ""
    indent: int = 0
    adds_brace: bool = False


def cut_at(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stop strings."""
    found = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(found, default=len(text))]


def first_line(text: str) -> str:
    """The text before the first line break."""
    return text.split("\n", 1)[0]


def first_block(text: str, fence: str) -> str | None:
    """What stands in the first fenced block marked with `fence`, in any case; None without one."""
    found = re.search(f"```{re.escape(fence)}\n(.*?)```", text, flags=re.DOTALL | re.IGNORECASE)
    return found[1] if found else None


def split_signature(code: str, *, fence: str) -> tuple[str, str]:
    """(what stands before the function to complete, how that function starts) of the code that was given.

    Python: the last line that starts with "def ", up to its parenthesis. Elsewhere the last line, up to its
    brace. Blank lines do not count.
    """
    lines = [line for line in code.strip().split("\n") if line.strip()]
    if fence != "python":
        return "\n".join(lines[:-1]), lines[-1].split("{")[0].strip()
    places = [idx for idx, line in enumerate(lines) if line.startswith("def ")]
    if not places:
        raise ValueError(f"split_signature: code must have a line that starts with 'def ', got {code!r}")
    return "\n".join(lines[: places[-1]]), lines[places[-1]].split("(")[0].strip()


def cut_function(block: str, signature: str, dialect: Dialect) -> str:
    """The function called for, from a block that may hold more: from its signature to before its last brace.

    That is the last brace that starts a line at the signature's indentation; without one, all to the end. A
    block without the signature (capitals do not count) is taken from its start.
    """
    if dialect.main and dialect.main in block:
        block = block[: block.index(dialect.main)]
    start = block.lower().find(signature.lower())
    before = block[: max(start, 0)]
    indent = len(before) - len(before.rstrip(" ")) if start >= 0 else dialect.indent
    brace = "\n" + " " * indent + "}"
    end = block.rfind(brace)
    body = block[max(start, 0) : end if end >= 0 else len(block)]
    return body + brace if dialect.adds_brace else body


def complete_function(code: str, answer: str, dialect: Dialect) -> str:
    """The given code with its last function as the answer completes it.

    Without a fenced block the whole answer is taken for the rest of the code.
    """
    block = first_block(answer, dialect.fence)
    if block is None:
        return code + "\n" + answer
    before, signature = split_signature(code, fence=dialect.fence)
    return before + "\n" + cut_function(block, signature, dialect) + "\n"
