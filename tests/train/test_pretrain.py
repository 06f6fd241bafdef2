"""The stage `pretrain` in one process: what it leaves, what it refuses, what it goes on from."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from dscoder.checkpoint import load_pretrained, source
from dscoder.config.train import (
    CheckpointConfig,
    PretrainConfig,
    ReportConfig,
)
from dscoder.models import Transformer
from dscoder.runtime.artifact import read_manifest
from dscoder.testing.tiny_run import TINY_MOE, TINY_WINDOW, config_for, tiny_windows
from dscoder.text.tokenizer import Tokenizer
from dscoder.train import memory, pretrain
from dscoder.train.checkpointing import completed, read_progress
from dscoder.train.metrics import MEASURED


@pytest.fixture(scope="module")
def finished(windows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    report = ReportConfig(log_every=2, eval_every=4)
    return pretrain.run(config_for(windows, out, report=report), evaluate=lambda model: {"found": 0.5})


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_pretrained(out / "model").state_dict()


def test_a_run_leaves_what_the_next_stages_read(finished: Path, windows: Path) -> None:
    names = {path.name for path in finished.iterdir()} - {"lock"}
    assert names == {
        *("checkpoints", "config.yaml", "loss.png", "manifest.json", "metrics.jsonl", "model", "tensorboard")
    }
    tokenizer = Tokenizer.load(finished / "model")
    model = load_pretrained(finished / "model")
    assert (model.config.bos_id, model.config.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)
    assert tokenizer.vocab_size == read_manifest(windows, command="prepare")["facts"]["vocab_size"]


def test_the_manifest_tells_what_the_run_did(finished: Path) -> None:
    manifest = read_manifest(finished, command="pretrain")
    assert manifest["counts"] == {"steps": 8, "sequences": 32, "tokens": 32 * TINY_WINDOW}
    assert manifest["facts"]["num_threads"] == 1
    assert manifest["facts"]["final"]["found"] == 0.5


def test_the_loss_falls(windows: Path, tmp_path: Path) -> None:
    seen: list[Mapping[str, float]] = []
    pretrain.run(config_for(windows, tmp_path, num_steps=40), on_metrics=seen.append)
    losses = [report["loss"] for report in seen if "loss" in report]
    assert losses[-1] < losses[0] - 0.5


def test_evaluations_come_at_intervals_and_at_the_end(windows: Path, tmp_path: Path) -> None:
    modes: list[bool] = []

    def evaluate(model: Transformer) -> dict[str, float]:
        modes.append(model.training)
        return {"found": 1.0}

    pretrain.run(config_for(windows, tmp_path, num_steps=6), evaluate=evaluate)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "found" in line] == [4, 6]
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6]
    assert modes == [True, True]


def test_the_config_in_the_run_directory_is_whole(finished: Path) -> None:
    written = yaml.safe_load((finished / "config.yaml").read_text())
    assert written["model"]["moe"]["num_experts"] == 4
    assert written["schedule"]["max_lr"] == 3e-3
    assert "overwrite" not in written


def test_running_a_finished_run_again_does_nothing(finished: Path, windows: Path) -> None:
    before = (finished / "manifest.json").stat().st_mtime_ns
    pretrain.run(config_for(windows, finished))
    assert (finished / "manifest.json").stat().st_mtime_ns == before


def test_tied_embeddings_stay_one_matrix(windows: Path, tmp_path: Path) -> None:
    tied = replace(TINY_MOE, tie_embeddings=True)
    first = pretrain.run(config_for(windows, tmp_path / "first", model=tied, num_steps=2))
    config = config_for(windows, tmp_path / "second", model=None, init_from=str(first / "model"), num_steps=2)
    models = [load_pretrained(out / "model") for out in (first, pretrain.run(config))]
    assert all(model.head.weight is model.embed.weight for model in models)
    assert not torch.equal(models[0].embed.weight, models[1].embed.weight)
    state = completed(first / "checkpoints")[-1][1] / ".metadata"
    assert b"master.embed.weight" in state.read_bytes()
    assert b"master.head.weight" not in state.read_bytes()


class KilledError(Exception):
    """Stands for whatever ends a process."""


def killed_at(step: int) -> pretrain.Evaluate:
    calls: list[int] = []

    def evaluate(model: Transformer) -> dict[str, float]:
        calls.append(1)
        if len(calls) == step:
            raise KilledError
        return {}

    return evaluate


def reports(out: Path) -> list[dict[str, float]]:
    """What a run reported, without how fast it was."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]


@pytest.mark.parametrize(("log_every", "every"), [(10, 4), (4, 3), (3, 5)])
def test_a_report_that_a_kill_falls_into_is_the_same(
    windows: Path, tmp_path: Path, log_every: int, every: int
) -> None:
    whole, cut = (
        config_for(
            windows,
            tmp_path / name,
            num_steps=12,
            checkpoint=CheckpointConfig(every=every),
            report=ReportConfig(log_every=log_every, eval_every=1, tensorboard="off", plot="off"),
        )
        for name in ("whole", "cut")
    )
    pretrain.run(whole, evaluate=lambda model: {})
    for killed_after in (every + 2, 2):
        with pytest.raises(KilledError):
            pretrain.run(cut, evaluate=killed_at(killed_after))
    pretrain.run(cut, evaluate=lambda model: {})
    assert reports(tmp_path / "cut") == reports(tmp_path / "whole")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_stochastic"])
