"""What this machine can run: the executables of each language, their versions, and the command lines."""

import re
import shutil
import site
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath

from dscoder.sandbox.box import View
from dscoder.sandbox.languages import LANGUAGES, Command, Language
from dscoder.sandbox.verdict import MIB

_SYSTEM_PATH = ("/usr/local/bin", "/usr/bin", "/bin")
_SYSTEM_ROOT = Path("/usr")
_ASKING_TIME = 60.0  # seconds a toolchain may take to say its version
_HEAP_SHARE = 0.6  # of the memory: what a runtime may give to its heap, the rest is for itself


@dataclass(frozen=True, kw_only=True, slots=True)
class Missing:
    """A language that nothing on this machine runs."""

    language: str
    executables: tuple[str, ...]  # those not found

    def detail(self) -> str:
        """A line for a person."""
        return f"{self.language} needs {' and '.join(self.executables)}, not found on PATH"


@dataclass(frozen=True, kw_only=True, slots=True)
class Toolchain:
    """A language with the executables found for it."""

    name: str
    language: Language
    version: str
    paths: Mapping[str, Path]  # by the name used in commands
    view: View

    @property
    def env(self) -> dict[str, str]:
        """The whole environment of its programs."""
        folders = dict.fromkeys([*(str(path.parent) for path in self.paths.values()), *_SYSTEM_PATH])
        env = {"PATH": ":".join(folders), "HOME": "/tmp", "TMPDIR": "/tmp", "LANG": "C.UTF-8"}
        return env | dict(self.language.env)

    def commands(
        self, main: str, *, args: Sequence[str], compiler_args: Sequence[str], memory: float
    ) -> tuple[list[Command], Command]:
        """The commands that compile a program whose main file is `main`, and the one that runs it."""
        words = {
            "main": main,
            "stem": str(PurePosixPath(main).with_suffix("")),
            "heap": str(max(16, int(memory * _HEAP_SHARE / MIB))),
        }

        def filled(command: Command) -> Command:
            found: list[str] = []
            for word in command:
                if word == "{args}":
                    found += args
                elif word == "{compiler_args}":
                    found += compiler_args
                else:
                    found.append(str(self.paths[word[1:]]) if word[0] == "@" else word.format_map(words))
            return tuple(found)

        return [filled(command) for command in self.language.compile], filled(self.language.run)


def _first_found(alternatives: str) -> Path | None:
    for name in alternatives.split("|"):
        if found := shutil.which(name):
            return Path(found)
    return None


def _ask(command: Sequence[str | Path]) -> str:
    """What a command of the toolchain itself says; "" if it fails."""
    try:
        answer = subprocess.run(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_ASKING_TIME,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return answer.stdout.decode(errors="replace")


def _python() -> Path:
    """The interpreter below this process's, without the packages of its virtual environment."""
    prefix = Path(sys.base_prefix).resolve()
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return prefix / "bin" / name


def _behind_rustup(rustc: Path) -> Path:
    """rustup puts a launcher on PATH that needs its own folder in $HOME; the compiler itself does not."""
    root = _ask([rustc, "--print", "sysroot"]).strip()
    return Path(root) / "bin" / "rustc" if root else rustc


def _locate(language: str, names: Sequence[str]) -> dict[str, Path | None]:
    if language == "python":
        return {"python3": _python()}
    found = {alternatives.split("|")[0]: _first_found(alternatives) for alternatives in names}
    if (rustc := found.get("rustc")) is not None:
        found["rustc"] = _behind_rustup(rustc)
    return found


def installation_of(path: Path) -> Path:
    """The folder that must be seen for an executable to run: what holds its bin, but never a home folder."""
    real = path.resolve()
    root = real.parent.parent
    is_too_much = root == Path("/") or Path.home().resolve().is_relative_to(root)
    return real.parent if is_too_much else root


def _view(language: str, paths: Sequence[Path]) -> View:
    folders = {installation_of(path) for path in paths} | {path.parent for path in paths}
    outside = sorted(folder for folder in folders if not folder.is_relative_to(_SYSTEM_ROOT))
    # A folder below another that is shown needs no showing.
    shown = tuple(
        folder for folder in outside if not any(folder.is_relative_to(o) for o in outside if o != folder)
    )
    if language != "python":
        return View(shown=shown)
    # The same standard library on every machine, and a start that does not depend on what is installed.
    packages = [Path(folder) for folder in site.getsitepackages([str(Path(sys.base_prefix).resolve())])]
    return View(shown=shown, masked=tuple(folder for folder in packages if folder.is_dir()))


@cache
def find(language: str) -> Toolchain | Missing:
    """The toolchain of a language, looked for once a process; ValueError for an unknown language."""
    if language not in LANGUAGES:
        raise ValueError(f"find: language must be one of {', '.join(sorted(LANGUAGES))}, got {language!r}")
    table = LANGUAGES[language]
    located = _locate(language, table.executables)
    missing = [name for name in table.executables if located[name.split("|")[0]] is None]
    if missing:
        return Missing(language=language, executables=tuple(name.replace("|", " or ") for name in missing))
    paths = {name: path for name, path in located.items() if path is not None}
    first = paths[table.executables[0].split("|")[0]]
    answer = _ask([first, *table.version])
    number = re.search(r"\d+(\.\d+)+", answer)
    return Toolchain(
        name=language,
        language=table,
        version=number[0] if number else "unknown",
        paths=paths,
        view=_view(language, list(paths.values())),
    )


def find_all() -> dict[str, Toolchain | Missing]:
    """Every language of the table, found or missing."""
    return {language: find(language) for language in LANGUAGES}
