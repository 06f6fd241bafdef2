"""Single-line infilling: take one line, or its end, out of a file, let the model write it, compare.

The rule is Coder-V2's (Table 6, footnote 5; the SantaCoder task): only the first generated line counts, and
it is exact if it equals the line taken out, both stripped of surrounding white space.
"""

import contextlib
import hashlib
import io
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from dscoder.tasks.answers import first_line

_COMMENT_STARTS = ("#", "//", "/*", "*", "--", '"""', "'''")


@dataclass(frozen=True, kw_only=True, slots=True)
class Hole:
    """One line, or its end, taken out of a document: prefix + answer + suffix is the document."""

    name: str
    prefix: str
    suffix: str
    answer: str  # with its indentation and its line break


@dataclass(frozen=True, kw_only=True, slots=True)
class HoleRule:
    """Which lines may be taken out; lengths are of the stripped line."""

    min_length: int = 4
    max_length: int = 80
    min_context: int = 2  # lines that must stand before and after it


@dataclass(frozen=True, kw_only=True, slots=True)
class InfillingScore:
    """How many holes were filled exactly."""

    num_exact: int
    num_holes: int

    @property
    def exact_match(self) -> float:
        """Share of holes filled exactly, in [0, 1]; 0 without holes."""
        return self.num_exact / self.num_holes if self.num_holes else 0.0


def single_line_holes(
    documents: Iterable[tuple[str, str]],
    *,
    num_holes: int,
    seed: int = 0,
    max_per_document: int = 4,
    rule: HoleRule | None = None,
) -> list[Hole]:
    """Choose up to `num_holes` lines from (name, text) documents.

    Lines are ranked by a hash of seed, text and line number, so the choice depends neither on the order of
    the documents nor on their names, and a smaller `num_holes` gives a subset: the first of the list.
    """
    ranked: list[tuple[bytes, Hole]] = []
    for name, text in documents:
        lines = list(io.StringIO(text))
        digest = hashlib.blake2b(text.encode(), digest_size=16, salt=seed.to_bytes(16, "little")).digest()
        ranks = sorted(
            (hashlib.blake2b(digest + line_idx.to_bytes(8, "little"), digest_size=16).digest(), line_idx)
            for line_idx in _candidates(text, lines, rule or HoleRule())
        )
        ranked += [(rank, _take_out(name, lines, line_idx)) for rank, line_idx in ranks[:max_per_document]]
    ranked.sort(key=lambda entry: entry[0])
    return [hole for _, hole in ranked[:num_holes]]


def line_end_holes(holes: Sequence[Hole], *, seed: int = 0) -> list[Hole]:
    """The same lines, each taken out only from a position inside its code on, as a cursor stands in it.

    The position is a hash of seed, name and line, uniform over those that leave at least one character on
    either side.
    """
    return [_from_inside(hole, seed) for hole in holes]


def is_exact(completion: str, answer: str) -> bool:
    """Whether the first line of `completion` is the answer, white space around both aside."""
    return first_line(completion).strip() == answer.strip()


def score_infilling(completions: Sequence[str], holes: Sequence[Hole]) -> InfillingScore:
    """Compare each completion with its hole."""
    if len(completions) != len(holes):
        raise ValueError(
            f"score_infilling: completions must be {len(holes)}, one a hole, got {len(completions)}"
        )
    exact = [is_exact(text, hole.answer) for text, hole in zip(completions, holes, strict=True)]
    return InfillingScore(num_exact=sum(exact), num_holes=len(exact))


def _from_inside(hole: Hole, seed: int) -> Hole:
    code = hole.answer.strip()
    key = f"{seed} {hole.name} {code}".encode()
    draw = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
    position = hole.answer.index(code) + 1 + draw % max(1, len(code) - 1)
    return replace(hole, prefix=hole.prefix + hole.answer[:position], answer=hole.answer[position:])


def _take_out(name: str, lines: Sequence[str], line_idx: int) -> Hole:
    return Hole(
        name=f"{name}:{line_idx + 1}",
        prefix="".join(lines[:line_idx]),
        suffix="".join(lines[line_idx + 1 :]),
        answer=lines[line_idx],
    )


def _candidates(text: str, lines: Sequence[str], rule: HoleRule) -> Iterator[int]:
    """Indices of the lines that `rule` allows: code, not prose, not the edge of the document."""
    prose = _lines_of_long_strings(text)
    for line_idx in range(rule.min_context, len(lines) - rule.min_context):
        line = lines[line_idx].strip()
        is_code = not line.startswith(_COMMENT_STARTS) and any(char.isalpha() for char in line)
        if is_code and rule.min_length <= len(line) <= rule.max_length and line_idx not in prose:
            yield line_idx


def _lines_of_long_strings(text: str) -> set[int]:
    """Indices of lines in Python strings of several lines (docstrings, mostly), as far as it is Python."""
    inside: set[int] = set()
    # In other languages the tokens are nonsense sooner or later, and the search ends there.
    with contextlib.suppress(tokenize.TokenError, SyntaxError):
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.STRING and token.end[0] > token.start[0]:
                inside.update(range(token.start[0] - 1, token.end[0]))
    return inside
