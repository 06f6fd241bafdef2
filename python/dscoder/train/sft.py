"""The stage `dscoder sft`: a base model learns to answer, from dialogues and holes.

The examples are written below the run directory first, as a stage of their own; from there on it is training
on packed windows, with a loss on what is answered alone.
"""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from dscoder.checkpoint import check_replaceable, load_config, load_pretrained, save_pretrained
from dscoder.checkpoint.adapter import ADAPTER_WEIGHTS, check_adapter_replaceable, lora_parts, save_adapter
from dscoder.config import ModelConfig
from dscoder.config.lora import LoraConfig
from dscoder.config.sft import SftConfig
from dscoder.data.examples import hash_examples, write_examples
from dscoder.data.prepare import HELD_OUT, TOKENIZER, TRAIN
from dscoder.data.shards import Windows
from dscoder.models import Transformer
from dscoder.models.lora import add_lora, merge_lora
from dscoder.runtime.device import resolve_device
from dscoder.text.tokenizer import Tokenizer
from dscoder.train.memory import require_memory
from dscoder.train.report import OnMetrics
from dscoder.train.run import MODEL, Job, hash_model, run_stage
from dscoder.train.schedule import steps_for_tokens
from dscoder.train.windows import WindowSteps, answer_loss

EXAMPLES = "examples"
ADAPTER = "adapter"
# Besides those of every run: the inputs are compared by what they hold.
_FREE = ("dialogues", "init_from")


def _checked(config: SftConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The config of the model to start from, once it goes with the tokenizer and the windows."""
    model = load_config(config.init_from)
    if tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"sft: the tokenizer of {config.init_from} must have at most {model.vocab_size} ids, the model's "
            f"vocab_size, got {tokenizer.vocab_size}"
        )
    if config.examples.window > model.max_positions:
        raise ValueError(
            f"sft: examples.window must be <= {model.max_positions}, the model's max_positions, "
            f"got {config.examples.window}"
        )
    return model


def _job(config: SftConfig, directory: Path, *, inputs: Mapping[str, str]) -> Job:
    """The run's windows, model and plan, once everything is known to go together."""
    check_replaceable(directory / MODEL, overwrite=True)
    check_adapter_replaceable(directory / ADAPTER)
    source = Path(config.init_from).expanduser()
    tokenizer = Tokenizer.load(source if source.exists() else config.init_from)
    target = _checked(config, tokenizer)
    device = resolve_device(config.device)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    num_adapters = None if config.lora is None else _num_adapters(target, config.lora)
    require_memory(target, dtype=dtype, device=device, num_adapters=num_adapters)
    data = _write_examples(config, directory / EXAMPLES, tokenizer, inputs)
    # The template's end token ends an answer, and so it becomes the model's eos.
    chat_tokenizer = Tokenizer.load(data / TOKENIZER / "tokenizer.json")
    target = replace(target, bos_id=chat_tokenizer.require_id("bos"), eos_id=chat_tokenizer.require_id("eos"))
    model = load_pretrained(config.init_from, config=target, dtype=dtype, device=device).train()
    if config.lora is not None:
        add_lora(model, lora_parts(target, config.lora.targets), config.lora, seed=config.seed)
    return _window_job(config, model, data)


def _write_examples(
    config: SftConfig, directory: Path, tokenizer: Tokenizer, inputs: Mapping[str, str]
) -> Path:
    try:
        return write_examples(
            directory,
            config.dialogues,
            tokenizer=tokenizer,
            config=config.examples,
            seed=config.seed,
            inputs=inputs,
        )
    except ValueError:
        # Files that cannot be used bind nobody: the run directory stays free for corrected ones.
        shutil.rmtree(directory, ignore_errors=True)
        raise


def _num_adapters(target: ModelConfig, config: LoraConfig) -> int:
    """Parameters of the adapters that the model will have."""
    shapes = Transformer(target, device="meta")
    add_lora(shapes, lora_parts(target, config.targets), config, seed=0)
    return sum(parameter.numel() for parameter in shapes.parameters() if parameter.requires_grad)


def _export(config: SftConfig, model: Transformer, data: Path, out: Path) -> None:
    """The adapters, if there are any, and the model that the next stages read, with them merged."""
    if config.lora is not None:
        save_adapter(model, out / ADAPTER, base=config.init_from)
        merge_lora(model)
    save_pretrained(model, out / MODEL, tokenizer=data / TOKENIZER, overwrite=True)


def _num_steps(config: SftConfig, windows: Windows) -> int:
    if config.num_steps is not None:
        return config.num_steps
    num_tokens = round(config.epochs * len(windows) * windows.window)
    return max(1, steps_for_tokens(config.batch, num_tokens=num_tokens, window=windows.window))


def _window_job(config: SftConfig, model: Transformer, data: Path) -> Job:
    vocab_size = model.config.vocab_size
    windows = Windows(data / TRAIN, vocab_size=vocab_size)
    num_steps = _num_steps(config, windows)
    steps = WindowSteps(
        model,
        windows,
        num_steps=num_steps,
        batch=config.batch,
        schedule=config.schedule,
        seed=config.seed,
    )
    has_held_out = (data / HELD_OUT).is_dir()
    held_out = Windows(data / HELD_OUT, vocab_size=vocab_size) if has_held_out else None

    def evaluate() -> dict[str, float]:
        assert held_out is not None
        return {"held_out_loss": answer_loss(model, held_out, max_windows=config.report.eval_windows)}

    return Job(
        model=model,
        num_steps=num_steps,
        learning_rate=steps.learning_rate,
        train_step=steps.train_step,
        export=lambda out: _export(config, model, data, out),
        results=(MODEL,) if config.lora is None else (MODEL, f"{ADAPTER}/{ADAPTER_WEIGHTS}"),
        evaluate=evaluate if has_held_out else None,
    )


def run(config: SftConfig, *, on_metrics: OnMetrics | None = None) -> Path:
    """Train, or go on training, and leave the model in `config.out`/model; returns `config.out`.

    Raises what `run_stage` does; ValueError too if the files hold nothing to learn from.
    """
    inputs = hash_examples(config.dialogues, config.examples)
    return run_stage(
        config,
        lambda directory: _job(config, directory, inputs=inputs),
        command="sft",
        inputs=inputs | {"init_from": hash_model(config.init_from)},
        free=_FREE,
        on_metrics=on_metrics,
    )
