"""How large a cache is, and which of its pages are free: numbers only, the storage is models/cache.py's."""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dscoder.models.cache import PAGE_SIZE


@dataclass(frozen=True, kw_only=True, slots=True)
class Room:
    """The sizes of a cache."""

    num_rows: int
    max_positions: int  # of one row
    num_pages: int | None  # that the rows share; None: every row has the memory of max_positions tokens

    def holds(self, wanted: "Room") -> bool:
        """Whether a cache of this size does where one of `wanted` would."""
        return (
            self.num_rows >= wanted.num_rows
            and self.max_positions >= wanted.max_positions
            and (self.num_pages or 0) >= (wanted.num_pages or 0)
        )


def plan_room(
    lengths: Sequence[int], *, max_batch: int, max_tokens: int, is_paged: bool, is_kept: bool
) -> Room:
    """The smallest cache in which any `max_batch` of these requests run together, if there is memory.

    Args:
        lengths: the most tokens that the cache will hold of each request; at least one request.
        max_batch: rows, at most.
        max_tokens: what there is memory for, all rows together.
        is_paged: rows share pages; otherwise every row has the memory of the longest request.
        is_kept: the cache serves later requests too, so sizes are rounded up to powers of two.

    Raises:
        ValueError: there is no memory for the longest request.
    """

    def rounded(size: int) -> int:
        return 1 << (size - 1).bit_length() if is_kept else size

    num_rows = min(max_batch, rounded(len(lengths)))
    # At least two, so that no row is full before it decodes.
    longest = max(*lengths, 2)
    if max_tokens < longest:
        raise ValueError(
            f"generate: the cache must have room for the {longest} tokens of the longest request, "
            f"got room for {max_tokens}"
        )
    max_positions = rounded(longest)
    if not is_paged:
        max_positions = max_positions if max_positions <= max_tokens else longest
        num_rows = min(num_rows, max_tokens // max_positions)
        return Room(num_rows=num_rows, max_positions=max_positions, num_pages=None)
    pages_of = [-(-length // PAGE_SIZE) for length in heapq.nlargest(num_rows, lengths)]
    # A longest request that just fits may need a page that is not used up.
    num_pages = min(rounded(sum(pages_of)), max(max_tokens // PAGE_SIZE, pages_of[0]))
    return Room(num_rows=num_rows, max_positions=max_positions, num_pages=num_pages)


class PagePool:
    """Hands out the pages 0 .. num_pages - 1: none to two owners, none lost."""

    def __init__(self, num_pages: int) -> None:
        if num_pages < 0:
            raise ValueError(f"PagePool: num_pages must be >= 0, got {num_pages}")
        self.num_pages = num_pages
        # The page given back last is handed out next; of those never used, the lowest number.
        self._free = list(range(num_pages - 1, -1, -1))
        self._is_free = bytearray(b"\x01" * num_pages)

    @property
    def num_free(self) -> int:
        """How many pages `take` can hand out."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` pages; ValueError if fewer are free."""
        if not 0 <= count <= len(self._free):
            raise ValueError(f"PagePool: count must be in [0, {len(self._free)}], got {count}")
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._is_free[page] = 0
        return pages

    def give_back(self, pages: Iterable[int]) -> None:
        """Make `pages` free again; ValueError for one that is not taken."""
        for page in pages:
            if not 0 <= page < self.num_pages or self._is_free[page]:
                raise ValueError(f"PagePool: a page given back must be a taken one, got {page}")
            self._is_free[page] = 1
            self._free.append(page)
