"""Models from and to the published Hugging Face layout where many ranks hold one model together.

Every rank reads from the files what it holds and nothing else, and writes what it holds into the files that
one process would write: no weight travels between ranks, and beside the model a rank needs memory for one
tensor. The directory must be one that all ranks see.
"""

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dscoder.checkpoint.config_hf import config_to_hf
from dscoder.checkpoint.names import Piece, pieces
from dscoder.checkpoint.outline import Outline, outline, write_box
from dscoder.checkpoint.replace import new_directory
from dscoder.checkpoint.source import (
    TIED_HEAD,
    Source,
    check_fit,
    open_source,
    pieces_of,
    require_vocabulary,
    unequal_head,
)
from dscoder.checkpoint.store import plan_files, read_tensors, write_index
from dscoder.checkpoint.target import MAX_SHARD_BYTES, Target, open_target
from dscoder.config import ModelConfig
from dscoder.models import Transformer
from dscoder.models.region import Region, whole_region
from dscoder.models.sharding import Part, is_counted, parts
from dscoder.runtime.agreement import Agreement
from dscoder.runtime.mesh import Mesh


def load_sharded(
    model: Transformer, path_or_repo_id: str | Path, *, mesh: Mesh, dtype: torch.dtype | None = None
) -> None:
    """Fill `model`, which is sharded over `mesh` and has its memory, with weights; a collective.

    Args:
        path_or_repo_id: as for `load_pretrained`. One rank of each machine fetches a repository.
        dtype: of the run: what every value is rounded to before it goes into the parameters, whatever their
            type is. None: values go as they are.

    ValueError for what `load_pretrained` refuses; RankError on ranks that found no fault of their own.
    """

    def find() -> Source:
        return open_source(path_or_repo_id, config=model.config, dtype=dtype)

    ranks = Agreement(mesh.control)
    fetched = ranks.each(lambda: find() if mesh.local_rank == 0 else None)
    source = ranks.each(lambda: fetched or find())
    held = parts(model, mesh)
    ranks.each(lambda: _fill(held, source, dtype))


@torch.no_grad()
def _fill(held: Mapping[str, Part], source: Source, dtype: torch.dtype | None) -> None:
    require_vocabulary(source)
    by_name = pieces_of(source)
    check_fit(source, by_name, {name: part.whole_shape for name, part in held.items()})
    assert {piece.parameter for piece in by_name.values()} == held.keys()
    for box, values in _read(held, source, by_name.values()):
        box.local.copy_(values.to(dtype or values.dtype))
    if source.config.tie_embeddings and TIED_HEAD in source.stored:
        _check_tied_head(held, source, dtype)


def _check_tied_head(held: Mapping[str, Part], source: Source, dtype: torch.dtype | None) -> None:
    """What `load_pretrained` refuses, on this rank's rows."""
    head = Piece(name=TIED_HEAD, parameter="embed.weight")
    for box, values in _read(held, source, [head]):
        if not torch.equal(values.to(dtype or values.dtype).to(box.local), box.local):
            raise ValueError(unequal_head(source.stored[TIED_HEAD]))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Box:
    """What this rank holds of one piece."""

    piece: Piece
    local: Tensor  # its memory
    place: Region  # in the tensor of the files


def _boxes(held: Mapping[str, Part], every: Iterable[Piece]) -> Iterator[_Box]:
    """This rank's box of every piece of whose parameter it holds some, unless it is empty."""
    regions = {name: part.region for name, part in held.items()}
    for piece in every:
        region = regions.get(piece.parameter)
        if region is None:
            continue
        shared = piece.region(region.whole_shape).overlap(region)
        if shared.num_elements:
            place = piece.place(shared)
            local = held[piece.parameter].local[shared.slices(region)].view(place.shape)
            yield _Box(piece=piece, local=local, place=place)


def _read(held: Mapping[str, Part], source: Source, every: Iterable[Piece]) -> Iterator[tuple[_Box, Tensor]]:
    """Every box of this rank and the values that the files have for it."""
    boxes = {box.piece.name: box for box in _boxes(held, every)}
    slices = {name: box.place.slices(whole_region(box.place.whole_shape)) for name, box in boxes.items()}
    for name, values in read_tensors({name: source.stored[name] for name in boxes}, slices):
        yield boxes[name], values


