"""The reward model of a GRPO run, and how it follows the policy (DeepSeekMath section 4.1.4, Algorithm 1).

At a reset the rollouts since the last one become preferences, by the verdicts they have already, and the
reward model learns on from its weights, with a share of what it learnt before among them:

    refresh/step-000100/preferences/    graded.jsonl and pairs.jsonl, as `dscoder prefer` leaves them
    refresh/step-000100/reward/         a run of `dscoder reward-model`: model/, held_out.json, metrics.jsonl

The learnt model is an artifact in a stage directory of its own and no part of the checkpoints. A reward model
may be as large as the policy, and a checkpoint is written far more often than it changes; what follows from
the rollouts need not be stored twice; and a reset that is killed resumes as every stage does. A run that
goes on from a checkpoint has the model of the last reset before it, and comes to the later resets again:
one that finds the answers and grades it learnt from is done, or goes on where it was; one that finds others
(a program near its time limit) is done anew. So the same rollouts are scored by the same model, bit for bit.

A reset whose rollouts give no pair to learn from, or none that is held out, leaves the model as it is; the
next one learns from its rollouts too.
"""

import hashlib
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch

from dscoder.config.grpo import GrpoConfig
from dscoder.config.reward import RefreshConfig, RewardModelConfig
from dscoder.runtime.artifact import MANIFEST, open_stage, read_json
from dscoder.runtime.log import get_logger
from dscoder.runtime.seed import random_state, restore_random_state
from dscoder.sandbox.verdict import Verdict
from dscoder.tasks.problem import Grade, Problem, Task
from dscoder.train import reward_model
from dscoder.train.candidates import candidate_line
from dscoder.train.pairs import Candidate, NoPairsError, outcome_of, program_key
from dscoder.train.preferences import COMMAND, write_results
from dscoder.train.reward import RewardBatch
from dscoder.train.reward_data import is_held_out_prompt, read_preferences
from dscoder.train.rollout import Rollout, read_rollouts, step_file
from dscoder.train.run import CHECKPOINTS, MODEL
from dscoder.train.scoring import AnswerScorer

REFRESH = "refresh"
PREFERENCES = "preferences"
REWARD = "reward"
_STEP = re.compile(r"step-(\d{6,})")
_LOG = get_logger(__name__)


@contextmanager
def _same_random_state() -> Iterator[None]:
    """What is drawn inside changes nothing outside."""
    state = random_state()
    try:
        yield
    finally:
        restore_random_state(state)


def reset_directory(directory: Path, step: int) -> Path:
    """Where the reset after `step` steps of the run in `directory` leaves what it made."""
    return directory / REFRESH / f"step-{step:06d}"


def done_resets(directory: Path) -> list[int]:
    """The resets of the run in `directory` at which the reward model learnt, by their steps, ascending."""
    folder = directory / REFRESH
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    steps = sorted(int(match[1]) for name in names if (match := _STEP.fullmatch(name)))
    return [step for step in steps if (reset_directory(directory, step) / REWARD / MANIFEST).is_file()]


def _grade(rollout: Rollout) -> Grade:
    """As the task gave it, as far as the rollout tells."""
    verdict = None if rollout.verdict is None else Verdict(outcome=rollout.verdict["outcome"])
    return Grade(
        is_passed=rollout.is_passed,
        score=rollout.score,
        verdict=verdict,
        detail=rollout.detail,
        is_suspect=rollout.is_suspect,
    )


def _key(task: Task, problem: Problem, completion: str) -> str:
    """What tells programs apart; a task that makes none of an answer has said so in its grade."""
    try:
        program = task.program(problem, completion)
    except Exception:
        program = None
    return program_key(program, completion)


def candidates_of(
    task: Task, problems: Mapping[str, Problem], rollouts: Mapping[str, Sequence[Rollout]]
) -> list[list[Candidate]]:
    """The rollouts of each problem as candidates that were judged; `rollouts` by the name of their file."""
    groups: dict[str, list[Candidate]] = {}
    for source, of_step in rollouts.items():
        for idx, rollout in enumerate(of_step):
            problem, grade = problems[rollout.problem], _grade(rollout)
            candidate = Candidate(
                problem=problem.id,
                form=problem.form,
                prompt=rollout.prompt,
                suffix=problem.suffix,
                source=source,
                idx=idx,
                completion=rollout.completion,
                finish_reason=rollout.finish_reason,
                program=_key(task, problem, rollout.completion),
                outcome=outcome_of(grade),
                score=grade.score,
                detail=grade.detail,
                is_suspect=grade.is_suspect,
            )
            groups.setdefault(problem.id, []).append(candidate)
    return list(groups.values())


def _hash_candidates(groups: Sequence[Sequence[Candidate]]) -> str:
    """sha256 of what preferences follow from: not of times, which no two runs have in common."""
    digest = hashlib.sha256()
    for candidate in (candidate for group in groups for candidate in group):
        digest.update(candidate_line(replace(candidate, detail="", verdict=None)).encode())
    return digest.hexdigest()


def write_preferences(
    directory: Path, run: Path, steps: Sequence[int], *, task: Task, config: RefreshConfig, seed: int
) -> None:
    """Make preferences of the rollouts of some steps, or find them made; NoPairsError if none differ."""
    problems = {problem.id: problem for problem in task.problems()}
    rollouts = {step_file(run, step).name: read_rollouts(run, step) for step in steps}
    groups = candidates_of(task, problems, rollouts)
    with open_stage(
        directory,
        command=COMMAND,
        config={"pairs": asdict(config.pairs), "seed": seed},
        inputs={"candidates": _hash_candidates(groups)},
        overwrite=True,
    ) as stage:
        if stage.is_finished:
            return
        write_results(stage, groups, task=task.name, config=config.pairs, seed=seed, num_problems=len(groups))


