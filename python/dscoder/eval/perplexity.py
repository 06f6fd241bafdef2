"""Bits per byte on held-out text: the loss of a model, comparable across tokenizers.

The bits that the model needs for the tokens of the text, over the bytes those tokens stand for. Tokens that
are not predicted count in neither: the first of a document without bos, and the first of each piece of a
document that is longer than a window. Nor do special tokens, which stand for no bytes.

Many ranks share the windows as they share those of a training step; the sums are over all of them.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.distributed.fsdp import FSDPModule

from dscoder.data.loader import IGNORED, assemble, window_order
from dscoder.data.prepare import HELD_OUT, TOKEN_BYTES
from dscoder.data.shards import Windows, load_array
from dscoder.models import Transformer
from dscoder.train.loss import token_losses
from dscoder.train.ranks import Ranks

_MICRO_TOKENS = 8192  # in one forward pass, or one window


@dataclass(frozen=True, kw_only=True, slots=True)
class BitsPerByte:
    """What a model spends on a text."""

    bits: float
    num_bytes: int
    num_tokens: int

    @property
    def bits_per_byte(self) -> float:
        """bits / num_bytes."""
        return self.bits / self.num_bytes

    @property
    def loss(self) -> float:
        """Mean loss in nats per token of text."""
        return self.bits * math.log(2) / self.num_tokens


@torch.no_grad()
def bits_per_byte(
    model: Transformer,
    directory: Path,
    *,
    max_windows: int | None = None,
    micro: int | None = None,
    ranks: Ranks | None = None,
) -> BitsPerByte:
    """Measure `model` on the held-out windows that `dscoder prepare` wrote to `directory`.

    Args:
        max_windows: a fixed choice of so many windows is measured, the same each time.
        micro: windows in one forward pass; None: as many as memory surely has room for.
        ranks: all ranks call this together, and each finds the same. None: this process is alone.
    """
    ranks = ranks or Ranks()
    bytes_V = torch.from_numpy(np.array(load_array(directory / TOKEN_BYTES))).long()
    windows = Windows(directory / HELD_OUT, vocab_size=len(bytes_V))
    count = len(windows) if max_windows is None else min(max_windows, len(windows))
    # Packing sorts by length: the first windows alone would be the longest documents.
    order = window_order(0, count, size=len(windows), seed=0)
    micro = micro or max(1, _MICRO_TOKENS // windows.window)
    was_training = model.training
    model.eval()
    try:
        sums_3 = torch.zeros(3, dtype=torch.float64)
        # Every rank takes part in every round, be it with no window: layers exchange weights and tokens.
        for start in range(0, count, micro * ranks.size):
            begin = start + ranks.rank * micro
            sums_3 += _sums(model, windows, order[begin : begin + micro], bytes_V)
    finally:
        model.train(was_training)
    if isinstance(model, FSDPModule):
        model.reshard()  # the root stays whole after a forward pass, for a backward pass that does not come
    nats, num_bytes, num_tokens = torch.stack(ranks.gather(sums_3)).sum(dim=0).tolist()
    return BitsPerByte(bits=nats / math.log(2), num_bytes=int(num_bytes), num_tokens=int(num_tokens))


def _sums(
    model: Transformer, windows: Windows, window_idx: NDArray[np.int64], bytes_V: torch.Tensor
) -> torch.Tensor:
    """Nats, bytes and tokens of text of some windows, in float64: [3]."""
    device = model.embed.weight.device
    batch = assemble(windows, window_idx)
    hidden_BSD = model.features(batch.tokens_BS.to(device), cu_seqlens=batch.cu_seqlens.to(device)).hidden_BSD
    labels_T = batch.labels_BS.flatten()
    nats_T = token_losses(hidden_BSD.flatten(0, 1), model.head.weight, labels_T.to(device)).cpu().double()
    bytes_T = torch.where(labels_T == IGNORED, 0, bytes_V[labels_T.clamp(min=0)])
    is_text_T = bytes_T > 0
    return torch.stack([nats_T[is_text_T].sum(), bytes_T.sum().double(), is_text_T.sum().double()])


def held_out_report(
    model: Transformer,
    *,
    directory: Path,
    max_windows: int | None = None,
    micro: int | None = None,
    ranks: Ranks | None = None,
) -> dict[str, float]:
    """The held-out figures as a run logs them; the arguments are those of `bits_per_byte`."""
    found = bits_per_byte(model, directory, max_windows=max_windows, micro=micro, ranks=ranks)
    return {"held_out_bits_per_byte": found.bits_per_byte, "held_out_loss": found.loss}
