"""Rollouts for the terminal: a step in a line, a group with its best answer and the others as diffs to it."""

import difflib
from collections import Counter
from collections.abc import Sequence

from rich.text import Text

from dscoder.train.rollout import Rollout, RolloutStep, by_group

_PROMPT_LINES = 12
_COMPLAINT_LINES = 6
_GRADES = {True: "passed", False: "failed", None: "not judged"}
_STYLES = {"passed": "not bold green", "failed": "not bold red", "not judged": "not bold yellow"}
_DIFF_STYLES = {"+": "green", "-": "red", "@": "cyan"}


def visible(text: str) -> str:
    """`text` with control characters spelled out: what a model wrote must not steer the terminal."""
    return "".join(
        letter if letter.isprintable() or letter in "\n\t" else f"\\x{ord(letter):02x}" for letter in text
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _mean(values: Sequence[float | None]) -> str:
    there = [value for value in values if value is not None]
    return _number(sum(there) / len(there) if there else None)


def render_step(step: int, rollouts: Sequence[Rollout]) -> Text:
    """One line: how many groups and answers, mean rewards, and what was left out and why."""
    reasons = Counter(rollout.reason for rollout in rollouts if rollout.reason)
    # Of the answers and, under process supervision, of their steps.
    rewarded = [r.rewards for r in rollouts], [step.rewards for r in rollouts for step in r.steps]
    means = "  ".join(
        f"{name} {_mean([found.get(name) for found in rewards])}"
        for rewards in rewarded
        for name in sorted({name for found in rewards for name in found})
    )
    line = Text(f"step {step}", style="bold")
    line.append(
        f"  {len(by_group(rollouts))} groups  {len(rollouts)} answers  "
        f"reward {_mean([r.reward for r in rollouts])}  ({means})",
        style="not bold",
    )
    if reasons:
        told = ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()))
        line.append(f"  left out: {told}", style="not bold yellow")
    return line


def _headline(rollout: Rollout, number: int) -> Text:
    rewards = ", ".join(f"{name} {_number(value)}" for name, value in rollout.rewards.items())
    grade = _GRADES[rollout.is_passed]
    program = "not run" if rollout.verdict is None else str(rollout.verdict["outcome"])
    line = Text(f"answer {number}  ", style="bold")
    # What the program did is no grade: one that ends well may have printed what is wrong.
    line.append(f"{grade}  " if grade == program else f"{grade} (program: {program})  ", style=_STYLES[grade])
    # Under process supervision the steps say what counts.
    advantage = "" if rollout.steps else f"advantage {_number(rollout.advantage)}  "
    line.append(
        f"reward {_number(rollout.reward)} ({rewards})  {advantage}"
        f"{len(rollout.completion_ids)} tokens, {rollout.finish_reason}",
        style="not bold",
    )
    if rollout.reason:
        line.append(f"  left out: {rollout.reason}", style="not bold yellow")
    return line


def _complaints(rollout: Rollout) -> Text:
    """What the sandbox and failed reward functions said, the last lines."""
    lines = [f"{name}: {reason}" for name, reason in rollout.failures.items()]
    if rollout.detail:
        lines.append(rollout.detail)
    if rollout.verdict is not None and rollout.verdict["outcome"] != "passed":
        said = rollout.verdict["compiler"] or rollout.verdict["stderr"]
        lines += str(said).rstrip().split("\n")[-_COMPLAINT_LINES:] if said else []
    return Text("".join(f"  {visible(line)}\n" for line in lines), style="red")


def _indented(text: str) -> str:
    return "".join(f"    {line}\n" for line in visible(text).split("\n"))


def _whole(rollout: Rollout) -> Text:
    """A completion; cut into steps, each under what it is rewarded with and what its tokens count."""
    if not rollout.steps:
        return Text(_indented(rollout.completion), style="not bold")
    shown, begin = Text(), 0
    for number, step in enumerate(rollout.steps, start=1):
        shown.append_text(_step_headline(step, number))
        text = rollout.completion[begin : step.text_end].removesuffix("\n")
        shown.append(_indented(text) if text else "", style="not bold")
        begin = step.text_end
    return shown


def _step_headline(step: RolloutStep, number: int) -> Text:
    rewards = ", ".join(f"{name} {_number(value)}" for name, value in step.rewards.items())
    told = (
        f"    step {number}  reward {_number(step.reward)} ({rewards})  advantage {_number(step.advantage)}\n"
    )
    return Text(told, style="cyan")


def _step_lines(rollout: Rollout) -> Text:
    """What the steps of an answer that is shown as a diff are worth."""
    lines = [_step_headline(step, number) for number, step in enumerate(rollout.steps, start=1)]
    return Text().join(lines)


def _diff(best: str, other: str) -> Text:
    """`other` as what changes in `best`."""
    lines = difflib.unified_diff(
        visible(best).split("\n"), visible(other).split("\n"), "best", "this", lineterm="", n=2
    )
    shown = Text()
    for line in list(lines)[2:]:  # without the names
        shown.append(f"    {line}\n", style=_DIFF_STYLES.get(line[:1], ""))
    return shown if shown else Text("    the same text\n", style="dim")


def _worth(rollout: Rollout) -> float:
    """The reward; under process supervision what the answer's first token counts, the sum over its steps."""
    worth = rollout.steps[0].advantage if rollout.steps else rollout.reward
    return float("-inf") if worth is None else worth


def render_group(group: Sequence[Rollout], *, num_answers: int) -> Text:
    """The end of the prompt, the best answer whole, and others as diffs to it, best and worst first.

    Args:
        num_answers: how many are shown besides the best.
    """
    first = group[0]
    shown = Text(f"{first.task} {visible(first.problem)}", style="bold")
    shown.append(f"  {len(group)} answers\n", style="not bold")
    prompt = first.prompt.split("\n")[-_PROMPT_LINES:]
    shown.append(_indented("\n".join(prompt)), style="not bold dim")
    numbered = sorted(enumerate(group, start=1), key=lambda item: (-_worth(item[1]), item[0]))
    (number, best), *others = numbered
    shown.append_text(_headline(best, number)).append("\n")
    shown.append_text(_whole(best))
    shown.append_text(_complaints(best))
    # From both ends: what failed most beside what nearly won.
    turns = [others[idx // 2] if idx % 2 else others[-1 - idx // 2] for idx in range(len(others))]
    for number, rollout in turns[:num_answers]:
        shown.append_text(_headline(rollout, number)).append("\n")
        shown.append_text(_diff(best.completion, rollout.completion))
        shown.append_text(_step_lines(rollout))
        shown.append_text(_complaints(rollout))
    left = len(others) - min(num_answers, len(others))
    if left:
        shown.append(f"{left} more answers\n", style="not bold dim")
    return shown
