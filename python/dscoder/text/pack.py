"""Packing: which tokens of which document stand in which training window.

Best-fit decreasing. Nothing that fits in a window is cut; a longer document gives whole windows and one rest,
which is packed like a short document. Documents keep their boundaries, so that attention does not cross them.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dscoder.runtime.native import _C


@dataclass(frozen=True, kw_only=True, slots=True)
class PackPlan:
    """P pieces in W windows: window w holds pieces begin[w] up to begin[w + 1], in order, then padding.

    Whole windows of long documents come first and windows of the longest pieces next: shuffle the windows
    before training on them.
    """

    window: int  # tokens a window holds
    document_P: NDArray[np.int64]
    start_P: NDArray[np.int64]  # the piece is tokens [start, start + length) of its document
    length_P: NDArray[np.int64]
    begin: NDArray[np.int64]  # [W + 1]

    @property
    def num_windows(self) -> int:
        """W."""
        return len(self.begin) - 1

    @property
    def num_tokens(self) -> int:
        """Tokens of the documents, without padding."""
        return int(self.length_P.sum())

    @property
    def padding_share(self) -> float:
        """Padding as a share of all places in the windows; 0 where there is no window."""
        num_places = self.num_windows * self.window
        return 1.0 - self.num_tokens / num_places if num_places else 0.0

    def offsets(self) -> NDArray[np.int64]:
        """Where in its window each of the P pieces begins."""
        end_P = np.cumsum(self.length_P)
        first_P = np.repeat(self.begin[:-1], np.diff(self.begin))
        begin_P = end_P - self.length_P
        return begin_P - begin_P[first_P]

    def pieces(self, window_idx: int) -> slice:
        """The pieces of one window, as a slice of the P arrays."""
        if not 0 <= window_idx < self.num_windows:
            raise IndexError(f"PackPlan: window_idx must be in [0, {self.num_windows}), got {window_idx}")
        return slice(int(self.begin[window_idx]), int(self.begin[window_idx + 1]))

    def cu_seqlens(self, window_idx: int) -> NDArray[np.int32]:
        """Where the documents of one window begin and end; its padding counts as one more document."""
        ends = np.cumsum(self.length_P[self.pieces(window_idx)])
        padding = [self.window] if ends[-1] < self.window else []
        return np.concatenate(([0], ends, padding)).astype(np.int32)


def pack(lengths: ArrayLike, *, window: int) -> PackPlan:
    """Pack documents of these many tokens into windows of `window` tokens.

    Every token stands in exactly one piece, the pieces of a document keep their order, and the same lengths
    give the same plan. Documents of no tokens give no piece. The arrays are the memory that C++ filled.
    """
    length_N = np.asarray(lengths)
    if length_N.ndim != 1 or not (length_N.size == 0 or np.issubdtype(length_N.dtype, np.integer)):
        raise ValueError(
            f"pack: lengths must be integers in one dimension, got {length_N.dtype} in {length_N.ndim}"
        )
    document_P, start_P, length_P, begin = _C.pack_plan(length_N.astype(np.int64, copy=False), window)
    return PackPlan(window=window, document_P=document_P, start_P=start_P, length_P=length_P, begin=begin)
