"""Sandboxes on the machines of a Ray cluster, for when one machine is not enough (`dscoder[ray]`).

Each node runs one actor with a Pool of its own; programs go to the nodes as they have room. Nobody else
imports this module, so nothing else needs Ray.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Self

import ray  # type: ignore[import-not-found]

from dscoder.sandbox.pool import Pool
from dscoder.sandbox.run import DEFAULT_LIMITS
from dscoder.sandbox.verdict import Isolation, Limits, Program, Verdict

_WAITING_PER_WORKER = 2  # programs at a node for each that it runs


class _Node:
    """The actor: a Pool, called by many threads."""

    def __init__(self, isolation: Isolation, num_workers: int) -> None:
        self._pool = Pool(num_workers=num_workers, isolation=isolation)

    def run(self, program: Program, limits: Limits) -> Verdict:
        return self._pool.submit(program, limits).result()


class RayPool:
    """The interface of Pool over a cluster that `ray.init` has joined; a node that is lost is no answer.

    Args:
        num_nodes: how many actors; they spread over the machines of the cluster.
        num_cpus: cores that each is given, and programs that it runs at one time.
    """

    def __init__(self, *, num_nodes: int, num_cpus: int, isolation: Isolation = "full") -> None:
        if num_nodes < 1 or num_cpus < 1:
            raise ValueError(
                f"RayPool: wants num_nodes >= 1 and num_cpus >= 1, got {num_nodes} and {num_cpus}"
            )
        node = ray.remote(_Node).options(
            num_cpus=num_cpus, max_concurrency=num_cpus * _WAITING_PER_WORKER, scheduling_strategy="SPREAD"
        )
        self.isolation = isolation
        self._nodes = [node.remote(isolation, num_cpus) for _ in range(num_nodes)]
        self._living = set(range(num_nodes))
        self._room = num_cpus * _WAITING_PER_WORKER

    def __enter__(self) -> Self:
        """The pool itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the nodes back, which kills what runs on them."""
        self.close()

    def close(self) -> None:
        """Give the nodes back, which kills what runs on them."""
        for node in self._nodes:
            ray.kill(node)

    def run_many(self, programs: Iterable[Program], limits: Limits = DEFAULT_LIMITS) -> list[Verdict]:
        """The verdict of each program, in their order."""
        verdicts = dict(self.stream(programs, limits))
        return [verdicts[idx] for idx in range(len(verdicts))]

    def stream(
        self, programs: Iterable[Program], limits: Limits = DEFAULT_LIMITS
    ) -> Iterator[tuple[int, Verdict]]:
        """(index of the program, its verdict), as they come."""
        running: dict[Any, tuple[int, int]] = {}  # by reference: the program and the node
        source = enumerate(programs)
        while True:
            while (node := self._place(running)) is not None and (item := next(source, None)) is not None:
                running[self._nodes[node].run.remote(item[1], limits)] = (item[0], node)
            if not running:
                break
            for reference in ray.wait(list(running), num_returns=1)[0]:
                idx, node = running.pop(reference)
                yield idx, self._verdict(reference, node)
        for idx, _ in source:  # only if no node is left
            yield idx, self._no_answer("every node was lost before the program ran")

    def _place(self, running: Mapping[Any, tuple[int, int]]) -> int | None:
        """The living node with the fewest programs; None if none has room."""
        load = Counter(node for _, node in running.values())
        node = min(self._living, key=load.__getitem__, default=None)
        return None if node is None or load[node] >= self._room else node

    def _verdict(self, reference: object, node: int) -> Verdict:
        try:
            verdict: Verdict = ray.get(reference)
        except ray.exceptions.RayActorError as error:
            self._living.discard(node)
            return self._no_answer(f"the node was lost: {error}")
        except Exception as error:  # of the task, or another of Ray's own: the program has no answer
            return self._no_answer(f"the node failed: {error!r}")
        return verdict

    def _no_answer(self, detail: str) -> Verdict:
        return Verdict(outcome="sandbox_error", isolation=self.isolation, detail=detail)
