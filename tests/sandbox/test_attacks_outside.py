"""Programs that reach for what is not theirs: files, the network, other processes, the supervisor."""

import os
import platform
import socket
import subprocess
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dscoder.sandbox.run import run
from dscoder.sandbox.verdict import Program, Verdict
from tests.sandbox.conftest import SMALL

Attack = Callable[..., Verdict]

REFUSED = """
import sys
def refused(action, *args):
    try:
        action(*args)
    except OSError:
        return True
    return False
"""


def test_files_outside_are_not_there(attack: Attack) -> None:
    source = """
import os, sys
others = ("/etc/shadow", "/etc/passwd", "/root/.ssh", "/home", "/var", "/sys", "/proc/1/root/etc")
for path in (sys.argv[1], *others):
    try:
        os.stat(path)
        print(path)
    except OSError:
        pass
"""
    verdict = attack(source)
    assert (verdict.outcome, verdict.stdout) == ("passed", "")


def test_the_environment_is_empty_and_descriptors_are_three(
    attack: Attack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hidden")
    inherited = os.open("/etc/hostname", os.O_RDONLY)
    os.set_inheritable(inherited, True)
    source = """
import os
print(sorted(os.environ))
print(len(os.listdir("/proc/self/fd")))
"""
    try:
        verdict = attack(source)
    finally:
        os.close(inherited)
    assert verdict.stdout.splitlines() == ["['HOME', 'LANG', 'PATH', 'TMPDIR']", "4"]  # listdir opens one


def test_nothing_but_the_private_folders_can_be_written(attack: Attack) -> None:
    source = """
import os
library = os.path.dirname(os.__file__)
for root in ("/", "/usr", "/usr/bin", "/etc", "/dev", "/proc", "/proc/sys/kernel", "/bin", library):
    try:
        open(root + "/planted", "w").close()
        print(root)
    except OSError:
        pass
for path in ("/proc/sys/kernel/hostname", "/proc/sysrq-trigger", "/usr/bin/env", "/etc/ld.so.cache"):
    try:
        open(path, "r+b").close()
        print(path)
    except OSError:
        pass
"""
    verdict = attack(source)
    assert (verdict.outcome, verdict.stdout) == ("passed", "")


def test_a_symlink_to_a_file_outside_leads_nowhere(attack: Attack) -> None:
    source = """
import os, sys
os.remove("main.py")
os.symlink(sys.argv[1], "main.py")
os.symlink("/proc/1/root" + sys.argv[1], "other")
for name in ("main.py", "other"):
    try:
        open(name, "w").write("changed")
        print(name)
    except OSError:
        pass
"""
    verdict = attack(source)
    assert (verdict.outcome, verdict.stdout) == ("passed", "")


def test_a_compiler_reads_no_file_outside(full_isolation: None, tmp_path: Path) -> None:
    secret = tmp_path / "secret.h"
    secret.write_text("int secret;")
    program = Program(language="cpp", source=f'#include "{secret}"\nint main() {{ return secret; }}')
    verdict = run(program, replace(SMALL, memory=512 << 20))
    if verdict.outcome == "toolchain_missing":
        pytest.skip(verdict.detail)
    assert verdict.outcome == "compile_error"
    assert verdict.compile is not None
    assert b"No such file" in verdict.compile.stderr


def test_no_connection_gets_out(attack: Attack) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.5)
        source = f"""{REFUSED}
import socket
for family in (socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK, socket.AF_PACKET):
    assert refused(socket.socket, family), family
assert refused(socket.create_connection, ("127.0.0.1", {server.getsockname()[1]}), 1)
"""
        assert attack(source).outcome == "passed"
        with pytest.raises(TimeoutError):
            server.accept()


def test_the_hosts_named_sockets_are_out_of_reach(attack: Attack) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"\0dscoder-test-{os.getpid()}")
        server.listen()
        source = f"""{REFUSED}
import socket
assert refused(socket.socket(socket.AF_UNIX).connect, "\\0dscoder-test-{os.getpid()}")
left, right = socket.socketpair()
left.send(b"inside")
assert right.recv(6) == b"inside"
"""
        assert attack(source).outcome == "passed"


