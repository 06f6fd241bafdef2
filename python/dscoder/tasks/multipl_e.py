"""HumanEval translated into C++, Java, JavaScript and Bash (MultiPL-E, Cassano et al. 2022), as
DeepSeek-Coder scores it.

The rules are those of `human_eval`, but for the stop strings, which are those of the file's first record. In
C++, Java and Bash the stop string is the closing brace of the function, and the tests start with it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from dscoder.sandbox.verdict import MIB, Limits, Program, Verdict
from dscoder.tasks.answers import Dialect, complete_function, cut_at
from dscoder.tasks.ending import end_statement, grade_ended
from dscoder.tasks.human_eval import BASE_TOKENS, INSTRUCT_TOKENS, Asking, ask, limits_for
from dscoder.tasks.problem import Grade, Problem, Task, not_judged
from dscoder.tasks.sources import Record, read_records

_FIELDS = ("name", "prompt", "tests", "stop_tokens")
_MEMORY = 1024 * MIB  # what compilers and virtual machines take, far more than a program in Python

# Each is added where the given code does not have it, letter by letter.
_CPP_HEADERS = (
    "#include<stdlib.h>",
    "#include<algorithm>",
    "#include<math.h>",
    "#include<stdio.h>",
    "#include<vector>",
    "#include<string>",
    "#include<climits>",
    "#include<cstring>",
    "#include<iostream>",
    "#include<cassert>",
)
_OPENSSL = "openssl/"  # one problem asks for an MD5 sum, which C++ has from libssl alone
_NO_OPENSSL = re.compile(r"openssl/\w+\.h: No such file|cannot find -l(crypto|ssl)")

_JAR_NAME = "javatuples.jar"
_JARS = (Path("/usr/share/java/javatuples.jar"), Path("/usr/local/share/java/javatuples.jar"))
_TUPLES_IMPORT = "import org.javatuples.*;\n"
_TUPLES = re.compile(
    r"\b(javatuples\.\w|Unit|Pair|Triplet|Quartet|Quintet|Sextet|Septet|Octet|Ennead|Decade|KeyValue|LabelValue|Tuple)"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Translation:
    """One language of the set."""

    suffix: str  # in the name of its file
    file_name: str
    dialect: Dialect
    headers: tuple[str, ...] = ()
    num_braces_after: int  # closing braces that the tests have after the place where the program ends


_TRANSLATIONS: Mapping[str, _Translation] = MappingProxyType(
    {
        "cpp": _Translation(
            suffix="cpp",
            file_name="main.cpp",
            dialect=Dialect(fence="cpp", main="int main()"),
            headers=_CPP_HEADERS,
            num_braces_after=1,
        ),
        "java": _Translation(
            suffix="java",
            file_name="Problem.java",  # named after its class
            dialect=Dialect(fence="java", main="public static void main", indent=4),
            num_braces_after=2,
        ),
        "javascript": _Translation(
            suffix="js",
            file_name="main.js",
            dialect=Dialect(fence="javascript", adds_brace=True),
            num_braces_after=0,
        ),
        "bash": _Translation(
            suffix="sh",
            file_name="main.sh",
            dialect=Dialect(fence="bash"),
            num_braces_after=0,
        ),
    }
)
LANGUAGES = tuple(_TRANSLATIONS)


def find_javatuples() -> Path | None:
    """The jar of Debian's libjavatuples-java, if it is installed."""
    return next((jar for jar in _JARS if jar.is_file()), None)


