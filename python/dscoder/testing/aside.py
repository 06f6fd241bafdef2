"""Checks in a process of their own, so that one that hangs is ended and takes nothing else with it."""

import functools
import inspect
import multiprocessing
import runpy
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

START_S = 120.0  # for a process to start and import torch

Check = Callable[..., None]


class Aside:
    """A process that runs one check after the other; one that hangs or dies is replaced.

    A check is a function at the top of a file, which the process reads for itself; its arguments are
    pickled. `prepare`, such a function too, goes ahead of the first check of a process, and tells by raising
    that a check that failed has left the process unfit for the next.
    """

    def __init__(self, prepare: Check, *, limit_s: float) -> None:
        self._prepare = prepare
        self._limit_s = limit_s
        self.num_hung = 0  # checks that did not end within the limit
        self._process: BaseProcess | None = None
        self._pipe: Connection[Any, Any] | None = None

    def run(self, check: Check, *args: Any) -> None:
        """AssertionError with the traceback of a check that raised.

        TimeoutError for one that did not end within the limit, ChildProcessError for one that took the
        process down.
        """
        if self._process is None:
            self._start()
        error = self._ask(check, args, self._limit_s)
        if error:
            self._keep_if_fit()
            raise AssertionError(error)

    def close(self) -> None:
        """End the process, whatever it is at."""
        if self._process is not None and self._pipe is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
        self._process = self._pipe = None

    def _start(self) -> None:
        spawn = multiprocessing.get_context("spawn")  # CUDA does not live through a fork
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        error = self._ask(self._prepare, (), START_S)
        if error:
            self.close()
            raise AssertionError(error)

    def _keep_if_fit(self) -> None:
        try:
            is_fit = not self._ask(self._prepare, (), self._limit_s)
        except (ChildProcessError, TimeoutError):
            return
        if not is_fit:
            self.close()

    def _ask(self, check: Check, args: tuple[Any, ...], limit_s: float) -> str:
        assert self._process is not None
        assert self._pipe is not None
        try:
            self._pipe.send((inspect.getfile(check), check.__name__, args))
            if self._pipe.poll(limit_s):
                error: str = self._pipe.recv()
                return error
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode
            self.close()
            raise ChildProcessError(f"{check.__name__}: its process ended with {code}") from None
        self.close()
        self.num_hung += 1
        raise TimeoutError(f"{check.__name__}: did not end within {limit_s:g} s")


_read = functools.cache(runpy.run_path)


def _serve(pipe: "Connection[Any, Any]") -> None:
    while True:
        try:
            file, name, args = pipe.recv()
        except EOFError:
            return
        try:
            _read(file)[name](*args)
        except Exception as error:  # all that a check may raise is told to the one who asked
            said = "".join(traceback.format_exception_only(error)).strip()
            pipe.send(f"{said}\n\n{traceback.format_exc()}")
        else:
            pipe.send("")
