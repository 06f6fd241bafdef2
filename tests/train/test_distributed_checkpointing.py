"""Checkpoints of many ranks: damage is named with its writer, what fails on one rank fails on all."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from dscoder.runtime.agreement import RankError
from dscoder.runtime.mesh import Mesh, open_mesh
from dscoder.testing.compare import assert_same
from dscoder.testing.ranks import run_ranks
from dscoder.train.checkpoint_files import _shares
from dscoder.train.checkpointing import CheckpointWriter, Progress, completed, load_state
from dscoder.train.ranks import Note, Ranks
from tests.train.ranks_at_work import TIMEOUT, Failed, failure

pytestmark = pytest.mark.dist

NUM_ROWS = 5  # uneven over 2 ranks and over 4


@contextmanager
def two_ranks() -> Iterator[Mesh]:
    with open_mesh(expert=1, replicate=1, device="cpu", timeout=TIMEOUT) as mesh:
        yield mesh


def whole_state() -> dict[str, Tensor]:
    return {"rows": torch.arange(NUM_ROWS * 3.0).view(NUM_ROWS, 3), "step": torch.tensor(7.0)}


def part_of_state(mesh: Mesh, *, is_empty: bool = False) -> dict[str, Tensor]:
    """This rank's rows as a part of the whole; zeros to be filled where `is_empty`."""
    whole = whole_state()
    if is_empty:
        whole = {name: torch.zeros_like(tensor) for name, tensor in whole.items()}
    own = whole["rows"].chunk(mesh.world_size)[mesh.rank].clone()
    rows = DTensor.from_local(
        own, mesh.shard_devices["shard"], [Shard(0)], shape=whole["rows"].shape, stride=(3, 1)
    )
    return {"rows": rows, "step": whole["step"]}


def save(directory: Path, mesh: Mesh, *, step: int = 1) -> Path:
    ranks = Ranks(mesh)
    progress = Progress(step=step, num_sequences=2, num_tokens=16, num_threads=1, layout=ranks.layout())
    with CheckpointWriter(directory, keep=2, ranks=ranks) as writer:
        writer.save(progress, part_of_state(mesh))
    return completed(directory)[-1][1]


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "flipped": ("__1_0.distcp", flip),
    "missing": ("__1_0.distcp", Path.unlink),
    "cut": ("__0_0.distcp", lambda file: file.write_bytes(file.read_bytes()[:50])),
    "metadata": (".metadata", flip),
    "progress": ("progress.json", flip),
}


def load_damaged(directory: Path) -> dict[str, Failed | None]:
    """On every rank: a checkpoint, loaded whole and with each kind of damage."""
    with two_ranks() as mesh:
        path = save(directory, mesh)
        found = {"whole": failure(lambda: load_state(path, part_of_state(mesh), Ranks(mesh)))}
        for name, (file, damage) in DAMAGES.items():
            copy = directory / name / path.name
            if mesh.is_first:
                shutil.copytree(path, copy)
                damage(copy / file)
            mesh.barrier()
            state = part_of_state(mesh, is_empty=True)
            found[name] = failure(lambda copy=copy, state=state: load_state(copy, state, Ranks(mesh)))
            rows = state["rows"]
            assert isinstance(rows, DTensor)
            assert not rows.to_local().any()  # nothing was loaded from what may be wrong
        return found


def test_a_damaged_shard_is_named_with_its_rank_on_all_ranks(tmp_path: Path) -> None:
    wanted = {
        "flipped": "__1_0.distcp of rank 1 does not add up to its sha256",
        "missing": "__1_0.distcp of rank 1 is not there",
        "cut": "__0_0.distcp of rank 0 must have",
        "metadata": ".metadata of rank 0 does not add up to its sha256",
        "progress": "progress.json",
    }
    for found in run_ranks(load_damaged, tmp_path, num_ranks=2):
        assert found.pop("whole") is None
        for name, text in wanted.items():
            assert text in found[name].text, name
            assert "without it the run goes on from the one before" in found[name].text
            assert found[name].kind == (
                "RankError" if "rank 0 failed" in found[name].text else "RuntimeError"
            )


