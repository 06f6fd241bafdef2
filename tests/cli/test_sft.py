"""The words of `dscoder sft`: what they make of a recipe, and a run from them."""

import json
from pathlib import Path

import pytest

from dscoder.cli.main import main
from dscoder.cli.sft import parse_config
from dscoder.config.lora import LORA_TARGETS
from dscoder.runtime.artifact import read_manifest
from dscoder.testing.tiny_sft import SFT_WINDOW, tiny_base, tiny_dialogues

PLACES = ["--dialogues", "d.jsonl", "--init_from", "m", "--out", "o"]


def test_words_override_the_recipe() -> None:
    words = ["--recipe", "coder", *PLACES, "--batch.micro", "2", "--examples.too_long", "cut"]
    config = parse_config(words)
    assert config.dialogues == ("d.jsonl",)
    assert (config.schedule.max_lr, config.num_steps, config.precision) == (1e-5, 477, "bf16")
    assert (config.batch.sequences, config.batch.micro) == (256, 2)
    assert (config.examples.template, config.examples.too_long) == ("coder", "cut")


def test_a_steps_choice_of_the_recipe_may_be_unset_for_epochs() -> None:
    config = parse_config(["--recipe", "coder_v2", *PLACES, "--num_steps", "null", "--epochs", "3"])
    assert (config.num_steps, config.epochs, config.schedule.max_lr) == (None, 3.0, 5e-6)


def test_naming_a_field_of_the_adapters_turns_them_on() -> None:
    assert parse_config(PLACES).lora is None
    lora = parse_config([*PLACES, "--lora.rank", "8"]).lora
    assert lora is not None
    assert (lora.rank, lora.alpha, lora.targets) == (8, 32.0, LORA_TARGETS)


def test_a_run_from_words_ends_well_and_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, dialogues = tiny_base(tmp_path / "base"), tiny_dialogues(tmp_path / "d.jsonl")
    words = ["sft", "--dialogues", str(dialogues), "--init-from", str(base), "--out", str(tmp_path / "run")]
    words += ["--examples.window", str(SFT_WINDOW), "--num-steps", "2", "--batch.sequences", "2"]
    words += ["--report.plot", "off", "--report.tensorboard", "off", "--num-threads", "1"]
    assert main([*words, "--lora.rank", "2"]) == 0
    assert main([*words, "--lora.rank", "2"]) == 0
    assert read_manifest(tmp_path / "run", command="sft")["counts"]["steps"] == 2
    assert json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())["r"] == 2
    capsys.readouterr()
    assert main([*words, "--lora.rank", "4"]) == 1
    assert "config.lora.rank: 2 there, 4 here" in capsys.readouterr().err
