import gzip
import json

import pytest

from dscoder.tasks import sources
from dscoder.tasks.sources import read_records

ROWS = [{"id": 1, "text": "one\u2028line"}, {"id": 2, "text": "two"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def read(source, names=("set.jsonl",), wanted=("id",)):
    return read_records(source, names=names, wanted=wanted)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("set.jsonl", LINES.encode()),
        ("set.jsonl.gz", gzip.compress(LINES.encode())),
        ("set.json", json.dumps(ROWS).encode()),
        ("set.json", LINES.encode()),  # lines under the name of an array, as GSM8K's file has it
    ],
    ids=["lines", "compressed lines", "an array", "lines named an array"],
)
def test_every_kind_of_file_gives_the_same_records(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path / name) == ROWS
    assert read(tmp_path, names=("absent.jsonl", name)) == ROWS


def test_parquet_is_read_with_pyarrow(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "set.parquet")
    assert read(tmp_path / "set.parquet") == ROWS


def test_parquet_without_pyarrow_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "parquet", None)
    (tmp_path / "set.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="needs pyarrow"):
        read(tmp_path / "set.parquet")


def test_several_sources_follow_one_another(tmp_path):
    (tmp_path / "set.jsonl").write_text('{"id": 1}\n')
    (tmp_path / "more.jsonl").write_text('\n{"id": 2}\n')
    assert read([tmp_path, tmp_path / "more.jsonl"]) == [{"id": 1}, {"id": 2}]


def test_a_hub_file_is_asked_for_by_repository_revision_and_path(tmp_path, monkeypatch):
    (tmp_path / "test.jsonl").write_text(LINES)
    asked = []

    def download(repo_id, filename, *, repo_type, revision):
        asked.append((repo_id, filename, repo_type, revision))
        return str(tmp_path / "test.jsonl")

    monkeypatch.setattr(sources, "hf_hub_download", download)
    assert read("hf://datasets/openai/gsm8k/main/test.jsonl") == ROWS
    assert read("hf://datasets/openai/gsm8k@v1/test.jsonl") == ROWS
    assert asked == [
        ("openai/gsm8k", "main/test.jsonl", "dataset", None),
        ("openai/gsm8k", "test.jsonl", "dataset", "v1"),
    ]


def test_a_hub_that_does_not_answer_is_named(monkeypatch):
    def download(*args, **kwargs):
        raise OSError("offline")

    monkeypatch.setattr(sources, "hf_hub_download", download)
    with pytest.raises(
        ValueError, match=r"'hf://datasets/a/b/c\.jsonl' must be had from the hub, got: offline"
    ):
        read("hf://datasets/a/b/c.jsonl")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("set.csv", b"a,b", "must end in .jsonl"),
        ("set.jsonl", b"{", "must hold records, got: Expecting"),
        ("set.jsonl", b"\xff", "must hold records"),
        ("set.jsonl.gz", b"{}", "must hold records, got: Not a gzipped file"),
        ("set.jsonl", b'{"id": 1}\n[]', "got another thing at record 1"),
        ("set.jsonl", b'{"id": 1}\n{"key": 2}', "must have id, got record 1 without id"),
    ],
)
def test_a_wrong_file_is_named_with_what_is_wrong(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name)


def test_a_source_that_is_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must be a file or a directory, got"):
        read(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"must hold set\.jsonl or other\.json"):
        read(tmp_path, names=("set.jsonl", "other.json"))
    with pytest.raises(ValueError, match="must be hf://datasets/<owner>/<name>"):
        read("hf://datasets/short")
