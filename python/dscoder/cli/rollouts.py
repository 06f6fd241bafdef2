"""The verb `dscoder rollouts`."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args

import yaml
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveInt
from rich.console import Console

from dscoder.cli.rollout_view import Numbered, counted, render_answer, render_group, render_step
from dscoder.sandbox.verdict import Outcome
from dscoder.text.tokenizer import Tokenizer
from dscoder.train.rollout import Reason, Rollout, by_group, read_rollouts, written_steps
from dscoder.train.run import CONFIG, MODEL

_GRADES = {True: "passed", False: "failed", None: "not_judged"}
# What --only takes: the grade, how the program ended, whether the answer is trained on, and why not.
_WORDS = tuple(
    dict.fromkeys(
        [
            *_GRADES.values(),
            "suspect",
            "used",
            "left_out",
            *get_args(Outcome),
            *filter(None, get_args(Reason)),
        ]
    )
)
_Groups = list[list[Numbered]]


def main(argv: Sequence[str]) -> None:
    """Show the answers that a run of `dscoder grpo` learnt from, with verdicts, rewards and diffs."""
    options = _parse(argv)
    directory = Path(options.directory)
    console = Console(highlight=False, soft_wrap=True)
    found = _found(directory, options)
    if options.steps:
        for step, groups in found:
            console.print(render_step(step, [rollout for group in groups for _, rollout in group]))
        return
    step, groups = next(found)
    if options.group is not None:
        groups = [_group(groups, step, options.group)]
    if options.answer is not None:
        console.print(render_answer(_answer(groups, options.answer), _token_bytes(directory)), end="")
        return
    console.print(render_step(step, [rollout for group in groups for _, rollout in group]))
    is_whole = options.group is not None
    num_answers = (None if is_whole else 2) if options.answers is None else options.answers
    for group in groups[: options.groups]:
        console.print()
        console.print(render_group(group, num_answers=num_answers, is_whole=is_whole), end="")
    if len(groups) > options.groups:
        console.print(f"\n{counted(len(groups) - options.groups, 'more group')}; --groups shows more")


def _parse(argv: Sequence[str]) -> Namespace:
    parser = ArgumentParser(prog="dscoder rollouts", description=main.__doc__)
    parser.add_argument("directory", type=str, help="the run directory")
    parser.add_argument(
        "--step", type=PositiveInt, help="the step; by default the last with what is asked for"
    )
    parser.add_argument("--steps", action="store_true", help="a line for every step, and no answers")
    parser.add_argument("--problem", type=str, help="the answers to this problem alone")
    parser.add_argument("--only", choices=_WORDS, help="answers with this grade, outcome or reason alone")
    parser.add_argument("--group", type=PositiveInt, help="all of the group with this number")
    parser.add_argument("--answer", type=PositiveInt, help="all of the answer with this number in its group")
    parser.add_argument("--groups", type=NonNegativeInt, default=3, help="groups shown, at most")
    parser.add_argument("--answers", type=NonNegativeInt, help="answers of a group shown beside the best: 2")
    options = parser.parse_args(list(argv))
    if options.steps and not options.step is options.group is options.answer is None:
        raise ValueError("--steps must go with --problem and --only alone, got another beside it")
    return options


def _found(directory: Path, options: Namespace) -> Iterator[tuple[int, _Groups]]:
    """The steps with answers that are asked for, and those: ascending for --steps, else the last first."""
    written = written_steps(directory)
    if not written:
        raise ValueError(f"{directory} must be a run of `dscoder grpo`, got one without rollouts")
    steps = written if options.step is None else [options.step]
    is_any = False
    for step in steps if options.steps else reversed(steps):
        groups = [list(enumerate(group, start=1)) for group in by_group(read_rollouts(directory, step))]
        wanted = [[item for item in group if _is_wanted(item[1], options)] for group in groups]
        if any(wanted):
            is_any = True
            yield step, [group for group in wanted if group]
    if not is_any:
        asked = [f"--{name} {options[name]}" for name in ("problem", "only") if options[name] is not None]
        where = f"step {steps[0]}" if len(steps) == 1 else f"{len(steps)} steps"
        raise ValueError(f"some answer must match {' '.join(asked)}, got none in {where}")


def _is_wanted(rollout: Rollout, options: Namespace) -> bool:
    is_problem = options.problem is None or rollout.problem == options.problem
    return is_problem and (options.only is None or options.only in _words(rollout))


def _words(rollout: Rollout) -> set[str]:
    """What --only may say for an answer."""
    words = {_GRADES[rollout.is_passed], rollout.reason, "used" if rollout.is_used else "left_out"}
    outcome = None if rollout.verdict is None else str(rollout.verdict["outcome"])
    # Of a program that ended well the grade says whether the answer passed.
    words |= {outcome} if outcome not in (None, "passed", "failed") else set()
    return words | {"suspect"} if rollout.is_suspect else words


def _group(groups: _Groups, step: int, wanted: int) -> list[Numbered]:
    by_number = {group[0][1].group + 1: group for group in groups}
    if wanted not in by_number:
        there = ", ".join(map(str, by_number))
        raise ValueError(f"--group must be one of {there} in step {step}, got {wanted}")
    return by_number[wanted]


def _answer(groups: _Groups, wanted: int) -> Numbered:
    if len(groups) != 1:
        raise ValueError(f"--answer must go with --group, got {len(groups)} groups to choose from")
    by_number = dict(groups[0])
    if wanted not in by_number:
        there = ", ".join(map(str, by_number))
        raise ValueError(f"--answer must be one of {there}, got {wanted}")
    return wanted, by_number[wanted]


def _token_bytes(directory: Path) -> Sequence[bytes] | None:
    """Of the run's tokenizer: beside its model, or beside the one that it began with; None: found nowhere."""
    config = directory / CONFIG
    began = Path(yaml.safe_load(config.read_text())["model"]) if config.is_file() else directory
    there = [path for path in (directory / MODEL, began) if (path / "tokenizer.json").is_file()]
    return Tokenizer.load(there[0]).token_bytes() if there else None
