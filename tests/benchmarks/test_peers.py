"""benchmarks.peers: every adapter, on a stand-in for its library, gives what our op gives."""

import importlib.machinery
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.peers import TABLE, Row, _is_installed, eager, peers
from dscoder import ops
from dscoder.testing import cases
from dscoder.testing.compare import assert_close
from dscoder.testing.peer import UnsupportedError
from tests.benchmarks.fake_libraries import MODULES

OWN = ("torch", "torch.compile", "triton")
GPU_ALONE = ("torch cudnn", "torch flash", "torch efficient")  # kernels that torch has for GPUs


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """Arguments on which all libraries agree to work, the first `num_leaves` with gradients."""

    ours: Callable[..., Any]
    args: tuple[Any, ...]
    options: dict[str, Any]
    num_leaves: int = 1


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """All libraries, as stand-ins."""
    for name, functions in MODULES.items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            parent = ".".join(parts[:end])
            if parent not in sys.modules:
                module = ModuleType(parent)
                module.__spec__ = importlib.machinery.ModuleSpec(parent, None)
                monkeypatch.setitem(sys.modules, parent, module)
        for function, fake in functions.items():
            monkeypatch.setattr(sys.modules[name], function, fake, raising=False)


def sample(op: str, step: str, name: str) -> Sample:
    rng = cases.generator(f"{op} {step}")
    num_tokens, num_experts, num_topk, width = 37, 20, 3, 16
    grouped = {"num_groups": 4, "num_groups_kept": 3, "scale": 2.0}
    options = {"vllm_grouped": grouped, "te": grouped, "vllm": {}, "sgl_kernel": {}}.get(name, grouped)
    logits = cases.randn(rng, num_tokens, num_experts)
    idx, weight = ops.moe_gate(logits, num_topk=num_topk)
    x = cases.randn(rng, num_tokens, width)
    rows, handle = ops.moe_permute(x, idx, num_experts=num_experts)
    experts = {"num_experts": num_experts}
    if op == "moe_gate":
        return Sample(ours=ops.moe_gate, args=(logits,), options={"num_topk": num_topk, **options})
    if step == "maps":
        return Sample(ours=lambda *_, **__: (handle.offsets_E, handle.row_TK), args=(idx,), options=experts)
    if op == "moe_permute":
        return Sample(ours=lambda *a, **k: ops.moe_permute(*a, **k)[0], args=(x, idx), options=experts)
    if op == "moe_unpermute":
        return Sample(ours=ops.moe_unpermute, args=(rows, weight, handle), options={}, num_leaves=2)
    if op == "moe_balance_loss":
        probs, chosen = logits[:36].softmax(dim=-1), idx[:36]
        terms = {"expert": 0.5, **({} if name == "te" else {"device": 0.2, "communication": 0.3})}
        groups = {"num_sequences": 3, "num_groups": 4, "num_groups_kept": 3}
        return Sample(ours=ops.moe_balance_loss, args=(probs, chosen), options={**terms, **groups})
    if op == "grouped_gemm":
        w = cases.randn(rng, num_experts, 24, width, dtype=torch.bfloat16)
        return Sample(
            ours=ops.grouped_gemm, args=(rows.bfloat16(), w, handle.offsets_E), options={}, num_leaves=2
        )
    return attention_sample(op, rng)


def appended(*args: Any, eps: float) -> tuple[Tensor, Tensor]:
    """latent_append to places of its own."""
    *tensors, target = args
    own = replace(target, cache_PLd=target.cache_PLd.clone(), query_out_THd=target.query_out_THd.clone())
    ops.latent_append(*tensors, eps=eps, target=own)
    return own.cache_PLd, own.query_out_THd


