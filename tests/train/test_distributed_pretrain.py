"""A run on many ranks has the loss curve of one process, whatever the layout."""

import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from dscoder.config.parallel import ParallelConfig
from dscoder.config.train import BatchConfig, PretrainConfig
from dscoder.models import Transformer
from dscoder.runtime.artifact import read_manifest
from dscoder.testing.compare import assert_same_curve
from dscoder.testing.ranks import run_ranks
from dscoder.testing.tiny_run import TINY_MOE
from dscoder.train import pretrain
from dscoder.train.ranks import Ranks
from dscoder.train.windows import check_micro
from tests.train.ranks_at_work import Failed, curve, failure, run_all, run_with, tiny_config

pytestmark = pytest.mark.dist

STEPS = 4
# The first steps of the ramp have one micro-batch, so most ranks have none.
RAMP = BatchConfig(sequences=7, ramp_from=2, ramp_tokens=64 * 20, micro=2)
DENSE = replace(TINY_MOE, moe=None, tie_embeddings=True)
KINDS: dict[str, dict[str, object]] = {
    "uneven": {},
    "ramp": {"batch": RAMP},
    "dense": {"model": DENSE},
    "bf16": {"precision": "bf16"},
    "sparing": {},  # of memory
}


def config_of(kind: str, windows: Path, out: Path, *, expert: int = 1, replicate: int = 1) -> PretrainConfig:
    config = tiny_config(windows, out, expert=expert, replicate=replicate, num_steps=STEPS, **KINDS[kind])
    if kind == "sparing":
        parallel = replace(config.parallel, sums_each_batch=True, recompute="full")
        config = replace(config, parallel=parallel)
    return config


@pytest.fixture(scope="module")
def alone(windows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of one process for each kind."""
    folder = tmp_path_factory.mktemp("alone")
    for kind in KINDS:
        run_with(config_of(kind, windows, folder / kind), Ranks())
    return folder


@pytest.mark.parametrize(
    ("num_ranks", "layouts"),
    [
        (1, [("uneven", 1, 1)]),
        (2, [("uneven", 1, 1), ("uneven", 2, 1), ("ramp", 1, 2), ("dense", 1, 1), ("bf16", 2, 1)]),
        (4, [("uneven", 1, 1), ("uneven", 4, 1), ("uneven", 2, 2), ("ramp", 2, 1), ("sparing", 2, 2)]),
    ],
)
def test_a_layout_has_the_curve_of_one_process(
    windows: Path, alone: Path, tmp_path: Path, num_ranks: int, layouts: list[tuple[str, int, int]]
) -> None:
    outs = [tmp_path / f"{kind}-{expert}-{replicate}" for kind, expert, replicate in layouts]
    configs = [
        config_of(kind, windows, out, expert=expert, replicate=replicate)
        for out, (kind, expert, replicate) in zip(outs, layouts, strict=True)
    ]
    run_ranks(run_all, configs, num_ranks=num_ranks)
    for out, (kind, _, _) in zip(outs, layouts, strict=True):
        dtype = torch.bfloat16 if kind == "bf16" else torch.float32
        assert_same_curve(curve(out), curve(alone / kind), dtype=dtype)
        exported, wanted = (load_file(run / "model" / "model.safetensors") for run in (out, alone / kind))
        assert exported.keys() == wanted.keys()
        if kind != "bf16":
            torch.testing.assert_close(exported, wanted, rtol=0, atol=1e-5)


def other_batch(config: PretrainConfig, **fields: int) -> PretrainConfig:
    return replace(config, batch=replace(config.batch, **fields))


def poison(model: Transformer) -> dict[str, float]:
    """What makes a rank's weights no numbers."""
    with torch.no_grad():
        for parameter in model.parameters():
            assert isinstance(parameter, DTensor)
            parameter.to_local().fill_(torch.nan)
    return {}


def refusals(config: PretrainConfig) -> dict[str, Failed | None]:
    """On both ranks: how runs fail that cannot go on, or not so."""
    out = Path(config.out)
    with pretrain.open_ranks(config) as ranks:

        def failing(
            config: PretrainConfig, name: str, evaluate: pretrain.Evaluate | None = None
        ) -> Failed | None:
            config = replace(config, out=str(out / name))
            return failure(lambda: pretrain.run(config, evaluate=evaluate, ranks=ranks))

        signals = [signal.SIGINT]

        def stop(model: Transformer) -> dict[str, float]:
            if ranks.rank == 0 and signals:  # a second one would end the process
                signal.raise_signal(signals.pop())
            return {}

        every_step = replace(config, report=replace(config.report, eval_every=1))
        elsewhere = replace(config, data=config.data if ranks.rank == 0 else str(out / "nowhere"))
        return {
            "micro": failing(other_batch(config, sequences=4, micro=4), "micro"),
            "sequences": failing(other_batch(config, sequences=1, micro=1), "sequences"),
            "layout": failing(replace(config, parallel=ParallelConfig(expert=2)), "layout"),
            "data": failing(elsewhere, "data"),
            "loss": failing(every_step, "loss", poison if ranks.rank == 1 else lambda model: {}),
            "stop": failing(every_step, "run", stop),
            "other": failing(replace(every_step, seed=1), "run"),
            "threads": failing(replace(every_step, num_threads=2), "run"),
        }


def test_what_one_rank_cannot_do_ends_the_run_of_all(windows: Path, tmp_path: Path) -> None:
    config = tiny_config(windows, tmp_path, num_steps=3)
    first, second = run_ranks(refusals, config, num_ranks=2)
    assert first["micro"] == second["micro"]
    assert "micro must be <= 3 for each of 2 ranks to have a micro-batch of 4" in first["micro"].text
    assert "sequences must be >= 2, one for each rank, got 1" in first["sequences"].text
    assert "parallel.expert = 2 and parallel.replicate = 1, got 1 and 1" in first["layout"].text
    assert first["data"].text.startswith("rank 1 failed: ValueError: ")
    assert second["data"].kind == "ValueError"
    assert first["loss"] == second["loss"]
    assert re.search(r"step 1: loss.* must be finite, got nan", first["loss"].text)
    assert len(re.findall(r"\d+", first["loss"].text.partition("training windows")[2])) == 7
    assert first["stop"] == second["stop"]
    assert "stopped by SIGINT after step 2" in first["stop"].text
    assert "config.seed: 0 there, 1 here" in first["other"].text
    assert "config.seed: 0 there, 1 here" in second["other"].text
    assert first["threads"] == second["threads"]
    assert "num_threads must be 1" in first["threads"].text
    # Under another layout bits differ anyway.
    alone = replace(config, out=str(tmp_path / "run"), num_threads=2)
    pretrain.run(alone)
    assert read_manifest(tmp_path / "run", command="pretrain")["facts"]["num_threads"] == 2


@pytest.mark.parametrize(
    ("sequences", "micro", "num_ranks", "largest"), [(10, 5, 3, 4), (8, 3, 4, 2), (4, 4, 2, 3), (4, 2, 4, 1)]
)
def test_the_largest_micro_that_gives_each_rank_one_is_named(
    sequences: int, micro: int, num_ranks: int, largest: int
) -> None:
    with pytest.raises(ValueError, match=rf"micro must be <= {largest} for each of {num_ranks} ranks"):
        check_micro(BatchConfig(sequences=sequences, micro=micro), num_ranks)
    check_micro(BatchConfig(sequences=sequences, micro=largest), num_ranks)
    with pytest.raises(ValueError, match="micro must be"):
        check_micro(BatchConfig(sequences=sequences, micro=largest + 1), num_ranks)
