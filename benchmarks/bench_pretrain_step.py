"""One optimizer step of the tiny models: forward, loss, backward, clip, AdamW."""

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from dscoder.config import preset
from dscoder.config.train import OptimizerConfig
from dscoder.data.loader import IGNORED, Batch
from dscoder.models import Transformer
from dscoder.runtime.seed import available_threads, deterministic
from dscoder.train.loop import train_step
from dscoder.train.loss import cross_entropy_sum
from dscoder.train.optimizer import MasterAdamW

SEQUENCES = 8
WINDOW = 512
DOCUMENT = 128


def random_batch(vocab_size: int) -> Batch:
    """Windows full of documents of one length."""
    generator = torch.Generator().manual_seed(0)
    tokens_BS = torch.randint(0, vocab_size, (SEQUENCES, WINDOW), generator=generator)
    labels_BS = tokens_BS.roll(-1, dims=1)
    labels_BS[:, DOCUMENT - 1 :: DOCUMENT] = IGNORED
    cu_seqlens = torch.arange(0, SEQUENCES * WINDOW + 1, DOCUMENT, dtype=torch.int32)
    return Batch(tokens_BS=tokens_BS, labels_BS=labels_BS, cu_seqlens=cu_seqlens, window_idx=(0,))


@pytest.mark.parametrize("name", ["tiny_dense", "tiny_moe"])
def test_step(benchmark: BenchmarkFixture, store: Callable[..., None], name: str) -> None:
    config = preset(name)
    batch = random_batch(config.vocab_size)
    with deterministic(seed=0, num_threads=available_threads()):
        model = Transformer(config).train()
        optimizer = MasterAdamW(model, OptimizerConfig())
        benchmark(train_step, model, optimizer, [batch], lr=1e-4, step=0)
    shape = f"B={SEQUENCES} S={WINDOW}"
    store("pretrain_step", f"step of {name}", shape, {}, {"tokens": batch.tokens_BS.numel()})


@pytest.mark.parametrize("chunked", [True, False], ids=["chunked", "whole_logits"])
def test_loss(benchmark: BenchmarkFixture, store: Callable[..., None], chunked: bool) -> None:
    """Cross-entropy with its gradients, against torch's on whole logits."""
    generator = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(4096, 256, generator=generator, requires_grad=True)
    weight_VD = torch.randn(4096, 256, generator=generator, requires_grad=True)
    labels_T = torch.randint(0, 4096, (4096,), generator=generator)

    def run() -> None:
        if chunked:
            total = cross_entropy_sum(hidden_TD, weight_VD, labels_T)
        else:
            logits_TV = hidden_TD @ weight_VD.T
            total = torch.nn.functional.cross_entropy(logits_TV, labels_T, reduction="sum")
        torch.autograd.grad(total, (hidden_TD, weight_VD))

    benchmark(run)
    step = "loss in chunks" if chunked else "loss of whole logits"
    store("pretrain_step", step, "T=4096 D=256 V=4096", {}, {"tokens": len(labels_T)})
