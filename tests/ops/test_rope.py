import math

import pytest
import torch
from torch import Tensor

from dscoder import ops
from dscoder.testing.cases import randn
from dscoder.testing.compare import assert_close, assert_gradients, assert_op_registered, assert_same
from dscoder.testing.poison import with_strides

Case = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def random_case(
    rng: torch.Generator, num_tokens: int = 7, *, dtype: torch.dtype = torch.float32, width: int = 8
) -> Case:
    """q of three heads, k of one, tables of twelve positions, positions in any order."""
    angle = randn(rng, 12, width // 2, dtype=torch.float64)
    table_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return (
        randn(rng, num_tokens, 3, width, dtype=dtype),
        randn(rng, num_tokens, 1, width, dtype=dtype),
        angle.cos().to(table_dtype),
        angle.sin().to(table_dtype),
        torch.randint(12, (num_tokens,), generator=rng),
    )


def by_pairs(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, *, interleaved: bool) -> Tensor:
    """Pair by pair, in float64."""
    x, out = x.double(), torch.empty(x.shape, dtype=torch.float64)
    num_pairs = x.shape[-1] // 2
    for pair in range(num_pairs):
        first, second = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + num_pairs)
        c, s = (table.double()[positions.long(), pair, None] for table in (cos, sin))
        out[..., first] = x[..., first] * c - x[..., second] * s
        out[..., second] = x[..., second] * c + x[..., first] * s
    return out


def test_neighbours_turn_by_the_angle_of_their_position() -> None:
    angle = torch.tensor([[0.0, 0.0], [math.pi / 2, math.pi]])
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    q, k = ops.rope(x, x, angle.cos(), angle.sin(), torch.tensor([1]))
    assert_close(q, torch.tensor([[[-2.0, 1.0, -3.0, -4.0]]]))
    assert_same(k, q)


def test_halves_turn_by_the_angle_of_their_position() -> None:
    angle = torch.tensor([[0.0, 0.0], [math.pi / 2, math.pi]])
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    q, _ = ops.rope(x, x, angle.cos(), angle.sin(), torch.tensor([1]), interleaved=False)
    assert_close(q, torch.tensor([[[-3.0, -2.0, 1.0, -4.0]]]))


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_tokens", [0, 1, 31])
def test_it_follows_the_definition(
    interleaved: bool, dtype: torch.dtype, num_tokens: int, rng: torch.Generator
) -> None:
    q, k, *tables = random_case(rng, num_tokens, dtype=dtype, width=64)
    for actual, x in zip(ops.rope(q, k, *tables, interleaved=interleaved), (q, k), strict=True):
        assert actual.dtype == dtype
        assert_close(actual, by_pairs(x, *tables, interleaved=interleaved))


def test_the_two_pairings_differ_by_a_permutation(rng: torch.Generator) -> None:
    q, k, *tables = random_case(rng)
    apart, _ = ops.rope(q, k, *tables, interleaved=True)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    halves, _ = ops.rope(q[..., order], k[..., order], *tables, interleaved=False)
    assert_close(halves, apart[..., order])


def test_int32_positions_mean_the_same(rng: torch.Generator) -> None:
    q, k, cos, sin, positions = random_case(rng)
    for actual, wanted in zip(
        ops.rope(q, k, cos, sin, positions.int()), ops.rope(q, k, cos, sin, positions), strict=True
    ):
        assert_same(actual, wanted)


@pytest.mark.parametrize("interleaved", [True, False])
def test_nan_stays_in_its_token(interleaved: bool, rng: torch.Generator) -> None:
    q, k, *tables = random_case(rng)
    q[2] = torch.nan
    out, _ = ops.rope(q, k, *tables, interleaved=interleaved)
    assert out[2].isnan().all()
    assert out[[0, 1, 3, 4, 5, 6]].isfinite().all()


@pytest.mark.parametrize("interleaved", [True, False])
def test_gradients_match_finite_differences(interleaved: bool, rng: torch.Generator) -> None:
    q, k, *tables = random_case(rng, 3, dtype=torch.float64, width=4)
    assert_gradients(lambda q, k: ops.rope(q, k, *tables, interleaved=interleaved), q, k)


