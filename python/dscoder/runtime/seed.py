"""Seeds and determinism: every random choice of the package comes from a named seed.

Bit-identical results need the same number of threads, because a sum split over other threads rounds
otherwise; `deterministic` therefore fixes it together with the seed.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def derive_seed(*parts: str | int) -> int:
    """A 63-bit seed from names and numbers; the same parts give the same seed on every machine."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def available_threads(num_processes: int = 1) -> int:
    """Threads for each of `num_processes` that share the cores that this one may use.

    No more than OMP_NUM_THREADS, where that is a number: it is of one process.
    """
    share = len(os.sched_getaffinity(0)) // num_processes
    limit = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(share, int(limit)) if limit.isdecimal() and int(limit) > 0 else share)


@contextmanager
def deterministic(*, seed: int, num_threads: int) -> Iterator[None]:
    """Seed torch; while the block runs, fix its thread count and make it choose deterministic algorithms.

    An op that has none on the device at hand warns; on the CPU every op has one.
    """
    # cuBLAS is deterministic only with a fixed workspace; read when its first handle is made.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    was_threads, was_chosen = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    was_lenient = torch.is_deterministic_algorithms_warn_only_enabled()
    was_filling = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.set_num_threads(num_threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Filling fresh memory finds uninitialised reads, and costs a pass over every new tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_num_threads(was_threads)
        torch.use_deterministic_algorithms(was_chosen, warn_only=was_lenient)
        torch.utils.deterministic.fill_uninitialized_memory = was_filling  # type: ignore[attr-defined]


def allow_fastest_kernels(device: torch.device) -> None:
    """Inside `deterministic`, until its end: ops on a GPU may take kernels whose bits differ from run to run.

    On the CPU nothing changes.
    """
    if device.type == "cuda":
        torch.use_deterministic_algorithms(False)


def _gpus(device: torch.device | None) -> dict[str, int]:
    """The GPUs whose generators count, by the names of their states."""
    if device is None:
        return {f"cuda{device_idx}": device_idx for device_idx in range(torch.cuda.device_count())}
    return {"cuda0": device.index or 0} if device.type == "cuda" else {}


def random_state(device: torch.device | None = None) -> dict[str, Tensor]:
    """The state of torch's generators: the CPU's and, where there are any, the GPUs'.

    With a `device` only its generator, which counts as the first GPU's whichever it is.
    """
    gpus = {name: torch.cuda.get_rng_state(device_idx) for name, device_idx in _gpus(device).items()}
    return {"cpu": torch.get_rng_state()} | gpus


def restore_random_state(state: dict[str, Tensor], device: torch.device | None = None) -> None:
    """Put the generators back to what `random_state` saw; generators it did not see are left alone."""
    torch.set_rng_state(state["cpu"])
    for name, device_idx in _gpus(device).items():
        if name in state:
            torch.cuda.set_rng_state(state[name], device_idx)
