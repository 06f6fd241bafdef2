"""What a benchmark stores: the record of one case, and the machine of a run."""

import functools
import platform
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dscoder.runtime import native
from dscoder.testing.timing import Ceilings, device_name


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One thing to measure, and what a call of it has to do at the least."""

    op: str
    step: str  # "forward", "backward", "forward + backward", or what the op calls a part of itself
    shape: str  # "T=8192 D=2048 E=64 K=6"
    dtype: torch.dtype
    model: str | None = None
    routing: str | None = None
    flops: float = 0.0
    num_bytes: float = 0.0
    num_tokens: int = 0  # that come out of a call, where it makes text
    kernels: tuple[str, ...] = ()  # the ops whose kernels decide, where the case is no op itself

    def names(self) -> dict[str, str]:
        """What tells the case from others in a record."""
        found = {"op": self.op, "step": self.step, "model": self.model, "routing": self.routing}
        found |= {"shape": self.shape, "dtype": str(self.dtype).removeprefix("torch.")}
        return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Median seconds of one contender, or why there are none."""

    seconds: float = 0.0
    method: str = ""
    error: str | None = None


def record(
    case: Case,
    *,
    device: torch.device,
    ours: Timing,
    peers: Mapping[str, Timing],
    ceilings: Ceilings,
    call_seconds: float | None = None,
    is_warm: bool = False,
) -> dict[str, Any]:
    """The `extra_info` of one benchmark; docs/benchmarks.md lists what it holds.

    `is_warm` says that a cache held all that the call touched: memory then bounds nothing.
    """
    kept: dict[str, Any] = {
        **case.names(),
        "device": device_name(device),
        "method": ours.method,
        "us": _rounded(ours.seconds * 1e6),
    }
    if call_seconds is not None:
        kept["call_us"] = _rounded(call_seconds * 1e6)
    if case.flops:
        kept["TFLOP/s"] = _rounded(case.flops / ours.seconds / 1e12)
    if case.num_bytes:
        kept["GB/s"] = _rounded(case.num_bytes / ours.seconds / 1e9)
    if case.num_tokens:
        kept["tokens/s"] = _rounded(case.num_tokens / ours.seconds)
    kept["ceiling_TFLOP/s"] = _rounded(ceilings.flops_per_second / 1e12)
    kept["ceiling_GB/s"] = _rounded(ceilings.bytes_per_second / 1e9)
    kept |= _standing(kept, is_warm=is_warm)
    wanted = set(case.kernels or (case.op,))
    kept["has_kernel"] = device.type == "cuda" and native.has_kernels() and wanted <= native.kernel_ops()
    kept["peers"] = {name: _beside(timing, ours) for name, timing in peers.items()}
    return kept


def _standing(kept: Mapping[str, Any], *, is_warm: bool) -> dict[str, Any]:
    """`bound`, and `share` where the ceilings say something about the result."""
    at_best = {
        "memory": 100 * kept.get("GB/s", 0.0) / kept["ceiling_GB/s"],
        "compute": 100 * kept.get("TFLOP/s", 0.0) / kept["ceiling_TFLOP/s"],
    }
    bound = max(at_best, key=lambda name: at_best[name])
    share = round(at_best[bound], 2)
    if not at_best[bound]:
        return {}
    if kept["method"] != "wall":
        return {"share": share, "bound": bound}
    if bound == "memory" and (is_warm or share > 100):
        return {"bound": "cache"}
    return {"bound": bound} if share > 100 else {"share": share, "bound": bound}


def settle(report: dict[str, Any]) -> None:
    """Hold every result of a run against the best ceilings that were seen from its begin to its end."""
    found = [benchmark["extra_info"] for benchmark in report["benchmarks"]]
    found = [kept for kept in found if "ceiling_GB/s" in kept]
    copy = max((kept["ceiling_GB/s"] for kept in found), default=0.0)
    product: dict[str, float] = {}
    for kept in found:
        product[kept["dtype"]] = max(product.get(kept["dtype"], 0.0), kept["ceiling_TFLOP/s"])
    for kept in found:
        kept |= {"ceiling_GB/s": copy, "ceiling_TFLOP/s": product[kept["dtype"]]}
        is_warm = kept.pop("bound", None) == "cache"
        kept.pop("share", None)
        kept |= _standing(kept, is_warm=is_warm)


def _beside(peer: Timing, ours: Timing) -> dict[str, Any]:
    if peer.error is not None:
        return {"error": peer.error}
    entry: dict[str, Any] = {
        "us": _rounded(peer.seconds * 1e6),
        "ratio": _rounded(peer.seconds / ours.seconds),
    }
    # A peer that waits for the GPU cannot be captured: its time holds the wait.
    return entry if peer.method == ours.method else {**entry, "method": peer.method}


def _rounded(value: float) -> float:
    """Four digits."""
    return float(f"{value:.4g}")


def measured_device() -> torch.device:
    """What benchmarks run on here: the first GPU if this build has kernels for it, else the CPU."""
    if torch.cuda.is_available() and native.arch_for(torch.cuda.get_device_capability()) is not None:
        return torch.device("cuda")
    return torch.device("cpu")


def unmeasured_gpu(device: torch.device) -> str | None:
    """Why a run is not on a GPU; None where it is."""
    if device.type == "cuda":
        return None
    if not torch.cuda.is_available():
        return "torch found no GPU"
    archs = ", ".join(f"sm_{arch}" for arch in native.cuda_archs())
    has = f"has kernels for {archs} alone" if archs else "has no kernels"
    return f"{torch.cuda.get_device_name()} is there and was not measured: this build {has}"


def _output(command: list[str]) -> str | None:
    """What a program that is there and succeeds prints, else None."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


@functools.cache
def machine(device: torch.device, checkout: Path) -> dict[str, Any]:
    """Device, versions, and the commit of `checkout`; what cannot be known is None."""
    driver = None
    if device.type == "cuda":
        found = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
        driver = found.splitlines()[0] if found else None
    git = ["git", "-C", str(checkout)]
    # A repository above an installed package is somebody else's.
    is_ours = (checkout / ".git").exists()
    changes = _output([*git, "status", "--porcelain", "--untracked-files=no"]) if is_ours else None
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "driver": driver,
        "python": platform.python_version(),
        "commit": _output([*git, "rev-parse", "HEAD"]) if is_ours else None,
        "is_dirty": None if changes is None else bool(changes),
        "note": unmeasured_gpu(device),
    }


def describe_machine(info: dict[str, Any], device: torch.device, checkout: Path) -> None:
    """Put `machine` into pytest-benchmark's machine_info; drop the host's name and the CPU's flags."""
    info.pop("node", None)
    info.get("cpu", {}).pop("flags", None)
    info.update(machine(device, checkout))


def drop_rounds(report: dict[str, Any]) -> None:
    """Keep the statistics of each benchmark, not its thousands of single times."""
    for benchmark in report["benchmarks"]:
        benchmark["stats"].pop("data", None)
