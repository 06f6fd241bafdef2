"""Reading dialogues: three forms, three kinds of file, and a reason for each record that is left out."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from dscoder.data import dialogues
from dscoder.data.dialogues import Dialogue, hash_dialogues, parse_record, read_dialogues
from dscoder.data.sources import Reason


def said(*pairs: tuple[str, object]) -> list[dict[str, object]]:
    return [{"role": role, "content": content} for role, content in pairs]


PLAIN = said(("user", "Q"), ("assistant", "A"))


def messages_of(record: object) -> list[dict[str, str]]:
    found = parse_record("r", record)
    assert isinstance(found, Dialogue), found
    return [dict(message) for message in found.messages]


def reason_of(record: object) -> str:
    found = parse_record("r", record)
    assert isinstance(found, Reason), found
    return found.name


# ---- forms ----


@pytest.mark.parametrize(
    "record",
    [
        {"messages": PLAIN},
        {"messages": [{**message, "name": "x"} for message in PLAIN], "id": 7},
        {"instruction": "Q", "output": "A"},
        {"instruction": "Q", "input": "", "output": "A"},
        {"instruction": "Q", "input": None, "output": "A", "system": None},
        {"prompt": "Q", "completion": "A"},
        {"prompt": PLAIN[:1], "completion": PLAIN[1:]},
        {"messages": None, "prompt": "Q", "completion": "A"},  # as a table with a column for each form has it
    ],
)
def test_one_question_in_every_form(record: object) -> None:
    assert messages_of(record) == PLAIN


def test_alpaca_input_follows_the_instruction_and_system_leads() -> None:
    record = {"instruction": "Sort.", "input": "3 1 2", "output": "1 2 3", "system": "Be brief."}
    assert messages_of(record) == said(
        ("system", "Be brief."), ("user", "Sort.\n3 1 2"), ("assistant", "1 2 3")
    )


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (["Q", "A"], "no_record"),
        ({"text": "Q"}, "unknown_form"),
        ({"instruction": "Q"}, "unknown_form"),
        ({"prompt": PLAIN, "completion": "A"}, "no_text"),
        ({"messages": ["Q", "A"]}, "unknown_role"),
        ({"messages": said(("user", "Q"), ("tool", "T"), ("assistant", "A"))}, "unknown_role"),
        ({"messages": said(("user", 3), ("assistant", "A"))}, "no_text"),
        ({"messages": said(("user", "Q"), ("assistant", None))}, "no_text"),
        ({"instruction": "\ud800", "output": "A"}, "no_text"),
        ({"instruction": 3, "input": "x", "output": "A"}, "no_text"),
        ({"messages": []}, "no_answer"),
        ({"messages": said(("system", "S"))}, "no_answer"),
        ({"messages": said(("user", "Q"))}, "no_answer"),
        ({"messages": [*PLAIN, *PLAIN[:1]]}, "no_answer"),
        ({"messages": PLAIN[1:]}, "not_in_turn"),
        ({"messages": [*PLAIN[:1], *PLAIN]}, "not_in_turn"),
        ({"messages": [*PLAIN, *said(("system", "S"))]}, "not_in_turn"),
        ({"prompt": "Q", "completion": " \n"}, "empty_message"),
        ({"prompt": "", "completion": "A"}, "empty_message"),
    ],
)
def test_a_record_that_teaches_nothing_says_why(record: object, reason: str) -> None:
    assert reason_of(record) == reason


def test_the_same_question_has_the_same_key_whatever_was_answered() -> None:
    one, other, third = (
        parse_record("r", {"prompt": question, "completion": answer})
        for question, answer in (("Q", "A"), ("Q", "B"), ("R", "A"))
    )
    assert isinstance(one, Dialogue)
    assert isinstance(other, Dialogue)
    assert isinstance(third, Dialogue)
    assert one.key == other.key != third.key
    assert one.content_key != other.content_key


# ---- files ----


def lines_of(*records: object) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def questions(path: Path) -> tuple[list[str], dict[str, int]]:
    dropped: Counter[str] = Counter()
    found = [dialogue.messages[0]["content"] for dialogue in read_dialogues([str(path)], dropped=dropped)]
    return found, dict(dropped)


def test_bad_lines_and_repeated_dialogues_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = {"prompt": "Q", "completion": "A"}
    path.write_bytes(
        b'{"prompt"\n\n\xff\n' + b"[" * 100_000 + b"\n" + lines_of(good, {"messages": PLAIN}, {})
    )
    assert questions(path) == (["Q"], {"bad_json": 3, "duplicate": 1, "unknown_form": 1})


def test_a_directory_is_its_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "c.jsonl").write_bytes(lines_of({"prompt": "third", "completion": "A"}))
    (tmp_path / "b" / "z.jsonl").write_bytes(lines_of({"prompt": "second", "completion": "A"}))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines_of({"prompt": "first", "completion": "A"})))
    (tmp_path / "README.md").write_text("nothing")
    assert questions(tmp_path)[0] == ["first", "second", "third"]


def test_parquet_holds_the_same_dialogues(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [
        {"messages": said(("user", f"Q{i}"), ("assistant", "A")), "source": "x", "output": None}
        for i in range(3000)
    ]
    rows.append({"messages": said(("user", "Q")), "source": "x", "output": None})
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert questions(tmp_path) == ([f"Q{i}" for i in range(3000)], {"no_answer": 1})
    alpaca = [{"instruction": "Q", "input": "", "output": "A"}]
    parquet.write_table(pyarrow.Table.from_pylist(alpaca), tmp_path / "a.parquet")
    assert questions(tmp_path / "a.parquet") == (["Q"], {})


def test_a_torn_parquet_file_is_named(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"a\.parquet must be a whole parquet file"):
        questions(tmp_path)


def test_parquet_without_pyarrow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dialogues, "ParquetFile", None)
    (tmp_path / "a.parquet").touch()
    with pytest.raises(ValueError, match=r"pip install 'dscoder\[sft\]'"):
        questions(tmp_path)


@pytest.mark.parametrize("name", ["absent.jsonl", "notes.txt", "empty"])
def test_a_path_without_dialogues_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=rf"ending in \.jsonl, .* got '.*{name}'"):
        questions(tmp_path / name)


def test_the_hash_is_of_names_and_contents(tmp_path: Path) -> None:
    hashes = []
    for folder, text in (("a", b"{}"), ("b", b"{}"), ("c", b"[]")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.jsonl").write_bytes(text)
        hashes.append(hash_dialogues([str(tmp_path / folder)]))
    assert hashes[0] == hashes[1] != hashes[2]
