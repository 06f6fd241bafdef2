"""Rollouts on disk."""

from dataclasses import replace
from pathlib import Path

import pytest

from dscoder.sandbox.verdict import Phase, Verdict
from dscoder.train.rollout import (
    RolloutStep,
    by_group,
    drop_rollouts_after,
    read_rollouts,
    require_rewards,
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


def test_steps_are_written_where_there_are_some(tmp_path: Path) -> None:
    step = RolloutStep(end=2, text_end=1, rewards={"process.f": None}, reward=0.5, advantage=-1.25)
    written = [rollout(steps=(step,)), rollout()]
    write_rollouts(tmp_path, 1, written)
    assert read_rollouts(tmp_path, 1) == written
    first, second = step_file(tmp_path, 1).read_text().splitlines()
    assert '"steps": [{"end": 2, ' in first
    assert "steps" not in second
    with step_file(tmp_path, 1).open("w") as file:
        file.write(first.replace('"text_end"', '"end_of_text"') + "\n")
    with pytest.raises(ValueError, match="line 1 must be a rollout"):
        read_rollouts(tmp_path, 1)


def test_every_token_has_the_advantage_of_its_step() -> None:
    def step(end: int, advantage: float) -> RolloutStep:
        return RolloutStep(end=end, text_end=end, rewards={}, reward=1.0, advantage=advantage)

    found = rollout(completion_ids=(4, 5, 6, 7, 8), steps=(step(2, 1.5), step(3, -1.0), step(5, 0.5)))
    assert found.token_advantages == [1.5, 1.5, -1.0, 0.5, 0.5]
    assert rollout(advantage=2.0).token_advantages == [2.0]


def test_a_step_of_a_run_needs_a_reward_that_counts() -> None:
    untold = RolloutStep(end=2, text_end=1, rewards={"process.f": None}, reward=None, advantage=None)
    require_rewards([rollout(reward=None), rollout(reward=0.0)])
    failed = rollout(steps=(untold,), reward=1.0, failures={"process.f": "hung"}, detail="ok")
    require_rewards([failed])
    with pytest.raises(ValueError, match=r"step 1 must have a reward, .* 1 \(the first: ok; process.f: hung"):
        require_rewards([failed], has_outcome=False)
    require_rewards([failed, rollout(steps=(replace(untold, reward=0.0),))], has_outcome=False)


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
