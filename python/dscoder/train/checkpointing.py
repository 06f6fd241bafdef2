"""Checkpoints of a run: written beside the training, whole or not at all, newest first.

The state is copied at once and written by a thread through torch's distributed checkpoint (DCP), whose files
can be read under another layout: each rank writes what it holds of the tensors into files of its own. A
checkpoint is written as `step-N.tmp`, synced to disk and renamed to `step-N` once all ranks are done: the
final name is the mark of a complete one, and no other is ever read.

The thread has a group of its own to agree with those of the other ranks, since its exchanges may come at any
time between those of the training.
"""

import errno
import os
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from dscoder.runtime.agreement import Agreement, RankError, error_number_of
from dscoder.runtime.artifact import fsync_directory, write_json
from dscoder.runtime.heartbeat import is_communication_error
from dscoder.runtime.log import get_logger
from dscoder.train.checkpoint_files import (
    PROGRESS,
    Progress,
    completed,
    damaged,
    describe_files,
    is_complete,
    read_progress,
    sealed_record,
    verify,
)
from dscoder.train.ranks import Ranks

__all__ = ["CheckpointWriter", "Progress", "completed", "load_state", "read_progress"]

_FULL_DISK = "unexpected pos"  # torch's writer reports a full disk as a wrong position in its file
_PATIENCE = 10.0  # seconds for a save under way when a rank is lost
_LOG = get_logger(__name__)


@contextmanager
def _plain_errors(ranks: Agreement) -> Iterator[None]:
    """What failed inside DCP comes out as itself on its rank and as RankError on all others."""
    # Said of one process, where it is meant so.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    try:
        yield
    except CheckpointException as wrapped:  # a BaseException, with one failure a rank
        rank, (error, _) = min(wrapped.failures.items())
        if ranks.rank in wrapped.failures:
            raise wrapped.failures[ranks.rank][0] from None
        what = f"{type(error).__name__}: {error}"
        raise RankError(rank, what, _error_number(error)) from None


def load_state(
    path: Path, state: dict[str, Tensor], ranks: Agreement | None = None, *, optional: str | None = None
) -> None:
    """Fill the tensors of `state` in place from the checkpoint at `path`.

    Each rank fills what it holds, whatever the ranks were that wrote it. Tensors whose names begin with
    `optional` stay as they are where the checkpoint has none.

    RuntimeError, on all ranks, if the checkpoint is damaged or lacks a tensor.
    """
    ranks = ranks or Agreement(None)
    verify(path, ranks)
    try:
        reader = FileSystemReader(path)
        there = reader.read_metadata().state_dict_metadata
        is_wanted = {name: name in there or not (optional and name.startswith(optional)) for name in state}
        with _plain_errors(ranks):
            load(
                {name: tensor for name, tensor in state.items() if is_wanted[name]},
                storage_reader=reader,
                process_group=ranks.group,
                no_dist=ranks.group is None,
            )
    except Exception as error:  # DCP raises AssertionError, KeyError, RuntimeError ... for one cause
        if is_communication_error(error):
            raise
        raise damaged(path, repr(error)) from error


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _remove(path: Path) -> None:
    # Renamed first: a checkpoint half-deleted must not look complete.
    doomed = path.with_name(path.name + ".tmp") if is_complete(path) else path
    if doomed != path:
        _delete(doomed)
        path.rename(doomed)
    _delete(doomed)


def _renew(path: Path) -> None:
    _delete(path)
    path.mkdir()


def _write(
    directory: Path, progress: Progress, state: dict[str, Tensor], keep: int, ranks: Agreement
) -> None:
    """Write one checkpoint, all ranks together; an error of one is raised on all."""
    final = directory / f"step-{progress.step:09d}"
    temporary = final.with_name(final.name + ".tmp")
    ranks.first(lambda: _renew(temporary))
    try:
        with _plain_errors(ranks):
            save(
                state,
                # Nothing copied ahead: that would wait for the current stream of a GPU, the training's.
                storage_writer=FileSystemWriter(temporary, sync_files=True, per_thread_copy_ahead=0),
                process_group=ranks.group,
                no_dist=ranks.group is None,
            )
        shares = ranks.gather(ranks.each(lambda: describe_files(temporary, ranks.rank)))
        files = {name: described for share in shares for name, described in share.items()}
        ranks.first(lambda: _seal(temporary, final, sealed_record(progress, files), keep))
    except BaseException:
        if ranks.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _seal(temporary: Path, final: Path, record: dict[str, Any], keep: int) -> None:
    """Make what all ranks have written a checkpoint, and delete those beyond the newest `keep`."""
    write_json(temporary / PROGRESS, record)
    fsync_directory(temporary)
    temporary.rename(final)
    fsync_directory(final.parent)
    for _, path in completed(final.parent)[:-keep]:
        try:
            _remove(path)
        except OSError as error:  # the new one is in place; a later save or start tries again
            _LOG.warning("the old checkpoint %s could not be deleted: %s", path.name, error)


