"""What a directory holds, and whether a crash has lost any of it.

What is found after a crash must be the state that the last finished operation left, or the one that
was under way; where only fsync promises anything, any state since the last fsync.  Bytes that are
overwritten in place may be newer than the rest.
"""

import os
import stat
from collections.abc import Sequence
from typing import Final, NamedTuple

NOTE: Final = "user.note"
"""The extended attribute that is looked at."""


class Node(NamedTuple):
    """A file, a directory or a symbolic link, whatever its names are."""

    mode: int
    content: bytes = b""
    """A file's bytes, or a link's target."""
    note: bytes | None = None
    """Its extended attribute."""


class Tree(NamedTuple):
    """What a directory holds: a node's number for each name, and each node."""

    names: dict[str, int]
    nodes: dict[int, Node]

    def with_node(self, number: int, node: Node) -> "Tree":
        """Return the tree with another node of this number."""
        return Tree(self.names, {**self.nodes, number: node})

    def with_names(self, names: dict[str, int]) -> "Tree":
        """Return the tree with other names, and without the nodes that have none."""
        kept = set(names.values())
        return Tree(names, {number: node for number, node in self.nodes.items() if number in kept})


def observe(directory: int) -> Tree:
    """Read all that there is under an open directory; nodes are numbered as inodes."""
    names: dict[str, int] = {}
    nodes: dict[int, Node] = {}
    for folder, folders, files, fd in os.fwalk(".", dir_fd=directory):
        for name in (*folders, *files):
            status = os.stat(name, dir_fd=fd, follow_symlinks=False)
            names[os.path.normpath(os.path.join(folder, name))] = status.st_ino
            if status.st_ino not in nodes:
                nodes[status.st_ino] = _node(name, fd, status)
    return Tree(names, nodes)


def _node(name: str, directory: int, status: os.stat_result) -> Node:
    if stat.S_ISLNK(status.st_mode):
        return Node(status.st_mode, os.readlink(os.fsencode(name), dir_fd=directory))
    fd = os.open(name, os.O_RDONLY, dir_fd=directory)
    try:
        content = b""
        if stat.S_ISREG(status.st_mode):
            with open(fd, "rb", closefd=False) as file:
                content = file.read()
        note = os.getxattr(fd, NOTE) if NOTE in os.listxattr(fd) else None
        return Node(status.st_mode, content, note)
    finally:
        os.close(fd)


class Record(NamedTuple):
    """What a writer has done since it was last sure of everything."""

    trees: list[Tree]
    """The first is durable; then the one after each operation."""
    steps: list[tuple[str, int | None]]
    """Each operation, and the node that it may leave half changed."""
    finished: int
    """How many of them have ended."""
    total: int
    """How many were done in all."""

    def complaint(self, found: Tree, *, by_fsync: bool) -> str | None:
        """Return what is wrong with a tree that a crash has left, or None.

        Args:
            found: what is there.
            by_fsync: whether operations that were not followed by fsync may be lost.
        """
        first = 0 if by_fsync else self.finished
        reasons: dict[str, list[int]] = {}
        for number in reversed(range(first, len(self.trees))):
            reason = self._mismatch(found, number)
            if reason is None:
                return None
            reasons.setdefault(reason, []).append(number)
        done = ", ".join(f"{n}: {name}" for n, (name, _) in enumerate(self.steps, 1))
        wrong = "; ".join(f"after {numbers}: {reason}" for reason, numbers in reasons.items())
        return f"{wrong}; the operations were {done}"

    def _mismatch(self, found: Tree, number: int) -> str | None:
        wanted = self.trees[number]
        if found.names.keys() != wanted.names.keys():
            return f"names {sorted(found.names.keys() ^ wanted.names.keys())} differ"
        numbers: dict[int, int] = {}
        for name, ino in found.names.items():
            if numbers.setdefault(ino, wanted.names[name]) != wanted.names[name]:
                return f"{name} is another file's name"
        if len(set(numbers.values())) != len(numbers):
            return "two files were one"
        torn = self.steps[number][1] if number < len(self.steps) else None
        for ino, mine in numbers.items():
            later = [tree.nodes[mine] for tree in self.trees[number:] if mine in tree.nodes]
            versions = later[:2] if mine == torn else later[:1]
            sizes = [len(node.content) for node in versions]
            reason = _difference(found.nodes[ino], later, min(sizes), max(sizes))
            if reason:
                name = next(name for name, other in found.names.items() if other == ino)
                return f"{name} {reason}"
        return None


def _difference(found: Node, later: Sequence[Node], shortest: int, longest: int) -> str | None:
    wanted = later[0]
    if (found.mode, found.note) != (wanted.mode, wanted.note):
        seen, meant = f"{found.mode:o} {found.note!r}", f"{wanted.mode:o} {wanted.note!r}"
        return f"has mode and attribute {seen}, not {meant}"
    if not shortest <= len(found.content) <= longest:
        return f"has {len(found.content)} bytes, not {shortest} to {longest}"
    at = foreign_byte(found.content, [node.content for node in later])
    return None if at is None else f"has a byte at {at:#x} that nobody wrote there"


def foreign_byte(content: bytes, versions: Sequence[bytes]) -> int | None:
    """Return where content has a byte that none of the versions has there."""
    # of the halves of what no version has as a whole, one may be another's
    places = [(0, len(content))]
    while places:
        start, end = places.pop()
        piece = content[start:end]
        if not any(version[start:end] == piece for version in versions):
            if end - start == 1:
                return start
            middle = (start + end) // 2
            places += [(middle, end), (start, middle)]
    return None
