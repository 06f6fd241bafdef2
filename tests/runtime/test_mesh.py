"""Ranks meet, agree, and end together: an error that names who is gone instead of a wait."""

import os
import signal
import threading
import time
from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed import PrefixStore, TCPStore, distributed_c10d  # type: ignore[attr-defined]

from dscoder.runtime import heartbeat, mesh
from dscoder.runtime.heartbeat import CommunicationError, Heartbeat, LostRankError, is_communication_error
from dscoder.runtime.mesh import (
    arrange,
    check_world,
    launched_ranks,
    open_mesh,
    set_launch,
)
from dscoder.testing.ranks import Ended, end_ranks, free_port, run_ranks

dist = pytest.mark.dist
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def _no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, "0")  # so that what a test sets is taken back
        monkeypatch.delenv(name)


def launch(world_size: int = 4) -> None:
    set_launch(rank=0, world_size=world_size, host="127.0.0.1", port=1)


# ---- what torchrun says ----


def test_without_torchrun_there_is_one_rank() -> None:
    assert launched_ranks() == 1


def test_an_address_alone_is_no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "node-0")
    assert launched_ranks() == 1


def test_torchrun_says_how_many_ranks_there_are() -> None:
    launch(world_size=4)
    assert launched_ranks() == 4


@pytest.mark.parametrize("missing", VARIABLES)
def test_a_launch_without_a_variable_is_refused(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launch()
    monkeypatch.delenv(missing)
    with pytest.raises(ValueError, match=f"must be set, got no {missing}; start the command with torchrun"):
        launched_ranks()


def test_a_variable_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    launch()
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(ValueError, match="WORLD_SIZE must be a number, got 'many'"):
        launched_ranks()


def open_wrongly(**changes: Any) -> None:
    arguments: dict[str, Any] = {"expert": 1, "replicate": 1, "device": "cpu", "timeout": 1.0} | changes
    with open_mesh(**arguments):
        raise AssertionError("the mesh must not open")


def test_a_mesh_without_torchrun_is_refused() -> None:
    with pytest.raises(ValueError, match=r"torchrun must set RANK, .* got none of them"):
        open_wrongly()


@pytest.mark.parametrize(("expert", "replicate"), [(3, 1), (2, 4), (1, 3)])
def test_sizes_that_do_not_divide_the_world_are_refused(expert: int, replicate: int) -> None:
    launch(world_size=4)
    wanted = rf"multiple of expert \* replicate = {expert * replicate}, got 4"
    with pytest.raises(ValueError, match=wanted):
        open_wrongly(expert=expert, replicate=replicate)


def test_sizes_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="expert and replicate must be >= 1, got 0 and 1"):
        check_world(world_size=4, expert=0, replicate=1)


def test_fewer_gpus_than_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    launch(world_size=4)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="every rank needs a GPU, got 2 GPUs for 4 ranks here"):
        open_wrongly(device="cuda")


def test_one_gpu_for_all_ranks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    launch(world_size=4)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(ValueError, match="as every rank has its own GPU, got 'cuda:1'"):
        open_wrongly(device="cuda:1")


@dist
def test_who_never_comes_is_named() -> None:
    ended = end_ranks(wait_for_more, num_ranks=2)
    for end in ended:
        assert "LostRankError: ranks that did not come within 3 s: 2, 3" in end.error


def wait_for_more() -> None:
    os.environ["WORLD_SIZE"] = "4"
    with open_mesh(expert=1, replicate=1, device="cpu", timeout=3):
        pass


# ---- layouts and agreement ----


def talk() -> dict[str, Any]:
    with open_mesh(expert=2, replicate=1, device="cpu", timeout=60) as mesh:
        other = arrange(mesh, expert=1, replicate=2)
        return {
            "sizes": (mesh.replicate, mesh.expert_shard, mesh.expert),
            "others": (other.replicate, other.expert_shard, other.expert),
            "grid": mesh.devices.mesh.tolist(),
            "names": mesh.devices.mesh_dim_names,
            "shard": other.shard_devices.mesh.tolist(),
            "cut": mesh.expert_devices.mesh.tolist(),
            "expert": torch.distributed.get_process_group_ranks(mesh.expert_group),
            "sum": mesh.all_sum(torch.tensor([1.0, mesh.rank])).tolist(),
            "max": mesh.agree_max(-mesh.rank),
            "shared": mesh.share(f"of rank {mesh.rank}"),
            "gathered": mesh.gather((mesh.rank, mesh.is_first)),
            "lost": mesh.lost_ranks(),
        }


