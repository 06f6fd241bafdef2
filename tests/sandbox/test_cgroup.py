"""Where groups can be made, from the texts of /proc; the files of both versions, in a stand-in tree."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dscoder.sandbox import cgroup
from dscoder.sandbox.cgroup import (
    Hierarchy,
    Shortage,
    find_hierarchies,
    new_group,
    open_folders,
    sweep,
)

BOTH = frozenset({"memory", "pids"})


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
        assert (folder / "cgroup.procs").exists() == (version == 2)
        (folder / "tasks").touch()
        with group.open_doors() as files:
            assert len(files) == (1 if version == 1 else 0)
        assert group.all_doors() == [folder / ("cgroup.procs" if version == 2 else "tasks")]
        (folder / "cgroup.procs").write_text("")  # the kernel empties it; this stand-in does not


@pytest.mark.parametrize("num_full", [0, 3])
@pytest.mark.parametrize("version", [2, 1], ids=["v2", "v1"])
def test_a_shortage_is_the_groups_own_only_if_it_was_full(
    tmp_path: Path, version: int, num_full: int
) -> None:
    hierarchy = Hierarchy(root=tmp_path, controllers=BOTH, version=version)
    with new_group((hierarchy,), memory=64 << 20, processes=7) as group:
        ((_, folder),) = group.folders
        if version == 2:
            (folder / "memory.events").write_text(f"max 9\noom {num_full}\noom_kill 2\n")
        else:
            (folder / "memory.oom_control").write_text("under_oom 0\noom_kill 2\n")
            most = (64 if num_full else 32) << 20
            (folder / "memory.max_usage_in_bytes").write_text(f"{most}\n")
        assert group.counts_memory()
        assert group.shortage() == Shortage(num_killed=2, is_own=num_full > 0)
        (folder / "cgroup.procs").write_text("")


def test_without_a_group_nobody_counts_memory() -> None:
    with new_group((), memory=1000, processes=7) as group:
        assert not group.counts_memory()


def refuse_while_inside(monkeypatch: pytest.MonkeyPatch, root: Path, *, is_alone: bool) -> None:
    """The kernel's rule: a group with processes gives its children no controllers."""

    def enable(folder: Path, controllers: frozenset[str]) -> None:
        leaf = root / "dscoder-launcher" / "cgroup.procs"
        if not (is_alone and leaf.exists()):
            raise OSError(errno.EBUSY, "busy")
        (folder / "cgroup.subtree_control").write_text(" ".join(sorted(controllers)))

    monkeypatch.setattr(cgroup, "_enable", enable)


def test_a_launcher_in_a_group_of_version_2_moves_out_of_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = version_2(tmp_path, enabled="")
    refuse_while_inside(monkeypatch, tmp_path / "mine", is_alone=True)
    (found,) = find_hierarchies(*texts)
    assert (found.root, found.controllers) == (tmp_path / "mine", BOTH)
    assert (tmp_path / "mine" / "dscoder-launcher" / "cgroup.procs").read_text() == str(os.getpid())


def test_a_launcher_beside_others_goes_back_to_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = version_2(tmp_path, enabled="")
    refuse_while_inside(monkeypatch, tmp_path / "mine", is_alone=False)
    assert find_hierarchies(*texts) == ()
    assert (tmp_path / "mine" / "cgroup.procs").read_text() == str(os.getpid())


def test_what_a_launcher_starts_makes_its_groups_beside_it(tmp_path: Path) -> None:
    table, _ = version_2(tmp_path)
    (tmp_path / "mine" / "dscoder-launcher").mkdir()
    (found,) = find_hierarchies(table, "0::/mine/dscoder-launcher\n")
    assert found.root == tmp_path / "mine"


def test_the_names_of_groups_cannot_be_guessed(tmp_path: Path) -> None:
    hierarchy = Hierarchy(root=tmp_path, controllers=frozenset(), version=1)
    with (
        new_group((hierarchy,), memory=1, processes=1) as first,
        new_group((hierarchy,), memory=1, processes=1) as second,
    ):
        names = {group.folders[0][1].name for group in (first, second)}
        for group in (first, second):
            (group.folders[0][1] / "cgroup.procs").write_text("")
    assert len(names) == 2
    assert min(map(len, names)) >= 16


MAKE_AND_WAIT = """
import sys
from pathlib import Path
from dscoder.sandbox.cgroup import Hierarchy, open_folders
open_folders((Hierarchy(root=Path(sys.argv[1]), controllers=frozenset({"memory"}), version=1),))
print("made", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("is_killed", [True, False])
def test_a_folder_goes_with_its_launcher_and_never_before(tmp_path: Path, is_killed: bool) -> None:
    hierarchy = Hierarchy(root=tmp_path, controllers=frozenset({"memory"}), version=1)
    command = [sys.executable, "-c", MAKE_AND_WAIT, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as launcher:
        assert launcher.stdout is not None
        assert launcher.stdout.readline() == b"made\n"
        (folder,) = tmp_path.iterdir()
        sweep((hierarchy,))
        assert folder.exists()
        if is_killed:
            launcher.kill()
        launcher.communicate()
    assert folder.exists() == is_killed
    sweep((hierarchy,))
    assert not folder.exists()


def test_a_process_forked_from_a_launcher_leaves_its_folder_alone(tmp_path: Path) -> None:
    hierarchy = Hierarchy(root=tmp_path, controllers=frozenset({"memory"}), version=1)
    (mine,) = open_folders((hierarchy,))
    cgroup._remove(mine.root, os.getpid() + 1)
    assert mine.root.exists()
    cgroup._remove(mine.root, os.getpid())
    assert not mine.root.exists()


WITHOUT_STREAMS = """
import os, sys
from pathlib import Path
from dscoder.sandbox.cgroup import Group, Hierarchy, open_folders
os.closerange(0, 3)
(mine,) = open_folders((Hierarchy(root=Path(sys.argv[1]), controllers=frozenset({"memory"}), version=1),))
(mine.root / "tasks").touch()
with Group(folders=((mine, mine.root),)).open_doors() as doors:
    opened = {int(name) for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")}
    os._exit(0 if len(doors) == 1 and not opened & {0, 1, 2} else 1)
"""


def test_a_launcher_without_streams_takes_no_group_for_one(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", WITHOUT_STREAMS, str(tmp_path)], check=True)
