"""The stage `dscoder tokenizer`: a vocabulary from the documents that are not held out."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from dscoder.config.data import SourcesConfig, TokenizerConfig
from dscoder.data.sources import hash_sources, is_held_out, read_documents
from dscoder.runtime.artifact import open_stage
from dscoder.runtime.log import get_logger
from dscoder.text.tokenizer import Tokenizer

_LOG = get_logger(__name__)


def _training_texts(config: SourcesConfig, *, counts: Counter[str], dropped: Counter[str]) -> Iterator[str]:
    for document in read_documents(config, dropped=dropped):
        if is_held_out(document, share=config.held_out_share):
            counts["held_out_documents"] += 1
            continue
        counts["documents"] += 1
        counts["bytes"] += len(document.text.encode())
        yield document.text


def run(config: TokenizerConfig) -> Path:
    """Train a tokenizer and write it to `config.out`; returns that directory."""
    with open_stage(
        Path(config.out),
        command="tokenizer",
        config=asdict(config),
        inputs={"sources": hash_sources(config.sources)},
        free=("out", "overwrite"),
        overwrite=config.overwrite,
    ) as stage:
        if stage.is_finished:
            _LOG.info("%s is finished already", stage.directory)
            return stage.directory
        counts: Counter[str] = Counter()
        dropped: Counter[str] = Counter()
        texts = _training_texts(config.sources, counts=counts, dropped=dropped)
        tokenizer = Tokenizer.train(texts, vocab_size=config.vocab_size, flavor=config.flavor)
        if not counts["documents"]:
            raise ValueError(
                f"tokenizer: the sources must hold a document, got none; dropped {dict(dropped)}"
            )
        if tokenizer.vocab_size < config.vocab_size:
            _LOG.warning(
                "the corpus gives %d tokens only, %d were asked for", tokenizer.vocab_size, config.vocab_size
            )
        tokenizer.save(stage.directory)
        stage.finish(counts={**counts, "vocab_size": tokenizer.vocab_size}, dropped=dropped)
        _LOG.info(
            "%s: %d tokens from %d documents", stage.directory, tokenizer.vocab_size, counts["documents"]
        )
        return stage.directory
