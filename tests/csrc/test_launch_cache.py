"""What launches keep of the driver's answers (csrc/core/launch_cache.h), asked by many threads at once."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CXX = shutil.which(os.environ.get("CXX", "g++"))


@pytest.mark.skipif(CXX is None, reason="no C++ compiler")
def test_no_thread_launches_below_the_limit_that_it_asked_for(tmp_path: Path) -> None:
    program = tmp_path / "launch_cache"
    options = ["-std=c++20", "-O1", "-pthread", f"-I{ROOT / 'csrc'}"]
    source = Path(__file__).with_name("launch_cache.cpp")
    subprocess.run([CXX or "g++", *options, source, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.stdout == "0 wrong, 0 asked again, refused right\n"
