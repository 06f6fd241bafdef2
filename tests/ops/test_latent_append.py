import pytest
import torch
from torch import Tensor

from dscoder import ops
from dscoder.testing.cases import latent_case
from dscoder.testing.compare import assert_close, assert_op_registered, assert_same

EPS = 1e-6
NUM_PAGES, PAGE_SIZE, WIDTH = 3, 4, 16  # of the latent


def target_of(slots: list[int], row_width: int = 20, dtype: torch.dtype = torch.float32) -> ops.AppendTarget:
    """Everything that is written to is NaN."""
    return ops.AppendTarget(
        slots_T=torch.tensor(slots, dtype=torch.int64),
        cache_PLd=torch.full((NUM_PAGES, PAGE_SIZE, row_width), torch.nan, dtype=dtype),
        query_out_THd=torch.full((len(slots), 3, row_width), torch.nan, dtype=dtype),
    )


def check(case: tuple[Tensor, ...], target: ops.AppendTarget) -> None:
    """What latent_rope gives stands where it belongs, and nothing else changed."""
    ops.latent_append(*case, eps=EPS, target=target)
    query, row = ops.latent_rope(*case, eps=EPS)
    num_rotated = row.shape[1] - WIDTH
    cache = torch.full_like(target.cache_PLd, torch.nan).flatten(0, 1)
    for t, slot in enumerate(target.slots_T.tolist()):
        if 0 <= slot < len(cache):
            cache[slot] = row[t]
    assert_close(target.cache_PLd.flatten(0, 1), cache)
    assert target.query_out_THd[..., :WIDTH].isnan().all()
    assert_close(target.query_out_THd[..., WIDTH:], query[..., query.shape[-1] - num_rotated :])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("slots", [[], [5], [11, 0, 3, 4, 7]], ids=len)
def test_rows_go_to_their_slots_and_queries_beside_the_latent_ones(
    dtype: torch.dtype, slots: list[int], rng: torch.Generator
) -> None:
    check(latent_case(rng, len(slots), dtype=dtype), target_of(slots, dtype=dtype))


@pytest.mark.parametrize(
    "slots",
    [[-1, 4], [4, 12], [3, -1, 12, 8], [-1], [12, -(2**62), 2**62], [-1, 0]],
    ids=str,
)
def test_a_slot_outside_the_cache_is_not_written(slots: list[int], rng: torch.Generator) -> None:
    check(latent_case(rng, len(slots)), target_of(slots))


def test_a_cache_without_pages_takes_nothing(rng: torch.Generator) -> None:
    target = target_of([0, 5])
    empty = ops.AppendTarget(
        slots_T=target.slots_T, cache_PLd=target.cache_PLd[:0], query_out_THd=target.query_out_THd
    )
    check(latent_case(rng, 2), empty)


def test_a_head_may_be_rotated_as_a_whole(rng: torch.Generator) -> None:
    check(latent_case(rng, 2, nope_width=0), target_of([1, 2]))


def test_the_cache_may_be_a_view(rng: torch.Generator) -> None:
    case, wanted = latent_case(rng, 3), target_of([6, 1, 4])
    wide = torch.full((NUM_PAGES, 2, PAGE_SIZE, 20), torch.nan)
    out = torch.full((3, 5, 20), torch.nan)
    view = ops.AppendTarget(slots_T=wanted.slots_T, cache_PLd=wide[:, 1], query_out_THd=out[:, :3])
    assert not view.cache_PLd.is_contiguous()
    check(case, view)
    assert wide[:, 0].isnan().all()
    assert out[:, 3:].isnan().all()


def test_nothing_gets_a_gradient(rng: torch.Generator) -> None:
    query, latent, weight, *angles = latent_case(rng, 2)
    leaves = (x.requires_grad_() for x in (query, latent, weight))
    target = target_of([0, 1])
    ops.latent_append(*leaves, *angles, eps=EPS, target=target)
    assert not target.cache_PLd.requires_grad
    assert not target.query_out_THd.requires_grad


@pytest.mark.parametrize("num_tokens", [0, 3])
def test_it_is_a_proper_op(num_tokens: int, rng: torch.Generator) -> None:
    target = target_of(list(range(1, num_tokens + 1)))
    args = (*latent_case(rng, num_tokens), EPS, target.slots_T, target.cache_PLd, target.query_out_THd)
    assert_op_registered(torch.ops.dscoder.latent_append.default, args)


def test_it_compiles_whole_and_still_writes_in_place(rng: torch.Generator) -> None:
    query, *rest = latent_case(rng, 3)
    target, wanted = target_of([5, 2, -1]), target_of([5, 2, -1])

    def append(query: Tensor, target: ops.AppendTarget) -> Tensor:
        ops.latent_append(query * 2, *rest, eps=EPS, target=target)
        return target.query_out_THd[..., WIDTH:] * 2

    compiled = torch.compile(append, fullgraph=True, backend="aot_eager", dynamic=True)
    assert_same(compiled(query, target), append(query, wanted))
    assert_same(target.cache_PLd, wanted.cache_PLd)
    assert_same(target.query_out_THd, wanted.query_out_THd)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"slots_T": torch.zeros(3).int()}, TypeError, "slots must be int64, got int32"),
        ({"slots_T": torch.zeros(2).long()}, ValueError, r"slots must have shape \(3,\), got \(2,\)"),
        ({"cache_PLd": torch.zeros(2, 4, 20).half()}, TypeError, "cache must be float32, got float16"),
        (
            {"cache_PLd": torch.zeros(2, 4, 24)},
            ValueError,
            r"cache must have shape \(2, 4, 20\), got \(2, 4, 24\)",
        ),
        ({"query_out_THd": torch.zeros(3, 3, 20).half()}, TypeError, "query_out must be float32, got .*"),
        (
            {"query_out_THd": torch.zeros(3, 3, 16)},
            ValueError,
            r"query_out must have shape \(3, 3, 20\), got \(3, 3, 16\)",
        ),
        ({"cache_PLd": torch.zeros(2, 4, 20, device="meta")}, ValueError, "cache must be on cpu like .*"),
    ],
)
def test_wrong_targets_are_named(
    changed: dict[str, Tensor], error: type[Exception], message: str, rng: torch.Generator
) -> None:
    fields = {
        **{"slots_T": torch.zeros(3).long(), "cache_PLd": torch.zeros(2, 4, 20)},
        **{"query_out_THd": torch.zeros(3, 3, 20), **changed},
    }
    with pytest.raises(error, match=f"^latent_append: {message}$"):
        ops.latent_append(*latent_case(rng, 3), eps=EPS, target=ops.AppendTarget(**fields))


def test_other_wrong_arguments_are_named(rng: torch.Generator) -> None:
    query, latent, *rest = latent_case(rng, 3)
    with pytest.raises(TypeError, match=r"^latent_append: target must be an AppendTarget, got tuple$"):
        ops.latent_append(query, latent, *rest, eps=EPS, target=())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^latent_append: latent must be float32, got float16$"):
        ops.latent_append(query, latent.half(), *rest, eps=EPS, target=target_of([0, 1, 2]))
