"""The system call filter, as a BPF program that the kernel runs on every call.

Three answers. A call that nothing but an attack makes (ptrace, mount, bpf, a new user namespace) kills the
process: the verdict is "security". A call that honest runtimes try and can do without (sockets, io_uring,
keys, another process's limits) fails with an error number, and so does every call that a kernel after Linux
6.17 adds. All others pass; namespaces, limits and missing capabilities bound those.
Numbers are from the kernel's unistd tables; the layout of seccomp_data and the constants from
Documentation/userspace-api/seccomp_filter.rst.
"""

import errno
import platform
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

KILL = 0x8000_0000  # SECCOMP_RET_KILL_PROCESS
FAIL = 0x0005_0000  # SECCOMP_RET_ERRNO, the number in the low 16 bits
ALLOW = 0x7FFF_0000

_LOAD = 0x20  # BPF_LD | BPF_W | BPF_ABS
_EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_AT_LEAST = 0x35  # BPF_JMP | BPF_JGE | BPF_K
_ANY_BIT = 0x45  # BPF_JMP | BPF_JSET | BPF_K
_AND = 0x54  # BPF_ALU | BPF_AND | BPF_K
_RETURN = 0x06  # BPF_RET | BPF_K
_NUMBER, _ARCHITECTURE = 0, 4  # offsets into seccomp_data; both machines are little-endian
_ARGUMENTS = 16
_X32_BIT = 0x4000_0000
_NEW_NAMESPACES = 0x7E02_0000  # CLONE_NEW{USER,PID,NET,IPC,UTS,CGROUP,NS}
_NEWEST = 469  # file_setattr; both machines number calls from 424 on alike
_AF_UNIX = 1
_SOCK_STREAM = 1
_PRIO_USER, _IOPRIO_USER = 2, 3
_SOCKET_KIND = 0xF  # of a socket's type; above it are flags
_MINUS_1 = 0xFFFF_FFFF  # the low half of the argument


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """How one processor family numbers its calls. A call that it lacks is left out."""

    audit: int  # AUDIT_ARCH_*
    has_x32: bool
    clone: int
    kill: int
    socket: Sequence[int]  # socket and socketpair: only AF_UNIX
    connect: int
    own: Sequence[int]  # only of the calling process: argument 0 is 0
    own_kind: Mapping[int, int]  # the same by argument 1, and argument 0 is not this one, a whole user
    killed: Mapping[str, int]
    refused: Mapping[str, int]  # fails with EPERM
    absent: Mapping[str, int]  # fails with ENOSYS, as on a kernel that lacks it


