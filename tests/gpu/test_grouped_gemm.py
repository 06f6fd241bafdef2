"""grouped_gemm on a GPU: kernels of each arch give the reference's answer, and keep out of the host's way."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from dscoder import ops
from dscoder.ops.grouped_gemm import product_in_pieces
from dscoder.testing import gpu
from dscoder.testing.cases import ROUTINGS, generator, randn, routing
from dscoder.testing.compare import assert_close, assert_op_registered, assert_product, assert_same
from dscoder.testing.poison import poison_rows_from, with_strides

DTYPES = [torch.bfloat16, torch.float16]
# N, K of the products of V2-Lite (up, down, their input gradients) and of V2.
WIDTHS = [
    *((2816, 2048), (2048, 1408), (2048, 2816), (1408, 2048)),
    *((3072, 5120), (5120, 1536), (5120, 3072), (1536, 5120)),
]
SMALL = (40, 136)  # N, K: a column tile and a block of the depth, both in part
SAMPLED = 64  # rows of an expert that large results are compared in


ARCHS = gpu.archs()


def ends_of(counts: Sequence[int]) -> Tensor:
    return torch.tensor(counts).cumsum(0).to(torch.int32)


def ends_of_routing(rng: torch.Generator, num_tokens: int, kind: str) -> Tensor:
    """END offsets of V2-Lite's 64 experts for T tokens of 6 choices each."""
    idx = routing(rng, num_tokens=num_tokens, num_experts=64, num_topk=6, kind=kind)
    return ops.moe_permute_maps(idx, num_experts=64).offsets_E


