"""Holes: where a position is, what is cut from long text, and the prompt's form."""

import pytest

from dscoder.config.generate import GenerateConfig
from dscoder.infer.engine import Engine
from dscoder.infer.infill import (
    infill_request,
    match_line_breaks,
    split_at_marker,
    split_at_position,
    text_request,
    trim_around_hole,
)
from dscoder.infer.request import Request


def build(tokenizer, prefix: str, suffix: str, *, max_positions: int = 64, **fields: object) -> Request:
    config = GenerateConfig(**{"max_new_tokens": 8, **fields})
    return infill_request(tokenizer, prefix, suffix, max_positions=max_positions, config=config)


# ---- positions ----


@pytest.mark.parametrize(
    ("line", "column", "before"),
    [(1, 1, ""), (1, 3, "ab"), (2, 1, "ab\n"), (2, None, "ab\n\tcd"), (2, 2, "ab\n\t"), (3, 1, "ab\n\tcd\n")],
)
def test_lines_and_columns_count_from_one(line: int, column: int | None, before: str) -> None:
    text = "ab\n\tcd\n"
    assert split_at_position(text, line=line, column=column) == (before, text[len(before) :])


def test_the_end_of_a_line_is_before_its_line_break_whatever_that_is() -> None:
    text = "a\r\nb\rc\n"
    assert split_at_position(text, line=1) == ("a", "\r\nb\rc\n")
    assert split_at_position(text, line=2) == ("a\r\nb", "\rc\n")
    assert split_at_position(text, line=3, column=2) == ("a\r\nb\rc", "\n")


def test_a_form_feed_does_not_end_a_line() -> None:
    assert split_at_position("a\x0cb\u2028c\nd", line=2) == ("a\x0cb\u2028c\nd", "")


def test_an_empty_text_has_one_line() -> None:
    assert split_at_position("", line=1, column=1) == ("", "")


@pytest.mark.parametrize("line", [0, 4])
def test_a_line_outside_the_text_is_an_error(line: int) -> None:
    with pytest.raises(ValueError, match=rf"line must be in \[1, 3\], got {line}"):
        split_at_position("a\nb\n", line=line)


@pytest.mark.parametrize("column", [0, 4])
def test_a_column_outside_the_line_is_an_error(column: int) -> None:
    with pytest.raises(ValueError, match=rf"column must be in \[1, 3\] on line 1, got {column}"):
        split_at_position("ab\nlonger\n", line=1, column=column)


def test_a_marker_splits_the_text() -> None:
    assert split_at_marker("a<X>b", "<X>") == ("a", "b")
    assert split_at_marker("ab", "<X>") is None


def test_two_markers_are_an_error() -> None:
    with pytest.raises(ValueError, match="must hold '<X>' at most once, got it 2 times"):
        split_at_marker("<X><X>", "<X>")


# ---- what is kept of long text ----


@pytest.mark.parametrize(
    ("num_prefix", "num_suffix", "kept"),
    [
        (3, 4, (3, 4)),  # both fit
        (50, 50, (15, 5)),  # neither: shared out
        (50, 2, (18, 2)),  # what one side does not need the other side gets
        (3, 50, (3, 17)),
        (20, 0, (20, 0)),
        (0, 50, (0, 20)),
    ],
)
def test_the_tokens_nearest_to_the_hole_are_kept(
    num_prefix: int, num_suffix: int, kept: tuple[int, int]
) -> None:
    prefix, suffix = list(range(num_prefix)), list(range(num_suffix))
    before, after = trim_around_hole(prefix, suffix, room=20, prefix_share=0.75)
    assert (len(before), len(after)) == kept
    assert before == prefix[num_prefix - len(before) :]
    assert after == suffix[: len(after)]


@pytest.mark.parametrize(("share", "kept"), [(0.0, (0, 20)), (1.0, (20, 0))])
def test_one_side_may_have_all_the_room(share: float, kept: tuple[int, int]) -> None:
    before, after = trim_around_hole(range(50), range(50), room=20, prefix_share=share)
    assert (len(before), len(after)) == kept


# ---- the prompt ----


