"""Text becomes a prompt: to be continued, or with a hole to be filled.

The prompt of a hole is prefix-suffix-middle, as both papers train it (DeepSeek-Coder section 3.1.2):
begin-of-text, fim-begin, prefix, fim-hole, suffix, fim-end; the model writes the middle and ends the text.
A model trained in the other order is asked in that (`GenerateConfig.fim_order`).
Only the base models of DeepSeek-Coder and Coder-V2-Lite were trained to; instruct models and the large V2
were not.
"""

import io
from collections.abc import Sequence

from dscoder.config.generate import GenerateConfig
from dscoder.infer.request import Request
from dscoder.text.fim import FimOrder, arrange
from dscoder.text.tokenizer import Tokenizer


def split_at_marker(text: str, marker: str) -> tuple[str, str] | None:
    """(before, after) the one `marker` in `text`; None without one, ValueError with several."""
    count = text.count(marker)
    if count > 1:
        raise ValueError(f"infill: the text must hold {marker!r} at most once, got it {count} times")
    if count == 0:
        return None
    before, _, after = text.partition(marker)
    return before, after


def split_at_position(text: str, *, line: int, column: int | None = None) -> tuple[str, str]:
    """(before, after) a position as editors count it: both from 1, column c is before the c-th character.

    A tab is one character. The column after the last character, and None, is the end of the line, before
    its line break.
    """
    # Not str.splitlines, which also breaks at form feeds and other characters that editors keep in a line.
    lines = list(io.StringIO(text, newline=""))
    if not text or text.endswith(("\n", "\r")):
        lines.append("")  # the line a cursor stands on after the last line break
    if not 1 <= line <= len(lines):
        raise ValueError(f"infill: line must be in [1, {len(lines)}], got {line}")
    length = len(lines[line - 1].rstrip("\r\n"))
    if column is not None and not 1 <= column <= length + 1:
        raise ValueError(f"infill: column must be in [1, {length + 1}] on line {line}, got {column}")
    offset = sum(len(text_line) for text_line in lines[: line - 1])
    offset += length if column is None else column - 1
    return text[:offset], text[offset:]


def trim_around_hole(
    prefix: Sequence[int], suffix: Sequence[int], *, room: int, prefix_share: float
) -> tuple[Sequence[int], Sequence[int]]:
    """The tokens nearest to the hole, at most `room` in all.

    The prefix has `prefix_share` of the room, the suffix the rest; what one side does not need the other
    side gets.
    """
    prefix_room = max(int(room * prefix_share), room - len(suffix))
    num_prefix = min(len(prefix), prefix_room)
    num_suffix = min(len(suffix), room - num_prefix)
    return prefix[len(prefix) - num_prefix :], suffix[:num_suffix]


def text_request(tokenizer: Tokenizer, text: str, *, config: GenerateConfig) -> Request:
    """The request that continues `text`, with begin-of-text before it; special strings in it mean nothing."""
    return Request(
        prompt=tuple(tokenizer.encode(text, add_bos=tokenizer.bos_id is not None)),
        max_new_tokens=config.max_new_tokens,
        sampling=config.sampling,
        stop=config.stop_strings,
    )


def infill_request(
    tokenizer: Tokenizer, prefix: str, suffix: str, *, max_positions: int, config: GenerateConfig
) -> Request:
    """The request that fills the hole between `prefix` and `suffix`.

    Text too long for the context is cut at the far ends, see `trim_around_hole`. Sentinels that the model
    writes end the completion.

    Raises:
        ValueError: the tokenizer has no FIM tokens, or the completion leaves no room for a prompt.
    """
    begin_id, hole_id, end_id = tokenizer.fim_begin_id, tokenizer.fim_hole_id, tokenizer.fim_end_id
    if begin_id is None or hole_id is None or end_id is None:
        raise ValueError(
            f"infill: the tokenizer must have the fill-in-the-middle tokens, got ids {begin_id}, {hole_id} "
            f"and {end_id}; the model was not trained to fill holes"
        )
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    sentinels = (begin_id, hole_id, end_id)
    frame_length = len(start) + len(sentinels)
    room = max_positions - config.max_new_tokens - frame_length
    if room < 1:
        raise ValueError(
            f"infill: max_new_tokens must be < {max_positions - frame_length} (the model's context less the "
            f"prompt's frame), got {config.max_new_tokens}"
        )
    before, after = trim_around_hole(
        tokenizer.encode(prefix), tokenizer.encode(suffix), room=room, prefix_share=config.prefix_share
    )
    order = FimOrder[config.fim_order.upper()]
    return Request(
        prompt=(*start, *arrange(order, before, after, sentinels)),
        max_new_tokens=config.max_new_tokens,
        sampling=config.sampling,
        stop=config.stop_strings,
        stop_ids=(begin_id, hole_id, end_id),
    )


def match_line_breaks(completion: str, text: str) -> str:
    """`completion` with the line breaks of `text`, if those are all CR LF."""
    if "\r\n" not in text or text.count("\n") != text.count("\r\n"):
        return completion
    return completion.replace("\r\n", "\n").replace("\n", "\r\n")
