"""The stage `prefer`: what it leaves, what it goes on from, what it never believes."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dscoder.checkpoint import save_pretrained
from dscoder.config.reward import PreferConfig
from dscoder.config.task import TaskConfig
from dscoder.models import Transformer
from dscoder.runtime.artifact import read_manifest
from dscoder.sandbox.run import run as run_program
from dscoder.sandbox.verdict import Limits, Program, Verdict
from dscoder.tasks.gsm8k_pal import Gsm8kPal
from dscoder.tasks.problem import Grade, Problem, Task, graded, not_judged
from dscoder.testing.tiny_run import TINY_MOE
from dscoder.text.tokenizer import Tokenizer
from dscoder.train import preferences
from dscoder.train.candidates import read_candidates
from dscoder.train.rollout import Rollout, write_rollouts


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Letters(Task):
    """An answer is worth the share of its characters that are letters; "?" cannot be judged."""

    name = "letters"
    limits = Limits()

    def __init__(self, num_problems: int) -> None:
        self.num_graded = 0
        self.dies_after: int | None = None
        self._problems = [
            Problem(task=self.name, id=f"letters/{i}", prompt=f"def f{i}(", max_new_tokens=6)
            for i in range(num_problems)
        ]

    def problems(self) -> Sequence[Problem]:
        return self._problems

    def program(self, problem: Problem, completion: str) -> None:
        return None

    def grade(self, problem: Problem, completion: str, verdict: Verdict | None) -> Grade:
        self.num_graded += 1
        if self.dies_after is not None and self.num_graded > self.dies_after:
            raise KeyboardInterrupt
        if completion == "?":
            return not_judged("nobody knows")
        share = sum(c.isalpha() for c in completion) / max(1, len(completion))
        return Grade(is_passed=share == 1, score=share)


class Doubled(Task):
    """`f(x)` doubles `x`; programs run in the sandbox."""

    name = "doubled"
    limits = Limits(time=5.0)

    def problems(self) -> Sequence[Problem]:
        return [Problem(task=self.name, id="doubled/0", prompt="f = lambda x:", max_new_tokens=6)]

    def program(self, problem: Problem, completion: str) -> Program:
        return Program(source=f"{problem.prompt}{completion}\nassert f(3) == 6\n")


def recorded(directory: Path, *answers: tuple[str, str], **fields: object) -> str:
    path = directory / "answers.jsonl"
    path.write_text("".join(json.dumps({"problem": p, "completion": c, **fields}) + "\n" for p, c in answers))
    return str(path)


LETTERS = [("letters/0", c) for c in ("abc", "ab1", "a12", "?", "a12 ", "123")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer.train(["def f(x):\n    return x\n"] * 3, vocab_size=300)
    tokenizer.save(directory / "tokenizer")
    config = replace(
        TINY_MOE,
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.require_id("bos"),
        eos_id=tokenizer.require_id("eos"),
    )
    save_pretrained(Transformer(config), directory / "model", tokenizer=directory / "tokenizer")
    return str(directory / "model")


def from_files(tmp_path: Path, *answers: tuple[str, str], **fields: object) -> PreferConfig:
    source = recorded(tmp_path, *(answers or LETTERS))
    return PreferConfig(out=str(tmp_path / "out"), candidates=(source,), **fields)  # type: ignore[arg-type]


def test_recorded_candidates_become_pairs_with_their_origin(tmp_path: Path) -> None:
    out = preferences.run(from_files(tmp_path), task=Letters(2))
    pairs = lines(out / "pairs.jsonl")
    assert len(pairs) == 6
    assert all(pair["chosen"]["pass_rate"] > pair["rejected"]["pass_rate"] for pair in pairs)
    assert {pair["prompt"] for pair in pairs} == {"def f0("}
    twice = next(pair["rejected"] for pair in pairs if pair["rejected"]["completion"] == "a12")
    assert twice["candidates"] == [["answers.jsonl", 2], ["answers.jsonl", 4]]


@pytest.mark.parametrize("num_threads", [1, 3])
def test_torch_has_as_many_threads_as_asked(num_threads: int, tmp_path: Path) -> None:
    class Watching(Letters):
        def grade(self, problem: Problem, completion: str, verdict: Verdict | None) -> Grade:
            seen.add(torch.get_num_threads())
            return super().grade(problem, completion, verdict)

    seen: set[int] = set()
    before = torch.get_num_threads()
    preferences.run(from_files(tmp_path, num_threads=num_threads), task=Watching(1))
    assert seen == {num_threads}
    assert torch.get_num_threads() == before


def test_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    sources = []
    for name, completion in (("a", "abc"), ("b", "123")):
        (tmp_path / name).mkdir()
        sources.append(recorded(tmp_path / name, ("letters/0", completion)))
    config = PreferConfig(out=str(tmp_path / "out"), candidates=tuple(sources))
    (pair,) = lines(preferences.run(config, task=Letters(1)) / "pairs.jsonl")
    assert pair["chosen"]["candidates"] == [[sources[0], 0]]
    assert pair["rejected"]["candidates"] == [[sources[1], 0]]


@pytest.mark.parametrize("problem", [["letters/0"], None])
def test_a_problem_that_is_no_text_is_named(problem: object, tmp_path: Path) -> None:
    config = from_files(tmp_path, ("letters/0", "abc"), (problem, "123"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"the problem of record 1 in answers\.jsonl must be a text, got"):
        preferences.run(config, task=Letters(1))


def test_the_manifest_counts_what_was_dropped(tmp_path: Path) -> None:
    config = from_files(tmp_path, *LETTERS, ("strange/1", "abc"))
    manifest = read_manifest(preferences.run(config, task=Letters(2)), command="prefer")
    assert manifest["dropped"] == {
        **{"not_judged": 1, "same_program": 1, "suspect": 0},
        **{"unknown_problem": 1, "problems_without_candidates": 1},
    }
    assert manifest["counts"] == {
        **{"problems": 2, "candidates": 6, "passed": 1},
        **{"answers": 4, "pairs": 6, "problems_with_pairs": 1},
    }
    assert manifest["facts"]["outcomes"] == {"no_program": 4, "not_judged": 1, "passed": 1}


def test_what_was_not_judged_is_stored_and_in_no_pair(tmp_path: Path) -> None:
    out = preferences.run(from_files(tmp_path), task=Letters(2))
    stored = read_candidates(out / "candidates" / "00000.jsonl")
    assert [c.completion for c in stored] == [c for _, c in LETTERS]
    assert [c.score for c in stored if c.completion == "?"] == [None]
    text = (out / "pairs.jsonl").read_text() + (out / "graded.jsonl").read_text()
    assert '"?"' not in text


def test_what_a_run_stored_is_read_as_candidates(tmp_path: Path) -> None:
    first = preferences.run(from_files(tmp_path), task=Letters(2))
    config = PreferConfig(out=str(tmp_path / "again"), candidates=(str(first / "candidates"),))
    again = preferences.run(config, task=Letters(2))
    names = [
        [(p["chosen"]["program"], p["rejected"]["program"]) for p in lines(out / "pairs.jsonl")]
        for out in (first, again)
    ]
    assert names[0] == names[1]


def test_recorded_verdicts_are_not_believed(tmp_path: Path) -> None:
    source = recorded(tmp_path, *LETTERS, score=1.0, verdict={"outcome": "passed"})
    out = preferences.run(PreferConfig(out=str(tmp_path / "out"), candidates=(source,)), task=Letters(1))
    rates = {line["completion"]: line["pass_rate"] for line in lines(out / "graded.jsonl")}
    assert rates == {"abc": 1.0, "ab1": 2 / 3, "a12": pytest.approx((1 / 3 + 1 / 4) / 2), "123": 0.0}


class Examples(Letters):
    """The prompt may be asked without its examples."""

    def problems(self) -> Sequence[Problem]:
        return [replace(problem, shorter_prompts=("short",)) for problem in super().problems()]


@pytest.mark.parametrize(("asked", "wanted"), [("short", "short"), ("another", "def f0("), (None, "def f0(")])
def test_the_prompt_is_the_one_that_was_asked(asked: str | None, wanted: str, tmp_path: Path) -> None:
    source = recorded(tmp_path, *LETTERS, prompt=asked)
    out = preferences.run(PreferConfig(out=str(tmp_path / "out"), candidates=(source,)), task=Examples(1))
    assert {line["prompt"] for line in lines(out / "graded.jsonl")} == {wanted}


def test_rollouts_are_candidates(tmp_path: Path) -> None:
    rollouts = [
        Rollout(
            step=1,
            group=0,
            task="letters",
            problem=problem,
            prompt="def f0(",
            prompt_ids=(1,),
            completion=text,
            completion_ids=(2,),
            logprobs=(-1.0,),
            finish_reason="eos",
            verdict=None,
            detail="",
            rewards={"tests": 1.0},
            failures={},
            reward=1.0,
            advantage=0.0,
            is_used=True,
            reason="",
        )
        for problem, text in LETTERS
    ]
    write_rollouts(tmp_path, 1, rollouts)
    config = PreferConfig(out=str(tmp_path / "out"), candidates=(str(tmp_path / "rollouts"),))
    out = preferences.run(config, task=Letters(1))
    assert len(lines(out / "pairs.jsonl")) == 6


def sampled(tmp_path: Path, model: str, name: str = "out") -> PreferConfig:
    return PreferConfig(
        out=str(tmp_path / name), model=model, num_candidates=4, temperature=1.5, top_p=1.0, num_workers=1
    )


def test_a_model_is_sampled(tmp_path: Path, model: str) -> None:
    out = preferences.run(sampled(tmp_path, model), task=Letters(3))
    stored = read_candidates(out / "candidates" / "00000.jsonl")
    assert [(c.problem, c.idx) for c in stored] == [(f"letters/{i}", j) for i in range(3) for j in range(4)]
    assert len({c.completion for c in stored}) > 6
    assert {c.source for c in stored} == {"model"}
    assert {c.finish_reason for c in stored} <= {"eos", "stop", "length"}


class LongPrompt(Letters):
    """The first problem's message is longer than the model's context."""

    def problems(self) -> Sequence[Problem]:
        first, *others = [replace(problem, form="chat") for problem in super().problems()]
        return [replace(first, prompt="def f(" * 100), *others]


def test_a_prompt_without_room_for_an_answer_is_left_out(tmp_path: Path, model: str) -> None:
    config = replace(sampled(tmp_path, model), template="v2")
    out = preferences.run(config, task=LongPrompt(3))
    manifest = read_manifest(out, command="prefer")
    assert manifest["dropped"]["problems_without_candidates"] == 1
    assert manifest["counts"]["candidates"] == 8


def test_messages_need_a_template(tmp_path: Path, model: str) -> None:
    with pytest.raises(ValueError, match="template must be one of coder, v2 for a task that asks in chat"):
        preferences.run(sampled(tmp_path, model), task=LongPrompt(3))


def test_a_killed_run_goes_on_to_the_same_bytes(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preferences, "_PROBLEMS_PER_FILE", 2)
    whole = preferences.run(sampled(tmp_path, model, "whole"), task=Letters(7))
    dying = Letters(7)
    dying.dies_after = 18
    config = sampled(tmp_path, model, "killed")
    with pytest.raises(KeyboardInterrupt):
        preferences.run(config, task=dying)
    files = sorted(path.name for path in (tmp_path / "killed" / "candidates").iterdir())
    assert files == ["00000.jsonl", "00001.jsonl"]
    going_on = Letters(7)
    again = preferences.run(config, task=going_on)
    assert going_on.num_graded == 12
    for name in ("pairs.jsonl", "graded.jsonl"):
        assert (again / name).read_bytes() == (whole / name).read_bytes()
    results = [read_manifest(out, command="prefer")["result"] for out in (whole, again)]
    assert results[0] == results[1]


def test_a_finished_run_is_left_alone(tmp_path: Path) -> None:
    config = from_files(tmp_path)
    preferences.run(config, task=Letters(2))
    again = Letters(2)
    preferences.run(config, task=again)
    assert again.num_graded == 0


def test_programs_run_in_the_sandbox(tmp_path: Path) -> None:
    if not run_program(Program(source="pass")).is_answer:
        pytest.skip("no sandbox here")
    answers = [("doubled/0", c) for c in (" 2 * x", " x", " )(", " x+x  # twice", " x + x")]
    out = preferences.run(from_files(tmp_path, *answers, num_workers=2), task=Doubled())
    stored = read_candidates(out / "candidates" / "00000.jsonl")
    assert [c.outcome == "passed" for c in stored] == [True, False, False, True, True]
    assert stored[0].verdict is not None
    assert stored[0].verdict["isolation"] == "full"
    pairs = {(p["chosen"]["completion"], p["rejected"]["completion"]) for p in lines(out / "pairs.jsonl")}
    assert pairs == {(right, wrong) for right in (" 2 * x", " x+x  # twice") for wrong in (" x", " )(")}


def solution(value: str) -> str:
    return f"```python\ndef solution():\n    return {value}\n```"


def test_mathematics_goes_by_the_answer(tmp_path: Path) -> None:
    if not run_program(Program(source="pass")).is_answer:
        pytest.skip("no sandbox here")
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": "6 * 7?", "answer": "#### 42"}))
    task = Gsm8kPal(tmp_path / "test.jsonl")
    answers = [("gsm8k/0", solution(value)) for value in ("42", "41")] + [("gsm8k/0", "It is 42.")]
    out = preferences.run(from_files(tmp_path, *answers), task=task)
    graded_lines = lines(out / "graded.jsonl")
    assert [(a["pass_rate"], a["outcome"]) for a in graded_lines] == [
        (1.0, "passed"),
        (0.0, "failed"),
        (0.0, "no_program"),
    ]


class Unjudged(Letters):
    """Nobody knows anything."""

    def grade(self, problem: Problem, completion: str, verdict: Verdict | None) -> Grade:
        return not_judged("no toolchain")


class Equal(Letters):
    """All are wrong."""

    def grade(self, problem: Problem, completion: str, verdict: Verdict | None) -> Grade:
        return graded(False)


@pytest.mark.parametrize(
    ("task", "error", "message"),
    [
        (lambda: Unjudged(1), RuntimeError, "no candidate of 1 problems could be judged; the first: no tool"),
        (lambda: Equal(1), ValueError, "a better and a worse answer, got none among 6 candidates of 1 prob"),
        (lambda: Letters(0), ValueError, "task letters must have problems, got none"),
    ],
)
def test_a_run_that_can_give_no_pair_says_why(
    task: Callable[[], Task], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        preferences.run(from_files(tmp_path), task=task())
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_completion_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps({"problem": "letters/0", "completion": 3}))
    config = PreferConfig(out=str(tmp_path / "out"), candidates=(str(path),))
    with pytest.raises(ValueError, match=r"record 0 in answers\.jsonl must be a text, got 3"):
        preferences.run(config, task=Letters(1))


def test_candidates_that_are_not_there_are_named(tmp_path: Path) -> None:
    config = PreferConfig(out=str(tmp_path / "out"), candidates=(str(tmp_path / "none"),))
    with pytest.raises(ValueError, match=r"must be JSONL files or directories of them, got '.*none'"):
        preferences.run(config, task=Letters(1))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "exactly one of model and candidates must be given, got neither"),
        ({"model": "m", "candidates": ("c",)}, "must be given, got both"),
        ({"model": "m", "num_candidates": 1}, "num_candidates must be >= 2, got 1"),
        ({"model": "m", "temperature": 0.0}, "temperature must be positive, .*, got 0.0"),
        ({"model": "m", "max_problems": 0}, "max_problems must be >= 1, got 0"),
        ({"model": "m", "num_threads": 0}, "num_threads must be >= 1, got 0"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PreferConfig(out="o", task=TaskConfig(name="mbpp"), **fields)
