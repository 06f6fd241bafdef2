"""The stage `dscoder prepare`: documents become packed windows of tokens.

Training documents are rearranged for FIM (seeded by their content, so neither order nor threads matter),
encoded, framed by bos and eos and packed; held-out documents are encoded and packed as they stand. Both
splits keep document boundaries. A document much longer than a window never stands in one with its hole, its
suffix and its middle, so where windows are short `section_bytes` makes documents of its sections first.

`token_bytes.npy` says how many bytes of text each id stands for: with it a loss per token becomes exact bits
per byte.
"""

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from dscoder.config.data import PrepareConfig
from dscoder.config.text import FimConfig
from dscoder.data.sections import split_sections
from dscoder.data.shards import SplitWriter, token_dtype
from dscoder.data.sources import Document, hash_sources, is_held_out, read_documents
from dscoder.runtime.artifact import Stage, hash_path, open_stage
from dscoder.runtime.log import get_logger
from dscoder.text.fim import apply_fim, encode_fim
from dscoder.text.tokenizer import Tokenizer

TRAIN = "train"
HELD_OUT = "held_out"
TOKENIZER = "tokenizer"  # a copy, for those who read the windows
TOKEN_BYTES = "token_bytes.npy"
BATCH_CHARACTERS = 2**22  # encoded in one parallel call, and so held as Python integers
_NO_FIM = FimConfig(rate=0.0)
_LOG = get_logger(__name__)


@dataclass(kw_only=True, slots=True)
class _Split:
    """One split while it is written."""

    writer: SplitWriter
    fim: FimConfig
    counts: Counter[str] = field(default_factory=Counter)


def _encode(batch: Sequence[Document], split: _Split, *, config: PrepareConfig, tokenizer: Tokenizer) -> None:
    """Add the token ids of the documents of one batch to the split."""
    texts = [document.text for document in batch]
    keys = [document.key for document in batch]
    parts = apply_fim(texts, document_ids=keys, config=split.fim, seed=config.seed)
    dtype = token_dtype(tokenizer.vocab_size)
    head = [tokenizer.require_id("bos")] if config.add_bos else []
    tail = [tokenizer.require_id("eos")]
    for ids in encode_fim(parts, tokenizer):
        split.writer.add(np.array([*head, *ids, *tail], dtype=dtype))
    split.counts["documents"] += len(batch)
    split.counts["bytes"] += sum(len(text.encode()) for text in texts)
    for part in parts:
        split.counts[f"fim_{part.order.name.lower()}"] += 1


def _sections(document: Document, max_bytes: int | None) -> list[Document]:
    if max_bytes is None:
        return [document]
    texts = split_sections(document.text, max_bytes=max_bytes)
    return [Document(name=document.name, text=text) for text in texts]


def _batches(
    documents: Iterator[Document], *, section_bytes: int | None, share: float
) -> Iterator[list[tuple[bool, Document]]]:
    """Documents with whether they are held out, which a section inherits from its document."""
    batch: list[tuple[bool, Document]] = []
    num_characters = 0
    for document in documents:
        is_held = is_held_out(document, share=share)
        batch += [(is_held, section) for section in _sections(document, section_bytes)]
        num_characters += len(document.text)
        if num_characters >= BATCH_CHARACTERS:
            yield batch
            batch, num_characters = [], 0
    yield batch


def _write_splits(
    stage: Stage, config: PrepareConfig, tokenizer: Tokenizer, dropped: Counter[str]
) -> dict[str, Counter[str]]:
    fill = tokenizer.require_id("eos") if tokenizer.pad_id is None else tokenizer.pad_id

    def split(name: str, fim: FimConfig) -> _Split:
        directory = stage.directory / name
        writer = SplitWriter(directory, window=config.window, fill=fill, pool_tokens=config.pool_tokens)
        return _Split(writer=writer, fim=fim)

    splits = {TRAIN: split(TRAIN, config.fim), HELD_OUT: split(HELD_OUT, _NO_FIM)}
    documents = read_documents(config.sources, dropped=dropped)
    share = config.sources.held_out_share
    for batch in _batches(documents, section_bytes=config.section_bytes, share=share):
        for name, part in splits.items():
            chosen = [document for is_held, document in batch if is_held == (name == HELD_OUT)]
            _encode(chosen, part, config=config, tokenizer=tokenizer)
            part.writer.flush_if_full()
    for part in splits.values():
        part.writer.flush()
        part.counts["windows"] = part.writer.num_windows
        part.counts["tokens"] = part.writer.num_tokens
    return {name: part.counts for name, part in splits.items()}


def _padding_share(counts: Counter[str], window: int) -> float:
    places = counts["windows"] * window
    return 1.0 - counts["tokens"] / places if places else 0.0


def _hash_tokenizer(tokenizer: Tokenizer) -> str:
    with tempfile.TemporaryDirectory() as directory:
        tokenizer.save(directory)
        return hash_path(Path(directory) / "tokenizer.json")


def run(config: PrepareConfig) -> Path:
    """Write the packed windows of both splits to `config.out`; returns that directory."""
    tokenizer = Tokenizer.load(config.tokenizer)
    with open_stage(
        Path(config.out),
        command="prepare",
        config=asdict(config),
        inputs={"sources": hash_sources(config.sources), "tokenizer": _hash_tokenizer(tokenizer)},
        free=("out", "tokenizer", "overwrite"),
        overwrite=config.overwrite,
    ) as stage:
        if stage.is_finished:
            _LOG.info("%s is finished already", stage.directory)
            return stage.directory
        dropped: Counter[str] = Counter()
        counts = _write_splits(stage, config, tokenizer, dropped)
        if not counts[TRAIN]["documents"]:
            raise ValueError(f"prepare: the sources must hold a document, got none; dropped {dict(dropped)}")
        np.save(stage.directory / TOKEN_BYTES, np.array(tokenizer.byte_lengths(), dtype=np.int32))
        tokenizer.save(stage.directory / TOKENIZER)
        padding = {f"{name}_padding_share": _padding_share(c, config.window) for name, c in counts.items()}
        stage.finish(
            counts={f"{name}_{key}": n for name, c in counts.items() for key, n in sorted(c.items())}
            | padding,
            dropped=dropped,
            facts={
                "window": config.window,
                "vocab_size": tokenizer.vocab_size,
                "bos_id": tokenizer.bos_id,
                "eos_id": tokenizer.eos_id,
            },
        )
        _report(counts, padding, dropped)
        return stage.directory


def _report(counts: dict[str, Counter[str]], padding: dict[str, float], dropped: Counter[str]) -> None:
    for name, c in counts.items():
        _LOG.info(
            "%s: %d documents, %d bytes, %d tokens in %d windows (%.2f %% padding)",
            *(name, c["documents"], c["bytes"], c["tokens"], c["windows"]),
            100 * padding[f"{name}_padding_share"],
        )
    for reason, number in sorted(dropped.items()):
        _LOG.info("dropped: %d %s", number, reason)
