"""The stage `reward-model`: it learns an order, reports on held-out prompts, resumes bit for bit."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from dscoder.checkpoint import load_scalar_model, save_pretrained
from dscoder.cli.main import main
from dscoder.config.reward import (
    PreferConfig,
    ReadingConfig,
    ReplayConfig,
    RewardLossConfig,
    RewardModelConfig,
)
from dscoder.config.train import BatchConfig, CheckpointConfig, ReportConfig, ScheduleConfig
from dscoder.models import Transformer
from dscoder.runtime.artifact import read_manifest
from dscoder.sandbox.verdict import Limits, Verdict
from dscoder.tasks.problem import Grade, Problem, Prompt, Task
from dscoder.testing.tiny_run import TINY_MOE
from dscoder.text.tokenizer import Tokenizer
from dscoder.train import preferences, reward_model
from dscoder.train.scoring import AnswerScorer

ANSWERS = ("ab cd", "abcdef", "a1 2b", "ab 12", "1234", "12 34")
RARELY = {"checkpoint": CheckpointConfig(every=100)}
POINTWISE = RewardLossConfig(kind="pointwise", margin=0.0)


class Letters(Task):
    """An answer is worth the share of letters among its letters and digits."""

    name = "letters"
    limits = Limits()

    def problems(self) -> Sequence[Problem]:
        return [
            Problem(task=self.name, id=f"letters/{i}", prompt=f"f({i}) =", max_new_tokens=6)
            for i in range(40)
        ]

    def program(self, problem: Problem, completion: str) -> None:
        return None

    def grade(self, problem: Problem, completion: str, verdict: Verdict | None) -> Grade:
        marks = completion.replace(" ", "")
        share = sum(mark.isalpha() for mark in marks) / len(marks)
        return Grade(is_passed=share == 1, score=share)


@pytest.fixture(scope="module")
def preferred(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("preferred")
    records = [
        {"problem": problem.id, "completion": f" {text}"}
        for problem in Letters().problems()
        for text in ANSWERS
    ]
    (directory / "c.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config = PreferConfig(out=str(directory / "out"), candidates=(str(directory / "c.jsonl"),))
    return str(preferences.run(config, task=Letters()))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("base")
    tokenizer = Tokenizer.train(["f(12) = ab34 cd\n"] * 3, vocab_size=300)
    tokenizer.save(directory / "tokenizer")
    config = replace(
        TINY_MOE,
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.require_id("bos"),
        eos_id=tokenizer.require_id("eos"),
        init_std=0.05,
    )
    save_pretrained(Transformer(config), directory / "model", tokenizer=directory / "tokenizer")
    return str(directory / "model")


def config_for(preferred: str, base: str, out: Path, **fields: Any) -> RewardModelConfig:
    config = RewardModelConfig(
        preferences=(preferred,),
        init_from=base,
        out=str(out),
        held_out_share=0.3,
        num_steps=6,
        batch=BatchConfig(sequences=8, micro=4),
        schedule=ScheduleConfig(kind="cosine", max_lr=3e-3, warmup_steps=2),
        checkpoint=CheckpointConfig(every=2),
        report=ReportConfig(log_every=2, eval_every=4, tensorboard="off", plot="off"),
        num_threads=1,
    )
    return replace(config, **fields)


def record(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "held_out.json").read_text())
    return found


@pytest.fixture(scope="module")
def trained(preferred: str, base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "run"
    return reward_model.run(config_for(preferred, base, out, num_steps=40, **RARELY))


def test_an_order_is_learnt_that_holds_for_other_prompts(
    trained: Path, preferred: str, base: str, tmp_path: Path
) -> None:
    still = ScheduleConfig(kind="constant", max_lr=1e-12, warmup_steps=0)
    before = reward_model.run(config_for(preferred, base, tmp_path, num_steps=1, schedule=still))
    assert record(before)["accuracy"] < 0.8
    found = record(trained)
    assert found["loss"] < record(before)["loss"] / 2
    assert found["held_out_prompts"] >= 5
    assert found["num_pairs"] == 8 * found["held_out_prompts"]
    assert found["accuracy"] > 0.9
    assert found["accuracy"] > found["shorter_accuracy"] + 0.2
    assert sum(item["count"] for item in found["order_bins"]) == found["num_pairs"]
    assert 0 <= found["order_error"] <= 0.5


def test_the_pass_rate_is_learnt_by_the_pointwise_loss(preferred: str, base: str, tmp_path: Path) -> None:
    out = reward_model.run(config_for(preferred, base, tmp_path, loss=POINTWISE, num_steps=60, **RARELY))
    found = record(out)
    assert found["accuracy"] > 0.9
    least = math.log(2) / 3  # two of six answers have a pass rate of a half, the others of 0 or 1
    assert least < found["loss"] < least + 0.1
    assert found["rate_error"] < 0.1
    bins = [item for item in found["rate_bins"] if item["count"]]
    assert bins[0]["observed"] < 0.1
    assert bins[-1]["observed"] > 0.9


def test_a_run_leaves_what_the_next_stages_read(trained: Path) -> None:
    manifest = read_manifest(trained, command="reward-model")
    assert manifest["counts"]["sequences"] == 40 * 8
    assert {"held_out_accuracy", "held_out_loss", "held_out_order_error"} <= set(manifest["facts"]["final"])
    asked = Prompt(text="f(99) =", max_new_tokens=8)
    good, bad = AnswerScorer.load(trained / "model", device="cpu").scores(
        [(asked, " abab"), (asked, " 1212")]
    )
    assert good is not None
    assert bad is not None
    assert good > bad


def test_transformers_scores_as_the_run_did(trained: Path) -> None:
    theirs = AutoModelForSequenceClassification.from_pretrained(
        trained / "model", experts_implementation="eager"
    ).eval()
    ours = load_scalar_model(trained / "model")
    ids = Tokenizer.load(trained / "model").encode("f(1) = ab", add_bos=True)
    with torch.no_grad():
        wanted = theirs(torch.tensor([ids])).logits[:, 0]
        torch.testing.assert_close(ours(torch.tensor([ids])), wanted, rtol=1e-4, atol=1e-4)


class KilledError(Exception):
    """Stands for whatever ends a process."""


def test_a_killed_run_goes_on_bit_for_bit(preferred: str, base: str, tmp_path: Path) -> None:
    def die(report: Mapping[str, float]) -> None:
        if report["step"] >= 4:
            raise KilledError

    whole = reward_model.run(config_for(preferred, base, tmp_path / "whole"))
    config = config_for(preferred, base, tmp_path / "killed")
    with pytest.raises(KilledError):
        reward_model.run(config, on_metrics=die)
    again = reward_model.run(config)
    states = [load_scalar_model(out / "model").state_dict() for out in (whole, again)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert record(whole) == record(again)


def test_a_finished_run_is_left_alone(trained: Path, preferred: str, base: str) -> None:
    before = (trained / "manifest.json").stat().st_mtime_ns
    reward_model.run(config_for(preferred, base, trained, num_steps=40, **RARELY))
    assert (trained / "manifest.json").stat().st_mtime_ns == before


def test_a_reward_model_is_trained_further(trained: Path, preferred: str, base: str, tmp_path: Path) -> None:
    out = reward_model.run(config_for(preferred, str(trained / "model"), tmp_path / "run", num_steps=1))
    assert record(out)["accuracy"] > 0.9


def test_earlier_preferences_are_replayed(preferred: str, base: str, tmp_path: Path) -> None:
    replay = ReplayConfig(preferences=(preferred,), share=0.25)
    plain = reward_model.run(config_for(preferred, base, tmp_path / "a", num_steps=1))
    config = config_for(preferred, base, tmp_path / "b", num_steps=1, replay=replay)
    replayed = reward_model.run(config)
    assert record(replayed)["train_pairs"] == record(plain)["train_pairs"] * 4 // 3
    assert record(replayed)["num_pairs"] == record(plain)["num_pairs"]
    assert "replay0" in read_manifest(replayed, command="reward-model")["inputs"]


def test_bfloat16_weights_are_trained(preferred: str, base: str, tmp_path: Path) -> None:
    out = reward_model.run(config_for(preferred, base, tmp_path, num_steps=30, precision="bf16", **RARELY))
    assert record(out)["accuracy"] > 0.9
    assert load_scalar_model(out / "model").score.weight.dtype == torch.bfloat16


def test_micro_batches_do_not_change_the_loss(preferred: str, base: str, tmp_path: Path) -> None:
    losses = []
    for micro in (1, 8):
        seen: list[Mapping[str, float]] = []
        batch = BatchConfig(sequences=8, micro=micro)
        report = ReportConfig(log_every=1, eval_every=9, tensorboard="off", plot="off")
        config = config_for(preferred, base, tmp_path / str(micro), batch=batch, num_steps=1, report=report)
        reward_model.run(config, on_metrics=seen.append)
        losses.append([(r["loss"], r["accuracy"], r["score"]) for r in seen if "loss" in r])
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-4, abs=1e-6)


def test_an_epoch_sees_every_pair_once(preferred: str, base: str, tmp_path: Path) -> None:
    config = config_for(preferred, base, tmp_path / "run", num_steps=None, batch=BatchConfig(sequences=64))
    out = reward_model.run(config)
    num_pairs = record(out)["train_pairs"]
    assert read_manifest(out, command="reward-model")["counts"]["steps"] == -(-num_pairs // 64)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"reading": ReadingConfig(max_length=99999)},
            "max_length must be <= 64, the model's max_positions, got 99999",
        ),
        (
            {"reading": ReadingConfig(max_length=3)},
            "must have a pair, got none on 0 of 0 prompts .*'too_long_answers': 240",
        ),
    ],
)
def test_what_does_not_go_together_is_named(
    fields: dict[str, Any], message: str, preferred: str, base: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        reward_model.run(config_for(preferred, base, tmp_path / "run", **fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"preferences": ()}, "preferences must name at least one directory, got none"),
        ({"held_out_share": 0.0}, r"held_out_share must be in \(0, 1\), got 0.0"),
        ({"epochs": 0.0}, "epochs must be positive, got 0.0"),
        ({"num_steps": 0}, "num_steps must be >= 1, got 0"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        config_for("p", "m", tmp_path, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"margin": -1.0}, "margin must be finite and >= 0, got -1.0"),
        ({"kind": "pointwise", "centring": 0.1}, "centring must be 0 for a pointwise loss, got 0.1"),
    ],
)
def test_a_wrong_loss_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardLossConfig(**fields)


def test_a_wrong_reading_or_replay_is_named() -> None:
    with pytest.raises(ValueError, match="max_length must be >= 1, got 0"):
        ReadingConfig(max_length=0)
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\), got 1.0"):
        ReplayConfig(share=1.0)


def test_the_verb_trains(preferred: str, base: str, tmp_path: Path) -> None:
    words = f"--preferences {preferred} --init-from {base} --out {tmp_path / 'run'} --num_steps 1"
    words += " --held_out_share 0.3 --loss.margin 0 --batch.sequences 4 --schedule.warmup_steps 0"
    words += " --num_threads 1 --report.plot off --report.tensorboard off --device cpu"
    assert main(["reward-model", *words.split()]) == 0
    assert (tmp_path / "run" / "manifest.json").is_file()
