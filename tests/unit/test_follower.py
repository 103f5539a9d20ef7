import random
from collections.abc import Callable
from pathlib import Path

import pytest
from pyfuse3 import FUSEError, RequestContext

from vfsmap.errors import NotAPool, PoolDamaged, Stale
from vfsmap.fs import ROOT, FileSystem, FollowedFileSystem
from vfsmap.fs.following import FollowedFileSystem as Followed
from vfsmap.pmem import Medium
from vfsmap.pool import Pool
from vfsmap.pool.layout import BATCH, SUPERBLOCKS, Superblock
from vfsmap.pool.rewrite import rewrite
from vfsmap.pool.scan import scan
from vfsmap.tally import Tallies
from vfsmap.testing.pools import GROUPED, STORED, killed_fs, make_fs, open_pmem
from vfsmap.units import KIB, MIB, PMD
from vfsmap_fuse.following import FollowingOperations


def follow(path: Path, medium: Medium = STORED) -> Followed:
    return FollowedFileSystem(Pool(open_pmem(path, medium, writable=False)))


def make(fs: FileSystem, name: bytes, content: bytes = b"") -> int:
    ino = fs.create(ROOT, name, 0o600, 0, 0).ino
    fs.write(ino, 0, content)
    return ino


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "pool"


@pytest.fixture
def fs(path: Path) -> FileSystem:
    return make_fs(path, 64 * MIB)


@pytest.fixture
def followed(path: Path, fs: FileSystem) -> Followed:
    return follow(path)


class Interruption:
    """Has the writer do something right before the follower looks at a place for the nth time."""

    def __init__(
        self, followed: Followed, place: int, act: Callable[[], object], *, turn: int = 1
    ) -> None:
        pmem = followed.pool.pmem
        self._read = pmem.read
        self._place = place
        self._act = act
        self.left = turn
        pmem.read = self  # type: ignore[method-assign]  # it stands in for the real one

    def __call__(self, offset: int, length: int) -> bytes:
        if offset == self._place:
            self.left -= 1
            if self.left == 0:
                self._act()
        return self._read(offset, length)


def bytes_of(followed: Followed, ino: int) -> int:
    """Return where a file begins in the pool."""
    return followed.extents(ino)[0].start


def test_what_was_freed_and_reused_while_it_was_read_is_not_shown(
    fs: FileSystem, followed: Followed
) -> None:
    secret = make(fs, b"secret", b"mine" * 2048)
    followed.refresh()

    def replace() -> None:
        extent = fs.extents(secret)[0]
        fs.unlink(ROOT, b"secret")
        while fs.extents(make(fs, b"other%d" % fs.pool.next_oid, b"HIS!" * 2048))[0] != extent:
            pass

    Interruption(followed, bytes_of(followed, secret), replace)
    with pytest.raises(Stale, match="no inode"):
        followed.read(secret, 0, 8192)


def test_a_file_whose_bytes_have_moved_while_it_was_read_is_read_again(
    fs: FileSystem, followed: Followed
) -> None:
    ino = make(fs, b"file", b"mine" * 2048)
    followed.refresh()

    def move() -> None:
        old = fs.extents(ino)
        fs.allocate(ino, 0, 8192, level=PMD)
        other = make(fs, b"other", b"HIS!" * 2048)
        assert fs.extents(other) == old

    Interruption(followed, bytes_of(followed, ino), move)
    assert followed.read(ino, 0, 8192) == b"mine" * 2048


def test_bytes_that_left_a_file_and_came_back_while_it_was_read_are_read_again(
    fs: FileSystem, followed: Followed
) -> None:
    ino = make(fs, b"file", b"mine" * 2048)
    place = fs.extents(ino)
    followed.refresh()

    def away_and_back() -> None:
        fs.setattr(ino, size=0)
        other = make(fs, b"other", b"HIS!" * 2048)
        assert fs.extents(other) == place
        fs.unlink(ROOT, b"other")
        fs.setattr(ino, size=8192)
        fs.write(ino, 8000, b"!")
        fs.write(ino, 10, b"!")

    Interruption(followed, bytes_of(followed, ino), away_and_back)
    data = followed.read(ino, 0, 8192)
    assert set(data) <= set(b"\0!")