def step(arch: str) -> gpu.Step:
    def product(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
        return ops.grouped_gemm(x, w, offsets, arch=arch if x.is_cuda else "auto")

    return gpu.forward_and_backward(product)


def operands(
    rng: torch.Generator, num_rows: int, num_experts: int, widths: tuple[int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    num_columns, depth = widths
    x = randn(rng, num_rows, depth, dtype=dtype)
    return x, (randn(rng, num_experts, num_columns, depth) / depth**0.5).to(dtype)


def counts_of(offsets: Tensor) -> list[int]:
    counts: list[int] = offsets.diff(prepend=offsets.new_zeros(1)).tolist()
    return counts


def sample(count: int, device: torch.device) -> Tensor:
    """Up to SAMPLED of `count` rows, the first and the last among them."""
    return torch.linspace(0, max(count - 1, 0), min(count, SAMPLED), device=device).long()


def check_on_gpu(arch: str, x: Tensor, w: Tensor, offsets: Tensor, rng: torch.Generator) -> None:
    """y, grad_x and grad_w, a sample of each expert's rows, beside float64: on the GPU, for it is quicker."""
    grad = randn(rng, len(x), w.shape[1], dtype=x.dtype)
    leaves = [x.requires_grad_(), w.requires_grad_()]
    gpu.poison_free_memory()
    y = ops.grouped_gemm(*leaves, offsets, arch=arch)
    grad_x, grad_w = torch.autograd.grad(y, leaves, grad)
    x, w, y = x.detach(), w.detach(), y.detach()
    for got in (y, grad_x, grad_w):
        assert got.dtype == x.dtype
        assert got.isfinite().all()
    counts, column = counts_of(offsets), sample(w.shape[1], x.device)
    rows = [sample(count, x.device) for count in counts]
    found: list[list[Tensor]] = [[], [], []]
    wanted: list[list[Tensor]] = [[], [], []]
    pieces = zip(*(tensor.split(counts) for tensor in (x, grad, y, grad_x)), w, grad_w, rows, strict=True)
    for x_e, grad_e, y_e, grad_x_e, w_e, grad_w_e, row in pieces:
        for kept, got in zip(found, (y_e[row], grad_x_e[row], grad_w_e[column]), strict=True):
            kept.append(got)
        wanted[0].append(x_e[row].double() @ w_e.double().T)
        wanted[1].append(grad_e[row].double() @ w_e.double())
        wanted[2].append(grad_e[:, column].double().T @ x_e.double())
    for got_e, want_e in zip(found, wanted, strict=True):
        assert_product(torch.cat(got_e), torch.cat(want_e))


@pytest.fixture
def gpu_rng(request: pytest.FixtureRequest) -> torch.Generator:
    return generator(request.node.nodeid, gpu.DEVICE)


@pytest.mark.sanitize("memcheck", "synccheck")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", ARCHS)
def test_a_few_rows(arch: str, dtype: torch.dtype, rng: torch.Generator) -> None:
    x, w = operands(rng, 150, 5, SMALL, dtype)
    gpu.assert_is_reference(step(arch), x, w, ends_of([1, 0, 130, 17, 0]))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("widths", WIDTHS)
def test_the_published_widths(widths: tuple[int, int], arch: str, gpu_rng: torch.Generator) -> None:
    counts = [129, 0, 1, 300, 64, 63, 0, 255]
    x, w = operands(gpu_rng, sum(counts), 8, widths, torch.bfloat16)
    check_on_gpu(arch, x, w, ends_of(counts).to(gpu.DEVICE), gpu_rng)


def check_layer_of_v2_lite(
    arch: str, num_tokens: int, kind: str, widths: tuple[int, int], rng: torch.Generator
) -> None:
    x, w = operands(rng, 6 * num_tokens, 64, widths, torch.bfloat16)
    check_on_gpu(arch, x, w, ends_of_routing(rng, num_tokens, kind), rng)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kind", ROUTINGS)
@pytest.mark.parametrize("widths", [(2816, 2048), (2048, 1408)])
@pytest.mark.parametrize("num_tokens", [1, 2, 8, 32, 128, 512, 1024, 2048, 8192])
def test_routings_of_v2_lite(
    num_tokens: int, widths: tuple[int, int], kind: str, arch: str, gpu_rng: torch.Generator
) -> None:
    check_layer_of_v2_lite(arch, num_tokens, kind, widths, gpu_rng)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("num_tokens", [1024, 8192])
def test_all_widths_with_many_rows(
    num_tokens: int, widths: tuple[int, int], arch: str, gpu_rng: torch.Generator
) -> None:
    """V2's widths with 20 experts, those of a rank of eight."""
    if widths in WIDTHS[:4]:
        return check_layer_of_v2_lite(arch, num_tokens, "uniform", widths, gpu_rng)
    idx = routing(gpu_rng, num_tokens=num_tokens, num_experts=20, num_topk=6)
    offsets = ops.moe_permute_maps(idx, num_experts=20).offsets_E
    x, w = operands(gpu_rng, 6 * num_tokens, 20, widths, torch.bfloat16)
    check_on_gpu(arch, x, w, offsets, gpu_rng)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("num_tokens", [4096, 16384, 32768])
def test_large_batches(num_tokens: int, arch: str, gpu_rng: torch.Generator) -> None:
    check_layer_of_v2_lite(arch, num_tokens, "skewed", (2816, 2048), gpu_rng)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("count", [63, 64, 65, 127, 128, 129, 255, 256, 257, 383, 385])
def test_every_expert_with_rows_about_a_multiple_of_a_tile(
    count: int, arch: str, gpu_rng: torch.Generator
) -> None:
    x, w = operands(gpu_rng, 64 * count, 64, (1408, 2048), torch.bfloat16)
    check_on_gpu(arch, x, w, ends_of([count] * 64).to(gpu.DEVICE), gpu_rng)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("more", [-1, 0, 1])
@pytest.mark.parametrize("tile", [8, 16, 64, 128, 256])
def test_rows_about_a_multiple_of_a_tile(tile: int, more: int, arch: str, rng: torch.Generator) -> None:
    counts = [tile + more, 2 * tile + more, 0, 3 * tile - more]
    gpu.assert_is_reference(
        step(arch), *operands(rng, sum(counts), 4, SMALL, torch.bfloat16), ends_of(counts)
    )


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("widths", [(8, 8), (8, 4096), (4096, 8), (264, 72), (1000, 520)])
def test_widths_that_fill_no_tile(widths: tuple[int, int], arch: str, rng: torch.Generator) -> None:
    x, w = operands(rng, 77, 3, widths, torch.bfloat16)
    gpu.assert_is_reference(step(arch), x, w, ends_of([20, 0, 57]))


@pytest.mark.parametrize("arch", ARCHS)
def test_rows_of_no_expert_are_not_read_and_come_out_zero(arch: str, rng: torch.Generator) -> None:
    x, w = operands(rng, 300, 4, SMALL, torch.bfloat16)
    x = poison_rows_from(x, 131).to(gpu.DEVICE)
    offsets = ends_of([1, 100, 0, 30]).to(gpu.DEVICE)
    grad = poison_rows_from(torch.ones(300, 40, dtype=torch.bfloat16), 131).to(gpu.DEVICE)
    leaves = [x.requires_grad_(), w.to(gpu.DEVICE).requires_grad_()]
    y = ops.grouped_gemm(*leaves, offsets, arch=arch)
    grad_x, grad_w = torch.autograd.grad(y, leaves, grad)
    assert y.isfinite().all()
    assert grad_w.isfinite().all()
    assert not y[131:].any()
    assert not grad_x[131:].any()
    assert not grad_w[2].any()


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("offsets", [[-9, 2, 3], [2, 99, 2**31 - 1], [3, 1, 2], [0, 0, 0]])
def test_wild_offsets_stay_within_the_rows(offsets: list[int], arch: str, rng: torch.Generator) -> None:
    x, w = operands(rng, 70, 3, SMALL, torch.bfloat16)
    gpu.assert_is_reference(step(arch), x, w, torch.tensor(offsets, dtype=torch.int32))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("num_rows", [0, 1])
def test_hardly_any_rows(num_rows: int, arch: str, rng: torch.Generator) -> None:
    x, w = operands(rng, num_rows, 3, SMALL, torch.bfloat16)
    gpu.assert_is_reference(step(arch), x, w, ends_of([0, num_rows, 0]))


@pytest.mark.parametrize("arch", ARCHS)
def test_as_many_experts_as_there_can_be(arch: str, rng: torch.Generator) -> None:
    x, w = operands(rng, 700, 512, SMALL, torch.bfloat16)
    counts = torch.randint(0, 700, (700,), generator=rng).remainder(512).bincount(minlength=512)
    gpu.assert_is_reference(step(arch), x, w, ends_of(counts.tolist()))


@pytest.mark.parametrize("arch", ARCHS)
def test_strides_and_boundaries_change_nothing(arch: str, rng: torch.Generator) -> None:
    x, w = (tensor.to(gpu.DEVICE) for tensor in operands(rng, 100, 3, SMALL, torch.bfloat16))
    offsets = ends_of([50, 0, 50]).to(gpu.DEVICE)
    wanted = ops.grouped_gemm(x, w, offsets, arch=arch)
    shifted = x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)
    for strange in (with_strides(x), shifted):
        assert_same(ops.grouped_gemm(strange, w, with_strides(offsets), arch=arch), wanted)
    for strange in (with_strides(w), w.mT.contiguous().mT):
        assert_close(ops.grouped_gemm(x, strange, offsets, arch=arch), wanted)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arch", ARCHS)
def test_the_weight_gradient_by_itself(
    arch: str, dtype: torch.dtype, accumulate: bool, rng: torch.Generator
) -> None:
    def run(grad: Tensor, x: Tensor, offsets: Tensor, out: Tensor) -> Tensor:
        on_gpu = grad.device.type == gpu.DEVICE
        return ops.grouped_gemm_weight_gradient(
            *(grad, x, offsets), out=out.clone(), accumulate=accumulate, arch=arch if on_gpu else "auto"
        )

    x, out = operands(rng, 700, 4, (264, 136), torch.bfloat16)
    grad = randn(rng, 700, 264, dtype=torch.bfloat16)
    offsets = ends_of([257, 0, 300, 1])
    inputs = [poison_rows_from(grad, 558), poison_rows_from(x, 558), offsets, out.to(dtype)]
    got = run(*(tensor.to(gpu.DEVICE) for tensor in inputs))
    assert got.dtype == dtype
    wanted = run(*(t.double() if t.is_floating_point() else t for t in inputs))
    assert_close(got, wanted)


@pytest.mark.parametrize(
    ("dtype", "widths"),
    [
        (torch.float32, (40, 136)),
        (torch.float64, (5, 7)),
        (torch.bfloat16, (5, 136)),
        (torch.float16, (8, 7)),
    ],
)
def test_what_kernels_cannot_do_runs_the_reference_without_waiting(
    dtype: torch.dtype, widths: tuple[int, int], rng: torch.Generator
) -> None:
    inputs = (*operands(rng, 300, 4, widths, dtype), ends_of([257, 0, 30, 1]))
    gpu.assert_is_reference(step("auto"), *inputs)
    gpu.assert_never_waits(step("auto"), *inputs)
    gpu.assert_same_bits_every_time(step("auto"), *inputs)
    gpu.assert_replay_follows(step("auto"), inputs, (*inputs[:2], ends_of([0, 0, 0, 300])))


@pytest.mark.parametrize("arch", ARCHS)
def test_the_reference_can_be_asked_for(arch: str, rng: torch.Generator) -> None:
    x, w = (tensor.to(gpu.DEVICE) for tensor in operands(rng, 100, 3, SMALL, torch.bfloat16))
    offsets = ends_of([50, 0, 50]).to(gpu.DEVICE)
    got = ops.grouped_gemm(x, w, offsets, arch="reference")
    assert_same(got, product_in_pieces(x, w, offsets))
    assert_close(ops.grouped_gemm(x, w, offsets, arch=arch), got)


@pytest.mark.parametrize("arch", ARCHS)
def test_it_never_waits_for_the_gpu(arch: str, rng: torch.Generator) -> None:
    x, w = operands(rng, 300, 4, SMALL, torch.bfloat16)
    gpu.assert_never_waits(step(arch), x, w, ends_of([257, 0, 30, 1]))


@pytest.mark.parametrize("arch", ARCHS)
def test_a_captured_graph_follows_its_offsets(arch: str, rng: torch.Generator) -> None:
    runs = []
    for counts in ([257, 0, 30, 1], [0, 0, 0, 300], [75, 75, 75, 75], [0, 0, 0, 0], [1, 2, 3, 4]):
        runs.append((*operands(rng, 300, 4, SMALL, torch.bfloat16), ends_of(counts)))
    gpu.assert_replay_follows(step(arch), *runs)


@pytest.mark.parametrize("arch", ARCHS)
def test_it_runs_on_the_callers_stream(arch: str, rng: torch.Generator) -> None:
    inputs = (*operands(rng, 300, 4, SMALL, torch.bfloat16), ends_of([257, 0, 30, 1]))
    gpu.assert_runs_on_the_callers_stream(step(arch), *inputs)


@pytest.mark.parametrize("arch", ARCHS)
def test_the_same_bits_every_time(arch: str, rng: torch.Generator) -> None:
    inputs = (*operands(rng, 6000, 64, (528, 520), torch.bfloat16), ends_of_routing(rng, 1000, "skewed"))
    gpu.assert_same_bits_every_time(step(arch), *inputs)


def test_it_compiles_in_one_graph(rng: torch.Generator) -> None:
    offsets = ends_of([257, 0, 30, 1]).to(gpu.DEVICE)
    inputs = operands(rng, 300, 4, SMALL, torch.bfloat16)
    gpu.assert_compiles_whole(lambda x, w: ops.grouped_gemm(x * 2, w, offsets), *inputs)


def test_it_passes_opcheck(rng: torch.Generator) -> None:
    x, w = (t.to(gpu.DEVICE).requires_grad_() for t in operands(rng, 300, 4, SMALL, torch.bfloat16))
    offsets = ends_of([257, 0, 30, 1]).to(gpu.DEVICE)
    assert_op_registered(torch.ops.dscoder.grouped_gemm.default, (x, w, offsets, "auto"))
    grad, rows, out = x.new_ones(300, 40), x.detach(), w.detach()
    library = torch.ops.dscoder
    assert_op_registered(library.grouped_gemm_weight_gradient.default, (grad, rows, offsets, None, "auto"))
    args = (out.clone(), grad, rows, offsets, None, True, "auto")
    assert_op_registered(library.grouped_gemm_weight_gradient_into.default, args)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_chain_of_kernels_that_start_early_is_as_good_as_one_that_waits(
    arch: str, rng: torch.Generator
) -> None:
    """Each link reads what the link ahead has just written, into memory that is used again and again."""
    x, w = (t.to(gpu.DEVICE) for t in operands(rng, 3000, 8, (512, 512), torch.bfloat16))
    offsets = ends_of([375] * 8).to(gpu.DEVICE)

    def chain(x: Tensor, *, is_apart: bool) -> Tensor:
        for _ in range(20):
            x = ops.grouped_gemm(x, w, offsets, arch=arch)
            if is_apart:
                torch.cuda.synchronize()
        return x

    assert_same(chain(x, is_apart=False), chain(x, is_apart=True))


@pytest.mark.parametrize(
    ("dtype", "widths", "num_experts", "message"),
    [
        (torch.float32, (8, 8), 1, "arch sm80 wants x of bfloat16 or float16, got float32"),
        (torch.bfloat16, (12, 8), 1, "arch sm80 wants N to be a positive multiple of 8, got 12"),
        (torch.bfloat16, (8, 12), 1, "arch sm80 wants K to be a positive multiple of 8, got 12"),
        (torch.bfloat16, (8, 8), 513, "arch sm80 wants 1 to 512 experts, got 513"),
    ],
)
def test_kernels_that_were_asked_for_and_cannot_say_why(
    dtype: torch.dtype, widths: tuple[int, int], num_experts: int, message: str
) -> None:
    x = torch.zeros(2, widths[1], dtype=dtype, device=gpu.DEVICE)
    w = torch.zeros(num_experts, *widths, dtype=dtype, device=gpu.DEVICE)
    offsets = torch.zeros(num_experts, dtype=torch.int32, device=gpu.DEVICE)
    with pytest.raises(ValueError, match=f"^grouped_gemm: {message}$"):
        ops.grouped_gemm(x, w, offsets, arch="sm80")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_tensors_device_counts_not_the_current_one(rng: torch.Generator) -> None:
    inputs = (*operands(rng, 300, 4, SMALL, torch.bfloat16), ends_of([257, 0, 30, 1]))
    with torch.cuda.device(0):
        got = step("auto")(*(tensor.to("cuda:1") for tensor in inputs))
        assert torch.cuda.current_device() == 0
    gpu.assert_agrees(got, step("auto")(*inputs))
