"""Programs that others wrote to find faults of file systems: stress-ng and fio."""

import subprocess
from pathlib import Path
from typing import Final

import pytest

STRESSORS: Final = {
    "access": 50,
    "chattr": 5,
    "chmod": 20,
    "chown": 100,
    "copy-file": 5,
    "dentry": 500,
    "dir": 300,
    "dirdeep": 100,
    "dirmany": 500,
    "dnotify": 20,
    "dup": 20,
    "fcntl": 100,
    "file-ioctl": 100,
    "filename": 50,
    "flock": 1000,
    "fstat": 200,
    "getdent": 500,
    "handle": 500,
    "hdd": 100,
    "inotify": 2,
    "io": 20,
    "locka": 1000,
    "lockf": 200,
    "lockofd": 1000,
    "mknod": 50,
    "open": 500,
    "rename": 200,
    "touch": 200,
    "utime": 200,
}
"""stress-ng's stressors for file systems, and how many of their rounds make test runs."""
SLOW: Final = ("chdir", "lease", "link", "symlink", "xattr")
"""Those that make, or wait for, too much in each round.

Left out are those that need what FUSE or pyfuse3 does not pass on (fallocate, fpunch, fsize,
inode-flags, sync-file, verity), or more room (iomix), and those that look elsewhere (binderfs,
fanotify, procfs).
"""
ENGINES: Final = ("psync", "mmap", "libaio")


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


def stress(stressor: str, where: Path, *limits: str) -> None:
    words = ("--verify", "--no-rand-seed", "--temp-path", str(where))
    run("stress-ng", f"--{stressor}", "2", *words, *limits)
    assert not list(where.iterdir())


def fio(engine: str, where: Path, *, direct: bool, megabytes: int) -> None:
    run(
        "fio",
        "--name=job",
        f"--directory={where}",
        f"--ioengine={engine}",
        f"--direct={int(direct)}",
        "--rw=randrw",
        "--bsrange=4k-64k",
        f"--size={megabytes}M",
        "--numjobs=2",
        "--verify=crc32c",
        "--do_verify=1",
        "--verify_fatal=1",
        "--randseed=1",
    )


@pytest.mark.parametrize("stressor", STRESSORS)
def test_stress_ng_finds_nothing(stressor: str, here: Path) -> None:
    stress(stressor, here, f"--{stressor}-ops", str(STRESSORS[stressor]), "--timeout", "60s")


@pytest.mark.parametrize("engine", ENGINES)
def test_fio_reads_what_it_wrote(engine: str, here: Path) -> None:
    fio(engine, here, direct=engine == "libaio", megabytes=8)


@pytest.mark.slow
@pytest.mark.parametrize("stressor", [*STRESSORS, *SLOW])
def test_stress_ng_finds_nothing_in_a_while(stressor: str, here: Path) -> None:
    stress(stressor, here, "--timeout", "10s")
