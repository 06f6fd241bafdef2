"""Profiles of steps on a GPU: kernels in the trace, and the allocator's history of these steps alone."""

import gzip
import json
import pickle
from pathlib import Path

import torch

from dscoder import ops
from dscoder.config.train import ProfileConfig
from dscoder.runtime.device import peak_memory
from dscoder.testing import gpu
from dscoder.train.profiling import MEMORY_SNAPSHOT, PROFILES, TRACE, StepProfiler


def take_steps(directory: Path) -> None:
    """Four steps, of which the second and third are profiled; each makes a tensor of its own size."""
    logits_TE = torch.randn(64, 16, device=gpu.DEVICE)
    config = ProfileConfig(start=2, steps=2)
    with StepProfiler(
        directory, config, num_steps=4, resume_step=0, device=torch.device(gpu.DEVICE)
    ) as profiler:
        for number in (1, 2, 3, 4):
            with profiler.step(number):
                torch.empty(number * 2**21, dtype=torch.uint8, device=gpu.DEVICE)
                ops.moe_gate(logits_TE, num_topk=2)


def test_a_trace_holds_our_kernels(tmp_path: Path) -> None:
    take_steps(tmp_path)
    with gzip.open(tmp_path / PROFILES / "steps-000000002-000000003" / f"rank-0-of-1.{TRACE}") as file:
        events = json.load(file)["traceEvents"]
    kernels = [event["name"] for event in events if event.get("cat") == "kernel"]
    assert sum("moe_gate" in name for name in kernels) == 2
    assert {event["name"] for event in events} >= {"step 2", "step 3"}
    assert not {event["name"] for event in events} & {"step 1", "step 4"}


def test_a_snapshot_holds_these_steps_allocations(tmp_path: Path) -> None:
    torch.cuda.empty_cache()
    take_steps(tmp_path)
    path = tmp_path / PROFILES / "steps-000000002-000000003" / f"rank-0-of-1.{MEMORY_SNAPSHOT}"
    snapshot = pickle.loads(path.read_bytes())
    events = [event for trace in snapshot["device_traces"] for event in trace if event["action"] == "alloc"]
    allocated = {event["size"] for event in events}
    assert {2 * 2**21, 3 * 2**21} <= allocated
    assert not {1 * 2**21, 4 * 2**21} & allocated
    files = {frame["filename"] for event in events for frame in event["frames"]}
    assert any(file.endswith("test_profiling.py") for file in files)
    assert not any(file.endswith((".so", ".cpp")) for file in files)
    assert snapshot["segments"]


def test_what_was_given_back_counts_for_the_peak() -> None:
    device = torch.device(gpu.DEVICE)
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    torch.empty(2**24, dtype=torch.uint8, device=device)
    peak = peak_memory(device)
    assert peak is not None
    assert peak >= held + 2**24
    assert torch.cuda.memory_allocated() == held
