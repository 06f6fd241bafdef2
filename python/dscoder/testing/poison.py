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


NUM_GUARD_ROWS = 3
WILD = 2**31 - 1


def guarded(*shape: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Memory for a kernel to write, poisoned (NaN, wild integers), and the same with guard rows round it."""
    fill = torch.nan if dtype.is_floating_point else WILD
    memory = torch.full((shape[0] + 2 * NUM_GUARD_ROWS, *shape[1:]), fill, dtype=dtype)
    return memory[NUM_GUARD_ROWS : NUM_GUARD_ROWS + shape[0]], memory


def assert_guards_whole(*memories: Tensor) -> None:
    """Nothing was written to the guard rows."""
    for memory in memories:
        guards = torch.cat([memory[:NUM_GUARD_ROWS], memory[-NUM_GUARD_ROWS:]])
        is_whole = guards.isnan() if guards.is_floating_point() else guards == WILD
        assert bool(is_whole.all()), "written outside its memory"
