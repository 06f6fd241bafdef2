from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dscoder import ops
from dscoder.ops import PermuteHandle
from dscoder.testing import gpu
from dscoder.testing.cases import randn, routing
from dscoder.testing.compare import assert_close, assert_gradients, assert_op_registered, assert_same
from dscoder.testing.poison import poison_rows_from, with_strides

NUM_EXPERTS, WIDTH, EXPERT_WIDTH = 5, 6, 4
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ROUTES = ("uniform", "one_hot", "half_empty", "some_dropped", "all_dropped", "no_tokens")


def choices(rng: torch.Generator, route: str, num_tokens: int = 9) -> Tensor:
    """idx_TK, K = 2."""
    kind = route if route in ("one_hot", "half_empty") else "uniform"
    num_tokens = 0 if route == "no_tokens" else num_tokens
    idx = routing(rng, num_tokens=num_tokens, num_experts=NUM_EXPERTS, num_topk=2, kind=kind)
    if route == "some_dropped":
        idx[1, 0] = idx[3] = -1
    return torch.full_like(idx, -1) if route == "all_dropped" else idx


def weights(rng: torch.Generator, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    gate_up = randn(rng, NUM_EXPERTS, 2 * EXPERT_WIDTH, WIDTH, dtype=dtype)
    return gate_up, randn(rng, NUM_EXPERTS, WIDTH, EXPERT_WIDTH, dtype=dtype)


def by_choice(x: Tensor, gate_up: Tensor, down: Tensor, idx: Tensor) -> Tensor:
    """The definition, one choice at a time in float64: [T, K, D], zero where a choice was dropped."""
    out = torch.zeros(*idx.shape, x.shape[1], dtype=torch.float64)
    for t, k in (idx >= 0).nonzero().tolist():
        expert = int(idx[t, k])
        gate, up = (gate_up[expert].double() @ x[t].double()).chunk(2)
        out[t, k] = down[expert].double() @ (F.silu(gate) * up)
    return out


def by_row(y_TKD: Tensor, row_TK: Tensor) -> Tensor:
    """Choices [T, K, D] in expert order, dropped ones behind them."""
    y_MD = torch.zeros(row_TK.numel(), y_TKD.shape[2], dtype=y_TKD.dtype)
    for t, k in (row_TK >= 0).nonzero().tolist():
        y_MD[row_TK[t, k]] = y_TKD[t, k]
    return y_MD


def maps(idx: Tensor) -> PermuteHandle:
    return ops.moe_permute_maps(idx, num_experts=NUM_EXPERTS)


@pytest.mark.parametrize("gathers", [None, False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("route", ROUTES)
def test_every_row_goes_through_its_experts_network(
    route: str, dtype: torch.dtype, gathers: bool | None, rng: torch.Generator
) -> None:
    idx = choices(rng, route)
    x, (gate_up, down) = randn(rng, len(idx), WIDTH, dtype=dtype), weights(rng, dtype)
    handle = maps(idx)
    y = ops.moe_experts(x, gate_up, down, handle, gathers=gathers)
    assert y.dtype == dtype
    assert_close(y, by_row(by_choice(x, gate_up, down, idx), handle.row_TK))


def test_rows_in_expert_order_come_with_their_offsets_alone(rng: torch.Generator) -> None:
    idx, x, (gate_up, down) = choices(rng, "some_dropped"), randn(rng, 9, WIDTH), weights(rng)
    rows, handle = ops.moe_permute(x, idx, num_experts=NUM_EXPERTS)
    assert_same(
        ops.moe_experts(rows, gate_up, down, handle.offsets_E), ops.moe_experts(x, gate_up, down, handle)
    )


@pytest.mark.parametrize("gathers", [False, True])
@pytest.mark.parametrize("route", ROUTES)
def test_gradients_match_finite_differences(route: str, gathers: bool, rng: torch.Generator) -> None:
    handle = maps(choices(rng, route, num_tokens=4))
    num_tokens = handle.row_TK.shape[0]
    x = randn(rng, num_tokens, WIDTH, dtype=torch.float64)
    assert_gradients(
        lambda *tensors: ops.moe_experts(*tensors, handle, gathers=gathers),
        x,
        *weights(rng, torch.float64),
    )


def test_gradients_of_rows_match_finite_differences(rng: torch.Generator) -> None:
    offsets = torch.tensor([2, 2, 3, 5, 5], dtype=torch.int32)
    rows = randn(rng, 6, WIDTH, dtype=torch.float64)
    assert_gradients(lambda *tensors: ops.moe_experts(*tensors, offsets), rows, *weights(rng, torch.float64))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_each_gradient_can_be_had_alone(wanted: tuple[int, ...], rng: torch.Generator) -> None:
    handle = maps(choices(rng, "uniform"))
    inputs = [randn(rng, 9, WIDTH), *weights(rng)]
    every = gpu.forward_and_backward(lambda *tensors: ops.moe_experts(*tensors, handle))(*inputs)[1:]
    leaves = [x.requires_grad_() if i in wanted else x for i, x in enumerate(inputs)]
    y = ops.moe_experts(*leaves, handle)
    grad = (torch.arange(y.numel()) % 17 - 8).div(8).view_as(y)
    for i, got in zip(wanted, torch.autograd.grad(y, [leaves[i] for i in wanted], grad), strict=True):
        assert_same(got, every[i])


def test_rows_of_no_expert_are_not_read_and_come_out_zero(rng: torch.Generator) -> None:
    rows = poison_rows_from(randn(rng, 9, WIDTH), 4).requires_grad_()
    gate_up, down = (w.requires_grad_() for w in weights(rng))
    offsets = torch.tensor([1, 1, 3, 4, 4], dtype=torch.int32)
    y = ops.moe_experts(rows, gate_up, down, offsets)
    assert y.isfinite().all()
    assert_same(y[4:], torch.zeros(5, WIDTH))
    grads = torch.autograd.grad(y, (rows, gate_up, down), poison_rows_from(torch.ones(9, WIDTH), 4))
    assert all(grad.isfinite().all() for grad in grads)
    assert_same(grads[0][4:], torch.zeros(5, WIDTH))


def test_nan_stays_with_its_token_and_its_experts(rng: torch.Generator) -> None:
    idx = torch.tensor([[0, 1], [2, 3], [2, 4]], dtype=torch.int32)
    x, (gate_up, down) = randn(rng, 3, WIDTH), (w.requires_grad_() for w in weights(rng))
    x[0, 0] = torch.nan
    handle = maps(idx)
    y = ops.moe_experts(x, gate_up, down, handle)
    rows = handle.row_TK[1:].flatten().long()
    assert y[rows].isfinite().all()
    for grad in torch.autograd.grad(y[rows].sum(), (gate_up, down)):
        assert grad[2:].isfinite().all()


def test_strides_change_nothing(rng: torch.Generator) -> None:
    handle, x, (gate_up, down) = maps(choices(rng, "uniform")), randn(rng, 9, WIDTH), weights(rng)
    spread = PermuteHandle(
        offsets_E=with_strides(handle.offsets_E),
        row_TK=with_strides(handle.row_TK),
        token_M=with_strides(handle.token_M),
    )
    step = gpu.forward_and_backward(lambda *tensors: ops.moe_experts(*tensors, spread))
    wanted = gpu.forward_and_backward(lambda *tensors: ops.moe_experts(*tensors, handle))(x, gate_up, down)
    gpu.assert_agrees(step(with_strides(x), with_strides(gate_up), with_strides(down)), wanted)


def kept(function: Callable[[], Tensor]) -> dict[int, int]:
    """Elements of each tensor that `function` keeps for a backward pass, by where it lies."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        sizes[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sizes


@pytest.mark.parametrize("gathers", [False, True])
def test_what_is_kept_for_the_gradient_is_what_the_docstring_says(
    gathers: bool, rng: torch.Generator
) -> None:
    handle = maps(choices(rng, "uniform"))
    num_rows = handle.row_TK.numel()
    x, gate_up, down = (tensor.requires_grad_() for tensor in (randn(rng, 9, WIDTH), *weights(rng)))
    sizes = kept(lambda: ops.moe_experts(x, gate_up, down, handle, gathers=gathers))
    inputs = {t.data_ptr() for t in (gate_up, down, handle.row_TK, handle.offsets_E)}
    assert inputs <= set(sizes)
    rest = sorted(size for place, size in sizes.items() if place not in inputs)
    x_or_rows, token = (x.numel(), [num_rows]) if gathers else (num_rows * WIDTH, [])
    assert rest == sorted([*token, x_or_rows, num_rows * 2 * EXPERT_WIDTH, num_rows * EXPERT_WIDTH])


def test_without_a_gradient_nothing_between_the_products_comes_out(rng: torch.Generator) -> None:
    offsets = torch.tensor([1, 2, 3, 4, 5], dtype=torch.int32)
    args = (randn(rng, 5, WIDTH), *weights(rng), offsets, None, None)
    y, gate_up, hidden = torch.ops.dscoder.moe_experts.default(*args, False, "auto")
    assert gate_up.numel() == hidden.numel() == 0
    assert_same(torch.ops.dscoder.moe_experts.default(*args, True, "auto")[0], y)


def test_a_gradient_of_what_kept_nothing_is_refused(rng: torch.Generator) -> None:
    offsets = torch.tensor([1, 2, 3, 4, 5], dtype=torch.int32)
    args = (randn(rng, 5, WIDTH).requires_grad_(), *weights(rng), offsets, None, None, False, "auto")
    with pytest.raises(ValueError, match=r"^moe_experts: keeps must be True where .*, got False$"):
        torch.ops.dscoder.moe_experts.default(*args)


@pytest.mark.parametrize("gathers", [False, True])
def test_a_gradient_of_the_gradient_is_refused_by_name(gathers: bool, rng: torch.Generator) -> None:
    x = randn(rng, 9, WIDTH).requires_grad_()
    y = ops.moe_experts(x, *weights(rng), maps(choices(rng, "uniform")), gathers=gathers)
    with pytest.raises(RuntimeError, match=r"^moe_experts: the gradient must not be differentiated again"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@pytest.mark.parametrize("route", ["some_dropped", "no_tokens"])
def test_they_are_proper_ops(route: str, rng: torch.Generator) -> None:
    handle = maps(choices(rng, route))
    num_tokens, num_rows = handle.row_TK.shape[0], handle.row_TK.numel()
    token = torch.zeros(num_rows, dtype=torch.int32)
    x, gate_up, down = (t.requires_grad_() for t in (randn(rng, num_tokens, WIDTH), *weights(rng)))
    library = torch.ops.dscoder
    for keeps, tensors in (
        (True, (x, gate_up, down)),
        (False, (x.detach(), gate_up.detach(), down.detach())),
    ):
        args = (*tensors, handle.offsets_E, handle.row_TK, token, keeps, "auto")
        assert_op_registered(library.moe_experts.default, args)
    rows = torch.zeros(num_rows, WIDTH).requires_grad_()
    assert_op_registered(
        library.moe_experts.default, (rows, gate_up, down, handle.offsets_E, None, None, True, "auto")
    )
    assert_op_registered(library.moe_experts_rows.default, (x, handle.row_TK, token))
    between = torch.zeros(num_rows, 2 * EXPERT_WIDTH)
    assert_op_registered(
        library.moe_experts_gate_up_gradient.default,
        (rows.detach(), down.detach(), between, handle.offsets_E, "auto"),
    )


@pytest.mark.parametrize("gathers", [False, True])
def test_it_compiles_whole_between_gate_and_unpermute(gathers: bool, rng: torch.Generator) -> None:
    inputs = (randn(rng, 9, WIDTH), *weights(rng))
    gate = randn(rng, NUM_EXPERTS, WIDTH)

    def layer(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        idx, weight = ops.moe_gate(x @ gate.t(), num_topk=2)
        handle = ops.moe_permute_maps(idx, num_experts=NUM_EXPERTS)
        return ops.moe_unpermute(ops.moe_experts(x, gate_up, down, handle, gathers=gathers), weight, handle)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    gpu.assert_agrees(gpu.forward_and_backward(compiled)(*inputs), gpu.forward_and_backward(layer)(*inputs))
    with torch.no_grad():
        assert_close(compiled(*inputs), layer(*inputs))


X = torch.zeros(3, WIDTH)
GATE_UP = torch.zeros(NUM_EXPERTS, 2 * EXPERT_WIDTH, WIDTH)
DOWN = torch.zeros(NUM_EXPERTS, WIDTH, EXPERT_WIDTH)
OFFSETS, ROW = torch.zeros(NUM_EXPERTS, dtype=torch.int32), torch.zeros(3, 2, dtype=torch.int32)
TOKEN = torch.zeros(6, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": X.int()}, TypeError, "x must be float32 or .*, got int32"),
        ({"x": X[0]}, ValueError, r"x must have 2 dimensions, got shape \(6,\)"),
        ({"gate_up": GATE_UP.half()}, TypeError, "gate_up must be float32, got float16"),
        ({"gate_up": GATE_UP[:, 1:]}, ValueError, r"gate_up must have shape \(5, 8, 6\), got \(5, 7, 6\)"),
        ({"gate_up": GATE_UP[0]}, ValueError, r"gate_up must have 3 dimensions, got shape \(8, 6\)"),
        ({"down": DOWN.half()}, TypeError, "down must be float32, got float16"),
        ({"down": DOWN[0]}, ValueError, r"down must have 3 dimensions, got shape \(6, 4\)"),
        ({"x": X[:, :5]}, ValueError, r"down must have shape \(5, 5, 4\), got \(5, 6, 4\)"),
        ({"offsets": OFFSETS.long()}, TypeError, "offsets must be int32, got int64"),
        ({"offsets": OFFSETS[:4]}, ValueError, r"offsets must have shape \(5,\), got \(4,\)"),
        ({"row": ROW.long()}, TypeError, "row must be int32, got int64"),
        ({"token": TOKEN.long()}, TypeError, "token must be int32, got int64"),
        ({"token": TOKEN[:5]}, ValueError, r"token must have shape \(6,\), got \(5,\)"),
        ({"token": TOKEN.to("meta")}, ValueError, "token must be on cpu like x, got meta"),
        ({"row": ROW[:2]}, ValueError, r"row must have shape \(3, 2\), got \(2, 2\)"),
        ({"down": DOWN.to("meta")}, ValueError, "down must be on cpu like x, got meta"),
        ({"row": ROW.to("meta")}, ValueError, "row must be on cpu like x, got meta"),
    ],
)
def test_wrong_arguments_are_named(changed: dict[str, Tensor], error: type[Exception], message: str) -> None:
    named = {"x": X, "gate_up": GATE_UP, "down": DOWN, "offsets": OFFSETS, "row": ROW, "token": TOKEN}
    named |= changed
    handle = PermuteHandle(offsets_E=named["offsets"], row_TK=named["row"], token_M=named["token"])
    with pytest.raises(error, match=f"^moe_experts: {message}$"):
        ops.moe_experts(named["x"], named["gate_up"], named["down"], handle)


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("sm70", "arch must be one of auto, sm80, sm90, reference, got 'sm70'"),
        ("sm80", "arch must be auto or reference on cpu, got sm80"),
    ],
)
def test_an_arch_that_cannot_be_had_is_named(arch: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^moe_experts: {message}$"):
        ops.moe_experts(X, GATE_UP, DOWN, OFFSETS, arch=arch)
