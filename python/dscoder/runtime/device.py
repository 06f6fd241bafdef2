"""Which device a run computes on, how much memory there is and was had, and how fast the device could be."""

import os
import re
from pathlib import Path

import torch

# Where Linux says how much memory a container may have, by the version of its control groups.
_MEMORY_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_STATUS = Path("/proc/self/status")  # VmHWM: the most pages that were resident since the program began

# Dense products of bfloat16 a second, by what a GPU's name holds; the first that matches counts. From
# NVIDIA's data sheets, which give twice as much for matrices with structured zeros: H100 (SXM 1979, NVL 1671,
# PCIe 1513 TFLOPS), H200 (SXM 1979, NVL 1671), GH200 (1979); A100 (312, dense, in every form). H800 and A800
# are H100 and A100 with slower links between GPUs. A part of a GPU (MIG) has an unknown part of it.
_PEAK_FLOPS: tuple[tuple[str, float | None], ...] = (
    (r"\bMIG\b", None),
    (r"\b(H100|H800)\b.*\bPCIe\b", 756e12),
    (r"\b(H100|H200)\b.*\bNVL\b", 835e12),
    (r"\b(H100|H200|H800|GH200)\b", 989e12),
    (r"\b(A100|A800)\b", 312e12),
)


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


def peak_memory(device: torch.device) -> int | None:
    """The most bytes that this process has had: allocated on a GPU, or resident in the host's memory.

    None where the host does not tell.
    """
    if device.type != "cpu":
        return torch.cuda.max_memory_allocated(device)
    found = (
        re.search(r"^VmHWM:\s*(\d+) kB$", _STATUS.read_text(), re.MULTILINE) if _STATUS.is_file() else None
    )
    return None if found is None else int(found[1]) * 1024


def peak_flops(device_name: str) -> float | None:
    """Operations a second of dense bfloat16 products on the GPU of that name; None where it is not known."""
    return next((peak for pattern, peak in _PEAK_FLOPS if re.search(pattern, device_name)), None)


def device_peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """`peak_flops` of `device` for a run in `dtype`; None on a CPU, and for other types than bfloat16."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    return peak_flops(torch.cuda.get_device_name(device))
