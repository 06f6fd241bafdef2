"""Answers in steps, for process supervision (DeepSeekMath section 4.1.3): where each ends.

A text is cut behind every match of a pattern. A piece of white space alone is no step: it belongs to the one
before it (at the beginning, to the one after). The last step ends with the answer's last token, so the token
that ends the answer belongs to it.

A step ends with the token that has the last byte of its last character. A token may hold more than that, the
beginning of the next step or all of it: it belongs to the step that it ends, and steps that would end in one
token are one step. So every token belongs to one step, and every step has a token.
"""

import codecs
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from dscoder.text.tokenizer import Tokenizer

# Behind what a step ends; any other pattern is a regular expression of its own.
STEP_PATTERNS = {
    "lines": r"\n",
    "statements": r"\n(?=\S)",  # at the outermost level: what follows is not indented
    "sentences": r"[.!?](?=\s)|[\u3002\uff01\uff1f]|\n",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Steps:
    """The steps of one answer, in order; none if it has no tokens.

    Attributes:
        ends: how many tokens the answer has up to the end of each step, ascending; the last is all of them.
        text_ends: the same in characters of the text; the last is all of it.
    """

    ends: tuple[int, ...] = ()
    text_ends: tuple[int, ...] = ()

    def texts(self, text: str) -> tuple[str, ...]:
        """The steps; put together they are `text`."""
        return tuple(text[begin:end] for begin, end in pairwise((0, *self.text_ends)))


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """A name of STEP_PATTERNS, or a regular expression; ValueError if it is neither."""
    try:
        return re.compile(STEP_PATTERNS.get(pattern, pattern), re.MULTILINE)
    except re.error as error:
        names = ", ".join(STEP_PATTERNS)
        raise ValueError(
            f"rewards.process.steps must be {names} or a regular expression, got {pattern!r}: {error}"
        ) from error


def cut_text(text: str, pattern: re.Pattern[str]) -> list[int]:
    """Where each step of a text ends, in characters, ascending; the last is the end of the text."""
    ends: list[int] = []
    begin = 0
    for match in pattern.finditer(text):
        if text[begin : match.end()].strip():
            ends.append(match.end())
            begin = match.end()
        elif ends:
            ends[-1] = begin = match.end()
    if ends and not text[begin:].strip():
        ends.pop()
    return [*ends, len(text)]


def characters_after(tokens: Sequence[int], token_bytes: Sequence[bytes]) -> list[int]:
    """How many whole characters there are up to and with each token; bytes without one become U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    return list(accumulate(len(decoder.decode(token_bytes[token])) for token in tokens))


def token_at(end: int, characters: Sequence[int]) -> int:
    """How many tokens it takes until there are `end` characters; `characters` are after each token."""
    return min(bisect_left(characters, end) + 1, len(characters))


class StepCutter:
    """Cuts the answers of one tokenizer by one pattern."""

    def __init__(self, tokenizer: Tokenizer, pattern: str) -> None:
        """`pattern`: see `compile_pattern`."""
        self._pattern = compile_pattern(pattern)
        self._token_bytes = tokenizer.token_bytes()

    def cut(self, text: str, tokens: Sequence[int]) -> Steps:
        """The steps of an answer.

        Args:
            text: what its tokens say, up to its end.
            tokens: with those that ended it.
        """
        if not tokens:
            return Steps()
        self._check(text, tokens)
        characters = characters_after(tokens, self._token_bytes)
        text_ends = cut_text(text, self._pattern)
        found: dict[int, int] = {}  # of the steps that end in one token the last counts
        for text_end in text_ends[:-1]:
            found[token_at(text_end, characters)] = text_end
        found[len(tokens)] = len(text)
        return Steps(ends=tuple(found), text_ends=tuple(found.values()))

    def _check(self, text: str, tokens: Sequence[int]) -> None:
        told = b"".join(self._token_bytes[token] for token in tokens).decode(errors="replace")
        if not told.startswith(text):
            raise ValueError(
                f"grpo: the text of an answer must be what its tokens say for steps to be found, got "
                f"{text[:80]!r} for {told[:80]!r}"
            )
