"""The papers' runs, number by number."""

from typing import Any

import pytest

from dscoder.config import YarnConfig, preset
from dscoder.config.train import LongContextConfig
from dscoder.train.long_context import stretched, unstretched
from dscoder.train.recipes import RECIPES, recipe
from dscoder.train.schedule import plan_batches


@pytest.mark.parametrize(
    ("name", "num_tokens"),
    [
        ("coder_1_3b", 2.0e12),
        ("v2_lite", 5.7e12),
        ("v2", 8.1e12),
        ("coder_v2_lite", 6e12),
        ("coder_v2", 6e12),
    ],
)
def test_a_run_sees_the_tokens_of_its_paper(name: str, num_tokens: float) -> None:
    run = recipe(name)
    consumed = plan_batches(run.batch, num_steps=run.num_steps, window=run.window)
    assert int(consumed[-1]) * run.window == pytest.approx(num_tokens, rel=1e-5)


@pytest.mark.parametrize("family", ["coder_v2_lite", "coder_v2"])
def test_both_long_context_stages_see_as_many_tokens_a_step(family: str) -> None:
    runs = [recipe(f"{family}_{size}") for size in ("32k", "128k")]
    assert [run.batch.sequences * run.window for run in runs] == [1152 * 32768, 288 * 131072]
    assert runs[0].batch.sequences * runs[0].window == runs[1].batch.sequences * runs[1].window
    assert [run.num_steps for run in runs] == [1000, 1000]
    assert {run.schedule.kind for run in runs} == {"constant"}


def test_recipes_are_whole_configs() -> None:
    for name, run in RECIPES.items():
        config = run.config(data="d", out="o", init_from=None if run.model else "m")
        assert config.stage == ("long_context" if "long" in name or name.endswith("k") else "pretrain")
        assert run.fields()["num_steps"] == config.num_steps


def test_pre_training_is_on_short_windows_without_scaling() -> None:
    for name in ("coder_1_3b", "v2_lite", "v2"):
        model = recipe(name).model
        assert model is not None
        assert (model.max_positions, model.rope.theta) == (4096, 10000.0)
        assert model.rope.yarn is None
        assert model.rope.linear_factor == 1.0


@pytest.mark.parametrize("name", ["coder_1_3b", "coder_33b", "v2_lite"])
def test_stretching_what_was_pre_trained_gives_the_published_model(name: str) -> None:
    before = recipe(name).model
    assert before is not None
    assert stretched(before, LongContextConfig()) == preset(name)


def test_a_second_stage_stretches_nothing() -> None:
    once = stretched(unstretched(preset("v2"), max_positions=4096), LongContextConfig())
    assert once.max_positions == 163840
    assert stretched(once, LongContextConfig()) == once


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("v2_lite", {"yarn": YarnConfig(factor=8.0)}),
        ("v2_lite", {"theta": 5e5}),
        ("coder_1_3b", {"linear_factor": 2.0}),
        ("coder_1_3b", {"yarn": YarnConfig(beta_fast=16.0)}),
    ],
)
def test_options_that_a_stretched_model_cannot_take_are_refused(name: str, option: dict[str, Any]) -> None:
    key = next(iter(option))
    with pytest.raises(
        ValueError, match=rf"long_context\.{key}.* must be as in the model, which is stretched"
    ):
        stretched(preset(name), LongContextConfig(**option))


def test_options_that_a_stretched_model_has_already_are_welcome() -> None:
    configs = {
        "v2_lite": LongContextConfig(yarn=YarnConfig(factor=8.0)),
        "coder_1_3b": LongContextConfig(theta=20000.0, linear_factor=2.0),
    }
    for name, config in configs.items():
        before = recipe(name).model
        assert before is not None
        once = stretched(before, config)
        assert once != before
        assert stretched(once, config) == once


def test_an_unknown_recipe_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"name must be one of coder_1_3b, .*v2_lite, got 'v3'"):
        recipe("v3")
