import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from ctypes import c_uint16, c_uint32, c_uint64
from pathlib import Path
from typing import Any, ClassVar

import pytest

from vfsmap.errors import (
    Exists,
    Invalid,
    NoMemory,
    NoSpace,
    NotAPool,
    NotFound,
    PoolDamaged,
    PoolInUse,
    ReadOnly,
    Unsupported,
)
from vfsmap.pmem import Medium, Promise
from vfsmap.pool import Oid, Pool, Structure, superblock
from vfsmap.pool.layout import BLOCK, FIRST_FREE, SUPERBLOCKS, Superblock
from vfsmap.pool.superblock import SIZE
from vfsmap.testing import media
from vfsmap.testing.pools import FLUSHED, GROUPED, STORED, killed, make_pool, scratch
from vfsmap.units import MIB, PMD, PTE, PUD, Level

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
MEDIA = pytest.mark.parametrize("medium", [STORED, FLUSHED, GROUPED], ids=lambda m: m.commit.value)


class Counter(Structure):
    _fields_: ClassVar = [("value", c_uint64), ("turns", c_uint32)]


class Pair(Structure):
    _fields_: ClassVar = [("left", Counter), ("right", Counter * 2)]


@pytest.fixture
def directory() -> Iterator[Path]:
    with scratch() as path:
        yield path


@pytest.fixture
def pool(directory: Path) -> Iterator[Pool]:
    with Pool.create(directory / "pool", "16M", label="test") as made:
        yield made


# facts, and opening


def test_a_new_pool_is_empty_and_knows_itself(pool: Pool) -> None:
    assert (pool.size, pool.label, pool.level) == (16 * MIB, "test", PMD)
    assert (dict(pool.objects), pool.root, pool.failed) == ({}, None, None)
    assert pool.writable
    assert pool.promise is Promise.PROCESS
    assert not pool.grouped
    assert isinstance(pool.uuid, uuid.UUID)


def test_a_pool_is_found_again_with_its_facts(directory: Path) -> None:
    path = directory / "pool"
    with Pool.create(path, "16M", label="größer", level=PUD) as pool:
        facts = pool.uuid, pool.label, pool.level, pool.size
    with Pool.open(path) as pool:
        assert (pool.uuid, pool.label, pool.level, pool.size) == facts


def test_the_flags_say_how_a_pool_is_opened(directory: Path) -> None:
    path = directory / "pool"
    with pytest.raises(NotFound):
        Pool.open(path, "r")
    with pytest.raises(NotFound):
        Pool.open(path, "w")
    with pytest.raises(Invalid, match="creating a pool needs a size"):
        Pool.open(path, "c")
    with Pool.open(path, "c", size="8M") as pool:
        first = pool.uuid
    with Pool.open(path, "c", size="8M") as pool:
        assert pool.uuid == first
    with pytest.raises(Exists):
        Pool.open(path, "x", size="8M")
    with Pool.open(path, "r") as pool:
        assert not pool.writable
    with pytest.raises(Invalid, match="flags 'rw': one of r, w, c and x"):
        Pool.open(path, "rw")


@pytest.mark.parametrize(
    ("size", "label", "message"),
    [
        ("3M", "", "at least 4M, not 3M"),
        ("8X", "", "'8X' is not a size"),
        (-1, "", "can't be negative"),
        ("8M", "x" * 64, "longer than 63 bytes"),
        (8 * MIB + 1, "", "not a multiple of the medium's page size"),
    ],
)
def test_a_pool_that_can_not_be_is_refused_and_nothing_is_left(
    directory: Path, size: int | str, label: str, message: str
) -> None:
    with pytest.raises(Invalid, match=message):
        Pool.create(directory / "pool", size, label=label)
    assert not list(directory.iterdir())


@needs_root
def test_a_pool_without_room_below_leaves_no_file() -> None:
    with media.tmpfs("never", "64K") as below:
        with pytest.raises(NoSpace, match="No space left on device"):
            Pool.create(below / "pool", "64M")
        assert not list(below.iterdir())


