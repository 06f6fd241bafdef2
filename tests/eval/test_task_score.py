"""Scoring a model on a task: who is asked what, what counts, and what is left out."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from dscoder.checkpoint import load_pretrained
from dscoder.config.evaluate import TaskScoreConfig
from dscoder.config.generate import EngineConfig
from dscoder.eval import task_score
from dscoder.eval.task_score import PASS_RATE, Answered, answer_task, score_of, watch
from dscoder.infer.engine import Engine
from dscoder.runtime.artifact import read_json, read_manifest
from dscoder.sandbox.pool import Pool
from dscoder.sandbox.verdict import Limits, Verdict
from dscoder.tasks.problem import Grade, Problem, Task, graded, not_judged
from dscoder.testing.tiny_sft import tiny_base
from dscoder.text.tokenizer import Tokenizer


class Even(Task):
    """Passed are answers of an even number of characters; nobody can tell of the last problem's."""

    name = "even"
    limits = Limits()

    def __init__(self, num_problems: int = 3, *, is_judged: bool = True) -> None:
        self._is_judged = is_judged
        self.graded: Counter[tuple[str, str]] = Counter()
        self._problems = [
            Problem(task="even", id=str(i), prompt=f"What is {i}?", max_new_tokens=5)
            for i in range(num_problems)
        ]

    def problems(self) -> Sequence[Problem]:
        return self._problems

    def program(self, problem: Problem, completion: str) -> None:
        self.graded[problem.id, completion] += 1
        return None

    def grade(self, problem: Problem, completion: str, verdict: Verdict | None) -> Grade:
        if not self._is_judged or problem is self._problems[-1]:
            return not_judged("nobody can tell")
        return graded(len(completion) % 2 == 0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("model"))


@pytest.fixture
def config(model: Path, tmp_path: Path) -> TaskScoreConfig:
    return TaskScoreConfig(
        out=str(tmp_path / "out"), model=str(model), num_samples=6, num_threads=1, device="cpu"
    )


def answered(problem: str, *passed: bool | None) -> Answered:
    return Answered(problem=problem, texts=("",) * len(passed), passed=passed)


def test_the_greedy_answer_and_the_draws_are_counted_apart() -> None:
    score = score_of([answered("a", True, False, False), answered("b", False, True, False)])
    assert score.greedy is not None
    assert score.sampled is not None
    assert (score.greedy.mean, score.sampled.mean) == (0.5, 0.25)
    assert (score.num_problems, score.num_answers, score.num_not_judged) == (2, 6, 0)


def test_what_nobody_could_judge_is_left_out_and_counted() -> None:
    score = score_of([answered("a", None, True, None, False), answered("b", True, None, None, None)])
    assert score.greedy is not None
    assert score.sampled is not None
    assert (score.greedy.mean, score.sampled.mean) == (1.0, 0.5)
    assert score.num_not_judged == 5
    nothing = score_of([answered("a", None, None)])
    assert (nothing.greedy, nothing.sampled) == (None, None)


def test_every_problem_gets_one_greedy_answer_and_so_many_draws(config: TaskScoreConfig) -> None:
    task = Even()
    engine = Engine.load(EngineConfig(model=config.model, device="cpu"))
    with Pool(num_workers=1) as pool:
        found = answer_task(engine, task, pool, config)
        again = answer_task(engine, Even(), pool, config)
        greedy = answer_task(engine, Even(), pool, replace(config, seed=1))
    assert [item.problem for item in found] == ["0", "1", "2"]
    assert all(len(item.texts) == len(item.passed) == 7 for item in found)
    assert found == again
    assert [item.texts[0] for item in greedy] == [item.texts[0] for item in found]
    assert [item.texts[1:] for item in greedy] != [item.texts[1:] for item in found]
    for item in found[:2]:
        assert item.passed == tuple(len(text) % 2 == 0 for text in item.texts)
    assert found[2].passed == (None,) * 7
    assert set(task.graded.values()) == {1}  # what was answered before is not judged again


def test_a_stage_writes_figures_and_answers_and_is_not_done_twice(config: TaskScoreConfig) -> None:
    task = Even()
    out = task_score.run(config, task=task)
    results = read_json(out / task_score.RESULTS)
    items = task_score.read_answered(out)
    assert [item.problem for item in items] == ["0", "1", "2"]
    score = score_of(items)
    assert score.sampled is not None
    assert results["score"]["sampled"]["mean"] == score.sampled.mean
    manifest = read_manifest(out, command="task-score")
    assert manifest["counts"] == {"problems": 3, "answers": 21}
    assert manifest["dropped"] == {"not_judged": 7}
    fresh = Even()
    assert task_score.run(config, task=fresh) == out
    assert not fresh.graded
    with pytest.raises(ValueError, match="was made by another config"):
        task_score.run(replace(config, num_samples=2), task=task)


def test_a_sandbox_that_judges_nothing_is_an_error(config: TaskScoreConfig) -> None:
    with pytest.raises(RuntimeError, match="no answer to the 3 problems of even could be judged"):
        task_score.run(config, task=Even(is_judged=False))


def test_a_model_can_be_watched_while_it_is_trained(config: TaskScoreConfig) -> None:
    tokenizer = Tokenizer.load(config.model)
    model = load_pretrained(config.model)
    with Pool(num_workers=1) as pool:
        figures = watch(Even(), tokenizer, pool, config)(model)
        assert watch(Even(is_judged=False), tokenizer, pool, config)(model) == {}
    found = score_of(task_score.read_answered(task_score.run(config, task=Even()))).sampled
    assert found is not None
    assert figures == {
        PASS_RATE: found.mean,
        f"{PASS_RATE}_low": found.low,
        f"{PASS_RATE}_high": found.high,
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_samples": 0}, "num_samples must be >= 1, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be >= 1, got 0"),
        ({"num_threads": 0}, "num_threads must be >= 1, got 0"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
    ],
)
def test_settings_that_measure_nothing_are_refused(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=f"TaskScoreConfig: {message}"):
        TaskScoreConfig(out="out", model="model", **fields)  # type: ignore[arg-type]
