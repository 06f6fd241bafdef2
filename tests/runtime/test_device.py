"""Devices by name, and the memory there is."""

import resource
from pathlib import Path

import pytest
import torch

from dscoder.runtime import device
from dscoder.runtime.device import (
    device_memory,
    device_peak_flops,
    host_memory,
    peak_flops,
    peak_memory,
    resolve_device,
)


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


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H800", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H800 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA A800-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA H20", None),
        ("NVIDIA A10", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_a_gpu_is_as_fast_as_its_data_sheet_says(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak


def test_no_peak_is_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    assert device_peak_flops(torch.device("cuda"), torch.bfloat16) == 989e12
    assert device_peak_flops(torch.device("cuda"), torch.float32) is None
    assert device_peak_flops(torch.device("cpu"), torch.bfloat16) is None


def test_the_peak_of_memory_stays_when_memory_is_given_back() -> None:
    held = torch.ones(2**24)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    del held
    peak = peak_memory(torch.device("cpu"))
    assert peak is not None
    assert peak >= resident - 2**22  # the kernel counts pages in batches


def test_a_host_that_does_not_tell_has_no_peak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_STATUS", tmp_path / "absent")
    assert peak_memory(torch.device("cpu")) is None
    (tmp_path / "status").write_text("VmPeak:\t 9 kB\nVmHWM:\t 7 kB\n")
    monkeypatch.setattr(device, "_STATUS", tmp_path / "status")
    assert peak_memory(torch.device("cpu")) == 7 * 1024
