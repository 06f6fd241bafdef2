"""Stage directories: what one verb leaves on disk for the next.

A stage directory says what made it. `started.json` (command, config, hashes of the inputs) is written first
and `manifest.json` (the same, with counts and a hash of what was made) last, so that a directory without a
manifest is half-written. While a directory is emptied, `started.json` holds a mark in place of a record:
whoever opens it then empties it again.
Opening a finished stage again does nothing, opening a killed one resumes or restarts it, and opening a
directory made by another config is an error.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dscoder
from dscoder.runtime.log import get_logger

MANIFEST = "manifest.json"
STARTED = "started.json"
LOCK = "lock"
FORMAT = 2  # of the two files
_TEMPORARY = ".tmp"  # ends the name of a file that is being written
_UNFINISHED = (STARTED + _TEMPORARY, MANIFEST + _TEMPORARY)
_OWN = (LOCK, STARTED, MANIFEST, *_UNFINISHED)
_CLEARING = {"format": FORMAT, "clearing": True}  # started.json of a directory that is being emptied
_RECORD_KEYS = {"format", "command", "config", "inputs", "code"}

_LOG = get_logger(__name__)


def fsync_directory(directory: Path) -> None:
    """Make renames inside `directory` survive a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file or, if the process dies, none of it."""
    temporary = path.with_name(path.name + _TEMPORARY)
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    fsync_directory(path.parent)


def write_json(path: Path, value: object) -> None:
    """Write `value` as JSON, whole or not at all."""
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; ValueError naming the file if there is none."""
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:  # not UTF-8, or not JSON
        raise ValueError(f"{path} must hold a JSON object, got {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(value).__name__}")
    return value


def hash_files(paths: Sequence[tuple[str, Path]]) -> str:
    """sha256 over (name, content) of each file, in the order given; the files are read in parallel."""

    def digest(path: Path) -> bytes:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()

    total = hashlib.sha256()
    with ThreadPoolExecutor(max_workers=8) as pool:
        for (name, _), content in zip(paths, pool.map(digest, (path for _, path in paths)), strict=True):
            total.update(len(name.encode()).to_bytes(8, "little") + name.encode() + content)
    return total.hexdigest()


def _files_below(directory: Path) -> Iterator[Path]:
    own = {directory / name for name in _OWN}
    return (file for file in directory.rglob("*") if file.is_file() and file not in own)


def _hash_below(directory: Path, files: Iterable[Path]) -> str:
    return hash_files([(file.relative_to(directory).as_posix(), file) for file in sorted(files)])


def hash_path(path: Path) -> str:
    """sha256 of a file, of what a stage made (as its manifest has it) or of every file below a directory.

    Where a stage directory lies, when it was written and by which version do not matter.
    """
    if (path / MANIFEST).is_file():
        return str(_read_manifest(path / MANIFEST)["result"])
    if path.is_dir():
        return _hash_below(path, _files_below(path))
    if not path.is_file():
        raise ValueError(f"hash_path: path must be a file or a directory, got {str(path)!r}")
    return hash_files([("", path)])


def _read_record(path: Path) -> dict[str, Any]:
    """The record in `path`, of whatever format; ValueError if dscoder did not write it."""
    record = read_json(path)
    missing = sorted(_RECORD_KEYS - set(record))
    if missing:
        raise ValueError(f"{path} must be a record of dscoder, got one without {', '.join(missing)}")
    return record


def _read_manifest(path: Path) -> dict[str, Any]:
    record = _read_record(path)
    if record["format"] != FORMAT:
        raise ValueError(
            f"{path} must have format {FORMAT}, got {record['format']}: another version of dscoder wrote it; "
            "run its stage again with --overwrite true"
        )
    missing = sorted({"counts", "dropped", "facts", "result"} - set(record))
    if missing:
        raise ValueError(f"{path} must be a manifest of dscoder, got one without {', '.join(missing)}")
    return record


def code_version() -> dict[str, str]:
    """The version of the package and a hash of its Python sources."""
    root = Path(dscoder.__file__).parent
    files = [(file.relative_to(root).as_posix(), file) for file in sorted(root.rglob("*.py"))]
    return {"version": dscoder.__version__, "sources": hash_files(files)}


def read_manifest(directory: Path, *, command: str) -> dict[str, Any]:
    """The manifest of a finished stage that `command` wrote."""
    path = directory / MANIFEST
    if not path.is_file():
        raise ValueError(f"{directory} holds no {MANIFEST}: `dscoder {command}` has not finished there")
    manifest = _read_manifest(path)
    if manifest["command"] != command:
        raise ValueError(
            f"{directory} must come from `dscoder {command}`, got `dscoder {manifest['command']}`"
        )
    return manifest


