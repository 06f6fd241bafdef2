"""The stage `dscoder pretrain`: packed windows become a model.

Every step is a function of the weights, the optimizer's moments and the step number, from which batch size,
learning rate and the windows read follow. So a run that goes on from a checkpoint does what the run that
was never stopped does, bit for bit, on the same number of threads.
"""

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import yaml
from torch import Tensor

from dscoder.checkpoint import check_replaceable, load_config, load_pretrained, save_pretrained
from dscoder.config import ModelConfig
from dscoder.config.train import PretrainConfig
from dscoder.data.loader import Batch, shuffled_batch
from dscoder.data.prepare import TOKENIZER, TRAIN
from dscoder.data.shards import Windows
from dscoder.models import Transformer, init_weights, materialise
from dscoder.runtime.artifact import Stage, hash_path, open_stage, read_manifest, write_bytes
from dscoder.runtime.device import resolve_device
from dscoder.runtime.log import get_logger
from dscoder.runtime.seed import available_threads, deterministic, random_state, restore_random_state
from dscoder.text.tokenizer import Tokenizer
from dscoder.train.checkpointing import CheckpointWriter, Progress, completed, load_state, read_progress
from dscoder.train.long_context import stretched
from dscoder.train.loop import train_step
from dscoder.train.memory import require_memory
from dscoder.train.metrics import METRICS, read_metrics
from dscoder.train.optimizer import MasterAdamW
from dscoder.train.report import OnMetrics, RunReport
from dscoder.train.schedule import learning_rate, plan_batches

MODEL = "model"
CHECKPOINTS = "checkpoints"
CONFIG = "config.yaml"
# What may differ from one start of a run to the next: places (the inputs are compared by what they hold, and
# with the data its window), and reports.
_FREE = ("data", "out", "init_from", "window", "num_threads", "checkpoint", "report", "overwrite")
_LOG = get_logger(__name__)

Evaluate = Callable[[Transformer], Mapping[str, float]]


class StoppedError(RuntimeError):
    """A signal ended the run after a checkpoint; starting it again goes on from there."""

    def __init__(self, signal_number: int, *, step: int, directory: Path) -> None:
        """Say what happened and what to do."""
        name = signal.Signals(signal_number).name
        super().__init__(
            f"stopped by {name} after step {step}; a checkpoint is in {directory}, "
            "and the same command goes on from there"
        )
        self.signal_number = signal_number


@dataclass(kw_only=True, slots=True)
class _StopRequest:
    signal_number: int | None = None


