import pytest
import torch

from dscoder.testing import cases
from dscoder.testing.compare import assert_close, assert_gradients, assert_same
from dscoder.testing.poison import poison_rows_from, with_strides

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def test_same_means_bit_for_bit() -> None:
    assert_same(torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.nan]))
    with pytest.raises(AssertionError):
        assert_same(torch.tensor([1.0]), torch.tensor([1.0 + 2**-23]))
    with pytest.raises(AssertionError, match="dtype"):
        assert_same(torch.tensor([1]), torch.tensor([1.0]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_close_allows_rounding_and_not_much_more(dtype: torch.dtype) -> None:
    wanted = cases.randn(cases.generator("rounding"), 1000, dtype=torch.float64)
    assert_close(wanted.to(dtype), wanted)
    with pytest.raises(AssertionError, match="largest error"):
        assert_close((wanted * 1.05).to(dtype), wanted)


def test_close_sees_one_wrong_element_among_many() -> None:
    wanted = torch.ones(100_000)
    actual = wanted.clone()
    actual[7] = 0.9
    with pytest.raises(AssertionError, match="largest error"):
        assert_close(actual, wanted)


def test_close_sees_a_small_error_that_all_elements_share() -> None:
    wanted = cases.randn(cases.generator("shared"), 1000, dtype=torch.float64)
    wanted[0] = 1000.0  # one large element hides the others from the relative error
    actual = wanted.bfloat16()
    actual[1:] += 5.0
    with pytest.raises(AssertionError, match="1 - cosine"):
        assert_close(actual, wanted)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_close_wants_what_is_not_finite_in_its_place(value: float) -> None:
    assert_close(torch.tensor([1.0, value]), torch.tensor([1.0, value]))
    for actual in (torch.tensor([1.0, 2.0]), torch.tensor([value, value])):
        with pytest.raises(AssertionError):
            assert_close(actual, torch.tensor([1.0, value]))


def test_close_compares_shapes() -> None:
    with pytest.raises(AssertionError, match="shape"):
        assert_close(torch.ones(2, 1), torch.ones(2))


def test_a_wrong_gradient_is_found() -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:
            return grad * 2.001

    x = torch.ones(2, dtype=torch.float64)
    assert_gradients(lambda x: x * 2, x)
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        assert_gradients(Doubled.apply, x)


def test_strided_memory_holds_the_values_and_betrays_its_neighbours() -> None:
    for x in (torch.arange(6.0).view(2, 3), torch.arange(6).view(2, 3)):
        strided = with_strides(x)
        assert_same(strided, x)
        assert strided.stride() == (14, 2)
    neighbours = with_strides(torch.zeros(2)).as_strided((5,), (1,), 0)
    assert neighbours.isnan().tolist() == [True, False, True, False, True]


def test_poisoned_rows_leave_the_original_alone() -> None:
    x = torch.zeros(3, 1)
    assert poison_rows_from(x, 1).isnan().flatten().tolist() == [False, True, True]
    assert_same(x, torch.zeros(3, 1))


def test_paged_memory_is_poisoned_where_unused() -> None:
    rows = [torch.ones(3, 2), torch.full((5, 2), 2.0)]
    cache, table = cases.paged(rows, page_size=2, num_spare_pages=1, rng=cases.generator("paged"))
    assert cache.shape == (6, 2, 2)
    assert int(cache.isfinite().all(dim=-1).sum()) == 8
    assert_same(cache[table[1, :3].long()].view(6, 2)[:5], rows[1])
    assert ((table < 0) | (table >= 6)).sum(dim=1).tolist() == [2, 1]


def test_a_test_draws_the_same_numbers_every_time() -> None:
    first, again, other = (cases.generator(name).initial_seed() for name in ("a", "a", "b"))
    assert first == again != other
