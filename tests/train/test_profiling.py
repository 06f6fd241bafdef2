"""Profiles of a run: which steps are in them, what they leave alone, and what they never overwrite."""

import gzip
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dscoder import ops
from dscoder.config.train import ProfileConfig, ReportConfig
from dscoder.models import Transformer
from dscoder.testing.tiny_run import config_for
from dscoder.train import pretrain
from dscoder.train.metrics import METRICS, read_metrics
from dscoder.train.profiling import MEMORY_TABLE, OPERATORS, PROFILES, TRACE, StepProfiler, profiled_steps


class BrokenError(Exception):
    """Stands for whatever ends a step."""


def gated(number: int, *, fails: bool) -> torch.Tensor:
    if fails:
        raise BrokenError
    return ops.moe_gate(torch.arange(32.0).view(4, 8).sin() * number, num_topk=2)[1]


def take_steps(
    directory: Path, config: ProfileConfig | None, *, resume_step: int, last: int, fails_at: int | None = None
) -> torch.Tensor:
    """Steps up to `last` of a run of ten, each of which gates some tokens; returns what they computed."""
    found = []
    with StepProfiler(
        directory, config, num_steps=10, resume_step=resume_step, device=torch.device("cpu")
    ) as profiler:
        for number in range(resume_step + 1, last + 1):
            with profiler.step(number):
                found.append(gated(number, fails=number == fails_at))
    return torch.stack(found)


def trace_of(directory: Path, first: int, last: int, *, ranks: str = "rank-0-of-1") -> list[dict[str, Any]]:
    folder = directory / PROFILES / f"steps-{first:09d}-{last:09d}"
    with gzip.open(folder / f"{ranks}.{TRACE}", "rt") as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    return events


def steps_in(events: list[dict[str, Any]]) -> list[int]:
    names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    return sorted(int(match[1]) for name in names if (match := re.fullmatch(r"step (\d+)", name)))


def written(directory: Path) -> set[str]:
    return {str(path.relative_to(directory / PROFILES)) for path in directory.rglob("*") if path.is_file()}


def test_a_trace_holds_the_steps_asked_for_and_no_others(tmp_path: Path) -> None:
    take_steps(tmp_path, ProfileConfig(start=4, steps=2), resume_step=0, last=10)
    events = trace_of(tmp_path, 4, 5)
    assert steps_in(events) == [4, 5]
    assert sum(event["name"] == "dscoder::moe_gate" for event in events) == 2
    assert any(event["name"] == "[memory]" for event in events)
    names = (TRACE, OPERATORS, MEMORY_TABLE)
    assert written(tmp_path) == {f"steps-000000004-000000005/rank-0-of-1.{name}" for name in names}


def test_the_tables_name_our_operators(tmp_path: Path) -> None:
    take_steps(tmp_path, ProfileConfig(start=4, steps=2), resume_step=0, last=10)
    for name in (OPERATORS, MEMORY_TABLE):
        text = (tmp_path / PROFILES / "steps-000000004-000000005" / f"rank-0-of-1.{name}").read_text()
        assert "dscoder::moe_gate" in text
    assert text.startswith("Bytes that torch's operators allocated on the CPU")


@pytest.mark.parametrize("config", [ProfileConfig(start=1, steps=1), ProfileConfig(start=3, steps=3)])
def test_what_is_watched_computes_the_same(tmp_path: Path, config: ProfileConfig) -> None:
    alone = take_steps(tmp_path / "alone", None, resume_step=0, last=10)
    assert not (tmp_path / "alone").exists()
    watched = take_steps(tmp_path / "watched", config, resume_step=0, last=10)
    assert torch.equal(alone, watched)
    assert (tmp_path / "watched" / PROFILES).is_dir()


@pytest.mark.parametrize(
    ("start", "steps", "resume_step", "expected"),
    [
        (None, 3, 0, range(3, 6)),
        (None, 3, 4, range(7, 10)),
        (None, 3, 6, range(8, 11)),  # as many of the first as are left over
        (None, 3, 8, range(9, 11)),
        (None, 10, 0, range(1, 11)),
        (1, 1, 0, range(1, 2)),
        (4, 2, 3, range(4, 6)),
        (4, 2, 4, range(5, 6)),  # the others were before
        (4, 2, 5, range(6, 6)),
        (None, 3, 10, range(11, 11)),
    ],
)
def test_steps_are_found_from_where_a_process_begins(
    start: int | None, steps: int, resume_step: int, expected: range
) -> None:
    config = ProfileConfig(start=start, steps=steps)
    assert profiled_steps(config, num_steps=10, resume_step=resume_step) == expected


def test_a_stop_leaves_the_steps_until_then(tmp_path: Path) -> None:
    take_steps(tmp_path, ProfileConfig(start=3, steps=4), resume_step=0, last=4)
    assert steps_in(trace_of(tmp_path, 3, 4)) == [3, 4]
    # Who goes on profiles the others, beside them.
    take_steps(tmp_path, ProfileConfig(start=3, steps=4), resume_step=4, last=10)
    assert steps_in(trace_of(tmp_path, 5, 6)) == [5, 6]
    assert steps_in(trace_of(tmp_path, 3, 4)) == [3, 4]


def test_a_stop_before_the_first_of_them_leaves_nothing(tmp_path: Path) -> None:
    take_steps(tmp_path, ProfileConfig(start=3, steps=4), resume_step=0, last=2)
    assert not (tmp_path / PROFILES).exists()


