"""A file system made of dictionaries: what the real one is held against.

Every function does what a file system has to do, or raises the error that it has to raise and
changes nothing.  Paths are text, relative to the root.
"""

import stat
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from vfsmap.errors import (
    Busy,
    Exists,
    Invalid,
    IsADirectory,
    NoData,
    NotADirectory,
    NotEmpty,
    NotFound,
    Sealed,
)
from vfsmap.fs import FileSystem
from vfsmap.fs.inode import ROOT
from vfsmap.testing.oracle import foreign_byte


@dataclass
class Node:
    """A file of any kind."""

    mode: int
    content: bytes = b""
    target: bytes = b""
    sealed: bool = False
    names: dict[bytes, int] = field(default_factory=dict)
    attributes: dict[bytes, bytes] = field(default_factory=dict)

    @property
    def is_directory(self) -> bool:
        """Tell whether names are in it."""
        return stat.S_ISDIR(self.mode)

    def copy(self) -> "Node":
        """Return one that can be changed by itself."""
        return replace(self, names=dict(self.names), attributes=dict(self.attributes))


class Files:
    """Nodes by inode number; those without a name are not among them."""

    def __init__(self, nodes: dict[int, Node]) -> None:
        self.nodes = nodes

    def copy(self) -> "Files":
        """Return one that can be changed by itself."""
        return Files({ino: node.copy() for ino, node in self.nodes.items()})

    def links(self) -> Counter[int]:
        """Return how many links each node has."""
        counts: Counter[int] = Counter({ROOT: 2})
        for ino, node in self.nodes.items():
            for child in node.names.values():
                directory = self.nodes[child].is_directory
                counts[child] += 1 + directory
                counts[ino] += directory
        return counts

    # paths

    def home(self, path: str) -> tuple[int, bytes]:
        """Return the directory of a path and its last name."""
        *parents, name = path.encode().split(b"/")
        at = ROOT
        for parent in parents:
            at = self.child(at, parent)
        return at, name

    def child(self, parent: int, name: bytes) -> int:
        """Return what a directory has under a name."""
        node = self.nodes[parent]
        if not node.is_directory:
            raise NotADirectory(f"{parent} is no directory")
        if name not in node.names:
            raise NotFound(f"there is no {name!r}")
        return node.names[name]

    def ino(self, path: str) -> int:
        """Return the number of the node at a path."""
        return self.child(*self.home(path))

    def file(self, path: str) -> Node:
        """Return the regular file at a path."""
        node = self.nodes[self.ino(path)]
        if node.is_directory:
            raise IsADirectory(f"{path} is a directory")
        if not stat.S_ISREG(node.mode):
            raise Invalid(f"{path} is not a regular file")
        return node

    def unsealed(self, path: str) -> Node:
        """Return the regular file at a path, whose content may change."""
        node = self.file(path)
        if node.sealed:
            raise Sealed(f"{path} is sealed")
        return node

    def _free(self, path: str) -> tuple[dict[bytes, int], bytes]:
        parent, name = self.home(path)
        node = self.nodes[parent]
        if not node.is_directory:
            raise NotADirectory(f"{parent} is no directory")
        if name in node.names:
            raise Exists(f"{path} exists")
        return node.names, name

    # names

    def make(self, path: str, node: Node, ino: int) -> None:
        """Put a new node at a path."""
        names, name = self._free(path)
        self.nodes[ino] = node
        names[name] = ino

    def link(self, old: str, new: str) -> None:
        """Give a file one more name."""
        ino = self.ino(old)
        self.home(new)
        if self.nodes[ino].is_directory:
            raise Invalid("a directory has one name")
        names, name = self._free(new)
        names[name] = ino

    def unlink(self, path: str) -> None:
        """Remove a file's name."""
        parent, name = self.home(path)
        if self.nodes[self.child(parent, name)].is_directory:
            raise IsADirectory(f"{path} is a directory")
        self._remove(parent, name)

    def rmdir(self, path: str) -> None:
        """Remove an empty directory."""
        parent, name = self.home(path)
        node = self.nodes[self.child(parent, name)]
        if not node.is_directory:
            raise NotADirectory(f"{path} is no directory")
        if node.names:
            raise NotEmpty(f"{path} is not empty")
        self._remove(parent, name)

    def _remove(self, parent: int, name: bytes) -> None:
        ino = self.nodes[parent].names.pop(name)
        if not any(ino in node.names.values() for node in self.nodes.values()):
            del self.nodes[ino]

    def rename(self, old: str, new: str, *, exchange: bool) -> None:
        """Move a name over another or nothing, or exchange two."""
        home, name = self.home(old)
        new_home, new_name = self.home(new)
        moved = self.child(home, name)
        if not self.nodes[new_home].is_directory:
            raise NotADirectory(f"{new_home} is no directory")
        replaced = self.nodes[new_home].names.get(new_name)
        if replaced == moved:
            return
        self._require_outside(moved, new_home)
        if exchange:
            if replaced is None:
                raise NotFound(f"there is no {new}")
            self._require_outside(replaced, home)
            self.nodes[home].names[name] = replaced
        else:
            if replaced is not None:
                self._require_replaceable(self.nodes[moved], self.nodes[replaced])
                self._remove(new_home, new_name)
            del self.nodes[home].names[name]
        self.nodes[new_home].names[new_name] = moved

    def _require_outside(self, ino: int, directory: int) -> None:
        queue = [ino]
        for at in queue:
            if at == directory:
                raise Invalid("a directory can't be inside itself")
            queue += self.nodes[at].names.values()

    def _require_replaceable(self, moved: Node, replaced: Node) -> None:
        if replaced.is_directory and not moved.is_directory:
            raise IsADirectory("only a directory replaces a directory")
        if replaced.names:
            raise NotEmpty("it is not empty")
        if moved.is_directory and not replaced.is_directory:
            raise NotADirectory("a directory replaces only a directory")

    # contents

    def write(self, path: str, offset: int, data: bytes) -> None:
        """Store bytes; a gap in front of them reads as zeros."""
        node = self.unsealed(path)
        head = node.content[:offset].ljust(offset, b"\0")
        node.content = head + data + node.content[offset + len(data) :]

    def cut(self, path: str, size: int, *, leased: int) -> None:
        """Set a file's size, which can't go below what is leased of it."""
        node = self.unsealed(path)
        if size < min(leased, len(node.content)):
            raise Busy(f"{path} is leased")
        node.content = node.content[:size].ljust(size, b"\0")

    def grow(self, path: str, size: int) -> None:
        """Make a file at least so large."""
        node = self.unsealed(path)
        node.content = node.content.ljust(size, b"\0")

    def seal(self, path: str, *, leased: int) -> None:
        """Fix a file's content."""
        node = self.file(path)
        if node.sealed:
            raise Exists(f"{path} is sealed")
        if leased:
            raise Busy(f"{path} is leased")
        node.sealed = True

    def chmod(self, path: str, mode: int) -> None:
        """Set permissions."""
        node = self.nodes[self.ino(path)]
        node.mode = stat.S_IFMT(node.mode) | mode

    def set_attribute(self, path: str, name: bytes, value: bytes | None) -> None:
        """Set an extended attribute, or remove it."""
        attributes = self.nodes[self.ino(path)].attributes
        if value is not None:
            attributes[name] = value
        elif name not in attributes:
            raise NoData(f"there is no {name!r}")
        else:
            del attributes[name]


