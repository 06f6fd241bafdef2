"""Preferences as ids: parted by prompt, long ones left out, every pair at its answers."""

import json
from pathlib import Path

import pytest

from dscoder.runtime.artifact import open_stage
from dscoder.text.tokenizer import Tokenizer
from dscoder.train.prompts import PromptEncoder
from dscoder.train.reward_data import Preferences, add_replay, is_held_out_prompt, read_preferences

TOKENIZER = Tokenizer.train(["def f(x):\n    return x\n"] * 3, vocab_size=300)
ENCODER = PromptEncoder(tokenizer=TOKENIZER, max_positions=64)


def preferences(directory: Path, *, num_problems: int = 40, answers: tuple[str, ...] = ("x", "y")) -> str:
    """What the stage `prefer` leaves: of each problem, each answer is better than those after it."""
    graded, pairs = [], []
    for number in range(num_problems):
        asked = {"task": "t", "problem": f"t/{number}", "form": "completion", "prompt": f"f({number})"}
        made = [
            {"completion": text, "program": text, "pass_rate": 1 - place / len(answers)}
            for place, text in enumerate(answers)
        ]
        graded += [{**asked, "suffix": "", **answer} for answer in made]
        pairs += [
            {**asked, "suffix": "", "chosen": made[i], "rejected": made[j]}
            for j in range(len(made))
            for i in range(j)
        ]
    with open_stage(directory, command="prefer", config={}, inputs={}) as stage:
        for name, lines in (("graded.jsonl", graded), ("pairs.jsonl", pairs)):
            (directory / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        stage.finish(counts={})
    return str(directory)


def read(*directories: str, max_length: int = 64, share: float = 0.3) -> Preferences:
    return read_preferences(directories, encoder=ENCODER, max_length=max_length, held_out_share=share)


def test_the_answers_to_a_prompt_are_on_one_side(tmp_path: Path) -> None:
    found = read(preferences(tmp_path / "a"))
    assert not found.train.prompts & found.held_out.prompts
    assert len(found.train.prompts) + len(found.held_out.prompts) == 40
    assert 4 <= len(found.held_out.prompts) <= 22
    for part in (found.train, found.held_out):
        assert len(part.answers) == 2 * len(part.prompts)
        assert len(part.pairs) == len(part.prompts)


def test_a_prompt_stays_on_its_side_in_other_sets(tmp_path: Path) -> None:
    one, more = read(preferences(tmp_path / "a")), read(preferences(tmp_path / "b", num_problems=60))
    assert one.held_out.prompts <= more.held_out.prompts
    assert one.train.prompts <= more.train.prompts


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_about_the_share_of_prompts_is_held_out(share: float) -> None:
    num_held = sum(is_held_out_prompt(f"prompt {i}", "", share=share) for i in range(2000))
    assert abs(num_held / 2000 - share) < 0.04


def test_a_pair_is_at_its_own_answers(tmp_path: Path) -> None:
    directories = [preferences(tmp_path / "a"), preferences(tmp_path / "b", answers=("p", "q", "r"))]
    found = read(*directories)
    assert len(found.train.pairs) == 4 * len(found.train.prompts)
    texts = set()
    for pair in found.train.pairs:
        chosen, rejected = found.train.answers[pair.chosen], found.train.answers[pair.rejected]
        assert found.train.gap(pair) == pytest.approx(chosen.pass_rate - rejected.pass_rate)
        assert found.train.gap(pair) > 0
        texts.add((TOKENIZER.decode(chosen.ids[-2:-1]), TOKENIZER.decode(rejected.ids[-2:-1])))
        prefix = [answer.ids[: len(answer.ids) - 2] for answer in (chosen, rejected)]
        assert prefix[0] == prefix[1]
    assert texts == {("x", "y"), ("p", "q"), ("p", "r"), ("q", "r")}


def test_what_is_too_long_is_left_out_and_counted(tmp_path: Path) -> None:
    long = "x" * 100
    found = read(preferences(tmp_path / "a", answers=("x", "y", long)), max_length=20)
    assert dict(found.dropped) == {"too_long_answers": 40, "too_long_pairs": 80}
    assert max(len(answer.ids) for answer in found.train.answers) <= 20


def test_replay_is_a_share_of_all_pairs(tmp_path: Path) -> None:
    new = read(preferences(tmp_path / "a")).train
    old = read(preferences(tmp_path / "b", answers=("p", "q", "r"))).train
    num_new = len(new.pairs)
    count = add_replay(new, old, share=0.25, is_pairwise=True, seed=0)
    assert count == round(num_new / 3)
    assert len(new.pairs) == num_new + count
    texts = {TOKENIZER.decode(new.answers[pair.chosen].ids[-2:-1]) for pair in new.pairs[num_new:]}
    assert texts <= {"p", "q"}
    assert all(new.gap(pair) > 0 for pair in new.pairs)


def test_replay_of_answers_takes_no_more_than_there_are(tmp_path: Path) -> None:
    new, old = (read(preferences(tmp_path / name)).train for name in ("a", "b"))
    num_new, num_pairs = len(new.answers), len(new.pairs)
    assert add_replay(new, old, share=0.9, is_pairwise=False, seed=0) == len(old.answers)
    assert len(new.answers) == num_new + len(old.answers)
    assert len(new.pairs) == num_pairs


def test_a_part_without_a_pair_is_an_error(tmp_path: Path) -> None:
    directory = preferences(tmp_path / "a", num_problems=3)
    with pytest.raises(ValueError, match="the held-out prompts must have a pair, got none on 0 of 3 prompts"):
        read(directory, share=1e-6)
    with pytest.raises(ValueError, match=r"the training prompts must have a pair, got none on 0 of 3"):
        read(directory, share=1 - 1e-6)


def test_a_directory_of_another_stage_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`dscoder prefer` has not finished there"):
        read(str(tmp_path))
