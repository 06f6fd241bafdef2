from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

version: str

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
