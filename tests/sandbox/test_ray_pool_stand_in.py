"""Which node a program goes to, with a stand-in for Ray that runs nothing."""

import importlib
import sys
from collections import Counter
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace

import pytest

from dscoder.sandbox.verdict import Program, Verdict
from tests.sandbox.conftest import SMALL


class LostError(Exception):
    """Stands for RayActorError."""


class Node:
    """Stands for an actor: counts what it is given, and is lost after some programs."""

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments
        self.given: list[str | None] = []
        self.num_until_lost = 1_000_000
        self.run = SimpleNamespace(remote=self.take)

    def take(self, program: Program, _: object) -> "tuple[Node, int]":
        self.given.append(program.source)
        return self, len(self.given)

    def answer(self, number: int) -> Verdict:
        if number > self.num_until_lost:
            raise LostError("gone")
        source = self.given[number - 1]
        if source == "surprise":
            raise KeyError(source)
        return Verdict(outcome="passed", stdout=source or "")


@pytest.fixture
def ray_pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module, imported over the stand-in."""
    fake = ModuleType("ray")
    actor = SimpleNamespace(remote=Node)
    fake.__dict__.update(
        remote=lambda _: SimpleNamespace(options=lambda **_: actor),
        wait=lambda references, num_returns: (references[:num_returns], references[num_returns:]),
        get=lambda reference: reference[0].answer(reference[1]),
        kill=lambda _: None,
        exceptions=SimpleNamespace(RayActorError=LostError),
    )
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.delitem(sys.modules, "dscoder.sandbox.ray_pool", raising=False)
    yield importlib.import_module("dscoder.sandbox.ray_pool")
    sys.modules.pop("dscoder.sandbox.ray_pool", None)


def programs(*sources: str) -> list[Program]:
    return [Program(source=source) for source in sources]


def test_programs_spread_and_no_node_has_more_than_it_has_room_for(ray_pool: ModuleType) -> None:
    with ray_pool.RayPool(num_nodes=2, num_cpus=3) as pool:
        stream = pool.stream(programs(*map(str, range(30))), SMALL)
        next(stream)
        assert [len(node.given) for node in pool._nodes] == [6, 6]
        assert sorted(int(verdict.stdout) for _, verdict in stream) == list(range(1, 30))


def test_a_node_runs_as_many_as_it_was_given_cores(ray_pool: ModuleType) -> None:
    with ray_pool.RayPool(num_nodes=1, num_cpus=3) as pool:
        assert pool._nodes[0].arguments == ("full", 3)
    assert ray_pool._Node("full", 3)._pool.num_workers == 3


def test_a_lost_node_is_not_chosen_again(ray_pool: ModuleType) -> None:
    with ray_pool.RayPool(num_nodes=2, num_cpus=1) as pool:
        pool._nodes[0].num_until_lost = 0
        verdicts = pool.run_many(programs(*map(str, range(20))), SMALL)
        assert len(pool._nodes[0].given) == 2
        assert Counter(verdict.outcome for verdict in verdicts) == {"passed": 18, "sandbox_error": 2}
        pool.run_many(programs("later"), SMALL)
        assert len(pool._nodes[0].given) == 2


def test_with_every_node_lost_each_program_still_has_its_verdict(ray_pool: ModuleType) -> None:
    with ray_pool.RayPool(num_nodes=2, num_cpus=1) as pool:
        for node in pool._nodes:
            node.num_until_lost = 0
        verdicts = pool.run_many(programs(*map(str, range(20))), SMALL)
    assert len(verdicts) == 20
    assert {verdict.is_answer for verdict in verdicts} == {False}


def test_a_surprise_at_a_node_loses_neither_the_program_nor_the_node(ray_pool: ModuleType) -> None:
    with ray_pool.RayPool(num_nodes=1, num_cpus=1) as pool:
        verdicts = pool.run_many(programs("a", "surprise", "b"), SMALL)
    assert [verdict.outcome for verdict in verdicts] == ["passed", "sandbox_error", "passed"]
    assert "surprise" in verdicts[1].detail
