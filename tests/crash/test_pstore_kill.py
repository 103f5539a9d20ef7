"""SIGKILL at any moment while eight processes log: what each had logged is there."""

import mmap
import os
import random
import re
import signal
import zlib
from pathlib import Path

import pytest

from vfsmap.pstore.format import format_region
from vfsmap.pstore.geometry import Geometry
from vfsmap.pstore.recorder import Recorder
from vfsmap.pstore.region import Region
from vfsmap.units import KIB

WRITERS = 8
LONGEST = 190
LINE = re.compile(rb"<(\d+) (\d+) x* ([0-9a-f]{8})>\n")


def make_line(writer: int, number: int, filler: int) -> bytes:
    text = b"%d %d %s" % (writer, number, b"x" * filler)
    return b"<%s %08x>\n" % (text, zlib.crc32(text))


class Round:
    """Eight processes that log until they are killed."""

    def __init__(self, path: Path, seed: int, *, reopen: bool) -> None:
        self.path = path
        self.random = random.Random(seed)
        self.reopen = reopen
        self.memory = mmap.mmap(-1, 8 * WRITERS)
        self.logged = memoryview(self.memory).cast("Q")
        """How many lines each writer has got back from."""

    def run(self, recorder: Recorder, lines: int) -> None:
        """Kill the writers when they have logged about ``lines`` together."""
        writers = [self._start(number, recorder) for number in range(WRITERS)]
        while sum(self.logged) < lines:
            pass
        self.random.shuffle(writers)
        for writer in writers:
            os.kill(writer, signal.SIGKILL)
        ends = [os.waitpid(writer, 0)[1] for writer in writers]
        assert ends == [signal.SIGKILL] * WRITERS

    def _start(self, writer: int, recorder: Recorder) -> int:
        filler = self.random.randrange(150)
        child = os.fork()
        if child:
            return child
        try:
            if self.reopen:
                recorder = Recorder(self.path, watch=False)
            number = 0
            while True:
                recorder.console(make_line(writer, number, filler))
                number += 1
                self.logged[writer] = number
        finally:
            os._exit(1)


def check(content: bytes, logged: memoryview, *, wrapped: bool) -> None:
    """Every line that was logged is there, and of the rest no more than a line for each writer.

    The rest is what the writers were at when they were killed: new bytes, or still the old ones,
    which can be whole lines of the ring's last turn.
    """
    lines: dict[int, list[tuple[int, int]]] = {writer: [] for writer in range(WRITERS)}
    known = 0
    for match in LINE.finditer(content):
        if int(match[3], 16) == zlib.crc32(match[0][1:-11]):
            lines[int(match[1])].append((int(match[2]), len(match[0])))
    for writer, found in lines.items():
        numbers = {number for number, _ in found}
        wanted = max(numbers & {logged[writer], logged[writer] - 1}, default=-1)
        assert wrapped or wanted >= logged[writer] - 1, "the last line is missing"
        for number, length in reversed(found):
            if number == wanted:
                known += length
                wanted -= 1
        assert wrapped or wanted == -1, "a line is missing"
    assert len(content) - known <= (WRITERS + wrapped) * LONGEST


def run_rounds(path: Path, rounds: range, *, ecc: int, console: int, lines: int) -> None:
    geometry = Geometry(256 * KIB + 2 * console, 32 * KIB, console, 4096, ecc=ecc)
    for seed in rounds:
        format_region(path, geometry, force=True)
        with Recorder(path, watch=False) as recorder:
            round_ = Round(path, seed, reopen=seed % 3 == 0)
            round_.run(recorder, round_.random.randrange(1, lines))
            with recorder.region.locked():  # a reader that may write mends what was torn
                pass
            files = {file.name: file for file in recorder.region.files()}
            zone = recorder.region.zone("console")
            assert zone
            wrapped = zone.size == zone.capacity
        shown = files["console-ramoops-0"]
        notice = b"\nECC: No errors detected\n" if ecc else b""
        assert shown.data.endswith(notice)
        check(shown.data.removesuffix(notice), round_.logged, wrapped=wrapped)
        with Region.open(path) as region:
            assert all(zone.valid for zone in region.zones)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "region"


KINDS = pytest.mark.parametrize(
    ("ecc", "console", "lines"),
    [(0, 1024 * KIB, 3000), (16, 512 * KIB, 400), (0, 8 * KIB, 3000), (16, 8 * KIB, 600)],
    ids=["plain", "ecc", "plain, wrapped", "ecc, wrapped"],
)


@KINDS
def test_killed_writers_leave_every_line_they_had_logged(
    path: Path, ecc: int, console: int, lines: int
) -> None:
    run_rounds(path, range(12), ecc=ecc, console=console, lines=lines)


@pytest.mark.slow
@pytest.mark.parametrize("lot", range(10))
@KINDS
def test_thousands_of_killed_writers_leave_every_line_they_had_logged(
    path: Path, ecc: int, console: int, lines: int, lot: int
) -> None:
    seeds = range(100 + 100 * lot, 200 + 100 * lot)
    run_rounds(path, seeds, ecc=ecc, console=console, lines=lines)
