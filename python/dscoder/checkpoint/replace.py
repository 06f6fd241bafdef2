"""A directory that appears whole or not at all.

It is written beside its place under `.NAME.partial`, flushed to the disk, and renamed. A lock on the partial
directory keeps two writers apart; the kernel drops it when a writer is killed, and the next one clears what
was left.
"""

import ctypes
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """An empty directory that becomes `target`, in place of what is there, when the block ends well.

    On an exception it is removed and `target` is as it was. OSError if another process is writing to the
    same target.
    """
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    lock = _lock(partial)
    try:
        for leftover in partial.iterdir():
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        yield partial
        for path in partial.iterdir():
            _flush(path)
        _flush(partial)
        _put(partial, target)
        _flush(target.parent)
    finally:
        # After an exchange this is what stood in the target's place.
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)


def _lock(partial: Path) -> int:
    partial.mkdir(exist_ok=True)
    lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Another writer may have moved the directory into place between the two calls.
        if os.fstat(lock).st_ino != partial.stat().st_ino:
            raise BlockingIOError
    except OSError as error:
        os.close(lock)
        raise OSError(f"checkpoint: {partial} is being written by another process") from error
    return lock


def _flush(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _put(partial: Path, target: Path) -> None:
    if not target.exists():
        partial.rename(target)
    elif not _exchange(partial, target):
        # Some network file systems cannot exchange: for a moment `target` is absent, `retired` whole.
        retired = target.with_name(f".{target.name}.retired")
        shutil.rmtree(retired, ignore_errors=True)
        target.rename(retired)
        partial.rename(target)
        shutil.rmtree(retired)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two directories in one step; False where the file system cannot."""
    paths = os.fsencode(one), os.fsencode(other)
    return bool(_libc.renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0)
