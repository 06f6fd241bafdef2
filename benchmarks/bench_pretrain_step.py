"""One optimizer step, forward to AdamW: of tiny models, and on a GPU of a slice of V2-Lite."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.shapes import DEVICE, DTYPE, IS_ON_GPU
from dscoder.config import preset
from dscoder.config.train import OptimizerConfig
from dscoder.data.loader import IGNORED, Batch
from dscoder.models import Transformer, init_weights, materialise
from dscoder.runtime.device import device_peak_flops
from dscoder.runtime.seed import available_threads, deterministic
from dscoder.testing.timing import device_name
from dscoder.train.flops import causal_pairs, training_flops
from dscoder.train.loop import train_step
from dscoder.train.loss import cross_entropy_sum
from dscoder.train.optimizer import MasterAdamW

SEQUENCES = 8
WINDOW = 512
DOCUMENT = 128

MICRO_BATCHES = 4
# Every width is V2-Lite's; the window is a micro-batch of one row.
SLICE = (
    ("v2_lite_8_layers", replace(preset("v2_lite"), num_layers=8), 4096)
    if IS_ON_GPU
    else ("tiny_moe", preset("tiny_moe"), DOCUMENT)
)
GPU_BYTES = 110e9  # weights, masters, moments, gradients in float32; activations


def random_batch(
    vocab_size: int, *, num_rows: int = SEQUENCES, window: int = WINDOW, document: int = DOCUMENT
) -> Batch:
    """Windows full of documents of one length."""
    generator = torch.Generator().manual_seed(0)
    tokens_BS = torch.randint(0, vocab_size, (num_rows, window), generator=generator)
    labels_BS = tokens_BS.roll(-1, dims=1)
    labels_BS[:, document - 1 :: document] = IGNORED
    cu_seqlens = torch.arange(0, num_rows * window + 1, document, dtype=torch.int32)
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


@pytest.mark.parametrize("is_deterministic", [False, True], ids=["any_order", "same_bits"])
def test_mfu(benchmark: BenchmarkFixture, store: Callable[..., None], is_deterministic: bool) -> None:
    """A step of four micro-batches of one document, as many operations as there are (docs/metrics.md).

    Runs ask for the same bits every time; without that, gradients may add up in any order.
    """
    name, config, window = SLICE
    if IS_ON_GPU and torch.cuda.mem_get_info()[0] < GPU_BYTES:
        pytest.skip(f"needs {GPU_BYTES / 1e9:.0f} GB of free GPU memory")
    batches = [random_batch(config.vocab_size, num_rows=1, window=window, document=window)] * MICRO_BATCHES
    with deterministic(seed=0, num_threads=available_threads()):
        torch.use_deterministic_algorithms(is_deterministic, warn_only=True)
        model = Transformer(config, device="meta").train()
        materialise(model, dtype=DTYPE, device=DEVICE)
        init_weights(model, seed=0)
        optimizer = MasterAdamW(model, OptimizerConfig())

        def step() -> None:
            train_step(model, optimizer, batches, lr=1e-4, step=0)
            if IS_ON_GPU:  # the optimizer's kernels, for which nobody else waits
                torch.cuda.synchronize(DEVICE)

        benchmark(step)
    num_tokens = MICRO_BATCHES * window
    figures: dict[str, object] = {
        "device": device_name(DEVICE),
        "bits": "same" if is_deterministic else "any",
    }
    peak = device_peak_flops(DEVICE, DTYPE)
    if peak is not None and benchmark.stats is not None:
        num_pairs = MICRO_BATCHES * causal_pairs([window])
        flops = training_flops(config, num_tokens=num_tokens, num_pairs=num_pairs)
        figures["MFU"] = float(f"{flops / benchmark.stats.stats.median / peak:.3g}")
    shape = f"B={MICRO_BATCHES} S={window}"
    store("pretrain_step", f"step of {name}, {figures['bits']} bits", shape, figures, {"tokens": num_tokens})


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
