"""Batched generation over the cache: prompts of any lengths in, text as it comes and completions out.

Requests run in waves of at most `max_batch` rows. A wave's prompts are computed together, in chunks; a
row that is finished leaves the batch. What a request gets does not depend on its wave: rows never mix, and
the sampler draws by the request's own seed and step.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from dscoder.checkpoint import load_pretrained
from dscoder.config.generate import EngineConfig
from dscoder.infer.request import Completion, Event, FinishReason, Request
from dscoder.infer.sampler import Draw, sample
from dscoder.infer.stream import TextStream
from dscoder.models.cache import Cache, allocate_cache
from dscoder.models.transformer import Transformer
from dscoder.runtime.device import resolve_device
from dscoder.text.tokenizer import Tokenizer

_DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class _Row:
    """One request under way."""

    def __init__(self, request_idx: int, request: Request, *, tokenizer: Tokenizer, room: int) -> None:
        self.request_idx = request_idx
        self.request = request
        self.tokens: list[int] = []
        self.budget = min(request.max_new_tokens, room)
        self._budget_reason: FinishReason = "length" if request.max_new_tokens <= room else "context"
        self._eos_id = tokenizer.eos_id
        self._stream = TextStream(partial(tokenizer.decode, skip_special=True), stop=request.stop)

    def draw(self) -> Draw:
        return Draw(request_idx=self.request_idx, step=len(self.tokens), sampling=self.request.sampling)

    def accept(self, token: int) -> Event:
        """Take one token; the event carries the completion if it is the last."""
        self.tokens.append(token)
        if token == self._eos_id:
            return self.finish("eos")
        if token in self.request.stop_ids:
            return self.finish("stop")
        text = self._stream.push(token)
        if self._stream.is_stopped:
            return self.finish("stop", text)
        if len(self.tokens) == self.budget:
            return self.finish(self._budget_reason, text)
        return Event(request_idx=self.request_idx, text=text)

    def finish(self, reason: FinishReason | None = None, text: str = "") -> Event:
        """End the text; without a reason the budget is what ended it."""
        text += self._stream.finish()
        completion = Completion(
            tokens=tuple(self.tokens),
            text=self._stream.text,
            # What was held back may turn out to be a stop string only once the text is complete.
            finish_reason="stop" if self._stream.is_stopped else reason or self._budget_reason,
        )
        return Event(request_idx=self.request_idx, text=text, completion=completion)


class Engine:
    """Runs requests through a model; holds no state between calls."""

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, *, max_batch: int = 8, prefill_chunk: int = 512
    ) -> None:
        if max_batch < 1 or prefill_chunk < 1:
            raise ValueError(
                f"Engine: max_batch and prefill_chunk must be >= 1, got {max_batch} and {prefill_chunk}"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.max_positions = model.config.max_positions
        self._max_batch = max_batch
        self._prefill_chunk = prefill_chunk
        # The embedding may have padding rows: ids that stand for no text are never drawn.
        self._num_ids = min(model.config.vocab_size, tokenizer.vocab_size)

    @classmethod
    def load(cls, config: EngineConfig) -> "Engine":
        """The model and the tokenizer of one directory or hub repository."""
        device = resolve_device(config.device)
        tokenizer = Tokenizer.load(config.model)
        model = load_pretrained(config.model, dtype=_DTYPES[config.dtype], device=device)
        return cls(model, tokenizer, max_batch=config.max_batch, prefill_chunk=config.prefill_chunk)

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """The completion of each request, in the order of the requests."""
        done = {event.request_idx: event.completion for event in self.stream(requests) if event.completion}
        return [done[request_idx] for request_idx in range(len(requests))]

    def stream(self, requests: Sequence[Request]) -> Iterator[Event]:
        """Events as they happen; those of one request put together are its text, the last has the whole.

        Raises:
            ValueError: before anything runs, a prompt too long for the model or with an id it lacks; while
                it runs, logits that are not finite.
        """
        for request_idx, request in enumerate(requests):
            self._check(request_idx, request)
        return self._run(requests)

    def _check(self, request_idx: int, request: Request) -> None:
        if len(request.prompt) > self.max_positions:
            raise ValueError(
                f"generate: request {request_idx} must have <= {self.max_positions} prompt tokens, the "
                f"model's context, got {len(request.prompt)}"
            )
        vocab_size = self.model.config.vocab_size
        if not 0 <= min(request.prompt) <= max(request.prompt) < vocab_size:
            raise ValueError(
                f"generate: the token ids of request {request_idx} must be in [0, {vocab_size}), "
                f"got {min(request.prompt)} to {max(request.prompt)}"
            )

    def _run(self, requests: Sequence[Request]) -> Iterator[Event]:
        # Token dropping is for training; whoever generates between training steps gets the mode back.
        was_training = self.model.training
        self.model.eval()
        try:
            for first in range(0, len(requests), self._max_batch):
                yield from self._run_wave(first, requests[first : first + self._max_batch])
        finally:
            self.model.train(was_training)

    def _run_wave(self, first: int, requests: Sequence[Request]) -> Iterator[Event]:
        rows = [
            _Row(first + i, request, tokenizer=self.tokenizer, room=self.max_positions - len(request.prompt))
            for i, request in enumerate(requests)
        ]
        yield from (row.finish() for row in rows if row.budget == 0)
        rows = [row for row in rows if row.budget > 0]
        if not rows:
            return
        cache = self._allocate(rows)
        hidden_BD = self._prefill(rows, cache)
        while True:
            events = self._draw(rows, hidden_BD)
            yield from events
            kept = [i for i, event in enumerate(events) if event.completion is None]
            if not kept:
                return
            if len(kept) < len(rows):
                cache.select(torch.tensor(kept, device=hidden_BD.device))
                rows = [rows[i] for i in kept]
            hidden_BD = self._step(rows, cache)

    def _allocate(self, rows: Sequence[_Row]) -> Cache:
        weight = self.model.head.weight
        return allocate_cache(
            self.model.config,
            num_sequences=len(rows),
            # The last token drawn is never read back.
            max_positions=max(len(row.request.prompt) + row.budget - 1 for row in rows),
            dtype=weight.dtype,
            device=weight.device,
        )

    @torch.inference_mode()
    def _prefill(self, rows: Sequence[_Row], cache: Cache) -> Tensor:
        """Compute the prompts; returns hidden_BD, the state after the last token of each."""
        device = self.model.head.weight.device
        length_B = torch.tensor([len(row.request.prompt) for row in rows])
        longest = int(length_B.max())
        prompt_BS = torch.zeros(len(rows), longest, dtype=torch.long)
        for row_idx, row in enumerate(rows):
            prompt_BS[row_idx, : len(row.request.prompt)] = torch.tensor(row.request.prompt)
        last_BD = None
        for start in range(0, longest, self._prefill_chunk):
            tokens_BS = prompt_BS[:, start : start + self._prefill_chunk]
            num_new_B = (length_B - start).clamp(0, tokens_BS.shape[1])
            hidden_BSD = self.model.features(
                tokens_BS.to(device), cache=cache, num_new_B=num_new_B.to(device, torch.int32)
            ).hidden_BSD
            end_BD = hidden_BSD[torch.arange(len(rows)), (num_new_B - 1).clamp(min=0)]
            # A row without tokens in this chunk has its state from an earlier one.
            is_new_B1 = (num_new_B > 0).to(device)[:, None]
            last_BD = end_BD if last_BD is None else torch.where(is_new_B1, end_BD, last_BD)
        assert last_BD is not None
        return last_BD

    @torch.inference_mode()
    def _step(self, rows: Sequence[_Row], cache: Cache) -> Tensor:
        """Feed each row's last token; returns hidden_BD."""
        device = self.model.head.weight.device
        tokens_B1 = torch.tensor([row.tokens[-1:] for row in rows], device=device)
        return self.model.features(tokens_B1, cache=cache).hidden_BSD[:, -1]

    @torch.inference_mode()
    def _draw(self, rows: Sequence[_Row], hidden_BD: Tensor) -> list[Event]:
        """Draw one token a row."""
        logits_BV = self.model.head(hidden_BD)[:, : self._num_ids]
        tokens = sample(logits_BV, [row.draw() for row in rows])
        return [row.accept(token) for row, token in zip(rows, tokens, strict=True)]
