"""What a run takes in memory, reckoned against what the run really holds, and refused where it cannot fit."""

import logging

import pytest
import torch

from dscoder.config import preset
from dscoder.config.train import OptimizerConfig
from dscoder.models import Transformer, count_parameters, init_weights, materialise
from dscoder.testing.tiny_run import TINY_MOE
from dscoder.train import memory
from dscoder.train.memory import RankShare, require_memory, state_bytes
from dscoder.train.optimizer import MasterAdamW

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("dtype", "has_masters"),
    [(torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)],
    ids=["fp32", "bf16", "bf16_stochastic"],
)
def test_the_reckoning_is_what_a_run_holds(dtype: torch.dtype, has_masters: bool) -> None:
    model = Transformer(TINY_MOE, device="meta")
    materialise(model, dtype=dtype, device=CPU)
    init_weights(model, seed=0)
    optimizer = MasterAdamW(model, OptimizerConfig(), rounding_seed=None if has_masters else 0)
    model(torch.zeros(1, 8, dtype=torch.long)).float().sum().backward()
    need = state_bytes(count_parameters(TINY_MOE).total, dtype, has_masters=has_masters)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    counters = sum(moment.nbytes for name, moment in optimizer.moments.items() if name.endswith(".step"))
    state = sum(tensor.nbytes for tensor in optimizer.state().values()) - counters
    gradients = optimizer.gradients()
    assert gradients.keys() == dict(model.named_parameters()).keys()
    assert need.weights == weights
    assert need.gradients == sum(gradient.nbytes for gradient in gradients.values())
    assert need.checkpoint == state
    # The weights themselves are saved where they are the masters, or where there are none.
    assert need.optimizer == state - (0 if has_masters and dtype != torch.float32 else weights)


def test_doing_without_masters_saves_four_bytes_a_parameter() -> None:
    held, saved = (
        state_bytes(1000, torch.bfloat16, has_masters=has_masters) for has_masters in (True, False)
    )
    assert held.on_device - saved.on_device == 4000
    assert held.checkpoint - saved.checkpoint == 2000


def test_a_rank_needs_what_it_holds_and_a_host_what_its_ranks_need(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda:1")
    share = RankShare(num_held=500_000_000, num_local_ranks=8)
    need = state_bytes(500_000_000, torch.float32)
    rooms = {"host": 8 * need.checkpoint, "device": need.on_device}
    monkeypatch.setattr(memory, "host_memory", lambda: rooms["host"])
    monkeypatch.setattr(memory, "device_memory", lambda device: rooms["device"])
    require_memory(preset("v2_lite"), dtype=torch.float32, device=gpu, share=share)
    rooms["host"] -= 1
    with pytest.raises(ValueError, match="the host must have"):
        require_memory(preset("v2_lite"), dtype=torch.float32, device=gpu, share=share)
    rooms |= {"host": 8 * need.checkpoint, "device": need.on_device - 1}
    with pytest.raises(ValueError, match="cuda:1 must have"):
        require_memory(preset("v2_lite"), dtype=torch.float32, device=gpu, share=share)
    monkeypatch.setattr(memory, "host_memory", lambda: 8 * (need.checkpoint + need.on_device) - 1)
    with pytest.raises(ValueError, match="the host must have"):
        require_memory(preset("v2_lite"), dtype=torch.float32, device=CPU, share=share)


def test_a_model_that_cannot_fit_the_host_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "host_memory", lambda: 24 * 2**30)
    message = r"the host must have 438\.8 GiB .* 15,706,484,224 parameters .*, got 24\.0 GiB"
    with pytest.raises(ValueError, match=message):
        require_memory(preset("v2_lite"), dtype=torch.bfloat16, device=CPU)


def test_device_and_host_each_hold_their_own_part(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda:0")
    need = state_bytes(count_parameters(preset("coder_1_3b")).total, torch.bfloat16)
    rooms = {"host": need.checkpoint, "device": need.on_device}
    monkeypatch.setattr(memory, "host_memory", lambda: rooms["host"])
    monkeypatch.setattr(memory, "device_memory", lambda device: rooms["device"])
    require_memory(preset("coder_1_3b"), dtype=torch.bfloat16, device=gpu)
    rooms["device"] -= 1
    with pytest.raises(ValueError, match="cuda:0 must have"):
        require_memory(preset("coder_1_3b"), dtype=torch.bfloat16, device=gpu)
    rooms |= {"device": need.on_device, "host": need.checkpoint - 1}
    with pytest.raises(ValueError, match="the host must have"):
        require_memory(preset("coder_1_3b"), dtype=torch.bfloat16, device=gpu)


def test_what_a_run_takes_is_told(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("dscoder")
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.INFO, logger="dscoder"):
            require_memory(TINY_MOE, dtype=torch.float32, device=CPU)
    finally:
        logger.removeHandler(caplog.handler)
    assert f"{count_parameters(TINY_MOE).total:,} parameters" in caplog.text
    assert "gradients 0.00 and optimizer 0.00 GiB on cpu" in caplog.text
