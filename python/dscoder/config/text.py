"""How documents become training text: fill-in-the-middle."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class FimConfig:
    """Fill-in-the-middle at document level, before packing (DeepSeek-Coder section 3.1.2)."""

    rate: float = 0.5  # share of documents that are rearranged; v1 and Coder-V2-Lite train at 0.5
    spm_share: float = 0.0  # of those, the share in suffix-prefix-middle order; the others are PSM
    cut: Literal["character", "line"] = "character"  # where a document may be cut

    def __post_init__(self) -> None:
        for field, value in (("rate", self.rate), ("spm_share", self.spm_share)):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"FimConfig: {field} must be between 0 and 1, got {value}")
        if self.cut not in ("character", "line"):
            raise ValueError(f"FimConfig: cut must be 'character' or 'line', got {self.cut!r}")
