"""Checkpoints of what lies on a GPU: copied through pinned memory, and whole before the training goes on."""

from pathlib import Path

import torch

from dscoder.testing import gpu
from dscoder.train.checkpointing import CheckpointWriter, Progress, _host_memory, completed, load_state


def test_what_changes_after_the_save_is_not_saved(tmp_path: Path) -> None:
    progress = Progress(step=1, num_sequences=2, num_tokens=16, num_threads=1)
    writer = CheckpointWriter(tmp_path, keep=1)
    live = {
        "large": torch.zeros(2**26, device=gpu.DEVICE),  # long enough to copy for a change to overtake it
        "half": torch.zeros(3, 5, dtype=torch.bfloat16, device=gpu.DEVICE),
        "random": torch.get_rng_state(),
    }
    for value in (1.0, 2.0):  # the second into the buffers of the first
        wanted = {name: torch.full_like(tensor, value).cpu() for name, tensor in live.items()}
        for tensor in live.values():
            tensor.fill_(value)
        writer.save(progress, live)
        for tensor in live.values():
            tensor.zero_()
        writer.wait()
        loaded = {name: torch.zeros_like(tensor) for name, tensor in live.items()}
        load_state(completed(tmp_path)[-1][1], loaded)
        assert all(torch.equal(loaded[name].cpu(), wanted[name]) for name in wanted)
    writer.close()


def test_what_a_gpu_holds_goes_through_pinned_memory() -> None:
    assert _host_memory(torch.ones(3, device=gpu.DEVICE)).is_pinned()
    assert not _host_memory(torch.ones(3)).is_pinned()
