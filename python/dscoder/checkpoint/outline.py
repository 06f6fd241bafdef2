"""A safetensors file written in place by many ranks: first its header, then every rank's bytes where they go.

The bytes are those that `save_file` of safetensors writes, which sorts tensors by type, then name, and pads
the header to eight bytes (https://huggingface.co/docs/safetensors, Format).
"""

import errno
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dscoder.checkpoint.store import DTYPES
from dscoder.models.region import Region

_METADATA = {"format": "pt"}  # transformers refuses files without it
_ALIGNMENT = 8
_LENGTH_BYTES = 8  # little-endian length of the header that opens a file


@dataclass(frozen=True, kw_only=True, slots=True)
class Outline:
    """A file of tensors of one type, before their values."""

    head: bytes
    begins: Mapping[str, int]  # byte of the file where each tensor begins
    num_bytes: int  # of the whole file
    itemsize: int

    def create(self, path: Path) -> None:
        """Make the file, of its size, with zeros for values."""
        with path.open("xb") as file:
            file.write(self.head)
            file.truncate(self.num_bytes)
            os.fsync(file.fileno())


def outline(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> Outline:
    """The file that holds tensors of these names and shapes."""
    names = {known: name for name, known in DTYPES.items()}
    header: dict[str, object] = {"__metadata__": _METADATA}
    ends = 0
    begins: dict[str, int] = {}
    for name in sorted(shapes):
        begins[name] = ends
        ends += math.prod(shapes[name]) * dtype.itemsize
        header[name] = {
            "dtype": names[dtype],
            "shape": list(shapes[name]),
            "data_offsets": [begins[name], ends],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    head = len(text).to_bytes(_LENGTH_BYTES, "little") + text
    return Outline(
        head=head,
        begins={name: len(head) + begin for name, begin in begins.items()},
        num_bytes=len(head) + ends,
        itemsize=dtype.itemsize,
    )


def write_box(file: int, values: Tensor, *, begin: int, box: Region) -> None:
    """Write `values`, on any device, to `box` of the tensor that begins at byte `begin` of an open file."""
    data = memoryview(values.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    itemsize = values.dtype.itemsize
    for run in box.runs():
        first = run.inside * itemsize
        _write_all(file, data[first : first + run.length * itemsize], begin + run.whole * itemsize)


def _write_all(file: int, data: memoryview, begin: int) -> None:
    while data:
        # Linux writes at most 2 GiB at once.
        num_bytes = os.pwrite(file, data, begin)
        if num_bytes == 0:
            raise OSError(errno.EIO, "checkpoint: nothing could be written")
        data, begin = data[num_bytes:], begin + num_bytes