def read_files(fs: FileSystem) -> Files:
    """Return all that a file system holds; its counts of links must be right."""
    files = Files({})
    queue = [ROOT]
    for ino in queue:
        if ino in files.nodes:
            continue
        inode = fs.get(ino)
        entries = fs.entries(ino) if inode.is_directory else []
        files.nodes[ino] = Node(
            inode.mode,
            bytes(fs.read(ino, 0, inode.size, noatime=True)) if inode.is_file else b"",
            fs.readlink(ino) if stat.S_ISLNK(inode.mode) else b"",
            fs.seal_of(ino) is not None,
            {name: child for _, name, child in entries},
            {name: fs.getxattr(ino, name) for name in fs.listxattr(ino)},
        )
        queue += files.nodes[ino].names.values()
    counts = files.links()
    assert counts == {ino: fs.get(ino).nlink for ino in files.nodes}
    return files


def is_left_of(found: Files, states: Sequence[Files]) -> bool:
    """Tell whether a crash may leave ``found`` of one of the states, the last being the newest.

    What was overwritten in place later may have any of the bytes it has had since.
    """
    return any(_is_left(found, states[at:]) for at in range(len(states)))


def _is_left(found: Files, later: Sequence[Files]) -> bool:
    wanted = later[0]
    if found.nodes.keys() != wanted.nodes.keys():
        return False
    for ino, node in found.nodes.items():
        if replace(node, content=b"") != replace(wanted.nodes[ino], content=b""):
            return False
        versions = [files.nodes[ino].content for files in later if ino in files.nodes]
        if len(node.content) != len(versions[0]):
            return False
        if foreign_byte(node.content, versions) is not None:
            return False
    return True
