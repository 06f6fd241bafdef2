"""The stage `dscoder grpo`: a policy learns from what its own answers are worth.

A step samples groups of answers, has them judged and rewarded (`explore.py`), writes them down (`rollout.py`)
and moves the policy on them (`policy_step.py`). It is a function of the weights, the optimizer's moments, the
reference, the seed and the place among the problems, all of which a checkpoint holds; so a run that goes on
from one makes the same rollouts and the same weights as one that was never stopped, as far as the verdicts
and the reward functions are the same.

Iterative GRPO (DeepSeekMath section 4.1.4): every so many steps the policy becomes the reference, and the
reward model learns from what the policy wrote since (`refresh.py`).
"""

import copy
import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dscoder.checkpoint import check_replaceable, load_config, load_pretrained, save_pretrained
from dscoder.config.grpo import GrpoConfig
from dscoder.models import Transformer
from dscoder.runtime.artifact import hash_path
from dscoder.runtime.device import resolve_device
from dscoder.runtime.log import get_logger
from dscoder.sandbox.pool import Pool
from dscoder.tasks.by_name import open_task
from dscoder.tasks.problem import Task
from dscoder.text.tokenizer import Tokenizer
from dscoder.train.explore import Explorer, Judge, Sampler, make_questions
from dscoder.train.memory import require_memory
from dscoder.train.optimizer import MasterAdamW
from dscoder.train.policy_step import PolicyUpdates, rollout_figures
from dscoder.train.prompts import PromptEncoder
from dscoder.train.refresh import FollowingRewardModel, check_parts
from dscoder.train.report import OnMetrics
from dscoder.train.reward import RewardFunction, Rewards, StepRewardFunction
from dscoder.train.reward_functions import reward_terms
from dscoder.train.rollout import drop_rollouts_after, require_rewards, write_rollouts
from dscoder.train.run import MODEL, Job, StepDone, hash_model, run_stage
from dscoder.train.samplers import open_sampler
from dscoder.train.schedule import learning_rate
from dscoder.train.steps import StepCutter

# The inputs are compared by what they hold, wherever they lie.
_FREE = ("model", "task", "reward_model")
_POSITION = "position"
_REFERENCE = "reference."
_LOG = get_logger(__name__)

Evaluate = Callable[[Transformer], Mapping[str, float]]
# Called with the model and the tokenizer: what writes the answers, instead of our own engine.
MakeSampler = Callable[[Transformer, Tokenizer], Sampler]
# Called when the policy has become the reference, with the steps done and the run's directory. A run that
# goes on calls it again for its last reset: what it does must follow from the rollouts of those steps alone.
OnReset = Callable[[int, Path], None]


