"""The demo: every number of a run that shows a model learning within minutes on two cores.

A tiny DeepSeek-Coder-V2 with all its parts (latent attention, routed and shared experts, a dense first
layer, FIM at rate 0.5), trained on the standard library of the running Python. Where it leaves the papers, it
is for its size: init std 0.05 and a learning rate of a few thousandths (the papers' 0.006 and 4e-4 are for
widths from 2048), one cosine, small batches, sections of files short enough for the window, and holes in
suffix-prefix-middle order, where the text before a hole stands right before what fills it. docs/demo.md says
how far its figures can be trusted.
"""

from dataclasses import dataclass, field
from pathlib import Path

from dscoder.config.data import PrepareConfig, SourcesConfig, TokenizerConfig
from dscoder.config.evaluate import HeldOutConfig
from dscoder.config.model import BalanceConfig, MlaConfig, ModelConfig, MoeConfig
from dscoder.config.text import FimConfig
from dscoder.config.train import (
    BatchConfig,
    CheckpointConfig,
    PretrainConfig,
    ReportConfig,
    ScheduleConfig,
)

_VOCAB_SIZE = 2048
_WINDOW = 256

_MODEL = ModelConfig(
    vocab_size=_VOCAB_SIZE,
    width=128,
    num_layers=3,
    mlp_width=352,
    attention=MlaConfig(
        num_heads=4, q_lora_rank=None, kv_lora_rank=48, nope_dim=16, rope_dim=16, value_dim=32
    ),
    moe=MoeConfig(
        num_experts=8,
        num_shared_experts=1,
        num_topk=2,
        expert_width=64,
        balance=BalanceConfig(expert=0.001),
    ),
    max_positions=_WINDOW,
    init_std=0.05,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    """The four stages of the demo; what they share is said once."""

    out: str = "runs/demo"  # each stage has a directory in it
    sources: SourcesConfig = field(
        default_factory=lambda: SourcesConfig(
            held_out_share=0.05,
            excluded=("pydoc_data/*", "html/entities.py"),  # tables, not code
        )
    )
    section_bytes: int = 600  # about two hundred and forty tokens
    model: ModelConfig = _MODEL
    num_steps: int = 2000
    batch: BatchConfig = field(default_factory=lambda: BatchConfig(sequences=8, micro=8))
    schedule: ScheduleConfig = field(
        default_factory=lambda: ScheduleConfig(kind="cosine", max_lr=6e-3, warmup_steps=50, final_share=0.05)
    )
    spm_share: float = 1.0  # of the rearranged documents
    num_holes: int = 300
    num_shown: int = 3  # completions shown in context: the first of the holes
    seed: int = 0
    overwrite: bool = False

    def directory(self, stage: str) -> str:
        """Where a stage leaves its results."""
        return str(Path(self.out) / stage)

    def tokenizer(self) -> TokenizerConfig:
        """A vocabulary of the size of the model's."""
        return TokenizerConfig(
            out=self.directory("tokenizer"),
            sources=self.sources,
            vocab_size=self.model.vocab_size,
            overwrite=self.overwrite,
        )

    def prepare(self) -> PrepareConfig:
        """Windows as long as the model's context."""
        return PrepareConfig(
            out=self.directory("data"),
            tokenizer=self.directory("tokenizer"),
            sources=self.sources,
            fim=FimConfig(rate=0.5, spm_share=self.spm_share),
            window=self.model.max_positions,
            section_bytes=self.section_bytes,
            seed=self.seed,
            overwrite=self.overwrite,
        )

    def pretrain(self) -> PretrainConfig:
        """The training run."""
        return PretrainConfig(
            data=self.directory("data"),
            out=self.directory("pretrain"),
            model=self.model,
            num_steps=self.num_steps,
            batch=self.batch,
            schedule=self.schedule,
            device="cpu",
            seed=self.seed,
            checkpoint=CheckpointConfig(every=200, keep=1),
            report=ReportConfig(log_every=20, eval_every=400, eval_windows=64),
            overwrite=self.overwrite,
        )

    def held_out(self) -> HeldOutConfig:
        """The trained model and its own initial weights on the same files."""
        return HeldOutConfig(
            out=self.directory("held_out"),
            model=self.directory("pretrain/model"),
            data=self.directory("data"),
            sources=self.sources,
            untrained_seed=self.seed,
            num_holes=self.num_holes,
            fim_order="spm" if self.spm_share > 0.5 else "psm",
            overwrite=self.overwrite,
        )
