"""Where documents come from, and why some are dropped."""

import gzip
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from dscoder.config.data import SourcesConfig
from dscoder.data.sources import Document, hash_sources, is_held_out, read_documents


def read(config: SourcesConfig) -> tuple[list[Document], Counter[str]]:
    dropped: Counter[str] = Counter()
    return list(read_documents(config, dropped=dropped)), dropped


def write(root: Path, files: dict[str, bytes]) -> SourcesConfig:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return SourcesConfig(paths=(str(root),), extensions=(".py",), max_bytes=20)


def test_files_are_read_in_sorted_order_by_extension(tmp_path: Path) -> None:
    config = write(tmp_path, {"b.py": b"2", "a/z.py": b"3", "a.py": b"1", "c.txt": b"4"})
    documents, dropped = read(config)
    assert [document.name for document in documents] == ["a.py", "b.py", "a/z.py"]
    assert not dropped


def test_what_is_dropped_is_counted_by_reason(tmp_path: Path) -> None:
    files = {
        "latin1.py": "caf\u00e9".encode("latin-1"),
        "nul.py": b"a\0b",
        "blank.py": b" \n\t\n",
        "empty.py": b"",
        "big.py": b"x" * 21,
        "good.py": b"x" * 20,
    }
    documents, dropped = read(write(tmp_path, files))
    assert [document.name for document in documents] == ["good.py"]
    assert dropped == {"undecodable": 1, "binary": 1, "empty": 2, "too_large": 1}


def test_texts_keep_every_character(tmp_path: Path) -> None:
    text = "a\r\nb\rc\n\f\ufeff\u4e2d"
    documents, _ = read(write(tmp_path, {"a.py": text.encode()}))
    assert documents[0].text == text


def test_foreign_folders_and_links_are_left_out(tmp_path: Path) -> None:
    config = write(tmp_path, {"a.py": b"1", "site-packages/b.py": b"2", ".git/c.py": b"3"})
    (tmp_path / "link.py").symlink_to(tmp_path / "a.py")
    documents, _ = read(config)
    assert [document.name for document in documents] == ["a.py"]


def test_excluded_paths_are_not_read(tmp_path: Path) -> None:
    config = write(
        tmp_path, {"a.py": b"1", "tables/b.py": b"2", "tables/deep/c.py": b"3", "d/tables.py": b"4"}
    )
    documents, dropped = read(replace(config, excluded=("tables/*",)))
    assert [document.name for document in documents] == ["a.py", "d/tables.py"]
    assert not dropped
    assert hash_sources(replace(config, excluded=("tables/*",))) != hash_sources(config)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_json_lines_give_one_document_each(tmp_path: Path, name: str) -> None:
    lines = [
        json.dumps({"content": "one"}),
        "",
        "not json",
        json.dumps({"other": "x"}),
        json.dumps({"content": 3}),
        json.dumps(["content"]),
        '{"content": "\\ud800"}',
        json.dumps({"content": "two\n"}),
    ]
    content = "\n".join(lines).encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    documents, dropped = read(SourcesConfig(paths=(str(path),), text_field="content"))
    assert [(d.name, d.text) for d in documents] == [(f"{name}:1", "one"), (f"{name}:8", "two\n")]
    assert dropped == {"bad_json": 2, "no_text": 3}


def test_the_standard_library_comes_without_its_tests() -> None:
    documents, _ = read(SourcesConfig())
    names = {document.name for document in documents}
    assert {"json/decoder.py", "argparse.py"} <= names
    assert not [name for name in names if {"test", "tests", "site-packages"} & set(name.split("/"))]


def test_the_split_follows_the_content_alone() -> None:
    documents = [Document(name=f"{i}.py", text=f"x = {i}") for i in range(2000)]
    held = [document for document in documents if is_held_out(document, share=0.1)]
    assert 140 < len(held) < 260
    moved = [Document(name="elsewhere", text=document.text) for document in held]
    assert all(is_held_out(document, share=0.1) for document in moved)


def test_a_larger_share_keeps_what_was_held_out() -> None:
    documents = [Document(name="", text=str(i)) for i in range(500)]
    small = {d.text for d in documents if is_held_out(d, share=0.05)}
    assert small < {d.text for d in documents if is_held_out(d, share=0.2)}
    assert not [d for d in documents if is_held_out(d, share=0.0)]


def test_the_hash_follows_names_and_contents(tmp_path: Path) -> None:
    config = write(tmp_path, {"a.py": b"1"})
    before = hash_sources(config)
    assert hash_sources(config) == before
    write(tmp_path, {"a.py": b"2"})
    assert hash_sources(config) != before


def test_a_source_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"each path must be 'stdlib', a directory or a file ending in \.jsonl"
    ):
        read(SourcesConfig(paths=(str(tmp_path / "missing"),)))
    with pytest.raises(ValueError, match=r"holds no file ending in \.py"):
        read(SourcesConfig(paths=(str(tmp_path),)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"paths": ()}, "paths must name at least one source, got none"),
        ({"extensions": ("py",)}, "extensions must start with a dot, got 'py'"),
        ({"max_bytes": 0}, "max_bytes must be positive, got 0"),
        ({"held_out_share": 1.0}, r"held_out_share must be in \[0, 1\), got 1.0"),
    ],
)
def test_wrong_fields_are_named(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SourcesConfig(**fields)