def test_a_step_that_fails_is_in_the_trace(tmp_path: Path) -> None:
    with pytest.raises(BrokenError):
        take_steps(tmp_path, ProfileConfig(start=1, steps=3), resume_step=0, last=10, fails_at=2)
    assert steps_in(trace_of(tmp_path, 1, 2)) == [1, 2]


def test_an_earlier_profile_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = ProfileConfig(start=4, steps=2)
    take_steps(tmp_path, config, resume_step=0, last=5)
    path = tmp_path / PROFILES / "steps-000000004-000000005" / f"rank-0-of-1.{TRACE}"
    before = path.read_bytes()
    # The process died after the profile and goes on from a checkpoint before it.
    take_steps(tmp_path, config, resume_step=2, last=10)
    assert path.read_bytes() == before
    assert any(f"nothing is profiled: {path} is there from an earlier start" in m for m in caplog.messages)


def test_a_shorter_profile_of_an_earlier_stop_is_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):  # stopped within the steps twice, at the same one
        take_steps(tmp_path, ProfileConfig(start=3, steps=4), resume_step=0, last=4)
    assert any("the profile of steps 3 to 4 is not written" in message for message in caplog.messages)
    assert steps_in(trace_of(tmp_path, 3, 4)) == [3, 4]


def test_steps_that_are_past_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    take_steps(tmp_path, ProfileConfig(start=2, steps=2), resume_step=5, last=10)
    assert any("no steps are left to profile: the run goes on after step 5" in m for m in caplog.messages)
    assert not (tmp_path / PROFILES).exists()


def test_ranks_write_beside_one_another(tmp_path: Path) -> None:
    for rank in (0, 1):
        with StepProfiler(
            tmp_path,
            ProfileConfig(start=1, steps=1),
            num_steps=1,
            resume_step=0,
            device=torch.device("cpu"),
            rank=rank,
            world_size=2,
        ) as profiler:
            with profiler.step(1):
                pass
            assert steps_in(trace_of(tmp_path, 1, 1, ranks=f"rank-{rank}-of-2")) == [1]


def test_a_profile_that_cannot_be_written_does_not_end_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / PROFILES).write_text("in the way")
    found = take_steps(tmp_path, ProfileConfig(start=1, steps=1), resume_step=0, last=3)
    assert len(found) == 3
    assert any("the profile of steps 1 to 1 is lost" in message for message in caplog.messages)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"start": 0}, "start must be >= 1, got 0"),
        ({"start": -1, "steps": 2}, "start must be >= 1, got -1"),
    ],
)
def test_steps_that_cannot_be_are_refused(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"^ProfileConfig: {message}$"):
        ProfileConfig(**fields)


@pytest.mark.parametrize(
    ("profile", "last"), [(ProfileConfig(steps=9), 9), (ProfileConfig(start=7, steps=3), 9)]
)
def test_steps_past_the_end_are_refused(tmp_path: Path, profile: ProfileConfig, last: int) -> None:
    config = config_for(tmp_path, tmp_path, num_steps=9, profile=profile)
    with pytest.raises(ValueError, match=rf"last step to profile must be <= num_steps = 8, got {last}$"):
        replace(config, num_steps=8)


def fails_at(call: int) -> pretrain.Evaluate:
    calls: list[int] = []

    def evaluate(_: Transformer) -> dict[str, float]:
        calls.append(1)
        if len(calls) == call:
            raise BrokenError
        return {}

    return evaluate


def test_a_profiled_run_is_the_run(windows: Path, tmp_path: Path) -> None:
    """From its first start or from a later one, which asks for it where the first did not."""
    report = ReportConfig(log_every=2, eval_every=1, tensorboard="off", plot="off")
    profile = ProfileConfig(start=5, steps=1)
    alone, profiled, later = (
        config_for(windows, tmp_path / name, report=report) for name in ("alone", "profiled", "later")
    )
    pretrain.run(alone, evaluate=lambda model: {})
    pretrain.run(replace(profiled, profile=profile), evaluate=lambda model: {})
    with pytest.raises(BrokenError):
        pretrain.run(later, evaluate=fails_at(4))  # behind the checkpoint of step 3
    pretrain.run(replace(later, profile=profile), evaluate=lambda model: {})
    wanted = (tmp_path / "alone" / "model" / "model.safetensors").read_bytes()
    for name in ("profiled", "later"):
        assert (tmp_path / name / "model" / "model.safetensors").read_bytes() == wanted
        events = trace_of(tmp_path / name, 5, 5)
        assert steps_in(events) == [5]
        names = {event["name"] for event in events}
        assert names >= {f"dscoder::{op}" for op in ("mla_prefill", "mla_prefill_backward", "moe_experts")}


def test_metrics_of_a_run_tell_of_its_machine(windows: Path, tmp_path: Path) -> None:
    pretrain.run(config_for(windows, tmp_path, num_steps=2))
    (line,) = read_metrics(tmp_path / METRICS)
    loads = ("expert_load_max", "expert_load_mean", "dropped_share")
    assert set(line) >= {"tokens_per_second", "peak_memory_gib", *loads}
    assert 1 <= line["expert_load_mean"] <= line["expert_load_max"] <= 4  # of one layer of four experts
    assert line["expert_load_mean"] == line["expert_load_max"]
    assert line["dropped_share"] == 0
