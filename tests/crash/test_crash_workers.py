"""A hunt whose workers die has not searched what it says, and does not end well."""

import subprocess
import sys

CODE = """
import sys
from unittest import mock
from vfsmap.testing import crash

def run(*_, **__):
    raise KeyError("a bug")

with mock.patch.object(crash.Hunter, "run", run):
    sys.argv[1:] = ["--only", "singles", "--minutes", "1"]
    crash.main()
"""


def test_a_hunt_whose_workers_die_says_so_and_fails() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "2 of 2 workers died" in done.stderr
