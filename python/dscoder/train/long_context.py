"""Models before and after their context is stretched (DeepSeek-Coder 3.6, DeepSeek-V2 3.1.4)."""

from dataclasses import asdict, replace

from dscoder.config import MlaConfig, ModelConfig, RopeConfig
from dscoder.config.train import LongContextConfig
from dscoder.runtime.log import get_logger

_LOG = get_logger(__name__)


def stretched(model: ModelConfig, config: LongContextConfig) -> ModelConfig:
    """`model` with its positions stretched; one that was stretched before stays as it is.

    So the second of Coder-V2's two stages goes on from the first with longer windows, all else unchanged.

    Raises:
        ValueError: the model was stretched before, and `config` asks for something else than was done.
    """
    rope = model.rope
    if rope.yarn is not None or rope.linear_factor != 1.0:
        _check_stretch(rope, config)
        _LOG.info("the model is stretched already: it keeps its %d positions", model.max_positions)
        return model
    if isinstance(model.attention, MlaConfig):
        yarn = replace(config.yarn, original_max_positions=model.max_positions)
        max_positions = int(model.max_positions * yarn.factor)
        return replace(model, rope=replace(rope, yarn=yarn), max_positions=max_positions)
    linear = RopeConfig(theta=config.theta, linear_factor=config.linear_factor)
    return replace(model, rope=linear, max_positions=int(model.max_positions * config.linear_factor))


def _options(part: RopeConfig | LongContextConfig) -> dict[str, float]:
    yarn = {} if part.yarn is None else asdict(part.yarn)
    scales = {f"yarn.{name}": value for name, value in yarn.items() if name != "original_max_positions"}
    return {"theta": part.theta, "linear_factor": part.linear_factor, **scales}


def _check_stretch(rope: RopeConfig, config: LongContextConfig) -> None:
    """An option that was set must say what the model has: it cannot change it any more."""
    there, default = _options(rope), _options(LongContextConfig())
    for name, value in _options(config).items():
        if value not in (default[name], there.get(name)):
            raise ValueError(
                f"pretrain: long_context.{name} must be as in the model, which is stretched already "
                f"({there.get(name, 'without it')}), or not given, got {value}"
            )


def unstretched(model: ModelConfig, *, max_positions: int) -> ModelConfig:
    """`model` as it is pre-trained, on short windows: no scaling, base frequency 10000 (both papers)."""
    return replace(model, rope=RopeConfig(theta=10000.0), max_positions=max_positions)
