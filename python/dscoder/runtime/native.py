"""The one import of the compiled extension."""

from dscoder import _C

__all__ = ["_C"]
