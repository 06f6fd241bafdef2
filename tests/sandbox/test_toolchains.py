"""Command lines of twenty languages: run where installed, and by stand-ins everywhere."""

from dataclasses import replace
from pathlib import Path

import pytest

from dscoder.sandbox import run as run_module
from dscoder.sandbox import toolchains
from dscoder.sandbox.languages import LANGUAGES, Language
from dscoder.sandbox.run import run
from dscoder.sandbox.toolchains import Missing, Toolchain, find, find_all, installation_of
from dscoder.sandbox.verdict import MIB, Limits, Program

LIMITS = Limits(time=20.0, memory=1024 * MIB, compile_time=60.0)
NAMES = sorted(LANGUAGES)

# Reads two numbers, writes their sum, and once its argument.
SUMS = {
    "python": "import sys\na, b = map(int, input().split())\nprint(a + b)\nprint(sys.argv[1])",
    "c": '#include <stdio.h>\nint main(int n, char** v) { int a, b; scanf("%d %d", &a, &b);'
    ' printf("%d\\n%s\\n", a + b, v[1]); }',
    "cpp": "#include <iostream>\nint main(int n, char** v) { int a, b; std::cin >> a >> b;"
    ' std::cout << a + b << "\\n" << v[1] << "\\n"; }',
    "java": "import java.util.Scanner;\npublic class Main { public static void main(String[] v) {"
    " Scanner in = new Scanner(System.in); System.out.println(in.nextInt() + in.nextInt());"
    " System.out.println(v[0]); } }",
    "javascript": "const [a, b] = require('fs').readFileSync(0, 'utf8').split(' ').map(Number);\n"
    "console.log(a + b); console.log(process.argv[2]);",
    "bash": 'read a b; echo $((a + b)); echo "$1"',
    "rust": "use std::io; fn main() { let mut s = String::new(); io::stdin().read_line(&mut s).unwrap();"
    " let sum: i32 = s.split_whitespace().map(|x| x.parse::<i32>().unwrap()).sum();"
    ' println!("{}", sum); println!("{}", std::env::args().nth(1).unwrap()); }',
    "perl": 'my ($a, $b) = split " ", <STDIN>; print $a + $b, "\\n$ARGV[0]\\n";',
}
MISTAKES = {"c": "int main( {", "cpp": "int main( {", "java": "class Main { int f( }", "rust": "fn main( {"}
ASSERTIONS = {
    "python": "assert 1 == 2",
    "c": "#include <assert.h>\nint main() { assert(1 == 2); }",
    "cpp": "#include <cassert>\nint main() { assert(1 == 2); }",
    "java": "class Main { public static void main(String[] v) { assert 1 == 2; } }",
    "javascript": "require('node:assert').strictEqual(1, 2)",
    "rust": "fn main() { assert_eq!(1, 2); }",
}
OUT_OF_MEMORY = {
    "cpp": "#include <vector>\nint main() {"
    " std::vector<std::vector<char>> x; for (;;) x.emplace_back(10000000, 'x'); }",
    "java": "import java.util.*; class Main { public static void main(String[] v) {"
    " List<byte[]> x = new ArrayList<>(); for (;;) x.add(new byte[1000000]); } }",
    "javascript": "const x = []; for (;;) x.push(new Array(100000).fill(x.length));",
    "perl": "my @x; push @x, 'x' x 1000000 while 1;",
    "bash": 'x=x; while true; do x="$x$x"; done',
}


def installed(language: str) -> Toolchain:
    found = find(language)
    if isinstance(found, Missing):
        pytest.skip(found.detail())
    return found


# ---- with what is installed ----


@pytest.mark.usefixtures("full_isolation")
@pytest.mark.parametrize("language", SUMS)
def test_a_program_reads_computes_and_writes(language: str) -> None:
    toolchain = installed(language)
    program = Program(
        language=language, source=SUMS[language], stdin="40 2\n", args=("a b",), expected_stdout="42\na b"
    )
    verdict = run(program, LIMITS)
    assert verdict.outcome == "passed", (verdict.detail, verdict.stderr, verdict.compile)
    assert (verdict.compile is not None) == bool(toolchain.language.compile)
    assert toolchain.version[0].isdigit()


@pytest.mark.usefixtures("full_isolation")
@pytest.mark.parametrize("language", MISTAKES)
def test_a_mistake_is_a_compile_error(language: str) -> None:
    installed(language)
    verdict = run(Program(language=language, source=MISTAKES[language]), LIMITS)
    assert verdict.outcome == "compile_error"
    assert verdict.compile is not None
    assert b"error" in verdict.compile.stderr
    assert (verdict.wall, verdict.exit_code) == (0.0, None)


@pytest.mark.usefixtures("full_isolation")
@pytest.mark.parametrize("language", ASSERTIONS)
def test_a_failed_assertion_is_told_from_a_crash(language: str) -> None:
    installed(language)
    assert run(Program(language=language, source=ASSERTIONS[language]), LIMITS).outcome == "failed"


