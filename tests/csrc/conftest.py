"""Builds the kernels for the CPU (csrc/host/host.cmake) once a session, and loads them.

`DSCODER_HOST_BUILD=sanitized` makes every test here use the sanitized build, in a process that has its
runtime libraries loaded: see test_sanitized.py.
"""

import fcntl
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pybind11
import pytest
import torch

from dscoder.runtime import native

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "host"
VARIANT = os.environ.get("DSCODER_HOST_BUILD", "plain")


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.fail(f"{' '.join(command)}\n{done.stdout}{done.stderr}", pytrace=False)


def build(variant: str) -> Path:
    """Build one variant, quickly when nothing changed, and return its folder."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        pytest.skip("no C++ compiler: the host executor is not built")
    tools = Path(sysconfig.get_path("scripts"))
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    cmake, ninja = shutil.which("cmake", path=path), shutil.which("ninja", path=path)
    assert cmake is not None, "cmake is missing: install the dev tools of pyproject.toml"
    assert ninja is not None, "ninja is missing: install the dev tools of pyproject.toml"
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / ".lock", "w") as lock:  # test processes run side by side
        fcntl.flock(lock, fcntl.LOCK_EX)
        configure = [
            *(cmake, "--fresh", "-G", "Ninja", "-S", str(ROOT), "-B", str(BUILD)),
            *(f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DPython_EXECUTABLE={sys.executable}"),
            *(
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                "-DDSCODER_CUDA=off",
                "-DDSCODER_HOST_EXECUTOR=ON",
            ),
        ]
        stamp = BUILD / ".configured"
        if not stamp.exists() or stamp.read_text(encoding="utf-8") != repr(configure):
            run(*configure)
            stamp.write_text(repr(configure), encoding="utf-8")
        run(ninja, "-C", str(BUILD), f"host_{variant}")
    return BUILD / variant


def load(folder: Path, name: str) -> ModuleType:
    path = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def build_host() -> Callable[[str], Path]:
    return build


@pytest.fixture(scope="session")
def host_folder() -> Path:
    """The build that this session tests."""
    return build(VARIANT)


@pytest.fixture(scope="session")
def host_kernels(host_folder: Path) -> ModuleType:
    """The executor's own test kernels, and its seed."""
    return load(host_folder, "_host_kernels")


@pytest.fixture(scope="session")
def host_ops(host_folder: Path) -> ModuleType:
    """The extension with every kernel on the host executor: it takes CPU tensors."""
    return load(host_folder, "_C_host")


@pytest.fixture
def use_kernels(host_ops: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """`use_kernels("moe_gate", ...)`: from here on these ops run their CUDA side on CPU tensors, on the host
    executor, gradients included."""
    monkeypatch.setattr(native, "_C", host_ops)
    monkeypatch.setattr(host_ops, "has_cuda", True)
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with torch.library._scoped_library("dscoder", "IMPL") as library:

        def use(*names: str) -> None:
            for name in names:
                op = getattr(torch.ops.dscoder, name).default

                def on_cuda(*args: Any, op: Any = op) -> Any:
                    return op.redispatch(key, *args)

                with warnings.catch_warnings(action="ignore", category=UserWarning):  # that it overrides
                    library.impl(name, on_cuda, "CPU", allow_override=True)

        yield use