def test_the_prompt_is_prefix_suffix_middle(tokenizer) -> None:
    request = build(tokenizer, "ab", "cd")
    assert request.prompt == (256, 258, *b"ab", 259, *b"cd", 260)
    assert request.stop == ()
    assert set(request.stop_ids) == {258, 259, 260}


def test_a_model_of_the_other_order_reads_the_suffix_first(tokenizer) -> None:
    assert build(tokenizer, "ab", "cd", fim_order="spm").prompt[-6:] == (259, *b"cd", 260, *b"ab")
    with pytest.raises(ValueError, match="fim_order must be psm or spm, got 'msp'"):
        build(tokenizer, "ab", "cd", fim_order="msp")


def test_prompt_and_completion_fill_the_context_and_no_more(tokenizer) -> None:
    request = build(tokenizer, "a" * 100, "b" * 100, max_positions=52)
    assert len(request.prompt) + request.max_new_tokens == 52
    assert request.prompt.count(ord("a")) == 30  # three quarters of the 40 that the frame leaves


@pytest.mark.parametrize("line_break", [b"\n", b"\r\n"])
def test_single_line_stops_before_the_line_break(scripted, tokenizer, line_break: bytes) -> None:
    model = scripted(b"\xff" + b"ab" + line_break + b"cd")
    model.follow[tokenizer.fim_end_id] = ord("a")
    [completion] = Engine(model, tokenizer).generate([build(tokenizer, "x", "y", single_line=True)])
    assert (completion.text, completion.finish_reason) == ("ab", "stop")


def test_a_sentinel_written_by_the_model_ends_the_completion(scripted, tokenizer) -> None:
    model = scripted(b"\xff" + b"ab")
    model.follow |= {tokenizer.fim_end_id: ord("a"), ord("b"): tokenizer.fim_hole_id}
    [completion] = Engine(model, tokenizer).generate([build(tokenizer, "x", "y")])
    assert (completion.text, completion.finish_reason) == ("ab", "stop")


def test_a_tokenizer_without_bos_gives_a_prompt_without(tokenizer) -> None:
    tokenizer.bos_id = None
    assert build(tokenizer, "a", "b").prompt == (258, *b"a", 259, *b"b", 260)


def test_a_tokenizer_without_fim_tokens_is_an_error(tokenizer) -> None:
    tokenizer.fim_hole_id = None
    with pytest.raises(
        ValueError, match="must have the fill-in-the-middle tokens, got ids 258, None and 260"
    ):
        build(tokenizer, "a", "b")


def test_a_completion_as_long_as_the_context_is_an_error(tokenizer) -> None:
    with pytest.raises(ValueError, match=r"max_new_tokens must be < 60 .* got 60"):
        build(tokenizer, "a", "b", max_new_tokens=60)


@pytest.mark.parametrize(("field", "value"), [("prefix_share", 1.5), ("max_new_tokens", -1)])
def test_infill_config_rejects_values_out_of_range(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"GenerateConfig: {field} must be .* got {value}"):
        GenerateConfig(**{field: value})


def test_generate_config_rejects_empty_stop_strings() -> None:
    with pytest.raises(ValueError, match=r"stop strings must not be empty, got \('a', ''\)"):
        GenerateConfig(stop=("a", ""))


def test_a_single_line_adds_line_breaks_to_the_stop_strings() -> None:
    assert GenerateConfig(stop=("a",), single_line=True).stop_strings == ("a", "\n", "\r\n")


def test_text_to_continue_starts_with_bos_if_there_is_one(tokenizer) -> None:
    config = GenerateConfig(max_new_tokens=5, stop=("x",))
    request = text_request(tokenizer, "ab", config=config)
    assert (request.prompt, request.max_new_tokens, request.stop) == ((256, *b"ab"), 5, ("x",))
    tokenizer.bos_id = None
    assert text_request(tokenizer, "ab", config=config).prompt == tuple(b"ab")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a\r\nb\r\n", "x\r\ny\r\n"), ("a\nb\r\n", "x\ny\r\n"), ("a\n", "x\ny\r\n"), ("a", "x\ny\r\n")],
)
def test_a_completion_takes_over_line_breaks_that_are_all_crlf(text: str, expected: str) -> None:
    assert match_line_breaks("x\ny\r\n", text) == expected
