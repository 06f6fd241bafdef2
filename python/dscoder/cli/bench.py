"""The verb `dscoder bench`: times the ops beside their peers on this machine."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.table import Table

PACKAGE = Path(__file__).resolve().parents[1]
# Where the benchmarks are: in an installed package, in a checkout.
HOMES = (PACKAGE / "_bench", PACKAGE.parents[1])
PREFIX = "bench_"
NEEDED = {"pytest": "pytest", "pytest_benchmark": "pytest-benchmark"}
NO_TESTS = 5  # exit status of pytest that found nothing to run


def main(argv: Sequence[str]) -> None:
    """Time ops beside their peers on this machine: its GPU if there is one, else the CPU.

    Without arguments everything is timed. Every result is written as soon as it is there, a table of all of
    them at the end, and what was measured as JSON (docs/benchmarks.md says what it holds).
    """
    home = find_home(HOMES)
    options = _parse(argv, sorted(benchmarks_of(home)))
    files = chosen(benchmarks_of(home), options.ops)
    require_installed(NEEDED)
    out = Path(options.out) if options.out else _default_out(home)
    out.parent.mkdir(parents=True, exist_ok=True)
    status = subprocess.run(pytest_command(home, files, out, only=options.only), check=False).returncode
    if status == NO_TESTS:
        raise ValueError(f"only must match a benchmark, got {options.only!r}")
    if out.is_file() and out.stat().st_size:
        Console(width=None if sys.stdout.isatty() else 200).print(results_table(json.loads(out.read_text())))
        print(f"stored in {out}")
    if status:
        raise RuntimeError(f"a benchmark failed (pytest's exit status is {status}); its message is above")


def _parse(argv: Sequence[str], names: Sequence[str]) -> Namespace:
    parser = ArgumentParser(prog="dscoder bench", description=main.__doc__)
    parser.add_argument("ops", nargs="*", default=[], help=f"what to time: {', '.join(names)}")
    parser.add_argument(
        "--only", type=str, help='those whose name holds this, such as "v2_lite and uniform" (pytest\'s -k)'
    )
    parser.add_argument("--out", type=str, help="JSON file (default: runs/bench/<device>/<UTC>.json)")
    return parser.parse_args(list(argv))


def find_home(homes: Sequence[Path]) -> Path:
    """The first folder that has the package `benchmarks` in it."""
    for home in homes:
        if (home / "benchmarks" / "conftest.py").is_file():
            return home
    raise RuntimeError(f"the benchmarks must be in one of {', '.join(map(str, homes))}, found in none")


def benchmarks_of(home: Path) -> dict[str, Path]:
    """The benchmark files by name."""
    files = (home / "benchmarks").glob(f"{PREFIX}*.py")
    return {path.stem.removeprefix(PREFIX): path for path in files}


def chosen(files: dict[str, Path], names: Sequence[str]) -> list[Path]:
    """The files of these names, all if there are none."""
    unknown = [name for name in names if name not in files]
    if unknown:
        raise ValueError(f"op must be one of {', '.join(sorted(files))}, got {', '.join(unknown)}")
    return [files[name] for name in names or sorted(files)]


def require_installed(needed: dict[str, str]) -> None:
    """RuntimeError naming the packages that are missing and the extra that brings them."""
    missing = [name for module, name in needed.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise RuntimeError(
            f"{' and '.join(missing)} must be installed to run benchmarks: pip install 'dscoder[bench]'"
        )


def pytest_command(home: Path, files: Sequence[Path], out: Path, *, only: str | None) -> list[str]:
    """pytest on these files alone, whatever is configured where the command is called."""
    words = [sys.executable, "-m", "pytest", "--quiet", "--capture=no", "-p", "no:cacheprovider"]
    words += ["-c", str(home / "benchmarks" / "bench.ini"), "--rootdir", str(home)]
    words += ["--benchmark-only", "--benchmark-quiet", f"--benchmark-json={out.resolve()}"]
    return [*words, *(["-k", only] if only else []), *map(str, files)]


def _default_out(home: Path) -> Path:
    # A process of its own: cli imports nothing of the benchmarks.
    command = [sys.executable, "-m", "benchmarks.result_file", str(Path("runs/bench").resolve())]
    done = subprocess.run(command, cwd=home, check=True, capture_output=True, text=True)
    return Path(done.stdout.strip())


def _cell(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value if value is not None else "")


def _peers(peers: dict[str, dict[str, Any]]) -> str:
    """How many times our time each takes; a failed one is named."""
    return ", ".join(
        f"{name} {peer['ratio']:.2f}x" if "ratio" in peer else f"{name} failed"
        for name, peer in peers.items()
    )


def results_table(report: dict[str, Any]) -> Table:
    """The records of a run, one a row."""
    machine = report["machine_info"]
    title = f"{machine.get('device', 'unknown device')}, torch {machine.get('torch', 'unknown')}"
    table = Table(title=title, title_justify="left", box=None)
    for column in ("op", "step", "case", "shape"):
        table.add_column(column)
    for column in ("us", "call us", "TFLOP/s", "GB/s", "% of ceiling"):
        table.add_column(column, justify="right")
    table.add_column("peers' time / ours")
    for benchmark in report["benchmarks"]:
        kept = benchmark["extra_info"]
        if "us" not in kept:
            continue
        case = " ".join(kept[name] for name in ("model", "routing", "dtype") if name in kept)
        figures = [_cell(kept.get(name)) for name in ("us", "call_us", "TFLOP/s", "GB/s", "share")]
        table.add_row(kept["op"], kept["step"], case, kept["shape"], *figures, _peers(kept.get("peers", {})))
    return table
