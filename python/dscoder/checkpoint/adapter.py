"""Adapters in the format of the `peft` package, both ways.

A directory holds `adapter_config.json` and `adapter_model.safetensors`, whose tensors are called
`base_model.model.<published layer>.lora_A.weight` [rank, in] and `.lora_B.weight` [out, rank]. peft and
transformers load such a directory onto the published form of the base model.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dscoder.checkpoint.names import pieces
from dscoder.checkpoint.replace import new_directory
from dscoder.checkpoint.store import DTYPES, StoredTensor, read_header, read_json, read_tensors, write_file
from dscoder.config import MlaConfig, ModelConfig
from dscoder.config.lora import LORA_TARGETS, LoraConfig
from dscoder.models import Transformer
from dscoder.models.lora import LoraPart, add_lora, lora_layers

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_TENSOR = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<matrix>[AB])\.weight")
_MLP = frozenset(("gate_proj", "up_proj", "down_proj"))
# What peft can do beyond a product of two matrices on linear layers, and the value that means "not done".
_PLAIN: Mapping[str, Sequence[object]] = {
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "lora_bias": (False,),
    "use_dora": (False,),
    "use_qalora": (False,),
    "alora_invocation_tokens": (None,),
    "layer_replication": (None,),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "kasa_config": (None,),
}
# How adapters may have begun. Other ways (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) take what they put into the
# adapters out of the weights of the base, which then are not the published ones that stand beside them here.
_PLAIN_STARTS: Sequence[object] = (True, False, "gaussian", "eva", "orthogonal")


def lora_parts(config: ModelConfig, targets: Sequence[str]) -> list[LoraPart]:
    """Where adapters called for by `targets` sit in a model.

    With latent attention that is the attention alone: peft takes the names of any MLP of a DeepSeek-V2 for
    those of its routed experts, which transformers holds as one stack. ValueError if no such layer is left.
    """
    names = set(targets) - (_MLP if isinstance(config.attention, MlaConfig) else frozenset())
    parts = [
        LoraPart(
            name=piece.name.removesuffix(".weight"),
            module=piece.parameter.removesuffix(".weight"),
            half_idx=piece.half_idx,
        )
        for piece in pieces(config)
        if piece.name.split(".")[-2] in names
    ]
    if not parts:
        raise ValueError(
            f"lora: targets must name a layer of the model that can have adapters, got {', '.join(targets)}"
        )
    return parts


def _peft_config(model: Transformer, config: LoraConfig, base: str | None) -> dict[str, Any]:
    names = {part.name.split(".")[-1] for layer in lora_layers(model) for part in layer.parts}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.is_rank_stabilised,
        "target_modules": sorted(names),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def save_adapter(model: Transformer, directory: str | Path, *, base: str | None = None) -> None:
    """Write the adapters of `model`, whole or not at all; what `directory` held is replaced.

    `base` says what model they belong to, for whoever loads them. ValueError if there are no adapters, or if
    `directory` holds anything but an adapter.
    """
    directory = Path(directory).expanduser()
    layers = list(lora_layers(model))
    if not layers:
        raise ValueError("save_adapter: model must have adapters, got none")
    check_adapter_replaceable(directory)
    tensors = [(name, matrix.detach()) for name, matrix in _named(model)]
    config = _peft_config(model, layers[0].config, base)
    with new_directory(directory) as partial:
        write_file(partial / ADAPTER_WEIGHTS, tensors)
        text = json.dumps(config, indent=2, sort_keys=True)
        (partial / ADAPTER_CONFIG).write_text(text + "\n", encoding="utf-8")


def check_adapter_replaceable(directory: Path) -> None:
    """ValueError unless `save_adapter` may write to `directory`: for asking before a long run."""
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"save_adapter: directory must not be a file, got {directory}")
    names = {path.name for path in directory.iterdir()} if directory.is_dir() else set()
    strange = sorted(names - {ADAPTER_CONFIG, ADAPTER_WEIGHTS, "README.md"})
    if strange:
        raise ValueError(
            f"save_adapter: directory must hold an adapter and nothing else, got {directory} with "
            f"{strange[0]!r} in it"
        )


def load_adapter(model: Transformer, directory: str | Path) -> None:
    """Put the adapters in `directory` into `model`, in place, which must have none; they can be trained on.

    ValueError names the file and what in it is wrong, missing or beyond what is supported here.
    """
    directory = Path(directory).expanduser()
    if any(lora_layers(model)):
        raise ValueError("load_adapter: model must have no adapters, got one that has; merge or remove them")
    config = _read_config(directory / ADAPTER_CONFIG)
    stored = read_header(directory / ADAPTER_WEIGHTS)
    add_lora(model, _stored_parts(model, stored, config.rank), config, seed=0)
    parameters = dict(_named(model))
    with torch.no_grad():
        for name, values in read_tensors(stored):
            parameters[name].copy_(values)


def _named(model: Transformer) -> Iterator[tuple[str, nn.Parameter]]:
    """Every matrix of the adapters by its name in the file."""
    for layer in lora_layers(model):
        for part, down, up in zip(layer.parts, layer.downs, layer.ups, strict=True):
            yield f"base_model.model.{part.name}.lora_A.weight", down
            yield f"base_model.model.{part.name}.lora_B.weight", up


def _read_config(path: Path) -> LoraConfig:
    data = read_json(path)
    if data.get("peft_type") != "LORA":
        raise ValueError(f"load_adapter: {path}: peft_type must be 'LORA', got {data.get('peft_type')!r}")
    for name, plain in _PLAIN.items():
        if name in data and data[name] not in plain:
            raise ValueError(f"load_adapter: {path}: {name} must be {plain[0]!r}, got {data[name]!r}")
    start = data.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise ValueError(
            f"load_adapter: {path}: init_lora_weights must be one of {', '.join(map(str, _PLAIN_STARTS))}, "
            f"got {start!r}: such an adapter belongs to changed weights of its base"
        )
    try:
        return LoraConfig(
            rank=int(data["r"]),
            alpha=float(data["lora_alpha"]),
            dropout=float(data.get("lora_dropout", 0.0)),
            is_rank_stabilised=bool(data.get("use_rslora", False)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"load_adapter: {path} must have r and lora_alpha, got {error!r}") from error


def _stored_parts(model: Transformer, stored: Mapping[str, StoredTensor], rank: int) -> list[LoraPart]:
    """Where the stored adapters sit; every tensor is of a layer of the model, in its pair and shape."""
    known = {part.name: part for part in lora_parts(model.config, LORA_TARGETS)}
    found: dict[str, LoraPart] = {}
    for name, tensor in stored.items():
        match = _TENSOR.fullmatch(name)
        part = known.get(match["layer"]) if match else None
        if match is None or part is None:
            raise ValueError(
                f"load_adapter: {tensor.file} must hold lora_A and lora_B of linear layers of the model, got "
                f"{name!r}"
            )
        num_rows, num_in = model.get_parameter(f"{part.module}.weight").shape
        num_rows //= 1 if part.half_idx is None else 2
        wanted = (rank, num_in) if match["matrix"] == "A" else (num_rows, rank)
        if tensor.shape != wanted or tensor.dtype not in DTYPES:
            raise ValueError(
                f"load_adapter: {tensor.file}: tensor {name!r} must be {wanted} of {', '.join(DTYPES)}, got "
                f"{tensor.shape} of {tensor.dtype}"
            )
        other = name.replace(".lora_A.", ".lora_B.") if match["matrix"] == "A" else name
        if other not in stored or other.replace(".lora_B.", ".lora_A.") not in stored:
            raise ValueError(f"load_adapter: {tensor.file} must hold {name!r} in a pair, got it alone")
        found[part.name] = part
    return list(found.values())