def test_a_promise_that_the_medium_can_not_keep_is_refused(directory: Path) -> None:
    path = directory / "pool"
    with pytest.raises(Unsupported, match="survives the death of processes but not power loss"):
        Pool.create(path, "8M", promise="power")
    assert not path.exists()
    Pool.create(path, "8M", promise=Promise.PROCESS).close()
    with pytest.raises(Unsupported):
        Pool.open(path, promise=Promise.POWER)
    with pytest.raises(Invalid, match="promise 'ever': process or power"):
        Pool.open(path, promise="ever")


@pytest.mark.parametrize("content", [b"x", b"x" * 100_000, bytes(8 * MIB)], ids=len)
def test_a_file_that_is_no_pool_is_refused_and_stays(directory: Path, content: bytes) -> None:
    path = directory / "file"
    path.write_bytes(content)
    for flags in "rw":
        with pytest.raises(NotAPool, match="file: not a vfsmap pool; make one with: vfsmap format"):
            Pool.open(path, flags)
    assert path.read_bytes() == content


def test_a_truncated_pool_is_refused_with_both_lengths(directory: Path) -> None:
    path = directory / "pool"
    Pool.create(path, "8M").close()
    os.truncate(path, 5 * MIB)
    with pytest.raises(PoolDamaged, match="the pool is 8388608 bytes long, its file only 5242880"):
        Pool.open(path)
    assert path.stat().st_size == 5 * MIB


def test_a_second_writer_is_told_who_the_first_one_is(directory: Path) -> None:
    path = directory / "pool"
    Pool.create(path, "8M").close()
    program = "import sys; from vfsmap.pool import Pool; pool = Pool.open(sys.argv[1]);"
    program += "print('open', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", program, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdin is not None
        holder.stdout.readline()
        with pytest.raises(PoolInUse, match=f"by process {holder.pid};"):
            Pool.open(path)
        with pytest.raises(PoolInUse):
            Pool.create(path, "8M", replace=True)
        with Pool.open(path, "r"):
            pass
        holder.stdin.close()
    Pool.open(path).close()


# superblocks


def changed(path: Path, copies: tuple[int, ...], **fields: int) -> None:
    """Change fields of some copies of the superblock, checksum and all."""
    with path.open("r+b") as file:
        for at in (SUPERBLOCKS[copy] for copy in copies):
            file.seek(at)
            sb = Superblock.from_buffer_copy(file.read(SIZE))
            for name, value in fields.items():
                setattr(sb, name, value)
            file.seek(at)
            file.write(superblock.encode(sb))


@pytest.mark.parametrize("copy", [0, 1])
def test_either_copy_of_the_superblock_will_do(directory: Path, copy: int) -> None:
    path = directory / "pool"
    with Pool.create(path, "8M") as pool:
        facts = pool.uuid
    with path.open("r+b") as file:
        file.seek(SUPERBLOCKS[copy] + 40)
        file.write(b"damage")
    with Pool.open(path, "r") as pool:
        assert pool.uuid == facts
        assert pool.complaints == [f"superblock at {SUPERBLOCKS[copy]:#x}: wrong checksum"]
    with Pool.open(path) as pool:
        assert pool.complaints
    with Pool.open(path) as pool:
        assert pool.complaints == [], "the writer before us should have mended it"
    with path.open("r+b") as file:
        file.seek(SUPERBLOCKS[1 - copy] + 40)
        file.write(b"damage")
    with Pool.open(path) as pool:
        assert pool.uuid == facts


def test_every_byte_of_a_superblock_is_summed(directory: Path) -> None:
    path = directory / "pool"
    Pool.create(path, "8M").close()
    with path.open("rb") as file:
        good = file.read(SIZE)
    assert superblock.problem(good, 8 * MIB) == ""
    for at in range(SIZE - 4):
        bad = bytearray(good)
        bad[at] ^= 0x40
        assert superblock.problem(bytes(bad), 8 * MIB)


def test_without_a_superblock_there_is_nothing_to_go_by(directory: Path) -> None:
    path = directory / "pool"
    Pool.create(path, "8M").close()
    with path.open("r+b") as file:
        for at in SUPERBLOCKS:
            file.seek(at + 40)
            file.write(b"damage")
    with pytest.raises(PoolDamaged, match="no usable superblock: wrong checksum"):
        Pool.open(path)


