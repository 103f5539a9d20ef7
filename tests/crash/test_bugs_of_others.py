"""Seventeen bugs that other persistent-memory systems shipped, each shown not to be one here."""

import mmap
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from vfsmap.alloc import Allocator
from vfsmap.errors import TooManyMappings
from vfsmap.fs import FileSystem
from vfsmap.fs.check import check
from vfsmap.mapping.window import Window
from vfsmap.pmem.medium import detect
from vfsmap.pool import Pool, superblock
from vfsmap.pool.layout import BATCH, USER_TAG, end_record
from vfsmap.pool.log import LogHalf, Place
from vfsmap.pool.scan import scan
from vfsmap.pstore import Geometry, Region, format_region
from vfsmap.testing.commands import vfsmap
from vfsmap.testing.hunt import Failure, Hunter, Tally
from vfsmap.testing.mending import mending_lost
from vfsmap.testing.pools import GROUPED, killed, killed_fs, make_fs, make_pool, open_pmem, scratch
from vfsmap.testing.recording import MEDIA, Fence, Flush, Memory, RecordingPmem, Store
from vfsmap.testing.workload import POOL_SIZE, base, parse
from vfsmap.units import KIB, LEVELS, MIB, PMD, Extent

PAGE = 4 * KIB
TAG = USER_TAG | 1


@pytest.fixture
def directory() -> Iterator[Path]:
    with scratch() as path:
        yield path


def lost(*names: str) -> list[Failure]:
    tally = Tally()
    for name in names:
        workload = parse(name)
        Hunter(workload.medium, tally, every=8).run(workload)
    assert tally.images
    return tally.failures


def test_superblock_checksum_covers_all_fields() -> None:
    whole = base("store")[0][: superblock.SIZE]
    assert not superblock.problem(whole, POOL_SIZE)
    for byte in range(superblock.SIZE):
        changed = bytearray(whole)
        changed[byte] ^= 0x10
        assert superblock.problem(bytes(changed), POOL_SIZE), f"byte {byte} is not covered"


def test_a_header_published_before_its_entry_is_no_entry() -> None:
    pmem = RecordingPmem(Memory(bytes(64 * KIB)), 64 * KIB, MEDIA["store"])
    half = LogHalf(pmem, Place(8 * KIB, 16 * KIB), 7, zlib.crc32(b"uuid"))
    at = half.append([end_record(5)], 6)
    assert LogHalf(pmem, half.place, 7, zlib.crc32(b"uuid")).valid_batch(at, 0)
    pmem.store(at + BATCH.size, bytes(16))
    assert not LogHalf(pmem, half.place, 7, zlib.crc32(b"uuid")).valid_batch(at, 0)


def test_a_log_is_never_full_for_ever(directory: Path) -> None:
    pool = make_pool(directory / "pool", 4 * MIB)
    epoch = pool.journal.superblock.epoch
    for turn in range(2000):
        with pool.transaction() as tx:
            tx.put(1, TAG, turn.to_bytes(8, "little") * 60)
    assert pool.journal.superblock.epoch > epoch
    pool.close()


def test_rename_loses_no_file_in_a_crash() -> None:
    assert lost("flush/rename", "store/rename-over-last", "sync/exchange-across") == []


def test_no_fence_is_missing_after_the_last_flush() -> None:
    pmem = RecordingPmem(Memory(base("flush")[0]), POOL_SIZE, MEDIA["flush"])
    fs = FileSystem(Pool(pmem))
    for number in range(3):
        ino = fs.create(1, b"new%d" % number, 0o600, 0, 0).ino
        fs.write(ino, 0, b"text")
        kinds = [type(event) for event in pmem.events]
        last = len(kinds) - 1 - kinds[::-1].index(Fence)
        assert not {Store, Flush} & set(kinds[last:])


def test_unaligned_edges_are_flushed() -> None:
    assert lost("flush/overwrite-edge", "flush/overwrite-and-grow") == []


def test_replay_goes_in_the_order_of_the_log(directory: Path) -> None:
    pool = make_pool(directory / "pool", 8 * MIB)
    for turn in range(300):
        with pool.transaction() as tx:
            tx.put(1, TAG, turn.to_bytes(8, "little"))
            tx.put(2 + turn, TAG, bytes(8))
        if turn % 100 == 50:
            pool.journal.compact()
    with killed(pool) as again:
        assert again.objects[1][16:24] == (299).to_bytes(8, "little")


