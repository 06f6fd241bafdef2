"""The programs for answers in C++, Java, JavaScript and Bash, with the mark that says that the tests ended.

JavaScript and Bash run the answer in a process of its own, as Python does. In C++ and Java the tests call it
in theirs: there the mark is read before anything of the answer runs, and what an answer commonly replaces
(the assertions, the equality of results) is put back in front of the tests.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType

from dscoder.sandbox.verdict import Program
from dscoder.tasks.ending import MARK_FILE, end_mark, mark_name

_IDENTIFIER = re.compile(r"[A-Za-z_]\w*")
_NO_MACROS = frozenset({"and", "or", "not", "xor", "defined"})  # which nobody can define
_STRING = re.compile(r'"(?:\\.|[^"\\\n])*"')

# {name} is unknown to the answer. Its own assert, since what the library's calls on failure can be replaced.
_CPP_START = """\
#include <stdio.h>
namespace {name} {{
char text[64];
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wprio-ctor-dtor"
__attribute__((constructor(0))) void take() {{
#pragma GCC diagnostic pop
    if (FILE* file = fopen("{mark}", "r")) {{
        text[fread(text, 1, sizeof text - 1, file)] = 0;
        fclose(file);
    }}
    remove("{mark}");
    remove("main.cpp");
}}
[[noreturn]] void fail(const char* test) {{
    text[0] = 0;
    fprintf(stderr, "main.cpp: Assertion `%s' failed.\\n", test);
    __builtin_trap();
}}
void end() {{
    printf("\\n%s\\n", text);
    fflush(stdout);
}}
}}
"""
_CPP_ASSERT = "#define assert(test) (static_cast<bool>(test) ? void(0) : {name}::fail(#test))\n"
_CPP_MAIN = "int main() {\n"
# In this scope, so that an operator of the answer's own is not found for types that are not.
_CPP_EQUAL = "    using std::operator==;\n"

_JAVA_CLASS = re.compile(r"^class Problem \{\n", flags=re.MULTILINE)
_JAVA_START = """\
    static final class {name} {{
        static byte[] text = {{}};
        static void take() {{
            try {{
                java.nio.file.Path path = java.nio.file.Paths.get("{mark}");
                text = java.nio.file.Files.readAllBytes(path);
                java.nio.file.Files.delete(path);
            }} catch (java.io.IOException error) {{
                throw new ExceptionInInitializerError(error);
            }}
        }}
        static void end() {{
            System.out.println("\\n" + new String(text));
        }}
    }}
    static {{ {name}.take(); }}