@pytest.mark.parametrize("copies", [(0, 1), (0,), (1,)])
@pytest.mark.parametrize("fields", [{"version": 2}, {"features": 1}], ids=["version", "features"])
def test_a_newer_format_is_refused_even_if_one_copy_is_not(
    directory: Path, copies: tuple[int, ...], fields: dict[str, int]
) -> None:
    path = directory / "pool"
    Pool.create(path, "8M").close()
    changed(path, copies, **fields)
    before = path.read_bytes()
    for flags in "rw":
        with pytest.raises(NotAPool, match="made by a newer vfsmap; use that one"):
            Pool.open(path, flags)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": 16 * MIB}, "its file only"),
        ({"size": 8 * MIB - 1}, "not a multiple of 4096"),
        ({"active": 2}, "the log lies outside the pool"),
    ],
)
def test_a_superblock_that_makes_no_sense_is_damage(
    directory: Path, fields: dict[str, int], message: str
) -> None:
    path = directory / "pool"
    Pool.create(path, "8M").close()
    changed(path, (0, 1), **fields)
    with pytest.raises(PoolDamaged, match=message):
        Pool.open(path)


def test_a_log_that_lies_outside_the_pool_is_damage(directory: Path) -> None:
    path = directory / "pool"
    with Pool.create(path, "8M") as pool:
        sb = pool.journal.superblock
    for start, length in ((0, MIB), (FIRST_FREE + 1, MIB), (8 * MIB, BLOCK), (MIB, 8 * MIB)):
        sb.halves[1].start, sb.halves[1].length = start, length
        raw = superblock.encode(sb)
        assert superblock.problem(raw, 8 * MIB) == "the log lies outside the pool"


# damage in the log


def test_a_torn_tail_is_a_transaction_that_never_was(directory: Path) -> None:
    path = directory / "pool"
    pool = make_pool(path, 8 * MIB)
    with pool.transaction() as tx:
        first = tx.new(Counter(value=1))
    tail = pool.journal.log.tail
    with pool.transaction() as tx:
        tx.new(Counter(value=2))
    end = pool.journal.log.tail
    whole = bytes(pool.pmem.view[tail:end])
    for torn in range(0, len(whole.rstrip(b"\0")), 8):
        pool.pmem.store(tail, whole[:torn] + bytes(end - tail - torn))
        pool = killed(pool)
        assert list(pool.objects) == [first]
        assert pool.writable
    with pool.transaction() as tx:
        again = tx.new(Counter(value=3))
    with killed(pool) as pool:
        assert set(pool.objects) == {first, again}


def test_damage_in_the_middle_of_the_log_opens_read_only_and_says_where(directory: Path) -> None:
    pool = make_pool(directory / "pool", 8 * MIB)
    ends = []
    for value in range(5):
        with pool.transaction() as tx:
            tx.new(Counter(value=value))
        ends.append(pool.journal.log.tail)
    pool.pmem.store(ends[2] - 4, b"\xff")
    pool = killed(pool)
    assert len(pool.objects) == 2
    assert not pool.writable
    message = f"log batch 3 at {ends[1]:#x} is damaged, yet a newer one at {ends[2]:#x} is whole"
    assert message in str(pool.failed)
    with pytest.raises(ReadOnly, match="turned read-only: log batch 3"), pool.transaction() as tx:
        tx.new(Counter(value=9))
    pool.close()


def test_extents_that_overlap_open_read_only(directory: Path) -> None:
    pool = make_pool(directory / "pool", 8 * MIB)
    with pool.transaction() as tx:
        arena = tx.allocate("1M")
    rec = pool.objects[arena]
    with pool.transaction() as tx:
        tx.put(tx.new_oid(), 2, rec[16:])
    with killed(pool) as again:
        assert not again.writable
        assert "belong to two extents" in str(again.failed)


def test_a_record_that_is_too_short_opens_read_only(directory: Path) -> None:
    pool = make_pool(directory / "pool", 8 * MIB)
    with pool.transaction() as tx:
        tx.put(tx.new_oid(), 2, b"short")
    with killed(pool) as again:
        assert "too short" in str(again.failed)


# typed objects


