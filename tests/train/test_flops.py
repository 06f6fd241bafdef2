"""Operations of a training step: the counts of torch's own counter, and hand numbers of published models."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dscoder.config import MlaConfig, ModelConfig, preset
from dscoder.models import Transformer, count_parameters
from dscoder.testing.tiny_run import TINY_MOE
from dscoder.train.flops import causal_pairs, forward_flops, training_flops
from dscoder.train.loss import cross_entropy_sum

LENGTHS = (5, 11, 16)  # documents of two rows of 16 tokens
NUM_TOKENS = sum(LENGTHS)
WITH_QUERY_LATENT = replace(
    TINY_MOE,
    attention=MlaConfig(num_heads=3, q_lora_rank=20, kv_lora_rank=16, nope_dim=8, rope_dim=4, value_dim=6),
)
CONFIGS = {
    "tiny_dense": preset("tiny_dense"),
    "tiny_dense_tied": replace(preset("tiny_dense"), tie_embeddings=True),
    "tiny_moe": preset("tiny_moe"),
    "two_layers": TINY_MOE,
    "query_latent": WITH_QUERY_LATENT,
}


def attended(ends_q: Tensor, ends_k: Tensor) -> int:
    """Pairs of one call, counted one query at a time."""
    documents = zip(ends_q.diff().tolist(), ends_k.diff().tolist(), strict=True)
    return sum(num_k - num_q + 1 + i for num_q, num_k in documents for i in range(num_q))


def prefill(
    query: Tensor, key: Tensor, value: Tensor, ends_q: Tensor, ends_k: Tensor, *_: Any, **__: Any
) -> int:
    pairs = attended(ends_q, ends_k)
    return 2 * query.shape[1] * pairs * (query.shape[2] + value.shape[2])


def prefill_backward(
    _: Tensor, saved: Sequence[Tensor], ends_q: Tensor, ends_k: Tensor, *__: Any, **___: Any
) -> int:
    # Four products; the fifth, which forms the scores again, is recomputation and not counted.
    query, _key, value = saved[:3]
    return 2 * prefill(query, _key, value, ends_q, ends_k)


def rows(offsets: Tensor) -> int:
    return int(offsets[-1])


def experts(_: Tensor, gate_up: Tensor, down: Tensor, offsets: Tensor, *__: Any, **___: Any) -> int:
    return 2 * rows(offsets) * (gate_up[0].numel() + down[0].numel())


def weight_gradient(grad: Tensor, x: Tensor, offsets: Tensor, *_: Any, **__: Any) -> int:
    return 2 * rows(offsets) * grad.shape[1] * x.shape[1]


def gate_up_gradient(_: Tensor, down: Tensor, __: Tensor, offsets: Tensor, *___: Any, **____: Any) -> int:
    return 2 * rows(offsets) * down[0].numel()


def grouped(_: Tensor, w: Tensor, offsets: Tensor, *__: Any, **___: Any) -> int:
    return 2 * rows(offsets) * w[0].numel()


def our_formulas() -> dict[Any, Callable[..., int]]:
    """For torch's counter, which knows torch's products alone: ours, from the tensors of each call."""
    formulas: dict[Any, Callable[..., int]] = {
        torch.ops.dscoder.mla_prefill: prefill,
        torch.ops.dscoder.mla_prefill_backward: prefill_backward,
        torch.ops.dscoder.moe_experts: experts,
        torch.ops.dscoder.moe_experts_gate_up_gradient: gate_up_gradient,
        torch.ops.dscoder.grouped_gemm: grouped,
        torch.ops.dscoder.grouped_gemm_weight_gradient: weight_gradient,
    }
    for formula in formulas.values():
        formula._get_raw = True  # type: ignore[attr-defined]  # tensors, not shapes
    return formulas


def counted(config: ModelConfig, cu_seqlens: Tensor | None) -> dict[Any, int]:
    """What torch's counter sees of one forward and backward, by operator."""
    model = Transformer(config).train()
    tokens_BS = torch.arange(NUM_TOKENS).view(2, -1) % config.vocab_size
    with FlopCounterMode(display=False, custom_mapping=our_formulas()) as counter:
        features = model.features(tokens_BS, cu_seqlens=cu_seqlens)
        hidden_TD = features.hidden_BSD.flatten(0, 1)
        loss = cross_entropy_sum(hidden_TD, model.head.weight, tokens_BS.flatten())
        (loss + features.balance).backward()
    return counter.get_flop_counts()["Global"]


def ends() -> Tensor:
    return torch.tensor([0, *LENGTHS]).cumsum(0).int()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_has_the_operations_that_torch_counts(name: str) -> None:
    config = CONFIGS[name]
    expected = training_flops(config, num_tokens=NUM_TOKENS, num_pairs=causal_pairs(LENGTHS))
    assert sum(counted(config, ends()).values()) == expected