def fail_to_write(directory: Path) -> tuple[Failed | None, Failed | None, list[int]]:
    """On every rank: a save in which rank 1 has a full disk, and what was saved before and after."""
    with two_ranks() as mesh:
        save(directory, mesh, step=1)

        def no_space(handle: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with mock.patch.object(os, "fsync", no_space if mesh.rank == 1 else os.fsync):
            full = failure(lambda: save(directory, mesh, step=2))
        mesh.barrier()
        assert not list(directory.glob("*.tmp"))
        again = failure(lambda: save(directory, mesh, step=3))
        return full, again, [step for step, _ in completed(directory)]


def test_a_rank_that_cannot_write_stops_all_with_its_number(tmp_path: Path) -> None:
    for full, again, steps in run_ranks(fail_to_write, tmp_path, num_ranks=2):
        assert (full.kind, full.number) == ("OSError", errno.ENOSPC)
        assert "No space left on device: rank 1 failed: " in full.text
        assert "the latest whole one is step-000000001" in full.text
        assert again is None
        assert steps == [1, 3]


def save_once(directory: Path) -> None:
    with two_ranks() as mesh:
        save(directory, mesh)


def load_once(directory: Path) -> Tensor:
    """On every rank: the rows that it read of the newest checkpoint."""
    with two_ranks() as mesh:
        state = part_of_state(mesh, is_empty=True)
        load_state(completed(directory)[-1][1], state, Ranks(mesh))
        rows = state["rows"]
        assert isinstance(rows, DTensor)
        assert float(state["step"]) == 7.0
        return rows.to_local()


@pytest.mark.parametrize(("num_writers", "num_readers"), [(2, 1), (1, 2)])
def test_one_process_and_many_ranks_read_each_other(
    tmp_path: Path, num_writers: int, num_readers: int
) -> None:
    if num_writers == 1:
        with CheckpointWriter(tmp_path, keep=1) as writer:
            progress = Progress(step=1, num_sequences=2, num_tokens=16, num_threads=1)
            writer.save(progress, whole_state())
        found = torch.cat(run_ranks(load_once, tmp_path, num_ranks=num_readers))
    else:
        run_ranks(save_once, tmp_path, num_ranks=num_writers)
        state = {name: torch.zeros_like(tensor) for name, tensor in whole_state().items()}
        load_state(completed(tmp_path)[-1][1], state)
        found = state["rows"]
    assert_same(found, whole_state()["rows"])


def agree(directory: Path) -> tuple[list[Failed | None], list[bool], object]:
    """On every rank: deeds that fail on one, and a note that one of them told."""
    with two_ranks() as mesh:
        ranks = Ranks(mesh)

        def fail_on(rank: int) -> str:
            if ranks.rank == rank:
                raise ValueError(f"not on {rank}")
            return "done"

        found = [
            failure(lambda: ranks.each(lambda: fail_on(1))),
            failure(lambda: ranks.first(lambda: fail_on(0))),
            failure(lambda: ranks.first(lambda: fail_on(1))),
        ]
        if ranks.rank == 1:
            ranks.tell(Note.TERMINATED)
        before = ranks.heard(Note.TERMINATED)
        sums = ranks.add_up(torch.tensor([1.0, float(ranks.rank)])).tolist()
        ranks.hear(sums[2:])
        heard = [before, ranks.heard(Note.TERMINATED), ranks.heard(Note.UNSAVED)]
        return found, heard, (sums[:2], [int(total) for total in ranks.totals(ranks.rank, 0)])


def test_what_fails_on_one_rank_fails_on_all_and_notes_ride_on_sums(tmp_path: Path) -> None:
    first, second = run_ranks(agree, tmp_path, num_ranks=2)
    assert [error and (error.kind, error.text) for error in first[0]] == [
        ("RankError", "rank 1 failed: ValueError: not on 1"),
        ("ValueError", "not on 0"),
        None,
    ]
    assert [error and (error.kind, error.text) for error in second[0]] == [
        ("ValueError", "not on 1"),
        ("RankError", "rank 0 failed: ValueError: not on 0"),
        None,
    ]
    assert first[1] == second[1] == [False, True, False]
    assert first[2] == second[2] == ([2.0, 1.0], [1, 1])


def test_files_are_shared_out_by_size() -> None:
    files = {name: {"bytes": size} for name, size in [("a", 5), ("b", 9), ("c", 4), ("d", 0)]}
    assert _shares(files, 2) == [["b", "d"], ["a", "c"]]
    assert _shares(files, 1) == [["b", "a", "c", "d"]]
    assert _shares({}, 2) == [[], []]


def test_a_rank_error_keeps_the_number_of_its_cause() -> None:
    error = RankError(3, "OSError: full", errno.ENOSPC)
    assert str(error) == "rank 3 failed: OSError: full"
    assert error.error_number == errno.ENOSPC


def test_progress_without_a_layout_is_of_one_process() -> None:
    progress = Progress(step=1, num_sequences=2, num_tokens=16, num_threads=1)
    assert asdict(progress)["layout"] == {"replicate": 1, "expert_shard": 1, "expert": 1}
