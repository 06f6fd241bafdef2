"""Rollouts for the terminal: a step in a line, a group with its best answer and the others as diffs to it."""

from collections import Counter
from collections.abc import Sequence

from rich.text import Text

from dscoder.cli.rollout_answer import (
    complaints,
    difference,
    headline,
    indented,
    number,
    unlikely_tokens,
    visible,
    whole_text,
)
from dscoder.train.rollout import Rollout, by_group

_PROMPT_LINES = 12
# An answer of a group by its number in it, from 1.
Numbered = tuple[int, Rollout]


def counted(count: int, noun: str) -> str:
    """As in "1 group", "2 groups"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _mean(values: Sequence[float | None]) -> str:
    there = [value for value in values if value is not None]
    return number(sum(there) / len(there) if there else None)


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
    num_passed = sum(rollout.is_passed is True for rollout in rollouts)
    line = Text(f"step {step}", style="bold")
    line.append(
        f"  {counted(len(by_group(rollouts)), 'group')}  {counted(len(rollouts), 'answer')}  "
        f"{num_passed} passed  reward {_mean([r.reward for r in rollouts])}  ({means})",
        style="not bold",
    )
    if reasons:
        told = ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()))
        line.append(f"  left out: {told}", style="not bold yellow")
    return line


def _worth(rollout: Rollout) -> float:
    """The reward; under process supervision what the answer's first token counts, the sum over its steps."""
    worth = rollout.steps[0].advantage if rollout.steps else rollout.reward
    return float("-inf") if worth is None else worth


def _folded(answers: Sequence[Numbered]) -> list[tuple[list[int], Rollout]]:
    """Answers that are alike in all that is shown of them as one with their numbers, the best first."""
    found: dict[str, tuple[list[int], Rollout]] = {}
    for answer_number, rollout in answers:
        facts = (rollout.completion, headline(rollout, [0]).plain, rollout.steps, rollout.detail)
        found.setdefault(repr((*facts, rollout.failures)), ([], rollout))[0].append(answer_number)
    return sorted(found.values(), key=lambda item: (-_worth(item[1]), item[0][0]))


def _head(first: Rollout, num_answers: int, *, is_whole: bool) -> Text:
    """Which group it is, and the prompt: its last lines, or all."""
    group_number = first.group + 1
    shown = Text(f"group {group_number}  {first.task} {visible(first.problem)}", style="bold")
    shown.append(f"  {counted(num_answers, 'answer')}\n", style="not bold")
    lines = first.prompt.split("\n")
    kept = lines if is_whole else lines[-_PROMPT_LINES:]
    if len(lines) > len(kept):
        before = counted(len(lines) - len(kept), "line")
        shown.append(
            f"    ... {before} before, which --group {group_number} shows\n", style="not bold yellow"
        )
    return shown.append(indented("\n".join(kept)), style="not bold dim")


def render_group(
    answers: Sequence[Numbered], *, num_answers: int | None = None, is_whole: bool = False
) -> Text:
    """The end of the prompt, the best answer whole, and others as diffs to it, best and worst first.

    Args:
        answers: of one group, all or some.
        num_answers: how many are shown besides the best; None: all.
        is_whole: the whole prompt.
    """
    shown = _head(answers[0][1], len(answers), is_whole=is_whole)
    (numbers, best), *others = _folded(answers)
    shown.append_text(headline(best, numbers)).append_text(whole_text(best)).append_text(complaints(best))
    # From both ends: what failed most beside what nearly won.
    turns = [others[idx // 2] if idx % 2 else others[-1 - idx // 2] for idx in range(len(others))]
    for numbers, rollout in turns[:num_answers]:
        shown.append_text(headline(rollout, numbers))
        shown.append_text(difference(best, rollout)).append_text(complaints(rollout))
    left = sum(len(numbers) for numbers, _ in turns[len(turns[:num_answers]) :])
    if left:
        shown.append(f"{left} more {'answer' if left == 1 else 'answers'}\n", style="not bold dim")
    return shown


def render_answer(answer: Numbered, token_bytes: Sequence[bytes] | None) -> Text:
    """All of one answer: the prompt, the text, what its program wrote, and its least likely tokens.

    Args:
        token_bytes: of each id; None: ids are shown.
    """
    answer_number, rollout = answer
    shown = _head(rollout, 1, is_whole=True)
    shown.append_text(headline(rollout, [answer_number])).append_text(whole_text(rollout))
    shown.append_text(complaints(rollout, is_whole=True))
    return shown.append_text(unlikely_tokens(rollout, token_bytes))
