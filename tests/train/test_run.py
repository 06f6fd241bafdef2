"""The run that training stages share: figures, more state, and going on where a run was stopped."""

import json
import signal
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

from dscoder.config.train import CheckpointConfig, OptimizerConfig, ReportConfig
from dscoder.runtime.artifact import read_manifest
from dscoder.runtime.heartbeat import CommunicationError
from dscoder.runtime.mesh import Mesh
from dscoder.train.loop import LossError, apply_gradients
from dscoder.train.metrics import MEASURED, read_metrics
from dscoder.train.optimizer import MasterAdamW
from dscoder.train.ranks import Ranks
from dscoder.train.report import RunReport
from dscoder.train.run import Job, StepDone, StoppedError, _stop_on_signals, run_stage
from dscoder.train.stopwatch import Stopwatch
from tests.train.test_stopwatch import NOTHING_SENT

NUM_STEPS = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class ToyConfig:
    """The fields of every run and nothing else."""

    out: str
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    seed: int = 0
    num_threads: int | None = 1
    checkpoint: CheckpointConfig = field(default_factory=lambda: CheckpointConfig(every=2))
    report: ReportConfig = field(
        default_factory=lambda: ReportConfig(log_every=2, eval_every=3, tensorboard="off", plot="off")
    )
    overwrite: bool = False


@dataclass(kw_only=True)
class Toy:
    """A stage that moves two numbers, draws from torch's generator and counts in a tensor of its own."""

    ends_at: int | None = None  # SIGTERM comes during this step
    begun: list[int] = field(default_factory=list)
    evaluated: list[int] = field(default_factory=list)
    result: torch.Tensor | None = None

    def build(self, directory: Path) -> Job:
        model = nn.Linear(2, 1, bias=False)
        count = torch.zeros(1)

        def train_step(optimizer: MasterAdamW, step: int, lr: float) -> StepDone:
            loss = (model(torch.rand(3, 2)) - 1.0).square().mean()
            loss.backward()
            count.add_(1)
            if step == self.ends_at:
                signal.raise_signal(signal.SIGTERM)
            figures = apply_gradients(
                optimizer, loss.detach()[None], names=["loss"], lr=lr, step=step, read=lambda: ""
            )
            return StepDone(figures=figures | {"count": float(count)}, num_sequences=3, num_tokens=6)

        def evaluate() -> Mapping[str, float]:
            self.evaluated.append(int(count))
            return {"found": float(count)}

        def export(out: Path) -> None:
            self.result = model.weight.detach().clone()
            (out / "model").mkdir(exist_ok=True)
            (out / "model" / "weight").write_text(str(model.weight.tolist()))

        return Job(
            model=model,
            num_steps=NUM_STEPS,
            learning_rate=lambda step: 0.1 / (step + 1),
            train_step=train_step,
            export=export,
            evaluate=evaluate,
            begin=self.begun.append,
            extra_state={"count": count},
        )


def run(toy: Toy, out: Path) -> Path:
    return run_stage(ToyConfig(out=str(out)), toy.build, command="toy", inputs={"data": "a"})


def reports(out: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]


def test_reports_hold_the_means_of_a_steps_own_figures(tmp_path: Path) -> None:
    out = run(Toy(), tmp_path)
    assert [line["count"] for line in reports(out) if "count" in line] == [1.5, 3.5, 5.5]
    assert [line["found"] for line in reports(out) if "found" in line] == [3.0, 6.0]
    assert [line["lr"] for line in reports(out) if "lr" in line] == [0.1 / 2, 0.1 / 4, 0.1 / 6]


def test_the_manifest_counts_what_the_steps_saw(tmp_path: Path) -> None:
    manifest = read_manifest(run(Toy(), tmp_path), command="toy")
    assert manifest["counts"] == {"steps": NUM_STEPS, "sequences": 18, "tokens": 36}
    assert manifest["facts"]["final"]["found"] == 6.0


def test_a_stopped_run_goes_on_to_the_same_end(tmp_path: Path) -> None:
    whole, cut, rest = Toy(), Toy(ends_at=2), Toy()
    run(whole, tmp_path / "whole")
    with pytest.raises(StoppedError, match="stopped by SIGTERM after step 3"):
        run(cut, tmp_path / "cut")
    torch.rand(7)  # whatever the process does in between
    run(rest, tmp_path / "cut")
    assert (cut.begun, rest.begun) == ([0], [3])
    assert rest.evaluated == [6]  # more state was restored too: the count went on from 3
    assert whole.result is not None
    assert rest.result is not None
    assert torch.equal(whole.result, rest.result)
    assert reports(tmp_path / "cut") == reports(tmp_path / "whole")


