import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dscoder.text.flavors import EOT, FIM_SENTINELS, FLAVORS
from dscoder.text.tokenizer import Tokenizer

VOCAB_SIZE = 600  # of the fixtures

HARD_TEXTS = [
    "",
    "\0\x01\x7f\u0080\u200b\ufeff\uffff",
    "a\r\nb\rc\n\n\td  \n ",
    "\U0001f469\u200d\U0001f4bb e\u0301 \u00e9 \u0130\u00df",
    "\u4f60\u597d world\uff0c\u3053\u3093\u306b\u3061\u306f \uc548\ub155",
    "x" * 5000 + " " * 5000 + "\n" * 50,
    "".join(FIM_SENTINELS) + EOT + "<|User|>",
    "\u00fc\u00f6\u00f8\u00f5\u00ff",
]


# ---- training ----


def test_the_vocabulary_has_the_size_asked_for(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == VOCAB_SIZE


def test_special_tokens_follow_the_regular_ones_in_published_order(tokenizer: Tokenizer, flavor: str) -> None:
    strings = FLAVORS[flavor].special_tokens
    first = VOCAB_SIZE - len(strings)
    assert tokenizer.special_tokens == {content: first + i for i, content in enumerate(strings)}
    ids = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.fim_hole_id, tokenizer.fim_begin_id)
    assert ids == (first, first + 1, first + 2, first + 3)
    assert (tokenizer.fim_end_id, tokenizer.eot_id) == (first + 4, first + 8)
    assert tokenizer.pad_id == tokenizer.eos_id  # as published


def test_a_corpus_too_small_gives_a_smaller_vocabulary(flavor: str) -> None:
    tokenizer = Tokenizer.train(["abab", "abab"], vocab_size=1000, flavor=flavor)
    num_regular = 256 + 2  # ab, abab
    assert tokenizer.bos_id == num_regular
    assert tokenizer.vocab_size == num_regular + len(FLAVORS[flavor].special_tokens)


def test_training_gives_the_same_file_in_any_process(tmp_path: Path, flavor: str, corpus: list[str]) -> None:
    program = (
        "import json, sys; from dscoder.text.tokenizer import Tokenizer; "
        "texts = json.load(sys.stdin); "
        "Tokenizer.train(texts, vocab_size=600, flavor=sys.argv[1]).save(sys.argv[2])"
    )
    files = []
    for number, threads in enumerate(("1", "2", "2")):
        environment = {**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": str(number)}
        target = tmp_path / str(number)
        command = [sys.executable, "-c", program, flavor, str(target)]
        subprocess.run(command, input=json.dumps(corpus), text=True, check=True, env=environment)
        files.append((target / "tokenizer.json").read_bytes())
    assert files[0] == files[1] == files[2]


def test_training_takes_an_iterator(corpus: list[str], v2: Tokenizer) -> None:
    again = Tokenizer.train(iter(corpus), vocab_size=VOCAB_SIZE)
    assert again.encode(corpus[0]) == v2.encode(corpus[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocab_size": 264}, r"Tokenizer.train: vocab_size must be >= 265, got 264"),
        ({"vocab_size": 600, "flavor": "v3"}, r"flavor must be one of coder, v2, got 'v3'"),
    ],
)
def test_wrong_training_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tokenizer.train(["a"], **arguments)


# ---- what the pre-tokenizers keep apart ----


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.decode([token_id]) for token_id in tokenizer.encode(text)]


def test_every_digit_is_a_token(tokenizer: Tokenizer) -> None:
    trained = Tokenizer.train(["2024 2024 1999"] * 20, vocab_size=300)
    for each in (tokenizer, trained):
        assert pieces(each, "x2024") == ["x", "2", "0", "2", "4"]


def test_no_token_crosses_a_line(tokenizer: Tokenizer) -> None:
    for token_id in range(tokenizer.vocab_size):
        text = tokenizer.decode([token_id])
        assert text in ("\n", "\r") or not set("\r\n") & set(text)


def test_a_space_joins_the_word_after_it(tokenizer: Tokenizer) -> None:
    assert pieces(tokenizer, "  def self") == [" ", " def", " self"]


def test_chinese_never_shares_a_token_with_latin(tokenizer: Tokenizer) -> None:
    texts = [tokenizer.decode([token_id]) for token_id in range(VOCAB_SIZE)]
    assert "\u4f60\u597d" in texts  # so there are merges that could have gone wrong
    assert not [
        text for text in texts if "\u4e00" <= max(text, default="") <= "\u9fa5" and min(text) < "\x80"
    ]