@dist
def test_neighbours_share_experts_and_every_rank_agrees() -> None:
    for rank, told in enumerate(run_ranks(talk, num_ranks=4)):
        assert told["sizes"] == (1, 2, 2)
        assert told["others"] == (2, 2, 1)
        assert told["grid"] == [[[0, 1], [2, 3]]]
        assert told["names"] == ("replicate", "expert_shard", "expert")
        assert told["shard"] == [[0, 1], [2, 3]]
        assert told["cut"] == [[[0, 2], [1, 3]]]
        assert told["expert"] == [rank // 2 * 2, rank // 2 * 2 + 1]
        assert told["sum"] == [4.0, 6.0]
        assert told["max"] == 0
        assert told["shared"] == "of rank 0"
        assert told["gathered"] == [(other, other == 0) for other in range(4)]
        assert told["lost"] == []


def count_groups() -> int:
    """How many groups a rank asks for, its own and others', when a mesh of the usual layout opens."""
    ask = distributed_c10d.new_group
    with (
        mock.patch.object(distributed_c10d, "new_group", side_effect=ask) as of_others,
        mock.patch.object(torch.distributed, "new_group", side_effect=ask) as own,
        open_mesh(expert=1, replicate=1, device="cpu", timeout=60) as opened,
    ):
        opened.barrier()
        return of_others.call_count + own.call_count


@dist
def test_ranks_make_no_groups_for_other_ranks_alone() -> None:
    # On the host two, of the ranks as they are sharded two, and one of this rank alone.
    assert run_ranks(count_groups, num_ranks=2) == [5, 5]


def work_long(seconds: float) -> str:
    """The first rank has work of its own for longer than ranks wait for each other otherwise."""
    with open_mesh(expert=1, replicate=1, device="cpu", timeout=seconds / 1.2) as mesh:
        if mesh.is_first:
            time.sleep(seconds)
        return mesh.share("done")


@dist
def test_the_host_waits_longer_than_the_timeout_for_a_rank_that_lives() -> None:
    assert run_ranks(work_long, 12.0, num_ranks=2) == ["done", "done"]


# ---- ranks that are lost ----


def lose_a_rank(how: str, who: int) -> None:
    """Rank `who` ends on its own; the others add numbers up until they notice."""
    with open_mesh(expert=1, replicate=1, device="cpu", timeout=60) as mesh:
        mesh.barrier()
        if mesh.rank == who and how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if mesh.rank == who:
            raise KeyError("no such thing")
        while True:
            mesh.all_sum(torch.ones(1))


def end_with_loss(how: str, who: int) -> tuple[list[Ended], float]:
    start = time.monotonic()
    ended = end_ranks(lose_a_rank, how, who, num_ranks=3)
    return ended, time.monotonic() - start


@dist
def test_a_killed_rank_is_named_by_the_others() -> None:
    ended, seconds = end_with_loss("killed", 2)
    assert ended[2].status == -signal.SIGKILL
    for end in ended[:2]:
        assert "LostRankError: rank 2 is gone: its heartbeat stopped" in end.error
    assert seconds < 40  # the timeout of the mesh is 60


@dist
def test_a_rank_that_fails_ends_with_its_own_error_and_the_others_tell_it() -> None:
    ended, seconds = end_with_loss("failed", 1)
    assert ended[1].error.endswith("KeyError: 'no such thing'\n")
    assert "LostRankError" not in ended[1].error
    for end in (ended[0], ended[2]):
        assert "LostRankError: rank 1 failed with KeyError: 'no such thing'" in end.error
    assert seconds < 40


@dist
def test_the_end_of_the_rank_that_keeps_the_store_is_told() -> None:
    ended, _ = end_with_loss("killed", 0)
    for end in ended[1:]:
        assert "does not answer: rank 0, which keeps it, is gone" in end.error


def lose_a_rank_unseen() -> None:
    """Rank 1 ends, rank 0 asks nobody anything, as one that waits for a GPU."""
    heartbeat._NOTICE = 0.5
    with open_mesh(expert=1, replicate=1, device="cpu", timeout=60) as mesh:
        mesh.barrier()
        if mesh.rank == 1:
            raise KeyError("no such thing")
        time.sleep(60)


@dist
def test_a_rank_that_does_not_notice_is_ended() -> None:
    start = time.monotonic()
    ended = end_ranks(lose_a_rank_unseen, num_ranks=2)
    assert ended[0].status == heartbeat._EXIT_STATUS
    assert time.monotonic() - start < 40


@pytest.fixture
def store() -> TCPStore:
    """As torchrun's agent keeps it."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def beat_at(store: TCPStore, *, attempt: int, rank: int = 0) -> Heartbeat:
    return Heartbeat(
        host="127.0.0.1",
        port=store.port,
        prefix=f"attempt-{attempt}",
        host_rank=None,
        rank=rank,
        world_size=2,
    )


def test_beats_of_an_earlier_start_are_not_taken_for_those_of_this_one(store: TCPStore) -> None:
    first = [beat_at(store, attempt=0, rank=rank) for rank in (0, 1)]
    first[0].meet(10.0)
    first[1].leave(KeyError("no such thing"))
    assert first[0].lost() == {1: "failed with KeyError: 'no such thing'"}
    first[0].leave(None)
    again = beat_at(store, attempt=1)
    with pytest.raises(LostRankError, match=r"did not come within 0\.2 s: 1"):
        again.meet(0.2)
    again.leave(None)


def test_a_rank_that_the_watch_ends_is_not_the_one_that_is_lost(
    store: TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = threading.Event()

    monkeypatch.setattr(os, "_exit", lambda status: ended.set())
    monkeypatch.setattr(heartbeat, "_NOTICE", 0.0)
    monkeypatch.setattr(heartbeat, "_PERIOD", 0.02)
    first, second = (beat_at(store, attempt=0, rank=rank) for rank in (0, 1))
    second.leave(KeyError("no such thing"))
    assert ended.wait(10.0)
    beats = PrefixStore("attempt-0", store)
    assert beats.get("beat/0").endswith(b" followed rank 1 is gone")
    first.leave(None)


def test_sigterm_waits_until_a_loss_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(_self: Heartbeat) -> dict[int, str]:
        signal.raise_signal(signal.SIGTERM)  # as torchrun does at once
        return {3: "is gone"}

    ended: list[int] = []
    set_launch(rank=0, world_size=1, host="127.0.0.1", port=free_port())
    monkeypatch.setattr(Heartbeat, "lost", lost)
    before = signal.signal(signal.SIGTERM, lambda number, _: ended.append(number))
    try:
        with (
            pytest.raises(LostRankError, match="rank 3 is gone"),
            open_mesh(expert=1, replicate=1, device="cpu", timeout=60),
        ):
            raise CommunicationError("no answer")
        assert ended == []
        signal.raise_signal(signal.SIGTERM)
        assert ended == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_groups_that_cannot_be_ended_do_not_hide_what_ended_the_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise RuntimeError("NCCL error")

    monkeypatch.setattr("dscoder.runtime.mesh.dist.is_initialized", lambda: True)
    monkeypatch.setattr("dscoder.runtime.mesh.dist.destroy_process_group", fail)
    mesh._end_groups(torch.device("cpu"))
    assert "could not be ended: NCCL error" in caplog.text


# ---- which errors count ----


@pytest.mark.parametrize(
    ("error", "counts"),
    [
        (torch.distributed.DistBackendError("NCCL error"), True),
        (
            RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer"),
            True,
        ),
        (CommunicationError("rank 3 waited"), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("connection closed by peer"), False),
        (KeyError("gloo"), False),
    ],
)
def test_errors_of_the_links_are_told_from_others(error: BaseException, counts: bool) -> None:
    assert is_communication_error(error) is counts


def test_an_error_raised_from_one_of_the_links_counts() -> None:
    error = OSError("the checkpoint was not written")
    assert not is_communication_error(error)
    error.__cause__ = torch.distributed.DistNetworkError("socket")
    assert is_communication_error(error)


def test_a_lost_rank_is_known_by_number() -> None:
    assert LostRankError([3, 5], "gone").ranks == (3, 5)
