"""Small programming problems made by rule: what to do in words, a program that does it, and tests from it.

A pipeline takes its argument through two to four steps and returns something of the result. There are three
families: a list of whole numbers, a text, and two numbers. A step is worded in several ways and may have a
constant. What a pipeline means is what its program does: the expected values of tests are computed by it.

The split of a pipeline follows from a hash of the kinds of its steps, in their order, without constants and
wording. So a split holds compositions that no other split has, however many problems are drawn for each.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from dscoder.runtime.seed import derive_seed
from dscoder.tasks.pipeline_steps import FAMILIES, Family, Step

NAME = "solve"
# Shares of all compositions. "taught": with answers, for pre-training and fine-tuning; "practised": with a
# few tests; the other two are for choosing sizes and for the figures in the end.
SPLITS: Mapping[str, float] = MappingProxyType(
    {"taught": 0.4, "practised": 0.4, "validation": 0.1, "test": 0.1}
)
_INDENT = "    "
_FEWEST_VALUES = 3  # that the tests of a problem expect


@dataclass(frozen=True, kw_only=True, slots=True)
class Pipeline:
    """A problem without its tests.

    Attributes:
        composition: family and kinds of steps, the key of its split.
        task: what is wanted, in words.
        source: a program that does it.
    """

    family: Family
    composition: str
    task: str
    source: str

    @property
    def head(self) -> str:
        """The first line of the function."""
        return self.source.split("\n", 1)[0]

    @property
    def body(self) -> str:
        """The lines after the first."""
        return self.source.split("\n", 1)[1]


def split_of(composition: str) -> str:
    """The split that a composition belongs to, by its hash alone."""
    place = derive_seed("split", composition) / 2**63
    for name, share in SPLITS.items():
        if place < share:
            return name
        place -= share
    return "test"


def _filled(step: Step, rng: random.Random) -> tuple[str, str]:
    """Words and code of a step with a constant."""
    constant = str(rng.choice(step.constants)) if step.constants else ""
    return rng.choice(step.wordings).replace("{k}", constant), step.code.replace("{k}", constant)


def _draw(rng: random.Random) -> Pipeline:
    family = rng.choice(FAMILIES)
    steps = [*rng.sample(family.steps, rng.randint(2, 4)), rng.choice(family.ends)]
    filled = [_filled(step, rng) for step in steps]
    lines = [f"def {NAME}({family.parameters}):"]
    lines += [_INDENT + code for code in ([family.start] if family.start else [])]
    lines += [_INDENT + code for _, code in filled]
    opening = "add a and b, " if family.start else ""
    words = opening + ", ".join(words for words, _ in filled)
    return Pipeline(
        family=family,
        composition="/".join([family.name, *(step.kind for step in steps)]),
        task=words[0].upper() + words[1:] + ".",
        source="\n".join(lines) + "\n",
    )


def draw_pipelines(split: str, count: int, *, seed: int) -> list[Pipeline]:
    """`count` pipelines of a split, no two asked for in the same words."""
    if split not in SPLITS:
        raise ValueError(f"draw_pipelines: split must be one of {', '.join(SPLITS)}, got {split!r}")
    rng = random.Random(derive_seed("pipelines", split, seed))
    found: dict[str, Pipeline] = {}
    while len(found) < count:
        pipeline = _draw(rng)
        if split_of(pipeline.composition) == split:
            found.setdefault(pipeline.task, pipeline)
    return list(found.values())


def without_step(pipeline: Pipeline, rng: random.Random) -> str:
    """The program without one of its steps; what it starts with and what it returns stay.

    What is left is a composition too, and must be of the same split. Where no step can go, none does.
    """
    family, *kinds = pipeline.composition.split("/")
    lines = pipeline.source.splitlines(keepends=True)
    first = len(lines) - len(kinds)
    places = [
        place
        for place in range(len(kinds) - 1)
        if split_of("/".join([family, *kinds[:place], *kinds[place + 1 :]])) == split_of(pipeline.composition)
    ]
    if not places:
        return pipeline.source
    left_out = first + rng.choice(places)
    return "".join(line for place, line in enumerate(lines) if place != left_out)


def make_tests(pipeline: Pipeline, count: int, *, seed: int) -> list[str] | None:
    """`count` assertions with arguments that follow from the problem and the seed.

    None if they expect fewer than three values (or `count`): a guess would pass such tests too often.
    """
    rng = random.Random(derive_seed("tests", pipeline.task, seed))
    space: dict[str, Any] = {}
    exec(pipeline.source, space)  # made from the tables of steps
    expected: dict[str, str] = {}  # by the arguments
    while len(expected) < count:
        arguments = pipeline.family.arguments(rng)
        expected[", ".join(map(repr, arguments))] = repr(space[NAME](*arguments))
    if len(set(expected.values())) < min(count, _FEWEST_VALUES):
        return None
    return [f"assert {NAME}({shown}) == {value}" for shown, value in expected.items()]


def draw_problems(split: str, count: int, *, num_tests: int, seed: int) -> list[tuple[Pipeline, list[str]]]:
    """`count` pipelines of a split with their tests."""
    found: list[tuple[Pipeline, list[str]]] = []
    num_drawn = count
    while len(found) < count:
        num_drawn *= 2
        drawn = (
            (p, make_tests(p, num_tests, seed=seed)) for p in draw_pipelines(split, num_drawn, seed=seed)
        )
        found = [(pipeline, tests) for pipeline, tests in drawn if tests is not None]
    return found[:count]
