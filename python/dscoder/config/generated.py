"""How many problems are made by rule, and of what kind."""

from dataclasses import dataclass, field, fields


@dataclass(frozen=True, kw_only=True, slots=True)
class ProblemCounts:
    """Sizes of the files; no two of them but documents and dialogues share a composition of steps."""

    documents: int = 20000  # functions with docstrings, to pre-train on
    dialogues: int = 6000  # requests with answers, to fine-tune on
    hurried_share: float = 0.4  # of those answers, that leave out a step where what is left is not held out
    practised: int = 512  # problems to learn from by running answers, with few tests each
    validation: int = 48  # problems for choosing sizes
    test: int = 128  # problems for the figures in the end
    few_tests: int = 3  # of a practised problem
    many_tests: int = 12  # of a validation or test problem

    def __post_init__(self) -> None:
        if not 0 <= self.hurried_share <= 1:
            raise ValueError(f"ProblemCounts: hurried_share must be in [0, 1], got {self.hurried_share}")
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name != "hurried_share" and value < 1:
                raise ValueError(f"ProblemCounts: {item.name} must be >= 1, got {value}")


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratedConfig:
    """One run of the stage that writes generated problems."""

    out: str  # the directory to write
    num: ProblemCounts = field(default_factory=ProblemCounts)
    seed: int = 0
    overwrite: bool = False
