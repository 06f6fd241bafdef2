from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

version: str
compiler: str
has_cuda: bool
cuda_version: str
cuda_archs: tuple[str, ...]
absent_hint: str

def moe_gate_forward(
    logits: Tensor,
    idx: Tensor,
    weight: Tensor,
    num_groups: int,
    num_groups_kept: int,
    scale: float,
    renormalize: bool,
) -> None: ...
def moe_gate_backward(
    logits: Tensor, idx: Tensor, grad_weight: Tensor, grad_logits: Tensor, scale: float, renormalize: bool
) -> None: ...
def fim_plan(
    texts: tuple[str, ...],
    keys: NDArray[np.uint64],
    sentinels: Sequence[str],
    rate: float,
    spm_share: float,
    cut_at_lines: bool,
    seed: int,
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]: ...
def pack_plan(
    lengths: NDArray[np.int64], window: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]: ...
