"""What is read from disk and from the hub, and what transformers reads of what is written."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dscoder.text import tokenizer as module
from dscoder.text.flavors import BOS, EOS, EOT, FIM_BEGIN, FIM_END, FIM_HOLE
from dscoder.text.tokenizer import Tokenizer

TEXT = f"def f(x):\r\n    return x + 2024  # \u4f60\u597d \U0001f600 {FIM_HOLE}{EOT}\n"

# The 13 bytes that never occur in UTF-8, spelled as the byte-level alphabet spells them: in published order.
LETTERS = "\u00f5\u00f7\u00c1\u00fd\u00c0\u00ff\u00f8\u00fa\u00fe\u00fc\u00f9\u00f6\u00fb"


@pytest.fixture(scope="module")
def published(tokenizers_by_flavor: dict[str, Tokenizer], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory laid out as the published v1 instruct models are: letters as added tokens, odd flags."""
    directory = tmp_path_factory.mktemp("published")
    tokenizers_by_flavor["coder"].save(directory)
    path = directory / "tokenizer.json"
    spec = json.loads(path.read_text(encoding="utf-8"))
    first = min(token["id"] for token in spec["added_tokens"])
    contents = [*LETTERS, BOS, EOS, FIM_HOLE, FIM_BEGIN, FIM_END, "<pad>", "<|User|>", "<|Assistant|>", EOT]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True}
    spec["added_tokens"] = [
        {"id": first + i, "content": content, **flags, "special": content in (BOS, EOS, EOT)}
        for i, content in enumerate(contents)
    ]
    spec["post_processor"] = None
    spec["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(spec), encoding="utf-8")
    names = {"bos_token": BOS, "eos_token": {"__type": "AddedToken", "content": EOT}, "pad_token": EOS}
    config = {**names, "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "{{ messages }}"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


# ---- published files ----


def test_a_published_file_keeps_its_ids(published: Path) -> None:
    tokenizer = Tokenizer.load(published)
    first = tokenizer.require_id("bos")
    assert tokenizer.vocab_size == first + 9
    assert tokenizer.fim_hole_id == first + 2
    assert tokenizer.fim_begin_id == first + 3
    assert tokenizer.fim_end_id == first + 4
    assert tokenizer.eos_id == tokenizer.eot_id == first + 8  # as its tokenizer_config.json says
    assert tokenizer.pad_id == first + 1
    assert tokenizer.chat_template == "{{ messages }}"


def test_ordinary_text_gets_the_ids_that_transformers_gives(published: Path) -> None:
    text = f"gr\u00fc\u00df dich, na\u00efve \u00f8re {LETTERS} def f(): return 1"
    theirs = AutoTokenizer.from_pretrained(published)
    ours = Tokenizer.load(published).encode(text)
    assert ours == theirs(text, add_special_tokens=False).input_ids
    assert len(ours) > 4  # the file's own truncation is not applied


def test_letters_that_are_added_tokens_come_back(published: Path) -> None:
    tokenizer = Tokenizer.load(published)
    for allow_special in (False, True):
        ids = tokenizer.encode(f"{LETTERS}{EOT} \u4f60\u00fc\u597d{LETTERS}", allow_special=allow_special)
        assert tokenizer.decode(ids) == f"{LETTERS}{EOT} \u4f60\u00fc\u597d{LETTERS}"


def test_tokens_a_published_file_does_not_flag_as_special_are_not_injected(published: Path) -> None:
    tokenizer = Tokenizer.load(published)
    assert not set(tokenizer.special_tokens.values()) & set(
        tokenizer.encode("".join(tokenizer.special_tokens))
    )
    assert tokenizer.encode(FIM_HOLE, allow_special=True) == [tokenizer.fim_hole_id]
    assert tokenizer.decode([tokenizer.require_id("fim_hole")], skip_special=True) == ""


def test_special_tokens_listed_in_the_vocabulary_stay_out_of_user_text(tmp_path: Path, v2: Tokenizer) -> None:
    v2.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    spec = json.loads(path.read_text(encoding="utf-8"))
    spec["model"]["vocab"] |= v2.special_tokens
    spec["model"]["ignore_merges"] = True  # a whole piece found in the vocabulary is a token, merges or not
    whole = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    spec["pre_tokenizer"] = whole  # no piece but the text itself
    path.write_text(json.dumps(spec), encoding="utf-8")
    tokenizer = Tokenizer.load(path)
    assert tokenizer.encode(EOT, allow_special=True) == [v2.eot_id]
    assert v2.eot_id not in tokenizer.encode(EOT)


def test_a_tokenizer_without_the_special_tokens_has_no_ids_for_them(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0}, merges=[])).save(str(path))
    tokenizer = Tokenizer.load(path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.fim_hole_id) == (None,) * 4
    with pytest.raises(ValueError, match="the tokenizer must have a token for fim_hole, got none"):
        tokenizer.require_id("fim_hole")


