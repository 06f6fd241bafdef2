"""What a run reports of its steps."""

from collections.abc import Mapping
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dscoder.config.train import ReportConfig
from dscoder.train.metrics import EVENTS, METRICS, read_metrics
from dscoder.train.report import LOSS_PICTURE, RunReport, short_line


def test_a_figure_is_the_mean_over_the_steps_that_have_it(tmp_path: Path) -> None:
    seen: list[Mapping[str, float]] = []
    config = ReportConfig(log_every=4, tensorboard="off", plot="off")
    steps = [{"loss": 1.0}, {"loss": 2.0, "reward": 0.5}, {"loss": 6.0, "reward": 0.25}, {"loss": 3.0}]
    waiting: Mapping[str, float] = {}
    # A run that was stopped between two reports goes on to the same one.
    for first in (0, 2):
        with RunReport(
            tmp_path, config, num_steps=4, resume_step=first, waiting=waiting, on_metrics=seen.append
        ) as report:
            for step in (first, first + 1):
                report.step_done(steps[step], step=step + 1, lr=0.1, num_tokens=1, total_tokens=step + 1)
            waiting = report.waiting()
    (found,) = seen
    assert (found["loss"], found["reward"]) == (3.0, 0.375)
    assert set(found) == {"step", "tokens", "loss", "reward", "lr", "tokens_per_second", "peak_memory_gib"}


def take_steps(directory: Path, *, is_first: bool = True) -> list[Mapping[str, float]]:
    """Two steps, the reports of which are returned."""
    seen: list[Mapping[str, float]] = []
    config = ReportConfig(log_every=1, tensorboard="auto", plot="auto")
    with RunReport(
        directory,
        config,
        num_steps=2,
        resume_step=0,
        waiting={},
        on_metrics=seen.append,
        is_first=is_first,
    ) as report:
        for step in (1, 2):
            report.step_done({"loss": 2.0}, step=step, lr=0.1, num_tokens=1, total_tokens=step, flops=10**9)
        report.evaluated({"held_out_loss": 2.5}, step=2, total_tokens=2)
    return seen


def test_other_ranks_than_the_first_write_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert take_steps(tmp_path, is_first=False) == []
    assert not list(tmp_path.iterdir())
    assert not [message for message in caplog.messages if "step" in message]
    assert len(take_steps(tmp_path)) == 3
    assert {path.name for path in tmp_path.iterdir()} >= {METRICS, EVENTS, LOSS_PICTURE}


def test_what_is_measured_is_in_the_metrics_and_the_events(tmp_path: Path) -> None:
    take_steps(tmp_path)
    lines = read_metrics(tmp_path / METRICS)[:2]
    events = EventAccumulator(str(tmp_path / EVENTS))
    events.Reload()
    for name in ("tokens_per_second", "peak_memory_gib"):
        written = [line[name] for line in lines]
        assert min(written) > 0
        assert [event.value for event in events.Scalars(name)] == pytest.approx(written)
    assert all("mfu" not in line for line in lines)  # a CPU's peak is not known


def test_a_line_is_short() -> None:
    report = {
        **{"step": 3, "tokens": 99, "loss": 2.3456, "balance": 0.1, "grad_norm": 1.0, "lr": 4.2e-4},
        **{"tokens_per_second": 12345.6, "mfu": 0.41234, "peak_memory_gib": 61.24},
        **{"expert_load_max": 1.73, "expert_load_mean": 1.5, "rank_load_max": 1.24, "rank_load_mean": 1.1},
        **{"dropped_share": 0.021, "dispatch_share": 0.031, "combine_share": 0.025},
    }
    assert short_line(report) == (
        "loss 2.346  lr 4.20e-04  12,346 tokens/s  MFU 41.2%  61.2 GiB  load x1.73  rank load x1.24  "
        "exchange 5.6%  dropped 2.1%"
    )


def test_a_line_leaves_out_what_is_not_there() -> None:
    report = {"step": 3, "accuracy": 0.5, "lr": 1e-3, "expert_load_max": 1.73, "dropped_share": 0.0}
    assert short_line(report) == "accuracy 0.500  lr 1.00e-03  load x1.73"
    assert short_line({"step": 3}) == ""
