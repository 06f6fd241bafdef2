"""Log-probabilities of answers under a model, with gradient, answers packed one after another.

The logits of a batch are its largest tensor by far, so a chunk of tokens at a time has some, and backward
computes them again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from dscoder.models import Transformer

_CHUNK_TOKENS = 2048


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptAndAnswer:
    """The ids of a prompt and of an answer to it, at least one each."""

    prompt: Sequence[int]
    answer: Sequence[int]

    def __post_init__(self) -> None:
        if not self.prompt or not self.answer:
            raise ValueError(
                "PromptAndAnswer: prompt and answer must hold at least one token, "
                f"got {len(self.prompt)} and {len(self.answer)}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerLogprobs:
    """What a model says of a batch of answers.

    Attributes:
        logprobs_BS: float32, padded on the right with zeros.
        mask_BS: bool, the tokens of the answers.
        balance: the model's weighted balance loss, in evaluation mode too; 0 without gradients.
    """

    logprobs_BS: Tensor
    mask_BS: Tensor
    balance: Tensor


class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, ids_T: Tensor, temperature: float) -> Tensor:
        logprob_T = torch.empty(len(ids_T), dtype=torch.float32, device=hidden_TD.device)
        lse_T = torch.empty_like(logprob_T)
        for start in range(0, len(ids_T), _CHUNK_TOKENS):
            rows = slice(start, start + _CHUNK_TOKENS)
            logits_TV = (hidden_TD[rows] @ weight_VD.T).float().div_(temperature)
            lse_T[rows] = logits_TV.logsumexp(dim=-1)
            logprob_T[rows] = logits_TV.gather(1, ids_T[rows, None])[:, 0] - lse_T[rows]
        ctx.save_for_backward(hidden_TD, weight_VD, ids_T, lse_T)
        ctx.temperature = temperature
        return logprob_T

    @staticmethod
    def backward(ctx: Any, gradient_T: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        hidden_TD, weight_VD, ids_T, lse_T = ctx.saved_tensors
        scaled_T = gradient_T / ctx.temperature
        hidden_gradient_TD = torch.empty_like(hidden_TD)
        weight_gradient_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        for start in range(0, len(ids_T), _CHUNK_TOKENS):
            rows = slice(start, start + _CHUNK_TOKENS)
            chunk_TD = hidden_TD[rows]
            logits_TV = (chunk_TD @ weight_VD.T).float().div_(ctx.temperature)
            # d logprob / d logits = one hot - softmax.
            gradient_TV = logits_TV.sub_(lse_T[rows, None]).exp_().mul_(-scaled_T[rows, None])
            gradient_TV[torch.arange(len(chunk_TD), device=ids_T.device), ids_T[rows]] += scaled_T[rows]
            gradient_TV = gradient_TV.to(hidden_TD.dtype)
            hidden_gradient_TD[rows] = gradient_TV @ weight_VD
            if ctx.needs_input_grad[1]:
                weight_gradient_VD += gradient_TV.T @ chunk_TD
        weight_gradient = weight_gradient_VD.to(weight_VD.dtype) if ctx.needs_input_grad[1] else None
        return hidden_gradient_TD, weight_gradient, None, None


def token_logprobs(
    hidden_TD: Tensor, weight_VD: Tensor, ids_T: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """log softmax(hidden @ weight.T / temperature) at one id a row, in float32: [T].

    Differentiable once in `hidden_TD` and `weight_VD`.
    """
    if hidden_TD.ndim != 2 or ids_T.shape != hidden_TD.shape[:1]:
        raise ValueError(
            f"token_logprobs: ids_T must have one id a row of hidden_TD {list(hidden_TD.shape)}, "
            f"got {list(ids_T.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"token_logprobs: temperature must be > 0, got {temperature}")
    found: Tensor = _ChunkedLogprobs.apply(hidden_TD, weight_VD, ids_T, temperature)  # type: ignore[no-untyped-call]
    return found


def answer_logprobs(
    model: Transformer, texts: Sequence[PromptAndAnswer], *, temperature: float, num_ids: int
) -> AnswerLogprobs:
    """How likely the tokens of each answer are after its prompt.

    Args:
        num_ids: ids from there on have probability 0: a sampler never draws those beyond the tokenizer's.
    """
    device = model.embed.weight.device
    # The last token of an answer predicts nothing.
    inputs = [[*text.prompt, *text.answer[:-1]] for text in texts]
    ends = [0, *accumulate(map(len, inputs))]
    rows = [
        row for text, end in zip(texts, ends[1:], strict=True) for row in range(end - len(text.answer), end)
    ]
    lengths_B1 = torch.tensor([[len(text.answer)] for text in texts], device=device)
    features = model.features(
        torch.tensor([[token for ids in inputs for token in ids]], device=device),
        cu_seqlens=torch.tensor(ends, dtype=torch.int32, device=device),
        has_balance=True,
    )
    logprob_T = token_logprobs(
        features.hidden_BSD[0, torch.tensor(rows, device=device)],
        model.head.weight[:num_ids],
        torch.tensor([token for text in texts for token in text.answer], device=device),
        temperature=temperature,
    )
    longest = max(len(text.answer) for text in texts)
    # Places are counted here: a device would have to be waited for to find them by the mask.
    places = [row * longest + idx for row, text in enumerate(texts) for idx in range(len(text.answer))]
    flat = torch.zeros(len(texts) * longest, device=device)
    flat = flat.index_copy(0, torch.tensor(places, device=device), logprob_T)
    return AnswerLogprobs(
        logprobs_BS=flat.view(len(texts), longest),
        mask_BS=torch.arange(longest, device=device) < lengths_B1,
        balance=features.balance,
    )
