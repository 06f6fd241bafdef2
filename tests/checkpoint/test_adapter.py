"""Adapters and the peft package: the same files, the same logits, the same weights once merged."""

import copy
import json
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dscoder.checkpoint import load_pretrained, save_pretrained
from dscoder.checkpoint.adapter import load_adapter, lora_parts, save_adapter
from dscoder.config.lora import LORA_TARGETS, LoraConfig
from dscoder.models import allocate_cache
from dscoder.models.lora import LoraLinear, add_lora, lora_layers, merge_lora, remove_lora
from tests.checkpoint.conftest import CONFIGS, build

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
LORA = LoraConfig(rank=3, alpha=5.0)
TOKENS_BS = torch.arange(2 * 9).view(2, 9) % 64

peft = pytest.importorskip("peft")


def adapted(config, lora=LORA):
    """A model with adapters that are not zero, built by the fixture of this folder."""
    model = build(config)
    add_lora(model, lora_parts(config, lora.targets), lora, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in lora_layers(model):
            for matrix in [*layer.downs, *layer.ups]:
                matrix.normal_(0.0, 0.3, generator=generator)
    return model


@torch.no_grad()
def logits_of(model):
    return model(TOKENS_BS)


@torch.no_grad()
def logits_there(model):
    return model(TOKENS_BS).logits


@pytest.fixture(params=["lite", "grouped", "dense", "no_shared_experts", "dense_latent"])
def config(request):
    return CONFIGS[request.param]


@pytest.fixture
def saved(config, tmp_path):
    """A base model and an adapter on disk, and the model with it in memory."""
    model = adapted(config)
    save_adapter(model, tmp_path / "adapter", base=str(tmp_path / "base"))
    base = copy.deepcopy(model)
    remove_lora(base)
    save_pretrained(base, tmp_path / "base")
    return tmp_path, model


def load_there(directory):
    base = AutoModelForCausalLM.from_pretrained(directory / "base", experts_implementation="eager")
    with warnings.catch_warnings():
        for kind in (UserWarning, RuntimeWarning):  # of keys that it misses or does not know
            warnings.simplefilter("error", kind)
        return peft.PeftModel.from_pretrained(base, directory / "adapter").eval()


def test_peft_gives_the_same_logits_and_merges_to_them(saved):
    directory, model = saved
    plain = logits_of(load_pretrained(directory / "base"))
    theirs = load_there(directory)
    wanted = logits_of(model)
    assert (wanted - plain).abs().max() > 0.05
    torch.testing.assert_close(logits_there(theirs), wanted, **TOLERANCE)
    torch.testing.assert_close(logits_there(theirs.merge_and_unload()), wanted, **TOLERANCE)


def test_peft_unloads_to_the_base(saved):
    directory, _ = saved
    theirs = load_there(directory)
    plain = logits_of(load_pretrained(directory / "base"))
    torch.testing.assert_close(logits_there(theirs.unload()), plain, **TOLERANCE)


def test_transformers_loads_the_adapter_itself(saved):
    directory, model = saved
    there = AutoModelForCausalLM.from_pretrained(directory / "base", experts_implementation="eager")
    there.load_adapter(str(directory / "adapter"))
    torch.testing.assert_close(logits_there(there.eval()), logits_of(model), **TOLERANCE)


def test_what_peft_trains_and_saves_loads_here(saved, config, tmp_path):
    directory, _ = saved
    base = AutoModelForCausalLM.from_pretrained(directory / "base", experts_implementation="eager")
    targets = sorted({part.name.split(".")[-1] for part in lora_parts(config, LORA_TARGETS)})
    theirs = peft.get_peft_model(
        base,
        peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, use_rslora=True, task_type="CAUSAL_LM"),
    ).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_pretrained(directory / "base")
    load_adapter(ours, tmp_path / "theirs")
    torch.testing.assert_close(logits_of(ours), logits_there(theirs), **TOLERANCE)


def test_saving_what_was_loaded_gives_the_same_files(saved, tmp_path):
    directory, model = saved
    again = load_pretrained(directory / "base")
    load_adapter(again, directory / "adapter")
    assert torch.equal(logits_of(again), logits_of(model))
    save_adapter(again, tmp_path / "again", base=str(directory / "base"))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (directory / "adapter" / name).read_bytes()


# ---- merged and removed here ----


def test_merging_keeps_the_logits_and_leaves_a_plain_model(config):
    model = adapted(config)
    wanted = logits_of(model)
    names = {name for name, _ in build(config).named_parameters()}
    merge_lora(model)
    torch.testing.assert_close(logits_of(model), wanted, **TOLERANCE)
    assert {name for name, _ in model.named_parameters()} == names
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_removing_gives_the_base_back_bit_for_bit(config):
    model = adapted(config)
    remove_lora(model)
    assert torch.equal(logits_of(model), logits_of(build(config)))


def test_fresh_adapters_change_nothing_and_are_all_that_trains(config):
    model = build(config)
    wanted = logits_of(model)
    add_lora(model, lora_parts(config, LORA.targets), LORA, seed=0)
    assert torch.equal(logits_of(model), wanted)
    model.train()
    features = model.features(TOKENS_BS)
    features.hidden_BSD.square().sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in model.named_parameters() if ".downs." in name or ".ups." in name}


