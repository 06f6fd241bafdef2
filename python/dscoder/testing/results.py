"""Where a run of the benchmarks is stored, and what of pytest-benchmark's report.

`python -m dscoder.testing.results` makes the folder of this machine's device below benchmarks/results and
writes the path of one run's file, named by the time, for --benchmark-json.
"""

import re
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from dscoder.testing.timing import device_name

RESULTS = Path("benchmarks/results")


def measured_device() -> torch.device:
    """What the benchmarks of this machine run on: its first GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def result_file(root: Path, device: torch.device, now: datetime) -> Path:
    """The file of a run that begins `now` on `device`, such as nvidia_h200/2026-11-20T11-30-00.json."""
    name = device_name(device) if device.type == "cuda" else "cpu"
    folder = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    return root / folder / f"{now.astimezone(UTC):%Y-%m-%dT%H-%M-%S}.json"


def describe_machine(machine: dict[str, Any], device: torch.device) -> None:
    """Name `device` and torch in pytest-benchmark's machine_info, which has neither; drop the host's name."""
    machine.pop("node", None)
    machine.update(device=device_name(device), torch=torch.__version__, cuda=torch.version.cuda)


def drop_rounds(report: dict[str, Any]) -> None:
    """Keep the statistics of each benchmark, not its thousands of single times."""
    for benchmark in report["benchmarks"]:
        benchmark["stats"].pop("data", None)


if __name__ == "__main__":
    path = result_file(RESULTS, measured_device(), datetime.now(UTC))
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.write(f"{path}\n")