# ---- loading ----


@pytest.mark.parametrize(
    "as_given", [str, Path, lambda d: d / "tokenizer.json", lambda d: f"{d}/tokenizer.json"]
)
def test_a_file_and_a_directory_load(
    tmp_path: Path, v2: Tokenizer, as_given: Callable[[Path], str | Path]
) -> None:
    v2.save(tmp_path)
    loaded = Tokenizer.load(as_given(tmp_path))
    assert loaded.encode(TEXT) == v2.encode(TEXT)
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (v2.bos_id, v2.eos_id, v2.pad_id)
    assert loaded.special_tokens == v2.special_tokens


@pytest.mark.parametrize("name", ["nowhere", "/nowhere/tokenizer.json", "./a/b", "a/b/c"])
def test_a_missing_file_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=r"path_or_repo_id must be .* or a hub repository, got '.*" + name):
        Tokenizer.load(name)


def test_a_directory_without_a_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a directory that holds one"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", ["not json", "{}", '{"model": {"type": "BPE"}}', "[]"])
def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"Tokenizer.load: .*tokenizer.json must be a tokenizer.json, got: "):
        Tokenizer.load(path)


def test_a_config_that_is_no_object_is_an_error(tmp_path: Path, v2: Tokenizer) -> None:
    v2.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokenizer_config.json must hold an object, got list"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "content", [b"{", b"\xff", b"", b"[" * 200_000], ids=["cut", "bytes", "empty", "deep"]
)
def test_a_config_that_is_no_json_is_named(tmp_path: Path, v2: Tokenizer, content: bytes) -> None:
    v2.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"Tokenizer.load: .*tokenizer_config.json must be JSON, got: "):
        Tokenizer.load(tmp_path)


def test_a_chat_template_that_is_no_text_is_named(tmp_path: Path, v2: Tokenizer) -> None:
    v2.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"Tokenizer.load: .*chat_template.jinja must be UTF-8, got: "):
        Tokenizer.load(tmp_path)


def test_a_chat_template_in_its_own_file_is_read(tmp_path: Path, v2: Tokenizer) -> None:
    v2.save(tmp_path, chat_template="in the config")
    (tmp_path / "chat_template.jinja").write_text("in a file", encoding="utf-8")
    assert Tokenizer.load(tmp_path).chat_template == "in a file"


def test_a_hub_repository_loads(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repo_id: str, name: str, *, revision: str | None) -> str:
        asked.append((repo_id, name, revision))
        if not (published / name).exists():
            raise LocalEntryNotFoundError(name)
        return str(published / name)

    monkeypatch.setattr(module, "hf_hub_download", download)
    tokenizer = Tokenizer.load("someone/model", revision="v1")
    assert tokenizer.eos_id == tokenizer.eot_id
    assert asked == [
        ("someone/model", name, "v1")
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    ]


def test_a_hub_that_does_not_answer_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*args: object, **kwargs: object) -> str:
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(module, "hf_hub_download", download)
    with pytest.raises(ValueError, match="got 'someone/model': no network"):
        Tokenizer.load("someone/model")


# ---- saving ----


@pytest.mark.parametrize("model_type", [None, "deepseek_v2", "llama"])
def test_transformers_reads_what_is_saved(
    tmp_path: Path, tokenizer: Tokenizer, model_type: str | None
) -> None:
    tokenizer.save(tmp_path)
    if model_type is not None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
    for theirs in (
        AutoTokenizer.from_pretrained(tmp_path),
        PreTrainedTokenizerFast.from_pretrained(tmp_path),
    ):
        # Theirs has no notion of untrusted text: it always takes special strings for tokens.
        ids = tokenizer.encode(TEXT, allow_special=True)
        assert theirs(TEXT, add_special_tokens=False).input_ids == ids
        assert theirs(TEXT).input_ids == [tokenizer.bos_id, *ids]
        assert theirs.decode(ids) == TEXT
        assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
        assert theirs.pad_token_id == tokenizer.pad_id
        assert len(theirs) == tokenizer.vocab_size


def test_saving_what_was_loaded_changes_nothing(tmp_path: Path, published: Path) -> None:
    loaded = Tokenizer.load(published)
    loaded.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.chat_template == loaded.chat_template
    assert again.encode(LETTERS + TEXT, allow_special=True) == loaded.encode(
        LETTERS + TEXT, allow_special=True
    )
    assert (again.eos_id, again.pad_id) == (loaded.eos_id, loaded.pad_id)


def test_the_special_tokens_map_is_written(tmp_path: Path, v2: Tokenizer) -> None:
    v2.save(tmp_path)
    content = json.loads((tmp_path / "special_tokens_map.json").read_text(encoding="utf-8"))
    assert content == {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS}
