"""Models from and to directories in the published Hugging Face layout, in one process.

Memory: a loaded model needs itself and one tensor; a saved one needs itself and, for weights that are not on
the CPU, one shard. checkpoint/sharded.py does the same for a model that many ranks hold together.
"""

from pathlib import Path

import torch
from torch import nn

from dscoder.checkpoint.config_hf import config_from_hf, config_to_hf, is_scalar_hf
from dscoder.checkpoint.names import Piece, pieces
from dscoder.checkpoint.replace import new_directory
from dscoder.checkpoint.source import (
    CONFIG,
    TIED_HEAD,
    Source,
    check_fit,
    find_checkpoint,
    naming,
    open_source,
    pieces_of,
    require_vocabulary,
    unequal_head,
)
from dscoder.checkpoint.store import StoredTensor, read_json, read_tensors, write_tensors
from dscoder.checkpoint.target import MAX_SHARD_BYTES, open_target
from dscoder.config import ModelConfig
from dscoder.models import ScalarModel, Transformer, materialise


def load_config(path_or_repo_id: str | Path) -> ModelConfig:
    """The config of the model in a directory or hub repository; its weights are left where they are."""
    path = find_checkpoint(path_or_repo_id, files=(CONFIG,)) / CONFIG
    with naming(path):
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
    source = open_source(path_or_repo_id, config=config, dtype=dtype)
    require_vocabulary(source)
    parts = pieces_of(source)
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
    source = open_source(path_or_repo_id, dtype=dtype)
    if not source.is_scalar:
        if seed is None:
            raise ValueError(
                f"load_scalar_model: {path_or_repo_id} must have a trained scalar head, "
                "got a model with a vocabulary"
            )
        backbone = load_pretrained(source.directory, dtype=dtype, device=device)
        return ScalarModel(backbone, seed=seed).eval()
    parts = pieces_of(source)
    model = ScalarModel(Transformer(source.config, device="meta"))
    _read_weights(model, source, parts, device=torch.device(device))
    return model.eval()


def _parameters(model: Transformer | ScalarModel) -> dict[str, nn.Parameter]:
    """The parameters by the names that pieces have for them."""
    if isinstance(model, ScalarModel):
        return {name.removeprefix("backbone."): weight for name, weight in model.named_parameters()}
    return dict(model.named_parameters())


def _read_weights(
    model: Transformer | ScalarModel, source: Source, parts: dict[str, Piece], *, device: torch.device
) -> None:
    """Give `model`, which is on the meta device, its memory and the weights of `source`."""
    parameters = _parameters(model)
    check_fit(source, parts, {name: tuple(parameter.shape) for name, parameter in parameters.items()})
    materialise(model, dtype=source.dtype, device=device)
    _fill(model, {name: source.stored[name] for name in parts}, parts)


@torch.no_grad()
def _fill(model: Transformer | ScalarModel, stored: dict[str, StoredTensor], parts: dict[str, Piece]) -> None:
    parameters = _parameters(model)
    assert {piece.parameter for piece in parts.values()} == parameters.keys()
    for name, tensor in read_tensors(stored):
        piece = parts[name]
        piece.view(parameters[piece.parameter]).copy_(tensor)


def _check_tied_head(model: Transformer, stored: dict[str, StoredTensor]) -> None:
    """A tied checkpoint may hold the head too, if it is the same matrix."""
    head = {name: tensor for name, tensor in stored.items() if name == TIED_HEAD}
    for name, tensor in read_tensors(head):
        if not torch.equal(tensor.to(model.embed.weight), model.embed.weight):
            raise ValueError(unequal_head(head[name]))


def save_pretrained(
    model: Transformer | ScalarModel,
    directory: str | Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
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
    is_scalar = isinstance(model, ScalarModel)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("save_pretrained: model must have its weights, got them on the meta device")
    target = open_target(
        directory,
        max_shard_bytes=max_shard_bytes,
        tokenizer=tokenizer,
        overwrite=overwrite,
        pads_with_bos=is_scalar,
    )
    parameters = _parameters(model)
    data = config_to_hf(model.config, dtype=parameters["embed.weight"].dtype, is_scalar=is_scalar)
    tensors = [
        (piece.name, piece.view(parameters[piece.parameter].detach()))
        for piece in pieces(model.config, is_scalar=is_scalar)
    ]
    with new_directory(target.directory) as partial:
        write_tensors(partial, tensors, max_shard_bytes=max_shard_bytes)
        target.write_companions(partial, data)
