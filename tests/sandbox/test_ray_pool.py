"""The pool over a cluster of one machine."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from dscoder.sandbox.verdict import Program
from tests.sandbox.conftest import SMALL

# Any folder named ray passes for a package of that name.
pytest.importorskip("ray.actor", reason="Ray is not installed: dscoder[ray]")
ray = pytest.importorskip("ray")
ray_pool = pytest.importorskip("dscoder.sandbox.ray_pool")

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.usefixtures("full_isolation")]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Ray on this machine."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.usefixtures("cluster")
def test_verdicts_come_in_order_and_carry_their_outcome() -> None:
    sources = [f"print({i})" for i in range(6)] + ["while True: pass"]
    with ray_pool.RayPool(num_nodes=2, num_cpus=1) as pool:
        *verdicts, last = pool.run_many(map(program, sources), replace(SMALL, time=1.0))
    assert [verdict.stdout for verdict in verdicts] == [f"{i}\n" for i in range(6)]
    assert last.outcome == "time_limit"


@pytest.mark.usefixtures("cluster")
def test_a_lost_node_is_no_answer() -> None:
    with ray_pool.RayPool(num_nodes=1, num_cpus=1) as pool:
        stream = pool.stream(
            [program("pass"), program("import time\ntime.sleep(60)")], replace(SMALL, time=60.0)
        )
        assert next(stream)[1].outcome == "passed"
        pool.close()
        _, lost = next(stream)
    assert (lost.outcome, lost.is_answer) == ("sandbox_error", False)


def test_a_pool_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="wants num_nodes >= 1 and num_cpus >= 1, got 0 and 1"):
        ray_pool.RayPool(num_nodes=0, num_cpus=1)


def program(source: str) -> Program:
    return Program(source=source)
