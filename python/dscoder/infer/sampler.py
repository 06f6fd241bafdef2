"""Draw the next token of every row of a batch: greedy, temperature, top-k, top-p.

A row's token is a pure function of its logits, its sampling config and its step, so it depends neither on
the other rows nor on its place among them: the randomness of a step is one uniform number computed from
(seed, step), turned into a token by inverting the cumulative distribution.

Order of the filters as in transformers and vLLM: temperature, top-k, then top-p on the renormalised rest.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dscoder.config.generate import SamplingConfig
from dscoder.runtime.seed import derive_seed


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """One row's draw: whose it is (for messages), how, and which token of the request it is."""

    request_idx: int
    step: int
    sampling: SamplingConfig


def uniform(seed: int, step: int) -> float:
    """The uniform number in [0, 1) of step `step` under `seed`; 53 random bits."""
    return (derive_seed("draw", seed, step) >> 10) / float(1 << 53)


def sample(logits_BV: Tensor, draws: Sequence[Draw]) -> list[int]:
    """The next token of each row.

    Equal logits go to the smaller id in the order of likelihood, so greedy takes the first of them.

    Raises:
        ValueError: a row has NaN, +inf, or nothing but -inf (-inf alone marks a token as forbidden).
    """
    if logits_BV.ndim != 2 or logits_BV.shape[0] != len(draws):
        raise ValueError(
            f"sample: logits_BV must be [{len(draws)}, V], one row per draw, got {tuple(logits_BV.shape)}"
        )
    # The peak alone tells a healthy row: NaN propagates through amax, +inf is the peak, all -inf too.
    peak_B1 = logits_BV.amax(-1, keepdim=True)
    token_B = logits_BV.argmax(-1)
    if any(draw.sampling.temperature > 0 for draw in draws):
        greedy_B = logits_BV.new_tensor([draw.sampling.temperature == 0 for draw in draws], dtype=torch.bool)
        token_B = torch.where(greedy_B, token_B, _draw_tokens(logits_BV, peak_B1, draws))
    # One transfer to the host for both the check and the result.
    answer_2B = torch.stack([peak_B1[:, 0].double(), token_B.double()]).tolist()
    for draw, peak in zip(draws, answer_2B[0], strict=True):
        if not -float("inf") < peak < float("inf"):
            raise ValueError(
                f"sample: the logits of request {draw.request_idx} at step {draw.step} must be finite, "
                f"got a largest value of {peak}"
            )
    return [int(token) for token in answer_2B[1]]


def _draw_tokens(logits_BV: Tensor, peak_B1: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Tokens [B] of the rows with a temperature; greedy rows get something in range."""
    vocab_size = logits_BV.shape[1]

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits_BV.device)[:, None]

    temperature_B1 = column([draw.sampling.temperature or 1.0 for draw in draws])
    top_k_B1 = column([float(draw.sampling.top_k or vocab_size) for draw in draws])
    top_p_B1 = column([draw.sampling.top_p for draw in draws])
    uniform_B1 = column([uniform(draw.sampling.seed, draw.step) for draw in draws])

    # Likeliest first, in float64: the sums over 100 000 tokens must not depend on rounding. Subtracting the
    # peak before dividing keeps tiny temperatures from overflowing.
    sorted_BV, order_BV = logits_BV.double().sort(dim=-1, descending=True, stable=True)
    weight_BV = ((sorted_BV - peak_B1.double()) / temperature_B1).exp()
    rank_V = torch.arange(vocab_size, device=logits_BV.device)
    weight_BV = weight_BV.masked_fill(rank_V >= top_k_B1, 0.0)
    # A token stays if the tokens before it have less than top_p: the first always does.
    before_BV = weight_BV.cumsum(-1) - weight_BV
    kept_BV = before_BV < top_p_B1 * weight_BV.sum(-1, keepdim=True)
    cumulative_BV = (weight_BV * kept_BV).cumsum(-1)
    # The first token whose cumulative weight exceeds the target; one with weight 0 never does. The product
    # may round up to the total, which nothing exceeds.
    total_B1 = cumulative_BV[:, -1:]
    target_B1 = torch.minimum(uniform_B1 * total_B1, torch.nextafter(total_B1, torch.zeros_like(total_B1)))
    # Rows of NaN point past the end; they are reported by the caller.
    choice_B1 = torch.searchsorted(cumulative_BV, target_B1, right=True).clamp_(max=vocab_size - 1)
    return order_BV.gather(-1, choice_B1)[:, 0]
