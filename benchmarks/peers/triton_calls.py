"""Our own short Triton versions, in triton_*.py; the grouped product and attention have no gradients.

They import triton, so they come in as the module, as a library does. Tuning happens on the first call.
"""

from typing import Any

from torch import Tensor

from benchmarks.peers.common import require
from dscoder.ops import PermuteHandle
from dscoder.testing.peer import Run


def gate(
    kernels: Any,
    logits_TE: Tensor,
    *,
    num_topk: int,
    num_groups: int = 1,
    num_groups_kept: int = 1,
    scale: float = 1.0,
    renormalize: bool = False,
) -> Run:
    """One launch, and one for the gradient; no renormalisation."""
    require(not renormalize, "the Triton gate does not renormalize")
    return _ready(lambda: kernels.gate(logits_TE, num_topk, num_groups, num_groups_kept, scale))


def maps(kernels: Any, idx_TK: Tensor, *, num_experts: int) -> Run:
    """Three launches: histogram of every chunk, sums over the chunks, ranks."""
    return _ready(lambda: kernels.maps(idx_TK, num_experts))


def permute(kernels: Any, x_TD: Tensor, idx_TK: Tensor, *, num_experts: int) -> Run:
    """The maps, then a copy that reads each row once."""
    return _ready(lambda: kernels.permute(x_TD, idx_TK, num_experts))


def unpermute(kernels: Any, y_MD: Tensor, weight_TK: Tensor, handle: PermuteHandle) -> Run:
    """Weighted gather; the gradients of rows and weights in one launch."""
    return _ready(lambda: kernels.unpermute(y_MD, weight_TK, handle.row_TK))


def grouped_gemm(kernels: Any, x_MK: Tensor, w_ENK: Tensor, offsets_E: Tensor) -> Run:
    """One launch; a program finds its expert in the offsets."""
    require(w_ENK.is_contiguous(), f"weights must lie as [E, N, K], got strides {w_ENK.stride()}")
    return _ready(lambda: kernels.grouped_gemm(x_MK, w_ENK, offsets_E))


def mla_prefill(
    kernels: Any,
    q_THd: Tensor,
    k_THd: Tensor,
    v_THv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    scale: float,
    causal: bool = True,
) -> Run:
    """One launch, with the log-sum-exp; the longest length, which a trainer knows, is read beforehand."""
    rows = (q_THd, k_THd, v_THv)
    require(all(x.is_contiguous() for x in rows), "q, k and v must be contiguous")
    widths = (q_THd.shape[2], v_THv.shape[2])
    is_fit = (widths[0] & (widths[0] - 1)).bit_count() <= 1 and widths[1].bit_count() == 1
    require(is_fit, f"widths must be sums of two powers of two and one, got {widths}")
    longest = int(cu_seqlens_q.diff().max())
    ends = (cu_seqlens_q, cu_seqlens_k)
    run = _ready(lambda: kernels.attention(*rows, *ends, longest=longest, scale=scale, causal=causal))
    return Run(call=run.call, read=lambda raw: raw[0])


def _ready(call: Any) -> Run:
    call()  # compiles and tunes
    return Run(call=call)
