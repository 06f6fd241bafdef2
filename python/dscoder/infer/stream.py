"""Turn a request's tokens into text as they come, without ever taking anything back.

Two things are held back: bytes that do not yet form a character, and text that may be the beginning of a
stop string. The parts put together are the decoded tokens, cut before the first stop string.
"""

from collections.abc import Callable, Sequence

_REPLACEMENT = "\ufffd"  # what decoding puts in place of an unfinished character
_LONGEST_CHARACTER = 4  # bytes of one UTF-8 character, so at most so many tokens


def remember_tokens(decode: Callable[[list[int]], str]) -> Callable[[list[int]], str]:
    """`decode`, with the text of single tokens kept: nearly all that a `Detokenizer` asks for."""
    known: dict[int, str] = {}

    def decode_once(tokens: list[int]) -> str:
        if len(tokens) > 1:
            return decode(tokens)
        [token] = tokens
        text = known.get(token)
        if text is None:
            text = known[token] = decode(tokens)
        return text

    return decode_once


class Detokenizer:
    """Incremental decoding; `decode` maps token ids to text and concatenates their bytes."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._pending: list[int] = []  # tokens whose text is not out yet

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is unfinished."""
        self._pending.append(token)
        text = self._decode(self._pending)
        if not text.endswith(_REPLACEMENT):
            self._pending = []
            return text
        return self._release_broken(text) if len(self._pending) >= _LONGEST_CHARACTER else ""

    def flush(self) -> str:
        """The rest, at the end of the text; an unfinished character becomes U+FFFD."""
        text = self._decode(self._pending) if self._pending else ""
        self._pending = []
        return text

    def _release_broken(self, text: str) -> str:
        """Let go of leading tokens that no later byte can complete, so that the wait stays bounded."""
        for cut in range(len(self._pending) - 1, 0, -1):
            head = self._decode(self._pending[:cut])
            # Where the cut splits a character, its two halves decode to more than the whole does.
            if head + self._decode(self._pending[cut:]) == text:
                del self._pending[:cut]
                return head
        return ""


class TextStream:
    """The text of one request: detokenised, and ended by the first stop string."""

    def __init__(self, decode: Callable[[list[int]], str], *, stop: Sequence[str] = ()) -> None:
        self._detokenizer = Detokenizer(decode)
        self._stop = tuple(stop)
        self._held = ""  # decoded, but perhaps the beginning of a stop string
        self._released: list[str] = []
        self.is_stopped = False

    @property
    def text(self) -> str:
        """Everything released."""
        return "".join(self._released)

    def push(self, token: int) -> str:
        """Add a token; returns the text that is certain. Sets `is_stopped` when a stop string is complete."""
        return self._advance(self._detokenizer.push(token))

    def finish(self) -> str:
        """The text ends here: returns what was held back."""
        rest = self._advance(self._detokenizer.flush())
        return rest if self.is_stopped else rest + self._release(len(self._held))

    def _advance(self, text: str) -> str:
        if self.is_stopped:
            return ""
        self._held += text
        cut = _first_stop(self._held, self._stop)
        if cut is not None:
            self.is_stopped = True
            released = self._release(cut)
            self._held = ""
            return released
        return self._release(len(self._held) - _undecided_length(self._held, self._stop))

    def _release(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        self._released.append(text)
        return text


def _first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the stop string starts that is complete first (of several, the longest).

    Which one is complete first does not depend on how the text was split into tokens; which one starts
    first would.
    """
    found = [(start + len(word), start) for word in stop if (start := text.find(word)) >= 0]
    return min(found)[1] if found else None


def _undecided_length(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of `text` that is a proper beginning of a stop string."""
    longest = max((len(word) for word in stop), default=0)
    for length in range(min(longest - 1, len(text)), 0, -1):
        if any(len(word) > length and word.startswith(text[-length:]) for word in stop):
            return length
    return 0
