"""Experts on several ranks: tokens travel beside the shared experts, and nothing else changes."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dscoder import ops
from dscoder.config import ModelConfig
from dscoder.models.compiled import compile_dense
from dscoder.models.moe import Moe
from dscoder.models.placement import place
from dscoder.runtime.mesh import open_mesh
from dscoder.testing.compare import assert_close
from dscoder.testing.ranks import run_ranks
from tests.models.sharded import full, loss_of, sharded_model, tiny, tokens_of, whole_gradients, whole_model

dist = pytest.mark.dist
NUM_RANKS = 2


def dropping() -> ModelConfig:
    """A device takes its even share alone, of half the sequences."""
    config = tiny("tiny_moe")
    assert config.moe is not None
    return replace(config, moe=replace(config.moe, capacity_factor=1.0, never_dropped_share=0.5))


# ---- on one process ----


@dataclass(frozen=True, kw_only=True, slots=True)
class Arrival:
    """What a travel waits for, and the list that says so."""

    events: list[str]
    name: str
    value: Any

    def wait(self) -> Any:
        self.events.append(f"{self.name} waits")
        return self.value


@dataclass(frozen=True, kw_only=True, slots=True)
class OneRank:
    """Expert parallelism among one rank: tokens stay where they are."""

    events: list[str]
    num_local_experts: int

    def start_dispatch(self, x_TD: Tensor, idx_TK: Tensor, weight_TK: Tensor) -> Arrival:
        self.events.append("dispatch starts")
        maps = ops.moe_permute_maps(idx_TK, num_experts=self.num_local_experts)
        handle = ops.DispatchHandle(
            maps=maps,
            idx_SK=idx_TK,
            weight_SK=weight_TK,
            slot_TR=idx_TK,
            counts_R=idx_TK,
            routes=None,  # type: ignore[arg-type]
        )
        return Arrival(events=self.events, name="dispatch", value=(x_TD, handle))

    def start_combine(self, y_SD: Tensor, handle: ops.DispatchHandle) -> Arrival:
        self.events.append("combine starts")
        return Arrival(events=self.events, name="combine", value=y_SD)


def test_shared_experts_run_while_tokens_travel() -> None:
    config = tiny("tiny_moe")
    assert config.moe is not None
    events: list[str] = []
    group = OneRank(events=events, num_local_experts=config.moe.num_experts)
    alone = Moe(config.width, config.moe)
    spread = Moe(config.width, config.moe, expert_parallel=group)  # type: ignore[arg-type]
    for parameter in alone.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    spread.load_state_dict(alone.state_dict())
    assert spread.shared is not None
    assert spread.experts is not None
    spread.shared.register_forward_hook(lambda *_: events.append("shared"))
    spread.experts.register_forward_hook(lambda *_: events.append("routed"))
    x_TD = torch.randn(14, config.width)
    placement = place(
        config, tokens_of(0, config), cu_seqlens=None, cache=None, num_new_B=None, drops_tokens=False
    )
    assert torch.equal(spread(x_TD, placement)[0], alone(x_TD, placement)[0])
    wanted = "dispatch starts, shared, dispatch waits, routed, combine starts, combine waits"
    assert ", ".join(events) == wanted


def test_a_rank_holds_its_share_of_the_experts() -> None:
    config = tiny("tiny_moe")
    assert config.moe is not None
    group = OneRank(events=[], num_local_experts=2)
    moe = Moe(config.width, config.moe, expert_parallel=group, device=torch.device("meta"))  # type: ignore[arg-type]
    assert len(moe.experts.gate_up) == len(moe.experts.down) == 2
    assert len(moe.gate.weight) == config.moe.num_experts


# ---- on two ranks ----


def gradients_of(config: ModelConfig, dtype: torch.dtype, stored: torch.dtype) -> dict[str, Any]:
    """Gradients and loads of one micro-batch a rank."""
    with open_mesh(expert=NUM_RANKS, replicate=1, device="cpu", timeout=60) as mesh:
        model, parts = sharded_model(config, mesh, dtype=dtype, stored=stored)
        tokens_BS = tokens_of(mesh.rank, config)
        loads = model.features(tokens_BS).loads_LE
        loss_of(model, tokens_BS, num_batches=NUM_RANKS).backward()
        gradients = {name: full(part, part.gradient()) for name, part in parts.items()}
        stored_as = {part.local.dtype for part in parts.values()}
    return {"gradients": gradients, "loads": loads, "stored": stored_as}


@dist
def test_dropped_tokens_are_those_of_one_process() -> None:
    config = dropping()
    wanted = whole_gradients(config, NUM_RANKS)
    model = whole_model(config)
    for rank, found in enumerate(
        run_ranks(gradients_of, config, torch.float32, torch.float32, num_ranks=NUM_RANKS)
    ):
        loads_LE = model.features(tokens_of(rank, config)).loads_LE
        assert loads_LE is not None
        assert config.moe is not None
        assert 0 < int(loads_LE.sum()) < 14 * config.moe.num_topk
        assert torch.equal(found["loads"], loads_LE)
        torch.testing.assert_close(found["gradients"], wanted, rtol=1e-4, atol=1e-6)


@dist
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_bfloat16_computes_on_the_weights_as_they_are_stored(stored: torch.dtype) -> None:
    config = tiny("tiny_moe")
    model = whole_model(config).to(torch.bfloat16)
    for batch_idx in range(NUM_RANKS):
        loss_of(model, tokens_of(batch_idx, config), num_batches=NUM_RANKS).backward()
    wanted = {name: parameter.grad for name, parameter in model.named_parameters()}
    for found in run_ranks(gradients_of, config, torch.bfloat16, stored, num_ranks=NUM_RANKS):
        assert found["stored"] == {stored}
        for name, gradient in found["gradients"].items():
            assert gradient.dtype == torch.float32
            assert_close(gradient.to(torch.bfloat16), wanted[name], dtype=torch.bfloat16)


def logits_and_compiled(config: ModelConfig) -> dict[str, Any]:
    with open_mesh(expert=NUM_RANKS, replicate=1, device="cpu", timeout=60) as mesh:
        model, parts = sharded_model(config, mesh)
        tokens_BS = tokens_of(mesh.rank, config)
        with torch.no_grad():
            logits = model.eval()(tokens_BS)
        compile_dense(model.train(), backend="aot_eager")
        for layer in model.layers:
            layer.recompute = "selective"
        loss_of(model, tokens_BS, num_batches=NUM_RANKS).backward()
        part = parts["layers.1.moe.shared.down.weight"]
        return {"logits": logits, "gradient": full(part, part.gradient())}


@dist
def test_evaluation_and_compiled_parts_work_on_a_sharded_model() -> None:
    config = tiny("tiny_moe")
    wanted = whole_gradients(config, NUM_RANKS)["layers.1.moe.shared.down.weight"]
    model = whole_model(config).eval()
    for rank, found in enumerate(run_ranks(logits_and_compiled, config, num_ranks=NUM_RANKS)):
        torch.testing.assert_close(found["logits"], model(tokens_of(rank, config)), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found["gradient"], wanted, rtol=1e-4, atol=1e-6)
