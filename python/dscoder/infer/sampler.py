"""Draw the next token of every row of a batch: greedy, temperature, top-k, top-p.

A row's token is a pure function of its logits, its sampling config and its step, so it depends neither on
the other rows nor on its place among them: the randomness of a step is one uniform number computed from
(seed, step), turned into a token by inverting the cumulative distribution: over the tokens by their ids, or,
for a row with top-k or top-p, likeliest first, which takes a sort of the vocabulary.

Order of the filters as in transformers and vLLM: temperature, top-k, then top-p on the renormalised rest.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dscoder.config.generate import SamplingConfig
from dscoder.runtime.seed import derive_seed

# What `draw_numbers` describes a draw by.
NUM_DRAW_COLUMNS = 4
GREEDY_NUMBERS = (0.0, 0.0, 1.0, 0.0)


def uniform(seed: int, step: int) -> float:
    """The uniform number in [0, 1) of step `step` under `seed`; 53 random bits."""
    return (derive_seed("draw", seed, step) >> 10) / float(1 << 53)


def draw_numbers(sampling: SamplingConfig, step: int) -> tuple[float, float, float, float]:
    """One row of `how_B4`: temperature, top-k, top-p and the uniform number of this step."""
    if sampling.temperature == 0:
        return GREEDY_NUMBERS
    return sampling.temperature, float(sampling.top_k), sampling.top_p, uniform(sampling.seed, step)


def likeliest(logits_BV: Tensor) -> Tensor:
    """The greedy answer, float64 [2, B]: each row's largest logit and its token.

    Equal logits go to the smaller id. The peak alone tells a healthy row: NaN propagates through it, +inf is
    the peak, and so is -inf where there is nothing else (-inf alone marks a token as forbidden).
    """
    peak_B, token_B = logits_BV.amax(dim=-1), logits_BV.argmax(dim=-1)
    return torch.stack([peak_B.double(), token_B.double()])


def has_filters(how: Sequence[Sequence[float]]) -> bool:
    """Whether any of these rows of `draw_numbers` has a top-k or a top-p."""
    return any(top_k > 0 or top_p < 1 for _, top_k, top_p, _ in how)


def draw(logits_BV: Tensor, answer_2B: Tensor, how_B4: Tensor, *, is_filtered: bool = True) -> Tensor:
    """The answer with the tokens of rows that have a temperature drawn; nothing waits for the device.

    Args:
        logits_BV: of any float type.
        answer_2B: of `likeliest`.
        how_B4: float64, a row of `draw_numbers` each; a top-k of 0 keeps the whole vocabulary.
        is_filtered: `has_filters` of the rows; where it is False nothing is sorted.
    """
    temperature_B1, top_k_B1, top_p_B1, uniform_B1 = (how_B[:, None] for how_B in how_B4.unbind(dim=1))
    is_greedy_B1 = temperature_B1 == 0
    # In float64: the sums over 100 000 tokens must not depend on rounding. Subtracting the peak before
    # dividing keeps tiny temperatures from overflowing.
    scaled_BV = (logits_BV - answer_2B[0, :, None]).div_(temperature_B1.masked_fill(is_greedy_B1, 1.0))
    token_B1 = _invert(scaled_BV.exp(), uniform_B1)
    if is_filtered:
        filtered_B1 = _draw_filtered(scaled_BV, top_k_B1, top_p_B1, uniform_B1)
        token_B1 = torch.where((top_k_B1 > 0) | (top_p_B1 < 1), filtered_B1, token_B1)
    return torch.stack([answer_2B[0], torch.where(is_greedy_B1, answer_2B[1, :, None], token_B1)[:, 0]])


def _draw_filtered(scaled_BV: Tensor, top_k_B1: Tensor, top_p_B1: Tensor, uniform_B1: Tensor) -> Tensor:
    """A token for each row, [B, 1], from those that its top-k and its top-p leave."""
    sorted_BV, order_BV = scaled_BV.sort(dim=-1, descending=True, stable=True)
    weight_BV = sorted_BV.exp_()
    rank_V = torch.arange(weight_BV.shape[1], device=weight_BV.device)
    weight_BV = weight_BV.masked_fill((rank_V >= top_k_B1) & (top_k_B1 > 0), 0.0)
    # A token stays if the tokens before it have less than top_p: the first always does.
    before_BV = weight_BV.cumsum(-1) - weight_BV
    kept_BV = before_BV < top_p_B1 * weight_BV.sum(-1, keepdim=True)
    return order_BV.gather(-1, _invert(weight_BV * kept_BV, uniform_B1))


def _invert(weight_BV: Tensor, uniform_B1: Tensor) -> Tensor:
    """The first place of each row, [B, 1], whose cumulative weight exceeds the uniform share of the total."""
    cumulative_BV = weight_BV.cumsum(-1)
    # A place of weight 0 never does. The product may round up to the total, which nothing exceeds.
    total_B1 = cumulative_BV[:, -1:]
    target_B1 = torch.minimum(uniform_B1 * total_B1, torch.nextafter(total_B1, torch.zeros_like(total_B1)))
    # Rows of NaN point past the end; their peak gives them away.
    last = weight_BV.shape[1] - 1
    return torch.searchsorted(cumulative_BV, target_B1, right=True).clamp_(max=last)


def add_logprobs(logits_BV: Tensor, answer_2B: Tensor, how_B4: Tensor | None) -> Tensor:
    """The answer with a third row: the log-probability of each row's token, computed in float32.

    It is that of the softmax over the whole vocabulary at the row's temperature (at 1 for greedy rows),
    before top-k and top-p: what a trainer that knows nothing of the filters finds too.

    Args:
        answer_2B: of `likeliest` or `draw`.
        how_B4: as for `draw`; None: all rows are greedy.
    """
    logits_BV = logits_BV.float()
    if how_B4 is not None:
        temperature_B1 = how_B4[:, :1].masked_fill(how_B4[:, :1] == 0, 1.0).float()
        # As in `draw`: a tiny temperature must not overflow.
        logits_BV = (logits_BV - logits_BV.amax(dim=-1, keepdim=True)) / temperature_B1
    token_B1 = answer_2B[1, :, None].long()
    logprob_B = logits_BV.gather(-1, token_B1)[:, 0] - logits_BV.logsumexp(dim=-1)
    return torch.cat([answer_2B, logprob_B[None].double()])
