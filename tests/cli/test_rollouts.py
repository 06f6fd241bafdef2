"""What `dscoder rollouts` shows of a run, and what it says where there is nothing to show."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dscoder.cli.main import main
from dscoder.cli.rollout_answer import number, unlikely_tokens, visible
from dscoder.cli.rollout_view import render_answer, render_group, render_step
from dscoder.sandbox.verdict import Outcome, Phase, Verdict
from dscoder.train.rollout import Rollout, RolloutStep, verdict_record, write_rollouts
from tests.train.grpo_stand_in import rollout

PASSED = {"is_passed": True, "score": 1.0}
FAILED = {"is_passed": False, "score": 0.0, "reward": 0.0, "rewards": {"tests": 0.0}, "advantage": -1.0}


def ended(outcome: Outcome, **fields: Any) -> dict[str, Any]:
    """What is stored of a verdict."""
    return verdict_record(Verdict(outcome=outcome, **fields))


def group_text(group: Sequence[Rollout], num_answers: int | None = None, *, is_whole: bool = False) -> str:
    numbered = list(enumerate(group, start=1))
    return render_group(numbered, num_answers=num_answers, is_whole=is_whole).plain


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of two groups; p1 is asked in the first alone."""
    directory = tmp_path_factory.mktemp("run")
    slow = FAILED | {"verdict": ended("time_limit", detail="10 s")}
    first = [rollout(), rollout(**FAILED), rollout(group=1, problem="p1", **PASSED)]
    second = [rollout(step=2), *(rollout(step=2, group=1, problem="p2", **more) for more in ({}, slow))]
    write_rollouts(directory, 1, first)
    write_rollouts(directory, 2, second)
    return directory


def shown(run: Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["rollouts", str(run), *words]) == 0
    return capsys.readouterr().out


def refused(run: Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["rollouts", str(run), *words]) == 1
    return capsys.readouterr().err


