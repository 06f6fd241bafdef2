"""AdamW without masters: right on average, whatever the layout, and as good as masters where it counts."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dscoder.config import GqaConfig, ModelConfig
from dscoder.config.train import OptimizerConfig
from dscoder.models import Transformer, init_weights
from dscoder.models.region import Region, whole_region
from dscoder.models.sharding import Part
from dscoder.train.optimizer import MasterAdamW
from dscoder.train.stochastic import StochasticAdamW

CONFIG = OptimizerConfig(weight_decay=0.1, clip_norm=1.0)


class Toy(nn.Module):
    """One stack of matrices and one norm, of the same values in any type."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.stack = nn.Parameter(torch.randn(5, 6, 7, generator=generator).bfloat16().to(dtype))
        self.norm = nn.Parameter(torch.ones(13, dtype=dtype))

    def loss(self) -> Tensor:
        return sum(((p.float() - 0.5) ** 2).sum() for p in self.parameters())


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A box of a parameter, as a rank holds it."""

    parameter: nn.Parameter
    region: Region

    @property
    def whole_shape(self) -> tuple[int, ...]:
        return self.region.whole_shape

    @property
    def local(self) -> Tensor:
        return self.parameter.detach()


def boxes(shape: tuple[int, ...], dim: int, at: int) -> list[Region]:
    """A tensor of `shape` cut in two."""
    first, second = list(shape), list(shape)
    first[dim], second[dim] = at, shape[dim] - at
    start = [0] * len(shape)
    start[dim] = at
    return [
        Region(whole_shape=shape, start=(0,) * len(shape), shape=tuple(first)),
        Region(whole_shape=shape, start=tuple(start), shape=tuple(second)),
    ]


def moved(weights: Tensor, gradients: list[Tensor], region: Region) -> Tensor:
    """A box of `weights` after a step with each of `gradients`."""
    inside = region.slices(whole_region(region.whole_shape))
    part = Cut(parameter=nn.Parameter(weights[inside].clone()), region=region)
    adam = StochasticAdamW({"w": part}, CONFIG, seed=7)  # type: ignore[dict-item]
    for gradient in gradients:
        adam.gradients["w"] = gradient[inside].clone()
        adam.step(0.01)
    return part.local


@pytest.mark.parametrize(
    ("shape", "dim", "at"), [((1031,), 0, 17), ((37, 29), 0, 5), ((5, 16, 9), 0, 5), ((5, 16, 9), 1, 3)]
)
def test_two_parts_move_as_the_whole_does_bit_for_bit(shape: tuple[int, ...], dim: int, at: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(shape, generator=generator).bfloat16()
    gradients = [torch.randn(shape, generator=generator) for _ in range(4)]
    whole = moved(weights, gradients, whole_region(shape))
    assert not torch.equal(whole, weights)
    for region in boxes(shape, dim, at):
        assert torch.equal(moved(weights, gradients, region), whole[region.slices(whole_region(shape))])


def test_a_large_parameter_moves_as_a_small_one(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, gradient = torch.ones(1000, dtype=torch.bfloat16), torch.linspace(-1, 1, 1000)
    at_once = moved(weights, [gradient] * 3, whole_region((1000,)))
    monkeypatch.setattr("dscoder.train.stochastic._CPU_CHUNK", 77)
    assert torch.equal(moved(weights, [gradient] * 3, whole_region((1000,))), at_once)


def test_before_rounding_a_step_is_that_of_masters() -> None:
    ours, theirs = Toy(), Toy(torch.float32)
    for model, optimizer in (
        (ours, MasterAdamW(ours, CONFIG, rounding_seed=0)),
        (theirs, MasterAdamW(theirs, CONFIG)),
    ):
        model.loss().backward()
        optimizer.clip()
        optimizer.step(0.01)
    for mine, wanted in zip(ours.parameters(), theirs.parameters(), strict=True):
        spacing = wanted.abs().log2().floor().exp2() / 128
        assert ((mine.float() - wanted).abs() < spacing * 1.001).all()


def small_steps(num_steps: int, lr: float, *, is_stochastic: bool) -> Tensor:
    """Weights 1.0 after steps of `lr` each, far below half the spacing of bfloat16, downhill all the way."""
    part = Part(
        name="w", parameter=nn.Parameter(torch.ones(1 << 14, dtype=torch.bfloat16)), whole_shape=(1 << 14,)
    )
    adam = StochasticAdamW({"w": part}, CONFIG, seed=1)
    for _ in range(num_steps):
        before = part.local.clone()
        adam.gradients["w"] = torch.ones(1 << 14)
        if is_stochastic:
            adam.step(lr)
        else:
            part.local.copy_(before.float() - lr)  # copies round to nearest
    return part.local


def test_rounding_to_nearest_loses_small_updates_and_rounding_at_random_keeps_them() -> None:
    lr, num_steps = 2e-5, 100
    assert (small_steps(num_steps, lr, is_stochastic=False) == 1.0).all()
    weights = small_steps(num_steps, lr, is_stochastic=True).double()
    # A walk of steps of one spacing, 2**-8 below one: its variance is at most that times the way gone.
    deviation = (lr * num_steps * 2**-8 / weights.numel()) ** 0.5
    assert abs(weights.mean() - (1.0 - lr * num_steps)) < 5 * deviation
    assert weights.unique().numel() > 2


def test_gradients_add_up_in_float32() -> None:
    model = Toy()
    optimizer = MasterAdamW(model, CONFIG, rounding_seed=0)
    for addend in (256.0, *[1.0] * 8):
        (model.norm.float() * addend).sum().backward()
    assert model.norm.grad is None
    assert optimizer.gradients()["norm"].tolist() == [264.0] * 13
    assert optimizer.clip().item() == pytest.approx(264 * 13**0.5)
    assert torch.linalg.vector_norm(optimizer.gradients()["norm"]).item() == pytest.approx(1.0)


def test_a_checkpoint_holds_weights_and_moments_and_no_masters() -> None:
    state = MasterAdamW(Toy(), CONFIG, rounding_seed=0).state()
    wanted = {f"weight.{name}" for name in ("stack", "norm")}
    wanted |= {
        f"adam.{name}.{key}" for name in ("stack", "norm") for key in ("step", "exp_avg", "exp_avg_sq")
    }
    assert state.keys() == wanted
    types = {tensor.dtype for name, tensor in state.items() if name.startswith("weight.")}
    assert types == {torch.bfloat16}


def copied(optimizer: MasterAdamW) -> tuple[Toy, MasterAdamW]:
    """A fresh model and optimizer with the state of another."""
    model = Toy()
    fresh = MasterAdamW(model, CONFIG, rounding_seed=3)
    for name, tensor in fresh.state().items():
        tensor.copy_(optimizer.state()[name])
    fresh.refresh_parameters()
    return model, fresh


def test_a_state_put_back_continues_bit_for_bit() -> None:
    runs = []
    for interrupted_at in (None, 3):
        model = Toy()
        optimizer = MasterAdamW(model, CONFIG, rounding_seed=3)
        for step in range(6):
            if step == interrupted_at:
                model, optimizer = copied(optimizer)
            model.loss().backward()
            optimizer.clip()
            optimizer.step(0.01)
        runs.append(optimizer.state())
    assert runs[0].keys() == runs[1].keys()
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_another_seed_rounds_otherwise() -> None:
    results = []
    for seed in (0, 0, 1):
        model = Toy()
        optimizer = MasterAdamW(model, CONFIG, rounding_seed=seed)
        model.loss().backward()
        optimizer.step(0.01)
        results.append(model.stack.detach())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_other_types_are_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"parameter stack must be torch\.bfloat16 .*, got torch\.float16"):
        MasterAdamW(Toy(torch.float16), CONFIG, rounding_seed=0)


def test_float32_parameters_keep_themselves_for_masters() -> None:
    ours, theirs = Toy(torch.float32), Toy(torch.float32)
    for model, seed in ((ours, 0), (theirs, None)):
        optimizer = MasterAdamW(model, CONFIG, rounding_seed=seed)
        model.loss().backward()
        optimizer.step(0.01)
    for mine, wanted in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, wanted)


TINY = ModelConfig(
    vocab_size=64,
    width=32,
    num_layers=1,
    mlp_width=64,
    attention=GqaConfig(num_heads=2, num_kv_heads=2, head_dim=16),
    max_positions=32,
    init_std=0.1,
)


def arithmetic_sequences(step: int) -> Tensor:
    """[8, 16]: from a random start on by a random stride; the third token follows from the first two."""
    generator = torch.Generator().manual_seed(step)
    start = torch.randint(0, 64, (8, 1), generator=generator)
    stride = torch.randint(1, 8, (8, 1), generator=generator)
    return (start + stride * torch.arange(16)) % 64


def last_loss(kind: str, num_steps: int) -> float:
    """The mean loss of the last fifth of a run in bfloat16 with `kind`: masters, random or nearest."""
    model = Transformer(TINY, dtype=torch.bfloat16)
    init_weights(model, seed=0)
    optimizer = MasterAdamW(model, OptimizerConfig(), rounding_seed=0 if kind == "random" else None)
    losses = []
    for step in range(num_steps):
        tokens_BS = arithmetic_sequences(step)
        logits_BSV = model.train()(tokens_BS)
        loss = F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1).float(), tokens_BS[:, 1:].flatten())
        loss.backward()
        optimizer.clip()
        optimizer.step(1e-3)
        if kind == "nearest":
            for name, parameter in model.named_parameters():
                optimizer.masters[name].data.copy_(parameter)
        losses.append(loss.item())
    return sum(losses[-num_steps // 5 :]) / (num_steps // 5)


def test_it_trains_as_well_as_masters_do() -> None:
    masters, random, nearest = (last_loss(kind, 200) for kind in ("masters", "random", "nearest"))
    assert abs(random / masters - 1.0) < 0.02
    assert nearest / masters - 1.0 > 0.05
