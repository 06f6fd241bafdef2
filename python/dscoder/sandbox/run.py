"""One program, under limits, to a Verdict.

Under "full" isolation the program has no network, its own user, process, ipc and mount namespaces, a
read-only system, a private /tmp of bounded size, no environment and no descriptor but its three streams. A
seccomp filter, rlimits and, where the system allows, control groups bound it, and all of its processes are
dead before the verdict. "rlimits" is for machines that refuse namespaces, and only used when asked for.
"""

from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from pathlib import Path

from dscoder.sandbox import box, weak
from dscoder.sandbox.box import Ending, SandboxError
from dscoder.sandbox.cgroup import Hierarchy, find_hierarchies, new_group, sweep
from dscoder.sandbox.job import FOLDER, Job, Step, read_report
from dscoder.sandbox.judge import judge, judge_compiling
from dscoder.sandbox.seccomp import filter_here
from dscoder.sandbox.toolchains import Missing, Toolchain, find
from dscoder.sandbox.verdict import MIB, Isolation, Limits, Phase, Program, Verdict, as_bytes

DEFAULT_LIMITS = Limits()
_SUPERVISOR_MEMORY = 32 * MIB
_SUPERVISOR_PROCESSES = 4


@cache
def _hierarchies() -> tuple[Hierarchy, ...]:
    found = find_hierarchies(Path("/proc/self/mounts").read_text(), Path("/proc/self/cgroup").read_text())
    sweep(found)
    return found


@cache
def _filter(keeps_broadcast: bool) -> bytes:
    return filter_here(keeps_broadcast=keeps_broadcast)


def _steps(program: Program, toolchain: Toolchain, limits: Limits) -> list[Step]:
    compiling, running = toolchain.commands(
        next(iter(program.files), toolchain.language.file_name),
        args=program.args,
        compiler_args=program.compiler_args,
        memory=limits.memory,
    )
    run_step = Step(
        argv=running,
        env=toolchain.env,
        stdin=as_bytes(program.stdin),
        time=limits.time,
        is_bounded_in_address_space=toolchain.language.is_bounded_in_address_space,
    )
    # Compilers are trusted with address space: some reserve much more than they use.
    first = replace(run_step, stdin=b"", time=limits.compile_time, is_bounded_in_address_space=False)
    return [*(replace(first, argv=command) for command in compiling), run_step]


def _job(program: Program, toolchain: Toolchain, limits: Limits) -> Job:
    """The job under full isolation."""
    sources = program.files or {toolchain.language.file_name: program.source or ""}
    return Job(
        files=[(name, as_bytes(content)) for name, content in sources.items()],
        steps=_steps(program, toolchain, limits),
        limits=limits,
        folder=FOLDER,
        memory_folders=box.MEMORY_FOLDERS,
        user=box.INSIDE_USER if box.is_root() else 0,
        is_pid_1=True,
        filter=_filter(True),
        join=(),
    )


def _weakened(job: Job, *, folder: str, user: int, join: tuple[str, ...]) -> Job:
    """The job without namespaces: what bubblewrap would do is left to the supervisor, or left out."""
    own = {"HOME": folder, "TMPDIR": folder}
    return replace(
        job,
        steps=[replace(step, env={**step.env, **own}) for step in job.steps],
        folder=folder,
        memory_folders=(),
        user=user,
        is_pid_1=False,
        filter=_filter(False),
        join=join,
    )


def _execute(
    job: Job, toolchain: Toolchain, isolation: Isolation, *, cancel: int | None
) -> tuple[Ending, int]:
    """How the supervisor ended, and how many processes the kernel killed for want of memory."""
    limits = job.limits
    with ExitStack() as stack:
        group = stack.enter_context(
            new_group(
                _hierarchies(),
                memory=int(limits.memory + 2 * limits.disk + _SUPERVISOR_MEMORY),
                processes=int(limits.processes + _SUPERVISOR_PROCESSES),
            )
        )
        if isolation == "full":
            ending = box.execute(job, toolchain.view, group, cancel=cancel)
            return ending, group.num_killed()
        user = weak.user()
        if user:
            for path in toolchain.paths.values():
                weak.check_reachable(path.resolve())
        folder = stack.enter_context(weak.new_folder(user))
        files = tuple(str(file) for file in group.member_files())
        job = _weakened(job, folder=folder, user=user, join=files)
        return weak.execute(job, cancel=cancel), group.num_killed()


def _explain(complaint: str, num_oom_killed: int) -> str:
    if num_oom_killed:
        complaint += f"; {num_oom_killed} processes were killed for want of memory"
    if complaint.startswith("bwrap:"):
        complaint += (
            "; where namespaces are refused, isolation 'rlimits' runs without them, and is much weaker"
        )
    return complaint


def _phases(ending: Ending, num_oom_killed: int) -> list[Phase]:
    """The steps that ran; SandboxError if the report does not say."""
    if ending.is_cancelled:
        raise SandboxError("cancelled")
    if ending.is_overdue:
        raise SandboxError("the supervisor did not report in time")
    try:
        phases = read_report(ending.report)
    except ValueError as error:
        raise SandboxError(_explain(ending.complaint or str(error), num_oom_killed)) from error
    if not phases:
        raise SandboxError("the supervisor ran nothing")
    return phases


def _verdict(
    phases: list[Phase], program: Program, toolchain: Toolchain, limits: Limits, num_oom_killed: int
) -> Verdict:
    num_compiling = len(toolchain.language.compile)
    compiling = phases[min(num_compiling, len(phases)) - 1] if num_compiling else None
    if len(phases) <= num_compiling:
        outcome, detail = judge_compiling(phases[-1], limits, num_oom_killed=num_oom_killed)
        return Verdict(outcome=outcome, compile=compiling, detail=detail)
    last = phases[-1]
    outcome, detail = judge(
        last, limits, toolchain.language, wanted=program.expected_stdout, num_oom_killed=num_oom_killed
    )
    return Verdict(
        outcome=outcome,
        stdout=last.stdout.decode(errors="backslashreplace"),
        stderr=last.stderr.decode(errors="backslashreplace"),
        exit_code=last.exit_code,
        signal=last.signal,
        wall=last.wall,
        cpu=last.cpu,
        peak_memory=last.peak_memory,
        compile=compiling,
        detail=detail,
    )


def run(
    program: Program,
    limits: Limits = DEFAULT_LIMITS,
    *,
    isolation: Isolation = "full",
    cancel: int | None = None,
) -> Verdict:
    """Run one program to its verdict; safe to call from many threads.

    A missing toolchain, and a sandbox that fails, come back as verdicts that are no answer, with the reason
    in `detail`; ValueError is for an unknown language.

    Args:
        cancel: a descriptor; once it can be read, the program is killed and the verdict is "sandbox_error".
    """
    toolchain = find(program.language)
    if isinstance(toolchain, Missing):
        return Verdict(outcome="toolchain_missing", isolation=isolation, detail=toolchain.detail())
    try:
        job = _job(program, toolchain, limits)
        ending, num_oom_killed = _execute(job, toolchain, isolation, cancel=cancel)
        verdict = _verdict(_phases(ending, num_oom_killed), program, toolchain, limits, num_oom_killed)
    except (SandboxError, OSError) as error:
        return Verdict(outcome="sandbox_error", isolation=isolation, detail=str(error))
    return replace(verdict, isolation=isolation)
