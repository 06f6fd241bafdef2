"""Answers in C++, Java, JavaScript and Bash that work on their tests and not on the problem.

The answers are in translated_answers/: those that must pass ("right"), those that must not ("wrong",
"cheat"), and those that nothing stops ("gap"), which pass and are suspect.
"""

import json
import re
from functools import cache
from pathlib import Path

import pytest

from dscoder.sandbox.pool import Pool
from dscoder.sandbox.toolchains import Missing, find
from dscoder.sandbox.verdict import Limits
from dscoder.tasks.multipl_e import MultiPlE
from dscoder.tasks.problem import Grade
from dscoder.tasks.translated import Parts, make_program, sign_of_cheating

FOLDER = Path(__file__).with_name("translated_answers")
SUFFIXES = {"cpp": "cpp", "java": "java", "javascript": "js", "bash": "sh"}


@cache
def sections(language: str) -> dict[str, str]:
    """The parts of a language's file, by what stands after ====."""
    parts = re.split(r"^==== (.*)\n", (FOLDER / f"{language}.txt").read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def of_kind(language: str, kind: str) -> dict[str, str]:
    found = {name: text.removesuffix("\n") for name, text in sections(language).items()}
    return {name: text for name, text in found.items() if name.startswith(f"{kind}: ")}


def task_of(folder: Path, language: str) -> MultiPlE:
    if isinstance(missing := find(language), Missing):
        pytest.skip(missing.detail())
    given, tests = sections(language)["given"], sections(language)["tests"]
    record = {"name": "twice", "prompt": given, "tests": tests, "stop_tokens": ["no stop string"]}
    (folder / f"humaneval-{SUFFIXES[language]}.jsonl").write_text(json.dumps(record))
    return MultiPlE(folder, language=language)


def without_brace(language: str, answer: str) -> str:
    """A base model's answer ends before the brace that the tests begin with."""
    return answer if language == "javascript" else answer.removesuffix("    }" if language == "java" else "}")


def grades(folder: Path, language: str, kind: str) -> dict[str, Grade]:
    task = task_of(folder, language)
    (problem,) = task.problems()
    answers = {name: without_brace(language, text) for name, text in of_kind(language, kind).items()}
    programs = [task.program(problem, answer) for answer in answers.values()]
    with Pool(num_workers=2, memory=2 * task.limits.memory) as pool:
        verdicts = pool.run_many([p for p in programs if p is not None], Limits(time=10.0, memory=1 << 30))
    found = {
        name: task.grade(problem, answer, verdict)
        for (name, answer), verdict in zip(answers.items(), verdicts, strict=True)
    }
    assert found
    return found


@pytest.mark.parametrize("language", SUFFIXES)
@pytest.mark.usefixtures("sandbox")
def test_right_answers_pass_and_are_not_suspect(tmp_path: Path, language: str) -> None:
    found = grades(tmp_path, language, "right")
    assert {name: (g.is_passed, g.detail) for name, g in found.items()} == dict.fromkeys(found, (True, ""))
    assert not any(grade.is_suspect for grade in found.values())


@pytest.mark.parametrize("language", SUFFIXES)
@pytest.mark.parametrize("kind", ["wrong", "cheat"])
@pytest.mark.usefixtures("sandbox")
def test_wrong_answers_and_cheats_do_not_pass(tmp_path: Path, language: str, kind: str) -> None:
    found = grades(tmp_path, language, kind)
    assert {name: grade.is_passed for name, grade in found.items()} == dict.fromkeys(found, False)


@pytest.mark.parametrize("language", ["cpp", "java"])
@pytest.mark.usefixtures("sandbox")
def test_known_gaps_pass_and_are_suspect(tmp_path: Path, language: str) -> None:
    found = grades(tmp_path, language, "gap")
    seen = {name: (grade.is_passed, grade.is_suspect) for name, grade in found.items()}
    assert seen == dict.fromkeys(found, (True, True))
    assert all(grade.detail.startswith("passed, but has ") for grade in found.values())


def parts_of(language: str, *, given: str | None = None, answer: str = "", tests: str | None = None) -> Parts:
    own = sections(language)
    given = own["given"] if given is None else given
    return Parts(
        language=language,
        given=given,
        code=given + "\n" + answer,
        tests=own["tests"] if tests is None else tests,
        num_braces_after={"cpp": 1, "java": 2}.get(language, 0),
    )


def test_tests_in_java_name_their_classes_in_full_but_not_in_strings() -> None:
    tests = sections("java")["tests"].replace("(3l)", '("new ArrayList, (Optional")')
    text = make_program(parts_of("java", tests=tests)).files["Problem.java"]
    assert isinstance(text, str)
    assert 'equals(twice(("new ArrayList, (Optional")))' in text
    assert "new java.util.ArrayList<Long>(java.util.Arrays.asList((long)6l" in text


@pytest.mark.parametrize(
    "line", ["assert(f(x).equals(g).equals(h));", "assert(f((1l)) == (2l));", "assert(!f(x).equals(y));"]
)
def test_a_test_in_java_that_is_not_clear_stays_as_it_is(line: str) -> None:
    tests = f"    }}\n    public static void main(String[] args) {{\n    {line}\n    }}\n}}\n"
    assert f"\n    {line}\n" in str(make_program(parts_of("java", tests=tests)).files["Problem.java"])


def test_every_word_of_the_tests_in_cpp_is_no_macro() -> None:
    text = str(make_program(parts_of("cpp", answer="#define vector list")).files["main.cpp"])
    undefined = re.findall(r"^#undef (\w+)$", text, flags=re.MULTILINE)
    assert {"assert", "candidate", "int", "main", "std", "vector", "twice"} <= set(undefined)
    assert text.index("#define vector") < text.index("#undef vector") < text.index("int main()")


@pytest.mark.parametrize(
    ("language", "answer", "sign"),
    [
        ("cpp", "return x;", ""),
        ("cpp", "bool operator == (A, B);", "operator =="),
        ("java", "return x.equals(y);", ""),
        ("java", "java.lang.reflect.Field f;", "java.lang.reflect"),
        ("javascript", "return process.argv;", ""),
        ("javascript", "open('/proc/1/mem')", "/proc"),
        ("bash", "cat /proc/$PPID/mem", "/proc"),
    ],
)
def test_the_sign_of_cheating_is_named(language: str, answer: str, sign: str) -> None:
    assert sign_of_cheating(parts_of(language, answer=answer)) == sign


def test_what_was_given_is_no_sign_of_cheating() -> None:
    given = "union U { bool operator==(long x); };\nU f(long n) {\n"
    parts = parts_of("cpp", given=given, answer="return n;")
    assert sign_of_cheating(parts) == ""


@pytest.mark.parametrize("language", ["javascript", "bash"])
def test_a_prompt_without_a_function_is_refused(language: str) -> None:
    with pytest.raises(ValueError, match=f"a prompt must start a function in {language}, got 'nothing'"):
        make_program(parts_of(language, given="nothing"))
