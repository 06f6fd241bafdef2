"""Which box of a whole tensor is held, read or written, and how two boxes meet."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Elements that follow one another both in a box and in the whole."""

    inside: int  # place of the first in the box, laid out by itself
    whole: int  # place of the first in the whole
    length: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Region:
    """A box of a tensor of `whole_shape`; empty if a side of it is."""

    whole_shape: tuple[int, ...]
    start: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        """Of the box."""
        return math.prod(self.shape)

    def overlap(self, other: "Region") -> "Region":
        """The box that is in both, of one whole."""
        assert self.whole_shape == other.whole_shape
        start = tuple(map(max, self.start, other.start))
        ends = (
            min(a + len_a, b + len_b)
            for a, len_a, b, len_b in zip(self.start, self.shape, other.start, other.shape, strict=True)
        )
        shape = tuple(max(0, end - first) for first, end in zip(start, ends, strict=True))
        return Region(whole_shape=self.whole_shape, start=start, shape=shape)

    def slices(self, frame: "Region") -> tuple[slice, ...]:
        """Where this box is in `frame`, a box around it."""
        return tuple(
            slice(first - origin, first - origin + length)
            for first, origin, length in zip(self.start, frame.start, self.shape, strict=True)
        )

    def runs(self) -> Iterator[Run]:
        """The box as the fewest runs, in their order; none if it is empty."""
        if self.num_elements == 0:
            return
        # From the last dimension that is cut on, elements follow one another.
        cuts = [d for d, length in enumerate(self.shape) if length != self.whole_shape[d]]
        cut = cuts[-1] if cuts else 0
        strides = [math.prod(self.whole_shape[d + 1 :]) for d in range(len(self.shape))]
        length = math.prod(self.shape[cut:])
        first = sum(place * stride for place, stride in zip(self.start, strides, strict=True))
        for number, places in enumerate(product(*(range(size) for size in self.shape[:cut]))):
            ahead = sum(place * stride for place, stride in zip(places, strides[:cut], strict=True))
            yield Run(inside=number * length, whole=first + ahead, length=length)


def whole_region(shape: tuple[int, ...]) -> Region:
    """All of a tensor."""
    return Region(whole_shape=shape, start=(0,) * len(shape), shape=shape)


def region_at(whole_shape: tuple[int, ...], *, offset: int, shape: tuple[int, ...]) -> Region:
    """The box of `shape` whose first element has place `offset` in the whole."""
    start = []
    for d in range(len(whole_shape)):
        stride = max(1, math.prod(whole_shape[d + 1 :]))
        start.append(offset // stride)
        offset %= stride
    return Region(whole_shape=whole_shape, start=tuple(start), shape=shape)
