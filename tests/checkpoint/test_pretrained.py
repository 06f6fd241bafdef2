"""load_pretrained and save_pretrained: what survives, what is refused, what is left on the disk."""

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from dscoder.checkpoint import load_config, load_pretrained, pretrained, save_pretrained, source, store
from dscoder.models import Transformer

WEIGHTS = "model.safetensors"


def assert_same_weights(one, other):
    theirs = other.state_dict()
    assert one.state_dict().keys() == theirs.keys()
    for name, tensor in one.state_dict().items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name


def saved(model, directory, **options):
    save_pretrained(model, directory, **options)
    return directory


def edit_weights(directory, edit):
    tensors = load_file(directory / WEIGHTS)
    edit(tensors)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---- what survives ----


def test_a_model_survives_bit_by_bit(model, tmp_path):
    loaded = load_pretrained(saved(model, tmp_path / "model"))
    assert loaded.config == model.config
    assert_same_weights(loaded, model)


@pytest.mark.parametrize("max_shard_bytes", [1, 3000])
def test_shards_of_any_size_hold_the_same_model(lite, tmp_path, max_shard_bytes):
    directory = saved(lite, tmp_path / "model", max_shard_bytes=max_shard_bytes)
    assert len(list(directory.glob("model-*.safetensors"))) > 3
    assert_same_weights(load_pretrained(directory), lite)


def test_saving_again_writes_the_same_bytes(lite, tmp_path):
    one = saved(lite, tmp_path / "one", max_shard_bytes=3000)
    other = saved(load_pretrained(one), tmp_path / "other", max_shard_bytes=3000)
    assert sorted(os.listdir(one)) == sorted(os.listdir(other))
    assert all((other / path.name).read_bytes() == path.read_bytes() for path in one.iterdir())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_type_of_the_weights_survives(lite, tmp_path, dtype):
    lite.to(dtype)
    assert_same_weights(load_pretrained(saved(lite, tmp_path / "model")), lite)


def test_a_type_that_is_asked_for_is_converted_to(lite, tmp_path):
    loaded = load_pretrained(saved(lite, tmp_path / "model"), dtype=torch.bfloat16)
    assert_same_weights(loaded, lite.to(torch.bfloat16))


def test_without_a_type_in_the_config_the_stored_one_is_taken(lite, tmp_path):
    edit_config(saved(lite.to(torch.bfloat16), tmp_path / "model"), torch_dtype=None)
    assert load_pretrained(tmp_path / "model").embed.weight.dtype == torch.bfloat16


def test_the_tied_head_is_the_embedding(tied, tmp_path):
    loaded = load_pretrained(saved(tied, tmp_path / "model"))
    assert loaded.head.weight is loaded.embed.weight
    assert "lm_head.weight" not in load_file(tmp_path / "model" / WEIGHTS)


def test_a_tied_checkpoint_may_hold_an_equal_head(tied, tmp_path):
    saved(tied, tmp_path / "model")
    edit_weights(
        tmp_path / "model", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    )
    assert_same_weights(load_pretrained(tmp_path / "model"), tied)


def test_rotary_frequencies_in_a_file_are_skipped(lite, tmp_path):
    saved(lite, tmp_path / "model")
    edit_weights(
        tmp_path / "model",
        lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}),
    )
    assert_same_weights(load_pretrained(tmp_path / "model"), lite)


def test_stacked_experts_are_read(lite, tmp_path):
    saved(lite, tmp_path / "model")

    def stack(tensors):
        for i in (1, 2):
            prefix = f"model.layers.{i}.mlp.experts"
            gates = [tensors.pop(f"{prefix}.{j}.gate_proj.weight") for j in range(6)]
            ups = [tensors.pop(f"{prefix}.{j}.up_proj.weight") for j in range(6)]
            downs = [tensors.pop(f"{prefix}.{j}.down_proj.weight") for j in range(6)]
            gate_ups = [torch.cat(pair) for pair in zip(gates, ups, strict=True)]
            tensors[f"{prefix}.gate_up_proj"] = torch.stack(gate_ups)
            tensors[f"{prefix}.down_proj"] = torch.stack(downs)

    edit_weights(tmp_path / "model", stack)
    assert_same_weights(load_pretrained(tmp_path / "model"), lite)


