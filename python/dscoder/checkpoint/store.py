"""Named tensors in a directory of safetensors files, read and written one file at a time.

A directory holds either `model.safetensors`, or shards and `model.safetensors.index.json`, which says in
which shard each tensor lies. All headers are checked, each in itself and against the index, before any weight
is read: an error names the tensor and the file.
"""

import errno
import json
import math
import operator
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_LENGTH_BYTES = 8  # little-endian length of the JSON header that opens a file
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """One tensor as the header of its file has it."""

    file: Path
    dtype: str  # as safetensors writes it: "BF16"
    shape: tuple[int, ...]
    start: int  # first byte in the file's data
    end: int  # one past the last


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; ValueError naming the file if there is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"checkpoint: {path} must be a JSON file, got {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"checkpoint: {path} must hold a JSON object, got a {type(data).__name__}")
    return data


def is_present(path: Path) -> bool:
    """Whether there is a file; ValueError if there is only a link to one that is gone.

    A hub cache whose download was cut short is full of such links.
    """
    if path.is_symlink() and not path.exists():
        raise ValueError(f"checkpoint: {path} must be a file, got a broken link to {path.readlink()}")
    return path.exists()


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file, which fill its data; ValueError names the file and the tensor."""
    try:
        num_bytes = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            end_of_header = _LENGTH_BYTES + length
            if num_bytes < end_of_header:
                raise ValueError(f"its header ends at byte {end_of_header}, the file at byte {num_bytes}")
            header = json.loads(file.read(length))
        if not isinstance(header, dict):
            raise ValueError(f"its header must be a JSON object, got a {type(header).__name__}")
        header.pop("__metadata__", None)
        tensors = {name: _stored(path, name, entry) for name, entry in header.items()}
        _check_extents(tensors, num_bytes - end_of_header)
        # Whatever else the reader refuses of a header, it refuses when it opens the file.
        with safe_open(path, framework="pt", device="cpu", backend="pread"):
            pass
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise ValueError(f"checkpoint: {path} must be a whole safetensors file: {error}") from error
    return tensors


def _stored(path: Path, name: str, entry: Any) -> StoredTensor:
    try:
        dtype, (start, end) = entry["dtype"], map(operator.index, entry["data_offsets"])
        shape = tuple(map(operator.index, entry["shape"]))
    except (KeyError, TypeError, ValueError):
        dtype = None
    if not isinstance(dtype, str):
        raise ValueError(
            f"tensor {name!r} must have a dtype, a shape and two data_offsets, got {entry!r:.80}"
        )
    return StoredTensor(file=path, dtype=dtype, shape=shape, start=start, end=end)


def _check_extents(tensors: dict[str, StoredTensor], num_bytes: int) -> None:
    """In the order of their bytes, the tensors have their size, leave no gap and end where the data does."""
    filled = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start != filled:
            raise ValueError(f"tensor {name!r} must start at byte {filled} of the data, got {tensor.start}")
        size = tensor.end - tensor.start
        # A type that no weight may have is refused by name later, if the tensor is wanted.
        wanted = math.prod(tensor.shape) * DTYPES[tensor.dtype].itemsize if tensor.dtype in DTYPES else size
        if size != wanted:
            what = f"tensor {name!r} of type {tensor.dtype} and shape {tensor.shape}"
            raise ValueError(f"{what} must be {wanted} bytes, got {size}")
        if tensor.end > num_bytes:
            raise ValueError(
                f"it is cut off: tensor {name!r} must end at byte {tensor.end} of the data, got {num_bytes}"
            )
        filled = tensor.end
    if filled != num_bytes:
        raise ValueError(f"it must hold {filled} bytes of data, got {num_bytes}")


def open_store(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint directory, without reading one."""
    index, weights = directory / INDEX, directory / WEIGHTS
    if is_present(index):
        weight_map = _read_index(index)
        if is_present(weights) and WEIGHTS not in weight_map.values():
            raise ValueError(f"checkpoint: {directory} must hold {WEIGHTS} or {INDEX}, got both")
        return _read_shards(directory, weight_map)
    if is_present(weights):
        return read_header(weights)
    raise ValueError(f"checkpoint: {directory} must hold {WEIGHTS} or {INDEX}, got {_found(directory)}")


