"""A peer: another implementation of an op, whose layouts and plans are made before it is timed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


class UnsupportedError(ValueError):
    """A case that a peer does not have; no fault of anybody."""


def _unchanged(raw: Any) -> Any:
    return raw


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A peer bound to its arguments."""

    call: Callable[[], Any]  # what is timed; waits for the GPU only if the peer itself does
    read: Callable[[Any], Any] = _unchanged  # the call's result -> our op's result; checked, not timed

    def __call__(self) -> Any:
        """Our op's result, from the peer."""
        return self.read(self.call())


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """What can take the place of one of our ops."""

    # The op's arguments -> what to time; UnsupportedError for a case it lacks.
    prepare: Callable[..., Run]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Our op's result for these arguments."""
        return self.prepare(*args, **kwargs)()
