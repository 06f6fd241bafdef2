"""The balance terms on a GPU, alone and fused with the gate: as the references, out of the host's way."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dscoder import ops
from dscoder.testing import gpu
from dscoder.testing.cases import randn
from dscoder.testing.compare import assert_close, assert_op_registered

SHAPES = [  # E, K, groups, kept
    (64, 6, 1, 1),  # V2-Lite
    (64, 16, 8, 8),
    (160, 6, 8, 3),  # V2
    (160, 16, 8, 5),
    (512, 16, 512, 100),
    (500, 16, 5, 2),
    (33, 16, 1, 1),
    (13, 13, 1, 1),
]
V2 = {"num_topk": 6, "num_groups": 8, "num_groups_kept": 3, "scale": 16.0}
TOKENS = [(1, 0), (3, 0), (1, 1), (1, 17), (4, 1024), (7, 331), (2048, 1)]  # sequences, tokens each


def options_of(shape: tuple[int, int, int, int]) -> dict[str, int]:
    _, num_topk, num_groups, num_groups_kept = shape
    return {"num_topk": num_topk, "num_groups": num_groups, "num_groups_kept": num_groups_kept}


def fused(**options: int | float | bool) -> Callable[[Tensor], tuple[Tensor, ...]]:
    return lambda logits_TE: ops.moe_gate_with_balance(logits_TE, **options)


def terms(**options: int) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda probs_TE, idx_TK: ops.moe_balance_terms(probs_TE, idx_TK, **options)


def routed(rng: torch.Generator, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Probabilities over 160 experts, and choices of which some count for nobody."""
    probs_TE = randn(rng, num_tokens, 160).softmax(dim=-1)
    idx_TK = torch.randint(-40, 200, (num_tokens, 6), generator=rng, dtype=torch.int32)
    return probs_TE, idx_TK


V2_STEP = gpu.forward_and_backward(fused(**V2, num_sequences=4))
LOSS_STEP = gpu.forward_and_backward(
    lambda probs_TE, idx_TK: ops.moe_balance_loss(
        *(probs_TE, idx_TK),
        **{"num_sequences": 4, "num_groups": 8, "num_groups_kept": 3},
        **{"expert": 0.003, "device": 0.05, "communication": 0.02},
    )
)
TERMS_STEP = gpu.forward_and_backward(terms(num_sequences=4, num_groups=8, num_groups_kept=3))


# ---- fused with the gate ----


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(("num_sequences", "length"), TOKENS)
@pytest.mark.parametrize("shape", SHAPES)
def test_fused_it_is_the_reference(
    shape: tuple[int, int, int, int],
    num_sequences: int,
    length: int,
    renormalize: bool,
    rng: torch.Generator,
) -> None:
    options = {**options_of(shape), "renormalize": renormalize, "num_sequences": num_sequences}
    logits_TE = 3 * randn(rng, num_sequences * length, shape[0])
    gpu.assert_is_reference(gpu.forward_and_backward(fused(**options)), logits_TE)


