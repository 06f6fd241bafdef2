"""`dscoder info`: this build, this machine, and what would run where."""

import importlib.metadata
import json
import pkgutil
import platform
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.table import Table

from dscoder import __version__, ops
from dscoder.runtime import native
from dscoder.runtime.seed import available_threads

# Optional parts and what they are for: Python packages, then programs.
PACKAGES = {
    "tensorboard": "pretrain: event files",
    "matplotlib": "pretrain: the loss plot; benchmarks: the report's plots",
    "pytest-benchmark": "bench: timing the ops",
    "transformers": "tests: parity with the published models",
}
PROGRAMS = {
    "nvcc": "building CUDA kernels",
    "c++": "building the extension; tests: the kernels on the CPU",
    "bwrap": "running generated programs under limits (bubblewrap)",
}


def _build() -> dict[str, str]:
    archs = ", ".join(f"sm_{arch}" for arch in native.cuda_archs())
    return {
        "dscoder": __version__,
        "kernels": archs or "none: built without CUDA kernels",
        **native.build_tools(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
    }


def _devices() -> dict[str, str]:
    """Each GPU that torch sees, and the kernels it would run."""
    found = {}
    for idx in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(idx)
        arch = native.arch_for(capability)
        kernels = f"sm_{arch}" if arch else "none of this build"
        name = torch.cuda.get_device_name(idx)
        found[f"cuda:{idx}"] = (
            f"{name}, compute capability {capability[0]}.{capability[1]}, kernels: {kernels}"
        )
    return found


def _op_runs_on(op: str, archs: Sequence[str | None]) -> str:
    """What a call of `op` ends up in on this machine's GPUs (given by the kernels each can run)."""
    is_exchange = op == "expert_parallel"
    without = "torch.distributed collectives" if is_exchange else "torch reference"
    if not archs:
        return f"{without} on cpu (no GPU found)"
    if not native.has_kernels():
        return f"{without} on cpu; an error on cuda (built without kernels)"
    where = f" between peers, else {without}" if is_exchange else ""
    missing = "an error (no kernel for this GPU)"
    found = sorted({f"kernel sm_{arch}{where}" if arch else missing for arch in archs})
    return ", ".join(found)


def _ops() -> dict[str, str]:
    devices = range(torch.cuda.device_count())
    archs = [native.arch_for(torch.cuda.get_device_capability(idx)) for idx in devices]
    # The other modules of the package help these; the other names of kernel_ops are parts of an op.
    modules = {module.name for module in pkgutil.iter_modules(ops.__path__)}
    return {op: _op_runs_on(op, archs) for op in sorted(modules & native.kernel_ops())}


def _parts() -> dict[str, dict[str, str]]:
    parts = {}
    installed = {
        distribution.name.lower(): distribution.version for distribution in importlib.metadata.distributions()
    }
    for name, purpose in PACKAGES.items():
        parts[name] = {"found": installed.get(name, "missing"), "for": purpose}
    for name, purpose in PROGRAMS.items():
        parts[name] = {"found": shutil.which(name) or "missing", "for": purpose}
    return parts


def describe() -> dict[str, Any]:
    """Everything `dscoder info` shows, as plain data."""
    return {
        "build": _build(),
        "devices": _devices() or {"cpu": f"no GPU found, {available_threads()} threads"},
        "ops": _ops(),
        "parts": _parts(),
    }


def _table(title: str, rows: Mapping[str, str | Mapping[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None)
    for name, value in rows.items():
        table.add_row(name, *([value] if isinstance(value, str) else value.values()))
    return table


def main(argv: Sequence[str]) -> None:
    """Show this build, the GPUs, what each op runs on here, and which optional parts are missing."""
    parser = ArgumentParser(prog="dscoder info", description=main.__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    arguments = parser.parse_args(list(argv))
    found = describe()
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    titles = {"build": "This build", "devices": "Devices", "ops": "Ops", "parts": "Optional parts"}
    console = Console()
    for section, title in titles.items():
        console.print(_table(title, found[section]), "")
