"""Cores and memory from the files of control groups, in a stand-in tree."""

import math
import os
from pathlib import Path

import pytest

from dscoder.sandbox import machine
from dscoder.sandbox.machine import container_limits, control_groups


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("_", ".", 1)).write_text(content + "\n")


def test_the_tightest_group_on_the_way_up_counts(tmp_path: Path) -> None:
    write(tmp_path, memory_max="9000", cpu_max="max 100000")
    write(tmp_path / "a", memory_max="5000", cpu_max="150000 100000")
    write(tmp_path / "a" / "b", memory_max="max", cpu_max="400000 100000")
    table = f"cgroup2 {tmp_path} cgroup2 rw 0 0\n"
    assert container_limits(table, "0::/a/b\n") == (1.5, 5000)


def test_inside_a_container_the_mount_point_is_the_own_group(tmp_path: Path) -> None:
    write(tmp_path, memory_max="5000", cpu_max="max 100000")
    table = f"cgroup2 {tmp_path} cgroup2 rw 0 0\n"
    assert container_limits(table, "0::/docker/0123\n") == (math.inf, 5000)


def test_version_1_has_a_hierarchy_for_each(tmp_path: Path) -> None:
    write(tmp_path / "memory" / "x", memory_limit_in_bytes="7000")
    write(tmp_path / "cpu" / "y", **{"cpu_cfs_quota_us": "200000", "cpu_cfs_period_us": "100000"})
    write(tmp_path / "cpu", **{"cpu_cfs_quota_us": "-1", "cpu_cfs_period_us": "100000"})
    table = (
        f"cgroup {tmp_path}/memory cgroup rw,memory 0 0\ncgroup {tmp_path}/cpu cgroup rw,cpu,cpuacct 0 0\n"
        "tmpfs /run tmpfs rw 0 0\n"
    )
    membership = "5:memory:/x\n4:cpu,cpuacct:/y\n1:name=systemd:/\n"
    assert container_limits(table, membership) == (2.0, 7000)
    assert [own.name for _, _, own, _ in control_groups(table, membership)] == ["x", "y"]


def test_where_nothing_is_said_nothing_is_bounded(tmp_path: Path) -> None:
    assert container_limits("", "") == (math.inf, math.inf)
    assert container_limits(f"cgroup2 {tmp_path} cgroup2 rw 0 0\n", "0::/\n") == (math.inf, math.inf)


@pytest.mark.parametrize(("quota", "cores"), [(0.4, 1), (1.5, 2), (math.inf, 3)])
def test_cores_are_those_of_the_process_and_of_its_container(
    monkeypatch: pytest.MonkeyPatch, quota: float, cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    monkeypatch.setattr(machine, "_container", lambda: (quota, math.inf))
    assert machine.num_cores() == cores


def test_memory_is_the_machines_or_the_containers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_container", lambda: (math.inf, math.inf))
    assert machine.memory() == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setattr(machine, "_container", lambda: (math.inf, 12345))
    assert machine.memory() == 12345


def test_the_kernels_count_of_the_killed_is_read() -> None:
    assert machine.num_killed_for_memory() >= 0
    assert "oom_kill" in Path("/proc/vmstat").read_text()
