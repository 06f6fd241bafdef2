"""A verb's config from its words: `--config run.yaml`, dotted overrides, presets to start from.

jsonargparse reads the YAML files and the words and checks each value's type. Records within records are put
together here: it cannot start from a nested record with slots, nor change one field of a record that is one
of several kinds (which attention, experts or none).
"""

import dataclasses
import inspect
import re
import types
import typing
from argparse import ArgumentError
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentParser

Record = TypeVar("Record")


def _kinds(hint: Any) -> list[Any]:
    """The records among the alternatives of a type hint."""
    alternatives = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return [kind for kind in alternatives if dataclasses.is_dataclass(kind)]


def _fields(kind: Any, start: Any) -> Iterator[tuple[str, Any, Any]]:
    """(name, type hint, value to start from or MISSING) of each field.

    `start` is a record, a mapping from some field names to values, or None.
    """
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(start):
            value = getattr(start, field.name)
        elif start is not None and field.name in start:
            value = start[field.name]
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        else:
            value = field.default
        yield field.name, hints[field.name], value


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Leaf:
    """A field that is not a record itself: one word of the command line."""

    key: str  # dotted
    hint: Any
    default: Any  # MISSING: it must be given
    help: str


def _help_texts(kind: Any) -> dict[str, str]:
    """What the comment behind each field says."""
    comment = re.compile(r"^    (\w+): [^#\n]*#\s+(.*)$", re.MULTILINE)
    return {match[1]: match[2].replace("%", "%%") for match in comment.finditer(inspect.getsource(kind))}


def _leaves(kind: Any, start: Any, prefix: str = "") -> Iterator[_Leaf]:
    """Every leaf below `kind`.

    Where there is no record to start from, every kind that the hint allows lends its fields; None is unset.
    """
    texts = _help_texts(kind)
    for name, hint, value in _fields(kind, start):
        kinds = _kinds(hint)
        if not kinds:
            yield _Leaf(key=f"{prefix}{name}", hint=hint, default=value, help=texts.get(name, ""))
        elif dataclasses.is_dataclass(value):
            yield from _leaves(type(value), value, f"{prefix}{name}.")
        else:
            for leaf in chain.from_iterable(_leaves(option, None, f"{prefix}{name}.") for option in kinds):
                yield dataclasses.replace(leaf, hint=leaf.hint | None, default=None)


def _item(hint: Any) -> Any:
    """The type of the items of a tuple of any length, which may be optional; None for other hints."""
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    for option in typing.get_args(hint) if is_union else (hint,):
        match typing.get_origin(option), typing.get_args(option):
            case origin, (item, end) if origin is tuple and end is ...:
                return item
    return None


def _is_set(value: Any) -> bool:
    return any(_is_set(item) for item in value.values()) if isinstance(value, Mapping) else value is not None


def _build(kind: Any, start: Any, given: Mapping[str, Any], *, is_new: bool) -> Any:
    """The record of type `kind` from parsed values; in a new one, unset fields take their own defaults."""
    values = {}
    for name, hint, value in _fields(kind, start):
        kinds, found = _kinds(hint), given.get(name)
        if kinds and found is not None and not isinstance(found, Mapping):
            wanted = " or ".join(option.__name__ for option in kinds)
            raise ValueError(f"{kind.__name__}: {name} must hold the fields of {wanted}, got {found!r}")
        if dataclasses.is_dataclass(value) and found is not None:
            found = _build(type(value), value, found, is_new=is_new)
        elif kinds:
            found = _build_new(name, kinds, found) if found is not None and _is_set(found) else None
        elif found is not None and _item(hint) is not None and not isinstance(found, list | tuple):
            found = (found,)
        elif is_new and found is None and value is not dataclasses.MISSING:
            found = value
        if found is None and value is dataclasses.MISSING and types.NoneType not in typing.get_args(hint):
            raise ValueError(f"{kind.__name__}: {name} must be given, got nothing")
        values[name] = found
    return kind(**values)


def _build_new(name: str, kinds: Sequence[Any], given: Mapping[str, Any]) -> Any:
    named = {key for key, value in given.items() if _is_set(value)}
    for kind in kinds:
        if named <= {field.name for field in dataclasses.fields(kind)}:
            return _build(kind, None, given, is_new=True)
    wanted = " or ".join(kind.__name__ for kind in kinds)
    raise ValueError(f"{name} must have the fields of {wanted}, got {', '.join(sorted(named))}")


