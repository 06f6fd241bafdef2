"""`dscoder demo`: from source files to filled holes, and nothing done twice."""

import json
from pathlib import Path

import pytest

from dscoder.cli.main import main
from dscoder.cli.progress import sparkline
from dscoder.config.demo import DemoConfig

MODULE = """import os
import sys

def function_{i}(name, other):
    value_{i} = os.path.join(name, other)
    if value_{i} in sys.path:
        return value_{i}
    return None
"""


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("demo")
    (root / "sources").mkdir()
    for i in range(60):
        (root / "sources" / f"module_{i}.py").write_text(MODULE.format(i=i) * (1 + i % 3))
    options = {
        "out": root / "out",
        "sources.paths": f"[{root / 'sources'}]",
        "sources.held_out_share": 0.3,
        "model.vocab_size": 512,
        "model.width": 32,
        "model.mlp_width": 48,
        "model.num_layers": 2,
        "model.max_positions": 256,
        "num_steps": 3,
        "batch.sequences": 4,
        "batch.micro": 4,
        "num_holes": 5,
        "num_shown": 2,
    }
    return [word for key, value in options.items() for word in (f"--{key}", str(value))]


def test_the_demo_trains_measures_and_shows(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", *words]) == 0
    shown = capsys.readouterr().out
    results = json.loads((Path(words[1]) / "held_out" / "results.json").read_text())
    for name in ("trained", "untrained"):
        score = results[name]["score"]
        assert [score[kind]["num_holes"] for kind in ("whole_lines", "line_ends")] == [5, 5]
        assert f"{score['bits_per_byte']:.3f}" in shown
    # Three steps are enough to be better than no step, and the untrained model knows nothing.
    assert results["trained"]["score"]["bits_per_byte"] < results["untrained"]["score"]["bits_per_byte"]
    assert results["untrained"]["score"]["whole_lines"]["num_exact"] == 0
    assert shown.count("\n> ") == 2  # two holes in context
    assert f"--model {Path(words[1]) / 'pretrain' / 'model'}" in shown.replace("\n", "")


def test_a_second_run_repeats_the_results_without_training(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(words[1])
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert main(["demo", *words]) == 0
    after = {
        path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name != "lock"
    }
    assert after == {path: time for path, time in before.items() if path.name != "lock"}
    assert "bits per byte" in capsys.readouterr().out


def test_the_model_that_the_demo_leaves_fills_holes(
    words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    source = tmp_path / "code.py"
    source.write_text("def f():\n    return 1\n")
    model = Path(words[1]) / "pretrain" / "model"
    assert main(["infill", str(source), "--line", "1", "--max-new-tokens", "4", "--model", str(model)]) == 0
    assert "def f():" in capsys.readouterr().out


def test_a_sparkline_spans_from_lowest_to_highest() -> None:
    assert sparkline([0.0, 7.0, 3.5], width=9) == "\u2581\u2588\u2585"
    assert sparkline([1.0, 1.0], width=9) == "\u2581\u2581"


def test_a_sparkline_averages_what_does_not_fit() -> None:
    assert sparkline([0.0, 0.0, 1.0, 3.0, 7.0, 7.0], width=3) == "\u2581\u2583\u2588"


def test_the_stages_of_the_demo_fit_together() -> None:
    config = DemoConfig()
    assert config.tokenizer().vocab_size == config.model.vocab_size
    assert config.prepare().window == config.model.max_positions
    assert config.prepare().fim.rate == 0.5
    assert {c.sources for c in (config.tokenizer(), config.prepare(), config.held_out())} == {config.sources}