def test_the_config_is_read_without_the_weights(lite, tmp_path):
    for path in saved(lite, tmp_path / "model").glob("*.safetensors"):
        path.unlink()
    assert load_config(tmp_path / "model") == lite.config


def test_another_config_may_take_the_place_of_the_stored_one(tied, tmp_path):
    longer = replace(tied.config, max_positions=2 * tied.config.max_positions, bos_id=3)
    loaded = load_pretrained(saved(tied, tmp_path / "model"), config=longer)
    assert loaded.config == longer
    assert loaded.head.weight is loaded.embed.weight
    assert torch.equal(loaded.embed.weight, tied.embed.weight)
    with pytest.raises(ValueError, match="must be"):
        load_pretrained(tmp_path / "model", config=replace(longer, width=2 * longer.width))


def test_a_loaded_model_evaluates_and_can_be_trained(lite, tmp_path, tokens):
    loaded = load_pretrained(saved(lite, tmp_path / "model"))
    assert not loaded.training
    loaded(tokens).sum().backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters() if parameter.dim() == 1)


def test_the_loaded_model_does_not_depend_on_the_files(lite, tmp_path):
    loaded = load_pretrained(saved(lite, tmp_path / "model"))
    for path in (tmp_path / "model").iterdir():
        path.write_bytes(b"\0" * path.stat().st_size)
    assert_same_weights(loaded, lite)


def test_tokenizer_files_are_copied(lite, tmp_path):
    source = tmp_path / "tokenizer"
    source.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "notes.txt"):
        (source / name).write_text(name)
    saved(lite, tmp_path / "model", tokenizer=source)
    assert (tmp_path / "model" / "tokenizer.json").read_text() == "tokenizer.json"
    assert not (tmp_path / "model" / "notes.txt").exists()


# ---- what is refused ----


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop(NORM), rf"model must hold tensor '{NORM}', got none"),
        (drop("model.layers.1.mlp.experts.3.up_proj.weight"), r"must hold tensor '.*experts\.3\.up_proj"),
        (put("model.layers.3.input_layernorm.weight", torch.ones(32)), r"got tensor 'model\.layers\.3\."),
        (put("model.layers.0.self_attn.q_proj.bias", torch.ones(24)), r"got tensor '.*q_proj\.bias' too"),
        (put(NORM, torch.ones(31)), rf"model\.safetensors: tensor '{NORM}' must be \(32,\), got \(31,\)"),
        (put(NORM, torch.ones(32, dtype=torch.int32)), rf"tensor '{NORM}' must be one of F64.*, got I32"),
        (put(NORM, torch.ones(32).to(torch.float8_e4m3fn)), rf"tensor '{NORM}' .* got F8_E4M3"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(lite, tmp_path, edit, message):
    edit_weights(saved(lite, tmp_path / "model"), edit)
    with pytest.raises(ValueError, match=f"load_pretrained: .*{message}"):
        load_pretrained(tmp_path / "model")


def test_a_checkpoint_of_another_size_is_refused(lite, tmp_path):
    edit_config(saved(lite, tmp_path / "model"), kv_lora_rank=16)
    with pytest.raises(ValueError, match=r"kv_a_proj_with_mqa.weight' must be \(20, 32\), got \(12, 32\)"):
        load_pretrained(tmp_path / "model")


def test_a_tied_checkpoint_with_another_head_is_refused(tied, tmp_path):
    edit_weights(saved(tied, tmp_path / "model"), put("lm_head.weight", torch.zeros(64, 32)))
    with pytest.raises(
        ValueError, match=r"model\.safetensors: tensor 'lm_head.weight' must equal the embedding"
    ):
        load_pretrained(tmp_path / "model")


def test_a_config_that_cannot_be_honoured_is_named_with_its_file(lite, tmp_path):
    edit_config(saved(lite, tmp_path / "model"), scoring_func="sigmoid")
    with pytest.raises(ValueError, match=r"model/config\.json: config_from_hf: scoring_func must be"):
        load_pretrained(tmp_path / "model")


def test_a_cut_file_is_refused_before_any_weight_is_read(lite, tmp_path, monkeypatch):
    path = saved(lite, tmp_path / "model") / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    monkeypatch.setattr(pretrained, "read_tensors", lambda tensors: pytest.fail("weights were read"))
    with pytest.raises(
        ValueError, match=r"model\.safetensors must be .* cut off: tensor 'model\.norm\.weight'"
    ):
        load_pretrained(path.parent)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_hidden_layers": 1_000_000_000},
            r"must hold tensor 'model\.layers\.3\.\S+' and others, got none",
        ),
        (
            {"n_routed_experts": 1_000_000_000},
            r"must hold tensor '.*experts\.6\.gate_proj\.weight' and others",
        ),
    ],
)
def test_a_config_of_a_giant_is_refused_without_building_it(lite, tmp_path, monkeypatch, changes, message):
    edit_config(saved(lite, tmp_path / "model"), **changes)
    monkeypatch.setattr(pretrained, "Transformer", lambda *_, **__: pytest.fail("the model was built"))
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path / "model")


