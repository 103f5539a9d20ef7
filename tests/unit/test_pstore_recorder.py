import logging
import mmap
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from vfsmap.errors import Busy, Damaged, Exists, Invalid, NoSpace, NotFound, ReadOnly
from vfsmap.pstore.companion import Companion
from vfsmap.pstore.format import format_region
from vfsmap.pstore.geometry import Geometry
from vfsmap.pstore.handler import RecorderHandler
from vfsmap.pstore.reader import read_files
from vfsmap.pstore.record import parse_title
from vfsmap.pstore.recorder import Recorder
from vfsmap.pstore.region import Region
from vfsmap.units import KIB

SMALL = Geometry(64 * KIB, 8 * KIB, 16 * KIB, 16 * KIB)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "region"
    format_region(file, SMALL)
    return file


@pytest.fixture
def recorder(path: Path) -> Iterator[Recorder]:
    with Recorder(path, watch=False) as recorder:
        yield recorder


def shown(recorder: Recorder) -> dict[str, bytes]:
    return {file.name: file.data for file in recorder.region.files()}


def test_lines_are_in_the_file_as_soon_as_they_are_recorded(path: Path, recorder: Recorder) -> None:
    recorder.console("first line\n")
    recorder.console(b"second line\n")
    recorder.pmsg(memoryview(b"a message\n"))
    files = {file.name: file.data for file in read_files(path.read_bytes(), SMALL)}
    assert files == {
        "console-ramoops-0": b"first line\nsecond line\n",
        "pmsg-ramoops-0": b"a message\n",
    }


def test_text_that_is_no_unicode_is_recorded_all_the_same(recorder: Recorder) -> None:
    recorder.console("\udcff ä\n")
    assert shown(recorder)["console-ramoops-0"] == "\\udcff ä\n".encode()


def test_a_recorder_goes_on_where_the_last_one_ended(path: Path) -> None:
    for n in range(3):
        with Recorder(path, watch=False) as recorder:
            recorder.console(f"run {n}\n")
    with Region.open(path) as region:
        assert region.file("console-ramoops-0").data == b"run 0\nrun 1\nrun 2\n"


@pytest.mark.parametrize("ecc", [0, 16])
def test_a_buffer_is_a_region_as_well(ecc: int) -> None:
    buffer = bytearray(64 * KIB)
    geometry = Geometry(64 * KIB, 8 * KIB, 16 * KIB, 16 * KIB, ecc=ecc)
    format_region(buffer, geometry)
    with Recorder(buffer, watch=False) as recorder:
        for n in range(300):
            recorder.console(f"line {n}\n")
    content = b"".join(b"line %d\n" % n for n in range(300))
    notice = b"\nECC: No errors detected\n" if ecc else b""
    assert [file.data for file in read_files(buffer, geometry)] == [content + notice]


def test_crash_record_holds_the_tail_of_the_log_and_is_numbered(recorder: Recorder) -> None:
    recorder.console("before\n")
    assert recorder.dmesg("Oops", "it went wrong\n") == "dmesg-ramoops-0"
    recorder.console("after\n")
    assert recorder.dmesg("Panic", "for good\n") == "dmesg-ramoops-1"
    files = shown(recorder)
    assert files["dmesg-ramoops-0"] == b"Oops#1 Part1\nbefore\nit went wrong\n"
    assert files["dmesg-ramoops-1"] == b"Panic#2 Part1\nbefore\nafter\nfor good\n"


def test_counter_goes_on_after_everything_was_erased(path: Path, recorder: Recorder) -> None:
    recorder.dmesg("Oops", "one")
    recorder.region.erase_all()
    with Recorder(path, watch=False) as later:
        later.dmesg("Oops", "two")
        assert shown(later)["dmesg-ramoops-0"] == b"Oops#2 Part1\ntwo"


def numbers(recorder: Recorder) -> list[int]:
    titles = (parse_title(file.data) for file in recorder.region.files() if file.kind == "dmesg")
    return [title.number for title in titles if title]


def test_unread_records_are_kept_and_the_refused_are_counted(recorder: Recorder) -> None:
    for _ in range(4):
        recorder.dmesg("Oops", "x")
    with pytest.raises(NoSpace, match="all 4 crash records are unread"):
        recorder.dmesg("Oops", "x")
    assert numbers(recorder) == [1, 2, 3, 4]
    assert (recorder.region.ledger.refused, recorder.region.ledger.overwritten) == (1, 0)


