"""`dscoder plan`."""

import json

import pytest

from dscoder.cli.main import main

LITE = ["plan", "--model", "v2_lite", "--gpus", "8", "--seq", "4096", "--tokens", "5.7T", "--price", "2"]


def test_tables_show_every_part_and_mark_what_is_assumed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(LITE) == 0
    shown = capsys.readouterr().out
    for text in (
        "15.71B parameters",
        "the quickest of each grid, times assumed",
        "Its step, seconds (assumed)",
        "AdamW's two, float32",
        "inside a node",
        "What does not fit, by how much",
        "5.7T tokens (assumed): 301,997 steps",
        "GPU-hours",
        "--parallel.recompute",
    ):
        assert text in shown
    assert "measured" not in shown


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
    ],
)
def test_wrong_questions_are_named(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *words]) == 1
    assert message in capsys.readouterr().err