def attention_sample(op: str, rng: torch.Generator) -> Sample:
    if op == "mla_decode":
        lengths = (70, 3, 64)
        sequences = [cases.randn(rng, length, 576) for length in lengths]
        cache, table = cases.paged(sequences, page_size=64, num_spare_pages=2, rng=rng)
        args = (cases.randn(rng, 3, 2, 4, 576), cache, table, torch.tensor(lengths, dtype=torch.int32))
        options = {"value_dim": 512, "scale": 0.1}
        return Sample(ours=lambda *a, **k: ops.mla_decode(*a, **k)[0], args=args, options=options)
    if op == "mla_prefill":
        ends = cases.cu_seqlens([5, 9, 1])
        q, k, v = (cases.randn(rng, 15, 2, width) for width in (24, 24, 16))
        return Sample(
            ours=lambda *a, **k: ops.mla_prefill(*a, **k)[0],
            args=(q, k, v, ends, ends),
            options={"scale": 0.2},
            num_leaves=3,
        )
    if op == "latent_rope":
        return Sample(
            ours=ops.latent_rope, args=cases.latent_case(rng, 11), options={"eps": 1e-3}, num_leaves=3
        )
    if op == "latent_append":
        target = ops.AppendTarget(
            slots_T=torch.tensor([7, 0, 4]),
            cache_PLd=torch.zeros(2, 5, 20),
            query_out_THd=torch.zeros(3, 3, 20),
        )
        args = (*cases.latent_case(rng, 3), target)
        return Sample(ours=appended, args=args, options={"eps": 1e-3})
    angle = cases.randn(rng, 11, 4)
    args = (
        cases.randn(rng, 11, 3, 8),
        cases.randn(rng, 11, 1, 8),
        angle.cos(),
        angle.sin(),
        torch.arange(11),
    )
    return Sample(ours=ops.rope, args=args, options={}, num_leaves=2)


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def compared(result: Any, op: str) -> tuple[Tensor, ...]:
    """Of a gate the weights: equal probabilities may be anyone's."""
    return as_tuple(result[1] if op == "moe_gate" and isinstance(result, tuple) else result)


def id_of(row: Row) -> str:
    return f"{row.op}-{row.steps}-{row.name}"


@pytest.mark.parametrize("row", [row for row in TABLE if row.name not in (*OWN[1:], *GPU_ALONE)], ids=id_of)
@pytest.mark.usefixtures("installed")
def test_a_peer_gives_our_result(row: Row) -> None:
    problem = sample(row.op, row.steps, row.name)
    has_backward = row.steps == "backward"
    leaves = [x.detach().clone().requires_grad_(has_backward) for x in problem.args[: problem.num_leaves]]
    args = (*leaves, *problem.args[problem.num_leaves :])
    peer = peers(row.op, row.steps, "cuda")[row.name]
    wanted = compared(problem.ours(*args, **problem.options), row.op)
    actual = compared(peer(*args, **problem.options), row.op)
    assert len(actual) == len(wanted)
    for got, want in zip(actual, wanted, strict=True):
        assert_close(got, want) if want.is_floating_point() else torch.testing.assert_close(got, want)
    if has_backward:
        grads = [torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype) for y in wanted]
        for got, want in zip(
            torch.autograd.grad(actual, leaves, grads),
            torch.autograd.grad(wanted, leaves, grads),
            strict=True,
        ):
            assert_close(got, want)


@pytest.mark.parametrize("formula", [eager.gate, eager.unpermute])
def test_a_compiled_formula_can_be_differentiated_again_and_again(formula: Callable[..., Any]) -> None:
    problem = sample(f"moe_{formula.__name__}", "backward", "torch")
    leaf = problem.args[0].detach().requires_grad_()
    run = eager.compiled(formula)(None, leaf, *problem.args[1:], **problem.options)
    out = compared(run(), f"moe_{formula.__name__}")[0]
    ours = problem.ours(leaf, *problem.args[1:], **problem.options)
    wanted = compared(ours, f"moe_{formula.__name__}")[0]
    assert_close(out, wanted)
    for _ in range(2):
        (grad,) = torch.autograd.grad(out.sum(), leaf, retain_graph=True)
    assert_close(grad, torch.autograd.grad(wanted.sum(), leaf)[0])


def refusal(op: str, step: str, name: str, *args: Any, **options: Any) -> str:
    with pytest.raises(UnsupportedError) as caught:
        peers(op, step, "cuda")[name].prepare(*args, **options)
    return str(caught.value)


