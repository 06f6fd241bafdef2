from typing import Any

import pytest
import torch
from torch import Tensor

from dscoder import ops
from dscoder.ops.mla_decode import _layout_refusal, kernel_refusal
from dscoder.testing.cases import paged, randn
from dscoder.testing.compare import assert_close, assert_op_registered, assert_same
from dscoder.testing.poison import with_strides

PAGE_SIZE, WIDTH, VALUE_DIM = 4, 6, 5
OPTIONS = {"value_dim": VALUE_DIM, "scale": 0.5}
LENGTHS = {
    "one_token": [1],
    "page_edges": [3, 4, 5, 8],
    "an_empty_one": [0, 9],
    "all_empty": [0, 0],
    "no_sequences": [],
    "long": [301, 17],
}


def random_case(
    rng: torch.Generator, lengths: list[int], *, num_new: int = 1, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The rows of each sequence, and (q, cache, page table, lengths) with all unused memory poisoned."""
    rows = [randn(rng, length, WIDTH, dtype=dtype) for length in lengths]
    pages = [*rows, torch.zeros(0, WIDTH, dtype=dtype)]
    cache, table = paged(pages, page_size=PAGE_SIZE, num_spare_pages=2, rng=rng)
    q = randn(rng, len(lengths), num_new, 3, WIDTH, dtype=dtype)
    return rows, (q, cache, table[:-1], torch.tensor(lengths, dtype=torch.int32))


def by_token(q: Tensor, rows: list[Tensor], scale: float) -> tuple[Tensor, Tensor]:
    """Each new token over the rows it sees, in float64."""
    out = torch.zeros(*q.shape[:3], VALUE_DIM, dtype=torch.float64)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=torch.float64)
    for b, sequence in enumerate(rows):
        for s in range(q.shape[1]):
            num_seen = len(sequence) - q.shape[1] + s + 1
            if num_seen <= 0:
                continue
            seen = sequence[:num_seen].double()
            scores = q[b, s].double() @ seen.t() * scale
            out[b, s] = scores.softmax(dim=-1) @ seen[:, :VALUE_DIM]
            lse[b, s] = scores.logsumexp(dim=-1)
    return out, lse


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("num_new", [1, 2, 4, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_follows_the_definition_in_poisoned_memory(
    lengths: str, num_new: int, dtype: torch.dtype, rng: torch.Generator
) -> None:
    rows, case = random_case(rng, LENGTHS[lengths], num_new=num_new, dtype=dtype)
    out, lse = ops.mla_decode(*case, value_dim=VALUE_DIM, scale=0.4)
    wanted_out, wanted_lse = by_token(case[0], rows, 0.4)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert_close(out, wanted_out)
    assert_close(lse, wanted_lse)


def test_length_zero_gives_out_zero_and_lse_minus_infinity(rng: torch.Generator) -> None:
    _, case = random_case(rng, [0, 9])
    out, lse = ops.mla_decode(*case, value_dim=VALUE_DIM, scale=1.0)
    assert_same(out[0], torch.zeros(1, 3, VALUE_DIM))
    assert_same(lse[0], torch.full((1, 3), -torch.inf))


def test_new_tokens_do_not_see_the_ones_after_them(rng: torch.Generator) -> None:
    _, (q, cache, table, seq_lens) = random_case(rng, [9], num_new=3)
    out, _ = ops.mla_decode(q, cache, table, seq_lens, value_dim=VALUE_DIM, scale=1.0)
    first, _ = ops.mla_decode(q[:, :1], cache, table, seq_lens - 2, value_dim=VALUE_DIM, scale=1.0)
    assert_close(out[:, :1], first)


def test_a_page_may_be_shared(rng: torch.Generator) -> None:
    _, (q, cache, table, seq_lens) = random_case(rng, [8])
    out, _ = ops.mla_decode(
        q.expand(2, -1, -1, -1),
        cache,
        table.expand(2, -1),
        seq_lens.expand(2),
        value_dim=VALUE_DIM,
        scale=1.0,
    )
    assert_same(out[0], out[1])


@pytest.mark.parametrize("length", [-5, 2**31 - 1])
def test_a_wild_length_stays_within_the_table(length: int, rng: torch.Generator) -> None:
    cache = randn(rng, 2, PAGE_SIZE, WIDTH)
    table = torch.tensor([[1, 99]], dtype=torch.int32)
    wild = torch.tensor([length], dtype=torch.int32)
    out, _ = ops.mla_decode(randn(rng, 1, 1, 3, WIDTH), cache, table, wild, value_dim=VALUE_DIM, scale=1.0)
    assert out.isfinite().all()


def test_a_page_that_is_not_there_reads_as_zeros(rng: torch.Generator) -> None:
    _, (q, cache, table, seq_lens) = random_case(rng, [9])
    zeros = torch.zeros(1, *cache.shape[1:])
    wanted = ops.mla_decode(
        q, torch.cat([cache, zeros]), table.index_fill(1, torch.tensor([1]), len(cache)), seq_lens, **OPTIONS
    )
    for wild in (-1, len(cache), 2**31 - 1, -(2**31)):
        actual = ops.mla_decode(q, cache, table.index_fill(1, torch.tensor([1]), wild), seq_lens, **OPTIONS)
        assert_same(actual[0], wanted[0])
        assert_same(actual[1], wanted[1])


def test_nan_stays_in_its_sequence(rng: torch.Generator) -> None:
    rows = [torch.full((5, WIDTH), torch.nan), randn(rng, 5, WIDTH)]
    cache, table = paged(rows, page_size=PAGE_SIZE, num_spare_pages=0, rng=rng)
    q, seq_lens = randn(rng, 2, 1, 3, WIDTH), torch.tensor([5, 5], dtype=torch.int32)
    out, _ = ops.mla_decode(q, cache, table, seq_lens, value_dim=VALUE_DIM, scale=1.0)
    assert out[0].isnan().all()
    assert out[1].isfinite().all()


def test_the_absorbed_form_equals_the_expanded_form(rng: torch.Generator) -> None:
    """Decoding one token over latents is prefill over the keys and values that the latents expand to."""
    latent, rotated = randn(rng, 9, 5, dtype=torch.float64), randn(rng, 9, 1, dtype=torch.float64)
    key_up, value_up = randn(rng, 2, 3, 5, dtype=torch.float64), randn(rng, 2, 4, 5, dtype=torch.float64)
    nope, turned = randn(rng, 1, 2, 3, dtype=torch.float64), randn(rng, 1, 2, 1, dtype=torch.float64)
    key = torch.cat([torch.einsum("tc,hnc->thn", latent, key_up), rotated[:, None].expand(-1, 2, -1)], dim=-1)
    value = torch.einsum("tc,hvc->thv", latent, value_up)
    ends = [torch.tensor([0, n], dtype=torch.int32) for n in (1, 9)]
    wanted, _ = ops.mla_prefill(torch.cat([nope, turned], dim=-1), key, value, *ends, scale=0.5)
    cache, table = paged(
        [torch.cat([latent, rotated], dim=-1)], page_size=PAGE_SIZE, num_spare_pages=1, rng=rng
    )
    q = torch.cat([torch.einsum("thn,hnc->thc", nope, key_up), turned], dim=-1)
    out, _ = ops.mla_decode(q[:, None], cache, table, ends[1][1:], value_dim=5, scale=0.5)
    assert_close(torch.einsum("hc,hvc->hv", out[0, 0], value_up), wanted[0])


def test_strides_change_little(rng: torch.Generator) -> None:
    _, case = random_case(rng, [5, 9], num_new=2)
    strided = [with_strides(x) for x in case]
    for actual, wanted in zip(
        ops.mla_decode(*strided, value_dim=VALUE_DIM, scale=1.0),
        ops.mla_decode(*case, value_dim=VALUE_DIM, scale=1.0),
        strict=True,
    ):
        assert_close(actual, wanted)


def test_pages_and_rows_of_the_table_may_lie_apart(rng: torch.Generator) -> None:
    _, (q, cache, table, seq_lens) = random_case(rng, [5, 9], num_new=2)
    wide_cache = torch.full((len(cache), PAGE_SIZE + 3, WIDTH), torch.nan)
    wide_cache[:, :PAGE_SIZE] = cache
    wide_table = torch.full((2, table.shape[1] + 5), -7, dtype=torch.int32)
    wide_table[:, : table.shape[1]] = table
    views = (wide_cache[:, :PAGE_SIZE], wide_table[:, : table.shape[1]])
    wanted = ops.mla_decode(q, cache, table, seq_lens, **OPTIONS)
    for actual, want in zip(ops.mla_decode(q, *views, seq_lens, **OPTIONS), wanted, strict=True):
        assert_same(actual, want)


def test_nothing_gets_a_gradient(rng: torch.Generator) -> None:
    _, (q, cache, table, seq_lens) = random_case(rng, [3, 9])
    results = ops.mla_decode(q.requires_grad_(), cache.requires_grad_(), table, seq_lens, **OPTIONS)
    assert not any(result.requires_grad for result in results)


def test_a_plan_changes_nothing(rng: torch.Generator) -> None:
    _, (q, cache, table, seq_lens) = random_case(rng, [5, 0, 9])
    max_rows = table.shape[1] * PAGE_SIZE
    plan = ops.mla_decode_plan(seq_lens, num_new=1, num_heads=3, max_rows=max_rows)
    actual = ops.mla_decode(q, cache, table, seq_lens, **OPTIONS, plan=plan, arch="reference")
    for got, want in zip(actual, ops.mla_decode(q, cache, table, seq_lens, **OPTIONS), strict=True):
        assert_same(got, want)


@pytest.mark.parametrize("has_plan", [False, True])
@pytest.mark.parametrize("lengths", ["page_edges", "all_empty", "no_sequences"])
def test_it_is_a_proper_op(lengths: str, has_plan: bool, rng: torch.Generator) -> None:
    _, (q, cache, table, seq_lens) = random_case(rng, LENGTHS[lengths], num_new=2)
    plan = torch.zeros(len(q) + 2, 2, dtype=torch.int32) if has_plan else None
    # opcheck compares inputs by value: no NaN.
    args = (q, cache.nan_to_num(), table, seq_lens, plan, VALUE_DIM, 0.5, "auto")
    assert_op_registered(torch.ops.dscoder.mla_decode.default, args)


def test_it_compiles_whole(rng: torch.Generator) -> None:
    _, (q, *rest) = random_case(rng, [5, 9])
    compiled = torch.compile(
        lambda q: ops.mla_decode(q * 2, *rest, value_dim=VALUE_DIM, scale=1.0),
        fullgraph=True,
        backend="aot_eager",
    )
    for actual, wanted in zip(
        compiled(q), ops.mla_decode(q * 2, *rest, value_dim=VALUE_DIM, scale=1.0), strict=True
    ):
        assert_same(actual, wanted)


Q, CACHE = torch.zeros(2, 1, 3, WIDTH), torch.zeros(4, PAGE_SIZE, WIDTH)
TABLE, SEQ_LENS = torch.zeros(2, 2).int(), torch.zeros(2).int()


PLAN = torch.zeros(4, 2).int()  # of one part


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"q": Q.int()}, TypeError, "q must be float32 or .*, got int32"),
        ({"q": Q[0]}, ValueError, r"q must have 4 dimensions, got shape \(1, 3, 6\)"),
        ({"cache": CACHE.half()}, TypeError, "cache must be float32, got float16"),
        ({"cache": CACHE[0]}, ValueError, r"cache must have 3 dimensions, got shape \(4, 6\)"),
        ({"cache": CACHE[..., :5]}, ValueError, r"cache must have shape \(4, 4, 6\), got \(4, 4, 5\)"),
        ({"cache": CACHE[:0]}, ValueError, "num_pages must be >= 1, got 0"),
        ({"cache": CACHE[:, :0]}, ValueError, "page_size must be >= 1, got 0"),
        ({"table": TABLE.long()}, TypeError, "page_table must be int32, got int64"),
        ({"table": TABLE[0]}, ValueError, r"page_table must have 2 dimensions, got shape \(2,\)"),
        ({"table": TABLE[:1]}, ValueError, r"page_table must have shape \(2, 2\), got \(1, 2\)"),
        ({"seq_lens": SEQ_LENS.long()}, TypeError, "seq_lens must be int32, got int64"),
        ({"seq_lens": TABLE}, ValueError, r"seq_lens must have 1 dimensions, got shape \(2, 2\)"),
        ({"seq_lens": SEQ_LENS[:1]}, ValueError, r"seq_lens must have shape \(2,\), got \(1,\)"),
        ({"seq_lens": [3, 4]}, TypeError, "seq_lens must be a tensor, got list"),
        ({"cache": CACHE.to("meta")}, ValueError, "cache must be on cpu like q, got meta"),
        ({"table": TABLE.to("meta")}, ValueError, "page_table must be on cpu like q, got meta"),
        ({"seq_lens": SEQ_LENS.to("meta")}, ValueError, "seq_lens must be on cpu like q, got meta"),
        ({"value_dim": 0}, ValueError, r"value_dim must be >= 1, got 0"),
        ({"value_dim": 7}, ValueError, r"value_dim must be <= 6, the width of q, got 7"),
        ({"value_dim": 5.0}, TypeError, r"value_dim must be int, got float"),
        ({"scale": "1"}, TypeError, r"scale must be float, got str"),
        ({"plan": PLAN.long()}, TypeError, "plan must be int32, got int64"),
        ({"plan": (1, 2)}, TypeError, "plan must be a tensor, got tuple"),
        ({"plan": PLAN[0]}, ValueError, r"plan must have 2 dimensions, got shape \(2,\)"),
        ({"plan": PLAN[:, :1]}, ValueError, r"plan must have shape \(4, 2\), got \(4, 1\)"),
        ({"plan": PLAN[:3]}, ValueError, "rows of plan must be >= 4, got 3"),
        ({"plan": PLAN.to("meta")}, ValueError, "plan must be on cpu like q, got meta"),
        ({"arch": "sm70"}, ValueError, "arch must be one of auto, sm80, sm90, reference, got 'sm70'"),
        ({"arch": "sm80"}, ValueError, "arch must be auto or reference on cpu, got sm80"),
        ({"arch": "sm90"}, ValueError, "arch must be auto or reference on cpu, got sm90"),
    ],
)
def test_wrong_arguments_are_named(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    tensors = {"q": Q, "cache": CACHE, "table": TABLE, "seq_lens": SEQ_LENS}
    options = {"value_dim": 5, "scale": 1.0, **changed}
    tensors = {name: options.pop(name, tensor) for name, tensor in tensors.items()}
    with pytest.raises(error, match=f"^mla_decode: {message}$"):
        ops.mla_decode(*tensors.values(), **options)


# ---- what the kernels are for ----

HALF = torch.bfloat16


@pytest.mark.parametrize("page_size", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_take_the_published_widths(dtype: torch.dtype, page_size: int) -> None:
    cache = torch.zeros(3, page_size, 576, dtype=dtype)
    assert kernel_refusal(torch.zeros(2, 1, 16, 576, dtype=dtype), cache, 512) is None
    assert _layout_refusal(cache) is None


@pytest.mark.parametrize(
    ("dtype", "width", "value_dim", "page_size", "wanted"),
    [
        (torch.float32, 576, 512, 64, "q of bfloat16 or float16, got float32"),
        (HALF, 576, 576, 64, "widths (576, 512) of rows and values, got (576, 576)"),
        (HALF, 320, 256, 64, "widths (576, 512) of rows and values, got (320, 256)"),
        (HALF, 576, 512, 48, "page_size to be one of 16, 32, 64, 128, got 48"),
    ],
)
def test_what_kernels_want_is_said(
    dtype: torch.dtype, width: int, value_dim: int, page_size: int, wanted: str
) -> None:
    q, cache = torch.zeros(2, 1, 16, width, dtype=dtype), torch.zeros(3, page_size, width, dtype=dtype)
    assert kernel_refusal(q, cache, value_dim) == wanted


def test_kernels_read_pages_where_they_lie() -> None:
    pages = torch.zeros(4, 80, 576, dtype=HALF)
    for view in (pages[:, :64], pages[1:, 16:], pages[2:3, :64].expand(1, -1, -1), pages[::2, :16]):
        assert _layout_refusal(view) is None
    apart = torch.zeros(4, 64 * 576 + 4, dtype=HALF)[:, : 64 * 576].unflatten(1, (64, 576))
    assert _layout_refusal(apart) == (
        "pages of cache at multiples of 8 elements, got stride 36868 and offset 0"
    )
    assert _layout_refusal(apart[1:2]) == (
        "pages of cache at multiples of 8 elements, got stride 36864 and offset 36868"
    )
    for strange in (
        pages.mT.contiguous().mT,
        pages[:1].expand(2, -1, -1),
        torch.zeros(4, 64, 640)[..., :576],
    ):
        assert _layout_refusal(strange) == (
            f"the rows of a page of cache one after the other, got strides {strange.stride()}"
        )
