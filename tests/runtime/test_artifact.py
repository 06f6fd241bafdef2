"""Stage directories: finished means whole, and no directory is taken over by mistake."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dscoder.runtime import artifact
from dscoder.runtime.artifact import differences, hash_path, open_stage, read_manifest, write_bytes

CONFIG = {"size": 1, "name": "a", "place": "here"}
INPUTS = {"data": "0" * 64}


def run_stage(
    directory: Path,
    *,
    config: dict[str, object] = CONFIG,
    overwrite: bool = False,
    is_resumable: bool = True,
) -> str:
    """Write one file as a stage would; says what the stage found."""
    with open_stage(
        directory,
        command="test",
        config=config,
        inputs=INPUTS,
        free=("place",),
        overwrite=overwrite,
        is_resumable=is_resumable,
    ) as stage:
        if stage.is_finished:
            return "finished"
        (directory / "result").write_text(str(config["size"]))
        stage.finish(counts={"files": 1}, dropped={"empty": 2}, facts={"x": "y"})
        return "resumed" if stage.is_resumed else "fresh"


def test_the_manifest_says_what_made_the_directory(tmp_path: Path) -> None:
    run_stage(tmp_path)
    manifest = read_manifest(tmp_path, command="test")
    assert manifest["config"] == CONFIG
    assert manifest["inputs"] == INPUTS
    assert manifest["counts"] == {"files": 1}
    assert manifest["dropped"] == {"empty": 2}
    assert manifest["facts"] == {"x": "y"}
    assert len(manifest["code"]["sources"]) == 64


def test_a_finished_stage_is_left_alone(tmp_path: Path) -> None:
    assert run_stage(tmp_path) == "fresh"
    assert run_stage(tmp_path) == "finished"


def test_a_half_written_stage_has_no_manifest_and_is_resumed(tmp_path: Path) -> None:
    with open_stage(tmp_path, command="test", config=CONFIG, inputs=INPUTS):
        (tmp_path / "half").write_text("")
    with pytest.raises(ValueError, match=r"holds no manifest\.json: `dscoder test` has not finished"):
        read_manifest(tmp_path, command="test")
    assert run_stage(tmp_path) == "resumed"


def test_a_stage_that_cannot_resume_starts_from_an_empty_directory(tmp_path: Path) -> None:
    with open_stage(tmp_path, command="test", config=CONFIG, inputs=INPUTS):
        (tmp_path / "half").write_text("")
    assert run_stage(tmp_path, is_resumable=False) == "fresh"
    assert not (tmp_path / "half").exists()


def test_another_config_is_refused_and_every_difference_named(tmp_path: Path) -> None:
    run_stage(tmp_path)
    with pytest.raises(ValueError, match="made by another config") as error:
        run_stage(tmp_path, config=CONFIG | {"size": 2, "name": "b"})
    assert "config.size: 1 there, 2 here" in str(error.value)
    assert "config.name: a there, b here" in str(error.value)
    assert (tmp_path / "result").read_text() == "1"


def test_free_keys_may_differ(tmp_path: Path) -> None:
    run_stage(tmp_path)
    assert run_stage(tmp_path, config=CONFIG | {"place": "there"}) == "finished"


def test_overwrite_replaces_what_another_config_made(tmp_path: Path) -> None:
    run_stage(tmp_path)
    (tmp_path / "folder").mkdir()
    assert run_stage(tmp_path, config=CONFIG | {"size": 2}, overwrite=True) == "fresh"
    assert (tmp_path / "result").read_text() == "2"
    assert not (tmp_path / "folder").exists()


def test_overwrite_keeps_what_the_same_config_made(tmp_path: Path) -> None:
    with open_stage(tmp_path, command="test", config=CONFIG, inputs=INPUTS):
        (tmp_path / "half").write_text("")
    assert run_stage(tmp_path, overwrite=True) == "resumed"
    assert (tmp_path / "half").exists()
    assert run_stage(tmp_path, overwrite=True) == "finished"


class KilledError(BaseException):
    """Stands for SIGKILL."""


def kill_before(operation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the next `operation` calls that open, write through, rename or delete a file pass, and no more."""
    num_passed = 0

    def watched(call: Callable[..., object]) -> Callable[..., object]:
        def watch(*arguments: object, **named: object) -> object:
            nonlocal num_passed
            if num_passed == operation:
                raise KilledError
            num_passed += 1
            return call(*arguments, **named)

        return watch

    monkeypatch.setattr(io, "open", watched(io.open))
    for name in ("open", "fsync", "replace", "unlink", "rmdir", "mkdir"):
        monkeypatch.setattr(os, name, watched(getattr(os, name)))


