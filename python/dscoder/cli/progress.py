"""What the demos show while they run: a title and a time for each stage, curves as a line of text."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

from rich.console import Console

_SPARKS = [chr(0x2581 + level) for level in range(8)]


@contextmanager
def step(screen: Console, title: str) -> Iterator[None]:
    """Rule a line with the title, and say how long the block took."""
    screen.rule(title, align="left")
    begin = time.perf_counter()
    yield
    screen.print(f"{title}: {time.perf_counter() - begin:.1f} s", style="dim")


def sparkline(values: Sequence[float], *, width: int) -> str:
    """One character a value, or a mean of neighbours where there are more than `width`."""
    count = min(width, len(values))
    edges = [i * len(values) // count for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(_SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_SPARKS[round((mean - low) * scale)] for mean in means)