@MEDIA
def test_objects_are_found_again_as_they_were_stored(directory: Path, medium: Medium) -> None:
    pool = make_pool(directory / "pool", 8 * MIB, medium)
    with pool.transaction() as tx:
        counter = tx.new(Counter(value=1, turns=2))
        pair = tx.new(Pair(Counter(3, 4), (Counter * 2)(Counter(5, 6), Counter(7, 8))))
        tx.root = pair
    with pool.transaction() as tx:
        tx.set(counter, Counter(value=9))
    pool.sync()
    with killed(pool) as again:
        assert again.root == pair
        found = again.get(counter, Counter)
        assert (found.value, found.turns) == (9, 0)
        both = again.get(pair, Pair)
        assert (both.left.turns, both.right[1].value) == (4, 7)


def test_an_object_is_not_misread_as_one_of_another_type(pool: Pool) -> None:
    with pool.transaction() as tx:
        oid = tx.new(Counter(value=1))

    class Renamed(Structure):
        _fields_: ClassVar = Counter._fields_

    def counter(*fields: tuple[object, ...]) -> type[Any]:
        return type("Counter", (Structure,), {"_pack_": 1, "_fields_": list(fields)})

    others: list[type[Structure]] = [
        Renamed,
        Pair,
        counter(("value", c_uint64)),
        counter(("value", c_uint64), ("turns", c_uint16)),
        counter(("value", c_uint64), ("turns", c_uint32, 5)),
        counter(("worth", c_uint64), ("turns", c_uint32)),
        counter(("turns", c_uint32), ("value", c_uint64)),
    ]
    for kind in others:
        with pytest.raises(Invalid, match=f"not a {kind.__name__} of this layout"):
            pool.get(oid, kind)
    same = counter(("value", c_uint64), ("turns", c_uint32))
    assert pool.get(oid, same).value == 1


def test_a_change_deep_inside_a_type_changes_its_layout(pool: Pool) -> None:
    def outer(first: str) -> type[Any]:
        fields = [(first, c_uint32), ("b", c_uint32)]
        inner: type[Any] = type("Inner", (Structure,), {"_fields_": fields})
        base = type("Base", (Structure,), {"_fields_": [("row", inner * 3)]})
        return type("Outer", (base,), {"_fields_": [("z", c_uint32)]})

    with pool.transaction() as tx:
        oid = tx.new(outer("a")())
    pool.get(oid, outer("a"))
    with pytest.raises(Invalid):
        pool.get(oid, outer("c"))


def test_what_does_not_exist_can_not_be_read_replaced_or_deleted(pool: Pool) -> None:
    with pool.transaction() as tx:
        oid = tx.new(Counter())
        arena = tx.allocate(4096)
    with pool.transaction() as tx:
        tx.delete(oid)
        with pytest.raises(NotFound):
            tx.delete(oid)
        with pytest.raises(NotFound):
            tx.set(oid, Counter())
        with pytest.raises(NotFound, match="there is no object 99"):
            tx.delete(Oid(99))
        with pytest.raises(Invalid, match="is not a typed object"):
            tx.set(arena, Counter())
        fresh = tx.new(Counter(value=1))
        tx.set(fresh, Counter(value=2))
        with pytest.raises(Invalid, match="made in this transaction"):
            tx.delete(fresh)
    for missing in (oid, Oid(99)):
        with pytest.raises(NotFound, match=f"there is no object {missing}"):
            pool.get(missing, Counter)
        with pytest.raises(NotFound, match=f"there is no arena {missing}"):
            pool.view(missing)
    with pytest.raises(NotFound, match=f"there is no arena {fresh}"):
        pool.arena(fresh)
    with pytest.raises(Invalid):
        pool.get(arena, Counter)
    assert pool.get(fresh, Counter).value == 2


def test_a_number_is_never_used_twice(directory: Path) -> None:
    pool = make_pool(directory / "pool", 8 * MIB)
    seen: set[int] = set()
    for _ in range(5):
        with pool.transaction() as tx:
            oid = tx.new(Counter())
        assert oid not in seen
        seen.add(oid)
        with pool.transaction() as tx:
            tx.delete(oid)
        pool.journal._finish_checkpoint()
        pool = killed(pool)
    pool.close()


