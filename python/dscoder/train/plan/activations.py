"""Bytes that a forward keeps for its backward pass, from the tensors that the model saves.

Every line is one tensor; tests/train/test_plan_activations.py holds the sums against what autograd keeps, to
the byte. Shape letters as in docs/names.md: T tokens, M rows in expert order.
"""

from dataclasses import dataclass

from dscoder.config import GqaConfig, MlaConfig, ModelConfig, MoeConfig
from dscoder.train.plan.exchange import exchange_of
from dscoder.train.plan.layout import Layout

_F32 = 4
_I32 = 4
_I64 = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """What one micro-batch brings to a layer."""

    sequences: int
    length: int
    item: int  # bytes of an activation: 2 in bfloat16, 4 in float32
    gathers: bool = True  # experts read their tokens where they lie; else a copy in expert order is kept

    @property
    def count(self) -> int:
        """T."""
        return self.sequences * self.length


def _norm(tokens: Tokens, width: int) -> int:
    """An RMSNorm's input and one scale a token."""
    return tokens.count * (tokens.item * width + _F32)


def _latent_attention(attention: MlaConfig, tokens: Tokens) -> int:
    heads, item = attention.num_heads, tokens.item
    query_latent = 0
    if attention.q_lora_rank is not None:  # the latent that its norm reads, and the normed one
        query_latent = _norm(tokens, attention.q_lora_rank) + tokens.count * item * attention.q_lora_rank
    per_token = (
        2 * item * attention.cache_dim  # latent and key before and behind norm and rotation
        + _F32  # the norm's scale
        + 2 * item * heads * attention.qk_dim  # query and key
        + item * heads * (attention.nope_dim + attention.value_dim)  # expanded latents: the value is a view
        + item * heads * attention.value_dim  # out
        + _F32 * heads  # log-sum-exp
    )
    return query_latent + tokens.count * per_token


def _grouped_attention(attention: GqaConfig, tokens: Tokens) -> int:
    query_and_out = 2 * tokens.item * attention.num_heads * attention.head_dim
    key_and_value = 2 * tokens.item * attention.num_kv_heads * attention.head_dim
    return tokens.count * (query_and_out + key_and_value + _F32 * attention.num_heads)


def attention_saved(model: ModelConfig, tokens: Tokens) -> int:
    """Of the first half of a layer: norm, attention, output projection."""
    attention = model.attention
    kept = _norm(tokens, model.width) + tokens.count * tokens.item * model.width  # the normed tokens
    if isinstance(attention, MlaConfig):
        return kept + _latent_attention(attention, tokens)
    return kept + _grouped_attention(attention, tokens)


def _swiglu(tokens: Tokens, mlp_width: int) -> int:
    return tokens.count * tokens.item * 3 * mlp_width  # gate, up, and their product


def mlp_saved(model: ModelConfig, tokens: Tokens) -> int:
    """Of the second half of a layer without experts."""
    normed = tokens.count * tokens.item * model.width
    return _norm(tokens, model.width) + normed + _swiglu(tokens, model.mlp_width)


def gate_saved(moe: MoeConfig, width: int, tokens: Tokens) -> int:
    """Of scoring and choosing experts, and of the balance terms."""
    wide_copies = 0  # the gate multiplies in float32
    if tokens.item < _F32:
        wide_copies = _F32 * (tokens.count * width + moe.num_experts * width)
    balance = moe.balance
    has_balance = max(balance.expert, balance.device, balance.communication) > 0
    load = 3 * tokens.sequences * _F32 * moe.num_experts if has_balance else 0
    logits = _F32 * tokens.count * moe.num_experts
    return wide_copies + logits + load + _I32 * tokens.count * moe.num_topk  # the choices


def experts_saved(moe: MoeConfig, width: int, tokens: Tokens, *, num_rows: int, num_experts: int) -> int:
    """Of `num_rows` rows of `num_experts` experts: maps, [gate, up], hidden rows, outputs."""
    maps = _I32 * (num_rows + num_experts)  # each choice's row; where experts end
    rows = tokens.item * num_rows * (3 * moe.expert_width + width)
    if tokens.gathers:
        return maps + rows + _I32 * num_rows  # each row's token
    return maps + rows + tokens.item * num_rows * width