@pytest.mark.usefixtures("full_isolation")
@pytest.mark.parametrize("language", OUT_OF_MEMORY)
def test_memory_runs_out_in_every_runtime(language: str) -> None:
    installed(language)
    limits = replace(LIMITS, memory=256 * MIB)
    verdict = run(Program(language=language, source=OUT_OF_MEMORY[language]), limits)
    assert verdict.outcome == "memory_limit", (verdict.detail, verdict.stderr)


@pytest.mark.usefixtures("full_isolation")
def test_a_class_runs_by_the_name_of_its_file() -> None:
    installed("java")
    source = 'class Problem { public static void main(String[] v) { System.out.println("ran"); } }'
    assert run(Program(language="java", files={"Problem.java": source}), LIMITS).stdout == "ran\n"


# ---- by stand-ins: executables that write down how they were called ----

STAND_IN = """#!/bin/bash
[[ $1 == *version || $1 == -v ]] && { echo "stand-in 1.2.3"; exit; }
echo "$(basename "$0") $*" >> calls
for word; do
    output=
    [[ $previous == -o ]] && output=$word
    [[ $word == -of=* ]] && output=${word#-of=}
    [[ $output ]] && printf '#!/bin/bash\\ncat calls; echo ran "$@"\\n' > "$output" && chmod +x "$output"
    previous=$word
done
cat calls
"""
CALLS = {
    "typescript": [
        "node TOOLS/tsc --target es2020 --module commonjs --skipLibCheck --outDir . -w main.ts",
        "node --max-old-space-size=614 main.js a",
    ],
    "csharp": ["mcs -d:DEBUG -out:program.exe -w main.cs", "mono program.exe a"],
    "php": ["php -d memory_limit=614M -d zend.assertions=1 -f main.php -- a"],
    "go": ["go build -o program -w main.go", "ran a"],
    "go_test": ["go test -c -o program -w main_test.go", "ran a"],
    "ruby": ["ruby main.rb a"],
    "lua": ["lua main.lua a"],
    "r": ["Rscript --vanilla main.R a"],
    "julia": ["julia --startup-file=no --history-file=no main.jl a"],
    "swift": ["swiftc -o program -w main.swift", "ran a"],
    "racket": ["racket main.rkt a"],
    "d": ["dmd -unittest -of=program -w main.d", "ran a"],
    "scala": ["scalac -d . -w Main.scala", "scala -J-Xmx614m -cp . Main a"],
}


@pytest.mark.usefixtures("full_isolation")
@pytest.mark.parametrize("language", CALLS)
def test_the_command_lines_are_those_of_the_documentation(
    language: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = tmp_path / "tools" / "bin"
    tools.mkdir(parents=True)
    for alternatives in LANGUAGES[language].executables:
        stand_in = tools / alternatives.split("|")[0]
        stand_in.write_text(STAND_IN)
        stand_in.chmod(0o755)
    monkeypatch.setattr(toolchains, "_first_found", lambda names: tools / names.split("|")[0])
    monkeypatch.setattr(run_module, "find", find.__wrapped__)
    program = Program(language=language, source="", args=("a",), compiler_args=("-w",))
    verdict = run(program, LIMITS)
    assert verdict.outcome == "passed", (verdict.detail, verdict.compile)
    expected = [call.replace("TOOLS", str(tools)) for call in CALLS[language]]
    assert verdict.stdout.splitlines() == expected
    assert find.__wrapped__(language).version == "1.2.3"


def test_every_language_is_tried_one_way_or_the_other() -> None:
    assert {*SUMS, *CALLS} == set(LANGUAGES)
    assert len({name.removesuffix("_test") for name in LANGUAGES}) == 20


# ---- finding ----


def test_a_missing_toolchain_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchains, "_first_found", lambda _: None)
    monkeypatch.setattr(run_module, "find", find.__wrapped__)
    verdict = run(Program(language="scala", source=""))
    assert (verdict.outcome, verdict.is_answer) == ("toolchain_missing", False)
    assert verdict.detail == "scala needs scalac and scala and java, not found on PATH"
    assert run(Program(language="lua", source="")).detail.startswith("lua needs lua or lua5.4 or lua5.3,")


def test_all_languages_are_found_or_missing() -> None:
    found = find_all()
    assert set(found) == set(LANGUAGES)
    assert isinstance(found["python"], Toolchain)


def test_python_is_the_interpreter_below_the_environment() -> None:
    python = find("python")
    assert isinstance(python, Toolchain)
    assert python.paths["python3"].is_file()
    assert all(folder.name.endswith("-packages") for folder in python.view.masked)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_home_folder_is_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, depth: int) -> None:
    home = tmp_path / "home" / "me"
    monkeypatch.setattr(Path, "home", lambda: home)
    folder = home.joinpath(*["opt", "tool"][: depth - 1], "bin")
    folder.mkdir(parents=True)
    shown = installation_of(folder / "lua")
    assert not home.is_relative_to(shown)
    assert folder.is_relative_to(shown)


def test_a_command_may_name_only_executables_that_are_looked_for() -> None:
    with pytest.raises(ValueError, match=r"commands may name \['lua'\], got \['luajit'\]"):
        Language(file_name="a.lua", executables=("lua|lua5.4",), run=("@luajit", "{main}"))
