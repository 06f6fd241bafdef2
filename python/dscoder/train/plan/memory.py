"""What the fullest moment of a step needs on the first rank, which holds the most of every parameter.

Three moments compete: the end of the forward, where the loss is; the start of the backward, where a layer's
gradients come to all that the forward kept; the end of the backward, where nothing of the forward is left
but every gradient is there.

Gradients. Micro-batches of one step add up in whole float32 gradients of everything that a rank computes
with, unsharded: that is what makes one reduction a step possible, and 4 bytes for every dense parameter and
every local expert's. With one micro-batch a rank and step, or sums after each, only the rank's part stays.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from dscoder.config import ModelConfig
from dscoder.config.plan import Precision
from dscoder.train.loss import CHUNK_TOKENS
from dscoder.train.plan.activations import (
    Tokens,
    around_saved,
    layer_peak,
    layer_saved,
    layer_workspace,
)
from dscoder.train.plan.exchange import buffer_bytes
from dscoder.train.plan.layout import Layout
from dscoder.train.plan.weights import Unit, Weights, gathered_numel, held_numel

_F32 = 4
_BF16 = 2
CONTEXT_BYTES = 2 * 10**9  # the CUDA context, NCCL's channels, cuBLAS: assumed


@dataclass(frozen=True, kw_only=True, slots=True)
class States:
    """What a rank holds between steps, to the byte."""

    weights: int  # float32 masters, or bfloat16 weights that are rounded stochastically
    moments: int  # AdamW's two, float32


def states(weights: Weights, layout: Layout, precision: Precision) -> States:
    """Of the first rank."""
    held = weights.sum_over(lambda unit: held_numel(unit, layout))
    item = _BF16 if precision == "bf16_stochastic" else _F32
    return States(weights=item * held, moments=2 * _F32 * held)


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes at the fullest moment, by what they are for."""

    moment: str
    weights: int
    moments: int
    gradients: int  # float32, kept for the optimizer
    exchange: int  # slots for tokens between expert ranks
    gathered: int  # weights put together for the layers at work
    activations: int  # kept by the forward
    working: int  # of the layer or the loss at work
    slack: int  # fragmentation, of all that comes and goes
    context: int

    @property
    def total(self) -> int:
        """Of all."""
        held = self.weights + self.moments + self.gradients + self.exchange + self.context
        return held + self.gathered + self.activations + self.working + self.slack


@dataclass(frozen=True, kw_only=True, slots=True)
class _Moment:
    name: str
    gradients: int
    activations: int
    working: int

    @property
    def total(self) -> int:
        return self.gradients + self.activations + self.working


def _kept_gradients(weights: Weights, layout: Layout, num_rounds: int) -> tuple[int, int]:
    """Bytes before the last round's backward, and behind it."""
    parts = _F32 * weights.sum_over(lambda unit: held_numel(unit, layout))
    if num_rounds == 1:
        return 0, parts
    if layout.sums_each_batch:
        return parts, parts
    whole = _F32 * weights.sum_over(lambda unit: gathered_numel(unit, layout))
    return whole, whole


def _gathered(weights: Weights, layout: Layout, precision: Precision) -> int:
    """Bytes of weights that multiply, beside those held: of all layers, or of two and the root."""
    everything = _BF16 * weights.sum_over(lambda unit: gathered_numel(unit, layout))
    if layout.world == 1:  # nothing is gathered: bfloat16 weights stand beside their masters
        return everything if precision == "bf16" else 0
    if not layout.reshard:
        return everything
    # The layer at work and the one that is gathered meanwhile; the root stays.
    in_flight = 2 * max(gathered_numel(kind.unit, layout) for kind in weights.kinds)
    return _BF16 * (gathered_numel(weights.root, layout) + in_flight)


def _loss_working(model: ModelConfig, tokens: Tokens) -> int:
    """A chunk's logits in float32 and in the weights' type, and the head's gradient in both."""
    chunk = min(CHUNK_TOKENS, tokens.count)
    return (chunk + model.width) * model.vocab_size * (_F32 + tokens.item)


def _on_the_way(unit: Unit, layout: Layout, tokens: Tokens, num_rounds: int) -> int:
    """Gradients of a unit's weights that do not stay.

    As autograd makes them, in float32 on their way to other ranks, and what has come if it is to be added.
    """
    made_and_sent = (tokens.item + _F32) * gathered_numel(unit, layout)
    if layout.sums_each_batch and num_rounds > 1:
        return made_and_sent + _F32 * held_numel(unit, layout)
    return made_and_sent


def _layer_working(
    model: ModelConfig, layout: Layout, weights: Weights, tokens: Tokens, num_rounds: int
) -> int:
    """The most that a layer's backward needs beside what the forward kept.

    What is computed again; the gradients it goes through; those of its weights.
    """
    return max(
        layer_peak(model, kind.first_idx, tokens, layout)
        - layer_saved(model, kind.first_idx, tokens, layout)
        + layer_workspace(model, kind.first_idx, tokens, layout)
        + _on_the_way(kind.unit, layout, tokens, num_rounds)
        for kind in weights.kinds
    )


def _moments(
    model: ModelConfig, layout: Layout, weights: Weights, tokens: Tokens, num_rounds: int
) -> Iterator[_Moment]:
    before, behind = _kept_gradients(weights, layout, num_rounds)
    saved = [layer_saved(model, kind.first_idx, tokens, layout) for kind in weights.kinds]
    kept = sum(kind.count * size for kind, size in zip(weights.kinds, saved, strict=True))
    around = around_saved(model, tokens)
    head_gradient = tokens.item * model.vocab_size * model.width
    working = _layer_working(model, layout, weights, tokens, num_rounds)
    root_gradients = _on_the_way(weights.root, layout, tokens, num_rounds)
    yield _Moment(
        name="loss",
        gradients=before,
        activations=kept + around - head_gradient,
        working=_loss_working(model, tokens),
    )
    yield _Moment(name="backward begins", gradients=before, activations=kept + around, working=working)
    yield _Moment(
        name="backward ends",
        gradients=behind,
        activations=saved[0] + around,
        working=max(working, root_gradients),
    )


def memory(
    model: ModelConfig,
    layout: Layout,
    weights: Weights,
    tokens: Tokens,
    *,
    precision: Precision,
    num_rounds: int,
    per_node: int,
    slack: float,
) -> Memory:
    """At the fullest moment of a step of `num_rounds` micro-batches like `tokens`."""
    held = states(weights, layout, precision)
    gathered = _gathered(weights, layout, precision)
    moments = _moments(model, layout, weights, tokens, num_rounds)
    fullest = max(moments, key=lambda moment: moment.total)
    exchange = 0
    if model.moe is not None:
        exchange = buffer_bytes(
            model.moe, layout, width=model.width, num_tokens=tokens.count, item=tokens.item, per_node=per_node
        )
    return Memory(
        moment=fullest.name,
        weights=held.weights,
        moments=held.moments,
        gradients=fullest.gradients,
        exchange=exchange,
        gathered=gathered,
        activations=fullest.activations,
        working=fullest.working,
        slack=round((slack - 1) * (gathered + fullest.activations + fullest.working)),
        context=CONTEXT_BYTES,
    )