@pytest.mark.parametrize("read", [load_config, load_pretrained])
@pytest.mark.parametrize(
    "value", ["[" * 200_000, "[" * 200_000 + "]" * 200_000 + "}"], ids=["open", "closed"]
)
def test_a_config_nested_without_end_is_named(lite, tmp_path, read, value):
    (saved(lite, tmp_path / "model") / "config.json").write_text('{"model_type": ' + value)
    with pytest.raises(ValueError, match=r"model/config\.json must be a JSON file, got .*recursion"):
        read(tmp_path / "model")


@pytest.mark.parametrize("value", [["float32"], {"dtype": "float32"}, 32, "", False])
def test_a_type_that_is_no_name_is_refused_with_its_file(lite, tmp_path, value):
    edit_config(saved(lite, tmp_path / "model"), torch_dtype=value)
    with pytest.raises(
        ValueError, match=r"model/config\.json: config_from_hf: torch_dtype must be one of bfloat16"
    ):
        load_pretrained(tmp_path / "model")


@pytest.mark.parametrize("read", [load_config, load_pretrained])
def test_a_config_that_was_not_fetched_is_a_broken_link(tmp_path, read):
    (tmp_path / "config.json").symlink_to("../blobs/0123")
    with pytest.raises(
        ValueError, match=r"config\.json must be a file, got a broken link to \.\./blobs/0123"
    ):
        read(tmp_path)


def test_a_directory_without_a_config_is_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match=r"must be a checkpoint directory, got no config\.json in it"):
        load_pretrained(tmp_path)


def test_a_type_that_weights_cannot_have_is_refused():
    with pytest.raises(ValueError, match=r"dtype must be one of torch\.float64.*, got torch\.int8"):
        load_pretrained("anywhere", dtype=torch.int8)


# ---- the hub ----


def test_a_repository_is_fetched_without_its_pickles(lite, tmp_path, monkeypatch):
    saved(lite, tmp_path / "snapshot")
    asked = []

    def fetch(repo_id, *, allow_patterns):
        asked.append((repo_id, allow_patterns))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(source, "snapshot_download", fetch)
    assert_same_weights(load_pretrained("deepseek-ai/deepseek-coder-1.3b-base"), lite)
    patterns = ["config.json", "model.safetensors.index.json", "model*.safetensors"]
    assert asked == [("deepseek-ai/deepseek-coder-1.3b-base", patterns)]


