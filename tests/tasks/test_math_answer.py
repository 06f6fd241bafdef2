import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dscoder.tasks.math_answer import math_equal, strip_answer


@pytest.mark.parametrize(
    ("answer", "stripped"),
    [
        (" 18 ", "18"),
        ("18.0", "18"),
        ("18.50", "18.50"),
        ("18.", "18"),
        ("$1,250.00", "1,250"),
        ("75\\%", "75"),
        ("5 \\text{ miles}", "5"),
        ("\\text{Friday}", "Friday"),
        (".5", "0.5"),
        ("x = 5", "5"),
        ("90^\\circ", "90"),
        ("3\n4", "34"),
        ("\\left(1, 2\\right)", "(1,2)"),
        ("", ""),
    ],
)
def test_dressing_is_taken_off(answer, stripped):
    assert strip_answer(answer) == stripped


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        ("18", "18"),
        ("18.00001", "18"),
        ("2125", "2,125"),
        ("0.18", "18"),  # a hundredth
        ("1800", "18"),  # a hundredfold
        ("-3e2", "-300"),
        ("[5]", "5"),
        ("{a}", "a"),
        ("[1.00001, 2]", "[1, 2]"),
        ("1/3", "\\frac{1}{3}"),
        ("\\frac12", "0.5"),
        ("2\\pi", "6.2832"),
        ("\\sqrt{8}", "2*sqrt(2)"),
        ("(x+1)^2", "x^2 + 2x + 1"),
        ("\\frac{x}{7}+\\frac{2}{7}", "\\frac{x+2}{7}"),
        ("no solution", "no solution"),
    ],
)
def test_equal_answers_are_equal_both_ways(found, wanted):
    assert math_equal(found, wanted)
    assert math_equal(wanted, found)


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        ("18.01", "18"),
        ("180", "18"),
        ("", "18"),
        ("nan", "18"),
        ("0.000001", "0"),
        ("[1, 2]", "[1, 3]"),
        ("[1, 2]", "[1, 2, 3]"),
        ("1/3", "1/4"),
        ("x+1", "x+2"),
        ("x", "y"),
        ("1/0", "1"),
        ("True", "1"),
        ("none", "18"),
        ("9**9**9**9", "1"),
        ("__import__('os').system('true')", "0"),
        ("[" * 5000, "1"),
    ],
)
def test_different_answers_are_different(found, wanted):
    assert not math_equal(found, wanted)


@given(st.text(max_size=80), st.text(alphabet="0123456789+-*/^()[]{}.,x \\fracsqrtpi", max_size=80))
@settings(max_examples=300, deadline=None)
def test_no_text_raises_and_every_text_equals_itself(found, wanted):
    assert math_equal(found, wanted) in (True, False)
    assert math_equal(wanted, wanted) or not wanted.strip()