def is_killed(
    directory: Path,
    operation: int,
    monkeypatch: pytest.MonkeyPatch,
    *,
    config: dict[str, object] = CONFIG,
    overwrite: bool = False,
) -> bool:
    """Begin a stage and die before file operation `operation`; False if it began with fewer."""
    # Hashing the package opens a file for each of its sources: no concern of this test.
    monkeypatch.setattr(artifact, "code_version", lambda: {"version": "0", "sources": "0"})
    with monkeypatch.context() as patched:
        kill_before(operation, patched)
        try:
            with open_stage(
                directory,
                command="test",
                config=config,
                inputs=INPUTS,
                free=("place",),
                overwrite=overwrite,
                is_resumable=True,
            ):
                return False
        except KilledError:
            return True


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_stage_killed_anywhere_while_it_begins_can_begin_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    operation = 0
    while is_killed(tmp_path / str(operation), operation, monkeypatch):
        assert run_stage(tmp_path / str(operation), overwrite=overwrite) == "fresh"
        operation += 1
    assert operation > 5
    leftovers = {path.name for path in tmp_path.rglob("*.tmp")}
    assert not leftovers


def messy(directory: Path, *, is_finished: bool) -> None:
    """A stage with several files and folders, whole or half-written."""
    with open_stage(directory, command="test", config=CONFIG, inputs=INPUTS) as stage:
        (directory / "deep" / "er").mkdir(parents=True)
        for name in ("a", "b", "deep/c", "deep/er/d"):
            (directory / name).write_text("old")
        if is_finished:
            stage.finish(counts={})


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("is_finished", [False, True])
def test_a_directory_killed_anywhere_while_it_is_emptied_belongs_to_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_finished: bool, overwrite: bool
) -> None:
    other = CONFIG | {"size": 2}
    operation, num_marked = 0, 0
    while True:
        directory = tmp_path / str(operation)
        messy(directory, is_finished=is_finished)
        if not is_killed(directory, operation, monkeypatch, config=other, overwrite=True):
            break
        started = directory / "started.json"
        is_marked = started.exists() and "clearing" in artifact.read_json(started)
        num_marked += is_marked
        is_whole = (directory / "deep" / "er" / "d").exists() and not is_marked
        assert run_stage(directory, config=other, overwrite=overwrite or is_whole) == "fresh"
        assert {path.name for path in directory.iterdir()} == {"lock", "manifest.json", "result"}
        operation += 1
    assert num_marked > 5


def test_a_half_emptied_directory_is_never_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for operation in range(100):
        directory = tmp_path / str(operation)
        messy(directory, is_finished=False)
        if not is_killed(directory, operation, monkeypatch, config=CONFIG | {"size": 2}, overwrite=True):
            break
        is_whole = all((directory / name).exists() for name in ("a", "b", "deep/c", "deep/er/d"))
        assert run_stage(directory, overwrite=True) in ("fresh", "resumed" if is_whole else "fresh")
    else:
        pytest.fail("never began")


def test_what_was_cut_off_while_it_was_written_is_no_result(tmp_path: Path) -> None:
    hashes = set()
    for name in ("clean", "cut"):
        with open_stage(tmp_path / name, command="test", config=CONFIG, inputs=INPUTS):
            (tmp_path / name / "half").write_text("")
        if name == "cut":
            (tmp_path / name / "manifest.json.tmp").write_text("{")
        run_stage(tmp_path / name)
        hashes.add(hash_path(tmp_path / name))
    assert len(hashes) == 1


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["started.json", "manifest.json"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "must hold a JSON object, got Expecting"),
        ("[1]", "must hold a JSON object, got a list"),
        ("\xff", "must hold a JSON object, got"),
        (
            '{"name": "an extension of a browser"}',
            "must be a record of dscoder, got one without code, command",
        ),
    ],
)
def test_records_that_are_not_ours_are_named_and_kept(
    tmp_path: Path, name: str, text: str, message: str, overwrite: bool
) -> None:
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    (tmp_path / "work").write_text("")
    with pytest.raises(ValueError, match=rf"/{name} {message}"):
        run_stage(tmp_path, overwrite=overwrite)
    assert (tmp_path / "work").exists()


