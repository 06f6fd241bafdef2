"""The Triton peers against our ops, under Triton's interpreter; test_triton_peers.py starts it.

A file of its own in a process of its own: whether Triton interprets is settled when it is first imported.
"""

import pytest
import torch

from benchmarks.peers import peers
from dscoder import ops
from dscoder.testing import cases
from dscoder.testing.compare import assert_close, assert_same

GATES = {  # T, E, options
    "v2": (37, 160, {"num_topk": 6, "num_groups": 8, "num_groups_kept": 3, "scale": 16.0}),
    "v2_lite": (65, 64, {"num_topk": 6}),
    "few": (1, 20, {"num_topk": 3, "num_groups": 4, "num_groups_kept": 2, "scale": 0.5}),
    "all_groups_kept": (3, 12, {"num_topk": 12, "num_groups": 3, "num_groups_kept": 3}),
}


@pytest.mark.parametrize("name", GATES)
def test_gate(name: str) -> None:
    num_tokens, num_experts, options = GATES[name]
    rng = cases.generator(name)
    logits = cases.randn(rng, num_tokens, num_experts).requires_grad_()
    peer = peers("moe_gate", "backward", "cuda")["triton"]
    (idx, weight), (wanted_idx, wanted) = peer(logits, **options), ops.moe_gate(logits, **options)
    assert_same(idx, wanted_idx)
    assert_close(weight, wanted)
    grad = cases.randn(rng, *weight.shape)
    (actual,), (expected,) = (torch.autograd.grad(y, logits, grad) for y in (weight, wanted))
    assert_close(actual, expected)


def test_ties_of_the_gate_go_to_the_smaller_expert() -> None:
    options = {"num_topk": 3, "num_groups": 4, "num_groups_kept": 2}
    idx, _ = peers("moe_gate", "forward", "cuda")["triton"](torch.zeros(2, 12), **options)
    assert idx.tolist() == [[0, 1, 2], [0, 1, 2]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("num_tokens", "num_experts"), [(1, 64), (211, 20)]
)  # more than one chunk of choices
def test_rows_there_and_back(num_tokens: int, num_experts: int, dtype: torch.dtype) -> None:
    rng = cases.generator(f"{num_tokens} {dtype}")
    idx = cases.randn(rng, num_tokens, num_experts).topk(6).indices.to(torch.int32)
    x = cases.randn(rng, num_tokens, 40, dtype=dtype).requires_grad_()
    rows, handle = ops.moe_permute(x, idx, num_experts=num_experts)
    offsets, row = peers("moe_permute", "maps", "cuda")["triton"](idx, num_experts=num_experts)
    assert_same(offsets, handle.offsets_E)
    assert_same(row, handle.row_TK)
    permuted = peers("moe_permute", "backward", "cuda")["triton"](x, idx, num_experts=num_experts)
    assert_same(permuted, rows)
    grad = cases.randn(rng, *rows.shape, dtype=dtype)
    (actual,), (expected,) = (torch.autograd.grad(y, x, grad) for y in (permuted, rows))
    assert_close(actual, expected)

    weight = torch.rand(num_tokens, 6, generator=rng).requires_grad_()
    leaves = (rows.detach().requires_grad_(), weight)
    out = peers("moe_unpermute", "backward", "cuda")["triton"](*leaves, handle)
    wanted = ops.moe_unpermute(*leaves, handle)
    assert_close(out, wanted)
    grads = [torch.autograd.grad(y, leaves, torch.ones_like(y)) for y in (out, wanted)]
    for got, want in zip(*grads, strict=True):
        assert_close(got, want, dtype=dtype)


@pytest.mark.parametrize("counts", [[3, 0, 17, 1, 0], [0, 0, 130, 0, 0], [1, 1, 1, 1, 1]])
def test_the_grouped_product(counts: list[int]) -> None:
    rng = cases.generator(str(counts))
    x, w = cases.randn(rng, sum(counts), 72), cases.randn(rng, 5, 136, 72)
    offsets = torch.tensor(counts).cumsum(0).to(torch.int32)
    got = peers("grouped_gemm", "forward", "cuda")["triton"](x, w, offsets)
    assert_close(got, ops.grouped_gemm(x, w, offsets))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("width", "value_width"), [(48, 32), (32, 32)])
@pytest.mark.parametrize(
    ("lengths_q", "lengths_k"), [([5, 150, 0, 1], [5, 150, 3, 1]), ([3, 4], [140, 2])], ids=["own", "behind"]
)
def test_attention(
    lengths_q: list[int], lengths_k: list[int], width: int, value_width: int, causal: bool
) -> None:
    """Keys ahead of the queries too, and queries that see none."""
    rng = cases.generator(f"{lengths_q} {width} {causal}")
    num_q, num_k = sum(lengths_q), sum(lengths_k)
    q = cases.randn(rng, num_q, 4, width)
    k, v = cases.randn(rng, num_k, 2, width), cases.randn(rng, num_k, 2, value_width)
    args = (q, k, v, cases.cu_seqlens(lengths_q), cases.cu_seqlens(lengths_k))
    got = peers("mla_prefill", "forward", "cuda")["triton"](*args, scale=0.2, causal=causal)
    assert_close(got, ops.mla_prefill(*args, scale=0.2, causal=causal)[0])
