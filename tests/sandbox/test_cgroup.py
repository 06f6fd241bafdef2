"""Where groups can be made, from the texts of /proc; the files of both versions, in a stand-in tree."""

from pathlib import Path

import pytest

from dscoder.sandbox.cgroup import Hierarchy, find_hierarchies, new_group, sweep


def version_2(
    root: Path, *, controllers: str = "cpu memory pids", enabled: str = "memory pids"
) -> tuple[str, str]:
    (root / "mine").mkdir()
    (root / "mine" / "cgroup.controllers").write_text(controllers)
    (root / "mine" / "cgroup.subtree_control").write_text(enabled)
    return f"cgroup2 {root} cgroup2 rw,nosuid 0 0\n", "0::/mine\n"


def test_version_2_is_found_at_the_own_group(tmp_path: Path) -> None:
    (found,) = find_hierarchies(*version_2(tmp_path))
    assert found == Hierarchy(root=tmp_path / "mine", controllers=frozenset({"memory", "pids"}), version=2)


def test_controllers_that_are_off_are_turned_on(tmp_path: Path) -> None:
    assert find_hierarchies(*version_2(tmp_path, enabled=""))
    assert (tmp_path / "mine" / "cgroup.subtree_control").read_text() == "+memory +pids"


def test_without_controllers_there_is_nothing(tmp_path: Path) -> None:
    assert find_hierarchies(*version_2(tmp_path, controllers="cpu")) == ()
    assert find_hierarchies("tmpfs /tmp tmpfs rw 0 0\n", "0::/\n") == ()


def test_version_1_is_found_by_controller(tmp_path: Path) -> None:
    (tmp_path / "memory" / "mine").mkdir(parents=True)
    mounts = f"cgroup {tmp_path}/memory cgroup rw,memory 0 0\ncgroup {tmp_path}/cpu cgroup rw,cpu 0 0\n"
    (found,) = find_hierarchies(mounts, "4:memory:/mine\n1:cpu:/\n")
    assert (found.root, found.version) == (tmp_path / "memory" / "mine", 1)


@pytest.mark.parametrize(
    ("version", "name"), [(2, "memory.max"), (1, "memory.limit_in_bytes")], ids=["v2", "v1"]
)
def test_limits_are_written(tmp_path: Path, version: int, name: str) -> None:
    both = frozenset({"memory", "pids"})
    hierarchy = Hierarchy(root=tmp_path, controllers=both, version=version)
    with new_group((hierarchy,), memory=1000, processes=7) as group:
        ((_, folder),) = group.folders
        assert (folder / name).read_text() == "1000"
        assert (folder / "pids.max").read_text() == "7"
        group.add(42)
        assert (folder / "cgroup.procs").read_text() == "42"
        events = "memory.events" if version == 2 else "memory.oom_control"
        (folder / events).write_text("oom 3\noom_kill 2\n")
        assert group.num_killed() == 2
        (folder / "cgroup.procs").write_text("")  # the kernel empties it; this stand-in does not


def test_groups_of_the_dead_are_swept(tmp_path: Path) -> None:
    hierarchy = Hierarchy(root=tmp_path, controllers=frozenset({"memory"}), version=1)
    living, dead, other = (
        tmp_path / f"{name}-0" for name in ("dscoder-sandbox-1", "dscoder-sandbox-99999999", "x-1")
    )
    for folder in (living, dead, other):
        folder.mkdir()
    sweep((hierarchy,))
    assert (living.exists(), dead.exists(), other.exists()) == (True, False, True)
