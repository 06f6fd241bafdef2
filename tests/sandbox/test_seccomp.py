"""The filter as the kernel reads it: interpreted here, for both machines, call by call."""

import errno
import struct

import pytest

from dscoder.sandbox import seccomp
from dscoder.sandbox.seccomp import AARCH64, ALLOW, FAIL, KILL, X86_64, Machine, filter_program

NEWEST = 469
MACHINES = pytest.mark.parametrize("machine", [X86_64, AARCH64], ids=["x86_64", "aarch64"])


def answer(program: bytes, *, number: int, audit: int, arguments: tuple[int, ...] = ()) -> int:
    """What the filter says to one call; an interpreter of the six instructions it is made of."""
    data = struct.pack("<IIQ6Q", number, audit, 0, *arguments, *[0] * (6 - len(arguments)))
    instructions = list(struct.iter_unpack("<HBBI", program))
    place = value = 0
    while True:
        code, if_true, if_false, operand = instructions[place]
        place += 1
        if code == 0x06:
            return operand
        if code == 0x20:
            (value,) = struct.unpack_from("<I", data, operand)
            continue
        if code == 0x54:
            value &= operand
            continue
        is_taken = {0x15: value == operand, 0x35: value >= operand, 0x45: bool(value & operand)}[code]
        place += if_true if is_taken else if_false


def ask(machine: Machine, number: int, *arguments: int, is_in_namespace: bool = True) -> int:
    program = filter_program(machine, is_in_namespace=is_in_namespace)
    return answer(program, number=number, audit=machine.audit, arguments=arguments)


@MACHINES
def test_each_listed_call_has_its_answer(machine: Machine) -> None:
    assert {ask(machine, number) for number in machine.killed.values()} == {KILL}
    assert {ask(machine, number) for number in machine.refused.values()} == {FAIL | errno.EPERM}
    assert {ask(machine, number) for number in machine.absent.values()} == {FAIL | errno.ENOSYS}


@MACHINES
def test_every_other_call_passes(machine: Machine) -> None:
    listed = {*machine.killed.values(), *machine.refused.values(), *machine.absent.values(), *machine.socket}
    others = set(range(NEWEST + 1)) - listed
    assert {ask(machine, number) for number in others} == {ALLOW}


@MACHINES
def test_a_call_that_nobody_has_looked_at_is_absent(machine: Machine) -> None:
    others = [NEWEST + 1, NEWEST + 2, 512, 547, 4096]
    assert {ask(machine, number) for number in others} == {FAIL | errno.ENOSYS}


@MACHINES
def test_limits_and_priorities_of_another_process_are_refused(machine: Machine) -> None:
    denied = FAIL | errno.EPERM
    for number in machine.own:
        assert (ask(machine, number, 0, 1), ask(machine, number, 1, 0)) == (ALLOW, denied)
    for number, whole_user in machine.own_kind.items():
        process, group = whole_user - 2, whole_user - 1
        assert (ask(machine, number, process, 0), ask(machine, number, group, 0)) == (ALLOW, ALLOW)
        assert (ask(machine, number, process, 1), ask(machine, number, whole_user, 0)) == (denied, denied)


@MACHINES
def test_outside_a_namespace_no_socket_reaches_another(machine: Machine) -> None:
    stream, datagram, seqpacket, no_delay, denied = 1, 2, 5, 0o4000, FAIL | errno.EPERM
    for number in machine.socket:
        assert ask(machine, number, 1, datagram) == ALLOW
        assert ask(machine, number, 1, stream | no_delay, is_in_namespace=False) == ALLOW
        for kind in (datagram, seqpacket, datagram | no_delay):
            assert ask(machine, number, 1, kind, is_in_namespace=False) == denied
    assert ask(machine, machine.connect, 3) == ALLOW
    assert ask(machine, machine.connect, 3, is_in_namespace=False) == denied


@MACHINES
def test_no_call_is_listed_twice(machine: Machine) -> None:
    listed = [*machine.killed.values(), *machine.refused.values(), *machine.absent.values()]
    single = [machine.clone, machine.kill, machine.connect]
    numbers = [*listed, *single, *machine.socket, *machine.own, *machine.own_kind]
    assert len(numbers) == len(set(numbers))


@MACHINES
def test_only_local_sockets_open(machine: Machine) -> None:
    for number in machine.socket:
        assert ask(machine, number, 1) == ALLOW
        assert {ask(machine, number, family) for family in (2, 10, 16, 17)} == {FAIL | errno.EPERM}


@MACHINES
def test_clone_makes_threads_and_processes_but_no_namespace(machine: Machine) -> None:
    fork, thread = 0x01200011, 0x003D0F00
    assert {ask(machine, machine.clone, flags) for flags in (fork, thread)} == {ALLOW}
    namespaces = [0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000]
    assert {ask(machine, machine.clone, fork | flag) for flag in namespaces} == {KILL}


@MACHINES
def test_a_signal_to_everything_is_refused_only_outside_a_namespace(machine: Machine) -> None:
    everything = 2**64 - 1
    assert ask(machine, machine.kill, everything) == ALLOW
    assert ask(machine, machine.kill, everything, is_in_namespace=False) == FAIL | errno.EPERM
    assert ask(machine, machine.kill, 17, is_in_namespace=False) == ALLOW


def test_calls_of_another_architecture_are_killed() -> None:
    program = filter_program(X86_64, is_in_namespace=True)
    i386, x32 = 0x40000003, 0x40000000
    assert answer(program, number=1, audit=i386) == KILL
    assert answer(program, number=x32 + 1, audit=X86_64.audit) == KILL
    assert ask(AARCH64, 1) == ALLOW


def test_a_machine_without_a_table_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seccomp.platform, "machine", lambda: "vax")
    with pytest.raises(ValueError, match="machine must be one of x86_64, aarch64, got vax"):
        seccomp.filter_here(is_in_namespace=True)
