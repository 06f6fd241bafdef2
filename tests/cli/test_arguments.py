"""Configs from words and YAML files, presets and recipes to start from."""

import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from dscoder.cli.arguments import parse, spelled
from dscoder.cli.pretrain import parse_config
from dscoder.config import GqaConfig, MlaConfig, YarnConfig, preset
from dscoder.config.data import SourcesConfig, TokenizerConfig
from dscoder.config.train import PretrainConfig, ProfileConfig
from dscoder.train.recipes import recipe

PLACES = ["--data", "d", "--out", "o"]


def written(path: Path, value: object) -> str:
    path.write_text(yaml.safe_dump(value))
    return str(path)


def test_a_preset_is_taken_whole() -> None:
    assert parse_config([*PLACES, "--model.preset", "v2"]).model == preset("v2")


def test_words_change_single_fields_of_a_preset() -> None:
    words = ["--model.preset=tiny_moe", "--model.num_layers", "3", "--model.moe.num_experts=8"]
    model = parse_config([*PLACES, *words, "--model.attention.num_heads", "2"]).model
    tiny = preset("tiny_moe")
    assert model is not None
    assert tiny.moe is not None
    assert isinstance(tiny.attention, MlaConfig)
    assert model == replace(
        tiny,
        num_layers=3,
        moe=replace(tiny.moe, num_experts=8),
        attention=replace(tiny.attention, num_heads=2),
    )


def test_a_part_that_a_preset_lacks_takes_its_own_defaults() -> None:
    model = parse_config([*PLACES, "--model.preset", "tiny_moe", "--model.rope.yarn.factor", "8"]).model
    assert model is not None
    assert model.rope.yarn == YarnConfig(factor=8.0)


def test_words_come_after_files_and_later_files_after_earlier_ones(tmp_path: Path) -> None:
    first = written(
        tmp_path / "a.yaml", {"data": "d", "out": "o", "num_steps": 1, "seed": 1, "init_from": "m"}
    )
    second = written(tmp_path / "b.yaml", {"num_steps": 2, "seed": 2})
    config = parse_config(["--config", first, "--config", second, "--seed", "3"])
    assert (config.num_steps, config.seed) == (2, 3)


def test_a_file_may_name_the_preset_and_null_a_part(tmp_path: Path) -> None:
    path = written(tmp_path / "a.yaml", {"model": {"preset": "tiny_moe", "num_layers": 2, "moe": None}})
    model = parse_config([*PLACES, "--config", path]).model
    assert model == replace(preset("tiny_moe"), num_layers=2, moe=None)


@pytest.mark.parametrize("name", ["tiny_dense", "tiny_moe", "coder_33b", "v2"])
def test_a_config_written_out_reads_back_the_same(tmp_path: Path, name: str) -> None:
    config = parse_config([*PLACES, "--model.preset", name, "--schedule.milestones", "[0.5,0.7]"])
    assert config.schedule.milestones == (0.5, 0.7)
    assert parse_config(["--config", written(tmp_path / "a.yaml", asdict(config))]) == config


def test_a_model_may_be_written_out_without_a_preset(tmp_path: Path) -> None:
    attention = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    model = {"vocab_size": 64, "width": 32, "num_layers": 1, "mlp_width": 64, "attention": attention}
    config = parse_config([*PLACES, "--config", written(tmp_path / "a.yaml", {"model": model})])
    assert config.model is not None
    assert config.model.attention == GqaConfig(num_heads=4, num_kv_heads=2, head_dim=8)
    assert config.model.norm_eps == 1e-6


def test_a_mixture_of_two_kinds_is_refused(tmp_path: Path) -> None:
    attention = {"num_heads": 4, "num_kv_heads": 2, "kv_lora_rank": 8}
    model = {"vocab_size": 64, "width": 32, "num_layers": 1, "mlp_width": 64, "attention": attention}
    path = written(tmp_path / "a.yaml", {"model": model})
    with pytest.raises(ValueError, match="attention must have the fields of GqaConfig or MlaConfig, got"):
        parse_config([*PLACES, "--config", path])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model": 3}, r"PretrainConfig: model must hold the fields of ModelConfig, got 3"),
        ({"model": ["tiny_moe"]}, r"PretrainConfig: model must hold the fields of ModelConfig, got \["),
        (
            {"model": {"preset": "tiny_moe", "attention": 3}},
            "ModelConfig: attention must hold the fields of GqaConfig or MlaConfig, got 3",
        ),
        (
            {"model": {"preset": "tiny_moe", "rope": [1]}},
            r"rope must hold the fields of RopeConfig, got \[1\]",
        ),
    ],
)
def test_a_value_where_fields_belong_is_refused(
    tmp_path: Path, config: dict[str, object], message: str
) -> None:
    path = written(tmp_path / "a.yaml", config)
    with pytest.raises(ValueError, match=message):
        parse_config([*PLACES, "--config", path])


def test_one_item_stands_for_a_list_of_one(tmp_path: Path) -> None:
    words = ["--model.preset", "tiny_moe", "--schedule.milestones", "0.5"]
    assert parse_config([*PLACES, *words]).schedule.milestones == (0.5,)


