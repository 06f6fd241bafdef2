"""Frozen records that say what a model is and what a run does; every number has one home here."""

from dscoder.config.model import (
    BalanceConfig,
    GqaConfig,
    MlaConfig,
    ModelConfig,
    MoeConfig,
    RopeConfig,
    YarnConfig,
)
from dscoder.config.presets import PRESETS, preset

__all__ = [
    "PRESETS",
    "BalanceConfig",
    "GqaConfig",
    "MlaConfig",
    "ModelConfig",
    "MoeConfig",
    "RopeConfig",
    "YarnConfig",
    "preset",
]