def test_without_a_network_the_error_says_what_was_tried(monkeypatch):
    def fetch(repo_id, *, allow_patterns):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(source, "snapshot_download", fetch)
    with pytest.raises(ValueError, match=r"got 'owner/name': .* LocalEntryNotFoundError: no connection"):
        load_pretrained("owner/name")


@pytest.mark.parametrize("path", ["./absent", "/absent/model", "a/b/c", "~/absent model", "../up"])
def test_what_cannot_be_a_repository_is_not_asked_for(monkeypatch, path):
    monkeypatch.setattr(source, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(ValueError, match="path_or_repo_id must be a directory or a hub id, got"):
        load_pretrained(path)


# ---- what is left on the disk ----


def test_a_directory_is_not_overwritten_unless_asked(lite, tmp_path):
    saved(lite, tmp_path / "model")
    with pytest.raises(ValueError, match="must not exist or be empty unless overwrite=True"):
        save_pretrained(lite, tmp_path / "model")


def test_an_overwritten_checkpoint_leaves_no_shard_behind(lite, tmp_path):
    saved(lite, tmp_path / "model", max_shard_bytes=3000)
    saved(lite, tmp_path / "model", overwrite=True)
    assert sorted(os.listdir(tmp_path / "model")) == ["config.json", WEIGHTS]


@pytest.mark.parametrize("stranger", ["thesis.tex", "folder"])
def test_a_directory_with_something_else_in_it_is_never_overwritten(lite, tmp_path, stranger):
    path = saved(lite, tmp_path / "model") / stranger
    path.mkdir() if stranger == "folder" else path.write_text("years of work")
    with pytest.raises(ValueError, match=f"to be overwritten, got .*model with '{stranger}' in it"):
        save_pretrained(lite, tmp_path / "model", overwrite=True)
    assert path.exists()


def test_a_directory_of_weights_without_a_config_is_not_overwritten(lite, tmp_path):
    (saved(lite, tmp_path / "model") / "config.json").unlink()
    with pytest.raises(ValueError, match=r"with no config\.json in it"):
        save_pretrained(lite, tmp_path / "model", overwrite=True)


def test_a_file_is_not_overwritten(lite, tmp_path):
    (tmp_path / "model").write_text("")
    with pytest.raises(ValueError, match="directory must not be a file"):
        save_pretrained(lite, tmp_path / "model", overwrite=True)


def test_an_empty_directory_is_filled(lite, tmp_path):
    (tmp_path / "model").mkdir()
    assert_same_weights(load_pretrained(saved(lite, tmp_path / "model")), lite)


def test_a_save_that_fails_midway_leaves_nothing(lite, tmp_path, monkeypatch):
    num_files = 0

    def fail_on_the_third(tensors, path, metadata):
        nonlocal num_files
        num_files += 1
        if num_files == 3:
            raise OSError("no space left on device")
        save_file(tensors, path, metadata)

    monkeypatch.setattr(store, "save_file", fail_on_the_third)
    with pytest.raises(OSError, match="no space left"):
        save_pretrained(lite, tmp_path / "model", max_shard_bytes=3000)
    assert os.listdir(tmp_path) == []


def test_arguments_are_checked_before_anything_is_written(lite, tmp_path):
    with pytest.raises(ValueError, match="max_shard_bytes must be >= 1, got 0"):
        save_pretrained(lite, tmp_path / "model", max_shard_bytes=0)
    with pytest.raises(ValueError, match=r"tokenizer must hold tokenizer\.json, got"):
        save_pretrained(lite, tmp_path / "model", tokenizer=tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_moved_checkpoint_loads(lite, tmp_path):
    saved(lite, tmp_path / "model", max_shard_bytes=3000)
    shutil.move(tmp_path / "model", tmp_path / "elsewhere")
    assert_same_weights(load_pretrained(str(tmp_path / "elsewhere")), lite)


def test_meta_models_are_not_saved_by_accident(lite, tmp_path):
    with pytest.raises(ValueError, match="model must have its weights, got them on the meta device"):
        save_pretrained(Transformer(lite.config, device="meta"), tmp_path / "model")
