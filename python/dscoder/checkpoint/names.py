"""Names of the published checkpoints and the parts of our parameters that they fill.

The published layout has a matrix per expert, and gate and up apart; ours has them stacked and gate above
up. A `Piece` is one published tensor and the view of our parameter that holds it: loading copies into the
view and saving writes it, so the two directions cannot drift apart.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from dscoder.config import MlaConfig, ModelConfig
from dscoder.models.region import Region

SCORE = "score.weight"  # the one row of a scalar head, here and there
_GQA = (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"), ("o_proj", "out"))
_MLA_PLAIN_QUERY = (("q_proj", "query"),)
_MLA_LATENT_QUERY = (("q_a_proj", "query_down"), ("q_a_layernorm", "query_norm"), ("q_b_proj", "query_up"))
_MLA = (
    ("kv_a_proj_with_mqa", "latent_down"),
    ("kv_a_layernorm", "latent_norm"),
    ("kv_b_proj", "latent_up"),
    ("o_proj", "out"),
)
_STACKED_GATE_UP = ".mlp.experts.gate_up_proj"
# Checkpoints of early LLaMA code hold these frequencies, which the config gives.
_DERIVED = ".rotary_emb.inv_freq"


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """One published tensor and where it lives in the model."""

    name: str  # in the files
    parameter: str  # in the model
    expert_idx: int | None = None  # of a stack of experts
    half_idx: int | None = None  # 0 the gate's rows of gate_up, 1 the up's

    def view(self, parameter: Tensor) -> Tensor:
        """The part of `parameter` that this piece is, sharing its memory."""
        part = parameter if self.expert_idx is None else parameter[self.expert_idx]
        if self.half_idx is None:
            return part
        num_rows = part.shape[0] // 2
        return part.narrow(0, self.half_idx * num_rows, num_rows)

    def region(self, shape: tuple[int, ...]) -> Region:
        """Where in the whole parameter, which is of `shape`, this piece is."""
        start, lengths = [0] * len(shape), list(shape)
        if self.expert_idx is not None:
            start[0], lengths[0] = self.expert_idx, 1
        if self.half_idx is not None:
            rows = 0 if self.expert_idx is None else 1
            lengths[rows] //= 2
            start[rows] = self.half_idx * lengths[rows]
        return Region(whole_shape=shape, start=tuple(start), shape=tuple(lengths))

    def place(self, box: Region) -> Region:
        """`box`, which lies in this piece's region of the parameter, as a part of the tensor in the files."""
        frame = self.region(box.whole_shape)
        kept = slice(None) if self.expert_idx is None else slice(1, None)
        start = tuple(place - origin for place, origin in zip(box.start, frame.start, strict=True))
        return Region(whole_shape=frame.shape[kept], start=start[kept], shape=box.shape[kept])

    def shape_in(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the tensor in the files, for a parameter of `shape`."""
        return self.region(shape).shape[0 if self.expert_idx is None else 1 :]


def has_stacked_experts(names: Iterable[str]) -> bool:
    """Whether a checkpoint holds each layer's experts as one tensor, as transformers has them in memory."""
    return any(name.endswith(_STACKED_GATE_UP) for name in names)


def is_derived(name: str) -> bool:
    """Whether the tensor `name` says nothing that config.json does not."""
    return name.endswith(_DERIVED)


def pieces(config: ModelConfig, *, stacked_experts: bool = False, is_scalar: bool = False) -> Iterator[Piece]:
    """Every published tensor of a model, layer by layer. The stacked form is read, never written.

    Args:
        is_scalar: of a ScalarModel, whose parameters go by the names they have in its backbone.
    """
    yield Piece(name="model.embed_tokens.weight", parameter="embed.weight")
    for layer_idx in range(config.num_layers):
        yield from _layer(config, layer_idx, stacked_experts)
    yield Piece(name="model.norm.weight", parameter="norm.weight")
    if is_scalar:
        yield Piece(name=SCORE, parameter=SCORE)
    elif not config.tie_embeddings:
        yield Piece(name="lm_head.weight", parameter="head.weight")


def _layer(config: ModelConfig, layer_idx: int, stacked_experts: bool) -> Iterator[Piece]:
    theirs, ours = f"model.layers.{layer_idx}", f"layers.{layer_idx}"
    for their_name, our_name in _attention(config):
        yield Piece(
            name=f"{theirs}.self_attn.{their_name}.weight", parameter=f"{ours}.attention.{our_name}.weight"
        )
    if config.is_moe_layer(layer_idx):
        yield from _experts(config, f"{theirs}.mlp", f"{ours}.moe", stacked_experts)
    else:
        yield from _mlp(f"{theirs}.mlp", f"{ours}.mlp")
    yield Piece(name=f"{theirs}.input_layernorm.weight", parameter=f"{ours}.attention_norm.weight")
    yield Piece(name=f"{theirs}.post_attention_layernorm.weight", parameter=f"{ours}.mlp_norm.weight")


def _attention(config: ModelConfig) -> tuple[tuple[str, str], ...]:
    if not isinstance(config.attention, MlaConfig):
        return _GQA
    return (_MLA_PLAIN_QUERY if config.attention.q_lora_rank is None else _MLA_LATENT_QUERY) + _MLA


def _mlp(theirs: str, ours: str) -> Iterator[Piece]:
    yield Piece(name=f"{theirs}.gate_proj.weight", parameter=f"{ours}.gate_up.weight", half_idx=0)
    yield Piece(name=f"{theirs}.up_proj.weight", parameter=f"{ours}.gate_up.weight", half_idx=1)
    yield Piece(name=f"{theirs}.down_proj.weight", parameter=f"{ours}.down.weight")


def _experts(config: ModelConfig, theirs: str, ours: str, stacked_experts: bool) -> Iterator[Piece]:
    assert config.moe is not None
    yield Piece(name=f"{theirs}.gate.weight", parameter=f"{ours}.gate.weight")
    gate_up, down = f"{ours}.experts.gate_up", f"{ours}.experts.down"
    if stacked_experts:
        yield Piece(name=f"{theirs}.experts.gate_up_proj", parameter=gate_up)
        yield Piece(name=f"{theirs}.experts.down_proj", parameter=down)
    for j in range(0 if stacked_experts else config.moe.num_experts):
        name = f"{theirs}.experts.{j}"
        yield Piece(name=f"{name}.gate_proj.weight", parameter=gate_up, expert_idx=j, half_idx=0)
        yield Piece(name=f"{name}.up_proj.weight", parameter=gate_up, expert_idx=j, half_idx=1)
        yield Piece(name=f"{name}.down_proj.weight", parameter=down, expert_idx=j)
    if config.moe.num_shared_experts:
        yield from _mlp(f"{theirs}.shared_experts", f"{ours}.shared")
