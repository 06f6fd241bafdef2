"""A program may not end as the failure of the sandbox instead of its own, nor be blamed for the machine."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from dscoder.sandbox import box
from dscoder.sandbox import run as run_module
from dscoder.sandbox.cgroup import Shortage
from dscoder.sandbox.languages import Language
from dscoder.sandbox.process import Ending, SandboxError
from dscoder.sandbox.run import run
from dscoder.sandbox.toolchains import Toolchain, find
from dscoder.sandbox.verdict import Limits, Program, Verdict
from tests.sandbox.conftest import SMALL

Attack = Callable[..., Verdict]


@pytest.fixture
def compiled_by_itself(full_isolation: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A language whose compiler does what the program says."""
    bash = find("bash")
    assert isinstance(bash, Toolchain)
    language = Language(
        file_name="main.sh",
        executables=("bash",),
        compile=(("@bash", "{main}"),),
        run=("./program", "{args}"),
    )
    monkeypatch.setattr(run_module, "find", lambda _: replace(bash, language=language))


@pytest.mark.usefixtures("compiled_by_itself")
@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("", "No such file"),
        ("echo nonsense > program; chmod +x program", "Exec format error"),
        ("echo '#!/no/such/loader' > program; chmod +x program", "No such file"),
        ("echo library > program", "Permission denied"),
        ("mkdir program", "Permission denied"),
        ("ln -s program program", "Too many levels"),
        ("cd /; rm -r /tmp/program", "chdir /tmp/program: No such file"),
        ("head -c 20 /bin/true > program; chmod +x program", "Exec format error"),
        # Cut off where the table of its parts ends, before the name of its loader.
        (
            "head -c $((64 + 56 * $(od -An -j56 -N2 -tu2 /bin/true))) /bin/true > program; chmod +x program",
            "Input/output error",
        ),
    ],
)
def test_a_file_that_cannot_be_executed_is_the_programs_mistake(source: str, reason: str) -> None:
    verdict = run(Program(language="bash", source=source), SMALL)
    assert (verdict.outcome, verdict.exit_code) == ("runtime_error", 126), verdict.detail
    assert verdict.stderr.startswith("cannot start: ")
    assert reason in verdict.stderr


def test_a_library_in_place_of_a_program_is_its_own_mistake(full_isolation: None) -> None:
    verdict = run(Program(language="rust", source='#![crate_type = "lib"]\npub fn f() {}'), Limits(time=10))
    if verdict.outcome == "toolchain_missing":
        pytest.skip(verdict.detail)
    assert verdict.outcome == "runtime_error", verdict.detail


# ---- other processes' limits ----


@pytest.mark.parametrize("is_root", [True, False])
def test_the_supervisor_keeps_its_limits_and_its_priority(
    attack: Attack, monkeypatch: pytest.MonkeyPatch, is_root: bool
) -> None:
    monkeypatch.setattr(box, "is_root", lambda: is_root)
    source = """
import os, resource
def refused(action, *args):
    try:
        action(*args)
    except OSError:
        return True
    return False
assert refused(resource.prlimit, 1, resource.RLIMIT_CPU, (1, 1))
assert refused(os.sched_setaffinity, 1, {0})
assert refused(os.setpriority, os.PRIO_PROCESS, 1, 19)
assert refused(os.setpriority, os.PRIO_USER, 0, 19)
assert refused(os.sched_setscheduler, 1, os.SCHED_BATCH, os.sched_param(0))
os.sched_setaffinity(0, os.sched_getaffinity(0))
os.setpriority(os.PRIO_PROCESS, 0, 19)
resource.prlimit(0, resource.RLIMIT_CORE, (0, 0))
for name in ("CapPrm", "CapEff", "CapAmb"):
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    assert int(status[name], 16) == 0, name
"""
    verdict = attack(source)
    assert verdict.outcome == "passed", verdict.stderr


# ---- shortage of memory, the program's own and the machine's ----

FAILED = b"step 1 - 1000 1000 4096 0 0\nend\n"
PASSED = b"step 0 - 1000 1000 4096 0 0\nend\n"
OWN, FOREIGN = Shortage(num_killed=1, is_own=True), Shortage(num_killed=1, is_own=False)


