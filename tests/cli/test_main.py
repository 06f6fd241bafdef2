"""`dscoder <verb>`: which verb, and errors on one line."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from dscoder import __version__
from dscoder.cli.main import VERBS, main
from dscoder.runtime.mesh import set_launch
from dscoder.testing.tiny_run import tiny_windows
from dscoder.train.run import StoppedError

PRETRAIN = ["pretrain", "--model.preset", "tiny_moe", "--num-threads", "1"]


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_windows(tmp_path_factory.mktemp("prepared"))


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of an error; a traceback is more."""
    [line] = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("verb", sorted(set(VERBS) - {"info"}))
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"out: [1,\n", "must be a YAML file, got: while parsing"),
        (b"\xff\xfe\xff", "must be a YAML file, got: 'utf-8' codec"),
        (b"- out\n", r"must map options to values, got \['out'\]"),
        (b"", "must map options to values, got None"),
    ],
)
def test_a_config_that_is_none_is_named(
    verb: str, content: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    assert main([verb, "--config", str(path)]) == 1
    assert re.match(rf"dscoder {verb}: --config: {re.escape(str(path))} {message}", one_line(capsys))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "cuda:99"], "device must be one that torch"),
        (["--device", "tpu"], "device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        (["--window", "128"], "must have 128 tokens"),
        (["--recipe", "v2_lite"], "must have 4096 tokens, which the recipe's batch"),
        (["--model.vocab-size", "300"], "model.vocab_size must be >= 512, the tokenizer's, got 300"),
    ],
)
def test_what_a_run_refuses_is_one_line(
    words: list[str], message: str, windows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*PRETRAIN, "--data", str(windows), "--out", str(tmp_path / "run"), *words]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("dscoder pretrain: ")
    assert message in line


def test_a_preset_takes_the_special_ids_of_the_data(windows: Path, tmp_path: Path) -> None:
    words = ["--model.preset", "v2", "--model.vocab_size", "512", "--model.num_layers", "1"]
    words += ["--model.width", "16", "--model.mlp_width", "16", "--model.attention.num_heads", "1"]
    words += ["--model.attention.q_lora_rank", "8", "--model.attention.kv_lora_rank", "8"]
    words += ["--num-steps", "1", "--batch.sequences", "1", "--report.tensorboard", "off"]
    assert main([*PRETRAIN, *words, "--data", str(windows), "--out", str(tmp_path / "run")]) == 0
    written = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    facts = json.loads((windows / "manifest.json").read_text())["facts"]
    assert (written["bos_token_id"], written["eos_token_id"]) == (facts["bos_id"], facts["eos_id"])


@pytest.mark.parametrize("verb", ["generate", "infill"])
def test_a_device_that_is_not_there_is_one_line(
    verb: str, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.py"
    path.write_text("x = 1\n")
    place = ["--line", "1"] if verb == "infill" else []
    assert main([verb, str(path), *place, "--model", str(model_dir), "--device", "cuda:99"]) == 1
    assert "device must be one that torch" in one_line(capsys)


@pytest.mark.parametrize("option", ["--single_line", "--single-line"])
@pytest.mark.parametrize("length", ["--max_new_tokens", "--max-new-tokens"])
def test_both_spellings_are_options(
    option: str, length: str, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "--model", str(model_dir), "--prompt", "def", option, length, "1"]) == 0


def test_info_is_shown_as_json_and_refuses_other_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["build"]["dscoder"] == __version__
    with pytest.raises(SystemExit) as end:
        main(["info", "--bogus"])
    assert end.value.code == 2
    assert "--bogus" in capsys.readouterr().err


def test_the_command_tells_its_verbs_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {verb} " in shown for verb in VERBS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__
    assert main(["fly"]) == 2
    assert "no verb 'fly'" in capsys.readouterr().err
    assert main([]) == 2


def test_the_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dscoder", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == __version__


@pytest.mark.parametrize(("rank", "is_said"), [(0, True), (3, False)])
def test_under_torchrun_an_error_names_its_rank_and_a_stop_is_said_once(
    rank: int,
    is_said: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stop(words: object) -> None:
        raise StoppedError(signal.SIGTERM, step=7, directory=tmp_path)

    with mock.patch.dict(os.environ):
        set_launch(rank=rank, world_size=4, host="127.0.0.1", port=1)
        (tmp_path / "run.yaml").write_text("- out")
        assert main(["pretrain", "--config", str(tmp_path / "run.yaml")]) == 1
        assert one_line(capsys).startswith(f"dscoder pretrain [rank {rank}]: --config: ")
        monkeypatch.setitem(VERBS, "pretrain", stop)
        assert main(["pretrain"]) == 128 + signal.SIGTERM
        assert ("after step 7" in capsys.readouterr().err) == is_said