@contextmanager
def _stop_on_signals() -> Iterator[_StopRequest]:
    """SIGINT and SIGTERM ask for a stop at the end of the step; a second one acts as it always does."""
    request = _StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # only the main thread may handle signals
        return

    def ask(number: int, _frame: FrameType | None) -> None:
        request.signal_number = number
        signal.signal(number, previous[number])
        _LOG.warning("%s: stopping after this step and a checkpoint", signal.Signals(number).name)

    previous: dict[int, Any] = {n: signal.signal(n, ask) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


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


def _input_hashes(config: PretrainConfig) -> dict[str, str]:
    """What the inputs hold; a model of the hub goes by its id."""
    hashes = {"data": hash_path(Path(config.data))}
    if config.init_from is not None:
        path = Path(config.init_from).expanduser()
        hashes["init_from"] = hash_path(path) if path.exists() else config.init_from
    return hashes


class _Run:
    """A run under way: the model, its optimizer, the plan, and how far it is."""

    def __init__(
        self, config: PretrainConfig, directory: Path, *, windows: Windows, facts: Mapping[str, Any]
    ) -> None:
        self.config = config
        self.windows = windows
        self.directory = directory
        self.consumed = plan_batches(config.batch, num_steps=config.num_steps, window=windows.window)
        self.model = _initial_model(config, _model_config(config, windows, facts))
        self.optimizer = MasterAdamW(self.model, config.optimizer)
        self.step = 0  # steps done
        self.waiting: Mapping[str, float] = {}  # of the report that the last checkpoint fell into

    def state(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint."""
        return self.optimizer.state() | {f"random.{k}": v for k, v in random_state().items()}

    def restore(self) -> None:
        """Go on from the latest checkpoint, if there is one."""
        found = completed(self.directory / CHECKPOINTS)
        if not found:
            return
        _, path = found[-1]
        state = self.state()
        load_state(path, state)
        self.optimizer.refresh_parameters()
        random = {name.removeprefix("random."): t for name, t in state.items() if name.startswith("random.")}
        restore_random_state(random)
        progress = read_progress(path)
        self.step, self.waiting = progress.step, progress.waiting
        _LOG.info("going on from %s", path)

    def progress(self) -> Progress:
        """How far the run is."""
        num_sequences = int(self.consumed[self.step])
        return Progress(
            step=self.step,
            num_sequences=num_sequences,
            num_tokens=num_sequences * self.windows.window,
            num_threads=torch.get_num_threads(),
        )

    def next_batches(self) -> list[Batch]:
        """The micro-batches of the next step."""
        begin, end = int(self.consumed[self.step]), int(self.consumed[self.step + 1])
        micro = self.config.batch.micro
        return [
            shuffled_batch(self.windows, position=start, count=min(micro, end - start), seed=self.config.seed)
            for start in range(begin, end, micro)
        ]


def _train(
    run: _Run, writer: CheckpointWriter, report: RunReport, evaluate: Evaluate | None, stop: _StopRequest
) -> None:
    """All steps that are left."""
    config = run.config
    while run.step < config.num_steps:
        lr = learning_rate(config.schedule, step=run.step, consumed=run.consumed)
        batches = run.next_batches()
        stats = train_step(run.model, run.optimizer, batches, lr=lr, step=run.step)
        run.step += 1
        progress = run.progress()
        report.step_done(
            stats,
            step=run.step,
            lr=lr,
            num_tokens=sum(batch.tokens_BS.numel() for batch in batches),
            total_tokens=progress.num_tokens,
        )
        writer.raise_if_failed()
        paused = report.pause()
        is_last = run.step == config.num_steps
        if evaluate is not None and (is_last or run.step % config.report.eval_every == 0):
            report.evaluated(evaluate(run.model), step=run.step, total_tokens=progress.num_tokens)
        if is_last or stop.signal_number is not None or run.step % config.checkpoint.every == 0:
            writer.save(replace(progress, waiting=report.waiting()), run.state())
        report.resume(paused)
        if stop.signal_number is not None and not is_last:
            writer.wait()
            raise StoppedError(stop.signal_number, step=run.step, directory=writer.directory)


def _num_threads(config: PretrainConfig, directory: Path) -> int:
    """What the run began with, else what the config says, else every core."""
    found = completed(directory / CHECKPOINTS)
    if not found:
        return config.num_threads or available_threads()
    earlier = read_progress(found[-1][1]).num_threads
    if config.num_threads not in (None, earlier):
        raise ValueError(
            f"pretrain: num_threads must be {earlier}, what the run in {directory} began with, "
            f"got {config.num_threads}"
        )
    return earlier


def _finish(run: _Run, stage: Stage, report: RunReport) -> None:
    """Write the model in the published layout, then the manifest."""
    report.draw()
    save_pretrained(
        run.model, stage.directory / MODEL, tokenizer=Path(run.config.data) / TOKENIZER, overwrite=True
    )
    last: dict[str, float] = {}
    for line in read_metrics(stage.directory / METRICS):
        last |= line
    progress = run.progress()
    stage.finish(
        counts={"steps": progress.step, "sequences": progress.num_sequences, "tokens": progress.num_tokens},
        facts={"num_threads": progress.num_threads, "final": last},
        results=(MODEL,),
    )


def run(
    config: PretrainConfig, *, evaluate: Evaluate | None = None, on_metrics: OnMetrics | None = None
) -> Path:
    """Train, or go on training, and leave the model in `config.out`/model; returns `config.out`.

    Args:
        evaluate: called with the model every `report.eval_every` steps and at the end, for figures to report.
        on_metrics: called with every report, after it is written.

    Raises:
        StoppedError: SIGINT or SIGTERM; a checkpoint was written.
        LossError: the loss is not a number.
        ValueError: config, data and model do not go together, or `config.out` holds another run.
        OSError: a checkpoint could not be written.
    """
    data = Path(config.data)
    facts = read_manifest(data, command="prepare")["facts"]
    windows = Windows(data / TRAIN, vocab_size=facts["vocab_size"])
    _check_window(config, windows)
    with open_stage(
        Path(config.out),
        command="pretrain",
        config=asdict(config),
        inputs=_input_hashes(config),
        free=_FREE,
        overwrite=config.overwrite,
        is_resumable=True,
    ) as stage:
        if stage.is_finished:
            _LOG.info("%s is finished already", stage.directory)
            return stage.directory
        num_threads = _num_threads(config, stage.directory)
        with deterministic(seed=config.seed, num_threads=num_threads):
            _run_stage(config, stage, windows, facts, evaluate, on_metrics)
        return stage.directory


def _run_stage(
    config: PretrainConfig,
    stage: Stage,
    windows: Windows,
    facts: Mapping[str, Any],
    evaluate: Evaluate | None,
    on_metrics: OnMetrics | None,
) -> None:
    _check_export(stage.directory / MODEL, Path(config.data) / TOKENIZER, facts)
    run = _Run(config, stage.directory, windows=windows, facts=facts)
    run.restore()
    # Without overwrite: this file is there to go on with the run, not to begin it again.
    resolved = {key: value for key, value in asdict(config).items() if key != "overwrite"}
    write_bytes(stage.directory / CONFIG, yaml.safe_dump(resolved, sort_keys=False).encode())
    _LOG.info("%d windows of %d tokens, %d threads", *(len(windows), windows.window, torch.get_num_threads()))
    if config.schedule.warmup_steps >= config.num_steps:
        _LOG.warning(
            "the rate never reaches its maximum: the warm-up takes %d steps, the run %d",
            *(config.schedule.warmup_steps, config.num_steps),
        )
    with (
        closing(CheckpointWriter(stage.directory / CHECKPOINTS, keep=config.checkpoint.keep)) as writer,
        RunReport(
            stage.directory,
            config.report,
            num_steps=config.num_steps,
            resume_step=run.step,
            waiting=run.waiting,
            on_metrics=on_metrics,
        ) as report,
        _stop_on_signals() as stop,
    ):
        _train(run, writer, report, evaluate, stop)
        writer.wait()
        _finish(run, stage, report)
