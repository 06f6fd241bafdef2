"""pytest as `dscoder bench` starts it: without what the caller's environment says to another pytest."""

import os
import sys
from collections.abc import Sequence

import pytest


def main(argv: Sequence[str]) -> int:
    """The exit status of pytest."""
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:
        del os.environ[name]
    return int(pytest.main(list(argv)))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