def test_a_part_that_was_cut_off_while_it_was_read_is_not_shown(
    fs: FileSystem, followed: Followed
) -> None:
    ino = make(fs, b"file", b"mine" * 2048)
    followed.refresh()
    second = fs.extents(ino)[0].start + 4096

    def cut() -> None:
        fs.setattr(ino, size=4096)
        while fs.extents(make(fs, b"%d" % fs.pool.next_oid, b"HIS!" * 1024))[0].start != second:
            pass

    Interruption(followed, bytes_of(followed, ino), cut)
    assert followed.read(ino, 0, 8192) == b"mine" * 1024


def test_what_was_committed_right_before_a_change_of_halves_is_not_missed(
    fs: FileSystem, followed: Followed
) -> None:
    def commit_and_change() -> None:
        make(fs, b"late")
        fs.pool.journal.compact()

    interruption = Interruption(
        followed, SUPERBLOCKS[0] + Superblock.epoch.offset, commit_and_change
    )
    followed.refresh()
    assert interruption.left <= 0
    assert followed.pool.objects == fs.pool.objects


def test_a_half_that_is_overwritten_while_it_is_read_is_given_up(
    fs: FileSystem, followed: Followed
) -> None:
    make(fs, b"first")
    followed.refresh()
    tail, place = fs.pool.journal.log.tail, fs.pool.journal.log.place

    def commit_and_change() -> None:
        make(fs, b"late")
        fs.pool.journal.compact()

    def overwrite() -> None:  # as the next checkpoint does
        fs.pool.pmem.zero(place.start, tail + 4096 - place.start)

    Interruption(followed, SUPERBLOCKS[0] + Superblock.epoch.offset, commit_and_change)
    # once before the change, when there is nothing, and once after it
    interruption = Interruption(followed, tail, overwrite, turn=2)
    followed.refresh()
    assert interruption.left <= 0
    assert followed.pool.objects == fs.pool.objects


def test_halves_that_moved_and_whose_room_is_a_files_now_are_given_up(
    fs: FileSystem, followed: Followed
) -> None:
    make(fs, b"first")
    followed.refresh()
    tail, place = fs.pool.journal.log.tail, fs.pool.journal.log.place
    make(fs, b"late")
    fs.pool.journal._grow(MIB)
    assert place not in fs.pool.journal.halves
    fs.pool.pmem.zero(tail, place.start + place.length - tail)  # as a file may
    followed.refresh()
    assert followed.pool.objects == fs.pool.objects
    assert sorted(followed.pool.space.runs()) == sorted(fs.pool.space.runs())


def test_a_file_that_has_grown_meanwhile_is_read_once(fs: FileSystem, followed: Followed) -> None:
    ino = make(fs, b"file", b"a" * 5000)
    followed.refresh()
    Interruption(followed, bytes_of(followed, ino), lambda: fs.write(ino, 5000, b"b" * 9000))
    assert followed.read(ino, 0, 20_000) == b"a" * 5000
    assert followed.read(ino, 0, 20_000) == b"a" * 5000 + b"b" * 9000


class Counting:
    """Counts the bytes that a follower reads."""

    def __init__(self, followed: Followed) -> None:
        pmem = followed.pool.pmem
        self._read = pmem.read
        self.bytes = 0
        pmem.read = self  # type: ignore[method-assign]  # it stands in for the real one

    def __call__(self, offset: int, length: int) -> bytes:
        self.bytes += length
        return self._read(offset, length)


