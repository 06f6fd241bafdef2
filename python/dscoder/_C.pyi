from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

version: str
compiler: str
has_cuda: bool
cuda_version: str
cuda_archs: tuple[str, ...]
absent_hint: str

def moe_gate_forward(
    logits: Tensor,
    idx: Tensor,
    weight: Tensor,
    num_groups: int,
    num_groups_kept: int,
    scale: float,
    renormalize: bool,
) -> None: ...
def moe_gate_backward(
    logits: Tensor, idx: Tensor, grad_weight: Tensor, grad_logits: Tensor, scale: float, renormalize: bool
) -> None: ...
def moe_gate_with_balance_forward(
    logits: Tensor,
    idx: Tensor,
    weight: Tensor,
    balance: tuple[Tensor, ...],
    num_groups: int,
    num_groups_kept: int,
    scale: float,
    renormalize: bool,
) -> None: ...
def moe_gate_with_balance_backward(
    logits: Tensor,
    idx: Tensor,
    grads: tuple[Tensor, Tensor],
    load: Tensor,
    grad_logits: Tensor,
    scale: float,
    renormalize: bool,
) -> None: ...
def moe_balance_loss_forward(
    probs: Tensor,
    idx: Tensor,
    balance: tuple[Tensor, ...],
    num_groups: int,
    num_groups_kept: int,
    weights: Sequence[float] | None = None,
) -> None: ...
def moe_balance_loss_backward(grad_terms: Tensor, load: Tensor, grad_probs: Tensor) -> None: ...
def moe_balance_plan(
    num_tokens: int, num_experts: int, num_sequences: int, num_groups: int
) -> tuple[int, int]: ...
def moe_permute_num_counts(num_choices: int) -> int: ...
def moe_permute_maps_forward(
    idx: Tensor, offsets: Tensor, row: Tensor, token: Tensor, counts: Tensor
) -> None: ...
def moe_permute_forward(
    x: Tensor, idx: Tensor, rows: Tensor, offsets: Tensor, row: Tensor, token: Tensor, counts: Tensor
) -> None: ...
def moe_permute_backward(grad: Tensor, row: Tensor, grad_x: Tensor) -> None: ...
def moe_unpermute_forward(y: Tensor, weight: Tensor, row: Tensor, out: Tensor) -> None: ...
def moe_unpermute_backward(
    grad: Tensor,
    y: Tensor,
    weight: Tensor,
    row: Tensor,
    offsets: Tensor,
    grad_y: Tensor,
    grad_weight: Tensor,
) -> None: ...
def rope_forward(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    q_out: Tensor,
    k_out: Tensor,
    interleaved: bool,
    inverse: bool,
) -> None: ...
def latent_rope_num_partials(num_tokens: int) -> int: ...
def latent_rope_forward(
    query: Tensor,
    latent: Tensor,
    weight: Tensor,
    angles: tuple[Tensor, Tensor, Tensor],
    query_out: Tensor,
    row_out: Tensor,
    scale_out: Tensor,
    eps: float,
) -> None: ...
def latent_rope_backward(
    grads: tuple[Tensor, Tensor],
    latent: Tensor,
    weight: Tensor,
    scale: Tensor,
    angles: tuple[Tensor, Tensor, Tensor],
    grad_query_out: Tensor,
    grad_latent: Tensor,
    grad_weight: tuple[Tensor, Tensor],
) -> None: ...
def latent_append_forward(
    query: Tensor,
    latent: Tensor,
    weight: Tensor,
    angles: tuple[Tensor, Tensor, Tensor],
    slots: Tensor,
    cache: Tensor,
    query_out: Tensor,
    eps: float,
) -> None: ...
def grouped_gemm_forward(
    x: Tensor,
    w: Tensor,
    y: Tensor,
    offsets: Tensor,
    row_idx: Tensor | None,
    is_w_transposed: bool,
    arch: str,
    tile: str = "auto",
) -> None: ...
def grouped_gemm_weight_gradient(
    grad: Tensor,
    x: Tensor,
    grad_w: Tensor,
    offsets: Tensor,
    row_idx: Tensor | None,
    accumulates: bool,
    arch: str,
    tile: str = "auto",
) -> None: ...
def grouped_swiglu_forward(
    x: Tensor,
    w: Tensor,
    hidden: Tensor,
    gate_up: Tensor | None,
    offsets: Tensor,
    row_idx: Tensor | None,
    arch: str,
    tile: str = "auto",
) -> None: ...
def grouped_swiglu_backward(
    grad: Tensor,
    w: Tensor,
    gate_up: Tensor,
    grad_gate_up: Tensor,
    offsets: Tensor,
    arch: str,
    tile: str = "auto",
) -> None: ...
def grouped_gemm_plan(
    step: str,
    num_rows: int,
    num_experts: int,
    num_columns: int,
    depth: int,
    capability: tuple[int, int],
    num_sms: int,
    arch: str = "auto",
) -> dict[str, str | int]: ...
def mla_decode_plan(seq_lens: Tensor, plan: Tensor, max_rows: int) -> None: ...
def mla_decode_forward(
    q: Tensor,
    cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    plan: Tensor,
    out: Tensor,
    lse: Tensor,
    partial_out: Tensor,
    partial_lse: Tensor,
    scale: float,
    arch: str,
) -> None: ...
def mla_decode_num_parts(num_new: int, num_heads: int, num_sms: int) -> int: ...
def mla_decode_plan_of(seq_lens: Sequence[int], num_parts: int, max_rows: int) -> list[tuple[int, int]]: ...
def mla_decode_sm80_plan(num_new: int, num_heads: int, max_shared_bytes: int) -> dict[str, int]: ...
def mla_prefill_plan(
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    plan: Tensor,
    num_queries: int,
    num_keys: int,
    side: str,
    tile_rows: int,
    block_rows: int,
    causal: bool,
) -> None: ...
def mla_prefill_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    plan: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    arch: str,
) -> None: ...
def mla_prefill_plan_of(
    cu_seqlens_q: Sequence[int],
    cu_seqlens_k: Sequence[int],
    num_queries: int,
    num_keys: int,
    side: str,
    tile_rows: int,
    block_rows: int,
    causal: bool,
) -> list[tuple[int, int]]: ...
def mla_prefill_plan_size(num_rows: int, num_sequences: int) -> int: ...
def mla_prefill_class(cost: int) -> int: ...
def mla_prefill_sm80_plan(
    width: int, value_width: int, shared_per_sm: int, shared_per_block: int
) -> dict[str, int]: ...
def mla_prefill_works(num_tiles: int, num_heads: int) -> list[tuple[int, int]]: ...
def mla_prefill_backward(
    grad_out: Tensor,
    saved: Sequence[Tensor],
    cu_seqlens: Sequence[Tensor],
    scratch: Sequence[Tensor],
    grads: Sequence[Tensor],
    scale: float,
    causal: bool,
    deterministic: bool,
    arch: str,
) -> None: ...
def mla_prefill_num_sums(num_queries: int, num_sequences: int) -> int: ...

