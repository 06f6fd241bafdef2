"""A Transformer that says one number about a sequence: what a reward model is.

The number is read at the last token of the sequence, the first place that has seen all of it. The head is one
row without a bias and has no vocabulary beside it (InstructGPT's form, and transformers'
...ForSequenceClassification with one label).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dscoder.models.transformer import Transformer


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """What a forward gives."""

    score_B: Tensor  # float32, of each sequence
    balance: Tensor  # float32 scalar, see Features


class ScalarModel(nn.Module):
    """`backbone` without its vocabulary head, and a head with one output.

    The backbone is taken over, not copied. Off the meta device the new head starts as normal(0, init_std),
    drawn by `seed`.
    """

    def __init__(self, backbone: Transformer, *, seed: int = 0) -> None:
        super().__init__()
        self.config = backbone.config
        self.backbone = backbone
        del backbone.head
        weight_VD = backbone.embed.weight
        self.score = nn.Linear(
            self.config.width, 1, bias=False, device=weight_VD.device, dtype=weight_VD.dtype
        )
        if not weight_VD.is_meta:
            generator = torch.Generator(weight_VD.device).manual_seed(seed)
            with torch.no_grad():
                self.score.weight.normal_(0.0, self.config.init_std, generator=generator)

    def forward(self, tokens_BS: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
        """float32 [B]: the number of each sequence; see `scores`."""
        return self.scores(tokens_BS, cu_seqlens=cu_seqlens).score_B

    def scores(self, tokens_BS: Tensor, *, cu_seqlens: Tensor | None = None) -> Scores:
        """The number of each sequence, and the balance loss of the experts on the way.

        Args:
            tokens_BS: token ids, int32 or int64.
            cu_seqlens: int32, as for `Transformer.features`: the sequences are its documents, in their order.
                None: every row is one sequence. No sequence may be empty, which is checked on CPUs alone.

        The head is computed in float32 whatever the dtype of the weights is: two answers to one prompt may
        differ by less than bfloat16 tells apart.
        """
        return self.scores_at(tokens_BS, _last_tokens(tokens_BS, cu_seqlens), cu_seqlens=cu_seqlens)

    def scores_at(self, tokens_BS: Tensor, place_B: Tensor, *, cu_seqlens: Tensor | None = None) -> Scores:
        """As `scores`, with one number for each of `place_B`, places among all tokens: int64.

        A token has seen what is before it in its sequence, so its number is that of the sequence up to there.
        """
        features = self.backbone.features(tokens_BS, cu_seqlens=cu_seqlens)
        hidden_BD = features.hidden_BSD.flatten(0, 1)[place_B]
        score_B1 = F.linear(hidden_BD.float(), self.score.weight.float())
        return Scores(score_B=score_B1.squeeze(1), balance=features.balance)


def _last_tokens(tokens_BS: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """int64: where the last token of each sequence is among all tokens."""
    if tokens_BS.ndim != 2 or tokens_BS.shape[1] == 0:
        raise ValueError(
            f"ScalarModel: tokens_BS must have two dimensions and a token a row, got {list(tokens_BS.shape)}"
        )
    num_sequences, length = tokens_BS.shape
    if cu_seqlens is None:
        return torch.arange(1, num_sequences + 1, device=tokens_BS.device) * length - 1
    if cu_seqlens.device.type == "cpu" and bool((cu_seqlens.diff() == 0).any()):
        which = int((cu_seqlens.diff() == 0).nonzero()[0])
        raise ValueError(f"ScalarModel: cu_seqlens must hold no empty sequence, got one at {which}")
    return cu_seqlens[1:].long() - 1
