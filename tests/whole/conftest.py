"""What the tests of system integration share."""

from pathlib import Path

import pytest

from vfsmap.testing.commands import vfsmap


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tree that ``vfsmap system install`` has made."""
    root = tmp_path_factory.mktemp("root")
    vfsmap("system", "install", "--root", root)
    return root
