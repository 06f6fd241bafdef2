"""`dscoder generate`: prompts in, text or JSON lines out."""

import io
import json
import sys
from pathlib import Path

import pytest

from dscoder.cli.main import main
from dscoder.config.generate import EngineConfig, GenerateConfig
from dscoder.infer.engine import Engine
from dscoder.infer.infill import infill_request, text_request


def continued(model_dir: Path, prompt: str, *, num_tokens: int = 6) -> str:
    engine = Engine.load(EngineConfig(model=str(model_dir)))
    config = GenerateConfig(max_new_tokens=num_tokens)
    return engine.generate([text_request(engine.tokenizer, prompt, config=config)])[0].text


def filled(model_dir: Path, prefix: str, suffix: str, *, num_tokens: int = 6) -> str:
    engine = Engine.load(EngineConfig(model=str(model_dir)))
    config = GenerateConfig(max_new_tokens=num_tokens)
    request = infill_request(
        engine.tokenizer, prefix, suffix, max_positions=engine.max_positions, config=config
    )
    return engine.generate([request])[0].text


def generate(model_dir: Path, *words: str) -> int:
    return main(["generate", "--model", str(model_dir), "--max-new-tokens", "6", *words])


def test_one_prompt_prints_its_completion_and_nothing_else(
    model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(model_dir, "--prompt", "def add") == 0
    assert capsys.readouterr().out == continued(model_dir, "def add")


def test_several_prompts_print_under_headings_in_order(
    model_dir: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "b.txt"
    path.write_text("for name in names:")
    assert generate(model_dir, "--prompt", "def add", "--prompt", "a", str(path), "--max-batch", "2") == 0
    sections = {"prompt 1": "def add", "prompt 2": "a", str(path): "for name in names:"}
    expected = [f"==> {name} <==\n{continued(model_dir, text)}\n" for name, text in sections.items()]
    assert capsys.readouterr().out == "".join(expected)


def test_a_marker_makes_a_hole(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(model_dir, "--prompt", "def add(<FILL_ME>):") == 0
    hole = capsys.readouterr().out
    assert hole == filled(model_dir, "def add(", "):")
    assert hole != continued(model_dir, "def add(<FILL_ME>):")
    assert generate(model_dir, "--prompt", "def add(@@):", "--marker", "@@") == 0
    assert capsys.readouterr().out == hole


def test_the_standard_input_is_a_prompt(
    model_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"def add")))
    assert generate(model_dir) == 0
    assert capsys.readouterr().out == continued(model_dir, "def add")


def test_json_lines_keep_their_fields_and_order(model_dir: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    records = [{"id": 7, "prompt": "def \u2028"}, {"prompt": "a(", "suffix": ")"}, {"prompt": "b"}]
    source.write_text(
        "\n".join(json.dumps(r, ensure_ascii=False) for r in records) + "\n\n", encoding="utf-8"
    )
    assert generate(model_dir, "--jsonl", str(source), "--output", str(target), "--max-batch", "2") == 0
    answers = [json.loads(line) for line in target.read_text(encoding="utf-8").split("\n") if line]
    assert [{key: a[key] for key in r} for a, r in zip(answers, records, strict=True)] == records
    expected = [continued(model_dir, "def \u2028"), filled(model_dir, "a(", ")"), continued(model_dir, "b")]
    assert [answer["completion"] for answer in answers] == expected
    assert all(answer["finish_reason"] in ("length", "eos", "stop") for answer in answers)
    assert all(1 <= answer["num_tokens"] <= 6 for answer in answers)


def test_json_lines_go_to_the_standard_output_too(
    model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(model_dir, "--prompt", "def add", "--output", "-") == 0
    [line] = capsys.readouterr().out.splitlines()
    assert json.loads(line)["completion"] == continued(model_dir, "def add")


def test_a_config_file_holds_the_same_options(
    model_dir: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(f"model: {model_dir}\nmax_new_tokens: 3\nprompt: [def add]\n")
    assert main(["generate", "--config", str(config)]) == 0
    assert capsys.readouterr().out == continued(model_dir, "def add", num_tokens=3)


def test_how_requests_are_batched_changes_nothing(
    model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ["--prompt", "def add", "--prompt", "a", "--prompt", "for name in names:"]
    outputs = []
    for words in (
        [],
        ["--max-batch", "1"],
        ["--prefill-chunk", "2", "--cache-tokens", "100", "--cuda-graphs", "false"],
    ):
        assert generate(model_dir, *prompts, *words) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] == outputs[2] != ""


def test_sampling_follows_the_seed(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = []
    for seed in ("1", "1", "2"):
        assert generate(model_dir, "--prompt", "def", "--temperature", "2", "--seed", seed) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]


def test_a_stop_string_cuts_the_text(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = continued(model_dir, "def add")
    middle = whole[len(whole) // 2]
    assert generate(model_dir, "--prompt", "def add", "--stop", "never there", "--stop", middle) == 0
    assert capsys.readouterr().out == whole[: whole.index(middle)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", "<FILL_ME><FILL_ME>"], "must hold '<FILL_ME>' at most once, got it 2 times"),
        (["--prompt", "a" * 500], "request 0 must have <= 96 prompt tokens"),
        (["--prompt", "a", "--temperature", "-1"], "temperature must be finite and >= 0, got -1.0"),
        (
            ["--prompt", "a", "--dtype", "int8"],
            "dtype must be auto, float32, bfloat16 or float16, got 'int8'",
        ),
        (["--prompt", "a", "--cache-tokens", "3"], "longest request, got room for 3"),
        (["--prompt", "a", "--memory-share", "2"], "memory_share must be in (0, 1], got 2.0"),
        (["missing.txt"], "No such file or directory: 'missing.txt'"),
    ],
)
def test_errors_are_one_line(
    model_dir: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert generate(model_dir, *words) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nope", "jsonl:1 must be a JSON object"),
        ('{"text": 1}', 'a text "prompt"'),
        ('{"prompt": "", "suffix": 3}', "int"),
    ],
)
def test_bad_records_are_named(
    model_dir: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, line: str, message: str
) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(line + "\n")
    assert generate(model_dir, "--jsonl", str(path)) == 1
    assert message in capsys.readouterr().err


def test_a_file_that_is_not_text_is_named(
    model_dir: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "binary"
    path.write_bytes(b"a\xff\xfe")
    assert generate(model_dir, str(path)) == 1
    assert f"{path} must be UTF-8 text, got 'utf-8' codec can't decode byte 0xff" in capsys.readouterr().err
