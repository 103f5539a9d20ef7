"""Checking a file system: everything that its records say is held against everything else.

The passes go from single records to the whole, each over what the ones before have mended in the
draft: records, inodes, what belongs to them, extents, names, the tree, link counts.

What can be told to be wrong, and how it is mended, follows from two facts: what was written later
is right where two records can't both be, since the file system never lets them meet; and whatever
nobody has a name for gets one in ``lost+found`` rather than an end.
"""

import stat
from typing import Final, NamedTuple

from vfsmap.fs.check_extents import check_extents, file_ends
from vfsmap.fs.check_tree import check_links, check_names, check_tree
from vfsmap.fs.data import MAX_SIZE
from vfsmap.fs.draft import Draft, Finding, new_directory
from vfsmap.fs.inode import ROOT, Inode
from vfsmap.fs.names import NAME_MAX
from vfsmap.pool.layout import RECORD
from vfsmap.pool.scan import Scan
from vfsmap.units import LEVELS

_KINDS: Final = (
    stat.S_IFREG,
    stat.S_IFDIR,
    stat.S_IFLNK,
    stat.S_IFIFO,
    stat.S_IFSOCK,
    stat.S_IFCHR,
    stat.S_IFBLK,
)
_SHIFTS: Final = (0, *(level.shift for level in LEVELS))


class Report(NamedTuple):
    """What a check found."""

    findings: list[Finding]
    draft: Draft
    """The objects as they would be after a repair."""

    @property
    def damage(self) -> list[Finding]:
        """What no crash leaves behind."""
        return [finding for finding in self.findings if not finding.harmless]

    @property
    def clean(self) -> bool:
        """Tell whether nothing is damaged."""
        return not self.damage


def check(found: Scan) -> Report:
    """Check a pool that was scanned; nothing is stored."""
    draft = Draft(found.objects, found.objects.written, found.next_oid)
    _check_log(draft, found)
    files = draft.holds_files()
    if files:
        _check_inodes(draft)
        _check_belongings(draft)
    check_extents(draft, found)
    if files:
        check_names(draft)
        check_tree(draft)
        check_links(draft)
    return Report(draft.findings, draft)


def _check_log(draft: Draft, found: Scan) -> None:
    if found.rebuilt:
        draft.note(
            "superblock", "superblock", "both copies are damaged", "put it together from the two"
        )
    for complaint in () if found.rebuilt else found.complaints:
        where, _, what = complaint.partition(": ")
        draft.note("superblock-copy", where, what, "write it again", harmless=True)
    if found.truncated:
        what = f"it has {found.size} bytes, the pool {found.superblock.size}"
        draft.note("truncated", "file", what, "make it longer; what was there reads as zeros")
    for gap in found.gaps:
        draft.note("log", f"log at {gap.at:#x}", str(gap), "go on with the newer batches")
    for text in found.nonsense:
        draft.note("log", "log", text, "leave out the rest of that batch")


# inodes


def _check_inodes(draft: Draft) -> None:
    root = draft.inodes.get(ROOT)
    if root is None or not root.is_directory:
        draft.note("root", "root directory", "it is missing", "make a new one")
        if ROOT in draft.objects:
            draft.end(ROOT)
        draft.put_inode(new_directory(ROOT))
    rec = draft.objects.get(0, b"")
    if rec[RECORD.size :] != ROOT.to_bytes(8, "little"):
        draft.note("root", "object 0", "it does not name the root directory", "let it")
        draft.put_root()
    kinds = {dirent.ino: dirent.kind << 12 for dirent in draft.names.values()}
    ends = file_ends(draft)
    for inode in list(draft.inodes.values()):
        _check_inode(draft, inode, kinds.get(inode.ino, 0), ends.get(inode.ino, 0))


def _check_inode(draft: Draft, inode: Inode, named_kind: int, end: int) -> None:
    wrong: list[tuple[str, str]] = []
    if stat.S_IFMT(inode.mode) not in _KINDS:
        kind = named_kind if named_kind in _KINDS else stat.S_IFREG
        wrong.append((f"mode {inode.mode:o} is of no type", f"make it {kind:o}"))
        inode.mode = kind | stat.S_IMODE(inode.mode)
    if inode.size > MAX_SIZE:
        wrong.append((f"size {inode.size} is impossible", "cut it behind its last extent"))
        inode.size = end
    if inode.align not in _SHIFTS:
        wrong.append((f"alignment 2^{inode.align} is no level's", "forget it"))
        inode.align = 0
    for what, remedy in wrong:
        draft.note("inode", draft.named(inode.ino), what, remedy)
        draft.put_inode(inode)


