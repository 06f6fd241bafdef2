"""`dscoder infill`: a position in a file, the completion in context or in the file."""

from pathlib import Path

import pytest

from dscoder.checkpoint import load_pretrained, save_pretrained
from dscoder.cli.context import render_in_context
from dscoder.cli.main import main
from dscoder.config.generate import EngineConfig, GenerateConfig
from dscoder.infer.engine import Engine
from dscoder.infer.infill import infill_request

SOURCE = "def add(a, b):\n\treturn \n\nprint(add(1, 2))\n"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "code.py"
    path.write_bytes(SOURCE.encode())
    return path


def infill(model_dir: Path, *words: str) -> int:
    return main(["infill", "--model", str(model_dir), "--max-new-tokens", "6", *words])


def filled(model_dir: Path, prefix: str, suffix: str) -> str:
    engine = Engine.load(EngineConfig(model=str(model_dir)))
    config = GenerateConfig(max_new_tokens=6)
    request = infill_request(
        engine.tokenizer, prefix, suffix, max_positions=engine.max_positions, config=config
    )
    return engine.generate([request])[0].text


def test_the_completion_stands_between_what_is_before_and_after(
    model_dir: Path, source: Path, tmp_path: Path
) -> None:
    target = tmp_path / "filled.py"
    assert infill(model_dir, str(source), "--line", "2", "--column", "9", "--output", str(target)) == 0
    prefix, suffix = SOURCE[:23], SOURCE[23:]
    assert prefix.endswith("\n\treturn ")
    assert target.read_bytes().decode() == prefix + filled(model_dir, prefix, suffix) + suffix
    assert source.read_bytes().decode() == SOURCE


def test_without_a_column_the_hole_is_at_the_end_of_the_line(
    model_dir: Path, source: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    outputs = []
    for words in (["--column", "9"], []):
        assert infill(model_dir, str(source), "--line", "2", "--output", "-", *words) == 0
        outputs.append(capfdbinary.readouterr().out)
    assert outputs[0] == outputs[1]
    assert outputs[0].startswith(SOURCE[:23].encode())


def test_in_place_changes_the_file_and_keeps_its_permissions(
    model_dir: Path, source: Path, tmp_path: Path
) -> None:
    source.chmod(0o751)
    link = tmp_path / "link.py"
    link.symlink_to(source)
    assert infill(model_dir, str(link), "--line", "3", "--in-place") == 0
    assert (
        source.read_bytes().decode()
        == SOURCE[:24] + filled(model_dir, SOURCE[:24], SOURCE[24:]) + SOURCE[24:]
    )
    assert source.stat().st_mode & 0o777 == 0o751
    assert link.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["code.py", "link.py"]


def test_line_breaks_stay_crlf(model_dir: Path, source: Path) -> None:
    source.write_bytes(SOURCE.replace("\n", "\r\n").encode())
    assert (
        infill(model_dir, str(source), "--line", "1", "--column", "1", "--in-place", "--temperature", "3")
        == 0
    )
    content = source.read_bytes()
    assert len(content) > len(SOURCE) + 4
    assert content.count(b"\n") == content.count(b"\r\n")


def test_the_terminal_shows_the_completion_in_context(
    model_dir: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert infill(model_dir, str(source), "--line", "2", "--context", "1", "--single-line") == 0
    shown = capsys.readouterr().out
    assert shown.startswith("  1 | def add(a, b):\n> 2 | ")
    assert "return " in shown.split("\n")[1]
    assert shown.endswith("\n  3 | \n")


# ---- rendering ----


def test_new_lines_are_marked_in_the_margin() -> None:
    shown = render_in_context("a\nb\nc = ", "1\nd = 2", " + 3\ne\nf\n", num_lines=1)
    assert shown.plain == "  2 | b\n> 3 | c = 1\n> 4 | d = 2 + 3\n  5 | e"
    assert [shown.plain[span.start : span.end] for span in shown.spans if "green" in str(span.style)] == [
        "1",
        "d = 2",
    ]


def test_an_empty_completion_still_shows_its_place() -> None:
    assert render_in_context("a\nb", "", "\nc", num_lines=9).plain == "  1 | a\n> 2 | b\n  3 | c"


# ---- errors ----


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--line", "9"], "line must be in [1, 5], got 9"),
        (["--line", "1", "--column", "16"], "column must be in [1, 15] on line 1, got 16"),
        (["--line", "1", "--max-new-tokens", "95"], "max_new_tokens must be < 92"),
    ],
)
def test_errors_are_one_line_and_leave_the_file_alone(
    model_dir: Path, source: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert infill(model_dir, str(source), "--in-place", *words) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert source.read_bytes().decode() == SOURCE


def test_a_file_that_is_not_text_is_named(
    model_dir: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source.write_bytes(b"\xff\xfea")
    assert infill(model_dir, str(source), "--line", "1") == 1
    assert f"{source} must be UTF-8 text" in capsys.readouterr().err


def test_a_model_without_fim_tokens_is_refused(
    model_dir: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    save_pretrained(load_pretrained(model_dir), other, tokenizer=model_dir)
    path = other / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8").replace("fim\u2581", "mif\u2581"), encoding="utf-8")
    assert infill(other, str(source), "--line", "1") == 1
    assert "the model was not trained to fill holes" in capsys.readouterr().err
