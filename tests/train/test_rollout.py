"""Rollouts on disk."""

from pathlib import Path

import pytest

from dscoder.sandbox.verdict import Phase, Verdict
from dscoder.train.rollout import (
    by_group,
    drop_rollouts_after,
    read_rollouts,
    step_file,
    verdict_record,
    write_rollouts,
    written_steps,
)
from tests.train.grpo_stand_in import rollout


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    verdict = verdict_record(Verdict(outcome="failed", detail="no", stderr="x"))
    written = [
        rollout(verdict=verdict, completion="\u4e2d\u2028\n\x85", rewards={"a": None, "b": -0.5}),
        rollout(advantage=None, reward=None, is_used=False, reason="no_reward", failures={"a": "hung"}),
    ]
    write_rollouts(tmp_path, 3, written)
    assert read_rollouts(tmp_path, 3) == written
    assert written_steps(tmp_path) == [3]


def test_halves_of_surrogate_pairs_do_not_end_a_run(tmp_path: Path) -> None:
    write_rollouts(tmp_path, 1, [rollout(completion="a\udc80b")])
    assert read_rollouts(tmp_path, 1)[0].completion == "a\udc80b"


def test_later_rollouts_are_dropped(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        write_rollouts(tmp_path, step, [])
    (tmp_path / "rollouts" / "notes.txt").write_text("kept")
    drop_rollouts_after(tmp_path, 1)
    assert written_steps(tmp_path) == [1]
    assert (tmp_path / "rollouts" / "notes.txt").exists()
    assert written_steps(tmp_path / "elsewhere") == []


def test_what_is_no_rollout_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must hold rollouts of step 2, got none at"):
        read_rollouts(tmp_path, 2)
    write_rollouts(tmp_path, 2, [rollout()])
    with step_file(tmp_path, 2).open("a") as file:
        file.write('{"step": 2}\n')
    with pytest.raises(ValueError, match=r"line 2 must be a rollout, got .*step"):
        read_rollouts(tmp_path, 2)


def test_long_outputs_keep_both_ends() -> None:
    phase = Phase(
        exit_code=0, signal=None, stopped="", wall=0.0, cpu=0.0, peak_memory=0, stdout=b"", stderr=b"\xff!"
    )
    kept = verdict_record(Verdict(outcome="passed", stdout="a" * 5000 + "b" * 5000, compile=phase))
    assert kept["stdout"].startswith("aaa")
    assert kept["stdout"].endswith("bbb")
    assert "... 8000 characters ..." in kept["stdout"]
    assert kept["compiler"] == "\\xff!"


def test_groups_come_in_their_order() -> None:
    found = by_group([rollout(group=1, problem="b"), rollout(group=0), rollout(group=1, problem="b")])
    assert [[r.problem for r in group] for group in found] == [["p0"], ["b", "b"]]
