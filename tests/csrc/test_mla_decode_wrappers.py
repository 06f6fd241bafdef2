"""The Python side of the kernels of mla_decode and its plan, the host executor in place of a GPU."""

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from dscoder import ops
from dscoder.testing.cases import generator, randn
from dscoder.testing.compare import assert_close, assert_same
from dscoder.testing.decode import (
    SCALE,
    VALUE_DIM,
    WIDTH,
    DecodeCase,
    assert_decodes,
    decode_case,
    plan_for,
)
from dscoder.testing.poison import with_strides

UseKernels = Callable[..., None]

OPS = ("mla_decode", "mla_decode_plan")
OPTIONS = {"value_dim": VALUE_DIM, "scale": 0.05}
HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> torch.Generator:
    return generator(request.node.nodeid)


@pytest.fixture
def use_parts(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """From here on plans are made for so many parts, as on a GPU that has room for them."""

    def use(num_parts: int) -> None:
        module = importlib.import_module("dscoder.ops.mla_decode")
        monkeypatch.setattr(module, "_num_parts", lambda *_: num_parts)

    return use


@pytest.fixture
def calls(host_ops: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[Any, ...]]]:
    """Name and arguments of each launch."""
    seen: list[tuple[str, tuple[Any, ...]]] = []

    def spy(name: str) -> None:
        binding = getattr(host_ops, name)

        def run(*args: Any) -> None:
            seen.append((name, args))
            binding(*args)

        monkeypatch.setattr(host_ops, name, run)

    spy("mla_decode_forward")
    spy("mla_decode_plan")
    return seen


def case_of(
    rng: torch.Generator, lengths: list[int], *, num_heads: int = 3, page_size: int = 32, **options: Any
) -> DecodeCase:
    return decode_case(rng, lengths, num_heads=num_heads, page_size=page_size, **options)


