"""Fine-tuning by adapters: what is trained, saved, gone on from, and left for others to load."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from dscoder.checkpoint import load_pretrained
from dscoder.checkpoint.adapter import load_adapter, lora_parts
from dscoder.config import GqaConfig
from dscoder.config.lora import LoraConfig
from dscoder.config.train import OptimizerConfig, ReportConfig
from dscoder.models import count_parameters
from dscoder.models.lora import add_lora, merge_lora
from dscoder.runtime.artifact import read_manifest
from dscoder.testing.tiny_sft import TINY_CHAT, sft_config_for, tiny_base, tiny_dialogues
from dscoder.train import sft
from dscoder.train.checkpointing import completed
from dscoder.train.memory import state_bytes
from dscoder.train.optimizer import MasterAdamW

DENSE = replace(TINY_CHAT, attention=GqaConfig(num_heads=4, num_kv_heads=2, head_dim=8), moe=None)
LORA = LoraConfig(rank=4, alpha=8.0, dropout=0.1)
QUIET = ReportConfig(log_every=1, eval_every=100, tensorboard="off", plot="off")


@pytest.fixture(scope="module", params=["latent", "dense"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = TINY_CHAT if request.param == "latent" else DENSE
    # Wide weights: with a head near zero adapters can change next to nothing.
    return tiny_base(tmp_path_factory.mktemp(f"base_{request.param}"), config=replace(config, init_std=0.15))


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dialogues(tmp_path_factory.mktemp("dialogues") / "d.jsonl")


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(torch.arange(24).view(2, 12))
    return logits


def test_the_base_and_the_adapter_are_the_merged_model(base: Path, dialogues: Path, tmp_path: Path) -> None:
    losses: list[float] = []

    def note(report: Mapping[str, float]) -> None:
        losses.extend([report["loss"]] if "loss" in report else [])

    config = sft_config_for(base, dialogues, tmp_path, lora=LORA, num_steps=30, report=QUIET)
    schedule = replace(config.schedule, max_lr=3e-2)
    out = sft.run(replace(config, schedule=schedule), on_metrics=note)
    assert losses[-1] < losses[0] - 0.5
    merged, model = load_pretrained(out / "model"), load_pretrained(base)
    plain = logits_of(model)
    load_adapter(model, out / "adapter")
    assert (logits_of(model) - plain).abs().max() > 0.1
    torch.testing.assert_close(logits_of(model), logits_of(merged), rtol=1e-4, atol=1e-4)
    assert torch.equal(merged.embed.weight, load_pretrained(base).embed.weight)


def test_peft_loads_what_a_run_leaves(base: Path, dialogues: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    out = sft.run(sft_config_for(base, dialogues, tmp_path, lora=LORA, report=QUIET))
    # By the name of its base in adapter_config.json.
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(
        out / "adapter", attn_implementation="eager", experts_implementation="eager"
    ).eval()
    with torch.no_grad():
        logits = theirs(torch.arange(24).view(2, 12)).logits
    torch.testing.assert_close(logits, logits_of(load_pretrained(out / "model")), rtol=1e-4, atol=1e-4)


def test_checkpoints_hold_the_adapters_alone(base: Path, dialogues: Path, tmp_path: Path) -> None:
    out = sft.run(sft_config_for(base, dialogues, tmp_path, lora=LORA, report=QUIET))
    metadata = (completed(out / "checkpoints")[-1][1] / ".metadata").read_bytes()
    assert b"master.layers.0.attention.query.downs.0" in metadata
    assert b"master.embed" not in metadata
    assert b".base.weight" not in metadata
    assert read_manifest(out, command="sft")["facts"]["num_threads"] == 1


class KilledError(Exception):
    """Stands for whatever ends a process."""


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_that_failed_goes_on_to_the_same_adapter(
    base: Path, dialogues: Path, tmp_path: Path, precision: str
) -> None:
    def fail(report: Mapping[str, float]) -> None:
        if report["step"] == 5:
            raise KilledError

    whole, cut = (
        sft_config_for(base, dialogues, tmp_path / name, lora=LORA, precision=precision, report=QUIET)
        for name in ("whole", "cut")
    )
    sft.run(whole)
    with pytest.raises(KilledError):
        sft.run(cut, on_metrics=fail)
    torch.rand(5)  # dropout draws from torch's generator, whose state is saved
    sft.run(cut)
    for name in ("adapter/adapter_model.safetensors", "model/model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
    with safe_open(tmp_path / "cut" / "adapter" / "adapter_model.safetensors", framework="pt") as file:
        wanted = torch.bfloat16 if precision == "bf16" else torch.float32
        assert {file.get_tensor(name).dtype for name in file.keys()} == {wanted}  # noqa: SIM118


def test_another_adapter_config_is_refused(base: Path, dialogues: Path, tmp_path: Path) -> None:
    config = sft_config_for(base, dialogues, tmp_path, lora=LORA, num_steps=1, report=QUIET)
    sft.run(config)
    with pytest.raises(ValueError, match=r"config\.lora\.rank: 4 there, 8 here"):
        sft.run(replace(config, lora=replace(LORA, rank=8)))


def test_work_in_the_place_of_the_adapter_is_refused_and_kept(
    base: Path, dialogues: Path, tmp_path: Path
) -> None:
    config = sft_config_for(base, dialogues, tmp_path, lora=LORA, report=QUIET)

    def fail(report: Mapping[str, float]) -> None:
        if report["step"] == 4:
            raise KilledError

    with pytest.raises(KilledError):
        sft.run(config, on_metrics=fail)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"must hold an adapter and nothing else"):
        sft.run(config, on_metrics=lambda report: pytest.fail("made a step"))
    assert (tmp_path / "adapter" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_reckoning_is_what_a_run_of_adapters_holds(base: Path, dtype: torch.dtype) -> None:
    model = load_pretrained(base, dtype=dtype).train()
    add_lora(model, lora_parts(model.config, LORA.targets), LORA, seed=0)
    num_adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    optimizer = MasterAdamW(model, OptimizerConfig())
    model(torch.zeros(1, 8, dtype=torch.long)).float().sum().backward()
    need = state_bytes(count_parameters(model.config).total, dtype, num_adapters=num_adapters)
    counters = sum(moment.nbytes for name, moment in optimizer.moments.items() if name.endswith(".step"))
    assert need.weights == sum(parameter.nbytes for parameter in model.parameters())
    assert need.checkpoint == sum(tensor.nbytes for tensor in optimizer.state().values()) - counters
    gradients = [master.grad for master in optimizer.masters.values() if master.grad is not None]
    assert need.gradients == sum(gradient.nbytes for gradient in gradients)


def test_gradients_are_those_of_the_merged_weight(base: Path) -> None:
    """d loss / dB = scale * (d loss / dW) A', and d loss / dA = scale * B' (d loss / dW)."""
    lora = replace(LORA, dropout=0.0)
    model = load_pretrained(base).double().train()
    add_lora(model, lora_parts(model.config, ("o_proj",)), lora, seed=0)
    layer = model.get_submodule("layers.0.attention.out")
    assert isinstance(layer.ups, torch.nn.ParameterList)
    assert isinstance(layer.downs, torch.nn.ParameterList)
    torch.nn.init.normal_(layer.ups[0], std=0.1)
    up, down = layer.ups[0], layer.downs[0]
    tokens_BS = torch.arange(24).view(2, 12)
    model(tokens_BS).square().sum().backward()
    assert up.grad is not None
    assert down.grad is not None
    merge_lora(model)
    model(tokens_BS).square().sum().backward()
    gradient_DF = model.get_parameter("layers.0.attention.out.weight").grad
    assert gradient_DF is not None
    torch.testing.assert_close(up.grad, lora.scale * gradient_DF @ down.detach().T, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(down.grad, lora.scale * up.detach().T @ gradient_DF, rtol=1e-4, atol=1e-6)