def parse(
    argv: Sequence[str],
    record: type[Record],
    *,
    verb: str,
    description: str | None,
    start: Mapping[str, object] | None = None,
    shortcuts: Mapping[str, str] | None = None,
) -> Record:
    """The `record` that the words and the YAML files they name describe.

    Args:
        start: values of fields that are not given, instead of the record's defaults.
        shortcuts: help of keys that `shortcut` read before; they are accepted and change nothing here.

    A wrong word ends the process with status 2, as in argparse, and one line; what the record itself refuses
    is its own ValueError.
    """
    parser = ArgumentParser(
        prog=f"dscoder {verb}", description=description, allow_abbrev=False, exit_on_error=False
    )
    parser.add_argument("--config", action="config", help="YAML file; later words override it")
    for key, text in (shortcuts or {}).items():
        parser.add_argument(f"--{key}", type=str | None, default=None, help=text)
    # Two kinds of one field may share a name: the last one's leaf stands for both.
    leaves = {leaf.key: leaf for leaf in _leaves(record, start)}
    for leaf in leaves.values():
        is_required = leaf.default is dataclasses.MISSING
        default = None if is_required else leaf.default
        # One item may stand for a list of one.
        hint = leaf.hint if _item(leaf.hint) is None else leaf.hint | _item(leaf.hint)
        # The parser adds type and default to a text, but not to an empty one.
        text = leaf.help or "type: %(type)s" + ("" if is_required else ", default: %(default)s")
        parser.add_argument(f"--{leaf.key}", type=hint, required=is_required, default=default, help=text)
    try:
        given = parser.parse_args(list(argv)).as_dict()
    except ArgumentError as error:
        said = _one_line(str(error), {key: leaf.hint for key, leaf in leaves.items()})
        parser.exit(2, f"dscoder {verb}: {said}; `dscoder {verb} --help` tells more\n")
    built: Record = _build(record, start, given, is_new=False)
    return built


def _told(hint: Any) -> str:
    """A type hint in words: "int or null", "none, selective or full"."""
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    words = []
    for option in typing.get_args(hint) if is_union else (hint,):
        if typing.get_origin(option) is typing.Literal:
            words += [str(choice) for choice in typing.get_args(option)]
        elif option is types.NoneType:
            words.append("null")
        else:
            words.append(option.__name__ if isinstance(option, type) and not _item(option) else str(option))
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last


def _one_line(message: str, hints: Mapping[str, Any]) -> str:
    """What the parser says of a wrong word, shortened where it names an option and its value."""
    key = re.search(r'Parser key "([^"]+)"', message)
    value = re.search(r"(?:Given|Got) value: (.*)$", message)
    if key and value and key[1] in hints:
        return f"{key[1]} must be {_told(hints[key[1]])}, got {value[1]!r}"
    return " ".join(message.split())


def spelled(argv: Sequence[str]) -> list[str]:
    """The words with options as the parsers know them: `--num-steps` is `--num_steps`, as in a YAML file."""
    num_options = argv.index("--") if "--" in argv else len(argv)
    option = re.compile(r"^--[A-Za-z][\w.-]*(?==|$)")
    return [*(option.sub(_with_underscores, word) for word in argv[:num_options]), *argv[num_options:]]


def _with_underscores(option: re.Match[str]) -> str:
    return "--" + option[0].removeprefix("--").replace("-", "_")


def _given(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(option, value) of each option among the words; the value may be the next word."""
    for word, following in pairwise([*argv, ""]):
        name, has_value, value = word.partition("=")
        if name.startswith("--"):
            yield name.removeprefix("--"), value if has_value else following


def _read_file(path: Path) -> dict[str, Any]:
    """What a YAML file says; ValueError, on one line and with the file's name, if it is not a mapping."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"--config: {path} must be a YAML file, got: {said}") from error
    if not isinstance(found, dict):
        raise ValueError(f"--config: {path} must map options to values, got {found!r}")
    return found


def check_files(argv: Sequence[str]) -> None:
    """ValueError if a YAML file that the words name cannot be read as one."""
    for name, value in _given(argv):
        if name == "config" and Path(value).is_file():
            _read_file(Path(value))


def shortcut(argv: Sequence[str], key: str) -> str | None:
    """The last value of `--key` among the words or in the YAML files they name, before anything is parsed."""
    found = None
    for name, value in _given(argv):
        if name == key:
            found = value
        elif name == "config" and Path(value).is_file():
            found = _looked_up(_read_file(Path(value)), key.split(".")) or found
    return found


def _looked_up(value: Any, path: Sequence[str]) -> str | None:
    for step in path:
        value = value.get(step) if isinstance(value, dict) else None
    return None if value is None else str(value)
