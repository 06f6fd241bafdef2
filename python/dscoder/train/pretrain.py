"""The stage `dscoder pretrain`: packed windows become a model.

Which windows a step reads, its batch size and its learning rate follow from its number alone (train/run.py).
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dscoder.checkpoint import check_replaceable, load_config, load_pretrained, save_pretrained
from dscoder.config import ModelConfig
from dscoder.config.parallel import ParallelConfig, check_experts_divide
from dscoder.config.train import PretrainConfig
from dscoder.data.prepare import TOKENIZER, TRAIN
from dscoder.data.shards import Windows
from dscoder.models import Transformer, init_weights, materialise
from dscoder.models.compiled import compile_dense
from dscoder.models.transformer import Layer
from dscoder.ops import ExpertParallel
from dscoder.runtime.artifact import hash_path, read_manifest
from dscoder.runtime.device import resolve_device
from dscoder.runtime.log import get_logger
from dscoder.runtime.mesh import launched_ranks, open_mesh
from dscoder.text.tokenizer import Tokenizer
from dscoder.train.long_context import stretched
from dscoder.train.memory import require_memory
from dscoder.train.ranks import Ranks
from dscoder.train.report import OnMetrics
from dscoder.train.run import MODEL, Job, StoppedError, hash_model, run_stage
from dscoder.train.spread import spread_model
from dscoder.train.stopwatch import Stopwatch
from dscoder.train.windows import WindowSteps, check_micro

# Besides those of every run: the inputs are compared by what they hold, and with the data its window.
# How the run is spread over ranks may change with every start, and what is profiled.
_FREE = ("data", "init_from", "window", "parallel", "profile")
_LOG = get_logger(__name__)

Evaluate = Callable[[Transformer], Mapping[str, float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Data:
    """A directory of `dscoder prepare`."""

    windows: Windows  # to train on
    facts: Mapping[str, Any]


def _open_data(config: PretrainConfig) -> _Data:
    data = Path(config.data)
    facts = read_manifest(data, command="prepare")["facts"]
    windows = Windows(data / TRAIN, vocab_size=facts["vocab_size"])
    _check_window(config, windows)
    return _Data(windows=windows, facts=facts)


def _hash_inputs(config: PretrainConfig) -> dict[str, str]:
    inputs = {"data": hash_path(Path(config.data))}
    if config.init_from is not None:
        inputs["init_from"] = hash_model(config.init_from)
    return inputs


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


def _whole_model(config: PretrainConfig, target: ModelConfig, dtype: torch.dtype) -> Transformer:
    """The model `target` of a process alone, with initial weights or those of `init_from`."""
    device = resolve_device(config.device)
    has_masters = config.precision != "bf16_stochastic"
    require_memory(target, dtype=dtype, device=device, has_masters=has_masters)
    if config.init_from is not None:
        return load_pretrained(config.init_from, config=target, dtype=dtype, device=device).train()
    model = Transformer(target, device="meta")
    materialise(model, dtype=dtype, device=device)
    init_weights(model, seed=config.seed)
    return model.train()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Built:
    """A model that can be trained: the whole of it, or this rank's part."""

    model: Transformer
    export: Callable[..., None]  # directory, tokenizer
    exchange: ExpertParallel | None = None


def _build(
    config: PretrainConfig, target: ModelConfig, ranks: Ranks, *, max_tokens: int, dtype: torch.dtype
) -> _Built:
    if ranks.mesh is None:
        model = _whole_model(config, target, dtype)
        built = _Built(model=model, export=functools.partial(save_pretrained, model, overwrite=True))
    else:
        spread = spread_model(config, target, ranks, max_tokens=max_tokens)
        built = _Built(model=spread.model, export=spread.save, exchange=spread.exchange)
    for layer in built.model.layers:
        assert isinstance(layer, Layer)
        layer.recompute = config.parallel.recompute
    if config.parallel.compile == "dense":
        compile_dense(built.model)
    return built


