"""How the ranks of one node come to write into each other's memory, and when they cannot."""

import socket
from pathlib import Path
from typing import Any

import torch

from dscoder.ops.exchange_transport import ExchangeSizes
from dscoder.ops.peer_transport import ROW_GRANULE, PeerTransport
from dscoder.ops.roll_call import RollCall
from dscoder.runtime import native

MAX_RANKS, MAX_TOKENS, MAX_TOPK = 8, 131072, 16  # as in csrc/comm/comm_layout.h
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # tells machines of one name apart


def connect_peers(
    roll_call: RollCall, sizes: ExchangeSizes, *, device: torch.device, timeout: float
) -> PeerTransport | str:
    """The transport, or what it wants and does not get: the same answer on every rank."""
    places = roll_call.share("places", _place(sizes, device))
    refusal = group_refusal(places)
    if refusal is not None:
        return refusal
    faults = roll_call.share("peer access", _unreachable(device, places))
    fault = _first_fault(faults)
    if fault is not None:
        return fault
    return _open(roll_call, sizes, device, timeout)


def own_refusal(sizes: ExchangeSizes, device: torch.device) -> str | None:
    """What the kernels want of this rank and do not get, or None."""
    row_bytes = sizes.hidden * sizes.dtype.itemsize
    if device.type != "cuda":
        return f"tensors on a GPU, got {device.type}"
    if not native.has_kernels():
        return "a build with kernels"
    capability = torch.cuda.get_device_capability(device)
    if native.arch_for(capability) is None:
        return f"kernels for compute capability {capability[0]}.{capability[1]}, got {native.cuda_archs()}"
    if sizes.dtype not in DTYPES:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        return f"dtype {wanted}, got {str(sizes.dtype).removeprefix('torch.')}"
    if row_bytes % ROW_GRANULE:
        return f"rows of a multiple of {ROW_GRANULE} bytes, got {row_bytes}"
    limits = {"ranks": MAX_RANKS, "max_tokens": MAX_TOKENS, "num_topk": MAX_TOPK}
    got = {"ranks": sizes.num_ranks, "max_tokens": sizes.max_tokens, "num_topk": sizes.num_topk}
    return next(
        (f"at most {limits[name]} {name}, got {got[name]}" for name in got if got[name] > limits[name]), None
    )


def group_refusal(places: list[dict[str, Any]]) -> str | None:
    """What the kernels want of the ranks together, or None: of each by itself first, then one host."""
    for rank, place in enumerate(places):
        if place["refusal"] is not None:
            return f"{place['refusal']} on rank {rank}"
        if place["host"] != places[0]["host"]:
            return (
                f"all ranks on one host, got {places[0]['host'][0]} and, on rank {rank}, {place['host'][0]}"
            )
    return None


def _place(sizes: ExchangeSizes, device: torch.device) -> dict[str, Any]:
    refusal = own_refusal(sizes, device)
    boot_id = _BOOT_ID.read_text().strip() if _BOOT_ID.is_file() else ""
    return {
        "host": [socket.gethostname(), boot_id],
        "gpu": None if refusal else _gpu_id(device),
        "refusal": refusal,
    }


def _gpu_id(device: torch.device | int) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)


def _unreachable(device: torch.device, places: list[dict[str, Any]]) -> str | None:
    """Which rank's GPU this one cannot write to; what this process cannot see shows when it is opened."""
    visible = {_gpu_id(index): index for index in range(torch.cuda.device_count())}
    for rank, place in enumerate(places):
        index = visible.get(place["gpu"], device.index)
        if index != device.index and not torch.cuda.can_device_access_peer(device, index):
            return f"peer access to the GPU of rank {rank}"
    return None


def _first_fault(faults: list[str | None]) -> str | None:
    return next((f"{fault}, on rank {rank}" for rank, fault in enumerate(faults) if fault), None)


def _open(
    roll_call: RollCall, sizes: ExchangeSizes, device: torch.device, timeout: float
) -> PeerTransport | str:
    """Makes this rank's buffer and opens those of the others."""
    buffer, handle, fault = None, "", None
    try:
        buffer = native._C.CommBuffer(
            rank=sizes.rank,
            num_ranks=sizes.num_ranks,
            max_tokens=sizes.max_tokens,
            row_bytes=sizes.hidden * sizes.dtype.itemsize,
            num_topk=sizes.num_topk,
            timeout=timeout,
            device=device.index,
        )
        handle = buffer.handle().hex()
    except RuntimeError as error:
        fault = f"memory for its buffer ({error})"
    faults = roll_call.share("buffers", fault)
    handles = roll_call.share("handles", handle)
    if buffer is not None and not any(faults):
        fault = _open_handles(buffer, handles)
    faults = faults if any(faults) else roll_call.share("connections", fault)
    refusal = _first_fault(faults)
    if refusal is None:
        return PeerTransport(sizes, buffer, device=device, roll_call=roll_call)
    if buffer is not None:
        buffer.disconnect()
    roll_call.share("disconnections", None)  # no rank frees what another has mapped
    if buffer is not None:
        buffer.close()
    return refusal


def _open_handles(buffer: Any, handles: list[str]) -> str | None:
    for peer, handle in enumerate(handles):
        if peer == buffer.rank:
            continue
        try:
            buffer.open(peer, bytes.fromhex(handle))
        except RuntimeError as error:
            return f"the buffer of rank {peer} to open ({error})"
    return None
