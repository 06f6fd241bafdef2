"""mla_decode beside its peers, and attention with it beside keys and values that are expanded.

"forward" is a call whose plan was made before, as for all layers of a step but the first, "plan and forward"
one that makes its own, "plan" the plan alone. Peers' plans are made before they are timed.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.shapes import DEVICE, DTYPE, IS_ON_GPU, ITEM, peers_of
from dscoder import ops
from dscoder.testing import cases
from dscoder.testing.decode import SCALE, VALUE_DIM, WIDTH, DecodeCase, decode_case, plan_for, random_lengths
from dscoder.testing.measure import Problem
from dscoder.testing.peer import Peer, Run
from dscoder.testing.results import Case

HEADS = {"v2_lite": 16, "v2": 128}
NOPE, ROPE, VALUE = 128, 64, 128  # widths of a head
# model, B, S, rows of each sequence; what targets are about comes first.
SHORT = [("v2_lite", B, 1, 1024) for B in (1, 4, 16)] if IS_ON_GPU else [("v2_lite", 1, 1, 256)]
CALLS = (
    [
        *(("v2_lite", 128, 1, 4096), ("v2", 128, 1, 4096), *SHORT),
        *(("v2_lite", 16, 1, 4096), ("v2_lite", 1, 1, 32768), ("v2_lite", 32, 1, 32768)),
        *(("v2_lite", 128, 2, 4096), ("v2_lite", 128, 4, 4096)),
        *(("v2", 1, 1, 1024), ("v2", 16, 1, 1024), ("v2", 32, 1, 32768), ("v2", 128, 2, 4096)),
    ]
    if IS_ON_GPU
    else [("v2_lite", 8, 1, 512), ("v2_lite", 8, 4, 512), ("v2", 2, 1, 256), *SHORT]
)
UNEVEN = [(model, 128 if IS_ON_GPU else 8, 8192 if IS_ON_GPU else 512) for model in HEADS]  # the longest
WHOLE = (
    [("v2_lite", 64, 1, 4096), ("v2", 16, 1, 4096)]
    if IS_ON_GPU
    else [("v2_lite", 8, 1, 512), ("v2_lite", 8, 4, 512), ("v2", 2, 1, 256)]
)


def shape_of(model: str, num_sequences: int, num_new: int, rows: int | str) -> str:
    """As a record holds it."""
    return f"H={HEADS[model]} B={num_sequences} S={num_new} rows={rows}"


def case_of(model: str, problem: DecodeCase, step: str, shape: str, op: str = "mla_decode") -> Case:
    """Each new token counts as seeing all rows; every row is read once, queries and outputs go once."""
    q, _, _, seq_lens = problem
    num_new, num_heads = q.shape[1:3]
    num_rows = int(seq_lens.sum())
    values = num_rows * WIDTH + q.numel() // WIDTH * (WIDTH + VALUE_DIM)
    flops = 2.0 * num_new * num_heads * num_rows * (WIDTH + VALUE_DIM)
    return Case(op=op, step=step, model=model, shape=shape, dtype=DTYPE, flops=flops, num_bytes=ITEM * values)


def tame_case(name: str, model: str, lengths: list[int], num_new: int) -> DecodeCase:
    """Without the poison: some peers read behind a sequence's end before they mask it."""
    rng = cases.generator(name, DEVICE)
    q, cache, table, seq_lens = decode_case(
        rng, lengths, num_new=num_new, num_heads=HEADS[model], dtype=DTYPE
    )
    return q, cache.nan_to_num_(), table.clamp_(0, len(cache) - 1), seq_lens


def attended(*case: Tensor, arch: str = "auto", value_dim: int, scale: float) -> Tensor:
    """The call makes its plan. The log-sum-exp is made too; not every peer gives it."""
    return ops.mla_decode(*case, value_dim=value_dim, scale=scale, arch=arch)[0]


def planned(arch: str = "auto") -> Peer:
    """The same with a plan made before."""

    def prepare(*case: Tensor, value_dim: int, scale: float) -> Run:
        plan = plan_for(case)
        options = {"value_dim": value_dim, "scale": scale, "plan": plan, "arch": arch}
        return Run(call=lambda: ops.mla_decode(*case, **options)[0])

    return Peer(prepare=prepare)


def problem_of(case: DecodeCase) -> Problem:
    """What ours and the peers are called with."""
    return Problem(args=case, kwargs={"value_dim": VALUE_DIM, "scale": SCALE})


@pytest.mark.parametrize(("model", "num_sequences", "num_new", "num_rows"), CALLS)
def test_forward(
    measure: Callable[..., None], model: str, num_sequences: int, num_new: int, num_rows: int
) -> None:
    shape = shape_of(model, num_sequences, num_new, num_rows)
    case = tame_case(shape, model, [num_rows] * num_sequences, num_new)
    peers = peers_of("mla_decode", "forward")
    if (num_sequences, num_new, num_rows) != CALLS[0][1:]:
        peers.pop("torch.compile", None)  # it takes seconds for each shape
    measure(case_of(model, case, "forward", shape), problem_of(case), planned(), peers)