def _error_number(error: BaseException) -> int:
    """The errno behind a failed write."""
    seen: BaseException | None = error
    while seen is not None:
        if _FULL_DISK in str(seen):
            return errno.ENOSPC
        seen = seen.__cause__ or seen.__context__
    return error_number_of(error) or errno.EIO


def _local(tensor: Tensor) -> Tensor:
    """This rank's memory of a tensor that may be part of a whole."""
    local: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local


def _host_memory(tensor: Tensor) -> Tensor:
    """Where copies of `tensor` go; a GPU writes there by itself."""
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.device.type == "cuda")


def _gpu_of(state: dict[str, Tensor]) -> torch.device | None:
    """The GPU that holds the state."""
    return next((tensor.device for tensor in state.values() if tensor.device.type == "cuda"), None)


class CheckpointWriter:
    """Saves one checkpoint at a time in the background."""

    def __init__(self, directory: Path, *, keep: int, ranks: Ranks | None = None) -> None:
        """Write below `directory`, keeping the newest `keep`; what a killed process left half-done goes."""
        self.directory = directory
        self._keep = keep
        self._ranks = ranks or Ranks()
        self._pending: Future[None] | None = None
        self._staged: dict[str, Tensor] = {}
        self._ranks.first(self._clean)
        self._ranks.each(self._check_shared)

    def _clean(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        for leftover in self.directory.glob("*.tmp"):
            _delete(leftover)

    def _check_shared(self) -> None:
        if not self.directory.is_dir():
            raise OSError(errno.ENOENT, "must be on a file system that all ranks share", str(self.directory))

    def save(self, progress: Progress, state: dict[str, Tensor]) -> None:
        """Copy `state` to the host and return; waits only while an earlier save still runs."""
        self.wait()
        for name, tensor in state.items():
            # Kept from save to save: a fresh gigabyte of pages, pinned or not, costs more than the copy.
            if name not in self._staged:
                self._staged[name] = _host_memory(tensor)
            _local(self._staged[name]).copy_(_local(tensor), non_blocking=True)
        gpu = _gpu_of(state)
        if gpu is not None:
            torch.cuda.synchronize(gpu)  # once for all copies
        self._pending = Future()
        # A daemon: at the end of a run that lost a rank nobody can wait for it.
        threading.Thread(
            target=_fulfil,
            args=(self._pending, partial(self._write, progress, gpu)),
            name="checkpoint",
            daemon=True,
        ).start()

    def _write(self, progress: Progress, gpu: torch.device | None) -> None:
        if gpu is not None:
            torch.cuda.set_device(gpu)  # a thread begins with GPU 0, which may be another rank's
        _write(self.directory, progress, self._staged, self._keep, self._ranks.background)

    def has_failed(self) -> bool:
        """Whether the save under way failed, as far as this rank knows; waits for nothing."""
        pending = self._pending
        return pending is not None and pending.done() and pending.exception() is not None

    def raise_if_failed(self) -> None:
        """OSError if the save under way failed; waits for nothing."""
        if self.has_failed():
            self.wait()

    def wait(self) -> None:
        """Wait for the save under way; OSError, on all ranks, if one of them could not write."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except Exception as error:
            if is_communication_error(error):
                raise
            raise self._explain(error) from error

    def close(self) -> None:
        """`wait`; for a run that ends well, or alone."""
        self.wait()

    def abandon(self, error: BaseException) -> None:
        """Let the save under way come to its end, or not if `error` says that a rank is lost for it."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        is_lost = is_communication_error(error) or not isinstance(error, Exception)
        try:
            pending.result(_PATIENCE if is_lost else None)
        except Exception as failure:
            _LOG.warning("the checkpoint under way was not written: %s", failure or "it takes too long")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or self._ranks.mesh is None:
            self.close()
        else:
            self.abandon(error)

    def _explain(self, error: Exception) -> OSError:
        number = _error_number(error)
        kept = completed(self.directory)
        latest = f"the latest whole one is {kept[-1][1].name}" if kept else "there is none yet"
        is_own = self._ranks.mesh is not None and not isinstance(error, RankError)
        who = f"rank {self._ranks.rank} failed: " if is_own else ""
        return OSError(
            number,
            f"the checkpoint could not be written ({os.strerror(number)}: {who}{error}); {latest}; "
            "the same command goes on from there",
            str(self.directory),
        )


def _fulfil(pending: "Future[None]", do: Callable[[], None]) -> None:
    try:
        do()
    except BaseException as error:
        pending.set_exception(error)
    else:
        pending.set_result(None)