def test_steps_are_a_line_each(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(run, capsys, "--steps").splitlines()
    assert [line[:27] for line in lines] == ["step 1  2 groups  3 answers", "step 2  2 groups  3 answers"]


def test_the_last_step_is_shown_so_many_groups_at_most(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = shown(run, capsys, "--groups", "1", "--answers", "0")
    assert found.startswith("step 2  ")
    assert "1 more group; --groups shows more" in found
    assert "group 1  letters p0  1 answer\n" in found
    assert "group 2" not in found


def test_a_problem_is_found_in_the_last_step_that_has_it(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = shown(run, capsys, "--problem", "p1")
    assert found.startswith("step 1  1 group  1 answer  1 passed")
    assert "group 2  letters p1" in found
    assert "p0" not in found
    assert shown(run, capsys, "--problem", "p0", "--step", "1").startswith("step 1  1 group  2 answers")


def test_a_problem_is_followed_over_all_steps(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [line[:6] for line in shown(run, capsys, "--steps", "--problem", "p0").splitlines()] == [
        "step 1",
        "step 2",
    ]
    assert shown(run, capsys, "--steps", "--problem", "p1").count("\n") == 1


@pytest.mark.parametrize(
    ("word", "num_answers"),
    [("passed", 1), ("failed", 2), ("not_judged", 3), ("time_limit", 1), ("used", 6)],
)
def test_answers_are_found_by_grade_outcome_and_reason(
    word: str, num_answers: int, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = re.findall(r"(\d+) answer", shown(run, capsys, "--steps", "--only", word))
    assert sum(map(int, found)) == num_answers


def test_an_answer_keeps_its_number_among_those_that_are_found(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = shown(run, capsys, "--only", "time_limit")
    assert "answer 2  failed (program: time_limit)" in found
    assert "answer 1" not in found


def test_suspects_and_what_was_left_out_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    withheld = {"reward": None, "advantage": None, "is_used": False, "reason": "suspect"}
    write_rollouts(tmp_path, 1, [rollout(**PASSED, **withheld, is_suspect=True), rollout()])
    for word in ("suspect", "left_out"):
        found = shown(tmp_path, capsys, "--only", word)
        assert "1 answer  1 passed  reward -  " in found
        assert "suspect  reward - (tests 1)  advantage -  2 tokens, eos  left out: suspect" in found


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--problem", "nope"], "some answer must match --problem nope, got none in 2 steps"),
        (["--step", "1", "--only", "empty"], "some answer must match --only empty, got none in step 1"),
        (["--step", "9"], "must hold rollouts of step 9"),
        (["--group", "3"], "--group must be one of 1, 2 in step 2, got 3"),
        (["--group", "2", "--answer", "7"], "--answer must be one of 1, 2, got 7"),
        (["--answer", "1"], "--answer must go with --group, got 2 groups to choose from"),
        (["--steps", "--group", "1"], "--steps must go with --problem and --only alone"),
    ],
)
def test_what_is_not_there_is_said(
    words: list[str], message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(run, capsys, *words)


@pytest.mark.parametrize("word", ["--groups", "--answers", "--group", "--answer", "--step"])
def test_no_number_may_be_negative(word: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["rollouts", str(run), word, "-1"])
    assert stop.value.code == 2
    assert "-1 does not conform" in capsys.readouterr().err


def test_a_directory_without_rollouts_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "must be a run of `dscoder grpo`, got one without rollouts" in refused(tmp_path, capsys)


def test_a_group_is_its_best_answer_and_diffs() -> None:
    stderr = "Traceback\n" + "x\n" * 20 + "AssertionError"
    failed = ended("failed", stderr=stderr, exit_code=1)
    group = [
        rollout(completion="a\nb\nc", reward=0.5, advantage=0.0),
        rollout(completion="a\nx\nc", reward=0.0, advantage=-1.2247, verdict=failed, detail="failed: no"),
        rollout(completion="a\nb\nc\nd", advantage=1.2247, verdict=ended("passed"), **PASSED),
        rollout(reward=None, advantage=None, is_used=False, reason="no_reward", failures={"tests": "hung"}),
    ]
    found = group_text(group, 2)
    best, worst, left_out = found.index("answer 3"), found.index("answer 4"), found.index("answer 1")
    assert best < worst < left_out
    assert "answer 3  passed  reward 1 (tests 1)  advantage 1.22  2 tokens, eos" in found
    assert "    a\n    b\n    c\n    d\n" in found
    assert "left out: no_reward" in found
    assert "tests: hung" in found
    assert "    -d\n" in found
    assert "1 more answer\n" in found
    whole = group_text(group)
    assert "    -b\n    +x\n" in whole
    assert "failed: no\n" in whole
    assert "  stderr:\n    ... 16 lines before\n    x\n" in whole
    assert "AssertionError\n" in whole
    assert "Traceback" not in whole  # the last lines alone


def test_an_answer_of_which_hardly_a_line_is_the_same_is_shown_as_it_is() -> None:
    def text(other: str) -> str:
        group = [rollout(completion="a\n\nb\nc\nd", **PASSED), rollout(completion=other, **FAILED)]
        return group_text(group)

    assert "    p\n    \n    q\n    d\n    r\n" in text("p\n\nq\nd\nr")
    assert "    -d\n" in text("a\n\nb\nc")


def test_what_a_program_printed_and_took_explains_its_grade() -> None:
    verdict = ended(
        "passed", stdout="42\n", exit_code=0, wall=0.125, cpu=0.1, peak_memory=9 << 20, isolation="rlimits"
    )
    found = group_text([rollout(verdict=verdict, detail="wanted 43", **FAILED)])
    assert "answer 1  failed (program: passed)" in found
    assert "  wanted 43\n  exit 0, 0.12 s, cpu 0.10 s, 9 MiB, isolation rlimits\n  stdout:\n    42\n" in found
    assert "stdout" not in group_text([rollout(verdict=verdict, **PASSED)])
    killed = ended("memory_limit", signal=9)
    assert "  signal 9 (SIGKILL), 0.00 s" in group_text([rollout(verdict=killed, **FAILED)])


def test_warnings_of_a_compiler_do_not_hide_what_a_program_said() -> None:
    phase = Phase(
        exit_code=0, signal=None, stopped="", wall=0.0, cpu=0.0, peak_memory=0, stdout=b"", stderr=b"unused x"
    )
    crashed = ended("runtime_error", stderr="out of range", compile=phase)
    found = group_text([rollout(verdict=crashed, **FAILED)])
    assert "out of range" in found
    assert "unused x" not in found
    refused_by_it = ended("compile_error", compile=phase)
    assert "  compiler:\n    unused x\n" in group_text([rollout(verdict=refused_by_it, **FAILED)])


def test_a_long_prompt_is_cut_with_a_mark() -> None:
    long = rollout(prompt="\n".join(f"line {idx}" for idx in range(15)))
    assert "    ... 3 lines before, which --group 1 shows\n    line 3\n" in group_text([long])
    assert "    line 0\n" in group_text([long], is_whole=True)
    assert "before" not in group_text([long], is_whole=True)


def test_answers_that_are_the_same_are_folded() -> None:
    best, other = rollout(**PASSED), rollout(completion="x", **FAILED)
    found = group_text([other, best, other, other, best])
    assert "answers 2, 5 (x2)  passed" in found
    assert "answers 1, 3, 4 (x3)  failed" in found
    assert found.count("answer") == 3  # the group's line, and two
    assert "3 more answers\n" in group_text([other, best, other, other, best], 0)
    # What differs in anything that is shown is not the same.
    late = rollout(completion="x", **FAILED | {"detail": "late"})
    assert "answer 2  failed" in group_text([other, late])


def test_one_answer_is_shown_whole() -> None:
    stdout = "\n".join(map(str, range(30)))
    verdict = ended("passed", stdout=stdout, stderr="note")
    one = rollout(prompt="p\n" * 20 + "end", completion="ab", verdict=verdict, **PASSED)
    found = render_answer((4, one), None).plain
    assert found.startswith("group 1  letters p0  1 answer\n" + "    p\n" * 20 + "    end\nanswer 4  passed")
    assert "  stdout:\n    0\n    1\n" in found
    assert "  stderr:\n    note\n" in found


def test_the_least_likely_tokens_are_shown_with_their_lines() -> None:
    token_bytes = (b"x =", b" 1\n", b"y", b"\x1b[m", b"")
    one = rollout(
        completion_ids=(0, 1, 2, 3, 4), logprobs=(-0.1, math.log(0.25), -0.2, math.log(0.01), math.log(0.5))
    )
    lines = unlikely_tokens(one, token_bytes).plain.splitlines()
    assert lines[1:4] == [
        "       1.00%  '\\x1b[m'  line 2: y\\x1b[m",
        "      25.00%  ' 1\\n'  line 1: x = 1",
        "      50.00%  id 4  line 2: y\\x1b[m",
    ]
    assert "id 3, token 4" in unlikely_tokens(one, None).plain


def test_steps_are_shown_with_what_they_count() -> None:
    def steps(*ends: int, advantage: float) -> tuple[RolloutStep, ...]:
        return tuple(
            RolloutStep(end=n, text_end=end, rewards={"process.f": 0.5}, reward=0.5, advantage=advantage)
            for n, end in enumerate(ends, start=1)
        )

    group = [
        rollout(completion="a\nb", reward=1.0, advantage=0.7, steps=steps(2, 3, advantage=-1.0)),
        rollout(completion="a\nc\n", reward=0.0, advantage=-0.7, steps=steps(2, 4, advantage=1.0)),
    ]
    found = group_text(group)
    # The one whose steps count more comes first, whatever its answer is worth.
    assert found.index("answer 2") < found.index("answer 1")
    head = "reward 0.5 (process.f 0.5)  advantage 1\n"
    assert f"    step 1  {head}    a\n    step 2  {head}    c\n" in found
    assert "    -c\n" in found
    assert "    step 2  reward 0.5 (process.f 0.5)  advantage -1\n" in found
    assert "advantage 0.7" not in found
    assert "(tests 1  process.f 0.5)" in render_step(1, group).plain


@pytest.mark.parametrize(
    ("is_passed", "outcome", "headed"),
    [
        (True, "passed", "passed  reward"),
        (False, "passed", "failed (program: passed)  reward"),
        (False, "failed", "failed  reward"),
        (False, "time_limit", "failed (program: time_limit)  reward"),
        (None, "sandbox_error", "not judged (program: sandbox_error)  reward"),
    ],
)
def test_an_answer_is_headed_by_its_grade(is_passed: bool | None, outcome: Outcome, headed: str) -> None:
    found = render_group([(1, rollout(is_passed=is_passed, verdict=ended(outcome)))], num_answers=0)
    assert f"answer 1  {headed}" in found.plain
    green = [str(span.style) for span in found.spans if "green" in str(span.style)]
    assert bool(green) == bool(is_passed)


def test_a_step_is_one_line() -> None:
    line = render_step(
        7,
        [
            rollout(reward=1.0, rewards={"tests": 1.0, "format": None}, **PASSED),
            rollout(reward=None, rewards={"tests": None, "format": None}, reason="no_reward", is_used=False),
        ],
    ).plain
    assert line == (
        "step 7  1 group  2 answers  1 passed  reward 1  (format -  tests 1)  left out: no_reward 1"
    )


def test_nothing_is_minus_zero() -> None:
    assert [number(value) for value in (-0.0, 0.0, -0.25, None)] == ["0", "0", "-0.25", "-"]


def test_what_a_model_wrote_does_not_steer_the_terminal() -> None:
    assert visible("a\x1b[31mb\r\tc\n") == "a\\x1b[31mb\\x0d\tc\n"
    group = [rollout(completion="[bold]\x1b]0;title\x07[/bold]")]
    assert "[bold]\\x1b]0;title\\x07[/bold]" in group_text(group)
