"""Low-rank adapters (LoRA, arXiv 2106.09685): what is trained beside weights that stay."""

import math
from dataclasses import dataclass

# The linear layers of both families by their names in the published checkpoints.
LORA_TARGETS = (
    *("q_proj", "k_proj", "v_proj", "o_proj"),
    *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
    *("gate_proj", "up_proj", "down_proj"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """weight + scale * B A, with A [rank, in] and B [out, rank] trained."""

    rank: int = 16
    alpha: float = 32.0  # scale = alpha / rank
    dropout: float = 0.0  # of what A sees, in training
    targets: tuple[str, ...] = LORA_TARGETS  # names of layers as peft has them; those of the model count
    is_rank_stabilised: bool = False  # scale = alpha / sqrt(rank) (arXiv 2312.03732)

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"LoraConfig: rank must be >= 1, got {self.rank}")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"LoraConfig: alpha must be positive, got {self.alpha}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"LoraConfig: dropout must be in [0, 1), got {self.dropout}")
        unknown = sorted(set(self.targets) - set(LORA_TARGETS))
        if unknown or not self.targets:
            raise ValueError(
                f"LoraConfig: targets must be among {', '.join(LORA_TARGETS)}, "
                f"got {', '.join(unknown) or 'none'}"
            )

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.is_rank_stabilised else self.rank)
