"""Sharded safetensors: how files are cut, what a broken directory is refused for."""

import errno
import json
import resource
import struct

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dscoder.checkpoint import store
from dscoder.checkpoint.store import (
    INDEX,
    WEIGHTS,
    open_store,
    plan_shards,
    read_header,
    read_json,
    read_tensors,
    write_tensors,
)

TENSORS = {name: torch.full((4,), float(i)) for i, name in enumerate("abcde")}  # 16 bytes each


def write(directory, *, max_shard_bytes=32):
    directory.mkdir(exist_ok=True)
    write_tensors(directory, list(TENSORS.items()), max_shard_bytes=max_shard_bytes)
    return directory


def edit_index(directory, **changes):
    path = directory / INDEX
    index = json.loads(path.read_text())
    index["weight_map"].update(changes)
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("sizes", "max_bytes", "shards"),
    [
        ([], 10, [range(0)]),
        ([1, 2, 3], 6, [range(3)]),
        ([1, 2, 3], 5, [range(2), range(2, 3)]),
        ([5, 5, 5], 10, [range(2), range(2, 3)]),
        ([50, 1], 10, [range(1), range(1, 2)]),
        ([1, 50, 1], 10, [range(1), range(1, 2), range(2, 3)]),
        ([1, 1], 0, [range(1), range(1, 2)]),
    ],
)
def test_shards_are_filled_in_order(sizes, max_bytes, shards):
    assert plan_shards(sizes, max_bytes=max_bytes) == shards


def test_what_fits_is_one_file_without_an_index(tmp_path):
    write(tmp_path, max_shard_bytes=80)
    assert [path.name for path in tmp_path.iterdir()] == [WEIGHTS]
    assert load_file(tmp_path / WEIGHTS).keys() == TENSORS.keys()


def test_the_index_is_that_of_the_published_checkpoints(tmp_path):
    write(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    files = [f"model-0000{number}-of-00003.safetensors" for number in (1, 1, 2, 2, 3)]
    assert index == {"metadata": {"total_size": 80}, "weight_map": dict(zip("abcde", files, strict=True))}


@pytest.mark.parametrize("max_shard_bytes", [16, 32, 80])
def test_what_was_written_is_read_back(tmp_path, max_shard_bytes):
    write(tmp_path, max_shard_bytes=max_shard_bytes)
    read = {name: tensor.clone() for name, tensor in read_tensors(open_store(tmp_path))}
    assert read.keys() == TENSORS.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in TENSORS.items())


def test_views_of_one_stack_and_strided_tensors_are_written(tmp_path):
    stack = torch.arange(12.0).view(2, 2, 3)
    tensors = {"first": stack[0], "second": stack[1], "turned": torch.arange(6.0).view(2, 3).t()}
    write_tensors(tmp_path, list(tensors.items()), max_shard_bytes=1000)
    read = load_file(tmp_path / WEIGHTS)
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_a_tensor_without_elements_is_written(tmp_path):
    write_tensors(tmp_path, [("none", torch.empty(0, 3))], max_shard_bytes=1)
    assert open_store(tmp_path)["none"].shape == (0, 3)


def test_every_cut_of_a_file_is_found(tmp_path):
    whole = tmp_path / "whole.safetensors"
    save_file(TENSORS, whole)
    content = whole.read_bytes()
    for length in range(len(content)):
        path = tmp_path / "cut.safetensors"
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"cut\.safetensors must be a whole"):
            read_header(path)


def test_a_cut_file_names_the_tensor_that_is_lost(tmp_path):
    path = write(tmp_path, max_shard_bytes=80) / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        ValueError, match=r"model\.safetensors must be .* cut off: tensor 'e' must end at byte 80 .*, got 79"
    ):
        open_store(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04 not a safetensors file",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 1) + b"{",
        struct.pack("<Q", 7) + b'{"a":1}',
        struct.pack("<Q", 8) + b'{"a":{}}',
        struct.pack("<Q", 2**63) + b"{}",
        b"\xff" * 64,
    ],
)
def test_what_is_no_safetensors_file_is_refused_by_name(tmp_path, content):
    (tmp_path / WEIGHTS).write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors must be a whole safetensors file"):
        open_store(tmp_path)


