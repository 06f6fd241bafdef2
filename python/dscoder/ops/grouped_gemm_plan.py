"""Which kernels a grouped product gets on a GPU, and what they want of a call; else the reference runs."""

import torch
from torch import Tensor

from dscoder.ops.library import ARCHS, aligned, device_refusal, gpu_of, gpu_refusal
from dscoder.runtime import native

KERNEL_DTYPES = (torch.bfloat16, torch.float16)
KERNEL_MULTIPLE = 8  # elements in the 16 bytes that the kernels copy at once
KERNEL_EXPERTS = 512


def grouped_gemm_plan(
    step: str,
    *,
    num_rows: int,
    num_experts: int,
    num_columns: int,
    depth: int,
    dtype: torch.dtype = torch.bfloat16,
    gpu: tuple[int, int, int] | None = None,
    arch: str = "auto",
) -> dict[str, str | int]:
    """What a call of these sizes runs on a GPU; how the rows fall to the experts changes nothing.

    `step` is "forward", "input_gradient" or "weight_gradient" (of [E, num_columns, depth]) of `grouped_gemm`,
    "swiglu" or "swiglu_backward" of `moe_experts`; the result has `num_columns`. `gpu` is (major, minor,
    number of SMs), default the current GPU; none need be there when it is given. `arch` as in `grouped_gemm`.

    Returns:
        "arch" ("sm80", "sm90" or "reference") and, for kernels, "tile", "stages", "cluster", "threads",
        "registers", "shared_bytes", "blocks_per_sm" and "blocks"; for the reference "wanted": what the
        kernels want and do not get, or "arch" where it was asked for.
    """
    op = "grouped_gemm_plan"
    if arch not in ARCHS:
        raise ValueError(f"{op}: arch must be one of {', '.join(ARCHS)}, got {arch!r}")
    refusal = size_refusal(dtype, num_experts, N=num_columns, K=depth)
    if refusal is None and arch != "reference":
        major, minor, num_sms = gpu_of(None) if gpu is None else gpu
        refusal = gpu_refusal((major, minor))
        if refusal is None:
            sizes = (num_rows, num_experts, num_columns, depth)
            return native._C.grouped_gemm_plan(step, *sizes, (major, minor), num_sms, arch)
    if refusal is not None and arch in ("sm80", "sm90"):
        raise ValueError(f"{op}: arch {arch} wants {refusal}")
    return {"arch": "reference", "wanted": refusal or "arch"}


def size_refusal(dtype: torch.dtype, num_experts: int, **widths: int) -> str | None:
    """What the kernels want and do not get, or None where they can run on a GPU they know."""
    if dtype not in KERNEL_DTYPES:
        wanted = " or ".join(str(kind).removeprefix("torch.") for kind in KERNEL_DTYPES)
        return f"x of {wanted}, got {str(dtype).removeprefix('torch.')}"
    if not 1 <= num_experts <= KERNEL_EXPERTS:
        return f"1 to {KERNEL_EXPERTS} experts, got {num_experts}"
    for name, width in widths.items():
        if width < 1 or width % KERNEL_MULTIPLE:
            return f"{name} to be a positive multiple of {KERNEL_MULTIPLE}, got {width}"
    return None


def kernel_refusal(x: Tensor, num_experts: int, **widths: int) -> str | None:
    """What the kernels want and do not get for x where it lies, or None where they can run."""
    return size_refusal(x.dtype, num_experts, **widths) or device_refusal(x.device)


def runs_reference(arch: str, x: Tensor, num_experts: int, **widths: int) -> bool:
    """Whether a call on a GPU runs the reference: it was asked for, or the kernels cannot."""
    return arch == "reference" or (arch == "auto" and kernel_refusal(x, num_experts, **widths) is not None)


def rows_of(x: Tensor, token_M: Tensor | None) -> Tensor:
    """The rows of x that the map names, or x where there is no map."""
    return x if token_M is None else x.index_select(0, token_M)


def loaded_rows(
    step: str, x: Tensor, token_M: Tensor | None, widths_ENK: tuple[int, int, int], arch: str
) -> tuple[Tensor, Tensor | None]:
    """x and the map as kernels take them: those of sm_90 read rows where they lie, so they get a copy."""
    if token_M is None:
        return aligned(x), None
    gpu = gpu_of(x.device)
    plan = native._C.grouped_gemm_plan(step, len(token_M), *widths_ENK, gpu[:2], gpu[2], arch)
    if "sm90" in (arch, plan["arch"]):
        return aligned(rows_of(x, token_M)), None
    return aligned(x), token_M
