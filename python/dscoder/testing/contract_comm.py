"""The build contract's rows of the kernels that reach other devices' memory (csrc/comm).

Registers leave two blocks an SM, which comm_num_blocks counts on; bulk copies move rows on sm_90a, 16-byte
accesses elsewhere; flags are acquired and released at system scope.
"""

from collections.abc import Sequence

from dscoder.testing.contract import Kernel

REGISTERS = 128  # 65536 of an SM, for two blocks of 256 threads
WORDS, BULK = "WordMover", "BulkMover"
RECEIVED, RELEASED, COUNTED = "LDG.E.64.STRONG.SYS", "STG.E.64.STRONG.SYS", "ATOMG.E.ADD.STRONG.SYS"
FENCE, STORES_MADE = "MEMBAR.ALL.SYS", "DEPBAR"
BULK_LOAD, BULK_STORE, PROXY_FENCE = "UBLKCP.S.G", "UBLKCP.G.S", "FENCE.VIEW.ASYNC.G"
_SENDS = {"LDG.E.STRONG.SYS": 1, RELEASED: 1, COUNTED: 1, FENCE: 1, "NANOSLEEP": 1}
_RECEIVES = {RECEIVED: 1, **_SENDS}
_MOVES = {
    WORDS: {"LDG.E.128": 8, "STG.E.128": 8},
    BULK: {
        **{BULK_LOAD: 2, BULK_STORE: 1, PROXY_FENCE: 1, STORES_MADE: 1},
        "SYNCS.PHASECHK.TRANS64.TRYWAIT": 1,
    },
}
_ARCHS = {WORDS: ("sm_80", "sm_90a"), BULK: ("sm_90a",)}
_SUMS = {"LDG.E.128": 8, "STG.E.128": 1}  # the words of eight ranks, all under way


def _kernel(*wants: dict[str, int], mover: str = WORDS, shared: int = 0) -> Kernel:
    merged: dict[str, int] = {}
    for part in wants:
        merged |= {name: max(number, merged.get(name, 0)) for name, number in part.items()}
    return Kernel(
        registers=REGISTERS,
        shared=shared,
        wants=merged,
        archs=_ARCHS[mover],
        is_overlapped=False,
        reaches_peers=True,
    )


COMM_KERNELS = {
    "expert_routes_kernel": Kernel(
        registers=40, shared=1024, wants={"LDG.E": 4, "VOTE": 1, "SHFL.IDX": 1}, is_overlapped=False
    ),
    "dispatch_counts_kernel": Kernel(
        registers=40, shared=32, wants={RECEIVED: 1, "NANOSLEEP": 1}, is_overlapped=False
    ),
    **{
        f"{name}<{mover}>": _kernel(_MOVES[mover], role, mover=mover, shared=shared)
        for mover in (WORDS, BULK)
        for name, role, shared in (
            ("dispatch_send_kernel", _SENDS, 0),
            ("dispatch_receive_kernel", _RECEIVES, 128),
            ("dispatch_together_kernel", _RECEIVES, 128),
            ("combine_send_kernel", _SENDS, 128),
        )
    },
    **{
        f"combine_receive_kernel<{dtype}>": _kernel(_SUMS, _RECEIVES, shared=128)
        for dtype in ("float", "__nv_bfloat16", "__half")
    },
    **{
        f"combine_together_kernel<{dtype}, {mover}>": _kernel(
            _MOVES[mover], _SUMS, _RECEIVES, mover=mover, shared=256
        )
        for dtype in ("float", "__nv_bfloat16", "__half")
        for mover in (WORDS, BULK)
    },
}


def broken_exchange(opcodes: Sequence[str]) -> list[str]:
    """What breaks the order of memory that csrc/comm/comm.h promises, in a kernel's machine code."""
    wrong = [f"{opcode}: the read-only path" for opcode in opcodes if ".CONSTANT" in opcode]
    for told in (RELEASED, COUNTED):
        for at in (i for i, opcode in enumerate(opcodes) if opcode.startswith(told)):
            above = [opcode for opcode in opcodes[:at] if opcode.startswith((FENCE, "STG", "UBLKCP"))]
            if not above or not above[-1].startswith(FENCE):
                wrong.append(f"no {FENCE} between what was written and {told}")
    for at in (i for i, opcode in enumerate(opcodes) if opcode.startswith(COUNTED)):
        stores = [i for i in range(at) if opcodes[i].startswith(BULK_STORE)]
        num_waits = (
            sum(opcode.startswith(STORES_MADE) for opcode in opcodes[stores[-1] : at]) if stores else 2
        )
        if num_waits < 2:  # for a stage to be read, and for all stores to be made
            wrong.append(f"no wait for bulk stores above {COUNTED}")
    fences = [i for i, opcode in enumerate(opcodes) if opcode.startswith(PROXY_FENCE)]
    loads = [i for i, opcode in enumerate(opcodes) if opcode.startswith(BULK_LOAD)]
    if loads and (not fences or fences[0] > loads[0]):
        wrong.append(f"no {PROXY_FENCE} above the first bulk copy")
    return wrong