def test_a_root_that_was_deleted_is_none(pool: Pool) -> None:
    with pool.transaction() as tx:
        oid = tx.new(Counter())
        tx.root = oid
    assert pool.root == oid
    with pool.transaction() as tx:
        tx.delete(oid)
    assert pool.root is None


# transactions


class Stop(Exception):
    pass


@MEDIA
def test_an_exception_undoes_the_whole_transaction(directory: Path, medium: Medium) -> None:
    pool = make_pool(directory / "pool", 8 * MIB, medium)
    with pool.transaction() as tx:
        kept = tx.new(Counter(value=1))
        arena = tx.allocate("64K")
        tx.root = kept
    pool.sync()
    before = dict(pool.objects)
    free = pool.space.free_bytes
    # the block is the transaction
    with pytest.raises(Stop), pool.transaction() as tx:  # noqa: PT012
        tx.set(kept, Counter(value=2))
        tx.root = tx.new(Counter(value=3))
        tx.allocate("1M")
        tx.delete(arena)
        raise Stop
    assert (pool.objects, pool.space.free_bytes) == (before, free)
    pool.sync()
    with killed(pool) as again:
        assert (again.objects, again.space.free_bytes) == (before, free)


def test_a_transaction_without_room_leaves_everything_as_it_was(pool: Pool) -> None:
    with pool.transaction() as tx:
        tx.allocate("12M")
    before = dict(pool.objects)
    free = pool.space.free_bytes
    # the block is the transaction
    with pytest.raises(NoSpace, match="no free run of 12M"), pool.transaction() as tx:  # noqa: PT012
        tx.new(Counter())
        tx.allocate("64K")
        tx.allocate("12M")
    assert (pool.objects, pool.space.free_bytes) == (before, free)


def test_a_pool_that_was_opened_to_read_takes_no_transaction(directory: Path) -> None:
    path = directory / "pool"
    with Pool.create(path, "8M") as pool, pool.transaction() as tx:
        oid = tx.new(Counter(value=5))
    with Pool.open(path, "r") as pool:
        assert pool.get(oid, Counter).value == 5
        with pytest.raises(ReadOnly, match="opened read-only"), pool.transaction() as tx:
            tx.delete(oid)
        with pytest.raises(ReadOnly):
            pool.resize("16M")


# arenas


@MEDIA
@pytest.mark.parametrize("level", [PTE, PMD], ids=str)
def test_an_arena_is_aligned_and_zeroed_whoever_had_the_bytes(
    directory: Path, medium: Medium, level: Level
) -> None:
    pool = make_pool(directory / "pool", 64 * MIB, medium)
    for turn in range(6):
        with pool.transaction() as tx:
            arena = tx.allocate(5 * MIB, level=level)
        extent = pool.arena(arena)
        assert (extent.start % level.size, extent.length % level.size) == (0, 0)
        with pool.view(arena) as view:
            assert len(view) == extent.length >= 5 * MIB
            assert bytes(view) == bytes(len(view)), f"old bytes in turn {turn}"
            view[:] = b"x" * len(view)
        pool.persist(arena)
        if turn % 2:
            with pool.transaction() as tx:
                tx.delete(arena)
            pool.sync()
    pool.close()


def test_the_bytes_of_an_arena_are_kept(directory: Path) -> None:
    pool = make_pool(directory / "pool", 8 * MIB)
    with pool.transaction() as tx:
        arena = tx.allocate("64K")
    pool.view(arena)[100:105] = b"hello"
    pool.persist(arena, 100, 5)
    pool = killed(pool)
    assert bytes(pool.view(arena)[98:107]) == b"\0\0hello\0\0"
    pool.close()


def test_a_view_of_a_pool_that_was_opened_to_read_is_read_only(directory: Path) -> None:
    path = directory / "pool"
    with Pool.create(path, "8M") as pool, pool.transaction() as tx:
        arena = tx.allocate("64K")
    with Pool.open(path, "r") as pool:
        view = pool.view(arena)
        assert view.readonly
        view.release()


def test_a_pool_with_a_view_in_use_stays_open(directory: Path) -> None:
    pool = Pool.create(directory / "pool", "8M")
    with pool.transaction() as tx:
        arena = tx.allocate("64K")
    view = pool.view(arena)
    with pytest.raises(BufferError):
        pool.close()
    with pytest.raises(BufferError):
        pool.resize("16M")
    view[0] = 7
    with pool.transaction() as tx:
        tx.new(Counter())
    view.release()
    pool.resize("16M")
    assert pool.view(arena)[0] == 7
    pool.close()


