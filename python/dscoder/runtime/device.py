"""Which device a run computes on, and how much memory there is."""

import os
import re
from pathlib import Path

import torch

# Where Linux says how much memory a container may have, by the version of its control groups.
_MEMORY_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def resolve_device(name: str) -> torch.device:
    """The device called `auto` (a GPU if there is one), `cpu`, `cuda` or `cuda:N`.

    Raises:
        ValueError: another name, or a device that this process does not have.
    """
    num_gpus = torch.cuda.device_count()
    if name == "auto":
        return torch.device("cuda" if num_gpus else "cpu")
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if match is None:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if name != "cpu" and int(match[1] or 0) >= num_gpus:
        raise ValueError(
            f"device must be one that torch {torch.__version__} can use here (GPUs: {num_gpus}), got {name!r}"
        )
    return torch.device(name)


def host_memory() -> int:
    """Bytes of memory that this process may have: the machine's or, if less, its container's."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = [path.read_text().strip() for path in _MEMORY_LIMITS if path.is_file()]
    return min([total, *(int(limit) for limit in limits if limit.isdecimal())])


def device_memory(device: torch.device) -> int:
    """Bytes of memory that `device` has in all."""
    return host_memory() if device.type == "cpu" else torch.cuda.get_device_properties(device).total_memory
