"""A harness that never fails proves nothing: it fails for every step of the commit path left out.

The steps are found in the code, so that a new one has to be put into the table as well.
"""

from collections.abc import Callable
from functools import partial
from typing import Final

import pytest

from vfsmap.errors import VfsmapError
from vfsmap.fs import FileSystem, data, names, placing, repair, seals, state
from vfsmap.fs.filesystem import FileSystem as Files
from vfsmap.pmem import pmem
from vfsmap.pool import Pool, journal, log, pool, rewrite, space, superblock
from vfsmap.testing.cuts import crashes
from vfsmap.testing.hunt import Hunter, Tally
from vfsmap.testing.making import making_lost
from vfsmap.testing.mending import mending_lost
from vfsmap.testing.mutation import Mutant, applied, replaced, without_steps
from vfsmap.testing.oracle import snapshot
from vfsmap.testing.pools import FLUSHED, make_fs, scratch
from vfsmap.testing.recording import MEDIA, Memory, RecordingPmem
from vfsmap.testing.workload import POOL_SIZE, base, parse
from vfsmap.units import MIB

Killer = str | Callable[[], list[str]]

COMMIT_PATH: Final = (
    pmem.Pmem,
    superblock,
    journal.Journal,
    journal.Commit,
    pool.Pool,
    pool,
    rewrite,
    space.Space,
    data.Data,
    placing.Placing,
    seals.Seals,
    Files,
    repair,
)


def hunted(*workloads: str) -> list[str]:
    """Return the first failure that a hunt through some workloads finds."""
    tally = Tally()
    for name in workloads:
        workload = parse(name)
        hunter = Hunter(workload.medium, tally, second=4, every=1, most_failures=1)
        hunter.run(workload)
    return list(map(str, tally.failures))


def stale_tail(grow: Callable[[FileSystem, int], object]) -> list[str]:
    """Return what of a file that was cut comes back when it grows."""
    with scratch() as home:
        fs = make_fs(home / "pool", 8 * MIB, FLUSHED)
        ino = fs.create(1, b"file", 0o600, 0, 0).ino
        fs.write(ino, 0, b"secret" * 20)
        fs.setattr(ino, size=50)
        grow(fs, ino)
        found = bytes(fs.read(ino, 50, 70))
        window = fs.pool.pmem.view[fs.extents(ino)[0].start + 50 :][:70]
        shown = bytes(window)
        window.release()
        fs.close()
    return [] if not any(found) and not any(shown) else [f"it reads {found!r}, shows {shown!r}"]


def closed() -> list[str]:
    """Return the crashes behind the closing of a pool that lose what was done before."""
    content = base("sync")[0]
    medium = RecordingPmem(Memory(content), POOL_SIZE, MEDIA["sync"])
    fs = FileSystem(Pool(medium))
    fs.create(1, b"new", 0o600, 0, 0)
    fs.close()
    medium.note("closed")
    wrong = []
    for left in crashes(medium.events, content, POOL_SIZE, MEDIA["sync"]):
        found = snapshot(FileSystem(Pool(RecordingPmem(left.memory, left.size, medium.medium))))
        if "closed" in left.marks and (1, b"new") not in found.names:
            wrong.append(left.name)
    return wrong


making = partial(making_lost, "flush")
making_by_sync = partial(making_lost, "sync")
mending = partial(mending_lost, "flush", range(5, 60, 6))
mending_by_sync = partial(mending_lost, "sync", range(1))