def test_a_refresh_reads_what_was_appended_and_not_the_pool(tmp_path: Path) -> None:
    read = {}
    for count in (200, 3200):
        path = tmp_path / f"{count}"
        fs = make_fs(path, 64 * MIB, log=4 * MIB)
        for number in range(count):
            make(fs, b"%d" % number)
        followed = follow(path)
        followed.refresh()
        counting = Counting(followed)
        for number in range(20):
            make(fs, b"new%d" % number)
        followed.refresh()
        assert followed.lookup(ROOT, b"new19")
        read[count] = counting.bytes
    assert read[3200] < read[200] * 1.1


def test_a_compaction_is_followed_without_reading_all_objects_again(path: Path) -> None:
    fs = make_fs(path, 64 * MIB, log=4 * MIB)
    for number in range(3000):
        make(fs, b"%d" % number)
    followed = follow(path)
    followed.refresh()
    counting = Counting(followed)
    fs.pool.journal.compact()
    make(fs, b"new")
    followed.refresh()
    assert followed.lookup(ROOT, b"new")
    assert followed.pool.objects == fs.pool.objects
    assert counting.bytes < 20 * KIB < fs.pool.journal.live


@pytest.mark.parametrize("medium", [STORED, GROUPED], ids=lambda medium: medium.name)
def test_two_compactions_at_once_are_followed(path: Path, medium: Medium) -> None:
    fs = make_fs(path, 64 * MIB, medium)
    followed = follow(path, medium)
    for number in range(3):
        for _ in range(number):
            make(fs, b"%d" % fs.pool.next_oid, b"x" * 100)
            fs.pool.journal.compact()
        fs.pool.sync()
        followed.refresh()
        assert followed.pool.objects == fs.pool.objects


def test_a_repair_is_followed_though_it_writes_other_objects(path: Path, fs: FileSystem) -> None:
    make(fs, b"good")
    make(fs, b"bad")
    followed = follow(path)
    followed.refresh()
    fs.pool.pmem.close()

    pmem = open_pmem(path)
    found = scan(pmem)
    bad = followed._names[ROOT][b"bad"]
    objects = {oid: rec for oid, rec in found.objects.items() if oid != bad}
    rewrite(pmem, found, objects, found.next_oid)

    followed.refresh()
    assert followed.pool.objects == objects


def test_a_pool_that_has_grown_is_followed(fs: FileSystem, followed: Followed) -> None:
    fs.pool.resize(96 * MIB)
    content = random.Random(1).randbytes(1 * MIB) * 70
    ino = make(fs, b"large", content)
    followed.refresh()
    assert followed.read(ino, 0, len(content)) == content
    assert followed.statfs() == fs.statfs()


def test_a_batch_that_a_killed_writer_has_torn_is_not_seen(path: Path, fs: FileSystem) -> None:
    make(fs, b"before")
    followed = follow(path)
    log = fs.pool.journal.log
    at = log.append([b"\x01" * 64], 99)
    fs.pool.pmem.store(at + BATCH.size + 8, b"\x02")
    followed.refresh()
    fs = killed_fs(fs)
    make(fs, b"after")
    followed.refresh()
    assert {name for _, name, _ in followed.entries(ROOT)} == {b"before", b"after"}


def test_damage_in_the_log_is_told_and_shows_nothing(fs: FileSystem, followed: Followed) -> None:
    ino = make(fs, b"file", b"content")
    followed.refresh()
    at = fs.pool.journal.log.tail
    make(fs, b"one")
    make(fs, b"two")
    fs.pool.pmem.store(at + BATCH.size + 20, b"\xff")
    with pytest.raises(PoolDamaged, match="is damaged"):
        followed.refresh()
    with pytest.raises(PoolDamaged, match="is damaged"):
        followed.read(ino, 0, 7)


def test_a_half_that_lost_what_was_durable_is_damage(fs: FileSystem, followed: Followed) -> None:
    make(fs, b"file", b"content")
    followed.refresh()
    fs.pool.journal.close()
    followed.refresh()
    place = fs.pool.journal.log.place
    fs.pool.pmem.zero(place.start, place.length)
    with pytest.raises(PoolDamaged, match="is damaged"):
        followed.refresh()


