"""What a process does to itself where bubblewrap does not do it: prctl through libc.

Runs inside the sandbox, before supervisor.py and in its interpreter; only where it is needed, since ctypes
takes a third of the time that a bare interpreter takes to start.
"""

import ctypes
import functools
import os
from typing import Any

_SET_DUMPABLE = 4
_SET_SECCOMP = 22
_SET_CHILD_SUBREAPER = 36
_SET_NO_NEW_PRIVS = 38
_MODE_FILTER = 2
_BYTES_PER_INSTRUCTION = 8

_LIBC = ctypes.CDLL(None, use_errno=True)


class _FilterProgram(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def _prctl(option: int, first: int, second: object = 0) -> None:
    if _LIBC.prctl(option, ctypes.c_ulong(first), second, ctypes.c_ulong(0), ctypes.c_ulong(0)):
        raise OSError(ctypes.get_errno(), f"prctl {option}: {os.strerror(ctypes.get_errno())}")


def _install_filter(instructions: bytes) -> None:
    """Put this process and all that it starts under a seccomp filter, for good."""
    program = _FilterProgram(len(instructions) // _BYTES_PER_INSTRUCTION, instructions)
    _prctl(_SET_NO_NEW_PRIVS, 1)
    _prctl(_SET_SECCOMP, _MODE_FILTER, ctypes.byref(program))


def guard(job: dict[str, Any]) -> None:
    """Close /proc/self/{mem,fd,environ,...} to other processes of the same user; adopt orphans as pid 1 does.

    The filter, if the job brings one, goes on just before exec.
    """
    _prctl(_SET_DUMPABLE, 0)
    _prctl(_SET_CHILD_SUBREAPER, 1)
    if job["filter"]:
        job["before_exec"] = functools.partial(_install_filter, job["filter"])
