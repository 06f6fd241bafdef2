"""What a run writes down: metrics.jsonl, one line a report, and TensorBoard events beside it.

Both are cut back to the checkpoint that a run resumes from, so no step stands there twice.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from dscoder.runtime.artifact import write_bytes
from dscoder.runtime.log import get_logger

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError:  # the extra "pretrain" is not installed
    SummaryWriter = None  # type: ignore[assignment,misc]

METRICS = "metrics.jsonl"
# Of a report's figures, those of the machine: the same run has others another time, or none.
MEASURED = ("tokens_per_second", "mfu", "peak_memory_gib", "dispatch_share", "combine_share")
EVENTS = "tensorboard"
_LOG = get_logger(__name__)


def has_tensorboard() -> bool:
    """Whether TensorBoard events can be written here."""
    return SummaryWriter is not None


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The reports of a run, in order; a last line that a killed process tore is left out.

    ValueError names the file and the line that is no report.
    """
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline is torn or empty
    return [_parse(line, path, number) for number, line in enumerate(lines, start=1)]


def _parse(line: bytes, path: Path, number: int) -> dict[str, float]:
    try:
        report = json.loads(line)
    except ValueError:
        report = None
    if not isinstance(report, dict) or not isinstance(report.get("step"), int):
        raise ValueError(f"{path}: line {number} must be a report with its step, got {line[:80]!r}")
    return report


class MetricsWriter:
    """Appends reports of one run; use as a context manager."""

    def __init__(self, directory: Path, *, resume_step: int, use_tensorboard: bool) -> None:
        """Go on after step `resume_step`: later reports of an earlier process are dropped."""
        path = directory / METRICS
        if resume_step and not path.is_file():
            _LOG.warning("%s is not there: the reports of the first %d steps are lost", path, resume_step)
        kept = [report for report in read_metrics(path) if report["step"] <= resume_step]
        write_bytes(path, "".join(json.dumps(report) + "\n" for report in kept).encode())
        self._file = path.open("a")
        self._events = None
        if use_tensorboard:
            self._events = SummaryWriter(str(directory / EVENTS), purge_step=resume_step + 1)

    def write(self, report: Mapping[str, float]) -> None:
        """Append one report; it must hold "step"."""
        self._file.write(json.dumps(dict(report)) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in report.items():
                if name != "step":
                    self._events.add_scalar(name, value, int(report["step"]))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()
