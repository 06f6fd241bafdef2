"""What every task is made of: Problem, Prompt, Grade and the Task protocol.

A task turns records into problems, an answer of a model into a program, and a verdict of the sandbox into a
grade. It runs nothing and knows no model, so rewards, preference pairs and evaluations share it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args

from dscoder.sandbox.verdict import Limits, Program, Verdict

# completion: the model continues the text; chat: the text is a user's message, for the chat template;
# infill: the model writes what stands between the text and the suffix.
Form = Literal["completion", "chat", "infill"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """What a model is asked.

    Attributes:
        suffix: what follows the hole, for form "infill".
        stop: strings that end the answer; they are no part of it.
    """

    text: str
    suffix: str = ""
    form: Form = "completion"
    stop: tuple[str, ...] = ()
    max_new_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One problem of a task.

    Attributes:
        task: name of the task.
        id: name of the problem, unique in its task.
        prompt: the text a model is given, as the task words it, with all of its examples.
        shorter_prompts: the same with fewer examples, the longest first.
        code: the code that was given, as the record has it to the character: what a program starts with.
        suffix: the code after the hole, where there is one.
        tests: what follows the answer in a program; for answers that are compared, empty.
        reference: an answer that is right, in the form in which a model gives it; None where there is none.
        answer: what the answer is compared with, where no tests decide.
        metadata: whatever else the record says.
    """

    task: str
    id: str
    prompt: str
    shorter_prompts: tuple[str, ...] = ()
    form: Form = "completion"
    stop: tuple[str, ...] = ()
    max_new_tokens: int
    language: str = "python"
    entry_point: str = ""
    code: str = ""
    suffix: str = ""
    tests: str = ""
    reference: str | None = None
    answer: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.form not in get_args(Form):
            raise ValueError(f"Problem: form must be one of {', '.join(get_args(Form))}, got {self.form!r}")
        if self.max_new_tokens < 1:
            raise ValueError(f"Problem: max_new_tokens must be >= 1, got {self.max_new_tokens}")
        if "" in self.stop:
            raise ValueError(f"Problem: stop strings must not be empty, got {self.stop!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Grade:
    """What an answer is worth.

    Attributes:
        is_passed: None if nobody can tell (the sandbox failed, a toolchain is missing); that is not wrong.
        score: 1 for passed, 0 for not, or a share between; None where `is_passed` is.
        verdict: what the sandbox said, if it was asked.
        detail: one line for a person; empty for a plain pass.
        is_suspect: whether the answer shows signs of working on its tests and not on the problem.
    """

    is_passed: bool | None
    score: float | None
    verdict: Verdict | None = None
    detail: str = ""
    is_suspect: bool = False

    def __post_init__(self) -> None:
        if (self.is_passed is None) != (self.score is None):
            raise ValueError(
                f"Grade: is_passed and score must both be None or neither, "
                f"got {self.is_passed} and {self.score}"
            )


def graded(is_passed: bool, *, verdict: Verdict | None = None, detail: str = "") -> Grade:
    """The grade of an answer that is right or wrong."""
    return Grade(is_passed=is_passed, score=float(is_passed), verdict=verdict, detail=detail)


def not_judged(detail: str, *, verdict: Verdict | None = None) -> Grade:
    """The grade of an answer of which nobody can tell."""
    return Grade(is_passed=None, score=None, verdict=verdict, detail=detail)


def grade_verdict(verdict: Verdict | None) -> Grade:
    """The grade where the sandbox alone decides."""
    if verdict is None:
        return not_judged("the program was not run")
    if not verdict.is_answer:
        return not_judged(f"{verdict.outcome}: {verdict.detail}", verdict=verdict)
    detail = "" if verdict.is_passed else f"{verdict.outcome}: {verdict.detail}"
    return graded(verdict.is_passed, verdict=verdict, detail=detail)


class Task(Protocol):
    """A set of problems with rules. For each answer: `program`, run it under `limits`, then `grade`.

    `grade` belongs into the process that called `program`: what says that tests ended differs by process.

    Attributes:
        name: what the task is called in files and on command lines.
        limits: what a program may take.
    """

    name: str
    limits: Limits

    def problems(self) -> Sequence[Problem]:
        """All problems, in the order of the records."""
        ...

    def request(self, problem: Problem, *, fits: Callable[[str], bool] | None = None) -> Prompt:
        """What to ask a model.

        Args:
            fits: whether a text leaves room for the answer. Examples are dropped until one does; if none
                does, the shortest text is returned and the caller cuts it.
        """
        texts = (problem.prompt, *problem.shorter_prompts)
        text = texts[0] if fits is None else next(filter(fits, texts), texts[-1])
        return Prompt(
            text=text,
            suffix=problem.suffix,
            form=problem.form,
            stop=problem.stop,
            max_new_tokens=problem.max_new_tokens,
        )

    def program(self, problem: Problem, completion: str) -> Program | None:
        """What to run for an answer; None if nothing needs or deserves to be run: `grade` says which."""
        ...

    def grade(self, problem: Problem, completion: str, verdict: Verdict | None) -> Grade:
        """What the answer is worth.

        Args:
            verdict: of its program; None where there is none.
        """
        return grade_verdict(verdict)
