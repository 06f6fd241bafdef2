"""Problems by rule: what a seed gives, and that no split knows the compositions of another."""

import random

import pytest

from dscoder.tasks.pipeline_steps import FAMILIES
from dscoder.tasks.pipelines import (
    NAME,
    SPLITS,
    draw_pipelines,
    draw_problems,
    make_tests,
    split_of,
    without_step,
)


def test_a_seed_gives_the_same_problems_and_another_seed_others() -> None:
    first = draw_pipelines("test", 40, seed=3)
    assert first == draw_pipelines("test", 40, seed=3)
    assert first[:20] == draw_pipelines("test", 20, seed=3)
    assert first != draw_pipelines("test", 40, seed=4)


def test_no_two_splits_share_a_composition_or_a_task() -> None:
    drawn = {split: draw_pipelines(split, 400, seed=0) for split in SPLITS}
    compositions = {split: {p.composition for p in found} for split, found in drawn.items()}
    tasks = {split: {p.task for p in found} for split, found in drawn.items()}
    for one in SPLITS:
        for other in set(SPLITS) - {one}:
            assert not compositions[one] & compositions[other]
            assert not tasks[one] & tasks[other]


def test_splits_take_their_shares_of_all_compositions() -> None:
    keys = [f"list/{i}" for i in range(20000)]
    found = {split: sum(split_of(key) == split for key in keys) / len(keys) for split in SPLITS}
    assert found == pytest.approx(dict(SPLITS), abs=0.02)


def test_the_words_of_a_problem_name_its_steps_in_order() -> None:
    for pipeline in draw_pipelines("taught", 50, seed=0):
        lines = pipeline.body.strip().split("\n")
        words = pipeline.task.split(", ")
        opening = 1 if pipeline.family.start else 0
        assert len(words) == len(lines) == len(pipeline.composition.split("/")) - 1 + opening
        for word, line in zip(words[opening:], lines[opening:], strict=True):
            digits = {piece for piece in word.replace(".", "").split() if piece.lstrip("-").isdigit()}
            assert all(digit in line for digit in digits), (word, line)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_step_runs_on_the_arguments_of_its_family(family) -> None:
    rng = random.Random(0)
    for step in (*family.steps, *family.ends):
        ending = "" if step in family.ends else f"\n    return {step.code.split()[0]}"
        code = step.code.replace("{k}", str(rng.choice(step.constants)) if step.constants else "")
        source = f"def f({family.parameters}):\n    {family.start or 'pass'}\n    {code}{ending}\n"
        space: dict = {}
        exec(source, space)
        for _ in range(20):
            space["f"](*family.arguments(rng))


def test_kinds_and_wordings_of_a_family_tell_its_steps_apart() -> None:
    for family in FAMILIES:
        kinds = [step.kind for step in family.steps]
        assert len(set(kinds)) == len(kinds)
        words = [wording for step in (*family.steps, *family.ends) for wording in step.wordings]
        assert len(set(words)) == len(words)
        assert all(("{k}" in word) == bool(step.constants) for step in family.steps for word in step.wordings)


def test_tests_are_assertions_that_hold_and_no_two_are_the_same() -> None:
    [(pipeline, tests)] = draw_problems("practised", 1, num_tests=12, seed=0)
    assert len(set(tests)) == 12
    assert all(line.startswith(f"assert {NAME}(") for line in tests)
    exec(pipeline.source + "\n".join(tests), {})
    assert make_tests(pipeline, 12, seed=0) == tests
    assert make_tests(pipeline, 12, seed=1) != tests


def test_no_problem_is_passed_by_a_guess() -> None:
    for pipeline, tests in draw_problems("test", 60, num_tests=3, seed=0):
        expected = {line.split(" == ", 1)[1] for line in tests}
        assert len(expected) == 3, pipeline.task
    answers_yes_or_no = next(
        p for p in draw_pipelines("test", 200, seed=0) if p.composition.endswith(("is_even", "is_above"))
    )
    assert make_tests(answers_yes_or_no, 12, seed=0) is None


def test_more_problems_begin_with_the_same_ones() -> None:
    few = draw_problems("validation", 5, num_tests=3, seed=0)
    assert draw_problems("validation", 30, num_tests=3, seed=0)[:5] == few


def test_a_hurried_program_lacks_one_step_and_still_returns() -> None:
    rng = random.Random(0)
    for pipeline in draw_pipelines("taught", 60, seed=0):
        whole, hurried = pipeline.source.splitlines(), without_step(pipeline, rng).splitlines()
        assert len(hurried) in (len(whole) - 1, len(whole))
        assert (hurried[0], hurried[-1]) == (whole[0], whole[-1])
        assert not pipeline.family.start or hurried[1] == whole[1]
        assert set(hurried) <= set(whole)


def test_a_split_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match=r"split must be one of taught, practised, .*, got 'train'"):
        draw_pipelines("train", 1, seed=0)