CALLS = {
    "ptrace": "libc.ptrace(16, 1, 0, 0)",
    "process_vm_readv": "libc.process_vm_readv(1, 0, 0, 0, 0, 0)",
    "unshare": "libc.unshare(0x10000000)",
    "setns": "libc.setns(0, 0)",
    "mount": "libc.mount(b'none', b'/tmp', b'tmpfs', 0, 0)",
    "umount": "libc.umount2(b'/proc', 2)",
    "chroot": "libc.chroot(b'/tmp')",
    "clone_newuser": "libc.syscall(56 if x86 else 220, 0x10000011, 0, 0, 0, 0)",
    "bpf": "libc.syscall(321 if x86 else 280, 0, 0, 0)",
    "reboot": "libc.reboot(0)",
    "open_by_handle_at": "libc.open_by_handle_at(-1, 0, 0)",
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_only_attacks_make_is_a_security_verdict(attack: Attack, name: str) -> None:
    source = "import ctypes, platform\nlibc = ctypes.CDLL(None)\nx86 = platform.machine() == 'x86_64'\n"
    verdict = attack(f"{source}{CALLS[name]}\nprint('survived')")
    assert (verdict.outcome, verdict.stdout, verdict.detail) == ("security", "", "killed by SIGSYS")


def test_calls_by_32_bit_numbers_are_a_security_verdict(attack: Attack) -> None:
    if platform.machine() != "x86_64":
        pytest.skip("only x86_64 has a second set of numbers")
    assert attack("import ctypes\nctypes.CDLL(None).syscall(0x40000000 + 39)").outcome == "security"


def test_the_supervisor_cannot_be_looked_into(attack: Attack) -> None:
    source = f"""{REFUSED}
import os
for name in ("mem", "environ", "maps", "auxv", "fd/0", "fd/1", "fd/2", "root", "cwd", "exe"):
    for mode in (os.O_RDONLY, os.O_WRONLY):
        assert refused(os.open, f"/proc/1/{{name}}", mode), name
assert refused(os.listdir, "/proc/1/fd")
"""
    verdict = attack(source)
    assert verdict.outcome == "passed", verdict.stderr


def test_a_report_cannot_be_forged(attack: Attack) -> None:
    source = """
import os
forged = b"step 0 - 1 1 1 0 0\\nend\\n"
for number in range(64):
    try:
        os.write(number, forged)
    except OSError:
        pass
for process in (1, os.getppid()):
    for number in range(8):
        try:
            with open(f"/proc/{process}/fd/{number}", "wb") as file:
                file.write(forged)
        except OSError:
            pass
os._exit(3)
"""
    verdict = attack(source)
    assert (verdict.outcome, verdict.exit_code) == ("runtime_error", 3)
    assert "step 0" in verdict.stdout


def test_signals_reach_no_process_outside(attack: Attack) -> None:
    with subprocess.Popen(["sleep", "60"]) as bystander:
        source = f"""{REFUSED}
import os, signal
for pid in ({bystander.pid}, {os.getpid()}):
    assert refused(os.kill, pid, signal.SIGKILL)
"""
        verdict = attack(source)
        is_alive = bystander.poll() is None
        bystander.kill()
    assert (verdict.outcome, is_alive) == ("passed", True), verdict.stderr


@pytest.mark.parametrize(
    "target",
    ["os.kill(1, n)", "os.kill(os.getppid(), n)", "os.killpg(1, n)"],
    ids=["init", "parent", "group"],
)
def test_the_supervisor_survives_every_signal(attack: Attack, target: str) -> None:
    source = f"""
import os
for n in range(1, 65):
    try:
        {target}
    except OSError:
        pass
print("done")
"""
    verdict = attack(source)
    assert (verdict.outcome, verdict.stdout) == ("passed", "done\n")


@pytest.mark.parametrize("target", ["os.killpg(0, 9)", "os.kill(-1, 9)"], ids=["own_group", "everything"])
def test_killing_all_within_reach_kills_nobody_else(attack: Attack, target: str) -> None:
    source = f"import os, time\nif os.fork() == 0: time.sleep(60)\n{target}\ntime.sleep(60)"
    verdict = attack(source, limits=replace(SMALL, time=1.0))
    assert verdict.outcome in ("runtime_error", "time_limit")
    assert verdict.is_answer


def test_a_daemon_dies_with_its_program(attack: Attack) -> None:
    source = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        while True: time.sleep(1)
    os._exit(0)
print("left")
"""
    verdict = attack(source)
    assert (verdict.outcome, verdict.stdout) == ("passed", "left\n")
    assert verdict.wall < 4.0  # though the daemon holds stdout open


def test_children_of_a_program_past_its_deadline_die(attack: Attack) -> None:
    source = """
import os, time
for _ in range(5):
    if os.fork() == 0:
        os.setsid()
        os.fork()
        time.sleep(600)
time.sleep(600)
"""
    assert attack(source, limits=replace(SMALL, time=1.0)).outcome == "time_limit"


def test_a_stopped_program_is_killed(attack: Attack) -> None:
    source = "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)"
    assert attack(source, limits=replace(SMALL, time=1.0)).outcome == "time_limit"


def test_deleting_the_working_directory_is_survived(attack: Attack) -> None:
    source = "import os, shutil\nshutil.rmtree(os.getcwd())\nprint(os.path.exists('/tmp/program'))"
    assert attack(source).stdout == "False\n"


def test_closed_streams_are_survived(attack: Attack) -> None:
    assert attack("import os\nfor n in (0, 1, 2): os.close(n)\nos._exit(0)").outcome == "passed"
    assert (
        attack("import os\nos.closerange(0, 1000)\nwhile True: pass", limits=replace(SMALL, time=0.5)).outcome
        == "time_limit"
    )


def test_the_input_cannot_be_written(full_isolation: None) -> None:
    source = """
import os
for action in (lambda: os.write(0, b"x"), lambda: os.truncate("/proc/self/fd/0", 1 << 30)):
    try:
        action()
        print("written")
    except OSError:
        pass
"""
    verdict = run(Program(source=source, stdin="input"), SMALL)
    assert (verdict.outcome, verdict.stdout) == ("passed", "")


def test_kernel_memory_outside_the_limits_is_refused(attack: Attack) -> None:
    source = f"""{REFUSED}
import ctypes, os
assert refused(os.memfd_create, "hidden")
libc = ctypes.CDLL(None)
assert libc.shmget(0, 1 << 20, 0o1600) == -1
assert libc.msgget(0, 0o1600) == -1
assert libc.semget(0, 100, 0o1600) == -1
"""
    verdict = attack(source)
    assert verdict.outcome == "passed", verdict.stderr


def test_no_rights_can_be_gained(attack: Attack) -> None:
    source = f"""{REFUSED}
import os
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
for name in ("CapPrm", "CapEff", "CapAmb"):
    assert int(status[name], 16) == 0, name
assert status["NoNewPrivs"].strip() == "1"
assert os.getuid() == 1000
assert refused(os.setuid, 0)
assert refused(os.chown, "/tmp/program", 0, 0)
assert refused(os.mknod, "device", 0o060666, os.makedev(8, 0))
assert not os.path.exists("/sys/fs/cgroup")
"""
    verdict = attack(source)
    assert verdict.outcome == "passed", verdict.stderr


def test_parallel_programs_do_not_see_each_other(full_isolation: None) -> None:
    seen: list[Verdict] = []
    source = """
import os, time
time.sleep(1)
print([name for name in os.listdir("/proc") if name.isdigit()], os.listdir("/tmp"))
"""
    threads = [
        threading.Thread(target=lambda: seen.append(run(Program(source=source), SMALL))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [verdict.stdout for verdict in seen] == ["['1', '2'] ['program']\n"] * 2


def test_what_is_written_to_tmp_stays_inside(attack: Attack) -> None:
    name = f"left-by-{os.getpid()}"
    assert attack(f"open('/tmp/{name}', 'w').close()").outcome == "passed"
    assert not Path("/tmp", name).exists()
