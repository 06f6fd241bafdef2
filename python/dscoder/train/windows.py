"""Training on packed windows: what a step reads, at which rate, as functions of its number alone.

A step's windows are cut into micro-batches. Micro-batch i goes to rank i mod R of R in its round i div R, so
what the model sees at once does not depend on the number of ranks; who has none in the last round runs an
empty one, since every rank must take part in the exchanges of every round.
"""

from collections.abc import Callable

import numpy as np
import torch

from dscoder.config.train import BatchConfig, ScheduleConfig
from dscoder.data.loader import IGNORED, Batch, assemble, shuffled_batch, window_order
from dscoder.data.shards import Windows
from dscoder.models import Transformer
from dscoder.runtime.log import get_logger
from dscoder.train.flops import forward_flops, training_flops
from dscoder.train.load import load_figures
from dscoder.train.loop import LossError, StepStats, train_step
from dscoder.train.loss import token_losses
from dscoder.train.optimizer import MasterAdamW
from dscoder.train.ranks import Ranks
from dscoder.train.run import StepDone
from dscoder.train.schedule import learning_rate, plan_batches

_EVAL_TOKENS = 8192  # in one forward pass, or one window
_LOG = get_logger(__name__)


def check_micro(batch: BatchConfig, num_ranks: int) -> None:
    """ValueError if the micro-batches of a full batch are fewer than the ranks."""
    num_micro = -(-batch.sequences // batch.micro)
    if num_micro >= num_ranks:
        return
    if batch.sequences < num_ranks:
        raise ValueError(f"batch: sequences must be >= {num_ranks}, one for each rank, got {batch.sequences}")
    largest = -(-batch.sequences // (num_ranks - 1)) - 1  # the largest that cuts the batch often enough
    raise ValueError(
        f"batch: micro must be <= {largest} for each of {num_ranks} ranks to have a micro-batch of "
        f"{batch.sequences} sequences, got {batch.micro}"
    )


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
        ranks: Ranks | None = None,
        check: Callable[[], None] | None = None,
    ) -> None:
        """Plan the whole run; `check` raises what may be behind a loss that is no number."""
        self._ranks = ranks or Ranks()
        self._check = check
        check_micro(batch, self._ranks.size)
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
        """This rank's micro-batches of step `step`: as many as every rank's, the last one maybe empty."""
        begin, end = int(self._consumed[step]), int(self._consumed[step + 1])
        ranks = self._ranks
        return [
            self._batch(start + ranks.rank * self._micro, end)
            for start in range(begin, end, self._micro * ranks.size)
        ]

    def _batch(self, position: int, end: int) -> Batch:
        """The micro-batch of the windows from `position` up to `end`, which may be passed."""
        count = min(self._micro, end - position)
        if count <= 0:
            return assemble(self._windows, np.empty(0, dtype=np.int64))
        return shuffled_batch(self._windows, position=position, count=count, seed=self._seed)

    def train_step(self, optimizer: MasterAdamW, step: int, lr: float) -> StepDone:
        """Move the weights by step `step`."""
        batches = self.batches(step)
        try:
            stats = train_step(self._model, optimizer, batches, lr=lr, step=step, ranks=self._ranks)
        except LossError:
            if self._check is not None:
                self._check()
            raise
        num_sequences = int(self._consumed[step + 1] - self._consumed[step])
        num_tokens = num_sequences * self._windows.window
        loads, num_dropped = self._loads(stats, num_tokens)
        return StepDone(
            figures=stats.figures() | loads,
            num_sequences=num_sequences,
            num_tokens=num_tokens,
            flops=training_flops(
                self._model.config, num_tokens=num_tokens, num_pairs=stats.num_pairs, num_dropped=num_dropped
            ),
        )

    def _loads(self, stats: StepStats, num_tokens: int) -> tuple[dict[str, float], int]:
        """What a report says of the experts' loads, and how many choices were dropped."""
        if stats.loads_LE is None:
            return {}, 0
        num_choices = num_tokens * forward_flops(self._model.config).choices_per_token
        num_ranks = self._ranks.layout()["expert"]
        figures = load_figures(stats.loads_LE, num_ranks=num_ranks, num_choices=num_choices)
        return figures, num_choices - round(float(stats.loads_LE.sum()))


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
