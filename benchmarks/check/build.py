"""dscoder built for this machine below build/gpu-check: no network, no pip, nothing installed.

CMake is called as it is, so that any machine with a C++ compiler, CMake, ninja, pybind11 and torch will do,
whatever its pip is; the package's Python files are copied beside the extension. The next build of the same
sources takes seconds.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.check.process import Ended, Runner

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path("build/gpu-check")
OBJECTS = Path("build/kernel-objects")  # where `make kernel-objects` leaves them
TAG = f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
SITE = ROOT / FOLDER / TAG / "site"  # what goes into PYTHONPATH: dscoder and its metadata
POINTERS = {"CUDACXX", "CUDA_HOME", "CUDA_PATH"}  # what names a toolkit
STAMP, LIBRARY = "kernel-objects.json", "libdscoder_kernels.a"

# What is imported as dscoder, and whether it has kernels for compute capability argv[1].argv[2].
IMPORT = """
import sys
from pathlib import Path
from dscoder.runtime import native
file, site = Path(native._C.__file__).resolve(), sys.argv[3]
if site and not file.is_relative_to(Path(site).resolve()):
    raise SystemExit(f"dscoder is imported from {file.parent}, which an editable install puts before {site}: "
                     "use that one (--installed), or another Python")
native.require_kernels("gpu-check")
if native.arch_for((int(sys.argv[1]), int(sys.argv[2]))) is None:
    raise SystemExit(f"{file} has kernels for {native.cuda_archs()}, the GPU is of compute capability "
                     + ".".join(sys.argv[1:3]))
print(f"kernels for {' '.join(native.cuda_archs())}, nvcc {native.build_tools()['nvcc']}, in {file}")
"""


def tool(name: str, environment: Mapping[str, str]) -> str:
    """A program of this Python's environment, else of PATH."""
    folders = (sysconfig.get_path("scripts"), os.path.dirname(sys.executable), environment.get("PATH", ""))
    search = os.pathsep.join(folders)
    found = shutil.which(name, path=search)
    if found is None:
        raise ValueError(
            f"{name} is missing: install the build group of pyproject.toml, or carry its wheel (--wheels)"
        )
    return found


def package_version() -> str:
    """As pyproject.toml has it."""
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"])


def configure_command(folder: Path, options: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """CMake's configure step for this Python; `options` are -D's without the -D."""
    done = subprocess.run(
        [sys.executable, "-m", "pybind11", "--cmakedir"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=dict(environment),
    )
    if done.returncode:
        raise ValueError(f"pybind11 is missing for {sys.executable}: {done.stderr.strip()}")
    settings = [
        f"CMAKE_MAKE_PROGRAM={tool('ninja', environment)}",
        f"Python_EXECUTABLE={sys.executable}",
        f"pybind11_DIR={done.stdout.strip()}",
        f"SKBUILD_PROJECT_VERSION={package_version()}",
        "DSCODER_CUDA=on",
        *options,
    ]
    return [
        tool("cmake", environment),
        "-G",
        "Ninja",
        "-S",
        str(ROOT),
        "-B",
        str(folder),
        *(f"-D{one}" for one in settings),
    ]


def archs_for(capability: tuple[int, int]) -> str:
    """What the kernels are compiled for where they run on one GPU alone."""
    major, minor = capability
    return "90a" if (major, minor) == (9, 0) else f"{major}{minor}"


def find_objects(runner: Runner, limit: float) -> Path | None:
    """The objects that lie in OBJECTS, if CMake finds that they fit these sources and this machine."""
    objects = ROOT / OBJECTS
    if not (objects / STAMP).exists():
        return None
    folder = ROOT / FOLDER / TAG / "linked"
    command = configure_command(folder, [f"DSCODER_KERNEL_OBJECTS={objects}"], runner.environment)
    ended = runner.run(command, name="build-objects", limit=limit)
    return objects if ended.code == 0 else None


def build(runner: Runner, *, capability: tuple[int, int], objects: Path | None, limit: float) -> Ended:
    """Build into SITE, from `objects` if given, else with nvcc for this GPU alone, until something fails."""
    environment = runner.environment
    folder = ROOT / FOLDER / TAG / ("linked" if objects else "compiled")
    source = f"DSCODER_KERNEL_OBJECTS={objects or ''}"
    archs = [] if objects else [f"DSCODER_CUDA_ARCHS={archs_for(capability)}"]
    has_nvcc = shutil.which("nvcc", path=environment.get("PATH")) or POINTERS & set(environment)
    if not objects and not has_nvcc:
        raise ValueError(
            "there is no nvcc (PATH, CUDACXX, CUDA_HOME) and no --objects: run `make kernel-objects` where "
            "nvcc is, carry build/kernel-objects here, and set CUDA_HOME to a toolkit with libcudart_static.a"
        )
    cmake = tool("cmake", environment)
    steps = [
        ("configure", configure_command(folder, [source, *archs], environment)),
        ("compile", [cmake, "--build", str(folder), "--target", "_C"]),
        ("install", [cmake, "--install", str(folder), "--prefix", str(SITE)]),
    ]
    shutil.rmtree(SITE, ignore_errors=True)
    seconds, output = 0.0, ""
    for name, command in steps:
        ended = runner.run(command, name=f"build-{name}", limit=max(1.0, limit - seconds))
        seconds, output = seconds + ended.seconds, ended.output
        if ended.code != 0:
            return Ended(code=ended.code, seconds=seconds, output=output)
    copy_package()
    return Ended(code=0, seconds=seconds, output=output)


def try_import(runner: Runner, *, capability: tuple[int, int], site: Path | None, limit: float) -> Ended:
    """Import dscoder and look for kernels for this GPU; it must come from `site` if that is given."""
    numbers = [str(number) for number in capability]
    return runner.run(
        [sys.executable, "-c", IMPORT, *numbers, str(site or "")], name="build-import", limit=limit
    )


def copy_package() -> None:
    """The Python files of dscoder and the metadata that names its version, into SITE."""
    shutil.copytree(
        ROOT / "python" / "dscoder",
        SITE / "dscoder",
        dirs_exist_ok=True,
        ignore=shutil.ignore_patterns("__pycache__", "*.so"),
    )
    metadata = SITE / f"dscoder-{package_version()}.dist-info"
    metadata.mkdir(exist_ok=True)
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: dscoder\nVersion: {package_version()}\n", encoding="utf-8"
    )


def unpack_wheels(runner: Runner, wheels: Path, limit: float) -> Path:
    """Install the wheels of a folder beside the build, for PYTHONPATH; nothing else is touched."""
    target = ROOT / FOLDER / TAG / "wheels"
    shutil.rmtree(target, ignore_errors=True)
    found = sorted(wheels.glob("*.whl"))
    if not found:
        raise ValueError(f"--wheels: {wheels} holds no .whl file")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    ended = runner.run([*pip, "--target", target, *found], name="wheels", limit=limit)
    if ended.code != 0:
        raise ValueError(f"--wheels: pip could not unpack {wheels}: {ended.output.strip().splitlines()[-1:]}")
    return target