def test_a_directory_of_strangers_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(
            ValueError, match=r"must be empty or a directory written by dscoder, got thesis\.tex"
        ):
            run_stage(tmp_path, overwrite=overwrite)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_stage_that_failed_before_it_wrote_binds_nobody(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), open_stage(tmp_path, command="test", config=CONFIG, inputs=INPUTS):
        raise RuntimeError
    assert run_stage(tmp_path, config=CONFIG | {"size": 2}) == "fresh"


def test_two_processes_never_write_one_directory(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from dscoder.runtime.artifact import open_stage\n"
        "with open_stage(Path(sys.argv[1]), command='test', config={}, inputs={}): pass"
    )
    with open_stage(tmp_path, command="test", config={}, inputs={}):
        other = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
        )
    assert other.returncode == 1
    assert "another process is writing" in other.stderr


def test_a_manifest_of_another_verb_is_refused(tmp_path: Path) -> None:
    run_stage(tmp_path)
    with pytest.raises(ValueError, match="must come from `dscoder prepare`, got `dscoder test`"):
        read_manifest(tmp_path, command="prepare")


def test_a_hash_tells_names_and_contents_apart(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "abc"]
    for folder, (name, text) in zip(folders, [("x", "1"), ("x", "2"), ("y", "1")], strict=True):
        folder.mkdir()
        (folder / name).write_text(text)
    assert len({hash_path(folder) for folder in folders}) == 3
    (folders[1] / "x").write_text("1")
    assert hash_path(folders[0]) == hash_path(folders[1])


def test_the_hash_of_a_stage_is_of_what_it_made_not_where_or_when(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there, other = (tmp_path / name for name in ("here", "there", "other"))
    run_stage(here)
    (here / "lock").write_text("changed")
    monkeypatch.setattr(artifact, "code_version", lambda: {"version": "later", "sources": "0"})
    run_stage(there, config=CONFIG | {"place": "there"})
    run_stage(other, config=CONFIG | {"size": 2})
    assert hash_path(here) == hash_path(there)
    assert hash_path(here) != hash_path(other)


def test_only_the_results_of_a_stage_are_in_its_hash(tmp_path: Path) -> None:
    hashes = []
    for name, speed in (("a", "fast"), ("b", "slow")):
        with open_stage(tmp_path / name, command="test", config=CONFIG, inputs=INPUTS) as stage:
            (stage.directory / "model").mkdir()
            (stage.directory / "model" / "weights").write_text("1")
            (stage.directory / "speed").write_text(speed)
            stage.finish(counts={}, results=("model",))
        hashes.append(hash_path(tmp_path / name))
    assert hashes[0] == hashes[1]


def test_a_manifest_of_another_format_is_refused(tmp_path: Path) -> None:
    run_stage(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 1}))
    for read in (hash_path, lambda directory: read_manifest(directory, command="test")):
        with pytest.raises(ValueError, match=r"manifest\.json must have format 2, got 1.* --overwrite true"):
            read(tmp_path)
    with pytest.raises(ValueError, match="format: 1 there, 2 here"):
        run_stage(tmp_path)
    assert run_stage(tmp_path, overwrite=True) == "fresh"


def test_a_manifest_of_strangers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"name": "thesis"}')
    with pytest.raises(ValueError, match=r"manifest\.json must be a record of dscoder, got one without code"):
        hash_path(tmp_path)


def test_a_manifest_without_its_facts_is_refused(tmp_path: Path) -> None:
    run_stage(tmp_path)
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["facts"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(
        ValueError, match=r"manifest\.json must be a manifest of dscoder, got one without facts"
    ):
        read_manifest(tmp_path, command="test")


def test_differences_name_nested_keys() -> None:
    assert differences({"a": {"b": 1}}, {"a": {"b": 2, "c": None}}) == ["a.b: 1 there, 2 here"]


def test_bytes_are_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_bytes(path, json.dumps([1]).encode())
    write_bytes(path, b"")
    assert path.read_bytes() == b""
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
