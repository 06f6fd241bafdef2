"""Batch sizes and learning rates of the papers."""

import itertools

import numpy as np
import pytest

from dscoder.config.train import BatchConfig, ScheduleConfig
from dscoder.train.schedule import batch_sequences, learning_rate, plan_batches, steps_for_tokens


def rates(schedule: ScheduleConfig, batch: BatchConfig, *, num_steps: int, window: int = 1) -> list[float]:
    consumed = plan_batches(batch, num_steps=num_steps, window=window)
    return [learning_rate(schedule, step=step, consumed=consumed) for step in range(num_steps)]


def test_warm_up_is_linear_and_reaches_the_maximum() -> None:
    schedule = ScheduleConfig(kind="constant", max_lr=1.0, warmup_steps=4)
    assert rates(schedule, BatchConfig(sequences=1), num_steps=6) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_multi_step_cuts_at_shares_of_the_tokens() -> None:
    schedule = ScheduleConfig(kind="multi_step", max_lr=1.0, warmup_steps=0, milestones=(0.8, 0.9))
    found = rates(schedule, BatchConfig(sequences=3), num_steps=10)
    assert found == pytest.approx([1.0] * 8 + [0.316, 0.316**2])


def test_a_growing_batch_moves_the_milestones_to_later_steps() -> None:
    schedule = ScheduleConfig(kind="multi_step", max_lr=1.0, warmup_steps=0, milestones=(0.5,))
    batch = BatchConfig(sequences=10, ramp_from=1, ramp_tokens=20, micro=1)
    consumed = plan_batches(batch, num_steps=8, window=1)
    assert consumed.tolist() == [0, 1, 2, 3, 5, 8, 12, 18, 27]
    # Half of the 27 sequences are seen after six steps, not after four.
    assert rates(schedule, batch, num_steps=8) == pytest.approx([1.0] * 7 + [0.316])


def test_cosine_ends_at_a_tenth() -> None:
    schedule = ScheduleConfig(kind="cosine", max_lr=2.0, warmup_steps=10)
    found = rates(schedule, BatchConfig(sequences=1), num_steps=1010)
    assert found[9] == 2.0
    assert found[10] == pytest.approx(2.0)
    assert found[510] == pytest.approx(2.0 * 0.55)
    assert found[-1] == pytest.approx(0.2, rel=1e-4)
    assert all(a >= b for a, b in itertools.pairwise(found[9:]))


def test_v2_ramps_from_2304_to_9216_over_225_billion_tokens() -> None:
    batch = BatchConfig(sequences=9216, ramp_from=2304, ramp_tokens=225_000_000_000, micro=1)
    assert batch_sequences(batch, num_tokens=0) == 2304
    assert batch_sequences(batch, num_tokens=112_500_000_000) == (2304 + 9216) // 2
    assert batch_sequences(batch, num_tokens=224_999_999_999) == 9215
    assert batch_sequences(batch, num_tokens=225_000_000_000) == 9216


def test_a_growing_batch_is_made_of_whole_micro_batches() -> None:
    batch = BatchConfig(sequences=32, ramp_from=8, ramp_tokens=1000, micro=8)
    sizes = {batch_sequences(batch, num_tokens=n) for n in range(0, 1100, 10)}
    assert sizes == {8, 16, 24, 32}


@pytest.mark.parametrize("num_tokens", [1, 999, 1000, 1001, 54_321])
@pytest.mark.parametrize(
    "batch", [BatchConfig(sequences=7), BatchConfig(sequences=9, ramp_from=2, ramp_tokens=3000, micro=1)]
)
def test_steps_for_tokens_is_the_smallest_that_suffices(batch: BatchConfig, num_tokens: int) -> None:
    num_steps = steps_for_tokens(batch, num_tokens=num_tokens, window=16)
    seen = plan_batches(batch, num_steps=num_steps, window=16) * 16
    assert seen[-1] >= num_tokens > seen[-2]


def test_a_plan_counts_sequences_before_each_step() -> None:
    assert plan_batches(BatchConfig(sequences=3), num_steps=3, window=8).tolist() == [0, 3, 6, 9]
    assert plan_batches(BatchConfig(sequences=3), num_steps=3, window=8).dtype == np.int64


@pytest.mark.parametrize(
    ("record", "fields", "message"),
    [
        (ScheduleConfig, {"max_lr": 0.0}, "max_lr must be positive, got 0.0"),
        (ScheduleConfig, {"warmup_steps": -1}, "warmup_steps must be >= 0, got -1"),
        (ScheduleConfig, {"milestones": (0.9, 0.8)}, r"milestones must rise inside \(0, 1\)"),
        (ScheduleConfig, {"milestones": (0.0, 0.8)}, r"milestones must rise inside \(0, 1\)"),
        (ScheduleConfig, {"factor": 0.0}, r"factor must be in \(0, 1\], got 0.0"),
        (BatchConfig, {"micro": 0}, "sequences and micro must be >= 1, got 32 and 0"),
        (BatchConfig, {"ramp_from": 2}, "ramp_from and ramp_tokens go together, got 2 and 0"),
        (
            BatchConfig,
            {"ramp_from": 64, "ramp_tokens": 1},
            r"ramp_from must be in \[1, sequences = 32\], got 64",
        ),
        (BatchConfig, {"ramp_from": 2, "ramp_tokens": -1}, "ramp_tokens must be >= 0, got -1"),
    ],
)
def test_wrong_fields_are_named(
    record: type[BatchConfig] | type[ScheduleConfig], fields: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        record(**fields)  # type: ignore[arg-type]
