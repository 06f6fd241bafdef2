"""Dialogues, and holes of source files among them, become packed windows with a mask of what is learnt.

A dialogue is encoded by its chat template, and of it only the answers and their end tokens are learnt. A
hole is a document cut in three: prefix and suffix are given, the middle and the end token are learnt. Both
end with the template's end token, which is what stops the trained model.
"""

import heapq
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np

from dscoder.config.sft import ExamplesConfig, FimExamplesConfig
from dscoder.config.text import FimConfig
from dscoder.data.dialogues import Dialogue, hash_dialogues, read_dialogues
from dscoder.data.prepare import BATCH_CHARACTERS, HELD_OUT, TOKENIZER, TRAIN
from dscoder.data.sections import split_sections
from dscoder.data.shards import SplitWriter, token_dtype
from dscoder.data.sources import Document, hash_sources, is_held_out, read_documents
from dscoder.runtime.artifact import Stage, open_stage
from dscoder.runtime.log import get_logger
from dscoder.runtime.seed import derive_seed
from dscoder.text.chat import CHAT_TEMPLATES, EncodedChat, encode_chats
from dscoder.text.fim import FimDocument, FimOrder, apply_fim, arrange
from dscoder.text.flavors import EOT
from dscoder.text.tokenizer import Tokenizer

COMMAND = "sft-examples"
_BATCH_HOLES = 256
_LOG = get_logger(__name__)


@dataclass(kw_only=True, slots=True)
class _Split:
    """One split while it is written."""

    writer: SplitWriter
    counts: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Encoder:
    """What turns examples into ids, and counts those that it cannot."""

    tokenizer: Tokenizer
    config: ExamplesConfig
    dropped: Counter[str]

    def add_dialogues(self, dialogues: Sequence[Dialogue], split: _Split) -> None:
        """Encode and add the dialogues of one batch."""
        conversations = [dialogue.messages for dialogue in dialogues]
        template = self.config.template
        for encoded in encode_chats(conversations, tokenizer=self.tokenizer, template=template):
            if self._add(encoded, split, can_cut=self.config.too_long == "cut"):
                split.counts["dialogues"] += 1

    def add_holes(self, documents: Sequence[FimDocument], split: _Split) -> None:
        """Encode and add documents in their parts."""
        bos, begin, hole, end = (
            self.tokenizer.require_id(name) for name in ("bos", "fim_begin", "fim_hole", "fim_end")
        )
        stop = self.tokenizer.require_id(CHAT_TEMPLATES[self.config.template].end)
        texts = [text for part in documents for text in (part.prefix, part.suffix, part.middle)]
        encoded = iter(self.tokenizer.encode_batch(texts))
        for document in documents:
            prefix, suffix, middle = islice(encoded, 3)
            given = [bos, *arrange(document.order, prefix, suffix, (begin, hole, end))]
            mask = [0] * len(given) + [1] * (len(middle) + 1)
            example = EncodedChat(ids=[*given, *middle, stop], loss_mask=mask)
            if self._add(example, split, can_cut=False):
                split.counts[f"fim_{document.order.name.lower()}"] += 1

    def _add(self, encoded: EncodedChat, split: _Split, *, can_cut: bool) -> bool:
        window, length = self.config.window, len(encoded.ids)
        if length > window and not can_cut:
            self.dropped["too_long"] += 1
            return False
        mask = np.array(encoded.loss_mask[:window], dtype=np.uint8)
        if not mask.any():
            self.dropped["no_answer_in_window"] += 1
            return False
        split.counts["cut"] += length > window
        split.counts["learnt_tokens"] += int(mask.sum())
        ids = np.array(encoded.ids[:window], dtype=token_dtype(self.tokenizer.vocab_size))
        split.writer.add(ids, mask)
        split.writer.flush_if_full()
        return True


def _sections(documents: Iterator[Document], config: FimExamplesConfig) -> Iterator[Document]:
    for document in documents:
        if is_held_out(document, share=config.sources.held_out_share):
            continue
        if config.section_bytes is None:
            yield document
            continue
        for text in split_sections(document.text, max_bytes=config.section_bytes):
            yield Document(name=document.name, text=text)


def _holes(config: FimExamplesConfig, *, count: int, seed: int, dropped: Counter[str]) -> list[FimDocument]:
    """`count` documents with a hole, or all there are; which ones depends on their contents and the seed."""
    documents = _sections(read_documents(config.sources, dropped=dropped), config)
    chosen = heapq.nsmallest(count, documents, key=lambda document: derive_seed("hole", seed, document.key))
    if len(chosen) < count:
        _LOG.warning("the sources of holes give %d examples, %d were wanted", len(chosen), count)
    parts = apply_fim(
        [document.text for document in chosen],
        document_ids=[document.key for document in chosen],
        config=FimConfig(rate=1.0, spm_share=config.spm_share, cut=config.cut),
        seed=seed,
    )
    whole = [part for part in parts if part.order in (FimOrder.PSM, FimOrder.SPM)]
    if len(whole) < len(parts):
        dropped["fim_not_cut"] += len(parts) - len(whole)  # they hold a sentinel, or nothing
    return whole