@pytest.mark.parametrize(("model", "num_sequences", "longest"), UNEVEN)
def test_forward_over_lengths_of_all_kinds(
    measure: Callable[..., None], model: str, num_sequences: int, longest: int
) -> None:
    shape = shape_of(model, num_sequences, 1, f"1..{longest}")
    drawn = random_lengths(cases.generator(shape), num_sequences, longest - 1)
    case = tame_case(shape, model, [length + 1 for length in drawn], 1)
    peers = peers_of("mla_decode", "forward")
    peers.pop("torch.compile", None)
    measure(case_of(model, case, "forward", shape), problem_of(case), planned(), peers)


@pytest.mark.parametrize(("model", "num_sequences", "num_new", "num_rows"), [*SHORT, CALLS[0]])
def test_plan_and_forward(
    measure: Callable[..., None], model: str, num_sequences: int, num_new: int, num_rows: int
) -> None:
    shape = shape_of(model, num_sequences, num_new, num_rows)
    case = tame_case(shape, model, [num_rows] * num_sequences, num_new)
    step = "plan and forward"
    measure(case_of(model, case, step, shape), problem_of(case), attended, {"planned": planned()})


@pytest.mark.parametrize("num_sequences", [1, 128])
def test_plan(measure: Callable[..., None], num_sequences: int) -> None:
    shape = shape_of("v2_lite", num_sequences, 1, 4096)
    seq_lens = torch.full((num_sequences,), 4096, dtype=torch.int32, device=DEVICE)
    case = Case(op="mla_decode", step="plan", model="v2_lite", shape=shape, dtype=torch.int32)
    problem = Problem(args=(seq_lens,), kwargs={"num_new": 1, "num_heads": 16, "max_rows": 1 << 17})
    measure(case, problem, ops.mla_decode_plan, {})


# ---- attention as a whole, with the products into and out of the latent space ----


def expand(rows: Tensor, key_up: Tensor, value_up: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [B, R, C + r] -> keys [B, H, R, n + r] and values [B, H, R, v]."""
    num_heads, _, latent_width = key_up.shape
    latent, rotated = rows[..., :latent_width], rows[..., None, latent_width:]
    kv = F.linear(latent, torch.cat([key_up, value_up], dim=1).flatten(0, 1))
    key, value = kv.unflatten(-1, (num_heads, -1)).split([key_up.shape[1], value_up.shape[1]], dim=-1)
    key = torch.cat([key, rotated.expand(-1, -1, num_heads, -1)], dim=-1)
    return key.transpose(1, 2), value.transpose(1, 2)


def attend(q: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """torch's fused attention; one new token sees all, which needs no mask."""
    num_new, num_rows = q.shape[1], key.shape[2]
    mask = None
    if num_new > 1:
        mask = torch.ones(num_new, num_rows, dtype=torch.bool, device=q.device).tril(num_rows - num_new)
    out = F.scaled_dot_product_attention(q.transpose(1, 2), key, value, attn_mask=mask, scale=SCALE)
    return out.transpose(1, 2)


def expanded(q: Tensor, rows: Tensor, key_up: Tensor, value_up: Tensor, *_: Tensor) -> Tensor:
    """From a cache of latents, all of them expanded anew in each call."""
    return attend(q, *expand(rows, key_up, value_up))


def kept(q: Tensor, rows: Tensor, key_up: Tensor, value_up: Tensor, *_: Tensor) -> Run:
    """From a cache of keys and values, 9 (V2-Lite) and 71 (V2) times the bytes of latents."""
    key, value = (x.contiguous() for x in expand(rows, key_up, value_up))
    return Run(call=lambda: attend(q, key, value))


def absorbed(q: Tensor, _rows: Tensor, key_up: Tensor, value_up: Tensor, *pages: Tensor) -> Run:
    """Ours: into the latent space, over the pages, and out of it."""
    cache, table, seq_lens = pages
    query = torch.cat([q.new_empty(*q.shape[:3], VALUE_DIM), q[..., NOPE:]], dim=-1)
    plan = plan_for((query, cache, table, seq_lens))

    def call() -> Tensor:
        latent = torch.einsum("bshn,hnc->bshc", q[..., :NOPE], key_up)
        query = torch.cat([latent, q[..., NOPE:]], dim=-1)
        out, _ = ops.mla_decode(query, cache, table, seq_lens, value_dim=VALUE_DIM, scale=SCALE, plan=plan)
        return torch.einsum("bshc,hvc->bshv", out, value_up)

    return Run(call=call)


@pytest.mark.parametrize(("model", "num_sequences", "num_new", "num_rows"), WHOLE)
def test_whole_attention(
    measure: Callable[..., None], model: str, num_sequences: int, num_new: int, num_rows: int
) -> None:
    shape = shape_of(model, num_sequences, num_new, num_rows)
    case = tame_case(shape, model, [num_rows] * num_sequences, num_new)
    _, cache, table, _ = case
    rows = cache[table[:, : num_rows // cache.shape[1]].long()].flatten(1, 2)
    rng = cases.generator(f"{shape} whole", DEVICE)
    q = cases.randn(rng, num_sequences, num_new, HEADS[model], NOPE + ROPE, dtype=DTYPE)
    key_up, value_up = (
        (cases.randn(rng, HEADS[model], width, VALUE_DIM) * VALUE_DIM**-0.5).to(DTYPE)
        for width in (NOPE, VALUE)
    )
    peers = {"expanded": expanded, "keys and values kept": Peer(prepare=kept)}
    problem = Problem(args=(q, rows, key_up, value_up, *case[1:]))
    measure(
        case_of(model, case, "forward", shape, "mla_decode_attention"), problem, Peer(prepare=absorbed), peers
    )
