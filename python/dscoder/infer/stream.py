"""Turn a request's tokens into text as they come, without ever taking anything back.

Two things are held back: bytes that do not yet form a character, and text that may be the beginning of a
stop string. The parts put together are the decoded tokens, cut before the first stop string.
"""

from collections.abc import Callable, Sequence

_REPLACEMENT = "\ufffd"  # what decoding puts in place of an unfinished character
_LONGEST_CHARACTER = 4  # bytes of one UTF-8 character, so at most so many tokens


class Detokenizer:
    """Incremental decoding; `decode` maps token ids to text and concatenates their bytes.

    `whole` remembers the text of tokens that are whole characters by themselves, nearly all of them; those
    who share a `decode` may share it.
    """

    def __init__(self, decode: Callable[[list[int]], str], *, whole: dict[int, str] | None = None) -> None:
        self._decode = decode
        self._whole = {} if whole is None else whole
        self._pending: list[int] = []  # tokens whose text is not out yet

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is unfinished."""
        known = self._whole.get(token)
        if self._pending and known is None and not self._decode([token]):
            known = self._whole[token] = ""
        # A character goes on behind tokens without text (special ones).
        if known == "" or (known is not None and not self._pending):
            return known
        self._pending.append(token)
        text = self._decode(self._pending)
        if text.endswith(_REPLACEMENT):
            return self._release_broken(text) if len(self._pending) >= _LONGEST_CHARACTER else ""
        if len(self._pending) == 1:
            self._whole[token] = text
        self._pending = []
        return text

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

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        *,
        stop: Sequence[str] = (),
        whole: dict[int, str] | None = None,
    ) -> None:
        self._detokenizer = Detokenizer(decode, whole=whole)
        self._stop = tuple(stop)
        # What the end of a text may be that is not certain yet.
        self._beginnings = {word[:length] for word in stop for length in range(1, len(word))}
        self._most_held = max(map(len, self._beginnings), default=0)
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
        if self.is_stopped or not text:
            return ""
        if not self._stop:
            self._released.append(text)
            return text
        self._held += text
        cut = _first_stop(self._held, self._stop)
        if cut is not None:
            self.is_stopped = True
            released = self._release(cut)
            self._held = ""
            return released
        return self._release(len(self._held) - self._undecided_length())

    def _release(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        self._released.append(text)
        return text

    def _undecided_length(self) -> int:
        """Length of the longest end of what is held that is a proper beginning of a stop string."""
        for length in range(min(self._most_held, len(self._held)), 0, -1):
            if self._held[-length:] in self._beginnings:
                return length
        return 0


def _first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the stop string starts that is complete first (of several, the longest).

    Which one is complete first does not depend on how the text was split into tokens; which one starts
    first would.
    """
    found = [(start + len(word), start) for word in stop if (start := text.find(word)) >= 0]
    return min(found)[1] if found else None
