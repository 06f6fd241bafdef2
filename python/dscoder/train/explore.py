"""Exploration: sample groups of answers, have their programs run, reward them and compare them.

While the sampler writes the next answers, the sandboxes run the programs of those that are done, and reward
functions score the groups that are complete. What comes out depends on the policy's weights, the seed and the
place among the problems alone, as far as verdicts and reward functions do.
"""

import random
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

from dscoder.config.grpo import GrpoConfig
from dscoder.infer.engine import Engine
from dscoder.infer.request import Completion, Request
from dscoder.runtime.log import get_logger
from dscoder.runtime.seed import derive_seed
from dscoder.sandbox.pool import Pool
from dscoder.sandbox.verdict import Verdict
from dscoder.tasks.problem import Grade, Problem, Task, not_judged
from dscoder.train.advantage import Credit, group_advantages, step_credits
from dscoder.train.prompts import PromptEncoder, PromptTooLongError
from dscoder.train.reward import Answer, RewardBatch, Rewards, Score
from dscoder.train.rollout import Reason, Rollout, RolloutStep, verdict_record
from dscoder.train.steps import StepCutter, Steps

# A verdict to come, or a grade that needs none.
Pending = Future[Verdict] | Grade
_LOG = get_logger(__name__)


class Sampler(Protocol):
    """What writes answers, by the weights that the policy has at the time of the call.

    An engine over the same model has them anyway; one elsewhere takes them from the model at the beginning of
    `sample`, which is called once a round, between updates.
    """

    def sample(self, requests: Sequence[Request]) -> Iterator[tuple[int, Completion]]:
        """(index of the request, its completion), as they end; every completion has its log-probabilities."""
        ...


