"""Sections of long documents: nothing lost, nothing too long, cut where the text allows it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dscoder.data.sections import split_sections

FUNCTIONS = "def a():\n    x = 1\n\n    return x\n\ndef b():\n    y = 2\n\n    return y\n"


def test_a_short_document_is_one_section() -> None:
    assert split_sections(FUNCTIONS, max_bytes=len(FUNCTIONS)) == [FUNCTIONS]


def test_cuts_prefer_the_least_indented_line_after_a_blank_one() -> None:
    assert split_sections(FUNCTIONS, max_bytes=60) == [FUNCTIONS[:34], FUNCTIONS[34:]]
    assert FUNCTIONS[34:].startswith("def b")


def test_without_blank_lines_the_latest_of_the_least_indented_lines_is_taken() -> None:
    assert split_sections("a\nb\n  c\nd\n  e\n", max_bytes=12) == ["a\nb\n  c\n", "d\n  e\n"]


def test_a_line_too_long_is_a_section_of_its_own() -> None:
    assert split_sections("a\n" + "b" * 50 + "\nc\n", max_bytes=10) == ["a\n", "b" * 50 + "\n", "c\n"]


def test_lengths_are_bytes() -> None:
    assert split_sections("\u4e2d\n\u4e2d\n", max_bytes=4) == ["\u4e2d\n", "\u4e2d\n"]


def test_an_empty_document_has_no_section() -> None:
    assert split_sections("", max_bytes=10) == []


@given(text=st.text(alphabet="ab \n\t\r\x0c\u4e2d", max_size=200), max_bytes=st.integers(1, 50))
def test_sections_put_together_are_the_document(text: str, max_bytes: int) -> None:
    sections = split_sections(text, max_bytes=max_bytes)
    assert "".join(sections) == text
    for section in sections:
        assert len(section.encode()) <= max_bytes or section.count("\n", 0, -1) == 0


def test_a_size_below_one_is_an_error() -> None:
    with pytest.raises(ValueError, match="split_sections: max_bytes must be >= 1, got 0"):
        split_sections("a", max_bytes=0)