@pytest.mark.usefixtures("installed")
def test_a_peer_refuses_what_it_computes_by_another_rule() -> None:
    logits = torch.zeros(2, 160)
    v2 = {"num_topk": 6, "num_groups": 8, "num_groups_kept": 3, "scale": 16.0}
    assert refusal("moe_gate", "backward", "te", logits, **v2) == (
        "a group scores by its 2 best experts here, not by the best"
    )
    assert refusal("moe_gate", "forward", "vllm", logits, **v2) == "topk_softmax has no groups, got 8"
    assert refusal("moe_gate", "forward", "sgl_kernel", logits, **v2) == "topk_softmax has no groups, got 8"
    lite = {"num_topk": 6}
    assert refusal("moe_gate", "forward", "vllm_grouped", logits, **lite) == (
        "grouped_topk is for groups, got 1"
    )
    table, seq_lens = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    narrow = (torch.zeros(1, 1, 2, 96), torch.zeros(1, 64, 96), table, seq_lens)
    assert refusal("mla_decode", "forward", "flash_mla", *narrow, value_dim=64, scale=1.0) == (
        "widths must be 576 and 512, got 96 and 64"
    )
    assert refusal("mla_decode", "forward", "fa3", *narrow, value_dim=64, scale=1.0) == (
        "widths must be (64, 512), got (32, 64)"
    )
    probs, idx = torch.ones(2, 4), torch.zeros(2, 1, dtype=torch.int32)
    assert refusal("moe_balance_loss", "backward", "te", probs, idx, device=0.1) == (
        "fused_moe_aux_loss has the expert-level term alone"
    )


@pytest.mark.parametrize("name", GPU_ALONE)
@pytest.mark.parametrize("lengths", [[5, 9, 1], [5, 5, 5]], ids=["masked", "batch"])
def test_a_kernel_of_torch_takes_the_case_or_says_that_it_does_not(name: str, lengths: list[int]) -> None:
    problem = attention_sample("mla_prefill", cases.generator(name))
    ends = cases.cu_seqlens(lengths)
    args, options = (*problem.args[:3], ends, ends), problem.options
    peer = peers("mla_prefill", "forward", "cuda")[name]
    if name == "torch flash":  # the CPU has one of that name, which takes masks too
        assert_close(peer(*args, **options), problem.ours(*args, **options))
    else:
        with pytest.raises(UnsupportedError, match="ATTENTION does not take the case"):
            peer.prepare(*args, **options)


@pytest.mark.usefixtures("installed")
def test_a_wrong_segment_shows_in_the_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    idx = torch.tensor([[1], [0], [1]], dtype=torch.int32)
    module = sys.modules["vllm.model_executor.layers.fused_moe.moe_align_block_size"]
    for slots in ([0, 1, 2], [0, 2, 1], [1, 0, 0], [1, 2, 0]):
        raw = (torch.tensor(slots, dtype=torch.int32), None, torch.tensor([3]))
        monkeypatch.setattr(module, "moe_align_block_size", lambda *_, raw=raw: raw)
        offsets, row = peers("moe_permute", "maps", "cuda")["vllm"](idx, num_experts=2)
        is_right = torch.equal(row, torch.tensor([[1], [0], [2]], dtype=torch.int32))
        assert is_right == (slots == [1, 2, 0]), slots
        assert offsets.tolist() == [1, 3] or slots == [1, 0, 0]


def test_what_is_not_installed_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = [row for row in TABLE if not _is_installed(row.module)]
    for row in missing:
        assert row.name not in peers(row.op, row.steps, "cuda")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert peers("moe_gate", "forward", "cuda") == {}


def test_what_cannot_be_imported_says_so_when_it_is_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sgl_kernel", "deep_gemm"):
        module = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    logits = torch.zeros(2, 4)
    found = peers("moe_gate", "forward", "cuda")
    with pytest.raises(AttributeError, match="topk_softmax"):
        found["sgl_kernel"](logits, num_topk=1)
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: name if name == "transformer_engine" else None
    )
    found = peers("moe_gate", "backward", "cuda")
    assert list(found) == ["te"]
    with pytest.raises(ModuleNotFoundError, match="transformer_engine"):
        found["te"].prepare(logits, num_topk=1)


def test_a_cpu_has_torch_alone() -> None:
    assert list(peers("moe_gate", "backward", "cpu")) == ["torch"]
    assert list(peers("mla_decode", "backward", "cpu")) == []


def test_each_step_has_its_peers() -> None:
    names = {(row.op, row.steps, row.name) for row in TABLE}
    assert len(names) == len(TABLE)
    assert "torch" in peers("moe_permute", "maps")
    assert "torch" in peers("moe_permute", "forward + backward")
    with_forward = {row.name for row in TABLE if row.op == "moe_permute" and row.steps != "maps"}
    assert set(peers("moe_permute", "forward", "cuda")) <= with_forward
