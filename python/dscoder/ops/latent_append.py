"""latent_append: latent_rope while decoding, its results written where they are wanted.

The rows go to the paged cache, the rotated queries beside the queries in the latent space that the absorbed
form of latent attention makes of the rest (DeepSeek-V2, arXiv 2405.04434, appendix C).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dscoder.ops.latent_rope import check_latent_rope, has_kernel, kernel_projections, normed, rotated
from dscoder.ops.library import accumulate_dtype, check_devices, check_shape, check_tensor, define_op
from dscoder.ops.rope import angles_at, kernel_angles
from dscoder.runtime import native


@dataclass(frozen=True, kw_only=True, slots=True)
class AppendTarget:
    """What `latent_append` writes to, in place."""

    slots_T: Tensor  # int64, the row of the cache for each token; outside [0, P * L): written nowhere
    cache_PLd: Tensor  # rows of C + r
    query_out_THd: Tensor  # rows of C + r, of which the last r are written


def latent_append(
    query_THd: Tensor,
    latent_Td: Tensor,
    weight_C: Tensor,
    cos_Lf: Tensor,
    sin_Lf: Tensor,
    positions_T: Tensor,
    *,
    eps: float,
    target: AppendTarget,
) -> None:
    """Write what `latent_rope` gives: rows to their slots, the queries' rotated part to `query_out_THd`.

    In place: row t goes to row slots_T[t] of the cache, its pages seen as one list of P * L rows, and the
    last r columns of query head h to columns C and on of query_out[t, h]; nothing else is written. Tokens
    whose slot is inside the cache have one each, or the row there is of no use. Nothing waits for the
    device. No argument gets a gradient.
    """
    op = "latent_append"
    check_latent_rope(op, query_THd, latent_Td, weight_C, (cos_Lf, sin_Lf, positions_T), eps)
    if not isinstance(target, AppendTarget):
        raise TypeError(f"{op}: target must be an AppendTarget, got {type(target).__name__}")
    num_tokens, width = latent_Td.shape
    slots_T, cache_PLd, query_out = target.slots_T, target.cache_PLd, target.query_out_THd
    check_tensor(op, "slots", slots_T, num_dims=1, dtypes=(torch.int64,))
    check_shape(op, "slots", slots_T, (num_tokens,))
    check_tensor(op, "cache", cache_PLd, num_dims=3, dtypes=(query_THd.dtype,))
    check_shape(op, "cache", cache_PLd, (*cache_PLd.shape[:2], width))
    check_tensor(op, "query_out", query_out, num_dims=3, dtypes=(query_THd.dtype,))
    check_shape(op, "query_out", query_out, (num_tokens, query_THd.shape[1], width))
    check_devices(op, query=query_THd, slots=slots_T, cache=cache_PLd, query_out=query_out)
    projections = (query_THd.detach(), latent_Td.detach(), weight_C.detach())
    torch.ops.dscoder.latent_append.default(
        *projections, cos_Lf, sin_Lf, positions_T, eps, slots_T, cache_PLd, query_out
    )


def _forward(
    query_THd: Tensor,
    latent_Td: Tensor,
    weight_C: Tensor,
    cos_Lf: Tensor,
    sin_Lf: Tensor,
    positions_T: Tensor,
    eps: float,
    *target: Tensor,
) -> None:
    slots_T, cache_PLd, query_out_THd = target
    dtype, width = accumulate_dtype(query_THd.dtype), weight_C.shape[0]
    angles = angles_at(cos_Lf, sin_Lf, positions_T, dtype=dtype, inverse=False)
    first = query_THd.shape[-1] - 2 * cos_Lf.shape[-1]
    # The key is one more head: one rotation costs half of two where tokens are few.
    heads = rotated(torch.cat([query_THd[..., first:], latent_Td[:, None, width:]], dim=1), angles)
    query_out_THd[..., width:] = heads[:, :-1]
    latent_TC, _ = normed(latent_Td[:, :width], weight_C, eps)
    _write_rows(cache_PLd, slots_T, torch.cat([latent_TC, heads[:, -1]], dim=-1))


def _write_rows(cache_PLd: Tensor, slots_T: Tensor, row_Td: Tensor) -> None:
    """A token with no slot writes what the first that has one writes: no size has to come to the host."""
    num_pages, page_size, _ = cache_PLd.shape
    num_slots = num_pages * page_size
    if not len(slots_T) or not num_slots:
        return
    is_inside_T = (slots_T >= 0) & (slots_T < num_slots)
    if slots_T.is_cpu and is_inside_T.all():
        cache_PLd.index_put_((slots_T // page_size, slots_T % page_size), row_Td)
        return
    tokens_T = torch.arange(len(slots_T), device=slots_T.device)
    source_T = torch.where(is_inside_T, tokens_T, is_inside_T.int().argmax())
    # Where no token has a slot, all of them write the first row as it was.
    is_any = is_inside_T.any()
    slots_T = slots_T[source_T].where(is_any, 0)
    row_Td = row_Td[source_T].where(is_any, cache_PLd[0, 0])
    cache_PLd.index_put_((slots_T // page_size, slots_T % page_size), row_Td)


def _forward_kernel(
    query_THd: Tensor,
    latent_Td: Tensor,
    weight_C: Tensor,
    cos_Lf: Tensor,
    sin_Lf: Tensor,
    positions_T: Tensor,
    eps: float,
    *target: Tensor,
) -> None:
    slots_T, cache_PLd, query_out_THd = target
    is_whole = all(x.is_contiguous() and x.data_ptr() % 16 == 0 for x in (cache_PLd, query_out_THd))
    if not is_whole or not has_kernel(query_THd, latent_Td, weight_C):
        return _forward(query_THd, latent_Td, weight_C, cos_Lf, sin_Lf, positions_T, eps, *target)
    native._C.latent_append_forward(
        *kernel_projections(query_THd, latent_Td, weight_C),
        kernel_angles(cos_Lf, sin_Lf, positions_T),
        slots_T.contiguous(),
        cache_PLd,
        query_out_THd,
        eps,
    )


def _fake(*_: Any) -> None:
    return None


define_op(
    "latent_append(Tensor query, Tensor latent, Tensor weight, Tensor cos, Tensor sin, Tensor positions,"
    " float eps, Tensor slots, Tensor(a!) cache, Tensor(b!) query_out) -> ()",
    reference=_forward,
    kernel=_forward_kernel,
    fake=_fake,
)
