from dataclasses import replace

import pytest

from dscoder.sandbox.pool import Pool
from dscoder.sandbox.run import run
from dscoder.sandbox.toolchains import Missing, find
from dscoder.sandbox.verdict import Phase, Verdict
from dscoder.tasks.multipl_e import LANGUAGES, MultiPlE, find_javatuples

# By problem and language: a right body, with its own indentation, as a model continues the prompt.
ADD, BELOW_ZERO, MAXIMUM = "HumanEval_53_add", "HumanEval_3_below_zero", "HumanEval_35_max_element"
SOLUTIONS = {
    "cpp": {
        ADD: "    return x + y;\n}\nint unused;",
        BELOW_ZERO: """\
    long balance = 0;
    for (long operation : operations) {
        balance += operation;
        if (balance < 0) return true;
    }
    return false;
}""",
        MAXIMUM: "    return *std::max_element(l.begin(), l.end());\n}",
    },
    "java": {
        ADD: "        return x + y;\n    }\n\n    int unused;",
        BELOW_ZERO: """\
        long balance = 0;
        for (long operation : operations) {
            balance += operation;
            if (balance < 0) return true;
        }
        return false;
    }
}""",
        MAXIMUM: "        return Collections.max(l);\n    }\n",
    },
    "javascript": {
        ADD: "  return x + y;\n}\nconsole.log(add(1, 2));",
        BELOW_ZERO: """\
  let balance = 0;
  return operations.some((operation) => (balance += operation) < 0);
}
""",
        MAXIMUM: "  return Math.max(...l);\n}\n\nfunction unused() {}",
    },
    "bash": {
        ADD: "    echo $(($1 + $2))\n}\necho unused",
        BELOW_ZERO: """\
    local balance=0
    for operation in $1; do
        balance=$((balance + operation))
        if ((balance < 0)); then echo true; return; fi
    done
    echo false
}""",
        MAXIMUM: "    tr ' ' '\\n' <<< \"$1\" | sort -n | tail -n 1\n}",
    },
}
PAIR = """\
        long sum = 0, product = 1;
        for (long number : numbers) {
            sum += number;
            product *= number;
        }
        return Pair.with(sum, product);
    }
"""
COUNTS = {"cpp": 161, "java": 158, "javascript": 161, "bash": 158}


def task_of(records, language, **options) -> MultiPlE:
    if isinstance(found := find(language), Missing):
        pytest.skip(found.detail())
    return MultiPlE(records, language=language, **options)


def by_id(task):
    return {problem.id: problem for problem in task.problems()}


def outcomes(task, answers):
    problems = by_id(task)
    programs = [task.program(problems[name], answer) for name, answer in answers.items()]
    with Pool(num_workers=2, memory=2 * task.limits.memory) as pool:
        found = pool.run_many(programs, replace(task.limits, time=30.0))
    named = zip(answers, found, strict=True)
    graded = {name: (task.grade(problems[name], answers[name], v), v.outcome) for name, v in named}
    return {name: (outcome, grade.detail) for name, (grade, outcome) in graded.items()}


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.usefixtures("sandbox")
def test_hand_written_solutions_pass(records, language):
    task = task_of(records, language)
    assert len(task.problems()) == COUNTS[language]
    assert outcomes(task, SOLUTIONS[language]) == dict.fromkeys(SOLUTIONS[language], ("passed", ""))


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.usefixtures("sandbox")
def test_a_wrong_solution_fails(records, language):
    wrong = SOLUTIONS[language][ADD].replace("+", "-")
    ((outcome, _),) = outcomes(task_of(records, language), {ADD: wrong}).values()
    assert outcome == ("runtime_error" if language == "bash" else "failed")


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.usefixtures("sandbox")
def test_the_answer_of_an_instruct_model_passes(records, language):
    task = task_of(records, language, asking="instruct")
    problem = by_id(task)[ADD]
    fence = {"cpp": "cpp", "java": "Java", "javascript": "javascript", "bash": "bash"}[language]
    body = SOLUTIONS[language][ADD].partition("}")[0] + "}\n"
    ending = "}\n" if language == "java" else ""
    answer = f"Here it is:\n```{fence}\n{problem.code}{body}{ending}```\nIt adds."
    assert outcomes(task, {ADD: answer}) == {ADD: ("passed", "")}


def test_an_answer_ends_at_the_files_stop_strings(records):
    task = MultiPlE(records, language="javascript")
    problem = task.problems()[0]
    assert task.request(problem).stop == ("\nfunction ", "\n/*", "\n//", "\nconsole.log")
    assert {p.stop for p in task.problems()} == {problem.stop}
    assert "unused" not in task.program(problem, "  return 0;\n}\n// unused").files["main.js"]
    java = MultiPlE(records, language="java")
    assert java.request(java.problems()[0]).stop == ("\n    }\n",)


def test_javas_brace_is_a_stop_string_only_before_a_line_break(records):
    task = MultiPlE(records, language="java")
    problem = by_id(task)[ADD]
    for rest, ending in (("\n", "return 0;\n    }\n    "), ("", "return 0;\n    }\n    }\n    ")):
        program = task.program(problem, "        return 0;\n    }" + rest)
        assert program.files["Problem.java"].partition("public static void main")[0].endswith(ending)