@pytest.mark.parametrize("interleaved", [True, False])
def test_strides_change_nothing(interleaved: bool, rng: torch.Generator) -> None:
    case = random_case(rng)
    strided = [with_strides(x) for x in case]
    for actual, wanted in zip(
        ops.rope(*strided, interleaved=interleaved), ops.rope(*case, interleaved=interleaved), strict=True
    ):
        assert_same(actual, wanted)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [0, 1, 3])
def test_the_rotary_part_may_start_at_any_column(
    interleaved: bool, dtype: torch.dtype, num_tokens: int, rng: torch.Generator
) -> None:
    # One head, one token: a slice that counts as contiguous wherever it starts.
    q, k, *tables = random_case(rng, num_tokens, dtype=dtype)
    for start in (1, 2, 3):
        sliced = [
            torch.cat([x.new_full((num_tokens, 1, start), torch.nan), x[:, :1]], dim=-1) for x in (q, k)
        ]
        got = ops.rope(*(x[..., start:] for x in sliced), *tables, interleaved=interleaved)
        for actual, wanted in zip(got, ops.rope(q[:, :1], k, *tables, interleaved=interleaved), strict=True):
            assert_same(actual, wanted)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("num_tokens", [0, 5])
def test_it_is_a_proper_op(interleaved: bool, num_tokens: int, rng: torch.Generator) -> None:
    q, k, *tables = random_case(rng, num_tokens)
    args = (q.requires_grad_(), k.requires_grad_(), *tables, interleaved, False)
    assert_op_registered(torch.ops.dscoder.rope.default, args)


@pytest.mark.parametrize("interleaved", [True, False])
def test_it_compiles_whole(interleaved: bool, rng: torch.Generator) -> None:
    q, k, *tables = random_case(rng)

    def turn(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return ops.rope(q * 2, k, *tables, interleaved=interleaved)

    compiled = torch.compile(turn, fullgraph=True, backend="aot_eager", dynamic=True)
    for actual, wanted in zip(compiled(q, k), turn(q, k), strict=True):
        assert_same(actual, wanted)


Q, K, TABLE, POSITIONS = torch.zeros(3, 2, 4), torch.zeros(3, 1, 4), torch.zeros(5, 2), torch.zeros(3).int()


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"q": Q.int()}, TypeError, "q must be float32 or .*, got int32"),
        ({"q": Q[0]}, ValueError, r"q must have 3 dimensions, got shape \(2, 4\)"),
        ({"q": torch.zeros(3, 2, 5)}, ValueError, "q must have an even last dimension, got 5"),
        ({"k": K.half()}, TypeError, "k must be float32, got float16"),
        ({"k": K[:2]}, ValueError, r"k must have shape \(3, 1, 4\), got \(2, 1, 4\)"),
        ({"cos": TABLE.half()}, TypeError, "cos must be float32 or float64, got float16"),
        ({"cos": torch.zeros(5, 3)}, ValueError, r"cos must have shape \(5, 2\), got \(5, 3\)"),
        ({"sin": TABLE.int()}, TypeError, "sin must be float32 or float64, got int32"),
        ({"sin": torch.zeros(4, 2)}, ValueError, r"sin must have shape \(5, 2\), got \(4, 2\)"),
        ({"positions": POSITIONS.float()}, TypeError, "positions must be int32 or int64, got float32"),
        ({"positions": POSITIONS[:2]}, ValueError, r"positions must have shape \(3,\), got \(2,\)"),
        ({"k": K.to("meta")}, ValueError, "k must be on cpu like q, got meta"),
    ],
)
def test_wrong_arguments_are_named(changed: dict[str, Tensor], error: type[Exception], message: str) -> None:
    arguments = {"q": Q, "k": K, "cos": TABLE, "sin": TABLE, "positions": POSITIONS, **changed}
    with pytest.raises(error, match=f"^rope: {message}$"):
        ops.rope(*arguments.values())
