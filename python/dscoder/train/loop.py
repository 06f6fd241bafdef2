"""One optimizer step: forward and backward over micro-batches, clip, AdamW.

Many ranks share the micro-batches of a step. Losses are divided by what all of them read together, so that
gradients and figures are sums over ranks, and all of them move the weights alike or not at all.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from dscoder.data.loader import IGNORED, Batch
from dscoder.models import Transformer
from dscoder.train.flops import causal_pairs
from dscoder.train.loss import cross_entropy_sum
from dscoder.train.optimizer import MasterAdamW
from dscoder.train.ranks import Count, Ranks

_SUMMED = ("loss", "balance", "balance_expert", "balance_device", "balance_communication")


class LossError(RuntimeError):
    """The loss or the gradient is not a number; the weights were not touched."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepStats:
    """What one step saw, on all ranks together."""

    loss: float  # mean over all labelled tokens of the step, without the balance losses
    balance: float  # the weighted balance loss that was added
    balance_expert: float  # the three terms without their weights, mean over layers
    balance_device: float
    balance_communication: float
    grad_norm: float  # before clipping
    num_pairs: int  # of a query and a key that attend
    loads_LE: Tensor | None  # float64 on the CPU: choices by layer with experts and expert; None: no experts

    def figures(self) -> dict[str, float]:
        """What a run reports of the step as it is; the counts need a model to mean something."""
        counts = ("num_pairs", "loads_LE")
        return {name: value for name, value in asdict(self).items() if name not in counts}


def apply_gradients(
    optimizer: MasterAdamW,
    sums_N: Tensor,
    *,
    names: Sequence[str],
    lr: float,
    step: int,
    read: Callable[[], str],
    ranks: Ranks | None = None,
) -> dict[str, float]:
    """Move the weights by the gradients that were added up; returns the step's figures by name.

    Args:
        sums_N: this rank's figures of the whole step, on the device. Their sums over ranks and the gradient's
            norm are read back at once, which is the only wait in a step.
        names: of the figures; "grad_norm", before clipping, is added.
        read: says what data the step read, for the error. All ranks call it, or none.
        ranks: None: this process is alone.

    LossError, on all ranks, if a figure or the norm is not a number: then the weights were not touched.
    """
    ranks = ranks or Ranks()
    return _apply(optimizer, sums_N, names=names, lr=lr, step=step, read=read, ranks=ranks)[0]


def _apply(
    optimizer: MasterAdamW,
    sums_N: Tensor,
    *,
    names: Sequence[str],
    lr: float,
    step: int,
    read: Callable[[], str],
    ranks: Ranks,
) -> tuple[dict[str, float], list[float]]:
    """As `apply_gradients`; also returns what `sums_N` has behind the figures that have names."""
    read_back = torch.cat([optimizer.clip().float().reshape(1), ranks.add_up(sums_N)]).tolist()
    norm, sums, notes = read_back[0], read_back[1 : len(sums_N) + 1], read_back[len(sums_N) + 1 :]
    figures = dict(zip([*names, "grad_norm"], [*sums[: len(names)], norm], strict=True))
    if not all(math.isfinite(value) for value in figures.values()):
        got = ", ".join(map(str, figures.values()))
        raise LossError(
            f"step {step}: {', '.join(figures)} must be finite, got {got}; the weights are those of the step "
            f"before. {read()}"
        )
    ranks.hear(notes)
    optimizer.step(lr)
    return figures, sums[len(names) :]


def _backward(
    model: Transformer, batch: Batch, *, num_labels: Count, num_sequences: Count
) -> tuple[Tensor, Tensor | None]:
    """Add the gradients of one micro-batch; returns the figures of _SUMMED, [5], and the loads [L, E]."""
    device = model.embed.weight.device
    features = model.features(
        batch.tokens_BS.to(device, non_blocking=True),
        cu_seqlens=batch.cu_seqlens.to(device, non_blocking=True),
    )
    labels_T = batch.labels_BS.flatten().to(device, non_blocking=True)
    total = cross_entropy_sum(features.hidden_BSD.flatten(0, 1), model.head.weight, labels_T)
    loss = total / num_labels
    share = len(batch.tokens_BS) / num_sequences
    balance = features.balance * share
    (loss + balance).backward()  # type: ignore[no-untyped-call]
    terms_3 = features.balance_terms_3
    terms_3 = torch.zeros(3, device=device) if terms_3 is None else terms_3 * share
    return torch.cat([torch.stack([loss.detach(), balance.detach()]), terms_3]), features.loads_LE


def _add_gradients(
    model: Transformer, batches: Sequence[Batch], ranks: Ranks
) -> tuple[Tensor, Tensor | None]:
    """Forward and backward of this rank's `batches`; what `_backward` returns, of all of them."""
    num_labels, num_sequences = ranks.totals(
        sum(int((batch.labels_BS != IGNORED).sum()) for batch in batches),
        sum(len(batch.tokens_BS) for batch in batches),
    )
    sums_5: list[Tensor] = []
    loads_LE: Tensor | None = None
    for number, batch in enumerate(batches, start=1):
        if isinstance(model, FSDPModule):
            # Whole gradients add up on their rank until the last batch's backward pass sums them over ranks;
            # or each batch's are summed into the parts that ranks keep, and replicas' parts by the last.
            is_last = number == len(batches)
            model.set_requires_gradient_sync(is_last or ranks.sums_each_batch)
            model.set_requires_all_reduce(is_last)
        seen_5, seen_LE = _backward(model, batch, num_labels=num_labels, num_sequences=num_sequences)
        sums_5.append(seen_5)
        if seen_LE is not None:
            loads_LE = seen_LE if loads_LE is None else loads_LE + seen_LE
    return torch.stack(sums_5).sum(dim=0), loads_LE


def train_step(
    model: Transformer,
    optimizer: MasterAdamW,
    batches: Sequence[Batch],
    *,
    lr: float,
    step: int,
    ranks: Ranks | None = None,
) -> StepStats:
    """Move the weights by the mean gradient over all labelled tokens of `batches`.

    Micro-batches weigh by their labelled tokens, so how a batch is cut does not change the loss; the balance
    losses, which are means over sequences, weigh by sequences.

    Of many ranks each has batches of its own, as many as the others; some may hold no sequence.
    """
    ranks = ranks or Ranks()
    sums_5, loads_LE = _add_gradients(model, batches, ranks)
    num_pairs = torch.tensor([sum(causal_pairs(batch.cu_seqlens.diff().long()) for batch in batches)])
    counts = [num_pairs.to(sums_5.device, non_blocking=True)]
    if loads_LE is not None:
        counts.append(loads_LE.flatten())
    windows = [index for batch in batches for index in batch.window_idx]
    figures, (pairs, *loads) = _apply(
        optimizer,
        torch.cat([part.double() for part in (sums_5, *counts)]),  # wide enough to count in
        names=_SUMMED,
        lr=lr,
        step=step,
        read=lambda: f"The step read the training windows {list(chain(*ranks.gather(windows)))}",
        ranks=ranks,
    )
    if loads_LE is not None:
        loads_LE = torch.tensor(loads, dtype=torch.float64).view(loads_LE.shape)
    return StepStats(**figures, num_pairs=round(pairs), loads_LE=loads_LE)