def test_what_a_host_has_lost_with_its_power_is_forgotten(
    path: Path, fs: FileSystem, followed: Followed
) -> None:
    make(fs, b"kept")
    tail, sequence = fs.pool.journal.log.tail, fs.pool.journal.log.sequence
    make(fs, b"lost")
    followed.refresh()
    fs.pool.pmem.zero(tail, fs.pool.journal.log.tail - tail)  # never left the CPU's caches
    fs = killed_fs(fs)
    assert fs.pool.journal.log.sequence == sequence
    followed.refresh()
    make(fs, b"new")
    followed.refresh()
    assert {name for _, name, _ in followed.entries(ROOT)} == {b"kept", b"new"}


def test_another_pool_in_the_same_file_is_stale(
    path: Path, fs: FileSystem, followed: Followed
) -> None:
    fs.close()
    whole = path.read_bytes()
    path.write_bytes(bytes(len(whole)))  # half made
    with pytest.raises(NotAPool):
        followed.refresh()
    Pool.create(path, 32 * MIB, replace=True).close()
    with pytest.raises(Stale, match="another pool was made"):
        followed.refresh()


def test_a_file_that_was_deleted_is_stale(fs: FileSystem, followed: Followed) -> None:
    ino = make(fs, b"file", b"content")
    followed.refresh()
    fs.unlink(ROOT, b"file")
    with pytest.raises(Stale):
        followed.read(ino, 0, 7)
    with pytest.raises(Stale):
        followed.get(ino)


def test_a_hole_of_the_pool_is_not_filled_by_reading(fs: FileSystem, followed: Followed) -> None:
    ino = make(fs, b"file", b"x" * 4 * MIB)
    followed.refresh()
    extent = followed.extents(ino)[0]
    fs.pool.pmem.punch(extent.start, 2 * MIB)  # as when it was freed and trimmed
    before = path_blocks(followed)
    assert followed._copy(ino, 0, 2 * MIB) == bytes(2 * MIB)
    assert path_blocks(followed) == before


def path_blocks(followed: Followed) -> int:
    return followed.pool.path.stat().st_blocks


def test_changes_are_told_once_and_only_of_files_that_are_there(
    fs: FileSystem, followed: Followed
) -> None:
    first, second = make(fs, b"first", b"1"), make(fs, b"second", b"2")
    followed.refresh()
    followed.take_changed()
    fs.write(first, 0, b"3")
    fs.unlink(ROOT, b"second")
    followed.refresh()
    changed = followed.take_changed()
    assert first in changed
    assert second not in changed
    assert not followed.take_changed()


async def test_a_request_to_a_followed_mount_is_counted_once_and_by_its_name(
    fs: FileSystem, followed: Followed
) -> None:
    async def nothing(*_: object) -> None:
        pass

    tallies = Tallies()
    mount = FollowingOperations(followed, sync=nothing, seal=nothing, tallies=tallies)
    ino = make(fs, b"file")
    entry = await mount.lookup(ROOT, b"file", RequestContext())
    assert entry.st_ino == ino
    await mount.statfs(RequestContext())
    fs.unlink(ROOT, b"file")
    with pytest.raises(FUSEError):
        await mount.getattr(ino, RequestContext())
    counted = {name: (tally.count, tally.errors) for name, tally in tallies.items() if tally.count}
    assert counted == {"lookup": (1, 0), "statfs": (1, 0), "getattr": (1, 1)}


def test_a_damaged_pool_is_not_followed(path: Path, fs: FileSystem) -> None:
    at = fs.pool.journal.log.tail
    make(fs, b"one")
    make(fs, b"two")
    fs.pool.pmem.store(at + BATCH.size + 20, b"\xff")
    with pytest.raises(PoolDamaged, match="can't be followed"):
        follow(path)
