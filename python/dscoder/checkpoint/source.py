"""A checkpoint to read: where it is, what its config.json and headers say, and whether they fit a model.

Nothing is read before config.json and all headers are found to fit.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from huggingface_hub import snapshot_download

from dscoder.checkpoint.config_hf import config_from_hf, dtype_from_hf, is_scalar_hf
from dscoder.checkpoint.names import Piece, has_stacked_experts, is_derived, pieces
from dscoder.checkpoint.store import DTYPES, INDEX, StoredTensor, is_present, open_store, read_json
from dscoder.config import ModelConfig

CONFIG = "config.json"
TIED_HEAD = "lm_head.weight"  # which a checkpoint with a tied head may hold too
_EMBEDDING = "model.embed_tokens.weight"
_HUB_FILES = (CONFIG, INDEX, "model*.safetensors")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A checkpoint whose headers were read."""

    directory: Path
    stored: dict[str, StoredTensor]
    config: ModelConfig
    dtype: torch.dtype
    is_scalar: bool


def open_source(
    path_or_repo_id: str | Path, *, config: ModelConfig | None = None, dtype: torch.dtype | None = None
) -> Source:
    """The checkpoint there, with `config` and `dtype` in place of what it says itself, where given."""
    if dtype is not None and dtype not in DTYPES.values():
        wanted = ", ".join(str(known) for known in DTYPES.values())
        raise ValueError(f"load_pretrained: dtype must be one of {wanted}, got {dtype}")
    directory = find_checkpoint(path_or_repo_id, files=_HUB_FILES)
    data = read_json(directory / CONFIG)
    is_scalar = is_scalar_hf(data)
    with naming(directory / CONFIG):
        config = config or config_from_hf(data, is_scalar=is_scalar)
        dtype = dtype or dtype_from_hf(data)
    stored = open_store(directory)
    if dtype is None and _EMBEDDING in stored:
        dtype = DTYPES.get(stored[_EMBEDDING].dtype)
    return Source(
        directory=directory,
        stored=stored,
        config=config,
        dtype=dtype or torch.float32,  # a missing or strange embedding is refused by name when it is read
        is_scalar=is_scalar,
    )


def require_vocabulary(source: Source) -> None:
    """ValueError for a model with a scalar head."""
    if source.is_scalar:
        raise ValueError(
            f"load_pretrained: {source.directory} must hold a model with a vocabulary, got one with a scalar "
            "head (load_scalar_model reads it)"
        )


def unequal_head(tensor: StoredTensor) -> str:
    """What is wrong where a tied model's checkpoint holds a head of its own: one of the two would be lost."""
    return (
        f"load_pretrained: {tensor.file}: tensor {TIED_HEAD!r} must equal the embedding "
        "(tie_word_embeddings is true), got other values"
    )


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Say in an error which file it is about."""
    try:
        yield
    except (ValueError, RecursionError) as error:
        raise ValueError(f"load_pretrained: {path}: {error}") from error


def find_checkpoint(path_or_repo_id: str | Path, *, files: Sequence[str]) -> Path:
    """The directory, or the one that a hub repository is fetched to; ValueError if there is neither."""
    path = Path(path_or_repo_id).expanduser()
    if path.is_dir():
        if not is_present(path / CONFIG):
            raise ValueError(f"load_pretrained: {path} must be a checkpoint directory, got no {CONFIG} in it")
        return path
    if isinstance(path_or_repo_id, Path) or not _HUB_ID.fullmatch(path_or_repo_id):
        raise ValueError(f"load_pretrained: path_or_repo_id must be a directory or a hub id, got {path}")
    try:
        return Path(snapshot_download(path_or_repo_id, allow_patterns=list(files)))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"load_pretrained: path_or_repo_id must be a directory or a repository of the Hugging Face hub, "
            f"got {path_or_repo_id!r}: there is no such directory, and the hub answered "
            f"{type(error).__name__}: {error}"
        ) from error


def pieces_of(source: Source) -> dict[str, Piece]:
    """The pieces of the model by their names in the files, all of which are there."""
    stored = source.stored
    every = pieces(source.config, stacked_experts=has_stacked_experts(stored), is_scalar=source.is_scalar)
    # One more than there are tensors is enough to miss one, whatever number of layers a config claims.
    parts = {piece.name: piece for piece in islice(every, len(stored) + 1)}
    missing = [name for name in parts if name not in stored]
    if missing:
        others = " and others" if len(missing) > 1 else ""
        raise ValueError(
            f"load_pretrained: {source.directory} must hold tensor {missing[0]!r}{others}, got none"
        )
    return parts


def check_fit(source: Source, parts: Mapping[str, Piece], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """ValueError if a tensor is left over, or one has another shape or a type that cannot be converted.

    `shapes` are those of the model's whole parameters, by the names that pieces have for them.
    """
    tied = {TIED_HEAD} if source.config.tie_embeddings else set()
    for name, tensor in source.stored.items():
        if name not in parts and name not in tied and not is_derived(name) and 0 not in tensor.shape:
            raise ValueError(
                f"load_pretrained: {tensor.file} must hold what {CONFIG} calls for, got tensor {name!r} too"
            )
    for name, piece in parts.items():
        tensor, wanted = source.stored[name], piece.shape_in(shapes[piece.parameter])
        if tensor.shape != wanted:
            raise ValueError(
                f"load_pretrained: {tensor.file}: tensor {name!r} must be {wanted}, got {tensor.shape}"
            )
        if tensor.dtype not in DTYPES:
            raise ValueError(
                f"load_pretrained: {tensor.file}: tensor {name!r} must be one of {', '.join(DTYPES)}, "
                f"got {tensor.dtype}"
            )
