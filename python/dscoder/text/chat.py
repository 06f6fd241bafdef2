"""The chat templates of DeepSeek-Coder (v1) instruct and of Coder-V2, with the mask that says what to learn.

The strings are those of the published tokenizer_config.json files, which differ in details from the
fine-tuning script and the READMEs ("DeepSeek" or "Deepseek", a full stop). Messages are mappings with `role`
and `content`: at most one system message, first, then user and assistant in turn.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from dscoder.text.flavors import EOT
from dscoder.text.tokenizer import Tokenizer

Message = Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatTemplate:
    """The strings round the messages. An answer is answer_start + content + answer_end + the end token."""

    default_system: str = ""  # stands where a conversation has no system message
    system_end: str
    user_start: str
    user_end: str
    prompt: str  # after it the model answers: no trailing space, which V2 answers badly to
    answer_start: str = ""
    answer_end: str = ""
    end: Literal["eos", "eot"]
    after_end: str = ""

    @property
    def jinja(self) -> str:
        """The same template for tokenizer_config.json."""
        content = "message['content']"
        end = "eos_token" if self.end == "eos" else _literal(EOT)
        answer = _sum(self.prompt + self.answer_start, content, self.answer_end)
        default = "{{ " + _literal(self.default_system) + " }}" if self.default_system else ""
        turns = (
            ("if message['role'] == 'system'", _sum("", content, self.system_end)),
            ("elif message['role'] == 'user'", _sum(self.user_start, content, self.user_end)),
            ("elif message['role'] == 'assistant'", answer + " + " + _sum("", end, self.after_end)),
        )
        return "".join(
            (
                "{{ bos_token }}",
                "{% if messages[0]['role'] != 'system' %}" + default + "{% endif %}" if default else "",
                "{% for message in messages %}",
                *("{% " + test + " %}{{ " + text + " }}" for test, text in turns),
                "{% endif %}{% endfor %}",
                "{% if add_generation_prompt %}{{ " + _literal(self.prompt) + " }}{% endif %}",
            )
        )


CHAT_TEMPLATES: Mapping[str, ChatTemplate] = {
    "coder": ChatTemplate(
        default_system=(
            "You are an AI programming assistant, utilizing the Deepseek Coder model, developed by Deepseek "
            "Company, and you only answer questions related to computer science. For politically sensitive "
            "questions, security and privacy issues, and other non-computer science questions, you will "
            "refuse to answer\n"
        ),
        system_end="",
        user_start="### Instruction:\n",
        user_end="\n",
        prompt="### Response:\n",
        answer_end="\n",
        end="eot",
        after_end="\n",
    ),
    "v2": ChatTemplate(
        system_end="\n\n",
        user_start="User: ",
        user_end="\n\n",
        prompt="Assistant:",
        answer_start=" ",  # learned with the answer: the space is part of the first word's token
        end="eos",
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedChat:
    """A conversation to learn from: the mask is 1 on every answer and its end token, 0 elsewhere."""

    ids: list[int]
    loss_mask: list[int]


def encode_chat(messages: Sequence[Message], *, tokenizer: Tokenizer, template: str) -> EncodedChat:
    """A conversation to learn from, the last message an answer.

    Special strings inside the messages are plain text.
    """
    return encode_chats([messages], tokenizer=tokenizer, template=template)[0]


def encode_chats(
    conversations: Sequence[Sequence[Message]], *, tokenizer: Tokenizer, template: str
) -> list[EncodedChat]:
    """`encode_chat` of each, encoded in parallel."""
    parts = []
    for messages in conversations:
        rules = _checked("encode_chat", messages, template, last="assistant")
        parts.append(_parts(messages, rules, ending=""))
    return _encoded(parts, tokenizer)


def chat_prompt(messages: Sequence[Message], *, tokenizer: Tokenizer, template: str) -> list[int]:
    """The ids after which the model answers, the last message a user's.

    Special strings inside the messages are plain text.
    """
    rules = _checked("chat_prompt", messages, template, last="user")
    [encoded] = _encoded([_parts(messages, rules, ending=rules.prompt)], tokenizer)
    return encoded.ids


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """A stretch of a conversation that is encoded in one go, and the special token after it, if any."""

    text: str
    is_learnt: bool
    end: Literal["eos", "eot"] | None = None


def _parts(messages: Sequence[Message], rules: ChatTemplate, *, ending: str) -> list[_Part]:
    # Everything up to an answer is one part: a token may cross the messages.
    parts = []
    told = "" if messages[0]["role"] == "system" else rules.default_system
    for message in messages:
        content = message["content"]
        if message["role"] == "system":
            told += content + rules.system_end
        elif message["role"] == "user":
            told += rules.user_start + content + rules.user_end
        else:
            answer = rules.answer_start + content + rules.answer_end
            parts += [
                _Part(text=told + rules.prompt, is_learnt=False),
                _Part(text=answer, is_learnt=True, end=rules.end),
            ]
            told = rules.after_end
    return [*parts, _Part(text=told + ending, is_learnt=False)]


def _encoded(conversations: Sequence[Sequence[_Part]], tokenizer: Tokenizer) -> list[EncodedChat]:
    encoded = iter(tokenizer.encode_batch([part.text for parts in conversations for part in parts]))
    chats = []
    for parts in conversations:
        ids, loss_mask = [tokenizer.require_id("bos")], [0]
        for part in parts:
            ids += next(encoded)
            if part.end is not None:
                ids.append(tokenizer.require_id(part.end))
            loss_mask += [int(part.is_learnt)] * (len(ids) - len(loss_mask))
        chats.append(EncodedChat(ids=ids, loss_mask=loss_mask))
    return chats


def _checked(op: str, messages: Sequence[Message], template: str, *, last: str) -> ChatTemplate:
    """The template called so, once the messages are known to be in order."""
    if template not in CHAT_TEMPLATES:
        raise ValueError(f"{op}: template must be one of {', '.join(CHAT_TEMPLATES)}, got {template!r}")
    roles = [message.get("role") for message in messages]
    for idx, message in enumerate(messages):
        if not isinstance(message.get("content"), str):
            raise ValueError(
                f"{op}: messages[{idx}] must have a text as content, got {message.get('content')!r}"
            )
    num_system = int(roles[:1] == ["system"])
    for idx, role in enumerate(roles[num_system:], start=num_system):
        wanted = ("user", "assistant")[(idx - num_system) % 2]
        if role != wanted:
            raise ValueError(f"{op}: messages[{idx}] must be from {wanted!r}, got {role!r}")
    if roles[-1:] != [last]:
        raise ValueError(
            f"{op}: the last message must be from {last!r}, got {roles[-1] if roles else None!r}"
        )
    return CHAT_TEMPLATES[template]


def _literal(text: str) -> str:
    """A Jinja string literal; JSON's escapes are Jinja's too."""
    return "'" + json.dumps(text)[1:-1].replace("'", "\\'") + "'"


def _sum(before: str, expression: str, after: str) -> str:
    """A Jinja expression between two texts, either of which may be empty."""
    return " + ".join(
        [*([_literal(before)] if before else []), expression, *([_literal(after)] if after else [])]
    )
