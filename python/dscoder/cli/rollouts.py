"""The verb `dscoder rollouts`."""

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from dscoder.cli.rollout_view import render_group, render_step
from dscoder.train.rollout import Rollout, by_group, read_rollouts, written_steps


def main(argv: Sequence[str]) -> None:
    """Show the answers that a run of `dscoder grpo` learnt from, with verdicts, rewards and diffs."""
    options = _parse(argv)
    directory = Path(options.directory)
    steps = written_steps(directory)
    if not steps:
        raise ValueError(f"{directory} must be a run of `dscoder grpo`, got one without rollouts")
    console = Console(highlight=False, soft_wrap=True)
    if options.steps:
        for step in steps:
            console.print(render_step(step, read_rollouts(directory, step)))
        return
    step = steps[-1] if options.step is None else options.step
    rollouts = read_rollouts(directory, step)
    console.print(render_step(step, rollouts))
    groups = [group for group in by_group(rollouts) if _is_wanted(group, options)]
    for group in groups[: options.groups]:
        console.print()
        console.print(render_group(group, num_answers=options.answers), end="")
    if len(groups) > options.groups:
        console.print(f"\n{len(groups) - options.groups} more groups; --groups shows more")


def _parse(argv: Sequence[str]) -> Namespace:
    parser = ArgumentParser(prog="dscoder rollouts", description=main.__doc__)
    parser.add_argument("directory", type=str, help="the run directory")
    parser.add_argument("--step", type=int, help="the step to show; the last by default")
    parser.add_argument("--steps", action="store_true", help="one line for every step, and no answers")
    parser.add_argument("--problem", type=str, help="show the groups of this problem alone")
    parser.add_argument("--left_out", action="store_true", help="show groups with an answer left out alone")
    parser.add_argument("--groups", type=int, default=3, help="groups shown, at most")
    parser.add_argument("--answers", type=int, default=2, help="answers of a group shown beside the best")
    return parser.parse_args(list(argv))


def _is_wanted(group: Sequence[Rollout], options: Namespace) -> bool:
    is_problem = options.problem is None or group[0].problem == options.problem
    return is_problem and (not options.left_out or any(rollout.reason for rollout in group))