def test_a_run_that_failed_goes_on_to_the_same_weights(windows: Path, tmp_path: Path, precision: str) -> None:
    report = ReportConfig(log_every=2, eval_every=1, tensorboard="off", plot="off")
    configs = [
        config_for(windows, tmp_path / name, precision=precision, report=report) for name in ("whole", "cut")
    ]
    pretrain.run(configs[0], evaluate=lambda model: {})
    with pytest.raises(KilledError):
        pretrain.run(configs[1], evaluate=killed_at(5))
    torch.rand(5)  # whatever the process does in between
    pretrain.run(configs[1], evaluate=lambda model: {})
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    expected = torch.float32 if precision == "fp32" else torch.bfloat16
    assert whole["embed.weight"].dtype == expected


def test_the_position_in_the_data_is_one_number(finished: Path) -> None:
    step, path = completed(finished / "checkpoints")[-1]
    progress = read_progress(path)
    assert (step, progress.num_sequences, progress.num_tokens) == (8, 32, 32 * TINY_WINDOW)


def unfinished(windows: Path, out: Path) -> PretrainConfig:
    """A run that stopped after step 3, and its config."""
    report = ReportConfig(eval_every=1, tensorboard="off", plot="off")
    config = config_for(windows, out, report=report)
    with pytest.raises(KilledError):
        pretrain.run(config, evaluate=killed_at(4))
    return config


def test_another_config_is_refused_but_reports_may_change(windows: Path, tmp_path: Path) -> None:
    config = unfinished(windows, tmp_path)
    with pytest.raises(ValueError, match=r"config\.schedule\.max_lr: 0\.003 there, 0\.1 here"):
        pretrain.run(replace(config, schedule=replace(config.schedule, max_lr=0.1)))
    pretrain.run(replace(config, report=ReportConfig(tensorboard="off", plot="off")))


def test_overwrite_keeps_the_progress_of_the_same_run(windows: Path, tmp_path: Path) -> None:
    config = replace(unfinished(windows, tmp_path), overwrite=True)
    steps: list[float] = []
    pretrain.run(config, on_metrics=lambda report: steps.append(report["step"]))
    assert min(steps) > 3
    before = (tmp_path / "manifest.json").stat().st_mtime_ns
    pretrain.run(config)
    assert (tmp_path / "manifest.json").stat().st_mtime_ns == before


def test_overwrite_begins_another_run(windows: Path, tmp_path: Path) -> None:
    config = unfinished(windows, tmp_path)
    pretrain.run(replace(config, seed=1, num_steps=2, overwrite=True))
    assert [line["step"] for line in reports(tmp_path)] == [2]
    assert [step for step, _ in completed(tmp_path / "checkpoints")] == [2]


def test_a_checkpoint_that_cannot_be_read_is_named(windows: Path, tmp_path: Path) -> None:
    config = unfinished(windows, tmp_path)
    (completed(tmp_path / "checkpoints")[-1][1] / "progress.json").write_text("{")
    with pytest.raises(RuntimeError, match=r"step-000000003 cannot be read .*goes on from the one before"):
        pretrain.run(config)


def test_another_number_of_threads_is_refused_once_there_is_a_checkpoint(
    windows: Path, tmp_path: Path
) -> None:
    config = unfinished(windows, tmp_path)
    with pytest.raises(ValueError, match=r"num_threads must be 1, what the run in .* began with, got 2"):
        pretrain.run(replace(config, num_threads=2))
    pretrain.run(replace(config, num_threads=None))
    assert read_manifest(tmp_path, command="pretrain")["facts"]["num_threads"] == 1


def test_other_data_is_refused(windows: Path, tmp_path: Path) -> None:
    config = unfinished(windows, tmp_path / "run")
    other = tiny_windows(tmp_path / "other", window=32)
    with pytest.raises(ValueError, match=r"inputs\.data: "):
        pretrain.run(replace(config, data=str(other)))


def test_the_same_data_made_again_elsewhere_is_the_same(windows: Path, tmp_path: Path) -> None:
    config = unfinished(windows, tmp_path / "run")
    again = tiny_windows(tmp_path / "again")
    pretrain.run(replace(config, data=str(again), report=ReportConfig(tensorboard="off", plot="off")))


def test_another_model_of_the_hub_is_refused(
    finished: Path, windows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "snapshot_download", lambda *_, **__: str(finished / "model"))
    report = ReportConfig(eval_every=1, tensorboard="off", plot="off")
    config = config_for(windows, tmp_path, model=None, init_from="owner/one", report=report)
    with pytest.raises(KilledError):
        pretrain.run(config, evaluate=killed_at(4))
    with pytest.raises(ValueError, match=r"inputs\.init_from: owner/one there, owner/two here"):
        pretrain.run(replace(config, init_from="owner/two"))
    pretrain.run(config)


