"""What the ranks of these tests do: runs of a tiny model, stopped, killed, and gone on with."""

import json
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dscoder.config.parallel import ParallelConfig
from dscoder.config.train import BatchConfig, CheckpointConfig, PretrainConfig, ReportConfig
from dscoder.eval.perplexity import held_out_report
from dscoder.models import Transformer
from dscoder.runtime.mesh import arrange, open_mesh
from dscoder.testing.tiny_run import config_for
from dscoder.train import pretrain
from dscoder.train.checkpointing import completed
from dscoder.train.ranks import Ranks
from dscoder.train.run import CHECKPOINTS, StoppedError

TIMEOUT = 60.0  # seconds; a mistake in a test ends with an error, not with the suite
COMPARED = ("step", "tokens", "loss", "balance", "balance_expert", "grad_norm", "held_out_loss")

Deed = Callable[[int], None]  # what a rank does after a step, which it is given


def tiny_config(
    windows: Path, out: Path, *, expert: int = 1, replicate: int = 1, **fields: object
) -> PretrainConfig:
    """Eight steps with an uneven last micro-batch; a checkpoint every second step, a report every step."""
    config = config_for(
        windows,
        out,
        num_steps=8,
        batch=BatchConfig(sequences=7, micro=2),
        checkpoint=CheckpointConfig(every=2),
        report=ReportConfig(log_every=1, eval_every=4, eval_windows=5, tensorboard="off", plot="off"),
        parallel=ParallelConfig(expert=expert, replicate=replicate, timeout=TIMEOUT),
        device="cpu",
    )
    return replace(config, **fields)  # type: ignore[arg-type]


def run_with(config: PretrainConfig, ranks: Ranks, after_step: Deed | None = None) -> None:
    """One run. With `after_step` it evaluates after every step, to do that instead."""

    def evaluate(model: Transformer) -> dict[str, float]:
        if after_step is not None:
            steps.append(steps[-1] + 1)
            after_step(steps[-1])
            return {}
        micro = None if ranks.mesh is None else config.batch.micro
        return held_out_report(
            model,
            directory=Path(config.data),
            max_windows=config.report.eval_windows,
            micro=micro,
            ranks=ranks,
        )

    saved = completed(Path(config.out) / CHECKPOINTS)
    steps = [saved[-1][0] if saved else 0]
    if after_step is not None:
        config = replace(config, report=replace(config.report, eval_every=1))
    pretrain.run(config, evaluate=evaluate, ranks=ranks)


def run_all(configs: Sequence[PretrainConfig]) -> None:
    """On every rank: one run after the other, each in its layout."""
    with open_mesh(expert=1, replicate=1, device=configs[0].device, timeout=TIMEOUT) as world:
        for config in configs:
            parallel = config.parallel
            run_with(config, Ranks(arrange(world, expert=parallel.expert, replicate=parallel.replicate)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Failed:
    """An error as a test looks at it."""

    kind: str
    text: str
    number: int | None


def failure(do: Callable[[], object]) -> Failed | None:
    try:
        do()
    except Exception as error:
        return Failed(kind=type(error).__name__, text=str(error), number=getattr(error, "errno", None))
    return None


def run_until(config: PretrainConfig, stop_after: int | None = None) -> str | None:
    """On every rank: one run; the last rank is told to stop after step `stop_after`. How it ended."""
    with pretrain.open_ranks(config) as ranks:
        return run_until_with(config, ranks, stop_after)


def run_until_with(config: PretrainConfig, ranks: Ranks, stop_after: int | None) -> str | None:
    """As `run_until`, where the ranks have met already."""

    def terminate(step: int) -> None:
        if step == stop_after and ranks.rank == ranks.size - 1:
            signal.raise_signal(signal.SIGTERM)

    try:
        run_with(config, ranks, terminate)
    except StoppedError as stop:
        return str(stop)
    return None


def die_after(config: PretrainConfig, rank: int, step: int) -> None:
    """On every rank: one run, in which one rank is killed."""

    def die(done: int) -> None:
        if (ranks.rank, done) == (rank, step):
            os.kill(os.getpid(), signal.SIGKILL)

    with pretrain.open_ranks(config) as ranks:
        run_with(config, ranks, die)


def curve(out: Path) -> list[dict[str, float]]:
    """What a run reported and does not depend on the machine or the layout."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in COMPARED if name in line} for line in lines]
