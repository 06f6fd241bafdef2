"""Where a run of this machine is kept: `python -m benchmarks.result_file [root]` writes the path of its file.

It lies in the folder of the device below root (default: benchmarks/results) and is named by the time; neither
is made.
"""

import sys
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.reporting.records import CPU, RESULTS, run_file
from dscoder.testing.results import measured_device
from dscoder.testing.timing import device_name


def main(root: Path) -> Path:
    """The file of a run that begins now, on the device that benchmarks measure; all CPUs share a folder."""
    device = measured_device()
    return run_file(root, device_name(device) if device.type == "cuda" else CPU, datetime.now(UTC))


if __name__ == "__main__":
    sys.stdout.write(f"{main(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS)}\n")
