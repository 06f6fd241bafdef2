"""Windows that the tests of this folder train on."""

from pathlib import Path

import pytest

from dscoder.testing.tiny_run import tiny_windows


@pytest.fixture(scope="session")
def windows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of `dscoder prepare`."""
    return tiny_windows(tmp_path_factory.mktemp("prepared"))
