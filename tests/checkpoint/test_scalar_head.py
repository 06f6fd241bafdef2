"""A scalar head in transformers' ...ForSequenceClassification layout: both ways, with the same scores."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from dscoder.checkpoint import load_config, load_pretrained, load_scalar_model, save_pretrained
from dscoder.models import ScalarModel
from dscoder.text.tokenizer import Tokenizer
from tests.checkpoint.conftest import CONFIGS, LITE, build

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def read_there(directory):
    """transformers' model, and that it found every tensor and no other."""
    model, info = AutoModelForSequenceClassification.from_pretrained(
        directory, output_loading_info=True, experts_implementation="eager"
    )
    empty = {name for name, tensor in model.state_dict().items() if not tensor.numel()}
    assert not info["missing_keys"] - empty
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


def scalar(config):
    model = ScalarModel(build(replace(config, bos_id=0, eos_id=1)), seed=3).eval()
    with torch.no_grad():
        model.score.weight.normal_(0.0, 0.2, generator=torch.Generator().manual_seed(5))
    return model


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_what_is_saved_scores_the_same_in_transformers(name, tokens, tmp_path):
    ours = scalar(CONFIGS[name])
    save_pretrained(ours, tmp_path / "model")
    theirs = read_there(tmp_path / "model")
    assert type(theirs).__name__ in ("LlamaForSequenceClassification", "DeepseekV2ForSequenceClassification")
    tokens = tokens.clamp(min=2)
    wanted = theirs(tokens).logits
    assert wanted.shape == (2, 1)
    torch.testing.assert_close(ours(tokens), wanted[:, 0], **TOLERANCE)


@pytest.mark.parametrize("name", ["lite", "dense", "tied_dense"])
@torch.no_grad()
def test_what_transformers_saves_scores_the_same_here(name, tokens, tmp_path):
    save_pretrained(scalar(CONFIGS[name]), tmp_path / "ours")
    theirs = read_there(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_scalar_model(tmp_path / "theirs")
    tokens = tokens.clamp(min=2)
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits[:, 0], **TOLERANCE)


@torch.no_grad()
def test_padded_rows_are_read_at_the_last_token_before_the_padding(tokens, tmp_path):
    ours = scalar(CONFIGS["lite"])
    save_pretrained(ours, tmp_path / "model")
    theirs = read_there(tmp_path / "model")
    row = tokens[0, :20].clamp(min=2)
    row[-1] = ours.config.eos_id
    padded = torch.cat([row, torch.full((7,), theirs.config.pad_token_id)])[None]
    mask = (torch.arange(27) < 20).long()[None]
    got = theirs(padded, attention_mask=mask).logits[:, 0]
    torch.testing.assert_close(ours(row[None]), got, **TOLERANCE)


@torch.no_grad()
def test_a_batch_of_texts_scores_the_same_by_transformers_defaults(tmp_path):
    tokenizer = Tokenizer.train(["def f(x):\n    return x\n"] * 3, vocab_size=300)
    tokenizer.save(tmp_path / "tokenizer")
    config = replace(LITE, vocab_size=tokenizer.vocab_size, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id)
    ours = ScalarModel(build(config), seed=3).eval()
    save_pretrained(ours, tmp_path / "model", tokenizer=tmp_path / "tokenizer")
    theirs = read_there(tmp_path / "model")
    their_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    texts = ["def f(x):", "def g(y): return y + 1"]
    rows = [[*tokenizer.encode(text, add_bos=True), tokenizer.eos_id] for text in texts]
    ended = [text + their_tokenizer.eos_token for text in texts]
    batch = their_tokenizer(ended, padding=True, return_tensors="pt")
    assert batch["input_ids"][1].tolist() == rows[1]
    assert len(rows[0]) < len(rows[1])
    wanted = [float(ours(torch.tensor([row]))) for row in rows]
    got = theirs(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    torch.testing.assert_close(got, torch.tensor(wanted), **TOLERANCE)


def test_a_round_trip_keeps_every_bit(tmp_path):
    ours = scalar(CONFIGS["grouped"])
    save_pretrained(ours, tmp_path / "model")
    again = load_scalar_model(tmp_path / "model")
    assert load_config(tmp_path / "model") == ours.config
    for (name, wanted), (other, got) in zip(ours.named_parameters(), again.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(got, wanted), name


@pytest.mark.parametrize("name", ["lite", "tied_dense"])
def test_a_model_with_a_vocabulary_gives_its_backbone(name, tmp_path):
    model = build(CONFIGS[name])
    save_pretrained(model, tmp_path / "model")
    first, second = (load_scalar_model(tmp_path / "model", seed=seed) for seed in (1, 2))
    assert torch.equal(first.backbone.layers[0].mlp_norm.weight, model.layers[0].mlp_norm.weight)
    assert torch.equal(first.backbone.embed.weight, model.embed.weight)
    assert not torch.equal(first.score.weight, second.score.weight)


def test_a_scalar_head_is_no_model_with_a_vocabulary(tmp_path):
    save_pretrained(scalar(CONFIGS["dense"]), tmp_path / "model")
    with pytest.raises(ValueError, match="must hold a model with a vocabulary, got one with a scalar head"):
        load_pretrained(tmp_path / "model")


def test_more_than_one_label_is_refused(tmp_path):
    save_pretrained(scalar(CONFIGS["dense"]), tmp_path / "model")
    theirs = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "model", num_labels=3, ignore_mismatched_sizes=True
    )
    theirs.save_pretrained(tmp_path / "three")
    assert json.loads((tmp_path / "three" / "config.json").read_text())["architectures"]
    with pytest.raises(ValueError, match=r"'score\.weight' must be \(1, 32\), got \(3, 32\)"):
        load_scalar_model(tmp_path / "three")
