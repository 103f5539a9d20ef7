"""Repairing a file system: what a check found is mended, and the pool written anew in one step."""

from vfsmap.errors import PoolDamaged
from vfsmap.fs.check import Report, check
from vfsmap.fs.filesystem import FileSystem
from vfsmap.fs.inode import ROOT
from vfsmap.pmem import Pmem
from vfsmap.pool import Pool
from vfsmap.pool.rewrite import rewrite
from vfsmap.pool.scan import scan


def repair(pmem: Pmem) -> Report:
    """Mend a pool, and return what was wrong with it.

    What can't be mended without guessing keeps its bytes and gets a name in ``lost+found``.

    Raises:
        NotAPool: it is none, or of a newer format.
        PoolDamaged: neither copy of the superblock can be used, or nothing of the log.
        NoSpace: there is no room for the mended objects.
        Unsupported: the file has to be made longer, and can't be.
        ReadOnly: the medium is not open for writing.
        MediumError: the medium refused.

    Crash: the pool as it was, or mended; it can be repaired again.
    """
    found = scan(pmem)
    report = check(found)
    if found.damaged and not found.objects:
        raise PoolDamaged(f"{pmem.path}: nothing of its log can be read; restore it from a copy")
    if not report.clean:
        rewrite(pmem, found, report.draft.objects, report.draft.next_oid)
    elif not report.findings:
        return report
    pool = Pool(pmem)  # which renews copies of the superblock
    if pool.failed:
        raise PoolDamaged(f"{pmem.path}: it can't be mended: {pool.failed}")
    if pool.root == ROOT:
        FileSystem(pool).end_orphans()
    pool.sync()
    pool.journal.close()
    return report
