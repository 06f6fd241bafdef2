"""The name tables against the names that the published classes have."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dscoder.checkpoint import config_to_hf
from dscoder.checkpoint.names import has_stacked_experts, is_derived, pieces
from dscoder.config import preset
from dscoder.models import Transformer


def published_shapes(config):
    """Name and shape of every tensor of transformers' class, one matrix an expert, as files have them."""
    fields = config_to_hf(config)
    hf_config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config)
    shapes = {}
    for name, tensor in model.state_dict().items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            shapes[name] = tuple(tensor.shape)
            continue
        stem, kind = name.rsplit(".", 1)
        num_experts, rows, columns = tensor.shape
        names = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
        for j in range(num_experts):
            shapes |= {f"{stem}.{j}.{part}.weight": (rows // len(names), columns) for part in names}
    return shapes


@pytest.mark.parametrize("name", ["coder_1_3b", "coder_33b", "v2_lite", "v2"])
def test_names_and_shapes_are_the_published_ones(name):
    config = replace(preset(name), num_layers=2)
    parameters = dict(Transformer(config, device="meta").named_parameters())
    ours = {piece.name: tuple(piece.view(parameters[piece.parameter]).shape) for piece in pieces(config)}
    assert ours == published_shapes(config)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("name", ["tiny_dense", "tiny_moe"])
def test_the_pieces_cover_every_element_once(name, stacked):
    config = preset(name)
    model = Transformer(config, device="meta").to_empty(device="cpu")
    counts = dict(model.named_parameters())
    with torch.no_grad():
        for count in counts.values():
            count.zero_()
        for piece in pieces(config, stacked_experts=stacked):
            piece.view(counts[piece.parameter]).add_(1)
    assert all(torch.equal(count, torch.ones_like(count)) for count in counts.values())


def test_gate_rows_stand_above_up_rows():
    config = preset("tiny_dense")
    by_name = {piece.name: piece for piece in pieces(config)}
    gate_up = torch.arange(4)[:, None]
    assert by_name["model.layers.0.mlp.gate_proj.weight"].view(gate_up).flatten().tolist() == [0, 1]
    assert by_name["model.layers.0.mlp.up_proj.weight"].view(gate_up).flatten().tolist() == [2, 3]


def test_a_tied_head_has_no_tensor():
    names = [piece.name for piece in pieces(replace(preset("tiny_dense"), tie_embeddings=True))]
    assert "lm_head.weight" not in names
    assert "model.embed_tokens.weight" in names


def test_stacked_experts_are_told_by_name():
    assert has_stacked_experts(["model.layers.1.mlp.experts.gate_up_proj"])
    assert not has_stacked_experts(["model.layers.1.mlp.experts.0.gate_proj.weight"])


def test_rotary_frequencies_are_derived():
    assert is_derived("model.layers.0.self_attn.rotary_emb.inv_freq")
    assert not is_derived("model.layers.0.self_attn.q_proj.weight")
