"""The stage that asks a model all problems of a task, runs its answers and counts those that pass.

Each problem is answered greedily once and by `num_samples` draws. results.json holds the two shares with
their intervals (docs in `pass_at_k.py`: Wilson's for the greedy answers, a bootstrap over problems for the
draws), and every answer with its grade. An answer that nobody could judge is no wrong one: it is left out of
the shares and counted.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dscoder.config.evaluate import TaskScoreConfig
from dscoder.config.generate import GREEDY, EngineConfig, SamplingConfig
from dscoder.eval.pass_at_k import Interval, bootstrap_interval, pass_at_k, wilson_interval
from dscoder.infer.engine import Engine
from dscoder.models import Transformer
from dscoder.runtime.artifact import open_stage, read_json, write_json
from dscoder.runtime.log import get_logger
from dscoder.runtime.seed import available_threads, derive_seed, deterministic
from dscoder.sandbox.pool import Pool
from dscoder.tasks.by_name import open_task
from dscoder.tasks.problem import Grade, Task
from dscoder.text.tokenizer import Tokenizer
from dscoder.train.candidates import hash_problems
from dscoder.train.explore import Judge, Pending, Question, make_questions
from dscoder.train.prompts import PromptEncoder
from dscoder.train.run import hash_model

COMMAND = "task-score"
RESULTS = "results.json"
PASS_RATE = "pass_at_1"  # of a run that is watched
_LOG = get_logger(__name__)

Look = Callable[[Transformer], dict[str, float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Answered:
    """A problem with its answers: the greedy one, then those that were drawn."""

    problem: str
    texts: tuple[str, ...]
    passed: tuple[bool | None, ...]  # None: not judged

    @property
    def pass_rate(self) -> float | None:
        """pass@1 of the draws; None if none was judged."""
        judged = [passed for passed in self.passed[1:] if passed is not None]
        return pass_at_k(len(judged), sum(judged)) if judged else None


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskScore:
    """The figures over all problems.

    Attributes:
        sampled: pass@1 of the draws; None if nobody could judge any.
        greedy: share of greedy answers that pass; None likewise.
    """

    sampled: Interval | None
    greedy: Interval | None
    num_problems: int
    num_answers: int
    num_not_judged: int


def score_of(answered: Sequence[Answered]) -> TaskScore:
    """The figures of all problems together."""
    rates = [item.pass_rate for item in answered]
    known = [rate for rate in rates if rate is not None]
    greedy = [item.passed[0] for item in answered if item.passed[0] is not None]
    grades = [passed for item in answered for passed in item.passed]
    return TaskScore(
        sampled=bootstrap_interval(known) if known else None,
        greedy=wilson_interval(sum(greedy), len(greedy)) if greedy else None,
        num_problems=len(answered),
        num_answers=len(grades),
        num_not_judged=sum(passed is None for passed in grades),
    )


def answer_task(engine: Engine, task: Task, pool: Pool, config: TaskScoreConfig) -> list[Answered]:
    """All problems answered and judged; programs run while the engine writes on.

    Draws follow from the problem, the number of the answer and the seed: a better model of the same seed
    differs by its weights alone.
    """
    encoder = PromptEncoder(
        tokenizer=engine.tokenizer,
        max_positions=engine.max_positions,
        template=config.template,
        fim_order=config.fim_order,
    )
    questions = make_questions(task, encoder, max_new_tokens=config.max_new_tokens)
    size = config.num_samples + 1
    requests = [
        replace(question.request, keep_logprobs=False, sampling=_sampling(question, number, config))
        for question in questions
        for number in range(size)
    ]
    judge = Judge(task, pool)
    known: dict[tuple[int, str], Pending] = {}  # what was answered before is not run again
    found: dict[int, tuple[str, Pending]] = {}
    for event in engine.stream(requests):
        if event.completion is None:
            continue
        text, place = event.completion.text, event.request_idx // size
        if (place, text) not in known:
            known[place, text] = judge.submit(questions[place].problem, text)
        found[event.request_idx] = text, known[place, text]
    return [
        _answered(question, [found[place * size + number] for number in range(size)], judge)
        for place, question in enumerate(questions)
    ]


def _sampling(question: Question, number: int, config: TaskScoreConfig) -> SamplingConfig:
    if number == 0:
        return GREEDY
    seed = derive_seed("task_score", config.seed, question.problem.id, number)
    return SamplingConfig(temperature=config.temperature, top_p=config.top_p, seed=seed)


def _answered(question: Question, answers: Sequence[tuple[str, Pending]], judge: Judge) -> Answered:
    grades: list[Grade] = [judge.grade(question.problem, text, pending) for text, pending in answers]
    return Answered(
        problem=question.problem.id,
        texts=tuple(text for text, _ in answers),
        passed=tuple(grade.is_passed for grade in grades),
    )


def watch(task: Task, tokenizer: Tokenizer, pool: Pool, config: TaskScoreConfig) -> Look:
    """An evaluation hook for training: pass@1 of the draws, with its interval, as figures of the run.

    Where nothing could be judged there is no figure, which is not 0.
    """

    def look(model: Transformer) -> dict[str, float]:
        engine = Engine(model, tokenizer, batch=config.batch)
        rate = score_of(answer_task(engine, task, pool, config)).sampled
        if rate is None:
            return {}
        return {PASS_RATE: rate.mean, PASS_RATE + "_low": rate.low, PASS_RATE + "_high": rate.high}

    return look


def read_answered(directory: Path) -> list[Answered]:
    """The answers that the finished stage in `directory` holds."""
    records = read_json(directory / RESULTS)["problems"]
    return [
        Answered(problem=record["problem"], texts=tuple(record["texts"]), passed=tuple(record["passed"]))
        for record in records
    ]


def run(config: TaskScoreConfig, *, task: Task | None = None) -> Path:
    """Ask, judge and write results.json to `config.out`; returns that directory.

    Args:
        task: in place of the one that `config.task` names.

    Raises:
        ValueError: model and task do not go together, or the directory holds something else.
        RuntimeError: the sandbox could judge nothing.
    """
    asked = task or open_task(config.task)
    with open_stage(
        Path(config.out),
        command=COMMAND,
        config=asdict(config),
        inputs={"model": hash_model(config.model), "problems": hash_problems(asked.problems())},
        free=("out", "model", "task", "num_workers", "overwrite"),
        overwrite=config.overwrite,
    ) as stage:
        if stage.is_finished:
            _LOG.info("%s is finished already", stage.directory)
            return stage.directory
        answered = _ask_model(config, asked)
        score = score_of(answered)
        if score.sampled is None or score.greedy is None:
            raise RuntimeError(
                f"task-score: no answer to the {score.num_problems} problems of {asked.name} could be judged"
            )
        record: dict[str, Any] = {"score": asdict(score), "problems": [asdict(item) for item in answered]}
        write_json(stage.directory / RESULTS, record)
        stage.finish(
            counts={"problems": score.num_problems, "answers": score.num_answers},
            dropped={"not_judged": score.num_not_judged},
            facts={"sampled": score.sampled.mean, "greedy": score.greedy.mean},
        )
        _LOG.info("%s: pass@1 %.3f, greedy %.3f", stage.directory, score.sampled.mean, score.greedy.mean)
        return stage.directory


def _ask_model(config: TaskScoreConfig, task: Task) -> list[Answered]:
    num_threads = config.num_threads or available_threads()
    with (
        deterministic(seed=config.seed, num_threads=num_threads),
        Pool(num_workers=config.num_workers, isolation=config.isolation) as pool,
    ):
        engine = Engine.load(
            EngineConfig(model=config.model, dtype=config.dtype, device=config.device, batch=config.batch)
        )
        return answer_task(engine, task, pool, config)
