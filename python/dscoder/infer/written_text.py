"""What one request has written so far, and the rules that end it, whatever drew the tokens."""

from collections.abc import Sequence
from functools import partial

from dscoder.infer.request import Completion, Event, FinishReason, Request
from dscoder.infer.stream import TextStream
from dscoder.text.tokenizer import Tokenizer


class WrittenText:
    """The tokens of one request, the text that they say, and where it ends."""

    def __init__(
        self,
        request_idx: int,
        request: Request,
        *,
        tokenizer: Tokenizer,
        max_positions: int,
        whole_tokens: dict[int, str],
    ) -> None:
        """`whole_tokens`: the text of those that are whole characters, shared by all texts of a tokenizer."""
        room = max_positions - len(request.prompt)
        self.request_idx = request_idx
        self.request = request
        self.tokens: list[int] = []
        self.logprobs: list[float] = []  # empty if they are not kept
        self.budget = min(request.max_new_tokens, room)
        self._budget_reason: FinishReason = "length" if request.max_new_tokens <= room else "context"
        self._eos_id = tokenizer.eos_id
        self._stream = TextStream(
            partial(tokenizer.decode, skip_special=True), stop=request.stop, whole=whole_tokens
        )

    @property
    def last_token(self) -> int:
        """The one that the next is drawn after."""
        return self.tokens[-1] if self.tokens else self.request.prompt[-1]

    def piece(self, start: int, length: int) -> Sequence[int]:
        """Tokens of the prompt and what follows it."""
        known = [*self.request.prompt, *self.tokens] if self.tokens else self.request.prompt
        return known[start : start + length]

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
            logprobs=tuple(self.logprobs) if self.request.keep_logprobs else None,
            # What was held back may turn out to be a stop string only once the text is complete.
            finish_reason="stop" if self._stream.is_stopped else reason or self._budget_reason,
        )
        return Event(request_idx=self.request_idx, text=text, completion=completion)
