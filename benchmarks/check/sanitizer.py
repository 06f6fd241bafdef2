"""compute-sanitizer: how it is called, and what its output says.

A clean summary proves nothing by itself: compute-sanitizer also ends with "0 errors" when the program it was
given never ran, or when it cannot instrument the device. So `passed` wants the summary and tests that passed
under it. https://docs.nvidia.com/compute-sanitizer/ComputeSanitizer
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.check.events import Seen

# racecheck looks at shared memory alone and does not understand TMA and wgmma: tests of kernels that use
# those are marked sanitize("memcheck", "synccheck").
TOOLS = ("memcheck", "synccheck", "racecheck")
ERROR_CODE = 86
# Torch's caching allocator would hide an access past the end of a tensor inside its own large blocks.
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

_ERRORS = re.compile(r"^=+ ERROR SUMMARY: (\d+) errors?", re.MULTILINE)
_HAZARDS = re.compile(r"^=+ RACECHECK SUMMARY: (\d+) hazards? displayed", re.MULTILINE)
_NOT_SUPPORTED = re.compile(r"^=+ .*device not supported.*$", re.MULTILINE | re.IGNORECASE)
_FINDING = re.compile(r"^=+ ((?:Invalid|Error:|Race|Warning:|Barrier|Program hit|Uninit).*)$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What one tool says about one op."""

    outcome: str  # passed, does not apply; found, tests failed, broken; nothing ran, not available, stopped
    num_found: int = 0
    note: str = ""


def sanitizer_command(program: str, tool: str, command: Sequence[str]) -> list[str]:
    """`command` under `tool`, which looks into dscoder's kernels alone (namespace dsc)."""
    options = [
        f"--tool={tool}",
        f"--error-exitcode={ERROR_CODE}",
        "--target-processes=application-only",
        *("--kernel-name", "kns=dsc"),
        "--report-api-errors=no",
        "--launch-timeout=0",
        "--print-limit=20",
    ]
    return [program, *options, *command]


def judge(tool: str, output: str, code: int | None, seen: Seen) -> Verdict:
    """Read one run: `code` is the exit status, None for a run that was stopped."""
    supported = _NOT_SUPPORTED.search(output)
    if supported:
        return Verdict(outcome="not available", note=supported[0].strip("= "))
    summaries = (_HAZARDS if tool == "racecheck" else _ERRORS).findall(output)
    num_found = max(map(int, summaries), default=0)
    first = _FINDING.search(output)
    if num_found or code == ERROR_CODE:
        return Verdict(outcome="found", num_found=max(1, num_found), note=first[1] if first else "")
    if code is None:
        return Verdict(outcome="stopped", note=first[1] if first else "did not end within its limit")
    if seen.num_bad:
        failure = seen.failures[0]
        return Verdict(outcome="tests failed", note=f"{failure['test']}: {failure['reason']}")
    if tool == "racecheck" and seen.is_finished and not seen.num_collected:
        return Verdict(outcome="does not apply")
    if not seen.counts.get("passed"):
        return Verdict(outcome="nothing ran", note=next(iter(seen.skips), "no test is marked sanitize"))
    if not summaries:
        last = output.strip().splitlines()[-1:]
        return Verdict(outcome="broken", note=first[1] if first else f"no summary; it ended with {last}")
    if code != 0:
        return Verdict(outcome="broken", note=f"exit status {code} without a finding")
    return Verdict(outcome="passed")
