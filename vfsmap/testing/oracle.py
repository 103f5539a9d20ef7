"""What must hold of a pool after a crash, whatever the crash left of it."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from vfsmap.errors import VfsmapError
from vfsmap.fs import FileSystem
from vfsmap.fs.check import check
from vfsmap.fs.draft import Finding
from vfsmap.fs.inode import ROOT
from vfsmap.pmem import Medium
from vfsmap.pool import Oid, Pool
from vfsmap.pool.layout import EXTENT, RECORD, SPACE, SUPERBLOCKS, USER_TAG, ExtentRecord
from vfsmap.pool.scan import Scan, scan
from vfsmap.pool.superblock import SIZE
from vfsmap.testing.recording import Event, Memory, RecordingPmem

_PROBE = b".probe"
OLD_BYTES: Final = b"\xa5" * 64
"""What the media of tests hold all over at first, and no file ever."""


class File(NamedTuple):
    """All that can be read of a file but its names."""

    inode: bytes
    content: bytes
    xattrs: tuple[tuple[bytes, bytes], ...]
    target: bytes
    seal: bytes


class Snapshot(NamedTuple):
    """All that can be read of a file system."""

    names: dict[tuple[int, bytes], int]
    files: dict[int, File]

    @property
    def key(self) -> int:
        """What tells it from others."""
        return hash((frozenset(self.names.items()), frozenset(self.files.items())))


class Expectation(NamedTuple):
    """What may be found after a crash."""

    snapshots: Sequence[Snapshot]
    """The state after each operation."""
    candidates: frozenset[int]
    """Which of them may be found."""
    latest: int
    """The state that bytes overwritten in place may already have."""
    key: int
    """What tells it from others."""


class Verdict(NamedTuple):
    """What was found."""

    problems: list[str]
    recovery: list[Event]
    """What recovery did to the medium."""


def snapshot(fs: FileSystem) -> Snapshot:
    """Read a whole file system, and change nothing."""
    names: dict[tuple[int, bytes], int] = {}
    queue = [ROOT]
    for directory in queue:
        for _, name, ino in fs.entries(directory):
            names[directory, name] = ino
            if fs.get(ino).is_directory:
                queue.append(ino)
    files = {ino: _file(fs, ino) for ino in {ROOT, *names.values()}}
    return Snapshot(names, files | _of_programs(fs.pool))


def _of_programs(pool: Pool) -> dict[int, File]:
    """Return what programs keep beside the file system, as files without an inode."""
    found = {}
    for oid, rec in pool.objects.items():
        _, tag, _ = RECORD.unpack_from(rec)
        if tag & USER_TAG:
            found[oid] = File(b"", b"", (), rec, b"")
        elif tag == ExtentRecord.TAG and not any(rec[RECORD.size : RECORD.size + 8]):
            found[oid] = File(b"", bytes(pool.view(Oid(oid))), (), b"", b"")
    return found


def _file(fs: FileSystem, ino: int) -> File:
    inode = fs.get(ino)
    link = inode.mode >> 12 == 0o12
    return File(
        inode=inode.encode(),
        content=_content(fs, ino, inode.size) if inode.is_file else b"",
        xattrs=tuple(sorted((name, fs.getxattr(ino, name)) for name in fs.listxattr(ino))),
        target=fs.readlink(ino) if link else b"",
        seal=(fs.seal_of(ino) or b"") + _tree(fs, ino),
    )


def _content(fs: FileSystem, ino: int, size: int) -> bytes:
    view = fs.pool.pmem.view
    content = bytearray(size)
    for extent in fs.extents(ino, 0, size):
        piece = view[extent.start : extent.start + extent.length]
        content[extent.offset : extent.offset + extent.length] = piece
    return bytes(content)


def _tree(fs: FileSystem, ino: int) -> bytes:
    view = fs.pool.pmem.view
    return b"".join(view[e.start : e.start + e.length] for e in fs.tree_extents(ino))


class Judge:
    """Judges what crashes left of pools on one medium.

    What can only depend on the metadata (the superblocks and the log up to its tail) is looked into
    once for all images that have the same: what a check finds, and how the pool can be used.
    """

    def __init__(self, medium: Medium) -> None:
        """Play ``medium``."""
        self._medium = medium
        self._checked: set[bytes] = set()
        self._used: set[bytes] = set()

    def judge(self, memory: Memory, size: int, expected: Expectation) -> Verdict:
        """Recover a pool from what a crash left, hold it against what was done, and use it.

        Any exception is a problem: nothing that a crash leaves may raise one.

        Args:
            memory: what the crash left; it is changed.
            size: bytes of it that the medium has.
            expected: what may be found.
        """
        pmem = RecordingPmem(memory, size, self._medium)
        recovery: list[Event] = []
        try:
            damage = (
                finding for finding in self._findings(pmem, scan(pmem)) if not finding.harmless
            )
            problems = [f"before recovery: {finding}" for finding in damage]
            fs = _recover(pmem)
            recovery = list(pmem.events)
            found = snapshot(fs)
            problems += mismatch(found, expected)
            problems += old_bytes(found)
            recovered = scan(pmem)
            problems += [
                f"after recovery: {finding}" for finding in self._findings(pmem, recovered)
            ]
            metadata = _metadata(pmem, recovered)
            if metadata not in self._used:
                self._used.add(metadata)
                problems += _use(fs, found)
        except (VfsmapError, Exception) as exc:
            return Verdict([f"{type(exc).__name__}: {exc}"], recovery)
        return Verdict(problems, recovery)

    def _findings(self, pmem: RecordingPmem, found: Scan) -> list[Finding]:
        metadata = _metadata(pmem, found)
        if metadata in self._checked:
            return []
        findings = check(found).findings
        if not findings:
            self._checked.add(metadata)
        return findings


def _metadata(pmem: RecordingPmem, found: Scan) -> bytes:
    """Return a digest of all that a pool's metadata is read from."""
    start = found.halves[found.superblock.active].start
    digest = hashlib.blake2b(pmem.size.to_bytes(8, "little"), digest_size=16)
    for at in SUPERBLOCKS:
        digest.update(pmem.view[at : at + SIZE])
    digest.update(pmem.view[start : found.tail])
    digest.update(repr((found.gaps, found.nonsense)).encode())
    return digest.digest()


