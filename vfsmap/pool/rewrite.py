"""Giving a damaged pool other objects: the last step of a repair."""

from collections.abc import Mapping

from vfsmap.pmem import Pmem
from vfsmap.pool import superblock
from vfsmap.pool.journal import Journal
from vfsmap.pool.layout import EXTENT, RECORD, SPACE, SUPERBLOCKS
from vfsmap.pool.scan import Scan


def rewrite(pmem: Pmem, found: Scan, objects: Mapping[int, bytes], next_oid: int) -> None:
    """Let a pool hold exactly ``objects``: they are written to the spare half, or to a new one.

    Raises:
        NoSpace: they don't fit.
        PoolDamaged: they own pool bytes twice.
        Unsupported: the file has to be made longer, and can't be.
        MediumError: the medium refused.

    Crash: the damaged objects or the new ones; it can be done again.
    """
    used = [
        EXTENT.unpack_from(rec, RECORD.size)[2:]
        for rec in objects.values()
        if RECORD.unpack_from(rec)[1] in SPACE
    ]
    used += ((half.start, half.length) for half in found.superblock.halves)
    if found.truncated:
        pmem.resize(found.superblock.size)
        for start, length in used:  # of what is lost, a store would ask for room
            pmem.reserve(start, length)
    if found.rebuilt:
        raw = superblock.encode(found.superblock)
        for at in SUPERBLOCKS:  # every word that was right stays so, whatever a crash tears
            pmem.store(at, raw)
            pmem.persist(at, len(raw))
    found.superblock.epoch += 1  # tells followers that the new half holds other objects
    journal = Journal(pmem, found.superblock)
    journal.objects = dict(objects)
    journal.live = sum(map(len, objects.values()))
    journal.next_oid = next_oid
    journal.space.fill(used, found.superblock.size)
    journal.compact()
