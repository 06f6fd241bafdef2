"""transformers' DeepseekV2ForCausalLM on the weights of one of our models, without a second copy of them."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dscoder.checkpoint.config_hf import config_to_hf
from dscoder.checkpoint.names import pieces
from dscoder.models import Transformer

try:
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, StaticCache
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2RotaryEmbedding
except ImportError:  # a peer like the others: left out where it is not installed
    DeepseekV2Config = DeepseekV2ForCausalLM = DeepseekV2RotaryEmbedding = StaticCache = None

HAS_TRANSFORMERS = DeepseekV2ForCausalLM is not None


def their_model(ours: Transformer) -> nn.Module:
    """Its parameters are views of `ours`, on the same device; gradients would be its own."""
    weight = ours.head.weight
    config = DeepseekV2Config(
        **config_to_hf(ours.config, dtype=weight.dtype), experts_implementation="grouped_mm"
    )
    with torch.device("meta"):
        theirs = DeepseekV2ForCausalLM(config)
    # The only thing beside the weights that is not made in every forward.
    theirs.model.rotary_emb = DeepseekV2RotaryEmbedding(config).to(weight.device)
    parameters = dict(ours.named_parameters())
    for piece in pieces(ours.config, stacked_experts=True):
        parent, _, name = piece.name.rpartition(".")
        ours_too = parameters[piece.parameter]
        view = nn.Parameter(piece.view(ours_too.detach()), requires_grad=ours_too.requires_grad)
        setattr(theirs.get_submodule(parent), name, view)
    return theirs


def cache_of(theirs: nn.Module, rows: list[Tensor], *, latent_width: int, length: int) -> "StaticCache":
    """A static cache of what `rows`, a tensor [B, L, C + r] a layer, hold in their first `length` entries.

    It keeps latents and rotated keys as ours does; the entries from `length` on are free.
    """
    cache = StaticCache(config=theirs.config, max_cache_len=rows[0].shape[1])
    for layer, rows_BLd in zip(cache.layers, rows, strict=True):
        latent, rotated = rows_BLd[:, None].tensor_split([latent_width], dim=-1)
        layer.lazy_initialization(latent, rotated)
        layer.keys.copy_(latent)
        layer.values.copy_(rotated)
        layer.cumulative_length.fill_(length)
    return cache


def decode_step(
    theirs: nn.Module, cache: "StaticCache", tokens_B1: Tensor, *, experts: str, is_compiled: bool = False
) -> Callable[[], tuple[Tensor, Tensor]]:
    """What adds one token to each row: tokens [B] and logits [B, V], with sdpa.

    Timed: the step, and one launch that takes the cache's lengths back, so that every call is the same.
    """
    forward: Callable[..., Tensor] = torch.compile(theirs, dynamic=False) if is_compiled else theirs
    lengths = [layer.cumulative_length for layer in cache.layers]

    @torch.no_grad()
    def call() -> tuple[Tensor, Tensor]:
        theirs.config._attn_implementation = "sdpa"
        theirs.config._experts_implementation = experts
        logits_BV = forward(tokens_B1, past_key_values=cache, use_cache=True).logits[:, -1]
        torch._foreach_sub_(lengths, 1)
        return logits_BV.argmax(dim=-1), logits_BV

    return call
