"""Models from and to directories in the published Hugging Face layout.

Memory: a loaded model needs itself and one tensor; a saved one needs itself and, for weights that are not on
the CPU, one shard. Nothing is read before config.json and all headers are found to fit.
"""

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from torch import nn

from dscoder.checkpoint.config_hf import config_from_hf, config_to_hf, dtype_from_hf, is_scalar_hf
from dscoder.checkpoint.names import Piece, has_stacked_experts, is_derived, pieces
from dscoder.checkpoint.replace import new_directory
from dscoder.checkpoint.store import (
    DTYPES,
    INDEX,
    StoredTensor,
    is_present,
    open_store,
    read_json,
    read_tensors,
    write_tensors,
)
from dscoder.config import ModelConfig
from dscoder.models import ScalarModel, Transformer, materialise

CONFIG = "config.json"
_EMBEDDING = "model.embed_tokens.weight"
_NAMING_PAD = ("tokenizer_config.json", "special_tokens_map.json")  # files that say how to pad
TOKENIZER_FILES = (
    "tokenizer.json",
    *_NAMING_PAD,
    "added_tokens.json",
    "chat_template.jinja",
)
# What a directory may hold to be replaced by a new checkpoint.
_CHECKPOINT_FILES = (
    *TOKENIZER_FILES,
    CONFIG,
    INDEX,
    "*.safetensors",
    "generation_config.json",
    "manifest.json",
    "README.md",
)
_HUB_FILES = (CONFIG, INDEX, "model*.safetensors")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_MAX_SHARD_BYTES = 5 * 1000**3  # what the published checkpoints have


def load_config(path_or_repo_id: str | Path) -> ModelConfig:
    """The config of the model in a directory or hub repository; its weights are left where they are."""
    path = _find(path_or_repo_id, files=(CONFIG,)) / CONFIG
    with _naming(path):
        data = read_json(path)
        return config_from_hf(data, is_scalar=is_scalar_hf(data))