def routed_saved(moe: MoeConfig, width: int, tokens: Tokens, layout: Layout) -> int:
    """Of the routed experts and of all that moves tokens to them and back."""
    exchange = exchange_of(moe, layout, tokens.count)
    kept = experts_saved(moe, width, tokens, num_rows=exchange.rows, num_experts=exchange.num_experts)
    kept += _F32 * exchange.rows  # the choices' weights
    if layout.expert == 1:
        return kept
    if tokens.gathers:  # the tokens that came, which the experts read
        kept += tokens.item * exchange.slots * width
    return kept


def moe_saved(model: ModelConfig, moe: MoeConfig, tokens: Tokens, layout: Layout) -> int:
    """Of the second half of a layer with experts."""
    width = model.width
    kept = _norm(tokens, width) + tokens.count * tokens.item * width  # the normed tokens
    kept += gate_saved(moe, width, tokens) + routed_saved(moe, width, tokens, layout)
    return kept + _swiglu(tokens, moe.num_shared_experts * moe.expert_width)


def layer_peak(model: ModelConfig, layer_idx: int, tokens: Tokens, layout: Layout) -> int:
    """Of a layer without recomputation: what is there while its backward runs."""
    kept = attention_saved(model, tokens)
    if model.moe is None or not model.is_moe_layer(layer_idx):
        return kept + mlp_saved(model, tokens)
    return kept + moe_saved(model, model.moe, tokens, layout)


def layer_input(model: ModelConfig, tokens: Tokens) -> int:
    """What recomputing a layer starts from."""
    return tokens.count * tokens.item * model.width


def layer_saved(model: ModelConfig, layer_idx: int, tokens: Tokens, layout: Layout) -> int:
    """What a layer keeps from its forward to its backward."""
    if layout.recompute == "none":
        return layer_peak(model, layer_idx, tokens, layout)
    kept = layer_input(model, tokens)
    if layout.recompute == "selective" and model.moe is not None and model.is_moe_layer(layer_idx):
        kept += layer_input(model, tokens)  # the normed tokens, from which shared experts are computed again
        kept += routed_saved(model.moe, model.width, tokens, layout)
    return kept


def layer_workspace(model: ModelConfig, layer_idx: int, tokens: Tokens, layout: Layout) -> int:
    """The largest gradients that a layer's backward has at once, as it goes through its steps."""
    attention = model.attention
    if isinstance(attention, MlaConfig):
        key_width, value_width = attention.qk_dim, attention.value_dim
    else:
        key_width = value_width = attention.head_dim
    residual = 2 * layer_input(model, tokens)
    # Query, key, value and out; the query's gradient is summed in float32.
    heads = attention.num_heads * (tokens.item * 2 * (key_width + value_width) + _F32 * key_width)
    attending = tokens.count * heads
    if model.moe is None or not model.is_moe_layer(layer_idx):
        return residual + max(attending, tokens.count * tokens.item * 3 * model.mlp_width)
    exchange = exchange_of(model.moe, layout, tokens.count)
    # Out, [gate, up] and in of every row.
    routed = tokens.item * exchange.rows * (2 * model.width + 2 * model.moe.expert_width)
    if layout.expert > 1:  # rows that go out and come in
        routed += 2 * tokens.item * exchange.slots * model.width
    return residual + max(attending, routed)


def placement_bytes(model: ModelConfig, tokens: Tokens) -> int:
    """Angles of every token, its row of them, and the ends of windows: once for all layers."""
    return tokens.count * (_I64 + _F32 * model.rotated_dim) + _I32 * (tokens.sequences + 1)


def around_saved(model: ModelConfig, tokens: Tokens) -> int:
    """Outside the layers: token ids, placement, the last norm, gradients of the loss."""
    hidden_gradient = tokens.count * tokens.item * model.width
    head_gradient = tokens.item * model.vocab_size * model.width
    kept = tokens.count * _I64 + placement_bytes(model, tokens)
    return kept + _norm(tokens, model.width) + hidden_gradient + head_gradient
