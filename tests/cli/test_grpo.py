"""The words of `dscoder grpo`, a run from them, and what `dscoder rollouts` shows of it."""

import json
from pathlib import Path

import pytest

from dscoder.cli.grpo import parse_config
from dscoder.cli.main import main
from dscoder.config.grpo import ProcessConfig
from dscoder.config.task import TaskConfig
from dscoder.runtime.artifact import read_manifest
from dscoder.tasks.problem import Task
from dscoder.train.rollout import written_steps
from tests.train.grpo_stand_in import Letters, save_policy

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
    assert shown.startswith("step 2  2 groups  6 answers  ")
    assert shown.count("letters p") == 2
    assert "(program: not run)" in shown
    assert main(["rollouts", str(finished), "--group", "2", "--answer", "3"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("group 2  letters p")
    assert "answer 3  " in shown
    # The tokenizer is the run's own: tokens are shown, not their ids.
    assert "  least likely tokens\n" in shown
    assert "%  '" in shown


def test_rollouts_are_json_lines(finished: Path) -> None:
    lines = (finished / "rollouts" / "step-000001.jsonl").read_text(encoding="utf-8").splitlines()
    record = json.loads(lines[0])
    wanted = {"step", "problem", "prompt", "prompt_ids", "completion", "completion_ids", "logprobs"}
    wanted |= {"finish_reason", "verdict", "rewards", "reward", "advantage", "is_used", "reason"}
    assert wanted <= set(record)
    assert len(lines) == 6
