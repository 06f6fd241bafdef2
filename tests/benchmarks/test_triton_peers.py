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
SIZES = {"num_tokens": "i32", "width": "i32", "scale": "fp32", "num_choices": "i32", "num_chunks": "i32"}
EXPERTS = {"EXPERTS": 160, "PADDED": 256, "CHUNK": 128}
V2 = {"EXPERTS": 160, "GROUPS": 8, "KEPT": 3, "K": 6, "PADDED_GROUPS": 8, "PADDED_WIDTH": 32, "BLOCK": 4}
# Module, kernel, pointers, constants; V2's sizes.
KERNELS = [
    ("gate", "forward_kernel", {"logits": FLOAT, "idx": INT, "weight": FLOAT}, V2),
    (
        "gate",
        "backward_kernel",
        {"logits": FLOAT, "idx": INT, "grad_weight": FLOAT, "grad_logits": FLOAT},
        {"EXPERTS": 160, "K": 6, "PADDED": 256, "BLOCK": 4},
    ),
    ("maps", "count_kernel", {"idx": INT, "counts": INT}, EXPERTS),
    ("maps", "sum_kernel", {"counts": INT, "totals": INT}, {"BLOCKS": 6, "BLOCK": 1024}),
    (
        "maps",
        "place_kernel",
        {"idx": INT, "counts": INT, "totals": INT, "offsets": INT, "row": INT},
        EXPERTS,
    ),
    ("permute", "spread_kernel", {"x": HALF, "row": INT, "out": HALF}, {"K": 6, "BLOCK": 1024}),
    (
        "permute",
        "collect_kernel",
        {"y": HALF, "weight": FLOAT, "row": INT, "out": HALF},
        {"K": 6, "BLOCK": 1024, "IS_WEIGHTED": True},
    ),
    (
        "permute",
        "collect_backward_kernel",
        {"grad": HALF, "y": HALF, "weight": FLOAT, "row": INT, "grad_y": HALF, "grad_weight": FLOAT},
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
    module: str, name: str, pointers: dict[str, str], constants: dict[str, Any]
) -> None:
    triton = importlib.import_module("triton")
    compiler = importlib.import_module("triton.compiler")
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)
    kernel = getattr(importlib.import_module(f"benchmarks.peers.triton_{module}"), name)
    if not isinstance(kernel, triton.JITFunction):
        kernel = kernel.fn  # the tuner's
    arguments = kernel.arg_names
    signature = {name: pointers.get(name) or SIZES.get(name, "constexpr") for name in arguments}
    aligned = [i for i, name in enumerate(arguments) if name in pointers or name == "width"]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    ptx = compiler.compile(source, target=target, options={"num_warps": 4}).asm["ptx"]
    assert ".target sm_90a" in ptx
    assert ".local" not in ptx, "spills"
    if HALF in pointers.values():
        for move in ("ld", "st"):
            assert re.search(rf"\b{move}\.global[.:\w]*\.v4\.b32", ptx), "rows do not move 16 bytes at a time"
