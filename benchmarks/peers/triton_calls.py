"""Our own short Triton versions, in triton_*.py; all but the grouped product have gradients.

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


def _ready(call: Any) -> Run:
    call()  # compiles and tunes
    return Run(call=call)
