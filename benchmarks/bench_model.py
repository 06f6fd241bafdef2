"""Training steps of the V2 models beside transformers' DeepseekV2ForCausalLM, with and without the optimizer.

Same weights, same tokens, training mode; ours computes the balance loss on top. On a GPU eight layers of
V2-Lite and one row of 4096 tokens, in bfloat16; on a CPU smaller ones, in float32. transformers runs with
each of its expert implementations that fit in memory ("batched_mm" gathers a weight matrix per token and
does not; "eager" fills a gradient of all experts for every expert, which the wide layer cannot afford).
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

from benchmarks.peers.transformers_model import HAS_TRANSFORMERS, their_model
from benchmarks.shapes import DEVICE, DTYPE, IS_ON_GPU
from dscoder.config import ModelConfig, preset
from dscoder.config.train import OptimizerConfig
from dscoder.data.loader import IGNORED, Batch
from dscoder.models import Transformer
from dscoder.models.init import init_weights, materialise
from dscoder.testing import cases
from dscoder.testing.measure import Problem
from dscoder.testing.results import Case
from dscoder.train.flops import causal_pairs, training_flops
from dscoder.train.loop import train_step
from dscoder.train.optimizer import MasterAdamW

# One dense and one expert layer at V2-Lite's widths; a small vocabulary, whose products are the same in both.
V2_LITE_SLICE = replace(preset("v2_lite"), num_layers=2, vocab_size=8192, bos_id=0, eos_id=1)

V2_LITE_8_LAYERS = replace(preset("v2_lite"), num_layers=8)
GPU_BYTES_WITH_OPTIMIZERS = 125e9  # weights, masters, two sets of moments and gradients, activations
GPU_BYTES = 80e9  # weights, three sets of gradients that captured steps keep, activations
# Whose kernels a step on a GPU stands on.
KERNELS = ("latent_rope", "mla_prefill", "moe_gate", "moe_experts")

# config, rows, length, (attention, experts) of transformers
STEPS: dict[str, tuple[ModelConfig, int, int, list[tuple[str, str]]]] = (
    {"v2_lite_8_layers": (V2_LITE_8_LAYERS, 1, 4096, [("sdpa", "grouped_mm"), ("eager", "grouped_mm")])}
    if IS_ON_GPU
    else {
        "tiny_moe": (
            preset("tiny_moe"),
            *(4, 512),
            [("sdpa", "grouped_mm"), ("eager", "grouped_mm"), ("sdpa", "eager")],
        ),
        "v2_lite_slice": (V2_LITE_SLICE, 1, 256, [("sdpa", "grouped_mm"), ("eager", "grouped_mm")]),
    }
)


def shape_of(name: str) -> str:
    """As a record holds it."""
    _, num_rows, length, _ = STEPS[name]
    return f"B={num_rows} S={length}"


def loss_of(logits_BSV: Tensor, tokens_BS: Tensor) -> Tensor:
    return F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), tokens_BS[:, 1:].flatten())


def forget_gradients(*models: nn.Module) -> None:
    """Before every step of either: two sets of gradients at once do not fit."""
    for model in models:
        model.zero_grad(set_to_none=True)


def require_room(benchmark: BenchmarkFixture, num_bytes: float) -> None:
    """Skip where a step takes too long or does not fit."""
    if benchmark.disabled:
        pytest.skip("a training step is too long for a test run")
    if IS_ON_GPU and torch.cuda.mem_get_info()[0] < num_bytes:
        pytest.skip(f"needs {num_bytes / 1e9:.0f} GB of free GPU memory")


def models_of(config: ModelConfig) -> tuple[Transformer, nn.Module | None]:
    """Ours, and theirs on the same weights where transformers is installed."""
    ours = Transformer(config, device="meta").train()
    materialise(ours, dtype=DTYPE, device=DEVICE)
    init_weights(ours, seed=0)
    return ours, their_model(ours).train() if HAS_TRANSFORMERS else None


def tokens_of(name: str) -> Tensor:
    """tokens_BS of a step."""
    config, num_rows, length, _ = STEPS[name]
    rng = cases.generator(name)
    return torch.randint(0, config.vocab_size, (num_rows, length), generator=rng).to(DEVICE)


def case_of(name: str, step: str) -> Case:
    """Its operations are those of the whole step but for the optimizer's (docs/metrics.md)."""
    config, num_rows, length, _ = STEPS[name]
    num_pairs = num_rows * causal_pairs([length])
    return Case(
        op="training_step",
        step=step,
        model=name,
        shape=shape_of(name),
        dtype=DTYPE,
        kernels=KERNELS,
        flops=float(training_flops(config, num_tokens=num_rows * length, num_pairs=num_pairs)),
    )


