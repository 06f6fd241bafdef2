"""What transformers saves loads here, and what we save loads there, with the same logits."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from dscoder.checkpoint import load_pretrained, save_pretrained

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
PUBLISHED = Path(__file__).parent / "published"
# The published shapes, made small; everything else of the published files stays.
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
    "rope_theta": 50.0,  # angles that differ within a few positions
}
SMALL_LLAMA = SMALL | {"num_key_value_heads": 2}
SMALL_V2 = SMALL | {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "n_routed_experts": 16,
    "moe_intermediate_size": 10,
}
CASES = {
    "coder_1_3b": SMALL_LLAMA | {"num_key_value_heads": 4},
    "coder_33b": SMALL_LLAMA,
    "v2_lite": SMALL_V2,
    "v2": SMALL_V2 | {"q_lora_rank": 12},
}


def read_there(directory):
    """transformers' model, and that it found every tensor and no other."""
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True, experts_implementation="eager"
    )
    # Without shared experts the class has matrices of no elements, which no file needs to hold.
    empty = {name for name, tensor in model.state_dict().items() if not tensor.numel()}
    assert not info["missing_keys"] - empty
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


def publish(name, directory):
    """A checkpoint as published: the true config.json made small, random weights under its names."""
    directory.mkdir()
    fields = json.loads((PUBLISHED / f"{name}.json").read_text()) | CASES[name]
    (directory / "config.json").write_text(json.dumps(fields))
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for key, tensor in empty.state_dict().items():
        values = torch.empty(tensor.shape).normal_(float(tensor.dim() == 1), 0.2, generator=generator)
        tensors |= split_experts(key, values)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def split_experts(key, values):
    stem, _, kind = key.rpartition(".")
    if kind == "down_proj":
        return {f"{stem}.{j}.down_proj.weight": values[j].clone() for j in range(len(values))}
    if kind != "gate_up_proj":
        return {key: values}
    halves = {"gate_proj": 0, "up_proj": 1}
    return {
        f"{stem}.{j}.{part}.weight": values[j].chunk(2)[half].clone()
        for j in range(len(values))
        for part, half in halves.items()
    }


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_published_directory_gives_the_logits_of_transformers(name, tmp_path, tokens):
    publish(name, tmp_path / "model")
    ours, theirs = load_pretrained(tmp_path / "model"), read_there(tmp_path / "model")
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, **TOLERANCE)


@torch.no_grad()
def test_what_we_save_gives_the_same_logits_there(model, tmp_path, tokens):
    save_pretrained(model, tmp_path / "model", max_shard_bytes=3000)
    theirs = read_there(tmp_path / "model")
    torch.testing.assert_close(theirs(tokens).logits, model(tokens), **TOLERANCE)


@torch.no_grad()
def test_what_transformers_saves_gives_the_same_logits_here(model, tmp_path, tokens):
    save_pretrained(model, tmp_path / "ours")
    theirs = read_there(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="3KB")
    back = load_pretrained(tmp_path / "theirs")
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), model.parameters(), strict=True))
    torch.testing.assert_close(back(tokens), theirs(tokens).logits, **TOLERANCE)


@torch.no_grad()
def test_bfloat16_weights_arrive_there_bit_by_bit(lite, tmp_path):
    save_pretrained(lite.to(torch.bfloat16), tmp_path / "model")
    theirs = read_there(tmp_path / "model")
    assert theirs.dtype == torch.bfloat16
    theirs.save_pretrained(tmp_path / "theirs")
    back = load_pretrained(tmp_path / "theirs")
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), lite.parameters(), strict=True))
    assert back.embed.weight.dtype == torch.bfloat16