def test_an_arena_needs_a_size(pool: Pool) -> None:
    for size in (0, "0", "nonsense"):
        with pytest.raises(Invalid), pool.transaction() as tx:
            tx.allocate(size)


@contextmanager
def gigantic(pages: int) -> Iterator[Path]:
    """A hugetlbfs of 1 GiB pages; a machine that has been up for long may have none to give."""
    with ExitStack() as stack:
        try:
            place = stack.enter_context(media.hugetlbfs("1G", pages))
        except NoMemory as exc:
            pytest.skip(f"memory lies in pieces: {exc}")
        yield place


@needs_root
@pytest.mark.parametrize(("page", "pages", "level"), [("2M", 16, PMD), ("1G", 2, PUD)])
def test_a_pool_lives_on_huge_pages(page: str, pages: int, level: Level) -> None:
    size = level.size * pages
    with media.hugetlbfs(page, pages) if page == "2M" else gigantic(pages) as below:
        path = below / "pool"
        pool = Pool.create(path, size, level=level)
        assert pool.pmem.medium.page_size == level.size
        with pool.transaction() as tx:
            small, large = tx.allocate("64K"), tx.allocate(level.size, level=level)
        pool.view(small)[:5] = b"small"
        pool.view(large)[-5:] = b"large"
        with pytest.raises(NoSpace), pool.transaction() as tx:
            tx.allocate(size, level=level)
        pool = killed(pool)
        assert bytes(pool.view(small)[:5]) == b"small"
        assert bytes(pool.view(large)[-5:]) == b"large"
        before = path.stat().st_blocks * 512
        with pool.transaction() as tx:
            tx.delete(large)
        while pool.space.trim():
            pass
        assert before - path.stat().st_blocks * 512 == level.size
        pool.close()


# resizing


@MEDIA
def test_a_pool_grows_and_keeps_what_it_has(directory: Path, medium: Medium) -> None:
    pool = make_pool(directory / "pool", 8 * MIB, medium)
    with pool.transaction() as tx:
        arena = tx.allocate("4M")
    pool.view(arena)[0] = 7
    free = pool.space.free_bytes
    pool.resize("64M")
    assert (pool.size, pool.space.free_bytes) == (64 * MIB, free + 56 * MIB)
    with pool.transaction() as tx:
        large = tx.allocate("32M", level=PMD)
    pool.sync()
    with killed(pool) as again:
        assert again.size == 64 * MIB
        assert again.view(arena)[0] == 7
        assert again.arena(large).length == 32 * MIB


@pytest.mark.parametrize("size", ["16M", "8M", 0, 16 * MIB + 1, "x"])
def test_a_pool_can_neither_shrink_nor_get_an_odd_size(pool: Pool, size: int | str) -> None:
    with pytest.raises(Invalid):
        pool.resize(size)
    assert pool.size == 16 * MIB


def test_a_pool_that_can_not_grow_stays_as_it_is(pool: Pool) -> None:
    for size in (1 << 62, 1 << 70):
        with pytest.raises(NoSpace):
            pool.resize(size)
    with pool.transaction() as tx:
        tx.new(Counter())
    assert pool.size == 16 * MIB
    assert pool.path.stat().st_size == 16 * MIB


# a real disk


@needs_root
def test_a_pool_on_a_disk_commits_in_groups_and_keeps_its_word() -> None:
    with media.ext4_loop("64M") as below:
        path = below / "pool"
        pool = Pool.create(path, "32M", promise="power")
        assert pool.grouped
        with pool.transaction() as tx:
            oid = tx.new(Counter(value=1))
            arena = tx.allocate("2M", level=PMD)
        pool.view(arena)[:3] = b"abc"
        pool.sync()
        with pool.transaction() as tx:
            tx.set(oid, Counter(value=2))
        pool = killed(pool)
        assert pool.get(oid, Counter).value == 1
        assert bytes(pool.view(arena)[:3]) == b"abc"
        pool.close()