def test_oldest_read_record_makes_room_first(recorder: Recorder) -> None:
    for _ in range(4):
        recorder.dmesg("Oops", "x")
    recorder.region.mark_read("dmesg-ramoops-2")
    recorder.region.mark_read("dmesg-ramoops-1")
    assert recorder.region.unread() == {"dmesg-ramoops-0", "dmesg-ramoops-3"}
    assert recorder.dmesg("Oops", "x") == "dmesg-ramoops-1"
    assert recorder.dmesg("Oops", "x") == "dmesg-ramoops-2"
    assert numbers(recorder) == [1, 5, 6, 4]
    assert len(recorder.region.unread()) == 4


def test_erased_zone_is_taken_before_any_record_goes(recorder: Recorder) -> None:
    for _ in range(4):
        recorder.dmesg("Oops", "x")
    recorder.region.mark_read("dmesg-ramoops-0")
    recorder.region.erase("dmesg-ramoops-3")
    assert recorder.dmesg("Oops", "x") == "dmesg-ramoops-3"


def test_policy_overwrite_lets_the_oldest_unread_go_and_counts_it(recorder: Recorder) -> None:
    recorder.region.set_policy(overwrite=True)
    for _ in range(6):
        recorder.dmesg("Oops", "x")
    assert numbers(recorder) == [5, 6, 3, 4]
    assert (recorder.region.ledger.refused, recorder.region.ledger.overwritten) == (0, 2)


def test_record_of_a_kernel_is_unread_and_numbering_follows_it() -> None:
    buffer = bytearray(64 * KIB)
    format_region(buffer, SMALL)
    for place in SMALL.places[:4]:  # as a kernel leaves them: nothing in the margins
        buffer[place.offset + 12 : place.offset + place.size] = bytes(place.size - 12)
    record = b"====1.000000-D\nOops#7 Part1\n<6>text\n"
    place = SMALL.places[1]
    length = len(record).to_bytes(4, "little")
    buffer[place.offset + 4 : place.offset + 12 + len(record)] = length * 2 + record
    with Recorder(buffer, SMALL, watch=False) as recorder:
        assert recorder.region.unread() == {"dmesg-ramoops-1"}
        recorder.dmesg("Oops", "ours")
        assert numbers(recorder) == [8, 7]


def test_record_that_fills_a_kernels_zone_costs_the_ledger_only_there(recorder: Recorder) -> None:
    for _ in range(2):
        recorder.dmesg("Oops", "x")
    zone = recorder.region.zones[0]
    zone.zap()
    zone.write((b"====1.000000-D\nPanic#1 Part1\n" + b"k" * zone.capacity)[: zone.capacity])
    assert recorder.region.ledger.counter == 2
    recorder.dmesg("Oops", "x")
    assert numbers(recorder) == [1, 2, 3]
    assert zone.read().endswith(b"kkkk")


def test_every_dmesg_zone_serves_when_they_are_large_and_few() -> None:
    buffer = bytearray(256 * KIB)
    geometry = Geometry(256 * KIB, 128 * KIB, 64 * KIB, 64 * KIB, ecc=16)
    format_region(buffer, geometry)
    with Recorder(buffer, watch=False) as recorder:
        recorder.console("x" * 60000)
        recorder.dmesg("Panic", os.urandom(100000))
        file = recorder.region.file("dmesg-ramoops-0")
        assert len(file.data) > 90000
        assert (file.corrected, file.bad) == (0, 0)
        assert recorder.region.ledger.counter == 1


@pytest.mark.parametrize("compression", ["deflate", "none"])
def test_compression_of_crash_records_is_the_callers_choice(path: Path, compression: str) -> None:
    # a plain str is no Literal
    with Recorder(path, compression=compression, watch=False) as recorder:  # type: ignore[arg-type]
        recorder.dmesg("Oops", "text\n" * 100)
        mark = recorder.region.zones[0].read().partition(b"\n")[0][-1:]
        assert mark == (b"C" if compression == "deflate" else b"D")
        assert shown(recorder)["dmesg-ramoops-0"] == b"Oops#1 Part1\n" + b"text\n" * 100


