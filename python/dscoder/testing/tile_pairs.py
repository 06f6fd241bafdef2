"""Which tiles each block of a cluster takes on sm_90a: csrc/gemm's functions in Python, by the same names.

Each block finds its tiles by itself, from the END rows of the experts; nothing but these functions makes both
blocks of a cluster agree. The model of the pipeline (dscoder.testing.pipeline) runs on them, and
tests/csrc/test_sm90_played.py holds them against the kernels' own.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Protocol

BAND_PAIRS = 4
DEPTH_BLOCK = 64


def ceil_div(size: int, part: int) -> int:
    """Parts that hold `size`, the last one in part."""
    return -(-size // part)


# ---- grouped_gemm_schedule_sm90.cuh ----


def num_pairs(row_tiles: int, column_tiles: int, *, swaps: bool) -> int:
    """Pairs in a grid of tiles; `swaps`: none by rows."""
    by_columns = (column_tiles + 1) // 2
    if swaps:
        return row_tiles * by_columns
    return row_tiles // 2 * column_tiles + row_tiles % 2 * by_columns


def pair_at(idx: int, row_tiles: int, column_tiles: int, rank: int, *, swaps: bool) -> tuple[int, int, bool]:
    """Row tile, column tile (which may not exist) and whether the pair shares its rows."""
    num_by_rows = 0 if swaps else row_tiles // 2 * column_tiles
    if idx < num_by_rows:
        band, in_band = divmod(idx, BAND_PAIRS * column_tiles)
        height = min(BAND_PAIRS, row_tiles // 2 - band * BAND_PAIRS)
        return 2 * (band * BAND_PAIRS + in_band % height) + rank, in_band // height, False
    place = idx - num_by_rows
    if swaps:
        return place % row_tiles, 2 * (place // row_tiles) + rank, True
    return row_tiles - 1, 2 * place + rank, True


# ---- grouped_gemm_schedule.cuh ----


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupTable:
    """The first row and the first pair of each expert, of the rows of none, and of what comes after."""

    first_row: tuple[int, ...]
    first_tile: tuple[int, ...]


def fill_groups(offsets: Sequence[int], num_rows: int, count_tiles: Callable[[int], int]) -> GroupTable:
    """END rows, clamped and made to ascend; count_tiles(rows): the pairs of a group."""
    clamped = [min(max(end, 0), num_rows) for end in offsets]
    first_row = [0, *accumulate([*clamped, num_rows], max)]
    counts = [count_tiles(end - begin) for begin, end in pairwise(first_row)]
    return GroupTable(first_row=tuple(first_row), first_tile=(0, *accumulate(counts)))


def find_group(table: GroupTable, num_experts: int, idx: int) -> int:
    """The last group that starts there or before: empty ones start where the next does."""
    return bisect_right(table.first_tile[: num_experts + 1], idx) - 1


# ---- the jobs ----


@dataclass(frozen=True, kw_only=True, slots=True)
class ProductTile:
    """What a block multiplies: lines from `row` and `column` on, over k blocks; rows of the depth or 0."""

    idx: int
    group: int
    row: int
    column: int
    num_k_blocks: int
    num_lines: int  # of the depth, where its end has to be blanked; else 0
    shares_rows: bool


class Job(Protocol):
    """A product as its two blocks see it."""

    @property
    def swaps(self) -> bool:
        """Whether wgmma's rows are columns of the result."""
        ...

    def num_tile_pairs(self) -> int:
        """Pairs of all clusters together."""
        ...

    def tile_at(self, idx: int, rank: int) -> ProductTile:
        """What the block `rank` of a cluster takes of a pair."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class RowsJob:
    """Rows in expert order (grouped_jobs_sm90.cuh): fill_pairs and row_tile_at."""

    offsets: tuple[int, ...]
    num_rows: int
    num_columns: int
    depth: int
    tile: tuple[int, int]  # rows, columns
    swaps: bool

    def table(self) -> GroupTable:
        """Rows and pairs of each expert."""
        column_tiles = ceil_div(self.num_columns, self.tile[1])
        return fill_groups(
            self.offsets,
            self.num_rows,
            lambda rows: num_pairs(ceil_div(rows, self.tile[0]), column_tiles, swaps=self.swaps),
        )

    def num_tile_pairs(self) -> int:
        """Pairs of all clusters together."""
        return self.table().first_tile[-1]

    def tile_at(self, idx: int, rank: int) -> ProductTile:
        """What the block `rank` of a cluster takes of a pair."""
        table, num_experts = self.table(), len(self.offsets)
        group = find_group(table, num_experts, idx)
        begin, end = table.first_row[group : group + 2]
        row_tiles, column_tiles = (
            ceil_div(end - begin, self.tile[0]),
            ceil_div(self.num_columns, self.tile[1]),
        )
        place = idx - table.first_tile[group]
        row_tile, column_tile, shares_rows = pair_at(place, row_tiles, column_tiles, rank, swaps=self.swaps)
        return ProductTile(
            idx=idx,
            group=group,
            row=begin + row_tile * self.tile[0],
            column=column_tile * self.tile[1],
            num_k_blocks=ceil_div(self.depth, DEPTH_BLOCK) if group < num_experts else 0,
            num_lines=0,
            shares_rows=shares_rows,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightGradient:
    """Every expert's rows are the depth (grouped_gemm_wgrad_sm90.cuh): tile_at."""

    offsets: tuple[int, ...]
    num_rows: int
    num_columns: int
    depth: int
    tile: tuple[int, int]
    swaps: bool = False

    def grid(self) -> tuple[int, int]:
        """Tiles of an expert: by rows and by columns."""
        return ceil_div(self.num_columns, self.tile[0]), ceil_div(self.depth, self.tile[1])

    def num_tile_pairs(self) -> int:
        """Pairs of all clusters together."""
        return len(self.offsets) * num_pairs(*self.grid(), swaps=False)

    def tile_at(self, idx: int, rank: int) -> ProductTile:
        """What the block `rank` of a cluster takes of a pair."""
        table = fill_groups(self.offsets, self.num_rows, lambda rows: 0)
        expert, place = divmod(idx, num_pairs(*self.grid(), swaps=False))
        row_tile, column_tile, shares_rows = pair_at(place, *self.grid(), rank, swaps=False)
        num_lines = table.first_row[expert + 1] - table.first_row[expert]
        return ProductTile(
            idx=idx,
            group=expert,
            row=row_tile * self.tile[0],
            column=column_tile * self.tile[1],
            num_k_blocks=ceil_div(num_lines, DEPTH_BLOCK),
            num_lines=num_lines,
            shares_rows=shares_rows,
        )
