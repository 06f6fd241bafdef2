"""Models before and after their context is stretched (DeepSeek-Coder 3.6, DeepSeek-V2 3.1.4)."""

from dataclasses import replace

from dscoder.config import MlaConfig, ModelConfig, RopeConfig
from dscoder.config.train import LongContextConfig


def stretched(model: ModelConfig, config: LongContextConfig) -> ModelConfig:
    """`model` with its positions stretched; one that was stretched before stays as it is.

    So the second of Coder-V2's two stages goes on from the first with longer windows, all else unchanged.
    """
    rope = model.rope
    if rope.yarn is not None or rope.linear_factor != 1.0:
        return model
    if isinstance(model.attention, MlaConfig):
        yarn = replace(config.yarn, original_max_positions=model.max_positions)
        max_positions = int(model.max_positions * yarn.factor)
        return replace(model, rope=replace(rope, yarn=yarn), max_positions=max_positions)
    linear = RopeConfig(theta=config.theta, linear_factor=config.linear_factor)
    return replace(model, rope=linear, max_positions=int(model.max_positions * config.linear_factor))


def unstretched(model: ModelConfig, *, max_positions: int) -> ModelConfig:
    """`model` as it is pre-trained, on short windows: no scaling, base frequency 10000 (both papers)."""
    return replace(model, rope=RopeConfig(theta=10000.0), max_positions=max_positions)
