"""A crash log in a mounted pool."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import vfsmap
from vfsmap.pstore import Geometry, Recorder, Region, format_region
from vfsmap.testing.commands import Server, served_pool
from vfsmap.testing.media import tmpfs
from vfsmap.units import MIB, PMD


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with tmpfs(huge="always", size="400M") as place, served_pool(place, "128M") as server:
        yield server


@pytest.fixture
def file(server: Server, request: pytest.FixtureRequest) -> Path:
    path = server.directory / str(request.node.name)
    format_region(path, Geometry(2 * MIB))
    return path


def test_log_in_a_pool_is_one_huge_page_mapped_out_of_the_pool(file: Path) -> None:
    with vfsmap.map(file, level=PMD, populate=True) as window:
        assert window.direct
        assert window.page_sizes()[PMD.size] == 2 * MIB


def test_lines_recorded_in_a_window_are_read_through_the_mount(file: Path) -> None:
    with Recorder(file, watch=False) as recorder:
        recorder.console("a line\n")
        recorder.dmesg("Oops", "text\n")
    assert b"a line\n" in file.read_bytes()
    with Region.open(file) as region:
        assert [shown.data for shown in region.files()] == [
            b"Oops#1 Part1\na line\ntext\n",
            b"a line\n",
        ]


def test_processes_share_a_log_in_a_pool(file: Path) -> None:
    script = (
        "import sys\nfrom vfsmap.pstore import Recorder\n"
        "with Recorder(sys.argv[1], watch=False) as recorder:\n"
        "    for n in range(200): recorder.console(f'{sys.argv[2]} {n}\\n')"
    )
    command = [sys.executable, "-c", script, str(file)]
    writers = [subprocess.Popen([*command, name]) for name in "abc"]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    with Region.open(file) as region:
        lines = region.file("console-ramoops-0").data.decode().splitlines()
    assert sorted(lines) == sorted(f"{name} {n}" for name in "abc" for n in range(200))


def test_killed_program_and_killed_server_lose_no_line(server: Server, file: Path) -> None:
    script = (
        "import os, sys\nfrom vfsmap.pstore import Recorder\n"
        "recorder = Recorder(sys.argv[1])\n"
        "for n in range(100): recorder.console(f'line {n}\\n')\n"
        "print('up', flush=True)\nsys.stdin.read()"
    )
    program = subprocess.Popen(
        [sys.executable, "-c", script, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert program.stdin
    assert program.stdout
    assert program.stdout.readline() == b"up\n"
    os.kill(program.pid, signal.SIGKILL)
    assert program.wait() == -signal.SIGKILL
    program.stdin.close()
    program.stdout.close()
    server.kill()
    server.mount()
    with Region.open(file, writable=True) as region:
        shown = {shown.name: shown.data for shown in region.files()}
    log = b"".join(b"line %d\n" % n for n in range(100))
    assert shown["console-ramoops-0"] == log
    assert shown["dmesg-ramoops-0"].startswith(b"Panic#1 Part1\n" + log + b"-c[")
