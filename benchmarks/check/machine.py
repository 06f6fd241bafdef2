"""What a check runs on, found without dscoder: it may not be built yet."""

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CUDA_FOLDER = Path("/usr/local/cuda")  # where toolkits are installed by habit, also where PATH forgets them

PROBE = """
import json, torch
found = {"torch": torch.__version__, "cuda": torch.version.cuda, "device": None}
if torch.cuda.is_available():
    found |= {"device": torch.cuda.get_device_name(), "capability": list(torch.cuda.get_device_capability())}
print(json.dumps(found))
"""


def describe(root: Path, environment: Mapping[str, str]) -> dict[str, Any]:
    """Device (None without a GPU), capability, torch, cuda, driver, python, commit, is_dirty."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, env=dict(environment), cwd=root
    )
    if done.returncode:
        raise ValueError(f"{sys.executable} has no working torch: {done.stderr.strip().splitlines()[-1:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    driver = _say("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    status = _say("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return found | {
        "driver": driver.splitlines()[0].strip() if driver else None,
        "python": platform.python_version(),
        "commit": (_say("git", "-C", str(root), "rev-parse", "HEAD") or "").strip() or None,
        "is_dirty": None if status is None else bool(status.strip()),
    }


def toolkit_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """CUDA_HOME set to the folder of habit when nothing points to a toolkit."""
    pointed = {"CUDACXX", "CUDA_HOME", "CUDA_PATH"} & set(environment)
    if pointed or shutil.which("nvcc", path=environment.get("PATH")) or not CUDA_FOLDER.is_dir():
        return dict(environment)
    return {**environment, "CUDA_HOME": str(CUDA_FOLDER)}


def find_sanitizer(environment: Mapping[str, str]) -> str | None:
    """compute-sanitizer from PATH, else from the toolkit."""
    homes = [Path(environment[name]) for name in ("CUDA_HOME", "CUDA_PATH") if environment.get(name)]
    folders = [
        folder for home in (*homes, CUDA_FOLDER) for folder in (home / "bin", home / "compute-sanitizer")
    ]
    search = os.pathsep.join([environment.get("PATH", ""), *map(str, folders)])
    return shutil.which("compute-sanitizer", path=search)


def _say(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