def test_one_half_of_a_joined_layer_may_be_adapted_alone(tmp_path):
    for target in ("gate_proj", "up_proj"):
        lora = replace(LORA, targets=(target,))
        model = adapted(CONFIGS["dense"], lora)
        wanted = logits_of(model)
        save_adapter(model, tmp_path / target)
        again = build(CONFIGS["dense"])
        load_adapter(again, tmp_path / target)
        assert torch.equal(logits_of(again), wanted)
        merge_lora(again)
        torch.testing.assert_close(logits_of(again), wanted, **TOLERANCE)


def test_decoding_with_a_cache_refuses_adapters_that_are_not_merged(config):
    model = adapted(config)
    cache = allocate_cache(model.config, num_sequences=2, max_positions=16)
    with pytest.raises(RuntimeError, match=r"adapters of layers\.0\..* must be merged before"):
        model(TOKENS_BS, cache=cache)


def test_dropout_is_for_training_alone():
    model = adapted(CONFIGS["dense"], replace(LORA, dropout=0.5))
    wanted = logits_of(model)
    assert torch.equal(logits_of(model), wanted)
    model.train()
    assert not torch.equal(logits_of(model), wanted)


def test_the_seed_decides_the_first_matrices():
    first = []
    for seed in (0, 0, 1):
        model = build(CONFIGS["dense"])
        add_lora(model, lora_parts(model.config, LORA.targets), LORA, seed=seed)
        layer = next(lora_layers(model))
        assert isinstance(layer, LoraLinear)
        first.append(layer.downs[0].detach())
        assert first[-1].abs().max() <= 1 / first[-1].shape[1] ** 0.5
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])


# ---- refused ----


@pytest.fixture
def damaged(tmp_path):
    """An adapter on disk that a test may damage."""
    save_adapter(adapted(CONFIGS["lite"]), tmp_path / "adapter")
    return tmp_path / "adapter"


def refused(directory, message):
    model = build(CONFIGS["lite"])
    with pytest.raises(ValueError, match=message):
        load_adapter(model, directory)
    assert not any(lora_layers(model))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("peft_type", "IA3", "peft_type must be 'LORA', got 'IA3'"),
        ("use_dora", True, "use_dora must be False, got True"),
        ("rank_pattern", {"q_proj": 2}, "rank_pattern must be {}, got {'q_proj': 2}"),
        ("bias", "all", "bias must be 'none', got 'all'"),
        ("init_lora_weights", "pissa_niter_4", "init_lora_weights must be one of .*, got 'pissa_niter_4'"),
        ("init_lora_weights", "olora", "init_lora_weights must be one of .*, got 'olora'"),
        ("init_lora_weights", ["pissa"], "init_lora_weights must be one of .*, got .'pissa'.: such an"),
        ("kasa_config", {"beta": 1.0}, "kasa_config must be None, got {'beta': 1.0}"),
        ("r", None, "must have r and lora_alpha"),
        ("r", 5, r"must be \(5, \d+\) of .* got \(3, \d+\)"),
    ],
)
def test_a_config_beyond_ours_is_named(damaged, name, value, message):
    path = damaged / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    refused(damaged, message)


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal"])
def test_starts_that_leave_the_base_as_it_is_are_loaded(damaged, start):
    path = damaged / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": start}))
    model = build(CONFIGS["lite"])
    load_adapter(model, damaged)
    assert any(lora_layers(model))


def test_tensors_that_fit_nowhere_are_named(damaged):
    path = damaged / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    alone = {key: value for key, value in tensors.items() if key != name}
    save_file(alone, path)
    refused(damaged, r"q_proj\.lora_B\.weight' in a pair, got it alone")
    save_file({key.replace("layers.0", "layers.7"): value for key, value in tensors.items()}, path)
    refused(damaged, r"got 'base_model\.model\.model\.layers\.7\.self_attn")


def test_a_second_adapter_is_refused(damaged):
    model = adapted(CONFIGS["lite"])
    with pytest.raises(ValueError, match="load_adapter: model must have no adapters"):
        load_adapter(model, damaged)
    with pytest.raises(ValueError, match="add_lora: model must have no adapters"):
        add_lora(model, lora_parts(model.config, LORA.targets), LORA, seed=0)


def test_an_adapter_replaces_an_adapter_and_nothing_else(damaged):
    save_adapter(adapted(CONFIGS["lite"]), damaged)
    (damaged / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"must hold an adapter and nothing else, .* 'notes\.txt' in it"):
        save_adapter(adapted(CONFIGS["lite"]), damaged)
    with pytest.raises(ValueError, match="model must have adapters, got none"):
        save_adapter(build(CONFIGS["lite"]), damaged.parent / "new")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "rank must be >= 1, got 0"),
        ({"alpha": 0.0}, "alpha must be positive, got 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1"),
        ({"targets": ()}, "targets must be among .*, got none"),
        ({"targets": ("q_proj", "gate")}, "targets must be among .*, got gate"),
    ],
)
def test_wrong_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**fields)


def test_targets_that_the_model_lacks_are_named():
    with pytest.raises(ValueError, match=r"targets must name a layer of .*, got q_a_proj"):
        lora_parts(CONFIGS["dense"], ("q_a_proj",))
    with pytest.raises(ValueError, match=r"targets must name a layer of .*, got up_proj, down_proj"):
        lora_parts(CONFIGS["lite"], ("up_proj", "down_proj"))