# what belongs to an inode


def _check_belongings(draft: Draft) -> None:
    _adopt_extents(draft)
    _check_symlinks(draft)
    _check_seals(draft)
    seen: dict[tuple[int, bytes], int] = {}
    for oid in sorted(draft.xattrs, key=draft.age, reverse=True):
        attribute = draft.xattrs[oid]
        if attribute.ino not in draft.inodes:
            _end(draft, oid, "xattr", f"attribute {attribute.name!r} belongs to no inode")
        elif not 0 < len(attribute.name) <= NAME_MAX:
            _end(draft, oid, "xattr", f"{attribute.name!r} can't be an attribute's name")
        elif seen.setdefault((attribute.ino, attribute.name), oid) != oid:
            _end(draft, oid, "xattr", f"attribute {attribute.name!r} is there twice")


def _end(draft: Draft, oid: int, code: str, what: str) -> None:
    draft.note(code, f"object {oid}", what, "end it")
    draft.end(oid)


def _adopt_extents(draft: Draft) -> None:
    """Make a file for extents whose inode is lost; end those that belong to what has none."""
    ends = file_ends(draft)
    for oid, run in list(draft.extents.items()):
        if run.owner == 0:
            continue
        inode = draft.inodes.get(run.owner)
        if inode is None and run.owner not in draft.objects:
            what = "it is lost, but not its extents"
            draft.note("inode", f"inode {run.owner}", what, "make a file for them")
            inode = Inode(run.owner, stat.S_IFREG | 0o600, 0, 0, 0)
            inode.size = ends[run.owner]
            draft.put_inode(inode)
            draft.next_oid = max(draft.next_oid, run.owner + 1)
        if inode is None or not inode.is_file:
            _end(draft, oid, "extent", f"the extent belongs to {run.owner}, which is no file")


def _check_symlinks(draft: Draft) -> None:
    targets: dict[int, int] = {}
    for oid in sorted(draft.symlinks, key=draft.age, reverse=True):
        ino, length = draft.symlinks[oid]
        inode = draft.inodes.get(ino)
        if inode is None or not stat.S_ISLNK(inode.mode):
            _end(draft, oid, "symlink", f"the target belongs to {ino}, which is no symbolic link")
        elif targets.setdefault(ino, oid) != oid:
            _end(draft, oid, "symlink", f"inode {ino} has two targets")
        elif length != inode.size:
            what = f"size {inode.size} is not the length of the target"
            draft.note("symlink", draft.named(ino), what, f"make it {length}")
            inode.size = length
            draft.put_inode(inode)
    for ino, inode in list(draft.inodes.items()):
        if stat.S_ISLNK(inode.mode) and ino not in targets:
            draft.note("symlink", draft.named(ino), "its target is lost", "end it")
            draft.end(ino)


def _check_seals(draft: Draft) -> None:
    seals: dict[int, int] = {}
    for oid in sorted(draft.seals, key=draft.age, reverse=True):
        ino = draft.seals[oid]
        inode = draft.inodes.get(ino)
        if inode is None or not inode.is_file or not inode.sealed:
            _end(draft, oid, "seal", f"the digest belongs to {ino}, which is not sealed")
        elif seals.setdefault(ino, oid) != oid:
            _end(draft, oid, "seal", f"inode {ino} has two digests")
    for inode in list(draft.inodes.values()):
        if inode.sealed and inode.ino not in seals:
            what = "it is sealed, but its digest is lost"
            draft.note("seal", draft.named(inode.ino), what, "unseal it")
            inode.flags &= ~1
            draft.put_inode(inode)
    for oid, run in list(draft.trees.items()):
        if run.owner not in seals:
            _end(draft, oid, "tree", f"the Merkle tree belongs to {run.owner}, which is not sealed")
