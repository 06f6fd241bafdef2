"""How many kernels one decoding step launches, by kind of layer: each costs time however little it does.

On the meta device, where it is counted, a step that read a value of the device would raise.
"""

import sys
from dataclasses import replace

import pytest
import torch

from dscoder.config import preset
from dscoder.models import Transformer
from dscoder.models.cache import allocate_cache
from dscoder.testing.launches import Launch, launches_of, num_kernels, table

NUM_ROWS = 128
CONTEXT = 1024
# Upper bounds: a step may take fewer, and then they are lowered.
ONCE, DENSE_LAYER, EXPERT_LAYER = 13, 14, 22


@pytest.fixture(scope="module")
def launches() -> list[Launch]:
    """Those of a decoding step of V2-Lite with a dense layer and two of experts, embedding to token."""
    config = replace(preset("v2_lite"), num_layers=3)
    model = Transformer(config, device="meta", dtype=torch.bfloat16).eval()
    cache = allocate_cache(
        config,
        num_sequences=NUM_ROWS,
        max_positions=2 * CONTEXT,
        dtype=torch.bfloat16,
        device="meta",
    )
    prompt_BS = torch.zeros(NUM_ROWS, CONTEXT, dtype=torch.int64, device="meta")
    with torch.inference_mode():
        model(prompt_BS, cache=cache)
    return launches_of(model, lambda: model(prompt_BS[:, :1], cache=cache)[:, -1].argmax(dim=-1))


def test_a_step_launches_no_more_than_it_did(launches: list[Launch]) -> None:
    sys.stdout.write(f"\n{table(launches)}\n")  # pytest -s shows it
    dense, expert, other = (num_kernels(launches, f"layers.{i}") for i in range(3))
    assert expert == other
    assert dense <= DENSE_LAYER, table(launches)
    assert expert <= EXPERT_LAYER, table(launches)
    assert num_kernels(launches) - dense - 2 * expert <= ONCE, table(launches)


def test_the_step_is_whole(launches: list[Launch]) -> None:
    ops = [one.op for one in launches]
    assert ops.count("dscoder.moe_experts") == 2
    assert ops.count("dscoder.mla_decode") == 3
    assert ops[-1] == "aten.argmax"
    assert {"embed", "layers.0.mlp", "layers.1.moe", "layers.2.attention", "norm", "head"} <= {
        one.module for one in launches
    }
