"""The extension: what it says about its build, how it reads tensors, and `dscoder info`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.reporting.readme import op_files
from dscoder.cli import info
from dscoder.cli.main import main
from dscoder.runtime import native

_C = native._C

with_kernels = pytest.mark.skipif(not native.has_kernels(), reason="this build has no kernels")


def gate_arguments(**changed: object) -> dict[str, object]:
    arguments: dict[str, object] = {
        "logits": torch.zeros(3, 4),
        "idx": torch.zeros(3, 2, dtype=torch.int32),
        "weight": torch.zeros(3, 2),
        **{"num_groups": 1, "num_groups_kept": 1, "scale": 1.0, "renormalize": False},
    }
    return arguments | changed


# ---- the build ----


def test_kernels_and_architectures_go_together() -> None:
    assert native.has_kernels() == bool(native.cuda_archs()) == ("nvcc" in native.build_tools())


def test_the_compiler_is_named_with_its_version() -> None:
    name, version = native.build_tools()["compiler"].split()
    assert name.isidentifier()
    assert version[0].isdigit()


def test_importing_needs_no_cuda_library() -> None:
    """The extension must import where there is no driver: nothing of CUDA may be among its libraries."""
    assert _C.__file__ is not None
    needed = subprocess.run(["ldd", _C.__file__], capture_output=True, text=True, check=True).stdout
    assert "libc.so" in needed
    for library in ("cuda", "torch", "c10"):
        assert library not in needed


def test_ops_with_kernels_are_known_by_their_own_names() -> None:
    assert {"moe_gate", "grouped_gemm", "moe_experts", "expert_parallel"} <= native.kernel_ops()
    assert "grouped_swiglu" not in native.kernel_ops()


def build_of(monkeypatch: pytest.MonkeyPatch, archs: tuple[str, ...]) -> None:
    monkeypatch.setattr(_C, "cuda_archs", archs)
    monkeypatch.setattr(_C, "has_cuda", bool(archs))


@pytest.mark.parametrize(
    ("capability", "arch"),
    [((8, 0), "80"), ((8, 6), "80"), ((8, 9), "89"), ((9, 0), "90a"), ((7, 5), None), ((10, 0), None)],
)
def test_a_gpu_runs_the_nearest_architecture_of_its_generation(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], arch: str | None
) -> None:
    build_of(monkeypatch, ("80", "89", "90a"))
    assert native.arch_for(capability) == arch


def test_a_build_without_kernels_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    build_of(monkeypatch, ())
    with pytest.raises(
        RuntimeError, match=r"^grouped_gemm: .*without CUDA kernels.*DSCODER_CUDA=on pip install"
    ):
        native.require_kernels("grouped_gemm")


@with_kernels
def test_a_build_with_kernels_lets_them_be_required() -> None:
    native.require_kernels("moe_gate")


@pytest.mark.skipif(native.has_kernels(), reason="this build has kernels")
def test_every_entry_point_without_kernels_says_so() -> None:
    for name in ("moe_gate_forward", "moe_gate_backward"):
        with pytest.raises(RuntimeError, match=r"^moe_gate: this dscoder was built without CUDA kernels"):
            vars(_C)[name](**gate_arguments())


@with_kernels
def test_a_tensor_on_the_cpu_is_refused_before_the_driver_is_asked() -> None:
    with pytest.raises(ValueError, match=r"^moe_gate: logits must be on a CUDA device, got cpu$"):
        _C.moe_gate_forward(**gate_arguments())


@with_kernels
@pytest.mark.parametrize("wrong", [3, None, [1.0]])
def test_something_else_than_a_tensor_is_refused(wrong: object) -> None:
    with pytest.raises(
        TypeError, match=rf"^moe_gate: logits must be a torch tensor .*, got {type(wrong).__name__}$"
    ):
        _C.moe_gate_forward(**gate_arguments(logits=wrong))


# ---- dscoder info ----


def test_info_names_every_op_and_what_runs_it() -> None:
    found = info.describe()
    assert found["ops"].keys() == {file.stem for file in op_files(Path(__file__).parents[1])}
    assert all(found["ops"].values())


def test_info_as_json_is_the_same_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == info.describe()


def test_info_as_a_table_shows_version_ops_and_parts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    for word in (_C.version, "moe_gate", "tensorboard", "nvcc", torch.__version__):
        assert word in shown


@pytest.mark.parametrize(
    ("built", "gpu", "op", "wanted"),
    [
        (("80", "90a"), [], "moe_gate", "torch reference on cpu (no GPU found)"),
        (("80", "90a"), ["90a"], "moe_gate", "kernel sm_90a"),
        (("80", "90a"), ["90a", "80"], "moe_gate", "kernel sm_80, kernel sm_90a"),
        (("80", "90a"), [None], "moe_gate", "an error (no kernel for this GPU)"),
        ((), [None], "moe_gate", "torch reference on cpu; an error on cuda (built without kernels)"),
        (("90a",), [], "expert_parallel", "torch.distributed collectives on cpu (no GPU found)"),
        (
            ("90a",),
            ["90a"],
            "expert_parallel",
            "kernel sm_90a between peers, else torch.distributed collectives",
        ),
    ],
)
def test_info_says_what_an_op_runs_on(
    monkeypatch: pytest.MonkeyPatch, built: tuple[str, ...], gpu: list[str | None], op: str, wanted: str
) -> None:
    build_of(monkeypatch, built)
    assert info._op_runs_on(op, gpu) == wanted


def test_python_m_dscoder_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dscoder", "info", "--json"], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["build"]["dscoder"] == _C.version
