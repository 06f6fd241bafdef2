"""A model and windows small enough to train within a test."""

import sysconfig
from dataclasses import replace
from pathlib import Path

from dscoder.config import BalanceConfig, MlaConfig, ModelConfig, MoeConfig
from dscoder.config.data import PrepareConfig, SourcesConfig, TokenizerConfig
from dscoder.config.train import (
    BatchConfig,
    CheckpointConfig,
    PretrainConfig,
    ReportConfig,
    ScheduleConfig,
)
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


def config_for(windows: Path, out: Path, **fields: object) -> PretrainConfig:
    """Eight steps on those windows, with other `fields` where given."""
    config = PretrainConfig(
        data=str(windows),
        out=str(out),
        model=TINY_MOE,
        num_steps=8,
        batch=BatchConfig(sequences=4, micro=2),
        schedule=ScheduleConfig(kind="cosine", max_lr=3e-3, warmup_steps=2),
        checkpoint=CheckpointConfig(every=3),
        report=ReportConfig(log_every=2, eval_every=4, tensorboard="off", plot="off"),
        num_threads=1,
    )
    return replace(config, **fields)  # type: ignore[arg-type]
