"""One answer of a rollout for the terminal: its grade, its text, what its program did and said."""

import difflib
import math
import signal
from collections.abc import Sequence
from typing import Any

from rich.text import Text

from dscoder.train.rollout import Rollout, RolloutStep

_STREAM_LINES = 6  # of each stream of a program, the last ones, where not all is wanted
_LEAST_ALIKE = 1 / 3  # share of lines that two answers have in common for a difference to be readable
_NUM_UNLIKELY = 8
_GRADES = {True: "passed", False: "failed", None: "not judged"}
_STYLES = {"passed": "not bold green", "failed": "not bold red", "not judged": "not bold yellow"}
_DIFF_STYLES = {"+": "green", "-": "red", "@": "cyan"}


def visible(text: str) -> str:
    """`text` with control characters spelled out: what a model wrote must not steer the terminal."""
    return "".join(
        letter if letter.isprintable() or letter in "\n\t" else f"\\x{ord(letter):02x}" for letter in text
    )


def number(value: float | None) -> str:
    """Three digits; a dash where there is none."""
    return "-" if value is None else f"{value + 0.0:.3g}"  # -0 becomes 0


def indented(text: str) -> str:
    """Each line four columns in."""
    return "".join(f"    {line}\n" for line in visible(text).split("\n"))


def headline(rollout: Rollout, numbers: Sequence[int]) -> Text:
    """A line: grade, rewards and length of the answers of a group with these numbers, which are the same."""
    rewards = ", ".join(f"{name} {number(value)}" for name, value in rollout.rewards.items())
    grade = _GRADES[rollout.is_passed]
    program = "not run" if rollout.verdict is None else str(rollout.verdict["outcome"])
    same = f"s {', '.join(map(str, numbers))} (x{len(numbers)})" if len(numbers) > 1 else f" {numbers[0]}"
    line = Text(f"answer{same}  ", style="bold")
    # What the program did is no grade: one that ends well may have printed what is wrong.
    line.append(f"{grade}  " if grade == program else f"{grade} (program: {program})  ", style=_STYLES[grade])
    if rollout.is_suspect:
        line.append("suspect  ", style="not bold yellow")
    # Under process supervision the steps say what counts.
    advantage = "" if rollout.steps else f"advantage {number(rollout.advantage)}  "
    line.append(
        f"reward {number(rollout.reward)} ({rewards})  {advantage}"
        f"{len(rollout.completion_ids)} tokens, {rollout.finish_reason}",
        style="not bold",
    )
    if rollout.reason:
        line.append(f"  left out: {rollout.reason}", style="not bold yellow")
    return line.append("\n")


def _ended(verdict: dict[str, Any]) -> str:
    """How a program ended and what it took."""
    number_of = verdict["signal"]
    known = {item.value: item.name for item in signal.Signals}
    by_signal = "" if number_of is None else f"signal {number_of} ({known.get(number_of, 'unknown')})"
    by_itself = "" if verdict["exit_code"] is None else f"exit {verdict['exit_code']}"
    taken = f"{verdict['wall']:.2f} s, cpu {verdict['cpu']:.2f} s, {verdict['peak_memory'] / 2**20:.0f} MiB"
    how = [by_itself or by_signal or "no exit", taken]
    return ", ".join([*how, *(["isolation rlimits"] if verdict["isolation"] != "full" else [])])


def _stream(name: str, text: str, *, is_whole: bool) -> list[str]:
    """What a program wrote, under its name; the last lines, with a mark, unless all is wanted."""
    lines = text.rstrip().split("\n") if text.strip() else []
    kept = lines if is_whole else lines[-_STREAM_LINES:]
    num_before = len(lines) - len(kept)
    cut = [f"... {num_before} lines before"] if num_before else []
    return [f"{name}:", *(f"  {line}" for line in [*cut, *kept])] if lines else []


