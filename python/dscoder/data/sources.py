"""Documents from directories of source files, from JSONL files and from Python's standard library.

A source is a directory (its files with the wanted extensions, in sorted order), a `.jsonl` or `.jsonl.gz`
file with the text in one field, or the word `stdlib`: the standard library of the running Python, without
site-packages and without its tests (more text than the library, and much of it broken or strange on
purpose). A document keeps its exact characters, so its bytes are its UTF-8 form.
"""

import gzip
import hashlib
import json
import os
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import chain
from pathlib import Path

from dscoder.config.data import SourcesConfig
from dscoder.runtime.artifact import hash_files

STDLIB = "stdlib"
_JSONL_SUFFIXES = (".jsonl", ".jsonl.gz")
# Folders whose files are not the project's own.
_FOREIGN_FOLDERS = frozenset(
    {"__pycache__", "site-packages", "dist-packages", "node_modules", ".git", ".venv"}
)
_STDLIB_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One text; `name` says where it came from and decides nothing."""

    name: str
    text: str

    @property
    def key(self) -> int:
        """64 bits of the content: the same text has the same key wherever it lies."""
        return int.from_bytes(hashlib.blake2b(self.text.encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True, kw_only=True, slots=True)
class Reason:
    """Why a document was dropped."""

    name: str  # what is counted
    document: str
    detail: str = ""


def is_held_out(document: Document, *, share: float) -> bool:
    """Whether the document belongs to the held-out set; the same content always answers the same."""
    return document.key < share * 2**64


def _walk(root: Path, *, extensions: tuple[str, ...], skipped: frozenset[str]) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in skipped)
        for name in sorted(names):
            path = Path(folder) / name
            if name.endswith(extensions) and path.is_file() and not path.is_symlink():
                yield path


def _source_files(source: str, config: SourcesConfig) -> list[tuple[str, Path]]:
    """(name, path) of the files of one source, in reading order."""
    path = Path(sysconfig.get_paths()["stdlib"] if source == STDLIB else source)
    if path.is_file() and path.name.endswith(_JSONL_SUFFIXES):
        return [(path.name, path)]
    if not path.is_dir():
        raise ValueError(
            f"sources: each path must be {STDLIB!r}, a directory or a file ending in "
            f"{' or '.join(_JSONL_SUFFIXES)}, got {source!r}"
        )
    skipped = _FOREIGN_FOLDERS | (_STDLIB_TEST_FOLDERS if source == STDLIB else frozenset())
    found = _walk(path, extensions=config.extensions, skipped=skipped)
    named = [(file.relative_to(path).as_posix(), file) for file in found]
    files = [
        (name, file)
        for name, file in named
        if not any(fnmatchcase(name, pattern) for pattern in config.excluded)
    ]
    if not files:
        raise ValueError(f"sources: {source!r} holds no file ending in {', '.join(config.extensions)}")
    return files


def hash_sources(config: SourcesConfig) -> str:
    """sha256 over the names and contents of all source files."""
    return hash_files([file for source in config.paths for file in _source_files(source, config)])


def _decode(name: str, content: bytes, *, max_bytes: int) -> Document | Reason:
    if len(content) > max_bytes:
        return Reason(name="too_large", document=name, detail=f"{len(content)} bytes, at most {max_bytes}")
    if not content.strip():
        return Reason(name="empty", document=name)
    if b"\0" in content:
        return Reason(name="binary", document=name)
    try:
        return Document(name=name, text=content.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Reason(name="undecodable", document=name, detail=f"byte {error.start} is not UTF-8")


def _decode_line(name: str, line: bytes, config: SourcesConfig) -> Document | Reason:
    try:
        record = json.loads(line)
        text = record[config.text_field]
        content = text.encode()
    except ValueError as error:  # not JSON, not UTF-8, or a lone surrogate in the text
        return Reason(name="bad_json", document=name, detail=str(error))
    except (KeyError, TypeError, AttributeError):
        return Reason(name="no_text", document=name, detail=f"no text in field {config.text_field!r}")
    return _decode(name, content, max_bytes=config.max_bytes)


def _read_file(name: str, path: Path, config: SourcesConfig) -> Iterator[Document | Reason]:
    if not path.name.endswith(_JSONL_SUFFIXES):
        yield _decode(name, path.read_bytes(), max_bytes=config.max_bytes)
        return
    with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _decode_line(f"{name}:{number}", line, config)


def read_documents(config: SourcesConfig, *, dropped: Counter[str]) -> Iterator[Document]:
    """All documents of all sources in a fixed order; `dropped` counts the others by reason."""
    files = [file for source in config.paths for file in _source_files(source, config)]
    for found in chain.from_iterable(_read_file(name, path, config) for name, path in files):
        if isinstance(found, Reason):
            dropped[found.name] += 1
        else:
            yield found
