import json
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
# Records of the same form, of our own; the stop strings of the second one must not matter.
WRITTEN = {
    "cpp": (
        "#include<vector>\n// The sum of x and y.\nlong sum_of(long x, long y) {\n",
        "}\nint main() {\n    auto candidate = sum_of;\n    assert(candidate((1), (2)) == (3));\n}\n",
        ["\n}"],
    ),
    "java": (
        "import org.javatuples.*;\nclass Problem {\n    // The sum of x and y.\n"
        "    public static long sumOf(long x, long y) {\n",
        "    }\n    public static void main(String[] args) {\n"
        "    assert(sumOf((1l), (2l)) == (3l));\n    }\n\n}\n",
        ["\n    }\n"],
    ),
    "js": (
        "// The sum of x and y.\nfunction sum_of(x, y){\n",
        "const assert = require('node:assert');\n\nassert.deepEqual(sum_of(1, 2),3);",
        ["\n//", "\nconsole.log"],
    ),
    "sh": (
        "#!/bin/bash\n# The sum of $1 and $2.\nsum_of() {\n",
        '}\n\nset -e\nrun_test() {\n    [[ $(sum_of "1" "2") = "3" ]]\n}\n\nrun_test',
        ["\n}"],
    ),
}
ANSWERS = {
    "cpp": "    return x + y;\n}\nint unused;",
    "java": "        return x + y;\n    }\n\n    int unused;",
    "javascript": "  return x + y;\n}\nconsole.log(sum_of(1, 2));",
    "bash": "    echo $(($1 + $2))\n}\necho unused",
}
COUNTS = {"cpp": 161, "java": 158, "javascript": 161, "bash": 158}


