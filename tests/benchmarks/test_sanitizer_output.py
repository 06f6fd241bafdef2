"""What benchmarks.check makes of compute-sanitizer's output. The samples follow NVIDIA's manual."""

import pytest

from benchmarks.check.events import Seen
from benchmarks.check.sanitizer import ERROR_CODE, TOOLS, Verdict, judge, sanitizer_command

CLEAN = """========= COMPUTE-SANITIZER
..                                                                       [100%]
========= ERROR SUMMARY: 0 errors
"""
OUT_OF_BOUNDS = """========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at void dsc::moe_gate_kernel<dsc::Layout<8>>(dsc::MoeGateParams)+0x160
=========     by thread (0,0,0) in block (0,0,0)
=========     Address 0x7f6510c00400 is out of bounds
=========     and is 1 bytes after the nearest allocation at 0x7f6510c00000 of size 1024 bytes
=========
========= Program hit cudaErrorLaunchFailure (error 719) due to "unspecified launch failure" on CUDA API call
=========
========= ERROR SUMMARY: 2 errors
"""
RACE = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at dsc::sum(int *, int *)+0xa0 in sum.cu:7
=========     and Read access at dsc::sum(int *, int *)+0x120 in sum.cu:13 [508 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
NO_RACE = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
BARRIER = """========= COMPUTE-SANITIZER
========= Barrier error detected. Divergent thread(s) in warp
=========     at dsc::sum(int *)+0x1d0
=========     by thread (33,0,0) in block (0,0,0)
=========
========= ERROR SUMMARY: 16 errors
"""
NOT_SUPPORTED = """========= COMPUTE-SANITIZER
========= Error: Device not supported. Please refer to the "Supported Devices" section of the documentation
=========
E   torch.AcceleratorError: CUDA error: unknown error
========= ERROR SUMMARY: 0 errors
"""
RAN = Seen(counts={"passed": 3})
FAILED = Seen(counts={"passed": 1, "failed": 1}, failures=[{"test": "t.py::a", "reason": "assert 1 == 2"}])


@pytest.mark.parametrize(
    ("tool", "output", "code", "seen", "wanted"),
    [
        ("memcheck", CLEAN, 0, RAN, Verdict(outcome="passed")),
        ("racecheck", NO_RACE, 0, RAN, Verdict(outcome="passed")),
        (
            "memcheck",
            OUT_OF_BOUNDS,
            ERROR_CODE,
            FAILED,
            Verdict(outcome="found", num_found=2, note="Invalid __global__ write of size 4 bytes"),
        ),
        (
            "racecheck",
            RACE,
            ERROR_CODE,
            RAN,
            Verdict(
                outcome="found",
                num_found=1,
                note="Error: Race reported between Write access at dsc::sum(int *, int *)+0xa0 in sum.cu:7",
            ),
        ),
        (
            "synccheck",
            BARRIER,
            ERROR_CODE,
            RAN,
            Verdict(
                outcome="found", num_found=16, note="Barrier error detected. Divergent thread(s) in warp"
            ),
        ),
    ],
)
def test_findings_are_counted_and_the_first_is_named(
    tool: str, output: str, code: int, seen: Seen, wanted: Verdict
) -> None:
    assert judge(tool, output, code, seen) == wanted


@pytest.mark.parametrize(
    ("output", "code", "seen", "wanted"),
    [
        (NOT_SUPPORTED, 1, FAILED, "not available"),
        (CLEAN, None, RAN, "stopped"),
        (CLEAN, 1, FAILED, "tests failed"),
        (CLEAN, 5, Seen(), "nothing ran"),
        (CLEAN, 0, Seen(counts={"skipped": 2}, skips={"needs a GPU": 2}), "nothing ran"),
        ("========= Error: unknown option --frob\n", 1, Seen(), "nothing ran"),
        ("3 passed\n", 0, RAN, "broken"),
        (NO_RACE, 0, RAN, "broken"),  # the summary of another tool
        (CLEAN, 1, RAN, "broken"),
        (OUT_OF_BOUNDS, None, RAN, "found"),  # found before its limit
    ],
)
def test_only_a_summary_over_tests_that_ran_is_a_pass(
    output: str, code: int | None, seen: Seen, wanted: str
) -> None:
    assert judge("memcheck", output, code, seen).outcome == wanted


def test_the_summaries_of_several_processes_are_all_read() -> None:
    assert judge("memcheck", CLEAN + OUT_OF_BOUNDS + CLEAN, 0, RAN).num_found == 2


def test_the_command_looks_at_dscoders_kernels_alone() -> None:
    command = sanitizer_command("compute-sanitizer", "racecheck", ["python", "-m", "pytest"])
    assert command[0] == "compute-sanitizer"
    assert {"--tool=racecheck", f"--error-exitcode={ERROR_CODE}"} <= set(command)
    assert command[command.index("--kernel-name") + 1] == "kns=dsc"
    assert command[-3:] == ["python", "-m", "pytest"]
    assert set(TOOLS) == {"memcheck", "synccheck", "racecheck"}