def load_pretrained(
    path_or_repo_id: str | Path,
    *,
    config: ModelConfig | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Transformer:
    """The model in a directory, or in a repository of the Hugging Face hub, in evaluation mode.

    Args:
        path_or_repo_id: a directory with config.json and safetensors files, or "owner/name".
        config: takes the place of the one in config.json: the same weights at other positions, say.
        dtype: of the parameters. None: what config.json says, else what the embedding is stored in.
        device: where they go; tensors are converted and moved one at a time.
    """
    source = _open(path_or_repo_id, config=config, dtype=dtype)
    if source.is_scalar:
        raise ValueError(
            f"load_pretrained: {source.directory} must hold a model with a vocabulary, got one with a scalar "
            "head (load_scalar_model reads it)"
        )
    parts = _parts(source)
    model = Transformer(source.config, device="meta")
    _read_weights(model, source, parts, device=torch.device(device))
    if source.config.tie_embeddings:
        _check_tied_head(model, source.stored)
    return model.eval()


def load_scalar_model(
    path_or_repo_id: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    seed: int | None = 0,
) -> ScalarModel:
    """A model with a scalar head, in evaluation mode; the arguments are those of `load_pretrained`.

    From a model with a vocabulary its backbone is taken, and the head is drawn by `seed`; ValueError if None.
    """
    source = _open(path_or_repo_id, config=None, dtype=dtype)
    if not source.is_scalar:
        if seed is None:
            raise ValueError(
                f"load_scalar_model: {path_or_repo_id} must have a trained scalar head, "
                "got a model with a vocabulary"
            )
        backbone = load_pretrained(source.directory, dtype=dtype, device=device)
        return ScalarModel(backbone, seed=seed).eval()
    parts = _parts(source)
    model = ScalarModel(Transformer(source.config, device="meta"))
    _read_weights(model, source, parts, device=torch.device(device))
    return model.eval()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Source:
    """A checkpoint whose headers were read."""

    directory: Path
    stored: dict[str, StoredTensor]
    config: ModelConfig
    dtype: torch.dtype
    is_scalar: bool


def _open(path_or_repo_id: str | Path, *, config: ModelConfig | None, dtype: torch.dtype | None) -> _Source:
    """The checkpoint there, with `config` and `dtype` in place of what it says itself, where given."""
    if dtype is not None and dtype not in DTYPES.values():
        wanted = ", ".join(str(known) for known in DTYPES.values())
        raise ValueError(f"load_pretrained: dtype must be one of {wanted}, got {dtype}")
    directory = _find(path_or_repo_id, files=_HUB_FILES)
    data = read_json(directory / CONFIG)
    is_scalar = is_scalar_hf(data)
    with _naming(directory / CONFIG):
        config = config or config_from_hf(data, is_scalar=is_scalar)
        dtype = dtype or dtype_from_hf(data)
    stored = open_store(directory)
    if dtype is None and _EMBEDDING in stored:
        dtype = DTYPES.get(stored[_EMBEDDING].dtype)
    return _Source(
        directory=directory,
        stored=stored,
        config=config,
        dtype=dtype or torch.float32,  # a missing or strange embedding is refused by name when it is read
        is_scalar=is_scalar,
    )


def _read_weights(
    model: Transformer | ScalarModel, source: _Source, parts: dict[str, Piece], *, device: torch.device
) -> None:
    """Give `model`, which is on the meta device, its memory and the weights of `source`."""
    _check(source.stored, parts, model)
    materialise(model, dtype=source.dtype, device=device)
    _fill(model, {name: source.stored[name] for name in parts}, parts)


def _parameters(model: Transformer | ScalarModel) -> dict[str, nn.Parameter]:
    """The parameters by the names that pieces have for them."""
    if isinstance(model, ScalarModel):
        return {name.removeprefix("backbone."): weight for name, weight in model.named_parameters()}
    return dict(model.named_parameters())


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, RecursionError) as error:
        raise ValueError(f"load_pretrained: {path}: {error}") from error


def _find(path_or_repo_id: str | Path, *, files: Sequence[str]) -> Path:
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


def _parts(source: _Source) -> dict[str, Piece]:
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


def _check(
    stored: dict[str, StoredTensor], parts: dict[str, Piece], model: Transformer | ScalarModel
) -> None:
    """No tensor is left over, each has the shape and a type that can be converted."""
    tied = {"lm_head.weight"} if model.config.tie_embeddings else set()
    for name, tensor in stored.items():
        if name not in parts and name not in tied and not is_derived(name) and 0 not in tensor.shape:
            raise ValueError(
                f"load_pretrained: {tensor.file} must hold what {CONFIG} calls for, got tensor {name!r} too"
            )
    parameters = _parameters(model)
    for name, piece in parts.items():
        tensor, wanted = stored[name], tuple(piece.view(parameters[piece.parameter]).shape)
        if tensor.shape != wanted:
            raise ValueError(
                f"load_pretrained: {tensor.file}: tensor {name!r} must be {wanted}, got {tensor.shape}"
            )
        if tensor.dtype not in DTYPES:
            raise ValueError(
                f"load_pretrained: {tensor.file}: tensor {name!r} must be one of {', '.join(DTYPES)}, "
                f"got {tensor.dtype}"
            )


@torch.no_grad()
def _fill(model: Transformer | ScalarModel, stored: dict[str, StoredTensor], parts: dict[str, Piece]) -> None:
    parameters = _parameters(model)
    assert {piece.parameter for piece in parts.values()} == parameters.keys()
    for name, tensor in read_tensors(stored):
        piece = parts[name]
        piece.view(parameters[piece.parameter]).copy_(tensor)


