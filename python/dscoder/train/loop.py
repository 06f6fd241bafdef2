"""One optimizer step: forward and backward over micro-batches, clip, AdamW."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dscoder.data.loader import IGNORED, Batch
from dscoder.models import Transformer
from dscoder.train.loss import cross_entropy_sum
from dscoder.train.optimizer import MasterAdamW


class LossError(RuntimeError):
    """The loss or the gradient is not a number; the weights were not touched."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepStats:
    """What one step saw."""

    loss: float  # mean over all labelled tokens of the step, without the balance losses
    balance: float  # the weighted balance loss that was added
    balance_expert: float  # the three terms without their weights, mean over layers
    balance_device: float
    balance_communication: float
    grad_norm: float  # before clipping


def apply_gradients(
    optimizer: MasterAdamW,
    sums_N: Tensor,
    *,
    names: Sequence[str],
    lr: float,
    step: int,
    read: Callable[[], str],
) -> dict[str, float]:
    """Move the weights by the gradients that were added up; returns the step's figures by name.

    Args:
        sums_N: the figures of the whole step, on the device; they and the gradient's norm are read back at
            once, which is the only wait in a step.
        names: of the figures; "grad_norm", before clipping, is added.
        read: says what data the step read, for the error.

    LossError if a figure or the norm is not a number: then the weights were not touched.
    """
    values = torch.cat([sums_N, optimizer.clip().float().reshape(1)]).tolist()
    figures = dict(zip([*names, "grad_norm"], values, strict=True))
    if not all(math.isfinite(value) for value in values):
        got = ", ".join(map(str, values))
        raise LossError(
            f"step {step}: {', '.join(figures)} must be finite, got {got}; the weights are those of the step "
            f"before. {read()}"
        )
    optimizer.step(lr)
    return figures


def _backward(model: Transformer, batch: Batch, *, num_labels: int, share: float) -> Tensor:
    """Add the gradients of one micro-batch; returns loss, balance and the three balance terms: [5]."""
    device = model.embed.weight.device
    features = model.features(
        batch.tokens_BS.to(device, non_blocking=True),
        cu_seqlens=batch.cu_seqlens.to(device, non_blocking=True),
    )
    labels_T = batch.labels_BS.flatten().to(device, non_blocking=True)
    total = cross_entropy_sum(features.hidden_BSD.flatten(0, 1), model.head.weight, labels_T)
    loss = total / num_labels
    balance = features.balance * share
    (loss + balance).backward()  # type: ignore[no-untyped-call]
    terms_3 = features.balance_terms_3
    terms_3 = torch.zeros(3, device=device) if terms_3 is None else terms_3 * share
    return torch.cat([torch.stack([loss.detach(), balance.detach()]), terms_3])


def train_step(
    model: Transformer, optimizer: MasterAdamW, batches: Sequence[Batch], *, lr: float, step: int
) -> StepStats:
    """Move the weights by the mean gradient over all labelled tokens of `batches`.

    Micro-batches weigh by their labelled tokens, so how a batch is cut does not change the loss; the balance
    losses, which are means over sequences, weigh by sequences.
    """
    num_labels = max(1, sum(int((batch.labels_BS != IGNORED).sum()) for batch in batches))
    num_sequences = sum(len(batch.tokens_BS) for batch in batches)
    sums_5 = torch.stack(
        [
            _backward(model, batch, num_labels=num_labels, share=len(batch.tokens_BS) / num_sequences)
            for batch in batches
        ]
    ).sum(dim=0)
    windows = [index for batch in batches for index in batch.window_idx]
    figures = apply_gradients(
        optimizer,
        sums_5,
        names=("loss", "balance", "balance_expert", "balance_device", "balance_communication"),
        lr=lr,
        step=step,
        read=lambda: f"The step read the training windows {windows}",
    )
    return StepStats(**figures)
