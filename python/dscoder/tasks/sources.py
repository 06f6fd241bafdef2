"""Records of a benchmark from a file, a directory or a data set on the Hugging Face hub.

A file is JSONL, gzipped or not, JSON (an array, or lines) or parquet. On the hub it is named as there:
`hf://datasets/<owner>/<name>[@<revision>]/<path>`.
"""

import gzip
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from huggingface_hub import hf_hub_download

try:
    from pyarrow import parquet  # type: ignore[import-not-found, import-untyped, unused-ignore]
except ImportError:  # only parquet files need it
    parquet = None

Record = dict[str, Any]
_HUB = re.compile(r"hf://datasets/(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?/(?P<path>.+)")
_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")


def _download(source: str) -> Path:
    found = _HUB.fullmatch(source)
    if found is None:
        raise ValueError(
            f"read_records: a source on the hub must be hf://datasets/<owner>/<name>[@<revision>]/<path>, "
            f"got {source!r}"
        )
    try:
        path = hf_hub_download(found["repo"], found["path"], repo_type="dataset", revision=found["revision"])
    except (OSError, ValueError) as error:
        raise ValueError(f"read_records: {source!r} must be had from the hub, got: {error}") from error
    return Path(path)


def _find(source: str | Path, names: Sequence[str]) -> Path:
    """The file that a source means; in a directory, the first of `names` that is there."""
    if str(source).startswith("hf://"):
        return _download(str(source))
    path = Path(source)
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"read_records: a source must be a file or a directory, got {str(source)!r}")
    found = [path / name for name in names if (path / name).is_file()]
    if not found:
        raise ValueError(f"read_records: {str(source)!r} must hold {' or '.join(names)}, got neither")
    return found[0]


def _parse(path: Path) -> list[Any]:
    if path.name.endswith(".parquet"):
        if parquet is None:
            raise ValueError(f"read_records: {path} needs pyarrow, which is not installed")
        return cast(list[Any], parquet.read_table(path).to_pylist())
    content = gzip.decompress(path.read_bytes()) if path.name.endswith(".gz") else path.read_bytes()
    text = content.decode("utf-8")
    if text.lstrip().startswith("["):
        return cast(list[Any], json.loads(text))
    # Not str.splitlines, which also breaks at characters that JSON allows inside a string.
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def _read_file(path: Path) -> list[Record]:
    if not path.name.endswith(_SUFFIXES):
        raise ValueError(f"read_records: a file must end in {', '.join(_SUFFIXES)}, got {path.name!r}")
    try:
        records = _parse(path)
    except (OSError, ValueError) as error:  # gzip.BadGzipFile, JSONDecodeError, UnicodeDecodeError
        raise ValueError(f"read_records: {path} must hold records, got: {error}") from error
    wrong = next((idx for idx, record in enumerate(records) if not isinstance(record, dict)), None)
    if wrong is not None:
        raise ValueError(f"read_records: {path} must hold objects, got another thing at record {wrong}")
    return records


def read_records(
    sources: str | Path | Sequence[str | Path], *, names: Sequence[str], wanted: Sequence[str]
) -> list[Record]:
    """All records of one or several sources, in their order.

    Args:
        names: how the file may be called where a source is a directory.
        wanted: fields that every record must have.
    """
    if isinstance(sources, str | Path):
        sources = [sources]
    records = [record for source in sources for record in _read_file(_find(source, names))]
    for idx, record in enumerate(records):
        missing = [name for name in wanted if name not in record]
        if missing:
            raise ValueError(
                f"read_records: records of {names[0]} must have {', '.join(wanted)}, "
                f"got record {idx} without {', '.join(missing)}"
            )
    return records