def differences(there: object, here: object, *, prefix: str = "") -> list[str]:
    """What differs between two JSON values, one line a key."""
    if isinstance(there, dict) and isinstance(here, dict):
        lines = []
        for key in sorted({*there, *here}):
            name = f"{prefix}.{key}" if prefix else key
            lines += differences(there.get(key), here.get(key), prefix=name)
        return lines
    return [] if there == here else [f"{prefix}: {there} there, {here} here"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A stage directory that this process holds."""

    directory: Path
    record: Mapping[str, Any]  # command, config, inputs, code
    is_finished: bool  # an earlier process finished it: there is nothing to do
    is_resumed: bool  # an earlier process began it and left files behind

    def finish(
        self,
        *,
        counts: Mapping[str, int | float],
        dropped: Mapping[str, int] | None = None,
        facts: Mapping[str, object] | None = None,
        results: Sequence[str] | None = None,
    ) -> None:
        """Write the manifest, the last act of a stage.

        Args:
            results: the folders and files of the directory whose content is the stage's result; None: all.
        """
        parts = [self.directory] if results is None else [self.directory / name for name in results]
        files = [file for part in parts for file in (_files_below(part) if part.is_dir() else (part,))]
        manifest = {
            **self.record,
            "counts": dict(counts),
            "dropped": dict(sorted((dropped or {}).items())),
            "facts": dict(facts or {}),
            "result": _hash_below(self.directory, files),
        }
        write_json(self.directory / MANIFEST, manifest)
        (self.directory / STARTED).unlink(missing_ok=True)


def _clear(directory: Path) -> None:
    """Delete all but the lock and a mark that says so: what is half-deleted must look like nothing else."""
    entries = {entry.name: entry for entry in directory.iterdir()}
    if set(entries) <= {LOCK, STARTED, *_UNFINISHED}:
        return  # nothing that a stage made
    write_json(directory / STARTED, _CLEARING)
    for name, entry in entries.items():
        if name in (LOCK, STARTED):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)  # started.json.tmp became started.json


def _earlier_record(directory: Path) -> tuple[dict[str, Any] | None, bool]:
    """What began the stage in `directory` (None: nothing that counts), and whether it was finished."""
    if (directory / STARTED).is_file() and read_json(directory / STARTED) == _CLEARING:
        return None, False
    for name in (MANIFEST, STARTED):
        if (directory / name).is_file():
            return _read_record(directory / name), name == MANIFEST
    strangers = sorted(entry.name for entry in directory.iterdir() if entry.name not in _OWN)
    if strangers:
        raise ValueError(
            f"{directory} must be empty or a directory written by dscoder, got {', '.join(strangers[:5])}"
        )
    return None, False


def _compared(record: Mapping[str, Any], free: Collection[str]) -> dict[str, Any]:
    """The part of a record that decides the result."""
    config = {key: value for key, value in record["config"].items() if key not in free}
    return {key: record[key] for key in ("format", "command", "inputs")} | {"config": config}


def _begin(
    directory: Path, record: dict[str, Any], *, free: Collection[str], overwrite: bool, is_resumable: bool
) -> Stage:
    earlier, is_finished = _earlier_record(directory)
    for name in _UNFINISHED:
        (directory / name).unlink(missing_ok=True)
    # A stage that failed before it wrote anything binds nobody to its config.
    is_bare = {entry.name for entry in directory.iterdir()} <= {LOCK, STARTED}
    if earlier is not None and not is_bare:
        lines = differences(_compared(earlier, free), _compared(record, free))
        if lines and not overwrite:
            raise ValueError(
                f"{directory} was made by another config; take another directory, or pass --overwrite true "
                "to delete what it holds:\n  " + "\n  ".join(lines)
            )
        if not lines and earlier["code"] != record["code"]:
            _LOG.warning("%s was begun by other code (version %s)", directory, earlier["code"]["version"])
        if not lines and is_finished:
            return Stage(directory=directory, record=record, is_finished=True, is_resumed=False)
        if not lines and is_resumable:
            # What may differ is taken from this call.
            write_json(directory / STARTED, record)
            return Stage(directory=directory, record=record, is_finished=False, is_resumed=True)
    _clear(directory)
    write_json(directory / STARTED, record)
    return Stage(directory=directory, record=record, is_finished=False, is_resumed=False)


@contextmanager
def open_stage(
    directory: Path,
    *,
    command: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, str],
    free: Collection[str] = (),
    overwrite: bool = False,
    is_resumable: bool = False,
) -> Iterator[Stage]:
    """Begin, resume or find finished the stage in `directory`, and hold it while the block runs.

    Args:
        config: what decides the result, as plain data.
        inputs: hash of each input, by role.
        free: keys of `config` that may differ from one start to the next (places, how often to log).
        overwrite: delete what another config left in `directory`; what the same config left is gone on with,
            or finished, all the same. Nothing but a stage is ever deleted.
        is_resumable: leave the block what a killed process left; else it starts from an empty directory.
    """
    directory.mkdir(parents=True, exist_ok=True)
    record = {
        "format": FORMAT,
        "command": command,
        "config": json.loads(json.dumps(config)),
        "inputs": dict(inputs),
        "code": code_version(),
    }
    # The lock dies with the process, so a killed run never blocks its successor.
    with (directory / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"another process is writing {directory}") from None
        yield _begin(directory, record, free=free, overwrite=overwrite, is_resumable=is_resumable)