"""
_JAVA_MAIN = "public static void main"
_JAVA_TEST = re.compile(r"^( *assert\()(\w+\(.*\))\.equals\((.*)\)(\);)$", flags=re.MULTILINE)
_JAVA_EQUALS = ").equals("
# The tests get these by their full names: the answer may have a class of the short one. Not inside strings.
_JAVA_NAME = re.compile(_STRING.pattern + r"|(?<![\w.])(?P<name>ArrayList|Arrays|HashMap|Optional)\b")

_JAVASCRIPT_NAME = re.compile(r"function\s+(\w+)\s*\(")
_BASH_NAME = re.compile(r"^(\w+)\s*\(\)", flags=re.MULTILINE)

# What an answer needs for the ways to cheat that are left, by language.
_SIGNS: Mapping[str, re.Pattern[str]] = MappingProxyType(
    {
        "cpp": re.compile(
            r"operator\s*==|__attribute__|\[\[\s*gnu|\basm\b|__asm|__FILE__|#\s*include\s*\"|#\s*define\s+int\b|"
            r"/proc/|\b(?:f|fre)?open\b|\b[io]?fstream\b|\bmmap\b|\bdl\w*sym\b|\b__libc|\b__start"
        ),
        "java": re.compile(
            r"java\.lang\.(?:reflect|invoke)|\bgetDeclared|\bgetClasses|\bsetAccessible\b|\bUnsafe\b|\bforName\b|"
            r"AssertionStatus|\bInstrumentation\b|boolean\s+equals\s*\(|java\.nio\.file|\bFile\w*\s*\(|/proc/"
        ),
        "javascript": re.compile(r"/proc|\bppid\b|process\.binding|\binspector\b|\bdlopen\b"),
        "bash": re.compile(r"/proc|\bPPID\b|\bgdb\b|\bmain\.sh\b"),
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """What a program is made of.

    Attributes:
        headers: lines that go before all else.
        given: the code of the record; code: the same with the answer; tests: begin where the code ends.
        num_braces_after: closing braces that the tests have after the place where the program ends.
    """

    language: str
    headers: str = ""
    given: str
    code: str
    tests: str
    num_braces_after: int = 0

    @property
    def mark(self) -> str:
        """What the program writes after its tests."""
        return end_mark(self.headers + self.code, self.tests)


def before_braces(tests: str, num_braces: int) -> int:
    """The place before so many closing braces at the end of the tests."""
    place = len(tests)
    for _ in range(num_braces):
        place = tests.rfind("}", 0, place)
        if place < 0:
            raise ValueError(
                f"MultiPlE: tests must end with {num_braces} closing braces, got {tests[-80:]!r}"
            )
    return place


def _ended(tests: str, statement: str, num_braces_after: int) -> str:
    place = before_braces(tests, num_braces_after)
    return f"{tests[:place]}{statement}\n{tests[place:]}"


def _cpp(parts: Parts) -> Program:
    name = mark_name(parts.mark)
    tests = _ended(parts.tests, f"    {name}::end();", parts.num_braces_after)
    tests = tests.replace(_CPP_MAIN, _CPP_MAIN + _CPP_EQUAL, 1)
    words = sorted(set(_IDENTIFIER.findall(_STRING.sub("", tests + _CPP_ASSERT))))
    undefined = "".join(f"#undef {word}\n" for word in words if word not in _NO_MACROS)
    text = (
        f"{parts.headers}{_CPP_START.format(name=name, mark=MARK_FILE)}{parts.code}\n\n"
        f"{undefined}{_CPP_ASSERT.format(name=name)}{tests}"
    )
    return Program(language="cpp", files={"main.cpp": text, MARK_FILE: parts.mark})


def _expected_first(test: re.Match[str]) -> str:
    """The test with the equality of what is expected in place of that of the result, where that is clear."""
    start, found, wanted, end = test.groups()
    if _STRING.sub("", test[0]).count(_JAVA_EQUALS) != 1:
        return test[0]
    return f"{start}({wanted}).equals({found}){end}"


def _java(parts: Parts) -> Program:
    name = mark_name(parts.mark)
    start = _JAVA_START.format(name=name, mark=MARK_FILE)
    code = _JAVA_CLASS.sub(lambda line: line[0] + start, parts.code, count=1)
    tests = _JAVA_NAME.sub(lambda word: "java.util." * bool(word["name"]) + word[0], parts.tests)
    tests = _JAVA_TEST.sub(_expected_first, _ended(tests, f"    {name}.end();", parts.num_braces_after))
    return Program(language="java", files={"Problem.java": f"{code}\n{tests}", MARK_FILE: parts.mark})


@cache
def _driver(file_name: str) -> str:
    return Path(__file__).with_name(file_name).read_text(encoding="utf-8")


def _apart(parts: Parts, suffix: str, answer: str, tests: str, name: str) -> Program:
    return Program(
        language=parts.language,
        files={
            f"main.{suffix}": _driver(f"driver.{suffix}"),
            f"answer.{suffix}": answer,
            f"tests.{suffix}": tests,
            MARK_FILE: parts.mark,
        },
        args=(name,),
    )


def _javascript(parts: Parts) -> Program:
    name = _last_name(_JAVASCRIPT_NAME, parts)
    return _apart(parts, "js", f"{parts.code}\n;module.exports = {name};\n", parts.tests, name)


def _bash(parts: Parts) -> Program:
    brace, _, tests = parts.tests.partition("\n")
    return _apart(parts, "sh", f"{parts.code}\n{brace}\n", tests, _last_name(_BASH_NAME, parts))


def _last_name(pattern: re.Pattern[str], parts: Parts) -> str:
    names: list[str] = pattern.findall(parts.given)
    if not names:
        raise ValueError(f"MultiPlE: a prompt must start a function in {parts.language}, got {parts.given!r}")
    return names[-1]


_MAKERS: Mapping[str, Callable[[Parts], Program]] = MappingProxyType(
    {"cpp": _cpp, "java": _java, "javascript": _javascript, "bash": _bash}
)


def make_program(parts: Parts) -> Program:
    """The program that runs an answer through its tests and then writes the mark."""
    return _MAKERS[parts.language](parts)


def sign_of_cheating(parts: Parts) -> str:
    """What of an answer may serve to cheat; "" if nothing does."""
    given = set(parts.given.split("\n"))
    answer = "\n".join(line for line in parts.code.split("\n") if line not in given)
    found = _SIGNS[parts.language].search(answer)
    return found[0] if found else ""
