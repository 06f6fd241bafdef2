"""What a plan says of the time of a step."""

from dataclasses import fields, replace

import pytest

from dscoder.config import ModelConfig, preset
from dscoder.train.flops import training_flops
from dscoder.train.plan.activations import Tokens
from dscoder.train.plan.layout import Layout
from dscoder.train.plan.rates import ASSUMED, Rate, Rates
from dscoder.train.plan.time import Time, step_time, travel_seconds, utilisation
from dscoder.train.plan.traffic import StepTraffic, Traffic
from dscoder.train.plan.weights import weights_of

MOE, DENSE = preset("tiny_moe"), preset("tiny_dense")
TOKENS = Tokens(sequences=2, length=100, item=2)
NOTHING = StepTraffic(gather=Traffic(), reduce=Traffic(), replicas=Traffic(), exchange=Traffic())
FAST = 1e30


def rates_of(**values: float) -> Rates:
    """So much per second; what is not named takes no time."""
    names = [field.name for field in fields(Rates)]
    return Rates(**{name: Rate(value=values.get(name, FAST), basis=ASSUMED, source="") for name in names})


def time_of(
    rates: Rates,
    *,
    model: ModelConfig = MOE,
    layout: Layout | None = None,
    traffic: StepTraffic = NOTHING,
    num_rounds: int = 1,
) -> Time:
    return step_time(
        model,
        layout or Layout(),
        weights_of(model),
        TOKENS,
        traffic,
        rates=rates,
        num_rounds=num_rounds,
    )


@pytest.mark.parametrize("model", [MOE, DENSE], ids=["moe", "dense"])
def test_products_attention_and_experts_are_all_operations_of_a_step(model: ModelConfig) -> None:
    # At one operation a second. Attention's backward forms the scores once more, which the count leaves out.
    time = time_of(
        rates_of(product=1, experts=1, attention_forward=1, attention_backward=1), model=model, num_rounds=3
    )
    forward = time_of(rates_of(attention_forward=1), model=model, num_rounds=3).attention
    counted = training_flops(model, num_tokens=600, num_pairs=6 * 100 * 101 // 2)
    assert time.products + time.experts + 3 * forward == pytest.approx(counted)


def test_attention_goes_back_at_five_products_for_two() -> None:
    forward = time_of(rates_of(attention_forward=1), model=DENSE).attention
    backward = time_of(rates_of(attention_backward=1), model=DENSE).attention
    assert backward == pytest.approx(2.5 * forward)


def test_recomputing_runs_layers_again_but_never_the_head() -> None:
    head = 6 * 256 * 4096 * TOKENS.count
    none, selective, full = (
        time_of(rates_of(product=1, experts=1), layout=Layout(recompute=recompute))
        for recompute in ("none", "selective", "full")
    )
    assert selective.products - head == pytest.approx((none.products - head) * 4 / 3)
    assert selective.experts == none.experts
    assert full.products == selective.products
    assert full.experts == pytest.approx(none.experts * 4 / 3)


def test_tokens_travel_behind_shared_experts_alone() -> None:
    # Three layers of two shared experts, forward and twice that backward.
    shared = 3 * 3 * TOKENS.count * 6 * 256 * 2 * 96
    traffic = replace(NOTHING, exchange=Traffic(link=1e9))
    slow = rates_of(link=1, product=shared / 1e6)
    assert time_of(slow, traffic=traffic, layout=Layout(expert=8)).exchange == pytest.approx(1e9 - 1e6)
    hidden = rates_of(link=1, product=shared / 1e10)
    assert time_of(hidden, traffic=traffic, layout=Layout(expert=8)).exchange == 0


def test_weights_travel_behind_computing_up_to_the_smaller_of_both() -> None:
    computing = time_of(rates_of(experts=1), num_rounds=4).computing
    traffic = replace(NOTHING, gather=Traffic(network=computing + 400))
    rates = rates_of(experts=1, network=1)
    assert time_of(rates, traffic=traffic, num_rounds=4).collectives == pytest.approx(400)
    traffic = replace(NOTHING, gather=Traffic(network=computing - 400))
    assert time_of(rates, traffic=traffic, num_rounds=4).collectives == 0


def test_gradients_of_a_step_travel_in_its_last_round() -> None:
    computing = time_of(rates_of(experts=1), num_rounds=4).computing
    rates = rates_of(experts=1, network=1)
    traffic = replace(
        NOTHING, reduce=Traffic(network=computing / 4 + 100), replicas=Traffic(network=computing)
    )
    found = time_of(rates, traffic=traffic, num_rounds=4)
    assert found.collectives == pytest.approx(100 + computing)
    each = replace(NOTHING, reduce=Traffic(network=computing + 400))
    found = time_of(rates, traffic=each, num_rounds=4, layout=Layout(sums_each_batch=True))
    assert found.collectives == pytest.approx(400)


def test_links_and_network_work_side_by_side() -> None:
    assert travel_seconds(Traffic(link=6, network=5), rates_of(link=2, network=1)) == 5


def test_adamw_moves_32_bytes_a_parameter_that_the_rank_holds() -> None:
    alone = time_of(rates_of(bandwidth=1), model=DENSE).optimizer
    assert time_of(rates_of(bandwidth=1), model=DENSE, layout=Layout(expert_shard=8)).optimizer == alone / 8
    num_parameters = weights_of(DENSE).sum_over(
        lambda unit: sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in unit.dense)
    )
    assert alone == 32 * num_parameters


def test_a_step_is_the_sum_of_its_parts() -> None:
    time = Time(products=1, experts=2, attention=4, elementwise=8, optimizer=16, exchange=32, collectives=64)
    assert time.total == 127


def test_full_use_is_one() -> None:
    flops = training_flops(MOE, num_tokens=200, num_pairs=2 * 5050)
    assert utilisation(MOE, sequences=2, length=100, seconds=2.0, flops=flops / 2) == pytest.approx(1.0)
