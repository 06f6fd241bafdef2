"""`dscoder demo --align`: all stages with everything small, the same twice, and nothing done twice."""

import json
import shutil
from pathlib import Path

import pytest

from dscoder.cli.main import main
from dscoder.config.align_demo import SIGNALS, AlignDemoConfig
from dscoder.runtime.artifact import MANIFEST
from dscoder.sandbox.run import run
from dscoder.sandbox.verdict import Program

STAGES = (
    *("problems", "tokenizer", "data", "pretrain", "sft", "validation_sft", "preferences", "reward_model"),
    *("grpo_tests", "grpo_reward_model", "test_sft", "test_grpo_tests", "test_grpo_reward_model"),
)
# Single tests of practised problems, and enough of these that some answers pass and others do not.
SMALL = {
    "problems.documents": 2000,
    "problems.dialogues": 300,
    "problems.practised": 24,
    "problems.validation": 3,
    "problems.test": 4,
    "problems.few_tests": 1,
    "problems.many_tests": 3,
    "model.vocab_size": 704,
    "model.width": 64,
    "model.mlp_width": 96,
    "pretrain.num_steps": 140,
    "pretrain.schedule.warmup_steps": 5,
    "pretrain.schedule.max_lr": 0.01,
    "sft.num_steps": 40,
    "sft.schedule.warmup_steps": 2,
    "sft.schedule.max_lr": 0.004,
    "reward.num_steps": 2,
    "num_asked": 24,
    "num_candidates": 8,
    "policy.num_steps": 2,
    "policy.rollout.groups": 2,
    "policy.rollout.group_size": 4,
    "num_samples": 2,
    "num_watched": 2,
    "watch_every": 1,
    "num_threads": 1,
}


def words(out: Path, **fields: object) -> list[str]:
    options = {"out": out, **SMALL, **fields}
    return ["demo", "--align", *(word for key, value in options.items() for word in (f"--{key}", str(value)))]


def learnt(out: Path) -> dict[str, str]:
    """What each stage made, by its hash."""
    return {stage: json.loads((out / stage / MANIFEST).read_text())["result"] for stage in STAGES}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    verdict = run(Program(source="pass"))
    if not verdict.is_answer:
        pytest.skip(f"no sandbox here: {verdict.detail}")
    out = tmp_path_factory.mktemp("align") / "out"
    assert main(words(out)) == 0
    return out


@pytest.mark.slow
def test_the_demo_leaves_figures_of_every_model(out: Path) -> None:
    results = json.loads((out / "results.json").read_text())
    assert list(results["scores"]) == ["sft", "grpo_tests", "grpo_reward_model"]
    for score in results["scores"].values():
        assert (score["num_problems"], score["num_answers"], score["num_not_judged"]) == (4, 12, 0)
        for rate in (score["sampled"], score["greedy"]):
            assert 0 <= rate["low"] <= rate["mean"] <= rate["high"] <= 1
    assert list(results["gains"]) == [
        "sft to grpo_tests",
        "sft to grpo_reward_model",
        "grpo_tests to grpo_reward_model",
    ]
    for curve in results["curves"].values():
        assert curve["steps"] == [0, 1, 2]
        assert len(curve["rates"]) == 3


@pytest.mark.slow
def test_both_signals_learn_from_the_same_start_and_problems(out: Path) -> None:
    by_signal = [json.loads((out / f"grpo_{signal}" / MANIFEST).read_text()) for signal in SIGNALS]
    tests, reward_model = (manifest["inputs"] for manifest in by_signal)
    assert set(reward_model) - set(tests) == {"reward_model"}
    assert all(reward_model[name] == tests[name] for name in tests)
    drawn = [(out / f"grpo_{signal}" / "rollouts" / "step-000001.jsonl").read_text() for signal in SIGNALS]
    first, second = ([json.loads(line)["completion"] for line in text.splitlines()] for text in drawn)
    assert first == second  # the same answers, before anything was learnt


@pytest.mark.slow
def test_a_run_that_is_started_again_shows_the_same_and_trains_nothing(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {stage: (out / stage / MANIFEST).stat().st_mtime_ns for stage in STAGES}
    results = (out / "results.json").read_bytes()
    assert main(words(out)) == 0
    shown = capsys.readouterr().out
    assert {stage: (out / stage / MANIFEST).stat().st_mtime_ns for stage in STAGES} == before
    assert (out / "results.json").read_bytes() == results
    assert "raw tests" in shown
    assert "reward model against raw tests" in shown
    assert "Write solve(" in shown


@pytest.mark.slow
def test_stages_that_are_missing_are_made_again_bit_for_bit(out: Path) -> None:
    before, results = learnt(out), (out / "results.json").read_bytes()
    for stage in STAGES[STAGES.index("preferences") :]:
        shutil.rmtree(out / stage)
    assert main(words(out)) == 0
    assert learnt(out) == before
    assert (out / "results.json").read_bytes() == results


def test_the_verb_has_a_help_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "--align", "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert "dscoder demo --align" in shown
    assert "--policy.rollout.group_size" in shown
    with pytest.raises(SystemExit):
        main(["demo", "--help"])
    assert "dscoder demo --align --help" in capsys.readouterr().out


def test_an_option_of_the_other_demo_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "--align", "--num_holes", "3"])
    assert stopped.value.code == 2
    assert "num_holes" in capsys.readouterr().err


def test_a_number_that_cannot_be_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--align", "--problems.test", "0"]) == 1
    assert "ProblemCounts: test must be >= 1, got 0" in capsys.readouterr().err


def test_the_stages_of_the_demo_fit_together() -> None:
    config = AlignDemoConfig()
    tests, reward_model = (config.grpo(signal) for signal in SIGNALS)
    assert (tests.seed, tests.num_steps, tests.rollout) == (
        reward_model.seed,
        reward_model.num_steps,
        reward_model.rollout,
    )
    assert config.prefer().task == tests.task == reward_model.task
    assert config.prefer().task != config.score("sft", "test").task
    assert config.reward_model().preferences == (config.prefer().out,)
    assert config.reward_model().loss == config.reward_loss
    # GRPO asks nothing of which the reward model saw no candidates.
    assert config.num_asked == config.problems.practised
    assert config.prepare().window == config.sft_run().examples.window == config.model.max_positions
    assert config.tokenizer().vocab_size == config.model.vocab_size