def test_torchs_attention_is_counted_without_the_half_that_its_mask_hides() -> None:
    # Rows that are one document take torch's own attention. Written out in products, all that its counter
    # knows on a CPU, it computes every pair of the square.
    config = preset("tiny_dense")
    with sdpa_kernel(SDPBackend.MATH):
        by_op = counted(config, None)
    row = NUM_TOKENS // 2
    square = 3 * config.num_layers * 2 * (row * row) * 4 * 2 * (64 + 64)  # 2 rows, 4 heads
    assert by_op.pop(torch.ops.aten.bmm) == square
    products = training_flops(config, num_tokens=NUM_TOKENS, num_pairs=0)
    assert sum(by_op.values()) == products
    ours = training_flops(config, num_tokens=NUM_TOKENS, num_pairs=causal_pairs([row, row]))
    assert (ours - products) * 2 * row == square * (row + 1)


def test_dropped_choices_are_not_computed() -> None:
    # One choice: gate, up and down of an expert of width 16 on a model of width 32, three passes.
    whole, less = (
        training_flops(TINY_MOE, num_tokens=NUM_TOKENS, num_pairs=0, num_dropped=dropped)
        for dropped in (0, 3)
    )
    assert whole - less == 3 * 3 * 2 * 3 * 32 * 16


@pytest.mark.parametrize(
    ("name", "num_norm_weights"),
    [
        ("coder_1_3b", 24 * 2 * 2048 + 2048),
        ("coder_33b", 62 * 2 * 7168 + 7168),
        ("v2_lite", 27 * (2 * 2048 + 512) + 2048),
        ("v2", 60 * (2 * 5120 + 1536 + 512) + 5120),
    ],
)
def test_without_attention_it_is_six_times_the_active_parameters(name: str, num_norm_weights: int) -> None:
    # All but the norms' weights, which multiply no matrix.
    config = preset(name)
    active = count_parameters(config).active - num_norm_weights
    assert training_flops(config, num_tokens=7, num_pairs=0) == 7 * 6 * active


def test_v2_lite_by_hand() -> None:
    # 27 layers, 16 heads of 192 and 128: a pair costs 2 * 16 * 320 operations a layer.
    forward = forward_flops(preset("v2_lite"))
    assert forward.per_pair == 27 * 2 * 16 * (192 + 128) == 276_480
    assert forward.per_choice == 2 * 3 * 2048 * 1408
    assert forward.choices_per_token == 26 * 6
    attention = 2048 * 16 * 192 + 2048 * 576 + 512 * 16 * 256 + 16 * 128 * 2048
    shared = 2 * 3 * 2048 * 1408
    elements = 27 * attention + 3 * 2048 * 10944 + 26 * (shared + 2048 * 64) + 2048 * 102400
    assert forward.per_token == 2 * elements
    # A window of 4096 as one document: 16.4e9 operations a token, a tenth of them in attention.
    step = training_flops(preset("v2_lite"), num_tokens=4096, num_pairs=4096 * 4097 // 2)
    assert step / 4096 == pytest.approx(16.407e9, rel=1e-4)


def test_v2_by_hand() -> None:
    # 60 layers, 128 heads of 192 and 128, experts 6 of 160.
    forward = forward_flops(preset("v2"))
    assert forward.per_pair == 60 * 2 * 128 * (192 + 128) == 4_915_200
    assert forward.per_choice == 2 * 3 * 5120 * 1536
    assert forward.choices_per_token == 59 * 6
    attention = 5120 * 1536 + 1536 * 128 * 192 + 5120 * 576 + 512 * 128 * 256 + 128 * 128 * 5120
    shared = 2 * 3 * 5120 * 1536
    elements = 60 * attention + 3 * 5120 * 12288 + 59 * (shared + 5120 * 160) + 5120 * 102400
    assert forward.per_token == 2 * elements


def test_grouped_queries_share_keys_but_not_scores() -> None:
    # coder_33b: 56 query heads on 8 key heads of 128, 62 layers.
    assert forward_flops(preset("coder_33b")).per_pair == 62 * 2 * 56 * 2 * 128


def test_pairs_are_those_on_and_under_the_diagonals() -> None:
    assert causal_pairs([]) == causal_pairs([0]) == 0
    assert causal_pairs([1, 3]) == 1 + 6
    assert causal_pairs(ends().diff()) == 15 + 66 + 136
    assert causal_pairs([131072]) == 131072 * 131073 // 2  # past 32 bits


@pytest.mark.parametrize("values", [(-1, 0, 0), (1, -1, 0), (1, 0, -1), (1, 0, 3)])
def test_counts_that_cannot_be_are_refused(values: tuple[int, int, int]) -> None:
    num_tokens, num_pairs, num_dropped = values
    with pytest.raises(ValueError, match=r"num_dropped in \[0, .*\], got " + ", ".join(map(str, values[:2]))):
        training_flops(TINY_MOE, num_tokens=num_tokens, num_pairs=num_pairs, num_dropped=num_dropped)
