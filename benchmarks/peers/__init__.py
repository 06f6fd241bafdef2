"""What dscoder's ops are compared with: `peers(op, step)` gives those that this machine has.

Every peer takes the arguments of our op (`dscoder.ops`) and gives its result, with these exceptions:
    moe_gate      experts with equal probabilities may come in another order
    moe_permute   the rows alone, in our order; "maps" is moe_permute_maps without the tokens of rows
    mla_*         the attention alone, no log-sum-exp
    latent_append returns what it wrote to, the cache and the queries
A peer whose step is "backward" is differentiable: run it on inputs that require gradients.

`peers` leaves out what is not installed. What is installed and does not work raises when it is prepared; what
lacks a case (V3's rule for groups, other widths) raises UnsupportedError. An adapter's docstring says what is
timed and what is not.
"""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch.nn.attention import SDPBackend

from benchmarks.peers import (
    deep_gemm,
    eager,
    eager_attention,
    flash_attention,
    flash_mla,
    flashinfer,
    sgl_kernel,
    transformer_engine,
    triton_calls,
    vllm,
)
from benchmarks.peers.eager import compiled
from dscoder.testing.peer import Peer, Run

__all__ = ["Peer", "Run", "peers"]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: `adapter(module, *args)` is the peer `name` of `op`."""

    op: str
    steps: str  # "maps", "forward", or "backward": differentiable, so forward too
    name: str
    module: str  # imported first; the part before the first dot says whether the library is installed
    adapter: Callable[..., Run]


_VLLM = "vllm.model_executor.layers.fused_moe"
_TE = "transformer_engine.pytorch"
_TRITON = "benchmarks.peers.triton"

TABLE = (
    Row("moe_gate", "backward", "torch", "torch", eager.eager(eager.gate)),
    Row("moe_gate", "backward", "torch.compile", "triton", compiled(eager.gate)),
    Row("moe_gate", "backward", "triton", f"{_TRITON}_gate", triton_calls.gate),
    Row("moe_gate", "forward", "vllm", "vllm._custom_ops", vllm.gate),
    Row("moe_gate", "forward", "vllm_grouped", f"{_VLLM}.router.grouped_topk_router", vllm.grouped_gate),
    Row("moe_gate", "forward", "sgl_kernel", "sgl_kernel", sgl_kernel.gate),
    Row("moe_gate", "backward", "te", f"{_TE}.router", transformer_engine.gate),
    Row("moe_permute", "maps", "torch", "torch", eager.eager(eager.maps)),
    Row("moe_permute", "maps", "torch.compile", "triton", compiled(eager.maps)),
    Row("moe_permute", "maps", "triton", f"{_TRITON}_maps", triton_calls.maps),
    Row("moe_permute", "maps", "vllm", f"{_VLLM}.moe_align_block_size", vllm.maps),
    Row("moe_permute", "maps", "sgl_kernel", "sgl_kernel", sgl_kernel.maps),
    Row("moe_permute", "backward", "torch", "torch", eager.eager(eager.permute, eager.first)),
    Row("moe_permute", "backward", "torch.compile", "triton", compiled(eager.permute, eager.first)),
    Row("moe_permute", "backward", "triton", f"{_TRITON}_permute", triton_calls.permute),
    Row("moe_permute", "forward", "vllm", f"{_VLLM}.moe_permute_unpermute", vllm.permute),
    Row("moe_permute", "backward", "te_index", f"{_TE}.permutation", transformer_engine.permute_by_index),
    Row("moe_permute", "backward", "te_mask", f"{_TE}.permutation", transformer_engine.permute_by_mask),
    Row("moe_unpermute", "backward", "torch", "torch", eager.eager(eager.unpermute)),
    Row("moe_unpermute", "backward", "torch.compile", "triton", compiled(eager.unpermute)),
    Row("moe_unpermute", "backward", "triton", f"{_TRITON}_permute", triton_calls.unpermute),
    Row("moe_unpermute", "forward", "vllm", f"{_VLLM}.moe_permute_unpermute", vllm.unpermute),
    Row("moe_unpermute", "backward", "te_index", f"{_TE}.permutation", transformer_engine.unpermute),
    Row("moe_balance_loss", "backward", "torch", "torch", eager.eager(eager.balance_loss)),
    Row("moe_balance_loss", "backward", "torch.compile", "triton", compiled(eager.balance_loss)),
    Row("moe_balance_loss", "backward", "te", f"{_TE}.router", transformer_engine.balance_loss),
    Row("grouped_gemm", "backward", "torch", "torch", eager.eager(eager.grouped_gemm)),
    Row("grouped_gemm", "forward", "triton", f"{_TRITON}_gemm", triton_calls.grouped_gemm),
    Row("grouped_gemm", "forward", "deep_gemm", "deep_gemm", deep_gemm.grouped_gemm),
    Row("mla_decode", "forward", "torch", "torch", eager.eager(eager_attention.mla_decode)),
    Row("mla_decode", "forward", "torch.compile", "triton", compiled(eager_attention.mla_decode)),
    Row("mla_decode", "forward", "flash_mla", "flash_mla", flash_mla.mla_decode),
    Row("mla_decode", "forward", "flashinfer", "flashinfer.mla", flashinfer.mla_decode),
    Row("mla_decode", "forward", "fa3", "flash_attn_interface", flash_attention.mla_decode),
    Row("mla_prefill", "backward", "torch", "torch", eager_attention.mla_prefill()),
    Row(
        "mla_prefill",
        "backward",
        "torch cudnn",
        "torch",
        eager_attention.mla_prefill(SDPBackend.CUDNN_ATTENTION),
    ),
    Row(
        *("mla_prefill", "backward", "torch flash", "torch"),
        eager_attention.mla_prefill(SDPBackend.FLASH_ATTENTION, is_padded=True),
    ),
    Row(
        *("mla_prefill", "backward", "torch efficient", "torch"),
        eager_attention.mla_prefill(SDPBackend.EFFICIENT_ATTENTION),
    ),
    Row("mla_prefill", "forward", "triton", f"{_TRITON}_attention", triton_calls.mla_prefill),
    Row("mla_prefill", "backward", "fa3", "flash_attn_interface", flash_attention.mla_prefill_3),
    Row("mla_prefill", "backward", "fa2", "flash_attn", flash_attention.mla_prefill_2),
    Row("mla_prefill", "forward", "flashinfer", "flashinfer.prefill", flashinfer.mla_prefill),
    Row("rope", "backward", "torch", "torch", eager.eager(eager_attention.rope)),
    Row("rope", "backward", "torch.compile", "triton", compiled(eager_attention.rope)),
    Row("rope", "forward", "flashinfer", "flashinfer.rope", flashinfer.rope),
    Row("latent_rope", "backward", "torch", "torch", eager.eager(eager_attention.latent_rope)),
    Row("latent_rope", "backward", "torch.compile", "triton", compiled(eager_attention.latent_rope)),
    Row("latent_append", "forward", "torch", "torch", eager.eager(eager_attention.latent_append)),
    Row("latent_append", "forward", "torch.compile", "triton", compiled(eager_attention.latent_append)),
    Row("latent_append", "forward", "vllm", "vllm._custom_ops", vllm.latent_append),
)


def peers(op: str, step: str, device: torch.device | str | None = None) -> dict[str, Peer]:
    """The peers of `op` for `step` ("maps", "forward", "backward" or "forward + backward") on `device`.

    Default: the GPU if there is one. On a CPU there is torch alone, eager.
    """
    device_type = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type
    rows = [row for row in TABLE if row.op == op and _covers(row.steps, step)]
    if device_type == "cpu":
        rows = [row for row in rows if row.name == "torch"]
    return {row.name: Peer(prepare=_prepare(row)) for row in rows if _is_installed(row.module)}


def _covers(steps: str, step: str) -> bool:
    if step == "forward":
        return steps in ("forward", "backward")
    return steps == ("maps" if step == "maps" else "backward")


def _library(module: str) -> str:
    return "triton" if module.startswith(_TRITON) else module.partition(".")[0]


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(_library(module)) is not None


def _load(module: str) -> ModuleType:
    """The one place that imports an optional library."""
    return importlib.import_module(module)


def _prepare(row: Row) -> Callable[..., Run]:
    def prepare(*args: Any, **kwargs: Any) -> Run:
        return row.adapter(_load(row.module), *args, **kwargs)

    return prepare
