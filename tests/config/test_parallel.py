"""A layout that cannot be is refused before anything starts, by the names and numbers given."""

from dataclasses import replace
from typing import Any

import pytest

from dscoder.config import ModelConfig, preset
from dscoder.config.parallel import ParallelConfig, check_experts_divide
from dscoder.config.train import PretrainConfig


def grouped(*, num_experts: int, num_groups: int) -> ModelConfig:
    config = preset("tiny_moe")
    assert config.moe is not None
    moe = replace(config.moe, num_experts=num_experts, num_groups=num_groups, num_groups_kept=num_groups)
    return replace(config, moe=moe)


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"expert": 0}, "expert must be >= 1, got 0"),
        ({"replicate": -1}, "replicate must be >= 1, got -1"),
        ({"timeout": 0.0}, r"timeout must be positive, got 0\.0"),
        ({"timeout": float("nan")}, "timeout must be positive, got nan"),
    ],
)
def test_impossible_values_are_refused(fields: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ValueError, match=f"ParallelConfig: {wanted}"):
        ParallelConfig(**fields)


@pytest.mark.parametrize(
    ("num_experts", "num_groups", "expert"),
    [(16, 1, 8), (16, 4, 2), (16, 4, 4), (16, 4, 8), (12, 3, 1), (160, 8, 8), (160, 8, 16)],
)
def test_ranks_that_hold_whole_groups_or_share_one_are_taken(
    num_experts: int, num_groups: int, expert: int
) -> None:
    check_experts_divide(
        grouped(num_experts=num_experts, num_groups=num_groups), ParallelConfig(expert=expert)
    )


def test_experts_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="expert must divide the model's num_experts = 16, got 3"):
        check_experts_divide(preset("tiny_moe"), ParallelConfig(expert=3))


def test_groups_and_ranks_that_overlap_are_refused() -> None:
    wanted = "must divide the model's num_groups = 3 or be a multiple of it, got 2"
    with pytest.raises(ValueError, match=wanted):
        check_experts_divide(grouped(num_experts=12, num_groups=3), ParallelConfig(expert=2))


def test_a_dense_model_has_no_expert_ranks() -> None:
    with pytest.raises(ValueError, match="expert must be 1 for a model without experts, got 2"):
        check_experts_divide(preset("tiny_dense"), ParallelConfig(expert=2))


def test_a_run_checks_its_layout_with_its_model() -> None:
    with pytest.raises(ValueError, match="num_experts = 16, got 5"):
        PretrainConfig(data="data", out="out", model=preset("tiny_moe"), parallel=ParallelConfig(expert=5))
