"""What measuring a model on held-out files takes."""

from dataclasses import dataclass, field

from dscoder.config.data import SourcesConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOutConfig:
    """Bits per byte and single-line infilling on the files that training never saw."""

    out: str  # the directory to write
    model: str  # a model directory
    data: str  # what `dscoder prepare` wrote: the held-out windows
    sources: SourcesConfig = field(default_factory=SourcesConfig)  # as prepare read them
    untrained_seed: int | None = None  # measure these initial weights of the same model too
    num_windows: int | None = None  # for bits per byte; None: all
    num_holes: int = 300
    max_per_document: int = 12  # holes of one file
    hole_seed: int = 0
    max_new_tokens: int = 48
    fim_order: str = "psm"  # of a hole's prompt: psm or spm, as the model learnt it
    prefix_share: float = 0.75  # of the context, where the text around a hole is too long
    max_batch: int = 32
    overwrite: bool = False

    def __post_init__(self) -> None:
        counts = {
            "num_holes": self.num_holes,
            "max_per_document": self.max_per_document,
            "max_new_tokens": self.max_new_tokens,
            "max_batch": self.max_batch,
        }
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"HeldOutConfig: {name} must be >= 1, got {value}")
        if self.num_windows is not None and self.num_windows < 1:
            raise ValueError(f"HeldOutConfig: num_windows must be >= 1, got {self.num_windows}")