@pytest.mark.parametrize(
    ("given", "paths"),
    [("src", ("src",)), ("[src, b.jsonl]", ("src", "b.jsonl")), ("123", ("123",)), ("a b", ("a b",))],
)
def test_sources_are_one_path_or_a_list(tmp_path: Path, given: str, paths: tuple[str, ...]) -> None:
    def read(*words: str) -> SourcesConfig:
        return parse(words, TokenizerConfig, verb="tokenizer", description=None).sources

    assert read("--out", "o", "--sources.paths", given).paths == paths
    (tmp_path / "a.yaml").write_text(f"out: o\nsources: {{paths: {given!r}, extensions: .rs}}\n")
    if not given.startswith("["):
        found = read("--config", str(tmp_path / "a.yaml"))
        assert (found.paths, found.extensions) == (paths, (".rs",))


def test_another_vocabulary_drops_the_special_ids_of_a_preset(tmp_path: Path) -> None:
    small = parse_config([*PLACES, "--model.preset", "coder_33b", "--model.vocab_size", "1024"]).model
    assert small == replace(preset("coder_33b"), vocab_size=1024, bos_id=0, eos_id=1)
    path = written(tmp_path / "a.yaml", {"model": {"preset": "v2", "vocab_size": 1024, "eos_id": 7}})
    model = parse_config([*PLACES, "--config", path]).model
    assert model == replace(preset("v2"), vocab_size=1024, bos_id=0, eos_id=7)


def test_a_model_written_out_must_be_whole(tmp_path: Path) -> None:
    path = written(tmp_path / "a.yaml", {"model": {"vocab_size": 64}})
    with pytest.raises(ValueError, match="ModelConfig: width must be given, got nothing"):
        parse_config([*PLACES, "--config", path])


def test_a_recipe_gives_all_but_the_places() -> None:
    config = parse_config([*PLACES, "--recipe", "v2_lite", "--batch.micro", "4"])
    expected = recipe("v2_lite").config(data="d", out="o")
    assert config == replace(expected, batch=replace(expected.batch, micro=4))
    long = parse_config([*PLACES, "--recipe", "coder_v2_32k", "--init_from", "m"])
    assert long == recipe("coder_v2_32k").config(data="d", out="o", init_from="m")


def test_what_the_config_refuses_is_its_own_error() -> None:
    with pytest.raises(ValueError, match="MoeConfig: num_topk must be <= 16"):
        parse_config([*PLACES, "--model.preset", "tiny_moe", "--model.moe.num_topk", "99"])
    with pytest.raises(ValueError, match=r"name must be one of .*tiny_moe.*, got 'tiny'"):
        parse_config([*PLACES, "--model.preset", "tiny"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*PLACES, "--model.preset", "tiny_moe", "--model.moe.nope", "3"], "--model.moe.nope"),
        ([*PLACES, "--batch.micro", "x"], "batch.micro must be int, got 'x'"),
        (["--out", "o"], "are required: data;"),
        (
            [*PLACES, "--schedule.kind", "linear"],
            "schedule.kind must be multi_step, cosine or constant, got 'linear'",
        ),
        ([*PLACES, "--model.num_layers", "x"], "model.num_layers must be int or null, got 'x'"),
        (["--config", "/nowhere.yaml"], "nowhere"),
    ],
)
def test_wrong_words_end_with_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        parse_config(words)
    assert end.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("dscoder pretrain: ")
    assert message in line


def test_options_may_be_spelled_with_dashes_and_values_stay_as_they_are() -> None:
    words = ["--num-steps", "a-b", "--model.num-layers=x-y", "--stop=--a-b", "-a-b", "--", "--a-b"]
    expected = ["--num_steps", "a-b", "--model.num_layers=x-y", "--stop=--a-b", "-a-b", "--", "--a-b"]
    assert spelled(words) == expected


def test_the_help_tells_what_the_comments_say(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_config(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "older ones are deleted (type: int, default: 2)" in told
    assert "--num_steps NUM_STEPS type: int, default: 1000 --batch" in told
    assert re.search(r"type: \S+'none', 'selective', 'full'\], default: none", told)
    assert isinstance(PretrainConfig.__doc__, str)


@pytest.mark.parametrize(
    ("words", "profile"),
    [
        ([], None),
        (["--profile"], ProfileConfig()),
        (["--profile", "--profile.start", "7"], ProfileConfig(start=7)),
        (["--profile.steps=2"], ProfileConfig(steps=2)),
        (["--profile.start", "7", "--profile.steps", "2"], ProfileConfig(start=7, steps=2)),
    ],
)
def test_profile_alone_is_enough(words: list[str], profile: ProfileConfig | None) -> None:
    assert parse_config([*PLACES, "--model.preset", "tiny_moe", *words]).profile == profile


def test_what_is_profiled_comes_back_from_a_file(tmp_path: Path) -> None:
    for profile in (None, ProfileConfig(start=7, steps=2)):
        path = written(tmp_path / "a.yaml", {"profile": None if profile is None else asdict(profile)})
        assert parse_config([*PLACES, "--init_from", "m", "--config", path]).profile == profile
