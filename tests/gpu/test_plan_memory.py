"""The peak that a plan tells of is what a step allocates."""

from dataclasses import replace

import pytest
import torch

from dscoder.config import preset
from dscoder.config.parallel import Recompute
from dscoder.config.train import OptimizerConfig
from dscoder.data.loader import Batch
from dscoder.models import Transformer, init_weights
from dscoder.models.init import materialise
from dscoder.models.transformer import Layer
from dscoder.train.loop import train_step
from dscoder.train.optimizer import MasterAdamW
from dscoder.train.plan.activations import Tokens
from dscoder.train.plan.layout import RECOMPUTES, Layout
from dscoder.train.plan.memory import CONTEXT_BYTES, memory
from dscoder.train.plan.weights import weights_of

MODEL = replace(preset("v2_lite"), num_layers=4)
SEQUENCES, LENGTH, ROUNDS = 2, 4096, 2
# A plan must not promise too much; what it leaves over is what the parts do not need all at once.
LEAST, MOST = 0.75, 1.05


def batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    ends = torch.arange(SEQUENCES + 1, dtype=torch.int32) * LENGTH
    found = []
    for number in range(ROUNDS):
        tokens_BS = torch.randint(MODEL.vocab_size, (SEQUENCES, LENGTH), generator=generator)
        labels_BS = tokens_BS.roll(-1, dims=1)
        found.append(Batch(tokens_BS=tokens_BS, labels_BS=labels_BS, cu_seqlens=ends, window_idx=(number,)))
    return found


@pytest.mark.parametrize("recompute", RECOMPUTES)
def test_a_step_needs_what_is_planned(recompute: Recompute) -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model = Transformer(MODEL, device="meta")
    materialise(model, dtype=torch.bfloat16, device=torch.device("cuda"))
    init_weights(model, seed=0)
    for layer in model.layers:
        assert isinstance(layer, Layer)
        layer.recompute = recompute
    optimizer = MasterAdamW(model.train(), OptimizerConfig())
    train_step(model, optimizer, batches(), lr=1e-4, step=0)
    torch.cuda.reset_peak_memory_stats()
    train_step(model, optimizer, batches(), lr=1e-4, step=1)
    planned = memory(
        MODEL,
        Layout(micro=SEQUENCES, recompute=recompute),
        weights_of(MODEL),
        Tokens(sequences=SEQUENCES, length=LENGTH, item=2),
        precision="bf16",
        num_rounds=ROUNDS,
        per_node=1,
        slack=1.0,
    )
    peak = torch.cuda.max_memory_allocated() - before
    assert LEAST <= peak / (planned.total - CONTEXT_BYTES) <= MOST