@pytest.fixture
def written(tmp_path):
    """A directory of records of our own."""
    for suffix, (prompt, tests, stops) in WRITTEN.items():
        first = {"name": "sum_of", "prompt": prompt, "tests": tests, "stop_tokens": stops}
        rows = [first, first | {"name": "other", "stop_tokens": ["other"]}]
        (tmp_path / f"humaneval-{suffix}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def block(language, answer):
    """What an instruct model says: the whole function in a fenced block, a main function after it."""
    prompt = WRITTEN[{"javascript": "js", "bash": "sh"}.get(language, language)][0]
    body, brace, _ = answer.partition("}")
    ending = {
        "java": "    public static void main(String[] args) {}\n}\n",
        "cpp": "int main() { return 1; }\n",
    }
    return (
        f"Here it is:\n```{language.upper()}\n{prompt}{body}{brace}\n{ending.get(language, '')}```\nIt adds."
    )


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


@pytest.mark.usefixtures("sandbox")
def test_a_tuple_in_java_passes_with_the_jar(records):
    if find_javatuples() is None:
        pytest.skip("libjavatuples-java is not installed")
    name = "HumanEval_8_sum_product"
    assert outcomes(task_of(records, "java"), {name: PAIR}) == {name: ("passed", "")}


def test_eight_problems_in_java_ask_for_tuples(records, monkeypatch):
    monkeypatch.setattr("dscoder.tasks.multipl_e._JARS", ())
    task = MultiPlE(records, language="java")
    assert sum(task.program(problem, "") is None for problem in task.problems()) == 8


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("asking", ["base", "instruct"])
@pytest.mark.usefixtures("sandbox")
def test_a_right_answer_passes_and_a_wrong_one_fails(written, language, asking):
    task = task_of(written, language, asking=asking)
    right = ANSWERS[language] if asking == "base" else block(language, ANSWERS[language])
    assert outcomes(task, {"sum_of": right}) == {"sum_of": ("passed", "")}
    ((outcome, _),) = outcomes(task, {"sum_of": right.replace("+", "-")}).values()
    assert outcome == ("runtime_error" if language == "bash" else "failed")


def test_an_answer_ends_at_the_stop_strings_of_the_first_record(written):
    task = MultiPlE(written, language="javascript")
    assert {problem.stop for problem in task.problems()} == {("\n//", "\nconsole.log")}
    problem = by_id(task)["other"]
    assert task.request(problem).stop == ("\n//", "\nconsole.log")
    assert "unused" not in task.program(problem, "  return 0;\n}\n// unused").files["main.js"]


def test_javas_brace_is_a_stop_string_only_before_a_line_break(written):
    task = MultiPlE(written, language="java")
    problem = by_id(task)["sum_of"]
    for rest, ending in (("\n", "return 0;\n    }\n    "), ("", "return 0;\n    }\n    }\n    ")):
        program = task.program(problem, "        return 0;\n    }" + rest)
        assert program.files["Problem.java"].partition("public static void main")[0].endswith(ending)


def test_headers_are_added_where_the_code_does_not_have_them(written):
    task = MultiPlE(written, language="cpp")
    source = task.program(by_id(task)["sum_of"], "    return x + y;").files["main.cpp"]
    added, _, rest = source.partition("#include <stdio.h>")
    assert added.split("\n")[0] == "#include<stdlib.h>"
    assert added.count("#include<") == 9  # of ten: the code has <vector>
    assert rest.count("#include<vector>\n") == 1


def test_java_is_named_after_its_class_and_has_the_jar_beside_it(written, tmp_path):
    jar = tmp_path / "tuples.jar"
    jar.write_bytes(b"PK")
    task = MultiPlE(written, language="java", javatuples=jar)
    for problem in task.problems():
        program = task.program(problem, "        return 0;")
        assert list(program.files) == ["Problem.java", "mark", "javatuples.jar"]
        assert program.files["javatuples.jar"] == b"PK"
        assert "import org.javatuples.*;" in program.files["Problem.java"]


def test_without_the_jar_only_what_uses_a_tuple_is_not_judged(written, monkeypatch):
    monkeypatch.setattr("dscoder.tasks.multipl_e._JARS", ())
    task = MultiPlE(written, language="java")
    problem = by_id(task)["sum_of"]
    assert "javatuples" not in task.program(problem, ANSWERS["java"]).files["Problem.java"]
    uses_one = "        return Pair.with(x, y).getValue0();\n"
    assert task.program(problem, uses_one) is None
    grade = task.grade(problem, uses_one, None)
    assert grade.is_passed is None
    assert "libjavatuples-java" in grade.detail


def test_openssl_is_linked_for_those_who_include_it(written):
    task = MultiPlE(written, language="cpp")
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
def test_a_missing_openssl_is_not_a_wrong_answer(written, said, is_passed):
    task = MultiPlE(written, language="cpp")
    phase = Phase(
        exit_code=1, signal=None, stopped="", wall=0.1, cpu=0.1, peak_memory=1, stdout=b"", stderr=said
    )
    grade = task.grade(task.problems()[0], "", Verdict(outcome="compile_error", compile=phase))
    assert grade.is_passed is is_passed


def test_a_missing_toolchain_is_not_a_wrong_answer(written, monkeypatch):
    monkeypatch.setattr(
        "dscoder.sandbox.run.find", lambda language: Missing(language=language, executables=("node",))
    )
    task = MultiPlE(written, language="javascript")
    problem = task.problems()[0]
    verdict = run(task.program(problem, "}"), task.limits)
    assert task.grade(problem, "}", verdict).is_passed is None


def test_compiling_has_its_own_time(written):
    base, instruct = (MultiPlE(written, language="java", asking=a) for a in ("base", "instruct"))
    assert (base.limits.time, instruct.limits.time, base.limits.compile_time) == (10.0, 3.0, 60.0)


def test_tests_without_their_braces_are_refused(tmp_path):
    source = tmp_path / "humaneval-java.jsonl"
    source.write_text('{"name": "a", "prompt": "", "tests": "}", "stop_tokens": []}')
    with pytest.raises(ValueError, match="tests must end with 2 closing braces, got '}'"):
        MultiPlE(source, language="java")


def test_an_unknown_language_is_refused():
    with pytest.raises(ValueError, match="language must be one of cpp, java, javascript, bash, got 'go'"):
        MultiPlE("nowhere", language="go")
