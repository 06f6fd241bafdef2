"""Memory that betrays whoever reads it: NaN where nothing was written, strides nobody counted on."""

import torch
from torch import Tensor


def with_strides(x: Tensor) -> Tensor:
    """The same values in memory that is contiguous in no dimension, NaN (or the lowest integer) between."""
    fill = torch.nan if x.is_floating_point() else torch.iinfo(x.dtype).min
    spread = torch.full([2 * size + 1 for size in x.shape], fill, dtype=x.dtype, device=x.device)
    view = spread[tuple(slice(1, 2 * size + 1, 2) for size in x.shape)]
    view.copy_(x)
    assert not view.is_contiguous() or view.numel() <= 1
    return view


def poison_rows_from(x: Tensor, first_row: int) -> Tensor:
    """A copy of x with NaN in the rows from `first_row` on."""
    poisoned = x.clone()
    poisoned[first_row:] = torch.nan
    return poisoned
