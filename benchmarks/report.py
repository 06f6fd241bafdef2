"""Turn the stored runs into tables and plots, and what of them the README shows.

`python -m benchmarks.report` writes report.md, roofline.png and ratios.png into the folder of each device
below benchmarks/results, and brings the README's table of ops and plots up to date; of runs stored elsewhere
(`--results`) the README says nothing. `--accept` makes the newest run's times the accepted ones of its
device; `--check` fails where a newer result takes over 5 % longer than accepted. A file that is no run is
named, and the others are used; the exit status is 2 then.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.reporting.plots import ratios, roofline, save
from benchmarks.reporting.readme import generated, replace_generated
from benchmarks.reporting.records import (
    CPU,
    RESULTS,
    Key,
    Run,
    devices,
    newest_results,
    read_folder,
    read_runs,
)
from benchmarks.reporting.tables import PLOTS, device_report
from benchmarks.reporting.targets import accept, read_accepted, slower
from dscoder.runtime import native

ROOT = Path(__file__).resolve().parents[1]


def main(argv: Sequence[str], *, root: Path = ROOT) -> int:
    """Write everything; the exit status."""
    parser = argparse.ArgumentParser(prog="report", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "devices", nargs="*", help="folders below the results (default: every device with runs)"
    )
    parser.add_argument("--accept", action="store_true", help="accept the newest run's times of each device")
    parser.add_argument(
        "--check", action="store_true", help="fail for results over 5 %% slower than accepted"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="where runs are stored")
    arguments = parser.parse_args(argv)
    folder = (root / arguments.results).resolve()
    is_default = folder == (root / RESULTS).resolve()
    problems: list[str] = []
    try:
        if not is_default and not folder.is_dir():
            raise ValueError(f"--results must be a folder, got {folder}")
        chosen = [folder / name for name in arguments.devices] or devices(folder)
        flagged = sum(report(one, problems, is_accepted=arguments.accept) for one in chosen)
        if is_default:
            write_readme(root, folder)
    except (ValueError, OSError) as error:
        problems.append(str(error))
    for problem in problems:
        sys.stderr.write(f"report: {problem}\n")
    if problems:
        return 2
    return 1 if arguments.check and flagged else 0


def report(folder: Path, problems: list[str], *, is_accepted: bool) -> int:
    """Write one device's page and plots; how many of its results are slower than accepted.

    What is wrong with the files of the device is added to `problems`.
    """
    runs, found = read_folder(folder)
    problems.extend(found)
    if not runs:
        problems.append(f"{folder} holds no runs")
        return 0
    if is_accepted:
        number = accept(folder, runs[-1])
        sys.stdout.write(f"{folder}: accepted {number} times of {runs[-1].path.name}\n")
    try:
        accepted = read_accepted(folder)
    except ValueError as error:
        problems.append(str(error))
        accepted = {}
    return write_device(folder, runs, accepted)


def write_device(folder: Path, runs: Sequence[Run], accepted: Mapping[Key, float]) -> int:
    """The page and the plots; how many results are slower than accepted."""
    results = [result for result, _ in newest_results(runs).values()]
    device = str(runs[-1].machine["device"])
    (folder / "report.md").write_text(device_report(runs, accepted), encoding="utf-8")
    for name, figure in zip(PLOTS, (roofline(results, device), ratios(results, device)), strict=True):
        save(figure, folder / name)
    found = slower(results, accepted)
    sys.stdout.write(f"{folder / 'report.md'}: {len(results)} results of {len(runs)} runs\n")
    for key, ratio in sorted(found.items()):
        sys.stdout.write(f"  {ratio:.2f} times the accepted time: {' '.join(part for part in key if part)}\n")
    return len(found)


def gpu_runs(folder: Path) -> list[Run]:
    """Every stored run on a GPU, the oldest first."""
    runs = [run for one in devices(folder) if one.name != CPU for run in read_runs(one)]
    return sorted(runs, key=lambda run: run.started)


def write_readme(root: Path, folder: Path) -> None:
    """Bring the README's table and plots up to date."""
    path = root / "README.md"
    text = path.read_text(encoding="utf-8")
    path.write_text(
        replace_generated(text, generated(root, native.kernel_ops(), gpu_runs(folder))), encoding="utf-8"
    )


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
