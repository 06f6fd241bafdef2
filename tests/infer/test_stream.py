"""Text as it comes: whole characters only, and nothing of a stop string."""

from itertools import pairwise

import pytest

from dscoder.infer.stream import Detokenizer, TextStream


def decode(tokens: list[int]) -> str:
    return bytes(tokens).decode(errors="replace")


def splits(data: bytes) -> list[bytes]:
    """Every byte for itself."""
    return [data[i : i + 1] for i in range(len(data))]


def test_characters_come_out_whole() -> None:
    detokenizer = Detokenizer(decode)
    parts = [detokenizer.push(byte) for byte in "a\u00e9\u4e2d\U0001f600b".encode()]
    assert [part for part in parts if part] == ["a", "\u00e9", "\u4e2d", "\U0001f600", "b"]
    assert detokenizer.flush() == ""


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x80\x80\x80\x80\x80",
        b"a\xe4\xb8b\xe4\xb8\xad",
        b"\xf0\x9f\x98\xf0\x9f\x98\x80",
        b"\xff\xfe\xe4\xb8",
        "x\ufffdy\ufffd\ufffd\ufffd\ufffd\ufffd".encode(),
    ],
)
def test_the_parts_put_together_are_the_decoded_whole(data: bytes) -> None:
    detokenizer = Detokenizer(decode)
    text = "".join(detokenizer.push(byte) for byte in data) + detokenizer.flush()
    assert text == data.decode(errors="replace")


@pytest.mark.parametrize("data", ["\U0001f600".encode(), b"\xe4\xe8\xf0\xb8\x9a\xb8", b"\xe4\x9a\xe9\xadX"])
@pytest.mark.parametrize("place", [1, 2, 3, 4])
def test_a_token_without_text_does_not_split_a_character(data: bytes, place: int) -> None:
    def without_last(tokens: list[int]) -> str:
        return decode([token for token in tokens if token < 256])

    tokens = [*data[:place], 256, 256, *data[place:]]
    detokenizer = Detokenizer(without_last)
    text = "".join(detokenizer.push(token) for token in tokens) + detokenizer.flush()
    assert text == data.decode(errors="replace")


def test_the_wait_for_a_character_is_bounded() -> None:
    detokenizer = Detokenizer(decode)
    released = [detokenizer.push(0x80) for _ in range(50)]
    assert sum(map(len, released)) >= 46


def test_an_unfinished_character_at_the_end_becomes_a_replacement() -> None:
    stream = TextStream(decode)
    assert [stream.push(byte) for byte in b"a\xe4\xb8"] == ["a", "", ""]
    assert stream.finish() == "\ufffd"
    assert stream.text == "a\ufffd"


def test_a_stop_string_across_tokens_ends_the_text_before_it() -> None:
    stream = TextStream(decode, stop=("\nend",))
    parts = [stream.push(byte) for byte in b"x = 1\nende"]
    assert parts == ["x", " ", "=", " ", "1", "", "", "", "", ""]
    assert stream.is_stopped
    assert stream.finish() == ""
    assert stream.text == "x = 1"


def test_text_held_back_comes_out_when_it_is_no_stop_string_after_all() -> None:
    stream = TextStream(decode, stop=("abc",))
    assert [stream.push(byte) for byte in b"abab"] == ["", "", "ab", ""]
    assert stream.push(ord("d")) == "abd"
    assert not stream.is_stopped


def test_text_held_back_comes_out_at_the_end() -> None:
    stream = TextStream(decode, stop=("abc",))
    assert stream.push(ord("a")) == ""
    assert stream.finish() == "a"


@pytest.mark.parametrize("stop", [("def", "ef"), ("ef", "def"), ("cdefg", "ef")])
def test_the_cut_does_not_depend_on_how_the_text_is_split(stop: tuple[str, ...]) -> None:
    data = b"abcdefghij"
    texts = set()
    for first in range(len(data)):
        for second in range(first, len(data)):
            pieces = [data[a:b] for a, b in pairwise((0, first, second, len(data)))]
            stream = TextStream(lambda tokens, p=pieces: b"".join(p[t] for t in tokens).decode(), stop=stop)
            for token in range(3):
                stream.push(token)
            texts.add(stream.text)
    # "def" and "ef" are complete together, so the longer wins; "cdefg" is complete only after "ef".
    assert texts == {"abc" if "def" in stop else "abcd"}


def test_a_stop_string_of_wide_characters_is_found() -> None:
    stream = TextStream(decode, stop=("\u4e2d",))
    parts = [stream.push(byte) for byte in "a\u4e2db".encode()]
    assert "".join(parts) == "a"
    assert stream.is_stopped


def test_nothing_after_a_stop_string_leaks() -> None:
    stream = TextStream(
        lambda tokens: "".join("one STOP two" if t == 0 else "three" for t in tokens), stop=("STOP",)
    )
    assert stream.push(0) == "one "
    assert stream.push(1) == ""
    assert stream.finish() == ""
    assert stream.text == "one "