def test_a_header_nested_without_end_is_refused_by_name(tmp_path):
    header = b'{"a":' + b"[" * 200_000
    (tmp_path / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ValueError, match=r"model\.safetensors must be a whole safetensors file: .*recursion"):
        open_store(tmp_path)


def entry(start, end, *, shape=(4,), dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": entry(0, 12)}, r"tensor 'a' of type F32 and shape \(4,\) must be 16 bytes, got 12"),
        ({"a": entry(0, 16, dtype="BF16")}, "tensor 'a' of type BF16 .* must be 8 bytes, got 16"),
        ({"a": entry(16, 0)}, "tensor 'a' must start at byte 0 of the data, got 16"),
        ({"a": entry(0, 16), "b": entry(8, 24)}, "tensor 'b' must start at byte 16 of the data, got 8"),
        ({"a": entry(0, 16), "b": entry(0, 16)}, "tensor 'b' must start at byte 16 of the data, got 0"),
        ({"b": entry(20, 36), "a": entry(0, 16)}, "tensor 'b' must start at byte 16 of the data, got 20"),
        ({"a": entry(0, 8, shape=(2,)), "b": entry(8, 20, shape=(3,))}, "must hold 20 bytes of data, got 36"),
        ({}, "must hold 0 bytes of data, got 36"),
        (
            {"a": entry(0, 16) | {"dtype": ["F32"]}},
            r"tensor 'a' must have a dtype, .*got {'dtype': \['F32'\]",
        ),
        (
            {"a": entry(0, 16, shape=(4.0,))},
            "tensor 'a' must have a dtype, a shape and two data_offsets, got {",
        ),
        (
            {"a": {"dtype": "F32", "shape": [4]}},
            "tensor 'a' must have a dtype, a shape and two data_offsets, got {",
        ),
        ({"a": entry(0, 36, shape=(9,), dtype="I16")}, "must be a whole safetensors file: .*invalid shape"),
        ({"a": entry(0, 36, shape=(-3, -3))}, "must be a whole safetensors file: .*expected usize"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused_before_a_weight_is_read(tmp_path, header, message):
    text = json.dumps(header).encode()
    (tmp_path / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + bytes(36))
    with pytest.raises(ValueError, match=rf"^checkpoint: .*model\.safetensors.*{message}"):
        open_store(tmp_path)


def test_tensors_without_elements_may_lie_anywhere(tmp_path):
    none = {"none": torch.empty(0, 3), "z": torch.empty(0, dtype=torch.float16)}
    save_file(TENSORS | none, tmp_path / WEIGHTS)
    assert open_store(tmp_path).keys() == TENSORS.keys() | none.keys()


def test_a_file_longer_than_its_header_says_is_refused(tmp_path):
    path = write(tmp_path, max_shard_bytes=80) / WEIGHTS
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(
        ValueError, match=r"model\.safetensors must be .*: it must hold 80 bytes of data, got 84"
    ):
        open_store(tmp_path)


def test_a_file_that_changes_after_its_header_was_read_is_named(tmp_path):
    path = write(tmp_path, max_shard_bytes=80) / WEIGHTS
    tensors = open_store(tmp_path)
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(ValueError, match=r"model\.safetensors must be a whole safetensors file"):
        list(read_tensors(tensors))


@pytest.mark.parametrize("name", [WEIGHTS, INDEX, "model-00002-of-00003.safetensors"])
def test_a_link_to_a_file_that_is_gone_is_named(tmp_path, name):
    path = write(tmp_path) / name
    path.unlink(missing_ok=True)
    path.symlink_to("../../blobs/0123")
    with pytest.raises(
        ValueError, match=rf"{name} must be a file, got a broken link to \.\./\.\./blobs/0123"
    ):
        open_store(tmp_path)


def test_files_may_be_links(tmp_path):
    blobs, snapshot = write(tmp_path / "blobs"), tmp_path / "snapshot"
    snapshot.mkdir()
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(path)
    assert open_store(snapshot).keys() == TENSORS.keys()


def test_an_absent_shard_is_named_with_a_tensor(tmp_path):
    (write(tmp_path) / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match=r"index\.json puts 'c' in model-00002-of-00003\S+, which is absent"):
        open_store(tmp_path)


def test_a_tensor_in_another_shard_than_listed_is_named(tmp_path):
    edit_index(write(tmp_path), a="model-00003-of-00003.safetensors")
    with pytest.raises(ValueError, match=r"'a' lies in .*model-00001-of-00003\S+, but .* in model-00003-of"):
        open_store(tmp_path)


def test_a_tensor_that_no_shard_holds_is_named(tmp_path):
    edit_index(write(tmp_path), z="model-00003-of-00003.safetensors")
    with pytest.raises(ValueError, match=r"puts 'z' in model-00003-of-00003\S+, which does not hold it"):
        open_store(tmp_path)


def test_a_tensor_that_the_index_leaves_out_is_named(tmp_path):
    index = json.loads((write(tmp_path) / INDEX).read_text())
    del index["weight_map"]["b"]
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"'b' lies in .*model-00001-of-00003\S+, but .* puts it nowhere"):
        open_store(tmp_path)


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "folder/x", "", ".", "..", 3])
def test_an_index_may_not_point_out_of_the_directory(tmp_path, file):
    edit_index(write(tmp_path), a=file)
    with pytest.raises(ValueError, match="the file of 'a' must be a plain name"):
        open_store(tmp_path)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', "[]", "{", ""])
