"""The files of generated problems: what they hold, and what no two of them share."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dscoder.config.generated import GeneratedConfig, ProblemCounts
from dscoder.data import generated
from dscoder.runtime.artifact import read_manifest

NUM = ProblemCounts(documents=300, dialogues=100, practised=80, validation=20, test=20)


def records(directory: Path, name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (directory / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generated.run(GeneratedConfig(out=str(tmp_path_factory.mktemp("generated") / "out"), num=NUM))


def test_the_files_hold_what_was_asked_for(written: Path) -> None:
    counts = read_manifest(written, command="generated")["counts"]
    assert counts == {"corpus": 300, "dialogues": 100, "practised": 80, "validation": 20, "test": 20}
    for name, count in counts.items():
        assert len(records(written, f"{name}.jsonl")) == count


def test_problems_have_few_tests_to_learn_from_and_many_to_be_measured_by(written: Path) -> None:
    for name, count in (("practised", 3), ("validation", 12), ("test", 12)):
        for record in records(written, f"{name}.jsonl"):
            assert record["tests"].count("assert solve(") == count


def test_no_composition_that_is_measured_was_ever_shown(written: Path) -> None:
    """The lines of a program without its constants stand for its composition."""

    def shape(source: str) -> tuple[str, ...]:
        lines = (line for line in source.split("\n") if line.startswith("    ") and '"""' not in line)
        return tuple("".join(c for c in line if not c.isdigit()) for line in lines)

    shown = {shape(record["text"]) for record in records(written, "corpus.jsonl")}
    shown |= {shape(record["completion"]) for record in records(written, "dialogues.jsonl")}
    practised = {shape(record["solution"]) for record in records(written, "practised.jsonl")}
    assert not shown & practised
    for name in ("validation.jsonl", "test.jsonl"):
        measured = {shape(record["solution"]) for record in records(written, name)}
        assert len(measured) > 15
        assert not measured & (shown | practised)


def test_nothing_is_both_shown_and_asked(written: Path) -> None:
    shown = {record["text"].split('"""')[1] for record in records(written, "corpus.jsonl")}
    asked = {record["prompt"].split(": ", 1)[1] for record in records(written, "dialogues.jsonl")}
    assert len(shown) == 300
    assert not shown & asked


def test_a_share_of_the_answers_leaves_out_a_step(tmp_path: Path) -> None:
    def lines(share: float) -> list[int]:
        num = replace(NUM, hurried_share=share)
        out = generated.run(GeneratedConfig(out=str(tmp_path / str(share)), num=num))
        return [len(record["completion"].splitlines()) for record in records(out, "dialogues.jsonl")]

    whole, hurried, some = lines(0.0), lines(1.0), lines(0.4)
    assert [count - 1 for count in whole] == hurried
    assert 25 <= sum(a != b for a, b in zip(whole, some, strict=True)) <= 55


def test_a_seed_gives_the_same_bytes(written: Path, tmp_path: Path) -> None:
    config = GeneratedConfig(out=str(tmp_path / "again"), num=NUM)
    again = generated.run(config)
    other = generated.run(replace(config, out=str(tmp_path / "other"), seed=1))
    for name in ("corpus.jsonl", "dialogues.jsonl", "practised.jsonl", "validation.jsonl", "test.jsonl"):
        assert (again / name).read_bytes() == (written / name).read_bytes()
        assert (other / name).read_bytes() != (written / name).read_bytes()


def test_a_finished_directory_is_left_alone(written: Path) -> None:
    before = (written / "corpus.jsonl").stat().st_mtime_ns
    assert generated.run(GeneratedConfig(out=str(written), num=NUM)) == written
    assert (written / "corpus.jsonl").stat().st_mtime_ns == before


def test_counts_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="ProblemCounts: few_tests must be >= 1, got 0"):
        ProblemCounts(few_tests=0)
    with pytest.raises(ValueError, match=r"ProblemCounts: hurried_share must be in \[0, 1\], got 1.5"):
        ProblemCounts(hurried_share=1.5)