def judged(report: bytes, shortage: Shortage) -> Verdict:
    python = find("python")
    assert isinstance(python, Toolchain)
    ending = Ending(report=report, complaint="")
    return run_module._judged(ending, shortage, Program(source=""), python, SMALL)


@pytest.mark.parametrize(
    ("report", "shortage", "outcome"),
    [
        (b"", OWN, "memory_limit"),
        (FAILED[:20], OWN, "memory_limit"),
        (FAILED, OWN, "memory_limit"),
        (PASSED, OWN, "passed"),
        (PASSED, FOREIGN, "passed"),
        (FAILED, Shortage(), "runtime_error"),
        (b"step -9 time 1000 1000 4096 0 0\nend\n", OWN, "time_limit"),
    ],
)
def test_a_shortage_explains_what_did_not_pass(report: bytes, shortage: Shortage, outcome: str) -> None:
    assert judged(report, shortage).outcome == outcome


@pytest.mark.parametrize("report", [b"", FAILED])
def test_a_shortage_of_the_machine_is_no_answer(report: bytes) -> None:
    with pytest.raises(SandboxError):
        judged(report, FOREIGN)


def test_a_kill_on_the_machine_meanwhile_is_no_answer_where_no_group_counts(
    full_isolation: None, without_groups: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = iter([3, 4])
    monkeypatch.setattr(run_module, "num_killed_for_memory", lambda: next(counts))
    verdict = run(Program(source="import os\nos.kill(os.getpid(), 9)"), SMALL)
    assert (verdict.outcome, verdict.is_answer) == ("sandbox_error", False)
    assert "ran out of memory" in verdict.detail


@pytest.mark.parametrize(
    "error", [KeyError("stopped"), RecursionError(), AttributeError("x"), TypeError("x")]
)
def test_a_surprise_in_a_report_is_no_answer(
    full_isolation: None, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def surprise(_: bytes) -> None:
        raise error

    monkeypatch.setattr(run_module, "read_report", surprise)
    verdict = run(Program(source="pass"), SMALL)
    assert (verdict.outcome, verdict.detail) == ("sandbox_error", repr(error))


# ---- processor time ----


@pytest.mark.parametrize("reaction", ["signal.SIG_IGN", "lambda *_: None"], ids=["ignored", "handled"])
def test_processor_time_that_a_program_does_not_want_to_hear_of_is_over_all_the_same(
    attack: Attack, reaction: str
) -> None:
    source = f"import signal\nsignal.signal(signal.SIGXCPU, {reaction})\nwhile True: pass"
    verdict = attack(source, limits=replace(SMALL, time=20.0, cpu_time=1.0))
    assert (verdict.outcome, verdict.signal) == ("time_limit", 9)


@pytest.mark.usefixtures("compiled_by_itself")
def test_compiling_has_its_own_processor_time() -> None:
    source = "for ((i = 0; i < 4000000; i++)); do :; done; ln -s /bin/true program"
    program = Program(language="bash", source=source)
    assert run(program, replace(SMALL, cpu_time=1.0)).outcome == "passed"
    late = run(program, replace(SMALL, compile_cpu_time=1.0))
    assert (late.outcome, late.detail[:10]) == ("time_limit", "compiling:")


def test_all_cores_may_be_used_for_as_long_as_the_clock_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "num_cores", lambda: 3)
    python = find("python")
    assert isinstance(python, Toolchain)
    (step,) = run_module._steps(Program(source=""), python, Limits(time=4.0))
    assert step.cpu_time == 15.0
    (step,) = run_module._steps(Program(source=""), python, Limits(time=4.0, cpu_time=2.0))
    assert step.cpu_time == 2.0


def test_signals_that_a_launcher_ignores_reach_the_program(full_isolation: None) -> None:
    # Python itself ignores SIGPIPE and SIGXFSZ; shells do not, and programs rely on them.
    source = "trap - PIPE XFSZ; kill -XFSZ $$; echo alive"
    assert run(Program(language="bash", source=source), SMALL).outcome == "output_limit"
