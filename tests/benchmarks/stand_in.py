"""A stand-in for a machine with a GPU, for benchmarks.gpu_check to run on from end to end.

A module named torch that reports one, small tests and benchmarks, and a program named compute-sanitizer that
runs what it is given; dscoder counts as installed. What is real is everything the check itself does.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TORCH = """
__version__ = "2.11.0+cu130"
class version:
    cuda = "13.0"
class cuda:
    is_available = staticmethod(lambda: {has_gpu})
    get_device_name = staticmethod(lambda: "NVIDIA H200")
    get_device_capability = staticmethod(lambda: (9, 0))
"""
# An editable install of dscoder would come before any stand-in.
NO_EDITABLE = """
import sys
sys.meta_path[:] = [one for one in sys.meta_path if not type(one).__name__.startswith("ScikitBuild")]
"""
# The parts of dscoder that the check asks for: an import with kernels for this GPU.
NATIVE = """
from types import SimpleNamespace
_C = SimpleNamespace(__file__=__file__)
require_kernels = lambda op: None
arch_for = lambda capability: {arch!r}
cuda_archs = lambda: ("90a",)
build_tools = lambda: {{"nvcc": "13.0.88"}}
"""
SANITIZER = """#!/bin/sh
while [ "${{1#--}}" != "$1" ]; do case "$1" in
    --tool=*) tool="${{1#--tool=}}";;
    --kernel-name) shift;;
esac; shift; done
"$@"; code=$?
{says}
exit $code
"""
CLEAN = """if [ "$tool" = racecheck ]; then
echo "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
else echo "========= ERROR SUMMARY: 0 errors"; fi"""
GOOD_TEST = """
import pytest
pytestmark = pytest.mark.gpu
@pytest.mark.sanitize
def test_small(): pass
@pytest.mark.sanitize("memcheck", "synccheck")
def test_wgmma(): pass
def test_large(): pass
def test_two_gpus(): pytest.skip("needs two GPUs")
"""
BENCH = """
def test_forward(benchmark):
    benchmark.pedantic(lambda: None)
    benchmark.extra_info.update(
        op="alpha", step="forward", model="v2", routing="uniform", shape="T=8192 E=160", dtype="float32",
        device="NVIDIA H200", method="graph", us=7.0, share=40.0, has_kernel=True,
        peers={"torch": {"us": 70.0, "ratio": 10.0}},
    )
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """The stand-in: where the check runs, and what it finds."""

    root: Path
    environment: Mapping[str, str]

    def write(self, name: str, text: str) -> None:
        """A file below the root."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def command(self, *arguments: str) -> list[str]:
        """What runs the check there."""
        program = (
            "import sys; from pathlib import Path; from benchmarks.gpu_check import main; "
            "raise SystemExit(main(sys.argv[2:], root=Path(sys.argv[1])))"
        )
        return [sys.executable, "-c", program, str(self.root), "--installed", *arguments]

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run it to its end."""
        return subprocess.run(
            self.command(*arguments),
            env=dict(self.environment),
            cwd=self.root,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def record(self) -> dict[str, Any]:
        """The one record there is."""
        (path,) = self.root.glob("benchmarks/results/nvidia_h200/*.json")
        stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return stored


def make_stand_in(
    tmp_path: Path, *, has_gpu: bool = True, arch: str | None = "90a", says: str | None = CLEAN
) -> Machine:
    """A machine below `tmp_path`; its compute-sanitizer runs what it is given and `says` its summary."""
    root, fakes, programs = tmp_path / "tree", tmp_path / "fakes", tmp_path / "programs"
    programs.mkdir()
    if says is not None:
        sanitizer = programs / "compute-sanitizer"
        sanitizer.write_text(SANITIZER.format(says=says), encoding="utf-8")
        sanitizer.chmod(0o755)
    kept = ("HOME", "LANG", "TMPDIR")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    environment |= {
        "PATH": os.pathsep.join((str(programs), "/usr/bin", "/bin")),
        "PYTHONPATH": os.pathsep.join((str(fakes), str(ROOT))),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # the others take a second to import
        "PYTEST_PLUGINS": "pytest_benchmark.plugin",
    }
    machine = Machine(root=root, environment=environment)
    machine.write("../fakes/torch.py", TORCH.format(has_gpu=has_gpu))
    machine.write("../fakes/sitecustomize.py", NO_EDITABLE)
    machine.write("../fakes/dscoder/__init__.py", "")
    machine.write("../fakes/dscoder/runtime/__init__.py", "")
    machine.write("../fakes/dscoder/runtime/native.py", NATIVE.format(arch=arch))
    machine.write("pytest.ini", "[pytest]\npython_files = test_*.py bench_*.py\nmarkers =\n gpu\n sanitize\n")
    machine.write("tests/gpu/test_alpha.py", GOOD_TEST)
    machine.write("benchmarks/bench_alpha.py", BENCH)
    return machine


def outcomes(record: Mapping[str, Any]) -> dict[str, str]:
    """The outcome of each step."""
    return {step["name"]: step["outcome"] for step in record["steps"]}
