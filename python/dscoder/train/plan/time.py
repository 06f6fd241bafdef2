"""How long a step takes: what the GPU computes, what travels, and what of it is hidden.

Model of overlap: tokens travel while shared experts are computed, and nothing else hides them. Weights and
gradients travel while layers are computed, up to the smaller of both. Exchange and collectives share the
links and the network, one after the other. Launches, the first layer's gathering, uneven routing and slow
nodes are not in it. Nor is it that with exact slots the host waits for counts in each layer, and asks for the
next layer's weights only then: they travel while this layer's experts compute.
"""

from dataclasses import dataclass

from dscoder.config import GqaConfig, ModelConfig
from dscoder.train.flops import causal_pairs, forward_flops, training_flops
from dscoder.train.plan.activations import Tokens, layer_peak
from dscoder.train.plan.layout import Layout
from dscoder.train.plan.rates import Rates
from dscoder.train.plan.traffic import StepTraffic, Traffic
from dscoder.train.plan.weights import Weights, held_numel

# Bytes of memory that AdamW moves for a parameter: weight, gradient and both moments read, all but the
# gradient written, and the gradient read once more for its norm.
_OPTIMIZER_BYTES = 32
# Bytes of memory that the loss moves for a logit between its products (train/loss.py).
_LOGIT_BYTES = 50
# What a forward keeps is written and read, and so is its gradient.
_PASSES_OVER_SAVED = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Time:
    """Seconds of a step, or of a part of it, by what they go to; the parts add up to the whole."""

    products: float  # dense products and the head's
    experts: float
    attention: float
    elementwise: float  # norms, rotations, gates, the loss: bound by memory
    optimizer: float
    exchange: float  # tokens, as far as nothing hides them
    collectives: float  # weights and gradients, as far as nothing hides them

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return self.computing + self.optimizer + self.exchange + self.collectives

    @property
    def computing(self) -> float:
        """Seconds of forward and backward alone."""
        return self.products + self.experts + self.attention + self.elementwise


def travel_seconds(traffic: Traffic, rates: Rates) -> float:
    """Links and network work side by side; the slower one counts."""
    return max(traffic.link / rates.link.value, traffic.network / rates.network.value)


def _forwards(layout: Layout) -> tuple[int, int]:
    """How often a layer's forward is computed: all but the routed experts, and those."""
    return {"none": (1, 1), "selective": (2, 1), "full": (2, 2)}[layout.recompute]


def _backward_share(model: ModelConfig) -> float:
    """What attention's backward multiplies for each multiplication forward, the scores again counted in."""
    attention = model.attention
    if isinstance(attention, GqaConfig):
        return 5 / 2
    key_width, value_width = attention.qk_dim, attention.value_dim
    return (3 * key_width + 2 * value_width) / (key_width + value_width)


def _saved_of_all(model: ModelConfig, weights: Weights, tokens: Tokens) -> int:
    """What the layers keep without recomputation and with all experts on the rank: what must be moved."""
    return sum(kind.count * layer_peak(model, kind.first_idx, tokens, Layout()) for kind in weights.kinds)


def step_time(
    model: ModelConfig,
    layout: Layout,
    weights: Weights,
    tokens: Tokens,
    traffic: StepTraffic,
    *,
    rates: Rates,
    num_rounds: int,
) -> Time:
    """Of `num_rounds` micro-batches like `tokens` on every rank; windows are one document each."""
    flops = forward_flops(model)
    head = 2 * model.width * model.vocab_size
    all_tokens = num_rounds * tokens.count
    dense, routed = _forwards(layout)
    pairs = num_rounds * tokens.sequences * causal_pairs([tokens.length])
    products = all_tokens * ((dense + 2) * (flops.per_token - head) + 3 * head)
    experts = (routed + 2) * all_tokens * flops.choices_per_token * flops.per_choice
    attending = pairs * flops.per_pair
    moved = (_PASSES_OVER_SAVED + 2 * (dense - 1)) * num_rounds * _saved_of_all(model, weights, tokens)
    moved += _LOGIT_BYTES * all_tokens * model.vocab_size
    held = weights.sum_over(lambda unit: held_numel(unit, layout))
    moe, shared = model.moe, 0.0
    if moe is not None:
        num_moe_layers = sum(kind.count for kind in weights.kinds if kind.unit.experts)
        per_token = 6 * model.width * moe.num_shared_experts * moe.expert_width
        shared = (dense + 2) * all_tokens * num_moe_layers * per_token / rates.product.value
    computed = Time(
        products=products / rates.product.value,
        experts=experts / rates.experts.value,
        attention=dense * attending / rates.attention_forward.value
        + _backward_share(model) * attending / rates.attention_backward.value,
        elementwise=moved / rates.bandwidth.value,
        optimizer=_OPTIMIZER_BYTES * held / rates.bandwidth.value,
        exchange=max(0.0, travel_seconds(traffic.exchange, rates) - shared),
        collectives=0.0,
    )
    return _with_collectives(
        computed, traffic, rates, num_rounds=num_rounds, each_round=layout.sums_each_batch
    )


def _with_collectives(
    time: Time, traffic: StepTraffic, rates: Rates, *, num_rounds: int, each_round: bool
) -> Time:
    """Add what weights and gradients take longer than computing, which differs by round."""
    gather = travel_seconds(traffic.gather, rates) / num_rounds
    reduce = travel_seconds(traffic.reduce, rates) / (num_rounds if each_round else 1)
    replicas = travel_seconds(traffic.replicas, rates)
    computing = time.computing / num_rounds
    early = max(0.0, gather + (reduce if each_round else 0.0) - computing)
    last = max(0.0, gather + reduce + replicas - computing)
    return Time(
        products=time.products,
        experts=time.experts,
        attention=time.attention,
        elementwise=time.elementwise,
        optimizer=time.optimizer,
        exchange=time.exchange,
        collectives=(num_rounds - 1) * early + last,
    )


def utilisation(model: ModelConfig, *, sequences: int, length: int, seconds: float, flops: float) -> float:
    """MFU: the operations of a step's windows over what all GPUs, `flops` together, could do meanwhile."""
    needed = training_flops(
        model, num_tokens=sequences * length, num_pairs=sequences * causal_pairs([length])
    )
    return needed / (seconds * flops)
