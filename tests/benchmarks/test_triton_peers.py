"""The Triton peers without a GPU: right under the interpreter, and compiled for Hopper."""

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLOAT, HALF, INT = "*fp32", "*bf16", "*i32"
SIZES = {
    "num_tokens": "i32",
    "width": "i32",
    "num_rows": "i32",
    "num_columns": "i32",
    "depth": "i32",
    "scale": "fp32",
    "num_choices": "i32",
    "num_chunks": "i32",
    "longest": "i32",
}
# Module, kernel, pointers (several where the kernel takes a tuple of them), constants; V2's sizes.
KERNELS: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    (
        "attention",
        "attention_kernel",
        {"tensors": (HALF, HALF, HALF, INT, INT, HALF, FLOAT)},
        {"SHAPE": (128, 128, 192, 128, 128), "CAUSAL": True, "ROWS": 64, "KEYS": 64},
    ),
    (
        "gemm",
        "product_kernel",
        {"tensors": (HALF, HALF, HALF, INT)},
        {"SHAPE": (64, 64), "ROWS": 64, "COLUMNS": 128, "DEPTH": 64},
    ),
    ("gate", "forward_kernel", {"tensors": (FLOAT, INT, FLOAT)}, {"SHAPE": (160, 8, 3, 6), "BLOCK": 4}),
    ("gate", "backward_kernel", {"tensors": (FLOAT, INT, FLOAT, FLOAT)}, {"SHAPE": (160, 6), "BLOCK": 4}),
    ("maps", "count_kernel", {"idx": INT, "counts": INT}, {"EXPERTS": 160, "CHUNK": 128}),
    ("maps", "sum_kernel", {"counts": INT, "totals": INT}, {"BLOCKS": 6, "BLOCK": 1024}),
    ("maps", "place_kernel", {"tensors": (INT, INT, INT, INT, INT)}, {"EXPERTS": 160, "CHUNK": 128}),
    ("permute", "spread_kernel", {"x": HALF, "row": INT, "out": HALF}, {"K": 6, "BLOCK": 1024}),
    (
        "permute",
        "collect_kernel",
        {"y": HALF, "weight": FLOAT, "row": INT, "out": HALF},
        {"K": 6, "BLOCK": 1024},
    ),
    (
        "permute",
        "collect_backward_kernel",
        {"tensors": (HALF, HALF, FLOAT, INT, HALF, FLOAT)},
        {"K": 6, "PADDED": 8192},
    ),
]

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton, which a CPU build of torch lacks"
)


@needs_triton
@pytest.mark.slow
def test_the_triton_peers_match_our_ops_under_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    script = ROOT / "tests" / "benchmarks" / "triton_interpreted.py"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", str(script)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@needs_triton
@pytest.mark.parametrize(
    ("module", "name", "pointers", "constants"), KERNELS, ids=[row[1] for row in KERNELS]
)
def test_a_kernel_compiles_for_hopper(
    module: str, name: str, pointers: dict[str, Any], constants: dict[str, Any]
) -> None:
    triton = importlib.import_module("triton")
    compiler = importlib.import_module("triton.compiler")
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)
    kernel = getattr(importlib.import_module(f"benchmarks.peers.triton_{module}"), name)
    if not isinstance(kernel, triton.JITFunction):
        kernel = kernel.fn  # the tuner's
    arguments = kernel.arg_names
    signature = {name: pointers.get(name) or SIZES.get(name, "constexpr") for name in arguments}
    # As the launcher finds it at run time: pointers and the width are multiples of 16.
    aligned: list[tuple[int, ...]] = []
    for i, name in enumerate(arguments):
        if isinstance(pointers.get(name), tuple):
            aligned += [(i, j) for j in range(len(pointers[name]))]
        elif name in pointers or name in ("width", "depth", "num_columns"):
            aligned.append((i,))
    attributes = {place: [["tt.divisibility", 16]] for place in aligned}
    source = compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    ptx = compiler.compile(source, target=target, options={"num_warps": 4}).asm["ptx"]
    assert ".target sm_90a" in ptx
    assert ".local" not in ptx, "spills"
    if module == "permute":
        for move in ("ld", "st"):
            assert re.search(rf"\b{move}\.global[.:\w]*\.v4\.b32", ptx), "rows do not move 16 bytes at a time"