def test_letters_without_case_join_a_word_in_coder_only(tokenizers_by_flavor: dict[str, Tokenizer]) -> None:
    # Arabic is a letter (v1: \\p{L}) but has no case, and V2 lists cased letters only.
    texts = ["\u0633\u0644\u0627\u0645 \u0633\u0644\u0627\u0645"] * 20
    sizes = {
        name: len(Tokenizer.train(texts, vocab_size=400, flavor=name).encode(texts[0]))
        for name in tokenizers_by_flavor
    }
    assert sizes["coder"] == 2
    assert sizes["v2"] == 1  # no split at all: the space and both words are one piece


# ---- encoding and decoding ----


@given(text=st.text())
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    for allow_special in (False, True):
        assert tokenizer.decode(tokenizer.encode(text, allow_special=allow_special)) == text


@pytest.mark.parametrize("text", HARD_TEXTS, ids=range(len(HARD_TEXTS)))
def test_hard_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    for allow_special in (False, True):
        assert tokenizer.decode(tokenizer.encode(text, allow_special=allow_special)) == text


def test_user_text_cannot_produce_a_special_id(tokenizer: Tokenizer) -> None:
    text = "".join(f"x{content} {content}{content}\n" for content in tokenizer.special_tokens)
    special = set(tokenizer.special_tokens.values())
    assert not special & set(tokenizer.encode(text))
    assert not special & set(tokenizer.encode_batch([text])[0])
    assert special <= set(tokenizer.encode(text, allow_special=True))


def test_special_tokens_can_be_left_out_of_a_decoded_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(f"{FIM_SENTINELS[0]}ab{EOT}", allow_special=True, add_bos=True)
    assert tokenizer.decode(ids, skip_special=True) == "ab"


def test_bos_stands_in_front_only_when_asked_for(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("a", add_bos=True) == [tokenizer.bos_id, *tokenizer.encode("a")]
    assert tokenizer.bos_id not in tokenizer.encode("a")


def test_a_batch_is_encoded_as_each_text_is(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode_batch(HARD_TEXTS) == [tokenizer.encode(text) for text in HARD_TEXTS]
    allowed = tokenizer.encode_batch(HARD_TEXTS, allow_special=True)
    assert allowed == [tokenizer.encode(text, allow_special=True) for text in HARD_TEXTS]
    assert tokenizer.encode_batch([]) == []


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (
            "a\ud800",
            ValueError,
            r"texts\[1\] must be valid Unicode, got surrogates not allowed at character 1",
        ),
        (b"a", TypeError, r"Tokenizer.encode: texts\[1\] must be str, got bytes"),
        (None, TypeError, r"Tokenizer.encode: texts\[1\] must be str, got NoneType"),
    ],
)
def test_what_is_no_text_is_named(
    tokenizer: Tokenizer, text: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        tokenizer.encode_batch(["fine", text])


def test_a_tokenizer_goes_to_another_process(tokenizer: Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode(HARD_TEXTS[4]) == tokenizer.encode(HARD_TEXTS[4])
    assert copy.eos_id == tokenizer.eos_id


def test_the_padded_vocabulary_is_that_of_the_published_models(tokenizer: Tokenizer) -> None:
    assert tokenizer.padded_vocab_size() == 768
    assert tokenizer.padded_vocab_size(multiple=600) == 600
    published = pickle.loads(pickle.dumps(tokenizer))
    published.vocab_size = 32022
    assert published.padded_vocab_size() == 32256  # v1
    published.vocab_size = 100018
    assert published.padded_vocab_size(multiple=4096) == 102400  # V2


def test_a_missing_or_unknown_name_is_an_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"name must be one of bos, eos, pad, .*, got 'mask'"):
        tokenizer.require_id("mask")


def test_a_place_below_the_home_directory_is_found(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer.save(tmp_path / "mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Tokenizer.load("~/mine").encode("def f") == tokenizer.encode("def f")


# ---- bytes ----


@given(st.data())
def test_the_bytes_of_tokens_are_what_they_decode_to(data: st.DataObject) -> None:
    tokenizer = Tokenizer.train(["caf\u00e9 \u4e2d\u6587"] * 2, vocab_size=300)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=12))
    spelled = tokenizer.token_bytes()
    text = b"".join(spelled[token] for token in ids).decode(errors="replace")
    assert text == tokenizer.decode(ids, skip_special=True)
    assert spelled[tokenizer.require_id("eos")] == b""
    assert tokenizer.byte_lengths() == [len(found) for found in spelled]
