"""DeepGEMM's grouped product in bfloat16: compiled at run time for sm_90a, forward only.

Read: csrc/apis/gemm.hpp, tests/generators.py and tests/test_bf16.py at commit 54e2261 (2.6.1, June 2026).
"""

from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.common import require
from dscoder.testing.peer import Run


def grouped_gemm(deep_gemm: Any, x_MK: Tensor, w_ENK: Tensor, offsets_E: Tensor) -> Run:
    """`m_grouped_bf16_gemm_nt_contiguous`, every expert's rows padded to its alignment (128 on sm_90).

    Not timed: making the padded copy of x, and taking the padding out of y. Timed: the padded rows' products.
    """
    require(x_MK.dtype == torch.bfloat16, f"bfloat16 only, got {x_MK.dtype}")
    alignment = deep_gemm.get_mk_alignment_for_contiguous_layout()
    ends = offsets_E.tolist()
    require(ends[-1] == len(x_MK), f"every row must belong to an expert, {ends[-1]} of {len(x_MK)} do")
    counts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    place = torch.empty(len(x_MK), dtype=torch.long)  # of each row among the padded ones
    experts = []
    for expert, (count, end) in enumerate(zip(counts, ends, strict=True)):
        place[end - count : end] = torch.arange(count) + len(experts)
        experts += [expert] * count + [-1] * (-count % alignment)
    place = place.to(x_MK.device)
    x_padded = x_MK.new_zeros(len(experts), x_MK.shape[1]).index_copy_(0, place, x_MK.detach())
    layout = torch.tensor(experts, dtype=torch.int32, device=x_MK.device)

    def call() -> Tensor:
        y_padded = x_MK.new_empty(len(layout), w_ENK.shape[1])
        deep_gemm.m_grouped_bf16_gemm_nt_contiguous(x_padded, w_ENK, y_padded, layout)
        return y_padded

    call()  # compiles
    return Run(call=call, read=lambda y_padded: y_padded[place])
