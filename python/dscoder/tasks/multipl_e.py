"""HumanEval translated into C++, Java, JavaScript and Bash (MultiPL-E, Cassano et al. 2022), as
DeepSeek-Coder scores it.

The rules are those of `human_eval`, but for the stop strings, which are those of the file's first record. In
C++, Java and Bash the stop string is the closing brace of the function, and the tests start with it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from dscoder.sandbox.verdict import MIB, Limits, Program, Verdict
from dscoder.tasks.answers import Dialect, complete_function, cut_at
from dscoder.tasks.ending import grade_ended
from dscoder.tasks.human_eval import BASE_TOKENS, INSTRUCT_TOKENS, Asking, ask, limits_for
from dscoder.tasks.problem import Grade, Problem, Task, not_judged
from dscoder.tasks.sources import Record, read_records
from dscoder.tasks.translated import Parts, before_braces, make_program, sign_of_cheating

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
    dialect: Dialect
    headers: tuple[str, ...] = ()
    num_braces_after: int  # closing braces that the tests have after the place where the program ends


_TRANSLATIONS: Mapping[str, _Translation] = MappingProxyType(
    {
        "cpp": _Translation(
            suffix="cpp",
            dialect=Dialect(fence="cpp", main="int main()"),
            headers=_CPP_HEADERS,
            num_braces_after=1,
        ),
        "java": _Translation(
            suffix="java",
            dialect=Dialect(fence="java", main="public static void main", indent=4),
            num_braces_after=2,
        ),
        "javascript": _Translation(
            suffix="js",
            dialect=Dialect(fence="javascript", adds_brace=True),
            num_braces_after=0,
        ),
        "bash": _Translation(
            suffix="sh",
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
        parts = self._parts(problem, completion)
        if self.language == "java" and self._jar is None and _needs_tuples(parts.code + parts.tests):
            return None
        program = make_program(parts)
        if self._jar is not None:
            return replace(program, files={**program.files, _JAR_NAME: self._jar.read_bytes()})
        if self.language == "cpp" and _OPENSSL in parts.code:
            return replace(program, compiler_args=("-lcrypto", "-lssl"))
        return program

    def grade(self, problem: Problem, completion: str, verdict: Verdict | None) -> Grade:
        """Passed if the program ran through its tests; not judged where a library is missing here."""
        if verdict is None and self.program(problem, completion) is None:
            return not_judged(f"needs javatuples (Debian: libjavatuples-java), found at none of {_listed()}")
        if verdict is not None and verdict.outcome == "compile_error" and verdict.compile is not None:
            found = _NO_OPENSSL.search(verdict.compile.stderr.decode(errors="replace"))
            if found:
                return not_judged(f"needs OpenSSL (Debian: libssl-dev): {found[0]}", verdict=verdict)
        parts = self._parts(problem, completion)
        grade = grade_ended(parts.headers + parts.code, verdict, tests=parts.tests)
        sign = sign_of_cheating(parts) if grade.is_passed else ""
        return replace(grade, is_suspect=True, detail=f"passed, but has {sign!r}") if sign else grade

    def _parts(self, problem: Problem, completion: str) -> Parts:
        if self.asking == "base":
            code = problem.code + "\n" + cut_at(completion, problem.stop)
        else:
            code = complete_function(problem.code, completion, self._rules.dialect)
        if self.language == "java" and self._jar is None:
            code = code.replace(_TUPLES_IMPORT, "", 1)
        headers = "".join(f"{header}\n" for header in self._rules.headers if header not in problem.code)
        return Parts(
            language=self.language,
            headers=headers,
            given=problem.code,
            code=code,
            tests=problem.tests,
            num_braces_after=self._rules.num_braces_after,
        )

    def _problem(self, record: Record) -> Problem:
        is_base = self.asking == "base"
        before_braces(record["tests"], self._rules.num_braces_after)  # told now, not at the first answer
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


def _needs_tuples(source: str) -> bool:
    return _TUPLES.search(source) is not None


def _listed() -> str:
    return " and ".join(str(jar) for jar in _JARS)