KILLERS: Final[dict[str, Killer]] = {
    "Pmem.flush: no self._flusher.pmem_flush(self._address + offset, length)": "flush/create",
    "Pmem.flush: no self._msync(offset, length)": "msync/create",
    "Pmem.fence: no self._fdatasync()": "flush/align-sparse,write-in-hole",
    "Pmem.fence: no self._flusher.pmem_drain()": "flush/create",
    "Pmem.persist: no self._msync(offset, length)": "sync/create",
    "Pmem.persist: no self.flush(offset, length)": "flush/create",
    "Pmem.persist: no self.fence()": "flush/create",
    "Pmem.sync: no self._fdatasync()": "sync/append-block",
    "Pmem.resize: no self._fdatasync()": "flush/resize",
    "superblock.write: no pmem.persist(at, len(raw))": "flush/compact,create",
    "Journal._store: no self.pmem.fence()": "flush/append-block",
    "Journal._store: no self.pmem.persist(at, self.log.tail - at)": "flush/create",
    "Journal._switch: no self.pmem.persist(half.place.start, half.tail - half.place.start)": (
        "flush/compact"
    ),
    "Journal.write_switched: no superblock.write(self.pmem, sb)": "flush/compact,create",
    "Commit._write: no journal.pmem.sync()": "sync/append-block",
    "Commit._write: no journal.pmem.persist(at, self._log.tail - at)": "sync/create",
    "Pool.__init__: no pmem.persist(SUPERBLOCKS[0], 2 * BLOCK)": "flush/compact",
    "Pool.__init__: no pmem.persist(log.place.start, log.tail - log.place.start)": "flush/create",
    "Pool.__init__: no superblock.write(pmem, self.journal.superblock)": "flush/compact",
    "Pool.persist: no self.pmem.persist(extent.start + offset, length)": "flush/arena,arena-write",
    "Pool.sync: no self.journal.sync()": "sync/create",
    "Pool.resize: no self.sync()": "sync-tiny/checkpoint,create,begin,run,resize",
    "Pool.resize: no superblock.write(self.pmem, sb)": "store/resize,fill",
    "Pool.close: no self.sync()": closed,
    "pool.format_pmem: no pmem.zero(SUPERBLOCKS[0], 2 * BLOCK)": making,
    "pool.format_pmem: no pmem.persist(SUPERBLOCKS[0], 2 * BLOCK)": making,
    "pool.format_pmem: no pmem.persist(at, first.tail - at)": making_by_sync,
    "pool.format_pmem: no superblock.write(pmem, sb)": making,
    "rewrite.rewrite: no pmem.persist(at, len(raw))": mending,
    "Space.take: no self.clear(start, got)": "flush/create-aligned,write-new-aligned",
    "Space.clear: no self._pmem.zero(a, b - a)": "flush/arena",
    "Space.clear: no self._pmem.flush(a, b - a)": "flush/arena",
    "Data.write: no self._zero(map_, inode.size, offset)": (
        partial(stale_tail, lambda fs, ino: fs.write(ino, 200, b"more"))
    ),
    "Data.truncate: no self._zero(map_, inode.size, size)": (
        partial(stale_tail, lambda fs, ino: fs.setattr(ino, size=200))
    ),
    "Data.allocate: no self._zero(map_, inode.size, end)": (
        partial(stale_tail, lambda fs, ino: fs.allocate(ino, 0, 200))
    ),
    "Data.zero_tail: no self._zero(self.map_of(ino), self.file(ino).size, MAX_SIZE)": (
        partial(stale_tail, lambda fs, ino: fs.zero_tail(ino))
    ),
    "Data.zero_tail: no self.pool.sync()": "sync/cut,zero-tail",
    "Data._store: no pmem.flush(start, len(data))": "flush/overwrite",
    "Data._store: no pmem.flush(extent.start, extent.length)": "flush/write-in-hole,write-across",
    "Data._zero: no self.pool.pmem.zero(extent.start, extent.length)": (
        partial(stale_tail, lambda fs, ino: fs.zero_tail(ino))
    ),
    "Data._zero: no self.pool.pmem.flush(extent.start, extent.length)": "flush/cut-in-block,grow",
    "Placing.place_unit: no pmem.flush(target, extent.length)": "flush/allocate-unit",
    "Placing._place_blocks: no self._clear(start, min(offset, at + got) - at)": (
        "flush/write-in-hole"
    ),
    "Placing._place_blocks: no self._clear(start + first - at, at + got - first)": (
        "flush/write-in-hole"
    ),
    "Placing._clear: no self.pool.space.clear(start, length)": "flush/align-small,allocate-large",
    "Placing._clear: no self.pool.pmem.zero(start, length)": "flush/write-in-hole",
    "Placing._clear: no self.pool.pmem.flush(start, length)": "flush/write-in-hole",
    "Seals._store_tree: no self.pool.pmem.flush(start, got)": "flush/seal",
    "repair.repair: no pool.sync()": mending_by_sync,
}

ELSEWHERE: Final = {
    "Pmem._msync: no self._map.flush(start, min(align_up(offset + length, _PAGE), self.size)"
    " - start)": "a recorded medium has its own: test_a_disk_that_fails_is_a_medium_error",
    "Pmem._stream: no library.pmem_drain()": (
        "a recorded medium stores in order: "
        "test_a_large_store_passes_the_caches_by_and_a_small_one_does_not"
    ),
    "Journal.close: no superblock.write(self.pmem, sb)": (
        "no crash needs it, but damage to the last batch is not seen: test_check_damage"
    ),
    "Journal._finish_checkpoint: no self.sync()": (
        "the log is called full and nothing is lost: "
        "test_a_log_goes_round_and_round_while_objects_change"
    ),
    "Journal.reclaim: no self.sync()": (
        "it loses room and nothing else: "
        "test_a_full_pool_commits_rather_than_refuse_what_was_just_freed"
    ),
}
"""Steps that no crash depends on, and what fails without them."""