class CommBuffer:
    """One rank's memory of an exchange: slots that its peers write, flags, and the status of its waits."""

    def __init__(
        self,
        *,
        rank: int,
        num_ranks: int,
        max_tokens: int,
        row_bytes: int,
        num_topk: int,
        timeout: float,
        device: int = 0,
        copy: str = "auto",
        num_blocks: int = 0,
    ) -> None: ...
    @property
    def rank(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def address(self) -> int: ...
    def handle(self) -> bytes: ...
    def open(self, peer: int, handle: bytes) -> None: ...
    def connect(self, peer: CommBuffer) -> None: ...
    def status(self) -> dict[str, int | str] | None: ...
    def fail(self) -> None: ...
    def disconnect(self) -> None: ...
    def close(self) -> None: ...

def expert_routes(
    idx: Sequence[Tensor], slot: Sequence[Tensor], count: Sequence[Tensor], num_experts: int
) -> None: ...
def dispatch_send(
    buffers: Sequence[CommBuffer],
    x: Sequence[Tensor],
    slot: Sequence[Tensor],
    count: Sequence[Tensor],
    idx: Sequence[Tensor] | None = None,
    weight: Sequence[Tensor] | None = None,
) -> None: ...
def dispatch_counts(buffers: Sequence[CommBuffer], count: Sequence[Tensor]) -> None: ...
def dispatch_receive(
    buffers: Sequence[CommBuffer],
    x: Sequence[Tensor],
    count: Sequence[Tensor],
    idx: Sequence[Tensor] | None = None,
    weight: Sequence[Tensor] | None = None,
    row_begin: Sequence[Sequence[int]] | None = None,
    num_local_experts: int = 0,
) -> None: ...
def dispatch_together(
    buffers: Sequence[CommBuffer],
    sent: tuple[
        Sequence[Tensor],
        Sequence[Tensor],
        Sequence[Tensor],
        Sequence[Tensor] | None,
        Sequence[Tensor] | None,
    ],
    received: tuple[
        Sequence[Tensor],
        Sequence[Tensor],
        Sequence[Tensor] | None,
        Sequence[Tensor] | None,
        Sequence[Sequence[int]] | None,
        int,
    ],
) -> None: ...
def combine_send(
    buffers: Sequence[CommBuffer],
    y: Sequence[Tensor],
    count: Sequence[Tensor],
    weight: Sequence[Tensor] | None = None,
    row_begin: Sequence[Sequence[int]] | None = None,
) -> None: ...
def combine_receive(
    buffers: Sequence[CommBuffer],
    out: Sequence[Tensor],
    slot: Sequence[Tensor],
    count: Sequence[Tensor],
    weight: Sequence[Tensor] | None = None,
) -> None: ...
def combine_together(
    buffers: Sequence[CommBuffer],
    sent: tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor] | None, Sequence[Sequence[int]] | None],
    received: tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], Sequence[Tensor] | None],
) -> None: ...
def comm_buffer_layout(num_ranks: int, max_tokens: int, row_bytes: int, num_topk: int) -> dict[str, int]: ...
def comm_num_blocks(num_sms: int, num_launched: int, num_roles: int) -> int: ...
def fim_plan(
    texts: tuple[str, ...],
    keys: NDArray[np.uint64],
    sentinels: Sequence[str],
    rate: float,
    spm_share: float,
    cut_at_lines: bool,
    seed: int,
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]: ...
def pack_plan(
    lengths: NDArray[np.int64], window: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]: ...
