"""Whoever installs the wheel has its types: a consumer's mypy knows what everything is."""

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]

CONSUMER = """
import vfsmap
from vfsmap.fs import FollowedFileSystem
from vfsmap.pool import Pool
from vfsmap_fuse.mount import MountOptions
from vfsmap_tools.archive import seconds

with vfsmap.map("/mnt/pool/x", level=vfsmap.PMD) as window:
    reveal_type(window)
    reveal_type(window.view())
    reveal_type(window.page_sizes())
vfsmap.map(5)
reveal_type(Pool.open("x", "r"))
reveal_type(FollowedFileSystem(Pool.open("x", "r")).read(1, 0, 1))
reveal_type(MountOptions.parse(["ro"]))
reveal_type(seconds(1))
"""
KNOWN = [
    "vfsmap.mapping.window.Window",
    "memoryview[int]",
    "dict[int, int]",
    "vfsmap.pool.pool.Pool",
    "bytes",
    "vfsmap_fuse.mount.MountOptions",
    "str",
]


def test_a_consumers_mypy_sees_the_types_of_the_wheel(tmp_path: Path) -> None:
    build = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", tmp_path, ROOT)
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    venv.create(tmp_path / "venv", symlinks=True)
    (site,) = tmp_path.glob("venv/lib/python*/site-packages")
    zipfile.ZipFile(wheel).extractall(site)
    (tmp_path / "consumer.py").write_text(CONSUMER)
    # types of an installed package are taken only if it says that it has them: py.typed
    checked = subprocess.run(
        (
            *(sys.executable, "-m", "mypy", "--strict", "--config-file=", "consumer.py"),
            *("--python-executable", tmp_path / "venv/bin/python"),
        ),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    told = [line for line in checked.stdout.splitlines() if line.startswith("consumer.py")]
    revealed = [line.split('"')[1] for line in told if "Revealed type" in line]
    assert revealed == KNOWN, checked.stdout
    (error,) = (line for line in told if "error:" in line)
    assert 'Argument 1 to "map" has incompatible type "int"' in error
