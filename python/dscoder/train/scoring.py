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
from dscoder.train.reward import Answer, RewardBatch
from dscoder.train.steps import characters_after, token_at

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


def score_sequences(
    model: ScalarModel, sequences: Sequence[Sequence[int]], *, max_tokens: int = _MAX_TOKENS
) -> list[float]:
    """The score of each sequence of ids; the model is in evaluation mode meanwhile."""
    places = [[len(sequence) - 1] for sequence in sequences]
    return [score for (score,) in score_places(model, sequences, places, max_tokens=max_tokens)]


@torch.no_grad()
def score_places(
    model: ScalarModel,
    sequences: Sequence[Sequence[int]],
    places: Sequence[Sequence[int]],
    *,
    max_tokens: int = _MAX_TOKENS,
) -> list[list[float]]:
    """The score of each sequence up to each of its places, read in one pass: it sees no token after."""
    device = model.score.weight.device
    scores: list[list[float]] = [[] for _ in sequences]
    was_training = model.training
    model.eval()
    try:
        for batch in _batches(sequences, max_tokens):
            tokens_BS, cu_seqlens = packed([sequences[idx] for idx in batch], device)
            starts = accumulate((len(sequences[idx]) for idx in batch), initial=0)
            among_all = [start + p for idx, start in zip(batch, starts, strict=False) for p in places[idx]]
            place_B = torch.tensor(among_all, dtype=torch.int64, device=device)
            found = iter(model.scores_at(tokens_BS, place_B, cu_seqlens=cu_seqlens).score_B.tolist())
            for idx in batch:
                scores[idx] = [next(found) for _ in places[idx]]
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
        found = self._scores([(prompt, text, (len(text),)) for prompt, text in answers])
        return [None if scores is None else scores[0] for scores in found]

    def reward(self, batch: RewardBatch) -> list[float | None]:
        """The scores as a reward function of GRPO."""
        return self.scores([(_asked(answer), answer.completion) for answer in batch.answers])

    def step_rewards(self, batch: RewardBatch) -> list[list[float] | None]:
        """A process reward function of GRPO: the score of each answer up to the end of each of its steps.

        All steps of an answer are read in one pass. The last one is read at the end token, where the model
        learnt to speak; what it says at the others is what it makes of an answer that is not done.
        """
        return self._scores(
            [
                (_asked(answer), answer.completion, tuple(accumulate(map(len, answer.steps))))
                for answer in batch.answers
            ]
        )

    def _scores(self, answers: Sequence[tuple[Prompt, str, tuple[int, ...]]]) -> list[list[float] | None]:
        """The scores of each answer up to each of so many characters; None where it is too long."""
        wanted = [self._wanted(*answer) for answer in answers]
        longest = self.encoder.max_positions
        distinct = list(dict.fromkeys(item for item in wanted if len(item[0]) <= longest))
        scores = score_places(self.model, *zip(*distinct, strict=True)) if distinct else []
        found = dict(zip(distinct, scores, strict=True))
        return [found.get(item) for item in wanted]

    def _wanted(
        self, prompt: Prompt, text: str, text_ends: Sequence[int]
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A sequence and the places in it after which there is so much of the text; its end at the last."""
        read = self.encoder.placed(prompt, text)
        characters = characters_after(read.ids[read.num_before : -1], self.encoder.tokenizer.token_bytes())
        inner = [
            read.num_before + token_at(end + read.shift, characters) - 1
            for end in text_ends
            if end < len(text)
        ]
        return read.ids, (*inner, *([len(read.ids) - 1] * (len(text_ends) - len(inner))))


def _asked(answer: Answer) -> Prompt:
    problem = answer.problem
    return Prompt(
        text=answer.prompt,
        suffix=problem.suffix,
        form=problem.form,
        max_new_tokens=problem.max_new_tokens,
    )
