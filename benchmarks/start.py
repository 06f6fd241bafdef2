"""pytest as `dscoder bench` starts it: without the options and plugins of its caller's environment."""

import os
import sys
from collections.abc import Sequence

import pytest


def main(argv: Sequence[str]) -> int:
    """The exit status of pytest."""
    for name in ("PYTEST_ADDOPTS", "PYTEST_PLUGINS"):
        os.environ.pop(name, None)
    return int(pytest.main(list(argv)))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
