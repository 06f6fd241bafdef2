import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dscoder import ops
from dscoder.testing.cases import latent_case
from dscoder.testing.compare import assert_close, assert_gradients, assert_op_registered, assert_same
from dscoder.testing.poison import with_strides

EPS = 1e-3


def by_definition(
    query: Tensor, latent: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """In float64, pair by pair."""
    cos, sin = (table.double()[positions.long()] for table in (cos, sin))

    def turned(x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        for pair in range(x.shape[-1] // 2):
            first, second = x[..., 2 * pair], x[..., 2 * pair + 1]
            c, s = (table[:, pair].view(-1, *[1] * (first.ndim - 1)) for table in (cos, sin))
            out[..., 2 * pair], out[..., 2 * pair + 1] = first * c - second * s, second * c + first * s
        return out

    query, latent, weight = query.double(), latent.double(), weight.double()
    num_rotated, width = 2 * cos.shape[1], len(weight)
    first = query.shape[-1] - num_rotated
    rms = (latent[:, :width].square().mean(dim=-1, keepdim=True) + EPS).sqrt()
    return (
        torch.cat([query[..., :first], turned(query[..., first:])], dim=-1),
        torch.cat([latent[:, :width] / rms * weight, turned(latent[:, width:])], dim=-1),
    )


def test_a_latent_is_normed_and_weighted_and_the_key_turned() -> None:
    angle = torch.tensor([[0.0], [math.pi / 2]])
    latent = torch.tensor([[3.0, -3.0, 5.0, 7.0]])
    query = torch.tensor([[[9.0, 1.0, 2.0]]])
    got_query, row = ops.latent_rope(
        query, latent, torch.tensor([1.0, 2.0]), angle.cos(), angle.sin(), torch.tensor([1]), eps=0.0
    )
    assert_close(row, torch.tensor([[1.0, -2.0, -7.0, 5.0]]))
    assert_close(got_query, torch.tensor([[[9.0, -2.0, 1.0]]]))


def test_eps_is_added_to_the_mean_square() -> None:
    table = torch.zeros(1, 0)
    _, row = ops.latent_rope(
        torch.zeros(1, 1, 2),
        torch.tensor([[3.0, 3.0]]),
        torch.ones(2),
        *(table, table, torch.tensor([0])),
        eps=16.0,
    )
    assert_close(row, torch.tensor([[0.6, 0.6]]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_tokens", [0, 1, 31])
def test_it_follows_the_definition(dtype: torch.dtype, num_tokens: int, rng: torch.Generator) -> None:
    case = latent_case(rng, num_tokens, dtype=dtype, nope_width=24, rope_width=16, latent_width=40)
    for actual, wanted in zip(ops.latent_rope(*case, eps=EPS), by_definition(*case), strict=True):
        assert actual.dtype == dtype
        assert_close(actual, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_rope_and_the_norm(dtype: torch.dtype, rng: torch.Generator) -> None:
    query, latent, weight, *angles = latent_case(rng, 31, dtype=dtype)
    got_query, row = ops.latent_rope(query, latent, weight, *angles, eps=EPS)
    turned, key = ops.rope(query[..., 8:], latent[:, None, 16:], *angles)
    assert_same(got_query, torch.cat([query[..., :8], turned], dim=-1))
    assert_same(row[:, 16:], key[:, 0])
    assert_close(row[:, :16], F.rms_norm(latent[:, :16], (16,), weight, EPS))


def test_the_norm_rounds_once(rng: torch.Generator) -> None:
    query, latent, weight, *angles = latent_case(rng, 31, dtype=torch.bfloat16)
    _, row = ops.latent_rope(query, latent, weight, *angles, eps=EPS)
    x = latent[:, :16].float()
    rms = (x.square().mean(dim=-1, keepdim=True) + EPS).sqrt()
    wanted = x / rms * weight.float()
    error = (row[:, :16].float() - wanted).abs() / wanted.abs()
    assert error.max() <= 2.0**-8


def test_the_weight_may_be_wider_than_the_latent(rng: torch.Generator) -> None:
    query, latent, _, *angles = latent_case(rng, 31, dtype=torch.bfloat16)
    weight = torch.full((16,), 1.0 + 2.0**-9).requires_grad_()  # 1 in bfloat16
    _, row = ops.latent_rope(query, latent, weight, *angles, eps=EPS)
    _, rounded = ops.latent_rope(query, latent, weight.bfloat16(), *angles, eps=EPS)
    assert not torch.equal(row, rounded)
    (grad,) = torch.autograd.grad(row.sum(), weight)
    assert grad.dtype == torch.float32


def test_int32_positions_mean_the_same(rng: torch.Generator) -> None:
    case = latent_case(rng)
    narrow = (*case[:-1], case[-1].int())
    for actual, wanted in zip(
        ops.latent_rope(*narrow, eps=EPS), ops.latent_rope(*case, eps=EPS), strict=True
    ):
        assert_same(actual, wanted)


def test_nan_stays_in_its_token(rng: torch.Generator) -> None:
    query, latent, *rest = latent_case(rng, 7)
    query[2], latent[2] = torch.nan, torch.nan
    for out in ops.latent_rope(query, latent, *rest, eps=EPS):
        assert out[2].isnan().all()
        assert out[[0, 1, 3, 4, 5, 6]].isfinite().all()


@pytest.mark.parametrize("nope_width", [0, 3])
@pytest.mark.parametrize("rope_width", [0, 4])
def test_gradients_match_finite_differences(nope_width: int, rope_width: int, rng: torch.Generator) -> None:
    case = latent_case(
        rng, 3, dtype=torch.float64, nope_width=nope_width, rope_width=rope_width, latent_width=5
    )
    assert_gradients(lambda *leaves: ops.latent_rope(*leaves, *case[3:], eps=EPS), *case[:3])


def test_one_output_alone_may_be_differentiated(rng: torch.Generator) -> None:
    query, latent, weight, *angles = latent_case(rng)
    leaves = [x.requires_grad_() for x in (query, latent, weight)]
    for chosen in (0, 1):
        out = ops.latent_rope(*leaves, *angles, eps=EPS)[chosen]
        grads = torch.autograd.grad(out.square().sum(), leaves, allow_unused=True)
        is_zero = [grad is None or not grad.any() for grad in grads]
        assert is_zero == ([False, True, True] if chosen == 0 else [True, False, False])


def test_a_second_derivative_is_refused(rng: torch.Generator) -> None:
    query, latent, *rest = latent_case(rng)
    out, _ = ops.latent_rope(query.requires_grad_(), latent, *rest, eps=EPS)
    with pytest.raises(RuntimeError, match="latent_rope: the gradient must not be differentiated again"):
        torch.autograd.grad(out.sum(), query, create_graph=True)


def test_strides_change_nothing(rng: torch.Generator) -> None:
    case = latent_case(rng)
    strided = [with_strides(x) for x in case]
    for actual, wanted in zip(
        ops.latent_rope(*strided, eps=EPS), ops.latent_rope(*case, eps=EPS), strict=True
    ):
        assert_close(actual, wanted)


def test_query_and_latent_may_be_views_of_one_projection(rng: torch.Generator) -> None:
    query, latent, *rest = latent_case(rng)
    both = torch.cat([query.flatten(1), latent], dim=1)
    views = both[:, : query[0].numel()].view(query.shape), both[:, query[0].numel() :]
    for actual, wanted in zip(
        ops.latent_rope(*views, *rest, eps=EPS), ops.latent_rope(query, latent, *rest, eps=EPS), strict=True
    ):
        assert_same(actual, wanted)
        assert actual.is_contiguous()


@pytest.mark.parametrize("num_tokens", [0, 5])
def test_it_is_a_proper_op(num_tokens: int, rng: torch.Generator) -> None:
    query, latent, weight, *angles = latent_case(rng, num_tokens)
    leaves = [x.requires_grad_() for x in (query, latent, weight)]
    assert_op_registered(torch.ops.dscoder.latent_rope.default, (*leaves, *angles, EPS))
    query, latent, weight = (x.detach() for x in leaves)
    scale = torch.rand(num_tokens, generator=rng)
    args = (query, latent, latent, weight, scale, *angles)
    assert_op_registered(torch.ops.dscoder.latent_rope_backward.default, args)


def test_it_compiles_whole(rng: torch.Generator) -> None:
    query, *rest = latent_case(rng)

    def run(query: Tensor) -> tuple[Tensor, Tensor]:
        return ops.latent_rope(query * 2, *rest, eps=EPS)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for actual, wanted in zip(compiled(query), run(query), strict=True):
        assert_same(actual, wanted)


QUERY, LATENT, WEIGHT = torch.zeros(3, 2, 6), torch.zeros(3, 12), torch.zeros(8)
TABLE, POSITIONS = torch.zeros(5, 2), torch.zeros(3).int()


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"query": QUERY.int()}, TypeError, "query must be float32 or .*, got int32"),
        ({"query": QUERY[0]}, ValueError, r"query must have 3 dimensions, got shape \(2, 6\)"),
        ({"query": torch.zeros(3, 2, 3)}, ValueError, "query must be at least 4 wide, got 3"),
        ({"latent": LATENT.half()}, TypeError, "latent must be float32, got float16"),
        ({"latent": LATENT[:2]}, ValueError, r"latent must have shape \(3, 12\), got \(2, 12\)"),
        (
            {"latent": torch.zeros(3, 11)},
            ValueError,
            "latent must be wider than weight by an even number of columns, got 11 and 8",
        ),
        (
            {"latent": torch.zeros(3, 6)},
            ValueError,
            "latent must be wider than weight by an even number of columns, got 6 and 8",
        ),
        ({"weight": WEIGHT.int()}, TypeError, "weight must be float32 or .*, got int32"),
        ({"weight": WEIGHT[:0]}, ValueError, "the number of weights must be >= 1, got 0"),
        ({"cos": torch.zeros(5, 3)}, ValueError, r"cos must have shape \(5, 2\), got \(5, 3\)"),
        ({"sin": torch.zeros(4, 2)}, ValueError, r"sin must have shape \(5, 2\), got \(4, 2\)"),
        ({"positions": POSITIONS.float()}, TypeError, "positions must be int32 or int64, got float32"),
        ({"positions": POSITIONS[:2]}, ValueError, r"positions must have shape \(3,\), got \(2,\)"),
        ({"eps": "1e-6"}, TypeError, "eps must be float, got str"),
        ({"weight": WEIGHT.to("meta")}, ValueError, "weight must be on cpu like query, got meta"),
    ],
)
def test_wrong_arguments_are_named(changed: dict[str, Tensor], error: type[Exception], message: str) -> None:
    arguments = {
        **{"query": QUERY, "latent": LATENT, "weight": WEIGHT, "cos": TABLE, "sin": TABLE},
        **{"positions": POSITIONS, "eps": 1e-6, **changed},
    }
    eps = arguments.pop("eps")
    with pytest.raises(error, match=f"^latent_rope: {message}$"):
        ops.latent_rope(*arguments.values(), eps=eps)  # type: ignore[arg-type]