def test_a_moved_model_is_the_same_input(finished: Path, windows: Path, tmp_path: Path) -> None:
    config = config_for(windows, tmp_path / "run", model=None, init_from=str(finished / "model"), num_steps=1)
    pretrain.run(config)
    shutil.copytree(finished / "model", tmp_path / "moved")
    pretrain.run(replace(config, init_from=str(tmp_path / "moved")))


def test_data_of_another_window_than_the_recipe_is_refused(windows: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must have 4096 tokens, .*recipe.* got 64; .* set window to 64"):
        pretrain.run(config_for(windows, tmp_path, window=4096))
    pretrain.run(config_for(windows, tmp_path, window=TINY_WINDOW, num_steps=1))


def test_a_model_beyond_the_memory_is_refused_before_it_is_made(
    windows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "host_memory", lambda: 2**20)
    monkeypatch.setattr(pretrain, "Transformer", lambda *_, **__: pytest.fail("made the model"))
    with pytest.raises(ValueError, match=r"the host must have .* GiB of memory"):
        pretrain.run(config_for(windows, tmp_path))


def test_a_device_that_is_not_there_is_refused(windows: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"device must be one that torch .* got 'cuda:99'"):
        pretrain.run(config_for(windows, tmp_path, device="cuda:99"))


def test_a_window_longer_than_the_model_is_refused(windows: Path, tmp_path: Path) -> None:
    short = replace(TINY_MOE, max_positions=32)
    with pytest.raises(ValueError, match=r"window of the data must be <= 32, .* got 64"):
        pretrain.run(config_for(windows, tmp_path, model=short))
    # Nothing was written, so the corrected config may use the directory.
    pretrain.run(config_for(windows, tmp_path, num_steps=1))


def test_a_vocabulary_larger_than_the_model_is_refused(windows: Path, tmp_path: Path) -> None:
    small = replace(TINY_MOE, vocab_size=300)
    with pytest.raises(ValueError, match=r"model\.vocab_size must be >= 512, the tokenizer's, got 300"):
        pretrain.run(config_for(windows, tmp_path, model=small))


def test_half_prepared_data_is_refused(windows: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    shutil.copytree(windows, half)
    (half / "manifest.json").unlink()
    with pytest.raises(ValueError, match="`dscoder prepare` has not finished there"):
        pretrain.run(config_for(half, tmp_path / "run"))


@pytest.fixture
def own_windows(windows: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(windows, tmp_path / "own")


def assert_refused_before_a_step(config: PretrainConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pretrain.run(config, on_metrics=lambda report: pytest.fail("made a step"))


def test_data_without_its_tokenizer_is_refused(own_windows: Path, tmp_path: Path) -> None:
    config = config_for(own_windows, tmp_path / "run")
    (own_windows / "tokenizer" / "tokenizer.json").unlink()
    assert_refused_before_a_step(config, r"tokenizer\.json")
    shutil.rmtree(own_windows / "tokenizer")
    assert_refused_before_a_step(config, "the data must hold a tokenizer, got none at .*own/tokenizer")


def test_a_tokenizer_that_is_not_the_one_of_the_data_is_refused(own_windows: Path, tmp_path: Path) -> None:
    Tokenizer.train(["a text"], vocab_size=300).save(own_windows / "tokenizer")
    config = config_for(own_windows, tmp_path / "run")
    assert_refused_before_a_step(config, r"own/tokenizer must have 512 ids, those of the data, got \d+")


def test_work_in_the_place_of_the_model_is_refused_and_kept(windows: Path, tmp_path: Path) -> None:
    config = unfinished(windows, tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes.txt").write_text("mine")
    assert_refused_before_a_step(config, r"must be a checkpoint and nothing else .*'notes\.txt' in it")
    assert (tmp_path / "model" / "notes.txt").read_text() == "mine"


def test_tokens_beyond_the_vocabulary_are_named_with_their_file(own_windows: Path, tmp_path: Path) -> None:
    path = own_windows / "train" / "tokens-00000.npy"
    np.save(path, np.full_like(np.load(path), 600))
    config = config_for(own_windows, tmp_path / "run")
    assert_refused_before_a_step(config, r"train/tokens-00000\.npy must hold token ids below 512, .* got 600")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": None}, "exactly one of model and init_from must be given, got neither"),
        ({"init_from": "x"}, "exactly one of model and init_from must be given, got both"),
        ({"stage": "long_context"}, "stage long_context needs init_from"),
        ({"window": 1}, "window must be >= 2, got 1"),
        ({"num_steps": 0}, "num_steps must be >= 1, got 0"),
        ({"num_threads": 0}, "num_threads must be >= 1, got 0"),
    ],
)
def test_wrong_fields_are_named(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_for(Path("d"), Path("o"), **fields)