@torch.no_grad()
def copy_weights(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Overwrite the weights of `target` by those of `source`, in place: its storage stays where it is.

    So whoever holds the target's tensors (a captured CUDA graph, an engine) goes on with the new weights.
    """
    parameters = dict(source.named_parameters())
    for name, parameter in target.named_parameters():
        parameter.copy_(parameters[name])


class GrpoSteps:
    """The steps of a run."""

    def __init__(
        self,
        model: Transformer,
        *,
        explorer: Explorer,
        config: GrpoConfig,
        num_ids: int,
        directory: Path,
        following: FollowingRewardModel | None = None,
        on_reset: OnReset | None = None,
    ) -> None:
        """`num_ids`: ids from there on are never drawn. `directory`: of the stage.

        `following`: learns at resets.
        """
        self._model = model
        self._explorer = explorer
        self._config = config
        self._directory = directory
        self._following = following
        self._on_reset = on_reset
        self._reference = None
        if config.loss.kl > 0:
            self._reference = copy.deepcopy(model).requires_grad_(False)
        self._updates = PolicyUpdates(model, reference=self._reference, config=config, num_ids=num_ids)
        self._position = torch.zeros((), dtype=torch.int64)
        self._plan = np.arange(config.num_steps + 1)

    def extra_state(self) -> dict[str, Tensor]:
        """What a checkpoint holds besides: the place among the problems, and a reference that changes."""
        state = {_POSITION: self._position}
        if self._reference is not None and self._config.reset_every:
            state |= {_REFERENCE + name: p.detach() for name, p in self._reference.named_parameters()}
        return state

    def begin(self, step: int) -> None:
        """Forget the rollouts of steps that a killed run made after its last checkpoint, and have rewards
        learn again what they had learnt at the last reset."""
        drop_rollouts_after(self._directory, step)
        if self._following is not None:
            self._following.begin(step)
        every = self._config.reset_every
        if self._on_reset is not None and every and step > every and step % every:
            self._on_reset(step - step % every, self._directory)

    def learning_rate(self, step: int) -> float:
        """Of step `step`, from 0."""
        return learning_rate(self._config.schedule, step=step, consumed=self._plan)

    def train_step(self, optimizer: MasterAdamW, step: int, lr: float) -> StepDone:
        """Explore, write the rollouts down, and move the policy on them."""
        every = self._config.reset_every
        refreshed = self._reset(step) if every and step and step % every == 0 else {}
        found = self._explorer.explore(step + 1, int(self._position))
        self._position.fill_(found.next_position)
        write_rollouts(self._directory, step + 1, found.rollouts)
        require_rewards(found.rollouts, has_outcome=self._config.rewards.has_outcome)
        began = time.perf_counter()
        figures = self._updates.update(optimizer, found.rollouts, step=step + 1, lr=lr)
        seconds = {
            "seconds_sampling": found.sampling,
            "seconds_waiting": found.waiting,
            "seconds_training": time.perf_counter() - began,
        }
        return StepDone(
            figures={
                **figures,
                **rollout_figures(found.rollouts),
                "rounds": float(found.num_rounds),
                **seconds,
                **refreshed,
            },
            num_sequences=len(found.rollouts),
            num_tokens=sum(len(rollout.completion_ids) for rollout in found.rollouts),
        )

    def _reset(self, step: int) -> dict[str, float]:
        """The policy becomes the reference, and the rewards learn; figures about that."""
        if self._reference is not None:
            copy_weights(self._model, self._reference)
            _LOG.info("step %d: the policy is the reference from here on", step)
        figures: dict[str, float] = {}
        if self._following is not None:
            began = time.perf_counter()
            figures = self._following.refresh(step)
            figures["seconds_refresh"] = time.perf_counter() - began
        if self._on_reset is not None:
            self._on_reset(step, self._directory)
        return figures


def _load_policy(config: GrpoConfig) -> Transformer:
    device = resolve_device(config.device)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    require_memory(load_config(config.model), dtype=dtype, device=device)
    return load_pretrained(config.model, dtype=dtype, device=device)


def _check(config: GrpoConfig, directory: Path) -> None:
    """What would end the run after its last step, when the model is written."""
    check_replaceable(directory / MODEL, overwrite=True)
    if config.reset_every and not config.loss.kl and config.rewards.refresh is None:
        raise ValueError(
            "grpo: reset_every must be 0 without a reference (loss.kl = 0) and rewards.refresh, "
            f"got {config.reset_every}"
        )
    margin, most = config.rewards.overlong_margin, config.rollout.max_new_tokens
    if margin > most:
        raise ValueError(
            f"grpo: rewards.overlong_margin must be <= {most}, rollout.max_new_tokens, got {margin}"
        )


def _inputs(config: GrpoConfig, task: Task) -> dict[str, str]:
    """What the inputs hold: the weights of policy and reward model, and every problem of the task."""
    problems = hashlib.sha256(repr((task.name, task.limits, list(task.problems()))).encode())
    inputs = {"model": hash_model(config.model), "problems": problems.hexdigest()}
    if config.reward_model:
        inputs["reward_model"] = hash_model(config.reward_model)
    refresh = config.rewards.refresh
    for idx, path in enumerate(() if refresh is None else refresh.preferences):
        inputs[f"preferences{idx}"] = hash_path(Path(path))
    return inputs


@dataclass(frozen=True, kw_only=True, slots=True)
class _Given:
    """What the caller of `run` brings: rewards of answers and of steps, a sampler, hooks."""

    rewards: Mapping[str, RewardFunction]
    process_rewards: Mapping[str, StepRewardFunction]
    make_sampler: MakeSampler
    evaluate: Evaluate | None
    on_reset: OnReset | None


def _rewards(config: GrpoConfig, given: _Given, following: FollowingRewardModel | None) -> Rewards:
    """The functions of the config: built in, by the reward model, by the caller, by their path."""
    by_caller = {*given.rewards, *given.process_rewards}
    if config.rewards.refresh is not None and "reward_model" in by_caller:
        raise ValueError(
            "grpo: rewards must hold no function reward_model with rewards.refresh, which is about the one "
            f"of the config, got {', '.join(sorted(by_caller))}"
        )
    whole = {} if following is None else {"reward_model": following.reward}
    of_steps = {} if following is None else {"reward_model": following.step_rewards}
    return Rewards(
        reward_terms(
            config.rewards,
            given={**whole, **given.rewards},
            given_process={**of_steps, **given.process_rewards},
        )
    )


def _build(config: GrpoConfig, task: Task, directory: Path, *, pool: Pool, given: _Given) -> Job:
    _check(config, directory)
    following = FollowingRewardModel(config, task, directory) if config.reward_model else None
    rewards = _rewards(config, given, following)
    tokenizer = Tokenizer.load(config.model)
    process, refresh = config.rewards.process, config.rewards.refresh
    cutter = None if process is None else StepCutter(tokenizer, process.steps)
    model = _load_policy(config)
    encoder = PromptEncoder(
        tokenizer=tokenizer,
        max_positions=model.config.max_positions,
        template=config.rollout.template,
        fim_order=config.rollout.fim_order,
    )
    questions = make_questions(task, encoder, max_new_tokens=config.rollout.max_new_tokens)
    if refresh is not None:
        check_parts([(question.text, question.problem.suffix) for question in questions], refresh)
    explorer = Explorer(
        questions,
        sampler=given.make_sampler(model, tokenizer),
        judge=Judge(task, pool),
        rewards=rewards,
        config=config,
        cutter=cutter,
    )
    steps = GrpoSteps(
        model,
        explorer=explorer,
        config=config,
        num_ids=min(model.config.vocab_size, tokenizer.vocab_size),
        directory=directory,
        following=None if refresh is None else following,
        on_reset=given.on_reset,
    )
    evaluate = given.evaluate
    return Job(
        model=model,
        num_steps=config.num_steps,
        learning_rate=steps.learning_rate,
        train_step=steps.train_step,
        export=lambda out: save_pretrained(model, out / MODEL, tokenizer=config.model, overwrite=True),
        evaluate=None if evaluate is None else lambda: evaluate(model),
        begin=steps.begin,
        extra_state=steps.extra_state(),
    )


def run(
    config: GrpoConfig,
    task: Task | None = None,
    *,
    rewards: Mapping[str, RewardFunction] | None = None,
    process_rewards: Mapping[str, StepRewardFunction] | None = None,
    make_sampler: MakeSampler | None = None,
    evaluate: Evaluate | None = None,
    on_reset: OnReset | None = None,
    on_metrics: OnMetrics | None = None,
) -> Path:
    """Train, or go on training, and leave the model in `config.out`/model; returns `config.out`.

    Args:
        task: whose problems are asked, and whose rules judge the answers; None: the one of the config.
        rewards: functions made by the caller, from a reward model say, by the name the config has for them.
        process_rewards: the same, of those that reward steps.
        make_sampler: what writes the answers; None: what `rollout.engine` says.
        evaluate: called with the model every `report.eval_every` steps and at the end, for figures to report.
        on_reset: called every `reset_every` steps, where a reward model learns from the rollouts since; and
            by a run that goes on for the last of those steps, when rollouts of later ones may lie there too.
        on_metrics: called with every report, after it is written.

    Raises what `run_stage` does.
    """

    learnt = open_task(config.task) if task is None else task
    given = _Given(
        rewards=rewards or {},
        process_rewards=process_rewards or {},
        make_sampler=make_sampler or partial(open_sampler, config),
        evaluate=evaluate,
        on_reset=on_reset,
    )
    with Pool(num_workers=config.rollout.num_workers, isolation=config.rollout.isolation) as pool:
        return run_stage(
            config,
            lambda directory: _build(config, learnt, directory, pool=pool, given=given),
            command="grpo",
            inputs=_inputs(config, learnt),
            free=_FREE,
            on_metrics=on_metrics,
        )
