"""The built-in reward functions on answers with made-up verdicts, and callables by their path."""

from dataclasses import replace
from typing import Any

import pytest

from dscoder.config.grpo import RewardsConfig
from dscoder.sandbox.run import run
from dscoder.sandbox.verdict import Limits, Phase, Verdict
from dscoder.tasks.ending import grade_ended, python_program
from dscoder.tasks.problem import Grade, Problem, grade_verdict, graded, not_judged
from dscoder.train.reward import Answer, RewardBatch, RewardFunction
from dscoder.train.reward_functions import (
    compiled,
    format_function,
    length_function,
    load_function,
    passed_tests,
    reward_terms,
    soft_overlong_penalty,
)

ANSWER = Answer(
    problem=Problem(task="test", id="0", prompt="p", max_new_tokens=8),
    prompt="p",
    completion="",
    tokens=(1, 2),
    finish_reason="eos",
    max_tokens=8,
)


def rewards(function: RewardFunction, *answers: Answer) -> list[float | None]:
    return list(function(RewardBatch(answers=answers)))  # type: ignore[arg-type]


def judged(grade: Grade | None, *, language: str = "python") -> Answer:
    return replace(ANSWER, grade=grade, problem=replace(ANSWER.problem, language=language))


def after(outcome: str, *, stderr: str = "", compile_status: int | None = None) -> Grade:
    phase = None
    if compile_status is not None:
        phase = Phase(
            exit_code=compile_status,
            signal=None,
            stopped="",
            wall=0.1,
            cpu=0.1,
            peak_memory=1,
            stdout=b"",
            stderr=b"",
        )
    return grade_verdict(Verdict(outcome=outcome, stderr=stderr, compile=phase))  # type: ignore[arg-type]


def test_tests_give_the_grade_and_nothing_for_what_was_not_judged() -> None:
    found = rewards(
        passed_tests,
        judged(after("passed")),
        judged(after("failed")),
        judged(Grade(is_passed=False, score=0.25)),
        judged(after("sandbox_error")),
        judged(after("toolchain_missing")),
        judged(None),
    )
    assert found == [1.0, 0.0, 0.25, None, None, None]


def test_compiled_languages_by_their_compiler() -> None:
    found = rewards(
        compiled,
        judged(after("compile_error", compile_status=1), language="cpp"),
        judged(after("failed", compile_status=0), language="cpp"),
        judged(after("time_limit", compile_status=0), language="cpp"),
        judged(after("time_limit", compile_status=1), language="cpp"),
        judged(after("toolchain_missing"), language="cpp"),
    )
    assert found == [0.0, 1.0, 1.0, 0.0, None]


def test_python_by_its_syntax() -> None:
    syntax = '  File "/work/main.py", line 1\n    x =\nSyntaxError: invalid syntax\n'
    raised = 'Traceback (most recent call last):\n  File "main.py", line 1\nSyntaxError: raised by hand\n'
    found = rewards(
        compiled,
        judged(after("runtime_error", stderr=syntax)),
        judged(after("runtime_error", stderr=raised)),
        judged(after("failed", stderr="AssertionError")),
        judged(after("passed")),
    )
    assert found == [0.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("code", "wanted"),
    [
        ("def f(x):\n    return x + 1\n", 1.0),
        ("def f(x):\n    return x\n", 1.0),
        ("def f(x):\n    import missing\n", 1.0),
        ("def f(x):\n    raise SyntaxError('by hand')\n", 1.0),
        ("raise SyntaxError('by hand')\n", 1.0),
        ("def f(x):\n    exec('def g(:')\n", 1.0),
        ("def f(x:\n    return x\n", 0.0),
        ("def f(x):\nreturn x\n", 0.0),
        ("def f(x):\n\tif x:\n        return 1\n", 0.0),
        ("def f(x):\n    return 'x\n", 0.0),
        ("def f(x):\n    return '\0'\n", 0.0),
        ("x = '\ud800'\n", 0.0),
    ],
)
def test_the_syntax_of_an_answer_that_runs_apart_from_its_tests(code: str, wanted: float) -> None:
    tests = "assert f(2) == 3\n"
    verdict = run(python_program(code, tests, asked=("f",)), Limits(time=10.0))
    assert rewards(compiled, judged(grade_ended(code, verdict, tests=tests))) == [wanted]


