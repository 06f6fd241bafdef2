"""The stage `dscoder pretrain`: packed windows become a model.

Which windows a step reads, its batch size and its learning rate follow from its number alone (train/run.py).
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dscoder.checkpoint import check_replaceable, load_config, load_pretrained, save_pretrained
from dscoder.config import ModelConfig
from dscoder.config.train import PretrainConfig
from dscoder.data.prepare import TOKENIZER, TRAIN
from dscoder.data.shards import Windows
from dscoder.models import Transformer, init_weights, materialise
from dscoder.runtime.artifact import hash_path, read_manifest
from dscoder.runtime.device import resolve_device
from dscoder.text.tokenizer import Tokenizer
from dscoder.train.long_context import stretched
from dscoder.train.memory import require_memory
from dscoder.train.report import OnMetrics
from dscoder.train.run import MODEL, Job, hash_model, run_stage
from dscoder.train.windows import WindowSteps

# Besides those of every run: the inputs are compared by what they hold, and with the data its window.
_FREE = ("data", "init_from", "window")

Evaluate = Callable[[Transformer], Mapping[str, float]]


def _check_window(config: PretrainConfig, windows: Windows) -> None:
    if config.window not in (None, windows.window):
        raise ValueError(
            f"pretrain: the windows of {config.data} must have {config.window} tokens, which the recipe's "
            f"batch and number of steps are meant for, got {windows.window}; prepare them so, or set window "
            f"to {windows.window} to train on these all the same"
        )


def _check(model: ModelConfig, windows: Windows, facts: Mapping[str, int]) -> None:
    if facts["vocab_size"] > model.vocab_size:
        raise ValueError(
            f"pretrain: model.vocab_size must be >= {facts['vocab_size']}, the tokenizer's, "
            f"got {model.vocab_size}"
        )
    if windows.window > model.max_positions:
        raise ValueError(
            f"pretrain: the window of the data must be <= {model.max_positions}, the model's max_positions, "
            f"got {windows.window}"
        )


def _check_export(directory: Path, tokenizer: Path, facts: Mapping[str, int]) -> None:
    """What would end the run after its last step, when the model is written."""
    check_replaceable(directory, overwrite=True)
    if not tokenizer.is_dir():
        raise ValueError(f"pretrain: the data must hold a tokenizer, got none at {tokenizer}")
    # The file by its name: a directory without one would be taken for a repository of the hub.
    vocab_size = Tokenizer.load(tokenizer / "tokenizer.json").vocab_size
    if vocab_size != facts["vocab_size"]:
        raise ValueError(
            f"pretrain: {tokenizer} must have {facts['vocab_size']} ids, those of the data, got {vocab_size}"
        )


def _model_config(config: PretrainConfig, windows: Windows, facts: Mapping[str, Any]) -> ModelConfig:
    """The fresh model or the one of `init_from`, with the run's positions and the tokenizer's special ids."""
    model = config.model
    if model is None:
        assert config.init_from is not None
        model = load_config(config.init_from)
    if config.stage == "long_context":
        model = stretched(model, config.long_context)
    _check(model, windows, facts)
    bos_id = model.bos_id if facts["bos_id"] is None else facts["bos_id"]
    return replace(model, bos_id=bos_id, eos_id=facts["eos_id"])


def _initial_model(config: PretrainConfig, target: ModelConfig) -> Transformer:
    """The model `target` with initial weights or those of `init_from`."""
    device = resolve_device(config.device)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    require_memory(target, dtype=dtype, device=device)
    if config.init_from is not None:
        return load_pretrained(config.init_from, config=target, dtype=dtype, device=device).train()
    model = Transformer(target, device="meta")
    materialise(model, dtype=dtype, device=device)
    init_weights(model, seed=config.seed)
    return model.train()


def _job(
    config: PretrainConfig,
    directory: Path,
    *,
    windows: Windows,
    facts: Mapping[str, Any],
    evaluate: Evaluate | None,
) -> Job:
    """The run's model and plan, once everything is known to go together."""
    tokenizer = Path(config.data) / TOKENIZER
    _check_export(directory / MODEL, tokenizer, facts)
    model = _initial_model(config, _model_config(config, windows, facts))
    steps = WindowSteps(
        model,
        windows,
        num_steps=config.num_steps,
        batch=config.batch,
        schedule=config.schedule,
        seed=config.seed,
    )
    return Job(
        model=model,
        num_steps=config.num_steps,
        learning_rate=steps.learning_rate,
        train_step=steps.train_step,
        export=lambda out: save_pretrained(model, out / MODEL, tokenizer=tokenizer, overwrite=True),
        evaluate=None if evaluate is None else functools.partial(evaluate, model),
    )


def run(
    config: PretrainConfig, *, evaluate: Evaluate | None = None, on_metrics: OnMetrics | None = None
) -> Path:
    """Train, or go on training, and leave the model in `config.out`/model; returns `config.out`.

    Args:
        evaluate: called with the model every `report.eval_every` steps and at the end, for figures to report.
        on_metrics: called with every report, after it is written.

    Raises what `run_stage` does.
    """
    data = Path(config.data)
    facts = read_manifest(data, command="prepare")["facts"]
    windows = Windows(data / TRAIN, vocab_size=facts["vocab_size"])
    _check_window(config, windows)
    inputs = {"data": hash_path(data)}
    if config.init_from is not None:
        inputs["init_from"] = hash_model(config.init_from)
    return run_stage(
        config,
        lambda directory: _job(config, directory, windows=windows, facts=facts, evaluate=evaluate),
        command="pretrain",
        inputs=inputs,
        free=_FREE,
        on_metrics=on_metrics,
    )