def test_a_stop_asked_for_after_the_save_waits_for_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resume = RunReport.resume
    waits = [1]  # steps until SIGTERM comes, when it was decided that the step is not saved

    def stop_late(report: RunReport, paused: float) -> None:
        resume(report, paused)
        waits[0] -= 1
        if waits[0] == 0:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(RunReport, "resume", stop_late)
    with pytest.raises(StoppedError, match="stopped by SIGTERM after step 2"):
        run(Toy(), tmp_path)
    assert (tmp_path / "checkpoints" / "step-000000002").is_dir()


@pytest.mark.parametrize("has_mesh", [False, True])
def test_sigterm_after_an_error_of_many_ranks_waits_for_the_mesh(has_mesh: bool) -> None:
    ended: list[int] = []
    ranks = Ranks()
    if has_mesh:
        ranks.mesh = mock.Mock(spec=Mesh)
    before = signal.signal(signal.SIGTERM, lambda number, _: ended.append(number))
    try:
        with pytest.raises(CommunicationError), _stop_on_signals(ranks):
            raise CommunicationError("no answer")
        signal.raise_signal(signal.SIGTERM)
        assert bool(ended) != has_mesh
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_finished_run_builds_nothing(tmp_path: Path) -> None:
    run(Toy(), tmp_path)
    again = Toy()
    run(again, tmp_path)
    assert again.begun == []


def test_another_config_is_refused_but_not_for_what_every_run_may_change(tmp_path: Path) -> None:
    with pytest.raises(StoppedError):
        run(Toy(ends_at=2), tmp_path)
    config = ToyConfig(out=str(tmp_path))
    with pytest.raises(ValueError, match=r"config\.seed: 0 there, 1 here"):
        run_stage(replace(config, seed=1), Toy().build, command="toy", inputs={"data": "a"})
    with pytest.raises(ValueError, match=r"inputs\.data: a there, b here"):
        run_stage(config, Toy().build, command="toy", inputs={"data": "b"})
    config = replace(config, checkpoint=CheckpointConfig(every=1), num_threads=None)
    run_stage(config, Toy().build, command="toy", inputs={"data": "a"})


def test_parameters_without_a_gradient_stay_and_are_not_saved() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model[0].requires_grad_(False)
    optimizer = MasterAdamW(model, OptimizerConfig())
    assert {name.split(".")[1] for name in optimizer.state()} == {"1"}
    before = model[0].weight.clone()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step(0.1)
    assert torch.equal(model[0].weight, before)


def test_a_figure_that_is_no_number_moves_nothing() -> None:
    model = nn.Linear(2, 1)
    optimizer = MasterAdamW(model, OptimizerConfig())
    model(torch.ones(1, 2)).sum().backward()
    before = model.weight.clone()
    sums_N = torch.tensor([1.0, float("inf")])
    with pytest.raises(
        LossError, match=r"step 4: loss, gain, grad_norm must be finite, got 1\.0, inf, .*why"
    ):
        apply_gradients(optimizer, sums_N, names=["loss", "gain"], lr=0.1, step=4, read=lambda: "this is why")
    assert torch.equal(model.weight, before)


def test_the_config_that_a_run_leaves_is_the_one_it_had(tmp_path: Path) -> None:
    text = (run(Toy(), tmp_path) / "config.yaml").read_text()
    assert all(f"{name}:" in text for name in asdict(ToyConfig(out="")) if name != "overwrite")
    assert "overwrite" not in text


@pytest.mark.parametrize("bitwise", [True, False])
def test_steps_take_the_fastest_kernels_where_bits_may_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bitwise: bool
) -> None:
    allowed: list[torch.device] = []
    monkeypatch.setattr("dscoder.train.run.allow_fastest_kernels", allowed.append)
    config = ToyConfig(out=str(tmp_path), checkpoint=CheckpointConfig(bitwise=bitwise))
    run_stage(config, Toy().build, command="toy", inputs={"data": "a"})
    assert allowed == ([] if bitwise else [torch.device("cpu")])


def test_what_an_evaluation_exchanges_is_none_of_the_steps(tmp_path: Path) -> None:
    sent = [NOTHING_SENT]

    def evaluate() -> Mapping[str, float]:
        sent.append(replace(NOTHING_SENT, dispatch_seconds=sent[-1].dispatch_seconds + 1.0))
        return {}

    def build(directory: Path) -> Job:
        watch = Stopwatch(read_exchange=lambda: sent[-1])
        return replace(Toy().build(directory), evaluate=evaluate, stopwatch=watch)

    run_stage(ToyConfig(out=str(tmp_path)), build, command="toy", inputs={"data": "a"})
    assert len(sent) == 3
    assert {
        line["dispatch_share"] for line in read_metrics(tmp_path / "metrics.jsonl") if "loss" in line
    } == {0}