def test_recovery_needs_one_cpu_only(directory: Path) -> None:
    fs = make_fs(directory / "pool", 8 * MIB)
    fs.create(1, b"file", 0o600, 0, 0)
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cpus)})
    try:
        with killed_fs(fs) as again:
            assert again.lookup(1, b"file").is_file
    finally:
        os.sched_setaffinity(0, cpus)


def test_freed_extents_are_promoted_when_their_neighbours_merge() -> None:
    allocator = Allocator()
    allocator.free(0, LEVELS[-1].size)
    runs = [allocator.allocate(2 * MIB, PMD) for _ in range(LEVELS[-1].size // (2 * MIB))]
    for start, length in (*runs[::2], *runs[1::2]):
        allocator.free(start, length)
    assert allocator.largest(LEVELS[-1]) == LEVELS[-1].size


def test_an_alignment_larger_than_the_length_is_kept(directory: Path) -> None:
    with make_pool(directory / "pool", 16 * MIB) as pool:
        with pool.transaction() as tx:
            arena = tx.allocate(PAGE, level=PMD)
        assert pool.arena(arena).start % PMD.size == 0


def test_a_check_beside_live_mappings_is_clean_and_changes_nothing(directory: Path) -> None:
    fs = make_fs(directory / "pool", 8 * MIB)
    ino = fs.create(1, b"file", 0o600, 0, 0).ino
    fs.write(ino, 0, b"text")
    pin = fs.pin(ino, 0, PAGE, writable=True)
    fs.hold(ino)
    fs.unlink(1, b"file")
    before = fs.pool.path.read_bytes()
    assert check(scan(open_pmem(fs.pool.path))).clean
    assert fs.pool.path.read_bytes() == before
    fs.unpin(pin)
    fs.drop(ino)
    fs.close()


def test_the_limit_of_mappings_is_not_reported_as_no_memory(tmp_path: Path) -> None:
    limit = int(Path("/proc/sys/vm/max_map_count").read_text())
    path = tmp_path / "file"
    path.write_bytes(bytes(3 * PAGE))
    extents = [Extent(n * PAGE, (n % 2) * 2 * PAGE, PAGE) for n in range(limit + 1)]
    fd = os.open(path, os.O_RDONLY)
    try:
        with pytest.raises(TooManyMappings, match=r"vm\.max_map_count"):
            Window(fd, extents, (limit + 1) * PAGE, detect(fd))
    finally:
        os.close(fd)


def test_one_users_write_window_is_not_open_for_another(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(PAGE))
    with path.open("r+b") as writer, path.open("rb") as reader:
        window = mmap.mmap(writer.fileno(), PAGE)
        with pytest.raises(PermissionError):  # the reader's descriptor, while the writer stores
            mmap.mmap(reader.fileno(), PAGE, prot=mmap.PROT_WRITE)
        shown = mmap.mmap(reader.fileno(), PAGE, prot=mmap.PROT_READ)
        with pytest.raises(TypeError):
            shown[0] = 1
        window.close()
        shown.close()


def test_a_crash_log_is_not_overwritten_at_the_next_start() -> None:
    geometry = Geometry(64 * KIB, 8 * KIB, 16 * KIB, 16 * KIB)
    buffer = bytearray(64 * KIB)
    format_region(buffer, geometry, overwrite=False)
    for start in range(2):
        with Region.over(buffer, geometry) as region:
            region.put("Oops", b"start %d\n" % start)
    with Region.over(buffer, geometry) as region:
        texts = [file.data for file in region.files() if file.kind == "dmesg"]
    assert sorted(text.splitlines()[-1] for text in texts) == [b"start 0", b"start 1"]


def test_fsync_is_more_than_a_barrier(directory: Path) -> None:
    fs = make_fs(directory / "pool", 8 * MIB, GROUPED)
    fs.create(1, b"file", 0o600, 0, 0)
    fs.pool.sync()
    with killed_fs(fs) as again:
        assert again.lookup(1, b"file").is_file
    assert lost("sync/append-block") == []


def test_a_mount_fails_rather_than_hangs_when_something_is_unsupported(tmp_path: Path) -> None:
    vfsmap("format", tmp_path / "pool", "--size", "16M")
    done = vfsmap("mount", tmp_path / "pool", tmp_path, "-o", "dax=always", check=False)
    assert done.returncode == 2
    assert "dax=always" in done.stderr


def test_an_aborted_check_or_repair_corrupts_nothing() -> None:
    pmem = RecordingPmem(Memory(base("store")[0]), POOL_SIZE, MEDIA["store"], writable=False)
    check(scan(pmem))
    assert pmem.events == []
    assert mending_lost("store", range(2)) == []
