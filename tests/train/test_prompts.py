"""Prompts and answers as ids: what an engine is asked, what a scalar head reads."""

from collections.abc import Sequence

import pytest

from dscoder.config.generate import SamplingConfig
from dscoder.sandbox.verdict import Limits
from dscoder.tasks.problem import Problem, Prompt, Task
from dscoder.text.chat import chat_prompt
from dscoder.text.tokenizer import Tokenizer
from dscoder.train.prompts import PromptEncoder

TOKENIZER = Tokenizer.train(["def f(x):\n    return x + 1\n"] * 3, vocab_size=300)
END = TOKENIZER.require_id("eos")


def encoder(**fields: object) -> PromptEncoder:
    return PromptEncoder(**({"tokenizer": TOKENIZER, "max_positions": 64, "template": "v2"} | fields))  # type: ignore[arg-type]


def prompt(text: str = "def f(x):", **fields: object) -> Prompt:
    return Prompt(**({"text": text, "max_new_tokens": 8} | fields))  # type: ignore[arg-type]


@pytest.mark.parametrize("template", ["v2", "coder"])
@pytest.mark.parametrize("form", ["completion", "chat", "infill"])
def test_a_sequence_is_the_request_the_answer_and_the_end(form: str, template: str) -> None:
    made = encoder(template=template, max_positions=400)
    asked = prompt(form=form, suffix="\n" if form == "infill" else "")
    request, sequence = made.request(asked), made.sequence(asked, " return x")
    assert sequence[: len(request.prompt)] == request.prompt
    end = TOKENIZER.require_id("eot") if (form, template) == ("chat", "coder") else END
    assert sequence[-1] == end
    answer = TOKENIZER.decode(sequence[len(request.prompt) : -1])
    assert answer == (" return x\n" if (form, template) == ("chat", "coder") else " return x")
    if form != "infill":
        assert request.stop_ids == (end,)


def test_a_chat_answer_keeps_one_space_before_it() -> None:
    asked = prompt(form="chat")
    assert encoder().sequence(asked, " return") == encoder().sequence(asked, "return")


def test_what_was_asked_for_goes_into_the_request() -> None:
    sampling = SamplingConfig(temperature=0.5, seed=3)
    request = encoder().request(prompt(stop=("\n",)), sampling=sampling)
    assert (request.sampling, request.stop, request.max_new_tokens) == (sampling, ("\n",), 8)


def test_a_long_completion_prompt_loses_its_beginning() -> None:
    ids = TOKENIZER.encode("def f(x):" * 40)
    request = encoder().request(prompt("def f(x):" * 40))
    assert len(request.prompt) == 64 - 8
    assert request.prompt[0] == TOKENIZER.bos_id
    assert list(request.prompt[1:]) == ids[-55:]


def test_a_long_chat_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="an answer of 8 must fit into 64 positions"):
        encoder().request(prompt("def f(x):" * 40, form="chat"))


def test_a_chat_prompt_needs_a_template() -> None:
    with pytest.raises(ValueError, match="template must be one of coder, v2 for a task that asks in chat"):
        encoder(template=None).request(prompt(form="chat"))


class Examples(Task):
    """One problem with two worked examples, which may be left out."""

    name = "examples"
    limits = Limits()

    def problems(self) -> Sequence[Problem]:
        return [
            Problem(
                task=self.name,
                id="1",
                prompt="def f(x):" * 30,
                shorter_prompts=("def f(x):",),
                max_new_tokens=8,
            )
        ]

    def program(self, problem: Problem, completion: str) -> None:
        return None


def test_examples_are_dropped_until_the_answer_has_room() -> None:
    task = Examples()
    problem = task.problems()[0]
    assert encoder().prompt_of(task, problem).text == "def f(x):"
    assert encoder(max_positions=500).prompt_of(task, problem).text == problem.prompt
    assert encoder().prompt_of(task, problem, max_new_tokens=3).max_new_tokens == 3


def test_a_chat_request_is_the_template_prompt() -> None:
    wanted = chat_prompt([{"role": "user", "content": "def f(x):"}], tokenizer=TOKENIZER, template="v2")
    assert list(encoder().request(prompt(form="chat")).prompt) == wanted
