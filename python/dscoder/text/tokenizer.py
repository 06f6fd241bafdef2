"""Byte-level BPE on Hugging Face tokenizers: load a published one, train one like it, encode and decode.

User text is never trusted: unless `allow_special` is given, a special string inside a text is encoded as the
plain characters it is made of, so that no document can plant a token that means something.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers

from dscoder.text.flavors import BOS, EOS, EOT, FIM_BEGIN, FIM_END, FIM_HOLE, FLAVORS, Flavor

_TOKENIZER_FILE = "tokenizer.json"
_CONFIG_FILE = "tokenizer_config.json"
_SPECIAL_FILE = "special_tokens_map.json"
_TEMPLATE_FILE = "chat_template.jinja"
_NUM_BYTES = 256


class Tokenizer:
    """Text to ids and back, with the special ids by name (None where a loaded tokenizer lacks one)."""

    def __init__(self, backend: tokenizers.Tokenizer, *, config: Mapping[str, Any] | None = None) -> None:
        """Wrap a Hugging Face tokenizer; `config` is what tokenizer_config.json holds, if anything."""
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._config = dict(config or {})
        added = backend.get_added_tokens_decoder()
        # The published v1 file lists 13 letters (o with tilde, u with umlaut ...) as added tokens, those that
        # spell bytes which never occur in UTF-8. They control nothing and stay matched in plain text.
        is_letter = {i: len(token.content) == 1 and not token.special for i, token in added.items()}
        self._letters = {i: token.content for i, token in added.items() if is_letter[i]}
        self._special = {token.content: i for i, token in added.items() if not is_letter[i]}
        self._special_ids = frozenset(self._special.values())
        self._plain = _without_special(backend, self._special)
        self._token_bytes: tuple[bytes, ...] | None = None  # made when it is asked for
        self.vocab_size = 1 + max(backend.get_vocab().values(), default=-1)
        self.bos_id = self._named_id("bos_token", BOS)
        self.eos_id = self._named_id("eos_token", EOS)
        self.pad_id = self._named_id("pad_token", EOS)
        self.eot_id = self._special.get(EOT)
        self.fim_begin_id = self._special.get(FIM_BEGIN)
        self.fim_hole_id = self._special.get(FIM_HOLE)
        self.fim_end_id = self._special.get(FIM_END)

    @classmethod
    def load(cls, path_or_repo_id: str | Path, *, revision: str | None = None) -> "Tokenizer":
        """Read a tokenizer.json, a directory that holds one, or a repository of the Hugging Face hub.

        bos, eos, pad and the chat template come from the tokenizer_config.json beside it, where there is one.
        """
        path = Path(path_or_repo_id).expanduser()
        if path.is_dir():
            path = path / _TOKENIZER_FILE
        if not path.is_file():
            path = _download(str(path_or_repo_id), revision)
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for whatever it cannot parse
            raise ValueError(f"Tokenizer.load: {path} must be a tokenizer.json, got: {error}") from error
        return cls(backend, config=_read_config(path.parent))

    @classmethod
    def train(cls, texts: Iterable[str], *, vocab_size: int, flavor: str = "v2") -> "Tokenizer":
        """Train byte-level BPE with the pre-splits and special tokens of a published tokenizer.

        `vocab_size` counts every id, the special ones too: the regular tokens come first, then the special
        tokens in their published order. A corpus too small to fill it gives a smaller vocabulary. The same
        texts in the same order give the same file, byte for byte.
        """
        if flavor not in FLAVORS:
            raise ValueError(f"Tokenizer.train: flavor must be one of {', '.join(FLAVORS)}, got {flavor!r}")
        rules = FLAVORS[flavor]
        num_regular = vocab_size - len(rules.special_tokens)
        if num_regular < _NUM_BYTES:
            smallest = _NUM_BYTES + len(rules.special_tokens)
            raise ValueError(f"Tokenizer.train: vocab_size must be >= {smallest}, got {vocab_size}")
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = _pre_tokenizer(rules)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=num_regular,
            min_frequency=2,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),  # all 256 bytes: any text encodes
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer=trainer)
        # normalized=False: matched in the text as it stands.
        backend.add_special_tokens(
            [AddedToken(content, normalized=False, special=True) for content in rules.special_tokens]
        )
        # As the published files do: whoever encodes with special tokens gets bos in front.
        backend.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, backend.token_to_id(BOS))]
        )
        config = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS}
        return cls(backend, config=config)

    def save(
        self, directory: str | Path, *, chat_template: str | None = None, eos_token: str | None = None
    ) -> None:
        """Write tokenizer.json and the two files beside it that transformers reads.

        `chat_template` (Jinja, a `ChatTemplate`'s) and `eos_token` replace those it was loaded with.
        """
        target = Path(directory)
        target.mkdir(parents=True, exist_ok=True)
        config = {
            **{key: value for key, value in self._config.items() if key != "added_tokens_decoder"},
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,  # decoding gives back every space
            **({"chat_template": chat_template} if chat_template is not None else {}),
            **({"eos_token": eos_token} if eos_token is not None else {}),
        }
        names = {key: config[key] for key in ("bos_token", "eos_token", "pad_token") if config.get(key)}
        self._backend.save(str(target / _TOKENIZER_FILE))
        for name, content in ((_CONFIG_FILE, config), (_SPECIAL_FILE, names)):
            (target / name).write_text(
                json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
            )

    @property
    def chat_template(self) -> str | None:
        """The Jinja chat template it was loaded with."""
        template = self._config.get("chat_template")
        return template if isinstance(template, str) else None

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """The special strings and their ids."""
        return dict(self._special)

    def padded_vocab_size(self, multiple: int = 256) -> int:
        """The rows a model's embedding should have: `vocab_size` rounded up (v1: 32022 to 32256)."""
        return -(-self.vocab_size // multiple) * multiple

    def encode(self, text: str, *, allow_special: bool = False, add_bos: bool = False) -> list[int]:
        """The ids of a text, without bos unless asked for.

        With `allow_special` a special string becomes its token: for prompts that the caller wrote itself.
        Without it no text produces a special id.
        """
        [ids] = self.encode_batch([text], allow_special=allow_special)
        return [self.require_id("bos"), *ids] if add_bos else ids

    def encode_batch(self, texts: Sequence[str], *, allow_special: bool = False) -> list[list[int]]:
        """`encode` of every text, in parallel over the texts."""
        encoder = self._backend if allow_special else self._plain
        try:
            encodings = encoder.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError as error:
            raise _first_wrong(texts) from error
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """The text of the ids: exactly what was encoded. Bytes that are not UTF-8 become U+FFFD."""
        kept = [i for i in ids if not (skip_special and i in self._special_ids)]
        if not self._letters or self._letters.keys().isdisjoint(kept):
            return self._backend.decode(kept, skip_special_tokens=False)
        # The byte-level decoder would take a letter token for the byte it is spelled like.
        parts, run = [], []
        for token_id in kept:
            letter = self._letters.get(token_id)
            if letter is None:
                run.append(token_id)
            else:
                parts += [self._backend.decode(run, skip_special_tokens=False), letter]
                run = []
        return "".join([*parts, self._backend.decode(run, skip_special_tokens=False)])

    def byte_lengths(self) -> list[int]:
        """How many bytes of text each id stands for, in UTF-8; 0 for special tokens and ids without one."""
        return list(map(len, self.token_bytes()))

    def token_bytes(self) -> tuple[bytes, ...]:
        """The bytes of text that each id stands for; none for special tokens and ids without text.

        What `decode` makes of ids without their special ones is these bytes as UTF-8.
        """
        if self._token_bytes is None:
            self._token_bytes = self._read_token_bytes()
        return self._token_bytes

    def _read_token_bytes(self) -> tuple[bytes, ...]:
        spelled = dict(zip(_byte_letters(), range(_NUM_BYTES), strict=True))
        found = [b""] * self.vocab_size
        for content, token_id in self._backend.get_vocab().items():
            is_spelled = token_id not in self._letters and spelled.keys() >= set(content)
            if token_id not in self._special_ids:
                spelling = [spelled[letter] for letter in content] if is_spelled else content.encode()
                found[token_id] = bytes(spelling)
        return tuple(found)

    def require_id(self, name: str) -> int:
        """The id called bos, eos, pad, eot, fim_begin, fim_hole or fim_end; ValueError if it is missing."""
        ids = {
            **{"bos": self.bos_id, "eos": self.eos_id, "pad": self.pad_id, "eot": self.eot_id},
            **{"fim_begin": self.fim_begin_id, "fim_hole": self.fim_hole_id, "fim_end": self.fim_end_id},
        }
        if name not in ids:
            raise ValueError(f"Tokenizer.require_id: name must be one of {', '.join(ids)}, got {name!r}")
        found = ids[name]
        if found is None:
            raise ValueError(f"Tokenizer.require_id: the tokenizer must have a token for {name}, got none")
        return found

    def _named_id(self, key: str, default: str) -> int | None:
        value = self._config.get(key)
        content = value.get("content") if isinstance(value, dict) else value
        return self._backend.token_to_id(content if isinstance(content, str) else default)


def _byte_letters() -> str:
    """The character that byte-level BPE spells each byte as, by byte: itself where it can be seen."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return "".join(chr(byte if byte in visible else next(others)) for byte in range(_NUM_BYTES))


def _first_wrong(texts: Sequence[object]) -> Exception:
    """What to say about the first text that cannot be encoded."""
    for idx, text in enumerate(texts):
        name = f"Tokenizer.encode: texts[{idx}]"
        if not isinstance(text, str):
            return TypeError(f"{name} must be str, got {type(text).__name__}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            return ValueError(f"{name} must be valid Unicode, got {error.reason} at character {error.start}")
    return TypeError(f"Tokenizer.encode: texts must be a sequence of str, got {type(texts).__name__}")


def _pre_tokenizer(rules: Flavor) -> pre_tokenizers.PreTokenizer:
    steps: list[pre_tokenizers.PreTokenizer] = [
        *(pre_tokenizers.Split(Regex(split), behavior="isolated") for split in rules.splits),
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    return pre_tokenizers.Sequence(steps)


def _without_special(backend: tokenizers.Tokenizer, special: Mapping[str, int]) -> tokenizers.Tokenizer:
    """The same tokenizer, to which the special strings are ordinary text."""
    spec = json.loads(backend.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] not in special]
    spec["post_processor"] = None
    vocab = spec["model"].get("vocab")
    if isinstance(vocab, dict):
        for content in special:
            vocab.pop(content, None)  # some files list their special tokens among the regular ones too
    return tokenizers.Tokenizer.from_str(json.dumps(spec))


def _read_config(directory: Path) -> dict[str, Any]:
    path, template = directory / _CONFIG_FILE, directory / _TEMPLATE_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"Tokenizer.load: {path} must be JSON, got: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"Tokenizer.load: {path} must hold an object, got {type(config).__name__}")
    try:
        if template.is_file():
            config["chat_template"] = template.read_text(encoding="utf-8")
    except ValueError as error:
        raise ValueError(f"Tokenizer.load: {template} must be UTF-8, got: {error}") from error
    return config


def _download(repo_id: str, revision: str | None) -> Path:
    """The tokenizer.json of a hub repository, with its companions beside it."""
    wanted = f"a {_TOKENIZER_FILE}, a directory that holds one or a hub repository"
    if repo_id.count("/") != 1 or repo_id.startswith((".", "/", "~")):
        raise ValueError(f"Tokenizer.load: path_or_repo_id must be {wanted}, got {repo_id!r}")
    try:
        path = hf_hub_download(repo_id, _TOKENIZER_FILE, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"Tokenizer.load: path_or_repo_id must be {wanted}, got {repo_id!r}: {error}"
        ) from error
    for companion in (_CONFIG_FILE, _TEMPLATE_FILE):
        try:
            hf_hub_download(repo_id, companion, revision=revision)
        except EntryNotFoundError:
            continue
    return Path(path)
