"""A base model and dialogues small enough to fine-tune on within a test."""

import json
from dataclasses import replace
from pathlib import Path

from dscoder.checkpoint import save_pretrained
from dscoder.config import ModelConfig
from dscoder.config.sft import ExamplesConfig, SftConfig
from dscoder.config.train import BatchConfig, CheckpointConfig, ReportConfig, ScheduleConfig
from dscoder.models import Transformer, init_weights
from dscoder.testing.tiny_run import TINY_MOE
from dscoder.text.tokenizer import Tokenizer

SFT_WINDOW = 128
TINY_CHAT = replace(TINY_MOE, max_positions=SFT_WINDOW)


def tiny_base(directory: Path, *, config: ModelConfig = TINY_CHAT) -> Path:
    """A model with initial weights and its tokenizer, as `pretrain` leaves one; returns `directory`."""
    text = "User: What is 1 plus 2?\n\nAssistant: The sum is 3.\n" * 8
    tokenizer = Tokenizer.train([text], vocab_size=config.vocab_size)
    tokenizer.save(directory / "tokenizer")
    model = Transformer(
        replace(config, bos_id=tokenizer.require_id("bos"), eos_id=tokenizer.require_id("eos"))
    )
    init_weights(model, seed=0)
    save_pretrained(model, directory / "model", tokenizer=directory / "tokenizer")
    return directory / "model"


def tiny_dialogues(path: Path, *, count: int = 60) -> Path:
    """Questions with one word to learn in the answer; returns `path`, a .jsonl file."""
    records = (
        {"prompt": f"What is {i} plus {i % 7}?", "completion": f"The sum is {i + i % 7}."}
        for i in range(count)
    )
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def sft_config_for(base: Path, dialogues: Path, out: Path, **fields: object) -> SftConfig:
    """Eight steps on those dialogues, with other `fields` where given."""
    config = SftConfig(
        dialogues=(str(dialogues),),
        init_from=str(base),
        out=str(out),
        examples=ExamplesConfig(window=SFT_WINDOW, held_out_share=0.2),
        num_steps=8,
        batch=BatchConfig(sequences=4, micro=2),
        schedule=ScheduleConfig(kind="cosine", max_lr=3e-3, warmup_steps=2),
        checkpoint=CheckpointConfig(every=3),
        report=ReportConfig(log_every=1, eval_every=4, tensorboard="off", plot="off"),
        num_threads=1,
    )
    return replace(config, **fields)  # type: ignore[arg-type]
