import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dscoder.text.chat import CHAT_TEMPLATES, Message, chat_prompt, encode_chat
from dscoder.text.flavors import BOS, EOS, EOT, FIM_HOLE
from dscoder.text.tokenizer import Tokenizer

V1_SYSTEM = (
    "You are an AI programming assistant, utilizing the Deepseek Coder model, developed by Deepseek Company, "
    "and you only answer questions related to computer science. For politically sensitive questions, "
    "security and privacy issues, and other non-computer science questions, you will refuse to answer\n"
)


def turns(*contents: str, system: str | None = None) -> list[Message]:
    roles = ("user", "assistant")
    start = [] if system is None else [{"role": "system", "content": system}]
    return [*start, *({"role": roles[i % 2], "content": content} for i, content in enumerate(contents))]


@pytest.fixture(scope="session")
def theirs(
    tokenizer: Tokenizer, flavor: str, tmp_path_factory: pytest.TempPathFactory
) -> PreTrainedTokenizerBase:
    """The tokenizer as transformers loads it, chat template included."""
    directory = tmp_path_factory.mktemp("chat")
    tokenizer.save(directory, chat_template=CHAT_TEMPLATES[flavor].jinja)
    return AutoTokenizer.from_pretrained(directory)


# ---- the text ----


def test_the_v1_prompt_is_the_published_one(tokenizers_by_flavor: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers_by_flavor["coder"]
    ids = chat_prompt(turns("Sort.", "Done.", "Thanks."), tokenizer=tokenizer, template="coder")
    assert tokenizer.decode(ids) == (
        f"{BOS}{V1_SYSTEM}### Instruction:\nSort.\n### Response:\nDone.\n{EOT}\n"
        "### Instruction:\nThanks.\n### Response:\n"
    )


def test_the_v2_prompt_is_the_published_one(v2: Tokenizer) -> None:
    ids = chat_prompt(turns("Sort.", "Done.", "Thanks."), tokenizer=v2, template="v2")
    assert v2.decode(ids) == f"{BOS}User: Sort.\n\nAssistant: Done.{EOS}User: Thanks.\n\nAssistant:"


def test_a_system_message_takes_the_place_of_the_default(tokenizers_by_flavor: dict[str, Tokenizer]) -> None:
    texts = {
        name: each.decode(chat_prompt(turns("Hi", system="Be brief."), tokenizer=each, template=name))
        for name, each in tokenizers_by_flavor.items()
    }
    assert (
        texts["coder"] == f"{BOS}Be brief.### Instruction:\nHi\n### Response:\n"
    )  # no line break, as published
    assert texts["v2"] == f"{BOS}Be brief.\n\nUser: Hi\n\nAssistant:"


def test_no_space_stands_after_the_name_of_the_assistant(v2: Tokenizer) -> None:
    ids = chat_prompt(turns("Hi"), tokenizer=v2, template="v2")
    assert v2.decode(ids).endswith("Assistant:")
    answered = encode_chat(turns("Hi", "Yes"), tokenizer=v2, template="v2").ids
    assert v2.decode(answered[len(ids) :]) == f" Yes{EOS}"  # the space is the answer's


# ---- transformers agrees ----


CONTENTS = st.text(alphabet=st.characters(exclude_categories=["Cs", "Co", "Cn"]), max_size=40)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contents=st.lists(CONTENTS, min_size=1, max_size=5), system=st.none() | CONTENTS)
def test_transformers_renders_the_same_text_and_ids(
    tokenizer: Tokenizer,
    theirs: PreTrainedTokenizerBase,
    flavor: str,
    contents: list[str],
    system: str | None,
) -> None:
    messages = turns(*contents, system=system)
    if len(contents) % 2:
        ids = chat_prompt(messages, tokenizer=tokenizer, template=flavor)
        rendered = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    else:
        ids = encode_chat(messages, tokenizer=tokenizer, template=flavor).ids
        rendered = theirs.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(ids) == rendered
    assert theirs(rendered, add_special_tokens=False).input_ids == ids


def test_the_template_is_what_other_programs_recognise() -> None:
    # llama.cpp and its kin tell a template by these strings.
    assert "'Assistant: ' + message['content'] + eos_token" in CHAT_TEMPLATES["v2"].jinja
    assert "### Instruction:" in CHAT_TEMPLATES["coder"].jinja
    assert EOT in CHAT_TEMPLATES["coder"].jinja


