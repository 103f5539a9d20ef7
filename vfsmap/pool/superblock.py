"""The superblock's two copies: read, checked, written one after the other."""

import ctypes
import zlib

from vfsmap.errors import NotAPool, PoolDamaged
from vfsmap.pmem import Pmem
from vfsmap.pool.layout import BLOCK, FIRST_FREE, MAGIC, SUPERBLOCKS, VERSION, Superblock
from vfsmap.units import align_down

SIZE = ctypes.sizeof(Superblock)
_NEWER = "format version"


def encode(superblock: Superblock) -> bytes:
    """Return the bytes of a copy, checksum included."""
    superblock.checksum = zlib.crc32(bytes(superblock)[: Superblock.checksum.offset])
    return bytes(superblock)


def problem(raw: bytes, pool_bytes: int) -> str:
    """Return what is wrong with a copy, or nothing."""
    if len(raw) < SIZE or raw[:8] != MAGIC:
        return "no superblock"
    sb = Superblock.from_buffer_copy(raw)
    if sb.checksum != zlib.crc32(raw[: Superblock.checksum.offset]) or sb.padding:
        return "wrong checksum"
    if sb.version != VERSION or sb.features:
        return f"{_NEWER} {sb.version}, features {sb.features:#x}"
    if sb.size > pool_bytes:
        return f"the pool is {sb.size} bytes long, its file only {pool_bytes}"
    if sb.size % BLOCK:
        return f"the pool's size, {sb.size}, is not a multiple of {BLOCK}"
    if sb.active > 1 or any(not _inside(h.start, h.length, sb.size) for h in sb.halves):
        return "the log lies outside the pool"
    return ""


def _inside(start: int, length: int, size: int) -> bool:
    whole_blocks = (start | length) % BLOCK == 0
    return whole_blocks and start >= FIRST_FREE and 0 < length <= size - start


def load(view: memoryview, pool_bytes: int | None = None) -> tuple[Superblock, list[str]]:
    """Return the superblock that holds, and a complaint for each copy that can't be used.

    ``view`` shows the file, or its beginning; then ``pool_bytes`` says how long the file is.

    A copy that is only older, as a crash between the two writes leaves it, is a complaint too, so
    that a writer knows it has to be written again.

    Raises:
        NotAPool: no copy has the magic, or the format is newer than this program.
        PoolDamaged: there are copies, but none that can be believed.
    """
    copies, complaints = [], []
    for at in SUPERBLOCKS:
        raw = bytes(view[at : at + SIZE])
        if wrong := problem(raw, len(view) if pool_bytes is None else pool_bytes):
            complaints.append(f"superblock at {at:#x}: {wrong}")
        else:
            copies.append((at, Superblock.from_buffer_copy(raw)))
    newer = [complaint for complaint in complaints if _NEWER in complaint]
    if newer:
        raise NotAPool(f"{newer[0]}: made by a newer vfsmap; use that one")
    if not copies:
        raise _unusable(view, complaints)
    _, best = max(copies, key=lambda copy: copy[1].epoch)
    complaints += [f"superblock at {at:#x}: older" for at, sb in copies if sb.epoch != best.epoch]
    return best, complaints


def _unusable(view: memoryview, complaints: list[str]) -> NotAPool | PoolDamaged:
    if not any(bytes(view[at : at + 8]) == MAGIC for at in SUPERBLOCKS):
        return NotAPool("not a vfsmap pool; make one with: vfsmap format NEW-FILE --size 8G")
    reasons = {complaint.partition(": ")[2]: complaint for complaint in complaints}
    if len(reasons) == 1:  # say once what is wrong with both
        complaints = list(reasons)
    return PoolDamaged(
        f"no usable superblock: {'; '.join(complaints)}; restore the pool from a whole copy"
    )


def write(pmem: Pmem, superblock: Superblock) -> None:
    """Make ``superblock`` the one that holds.

    The copy that is worth less is written first: while it is torn, the other one must hold.

    Crash: the old or the new one holds; everything either needs is durable before the first store.
    """
    superblock.epoch += 1
    raw = encode(superblock)
    for at in sorted(SUPERBLOCKS, key=lambda at: _epoch_at(pmem.view, at)):
        pmem.store(at, raw)
        pmem.persist(at, len(raw))  # the first persist is the commit point


def _epoch_at(view: memoryview, at: int) -> int:
    """Return the epoch of a copy, or -1 if it can't be used."""
    raw = bytes(view[at : at + SIZE])
    return -1 if problem(raw, len(view)) else int(Superblock.from_buffer_copy(raw).epoch)


def usable_size(size: int) -> int:
    """Return the bytes of a file of ``size`` bytes that a pool uses."""
    return align_down(size, BLOCK)