def test_an_answer_without_a_program_does_not_compile_if_it_is_wrong() -> None:
    assert rewards(compiled, judged(graded(False)), judged(graded(True)), judged(not_judged("?"))) == [
        0.0,
        None,
        None,
    ]


def test_format_is_whether_the_pattern_is_found() -> None:
    has_format = format_function(r"^<think>.*</think>")
    texts = ("<think>a\nb</think>c", "no")
    assert rewards(has_format, *(replace(ANSWER, completion=text) for text in texts)) == [1.0, 0.0]
    with pytest.raises(ValueError, match=r"format_pattern must be a regular expression, got '\('"):
        format_function("(")


@pytest.mark.parametrize(
    ("num_tokens", "wanted"), [(0, 0.0), (80, 0.0), (90, -0.5), (100, -1.0), (101, -1.0)]
)
def test_the_overlong_penalty_falls_on_a_line(num_tokens: int, wanted: float) -> None:
    assert soft_overlong_penalty(num_tokens, max_tokens=100, margin=20) == wanted


def test_without_a_margin_only_what_is_too_long_costs() -> None:
    assert soft_overlong_penalty(100, max_tokens=100, margin=0) == 0.0
    assert soft_overlong_penalty(101, max_tokens=100, margin=0) == -1.0
    with pytest.raises(ValueError, match=r"margin must be in \[0, 5\], max_tokens, got 6"):
        soft_overlong_penalty(1, max_tokens=5, margin=6)


def test_an_answer_that_was_cut_off_gets_the_whole_penalty() -> None:
    lengths = [replace(ANSWER, tokens=(1,) * 6), replace(ANSWER, tokens=(1,) * 8, finish_reason="length")]
    assert rewards(length_function(4), *lengths) == [-0.5, -1.0]


def test_a_callable_is_found_by_its_path() -> None:
    path = "dscoder.train.reward_functions.passed_tests"
    assert load_function(path) is passed_tests
    assert load_function("dscoder.train.reward_functions:passed_tests") is passed_tests


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("nothing", "must be tests, compiler, format, length or package.module.name, got 'nothing'"),
        ("no.such.module", "got 'no.such.module': No module named 'no'"),
        ("dscoder.train.reward._GRACE", "must be callable, got .*_GRACE"),
        ("dscoder.train.reward_functions.gone", "must be callable, got .*gone': None"),
    ],
)
def test_a_path_that_leads_nowhere_is_named(path: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        load_function(path)


def test_a_config_names_functions_and_weights() -> None:
    config = RewardsConfig(
        functions=("tests", "format", "learnt"), weights=(1.0, 0.5, 2.0), time=3.0, format_pattern="x"
    )
    terms = reward_terms(config, given={"learnt": passed_tests})
    assert [(term.name, term.weight, term.time) for term in terms] == [
        ("tests", 1.0, 3.0),
        ("format", 0.5, 3.0),
        ("learnt", 2.0, 3.0),
    ]
    assert terms[2].function is passed_tests


def test_functions_without_weights_weigh_the_same() -> None:
    assert RewardsConfig(functions=("tests", "length")).weight_of == {"tests": 1.0, "length": 1.0}


def test_tests_are_required_where_they_are_used_unless_the_config_says_what_is() -> None:
    def required(**fields: Any) -> list[str]:
        terms = reward_terms(RewardsConfig(**fields))
        return [term.name for term in terms if term.is_required]

    assert required(functions=("length", "tests")) == ["tests"]
    assert required(functions=("length",)) == []
    assert required(functions=("tests", "length"), required=("length",)) == ["length"]
    assert required(required=()) == []
    with pytest.raises(ValueError, match="required must be some of tests, functions, got compiler"):
        RewardsConfig(required=("compiler",))
