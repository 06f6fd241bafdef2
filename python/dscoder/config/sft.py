"""What `dscoder sft` does, and the papers' runs (DeepSeek-Coder section 3.7, Coder-V2 section 3.5.1)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from dscoder.config.data import SourcesConfig
from dscoder.config.lora import LoraConfig
from dscoder.config.train import BatchConfig, CheckpointConfig, OptimizerConfig, ReportConfig, ScheduleConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class FimExamplesConfig:
    """Holes of source files among the dialogues; what is learnt is the middle and its end."""

    share: float = 0.0  # of all examples; 0: none
    sources: SourcesConfig = field(default_factory=SourcesConfig)
    spm_share: float = 0.0  # of them, in suffix-prefix-middle order
    cut: Literal["character", "line"] = "character"  # where a file may be cut
    section_bytes: int | None = None  # longer files are first cut into sections of at most this size

    def __post_init__(self) -> None:
        if not 0.0 <= self.share < 1.0:
            raise ValueError(f"FimExamplesConfig: share must be in [0, 1), got {self.share}")
        if not 0.0 <= self.spm_share <= 1.0:
            raise ValueError(f"FimExamplesConfig: spm_share must be between 0 and 1, got {self.spm_share}")
        if self.section_bytes is not None and self.section_bytes < 1:
            raise ValueError(f"FimExamplesConfig: section_bytes must be >= 1, got {self.section_bytes}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExamplesConfig:
    """How dialogues become windows of tokens."""

    template: Literal["coder", "v2"] = "v2"  # the chat template: of DeepSeek-Coder instruct, of Coder-V2
    window: int = 4096  # tokens; several dialogues stand in one window and do not see one another
    too_long: Literal["drop", "cut"] = "drop"  # what happens to a dialogue that is longer than a window
    held_out_share: float = 0.02  # of the dialogues, chosen by a hash of their first question
    fim: FimExamplesConfig = field(default_factory=FimExamplesConfig)
    pool_tokens: int = 2**26  # how many tokens are packed together, and so held in memory

    def __post_init__(self) -> None:
        if self.window < 2:
            raise ValueError(f"ExamplesConfig: window must be >= 2, got {self.window}")
        if not 0.0 <= self.held_out_share < 1.0:
            raise ValueError(f"ExamplesConfig: held_out_share must be in [0, 1), got {self.held_out_share}")
        if self.pool_tokens < self.window:
            raise ValueError(
                f"ExamplesConfig: pool_tokens must be >= window ({self.window}), got {self.pool_tokens}"
            )


def _schedule() -> ScheduleConfig:
    return ScheduleConfig(kind="cosine", max_lr=5e-6, warmup_steps=100)


@dataclass(frozen=True, kw_only=True, slots=True)
class SftConfig:
    """One run of `dscoder sft`."""

    dialogues: tuple[str, ...]  # .jsonl, .jsonl.gz or .parquet files, or directories of them
    init_from: str  # a model directory with its tokenizer, or a hub id
    out: str  # the run directory to write
    examples: ExamplesConfig = field(default_factory=ExamplesConfig)
    lora: LoraConfig | None = None  # train adapters beside the weights; None: the weights themselves
    epochs: float = 2.0  # over the windows, where num_steps is not given
    num_steps: int | None = None  # of the optimizer
    batch: BatchConfig = field(default_factory=BatchConfig)
    schedule: ScheduleConfig = field(default_factory=_schedule)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: weights and activations, with float32 masters
    device: str = "auto"  # auto: the GPU if there is one
    seed: int = 0
    num_threads: int | None = None  # None: every core; results are bit-identical only at one number
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not self.dialogues:
            raise ValueError("SftConfig: dialogues must name at least one file or directory, got none")
        if not self.epochs > 0:
            raise ValueError(f"SftConfig: epochs must be positive, got {self.epochs}")
        if self.num_steps is not None and self.num_steps < 1:
            raise ValueError(f"SftConfig: num_steps must be >= 1, got {self.num_steps}")
        if self.num_threads is not None and self.num_threads < 1:
            raise ValueError(f"SftConfig: num_threads must be >= 1, got {self.num_threads}")


# The papers give the rate, the warm-up, and the tokens of a batch and of the whole run. They are silent on
# the window (here v1's longest, and the 4096 of V2) and on where the cosine ends (here at a tenth).
SFT_RECIPES: Mapping[str, Mapping[str, object]] = {
    # v1: batches of 4M tokens, 2B in all.
    "coder": {
        "examples": ExamplesConfig(template="coder", window=16384),
        "num_steps": 477,
        "batch": BatchConfig(sequences=256, micro=1),
        "schedule": ScheduleConfig(kind="cosine", max_lr=1e-5, warmup_steps=100),
        "precision": "bf16",
    },
    # Coder-V2: batches of 1M tokens, 1B in all.
    "coder_v2": {
        "examples": ExamplesConfig(template="v2", window=4096),
        "num_steps": 954,
        "batch": BatchConfig(sequences=256, micro=1),
        "schedule": _schedule(),
        "precision": "bf16",
    },
}


def sft_recipe(name: str) -> Mapping[str, object]:
    """The fields of the run called `name`; ValueError lists the names there are."""
    if name not in SFT_RECIPES:
        raise ValueError(f"recipe: name must be one of {', '.join(sorted(SFT_RECIPES))}, got {name!r}")
    return SFT_RECIPES[name]
