"""The optimizer on many ranks: the steps of one process, whatever the layout."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dscoder.config import MlaConfig, ModelConfig
from dscoder.config.train import OptimizerConfig
from dscoder.models import Transformer
from dscoder.models.sharding import Part, parts
from dscoder.runtime.mesh import Mesh, arrange, open_mesh
from dscoder.testing.ranks import run_ranks
from dscoder.train.optimizer import MasterAdamW
from tests.models.sharded import loss_of, sharded_model, tiny, tokens_of, whole_model
from tests.whole import whole_of

pytestmark = pytest.mark.dist

# A step is a ratio of moments: where a gradient is next to nothing, eps keeps rounding out of it.
CONFIG = OptimizerConfig(weight_decay=0.1, clip_norm=0.5, eps=1e-4)
LOOSE = replace(CONFIG, clip_norm=1e9)
LAYOUTS = {2: [(1, 1), (2, 1), (1, 2)], 4: [(2, 1), (4, 1), (2, 2)]}
NUM_STEPS, NUM_BATCHES = 3, 5


def config_of() -> ModelConfig:
    """Rows that do not divide over the ranks; of the latent's norm one of four has none."""
    config = tiny("tiny_moe")
    assert isinstance(config.attention, MlaConfig)
    return replace(config, vocab_size=67, mlp_width=23, attention=replace(config.attention, kv_lora_rank=5))


def full(tensor: Tensor) -> Tensor:
    return whole_of(tensor) if isinstance(tensor, DTensor) else tensor.clone()


def run_alone() -> tuple[list[float], dict[str, Tensor]]:
    """The norms and the state after some steps of one process."""
    config = config_of()
    model = whole_model(config)
    optimizer, norms = MasterAdamW(model, CONFIG), []
    for step in range(NUM_STEPS):
        for i in range(NUM_BATCHES):
            loss_of(model, tokens_of(step * NUM_BATCHES + i, config), num_batches=NUM_BATCHES).backward()
        norms.append(optimizer.clip().item())
        optimizer.step(1e-2)
    return norms, {name: tensor.detach() for name, tensor in optimizer.state().items()}


def run_spread(mesh: Mesh) -> tuple[list[float], dict[str, Tensor], Transformer]:
    """The same on a mesh."""
    config = config_of()
    model, _ = sharded_model(config, mesh)
    optimizer, norms = MasterAdamW(model, CONFIG, mesh=mesh), []
    rounds = -(-NUM_BATCHES // mesh.world_size)
    for step in range(NUM_STEPS):
        for turn in range(rounds):
            i = turn * mesh.world_size + mesh.rank
            model.set_requires_gradient_sync(turn == rounds - 1)
            tokens_BS = tokens_of(step * NUM_BATCHES + i, config)
            tokens_BS = tokens_BS if i < NUM_BATCHES else tokens_BS[:0]
            loss_of(model, tokens_BS, num_batches=NUM_BATCHES).backward()
        norms.append(optimizer.clip().item())
        optimizer.step(1e-2)
    return norms, {name: full(tensor) for name, tensor in optimizer.state().items()}, model


def step_on_layouts(num_ranks: int) -> list[tuple[list[float], dict[str, Tensor]]]:
    found = []
    with open_mesh(expert=1, replicate=1, device="cpu", timeout=60) as world:
        for expert, replicate in LAYOUTS[num_ranks]:
            mesh = arrange(world, expert=expert, replicate=replicate)
            norms, state, model = run_spread(mesh)
            assert len(set(map(tuple, mesh.gather(norms)))) == 1
            assert_parameters_are_the_masters(parts(model, mesh), state)
            found.append((norms, state))
    return found if world.is_first else []


def assert_parameters_are_the_masters(held: dict[str, Part], state: dict[str, Tensor]) -> None:
    for name, part in held.items():
        assert torch.equal(full(part.whole(part.local)), state[f"master.{name}"]), name
        assert part.parameter.grad is None


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_steps_are_those_of_one_process(num_ranks: int) -> None:
    wanted_norms, wanted = run_alone()
    assert min(wanted_norms) > CONFIG.clip_norm
    for norms, state in run_ranks(step_on_layouts, num_ranks, num_ranks=num_ranks)[0]:
        assert norms == pytest.approx(wanted_norms, rel=1e-5)
        assert state.keys() == wanted.keys()
        for name, tensor in state.items():
            assert tensor.dtype == wanted[name].dtype
            torch.testing.assert_close(
                tensor, wanted[name], rtol=1e-3, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}"
            )


