"""A decoding step of a whole model on a GPU: near the exact one, the same from a graph, and never waiting."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dscoder.config import preset
from dscoder.models import Transformer
from dscoder.models.cache import LatentCache, allocate_cache
from dscoder.testing import gpu
from dscoder.testing.cases import randn
from dscoder.testing.compare import assert_close

V2_LITE = preset("v2_lite")
# V2-Lite's attention in a small model; every expert is chosen, so that no rounding chooses another.
SMALL = replace(
    V2_LITE,
    width=512,
    num_layers=3,
    mlp_width=1024,
    vocab_size=640,
    bos_id=0,
    eos_id=1,
    max_positions=512,
    moe=replace(V2_LITE.moe, num_experts=8, num_topk=8, expert_width=128),
)
LENGTHS = (1, 63, 64, 65, 200, 127, 3, 130)
STD = 0.05  # of the weights: every part of the model then has a say in the logits


def random_tokens(rng: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(0, SMALL.vocab_size, shape, generator=rng)


def make_model(rng: torch.Generator) -> Transformer:
    """On the CPU, in bfloat16."""
    model = Transformer(SMALL, dtype=torch.bfloat16).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0.0, STD, generator=rng)
    return model


def make_cache(rng: torch.Generator, num_rows: int) -> LatentCache:
    """On the CPU, in bfloat16: rows of LENGTHS tokens, in pages that lie in no order."""
    cache = allocate_cache(SMALL, num_sequences=num_rows, max_positions=256, dtype=torch.bfloat16)
    for pool in cache.pages:
        pool.copy_(randn(rng, *pool.shape))
    shuffled = torch.randperm(cache.page_table_BN.numel(), generator=rng, dtype=torch.int32)
    cache.page_table_BN.copy_(shuffled.view_as(cache.page_table_BN))
    cache.seq_lens_B.copy_(torch.tensor(LENGTHS).repeat(-(-num_rows // len(LENGTHS)))[:num_rows])
    return cache


class Stepper:
    """A model and rows to append to."""

    def __init__(self, model: Transformer, cache: LatentCache) -> None:
        self.model = model
        self.cache = cache

    @torch.inference_mode()
    def __call__(self, tokens_B1: Tensor, seq_lens_B: Tensor) -> tuple[Tensor]:
        """Logits [B, V] of a step over rows of these lengths."""
        self.cache.seq_lens_B.copy_(seq_lens_B)
        rows = self.cache.rows(0, len(tokens_B1), max_len=self.cache.max_positions - 1)
        return (self.model(tokens_B1, cache=rows)[:, -1],)


def copied(model: Transformer, cache: LatentCache, *, dtype: torch.dtype, device: str) -> Stepper:
    """Both with the same values elsewhere."""
    other = Transformer(SMALL, dtype=dtype, device=device).eval().requires_grad_(False)
    other.load_state_dict(model.state_dict())
    rows = allocate_cache(
        SMALL, num_sequences=cache.num_sequences, max_positions=256, dtype=dtype, device=device
    )
    for pool, values in zip(rows.pages, cache.pages, strict=True):
        pool.copy_(values)
    rows.page_table_BN.copy_(cache.page_table_BN)
    return Stepper(other, rows)


def distance(logits_BV: Tensor, wanted_BV: Tensor) -> float:
    """Relative to the length of what was wanted."""
    return float((logits_BV.cpu().double() - wanted_BV).norm() / wanted_BV.norm())


@pytest.mark.sanitize("memcheck", "synccheck")
@pytest.mark.parametrize("num_rows", [1, 3])
def test_a_few_rows(num_rows: int, rng: torch.Generator) -> None:
    check_error(num_rows, rng)


@pytest.mark.parametrize("num_rows", [8, 64, 130])
def test_many_rows(num_rows: int, rng: torch.Generator) -> None:
    check_error(num_rows, rng)


def check_error(num_rows: int, rng: torch.Generator) -> None:
    """Within twice the error that the reference makes in bfloat16, against the reference in float64."""
    model, cache = make_model(rng), make_cache(rng, num_rows)
    tokens_B1 = random_tokens(rng, num_rows, 1)
    lens_B = cache.seq_lens_B.clone()
    (wanted,) = copied(model, cache, dtype=torch.float64, device="cpu")(tokens_B1, lens_B)
    (usual,) = copied(model, cache, dtype=torch.bfloat16, device="cpu")(tokens_B1, lens_B)
    stepper = copied(model, cache, dtype=torch.bfloat16, device=gpu.DEVICE)
    gpu.poison_free_memory()
    (got,) = stepper(tokens_B1.to(gpu.DEVICE), lens_B.to(gpu.DEVICE))
    assert distance(usual, wanted) > 0
    assert distance(got, wanted) <= 2 * distance(usual, wanted)


@pytest.mark.parametrize("num_rows", [1, 8, 130])
def test_a_graph_follows_tokens_lengths_and_pages(num_rows: int, rng: torch.Generator) -> None:
    model, cache = make_model(rng), make_cache(rng, num_rows)
    stepper = copied(model, cache, dtype=torch.bfloat16, device=gpu.DEVICE)
    tokens_B1 = torch.zeros(num_rows, 1, dtype=torch.int64, device=gpu.DEVICE)
    lens_B = torch.ones(num_rows, dtype=torch.int32, device=gpu.DEVICE)
    replay = gpu.captured(lambda: stepper(tokens_B1, lens_B))
    for turn in range(4):
        tokens_B1.copy_(random_tokens(rng, num_rows, 1))
        lens_B.copy_(cache.seq_lens_B.roll(turn))
        stepper.cache.page_table_BN.copy_(cache.page_table_BN.flip(0) if turn % 2 else cache.page_table_BN)
        (replayed,) = replay()
        replayed = replayed.clone()
        assert_close(replayed, stepper(tokens_B1, lens_B)[0])


def test_a_step_never_waits(rng: torch.Generator) -> None:
    model, cache = make_model(rng), make_cache(rng, 8)
    stepper = copied(model, cache, dtype=torch.bfloat16, device=gpu.DEVICE)
    inputs = (torch.zeros(8, 1, dtype=torch.int64), cache.seq_lens_B)
    stepper(*(x.to(gpu.DEVICE) for x in inputs))  # the first call loads kernels
    gpu.assert_never_waits(stepper, *inputs)
