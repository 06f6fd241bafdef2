"""FlashMLA's dense decoding kernel for sm_90a.

Read: flash_mla/flash_mla_interface.py and csrc/api/dense_decode.h at commit 9241ae3 (April 2026).
"""

from typing import Any

from torch import Tensor

from benchmarks.peers.common import require
from dscoder.testing.peer import Run


def mla_decode(
    flash_mla: Any,
    q_BSHd: Tensor,
    cache_PLd: Tensor,
    page_table_BN: Tensor,
    seq_lens_B: Tensor,
    *,
    value_dim: int,
    scale: float,
) -> Run:
    """`flash_mla_with_kvcache`: pages of 64 rows, 576 wide, values 512 wide.

    Its plan (`get_mla_metadata`), one for all layers of a step, is made by the first call and not timed. The
    arguments of `get_mla_metadata` are for versions before 2026, which made it there.
    """
    num_new, num_heads, width = q_BSHd.shape[1:]
    require(cache_PLd.shape[1] == 64, f"pages must have 64 rows, got {cache_PLd.shape[1]}")
    require((width, value_dim) == (576, 512), f"widths must be 576 and 512, got {width} and {value_dim}")
    metadata, num_splits = flash_mla.get_mla_metadata(seq_lens_B, num_new * num_heads, 1)

    def call() -> Any:
        return flash_mla.flash_mla_with_kvcache(
            q_BSHd,
            cache_PLd.unsqueeze(2),
            page_table_BN,
            seq_lens_B,
            value_dim,
            metadata,
            num_splits,
            softmax_scale=scale,
            causal=True,
        )

    call()  # plans
    return Run(call=call, read=lambda raw: raw[0])
