"""Scores of sequences by a model with a scalar head: many at once, packed, without padding."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from dscoder.checkpoint import load_scalar_model
from dscoder.models import ScalarModel
from dscoder.runtime.device import resolve_device
from dscoder.tasks.problem import Prompt
from dscoder.text.tokenizer import Tokenizer
from dscoder.train.prompts import PromptEncoder
from dscoder.train.reward import RewardBatch

_MAX_TOKENS = 16384  # in one forward pass


def packed(sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """tokens_BS [1, T] and cu_seqlens of sequences one behind the other."""
    tokens_BS = torch.tensor([[token for sequence in sequences for token in sequence]], dtype=torch.int64)
    ends = [0, *accumulate(map(len, sequences))]
    cu_seqlens = torch.tensor(ends, dtype=torch.int32)
    return tokens_BS.to(device, non_blocking=True), cu_seqlens.to(device, non_blocking=True)


def _batches(sequences: Sequence[Sequence[int]], max_tokens: int) -> Iterator[list[int]]:
    """Indices, shortest sequences first, so many at a time that `max_tokens` hold them; at least one."""
    batch: list[int] = []
    num_tokens = 0
    for idx in sorted(range(len(sequences)), key=lambda idx: (len(sequences[idx]), idx)):
        if batch and num_tokens + len(sequences[idx]) > max_tokens:
            yield batch
            batch, num_tokens = [], 0
        batch.append(idx)
        num_tokens += len(sequences[idx])
    if batch:
        yield batch


@torch.no_grad()
def score_sequences(
    model: ScalarModel, sequences: Sequence[Sequence[int]], *, max_tokens: int = _MAX_TOKENS
) -> list[float]:
    """The score of each sequence of ids; the model is in evaluation mode meanwhile."""
    device = model.score.weight.device
    scores = [0.0] * len(sequences)
    was_training = model.training
    model.eval()
    try:
        for batch in _batches(sequences, max_tokens):
            tokens_BS, cu_seqlens = packed([sequences[idx] for idx in batch], device)
            for idx, score in zip(batch, model(tokens_BS, cu_seqlens=cu_seqlens).tolist(), strict=True):
                scores[idx] = score
    finally:
        model.train(was_training)
    return scores


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerScorer:
    """A reward model and how it reads prompts and answers."""

    model: ScalarModel
    encoder: PromptEncoder

    @classmethod
    def load(
        cls,
        directory: str | Path,
        *,
        template: str | None = None,
        fim_order: str = "psm",
        dtype: torch.dtype | None = None,
        device: str = "auto",
    ) -> "AnswerScorer":
        """The model that `dscoder reward-model` left in RUN/model; `template` as it was trained."""
        model = load_scalar_model(directory, dtype=dtype, device=resolve_device(device), seed=None)
        encoder = PromptEncoder(
            tokenizer=Tokenizer.load(directory),
            max_positions=model.config.max_positions,
            template=template,
            fim_order=fim_order,
        )
        return cls(model=model, encoder=encoder)

    def scores(self, answers: Sequence[tuple[Prompt, str]]) -> list[float | None]:
        """The score of each answer to its prompt; None where both are too long for the model.

        The same sequence has the same score, bit for bit: what packing does to the last bits would become
        advantages of full size in a group whose answers are all alike.
        """
        sequences = [self.encoder.sequence(prompt, completion) for prompt, completion in answers]
        longest = self.encoder.max_positions
        distinct = list(dict.fromkeys(sequence for sequence in sequences if len(sequence) <= longest))
        found = dict(zip(distinct, score_sequences(self.model, distinct), strict=True))
        return [found.get(sequence) for sequence in sequences]

    def reward(self, batch: RewardBatch) -> list[float | None]:
        """The scores as a reward function of GRPO."""
        return self.scores(
            [
                (
                    Prompt(
                        text=answer.prompt,
                        suffix=answer.problem.suffix,
                        form=answer.problem.form,
                        max_new_tokens=answer.problem.max_new_tokens,
                    ),
                    answer.completion,
                )
                for answer in batch.answers
            ]
        )
