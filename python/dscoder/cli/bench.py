"""The verb `dscoder bench`: times the ops beside their peers on this machine."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
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
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAME_STOP_SECONDS = 1.0  # timeout(1) and terminals send a signal more than once


def main(argv: Sequence[str]) -> None:
    """Time ops beside their peers on this machine: its GPU if there is one, else the CPU.

    Without arguments everything is timed. How long that takes depends on the machine and on which peers are
    installed: name ops to time these alone, the more so on a CPU. Every result is shown as soon as it is
    there, a table of all of them at the end, and they are stored as JSON (docs/benchmarks.md says what it
    holds). Ctrl-C ends the run and keeps what was measured; a second one ends it at once.
    """
    home = find_home(HOMES)
    options = _parse(argv, sorted(benchmarks_of(home)))
    files = chosen(benchmarks_of(home), options.ops)
    require_installed(NEEDED)
    out = Path(options.out) if options.out else _default_out(home)
    with scratch_beside(out) as folder:
        fresh = folder / "run.json"
        print(f"runs {', '.join(path.name for path in files)} of {home / 'benchmarks'}", flush=True)
        status, stop = run_stoppable(pytest_command(home, files, fresh, only=options.only))
        if status == NO_TESTS:
            raise ValueError(f"only must match a benchmark, got {options.only!r}")
        keep(fresh, out)
    if stop is not None:
        print(f"dscoder bench: ended by {signal.Signals(stop).name}", file=sys.stderr)
        raise SystemExit(128 + stop)
    if status:
        raise RuntimeError(f"a benchmark failed (pytest's exit status is {status}); its message is above")


def _parse(argv: Sequence[str], names: Sequence[str]) -> Namespace:
    parser = ArgumentParser(prog="dscoder bench", description=main.__doc__)
    parser.add_argument("ops", nargs="*", default=[], help=f"what to time: {', '.join(names)}")
    parser.add_argument(
        "--only", type=str, help='those whose name holds this, such as "v2_lite and uniform" (pytest\'s -k)'
    )
    parser.add_argument(
        "--out", type=str, help="JSON file, replaced if it exists (default: runs/bench/<device>/<UTC>.json)"
    )
    return parser.parse_args(list(argv))


@contextmanager
def scratch_beside(out: Path) -> Iterator[Path]:
    """An empty folder on the file system of `out`, which this shows can be written, gone at the end."""
    if out.is_dir():
        raise ValueError(f"out must be a file, got the folder {out}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=out.parent, prefix=".bench_")
    except OSError as error:
        raise ValueError(
            f"out must lie in a folder that can be written, got {out.parent}: {error.strerror}"
        ) from error
    with scratch as name:
        yield Path(name)


def run_stoppable(command: Sequence[str]) -> tuple[int, int | None]:
    """The exit status of a command, and the signal that ended it, if one did.

    The first signal reaches the command as SIGINT, on which pytest gives up the benchmark that it is in and
    stores the others; it is waited for. A later one kills it.
    """
    running: list[subprocess.Popen[bytes]] = []
    stops: list[tuple[int, float]] = []

    def stop(number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if not stops:
            stops.append((number, now))
            for child in running:
                child.send_signal(signal.SIGINT)
        elif now - stops[0][1] > SAME_STOP_SECONDS:
            for child in running:
                os.killpg(child.pid, signal.SIGKILL)

    previous = {number: signal.signal(number, stop) for number in STOPS}
    try:
        # A process group of its own: what a terminal sends comes by way of `stop`, once.
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0)
        running.append(child)
        if stops:
            child.send_signal(signal.SIGINT)
        status = child.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return status, stops[0][0] if stops else None


def keep(fresh: Path, out: Path) -> None:
    """Move what a run stored to `out` and show it; nothing where it ended before it stored anything."""
    if not fresh.is_file() or not fresh.stat().st_size:
        print("nothing is stored: the run ended before it wrote a result")
        return
    report = json.loads(fresh.read_text(encoding="utf-8"))
    replaced = " (replaced the run that was there)" if out.exists() else ""
    fresh.replace(out)
    Console(width=None if sys.stdout.isatty() else 200).print(results_table(report))
    print(f"stored in {out}{replaced}")


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
    """pytest on these files alone, whatever is configured or lies where the command is called."""
    words = [sys.executable, "-P", str(home / "benchmarks" / "start.py")]
    words += ["--quiet", "--capture=no", "-p", "no:cacheprovider"]
    words += ["-c", str(home / "benchmarks" / "bench.ini"), "--rootdir", str(home)]
    words += ["--benchmark-only", "--benchmark-quiet", f"--benchmark-json={out.resolve()}"]
    # Nothing is stored there, but the folder is made: else in the caller's.
    words += [f"--benchmark-storage=file://{out.resolve().parent / 'storage'}"]
    return [*words, *(["-k", only] if only else []), *map(str, files)]


def _default_out(home: Path) -> Path:
    # A process of its own: cli imports nothing of the benchmarks.
    command = [sys.executable, "-m", "benchmarks.result_file", str(Path("runs/bench").resolve())]
    done = subprocess.run(command, cwd=home, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the device must be one that torch knows, got {done.stderr.strip()[-200:]}")
    return Path(done.stdout.strip())


def _cell(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value if value is not None else "")


def _peers(peers: dict[str, dict[str, Any]]) -> str:
    """How many times our time each takes; a failed one is named."""
    return ", ".join(
        f"{name} {peer['ratio']:.2f}x" if "ratio" in peer else f"{name} failed"
        for name, peer in peers.items()
    )


def heading(report: dict[str, Any]) -> str:
    """What was measured on, which ceilings it has, and whether any kernel ran."""
    machine = report["machine_info"]
    records = [benchmark["extra_info"] for benchmark in report["benchmarks"]]
    note = f"; {machine['note']}" if machine.get("note") else ""
    lines = [f"{machine.get('device', 'unknown device')}, torch {machine.get('torch', 'unknown')}{note}"]
    copies = {f"copy {kept['ceiling_GB/s']:g} GB/s" for kept in records if "ceiling_GB/s" in kept}
    products = {
        f"{kept['dtype']} product {kept['ceiling_TFLOP/s']:g} TFLOP/s"
        for kept in records
        if "ceiling_TFLOP/s" in kept and "float" in kept["dtype"]
    }
    if copies:
        lines.append(f"ceilings: {', '.join([*sorted(copies), *sorted(products)])}")
    if records and not any(kept.get("has_kernel") for kept in records):
        lines.append("no kernel ran: the times of ops are those of their references in plain PyTorch")
    return "\n".join(lines)


def _share(kept: dict[str, Any]) -> str:
    return "in cache" if kept.get("bound") == "cache" else _cell(kept.get("share"))


def results_table(report: dict[str, Any]) -> Table:
    """The records of a run, one a row."""
    table = Table(title=heading(report), title_justify="left", box=None)
    for column in ("op", "step", "case", "shape", "by"):
        table.add_column(column)
    for column in ("us", "call us", "TFLOP/s", "GB/s", "% of ceiling"):
        table.add_column(column, justify="right")
    table.add_column("peers' time / ours")
    for benchmark in report["benchmarks"]:
        kept = benchmark["extra_info"]
        if "us" not in kept:
            continue
        case = " ".join(kept[name] for name in ("model", "routing", "dtype") if name in kept)
        by = "" if "dtype" not in kept else "kernel" if kept.get("has_kernel") else "reference"
        figures = [*(_cell(kept.get(name)) for name in ("us", "call_us", "TFLOP/s", "GB/s")), _share(kept)]
        names = (kept["op"], kept["step"], case, kept["shape"], by)
        table.add_row(*names, *figures, _peers(kept.get("peers", {})))
    return table