def _recover(pmem: RecordingPmem) -> FileSystem:
    pool = Pool(pmem)
    if pool.failed:
        raise pool.failed
    fs = FileSystem(pool)
    fs.end_orphans()
    with fs.change() as tx:  # changes nothing, but goes behind whatever the crash left in the log
        fs.put(tx, fs.get(ROOT))
    pool.sync()
    return fs


def mismatch(found: Snapshot, expected: Expectation) -> list[str]:
    """Return how a snapshot differs from the nearest state that is allowed; nothing if it fits."""
    nearest: list[str] | None = None
    for candidate in sorted(expected.candidates):
        later = expected.snapshots[candidate : expected.latest + 1]
        different = _differences(found, later)
        if not different:
            return []
        if nearest is None or len(different) < len(nearest):
            nearest = [f"state {candidate}: {line}" for line in different]
    return nearest or ["no state is allowed"]


def old_bytes(found: Snapshot) -> list[str]:
    """Return which files show what the medium held before."""
    whole = {ino: file.content + file.seal for ino, file in found.files.items()}
    return [f"inode {ino} shows old bytes" for ino, text in whole.items() if OLD_BYTES in text]


def _differences(found: Snapshot, later: Sequence[Snapshot]) -> list[str]:
    wanted = later[0]
    lines = [
        f"name {key} is {found.names.get(key)} instead of {wanted.names.get(key)}"
        for key in found.names.keys() | wanted.names.keys()
        if found.names.get(key) != wanted.names.get(key)
    ]
    for ino in found.files.keys() & wanted.files.keys():
        mine, theirs = found.files[ino], wanted.files[ino]
        if mine == theirs:
            continue
        if mine._replace(content=b"") != theirs._replace(content=b""):
            fields = [n for n in File._fields if getattr(mine, n) != getattr(theirs, n)]
            lines.append(f"inode {ino} differs in {', '.join(fields)}")
            continue
        versions = [snap.files[ino].content for snap in later if ino in snap.files]
        at = foreign_byte(mine.content, versions)
        if at is not None:
            lines.append(f"inode {ino} has a byte at {at:#x} that nobody wrote there")
    return lines


def foreign_byte(content: bytes, versions: Sequence[bytes]) -> int | None:
    """Return where content has a byte that none of the versions has there."""
    first = versions[0]
    for start in range(0, len(content), 512):
        end = start + 512
        if content[start:end] == first[start:end]:
            continue
        for at in range(start, min(end, len(content))):
            byte = content[at]
            if not any(at < len(version) and version[at] == byte for version in versions):
                return at
    return None


def _use(fs: FileSystem, found: Snapshot) -> list[str]:
    """Create, write, rename and delete in every directory; compact; open again."""
    problems = []
    data = b"probe" * 20 if fs.pool.space.free_bytes else b""
    for directory in [ino for ino, file in found.files.items() if _is_directory(file)]:
        ino = fs.create(directory, _PROBE, 0o600, 0, 0).ino
        fs.write(ino, 10, data)
        fs.rename(directory, _PROBE, directory, _PROBE + b"2")
        if bytes(fs.read(ino, 10, 1000)) != data:
            problems.append(f"a new file in {directory} does not read back")
        fs.unlink(directory, _PROBE + b"2")
    fs.pool.sync()
    fs.pool.journal.compact()
    after = snapshot(fs)
    problems += [f"after use: {line}" for line in _changes(found, after)]
    pmem = fs.pool.pmem
    assert isinstance(pmem, RecordingPmem)
    problems += [f"after use: {f}" for f in check(scan(pmem)).findings]
    fs.close()
    again = _recover(RecordingPmem(pmem.memory, pmem.size, pmem.medium))
    if snapshot(again) != after:
        problems.append("opened again, it is another one")
    return problems


def _changes(found: Snapshot, after: Snapshot) -> list[str]:
    """Return what differs but for the times of directories."""
    lines = [] if found.names == after.names else ["names have changed"]
    for ino, file in found.files.items():
        new = after.files.get(ino)
        if new != file and not (new and _is_directory(file) and _is_directory(new)):
            lines.append(f"inode {ino} has changed")
    return lines


def _is_directory(file: File) -> bool:
    return bool(file.inode) and file.inode[1] >> 4 == 0o4


def used_runs(objects: Mapping[int, bytes]) -> list[tuple[int, int]]:
    """Return the pool bytes that objects own, as start and length."""
    return [
        EXTENT.unpack_from(rec, RECORD.size)[2:]
        for rec in objects.values()
        if rec[4] in SPACE and not rec[7]
    ]