class EngineSampler:
    """Our own engine over the model that is trained: weights are handed over by being the same tensors."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def sample(self, requests: Sequence[Request]) -> Iterator[tuple[int, Completion]]:
        """As `Sampler` says."""
        for event in self._engine.stream(requests):
            if event.completion is not None:
                yield event.request_idx, event.completion


def _awaited(pending: Future[Verdict]) -> Verdict | Grade:
    """The verdict to come; where the sandbox failed instead, a grade that says so."""
    try:
        error = pending.exception()
    except CancelledError:
        return not_judged("the program was called off")
    # Whatever it is that was raised elsewhere, it is not to end this thread.
    return pending.result() if error is None else not_judged(f"the sandbox raised: {error!r}")


class Judge:
    """Grades answers by a task's rules; what goes wrong on the way is no answer, never a wrong one."""

    def __init__(self, task: Task, pool: Pool) -> None:
        self._task = task
        self._pool = pool
        self._told: set[str] = set()  # kinds of failure that the log has already
        self._lock = threading.Lock()  # of `_told`: groups are graded by several threads at once

    def submit(self, problem: Problem, completion: str) -> Pending:
        """Have the answer's program run; the grade at once if there is nothing to run."""
        try:
            program = self._task.program(problem, completion)
        except Exception as error:
            return not_judged(f"the task could not make a program: {error!r}")
        if program is None:
            return self._grade(problem, completion, None)
        try:
            return self._pool.submit(program, self._task.limits)
        except Exception as error:
            return not_judged(f"the sandbox took no program: {error!r}")

    def grade(self, problem: Problem, completion: str, pending: Pending) -> Grade:
        """What the answer is worth; waits for the verdict."""
        found = pending if isinstance(pending, Grade) else _awaited(pending)
        grade = found if isinstance(found, Grade) else self._grade(problem, completion, found)
        if grade.is_passed is None:
            self._tell(problem, f"was not judged ({grade.detail})")
        elif grade.is_suspect and grade.score:
            self._tell(problem, f"is suspect: it may have cheated its tests ({grade.detail or 'passed'})")
        return grade

    def _tell(self, problem: Problem, what: str) -> None:
        """Warn of each kind of answer without a reward once."""
        kind = what.partition(":")[0]
        with self._lock:
            is_known = kind in self._told
            self._told.add(kind)
        if not is_known:
            _LOG.warning("an answer to %s %s; it has no reward", problem.id, what)

    def cancel(self) -> None:
        """Call off what runs and waits: a verdict to come is then CancelledError or "sandbox_error"."""
        self._pool.cancel()

    def _grade(self, problem: Problem, completion: str, verdict: Verdict | None) -> Grade:
        try:
            return self._task.grade(problem, completion, verdict)
        except Exception as error:
            return not_judged(f"the task could not grade: {error!r}", verdict=verdict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A problem as the model is asked it."""

    problem: Problem
    text: str
    request: Request


def make_questions(task: Task, encoder: PromptEncoder, *, max_new_tokens: int) -> list[Question]:
    """The problems of a task as requests that keep log-probabilities, each with a seed of 0.

    Problems whose prompts leave no room for an answer are left out; ValueError if that leaves none.
    """
    questions = []
    problems, reason = task.problems(), ""
    for problem in problems:
        most = min(problem.max_new_tokens, max_new_tokens)
        prompt = encoder.prompt_of(task, problem, max_new_tokens=most)
        try:
            request = encoder.request(prompt)
        except PromptTooLongError as error:
            reason = f"{problem.id}: {error}"
            continue
        request = replace(request, keep_logprobs=True)
        questions.append(Question(problem=problem, text=prompt.text, request=request))
    if not questions:
        raise ValueError(
            f"grpo: some of the {len(problems)} problems of {task.name} must leave room for an answer, got "
            f"none that does ({reason or 'there are none'})"
        )
    if reason:
        _LOG.warning("%d problems are left out (%s)", len(problems) - len(questions), reason)
    return questions


@dataclass(frozen=True, kw_only=True, slots=True)
class Exploration:
    """The answers of one step.

    Attributes:
        next_position: among the problems, for the next step.
        num_rounds: draws of problems it took.
        sampling: seconds that the sampler took; `waiting`: seconds after it for verdicts and rewards.
    """

    rollouts: Sequence[Rollout]
    next_position: int
    num_rounds: int
    sampling: float
    waiting: float


_Judged = tuple[Completion, Pending]


class Explorer:
    """Makes the rollouts of a run."""

    def __init__(
        self,
        questions: Sequence[Question],
        *,
        sampler: Sampler,
        judge: Judge,
        rewards: Rewards,
        config: GrpoConfig,
        cutter: StepCutter | None = None,
    ) -> None:
        """`cutter`: of answers into steps, under process supervision."""
        self._cutter = cutter
        self._questions = questions
        self._sampler = sampler
        self._judge = judge
        self._rewards = rewards
        self._config = config
        self._epoch, self._order = -1, [0]

    def question_at(self, position: int) -> Question:
        """The one at a place in an endless sequence of shuffled epochs."""
        epoch, place = divmod(position, len(self._questions))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, list(range(len(self._questions)))
            random.Random(derive_seed("problems", self._config.seed, epoch)).shuffle(self._order)
        return self._questions[self._order[place]]

    def explore(self, step: int, position: int) -> Exploration:
        """The rollouts of step `step` (from 1), whose first problem is at `position`.

        Under dynamic sampling further problems take the place of groups that teach nothing, until there are
        enough or the rounds are used up.
        """
        wanted = self._config.rollout.groups
        groups: list[list[Rollout]] = []
        num_rounds, sampling, waiting = 0, 0.0, 0.0
        while num_rounds < self._config.rollout.max_rounds:
            missing = wanted - sum(any(rollout.is_used for rollout in group) for group in groups)
            if missing == 0:
                break
            began = time.perf_counter()
            found, seconds = self._round(step, range(position, position + missing), first=len(groups))
            groups += found
            sampling += seconds
            waiting += time.perf_counter() - began - seconds
            position += missing
            num_rounds += 1
        return Exploration(
            rollouts=[rollout for group in groups for rollout in group],
            next_position=position,
            num_rounds=num_rounds,
            sampling=sampling,
            waiting=waiting,
        )

    def _round(self, step: int, positions: range, *, first: int) -> tuple[list[list[Rollout]], float]:
        """The groups of the questions at `positions`, judged while the sampler writes, and its seconds."""
        size, seed = self._config.rollout.group_size, self._config.seed
        questions = [self.question_at(position) for position in positions]
        requests = [
            replace(
                question.request,
                sampling=self._config.rollout.sampling(seed=derive_seed("rollout", seed, position, number)),
            )
            for position, question in zip(positions, questions, strict=True)
            for number in range(size)
        ]
        began = time.perf_counter()
        judged: dict[int, _Judged] = {}
        known: dict[tuple[int, str], Pending] = {}  # what a group wrote before is not run again
        futures: dict[int, Future[list[Rollout]]] = {}
        with self._scorers() as scorers:
            for request_idx, completion in self._sampler.sample(requests):
                group = request_idx // size
                key = group, completion.text
                if key not in known:
                    known[key] = self._judge.submit(questions[group].problem, completion.text)
                judged[request_idx] = completion, known[key]
                members = range(group * size, group * size + size)
                if all(idx in judged for idx in members):
                    futures[group] = scorers.submit(
                        self._score, step, first + group, questions[group], [judged[idx] for idx in members]
                    )
            missing = len(requests) - len(judged)
            if missing:
                raise ValueError(
                    f"grpo: a sampler must complete all {len(requests)} requests, got none for {missing}"
                )
            seconds = time.perf_counter() - began
        return [futures[group].result() for group in range(len(questions))], seconds

    @contextmanager
    def _scorers(self) -> Iterator[ThreadPoolExecutor]:
        """Threads that score groups; if sampling fails, they wait for no program that nobody asks about."""
        with ThreadPoolExecutor(self._config.rollout.num_scorers, thread_name_prefix="score") as scorers:
            try:
                yield scorers
            except BaseException:
                scorers.shutdown(wait=False, cancel_futures=True)
                self._judge.cancel()
                raise

    def _score(self, step: int, group: int, question: Question, judged: Sequence[_Judged]) -> list[Rollout]:
        problem = question.problem
        cuts = [self._cut(completion) for completion, _ in judged]
        answers = tuple(
            Answer(
                problem=problem,
                prompt=question.text,
                completion=completion.text,
                tokens=completion.tokens,
                finish_reason=completion.finish_reason,
                max_tokens=question.request.max_new_tokens,
                grade=self._judge.grade(problem, completion.text, pending),
                steps=cut.texts(completion.text),
            )
            for (completion, pending), cut in zip(judged, cuts, strict=True)
        )
        scores = self._rewards.score(RewardBatch(answers=answers))
        credits = self._credits(scores, cuts)
        return [
            self._rollout(step, group, question, completion, (answer, score, credit, cut))
            for (completion, _), answer, score, credit, cut in zip(
                judged, answers, scores, credits, cuts, strict=True
            )
        ]

    def _cut(self, completion: Completion) -> Steps:
        return Steps() if self._cutter is None else self._cutter.cut(completion.text, completion.tokens)

    def _credits(self, scores: Sequence[Score], cuts: Sequence[Steps]) -> list[Credit]:
        kind, process = self._config.advantage, self._config.rewards.process
        outcomes = group_advantages([score.reward for score in scores], kind=kind)
        if process is None:
            return [Credit(outcome=value, reason=outcomes.reason) for value in outcomes.values]
        return step_credits(
            [score.steps for score in scores],
            [cut.ends for cut in cuts],
            outcomes,
            outcome_weight=process.outcome,
            kind=kind,
        )

    def _rollout(
        self,
        step: int,
        group: int,
        question: Question,
        completion: Completion,
        found: tuple[Answer, Score, Credit, Steps],
    ) -> Rollout:
        answer, score, credit, cut = found
        reason = credit.reason or self._own_reason(answer, score, credit)
        verdict = None if answer.grade is None else answer.grade.verdict
        if completion.logprobs is None:
            raise ValueError("grpo: a sampler must give the log-probabilities of its tokens, got none")
        return Rollout(
            step=step,
            group=group,
            task=answer.problem.task,
            problem=answer.problem.id,
            prompt=question.text,
            prompt_ids=question.request.prompt,
            completion=answer.completion,
            completion_ids=answer.tokens,
            logprobs=completion.logprobs,
            finish_reason=answer.finish_reason,
            verdict=None if verdict is None else verdict_record(verdict),
            detail="" if answer.grade is None else answer.grade.detail,
            rewards=score.rewards,
            failures=score.reasons,
            reward=score.reward,
            advantage=credit.outcome,
            is_used=not reason,
            reason=reason,
            is_passed=None if answer.grade is None else answer.grade.is_passed,
            score=None if answer.grade is None else answer.grade.score,
            is_suspect=answer.grade is not None and answer.grade.is_suspect,
            steps=tuple(
                RolloutStep(
                    end=end,
                    text_end=text_end,
                    rewards={name: values[idx] for name, values in score.step_rewards.items()},
                    reward=score.steps[idx],
                    advantage=credit.steps[idx] if credit.steps else None,
                )
                for idx, (end, text_end) in enumerate(zip(cut.ends, cut.text_ends, strict=True))
            ),
        )

    def _own_reason(self, answer: Answer, score: Score, credit: Credit) -> Reason:
        if not answer.tokens:
            return "empty"
        if answer.is_withheld:
            return "suspect"
        if score.reward is None if self._cutter is None else not credit.steps:
            return "no_reward"
        is_masked = answer.is_truncated and self._config.rollout.mask_truncated
        return "truncated" if is_masked else ""
