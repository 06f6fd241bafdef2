"""AdamW on masters: torch's own AdamW in float32, exact small steps in bfloat16."""

import pytest
import torch
from torch import nn

from dscoder.config.train import OptimizerConfig
from dscoder.train.optimizer import MasterAdamW, decays

CONFIG = OptimizerConfig(weight_decay=0.1, clip_norm=1.0)


class Toy(nn.Module):
    """A matrix, a stack of matrices and a norm."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in {"matrix": (3, 4), "stack": (2, 3, 4), "norm": (4,)}.items():
            start = torch.randn(shape, generator=generator).to(dtype)
            self.register_parameter(name, nn.Parameter(start))

    def loss(self, scale: float) -> torch.Tensor:
        return scale * sum((p.float() ** 3).sum() for p in self.parameters())


def test_float32_steps_are_torchs_own() -> None:
    ours, theirs = Toy(), Toy()
    optimizer = MasterAdamW(ours, CONFIG)
    groups = [
        {"params": [p for p in theirs.parameters() if decays(p)], "weight_decay": 0.1},
        {"params": [p for p in theirs.parameters() if not decays(p)], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    for step in range(4):
        for model in (ours, theirs):
            model.loss(step + 1.0).backward()
        norm = optimizer.clip()
        wanted_norm = nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        torch.testing.assert_close(norm, wanted_norm)
        for group in reference.param_groups:
            group["lr"] = 0.01 * (step + 1)
        optimizer.step(0.01 * (step + 1))
        reference.step()
        reference.zero_grad()
    for mine, wanted in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, wanted)


class Plain:
    """What one process does, written out: gradients add up in float32, torch clips and moves the masters."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = list(model.parameters())
        self.masters = [p if p.dtype == torch.float32 else p.detach().float() for p in self.parameters]
        groups = [
            {"params": [m for m in self.masters if decays(m)], "weight_decay": 0.1},
            {"params": [m for m in self.masters if not decays(m)], "weight_decay": 0.0},
        ]
        self.adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=True)

    def take_gradients(self) -> None:
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if parameter is master:
                continue
            assert parameter.grad is not None
            master.grad = parameter.grad.float() if master.grad is None else master.grad + parameter.grad
            parameter.grad = None

    @torch.no_grad()
    def step(self, lr: float) -> torch.Tensor:
        norm = nn.utils.clip_grad_norm_(self.masters, 1.0, foreach=True)
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if parameter is not master:
                parameter.copy_(master)
        return norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_on_one_process_every_bit_is_that_of_torch(dtype: torch.dtype) -> None:
    ours, theirs = Toy(dtype), Toy(dtype)
    optimizer, reference = MasterAdamW(ours, CONFIG), Plain(theirs)
    for step in range(5):
        for micro in range(3):
            for model in (ours, theirs):
                model.loss(0.01 * (step + micro + 1)).backward()
            reference.take_gradients()
        assert torch.equal(optimizer.clip(), reference.step(0.01))
        optimizer.step(0.01)
        for mine, wanted in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(mine, wanted)


def test_decay_is_for_matrices_only() -> None:
    model = Toy()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = MasterAdamW(model, CONFIG)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(0.5)
    torch.testing.assert_close(model.norm, before["norm"])
    torch.testing.assert_close(model.matrix, before["matrix"] * (1 - 0.5 * 0.1))
    torch.testing.assert_close(model.stack, before["stack"] * (1 - 0.5 * 0.1))


def test_bfloat16_parameters_are_their_rounded_masters() -> None:
    model = Toy(torch.bfloat16)
    optimizer = MasterAdamW(model, CONFIG)
    before = {name: master.detach().clone() for name, master in optimizer.masters.items()}
    for _ in range(3):
        model.loss(1.0).backward()
        optimizer.clip()
        optimizer.step(1e-6)  # far below the spacing of bfloat16
    for name, parameter in model.named_parameters():
        master = optimizer.masters[name]
        assert master.dtype == torch.float32
        assert not torch.equal(master, before[name])
        assert torch.equal(parameter, master.bfloat16())


def test_bfloat16_gradients_add_up_in_float32() -> None:
    model = Toy(torch.bfloat16)
    optimizer = MasterAdamW(model, CONFIG)
    # 256 + 1 is 256 in bfloat16: a sum kept there would never grow.
    for addend in (256.0, *[1.0] * 8):
        (model.norm.float() * addend).sum().backward()
    assert model.norm.grad is None
    assert optimizer.masters["norm"].grad is not None
    assert optimizer.masters["norm"].grad.tolist() == [264.0] * 4


def copied(optimizer: MasterAdamW) -> tuple[Toy, MasterAdamW]:
    """A fresh model and optimizer with the state of another."""
    model = Toy(torch.bfloat16)
    fresh = MasterAdamW(model, CONFIG)
    for name, tensor in fresh.state().items():
        tensor.copy_(optimizer.state()[name])
    fresh.refresh_parameters()
    return model, fresh


def test_a_state_put_back_continues_bit_for_bit() -> None:
    runs = []
    for interrupted_at in (None, 3):
        model = Toy(torch.bfloat16)
        optimizer = MasterAdamW(model, CONFIG)
        for step in range(6):
            if step == interrupted_at:
                model, optimizer = copied(optimizer)
            model.loss(1.0).backward()
            optimizer.clip()
            optimizer.step(0.01)
        runs.append(optimizer.state())
    assert runs[0].keys() == runs[1].keys()
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