X86_64 = Machine(
    audit=0xC000_003E,
    has_x32=True,
    clone=56,
    kill=62,
    socket=(41, 53),
    connect=42,
    # prlimit64, sched_set{affinity,scheduler,param,attr}; {set,ioprio_}priority
    own=(302, 203, 144, 142, 314),
    own_kind=MappingProxyType({141: _PRIO_USER, 251: _IOPRIO_USER}),
    killed=MappingProxyType(
        {
            **{"ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312},
            **{"mount": 165, "umount2": 166, "pivot_root": 155, "chroot": 161, "setns": 308, "unshare": 272},
            **{"open_tree": 428, "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432},
            **{
                "fspick": 433,
                "mount_setattr": 442,
                "open_tree_attr": 467,
                "open_by_handle_at": 304,
                "swapon": 167,
                "swapoff": 168,
            },
            **{"init_module": 175, "finit_module": 313, "delete_module": 176, "kexec_load": 246},
            **{"kexec_file_load": 320, "reboot": 169, "bpf": 321, "perf_event_open": 298, "acct": 163},
            **{"iopl": 172, "ioperm": 173, "settimeofday": 164, "clock_settime": 227, "quotactl": 179},
            **{"syslog": 103, "sethostname": 170, "setdomainname": 171, "pidfd_getfd": 438},
        }
    ),
    refused=MappingProxyType(
        {"add_key": 248, "request_key": 249, "keyctl": 250, "fanotify_init": 300, "personality": 135}
    ),
    absent=MappingProxyType(
        {
            **{"io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "clone3": 435},
            **{"userfaultfd": 323, "memfd_create": 319, "memfd_secret": 447},
            **{"shmget": 29, "semget": 64, "msgget": 68, "mq_open": 240},
        }
    ),
)
AARCH64 = Machine(
    audit=0xC000_00B7,
    has_x32=False,
    clone=220,
    kill=129,
    socket=(198, 199),
    connect=203,
    own=(261, 122, 119, 118, 274),
    own_kind=MappingProxyType({140: _PRIO_USER, 30: _IOPRIO_USER}),
    killed=MappingProxyType(
        {
            **{"ptrace": 117, "process_vm_readv": 270, "process_vm_writev": 271, "kcmp": 272},
            **{"mount": 40, "umount2": 39, "pivot_root": 41, "chroot": 51, "setns": 268, "unshare": 97},
            **{"open_tree": 428, "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432},
            **{
                "fspick": 433,
                "mount_setattr": 442,
                "open_tree_attr": 467,
                "open_by_handle_at": 265,
                "swapon": 224,
                "swapoff": 225,
            },
            **{"init_module": 105, "finit_module": 273, "delete_module": 106, "kexec_load": 104},
            **{"kexec_file_load": 294, "reboot": 142, "bpf": 280, "perf_event_open": 241, "acct": 89},
            **{"settimeofday": 170, "clock_settime": 112, "quotactl": 60},
            **{"syslog": 116, "sethostname": 161, "setdomainname": 162, "pidfd_getfd": 438},
        }
    ),
    refused=MappingProxyType(
        {"add_key": 217, "request_key": 218, "keyctl": 219, "fanotify_init": 262, "personality": 92}
    ),
    absent=MappingProxyType(
        {
            **{"io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "clone3": 435},
            **{"userfaultfd": 282, "memfd_create": 279, "memfd_secret": 447},
            **{"shmget": 194, "semget": 190, "msgget": 186, "mq_open": 180},
        }
    ),
)
MACHINES = MappingProxyType({"x86_64": X86_64, "aarch64": AARCH64})


def _instruction(code: int, value: int, *, if_true: int = 0, if_false: int = 0) -> bytes:
    """One struct sock_filter; the jumps count instructions after this one."""
    return struct.pack("<HBBI", code, if_true, if_false, value)


def _return(action: int) -> bytes:
    return _instruction(_RETURN, action)


def _load_argument(index: int) -> bytes:
    return _instruction(_LOAD, _ARGUMENTS + 8 * index)


def _when(number: int, rest: Sequence[bytes]) -> list[bytes]:
    """What decides about the call `number` alone; it must end in a return."""
    return [_instruction(_EQUAL, number, if_false=len(rest)), *rest]


def _argument_rules(machine: Machine, *, is_in_namespace: bool) -> list[bytes]:
    """Calls that pass or not by their arguments."""
    denied, allowed = _return(FAIL | errno.EPERM), _return(ALLOW)
    program = _when(
        machine.clone,
        [_load_argument(0), _instruction(_ANY_BIT, _NEW_NAMESPACES, if_false=1), _return(KILL), allowed],
    )
    for number in machine.own:
        program += _when(number, [_load_argument(0), _instruction(_EQUAL, 0, if_true=1), denied, allowed])
    for number, whole_user in machine.own_kind.items():
        is_other = [_instruction(_EQUAL, whole_user, if_true=2), _load_argument(1)]
        program += _when(
            number, [_load_argument(0), *is_other, _instruction(_EQUAL, 0, if_true=1), denied, allowed]
        )
    is_local = [_load_argument(0), _instruction(_EQUAL, _AF_UNIX, if_true=1), denied]
    # Streams send to nobody but whom they are connected to; datagrams to any name.
    is_stream = [
        _load_argument(1),
        _instruction(_AND, _SOCKET_KIND),
        _instruction(_EQUAL, _SOCK_STREAM, if_true=1),
        denied,
    ]
    for number in machine.socket:
        program += _when(number, [*is_local, *([] if is_in_namespace else is_stream), allowed])
    if not is_in_namespace:
        program += _when(machine.connect, [denied])
        program += _when(
            machine.kill, [_load_argument(0), _instruction(_EQUAL, _MINUS_1, if_false=1), denied, allowed]
        )
    return program


def filter_program(machine: Machine, *, is_in_namespace: bool) -> bytes:
    """The filter for `machine`: an array of struct sock_filter.

    Args:
        is_in_namespace: whether the program has processes and a network of its own. Outside of one kill(-1)
            would reach everything that its user runs, and a named socket whoever listens on the host.
    """
    program = [
        _instruction(_LOAD, _ARCHITECTURE),
        _instruction(_EQUAL, machine.audit, if_true=1),
        _return(KILL),  # a call by another architecture's numbers
        _instruction(_LOAD, _NUMBER),
    ]
    if machine.has_x32:
        program += [_instruction(_AT_LEAST, _X32_BIT, if_false=1), _return(KILL)]
    program += [_instruction(_AT_LEAST, _NEWEST + 1, if_false=1), _return(FAIL | errno.ENOSYS)]
    actions = (
        (machine.killed, KILL),
        (machine.refused, FAIL | errno.EPERM),
        (machine.absent, FAIL | errno.ENOSYS),
    )
    for calls, action in actions:
        for number in sorted(calls.values()):
            program += [_instruction(_EQUAL, number, if_false=1), _return(action)]
    return b"".join([*program, *_argument_rules(machine, is_in_namespace=is_in_namespace), _return(ALLOW)])


def filter_here(*, is_in_namespace: bool) -> bytes:
    """The filter for this machine; ValueError on one whose calls are not listed."""
    name = platform.machine()
    if name not in MACHINES:
        raise ValueError(f"seccomp: machine must be one of {', '.join(MACHINES)}, got {name}")
    return filter_program(MACHINES[name], is_in_namespace=is_in_namespace)
