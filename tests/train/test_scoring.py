"""Scores of many sequences at once."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dscoder.checkpoint import save_pretrained
from dscoder.models import ScalarModel, Transformer
from dscoder.tasks.problem import Form, Problem, Prompt
from dscoder.testing.tiny_run import TINY_MOE
from dscoder.text.tokenizer import Tokenizer
from dscoder.train import scoring
from dscoder.train.prompts import PromptEncoder
from dscoder.train.reward import Answer, RewardBatch
from dscoder.train.scoring import AnswerScorer, packed, score_places, score_sequences

SEQUENCES = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [5, 6]]


@pytest.fixture(scope="module")
def model() -> ScalarModel:
    return ScalarModel(Transformer(replace(TINY_MOE, init_std=0.2))).eval()


def test_sequences_stand_one_behind_the_other() -> None:
    tokens_BS, cu_seqlens = packed(SEQUENCES[:2], torch.device("cpu"))
    assert tokens_BS.tolist() == [[5, 6, 7, 8]]
    assert cu_seqlens.tolist() == [0, 3, 4]


@pytest.mark.parametrize("max_tokens", [1, 4, 100])
def test_each_sequence_scores_as_if_alone(model: ScalarModel, max_tokens: int) -> None:
    with torch.no_grad():
        wanted = [float(model(torch.tensor([sequence]))) for sequence in SEQUENCES]
    got = score_sequences(model, SEQUENCES, max_tokens=max_tokens)
    assert got == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    assert len(set(got)) == len(got)


def test_training_goes_on_after_scoring(model: ScalarModel) -> None:
    model.train()
    score_sequences(model, SEQUENCES)
    assert model.training
    assert model.backbone.training
    model.eval()
    assert score_sequences(model, []) == []


def test_a_directory_scores_answers_and_says_which_are_too_long(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(["def f(x):\n    return x\n"] * 3, vocab_size=300)
    tokenizer.save(tmp_path / "tokenizer")
    config = replace(
        TINY_MOE,
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.require_id("bos"),
        eos_id=tokenizer.require_id("eos"),
    )
    saved = ScalarModel(Transformer(config)).eval()
    save_pretrained(saved, tmp_path / "model", tokenizer=tmp_path / "tokenizer")
    scorer = AnswerScorer.load(tmp_path / "model", device="cpu")
    asked = Prompt(text="def f(x):", max_new_tokens=8)
    first, too_long = scorer.scores([(asked, " return x"), (asked, " x" * config.max_positions)])
    ids = [*tokenizer.encode("def f(x):", add_bos=True), *tokenizer.encode(" return x"), config.eos_id]
    with torch.no_grad():
        assert first == pytest.approx(float(saved(torch.tensor([ids]))), rel=1e-4)
    assert too_long is None


def test_answers_of_a_group_are_rewarded_by_their_scores(model: ScalarModel) -> None:
    tokenizer = Tokenizer.train(["def f(x):\n    return x\n"] * 3, vocab_size=300)
    scorer = AnswerScorer(model=model, encoder=PromptEncoder(tokenizer=tokenizer, max_positions=64))
    problem = Problem(task="t", id="1", prompt="not this", max_new_tokens=8)
    answers = tuple(
        Answer(
            problem=problem,
            prompt="def f(x):",
            completion=text,
            tokens=(1,),
            finish_reason="eos",
            max_tokens=8,
        )
        for text in (" return x", " x")
    )
    asked = Prompt(text="def f(x):", max_new_tokens=8)
    wanted = scorer.scores([(asked, answer.completion) for answer in answers])
    assert scorer.reward(RewardBatch(answers=answers)) == wanted
    assert wanted[0] != wanted[1]


def test_equal_answers_have_equal_scores_whatever_they_are_packed_with(
    model: ScalarModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def noisy(
        _: ScalarModel, sequences: Sequence[Sequence[int]], places: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        return [[place + 1e-8 * idx for place in at] for idx, at in enumerate(places)]

    monkeypatch.setattr(scoring, "score_places", noisy)
    tokenizer = Tokenizer.train(["def f(x):\n    return x\n"] * 3, vocab_size=300)
    scorer = AnswerScorer(model=model, encoder=PromptEncoder(tokenizer=tokenizer, max_positions=64))
    asked = Prompt(text="def f(x):", max_new_tokens=8)
    scores = scorer.scores([(asked, " x"), (asked, " return x"), (asked, " x"), (asked, " x" * 64)] * 4)
    assert scores[3] is None
    assert len(set(scores)) == 3
    assert scores[:4] * 4 == scores


def test_each_place_scores_as_the_sequence_up_to_there(model: ScalarModel) -> None:
    places = [[0, 2], [0], [1, 3, 4], []]
    with torch.no_grad():
        wanted = [
            [float(model(torch.tensor([sequence[: place + 1]]))) for place in at]
            for sequence, at in zip(SEQUENCES, places, strict=True)
        ]
    for max_tokens in (4, 100):
        for got, expected in zip(
            score_places(model, SEQUENCES, places, max_tokens=max_tokens), wanted, strict=True
        ):
            assert got == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(("form", "template"), [("completion", None), ("chat", "v2"), ("chat", "coder")])
@pytest.mark.parametrize("start", ["", " "])
def test_steps_are_scored_where_they_end(
    model: ScalarModel, form: Form, template: str | None, start: str
) -> None:
    tokenizer = Tokenizer.train(["def f(x):\n    return x\n"] * 3, vocab_size=300)
    encoder = PromptEncoder(tokenizer=tokenizer, max_positions=800, template=template)
    wide = replace(TINY_MOE, init_std=0.2, vocab_size=tokenizer.vocab_size, max_positions=800)
    scorer = AnswerScorer(model=ScalarModel(Transformer(wide)).eval(), encoder=encoder)
    problem = Problem(task="t", id="1", prompt="not this", form=form, max_new_tokens=8)
    steps = (start + "x = 1\n", "return x\n", "y")
    answer = Answer(
        problem=problem,
        prompt="f",
        completion="".join(steps),
        tokens=(1,),
        finish_reason="eos",
        max_tokens=8,
        steps=steps,
    )
    (found,) = scorer.step_rewards(RewardBatch(answers=(answer,)))
    assert found is not None
    assert found[-1] == scorer.reward(RewardBatch(answers=(answer,)))[0]
    asked = Prompt(text="f", form=form, max_new_tokens=8)
    ids = encoder.sequence(asked, answer.completion)
    # Each of the others is read at the first token with which the line is whole.
    for number, score in enumerate(found[:-1], start=1):
        end = next(n for n in range(len(ids)) if tokenizer.decode(ids[:n]).endswith("".join(steps[:number])))
        with torch.no_grad():
            wanted = float(scorer.model(torch.tensor([ids[:end]])))
        assert score == pytest.approx(wanted, rel=1e-3, abs=1e-5)


def test_answers_too_long_have_no_step_rewards(model: ScalarModel) -> None:
    tokenizer = Tokenizer.train(["def f(x):\n    return x\n"] * 3, vocab_size=300)
    scorer = AnswerScorer(model=model, encoder=PromptEncoder(tokenizer=tokenizer, max_positions=8))
    problem = Problem(task="t", id="1", prompt="f", max_new_tokens=8)
    one = Answer(
        problem=problem,
        prompt="f",
        completion="x" * 9,
        tokens=(1,),
        finish_reason="eos",
        max_tokens=8,
        steps=("x" * 9,),
    )
    assert scorer.step_rewards(RewardBatch(answers=(one,))) == [None]
