"""Compile the kernels into build/kernel-objects, for machines that link them in place of compiling.

`make kernel-objects`, or `python -m benchmarks.kernel_objects`. Needs nvcc and no GPU. See docs/gpu_check.md.
"""

import os
import shutil
import subprocess
import sys

from benchmarks.check.build import LIBRARY, OBJECTS, ROOT, STAMP, configure_command, tool

WORK = ROOT / "build" / "objects"


def main() -> int:
    """Configure, compile what changed, stamp, and put the two files that travel into OBJECTS."""
    try:
        commands = [
            configure_command(WORK, ["DSCODER_KERNEL_OBJECTS="], os.environ),
            [tool("cmake", os.environ), "--build", str(WORK), "--target", "kernel_objects"],
        ]
    except ValueError as error:
        sys.stderr.write(f"kernel-objects: {error}\n")
        return 2
    for command in commands:
        code = subprocess.run(command, cwd=ROOT).returncode
        if code:
            return code
    target = ROOT / OBJECTS
    target.mkdir(parents=True, exist_ok=True)
    for name in (LIBRARY, STAMP):
        shutil.copy2(WORK / name, target / name)
    megabytes = (target / LIBRARY).stat().st_size / 1e6
    sys.stdout.write(f"{OBJECTS}: {LIBRARY} ({megabytes:.1f} MB) and {STAMP}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
