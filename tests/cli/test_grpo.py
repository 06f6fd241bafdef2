"""The words of `dscoder grpo`, a run from them, and what `dscoder rollouts` shows of it."""

import json
from pathlib import Path

import pytest

from dscoder.cli.grpo import parse_config
from dscoder.cli.main import main
from dscoder.cli.rollout_view import render_group, render_step, visible
from dscoder.config.grpo import ProcessConfig
from dscoder.config.task import TaskConfig
from dscoder.runtime.artifact import read_manifest
from dscoder.tasks.problem import Task
from dscoder.train.rollout import RolloutStep, written_steps
from tests.train.grpo_stand_in import Letters, rollout, save_policy

PLACES = ["--model", "m", "--out", "o"]


def letters(config: TaskConfig) -> Task:
    """A task by its dotted name."""
    return Letters(num_problems=2)


TASK = ["--task.name", f"{__name__}.letters"]


def test_the_defaults_are_those_of_the_paper() -> None:
    config = parse_config(PLACES)
    assert (config.rollout.groups, config.rollout.group_size, config.rollout.max_new_tokens) == (16, 64, 1024)
    assert (config.schedule.max_lr, config.loss.kl, config.update.passes) == (1e-6, 0.04, 1)


def test_words_reach_every_section() -> None:
    words = [*PLACES, "--loss.objective", "dapo", "--loss.clip_high", "0.28", "--rewards.functions"]
    words += ['["tests", "format"]', "--rewards.weights", "[1, 0.1]", "--rewards.format_pattern", "a.b"]
    words += ["--rollout.batch.max_batch", "7", "--update.passes", "2", "--task.asking", "instruct"]
    config = parse_config(words)
    assert (config.loss.objective, config.loss.clip_high, config.update.passes) == ("dapo", 0.28, 2)
    assert config.rewards.weight_of == {"tests": 1.0, "format": 0.1}
    assert (config.rollout.batch.max_batch, config.task.asking) == (7, "instruct")


def test_words_ask_for_process_supervision_and_refreshes() -> None:
    words = [*PLACES, "--reward_model", "r", "--reset_every", "5", "--rewards.process.steps", "sentences"]
    words += ["--rewards.process.outcome", "0.5", "--rewards.refresh.replay_share", "0.2"]
    words += ["--rewards.refresh.loss.kind", "pointwise", "--rewards.refresh.preferences", "p"]
    config = parse_config(words)
    assert config.rewards.process == ProcessConfig(steps="sentences", outcome=0.5)
    refresh = config.rewards.refresh
    assert refresh is not None
    assert (refresh.replay_share, refresh.loss.kind, refresh.preferences) == (0.2, "pointwise", ("p",))
    assert (refresh.schedule.max_lr, refresh.held_out_share) == (2e-5, 0.1)
    assert parse_config(PLACES).rewards.process is None


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("grpo")
    model = save_policy(root)
    words = ["grpo", "--model", str(model), "--out", str(root / "run"), *TASK, "--num-steps", "2"]
    words += ["--rollout.groups", "2", "--rollout.group-size", "3", "--rollout.max-new-tokens", "5"]
    words += ["--num-threads", "1", "--report.tensorboard", "off", "--report.plot", "off"]
    assert main(words) == 0
    assert main(words) == 0  # there is nothing left to do
    return root / "run"


def test_a_run_from_words_leaves_a_model_and_rollouts(finished: Path) -> None:
    manifest = read_manifest(finished, command="grpo")
    assert manifest["counts"]["sequences"] == 12
    assert written_steps(finished) == [1, 2]
    assert (finished / "model" / "config.json").is_file()