def _found(directory: Path) -> str:
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if pickles:
        return (
            f"{pickles[0]}: a pickle, which can run any code when it is opened. If you trust it, convert it "
            "with torch.load(file, weights_only=True) and safetensors.torch.save_file"
        )
    shards = sorted(path.name for path in directory.glob("*.safetensors"))
    return f"{shards[0]} and no index" if shards else "neither"


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"checkpoint: {path} must have a weight_map, got {weight_map!r:.80}")
    for name, file in weight_map.items():
        # A name with a folder in it could point anywhere on this machine.
        if not isinstance(file, str) or file in ("", "..") or Path(file).name != file:
            raise ValueError(f"checkpoint: {path}: the file of {name!r} must be a plain name, got {file!r}")
    return weight_map


def _read_shards(directory: Path, weight_map: dict[str, str]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    index = directory / INDEX
    for file in sorted(set(weight_map.values())):
        path = directory / file
        if not is_present(path):
            name = next(name for name, holder in weight_map.items() if holder == file)
            raise ValueError(f"checkpoint: {index} puts {name!r} in {file}, which is absent")
        for name, tensor in read_header(path).items():
            listed = weight_map.get(name)
            if listed != file:
                where = "nowhere" if listed is None else f"in {listed}"
                raise ValueError(f"checkpoint: {name!r} lies in {path}, but {INDEX} puts it {where}")
            tensors[name] = tensor
    for name, file in weight_map.items():
        if name not in tensors:
            raise ValueError(f"checkpoint: {index} puts {name!r} in {file}, which does not hold it")
    return tensors


def read_tensors(
    tensors: dict[str, StoredTensor], boxes: Mapping[str, tuple[slice, ...]] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor, one file open at a time and in its order; a tensor is read when it is asked for.

    Of the tensors in `boxes` that box alone is read.
    """
    by_file: dict[Path, list[str]] = {}
    for name in sorted(tensors, key=lambda name: (tensors[name].file, tensors[name].start)):
        by_file.setdefault(tensors[name].file, []).append(name)
    for path, names in by_file.items():
        yield from _read_file(path, names, boxes or {})


def _read_file(
    path: Path, names: Sequence[str], boxes: Mapping[str, tuple[slice, ...]]
) -> Iterator[tuple[str, Tensor]]:
    try:
        # Not mapped: pages of a mapped file would count as this process's memory until it is closed.
        with safe_open(path, framework="pt", device="cpu", backend="pread") as file:
            for name in names:
                box = boxes.get(name)
                yield name, file.get_tensor(name) if box is None else file.get_slice(name)[box]
    except (SafetensorError, OSError) as error:
        raise ValueError(f"checkpoint: {path} must be a whole safetensors file: {error}") from error


def plan_shards(sizes: Sequence[int], *, max_bytes: int) -> list[range]:
    """Cut items of `sizes` bytes, in order, into runs of at most `max_bytes`; a larger item stands alone."""
    shards: list[range] = []
    start = filled = 0
    for i, size in enumerate(sizes):
        if i > start and filled + size > max_bytes:
            shards.append(range(start, i))
            start, filled = i, 0
        filled += size
    return [*shards, range(start, len(sizes))]


def plan_files(sizes: Sequence[int], *, max_bytes: int) -> dict[str, range]:
    """Which of the tensors of `sizes` bytes go to which file: one for all, or shards."""
    shards = plan_shards(sizes, max_bytes=max_bytes)
    if len(shards) == 1:
        return {WEIGHTS: shards[0]}
    return {
        f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard
        for number, shard in enumerate(shards, start=1)
    }


def write_tensors(directory: Path, tensors: Sequence[tuple[str, Tensor]], *, max_shard_bytes: int) -> None:
    """Write named tensors, as one file if they fit in `max_shard_bytes`, else as shards with an index.

    Nothing is copied but what is on another device or not contiguous, and of that one shard at a time.
    """
    sizes = [tensor.nbytes for _, tensor in tensors]
    weight_map: dict[str, str] = {}
    for file, shard in plan_files(sizes, max_bytes=max_shard_bytes).items():
        part = tensors[shard.start : shard.stop]
        write_file(directory / file, part)
        weight_map |= {name: file for name, _ in part}
    write_index(directory, weight_map, num_bytes=sum(sizes))


def write_index(directory: Path, weight_map: Mapping[str, str], *, num_bytes: int) -> None:
    """Say which file each tensor is in, where there are shards."""
    if set(weight_map.values()) == {WEIGHTS}:
        return
    index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_file(path: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write named tensors as one safetensors file; what is on another device is copied."""
    on_cpu = {name: tensor.cpu().contiguous() for name, tensor in tensors}
    try:
        # The metadata names the framework; transformers refuses files without it.
        save_file(on_cpu, path, metadata={"format": "pt"})
    except SafetensorError as error:
        # Not an OSError, whose number it gives in its text alone.
        number = _OS_ERROR.search(str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, f"checkpoint: {path} could not be written: {error}") from error
