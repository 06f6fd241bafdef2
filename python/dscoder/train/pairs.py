"""Candidates that were judged become answers with a pass rate, and pairs of a better and a worse answer.

Everything here is a function of plain data. Candidates that write the same program count as one answer: its
pass rate is the mean of their scores, so a program whose tests sometimes pass stands between. What nobody
could judge says nothing about its program, and is in no answer. Nor is a program of which a candidate has a
score and is suspect: what passes by cheating its tests is no example of either side.
"""

import ast
import hashlib
import random
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from dscoder.config.reward import PairsConfig
from dscoder.sandbox.verdict import Program
from dscoder.tasks.ending import without_digests
from dscoder.tasks.problem import Form, Grade

# Outcomes of a grade that no verdict has.
NO_PROGRAM = "no_program"  # the answer holds nothing to run
_UNFINISHED = {NO_PROGRAM: 0, "compile_error": 1}  # how far an answer came; all others came further


class NoPairsError(ValueError):
    """No two answers to a prompt differ in what they are worth: there is nothing to learn an order from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One completion of a problem as it was judged; a line of the candidates' files.

    Attributes:
        problem: its id.
        form, prompt, suffix: what was asked, see Prompt.
        source: "model", or the file that it was read from.
        idx: which sample of the problem, or which record of the file, from 0.
        program: hash of the normalised program.
        outcome: of the grade, see `outcome_of`.
        score: None where nobody could judge.
        is_suspect: whether it shows signs of cheating its tests.
        verdict: what the sandbox said, without the output of the program.
    """

    problem: str
    form: Form
    prompt: str
    suffix: str
    source: str
    idx: int
    completion: str
    finish_reason: str | None
    program: str
    outcome: str
    score: float | None
    detail: str
    is_suspect: bool = False
    verdict: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class GradedAnswer:
    """One program that candidates wrote; `candidates` are their (source, idx)."""

    completion: str
    program: str
    pass_rate: float
    outcome: str
    candidates: tuple[tuple[str, int], ...]


@dataclass(kw_only=True, slots=True)
class _Group:
    scores: list[float] = field(default_factory=list)
    members: list[Candidate] = field(default_factory=list)


def _python_form(source: str) -> str | None:
    """The program without comments and layout; None if it is no Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the literals of other people's programs
            return ast.unparse(ast.parse(source))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _text_form(source: str) -> str:
    """The text without trailing white space and empty lines."""
    return "\n".join(line.rstrip() for line in source.split("\n") if line.strip())


def program_key(program: Program | None, completion: str) -> str:
    """The same for programs that differ in layout alone (in Python, in comments too); a sha256.

    Without a program the completion's text is what counts.
    """
    digest = hashlib.sha256()
    if program is None:
        digest.update(_text_form(completion).encode(errors="surrogatepass"))
        return digest.hexdigest()
    files = program.files or {"": program.source or ""}
    for name, content in files.items():
        if isinstance(content, bytes):
            normal = content
        else:
            text = without_digests(content)
            python = _python_form(text) if program.language == "python" else None
            normal = (python or _text_form(text)).encode(errors="surrogatepass")
        for part in (name.encode(), normal):
            digest.update(len(part).to_bytes(8, "little") + part)
    digest.update(repr((program.language, program.args, program.stdin)).encode())
    return digest.hexdigest()


def outcome_of(grade: Grade) -> str:
    """One word for a grade: the verdict's, unless the answer held no program or its output was wrong."""
    if grade.is_passed:
        return "passed"
    if grade.verdict is None:
        return NO_PROGRAM if grade.is_passed is not None else "not_judged"
    return "failed" if grade.verdict.is_passed else grade.verdict.outcome


def suspect_programs(candidates: Iterable[Candidate]) -> set[str]:
    """The programs that have a score and may have cheated for it."""
    return {candidate.program for candidate in candidates if candidate.is_suspect and candidate.score}


def pool_answers(candidates: Sequence[Candidate]) -> list[GradedAnswer]:
    """The distinct programs among the judged candidates of one problem, in order of first appearance."""
    groups: dict[str, _Group] = {}
    withheld = suspect_programs(candidates)
    for candidate in candidates:
        if candidate.score is not None and candidate.program not in withheld:
            group = groups.setdefault(candidate.program, _Group())
            group.scores.append(candidate.score)
            group.members.append(candidate)
    return [
        GradedAnswer(
            completion=group.members[0].completion,
            program=program,
            pass_rate=sum(group.scores) / len(group.scores),
            outcome=Counter(member.outcome for member in group.members).most_common(1)[0][0],
            candidates=tuple((member.source, member.idx) for member in group.members),
        )
        for program, group in groups.items()
    ]


def _is_better(one: GradedAnswer, other: GradedAnswer, config: PairsConfig) -> bool:
    gap = one.pass_rate - other.pass_rate
    if gap or not config.by_outcome:
        return gap >= config.min_gap
    furthest = len(_UNFINISHED)
    return _UNFINISHED.get(one.outcome, furthest) > _UNFINISHED.get(other.outcome, furthest)


def choose_pairs(
    answers: Sequence[GradedAnswer], config: PairsConfig, *, seed: int
) -> list[tuple[GradedAnswer, GradedAnswer]]:
    """(better, worse) pairs of the answers to one prompt, at most `config.max_pairs`.

    Each next pair is one whose answers were used least so far and whose outcomes were seen least together;
    `seed` decides among equals. So one right answer among many wrong ones meets different ones, and rare
    outcomes are not crowded out.
    """
    left = [pair for pair in product(answers, answers) if _is_better(*pair, config)]
    random.Random(seed).shuffle(left)
    num_uses: Counter[str] = Counter()
    num_seen: Counter[tuple[str, str]] = Counter()
    chosen: list[tuple[GradedAnswer, GradedAnswer]] = []
    while left and len(chosen) < config.max_pairs:
        best = min(
            range(len(left)),
            key=lambda i: (
                sum(num_uses[answer.program] for answer in left[i]),
                num_seen[left[i][0].outcome, left[i][1].outcome],
            ),
        )
        pair = left.pop(best)
        num_uses.update(answer.program for answer in pair)
        num_seen[pair[0].outcome, pair[1].outcome] += 1
        chosen.append(pair)
    return chosen
