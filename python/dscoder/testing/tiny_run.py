"""A model and windows small enough to train within a test."""

import sysconfig
from pathlib import Path

from dscoder.config import BalanceConfig, MlaConfig, ModelConfig, MoeConfig
from dscoder.config.data import PrepareConfig, SourcesConfig, TokenizerConfig
from dscoder.data import prepare, tokenizer

TINY_WINDOW = 64

TINY_MOE = ModelConfig(
    vocab_size=512,
    width=32,
    num_layers=2,
    mlp_width=64,
    attention=MlaConfig(num_heads=2, q_lora_rank=None, kv_lora_rank=16, nope_dim=8, rope_dim=8, value_dim=8),
    moe=MoeConfig(
        num_experts=4,
        num_shared_experts=1,
        num_topk=2,
        expert_width=16,
        balance=BalanceConfig(expert=0.001),
    ),
    max_positions=TINY_WINDOW,
)


def tiny_sources() -> SourcesConfig:
    """Two packages of the standard library, some of their files held out."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    paths = tuple(str(stdlib / name) for name in ("json", "logging"))
    return SourcesConfig(paths=paths, held_out_share=0.3)


def tiny_windows(directory: Path, *, window: int = TINY_WINDOW) -> Path:
    """A tokenizer and packed windows made from the tiny sources below `directory`; returns the windows'."""
    sources = tiny_sources()
    trained = tokenizer.run(
        TokenizerConfig(out=str(directory / "tokenizer"), sources=sources, vocab_size=512)
    )
    return prepare.run(
        PrepareConfig(
            out=str(directory / "windows"),
            tokenizer=str(trained),
            sources=sources,
            window=window,
            section_bytes=2 * window,
        )
    )
