"""A run on many ranks has the loss curve of one process, whatever the layout."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dscoder.config.train import BatchConfig, PretrainConfig
from dscoder.testing.compare import assert_same_curve
from dscoder.testing.ranks import run_ranks
from dscoder.testing.tiny_run import TINY_MOE
from dscoder.train.ranks import Ranks
from tests.train.ranks_at_work import curve, run_all, run_with, tiny_config

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
}


def config_of(kind: str, windows: Path, out: Path, *, expert: int = 1, replicate: int = 1) -> PretrainConfig:
    return tiny_config(windows, out, expert=expert, replicate=replicate, num_steps=STEPS, **KINDS[kind])


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
        (4, [("uneven", 1, 1), ("uneven", 4, 1), ("uneven", 2, 2), ("ramp", 2, 1)]),
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