def _layout_line(
    config: PretrainConfig, ranks: Ranks, device: torch.device, exchange: ExpertParallel | None
) -> str:
    """How the run is laid out, as its log says once."""
    words = [f"{ranks.size} {'rank' if ranks.size == 1 else 'ranks'} on {device.type}"]
    if ranks.mesh is not None:
        words.append(" x ".join(f"{name} {size}" for name, size in ranks.layout().items()))
        words.append(f"backend {dist.get_backend()}")
    if exchange is not None:
        words.append(f"transport {exchange.transport}")
    num_micro = -(-config.batch.sequences // config.batch.micro)
    words.append(f"micro-batches a step {num_micro}, a rank {-(-num_micro // ranks.size)}")
    words += [f"precision {config.precision}", f"threads a rank {torch.get_num_threads()}"]
    return ", ".join(words)


def _job(
    config: PretrainConfig,
    directory: Path,
    data: _Data,
    *,
    evaluate: Evaluate | None,
    ranks: Ranks,
    held: ExitStack,
) -> Job:
    """The run's model and plan, once everything is known to go together; `held` gets what must be closed."""
    tokenizer = Path(config.data) / TOKENIZER
    windows = data.windows

    def check() -> ModelConfig:
        _check_export(directory / MODEL, tokenizer, data.facts)
        target = _model_config(config, windows, data.facts)
        check_experts_divide(target, config.parallel)  # a model of init_from is seen here first
        return target

    target = ranks.each(check)
    dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
    built = _build(config, target, ranks, max_tokens=config.batch.micro * windows.window, dtype=dtype)
    model, exchange = built.model, built.exchange
    if exchange is not None:
        held.callback(exchange.close)
    if ranks.is_first:
        _LOG.info("%s", _layout_line(config, ranks, model.embed.weight.device, exchange))
    steps = WindowSteps(
        model,
        windows,
        num_steps=config.num_steps,
        batch=config.batch,
        schedule=config.schedule,
        seed=config.seed,
        ranks=ranks,
        check=None if exchange is None else exchange.check,
    )
    return Job(
        model=model,
        num_steps=config.num_steps,
        learning_rate=steps.learning_rate,
        train_step=steps.train_step,
        export=lambda out: built.export(out / MODEL, tokenizer=tokenizer),
        evaluate=None if evaluate is None else functools.partial(evaluate, model),
        rounding_seed=config.seed if config.precision == "bf16_stochastic" else None,
        stopwatch=Stopwatch(
            model.embed.weight.device,
            dtype,
            ranks=ranks,
            read_exchange=None if exchange is None else exchange.statistics,
        ),
    )


@contextmanager
def open_ranks(config: PretrainConfig) -> Iterator[Ranks]:
    """The ranks that torchrun started, laid out as `config.parallel` says; without it one process alone.

    LostRankError, inside the block, where another rank is gone.
    """
    parallel = config.parallel
    if launched_ranks() == 1:
        _check_alone(parallel)
        yield Ranks()
        return
    stop: StoppedError | None = None
    with open_mesh(
        expert=parallel.expert,
        replicate=parallel.replicate,
        device=config.device,
        timeout=parallel.timeout,
    ) as mesh:
        try:
            yield Ranks(mesh, sums_each_batch=parallel.sums_each_batch)
        except StoppedError as asked:
            stop = asked  # by all ranks after the same step: to the mesh a good end, which they wait for
    if stop is not None:
        raise stop


def _check_alone(parallel: ParallelConfig) -> None:
    if (parallel.expert, parallel.replicate) != (1, 1):
        raise ValueError(
            "pretrain: parallel.expert and parallel.replicate must be 1 for one process, "
            f"got {parallel.expert} and {parallel.replicate}; start the command with torchrun "
            f"on a multiple of {parallel.expert * parallel.replicate} ranks"
        )


def _check_layout(config: PretrainConfig, ranks: Ranks) -> None:
    there, wanted = ranks.layout(), config.parallel
    if (there["expert"], there["replicate"]) != (wanted.expert, wanted.replicate):
        raise ValueError(
            f"pretrain: ranks must be laid out with parallel.expert = {wanted.expert} and parallel.replicate "
            f"= {wanted.replicate}, got {there['expert']} and {there['replicate']}"
        )


def run(
    config: PretrainConfig,
    *,
    evaluate: Evaluate | None = None,
    on_metrics: OnMetrics | None = None,
    ranks: Ranks | None = None,
) -> Path:
    """Train, or go on training, and leave the model in `config.out`/model; returns `config.out`.

    Args:
        evaluate: called with the model every `report.eval_every` steps and at the end, for figures to report;
            on all ranks, which must exchange the same.
        on_metrics: called with every report, after it is written, on rank 0.
        ranks: from `open_ranks`; all of them call this with the same arguments. None: this process is alone.

    Raises what `run_stage` does.
    """
    ranks = ranks or Ranks()
    _check_layout(config, ranks)

    def open_data() -> _Data:
        check_micro(config.batch, ranks.size)
        return _open_data(config)

    data = ranks.each(open_data)
    held = ExitStack()
    try:
        out = run_stage(
            config,
            lambda directory: _job(config, directory, data, evaluate=evaluate, ranks=ranks, held=held),
            command="pretrain",
            inputs=ranks.first(lambda: _hash_inputs(config)),
            free=_FREE,
            on_metrics=on_metrics,
            profile=config.profile,
            ranks=ranks,
        )
    except StoppedError:
        held.close()
        raise
    # Not after other errors: closing is done by all ranks, and some may be gone.
    held.close()
    return out