def test_threads_do_not_tear_each_others_lines(recorder: Recorder) -> None:
    def log(name: str) -> None:
        for n in range(50):
            recorder.console(f"{name} {n} {'-' * 20}\n")

    threads = [threading.Thread(target=log, args=(name,)) for name in "abcdef"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = shown(recorder)["console-ramoops-0"].decode().splitlines()
    assert sorted(lines) == sorted(f"{name} {n} {'-' * 20}" for name in "abcdef" for n in range(50))


def test_signal_handler_that_logs_in_the_midst_of_a_write_is_heard_after_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Recorder(path, watch=False) as recorder:
        zone = recorder.region.zone("console")
        assert zone
        real = zone.write

        def interrupted(data: bytes) -> None:
            monkeypatch.setattr(zone, "write", real)
            signal.raise_signal(signal.SIGUSR1)
            real(data)

        old = signal.signal(signal.SIGUSR1, lambda *_: recorder.console("signal\n"))
        try:
            monkeypatch.setattr(zone, "write", interrupted)
            recorder.console("line\n")
        finally:
            signal.signal(signal.SIGUSR1, old)
        assert shown(recorder)["console-ramoops-0"] == b"line\nsignal\n"


def test_exception_in_the_midst_of_a_write_leaves_the_region_free(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    zone = recorder.region.zone("console")
    assert zone

    def interrupted(data: bytes) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(zone, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            recorder.console("lost\n")
    recorder.console("kept\n")
    assert shown(recorder)["console-ramoops-0"] == b"kept\n"


def test_lock_that_an_exception_left_taken_is_not_waited_for(recorder: Recorder) -> None:
    companion = recorder.region.companion
    assert companion
    companion.mutex.lock()  # as a KeyboardInterrupt between lock and write leaves it
    recorder.console("line\n")
    recorder.console("line\n")
    assert shown(recorder)["console-ramoops-0"] == b"line\nline\n"


@pytest.mark.parametrize("ecc", [0, 16])
def test_next_writer_makes_good_what_a_killed_one_left(tmp_path: Path, ecc: int) -> None:
    path = tmp_path / "region"
    format_region(path, Geometry(64 * KIB, 8 * KIB, 16 * KIB, 16 * KIB, ecc=ecc))
    with Recorder(path, watch=False) as recorder:
        recorder.console("before\n")
        zone = recorder.region.zone("console")
        assert zone
        child = os.fork()
        if child == 0:
            # between data and parity there is no moment to stop at: stop when it wants to unlock
            vars(recorder)["_mutex"] = None
            companion = recorder.region.companion
            assert companion
            companion.mutex.lock()
            recorder._note(zone, 200)
            zone.data[zone.start : zone.start + 200] = b"t" * 200
            zone._words[1] = zone._words[2] = zone.start + 200
            os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(child, 0)
        recorder.console("after\n")
        file = recorder.region.file("console-ramoops-0")
        assert file.data.startswith(b"before\n" + b"t" * 200 + b"after\n")
        assert (file.corrected, file.bad) == (0, 0)


def test_region_of_another_user_in_use_is_refused(path: Path) -> None:
    with Recorder(path, watch=False):
        key = path.stat().st_dev, path.stat().st_ino
        child = os.fork()
        if child == 0:
            os.seteuid(12345)
            try:
                Companion.beside(key)
            except Busy as error:
                os._exit(0 if "another user's process" in str(error) else 2)
            os._exit(1)
        assert os.waitpid(child, 0)[1] == 0


def test_region_may_be_used_by_another_user_when_it_is_free(path: Path) -> None:
    Recorder(path, watch=False).close()
    key = path.stat().st_dev, path.stat().st_ino
    child = os.fork()
    if child == 0:
        os.seteuid(12345)
        Companion.beside(key).close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_reading_needs_no_right_to_write(path: Path, recorder: Recorder) -> None:
    recorder.console("line\n")
    with Region.open(path) as region:
        assert [file.name for file in region.files()] == ["console-ramoops-0"]
        with pytest.raises(ReadOnly):
            region.erase("console-ramoops-0")


def test_erased_file_is_gone_and_the_others_stay(recorder: Recorder) -> None:
    recorder.console("line\n")
    recorder.pmsg("line\n")
    recorder.dmesg("Oops", "x")
    recorder.region.erase("pmsg-ramoops-0")
    assert sorted(shown(recorder)) == ["console-ramoops-0", "dmesg-ramoops-0"]
    with pytest.raises(NotFound, match="it shows dmesg-ramoops-0, console-ramoops-0"):
        recorder.region.erase("pmsg-ramoops-0")


def test_recording_where_there_is_no_zone_says_what_to_do() -> None:
    buffer = bytearray(64 * KIB)
    format_region(buffer, Geometry(64 * KIB, 0, 16 * KIB, 0))
    with Recorder(buffer, Geometry(64 * KIB, 0, 16 * KIB, 0)) as recorder:
        with pytest.raises(Invalid, match="format it with a pmsg size"):
            recorder.pmsg("x")
        with pytest.raises(NotFound, match="format it with a record size"):
            recorder.dmesg("Oops", "x")


def test_what_is_no_region_is_refused(tmp_path: Path) -> None:
    (tmp_path / "zeros").write_bytes(bytes(64 * KIB))
    with pytest.raises(Damaged, match="format it"):
        Recorder(tmp_path / "zeros")
    with pytest.raises(NotFound):
        Recorder(tmp_path / "nothing")
    with pytest.raises(Invalid, match="not a regular file"):
        Recorder(tmp_path)
    (tmp_path / "empty").touch()
    with pytest.raises(Invalid, match="empty"):
        Recorder(tmp_path / "empty")
    with pytest.raises(Invalid, match="can be written"):
        Recorder(bytes(64 * KIB), SMALL)


def test_formatting_never_takes_a_file_with_something_in_it(path: Path) -> None:
    with pytest.raises(Exists, match="force"):
        format_region(path, SMALL)


def test_formatted_file_has_no_holes(path: Path) -> None:
    assert path.stat().st_blocks * 512 >= SMALL.size


def test_geometry_of_a_formatted_region_is_known_from_its_ledger() -> None:
    geometry = Geometry(300000, 20000, 0, 8192, 4096, ecc=7, cpus=3, order="6.1")
    buffer = bytearray(400000)
    format_region(buffer, geometry)
    with Region.over(buffer) as region:
        assert region.geometry == geometry


def test_logging_goes_to_the_zone_that_was_asked_for(path: Path) -> None:
    logger = logging.Logger("test")
    console, pmsg = RecorderHandler(path), RecorderHandler(path, zone="pmsg")
    try:
        logger.addHandler(console)
        logger.addHandler(pmsg)
        logger.warning("over %s", "here")
        files = shown(console.recorder)
    finally:
        console.close()
        pmsg.close()
    assert files["console-ramoops-0"] == files["pmsg-ramoops-0"]
    assert files["console-ramoops-0"].endswith(b"WARNING test: over here\n")


def test_handler_leaves_a_recorder_open_that_is_not_its_own(recorder: Recorder) -> None:
    handler = RecorderHandler(recorder)
    handler.close()
    recorder.console("still there\n")


def test_forked_region_in_memory_is_shared() -> None:
    memory = mmap.mmap(-1, 64 * KIB)
    format_region(memory, SMALL)
    recorder = Recorder(memory, watch=False)
    child = os.fork()
    if child == 0:
        recorder.console("child\n")
        os._exit(0)
    os.waitpid(child, 0)
    recorder.console("parent\n")
    assert shown(recorder)["console-ramoops-0"] == b"child\nparent\n"


@pytest.mark.parametrize("everything", [False, True])
def test_what_ecc_lets_read_despite_a_wrong_signature_is_erased(everything: bool) -> None:
    geometry = Geometry(64 * KIB, 8 * KIB, 16 * KIB, 16 * KIB, ecc=16)
    buffer = bytearray(geometry.size)
    format_region(buffer, geometry)
    with Recorder(buffer, geometry, watch=False) as recorder:
        recorder.console("a line\n")
    with Region.over(buffer, geometry) as region:
        zone = region.zone("console")
        assert zone
        buffer[zone.place.offset] ^= 0xFF
        if everything:
            region.erase_all()
        else:
            region.erase("console-ramoops-0")
        assert not region.files()
        assert zone.valid
        assert zone.recall() == (b"", 0, 0)
