"""Preferences as token ids, parted into what is learnt and what is held out.

The parts are told by a hash of the prompt: all answers to a prompt are on one side, in every run and in every
set of preferences that it appears in.
"""

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dscoder.runtime.artifact import read_manifest
from dscoder.runtime.seed import derive_seed
from dscoder.tasks.problem import Prompt
from dscoder.train.pairs import NoPairsError
from dscoder.train.preferences import COMMAND, GRADED, PAIRS
from dscoder.train.prompts import PromptEncoder

_HASH_VALUES = 1 << 24


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredAnswer:
    """One graded answer: prompt, answer and end token as ids."""

    ids: tuple[int, ...]
    pass_rate: float
    num_characters: int  # of the answer


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredPair:
    """A better and a worse answer, as places among the answers."""

    chosen: int
    rejected: int


@dataclass(kw_only=True, slots=True)
class PreferenceSet:
    """Answers and the pairs among them."""

    answers: list[ScoredAnswer]
    pairs: list[ScoredPair]
    prompts: set[tuple[str, str]]

    @classmethod
    def empty(cls) -> "PreferenceSet":
        """A set without any."""
        return cls(answers=[], pairs=[], prompts=set())

    def gap(self, pair: ScoredPair) -> float:
        """By how much the pass rates of a pair differ."""
        return self.answers[pair.chosen].pass_rate - self.answers[pair.rejected].pass_rate


@dataclass(frozen=True, kw_only=True, slots=True)
class Preferences:
    """Both parts, and how many answers and pairs were left out for which reason."""

    train: PreferenceSet
    held_out: PreferenceSet
    dropped: Counter[str]


def is_held_out_prompt(prompt: str, suffix: str, *, share: float) -> bool:
    """Whether a prompt is in the held-out part: about `share` of all are."""
    return derive_seed("held out", prompt, suffix) % _HASH_VALUES < share * _HASH_VALUES


def _lines(path: Path) -> list[dict[str, Any]]:
    # Not str.splitlines, which also breaks at characters that JSON allows inside a string.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def read_preferences(
    directories: Sequence[str],
    *,
    encoder: PromptEncoder,
    max_length: int,
    held_out_share: float,
    needs_held_out: bool = True,
) -> Preferences:
    """The preferences of all directories.

    ValueError names a directory that `dscoder prefer` did not finish, NoPairsError a part that has no pair.
    """
    found = Preferences(train=PreferenceSet.empty(), held_out=PreferenceSet.empty(), dropped=Counter())
    for directory in map(Path, directories):
        read_manifest(directory, command=COMMAND)
        _add(found, directory, encoder=encoder, max_length=max_length, share=held_out_share)
    num_prompts = len(found.train.prompts) + len(found.held_out.prompts)
    for name, part in (("training", found.train), ("held-out", found.held_out)):
        if not part.pairs and (name == "training" or needs_held_out):
            raise NoPairsError(
                f"reward-model: the {name} prompts must have a pair, got none on {len(part.prompts)} of "
                f"{num_prompts} prompts with held_out_share {held_out_share}; left out: {dict(found.dropped)}"
            )
    return found


def add_replay(new: PreferenceSet, old: PreferenceSet, *, share: float, is_pairwise: bool, seed: int) -> int:
    """Append so many pairs of `old`, or answers, that `share` of all are old, or all that there are.

    Returns how many were appended; `seed` chooses them.
    """
    choose = random.Random(seed)
    size, size_old = (len(part.pairs if is_pairwise else part.answers) for part in (new, old))
    chosen = sorted(choose.sample(range(size_old), min(size_old, round(size * share / (1.0 - share)))))
    if not is_pairwise:
        new.answers += [old.answers[idx] for idx in chosen]
        return len(chosen)
    places: dict[int, int] = {}
    for pair in (old.pairs[idx] for idx in chosen):
        for place in (pair.chosen, pair.rejected):
            if place not in places:
                places[place] = len(new.answers)
                new.answers.append(old.answers[place])
        new.pairs.append(ScoredPair(chosen=places[pair.chosen], rejected=places[pair.rejected]))
    return len(chosen)


def _add(
    found: Preferences, directory: Path, *, encoder: PromptEncoder, max_length: int, share: float
) -> None:
    """The answers and pairs of one directory."""
    places: dict[tuple[str, str], int] = {}
    for line in _lines(directory / GRADED):
        asked = Prompt(text=line["prompt"], suffix=line["suffix"], form=line["form"], max_new_tokens=1)
        ids = encoder.sequence(asked, line["completion"])
        if len(ids) > max_length:
            found.dropped["too_long_answers"] += 1
            continue
        part = _part(found, line, share)
        part.prompts.add((line["prompt"], line["suffix"]))
        places[line["problem"], line["program"]] = len(part.answers)
        part.answers.append(
            ScoredAnswer(ids=ids, pass_rate=line["pass_rate"], num_characters=len(line["completion"]))
        )
    for line in _lines(directory / PAIRS):
        both = [places.get((line["problem"], line[side]["program"])) for side in ("chosen", "rejected")]
        if both[0] is None or both[1] is None:
            found.dropped["too_long_pairs"] += 1
            continue
        _part(found, line, share).pairs.append(ScoredPair(chosen=both[0], rejected=both[1]))


def _part(found: Preferences, line: dict[str, Any], share: float) -> PreferenceSet:
    is_held = is_held_out_prompt(line["prompt"], line["suffix"], share=share)
    return found.held_out if is_held else found.train