def assert_agree(actual: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    for got, want in zip(actual, wanted, strict=True):
        assert got.dtype == want.dtype
        assert_close(got, want)


@pytest.mark.parametrize("num_parts", [1, 5])
@pytest.mark.parametrize("has_plan", [False, True])
@pytest.mark.parametrize("page_size", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", HALVES)
def test_kernels_agree_with_the_reference(
    use_kernels: UseKernels,
    use_parts: Callable[[int], None],
    dtype: torch.dtype,
    page_size: int,
    has_plan: bool,
    num_parts: int,
    rng: torch.Generator,
) -> None:
    case = case_of(rng, [70, 0, 1, 200], num_new=2, page_size=page_size, dtype=dtype)
    wanted = ops.mla_decode(*case, **OPTIONS)
    use_kernels(*OPS)
    use_parts(num_parts)
    plan = plan_for(case) if has_plan else None
    assert_agree(ops.mla_decode(*case, **OPTIONS, plan=plan), wanted)


@pytest.mark.parametrize("num_parts", [1, 5])
@pytest.mark.parametrize("scale", [SCALE, 1.0])
@pytest.mark.parametrize("dtype", HALVES)
def test_kernels_are_exact_enough(
    use_kernels: UseKernels,
    use_parts: Callable[[int], None],
    dtype: torch.dtype,
    scale: float,
    num_parts: int,
    rng: torch.Generator,
) -> None:
    """As on a GPU: sequence by sequence, held to torch's own error in the same dtype."""
    case = case_of(rng, [300, 1, 0, 64, 2, 65], num_new=2, num_heads=16, dtype=dtype)
    use_kernels(*OPS)
    use_parts(num_parts)
    assert_decodes(ops.mla_decode(*case, value_dim=VALUE_DIM, scale=scale), case, scale=scale)


@pytest.mark.parametrize("num_parts", [1, 7])
@pytest.mark.parametrize("lengths", [[700, 0, 65], [0, 0], [], [-4, 2**31 - 1]])
def test_the_plan_is_the_hosts(
    use_kernels: UseKernels, use_parts: Callable[[int], None], lengths: list[int], num_parts: int
) -> None:
    use_parts(num_parts)
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    sizes = {"num_new": 1, "num_heads": 16, "max_rows": 1024}
    wanted = ops.mla_decode_plan(seq_lens, **sizes)
    use_kernels(*OPS)
    assert_same(ops.mla_decode_plan(seq_lens, **sizes), wanted)
    assert_same(ops.mla_decode_plan(with_strides(seq_lens), **sizes), wanted)


def test_one_plan_serves_all_layers(
    use_kernels: UseKernels, calls: list[tuple[str, tuple[Any, ...]]], rng: torch.Generator
) -> None:
    case = case_of(rng, [70, 33])
    use_kernels(*OPS)
    plan = plan_for(case)
    for _ in range(3):
        ops.mla_decode(*case, **OPTIONS, plan=plan)
    assert [name for name, _ in calls] == ["mla_decode_plan", *["mla_decode_forward"] * 3]
    assert all(args[4] is plan for _, args in calls[1:])


@pytest.mark.parametrize("others", [[0, 0, 0], [65, 9000, 33], [2**31 - 1] * 3])
def test_a_plan_for_other_lengths_decodes_too(
    use_kernels: UseKernels, use_parts: Callable[[int], None], others: list[int], rng: torch.Generator
) -> None:
    case = case_of(rng, [300, 0, 64])
    wanted = ops.mla_decode(*case, **OPTIONS)
    use_kernels(*OPS)
    use_parts(5)
    seq_lens = torch.tensor(others, dtype=torch.int32)
    plan = ops.mla_decode_plan(seq_lens, num_new=1, num_heads=3, max_rows=1 << 14)
    assert_agree(ops.mla_decode(*case, **OPTIONS, plan=plan), wanted)


def test_without_a_plan_a_call_makes_its_own(
    use_kernels: UseKernels, calls: list[tuple[str, tuple[Any, ...]]], rng: torch.Generator
) -> None:
    use_kernels(*OPS)
    ops.mla_decode(*case_of(rng, [70, 33]), **OPTIONS)
    assert [name for name, _ in calls] == ["mla_decode_plan", "mla_decode_forward"]


def test_views_of_a_larger_cache_and_table_are_read_where_they_lie(
    use_kernels: UseKernels, calls: list[tuple[str, tuple[Any, ...]]], rng: torch.Generator
) -> None:
    q, cache, table, seq_lens = case = case_of(rng, [70, 33])
    wanted = ops.mla_decode(*case, **OPTIONS)
    pages = torch.full((len(cache), 40, WIDTH), torch.nan, dtype=q.dtype)
    pages[:, :32] = cache
    slots = torch.full((2, table.shape[1] + 3), 77, dtype=torch.int32)
    slots[:, : table.shape[1]] = table
    use_kernels(*OPS)
    got = ops.mla_decode(q, pages[:, :32], slots[:, : table.shape[1]], seq_lens, **OPTIONS)
    assert_agree(got, wanted)
    _, args = calls[-1]
    assert (args[1].data_ptr(), args[2].data_ptr()) == (pages.data_ptr(), slots.data_ptr())


def test_other_inputs_are_copied(use_kernels: UseKernels, rng: torch.Generator) -> None:
    q, cache, table, seq_lens = case = case_of(rng, [70, 33], num_new=2)
    wanted = ops.mla_decode(*case, **OPTIONS)
    use_kernels(*OPS)
    plan = with_strides(plan_for(case))
    strided = (with_strides(q), cache, with_strides(table), with_strides(seq_lens))
    assert_agree(ops.mla_decode(*strided, **OPTIONS, plan=plan), wanted)
    shifted = torch.empty(q.numel() + 1, dtype=q.dtype)[1:].view(q.shape).copy_(q)
    assert_agree(ops.mla_decode(shifted, cache, table, seq_lens, **OPTIONS), wanted)


@pytest.mark.parametrize("lengths", [[5], [5, 9]])
def test_one_page_and_one_row_of_the_table_may_have_any_stride(
    use_kernels: UseKernels, lengths: list[int], rng: torch.Generator
) -> None:
    q, cache, table, seq_lens = case_of(rng, lengths, page_size=16)
    cache, table = torch.zeros(3, 32, WIDTH, dtype=q.dtype)[1:2, :16], torch.zeros(9, 2).int()[: len(q), 1:]
    case = (q, cache.copy_(randn(rng, *cache.shape)), table, seq_lens)
    wanted = ops.mla_decode(*case, **OPTIONS)
    use_kernels(*OPS)
    assert_agree(ops.mla_decode(*case, **OPTIONS), wanted)


@pytest.mark.parametrize(
    ("num_sequences", "num_new", "num_slots"), [(0, 1, 2), (2, 0, 2), (2, 1, 0), (0, 0, 0)]
)
def test_nothing_to_do(
    use_kernels: UseKernels, num_sequences: int, num_new: int, num_slots: int, rng: torch.Generator
) -> None:
    q = randn(rng, num_sequences, num_new, 3, WIDTH, dtype=torch.bfloat16)
    cache = torch.full((1, 16, WIDTH), torch.nan, dtype=torch.bfloat16)
    table = torch.zeros(num_sequences, num_slots, dtype=torch.int32)
    seq_lens = torch.zeros(num_sequences, dtype=torch.int32) + (0 if num_slots else 9)
    wanted = ops.mla_decode(q, cache, table, seq_lens, **OPTIONS)
    use_kernels(*OPS)
    for got, want in zip(ops.mla_decode(q, cache, table, seq_lens, **OPTIONS), wanted, strict=True):
        assert_same(got, want)


def test_as_many_new_rows_as_a_long_prompt_has_are_taken(use_kernels: UseKernels) -> None:
    """S * H beyond what a grid is high (2^16), pairs of rows included; empty, so that nothing is computed."""
    q = torch.empty(1, 1025, 128, WIDTH, dtype=torch.bfloat16)
    cache = torch.full((1, 64, WIDTH), torch.nan, dtype=torch.bfloat16)
    use_kernels(*OPS)
    out, lse = ops.mla_decode(q, cache, torch.zeros(1, 1).int(), torch.zeros(1).int(), **OPTIONS)
    assert not out.any()
    assert bool((lse == -torch.inf).all())


def strange_caches(cache: Tensor) -> dict[str, Tensor]:
    """The same pages where the kernels cannot read them."""
    num_pages, page_size, width = cache.shape
    apart = torch.zeros(num_pages, page_size * width + 4, dtype=cache.dtype)[:, :-4]
    shifted = torch.zeros(cache.numel() + 4, dtype=cache.dtype)[4:]
    return {
        "pages off their boundary": apart.unflatten(1, (page_size, width)).copy_(cache),
        "shifted": shifted.view(cache.shape).copy_(cache),
        "rows apart": with_strides(cache),
    }


def test_what_kernels_cannot_do_runs_the_reference(
    use_kernels: UseKernels, calls: list[tuple[str, tuple[Any, ...]]], rng: torch.Generator
) -> None:
    q, cache, table, seq_lens = case_of(rng, [70, 33])
    cases: list[tuple[DecodeCase, int]] = [
        ((q, strange, table, seq_lens), VALUE_DIM) for strange in strange_caches(cache).values()
    ]
    cases += [((q.float(), cache.float(), table, seq_lens), VALUE_DIM), ((q, cache, table, seq_lens), 500)]
    cases += [((q[..., :64], cache[..., :64].contiguous(), table, seq_lens), 64)]
    cases += [(case_of(rng, [70, 33], page_size=24), VALUE_DIM)]
    wanted = [ops.mla_decode(*case, value_dim=value_dim, scale=0.05) for case, value_dim in cases]
    use_kernels(*OPS)
    for (case, value_dim), want in zip(cases, wanted, strict=True):
        for got, expected in zip(ops.mla_decode(*case, value_dim=value_dim, scale=0.05), want, strict=True):
            assert_same(got, expected)
    assert ops.mla_decode(q, cache, table, seq_lens, **OPTIONS, arch="reference")[0].isfinite().all()
    assert calls == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "pages off their boundary",
            r"pages of cache at multiples of 8 elements, got stride 18436 and offset 0",
        ),
        ("shifted", r"pages of cache at multiples of 8 elements, got stride 18432 and offset 4"),
        ("rows apart", r"the rows of a page of cache one after the other, got strides \(.*\)"),
    ],
)
def test_a_layout_that_kernels_cannot_read_is_named_where_they_were_asked_for(
    use_kernels: UseKernels, name: str, message: str, rng: torch.Generator
) -> None:
    q, cache, table, seq_lens = case_of(rng, [70, 33])
    use_kernels(*OPS)
    strange = strange_caches(cache)[name]
    with pytest.raises(ValueError, match=f"^mla_decode: arch sm80 wants {message}$"):
        torch.ops.dscoder.mla_decode.default(q, strange, table, seq_lens, None, VALUE_DIM, 0.05, "sm80")


