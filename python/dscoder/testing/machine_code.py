"""What nvcc made of a kernel: registers and spills from ptxas's report, opcodes from the machine code."""

import functools
import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

# ptxas: setmaxnreg ignored (C7508); wgmma serialised for a call, registers, or what defines accumulators.
LOSSES = ("C7508", "C7510", "C7511", "C7515")


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
