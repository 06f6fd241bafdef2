"""Which candidates count as one answer, and which answers make pairs."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dscoder.config.reward import PairsConfig
from dscoder.sandbox.verdict import Outcome, Program, Verdict
from dscoder.tasks.ending import python_program
from dscoder.tasks.problem import Grade, grade_verdict, graded
from dscoder.train.pairs import (
    NO_PROGRAM,
    Candidate,
    GradedAnswer,
    choose_pairs,
    outcome_of,
    pool_answers,
    program_key,
)


def candidate(program: str, score: float | None, *, idx: int = 0, outcome: str = "failed") -> Candidate:
    return Candidate(
        problem="p",
        form="completion",
        prompt="?",
        suffix="",
        source="model",
        idx=idx,
        completion=f"text {idx}",
        finish_reason="eos",
        program=program,
        outcome="passed" if score == 1 else outcome,
        score=score,
        detail="",
    )


def answer(program: str, pass_rate: float, outcome: str = "failed") -> GradedAnswer:
    return GradedAnswer(
        completion=program, program=program, pass_rate=pass_rate, outcome=outcome, candidates=(("model", 0),)
    )


def key(source: str, language: str = "python") -> str:
    return program_key(Program(language=language, source=source), "")


def test_python_that_differs_in_layout_and_comments_is_one_program() -> None:
    assert key("x = 1  # one\n\n\nprint( x )") == key("x=1\nprint(x)\n")
    assert key("x = 1") != key("x = 2")
    assert key("if x:\n    y = 1\nz = 2") != key("if x:\n    y = 1\n    z = 2")


def test_the_mark_of_a_program_does_not_tell_it_from_another() -> None:
    one, other = (python_program(source) for source in ("x = 1\n", "x = 1  # one\n"))
    assert one.files["mark"] != other.files["mark"]
    assert program_key(one, "") == program_key(other, "")
    assert program_key(one, "") != program_key(python_program("x = 2\n"), "")


def test_half_a_character_has_a_key() -> None:
    assert key("x = '\ud800'") != key("x = '\ud801'")


def test_other_languages_are_compared_by_their_lines() -> None:
    assert key("int x;  \n\n\nint y;", "cpp") == key("int x;\nint y;", "cpp")
    assert key("int x;", "cpp") != key("int  x;", "cpp")
    assert key("x = 1", "python") != key("x = 1", "ruby")


@pytest.mark.parametrize("source", ["def f(:", "x = '\0'", "(" * 3000 + ")" * 3000, "-" * 20000 + "1"])
def test_what_is_no_python_has_a_key_too(source: str) -> None:
    assert key(source) == key(source + "\n\n")
    assert key(source) != key("pass")


def test_an_answer_without_a_program_goes_by_its_text() -> None:
    assert program_key(None, "I do not know ") == program_key(None, "I do not know")
    assert program_key(None, "yes") != program_key(None, "no")


@pytest.mark.parametrize(
    ("grade", "wanted"),
    [
        (grade_verdict(Verdict(outcome="passed")), "passed"),
        (grade_verdict(Verdict(outcome="compile_error")), "compile_error"),
        (graded(False, verdict=Verdict(outcome="passed")), "failed"),
        (graded(False), NO_PROGRAM),
        (graded(True), "passed"),
        (grade_verdict(Verdict(outcome="sandbox_error")), "sandbox_error"),
        (grade_verdict(None), "not_judged"),
    ],
)
def test_a_grade_has_one_outcome(grade: Grade, wanted: Outcome) -> None:
    assert outcome_of(grade) == wanted


def test_the_same_program_is_one_answer_with_the_mean_of_its_scores() -> None:
    found = pool_answers(
        [
            candidate("a", 1.0, idx=0),
            candidate("b", 0.0, idx=1),
            candidate("a", 0.0, idx=2, outcome="time_limit"),
            candidate("a", 1.0, idx=3),
        ]
    )
    assert [(a.program, a.completion, a.outcome) for a in found] == [
        ("a", "text 0", "passed"),
        ("b", "text 1", "failed"),
    ]
    assert found[0].pass_rate == pytest.approx(2 / 3)
    assert found[0].candidates == (("model", 0), ("model", 2), ("model", 3))


def test_what_was_not_judged_is_in_no_answer() -> None:
    lost = candidate("a", None, outcome="sandbox_error")
    assert pool_answers([lost]) == []
    [found] = pool_answers([lost, candidate("a", 1.0, idx=1)])
    assert (found.pass_rate, found.candidates) == (1.0, (("model", 1),))


def test_a_pair_needs_different_pass_rates() -> None:
    same = [answer("a", 0.0), answer("b", 0.0, "compile_error")]
    assert choose_pairs(same, PairsConfig(), seed=0) == []
    near = [answer("a", 0.5), answer("b", 0.4)]
    assert choose_pairs(near, PairsConfig(min_gap=0.2), seed=0) == []
    assert choose_pairs(near, PairsConfig(), seed=0) == [(near[0], near[1])]


def test_failures_are_ordered_by_how_far_they_came_if_asked_for() -> None:
    answers = [
        answer("a", 0.0, NO_PROGRAM),
        answer("b", 0.0, "compile_error"),
        answer("c", 0.0, "time_limit"),
    ]
    pairs = choose_pairs(answers, PairsConfig(by_outcome=True), seed=0)
    assert {(better.program, worse.program) for better, worse in pairs} == {
        ("b", "a"),
        ("c", "a"),
        ("c", "b"),
    }
    right = [answer("d", 1.0, "passed"), answer("e", 1.0, "passed")]
    assert choose_pairs(right, PairsConfig(by_outcome=True), seed=0) == []


def test_one_right_answer_meets_different_wrong_ones() -> None:
    answers = [answer("right", 1.0, "passed"), *(answer(f"wrong {i}", 0.0) for i in range(20))]
    pairs = choose_pairs(answers, PairsConfig(max_pairs=8), seed=0)
    assert len({worse.program for _, worse in pairs}) == 8


def test_answers_are_used_evenly() -> None:
    answers = [answer(f"{side}{i}", rate) for side, rate in (("+", 1.0), ("-", 0.0)) for i in range(4)]
    pairs = choose_pairs(answers, PairsConfig(max_pairs=8), seed=0)
    uses = Counter(answer.program for pair in pairs for answer in pair)
    assert set(uses.values()) == {2}
    assert len(uses) == 8


def test_a_rare_outcome_is_not_crowded_out() -> None:
    wrong = [answer(f"w{i}", 0.0, "failed") for i in range(30)] + [answer("slow", 0.0, "time_limit")]
    pairs = choose_pairs([answer("right", 1.0, "passed"), *wrong], PairsConfig(max_pairs=2), seed=3)
    assert {worse.outcome for _, worse in pairs} == {"failed", "time_limit"}


@given(
    rates=st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), max_size=12),
    limit=st.integers(1, 40),
    seed=st.integers(0, 9),
)
def test_pairs_are_ordered_different_and_limited(rates: list[float], limit: int, seed: int) -> None:
    answers = [answer(str(i), rate) for i, rate in enumerate(rates)]
    pairs = choose_pairs(answers, PairsConfig(max_pairs=limit), seed=seed)
    num_possible = sum(one > other for one in rates for other in rates)
    assert len(pairs) == min(limit, num_possible)
    assert len({(a.program, b.program) for a, b in pairs}) == len(pairs)
    assert all(better.pass_rate > worse.pass_rate for better, worse in pairs)
    assert pairs == choose_pairs(answers, PairsConfig(max_pairs=limit), seed=seed)
