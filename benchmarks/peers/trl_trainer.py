"""TRL's GRPOTrainer on one of our model directories, a step of it at a time. Written for trl 1.16.

Its own generation through transformers, with a cache: vLLM needs a GPU. What slows it down without a use here
is off: mixed precision, recomputing activations, logs, checkpoints, worker processes, progress bars.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dscoder.config.grpo import GrpoConfig

try:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
except ImportError:  # a peer like the others: left out where it is not installed
    GRPOTrainer = TrainerCallback = object
    GRPOConfig = Dataset = None

HAS_TRL = GRPOConfig is not None

# What answers are worth, by their texts.
TextReward = Callable[[Sequence[str]], list[float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTimes:
    """Seconds of one step, by the clock, and what it made.

    Attributes:
        sampling: until the answers are text.
        waiting: for rewards, after that.
        training: the rest: log-probabilities under the reference, gradients, the optimizer.
        processor: seconds of the processor that the process took, over all of its threads.
        num_tokens: of the answers.
    """

    total: float
    sampling: float
    waiting: float
    training: float
    processor: float
    num_tokens: int


def arguments(config: GrpoConfig, *, num_steps: int) -> dict[str, Any]:
    """Those of trl's GRPOConfig that make it do what `config` says, one update a step."""
    answers = config.rollout.groups * config.rollout.group_size
    micro = min(config.update.micro, answers)
    return {
        "output_dir": config.out,
        "max_steps": num_steps,
        "num_generations": config.rollout.group_size,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": answers // micro,
        "max_completion_length": config.rollout.max_new_tokens,
        "temperature": config.rollout.temperature,
        "loss_type": config.loss.objective,
        "beta": config.loss.kl,
        "epsilon": config.loss.clip_low,
        "epsilon_high": config.loss.clip_high,
        "learning_rate": config.schedule.max_lr,
        "lr_scheduler_type": "constant",
        "adam_beta1": config.optimizer.beta1,
        "adam_beta2": config.optimizer.beta2,
        "adam_epsilon": config.optimizer.eps,
        "weight_decay": config.optimizer.weight_decay,
        "max_grad_norm": config.optimizer.clip_norm,
        "seed": config.seed,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "shuffle_dataset": False,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
        "report_to": [],
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


class _Trainer(GRPOTrainer):  # type: ignore[misc]
    """With the seconds of the last generation and of its rewards."""

    sampling = waiting = 0.0

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        found = super()._generate(*args, **kwargs)
        self.sampling = time.perf_counter() - began
        return found

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        found = super()._calculate_rewards(*args, **kwargs)
        self.waiting = time.perf_counter() - began
        return found


class _Turns(TrainerCallback):  # type: ignore[misc]
    """Times every step from the end of the one before, and lets something else run between them."""

    def __init__(self, between: Callable[[], None]) -> None:
        self.between = between
        self.trainer: _Trainer | None = None
        self.num_tokens = 0
        self.times: list[StepTimes] = []
        self._began = self._used = 0.0

    def _begin(self) -> None:
        self._began, self._used = time.perf_counter(), time.process_time()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._begin()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        total, used = time.perf_counter() - self._began, time.process_time() - self._used
        assert self.trainer is not None
        sampling, waiting = self.trainer.sampling, self.trainer.waiting
        self.times.append(
            StepTimes(
                total=total,
                sampling=sampling,
                waiting=waiting,
                training=total - sampling - waiting,
                processor=used,
                num_tokens=self.num_tokens,
            )
        )
        self.between()
        self._begin()


def train(
    config: GrpoConfig,
    prompts: Sequence[str],
    reward: TextReward,
    *,
    num_steps: int,
    between: Callable[[], None],
    prompt_ids: Sequence[Sequence[int]],
) -> list[StepTimes]:
    """The times of `num_steps` steps, each followed by a call of `between`, which is not timed.

    Args:
        prompts: those of one step, a group each.
        prompt_ids: what they must be as tokens.
    """
    turns = _Turns(between)

    def reward_of(*, completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        turns.num_tokens = sum(map(len, completion_ids))
        return reward(completions)

    turns.trainer = trainer = _Trainer(
        model=str(Path(config.model)),
        reward_funcs=reward_of,
        args=GRPOConfig(**arguments(config, num_steps=num_steps)),
        train_dataset=Dataset.from_dict({"prompt": list(prompts)}),
        callbacks=[turns],
    )
    theirs = trainer.processing_class(text=list(prompts))["input_ids"]
    if [list(ids) for ids in theirs] != [list(ids) for ids in prompt_ids]:
        raise ValueError(f"trl_trainer: prompts must be the tokens {prompt_ids[0]} ..., got {theirs[0]} ...")
    trainer.train()
    return turns.times