def check_parts(prompts: Sequence[tuple[str, str]], config: RefreshConfig) -> None:
    """ValueError unless some of the prompts (text and suffix) are learnt from and some are held out."""
    share = config.held_out_share
    num_held = sum(is_held_out_prompt(text, suffix, share=share) for text, suffix in prompts)
    if num_held in (0, len(prompts)):
        raise ValueError(
            "grpo: rewards.refresh.held_out_share must part the prompts into some to learn from and some to "
            f"hold out, got {num_held} of {len(prompts)} held out with {share}"
        )


class FollowingRewardModel:
    """The reward model of a run: the one that the config names, then what each reset makes of it."""

    def __init__(self, config: GrpoConfig, task: Task, directory: Path) -> None:
        """Load it; `directory`: of the run."""
        self._config = config
        self._task = task
        self._directory = directory
        refresh = config.rewards.refresh
        if refresh is not None:  # what a reset would say, at once
            encoder = reward_model.reading_encoder(self._run_config(refresh, 0))
            if refresh.preferences:
                read_preferences(
                    refresh.preferences,
                    encoder=encoder,
                    max_length=refresh.max_length or encoder.max_positions,
                    held_out_share=refresh.held_out_share,
                    needs_held_out=False,
                )
        self._scorer: AnswerScorer | None = self._loaded(config.reward_model)

    def reward(self, batch: RewardBatch) -> list[float | None]:
        """A reward function: see AnswerScorer."""
        return self._there().reward(batch)

    def step_rewards(self, batch: RewardBatch) -> list[list[float] | None]:
        """A process reward function: see AnswerScorer."""
        return self._there().step_rewards(batch)

    def begin(self, step: int) -> None:
        """Be the model that scores the step after `step` steps, before any reset there.

        Earlier resets are done already, or nothing could be learnt at them; if somebody deleted what they
        made, it is made again.
        """
        every = self._config.reset_every
        for reset in range(every, step, every):
            if reset not in done_resets(self._directory):
                self._learn(reset)
        self._scorer = self._loaded(self._model_before(step))

    def refresh(self, step: int) -> dict[str, float]:
        """Learn from the rollouts since the last reset; returns figures about what is held out.

        Raises what `reward_model.run` does.
        """
        figures = self._learn(step)
        self._scorer = self._loaded(self._model_before(step + 1))
        return figures

    def _learn(self, step: int) -> dict[str, float]:
        refresh = self._config.rewards.refresh
        assert refresh is not None
        out = reset_directory(self._directory, step)
        out.mkdir(parents=True, exist_ok=True)
        since = max((reset for reset in done_resets(self._directory) if reset < step), default=0)
        self._scorer = None  # its memory is needed for training
        _LOG.info(
            "step %d: the reward model learns from the answers of steps %d to %d", step, since + 1, step
        )
        try:
            with _same_random_state():
                write_preferences(
                    out / PREFERENCES,
                    self._directory,
                    range(since + 1, step + 1),
                    task=self._task,
                    config=refresh,
                    seed=self._config.seed,
                )
                reward_model.run(self._run_config(refresh, step))
        except NoPairsError as error:
            _LOG.warning("step %d: the reward model learns nothing at this reset (%s)", step, error)
            shutil.rmtree(out / REWARD, ignore_errors=True)  # of other rollouts, before a kill
            return {"refresh_skipped": 1.0}
        shutil.rmtree(out / REWARD / CHECKPOINTS, ignore_errors=True)  # nobody goes on from them
        found = read_json(out / REWARD / reward_model.HELD_OUT)
        before, after = found["before"]["held_out_accuracy"], found["accuracy"]
        _LOG.info("step %d: it orders %.3f of what is held out, before %.3f", step, after, before)
        return {
            "refresh_accuracy_before": before,
            "refresh_accuracy": after,
            "refresh_held_out_pairs": float(found["num_pairs"]),
            "refresh_pairs": float(found["train_pairs"]),
            "refresh_replayed": float(found["replayed"]),
            "refresh_skipped": 0.0,
        }

    def _run_config(self, refresh: RefreshConfig, step: int) -> RewardModelConfig:
        """The run of the reward-model stage that the reset at `step` is."""
        out = reset_directory(self._directory, step)
        resets = [reset for reset in done_resets(self._directory) if reset < step]
        earlier = [str(reset_directory(self._directory, reset) / PREFERENCES) for reset in resets]
        config, rollout = self._config, self._config.rollout
        run = refresh.run_config(
            init_from=self._model_before(step),
            preferences=(str(out / PREFERENCES),),
            replay=(*refresh.preferences, *earlier),
            out=str(out / REWARD),
        )
        return replace(
            run,
            reading=replace(run.reading, template=rollout.template, fim_order=rollout.fim_order),
            precision=config.precision,
            device=config.device,
            seed=config.seed,
            num_threads=torch.get_num_threads(),
            overwrite=True,
        )

    def _model_before(self, step: int) -> str:
        """The model that the last reset before `step` steps left; without one, that of the config."""
        resets = [reset for reset in done_resets(self._directory) if reset < step]
        if not resets:
            return self._config.reward_model
        return str(reset_directory(self._directory, resets[-1]) / REWARD / MODEL)

    def _loaded(self, path: str) -> AnswerScorer:
        rollout = self._config.rollout
        return AnswerScorer.load(
            path,
            template=rollout.template,
            fim_order=rollout.fim_order,
            dtype=torch.bfloat16 if self._config.precision == "bf16" else torch.float32,
            device=self._config.device,
        )

    def _there(self) -> AnswerScorer:
        assert self._scorer is not None  # as of everybody who scores between resets
        return self._scorer