@dataclass(frozen=True, kw_only=True, slots=True)
class _File:
    """One file to write."""

    outline: Outline
    pieces: Sequence[Piece]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """The files of a checkpoint, and what rank 0 puts beside them."""

    files: Mapping[str, _File]
    dtype: torch.dtype
    config: dict[str, Any]
    target: Target | None  # on rank 0

    def create(self, partial: Path) -> None:
        """Make every file, without its values, and what stands beside them; rank 0's part."""
        assert self.target is not None
        for name, file in self.files.items():
            file.outline.create(partial / name)
        weight_map = {piece.name: name for name, file in self.files.items() for piece in file.pieces}
        num_bytes = sum(file.outline.num_bytes - len(file.outline.head) for file in self.files.values())
        write_index(partial, weight_map, num_bytes=num_bytes)
        self.target.write_companions(partial, self.config)


def _plan_files(
    config: ModelConfig, held: Mapping[str, Part], *, dtype: torch.dtype, max_shard_bytes: int
) -> dict[str, _File]:
    every = list(pieces(config))
    shapes = [piece.shape_in(held[piece.parameter].whole_shape) for piece in every]
    sizes = [math.prod(shape) * dtype.itemsize for shape in shapes]
    return {
        name: _File(
            outline=outline({every[i].name: shapes[i] for i in chosen}, dtype),
            pieces=[every[i] for i in chosen],
        )
        for name, chosen in plan_files(sizes, max_bytes=max_shard_bytes).items()
    }


def save_sharded(
    model: Transformer,
    directory: str | Path,
    *,
    mesh: Mesh,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    tokenizer: str | Path | None = None,
    overwrite: bool = False,
) -> None:
    """Write `model`, which is sharded over `mesh`, whole or not at all; a collective.

    The files are byte for byte those that `save_pretrained` writes of the whole model.

    Args:
        dtype: of the files; the parameters are rounded to it. None: their own.

    The others are those of `save_pretrained`. An error on one rank is a RankError on the others.
    """
    held = parts(model, mesh)

    def prepare() -> _Plan:
        if any(part.local.is_meta for part in held.values()):
            raise ValueError("save_pretrained: model must have its weights, got them on the meta device")
        target = None
        if mesh.is_first:
            target = open_target(
                directory, max_shard_bytes=max_shard_bytes, tokenizer=tokenizer, overwrite=overwrite
            )
        written = dtype or held["embed.weight"].local.dtype
        return _Plan(
            target=target,
            config=config_to_hf(model.config, dtype=written),
            files=_plan_files(model.config, held, dtype=written, max_shard_bytes=max_shard_bytes),
            dtype=written,
        )

    ranks = Agreement(mesh.control)
    plan = ranks.each(prepare)
    with _shared_directory(None if plan.target is None else plan.target.directory, ranks) as partial:
        ranks.each(lambda: plan.create(partial) if ranks.is_first else None)
        ranks.each(lambda: _write_held(partial, plan, held))


@contextmanager
def _shared_directory(target: Path | None, ranks: Agreement) -> Iterator[Path]:
    """`new_directory` of rank 0's `target`, for all ranks."""
    with ExitStack() as stack:

        def enter() -> Path | None:
            return None if target is None else stack.enter_context(new_directory(target))

        partial = ranks.share(ranks.each(enter))
        assert partial is not None
        yield partial
        # Rank 0 moves it into place; the others learn whether it could.
        ranks.each(stack.close)


@torch.no_grad()
def _write_held(partial: Path, plan: _Plan, held: Mapping[str, Part]) -> None:
    """Write this rank's part of every piece to its place, and have it on the disk; one of several copies."""
    counted = {name: part for name, part in held.items() if is_counted(part)}
    for name, file in plan.files.items():
        boxes = list(_boxes(counted, file.pieces))
        if not boxes:
            continue
        opened = os.open(partial / name, os.O_WRONLY)
        try:
            for box in boxes:
                begin = file.outline.begins[box.piece.name]
                write_box(opened, box.local.to(plan.dtype), begin=begin, box=box.place)
            os.fsync(opened)
        finally:
            os.close(opened)
