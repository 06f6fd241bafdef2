"""The files of generated problems: what they hold, and what no two of them share."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dscoder.config.generated import GeneratedConfig, ProblemCounts
from dscoder.data import generated
from dscoder.runtime.artifact import read_manifest
from dscoder.tasks.pipeline_steps import FAMILIES

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


def composition(source: str) -> str:
    """The family of a program and the kinds of its steps, by its lines."""
    lines = [line.strip() for line in source.split("\n")]
    family = next(f for f in FAMILIES if any(f"({f.parameters}):" in line for line in lines))
    steps = (*family.steps, *family.ends)
    kinds = {s.code.replace("{k}", str(k)): s.kind for s in steps for k in (s.constants or ("",))}
    return "/".join([family.name, *(kinds[line] for line in lines if line in kinds)])


def test_no_composition_that_is_measured_was_ever_shown(tmp_path: Path) -> None:
    num = replace(NUM, documents=4000, dialogues=4000, practised=1000, validation=300, test=300)
    written = generated.run(GeneratedConfig(out=str(tmp_path / "out"), num=num))
    shown = {composition(record["text"]) for record in records(written, "corpus.jsonl")}
    shown |= {composition(record["completion"]) for record in records(written, "dialogues.jsonl")}
    practised = {
        composition(record["code"] + record["solution"]) for record in records(written, "practised.jsonl")
    }
    assert len(shown) > 2000
    assert not shown & practised
    for name in ("validation.jsonl", "test.jsonl"):
        found = records(written, name)
        measured = {composition(record["code"] + record["solution"]) for record in found}
        assert all(
            record["id"].endswith(composition(record["code"] + record["solution"])) for record in found
        )
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
    gone = [a - b for a, b in zip(whole, hurried, strict=True)]
    assert set(gone) == {0, 1}  # where all that could be left of a program is held out, nothing goes
    assert sum(gone) > 50
    assert 0.2 * sum(gone) < sum(whole) - sum(some) < 0.6 * sum(gone)


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
