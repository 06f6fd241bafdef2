"""The rotary part of config.json, both forms and both ways.

The published checkpoints have `rope_theta` beside `rope_scaling: {"type": "linear" | "yarn", ...}` or null;
transformers 5 has `rope_parameters: {"rope_type": ..., "rope_theta": ..., ...}`. We write the first, which
every reader knows.

YaRN multiplies cos and sin by one number, the attention factor. The published DeepSeek-V2 code, and this
package for both families, takes m(mscale) / m(mscale_all_dim) with m(x) = 0.1 * x * ln(factor) + 1 and the
defaults 1 and 0; transformers takes that only if both are given and not 0, else m(1). Where the two differ
what we write carries `attention_factor`, by which transformers abides. What we read is understood as the
published code does for deepseek_v2; for llama, which only transformers knows with YaRN, it is refused.
"""

import math
from typing import Any

from dscoder.checkpoint.fields import Fields
from dscoder.config import RopeConfig, YarnConfig
from dscoder.models.yarn import magnitude

_DEFAULT_THETA = 10000.0
_TYPES = ("default", "linear", "yarn")


def rope_from_hf(fields: Fields, *, is_latent: bool) -> RopeConfig:
    """Read the rotary fields of a config; `is_latent` says deepseek_v2 instead of llama."""
    theta = fields.value("rope_theta")
    published, native = fields.part("rope_scaling"), fields.part("rope_parameters")
    fields.expect("partial_rotary_factor", 1.0)
    if theta is not None:
        theta = fields.number("rope_theta")
    if published is None and native is None:
        return RopeConfig(theta=_DEFAULT_THETA if theta is None else theta)
    ropes = [_scaled(part, theta, is_latent) for part in (published, native) if part is not None]
    if ropes[0] != ropes[-1]:
        wanted = f"absent or equal to rope_scaling ({ropes[0]})"
        raise fields.refuse("rope_parameters", wanted=wanted, got=ropes[-1])
    return ropes[0]


def _scaled(part: Fields, theta: float | None, is_latent: bool) -> RopeConfig:
    inner_theta = part.number("rope_theta", _DEFAULT_THETA if theta is None else theta)
    if theta is not None and inner_theta != theta:
        raise part.refuse("rope_theta", wanted=f"{theta}, as outside", got=inner_theta)
    old_name, new_name = part.value("type"), part.value("rope_type")
    key = "rope_type" if old_name is None else "type"
    kind = part.choice(key, _TYPES, default="default")
    if old_name is not None and new_name is not None and old_name != new_name:
        raise part.refuse("rope_type", wanted=f"{old_name!r}, as type is", got=new_name)
    part.expect("partial_rotary_factor", 1.0)
    linear_factor, yarn = 1.0, None
    if kind == "linear":
        linear_factor = part.number("factor")
    elif kind == "yarn":
        yarn = _yarn_from_hf(part, is_latent)
    part.finish()
    return RopeConfig(theta=inner_theta, linear_factor=linear_factor, yarn=yarn)


def _yarn_from_hf(part: Fields, is_latent: bool) -> YarnConfig:
    part.expect("truncate", True)
    yarn = YarnConfig(
        factor=part.number("factor"),
        original_max_positions=part.integer("original_max_position_embeddings"),
        beta_fast=part.number("beta_fast", 32.0),
        beta_slow=part.number("beta_slow", 1.0),
        mscale=part.number("mscale", 1.0),
        mscale_all_dim=part.number("mscale_all_dim", 0.0),
    )
    wanted = _published_factor(yarn)
    got = part.number("attention_factor", wanted if is_latent else _transformers_factor(yarn))
    if not math.isclose(got, wanted, rel_tol=1e-6):
        raise part.refuse("attention_factor", wanted=f"{wanted} (what mscale gives)", got=got)
    return yarn


def rope_to_hf(rope: RopeConfig) -> dict[str, Any]:
    """rope_theta and rope_scaling of a published config.json."""
    if rope.yarn is not None:
        return {"rope_theta": rope.theta, "rope_scaling": _yarn_to_hf(rope.yarn)}
    if rope.linear_factor == 1.0:
        return {"rope_theta": rope.theta, "rope_scaling": None}
    return {"rope_theta": rope.theta, "rope_scaling": {"type": "linear", "factor": rope.linear_factor}}


def _yarn_to_hf(yarn: YarnConfig) -> dict[str, Any]:
    scaling = {
        "type": "yarn",
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_max_positions,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "mscale": yarn.mscale,
        "mscale_all_dim": yarn.mscale_all_dim,
    }
    wanted = _published_factor(yarn)
    if not math.isclose(wanted, _transformers_factor(yarn), rel_tol=1e-9):
        scaling["attention_factor"] = wanted
    return scaling


def _published_factor(yarn: YarnConfig) -> float:
    return magnitude(yarn.factor, yarn.mscale) / magnitude(yarn.factor, yarn.mscale_all_dim)


def _transformers_factor(yarn: YarnConfig) -> float:
    """What transformers computes where attention_factor is absent."""
    if yarn.mscale and yarn.mscale_all_dim:
        return _published_factor(yarn)
    return magnitude(yarn.factor, 1.0)
