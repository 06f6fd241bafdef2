"""Training on packed windows: what a step reads, at which rate, as functions of its number alone."""

from dataclasses import asdict

import torch

from dscoder.config.train import BatchConfig, ScheduleConfig
from dscoder.data.loader import Batch, shuffled_batch
from dscoder.data.shards import Windows
from dscoder.models import Transformer
from dscoder.runtime.log import get_logger
from dscoder.train.loop import train_step
from dscoder.train.optimizer import MasterAdamW
from dscoder.train.run import StepDone
from dscoder.train.schedule import learning_rate, plan_batches

_LOG = get_logger(__name__)


class WindowSteps:
    """The steps of a run of `num_steps` over shuffled epochs of `windows`."""

    def __init__(
        self,
        model: Transformer,
        windows: Windows,
        *,
        num_steps: int,
        batch: BatchConfig,
        schedule: ScheduleConfig,
        seed: int,
    ) -> None:
        """Plan the whole run."""
        self._model = model
        self._windows = windows
        self._micro = batch.micro
        self._schedule = schedule
        self._seed = seed
        self._consumed = plan_batches(batch, num_steps=num_steps, window=windows.window)
        _LOG.info(
            "%d windows of %d tokens, %d threads", len(windows), windows.window, torch.get_num_threads()
        )
        if schedule.warmup_steps >= num_steps:
            _LOG.warning(
                "the rate never reaches its maximum: the warm-up takes %d steps, the run %d",
                *(schedule.warmup_steps, num_steps),
            )

    def learning_rate(self, step: int) -> float:
        """Of step `step`, from 0."""
        return learning_rate(self._schedule, step=step, consumed=self._consumed)

    def batches(self, step: int) -> list[Batch]:
        """The micro-batches of step `step`."""
        begin, end = int(self._consumed[step]), int(self._consumed[step + 1])
        return [
            shuffled_batch(
                self._windows, position=start, count=min(self._micro, end - start), seed=self._seed
            )
            for start in range(begin, end, self._micro)
        ]

    def train_step(self, optimizer: MasterAdamW, step: int, lr: float) -> StepDone:
        """Move the weights by step `step`."""
        batches = self.batches(step)
        stats = train_step(self._model, optimizer, batches, lr=lr, step=step)
        return StepDone(
            figures=asdict(stats),
            num_sequences=sum(len(batch.tokens_BS) for batch in batches),
            num_tokens=sum(batch.tokens_BS.numel() for batch in batches),
        )