def test_rollouts_shows_the_last_step(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rollouts", str(finished)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("step 2  2 groups  6 answers  reward 0")
    assert shown.count("letters p") == 2
    assert "(program: not run)" in shown


def test_rollouts_shows_what_is_asked_for(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rollouts", str(finished), "--steps"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:6] for line in lines] == ["step 1", "step 2"]
    assert main(["rollouts", str(finished), "--step", "1", "--groups", "1", "--answers", "0"]) == 0
    shown = capsys.readouterr().out
    assert "1 more groups; --groups shows more" in shown
    assert "2 more answers" in shown
    assert main(["rollouts", str(finished), "--problem", "p0", "--step", "1"]) == 0
    shown = capsys.readouterr().out
    assert ("letters p0" in shown, "letters p1" in shown) == (True, False)


def test_rollouts_names_what_is_missing(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["rollouts", str(tmp_path)]) == 1
    assert "must be a run of `dscoder grpo`, got one without rollouts" in capsys.readouterr().err
    assert main(["rollouts", str(finished), "--step", "9"]) == 1
    assert "must hold rollouts of step 9" in capsys.readouterr().err


VERDICT = {
    "outcome": "failed",
    "compiler": None,
    "stderr": "Traceback\n" + "x\n" * 20 + "AssertionError",
}


def test_a_group_is_its_best_answer_and_diffs() -> None:
    group = [
        rollout(completion="a\nb\nc", reward=0.5, advantage=0.0),
        rollout(completion="a\nx\nc", reward=0.0, advantage=-1.2247, verdict=VERDICT, detail="failed: no"),
        rollout(
            completion="a\nb\nc\nd",
            reward=1.0,
            advantage=1.2247,
            verdict=VERDICT | {"outcome": "passed"},
            is_passed=True,
        ),
        rollout(reward=None, advantage=None, is_used=False, reason="no_reward", failures={"tests": "hung"}),
    ]
    shown = render_group(group, num_answers=2).plain
    best, worst, left_out = shown.index("answer 3"), shown.index("answer 4"), shown.index("answer 1")
    assert best < worst < left_out
    assert "answer 3  passed  reward 1 (tests 1)  advantage 1.22  2 tokens, eos" in shown
    assert "    a\n    b\n    c\n    d\n" in shown
    assert "left out: no_reward" in shown
    assert "tests: hung" in shown
    assert "    -d\n" in shown
    assert "1 more answers" in shown
    whole = render_group(group, num_answers=3).plain
    assert "    -b\n    +x\n" in whole
    assert "failed: no\n" in whole
    assert "AssertionError\n" in whole
    assert "Traceback" not in whole  # the last lines alone


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
    shown = render_group(group, num_answers=1).plain
    # The one whose steps count more comes first, whatever its answer is worth.
    assert shown.index("answer 2") < shown.index("answer 1")
    head = "reward 0.5 (process.f 0.5)  advantage 1\n"
    assert f"    step 1  {head}    a\n    step 2  {head}    c\n" in shown
    assert "    -c\n" in shown
    assert "    step 2  reward 0.5 (process.f 0.5)  advantage -1\n" in shown
    assert "advantage 0.7" not in shown
    assert "(tests 1  process.f 0.5)" in render_step(1, group).plain


@pytest.mark.parametrize(
    ("is_passed", "outcome", "shown"),
    [
        (True, "passed", "passed  reward"),
        (False, "passed", "failed (program: passed)  reward"),
        (False, "failed", "failed  reward"),
        (False, "time_limit", "failed (program: time_limit)  reward"),
        (None, "sandbox_error", "not judged (program: sandbox_error)  reward"),
    ],
)
def test_an_answer_is_headed_by_its_grade(is_passed: bool | None, outcome: str, shown: str) -> None:
    found = render_group(
        [rollout(is_passed=is_passed, verdict=VERDICT | {"outcome": outcome})], num_answers=0
    )
    assert f"answer 1  {shown}" in found.plain
    green = [str(span.style) for span in found.spans if "green" in str(span.style)]
    assert bool(green) == bool(is_passed)


def test_a_step_is_one_line() -> None:
    line = render_step(
        7,
        [
            rollout(reward=1.0, rewards={"tests": 1.0, "format": None}),
            rollout(reward=None, rewards={"tests": None, "format": None}, reason="no_reward", is_used=False),
        ],
    ).plain
    assert line == ("step 7  1 groups  2 answers  reward 1  (format -  tests 1)  left out: no_reward 1")


def test_what_a_model_wrote_does_not_steer_the_terminal() -> None:
    assert visible("a\x1b[31mb\r\tc\n") == "a\\x1b[31mb\\x0d\tc\n"
    group = [rollout(completion="[bold]\x1b]0;title\x07[/bold]")]
    assert "[bold]\\x1b]0;title\\x07[/bold]" in render_group(group, num_answers=1).plain


def test_rollouts_are_json_lines(finished: Path) -> None:
    lines = (finished / "rollouts" / "step-000001.jsonl").read_text(encoding="utf-8").splitlines()
    record = json.loads(lines[0])
    wanted = {"step", "problem", "prompt", "prompt_ids", "completion", "completion_ids", "logprobs"}
    wanted |= {"finish_reason", "verdict", "rewards", "reward", "advantage", "is_used", "reason"}
    assert wanted <= set(record)
    assert len(lines) == 6
