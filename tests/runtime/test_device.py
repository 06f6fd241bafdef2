"""Devices by name, and the memory there is."""

from pathlib import Path

import pytest
import torch

from dscoder.runtime import device
from dscoder.runtime.device import device_memory, host_memory, resolve_device


@pytest.fixture
def num_gpus(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    count: int = request.param
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    return count


@pytest.mark.parametrize(
    ("num_gpus", "name", "expected"),
    [
        (0, "auto", "cpu"),
        (2, "auto", "cuda"),
        (2, "cpu", "cpu"),
        (1, "cuda", "cuda"),
        (2, "cuda:1", "cuda:1"),
    ],
    indirect=["num_gpus"],
)
def test_a_name_is_a_device(num_gpus: int, name: str, expected: str) -> None:
    assert resolve_device(name) == torch.device(expected)


@pytest.mark.parametrize(
    ("num_gpus", "name"), [(0, "cuda"), (0, "cuda:0"), (2, "cuda:2")], indirect=["num_gpus"]
)
def test_a_device_that_is_not_there_is_refused(num_gpus: int, name: str) -> None:
    with pytest.raises(ValueError, match=rf"device must be one .* \(GPUs: {num_gpus}\), got '{name}'"):
        resolve_device(name)


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "mps", "", "cpu:0"])
def test_another_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"device must be auto, cpu, cuda or cuda:N, got '{name}'"):
        resolve_device(name)


@pytest.mark.parametrize(("limit", "is_lower"), [("4096\n", True), ("max\n", False), (f"{2**63}\n", False)])
def test_the_host_has_what_its_container_allows(
    limit: str, is_lower: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "_MEMORY_LIMITS", (tmp_path / "absent",))
    machine = host_memory()
    assert machine > 2**20
    (tmp_path / "limit").write_text(limit)
    monkeypatch.setattr(device, "_MEMORY_LIMITS", (tmp_path / "absent", tmp_path / "limit"))
    assert host_memory() == (4096 if is_lower else machine)
    assert device_memory(torch.device("cpu")) == host_memory()
