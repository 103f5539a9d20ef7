"""Checking names: each says what it names, the root is above all of them, and links are counted."""

from collections import Counter, defaultdict
from typing import Final

from vfsmap.fs.draft import Draft, new_directory
from vfsmap.fs.inode import ROOT, Inode
from vfsmap.fs.names import NAME_MAX

LOST_AND_FOUND: Final = b"lost+found"


def check_names(draft: Draft) -> None:
    """Remove names that can't be: of nothing, in nothing, twice the same, a directory's second."""
    seen: set[tuple[int, bytes]] = set()
    directories: set[int] = {ROOT}
    for oid in sorted(draft.names, key=draft.age, reverse=True):
        dirent = draft.names[oid]
        inode = draft.inodes.get(dirent.ino)
        home = draft.inodes.get(dirent.parent)
        if inode is None:
            wrong = f"inode {dirent.ino} is lost"
        elif home is None or not home.is_directory:
            wrong = f"{dirent.parent} is no directory"
        elif not _possible(dirent.name):
            wrong = "that can't be a name"
        elif (dirent.parent, dirent.name) in seen:
            wrong = f"directory {dirent.parent} has it twice"
        elif inode.is_directory and dirent.ino in directories:
            wrong = f"directory {dirent.ino} has another name"
        else:
            seen.add((dirent.parent, dirent.name))
            _check_kind(draft, oid, inode, directories)
            continue
        draft.note("name", f"name {dirent.name!r}", wrong, "remove it")
        draft.end(oid)


def _check_kind(draft: Draft, oid: int, inode: Inode, directories: set[int]) -> None:
    dirent = draft.names[oid]
    if inode.is_directory:
        directories.add(dirent.ino)
    if dirent.kind != inode.mode >> 12:
        what = f"it says type {dirent.kind:o}, its inode {inode.mode >> 12:o}"
        draft.note("name", f"name {dirent.name!r}", what, "believe the inode")
        draft.put_name(oid, dirent.parent, dirent.ino, dirent.name)


def _possible(name: bytes) -> bool:
    return (
        0 < len(name) <= NAME_MAX
        and name not in (b".", b"..")
        and b"/" not in name
        and b"\0" not in name
    )


def check_tree(draft: Draft) -> None:
    """Give what can't be reached from the root a name in ``lost+found``."""
    home_of = {d.ino: oid for oid, d in draft.names.items() if draft.inodes[d.ino].is_directory}
    below: defaultdict[int, list[int]] = defaultdict(list)
    for ino, oid in home_of.items():
        below[draft.names[oid].parent].append(ino)
    named = {dirent.ino for dirent in draft.names.values()}
    parents = {dirent.parent for dirent in draft.names.values()}
    reached: set[int] = set()
    _reach(ROOT, below, reached)
    lost = LostAndFound(draft)
    for ino, inode in list(draft.inodes.items()):
        if ino in named or ino == ROOT:
            continue
        if inode.nlink == 0 and ino not in parents:
            what = "it has no name, but was open"
            draft.note("orphan", f"inode {ino}", what, "the next mount ends it", harmless=True)
            continue
        _reach(ino, below, reached)
        lost.take(ino, "it has no name")
    for ino, oid in home_of.items():
        if ino not in reached:
            draft.end(oid)
            _reach(ino, below, reached)
            lost.take(ino, "it is inside itself")


def _reach(ino: int, below: dict[int, list[int]], reached: set[int]) -> None:
    """Add an inode and every directory below it to what is reached."""
    queue = [ino]
    while queue:
        at = queue.pop()
        if at not in reached:
            reached.add(at)
            queue += below.get(at, ())


class LostAndFound:
    """The directory for what has no name, made when it is first needed."""

    def __init__(self, draft: Draft) -> None:
        self._draft = draft
        self._ino = 0
        self._taken: set[bytes] = set()

    def take(self, ino: int, why: str) -> None:
        """Give an inode a name in it."""
        draft = self._draft
        if not self._ino:
            self._ino = self._directory()
            self._taken = {d.name for d in draft.names.values() if d.parent == self._ino}
        name = _free_name(b"#%d" % ino, self._taken)
        self._taken.add(name)
        draft.note("lost", f"inode {ino}", why, f"name it lost+found/{name.decode()}")
        draft.put_name(draft.new_oid(), self._ino, ino, name)

    def _directory(self) -> int:
        draft = self._draft
        at_root = {d.name: d.ino for d in draft.names.values() if d.parent == ROOT}
        ino = at_root.get(LOST_AND_FOUND)
        if ino is not None and draft.inodes[ino].is_directory:
            return ino
        ino = draft.new_oid()
        draft.put_inode(new_directory(ino))
        draft.put_name(draft.new_oid(), ROOT, ino, _free_name(LOST_AND_FOUND, set(at_root)))
        return ino


def _free_name(wanted: bytes, taken: set[bytes]) -> bytes:
    name, number = wanted, 1
    while name in taken:
        name = b"%s.%d" % (wanted, number)
        number += 1
    return name


def check_links(draft: Draft) -> None:
    """Let every inode count its names, and every directory those inside it that lead back."""
    links = Counter(dirent.ino for dirent in draft.names.values())
    below = Counter(
        dirent.parent for dirent in draft.names.values() if draft.inodes[dirent.ino].is_directory
    )
    for ino, inode in list(draft.inodes.items()):
        count = links[ino]
        if inode.is_directory:
            count = 2 + below[ino] if count or ino == ROOT else 0
        if inode.nlink != count:
            what = f"it counts {inode.nlink} links and has {count}"
            draft.note("links", draft.named(ino), what, f"make it {count}")
            inode.nlink = count
            draft.put_inode(inode)