@pytest.mark.sanitize
@pytest.mark.parametrize("shape", SHAPES)
def test_fused_a_few_tokens(shape: tuple[int, int, int, int], rng: torch.Generator) -> None:
    step = gpu.forward_and_backward(fused(**options_of(shape), num_sequences=3))
    gpu.assert_is_reference(step, randn(rng, 57, shape[0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fused_narrow_logits(dtype: torch.dtype, rng: torch.Generator) -> None:
    gpu.assert_is_reference(V2_STEP, randn(rng, 512, 160, dtype=dtype))


def test_fused_nan_reaches_the_terms_and_no_index_leaves_its_range(rng: torch.Generator) -> None:
    logits_TE = randn(rng, 512, 160)
    logits_TE[77, 5] = torch.nan
    idx_TK, weight_TK, terms_3 = ops.moe_gate_with_balance(logits_TE.to(gpu.DEVICE), **V2)
    assert terms_3.isnan().all()
    assert weight_TK[77].isnan().all()
    assert weight_TK[:77].isfinite().all()
    assert bool(((idx_TK >= 0) & (idx_TK < 160)).all())


def test_the_weights_are_those_of_the_gate_alone(rng: torch.Generator) -> None:
    logits_TE = randn(rng, 4096, 160).to(gpu.DEVICE)
    idx_TK, weight_TK, _ = ops.moe_gate_with_balance(logits_TE, **V2)
    gpu.assert_all_same((idx_TK, weight_TK), ops.moe_gate(logits_TE, **V2))


# ---- alone ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_sequences", "length"), TOKENS)
def test_alone_it_is_the_reference(
    num_sequences: int, length: int, dtype: torch.dtype, rng: torch.Generator
) -> None:
    probs_TE, idx_TK = routed(rng, num_sequences * length)
    options = {"num_sequences": num_sequences, "num_groups": 8, "num_groups_kept": 3}
    gpu.assert_is_reference(gpu.forward_and_backward(terms(**options)), probs_TE.to(dtype), idx_TK)


@pytest.mark.sanitize
@pytest.mark.parametrize("shape", SHAPES)
def test_alone_a_few_tokens(shape: tuple[int, int, int, int], rng: torch.Generator) -> None:
    num_experts, num_topk, num_groups, num_groups_kept = shape
    probs_TE = randn(rng, 57, num_experts).softmax(dim=-1)
    idx_TK = torch.randint(0, num_experts, (57, num_topk), generator=rng, dtype=torch.int32)
    options = {"num_sequences": 3, "num_groups": num_groups, "num_groups_kept": num_groups_kept}
    gpu.assert_is_reference(gpu.forward_and_backward(terms(**options)), probs_TE, idx_TK)


@pytest.mark.sanitize
@pytest.mark.parametrize("num_tokens", [0, 4, 68, 4096])
def test_the_weighted_loss_is_the_reference(num_tokens: int, rng: torch.Generator) -> None:
    gpu.assert_is_reference(LOSS_STEP, *routed(rng, num_tokens))


# ---- out of the host's way ----


def test_they_pass_opcheck(rng: torch.Generator) -> None:
    logits_TE = randn(rng, 36, 160).to(gpu.DEVICE).requires_grad_()
    args = (logits_TE, 6, 8, 3, 16.0, False, 4)
    assert_op_registered(torch.ops.dscoder.moe_gate_with_balance.default, args)
    probs_TE, idx_TK = (x.to(gpu.DEVICE) for x in routed(rng, 36))
    assert_op_registered(
        torch.ops.dscoder.moe_balance_loss.default, (probs_TE.requires_grad_(), idx_TK, 4, 8, 3, None)
    )
    assert_op_registered(
        torch.ops.dscoder.moe_balance_loss.default, (probs_TE, idx_TK, 4, 8, 3, [0.003, 0.05, 0.02])
    )


def test_they_compile_in_one_graph(rng: torch.Generator) -> None:
    gpu.assert_compiles_whole(fused(**V2, num_sequences=4), randn(rng, 128, 160))
    gpu.assert_compiles_whole(terms(num_sequences=4, num_groups=8), *routed(rng, 128))


def test_captured_graphs_follow_their_inputs(rng: torch.Generator) -> None:
    first, second = randn(rng, 2, 512, 160)
    gpu.assert_replay_follows(V2_STEP, [first], [second])
    gpu.assert_replay_follows(TERMS_STEP, routed(rng, 512), routed(rng, 512))


def test_they_run_on_the_callers_stream(rng: torch.Generator) -> None:
    gpu.assert_runs_on_the_callers_stream(V2_STEP, randn(rng, 512, 160))
    gpu.assert_runs_on_the_callers_stream(TERMS_STEP, *routed(rng, 512))


def test_they_never_wait_for_the_gpu(rng: torch.Generator) -> None:
    gpu.assert_never_waits(V2_STEP, randn(rng, 512, 160))
    gpu.assert_never_waits(TERMS_STEP, *routed(rng, 512))
    gpu.assert_never_waits(LOSS_STEP, *routed(rng, 512))


def test_the_same_bits_every_time(rng: torch.Generator) -> None:
    gpu.assert_same_bits_every_time(V2_STEP, randn(rng, 8192, 160), num_times=10)
    gpu.assert_same_bits_every_time(TERMS_STEP, *routed(rng, 8192), num_times=10)
    gpu.assert_same_bits_every_time(LOSS_STEP, *routed(rng, 8192), num_times=10)


def test_two_streams_at_once_do_not_mix(rng: torch.Generator) -> None:
    """The block that finishes last is told by a ticket in scratch of the call's own."""
    inputs = [randn(rng, 4096, 160).to(gpu.DEVICE) for _ in range(2)]
    wanted = [ops.moe_gate_with_balance(x, **V2, num_sequences=4)[2] for x in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    got: list[list[Tensor]] = [[], []]
    for _ in range(50):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                got[i].append(ops.moe_gate_with_balance(inputs[i], **V2, num_sequences=4)[2])
    torch.cuda.synchronize()
    for i in range(2):
        gpu.assert_all_same(got[i], [wanted[i]] * len(got[i]))


def test_what_the_kernels_cannot_do_is_refused() -> None:
    wide = torch.zeros(2, 513, device=gpu.DEVICE)
    with pytest.raises(ValueError, match=r"^moe_gate_with_balance: num_experts must be <= 512, got 513$"):
        ops.moe_gate_with_balance(wide, num_topk=1)
    with pytest.raises(ValueError, match=r"^moe_balance_loss: num_experts must be <= 512, got 513$"):
        ops.moe_balance_terms(wide, torch.zeros(2, 1, dtype=torch.int32, device=gpu.DEVICE))


def test_perfect_balance_is_one() -> None:
    logits_TE = torch.zeros(64, 8, device=gpu.DEVICE)
    for t in range(64):
        logits_TE[t, t % 8] = 1e-3  # each expert is first as often
    _, _, terms_3 = ops.moe_gate_with_balance(logits_TE, num_topk=1, num_groups=4, num_groups_kept=1)
    assert_close(terms_3.cpu(), torch.ones(3), dtype=torch.float16)