def test_a_broken_index_is_named(tmp_path, content):
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json must"):
        open_store(tmp_path)


def test_an_index_and_a_single_file_together_are_ambiguous(tmp_path):
    write(tmp_path)
    write(tmp_path, max_shard_bytes=80)
    with pytest.raises(ValueError, match=r"must hold model\.safetensors or .*, got both"):
        open_store(tmp_path)


def test_an_index_may_list_the_single_file(tmp_path):
    write(tmp_path, max_shard_bytes=80)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(TENSORS, WEIGHTS)}))
    assert open_store(tmp_path).keys() == TENSORS.keys()


def test_pickles_are_refused_with_the_way_out(tmp_path):
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"got pytorch_model\.bin: a pickle.*weights_only=True"):
        open_store(tmp_path)


def test_shards_without_their_index_and_an_empty_directory_are_told_apart(tmp_path):
    with pytest.raises(ValueError, match="got neither"):
        open_store(tmp_path)
    (write(tmp_path) / INDEX).unlink()
    with pytest.raises(ValueError, match=r"got model-00001-of-00003\.safetensors and no index"):
        open_store(tmp_path)


def test_json_that_is_no_object_is_refused(tmp_path):
    (tmp_path / "x.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"x\.json must be a JSON file"):
        read_json(tmp_path / "x.json")
    with pytest.raises(ValueError, match=r"absent\.json must be a JSON file"):
        read_json(tmp_path / "absent.json")
    (tmp_path / "deep.json").write_text("[" * 200_000)
    with pytest.raises(ValueError, match=r"deep\.json must be a JSON file, got .*recursion"):
        read_json(tmp_path / "deep.json")


def test_a_file_that_cannot_be_written_is_an_os_error_with_its_number(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    tensors = [("a", torch.zeros(100_000))]
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match=r"checkpoint: .*model\.safetensors could not be written") as caught:
            write_tensors(tmp_path, tensors, max_shard_bytes=1_000_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("I/O error: No space left on device (os error 28)", errno.ENOSPC),
        ("I/O error: failed to write whole buffer", errno.EIO),
    ],
)
def test_a_full_disk_is_told_from_a_broken_one(tmp_path, monkeypatch, text, number):
    def fail(tensors, path, metadata):
        raise SafetensorError(f"Error while serializing: {text}")

    monkeypatch.setattr(store, "save_file", fail)
    with pytest.raises(OSError, match=r"\.safetensors could not be written: ") as caught:
        write(tmp_path)
    assert caught.value.errno == number
