"""Training on packed windows: what a step reads, at which rate, as functions of its number alone."""

from dataclasses import asdict

import torch

from dscoder.config.train import BatchConfig, ScheduleConfig
from dscoder.data.loader import IGNORED, Batch, assemble, shuffled_batch, window_order
from dscoder.data.shards import Windows
from dscoder.models import Transformer
from dscoder.runtime.log import get_logger
from dscoder.train.loop import train_step
from dscoder.train.loss import token_losses
from dscoder.train.optimizer import MasterAdamW
from dscoder.train.run import StepDone
from dscoder.train.schedule import learning_rate, plan_batches

_EVAL_TOKENS = 8192  # in one forward pass, or one window
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


@torch.no_grad()
def answer_loss(model: Transformer, windows: Windows, *, max_windows: int | None = None) -> float:
    """Mean loss in nats over the labelled tokens of `windows`: those of the answers, where there is a mask.

    With `max_windows` a fixed choice of so many windows is measured, the same each time.
    """
    count = len(windows) if max_windows is None else min(max_windows, len(windows))
    # Packing sorts by length: the first windows alone would be the longest documents.
    order = window_order(0, count, size=len(windows), seed=0)
    micro = max(1, _EVAL_TOKENS // windows.window)
    device = model.embed.weight.device
    was_training = model.training
    model.eval()
    total, num_labels = 0.0, 0
    try:
        for start in range(0, count, micro):
            batch = assemble(windows, order[start : start + micro])
            features = model.features(batch.tokens_BS.to(device), cu_seqlens=batch.cu_seqlens.to(device))
            labels_T = batch.labels_BS.flatten()
            hidden_TD = features.hidden_BSD.flatten(0, 1)
            total += float(token_losses(hidden_TD, model.head.weight, labels_T.to(device)).double().sum())
            num_labels += int((labels_T != IGNORED).sum())
    finally:
        model.train(was_training)
    return total / max(1, num_labels)
