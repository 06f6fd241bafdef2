"""Several ranks on this machine, for tests: processes that find torchrun's variables set.

The processes are forked from one server that has imported torch once, so that starting one costs little.
"""

import multiprocessing
import pickle
import queue
import socket
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dscoder.runtime.mesh import set_launch

_CONTEXT = multiprocessing.get_context("forkserver")
_POLL = 0.1  # seconds
_PRELOADED = ["dscoder.testing.ranks", "dscoder.train.pretrain"]  # 3 s of imports that each rank would repeat


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """How one rank ended."""

    status: int | None  # the process's exit status, negative for a signal; None: it had to be killed
    value: Any  # what the function returned
    error: str  # the traceback of what it raised; empty without

    @property
    def is_good(self) -> bool:
        """Whether the function returned."""
        return self.status == 0 and not self.error


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _rank_main(
    results: Any,
    place: tuple[int, int, int],
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    rank, num_ranks, port = place
    set_launch(rank=rank, world_size=num_ranks, host="127.0.0.1", port=port)
    torch.set_num_threads(1)
    try:
        # Bytes: a tensor would go as a file of this process, which may end before it is opened.
        results.put((rank, pickle.dumps(function(*arguments)), ""))
    except BaseException:
        results.put((rank, pickle.dumps(None), traceback.format_exc()))
        raise
    finally:
        results.close()
        results.join_thread()


def end_ranks(
    function: Callable[..., Any], *arguments: Any, num_ranks: int, limit: float = 120.0
) -> list[Ended]:
    """Run `function(*arguments)` in `num_ranks` processes; how each ended, by rank.

    The function must be importable by name and everything that goes in or out must pickle. Processes that
    are alive after `limit` seconds are killed.
    """
    _CONTEXT.set_forkserver_preload(_PRELOADED)
    results = _CONTEXT.Queue()
    port = free_port()
    processes = []
    for rank in range(num_ranks):
        process = _CONTEXT.Process(
            target=_rank_main,
            args=(results, (rank, num_ranks, port), function, arguments),
            name=f"rank {rank}",
        )
        process.start()
        processes.append(process)
    values: dict[int, Any] = {}
    errors: dict[int, str] = {}
    deadline = time.monotonic() + limit
    # Read while they run: a process with an unread result does not end.
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        _read(results, values, errors, wait=_POLL)
    late = [process for process in processes if process.is_alive()]
    for process in late:
        process.kill()
    for process in processes:
        process.join()
    _read(results, values, errors, wait=_POLL)
    return [
        Ended(
            status=None if process in late else process.exitcode,
            value=values.get(rank),
            error=errors.get(rank, ""),
        )
        for rank, process in enumerate(processes)
    ]


def _read(results: Any, values: dict[int, Any], errors: dict[int, str], *, wait: float) -> None:
    """Take what has come in; wait so long for the first."""
    try:
        while True:
            rank, value, error = results.get(timeout=wait)
            values[rank], errors[rank] = pickle.loads(value), error
    except queue.Empty:
        return


def run_ranks(
    function: Callable[..., Any], *arguments: Any, num_ranks: int, limit: float = 120.0
) -> list[Any]:
    """What `function(*arguments)` returns in each of `num_ranks` processes; see `end_ranks`.

    RuntimeError with the tracebacks where a rank did not return.
    """
    ended = end_ranks(function, *arguments, num_ranks=num_ranks, limit=limit)
    bad = [
        f"rank {rank} ended with status {end.status}\n{end.error}"
        for rank, end in enumerate(ended)
        if not end.is_good
    ]
    if bad:
        raise RuntimeError("\n".join(bad))
    return [end.value for end in ended]
