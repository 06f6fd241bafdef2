"""The stage `sft`: what it leaves, what it learns, what it refuses, what it goes on from."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dscoder.checkpoint import load_pretrained
from dscoder.config.sft import SFT_RECIPES, ExamplesConfig, SftConfig, sft_recipe
from dscoder.config.train import BatchConfig
from dscoder.data.loader import IGNORED, assemble, window_order
from dscoder.data.prepare import HELD_OUT, TRAIN
from dscoder.data.shards import Windows
from dscoder.infer.engine import Engine
from dscoder.infer.request import Request
from dscoder.runtime.artifact import read_manifest
from dscoder.testing.tiny_sft import sft_config_for, tiny_base, tiny_dialogues
from dscoder.text.chat import chat_prompt
from dscoder.text.tokenizer import Tokenizer
from dscoder.train import sft
from dscoder.train.metrics import MEASURED
from dscoder.train.windows import answer_loss


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dialogues(tmp_path_factory.mktemp("dialogues") / "d.jsonl")


@pytest.fixture(scope="module")
def finished(base: Path, dialogues: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sft.run(sft_config_for(base, dialogues, tmp_path_factory.mktemp("sft") / "run", num_steps=40))


def reports(out: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]


def test_both_losses_fall(finished: Path) -> None:
    losses = [line["loss"] for line in reports(finished) if "loss" in line]
    held_out = [line["held_out_loss"] for line in reports(finished) if "held_out_loss" in line]
    assert losses[-1] < losses[0] - 3.0
    assert held_out[-1] < held_out[0] - 1.0
    assert len(held_out) == 10


def test_the_first_loss_is_that_of_the_answers_alone(finished: Path, base: Path) -> None:
    windows = Windows(finished / "examples" / TRAIN)
    batch = assemble(windows, window_order(0, 4, size=len(windows), seed=0))
    model = load_pretrained(base)
    with torch.no_grad():
        logits_TV = model(batch.tokens_BS, cu_seqlens=batch.cu_seqlens).flatten(0, 1)
    labels_T = batch.labels_BS.flatten()
    expected = torch.nn.functional.cross_entropy(logits_TV, labels_T, ignore_index=IGNORED)
    assert 0.05 < float((labels_T != IGNORED).float().mean()) < 0.6
    assert reports(finished)[0]["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_the_held_out_loss_is_the_mean_over_answer_tokens(finished: Path, base: Path) -> None:
    windows = Windows(finished / "examples" / HELD_OUT)
    model = load_pretrained(base)
    nats, count = 0.0, 0
    for index in range(len(windows)):
        batch = assemble(windows, window_order(index, 1, size=len(windows), seed=0))
        with torch.no_grad():
            logits_TV = model(batch.tokens_BS, cu_seqlens=batch.cu_seqlens).flatten(0, 1)
        labels_T = batch.labels_BS.flatten()
        nats += float(
            torch.nn.functional.cross_entropy(logits_TV, labels_T, ignore_index=IGNORED, reduction="sum")
        )
        count += int((labels_T != IGNORED).sum())
    assert answer_loss(model, windows) == pytest.approx(nats / count, rel=1e-5)
    assert not model.training


def test_transformers_loads_the_model_and_its_chat_template(finished: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(finished / "model")
    theirs = AutoModelForCausalLM.from_pretrained(finished / "model", attn_implementation="eager")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 3 plus 3?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=False,
    )
    ours = load_pretrained(finished / "model")
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)
    assert ours.config.eos_id == tokenizer.eos_token_id


def test_the_trained_model_answers_and_stops(base: Path, tmp_path: Path) -> None:
    dialogues = tiny_dialogues(tmp_path / "d.jsonl", count=4)
    examples = ExamplesConfig(window=128, held_out_share=0.0)
    out = sft.run(sft_config_for(base, dialogues, tmp_path / "run", examples=examples, num_steps=70))
    engine = Engine(load_pretrained(out / "model"), Tokenizer.load(out / "model"))
    question = [{"role": "user", "content": "What is 3 plus 3?"}]
    prompt = chat_prompt(question, tokenizer=engine.tokenizer, template="v2")
    [completion] = engine.generate([Request(prompt=tuple(prompt), max_new_tokens=30)])
    assert completion.text.startswith(" The sum is ")
    assert completion.finish_reason == "eos"


def test_v1_answers_end_with_eot_in_model_and_tokenizer(base: Path, dialogues: Path, tmp_path: Path) -> None:
    wide = tiny_base(tmp_path / "base", config=replace(load_pretrained(base).config, max_positions=512))
    examples = ExamplesConfig(window=512, template="coder", held_out_share=0.0)
    out = sft.run(sft_config_for(wide, dialogues, tmp_path / "run", examples=examples, num_steps=1))
    tokenizer = Tokenizer.load(out / "model")
    assert load_pretrained(out / "model").config.eos_id == tokenizer.eos_id == tokenizer.eot_id
    assert not any("held_out_loss" in line for line in reports(out))


def test_the_manifest_names_its_inputs(finished: Path) -> None:
    manifest = read_manifest(finished, command="sft")
    assert set(manifest["inputs"]) == {"dialogues", "init_from"}
    assert manifest["counts"]["steps"] == 40


def test_epochs_give_the_number_of_steps(base: Path, dialogues: Path, tmp_path: Path) -> None:
    config = sft_config_for(base, dialogues, tmp_path, num_steps=None, epochs=1.5)
    out = sft.run(replace(config, batch=BatchConfig(sequences=3, micro=3)))
    num_windows = read_manifest(out / "examples", command="sft-examples")["counts"]["train_windows"]
    steps = read_manifest(out, command="sft")["counts"]["steps"]
    assert steps == math.ceil(round(1.5 * num_windows * 128) / (3 * 128)) > 1


class KilledError(Exception):
    """Stands for whatever ends a process."""


def test_a_run_that_failed_goes_on_to_the_same_weights(base: Path, dialogues: Path, tmp_path: Path) -> None:
    def fail(report: Mapping[str, float]) -> None:
        if report["step"] == 5:
            raise KilledError

    whole, cut = (sft_config_for(base, dialogues, tmp_path / name) for name in ("whole", "cut"))
    sft.run(whole)
    with pytest.raises(KilledError):
        sft.run(cut, on_metrics=fail)
    examples = (tmp_path / "cut" / "examples" / "manifest.json").stat().st_mtime_ns
    sft.run(cut)
    assert (tmp_path / "cut" / "examples" / "manifest.json").stat().st_mtime_ns == examples
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]
    assert reports(tmp_path / "cut") == reports(tmp_path / "whole")


def test_other_dialogues_are_refused_but_moved_ones_are_not(
    base: Path, dialogues: Path, tmp_path: Path
) -> None:
    config = sft_config_for(base, dialogues, tmp_path / "run", num_steps=1)
    sft.run(config)
    moved = tmp_path / "d.jsonl"
    moved.write_bytes(dialogues.read_bytes())
    sft.run(replace(config, dialogues=(str(moved),)))
    moved.write_bytes(dialogues.read_bytes() + b'{"prompt": "Q", "completion": "A"}\n')
    with pytest.raises(ValueError, match=r"inputs\.dialogues: "):
        sft.run(replace(config, dialogues=(str(moved),)))


def test_a_window_longer_than_the_model_is_refused(base: Path, dialogues: Path, tmp_path: Path) -> None:
    config = sft_config_for(base, dialogues, tmp_path, examples=ExamplesConfig(window=256))
    with pytest.raises(ValueError, match=r"examples\.window must be <= 128, .* got 256"):
        sft.run(config)
    assert not (tmp_path / "examples").exists()


def test_dialogues_that_teach_nothing_leave_the_directory_free(
    base: Path, dialogues: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "Q", "completion": ""}\n')
    with pytest.raises(ValueError, match=r"got none; dropped \{'empty_message': 1\}"):
        sft.run(sft_config_for(base, bad, tmp_path / "run"))
    sft.run(sft_config_for(base, dialogues, tmp_path / "run", num_steps=1))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dialogues": ()}, "dialogues must name at least one"),
        ({"epochs": 0.0}, "epochs must be positive, got 0"),
        ({"num_steps": 0}, "num_steps must be >= 1, got 0"),
        ({"num_threads": 0}, "num_threads must be >= 1, got 0"),
    ],
)
def test_wrong_fields_are_named(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(sft_config_for(Path("b"), Path("d"), Path("o")), **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "rate", "tokens", "total"), [("coder", 1e-5, 4e6, 2e9), ("coder_v2", 5e-6, 1e6, 1e9)]
)
def test_recipes_are_the_papers(name: str, rate: float, tokens: float, total: float) -> None:
    config = SftConfig(dialogues=("d",), init_from="m", out="o", **sft_recipe(name))  # type: ignore[arg-type]
    schedule = config.schedule
    assert (schedule.kind, schedule.max_lr, schedule.warmup_steps) == ("cosine", rate, 100)
    assert config.batch.sequences * config.examples.window == pytest.approx(tokens, rel=0.05)
    assert config.num_steps is not None
    batch_tokens = config.batch.sequences * config.examples.window
    assert total <= config.num_steps * batch_tokens < total + batch_tokens


def test_an_unknown_recipe_is_named() -> None:
    with pytest.raises(ValueError, match=f"one of {', '.join(sorted(SFT_RECIPES))}, got 'x'"):
        sft_recipe("x")
