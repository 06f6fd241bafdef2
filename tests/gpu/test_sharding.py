"""Meshes over NCCL: a sharded model has the gradients of the whole one, and a lost rank ends the rest."""

import os
import signal
import time
from typing import Any

import pytest
import torch

from dscoder.config.parallel import ParallelConfig, Recompute
from dscoder.models.compiled import compile_dense
from dscoder.runtime import heartbeat
from dscoder.runtime.mesh import open_mesh
from dscoder.testing.compare import assert_close
from dscoder.testing.ranks import end_ranks, run_ranks
from tests.models.sharded import full, loss_of, sharded_model, tiny, tokens_of, whole_model

CONFIG = tiny("tiny_moe")
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def gradients_on_gpus(expert: int, recompute: Recompute, is_compiled: bool) -> dict[str, Any]:
    parallel = ParallelConfig(expert=expert)
    with open_mesh(expert=expert, replicate=1, device="cuda", timeout=120) as mesh:
        model, parts = sharded_model(CONFIG, mesh, dtype=torch.bfloat16, parallel=parallel)
        for layer in model.layers:
            layer.recompute = recompute
        if is_compiled:
            compile_dense(model)
        for turn in range(
            2
        ):  # the second pass runs with what the allocator and the streams kept of the first
            model.set_requires_gradient_sync(turn == 1)
            tokens_BS = tokens_of(turn * mesh.world_size + mesh.rank, CONFIG)
            loss_of(model, tokens_BS, num_batches=2 * mesh.world_size).backward()
        return {name: full(part, part.gradient()).cpu() for name, part in parts.items()}


def check_gradients(num_ranks: int, recompute: Recompute, *, is_compiled: bool = False) -> None:
    model = whole_model(CONFIG).to("cuda", torch.bfloat16)
    for batch_idx in range(2 * num_ranks):
        loss_of(model, tokens_of(batch_idx, CONFIG), num_batches=2 * num_ranks).backward()
    wanted = {name: parameter.grad for name, parameter in model.named_parameters()}
    found = run_ranks(gradients_on_gpus, num_ranks, recompute, is_compiled, num_ranks=num_ranks)
    for gradients in found:
        for name, gradient in gradients.items():
            grad = wanted[name]
            assert grad is not None
            assert_close(gradient, grad.cpu().float(), dtype=torch.bfloat16)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_one_rank_has_the_gradients_of_the_whole_model(recompute: Recompute) -> None:
    check_gradients(1, recompute)


def test_compiled_parts_have_the_gradients_of_the_eager_ones() -> None:
    check_gradients(1, "selective", is_compiled=True)


@two_gpus
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_two_ranks_have_the_gradients_of_the_whole_model(recompute: Recompute) -> None:
    check_gradients(2, recompute)


def lose_a_rank() -> None:
    heartbeat._WATCH, heartbeat._NOTICE = 3.0, 3.0
    with open_mesh(expert=1, replicate=1, device="cuda", timeout=120) as mesh:
        mesh.barrier()
        if mesh.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        while True:
            mesh.all_sum(torch.ones(1, device=mesh.device)).item()


@two_gpus
def test_a_killed_rank_ends_the_others_long_before_the_timeout() -> None:
    start = time.monotonic()
    ended = end_ranks(lose_a_rank, num_ranks=2)
    is_named = "rank 1 is gone" in ended[0].error
    assert is_named or ended[0].status == heartbeat._EXIT_STATUS
    assert time.monotonic() - start < 60
