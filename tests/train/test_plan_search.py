"""Which layouts fit, which is the quickest, and what the run costs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dscoder.checkpoint import config_to_hf
from dscoder.config import preset
from dscoder.config.plan import PlanConfig
from dscoder.train.plan.question import batch_of, read_model
from dscoder.train.plan.search import advice, plan

TINY = PlanConfig(model="tiny_moe", gpus=4, seq=128, batch=16)


def test_what_fits_comes_quickest_first_and_what_does_not_nearest_first() -> None:
    found = plan(replace(TINY, model="v2_lite", seq=4096, gpus=8, batch=4608))
    seconds = [one.time.total for one in found.fitting]
    assert seconds == sorted(seconds)
    assert all(one.memory.total <= 80e9 for one in found.fitting)
    lacking = [one.missing for one in found.missing]
    assert lacking == sorted(lacking)
    assert all(one.missing == one.memory.total - 80 * 10**9 > 0 for one in found.missing)


def test_each_way_to_share_parameters_out_stands_once() -> None:
    found = plan(TINY)
    grids = [(one.layout.replicate, one.layout.expert_shard, one.layout.expert) for one in found.fitting]
    assert len(set(grids)) == len(grids) == 6
    assert found.num_fitting == found.num_layouts > 6


def test_show_limits_what_is_told() -> None:
    assert len(plan(replace(TINY, show=2)).fitting) == 2


def test_memory_of_the_question_decides() -> None:
    fixed = replace(TINY, expert=1, replicate=1, micro=4, recompute="full")
    sizes = sorted(one.memory.total for one in plan(replace(fixed, memory="1B")).missing)
    assert plan(replace(fixed, memory=f"{sizes[0]}B")).num_fitting == 1
    assert plan(replace(fixed, memory=f"{sizes[0] - 1}B")).num_fitting == 0


def test_a_run_is_its_steps() -> None:
    found = plan(replace(TINY, tokens="1M", price=2.0))
    run, seconds = found.run, found.fitting[0].time.total
    assert run is not None
    assert run.num_steps == 489  # of 16 * 128 tokens, the last not full
    assert run.gpu_hours == pytest.approx(489 * seconds / 3600 * 4)
    assert run.days == pytest.approx(489 * seconds / 86400)
    assert run.price == pytest.approx(2 * run.gpu_hours)
    assert plan(TINY).run is None


def test_the_batch_is_the_papers_unless_given() -> None:
    assert batch_of(PlanConfig(model="v2", gpus=8)).sequences == 9216
    assert batch_of(PlanConfig(model="v2", gpus=8, batch=64)).sequences == 64
    assert batch_of(PlanConfig(model="v2", gpus=8, batch_tokens="4096000")).sequences == 1000


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "v3"}, "model must be a directory or one of coder_1_3b, .* got 'v3'"),
        ({"seq": 1025}, "seq must be <= the model's max_positions = 1024, got 1025"),
        ({"batch": None}, "batch or batch_tokens must be given for a model without .* got neither"),
        ({"batch": None, "batch_tokens": "1M"}, "batch_tokens must be a multiple of seq = 128, got 1000000"),
    ],
)
def test_what_cannot_be_planned_is_named(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"plan: {message}"):
        plan(replace(TINY, **fields))


def test_a_model_may_be_a_directory(tmp_path: Path) -> None:
    model = preset("v2_lite")
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(model)))
    assert read_model(str(tmp_path)).moe == model.moe


def test_v2_on_512_gpus_needs_gradients_in_parts() -> None:
    found = plan(PlanConfig(model="v2", gpus=512))
    assert found.fitting
    assert all(one.layout.sums_each_batch for one in found.fitting)


def test_advice_is_what_would_fit() -> None:
    question = PlanConfig(model="v2", gpus=32)
    assert plan(question).num_fitting == 0
    *_, more = advice(question)
    assert more == "more GPUs (--gpus 64)"
    assert plan(replace(question, gpus=64)).num_fitting > 0


def test_other_layouts_and_less_precision_help_where_they_do() -> None:
    question = PlanConfig(model="v2_lite", gpus=8, memory="50GB", micro=1, recompute="none")
    layouts, precision = "another layout, micro-batch or recomputation", "--precision bf16_stochastic"
    assert layouts in advice(question)
    assert precision not in " ".join(advice(question))
    tight = advice(replace(question, memory="38GB", recompute="full"))
    assert layouts not in tight
    assert precision in " ".join(tight)
