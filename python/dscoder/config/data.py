"""What `dscoder tokenizer` and `dscoder prepare` do."""

from dataclasses import dataclass, field
from typing import Literal

from dscoder.config.text import FimConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class SourcesConfig:
    """Where documents come from and which of them are held out."""

    paths: tuple[str, ...] = ("stdlib",)  # directories, .jsonl or .jsonl.gz files, or "stdlib"
    extensions: tuple[str, ...] = (".py",)  # of the files taken from directories
    excluded: tuple[str, ...] = ()  # patterns (* and ?) of paths below a directory that are not read
    text_field: str = "text"  # of a JSONL line
    max_bytes: int = 1_000_000  # a larger document is dropped
    held_out_share: float = 0.02  # of the documents, chosen by a hash of their content

    def __post_init__(self) -> None:
        if not self.paths:
            raise ValueError("SourcesConfig: paths must name at least one source, got none")
        for extension in self.extensions:
            if not extension.startswith("."):
                raise ValueError(f"SourcesConfig: extensions must start with a dot, got {extension!r}")
        if self.max_bytes <= 0:
            raise ValueError(f"SourcesConfig: max_bytes must be positive, got {self.max_bytes}")
        if not 0.0 <= self.held_out_share < 1.0:
            raise ValueError(f"SourcesConfig: held_out_share must be in [0, 1), got {self.held_out_share}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerConfig:
    """Training a tokenizer on the documents that are not held out."""

    out: str  # the directory to write
    sources: SourcesConfig = field(default_factory=SourcesConfig)
    vocab_size: int = 4096  # special tokens included
    flavor: Literal["coder", "v2"] = "v2"  # whose pre-tokenizer and special tokens
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.vocab_size < 512:
            raise ValueError(
                f"TokenizerConfig: vocab_size must be >= 512 (256 bytes, the special tokens, some merges), "
                f"got {self.vocab_size}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareConfig:
    """From documents to packed windows of tokens."""

    out: str  # the directory to write
    tokenizer: str  # a directory with tokenizer.json, such a file, or a hub id
    sources: SourcesConfig = field(default_factory=SourcesConfig)
    fim: FimConfig = field(default_factory=FimConfig)  # held-out documents are never transformed
    window: int = 1024  # tokens a window
    section_bytes: int | None = None  # longer documents are first cut into sections of at most this size
    add_bos: bool = True  # before each document, as the published tokenizers put it before a prompt
    seed: int = 0
    pool_tokens: int = 2**27  # how many tokens are packed together, and so held in memory
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.window < 2:
            raise ValueError(f"PrepareConfig: window must be >= 2, got {self.window}")
        if self.section_bytes is not None and self.section_bytes < 1:
            raise ValueError(f"PrepareConfig: section_bytes must be >= 1, got {self.section_bytes}")
        if self.pool_tokens < self.window:
            raise ValueError(
                f"PrepareConfig: pool_tokens must be >= window ({self.window}), got {self.pool_tokens}"
            )
