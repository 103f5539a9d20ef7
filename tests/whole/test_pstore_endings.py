"""Programs that end in every way there is, and the crash record that each leaves."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vfsmap.pstore.format import format_region
from vfsmap.pstore.geometry import Geometry
from vfsmap.pstore.recorder import Recorder
from vfsmap.pstore.region import Region
from vfsmap.units import KIB

START = """
import ctypes, os, signal, sys, threading
from vfsmap.pstore.recorder import Recorder
recorder = Recorder(sys.argv[1])
recorder.console("last words\\n")
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "region"
    format_region(file, Geometry(256 * KIB, 32 * KIB, 32 * KIB, 32 * KIB))
    return file


def run(path: Path, ending: str) -> subprocess.CompletedProcess[bytes]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONFAULTHANDLER"}
    command = [sys.executable, "-c", START + ending, str(path)]
    return subprocess.run(command, capture_output=True, env=environment, check=False)


def records(path: Path, *, writable: bool) -> list[str]:
    with Region.open(path, writable=writable) as region:
        return [file.data.decode() for file in region.files() if file.kind == "dmesg"]


@pytest.mark.parametrize(
    "ending", ["", "sys.exit(3)", "raise KeyboardInterrupt", "recorder.close(); os._exit(1)"]
)
def test_good_or_wanted_end_leaves_no_record(path: Path, ending: str) -> None:
    run(path, ending)
    assert records(path, writable=True) == []


def test_unhandled_exception_is_a_panic_at_once_and_python_still_reports_it(path: Path) -> None:
    done = run(path, "1 / 0")
    assert done.returncode == 1
    assert b"ZeroDivisionError" in done.stderr
    (record,) = records(path, writable=False)
    assert record.startswith("Panic#1 Part1\nlast words\nTraceback (most recent call last):\n")
    assert record.endswith("ZeroDivisionError: division by zero\n")
    assert records(path, writable=True) == [record]


def test_exception_of_a_thread_is_an_oops(path: Path) -> None:
    done = run(path, "t = threading.Thread(target=lambda: 1 / 0); t.start(); t.join()")
    assert done.returncode == 0
    (record,) = records(path, writable=False)
    assert record.startswith("Oops#1 Part1\nlast words\n")
    assert "ZeroDivisionError" in record


@pytest.mark.parametrize(
    ("ending", "status", "told"),
    [
        ("ctypes.string_at(0)", -signal.SIGSEGV, "Segmentation fault"),
        ("os.abort()", -signal.SIGABRT, "Aborted"),
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
        ("os._exit(7)", 7, ""),
    ],
)
def test_end_without_a_word_is_recorded_by_whoever_opens_the_region_next(
    path: Path, ending: str, status: int, told: str
) -> None:
    assert run(path, ending).returncode == status
    (record,) = records(path, writable=True)
    assert record.startswith("Panic#1 Part1\nlast words\n-c[")
    assert "ended without a word" in record
    assert told in record
    assert ("most recent call first" in record) == bool(told)
    assert records(path, writable=True) == [record]


def test_program_that_still_runs_is_left_alone(path: Path) -> None:
    with Recorder(path) as recorder:
        assert recorder.region.entered
        assert records(path, writable=True) == []
        assert run(path, "os._exit(1)").returncode == 1
        assert len(records(path, writable=True)) == 1
    assert len(records(path, writable=True)) == 1


def test_child_that_dies_is_not_taken_for_its_parent(path: Path) -> None:
    ending = "\nif os.fork() == 0: os.kill(os.getpid(), 9)\nos.wait()"
    assert run(path, ending).returncode == 0
    assert records(path, writable=True) == []


def test_killed_program_whose_record_finds_no_room_is_counted(path: Path) -> None:
    with Recorder(path, watch=False) as recorder:
        for _ in range(6):
            recorder.dmesg("Oops", "unread")
    run(path, "os._exit(1)")
    assert len(records(path, writable=True)) == 6
    with Region.open(path) as region:
        assert region.ledger.refused == 1


def test_watch_puts_back_the_hooks_it_found(path: Path) -> None:
    before = sys.excepthook
    with Recorder(path):
        assert sys.excepthook is not before
    assert sys.excepthook is before
