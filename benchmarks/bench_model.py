"""A training step of the V2 models, forward and backward, beside transformers' DeepseekV2ForCausalLM.

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
from dscoder.models import Transformer
from dscoder.models.init import init_weights, materialise
from dscoder.testing import cases
from dscoder.testing.measure import Problem
from dscoder.testing.results import Case
from dscoder.train.flops import causal_pairs, training_flops

# One dense and one expert layer at V2-Lite's widths; a small vocabulary, whose products are the same in both.
V2_LITE_SLICE = replace(preset("v2_lite"), num_layers=2, vocab_size=8192, bos_id=0, eos_id=1)

V2_LITE_8_LAYERS = replace(preset("v2_lite"), num_layers=8)
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


@pytest.mark.parametrize("name", STEPS)
def test_training_step(measure: Callable[..., None], benchmark: BenchmarkFixture, name: str) -> None:
    config, num_rows, length, implementations = STEPS[name]
    if benchmark.disabled:
        pytest.skip("a training step is too long for a test run")
    if IS_ON_GPU and torch.cuda.mem_get_info()[0] < GPU_BYTES:
        pytest.skip(f"needs {GPU_BYTES / 1e9:.0f} GB of free GPU memory")
    ours = Transformer(config, device="meta").train()
    materialise(ours, dtype=DTYPE, device=DEVICE)
    init_weights(ours, seed=0)
    if not HAS_TRANSFORMERS:
        implementations = []
    theirs = their_model(ours).train() if implementations else None
    models = [model for model in (ours, theirs) if model is not None]
    rng = cases.generator(name)
    tokens_BS = torch.randint(0, config.vocab_size, (num_rows, length), generator=rng).to(DEVICE)

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

    case = Case(
        op="training_step",
        step="training step",
        model=name,
        shape=shape_of(name),
        dtype=DTYPE,
        kernels=KERNELS,
        flops=float(
            training_flops(config, num_tokens=tokens_BS.numel(), num_pairs=num_rows * causal_pairs([length]))
        ),
    )
    peers = {f"transformers {' '.join(names)}": their_step(*names) for names in implementations}
    measure(case, Problem(args=(tokens_BS,)), our_step, peers)
