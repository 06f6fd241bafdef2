"""What the sandbox's tests share: whether this machine can isolate, and a look at what is left behind."""

import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dscoder.sandbox import run as run_module
from dscoder.sandbox.run import run
from dscoder.sandbox.verdict import MIB, Limits, Program, Verdict

# Small, so that a sandbox that does not hold cannot hurt the machine that tests it.
SMALL = Limits(time=5.0, memory=128 * MIB, output=64 * 1024, processes=24, disk=8 * MIB)


@pytest.fixture(scope="session")
def full_isolation() -> None:
    """Skips where bubblewrap is not installed; fails where it is and cannot make namespaces."""
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed")
    probe = ["bwrap", "--unshare-all", "--ro-bind", "/", "/", "--proc", "/proc", "true"]
    answer = subprocess.run(probe, capture_output=True, text=True, check=False)
    if answer.returncode:
        pytest.fail(f"bubblewrap is installed and does not work: {answer.stderr.strip()}")


@pytest.fixture
def without_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where no control group can be made, on a machine that kills nobody for want of memory.

    Its real count holds the kills in everybody's control groups, those of tests that run beside this one too.
    """
    monkeypatch.setattr(run_module, "_hierarchies", lambda _: ())
    monkeypatch.setattr(run_module, "num_killed_for_memory", lambda: 0)


def living(marker: str) -> list[int]:
    """Processes of the whole machine with `marker` on their command line."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if marker.encode() in file.read_bytes():
                found.append(int(file.parent.name))
        except OSError:
            continue
    return found


@pytest.fixture
def attack(full_isolation: None, tmp_path: Path) -> Iterator[Callable[..., Verdict]]:
    """`attack(source, *args)`: the verdict of a hostile Python program.

    After the test: nothing that it started is alive, the machine still starts processes, and a file outside
    is as it was. The path of that file is sys.argv[1], a word that marks the program's processes sys.argv[2].
    """
    marker = uuid.uuid4().hex
    outside = tmp_path / "outside.txt"
    outside.write_text("untouched")
    tmp_path.chmod(0o777)
    outside.chmod(0o666)

    def start(source: str, *args: str, limits: Limits = SMALL) -> Verdict:
        return run(Program(source=source, args=(str(outside), marker, *args)), limits)

    yield start
    assert living(marker) == []
    assert outside.read_text() == "untouched"
    assert list(tmp_path.iterdir()) == [outside]
    begin = time.monotonic()
    subprocess.run(["true"], check=True)
    assert time.monotonic() - begin < 5.0
