"""The clauses of the build contract: what each kernel may use, and what its machine code must hold.

tests/csrc/test_build_contract.py compiles the kernels and holds them to it. A new kernel adds a row to
dscoder.testing.contract_kernels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from dscoder.testing.machine_code import Usage, count

ARCHS = ("sm_80", "sm_90a")


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernel:
    """What one kernel may use and must hold, on each architecture it is compiled for."""

    registers: int  # at most, a thread
    shared: int = 0  # bytes of static shared memory, a block
    wants: Mapping[str, int] = field(
        default_factory=dict
    )  # SASS opcode (or its beginning): at least how often
    archs: tuple[str, ...] = ARCHS
    is_overlapped: bool = True  # by launch_overlapped: on sm_90a it waits before it touches global memory
    blanks: bool = False  # lines of a stage, between the copy engine's writing and wgmma's reading
    tells: bool = False  # its warpgroups write what others' products read, in several places
    weighs: int = 0  # exponentials of a thread under a product, in prefill attention by wgmma
    reaches_peers: bool = False  # reads and writes other devices' memory, by the protocol of csrc/comm
    turns: int = 0  # places where its warps write what wgmma or the copy engine reads, in its gradients


# Kernels that may spill, with the bytes a thread: none.
SPILLS: dict[str, int] = {}
# Local memory, which spills and arrays indexed at run time end up in.
NEVER = ("LDL", "STL")
# griddepcontrol.wait and .launch_dependents, and what must not stand above the wait (core/overlap.h).
WAIT, LET_START = "ACQBULK", "PREEXIT"
AFTER_WAIT = ("LDG", "STG", "LD.", "ST.", "ATOM", "RED.", "CCTL", "UBLK", "UTMA", "UBULK", "EXIT", "RET")
# What a warpgroup does to a stage that it blanks (csrc/gemm/grouped_gemm_wgrad_sm90.cuh), in this order.
STORE, MULTIPLY = "STS.128", "HGMMA"
BLANKING = (
    "SYNCS.PHASECHK.TRANS64.TRYWAIT",
    STORE,
    "FENCE.VIEW.ASYNC",
    "BAR.SYNC",
    "WARPGROUP.ARRIVE",
    MULTIPLY,
)


# ---- the clauses ----


def broken_overlap(opcodes: Sequence[str]) -> list[str]:
    """What breaks the rule of core/overlap.h in the machine code of an overlapped kernel."""
    missing = [f"no {name}" for name in (WAIT, LET_START) if name not in opcodes]
    if missing:
        return missing
    above = [opcode for opcode in opcodes[: opcodes.index(WAIT)] if opcode.startswith(AFTER_WAIT)]
    return [f"{opcode} above the wait" for opcode in above]


def broken_blanking(opcodes: Sequence[str]) -> list[str]:
    """What breaks the order of blanking in the machine code of a kernel that does it in one place."""
    steps = [step for opcode in opcodes for step in BLANKING if opcode.startswith(step)]
    missing = [f"no {step}" for step in BLANKING if step not in steps]
    if missing:
        return missing
    end = steps.index(MULTIPLY)
    begin = max((i for i in range(end) if steps[i] == BLANKING[0]), default=0)
    found = tuple(step for step, _ in groupby(steps[begin : end + 1]))
    broken_order = [] if found == BLANKING else [f"blanks in the order {' '.join(found)}"]
    elsewhere = (steps[:begin] + steps[end:]).count(STORE)
    return broken_order + ([f"{elsewhere} x {STORE} elsewhere"] if elsewhere else [])


def broken(kernel: Kernel, usage: Usage, opcodes: Sequence[str], *, may_spill: int = 0) -> list[str]:
    """Each clause of the contract that does not hold."""
    found = []
    if usage.registers > kernel.registers:
        found.append(f"{usage.registers} registers, at most {kernel.registers}")
    if usage.shared > kernel.shared:
        found.append(f"{usage.shared} bytes of shared memory, at most {kernel.shared}")
    if usage.spilled > may_spill:
        found.append(f"{usage.spilled} bytes spilled, at most {may_spill}")
    if not may_spill:
        found += [f"{count(opcodes, name)} x {name}" for name in NEVER if count(opcodes, name)]
    for name, wanted in kernel.wants.items():
        if count(opcodes, name) < wanted:
            found.append(f"{count(opcodes, name)} x {name}, at least {wanted}")
    return found