def _check_tied_head(model: Transformer, stored: dict[str, StoredTensor]) -> None:
    """A tied checkpoint may hold the head too; if it is another matrix, one of the two would be lost."""
    head = {name: tensor for name, tensor in stored.items() if name == "lm_head.weight"}
    for name, tensor in read_tensors(head):
        if not torch.equal(tensor.to(model.embed.weight), model.embed.weight):
            raise ValueError(
                f"load_pretrained: {head[name].file}: tensor {name!r} must equal the embedding "
                "(tie_word_embeddings is true), got other values"
            )


def save_pretrained(
    model: Transformer | ScalarModel,
    directory: str | Path,
    *,
    max_shard_bytes: int = _MAX_SHARD_BYTES,
    tokenizer: str | Path | None = None,
    overwrite: bool = False,
) -> None:
    """Write `model` to `directory`, whole or not at all, as vLLM, SGLang and transformers read it.

    Args:
        max_shard_bytes: weights of a file; what fits in one is one file, a larger tensor stands alone.
        tokenizer: a directory whose tokenizer files are copied into the new one. Beside a scalar head its
            padding token becomes the begin-of-text token.
        overwrite: replace `directory` if it is a checkpoint and nothing else; else it must not exist or be
            empty.
    """
    directory = Path(directory).expanduser()
    if max_shard_bytes < 1:
        raise ValueError(f"save_pretrained: max_shard_bytes must be >= 1, got {max_shard_bytes}")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("save_pretrained: model must have its weights, got them on the meta device")
    check_replaceable(directory, overwrite=overwrite)
    companions = [] if tokenizer is None else _tokenizer_files(Path(tokenizer).expanduser())
    parameters, is_scalar = _parameters(model), isinstance(model, ScalarModel)
    data = config_to_hf(model.config, dtype=parameters["embed.weight"].dtype, is_scalar=is_scalar)
    tensors = [
        (piece.name, piece.view(parameters[piece.parameter].detach()))
        for piece in pieces(model.config, is_scalar=is_scalar)
    ]
    with new_directory(directory) as partial:
        write_tensors(partial, tensors, max_shard_bytes=max_shard_bytes)
        for path in companions:
            shutil.copyfile(path, partial / path.name)
        if is_scalar:
            _pad_with_bos([partial / path.name for path in companions])
        text = json.dumps(data, indent=2, sort_keys=True)
        (partial / CONFIG).write_text(text + "\n", encoding="utf-8")


def _pad_with_bos(files: Sequence[Path]) -> None:
    """Make the padding token of copied tokenizer files what config.json says it is.

    transformers looks for the last token that is no padding; the published tokenizers pad with the
    end-of-text token, which sequences end with.
    """
    for path in files:
        data = read_json(path) if path.name in _NAMING_PAD else {}
        if data.get("bos_token") is not None:
            data["pad_token"] = data["bos_token"]
            path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _tokenizer_files(directory: Path) -> list[Path]:
    files = [directory / name for name in TOKENIZER_FILES if (directory / name).is_file()]
    if directory / TOKENIZER_FILES[0] not in files:
        raise ValueError(f"save_pretrained: tokenizer must hold {TOKENIZER_FILES[0]}, got {directory}")
    return files


def check_replaceable(directory: Path, *, overwrite: bool) -> None:
    """ValueError unless `save_pretrained` may write to `directory`: for asking before a long run."""
    if not directory.exists():
        return
    if not directory.is_dir():
        raise ValueError(f"save_pretrained: directory must not be a file, got {directory}")
    entries = sorted(directory.iterdir())
    if not entries:
        return
    if not overwrite:
        raise ValueError(
            f"save_pretrained: directory must not exist or be empty unless overwrite=True, got {directory}"
        )
    strange = [p.name for p in entries if p.is_dir() or not any(p.match(form) for form in _CHECKPOINT_FILES)]
    if strange or not (directory / CONFIG).is_file():
        what = f"{strange[0]!r} in it" if strange else f"no {CONFIG} in it"
        raise ValueError(
            f"save_pretrained: directory must be a checkpoint and nothing else to be overwritten, "
            f"got {directory} with {what}"
        )
