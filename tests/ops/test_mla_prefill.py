import pytest
import torch
from torch import Tensor

from dscoder import ops
from dscoder.testing.cases import cu_seqlens, randn
from dscoder.testing.compare import assert_close, assert_gradients, assert_op_registered, assert_same
from dscoder.testing.poison import with_strides

LENGTHS = {  # of each sequence, in queries and in keys
    "one": ([5], [5]),
    "packed": ([3, 1, 7], [3, 1, 7]),
    "longer_than_a_block": ([300, 2, 129], [300, 2, 129]),
    "keys_before": ([2, 130], [7, 301]),
    "queries_without_keys": ([7, 140], [3, 5]),
    "empty_sequences": ([0, 4, 0, 3, 2], [0, 4, 5, 0, 2]),
    "nothing": ([0], [0]),
    "no_sequences": ([], []),
}


def random_case(
    rng: torch.Generator,
    lengths: str,
    *,
    dtype: torch.dtype = torch.float32,
    widths: tuple[int, int, int] = (2, 6, 4),
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v of (heads, key width, value width), and both cu_seqlens."""
    (num_heads, width, value_width), (lengths_q, lengths_k) = widths, LENGTHS[lengths]
    return (
        randn(rng, sum(lengths_q), num_heads, width, dtype=dtype),
        randn(rng, sum(lengths_k), num_heads, width, dtype=dtype),
        randn(rng, sum(lengths_k), num_heads, value_width, dtype=dtype),
        cu_seqlens(lengths_q),
        cu_seqlens(lengths_k),
    )


def dense(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """One softmax over all keys of all sequences under a mask, in float64, differentiable."""
    q, k, v = (x.double() for x in (q, k, v))
    sees = torch.zeros(q.shape[0], k.shape[0], dtype=torch.bool)
    ends_q, ends_k = cu_q.tolist(), cu_k.tolist()
    for b in range(len(ends_q) - 1):
        num_q, num_k = ends_q[b + 1] - ends_q[b], ends_k[b + 1] - ends_k[b]
        block = torch.ones(num_q, num_k, dtype=torch.bool)
        if causal:
            block = block.tril(num_k - num_q)
        sees[ends_q[b] : ends_q[b + 1], ends_k[b] : ends_k[b + 1]] = block
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    lse = scores.masked_fill(~sees, -torch.inf).logsumexp(dim=-1)
    probs = (scores - lse.masked_fill(lse.isinf(), 0.0)[..., None]).exp().masked_fill(~sees, 0.0)
    return torch.einsum("hqk,khv->qhv", probs, v), lse.t()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_out_and_lse_follow_the_definition(
    causal: bool, lengths: str, dtype: torch.dtype, rng: torch.Generator
) -> None:
    case = random_case(rng, lengths, dtype=dtype)
    out, lse = ops.mla_prefill(*case, scale=0.4, causal=causal)
    wanted_out, wanted_lse = dense(*case, scale=0.4, causal=causal)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert_close(out, wanted_out)
    assert_close(lse, wanted_lse)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_follow_the_definition(
    causal: bool, lengths: str, dtype: torch.dtype, rng: torch.Generator
) -> None:
    *inputs, cu_q, cu_k = random_case(rng, lengths, dtype=dtype)
    grad = randn(rng, *inputs[0].shape[:2], inputs[2].shape[2], dtype=dtype)
    inputs = [x.requires_grad_() for x in inputs]
    out, _ = ops.mla_prefill(*inputs, cu_q, cu_k, scale=0.4, causal=causal)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    wanted_out, _ = dense(*exact, cu_q, cu_k, scale=0.4, causal=causal)
    for actual, wanted in zip(
        torch.autograd.grad(out, inputs, grad),
        torch.autograd.grad(wanted_out, exact, grad.double()),
        strict=True,
    ):
        assert actual.dtype == dtype
        assert_close(actual, wanted)


def test_the_published_widths_192_and_128_need_no_padding(rng: torch.Generator) -> None:
    case = random_case(rng, "packed", widths=(2, 192, 128))
    out, _ = ops.mla_prefill(*case, scale=192**-0.5)
    assert out.shape == (11, 2, 128)
    assert_close(out, dense(*case, scale=192**-0.5, causal=True)[0])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", ["packed", "queries_without_keys", "empty_sequences"])
def test_gradients_match_finite_differences(causal: bool, lengths: str, rng: torch.Generator) -> None:
    *inputs, cu_q, cu_k = random_case(rng, lengths, dtype=torch.float64, widths=(1, 2, 1))
    assert_gradients(
        lambda q, k, v: ops.mla_prefill(q, k, v, cu_q, cu_k, scale=0.7, causal=causal)[0], *inputs
    )


def test_a_query_that_sees_nothing_has_out_zero_and_lse_minus_infinity(rng: torch.Generator) -> None:
    out, lse = ops.mla_prefill(*random_case(rng, "queries_without_keys"), scale=1.0)
    assert_same(out[:4], torch.zeros(4, 2, 4))
    assert_same(lse[:4], torch.full((4, 2), -torch.inf))
    assert lse[4:7].isfinite().all()


@pytest.mark.parametrize("num_key_heads", [1, 2, 3])
def test_heads_that_share_keys_are_as_good_as_copies_of_them(
    num_key_heads: int, rng: torch.Generator
) -> None:
    q, *_ = random_case(rng, "keys_before", widths=(6, 5, 3))
    _, k, v, *ends = random_case(rng, "keys_before", widths=(num_key_heads, 5, 3))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    shared_out, shared_lse = ops.mla_prefill(q, k, v, *ends, scale=0.4)
    k_copies, v_copies = (x.repeat_interleave(6 // num_key_heads, dim=1) for x in (k, v))
    out, lse = ops.mla_prefill(q, k_copies, v_copies, *ends, scale=0.4)
    assert_same(shared_out, out)
    assert_same(shared_lse, lse)
    shared_grads = torch.autograd.grad(shared_out.square().sum(), (q, k, v))
    for actual, wanted in zip(shared_grads, torch.autograd.grad(out.square().sum(), (q, k, v)), strict=True):
        assert_close(actual, wanted)


def test_the_last_query_sees_every_key(rng: torch.Generator) -> None:
    q, k, v, cu_q, cu_k = random_case(rng, "keys_before")
    out, lse = ops.mla_prefill(q, k, v, cu_q, cu_k, scale=1.0, causal=True)
    free_out, free_lse = ops.mla_prefill(q, k, v, cu_q, cu_k, scale=1.0, causal=False)
    assert_close(out[[1, -1]], free_out[[1, -1]])
    assert_close(lse[[1, -1]], free_lse[[1, -1]])


@pytest.mark.parametrize("causal", [True, False])
def test_nan_never_crosses_into_another_sequence(causal: bool, rng: torch.Generator) -> None:
    q, k, v, cu_q, cu_k = random_case(rng, "packed")
    poisoned = [x.clone() for x in (q, k, v)]
    for x in poisoned:
        x[3] = torch.nan  # the whole second sequence
        x.requires_grad_()
    others = [0, 1, 2, *range(4, 11)]
    out, _ = ops.mla_prefill(*poisoned, cu_q, cu_k, scale=1.0, causal=causal)
    assert_same(out[others], ops.mla_prefill(q, k, v, cu_q, cu_k, scale=1.0, causal=causal)[0][others])
    for grad in torch.autograd.grad(out.sum(), poisoned):
        assert grad[others].isfinite().all()


def test_scores_beyond_float32_exp_stay_finite(rng: torch.Generator) -> None:
    *inputs, cu_q, cu_k = random_case(rng, "packed")
    inputs = [(x * 30).requires_grad_() for x in inputs]
    out, _ = ops.mla_prefill(*inputs, cu_q, cu_k, scale=1.0)
    assert out.isfinite().all()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), inputs))


def test_lse_carries_no_gradient(rng: torch.Generator) -> None:
    *inputs, cu_q, cu_k = random_case(rng, "packed")
    _, lse = ops.mla_prefill(*(x.requires_grad_() for x in inputs), cu_q, cu_k, scale=1.0)
    assert not lse.requires_grad


def test_strides_change_little(rng: torch.Generator) -> None:
    *inputs, cu_q, cu_k = random_case(rng, "packed")
    strided = [with_strides(x).requires_grad_() for x in inputs]
    plain = [x.clone().requires_grad_() for x in inputs]
    outs = [ops.mla_prefill(*x, cu_q, cu_k, scale=1.0)[0] for x in (strided, plain)]
    assert_close(*outs)
    grads = [
        torch.autograd.grad(out.square().sum(), x) for out, x in zip(outs, (strided, plain), strict=True)
    ]
    for actual, wanted in zip(*grads, strict=True):
        assert_close(actual, wanted)


@pytest.mark.parametrize("lengths", ["packed", "queries_without_keys", "nothing"])
@pytest.mark.parametrize("causal", [True, False])
def test_it_is_a_proper_op(lengths: str, causal: bool, rng: torch.Generator) -> None:
    *inputs, cu_q, cu_k = random_case(rng, lengths)
    outputs = torch.ops.dscoder.mla_prefill.default(*inputs, cu_q, cu_k, 0.5, causal, False, "auto")
    grad = torch.randn_like(outputs[0])
    args = (grad, [*inputs, *outputs], cu_q, cu_k, 0.5, causal, False, "auto")
    assert_op_registered(torch.ops.dscoder.mla_prefill_backward.default, args)
    args = (*(x.requires_grad_() for x in inputs), cu_q, cu_k, 0.5, causal, False, "auto")
    assert_op_registered(torch.ops.dscoder.mla_prefill.default, args)


def test_it_compiles_whole(rng: torch.Generator) -> None:
    *inputs, cu_q, cu_k = random_case(rng, "packed")
    inputs = [x.requires_grad_() for x in inputs]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.mla_prefill(q * 2, k, v, cu_q, cu_k, scale=0.3)[0]

    actual = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=True)(*inputs)
    wanted = attend(*inputs)
    assert_same(actual, wanted)
    for got, want in zip(
        torch.autograd.grad(actual.sum(), inputs), torch.autograd.grad(wanted.sum(), inputs), strict=True
    ):
        assert_same(got, want)


Q, K, V, CU = torch.zeros(4, 2, 6), torch.zeros(5, 2, 6), torch.zeros(5, 2, 3), torch.zeros(2).int()


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"q": Q.int()}, TypeError, "q must be float32 or .*, got int32"),
        ({"q": Q[0]}, ValueError, r"q must have 3 dimensions, got shape \(2, 6\)"),
        ({"k": K.half()}, TypeError, "k must be float32, got float16"),
        ({"k": K[..., :1]}, ValueError, r"k must have shape \(5, 2, 6\), got \(5, 2, 1\)"),
        ({"k": K[:, :1]}, ValueError, r"v must have shape \(5, 1, 3\), got \(5, 2, 3\)"),
        ({"q": Q[:, :1]}, ValueError, "k must have heads that divide 1, those of q, got 2"),
        ({"k": K[:, :0]}, ValueError, "k must have heads that divide 2, those of q, got 0"),
        ({"q": Q[:, :0]}, ValueError, "k must have heads that divide 0, those of q, got 2"),
        ({"v": V.double()}, TypeError, "v must be float32, got float64"),
        ({"v": V[:4]}, ValueError, r"v must have shape \(5, 2, 3\), got \(4, 2, 3\)"),
        ({"cu_q": CU.long()}, TypeError, "cu_seqlens_q must be int32, got int64"),
        ({"cu_q": CU[None]}, ValueError, r"cu_seqlens_q must have 1 dimensions, got shape \(1, 2\)"),
        ({"cu_q": CU[:0]}, ValueError, "cu_seqlens_q must have at least one element, got 0"),
        ({"cu_k": CU.float()}, TypeError, "cu_seqlens_k must be int32, got float32"),
        ({"cu_k": CU[:1]}, ValueError, r"cu_seqlens_k must have shape \(2,\), got \(1,\)"),
        ({"v": V.to("meta")}, ValueError, "v must be on cpu like q, got meta"),
    ],
)
def test_wrong_arguments_are_named(changed: dict[str, Tensor], error: type[Exception], message: str) -> None:
    arguments = {"q": Q, "k": K, "v": V, "cu_q": CU, "cu_k": CU, **changed}
    with pytest.raises(error, match=f"^mla_prefill: {message}$"):
        ops.mla_prefill(*arguments.values(), scale=1.0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"cu_q": [0, 5]}, r"cu_seqlens_q must ascend within 0 and 4, the rows, got \[0, 5\]"),
        ({"cu_q": [-1, 4]}, r"cu_seqlens_q must ascend within 0 and 4, the rows, got \[-1, 4\]"),
        ({"cu_k": [0, 6]}, r"cu_seqlens_k must ascend within 0 and 5, the rows, got \[0, 6\]"),
        (
            {"cu_q": [0, 3, 4], "cu_k": [0, 5, 2]},
            r"cu_seqlens_k must ascend within 0 and 5, the rows, got \[0, 5, 2\]",
        ),
    ],
)
def test_the_reference_refuses_ends_that_are_none(changed: dict[str, list[int]], message: str) -> None:
    ends = {"cu_q": [0, 4], "cu_k": [0, 5], **changed}
    with pytest.raises(ValueError, match=f"^mla_prefill: {message}$"):
        ops.mla_prefill(Q, K, V, *(torch.tensor(x, dtype=torch.int32) for x in ends.values()), scale=1.0)


@pytest.mark.parametrize(("causal", "name"), [("no", "str"), (None, "NoneType"), (1, "int")])
def test_causal_is_yes_or_no(causal: bool, name: str) -> None:
    with pytest.raises(TypeError, match=f"^mla_prefill: causal must be bool, got {name}$"):
        ops.mla_prefill(Q, K, V, CU, CU, scale=1.0, causal=causal)
