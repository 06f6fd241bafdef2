"""What all ranks do together ends well on all of them, or with an error on all of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from dscoder.runtime.mesh import Mesh

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Failure:
    """What went wrong on a rank, in a form that every rank can read."""

    text: str
    error_number: int | None  # of an OSError
    is_refusal: bool  # a ValueError

    def as_error(self, rank: int) -> Exception:
        """The error of the ranks that had none of their own."""
        text = f"rank {rank}: {self.text}"
        if self.error_number is not None:
            return OSError(self.error_number, text)
        return ValueError(text) if self.is_refusal else RuntimeError(text)


def on_every_rank(mesh: Mesh, action: Callable[[], T]) -> T:
    """The result of `action`, which is no collective, once every rank's has ended well.

    If it fails anywhere, every rank raises: its own error, or one of the same kind that names the first rank
    that failed and says what it said.
    """
    failure: Exception | None = None
    try:
        result = action()
    except Exception as error:
        failure = error
    told = mesh.gather(None if failure is None else _describe(failure))
    if failure is not None:
        raise failure
    for rank, other in enumerate(told):
        if other is not None:
            raise other.as_error(rank)
    return result


def _describe(error: Exception) -> _Failure:
    return _Failure(
        text=str(error) or type(error).__name__,
        error_number=(error.errno or 0) if isinstance(error, OSError) else None,
        is_refusal=isinstance(error, ValueError),
    )
