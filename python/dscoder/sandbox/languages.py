"""The twenty languages as data: what runs each, and how its failures look.

In a command `@name` is the path of that executable, `{main}` the main file, `{stem}` its name without the
ending, `{heap}` the megabytes a runtime that sizes its own heap may take; `{args}` and `{compiler_args}` are
the program's.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

Command = tuple[str, ...]
_RUN_BINARY = ("./program", "{args}")
_JVM = ("-XX:+UseSerialGC", "-XX:-UsePerfData", "-Xshare:auto")
_JVM_COMPILER = tuple(f"-J{flag}" for flag in (*_JVM, "-XX:TieredStopAtLevel=1"))
_BAD_ALLOC = r"std::bad_alloc"
_JAVA_MEMORY = r"java\.lang\.OutOfMemoryError"
_SOME = ".{0,4000}"  # bounded, or a program could keep the search busy for hours
_C_ASSERT = rf"Assertion `?{_SOME} failed|Assertion failed"


@dataclass(frozen=True, kw_only=True, slots=True)
class Language:
    """How one language is compiled and run.

    Attributes:
        file_name: what its one file is called.
        executables: what must be installed; alternatives for one part are joined by "|".
        version: arguments that make the first executable name its version.
        memory_mark, assertion_mark: what stderr holds after running out of memory, and after a failed
            assertion; "" if nothing tells.
        is_bounded_in_address_space: False for runtimes that reserve much more than they use.
        env: variables beside PATH, HOME, TMPDIR and LANG.
    """

    file_name: str
    executables: tuple[str, ...]
    version: Command = ("--version",)
    compile: tuple[Command, ...] = ()
    run: Command
    memory_mark: str = ""
    assertion_mark: str = ""
    is_bounded_in_address_space: bool = True
    env: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        named = {word[1:] for command in (*self.compile, self.run) for word in command if word[0] == "@"}
        known = {name.split("|")[0] for name in self.executables}
        if not named <= known:
            raise ValueError(f"Language: commands may name {sorted(known)}, got {sorted(named)}")
        for mark in (self.memory_mark, self.assertion_mark):
            re.compile(mark)


LANGUAGES: Mapping[str, Language] = MappingProxyType(
    {
        "python": Language(
            file_name="main.py",
            executables=("python3",),
            run=("@python3", "-B", "{main}", "{args}"),
            memory_mark=r"^MemoryError",
            assertion_mark=r"^AssertionError",
        ),
        "c": Language(
            file_name="main.c",
            executables=("gcc|clang|cc",),
            compile=(("@gcc", "-std=c17", "-o", "program", "{main}", "{compiler_args}", "-lm"),),
            run=_RUN_BINARY,
            assertion_mark=_C_ASSERT,
        ),
        "cpp": Language(
            file_name="main.cpp",
            executables=("g++|clang++|c++",),
            compile=(("@g++", "-std=c++17", "-o", "program", "{main}", "{compiler_args}"),),
            run=_RUN_BINARY,
            memory_mark=_BAD_ALLOC,
            assertion_mark=_C_ASSERT,
        ),
        "java": Language(
            file_name="Main.java",
            executables=("java", "javac"),
            version=("-version",),
            compile=(
                (
                    *("@javac", *_JVM_COMPILER, "-encoding", "UTF-8", "-cp", ".:*", "-d", "."),
                    *("{compiler_args}", "{main}"),
                ),
            ),
            run=("@java", *_JVM, "-Xmx{heap}m", "-ea", "-cp", ".:*", "{stem}", "{args}"),
            memory_mark=_JAVA_MEMORY,
            assertion_mark=r"java\.lang\.AssertionError",
            is_bounded_in_address_space=False,
        ),
        "javascript": Language(
            file_name="main.js",
            executables=("node|nodejs",),
            run=("@node", "--max-old-space-size={heap}", "{main}", "{args}"),
            memory_mark=r"JavaScript heap out of memory",
            assertion_mark=r"AssertionError|Assertion failed",
            is_bounded_in_address_space=False,
        ),
        "typescript": Language(
            file_name="main.ts",
            executables=("tsc", "node|nodejs"),
            compile=(
                (
                    *("@node", "@tsc", "--target", "es2020", "--module", "commonjs", "--skipLibCheck"),
                    *("--outDir", ".", "{compiler_args}", "{main}"),
                ),
            ),
            run=("@node", "--max-old-space-size={heap}", "{stem}.js", "{args}"),
            memory_mark=r"JavaScript heap out of memory",
            assertion_mark=r"AssertionError|Assertion failed",
            is_bounded_in_address_space=False,
        ),
        "bash": Language(
            file_name="main.sh",
            executables=("bash",),
            run=("@bash", "{main}", "{args}"),
            memory_mark=r"cannot allocate|xrealloc|xmalloc",
        ),
        "rust": Language(
            file_name="main.rs",
            executables=("rustc",),
            compile=(("@rustc", "--edition", "2021", "-o", "program", "{compiler_args}", "{main}"),),
            run=_RUN_BINARY,
            memory_mark=r"memory allocation of \d+ bytes failed",
            assertion_mark=rf"assertion (`{_SOME}` )?failed",
        ),
        "perl": Language(
            file_name="main.pl",
            executables=("perl",),
            run=("@perl", "{main}", "{args}"),
            memory_mark=r"Out of memory",
        ),
        "csharp": Language(
            file_name="main.cs",
            executables=("mcs", "mono"),
            compile=(("@mcs", "-d:DEBUG", "-out:program.exe", "{compiler_args}", "{main}"),),
            run=("@mono", "program.exe", "{args}"),
            memory_mark=r"OutOfMemoryException",
            assertion_mark=r"^Fail:|Assertion failed",
            is_bounded_in_address_space=False,
        ),
        "php": Language(
            file_name="main.php",
            executables=("php",),
            run=(
                "@php",
                "-d",
                "memory_limit={heap}M",
                "-d",
                "zend.assertions=1",
                "-f",
                "{main}",
                "--",
                "{args}",
            ),
            memory_mark=r"Allowed memory size",
            assertion_mark=r"AssertionError",
        ),
        "go": Language(
            file_name="main.go",
            executables=("go",),
            version=("version",),
            compile=(("@go", "build", "-o", "program", "{compiler_args}", "{main}"),),
            run=_RUN_BINARY,
            memory_mark=r"runtime: out of memory",
            is_bounded_in_address_space=False,
            env=MappingProxyType({"GOCACHE": "/tmp/go-cache", "GOPATH": "/tmp/go", "GOTOOLCHAIN": "local"}),
        ),
        "go_test": Language(  # a file of tests, as the translated HumanEval has it
            file_name="main_test.go",
            executables=("go",),
            version=("version",),
            compile=(("@go", "test", "-c", "-o", "program", "{compiler_args}", "{main}"),),
            run=_RUN_BINARY,
            memory_mark=r"runtime: out of memory",
            is_bounded_in_address_space=False,
            env=MappingProxyType({"GOCACHE": "/tmp/go-cache", "GOPATH": "/tmp/go", "GOTOOLCHAIN": "local"}),
        ),
        "ruby": Language(
            file_name="main.rb",
            executables=("ruby",),
            run=("@ruby", "{main}", "{args}"),
            memory_mark=r"failed to allocate memory",
            assertion_mark=r"Failure:|AssertionFailedError",
        ),
        "lua": Language(
            file_name="main.lua",
            executables=("lua|lua5.4|lua5.3",),
            version=("-v",),
            run=("@lua", "{main}", "{args}"),
            memory_mark=r"not enough memory",
            assertion_mark=r"assertion failed|LuaUnit|expected:",
        ),
        "r": Language(
            file_name="main.R",
            executables=("Rscript",),
            run=("@Rscript", "--vanilla", "{main}", "{args}"),
            memory_mark=r"cannot allocate (vector|memory)",
            assertion_mark=r"is not TRUE|are not equal",
        ),
        "julia": Language(
            file_name="main.jl",
            executables=("julia",),
            run=("@julia", "--startup-file=no", "--history-file=no", "{main}", "{args}"),
            memory_mark=r"OutOfMemoryError",
            assertion_mark=r"AssertionError|Test Failed",
            is_bounded_in_address_space=False,
            env=MappingProxyType({"JULIA_DEPOT_PATH": "/tmp/julia:"}),
        ),
        "swift": Language(
            file_name="main.swift",
            executables=("swiftc",),
            compile=(("@swiftc", "-o", "program", "{compiler_args}", "{main}"),),
            run=_RUN_BINARY,
            assertion_mark=r"Assertion failed",
            is_bounded_in_address_space=False,
        ),
        "racket": Language(
            file_name="main.rkt",
            executables=("racket",),
            run=("@racket", "{main}", "{args}"),
            memory_mark=r"out of memory",
            assertion_mark=r"^FAILURE",
            is_bounded_in_address_space=False,
        ),
        "d": Language(
            file_name="main.d",
            executables=("dmd|ldmd2|gdmd",),
            compile=(("@dmd", "-unittest", "-of=program", "{compiler_args}", "{main}"),),
            run=_RUN_BINARY,
            memory_mark=r"OutOfMemoryError",
            assertion_mark=r"core\.exception\.AssertError|unittest failure",
        ),
        "scala": Language(
            file_name="Main.scala",
            executables=("scalac", "scala", "java"),
            version=("-version",),
            compile=(("@scalac", "-d", ".", "{compiler_args}", "{main}"),),
            run=("@scala", "-J-Xmx{heap}m", "-cp", ".", "{stem}", "{args}"),
            memory_mark=_JAVA_MEMORY,
            assertion_mark=r"AssertionError|assertion failed",
            is_bounded_in_address_space=False,
        ),
    }
)
