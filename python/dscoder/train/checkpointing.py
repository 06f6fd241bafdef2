"""Checkpoints of a run: written beside the training, whole or not at all, newest first.

The state is copied at once and written by a thread through torch's distributed checkpoint (DCP), whose files
can be read under another layout. A checkpoint is written as `step-N.tmp`, synced to disk and renamed to
`step-N`: the final name is the mark of a complete one, and no other is ever read.

`progress.json` says how far the run is, and size and sha256 of every other file: torch's reader does not look
at the sums in its own files, so that a flipped bit would go on in the weights unseen.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from dscoder.runtime.artifact import fsync_directory, read_json, write_json

_PROGRESS = "progress.json"
_COMPLETE = re.compile(r"step-(\d{9})")
_FULL_DISK = "unexpected pos"  # torch's writer reports a full disk as a wrong position in its file


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a run is. The data position is one number, so it holds under any number of processes."""

    step: int  # optimizer steps done
    num_sequences: int  # windows consumed since the start of the run
    num_tokens: int  # tokens in them
    num_threads: int  # sums are split over so many; another number rounds differently
    waiting: Mapping[str, float] = field(default_factory=dict)  # of the next report: see RunReport.waiting


def completed(directory: Path) -> list[tuple[int, Path]]:
    """(step, path) of every complete checkpoint, oldest first."""
    if not directory.is_dir():
        return []
    found = [(_COMPLETE.fullmatch(entry.name), entry) for entry in directory.iterdir()]
    return sorted((int(match[1]), entry) for match, entry in found if match)


def _damaged(path: Path, reason: str) -> RuntimeError:
    return RuntimeError(
        f"the checkpoint {path} cannot be read ({reason}); without it the run goes on from the one before"
    )


def _sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """`record` with a sum over all of it."""
    text = json.dumps(record, sort_keys=True)
    return {**record, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def _read_record(path: Path) -> dict[str, Any]:
    """What progress.json of the checkpoint at `path` holds; RuntimeError if it is not what was written."""
    try:
        record = read_json(path / _PROGRESS)
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    if record != _sealed({key: value for key, value in record.items() if key != "sha256"}):
        raise _damaged(path, f"{_PROGRESS} does not add up to its sha256")
    return record


def read_progress(path: Path) -> Progress:
    """The progress that the checkpoint at `path` was saved at; RuntimeError if it is damaged."""
    return Progress(**_read_record(path)["progress"])


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _describe_files(path: Path) -> dict[str, dict[str, int | str]]:
    return {
        file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in sorted(path.iterdir())
    }


def _verify(path: Path) -> None:
    """RuntimeError unless every file of the checkpoint at `path` is as it was written."""
    for name, wanted in _read_record(path)["files"].items():
        file = path / name
        if not file.is_file():
            raise _damaged(path, f"{name} is not there")
        num_bytes = file.stat().st_size
        if num_bytes != wanted["bytes"]:
            raise _damaged(path, f"{name} must have {wanted['bytes']} bytes, got {num_bytes}")
        if _sha256(file) != wanted["sha256"]:
            raise _damaged(path, f"{name} does not add up to its sha256")


@contextmanager
def _single_process() -> Iterator[None]:
    """DCP without a process group: what failed comes out as itself, and the remark about groups stays out."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    try:
        yield
    except CheckpointException as wrapped:  # a BaseException, with one failure a process
        error, _ = wrapped.failures[0]
        raise error from None


def load_state(path: Path, state: dict[str, Tensor]) -> None:
    """Fill the tensors of `state` in place from the checkpoint at `path`; RuntimeError if it is damaged."""
    _verify(path)
    try:
        with _single_process():
            load(state, storage_reader=FileSystemReader(path), no_dist=True)
    except Exception as error:  # DCP raises AssertionError, KeyError, RuntimeError ... for one cause
        raise _damaged(path, repr(error)) from error


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _remove(path: Path) -> None:
    # Renamed first: a checkpoint half-deleted must not look complete.
    doomed = path.with_name(path.name + ".tmp") if _COMPLETE.fullmatch(path.name) else path
    if doomed != path:
        _delete(doomed)
        path.rename(doomed)
    _delete(doomed)


def _write(directory: Path, progress: Progress, state: dict[str, Tensor], keep: int) -> None:
    final = directory / f"step-{progress.step:09d}"
    temporary = final.with_name(final.name + ".tmp")
    _delete(temporary)
    temporary.mkdir()
    try:
        with _single_process():
            save(state, storage_writer=FileSystemWriter(temporary, sync_files=True), no_dist=True)
        record = {"progress": asdict(progress), "files": _describe_files(temporary)}
        write_json(temporary / _PROGRESS, _sealed(record))
        fsync_directory(temporary)
        temporary.rename(final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_directory(directory)
    for _, path in completed(directory)[:-keep]:
        _remove(path)


def _error_number(error: BaseException) -> int:
    """The errno behind a failed write."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno:
            return cause.errno
        if _FULL_DISK in str(cause):
            return errno.ENOSPC
        cause = cause.__cause__ or cause.__context__
    return errno.EIO


class CheckpointWriter:
    """Saves one checkpoint at a time in the background."""

    def __init__(self, directory: Path, *, keep: int) -> None:
        """Write below `directory`, keeping the newest `keep`; what a killed process left half-done goes."""
        directory.mkdir(parents=True, exist_ok=True)
        for leftover in directory.glob("*.tmp"):
            _delete(leftover)
        self.directory = directory
        self._keep = keep
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._staged: dict[str, Tensor] = {}

    def save(self, progress: Progress, state: dict[str, Tensor]) -> None:
        """Copy `state` to the host and return; waits only while an earlier save still runs."""
        self.wait()
        for name, tensor in state.items():
            # The copies are made once and reused: a fresh gigabyte of pages costs more than the copy.
            if name not in self._staged:
                self._staged[name] = torch.empty_like(tensor, device="cpu")
            self._staged[name].copy_(tensor)
        self._pending = self._pool.submit(_write, self.directory, progress, self._staged, self._keep)

    def raise_if_failed(self) -> None:
        """OSError if the save under way failed; waits for nothing."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the save under way; OSError if it could not be written."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except Exception as error:
            raise self._explain(error) from error

    def close(self) -> None:
        """`wait`, and end the thread."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()

    def _explain(self, error: Exception) -> OSError:
        number = _error_number(error)
        kept = completed(self.directory)
        latest = f"the latest whole one is {kept[-1][1].name}" if kept else "there is none yet"
        return OSError(
            number,
            f"the checkpoint could not be written ({os.strerror(number)}: {error}); {latest}; "
            "the same command goes on from there",
            str(self.directory),
        )