def test_the_arch_is_what_was_asked_for(
    use_kernels: UseKernels, calls: list[tuple[str, tuple[Any, ...]]], rng: torch.Generator
) -> None:
    case = case_of(rng, [70, 33])
    wanted = ops.mla_decode(*case, **OPTIONS)
    use_kernels(*OPS)
    assert_agree(torch.ops.dscoder.mla_decode.default(*case, None, VALUE_DIM, 0.05, "sm80"), wanted)
    assert calls[-1][1][-1] == "sm80"
    with pytest.raises(ValueError, match=r"^mla_decode: arch sm90 needs compute capability 9.0"):
        torch.ops.dscoder.mla_decode.default(*case, None, VALUE_DIM, 0.05, "sm90")


@pytest.mark.parametrize("binding", ["mla_decode_forward", "mla_decode_plan"])
def test_the_kernels_are_what_ran(
    use_kernels: UseKernels,
    host_ops: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    binding: str,
    rng: torch.Generator,
) -> None:
    """The tests above compare something: with the binding gone, the way to it is an error."""
    case = case_of(rng, [5])
    monkeypatch.delattr(host_ops, binding)
    use_kernels(*OPS)
    with pytest.raises(AttributeError, match=binding):
        ops.mla_decode(*case, **OPTIONS)