WRONG: Final[dict[Mutant, Killer]] = {
    # checksums
    replaced(log.LogHalf, "valid_batch", "!= checksum", "!= checksum < 0"): "flush/create,rename",
    replaced(log.LogHalf, "valid_batch", "or generation != self.generation", ""): (
        "store/compact,compact"
    ),
    replaced(superblock, "problem", "sb.checksum != zlib", "sb.checksum != sb.checksum != zlib"): (
        "store/compact"
    ),
    # what is counted
    replaced(
        journal.Journal,
        "replay",
        "max(1, self.log.replay(self.objects))",
        "min(2, self.log.replay(self.objects))",
    ): "store/create",
    replaced(
        journal.Journal, "_start_checkpoint", "new_generation()", "self.superblock.generation"
    ): "store/create,compact,compact",
    replaced(
        pmem.Pmem, "_change_blocks", "self._unsynced = self.medium.commit is Commit.FLUSH", "pass"
    ): "flush/align-sparse,write-in-hole",
    # order
    replaced(
        superblock,
        "write",
        "sorted(SUPERBLOCKS, key=lambda at: _epoch_at(pmem.view, at))",
        "SUPERBLOCKS",
    ): "store/compact",
    replaced(
        superblock,
        "write",
        "        pmem.store(at, raw)\n        pmem.persist(at, len(raw))",
        "        pmem.store(at, raw)\n    for at in SUPERBLOCKS:\n"
        "        pmem.persist(at, len(raw))",
    ): "flush/compact",
    replaced(
        journal.Journal,
        "_switch",
        "self.pmem.persist(half.place.start, half.tail - half.place.start)\n"
        "        new = self.write_switched(half)",
        "new = self.write_switched(half)\n"
        "        self.pmem.persist(half.place.start, half.tail - half.place.start)",
    ): ("flush/compact"),
    replaced(journal.Journal, "apply", "self._pending_free += freed", "self._free(freed)"): (
        "sync/unlink-data,write-in-hole"
    ),
    replaced(journal.Journal, "_advance", "checkpoint.follow(records, self.next_oid)", "True"): (
        "store-tiny/checkpoint,create"
    ),
    replaced(
        data.Data,
        "write",
        "self._store(edit or map_, offset, data)",
        "pass",
        "    return len(data)",
        "    self._store(edit or map_, offset, data)\n    return len(data)",
    ): "store/append-block",
    replaced(
        names.Names,
        "_move",
        "tx.end(self._names[parent][name])",
        "tx.end(self._names[parent][name])\n    with self.change() as tx:",
    ): ("store/rename"),
    replaced(
        names.Names,
        "_remove",
        "tx.end(names[name])",
        "tx.end(names[name])\n    with self.change() as tx:",
    ): "store/unlink-link",
    replaced(
        state.State,
        "_end_inodes",
        "(*self._belongings(ino), ino)",
        "(ino, *self._belongings(ino))",
    ): "store-tiny/unlink-attributes",
    replaced(Files, "end_orphans", "self.end_inode(ino)", "pass"): "store/unlink-held",
    replaced(rewrite, "rewrite", "journal.compact()", "pass"): mending_by_sync,
}


def found_by(killer: Killer) -> list[str]:
    try:
        return hunted(killer) if isinstance(killer, str) else killer()
    except (AssertionError, VfsmapError) as exc:  # what follows from it shows it as well
        return [str(exc)]


STEPS: Final = [mutant for owner in COMMIT_PATH for mutant in without_steps(owner)]


def test_every_step_of_the_commit_path_is_in_the_table() -> None:
    assert sorted(map(str, STEPS)) == sorted([*KILLERS, *ELSEWHERE])


@pytest.mark.parametrize("step", [s for s in STEPS if str(s) in KILLERS], ids=str)
def test_a_step_left_out_loses_something_and_is_caught(step: Mutant) -> None:
    with applied(step):
        assert found_by(KILLERS[str(step)])


@pytest.mark.parametrize("mutant", WRONG, ids=str)
def test_a_step_done_wrongly_loses_something_and_is_caught(mutant: Mutant) -> None:
    with applied(mutant):
        assert found_by(WRONG[mutant])
