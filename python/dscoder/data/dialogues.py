"""Dialogues to learn from: JSONL (also gzipped) and parquet files, or directories of them.

A record is one of three forms, told apart by its fields: `messages`, a list of {role, content}; the Alpaca
fields `instruction`, `input` (may be absent or empty), `output` and `system` (may be absent); or `prompt` and
`completion`, both texts or both lists of messages. Other fields are ignored. A record that cannot be learnt
from is dropped under a reason, which is counted.
"""

import gzip
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from dscoder.data.sources import Reason
from dscoder.runtime.artifact import hash_files
from dscoder.text.chat import Message

try:
    from pyarrow import ArrowException  # type: ignore[import-untyped,import-not-found,unused-ignore]
    from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped,import-not-found,unused-ignore]
except ImportError:  # the extra "sft" is not installed
    ParquetFile = None

_PARQUET = ".parquet"
_SUFFIXES = (".jsonl", ".jsonl.gz", _PARQUET)
_INSTALL = "pip install 'dscoder[sft]'"
_FIELDS = ("messages", "instruction", "input", "output", "system", "prompt", "completion")
_PARQUET_ROWS = 1024  # held in memory at once
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, kw_only=True, slots=True)
class Dialogue:
    """Messages in order: perhaps one of the system, then user and assistant in turn, an answer last."""

    name: str  # where it came from; decides nothing
    messages: tuple[Message, ...]

    @property
    def key(self) -> int:
        """64 bits of the first question: the same question has the same key whatever was answered."""
        question = next(message for message in self.messages if message["role"] == "user")
        return _hash(question["content"])

    @property
    def content_key(self) -> int:
        """64 bits of everything that was said."""
        return _hash(json.dumps([[message["role"], message["content"]] for message in self.messages]))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _dialogue_files(paths: Sequence[str]) -> list[Path]:
    """Every file that the paths name, directories in sorted order."""
    files: list[Path] = []
    for given in paths:
        path = Path(given).expanduser()
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(_SUFFIXES))
        else:
            found = [path] if path.is_file() and path.name.endswith(_SUFFIXES) else []
        if not found:
            raise ValueError(
                f"dialogues: each path must be a file ending in {', '.join(_SUFFIXES)} or a directory with "
                f"such files, got {given!r}"
            )
        files += found
    return files


def hash_dialogues(paths: Sequence[str]) -> str:
    """sha256 over the names and contents of the files."""
    return hash_files([(path.name, path) for path in _dialogue_files(paths)])


def parse_record(name: str, record: object) -> Dialogue | Reason:
    """The dialogue that one record holds, or why it holds none."""
    if not isinstance(record, dict):
        return Reason(name="no_record", document=name, detail=f"a {type(record).__name__}, not an object")
    messages = _messages(record)
    if messages is None:
        found = ", ".join(sorted(map(str, record))) or "none"
        return Reason(name="unknown_form", document=name, detail=f"fields {found}")
    fault = _fault(messages)
    if fault is not None:
        return Reason(name=fault, document=name)
    kept = tuple({"role": message["role"], "content": message["content"]} for message in messages)
    return Dialogue(name=name, messages=kept)


def _messages(record: dict[Any, Any]) -> list[Any] | None:
    """The messages that the record's fields say, unchecked; None: it has none of the forms."""
    given = {name: record.get(name) for name in _FIELDS}
    if isinstance(given["messages"], list):
        return given["messages"]
    if given["instruction"] is not None and given["output"] is not None:
        system = [_message("system", given["system"])] if given["system"] else []
        question = given["instruction"]
        if given["input"] and isinstance(question, str) and isinstance(given["input"], str):
            question = f"{question}\n{given['input']}"
        return [*system, _message("user", question), _message("assistant", given["output"])]
    prompt, completion = given["prompt"], given["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return [*prompt, *completion]
    if prompt is not None and completion is not None:
        return [_message("user", prompt), _message("assistant", completion)]
    return None


def _message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def _fault(messages: Sequence[Any]) -> str | None:
    """Why nothing can be learnt from the messages; None: it can."""
    if not all(isinstance(message, dict) and message.get("role") in _ROLES for message in messages):
        return "unknown_role"
    contents = [message.get("content") for message in messages]
    if not all(isinstance(content, str) and _is_utf8(content) for content in contents):
        return "no_text"
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if turns != [("user", "assistant")[i % 2] for i in range(len(turns))]:
        return "not_in_turn"
    if turns[-1:] != ["assistant"]:
        return "no_answer"
    if not all(message["content"].strip() for message in messages if message["role"] != "system"):
        return "empty_message"
    return None


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate
        return False
    return True


def _read_jsonl(path: Path) -> Iterator[Dialogue | Reason]:
    with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _parse_line(f"{path.name}:{number}", line)


def _parse_line(name: str, line: bytes) -> Dialogue | Reason:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Reason(name="bad_json", document=name, detail=str(error))
    return parse_record(name, record)


def _read_parquet(path: Path) -> Iterator[Dialogue | Reason]:
    if ParquetFile is None:
        raise ValueError(f"dialogues: pyarrow must be installed to read {path} ({_INSTALL})")
    try:
        with ParquetFile(path) as file:
            columns = [name for name in file.schema_arrow.names if name in _FIELDS]
            rows = (
                row
                for batch in file.iter_batches(_PARQUET_ROWS, columns=columns)
                for row in batch.to_pylist()
            )
            for number, row in enumerate(rows, start=1):
                yield parse_record(f"{path.name}:{number}", row)
    except ArrowException as error:
        raise ValueError(f"dialogues: {path} must be a whole parquet file, got: {error}") from error


def _distinct(found: Iterable[Dialogue | Reason]) -> Iterator[Dialogue | Reason]:
    """The same records, but of those that say the same only the first is a dialogue."""
    seen: set[int] = set()
    for item in found:
        if isinstance(item, Dialogue):
            key = item.content_key
            if key in seen:
                yield Reason(name="duplicate", document=item.name)
                continue
            seen.add(key)
        yield item


def read_dialogues(paths: Sequence[str], *, dropped: Counter[str]) -> Iterator[Dialogue]:
    """All dialogues of all files in a fixed order; `dropped` counts the other records by reason."""
    records = chain.from_iterable(
        _read_parquet(path) if path.name.endswith(_PARQUET) else _read_jsonl(path)
        for path in _dialogue_files(paths)
    )
    for found in _distinct(records):
        if isinstance(found, Reason):
            dropped[found.name] += 1
        else:
            yield found
