"""The directory that a model is written to: what may be replaced there, what stands beside the weights."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dscoder.checkpoint.source import CONFIG
from dscoder.checkpoint.store import INDEX, read_json

MAX_SHARD_BYTES = 5 * 1000**3  # what the published checkpoints have
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What `save_pretrained` writes besides weights, once it was found that it may."""

    directory: Path
    tokenizer_files: Sequence[Path]
    pads_with_bos: bool  # beside a scalar head

    def write_companions(self, partial: Path, config: dict[str, Any]) -> None:
        """Put config.json and the tokenizer's files into `partial`."""
        for path in self.tokenizer_files:
            shutil.copyfile(path, partial / path.name)
        if self.pads_with_bos:
            _pad_with_bos([partial / path.name for path in self.tokenizer_files])
        text = json.dumps(config, indent=2, sort_keys=True)
        (partial / CONFIG).write_text(text + "\n", encoding="utf-8")


def open_target(
    directory: str | Path,
    *,
    max_shard_bytes: int,
    tokenizer: str | Path | None,
    overwrite: bool,
    pads_with_bos: bool = False,
) -> Target:
    """The target `directory`; ValueError, before anything is written, for what `save_pretrained` refuses."""
    directory = Path(directory).expanduser()
    if max_shard_bytes < 1:
        raise ValueError(f"save_pretrained: max_shard_bytes must be >= 1, got {max_shard_bytes}")
    check_replaceable(directory, overwrite=overwrite)
    files = [] if tokenizer is None else _tokenizer_files(Path(tokenizer).expanduser())
    return Target(directory=directory, tokenizer_files=files, pads_with_bos=pads_with_bos)


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
