"""`dscoder plan`."""

import json
import re

import pytest

from dscoder.cli.main import main

LITE = ["plan", "--model", "v2_lite", "--gpus", "8", "--seq", "4096", "--tokens", "5.7T", "--price", "2"]


TINY = ["plan", "--model", "tiny_moe", "--seq", "512", "--batch", "32", "--gpus"]
C10D = "--rdzv-backend c10d --rdzv-endpoint HOST:29500"


def test_tables_show_every_part_and_mark_what_is_assumed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")  # of no terminal: a file takes lines of any length
    assert main(LITE) == 0
    shown = capsys.readouterr().out
    for text in (
        "15.71B parameters",
        "the quickest of each grid, times assumed",
        "Its step (assumed)",
        "AdamW's two, float32",
        "inside a node",
        "What does not fit, by how much",
        "5.7T tokens (assumed): 301,997 steps",
        "GPU-hours",
        "\ntorchrun --nproc-per-node 8 -m dscoder pretrain --model.preset v2_lite --data DATA ",
        "--parallel.recompute",
    ):
        assert text in shown
    assert "measured" not in shown
    assert "\u2026" not in shown  # the mark of a cut cell


@pytest.mark.parametrize("width", [100, 80, 60])
def test_a_narrow_terminal_gets_fewer_columns_and_whole_numbers(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert main([*LITE, "--show", "1"]) == 0
    lines = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out).splitlines()
    [end] = [idx for idx, line in enumerate(lines) if line.startswith("torchrun")]
    assert max(len(line) for line in lines[:end]) <= width
    head, row = first_with(lines, "layout  "), first_with(lines, "1 x 2 x 4")
    assert "step s" in head
    assert re.search(r"\d\d\.\d\d ", row)
    assert "weights" not in head
    assert "Left out, for the terminal is narrow: weights" in " ".join(map(str.strip, lines))
    assert "\u2026" not in "".join(lines)


def first_with(lines: list[str], text: str) -> str:
    """The first line that holds `text`."""
    return next(line for line in lines if text in line)


def test_small_models_have_small_units(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "2"]) == 0
    shown = capsys.readouterr().out
    for text in ("tiny_moe: 7.097M parameters", " step ms ", "receives in a step, MB"):
        assert text in shown


@pytest.mark.parametrize(
    ("words", "launch"),
    [
        (["1"], "dscoder pretrain"),
        (["4"], "torchrun --nproc-per-node 4 -m dscoder pretrain"),
        (
            ["8", "--gpus-per-node", "4"],
            f"torchrun --nnodes 2 {C10D} --nproc-per-node 4 -m dscoder pretrain",
        ),
    ],
)
def test_the_quickest_comes_as_a_command(
    words: list[str], launch: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*TINY, *words]) == 0
    assert f"\n{launch} --model.preset tiny_moe --data DATA " in capsys.readouterr().out


def test_json_holds_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*LITE, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["basis"] == found["run"]["basis"] == "assumed"
    assert {rate["basis"] for rate in found["rates"].values()} == {"assumed"}
    best = found["fitting"][0]
    assert best["seconds"]["basis"] == best["mfu"]["basis"] == "assumed"
    parts = [size for name, size in best["memory_bytes"].items() if name not in ("moment", "total")]
    assert sum(parts) == best["memory_bytes"]["total"] <= found["gpu_memory_bytes"]
    assert best["missing_bytes"] == 0 < found["missing"][0]["missing_bytes"]


def test_nothing_that_fits_is_an_error_that_says_what_would_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "v2", "--gpus", "32", "--memory", "80GB"]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("dscoder plan: none of ")
    assert " layouts fits 80.0 GB. The nearest, 1 x " in line
    assert " lacks " in line
    assert "What would help: " in line
    assert "(--gpus 64)" in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "v9", "--gpus", "8"], "plan: model must be a directory or one of"),
        (["--model", "v2", "--gpus", "12"], "plan: gpus must be a multiple of gpus_per_node = 8, got 12"),
        (["--model", "v2", "--gpus", "8", "--memory", "80"], "plan: memory must be a size"),
        (
            ["--model", "v2", "--gpus", "8", "--expert", "16"],
            "plan: gpus must be a multiple of expert, got 8 and 16",
        ),
    ],
)
def test_wrong_questions_are_named(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *words]) == 1
    assert message in capsys.readouterr().err
