"""One program, under limits, to a Verdict.

Under "full" isolation the program has no network, its own user, process, ipc and mount namespaces, a
read-only system, a private /tmp of bounded size, no environment and no descriptor but its three streams. A
seccomp filter, rlimits and, where the system allows, control groups bound it, and all of its processes are
dead before the verdict. "rlimits" is for machines that refuse namespaces, and only used when asked for.
"""

import os
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from pathlib import Path

from dscoder.sandbox import box, weak
from dscoder.sandbox.cgroup import Hierarchy, Shortage, find_hierarchies, new_group, open_folders, sweep
from dscoder.sandbox.job import FOLDER, Job, Step, read_report
from dscoder.sandbox.judge import judge, judge_compiling, out_of_memory
from dscoder.sandbox.machine import num_cores, num_killed_for_memory
from dscoder.sandbox.process import Ending, SandboxError
from dscoder.sandbox.seccomp import filter_here
from dscoder.sandbox.toolchains import Missing, Toolchain, find
from dscoder.sandbox.verdict import MIB, Isolation, Limits, Outcome, Phase, Program, Verdict, as_bytes

DEFAULT_LIMITS = Limits()
_SUPERVISOR_MEMORY = 32 * MIB
_SUPERVISOR_PROCESSES = 4
# What stays the outcome though processes of the program were killed for want of memory, too.
_FROM_OUTSIDE: frozenset[Outcome] = frozenset({"time_limit", "output_limit"})


@cache
def _hierarchies(pid: int) -> tuple[Hierarchy, ...]:
    """Where process `pid`, this one, makes groups; one forked from it has its own."""
    found = find_hierarchies(Path("/proc/self/mounts").read_text(), Path("/proc/self/cgroup").read_text())
    sweep(found)
    return open_folders(found)


@cache
def _filter(is_in_namespace: bool) -> bytes:
    return filter_here(is_in_namespace=is_in_namespace)


def _cpu_time(limit: float | None, wall: float) -> float:
    # One second of grace: the wall clock ends most programs, and says so.
    return limit if limit is not None else (wall + 1) * num_cores()


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
        cpu_time=_cpu_time(limits.cpu_time, limits.time),
        is_bounded_in_address_space=toolchain.language.is_bounded_in_address_space,
    )
    # Compilers are trusted with address space: some reserve much more than they use.
    first = replace(
        run_step,
        stdin=b"",
        time=limits.compile_time,
        cpu_time=_cpu_time(limits.compile_cpu_time, limits.compile_time),
        is_bounded_in_address_space=False,
    )
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
        launcher=0,
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
        launcher=os.getpid(),
        filter=_filter(False),
        join=join,
    )


def _execute(
    job: Job, toolchain: Toolchain, isolation: Isolation, *, cancel: int | None
) -> tuple[Ending, Shortage]:
    """How the supervisor ended, and whom the kernel killed for want of memory."""
    limits = job.limits
    with ExitStack() as stack:
        group = stack.enter_context(
            new_group(
                _hierarchies(os.getpid()),
                memory=int(limits.memory + 2 * limits.disk + _SUPERVISOR_MEMORY),
                processes=int(limits.processes + _SUPERVISOR_PROCESSES),
            )
        )
        # Without a group that counts, whoever was killed on the machine may have been the program's.
        killed_before = None if group.counts_memory() else num_killed_for_memory()
        if isolation == "full":
            ending = box.execute(job, toolchain.view, group, cancel=cancel)
        else:
            user = weak.user()
            if user:
                for path in toolchain.paths.values():
                    weak.check_reachable(path.resolve())
            folder = stack.enter_context(weak.new_folder(user))
            files = tuple(str(file) for file in group.all_doors())
            ending = weak.execute(_weakened(job, folder=folder, user=user, join=files), cancel=cancel)
        if killed_before is None:
            return ending, group.shortage()
        return ending, Shortage(num_killed=num_killed_for_memory() - killed_before)


def _explain(complaint: str) -> str:
    if complaint.startswith("bwrap:"):
        complaint += (
            "; where namespaces are refused, isolation 'rlimits' runs without them, and is much weaker"
        )
    return complaint


def _phases(ending: Ending) -> list[Phase]:
    """The steps that ran; SandboxError if the report does not say."""
    try:
        phases = read_report(ending.report)
    except ValueError as error:
        raise SandboxError(_explain(ending.complaint or str(error))) from error
    if not phases:
        raise SandboxError("the supervisor ran nothing")
    return phases


def _verdict(phases: list[Phase], program: Program, toolchain: Toolchain, limits: Limits) -> Verdict:
    num_compiling = len(toolchain.language.compile)
    compiling = phases[min(num_compiling, len(phases)) - 1] if num_compiling else None
    if len(phases) <= num_compiling:
        outcome, detail = judge_compiling(phases[-1], limits)
        return Verdict(outcome=outcome, compile=compiling, detail=detail)
    last = phases[-1]
    outcome, detail = judge(last, limits, toolchain.language, wanted=program.expected_stdout)
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


def _judged(
    ending: Ending, shortage: Shortage, program: Program, toolchain: Toolchain, limits: Limits
) -> Verdict:
    """The verdict on what was reported, or on a report that is missing for want of memory."""
    is_own_shortage = shortage.num_killed > 0 and shortage.is_own
    try:
        verdict = _verdict(_phases(ending), program, toolchain, limits)
    except SandboxError:
        if not is_own_shortage:
            raise
        # The program left so little that the supervisor itself was killed.
        return Verdict(outcome="memory_limit", detail=out_of_memory(limits))
    if shortage.num_killed == 0 or verdict.is_passed:
        return verdict
    if not is_own_shortage:
        raise SandboxError(f"the machine ran out of memory meanwhile; the program: {verdict.detail}")
    if verdict.outcome in _FROM_OUTSIDE:
        return verdict
    return replace(verdict, outcome="memory_limit", detail=out_of_memory(limits))


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
        ending, shortage = _execute(job, toolchain, isolation, cancel=cancel)
        verdict = _judged(ending, shortage, program, toolchain, limits)
    except Exception as error:  # whatever it is, it must never be scored as the program's answer
        detail = str(error) if isinstance(error, SandboxError | OSError) else repr(error)
        return Verdict(outcome="sandbox_error", isolation=isolation, detail=detail)
    return replace(verdict, isolation=isolation)