def complaints(rollout: Rollout, *, is_whole: bool = False) -> Text:
    """Why the answer has its grade: what the grade, failed reward functions and the program say.

    Args:
        is_whole: all that was stored of what the program wrote, of answers that passed too.
    """
    lines = [f"{name}: {reason}" for name, reason in rollout.failures.items()]
    lines += [rollout.detail] if rollout.detail else []
    verdict = rollout.verdict
    if verdict is not None and (is_whole or rollout.is_suspect or not rollout.is_passed):
        lines.append(_ended(dict(verdict)))
        streams = ["stdout", "stderr"]
        # Warnings of a compiler explain nothing where the program ran.
        streams += ["compiler"] if is_whole or verdict["outcome"] == "compile_error" else []
        for name in streams:
            lines += _stream(name, str(verdict[name] or ""), is_whole=is_whole)
    return Text(
        "".join(f"  {visible(line)}\n" for line in lines), style="dim" if rollout.is_passed else "red"
    )


def whole_text(rollout: Rollout) -> Text:
    """A completion; cut into steps, each under what it is rewarded with and what its tokens count."""
    if not rollout.steps:
        return Text(indented(rollout.completion), style="not bold")
    shown, begin = Text(), 0
    for step_number, step in enumerate(rollout.steps, start=1):
        shown.append_text(_step_headline(step, step_number))
        text = rollout.completion[begin : step.text_end].removesuffix("\n")
        shown.append(indented(text) if text else "", style="not bold")
        begin = step.text_end
    return shown


def _step_headline(step: RolloutStep, step_number: int) -> Text:
    rewards = ", ".join(f"{name} {number(value)}" for name, value in step.rewards.items())
    told = f"reward {number(step.reward)} ({rewards})  advantage {number(step.advantage)}"
    return Text(f"    step {step_number}  {told}\n", style="cyan")


def difference(best: Rollout, other: Rollout) -> Text:
    """`other` as what changes in `best`; as it is where hardly a line is the same. Its steps come after."""
    one, two = (visible(rollout.completion).split("\n") for rollout in (best, other))
    if one == two:
        shown = Text("    the same text\n", style="dim")
    elif _share_alike(one, two) < _LEAST_ALIKE:
        return whole_text(other)
    else:
        shown = Text()
        lines = difflib.unified_diff(one, two, "best", "this", lineterm="", n=2)
        for line in list(lines)[2:]:  # without the names
            shown.append(f"    {line}\n", style=_DIFF_STYLES.get(line[:1], ""))
    steps = [_step_headline(step, step_number) for step_number, step in enumerate(other.steps, start=1)]
    return shown.append_text(Text().join(steps))


def _share_alike(one: Sequence[str], two: Sequence[str]) -> float:
    left, right = ([line for line in lines if line.strip()] for lines in (one, two))
    return difflib.SequenceMatcher(None, left, right, autojunk=False).ratio()


def unlikely_tokens(rollout: Rollout, token_bytes: Sequence[bytes] | None) -> Text:
    """The tokens that the policy gave the least probability, each with the line it stands in.

    Args:
        token_bytes: of each id; None: ids are shown.
    """
    ids = rollout.completion_ids
    worst = sorted(range(len(ids)), key=lambda place: rollout.logprobs[place])[:_NUM_UNLIKELY]
    shown = Text("  least likely tokens\n", style="not bold")
    for place in worst:
        shown.append(f"    {math.exp(rollout.logprobs[place]):8.2%}  ", style="yellow")
        shown.append(f"{_placed(ids, place, token_bytes)}\n", style="not bold")
    return shown


def _placed(ids: Sequence[int], place: int, token_bytes: Sequence[bytes] | None) -> str:
    if token_bytes is None:
        return f"id {ids[place]}, token {place + 1}"
    before = b"".join(token_bytes[token] for token in ids[:place])
    piece, rest = token_bytes[ids[place]], b"".join(token_bytes[token] for token in ids[place + 1 :])
    begin = before.rfind(b"\n") + 1
    line = before[begin:] + piece.split(b"\n")[0] + (b"" if b"\n" in piece else rest.split(b"\n")[0])
    told = repr(piece.decode(errors="replace")) if piece else f"id {ids[place]}"
    return f"{told}  line {before.count(10) + 1}: {visible(line.decode(errors='replace'))}"
