"""Answers in steps: where each ends in the text, and with which token."""

import random
import re

import pytest

from dscoder.text.tokenizer import Tokenizer
from dscoder.train.steps import StepCutter, Steps, characters_after, compile_pattern, cut_text, token_at

TOKENIZER = Tokenizer.train(
    ["def f(x):\n    return x + 1\n", "an apple. A pear.\n\n", "caf\u00e9 \u4e2d\u6587"] * 3, vocab_size=300
)
END = TOKENIZER.require_id("eos")


def cut(text: str, pattern: str = "lines") -> list[str]:
    return list(Steps(text_ends=tuple(cut_text(text, compile_pattern(pattern)))).texts(text))


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("a\nb\n", ["a\n", "b\n"]),
        ("a\nb", ["a\n", "b"]),
        ("a\n\n  \nb\n\n", ["a\n\n  \n", "b\n\n"]),
        ("\n\na\nb", ["\n\na\n", "b"]),
        ("a", ["a"]),
        (" \n", [" \n"]),
        ("", [""]),
    ],
)
def test_white_space_alone_is_no_step(text: str, steps: list[str]) -> None:
    assert cut(text) == steps
    assert "".join(steps) == text


def test_steps_are_lines_statements_sentences_or_what_a_pattern_says() -> None:
    program = "import a\ndef f():\n    return 1\n\nf()\n"
    assert cut(program) == ["import a\n", "def f():\n", "    return 1\n\n", "f()\n"]
    assert cut(program, "statements") == ["import a\n", "def f():\n    return 1\n\n", "f()\n"]
    prose = "So x = 1.5. Is it? Yes! Done\nThe end."
    assert cut(prose, "sentences") == ["So x = 1.5.", " Is it?", " Yes!", " Done\n", "The end."]
    assert cut("a; b; c", "; ") == ["a; ", "b; ", "c"]
    assert cut("ab", "(?<=a)") == ["a", "b"]
    with pytest.raises(
        ValueError, match=r"steps must be lines, statements, sentences or a regular .* got '\('"
    ):
        compile_pattern("(")


def spelled(*pieces: bytes) -> list[int]:
    """The ids that stand for these bytes."""
    known = {content: token_id for token_id, content in reversed(list(enumerate(TOKENIZER.token_bytes())))}
    return [known[piece] for piece in pieces]


def letters(text: bytes) -> list[int]:
    return spelled(*(bytes([byte]) for byte in text))


def test_a_step_ends_with_the_token_that_has_its_last_byte() -> None:
    cutter = StepCutter(TOKENIZER, "lines")
    found = cutter.cut("a\nbc", [*letters(b"a\nbc"), END])
    assert found == Steps(ends=(2, 5), text_ends=(2, 4))  # the end token belongs to the last step
    assert cutter.cut("", [END]) == Steps(ends=(1,), text_ends=(0,))
    assert cutter.cut("", []) == Steps()


def test_a_token_over_a_boundary_belongs_to_the_step_that_it_ends() -> None:
    cutter = StepCutter(TOKENIZER, "e")
    # " return" holds the end of one step and the beginning of the next.
    (return_id,) = spelled(b" return")
    tokens = [*letters(b"a"), return_id, *letters(b"e b")]
    assert cutter.cut("a returne b", tokens) == Steps(ends=(2, 3, 5), text_ends=(4, 9, 11))
    # Two steps that end in one token are one step.
    both = StepCutter(TOKENIZER, "[er]")
    assert both.cut("a returne b", tokens) == Steps(ends=(2, 3, 5), text_ends=(7, 9, 11))


def test_a_step_that_would_end_in_the_last_token_is_the_last_one() -> None:
    (return_id,) = spelled(b" return")
    assert StepCutter(TOKENIZER, "e").cut(" return", [return_id]) == Steps(ends=(1,), text_ends=(7,))


def test_bytes_of_one_character_may_be_spread_over_tokens() -> None:
    text = "\u4e2d\n\u00e9"
    tokens = letters(text.encode())
    assert characters_after(tokens, TOKENIZER.token_bytes()) == [0, 0, 1, 2, 2, 3]
    assert StepCutter(TOKENIZER, "lines").cut(text, tokens) == Steps(ends=(4, 6), text_ends=(2, 3))


def test_an_answer_cut_off_inside_a_character_has_its_steps() -> None:
    tokens = letters(b"a\nb\xe4\xb8")
    assert StepCutter(TOKENIZER, "lines").cut("a\nb\ufffd", tokens) == Steps(ends=(2, 5), text_ends=(2, 4))


def test_what_comes_after_the_end_of_the_text_belongs_to_the_last_step() -> None:
    tokens = [*letters(b"a\nb\nSTOP"), END]
    assert StepCutter(TOKENIZER, "lines").cut("a\nb", tokens) == Steps(ends=(2, 9), text_ends=(2, 3))


@pytest.mark.parametrize("seed", range(30))
def test_random_tokens_are_cut_where_their_decoded_beginnings_say(seed: int) -> None:
    choose = random.Random(seed)
    often = [*letters(b"\n\n a\xe4\xb8\xad\xff"), END]
    tokens = [choose.choice([*often, choose.randrange(TOKENIZER.vocab_size)]) for _ in range(40)]
    text = TOKENIZER.decode(tokens, skip_special=True)
    found = StepCutter(TOKENIZER, "lines").cut(text, tokens)
    assert "".join(found.texts(text)) == text
    assert list(found.ends) == sorted(set(found.ends))
    assert found.ends[-1] == len(tokens)
    for end, text_end in list(zip(found.ends, found.text_ends, strict=True))[:-1]:
        assert text[:text_end].endswith("\n")
        # With this token the newline is there, without it it is not.
        raw = [b"".join(TOKENIZER.token_bytes()[token] for token in tokens[:n]) for n in (end - 1, end)]
        newlines = [bytes_of.count(b"\n") for bytes_of in raw]
        assert newlines[0] < text[:text_end].count("\n") <= newlines[1]


def test_a_text_that_its_tokens_do_not_say_is_named() -> None:
    with pytest.raises(ValueError, match=r"must be what its tokens say .* got 'x' for 'a'"):
        StepCutter(TOKENIZER, "lines").cut("x", letters(b"a"))


def test_a_place_beyond_the_last_token_is_the_last_token() -> None:
    assert [token_at(end, [0, 2, 2, 5]) for end in (1, 2, 3, 5, 6)] == [2, 2, 4, 4, 4]


def test_the_patterns_compile_with_lines() -> None:
    assert compile_pattern("lines").pattern == r"\n"
    assert compile_pattern("^x").flags & re.MULTILINE
