"""Which task a stage works on, and where its records are."""

from dataclasses import dataclass
from typing import Literal

Scoring = Literal["tests", "whole", "first_line"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskConfig:
    """A task by its name; what a task has no use for must be left out."""

    name: str  # human_eval, multipl_e, mbpp, single_line_infilling, gsm8k_pal, generated, or module.function
    sources: tuple[str, ...] = ()  # files or directories of records, or hf://datasets/<owner>/<name>/<path>
    asking: Literal["base", "instruct", "instruct_v2"] = "base"  # to be continued, or as a chat message
    language: str | None = None  # of multipl_e
    examples: str | None = None  # of gsm8k_pal: a file with worked examples in place of ours
    # Of single_line_infilling; None: first_line. Run the tests, or compare all or the first line of answers.
    scoring: Scoring | None = None

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("TaskConfig: name must not be empty")
        if (self.language is None) == (self.name == "multipl_e"):
            raise ValueError(
                f"TaskConfig: language must be given for multipl_e and only there, got {self.language} for "
                f"{self.name}"
            )
        if self.examples is not None and self.name != "gsm8k_pal":
            raise ValueError(f"TaskConfig: examples must be None but for gsm8k_pal, got {self.examples!r}")
        if self.scoring is not None and self.name != "single_line_infilling":
            raise ValueError(
                f"TaskConfig: scoring must be None but for single_line_infilling, got {self.scoring!r}"
            )
