"""What generation is asked for and what it answers."""

from dataclasses import dataclass
from typing import Literal

from dscoder.config.generate import GREEDY, SamplingConfig

# eos: the model ended the text; stop: a stop string or stop token came; length: max_new_tokens are there;
# context: the model has no positions left.
FinishReason = Literal["eos", "stop", "length", "context"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One prompt, as token ids, and how to continue it."""

    prompt: tuple[int, ...]
    max_new_tokens: int = 128
    sampling: SamplingConfig = GREEDY
    stop: tuple[str, ...] = ()  # the text ends before the first of them
    stop_ids: tuple[int, ...] = ()  # end the text as the end-of-text token does, but with reason "stop"
    keep_logprobs: bool = False  # tell how likely each token drawn was

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("Request: prompt must hold at least one token, got none")
        if self.max_new_tokens < 0:
            raise ValueError(f"Request: max_new_tokens must be >= 0, got {self.max_new_tokens}")
        if "" in self.stop:
            raise ValueError(f"Request: stop strings must not be empty, got {self.stop!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """The answer to one request.

    `tokens` are all tokens drawn, the one that ended the text included; `text` is what they say up to the
    end: no end-of-text token, no stop string, nothing after it. `logprobs`, if the request keeps them, has
    one number a token: see `dscoder.infer.sampler.add_logprobs`.
    """

    tokens: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    logprobs: tuple[float, ...] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """News of one request while it runs: text to append and, at its end, the whole completion."""

    request_idx: int  # place among the requests given
    text: str  # may be empty
    completion: Completion | None = None