class MultiPlE(Task):
    """The problems in one other language.

    Args:
        sources: where the records are, see `read_records`.
        language: cpp, java, javascript or bash.
        asking: as for `HumanEval`.
        javatuples: the jar that Java's problems import; None: where Debian's libjavatuples-java has it.
            Without it, programs that use a tuple are not judged, and the others lose the import.
    """

    def __init__(
        self,
        sources: str | Path | Sequence[str | Path],
        *,
        language: str,
        asking: Asking = "base",
        javatuples: Path | None = None,
    ) -> None:
        if language not in _TRANSLATIONS:
            raise ValueError(f"MultiPlE: language must be one of {', '.join(LANGUAGES)}, got {language!r}")
        self.name = f"multipl_e_{language}"
        self.language = language
        self.asking = asking
        self.limits: Limits = limits_for(asking, memory=_MEMORY)
        self._rules = _TRANSLATIONS[language]
        self._jar = (javatuples or find_javatuples()) if language == "java" else None
        names = (f"humaneval-{self._rules.suffix}.jsonl",)
        records = read_records(sources, names=names, wanted=_FIELDS)
        self._stop = tuple(records[0]["stop_tokens"]) if records else ()
        self._problems = [self._problem(record) for record in records]

    def problems(self) -> Sequence[Problem]:
        """All problems, in the order of the records."""
        return self._problems

    def program(self, problem: Problem, completion: str) -> Program | None:
        """Headers, given code, answer and tests; None for Java with a tuple where their jar is missing."""
        source = self._marked(problem, completion)
        files: dict[str, str | bytes] = {self._rules.file_name: source}
        if self._jar is not None:
            files[_JAR_NAME] = self._jar.read_bytes()
        elif self.language == "java":
            if _needs_tuples(source):
                return None
            files[self._rules.file_name] = source.replace(_TUPLES_IMPORT, "", 1)
        needs_openssl = self.language == "cpp" and _OPENSSL in source
        return Program(
            language=self.language,
            files=files,
            compiler_args=("-lcrypto", "-lssl") if needs_openssl else (),
        )

    def grade(self, problem: Problem, completion: str, verdict: Verdict | None) -> Grade:
        """Passed if the program ran through its tests; not judged where a library is missing here."""
        if verdict is None and self.program(problem, completion) is None:
            return not_judged(f"needs javatuples (Debian: libjavatuples-java), found at none of {_listed()}")
        if verdict is not None and verdict.outcome == "compile_error" and verdict.compile is not None:
            found = _NO_OPENSSL.search(verdict.compile.stderr.decode(errors="replace"))
            if found:
                return not_judged(f"needs OpenSSL (Debian: libssl-dev): {found[0]}", verdict=verdict)
        return grade_ended(self._source(problem, completion, problem.tests), verdict)

    def _marked(self, problem: Problem, completion: str) -> str:
        statement = end_statement(self._source(problem, completion, problem.tests), self.language)
        place = _before_braces(problem.tests, self._rules.num_braces_after)
        tests = f"{problem.tests[:place]}\n{statement}\n{problem.tests[place:]}"
        return self._source(problem, completion, tests)

    def _source(self, problem: Problem, completion: str, tests: str) -> str:
        if self.asking == "base":
            code = problem.code + "\n" + cut_at(completion, problem.stop)
        else:
            code = complete_function(problem.code, completion, self._rules.dialect)
        headers = "".join(f"{header}\n" for header in self._rules.headers if header not in problem.code)
        return (headers + "\n" if self._rules.headers else "") + code + "\n" + tests

    def _problem(self, record: Record) -> Problem:
        is_base = self.asking == "base"
        _before_braces(record["tests"], self._rules.num_braces_after)  # told now, not at the first answer
        return Problem(
            task=self.name,
            id=str(record.get("task_id", record["name"])),
            prompt=ask(record["prompt"], asking=self.asking, language=self._rules.dialect.fence),
            form="completion" if is_base else "chat",
            stop=self._stop if is_base else (),
            max_new_tokens=BASE_TOKENS if is_base else INSTRUCT_TOKENS,
            language=self.language,
            code=record["prompt"],
            tests=record["tests"],
        )


def _before_braces(tests: str, num_braces: int) -> int:
    """The place before so many closing braces at the end of the tests."""
    place = len(tests)
    for _ in range(num_braces):
        place = tests.rfind("}", 0, place)
        if place < 0:
            raise ValueError(
                f"MultiPlE: tests must end with {num_braces} closing braces, got {tests[-80:]!r}"
            )
    return place


def _needs_tuples(source: str) -> bool:
    return _TUPLES.search(source.replace(_TUPLES_IMPORT, "", 1)) is not None


def _listed() -> str:
    return " and ".join(str(jar) for jar in _JARS)
