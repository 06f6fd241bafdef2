"""What nvcc made of a kernel: registers and spills from ptxas's report, opcodes from the machine code."""

import functools
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

# ptxas: setmaxnreg ignored (C7508); wgmma serialised for a call, registers, what defines accumulators, or an
# arrive that ptxas had to add on a branch.
LOSSES = ("C7508", "C7510", "C7511", "C7515", "C7520")


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """What ptxas reports for one kernel on one architecture."""

    registers: int
    shared: int
    spilled: int  # bytes stored and loaded again, a thread


@functools.cache  # each is a process, and each is asked for by many tests
def readable(symbol: str) -> str:
    """`moe_gate_kernel<Layout<8, 8, 8, (Groups)0>>` from a mangled name."""
    name = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout.strip()
    name = re.sub(r"\(anonymous namespace\)::|\b[a-z_0-9]+::", "", name)
    name = re.sub("> (?=>)", ">", name)
    depth, end = 0, len(name)
    for position, letter in enumerate(name):  # the parameter list opens outside all angle brackets
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "(" and depth == 0:
            end = position
            break
    return name[:end].removeprefix("void ")


def parse_usage(report: str) -> dict[tuple[str, str], Usage]:
    """(kernel, architecture) -> usage, from the output of `ptxas -v`."""
    entries = re.split(r"Compiling entry function '", report)[1:]
    found = {}
    for entry in entries:
        head = re.match(r"(\w+)' for '(\w+)'", entry)
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", entry)
        registers = re.search(r"Used (\d+) registers", entry)
        shared = re.search(r"(\d+) bytes smem", entry)
        assert head is not None, entry
        assert spills is not None, entry
        assert registers is not None, entry
        found[readable(head[1]), head[2]] = Usage(
            registers=int(registers[1]),
            shared=int(shared[1]) if shared else 0,
            spilled=int(spills[1]) + int(spills[2]),
        )
    return found


def parse_sass(listing: str) -> dict[str, list[str]]:
    """Kernel -> the opcodes of its machine code in their order, from `cuobjdump -sass`."""
    found = {}
    for entry in listing.split("Function : ")[1:]:
        opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Za-z0-9_.]+)", entry)
        found[readable(entry.split(maxsplit=1)[0])] = opcodes
    return found


def losses(report: str) -> list[str]:
    """Lines of the report that say what costs Hopper its tensor cores."""
    return [line for line in report.splitlines() if any(code in line for code in LOSSES)]


def count(opcodes: Iterable[str], beginning: str) -> int:
    """How many opcodes begin so: LDG.E.128 counts LDG.E.128.CONSTANT too."""
    return sum(opcode.startswith(beginning) for opcode in opcodes)


# ---- what warpgroups write for wgmma to read ----

_STEPS = ("STS.128", "STS", "FENCE.VIEW.ASYNC", "BAR.SYNC", "BAR.ARV", "WARPGROUP.ARRIVE", "HGMMA")
# Zeros over lines of a stage: written, ordered before wgmma's reads, met over, multiplied by.
_BLANKED = ("STS.128", "FENCE.VIEW.ASYNC", "BAR.SYNC", "WARPGROUP.ARRIVE", "HGMMA")
# A strip for the other warpgroup: when all warps have read it, written, ordered, told of.
_TOLD = ("BAR.SYNC", "STS", "FENCE.VIEW.ASYNC", "BAR.ARV")


def broken_telling(opcodes: Sequence[str]) -> list[str]:
    """What breaks these two orders in the machine code of a kernel that keeps them in several places.

    As csrc/attention/mla_decode_sm90.cuh does, whose wide stores to shared memory are zeros alone.
    """
    seen = [next((step for step in _STEPS if opcode.startswith(step)), "") for opcode in opcodes]
    steps = [step for step, _ in groupby(step for step in seen if step)]
    missing = [f"no {step}" for step in _STEPS if step not in steps]
    blanked = [tuple(steps[i : i + len(_BLANKED)]) for i, step in enumerate(steps) if step == _BLANKED[0]]
    told = [tuple(steps[max(0, i - 3) : i + 1]) for i, step in enumerate(steps) if step == _TOLD[-1]]
    wrong = [found for found in blanked if found != _BLANKED] + [found for found in told if found != _TOLD]
    return missing + [f"in the order {' '.join(found)}" for found in wrong]


# ---- attention by wgmma ----

_ZERO_STEPS = ("STS.128", "FENCE.VIEW.ASYNC", "BAR.SYNC", "UTMALDG", "WARPGROUP.ARRIVE", "HGMMA")


def broken_prefill(opcodes: Sequence[str], num_weights: int) -> list[str]:
    """What csrc/attention/mla_prefill_sm90.cuh rests on and the machine code does not keep.

    Zeros over values are written, ordered before wgmma's reads, met over, multiplied by; other wide stores to
    shared memory are the loader's, ahead of its copies. And a row's weights are made while a product is under
    way: so many exponentials between the wait for scores and the one for the product issued behind them,
    where ptxas is free to take a wait ahead of arithmetic.
    """
    seen = [next((step for step in _ZERO_STEPS if opcode.startswith(step)), "") for opcode in opcodes]
    steps = [step for step, _ in groupby(step for step in seen if step)]
    written = [tuple(steps[i : i + len(_BLANKED)]) for i, step in enumerate(steps) if step == _BLANKED[0]]
    zeros = [found for found in written if found[1:2] != ("UTMALDG",)]
    wrong = [f"in the order {' '.join(found)}" for found in zeros if found != _BLANKED]
    waits = [i for i, opcode in enumerate(opcodes) if opcode.startswith(("WARPGROUP.DEPBAR", "HGMMA"))]
    between = [
        count(opcodes[begin:end], "MUFU.EX2")
        for begin, end in pairwise(waits)
        if not opcodes[begin].startswith("HGMMA") and not opcodes[end].startswith("HGMMA")
    ]
    most = max(between, default=0)
    if most < num_weights:
        wrong.append(f"{most} x MUFU.EX2 under a product, at least {num_weights}")
    return wrong if zeros else [*wrong, "no zeros"]


_WRITTEN = "STS"  # stores to shared memory, turned ones (STSM) too
_WRITE_STEPS = (_WRITTEN, "FENCE.VIEW.ASYNC", "BAR.SYNC", "SYNCS.ARRIVE", "HGMMA")


def broken_turning(opcodes: Sequence[str], num_written: int) -> list[str]:
    """What csrc/attention/mla_prefill_backward_sm90.cuh rests on and the machine code does not keep.

    What warps write to shared memory, in so many places, is ordered before the reads of wgmma and the copy
    engine, and told of or met over. Results, which come last, are for threads alone.
    """
    seen = [next((step for step in _WRITE_STEPS if opcode.startswith(step)), "") for opcode in opcodes]
    steps = [step for step, _ in groupby(step for step in seen if step)]
    places = [i for i, step in enumerate(steps) if step == _WRITTEN][:-1]
    wrong = [
        f"in the order {' '.join(steps[i : i + 3])}"
        for i in places
        if steps[i + 1] != _WRITE_STEPS[1] or steps[i + 2] not in ("BAR.SYNC", "SYNCS.ARRIVE")
    ]
    if len(places) < num_written:
        wrong.append(f"written in {len(places)} places, at least {num_written}")
    return wrong