def test_headers_are_added_where_the_code_does_not_have_them(records, tmp_path):
    task = MultiPlE(records, language="cpp")
    source = task.program(by_id(task)[ADD], "    return x + y;").files["main.cpp"]
    added, _, rest = source.partition("\n\n")
    assert added.split("\n")[0] == "#include<stdlib.h>"
    assert len(added.split("\n")) == 10
    assert rest.startswith("#include<assert.h>\n#include<bits/stdc++.h>\n")
    with_one = tmp_path / "humaneval-cpp.jsonl"
    with_one.write_text(
        '{"name": "a", "prompt": "#include<vector>\\n", "tests": "}", "stop_tokens": ["\\n}"]}'
    )
    (problem,) = MultiPlE(with_one, language="cpp").problems()
    source = MultiPlE(with_one, language="cpp").program(problem, "").files["main.cpp"]
    assert source.count("#include<vector>") == 1


def test_java_is_named_after_its_class_and_has_the_jar_beside_it(records, tmp_path):
    jar = tmp_path / "tuples.jar"
    jar.write_bytes(b"PK")
    task = MultiPlE(records, language="java", javatuples=jar)
    program = task.program(task.problems()[0], "        return 0;")
    assert list(program.files) == ["Problem.java", "javatuples.jar"]
    assert program.files["javatuples.jar"] == b"PK"
    assert "import org.javatuples.*;" in program.files["Problem.java"]


def test_without_the_jar_only_what_uses_a_tuple_is_not_judged(records, monkeypatch):
    monkeypatch.setattr("dscoder.tasks.multipl_e._JARS", ())
    task = MultiPlE(records, language="java")
    assert sum(task.program(problem, "") is None for problem in task.problems()) == 8
    pair = by_id(task)["HumanEval_8_sum_product"]
    assert task.program(pair, PAIR) is None
    grade = task.grade(pair, PAIR, None)
    assert grade.is_passed is None
    assert "libjavatuples-java" in grade.detail
    assert "javatuples" not in task.program(by_id(task)[ADD], "        return x + y;").files["Problem.java"]


@pytest.mark.usefixtures("sandbox")
def test_a_tuple_in_java_passes_with_the_jar(records):
    if find_javatuples() is None:
        pytest.skip("libjavatuples-java is not installed")
    assert outcomes(task_of(records, "java"), {"HumanEval_8_sum_product": PAIR}) == {
        "HumanEval_8_sum_product": ("passed", "")
    }


def test_openssl_is_linked_for_those_who_include_it(records):
    task = MultiPlE(records, language="cpp")
    problem = task.problems()[0]
    assert task.program(problem, "    return 0;").compiler_args == ()
    assert task.program(problem, "#include <openssl/md5.h>").compiler_args == ("-lcrypto", "-lssl")


@pytest.mark.parametrize(
    ("said", "is_passed"),
    [
        (b"main.cpp:1:10: fatal error: openssl/md5.h: No such file or directory", None),
        (b"/usr/bin/ld: cannot find -lcrypto: No such file", None),
        (b"main.cpp:1:1: error: 'x' does not name a type", False),
    ],
)
def test_a_missing_openssl_is_not_a_wrong_answer(records, said, is_passed):
    task = MultiPlE(records, language="cpp")
    phase = Phase(
        exit_code=1, signal=None, stopped="", wall=0.1, cpu=0.1, peak_memory=1, stdout=b"", stderr=said
    )
    grade = task.grade(task.problems()[0], "", Verdict(outcome="compile_error", compile=phase))
    assert grade.is_passed is is_passed


def test_a_missing_toolchain_is_not_a_wrong_answer(records, monkeypatch):
    monkeypatch.setattr(
        "dscoder.sandbox.run.find", lambda language: Missing(language=language, executables=("node",))
    )
    task = MultiPlE(records, language="javascript")
    problem = task.problems()[0]
    verdict = run(task.program(problem, "}"), task.limits)
    assert task.grade(problem, "}", verdict).is_passed is None


@pytest.mark.parametrize(
    ("language", "leave"),
    [("cpp", "exit(0);"), ("java", "System.exit(0);"), ("javascript", "process.exit(0);")],
)
@pytest.mark.usefixtures("sandbox")
def test_leaving_before_the_tests_end_is_not_passing(records, language, leave):
    task = task_of(records, language)
    problem = by_id(task)[ADD]
    completion = f"    {leave}\n    return 0;\n" + ("}" if language == "javascript" else "")
    verdict = run(task.program(problem, completion), replace(task.limits, time=30.0))
    assert verdict.exit_code == 0
    grade = task.grade(problem, completion, verdict)
    assert (grade.is_passed, grade.detail) == (False, "the program ended before its tests did")


@pytest.mark.usefixtures("sandbox")
def test_leaving_bash_before_the_tests_end_is_not_passing(records):
    task = task_of(records, "bash", asking="instruct")
    problem = by_id(task)[ADD]
    completion = f"```bash\n{problem.code}    echo 0\n}}\nexit 0\nadd() {{\n}}\n```"
    verdict = run(task.program(problem, completion), task.limits)
    assert verdict.exit_code == 0
    assert task.grade(problem, completion, verdict).is_passed is False


def test_tests_without_their_braces_are_refused(tmp_path):
    source = tmp_path / "humaneval-java.jsonl"
    source.write_text('{"name": "a", "prompt": "", "tests": "}", "stop_tokens": []}')
    with pytest.raises(ValueError, match="tests must end with 2 closing braces, got '}'"):
        MultiPlE(source, language="java")


def test_an_unknown_language_is_refused():
    with pytest.raises(ValueError, match="language must be one of cpp, java, javascript, bash, got 'go'"):
        MultiPlE("nowhere", language="go")