def _batches(dialogues: Iterator[Dialogue]) -> Iterator[list[Dialogue]]:
    """Dialogues that are encoded together."""
    batch: list[Dialogue] = []
    num_characters = 0
    for dialogue in dialogues:
        batch.append(dialogue)
        num_characters += sum(len(message["content"]) for message in dialogue.messages)
        if num_characters >= BATCH_CHARACTERS:
            yield batch
            batch, num_characters = [], 0
    yield batch


def _is_held_out(dialogue: Dialogue, config: ExamplesConfig) -> bool:
    return dialogue.key < config.held_out_share * 2**64


def _write_splits(
    stage: Stage, paths: Sequence[str], encoder: _Encoder, *, seed: int
) -> dict[str, Counter[str]]:
    config, tokenizer = encoder.config, encoder.tokenizer
    fill = tokenizer.require_id("eos") if tokenizer.pad_id is None else tokenizer.pad_id

    def split(name: str) -> _Split:
        directory = stage.directory / name
        return _Split(
            writer=SplitWriter(directory, window=config.window, fill=fill, pool_tokens=config.pool_tokens)
        )

    splits = {TRAIN: split(TRAIN), HELD_OUT: split(HELD_OUT)}
    for batch in _batches(read_dialogues(paths, dropped=encoder.dropped)):
        for name, part in splits.items():
            chosen = [each for each in batch if _is_held_out(each, config) == (name == HELD_OUT)]
            encoder.add_dialogues(chosen, part)
    share = config.fim.share
    num_holes = round(splits[TRAIN].counts["dialogues"] * share / (1.0 - share))
    if num_holes:
        holes = _holes(config.fim, count=num_holes, seed=seed, dropped=encoder.dropped)
        for start in range(0, len(holes), _BATCH_HOLES):
            encoder.add_holes(holes[start : start + _BATCH_HOLES], splits[TRAIN])
    for part in splits.values():
        part.writer.flush()
        part.counts["windows"] = part.writer.num_windows
        part.counts["tokens"] = part.writer.num_tokens
    return {name: part.counts for name, part in splits.items()}


def hash_examples(paths: Sequence[str], config: ExamplesConfig) -> dict[str, str]:
    """What the files hold that examples are made of, by role."""
    hashes = {"dialogues": hash_dialogues(paths)}
    return hashes | ({"fim": hash_sources(config.fim.sources)} if config.fim.share else {})


def write_examples(
    directory: Path,
    paths: Sequence[str],
    *,
    tokenizer: Tokenizer,
    config: ExamplesConfig,
    seed: int,
    inputs: Mapping[str, str],
) -> Path:
    """Write the windows of both splits and the tokenizer with its chat template; returns `directory`.

    A stage of its own: what is finished there is left as it is. `inputs` is what `hash_examples` says.
    """
    template = CHAT_TEMPLATES[config.template]
    tokenizer.require_id(template.end)
    with open_stage(
        directory,
        command=COMMAND,
        config=asdict(config) | {"seed": seed},
        inputs=inputs,
    ) as stage:
        if stage.is_finished:
            return stage.directory
        encoder = _Encoder(tokenizer=tokenizer, config=config, dropped=Counter())
        counts = _write_splits(stage, paths, encoder, seed=seed)
        if not counts[TRAIN]["windows"]:
            raise ValueError(
                f"sft: the dialogues must hold one to learn from, got none; dropped {dict(encoder.dropped)}"
            )
        eos_token = EOT if template.end == "eot" else None
        tokenizer.save(stage.directory / TOKENIZER, chat_template=template.jinja, eos_token=eos_token)
        stage.finish(
            counts={f"{name}_{key}": n for name, c in counts.items() for key, n in sorted(c.items())},
            dropped=encoder.dropped,
            facts={"window": config.window, "vocab_size": tokenizer.vocab_size},
        )
        _report(counts, encoder.dropped)
        return stage.directory


def _report(counts: dict[str, Counter[str]], dropped: Counter[str]) -> None:
    for name, c in counts.items():
        _LOG.info(
            "%s: %d dialogues and %d holes, %d tokens in %d windows, %d of them learnt",
            *(name, c["dialogues"], c["fim_psm"] + c["fim_spm"], c["tokens"], c["windows"]),
            c["learnt_tokens"],
        )
    for reason, number in sorted(dropped.items()):
        _LOG.info("dropped: %d %s", number, reason)
