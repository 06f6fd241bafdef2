"""metrics.jsonl, TensorBoard events and the picture."""

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dscoder.train.metrics import EVENTS, METRICS, MetricsWriter, read_metrics
from dscoder.train.plot import plot_loss
from dscoder.train.report import wants


def write(directory: Path, steps: list[int], *, resume_step: int, value: float) -> None:
    with MetricsWriter(directory, resume_step=resume_step, use_tensorboard=True) as writer:
        for step in steps:
            writer.write({"step": step, "loss": value})


def test_going_on_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, [1, 2, 3, 4], resume_step=0, value=1.0)
    write(tmp_path, [3, 4, 5], resume_step=2, value=2.0)
    lines = [(line["step"], line["loss"]) for line in read_metrics(tmp_path / METRICS)]
    assert lines == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0)]


def test_tensorboard_shows_each_step_once(tmp_path: Path) -> None:
    write(tmp_path, [1, 2, 3, 4], resume_step=0, value=1.0)
    write(tmp_path, [3, 4, 5], resume_step=2, value=2.0)
    events = EventAccumulator(str(tmp_path / EVENTS))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (1, 1.0),
        (2, 1.0),
        (3, 2.0),
        (4, 2.0),
        (5, 2.0),
    ]


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert [line["step"] for line in read_metrics(tmp_path / METRICS)] == [1, 2]
    write(tmp_path, [3], resume_step=2, value=0.0)
    assert [line["step"] for line in read_metrics(tmp_path / METRICS)] == [1, 2, 3]


@pytest.mark.parametrize("text", ["garbage", "[1]", '{"loss": 1.0}', "\xff"])
def test_a_line_that_is_no_report_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / METRICS
    path.write_bytes(f'{{"step": 1}}\n{text}\n{{"step": 2}}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 2 must be a report with its step, got b"):
        read_metrics(path)


def test_reports_that_are_gone_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, [1, 2], resume_step=0, value=1.0)
    assert not caplog.messages
    (tmp_path / METRICS).unlink()
    write(tmp_path, [3], resume_step=2, value=1.0)
    assert any("is not there: the reports of the first 2 steps are lost" in text for text in caplog.messages)


def test_no_file_is_no_reports(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / METRICS) == []


@pytest.mark.parametrize("name", ["held_out_bits_per_byte", "held_out_loss"])
@pytest.mark.parametrize("num_reports", [0, 1, 5])
def test_the_picture_is_a_png(tmp_path: Path, num_reports: int, name: str) -> None:
    reports = [{"step": i, "tokens": 10 * i, "loss": 5.0 - i} for i in range(num_reports)]
    plot_loss(reports, tmp_path / "loss.png")
    without = (tmp_path / "loss.png").read_bytes()
    reports += [{"step": i, "tokens": 10 * i, name: 2.0} for i in range(num_reports)]
    plot_loss(reports, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert ((tmp_path / "loss.png").read_bytes() != without) == bool(num_reports)
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


def test_what_is_missing_is_an_error_only_if_asked_for() -> None:
    assert wants("auto", is_there=True, what="plot")
    assert not wants("auto", is_there=False, what="plot")
    assert not wants("off", is_there=True, what="plot")
    with pytest.raises(ValueError, match=r"plot must be installed for report\.plot = on \(pip install"):
        wants("on", is_there=False, what="plot")
