"""Floating-point operations of a training step, exact from the shapes of a model.

MFU, model FLOPs utilisation, is defined by the PaLM paper (Chowdhery et al., arXiv 2204.02311, section 4.1
and appendix B): the operations that the products of forward and backward need, over what the hardware could
have done in the same time. A multiplication with an addition counts as two. What is computed a second time
(recomputed activations, the scores that a fused attention forms again backward) is not counted again, and
what is no matrix product (norms, softmax, the choice of experts, the optimizer) not at all. The paper's
formula, 6 N + 12 L H Q T a token, is for dense models and the whole square of a window: here N are the
parameters that multiply the token, and attention has the pairs that a causal mask inside documents leaves.

Every product y = x w of the forward needs two of its size backward, one for each operand's gradient; so a
training step takes three times its forward.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dscoder.config import GqaConfig, MlaConfig, ModelConfig

_PASSES = 3  # the forward, and backward the gradients of both operands


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardFlops:
    """Operations of the forward by what they grow with."""

    per_token: int  # projections, dense and shared MLPs, gates, the head
    per_choice: int  # one routed expert computing one token in one layer
    per_pair: int  # one query seeing one key: scores and values, of all heads and layers
    choices_per_token: int  # routed experts of a token, over all layers


def _projections(config: GqaConfig | MlaConfig, width: int) -> int:
    """Elements of the matrices of one layer's attention; in training latents are expanded to heads."""
    if isinstance(config, GqaConfig):
        return 2 * width * config.head_dim * (config.num_heads + config.num_kv_heads)
    num_query_features = config.num_heads * config.qk_dim
    if config.q_lora_rank is None:
        query = width * num_query_features
    else:
        query = config.q_lora_rank * (width + num_query_features)
    latent = width * config.cache_dim
    latent += config.kv_lora_rank * config.num_heads * (config.nope_dim + config.value_dim)
    return query + latent + config.num_heads * config.value_dim * width


def _pair_width(config: GqaConfig | MlaConfig) -> int:
    """Multiplications of one query and one key in one layer: key width and value width of every head."""
    if isinstance(config, GqaConfig):
        return config.num_heads * 2 * config.head_dim
    return config.num_heads * (config.qk_dim + config.value_dim)


def forward_flops(config: ModelConfig) -> ForwardFlops:
    """What the forward of `config` costs, its expanded form as in training; the head included."""
    width, moe = config.width, config.moe
    num_moe_layers = sum(config.is_moe_layer(layer_idx) for layer_idx in range(config.num_layers))
    elements = config.num_layers * _projections(config.attention, width)
    elements += (config.num_layers - num_moe_layers) * 3 * width * config.mlp_width
    elements += width * config.vocab_size
    if moe is not None:
        shared = moe.num_shared_experts * 3 * width * moe.expert_width
        elements += num_moe_layers * (shared + width * moe.num_experts)
    return ForwardFlops(
        per_token=2 * elements,
        per_choice=0 if moe is None else 2 * 3 * width * moe.expert_width,
        per_pair=2 * config.num_layers * _pair_width(config.attention),
        choices_per_token=0 if moe is None else num_moe_layers * moe.num_topk,
    )


def causal_pairs(lengths: Sequence[int] | Tensor) -> int:
    """How many (query, key) pairs attend in documents of these lengths: n (n + 1) / 2 of each."""
    found = lengths.tolist() if isinstance(lengths, Tensor) else lengths
    return sum(length * (length + 1) // 2 for length in found)


def training_flops(config: ModelConfig, *, num_tokens: int, num_pairs: int, num_dropped: int = 0) -> int:
    """Operations of one step: forward and backward of every parameter, nothing recomputed.

    Args:
        num_tokens: in the step, padding included, which is computed like any other.
        num_pairs: `causal_pairs` of its documents.
        num_dropped: choices of routed experts that were dropped and not computed, over all layers.
    """
    forward = forward_flops(config)
    num_choices = num_tokens * forward.choices_per_token
    if min(num_tokens, num_pairs) < 0 or not 0 <= num_dropped <= num_choices:
        raise ValueError(
            "training_flops: num_tokens and num_pairs must be >= 0 and num_dropped in "
            f"[0, {num_choices}], got {num_tokens}, {num_pairs} and {num_dropped}"
        )
    return _PASSES * (
        num_tokens * forward.per_token
        + (num_choices - num_dropped) * forward.per_choice
        + num_pairs * forward.per_pair
    )