@pytest.mark.parametrize("name", STEPS)
def test_training_step(measure: Callable[..., None], benchmark: BenchmarkFixture, name: str) -> None:
    """Forward and backward."""
    require_room(benchmark, GPU_BYTES)
    config, _, _, implementations = STEPS[name]
    ours, theirs = models_of(config)
    models = [model for model in (ours, theirs) if model is not None]

    def our_step(tokens_BS: Tensor) -> Tensor:
        forget_gradients(*models)
        features = ours.features(tokens_BS)
        loss = loss_of(ours.head(features.hidden_BSD), tokens_BS)
        (loss + features.balance).backward()
        return loss.detach()[None]

    def their_step(attention: str, experts: str) -> Callable[[Tensor], Tensor]:
        def run(tokens_BS: Tensor) -> Tensor:
            forget_gradients(*models)
            theirs.config._attn_implementation = attention
            theirs.config._experts_implementation = experts
            loss = loss_of(theirs(tokens_BS, use_cache=False).logits, tokens_BS)
            loss.backward()
            return loss.detach()[None]

        return run

    names = implementations if theirs is not None else []
    peers = {f"transformers {' '.join(pair)}": their_step(*pair) for pair in names}
    measure(case_of(name, "training step"), Problem(args=(tokens_of(name),)), our_step, peers)


def batch_of(tokens_BS: Tensor) -> Batch:
    """One document a row; its last token has nothing to predict."""
    labels_BS = tokens_BS.roll(-1, dims=1)
    labels_BS[:, -1] = IGNORED
    num_rows, length = tokens_BS.shape
    ends = torch.arange(0, num_rows * length + 1, length, dtype=torch.int32)
    return Batch(tokens_BS=tokens_BS, labels_BS=labels_BS, cu_seqlens=ends, window_idx=(0,))


@pytest.mark.parametrize("name", STEPS)
def test_whole_step(measure: Callable[..., None], benchmark: BenchmarkFixture, name: str) -> None:
    """Forward, backward, clipping and AdamW: what a run does a step.

    Ours keeps float32 masters and adds up gradients in them; theirs updates the weights as they are with
    torch's fused AdamW, which is less work. With a learning rate of 0 the shared weights stay what they are.
    """
    require_room(benchmark, GPU_BYTES_WITH_OPTIMIZERS)
    config, _, _, implementations = STEPS[name]
    ours, theirs = models_of(config)
    optimizer = MasterAdamW(ours, OptimizerConfig())

    def our_step(tokens_BS: Tensor) -> Tensor:
        stats = train_step(ours, optimizer, [batch_of(tokens_BS)], lr=0.0, step=0)
        return torch.tensor([stats.loss])

    their_optimizer = None
    if theirs is not None:
        their_optimizer = torch.optim.AdamW(theirs.parameters(), lr=0.0, betas=(0.9, 0.95), fused=True)

    def their_step(attention: str, experts: str) -> Callable[[Tensor], Tensor]:
        def run(tokens_BS: Tensor) -> Tensor:
            theirs.config._attn_implementation = attention
            theirs.config._experts_implementation = experts
            loss = loss_of(theirs(tokens_BS, use_cache=False).logits, tokens_BS)
            loss.backward()
            nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
            their_optimizer.step()
            theirs.zero_grad(set_to_none=True)
            return loss.detach().float().cpu()[None]

        return run

    # The quickest attention alone: a second set of activations is not worth its time here.
    names = implementations[:1] if theirs is not None else []
    peers = {f"transformers {' '.join(pair)}": their_step(*pair) for pair in names}
    measure(case_of(name, "whole step"), Problem(args=(tokens_of(name),)), our_step, peers)