def given_gradients(model: Transformer, step: int) -> dict[str, Tensor]:
    """The same for every layout, whole."""
    generator = torch.Generator().manual_seed(step)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}


def round_alone() -> dict[str, Tensor]:
    """The state after steps without masters by given gradients, on one process."""
    model = whole_model(config_of()).bfloat16()
    optimizer = MasterAdamW(model, LOOSE, rounding_seed=5)
    for step in range(NUM_STEPS):
        for name, gradient in given_gradients(model, step).items():
            model.get_parameter(name).backward(gradient)
        optimizer.clip()
        optimizer.step(1e-2)
    return {name: tensor.clone() for name, tensor in optimizer.state().items()}


def round_on_layouts(num_ranks: int) -> None:
    wanted = round_alone()
    with open_mesh(expert=1, replicate=1, device="cpu", timeout=60) as world:
        for expert, replicate in LAYOUTS[num_ranks]:
            round_spread(arrange(world, expert=expert, replicate=replicate), wanted)


def round_spread(mesh: Mesh, wanted: dict[str, Tensor]) -> None:
    """The same steps on a mesh, to the same bits."""
    alone = whole_model(config_of())
    model, held = sharded_model(config_of(), mesh, dtype=torch.bfloat16, stored=torch.bfloat16)
    optimizer = MasterAdamW(model, LOOSE, mesh=mesh, rounding_seed=5)
    for step in range(NUM_STEPS):
        for name, gradient in given_gradients(alone, step).items():
            put_gradient(held[name], gradient)
        optimizer.clip()
        optimizer.step(1e-2)
    state = optimizer.state()
    assert state.keys() == wanted.keys()
    for name, tensor in state.items():
        assert torch.equal(full(tensor), wanted[name]), (name, mesh.expert, mesh.replicate)
    step_by_a_backward_pass(model, optimizer, held)


def step_by_a_backward_pass(model: Transformer, optimizer: MasterAdamW, held: dict[str, Part]) -> None:
    """What FSDP itself leaves at bfloat16 parameters moves them."""
    before = {name: full(part.whole(part.local)).clone() for name, part in held.items()}
    loss_of(model, tokens_of(0, config_of()), num_batches=1).backward()
    assert {gradient.dtype for gradient in optimizer.gradients().values()} == {torch.float32}
    assert optimizer.gradients().keys() == held.keys()
    optimizer.clip()
    optimizer.step(1e-2)
    assert not optimizer.gradients()
    for name, part in held.items():
        after = full(part.whole(part.local))
        assert after.dtype == torch.bfloat16
        assert after.isfinite().all()
        assert not torch.equal(after, before[name]), name


def put_gradient(part: Part, gradient: Tensor) -> None:
    """Leave this rank's part of `gradient` at the parameter and say so, as FSDP does."""
    sharded = torch.zeros_like(part.parameter)
    assert isinstance(sharded, DTensor)
    sharded.to_local().copy_(part.take(gradient))
    part.parameter.grad = sharded
    for hook in (part.parameter._post_accumulate_grad_hooks or {}).values():  # type: ignore[attr-defined]
        hook(part.parameter)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_rounding_at_random_is_the_same_on_every_layout_bit_for_bit(num_ranks: int) -> None:
    run_ranks(round_on_layouts, num_ranks, num_ranks=num_ranks)
