"""States of dscoder.testing.weak_memory: where actors stand, what they must see, and what memory holds.

States that nobody can tell apart any more are brought to one form, or there would be far more of them: an
access that everybody who will touch a word or flag must see is as good as none, a value that all readers know
better of will not be seen, and a clock is only held against accesses that memory still knows.
"""

from collections.abc import Sequence
from typing import NamedTuple

from dscoder.testing.weak_memory_steps import Value

Clock = tuple[int, ...]  # of every other actor, how many of its steps must be seen
Access = tuple[int, int]  # who, at which of its steps

NEVER: Access = (0, 0)


class Word(NamedTuple):
    """Its value, who wrote it at which step, and who has read it since."""

    value: int
    written: Access
    reads: tuple[Access, ...]


class Entry(NamedTuple):
    """A value of a flag, who wrote it at which step, and what an acquire of it carries over."""

    value: Value
    written: Access
    carries: Clock


class State(NamedTuple):
    """Where actors stand, what they must see, memory, and for whom each rank first waited in vain (-1)."""

    places: tuple[int, ...]
    clocks: tuple[Clock, ...]
    words: tuple[Word, ...]
    flags: tuple[tuple[Entry, ...], ...]
    records: tuple[int, ...]
    dead: int  # a rank that has stopped for ever, -1: none


def shortened_word(
    word: Word, users: Sequence[int], clocks: Sequence[Clock], known: Sequence[set[int]]
) -> Word:
    """As its users, the actors that will touch it, can tell it from others."""
    if not users:
        return Word(0, NEVER, ())
    accesses = [access for access in (word.written, *word.reads) if access[1]]
    asked = [access for access in accesses if not all(is_behind(clocks[i], i, access) for i in users)]
    for who, step in asked:
        known[who].add(step)
    reads = tuple(read for read in word.reads if read in asked)
    return Word(word.value, word.written if word.written in asked else NEVER, reads)


def shortened_flag(
    history: tuple[Entry, ...], users: Sequence[int], clocks: Sequence[Clock], known: Sequence[set[int]]
) -> tuple[Entry, ...]:
    """Likewise."""
    if not users:
        return ()
    found = []
    for entry in history[min(oldest(clocks[i], i, history) for i in users) :]:
        written, carries = entry.written, entry.carries
        if all(is_behind(clocks[i], i, written) for i in users):
            written = NEVER
        known[written[0]].add(written[1])
        if any(carries):
            carries = tuple(
                step if any(i != who and clocks[i][who] < step for i in users) else 0
                for who, step in enumerate(carries)
            )
        found.append(Entry(entry.value, written, carries))
    return tuple(found)


def rounded(clock: Clock, steps: Sequence[Sequence[int]]) -> Clock:
    """Each at the last of the steps, from the last to the first, that it holds."""
    if not any(clock):
        return clock
    return tuple(
        next(step for step in known if step <= bound) if bound else 0
        for bound, known in zip(clock, steps, strict=True)
    )


def is_behind(clock: Clock, idx: int, access: Access) -> bool:
    """Whether actor `idx` with this clock must see an access, or made it."""
    return access[0] == idx or access[1] <= clock[access[0]]


def oldest(clock: Clock, idx: int, history: tuple[Entry, ...]) -> int:
    """The first of a flag's values that the actor may still see."""
    return max((i for i, entry in enumerate(history) if is_behind(clock, idx, entry.written)), default=0)
