"""What a run reports of its steps."""

from collections.abc import Mapping
from pathlib import Path

from dscoder.config.train import ReportConfig
from dscoder.train.report import RunReport


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
    assert set(found) == {"step", "tokens", "loss", "reward", "lr", "tokens_per_second"}
