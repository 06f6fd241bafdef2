"""What a task asks, as token ids: to sample answers with an engine, and to score them with a model.

A text is encoded in one place for both, so a reward model reads an answer where a policy writes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dscoder.config.generate import GREEDY, GenerateConfig, SamplingConfig
from dscoder.infer.infill import infill_request
from dscoder.infer.request import Request
from dscoder.tasks.problem import Problem, Prompt, Task
from dscoder.text.chat import CHAT_TEMPLATES, chat_prompt, encode_chat
from dscoder.text.fim import FimOrder, fim_prompt
from dscoder.text.tokenizer import Tokenizer


class PromptTooLongError(ValueError):
    """A prompt leaves no room for its answer, and may not be cut."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacedAnswer:
    """A prompt, an answer and the end token as ids.

    Attributes:
        num_before: tokens before the answer.
        shift: characters that those after it say before the answer's own first one.
    """

    ids: tuple[int, ...]
    num_before: int
    shift: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptEncoder:
    """Prompts and answers to ids.

    Attributes:
        template: of chat prompts, a key of CHAT_TEMPLATES; None: chat prompts are refused.
        fim_order: of infilling prompts, as the model learnt it: psm or spm.
    """

    tokenizer: Tokenizer
    max_positions: int
    template: str | None = None
    fim_order: str = "psm"

    def prompt_of(self, task: Task, problem: Problem, *, max_new_tokens: int | None = None) -> Prompt:
        """What `task` asks for `problem`, with as many examples as leave room for the answer."""
        room = self.max_positions - (max_new_tokens or problem.max_new_tokens)
        prompt = task.request(problem, fits=lambda text: len(self.tokenizer.encode(text)) < room)
        return prompt if max_new_tokens is None else replace(prompt, max_new_tokens=max_new_tokens)

    def request(self, prompt: Prompt, *, sampling: SamplingConfig = GREEDY) -> Request:
        """What to ask an engine.

        A completion prompt that leaves no room for an answer loses its beginning; PromptTooLongError for a
        chat prompt that does.
        """
        if prompt.form == "infill":
            config = GenerateConfig(
                max_new_tokens=prompt.max_new_tokens,
                stop=prompt.stop,
                fim_order=self.fim_order,
                sampling=sampling,
            )
            return infill_request(
                self.tokenizer, prompt.text, prompt.suffix, max_positions=self.max_positions, config=config
            )
        ids = self._prompt_ids(prompt)
        room = self.max_positions - prompt.max_new_tokens
        if len(ids) > room:
            ids = self._cut(prompt, ids, room)
        return Request(
            prompt=tuple(ids),
            max_new_tokens=prompt.max_new_tokens,
            sampling=sampling,
            stop=prompt.stop,
            stop_ids=(self._end_id(prompt),),
        )

    def sequence(self, prompt: Prompt, completion: str) -> tuple[int, ...]:
        """A prompt, an answer to it and the end token: what a scalar head reads, at its last token.

        Nothing is cut: it may be longer than `max_positions`.
        """
        return self.placed(prompt, completion).ids

    def placed(self, prompt: Prompt, completion: str) -> PlacedAnswer:
        """`sequence`, and where the answer is in it."""
        if prompt.form == "chat":
            name = self._checked_template()
            rules = CHAT_TEMPLATES[name]
            answer = completion.removeprefix(rules.answer_start).removesuffix(rules.answer_end)
            messages = ({"role": "user", "content": prompt.text}, {"role": "assistant", "content": answer})
            encoded = encode_chat(messages, tokenizer=self.tokenizer, template=name)
            # A template may have a line break after the end token.
            num_after = encoded.loss_mask[::-1].index(1)
            ids = tuple(encoded.ids[: len(encoded.ids) - num_after])
            shift = 0 if completion.startswith(rules.answer_start) else len(rules.answer_start)
            return PlacedAnswer(ids=ids, num_before=encoded.loss_mask.index(1), shift=shift)
        before = self._prompt_ids(prompt)
        ids = (*before, *self.tokenizer.encode(completion), self._end_id(prompt))
        return PlacedAnswer(ids=ids, num_before=len(before))

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        if prompt.form == "chat":
            message = {"role": "user", "content": prompt.text}
            return chat_prompt([message], tokenizer=self.tokenizer, template=self._checked_template())
        if prompt.form == "infill":
            order = FimOrder[self.fim_order.upper()]
            return fim_prompt(prompt.text, prompt.suffix, tokenizer=self.tokenizer, order=order)
        return self.tokenizer.encode(prompt.text, add_bos=self.tokenizer.bos_id is not None)

    def _cut(self, prompt: Prompt, ids: Sequence[int], room: int) -> list[int]:
        start = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        num_kept = room - len(start)
        if prompt.form == "chat" or num_kept < 1:
            raise PromptTooLongError(
                f"prompts: a prompt of {len(ids)} tokens and an answer of {prompt.max_new_tokens} must fit "
                f"into {self.max_positions} positions, the model's"
            )
        return [*start, *ids[len(ids) - num_kept :]]

    def _end_id(self, prompt: Prompt) -> int:
        if prompt.form == "chat":
            return self.tokenizer.require_id(CHAT_TEMPLATES[self._checked_template()].end)
        return self.tokenizer.require_id("eos")

    def _checked_template(self) -> str:
        if self.template is None or self.template not in CHAT_TEMPLATES:
            raise ValueError(
                f"prompts: template must be one of {', '.join(CHAT_TEMPLATES)} for a task that asks in chat "
                f"messages, got {self.template!r}"
            )
        return self.template