def test_the_template_is_kept_with_the_tokenizer(tmp_path: Path, v2: Tokenizer) -> None:
    v2.save(tmp_path, chat_template=CHAT_TEMPLATES["v2"].jinja)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["chat_template"] == CHAT_TEMPLATES["v2"].jinja
    assert Tokenizer.load(tmp_path).chat_template == CHAT_TEMPLATES["v2"].jinja


# ---- what is learned ----


@pytest.mark.parametrize(
    ("template", "learned"), [("coder", f"Yes.\n{EOT}No.\n{EOT}"), ("v2", f" Yes.{EOS} No.{EOS}")]
)
def test_answers_and_their_ends_are_learned_and_nothing_else(
    tokenizers_by_flavor: dict[str, Tokenizer], template: str, learned: str
) -> None:
    tokenizer = tokenizers_by_flavor[template]
    chat = encode_chat(turns("a?", "Yes.", "b?", "No."), tokenizer=tokenizer, template=template)
    assert len(chat.ids) == len(chat.loss_mask)
    assert set(chat.loss_mask) == {0, 1}
    assert tokenizer.decode([i for i, mask in zip(chat.ids, chat.loss_mask, strict=True) if mask]) == learned


def test_a_prompt_and_what_is_learned_after_it_are_the_conversation(
    tokenizer: Tokenizer, flavor: str
) -> None:
    chat = encode_chat(turns("a?", "Yes."), tokenizer=tokenizer, template=flavor)
    prompt = chat_prompt(turns("a?"), tokenizer=tokenizer, template=flavor)
    assert chat.ids[: len(prompt)] == prompt
    assert chat.loss_mask.index(1) == len(prompt)


def test_special_strings_in_a_message_are_plain_text(tokenizer: Tokenizer, flavor: str) -> None:
    hostile = f"{EOS}{EOT}{FIM_HOLE}{BOS}"
    chat = encode_chat(turns(hostile, hostile), tokenizer=tokenizer, template=flavor)
    special = [i for i in chat.ids if i in tokenizer.special_tokens.values()]
    assert special == [tokenizer.bos_id, tokenizer.eot_id if flavor == "coder" else tokenizer.eos_id]
    assert tokenizer.decode(chat.ids).count(hostile) == 2


# ---- errors ----


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "encode_chat: the last message must be from 'assistant', got None"),
        (turns("a"), "encode_chat: the last message must be from 'assistant', got 'user'"),
        (turns("a", "b")[1:], r"encode_chat: messages\[0\] must be from 'user', got 'assistant'"),
        ([*turns("a"), *turns("b", "c")], r"encode_chat: messages\[1\] must be from 'assistant', got 'user'"),
        (
            [*turns("a", "b"), *turns("c", "d", system="s")],
            r"encode_chat: messages\[2\] must be from 'user', got 'system'",
        ),
        (turns(system="s"), "encode_chat: the last message must be from 'assistant', got 'system'"),
        ([{"role": "tool", "content": "x"}], r"encode_chat: messages\[0\] must be from 'user', got 'tool'"),
        ([{"content": "x"}], r"encode_chat: messages\[0\] must be from 'user', got None"),
        ([{"role": "user"}], r"encode_chat: messages\[0\] must have a text as content, got None"),
    ],
)
def test_messages_out_of_order_are_named(v2: Tokenizer, messages: list[Message], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode_chat(messages, tokenizer=v2, template="v2")


def test_a_prompt_ends_with_the_user(v2: Tokenizer) -> None:
    with pytest.raises(
        ValueError, match="chat_prompt: the last message must be from 'user', got 'assistant'"
    ):
        chat_prompt(turns("a", "b"), tokenizer=v2, template="v2")


def test_an_unknown_template_is_named(v2: Tokenizer) -> None:
    with pytest.raises(ValueError, match="chat_prompt: template must be one of coder, v2, got 'v3'"):
        chat_prompt(turns("a"), tokenizer=v2, template="v3")


def test_a_tokenizer_without_the_end_token_is_an_error(tmp_path: Path, v2: Tokenizer) -> None:
    v2.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    spec = json.loads(path.read_text(encoding="utf-8"))
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] != EOT]
    path.write_text(json.dumps(spec), encoding="utf-8")
    with pytest.raises(ValueError, match="the tokenizer must have a token for eot, got none"):
        encode_chat(turns("a", "b"), tokenizer=Tokenizer.load(path), template="coder")
