"""Training steps on a GPU: the kernels' loss and gradients are those of the reference on the CPU."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dscoder.config import MlaConfig, ModelConfig, MoeConfig
from dscoder.config.train import OptimizerConfig
from dscoder.data.loader import IGNORED, Batch
from dscoder.models import Transformer
from dscoder.models.init import init_weights, materialise
from dscoder.testing import gpu
from dscoder.testing.compare import assert_close
from dscoder.train.loop import train_step
from dscoder.train.optimizer import MasterAdamW

# The attention and the gate of V2-Lite, which the kernels are made for, in a small model.
CONFIG = ModelConfig(
    vocab_size=512,
    width=256,
    num_layers=2,
    mlp_width=512,
    attention=MlaConfig(
        num_heads=16, q_lora_rank=None, kv_lora_rank=512, nope_dim=128, rope_dim=64, value_dim=128
    ),
    moe=MoeConfig(num_experts=16, num_shared_experts=1, num_topk=4, expert_width=128),
    max_positions=1024,
)
LENGTHS = [(256,), (100, 31, 125)]


def model_on(device: str, dtype: torch.dtype) -> Transformer:
    model = Transformer(CONFIG, device="meta").train()
    materialise(model, dtype=torch.float32, device="cpu")
    init_weights(model, seed=0)
    return model.to(device, dtype)


def batch_on(device: str, lengths: tuple[int, ...]) -> Batch:
    rng = torch.Generator().manual_seed(sum(lengths))
    tokens_BS = torch.randint(0, CONFIG.vocab_size, (1, sum(lengths)), generator=rng)
    labels_BS, ends = tokens_BS.roll(-1, dims=1), torch.tensor([0, *lengths]).cumsum(0)
    labels_BS[:, ends[1:] - 1] = IGNORED
    batch = Batch(tokens_BS=tokens_BS, labels_BS=labels_BS, cu_seqlens=ends.int(), window_idx=(0,))
    return replace(batch, tokens_BS=tokens_BS.to(device), labels_BS=labels_BS.to(device))


def gradients(device: str, dtype: torch.dtype, lengths: tuple[int, ...]) -> dict[str, Tensor]:
    """The loss, and what one micro-batch adds to every gradient."""
    model, batch = model_on(device, dtype), batch_on(device, lengths)
    features = model.features(batch.tokens_BS, cu_seqlens=batch.cu_seqlens)
    logits_BSV = model.head(features.hidden_BSD).float()
    loss = torch.nn.functional.cross_entropy(
        logits_BSV.flatten(0, 1), batch.labels_BS.flatten(), ignore_index=IGNORED
    )
    (loss + features.balance).backward()
    found = {name: parameter.grad.cpu() for name, parameter in model.named_parameters()}
    return {"loss": loss.detach().cpu()[None], **found}


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_a_micro_batch_has_the_references_gradients(lengths: tuple[int, ...]) -> None:
    """In float32, where no choice of experts turns on a rounding."""
    wanted = gradients("cpu", torch.float32, lengths)
    for name, got in gradients(gpu.DEVICE, torch.float32, lengths).items():
        assert_close(got, wanted[name], dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_steps_on_one_batch_lower_its_loss(dtype: torch.dtype) -> None:
    model, batch = model_on(gpu.DEVICE, dtype), batch_on(gpu.DEVICE, LENGTHS[1])
    optimizer = MasterAdamW(model, OptimizerConfig())
    losses = [train_step(model, optimizer, [batch], lr=1e-2, step=i).loss for i in range(20)]
    assert losses[-1] < 0.7 * losses[0], losses
