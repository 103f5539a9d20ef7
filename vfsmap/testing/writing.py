"""A program that keeps changing files, and knows what each of its operations does to the tree.

Each writer has a directory to itself.  It notes what an operation will make of its tree, does it,
and notes that it has ended; :class:`~vfsmap.testing.trees.Record` is what it has noted.
"""

import errno
import mmap
import os
import random
import stat
from collections.abc import Callable
from typing import Final, NamedTuple

import vfsmap
from vfsmap.errors import VfsmapError
from vfsmap.pmem.libc import MADV_POPULATE_WRITE
from vfsmap.testing.trees import NOTE, Node, Record, Tree, observe
from vfsmap.units import KIB, MIB

_NAMES: Final = ("a", "b", "c", "d", "e", "f")
_DIRECTORIES: Final = ("p", "q", "r")
_LARGEST: Final = 3 * MIB
_GONE: Final = frozenset({errno.ENOTCONN, errno.ECONNABORTED})
"""What the kernel says when a mount's server has died."""


class Step(NamedTuple):
    """One operation, as it is about to be done."""

    name: str
    after: Tree
    do: Callable[[], None]
    torn: int | None = None
    """The node that may be found half changed."""
    durable: bool = False
    """Whether its end promises that it, and all before, survive a crash."""


class Writer:
    """Changes what is under an open directory, an operation drawn after the other."""

    def __init__(self, directory: int, seed: int) -> None:
        """Go on from what is there."""
        self.directory = directory
        self._chance = random.Random(seed)
        self._tree = observe(directory)
        self._numbers = iter(range(1 << 40, 1 << 41))  # of nodes to come; no inode has such a one
        self._trees = [self._tree]
        self._steps: list[tuple[str, int | None]] = []
        self._finished = 0
        self._total = 0

    def record(self) -> Record:
        """Return what was done."""
        return Record(self._trees, self._steps, self._finished, self._total)

    def step(self, *, by_fsync: bool) -> None:
        """Draw an operation and do it; where it says so, all until now is durable afterwards.

        Raises:
            OSError, VfsmapError: it failed; so it is under way still, for all that is known.
        """
        step = self._draw()
        self._trees.append(step.after)
        self._steps.append((step.name, step.torn))
        step.do()
        self._tree = step.after
        self._finished += 1
        self._total += 1
        if step.durable or not by_fsync:
            del self._trees[: self._finished], self._steps[: self._finished]
            self._finished = 0

    # drawing

    def _draw(self) -> Step:
        makers = (
            *(self._create,) * 4,
            *(self._write,) * 8,
            *(self._write_mapped, self._write_window, self._truncate, self._rename) * 2,
            *(self._fsync, self._unlink, self._note) * 2,
            *(self._link, self._symlink, self._mkdir, self._rmdir, self._chmod),
            *(self._move_directory, self._unlink_open),
        )
        for maker in iter(lambda: self._chance.choice(makers), None):
            step = maker()
            if step is not None:
                return step
        raise AssertionError("there is always something to do")

    def _of_kind(self, kind: int) -> list[str]:
        nodes = self._tree.nodes
        return [n for n, ino in self._tree.names.items() if stat.S_IFMT(nodes[ino].mode) == kind]

    def _a_file(self) -> tuple[str, int, Node] | None:
        files = self._of_kind(stat.S_IFREG)
        if not files:
            return None
        name = self._chance.choice(files)
        number = self._tree.names[name]
        return name, number, self._tree.nodes[number]

    def _new_name(self) -> str | None:
        """Return a name that nothing has, in a directory that is there."""
        folder = self._chance.choice(["", *(f"{d}/" for d in self._of_kind(stat.S_IFDIR))])
        name = folder + self._chance.choice(_NAMES)
        return None if name in self._tree.names else name

    def _with_new(self, name: str, node: Node) -> Tree:
        number = next(self._numbers)
        return Tree({**self._tree.names, name: number}, {**self._tree.nodes, number: node})

    def _open(self, name: str, flags: int) -> int:
        return os.open(name, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600, dir_fd=self.directory)

    def _bytes(self, at: int) -> bytes:
        size = self._chance.choice((1, 100, 512, 4096, 5000, 20_000, 64 * KIB))
        if self._chance.random() < 0.04:
            size = self._chance.choice((MIB, 2 * MIB))
        return self._chance.randbytes(max(1, min(size, _LARGEST - at)))

    # operations

    def _create(self) -> Step | None:
        name = self._new_name()
        if name is None:
            return None
        after = self._with_new(name, Node(stat.S_IFREG | 0o600))
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
        return Step(f"create {name}", after, lambda: os.close(self._open(name, flags)))

    def _write(self) -> Step | None:
        found = self._a_file()
        if found is None:
            return None
        name, number, node = found
        size = len(node.content)
        at = size if self._chance.random() < 0.4 else self._chance.randrange(size + 5000)
        data = self._bytes(min(at, _LARGEST - 1))
        at = min(at, _LARGEST - len(data))
        content = _written(node.content, at, data)

        def do() -> None:
            fd = self._open(name, os.O_WRONLY)
            try:
                if os.pwrite(fd, data, at) != len(data):
                    raise OSError(errno.ENOSPC, "a short write")
            finally:
                os.close(fd)

        after = self._tree.with_node(number, node._replace(content=content))
        return Step(f"write {name} {at}+{len(data)}", after, do, torn=number)

    def _overwritten(self) -> tuple[str, int, int, bytes, Tree] | None:
        """Draw a file, and bytes that lie inside it."""
        found = self._a_file()
        if found is None or not found[2].content:
            return None
        name, number, node = found
        at = self._chance.randrange(len(node.content))
        data = self._bytes(at)[: len(node.content) - at]
        content = _written(node.content, at, data)
        return name, number, at, data, self._tree.with_node(number, node._replace(content=content))

    def _write_mapped(self) -> Step | None:
        drawn = self._overwritten()
        if drawn is None:
            return None
        name, number, at, data, after = drawn

        def do() -> None:
            fd = self._open(name, os.O_RDWR)
            try:
                with mmap.mmap(fd, 0) as mapped:
                    # a page that can't be read in would be SIGBUS; like this it is an error
                    mapped.madvise(MADV_POPULATE_WRITE)
                    mapped[at : at + len(data)] = data
                    mapped.flush()
            finally:
                os.close(fd)

        where = f"{name} {at}+{len(data)}"
        return Step(f"write mapped {where}", after, do, torn=number, durable=True)

    def _write_window(self) -> Step | None:
        drawn = self._overwritten()
        if drawn is None:
            return None
        name, number, at, data, after = drawn
        path = f"/proc/self/fd/{self.directory}/{name}"

        def do() -> None:
            with vfsmap.map(path, writable=True, direct=True) as window:
                window.view()[at : at + len(data)] = data
                window.persist(at, len(data))

        where = f"{name} {at}+{len(data)}"
        return Step(f"write window {where}", after, do, torn=number, durable=True)

    def _truncate(self) -> Step | None:
        found = self._a_file()
        if found is None:
            return None
        name, number, node = found
        size = self._chance.randrange(2 * len(node.content) + 5000) % _LARGEST
        content = node.content[:size].ljust(size, b"\0")

        def do() -> None:
            fd = self._open(name, os.O_WRONLY)
            try:
                os.ftruncate(fd, size)
            finally:
                os.close(fd)

        after = self._tree.with_node(number, node._replace(content=content))
        return Step(f"truncate {name} {size}", after, do)

    def _fsync(self) -> Step | None:
        names = [*self._of_kind(stat.S_IFREG), *self._of_kind(stat.S_IFDIR)]
        name = self._chance.choice([".", *names])

        def do() -> None:
            fd = self._open(name, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

        return Step(f"fsync {name}", self._tree, do, durable=True)

    def _rename(self) -> Step | None:
        movable = [*self._of_kind(stat.S_IFREG), *self._of_kind(stat.S_IFLNK)]
        if not movable:
            return None
        old = self._chance.choice(movable)
        new = self._new_name() if self._chance.random() < 0.5 else self._chance.choice(movable)
        if new is None or self._tree.names[old] == self._tree.names.get(new):
            return None
        names = {**self._tree.names, new: self._tree.names[old]}
        del names[old]
        after = self._tree.with_names(names)
        return Step(f"rename {old} {new}", after, lambda: self._do_rename(old, new))

    def _do_rename(self, old: str, new: str) -> None:
        os.rename(old, new, src_dir_fd=self.directory, dst_dir_fd=self.directory)

    def _move_directory(self) -> Step | None:
        folders = self._of_kind(stat.S_IFDIR)
        new = self._chance.choice(_DIRECTORIES)
        if not folders or new in self._tree.names:
            return None
        old = self._chance.choice(folders)
        names = {
            new + name[len(old) :] if f"{name}/".startswith(f"{old}/") else name: number
            for name, number in self._tree.names.items()
        }
        after = Tree(names, self._tree.nodes)
        return Step(f"rename {old} {new}", after, lambda: self._do_rename(old, new))

    def _unlink(self) -> Step | None:
        files = [*self._of_kind(stat.S_IFREG), *self._of_kind(stat.S_IFLNK)]
        if len(files) < 4:
            return None
        name = self._chance.choice(files)
        return Step(f"unlink {name}", self._without(name), lambda: self._do_unlink(name))

    def _unlink_open(self) -> Step | None:
        found = self._a_file()
        if found is None:
            return None
        name, end, data = found[0], len(found[2].content), self._bytes(0)

        def do() -> None:
            fd = self._open(name, os.O_RDWR)
            try:
                self._do_unlink(name)
                os.pwrite(fd, data, end)  # what lies before might show if the name is back
            finally:
                os.close(fd)

        # what other names it has shows the write
        if list(self._tree.names.values()).count(found[1]) > 1:
            return None
        # and so does what lay there, if a cut that is not durable is undone
        nodes = [tree.nodes[found[1]] for tree in self._trees if found[1] in tree.nodes]
        if max(len(node.content) for node in nodes) > end:
            return None
        return Step(f"unlink open {name}", self._without(name), do)

    def _do_unlink(self, name: str) -> None:
        os.unlink(name, dir_fd=self.directory)

    def _without(self, name: str) -> Tree:
        names = dict(self._tree.names)
        del names[name]
        return self._tree.with_names(names)

    def _link(self) -> Step | None:
        found, new = self._a_file(), self._new_name()
        if found is None or new is None:
            return None
        old = found[0]
        after = Tree({**self._tree.names, new: found[1]}, self._tree.nodes)
        at = self.directory
        return Step(
            f"link {old} {new}", after, lambda: os.link(old, new, src_dir_fd=at, dst_dir_fd=at)
        )

    def _symlink(self) -> Step | None:
        name = self._new_name()
        if name is None:
            return None
        target = "x" * self._chance.randrange(1, 300)
        after = self._with_new(name, Node(stat.S_IFLNK | 0o777, target.encode()))
        return Step(
            f"symlink {name}", after, lambda: os.symlink(target, name, dir_fd=self.directory)
        )

    def _mkdir(self) -> Step | None:
        name = self._chance.choice(_DIRECTORIES)
        if name in self._tree.names:
            return None
        after = self._with_new(name, Node(stat.S_IFDIR | 0o755))
        return Step(f"mkdir {name}", after, lambda: os.mkdir(name, 0o755, dir_fd=self.directory))

    def _rmdir(self) -> Step | None:
        names = self._tree.names
        empty = [
            folder
            for folder in self._of_kind(stat.S_IFDIR)
            if not any(name.startswith(f"{folder}/") for name in names)
        ]
        if not empty:
            return None
        name = self._chance.choice(empty)
        after = self._without(name)
        return Step(f"rmdir {name}", after, lambda: os.rmdir(name, dir_fd=self.directory))

    def _note(self) -> Step | None:
        found = self._a_file()
        if found is None:
            return None
        name, number, node = found
        note = self._chance.randbytes(self._chance.choice((0, 10, 200)))
        after = self._tree.with_node(number, node._replace(note=note))
        path = f"/proc/self/fd/{self.directory}/{name}"
        return Step(f"setxattr {name}", after, lambda: os.setxattr(path, NOTE, note))

    def _chmod(self) -> Step | None:
        found = self._a_file()
        if found is None:
            return None
        name, number, node = found
        mode = self._chance.choice((0o600, 0o640, 0o755))
        after = self._tree.with_node(number, node._replace(mode=stat.S_IFREG | mode))
        return Step(f"chmod {name}", after, lambda: os.chmod(name, mode, dir_fd=self.directory))


def _written(content: bytes, at: int, data: bytes) -> bytes:
    return content[:at].ljust(at, b"\0") + data + content[at + len(data) :]


def write_until_gone(writer: Writer, *, by_fsync: bool) -> Record:
    """Write until the mount's server is gone.

    Raises:
        OSError, VfsmapError: an operation failed, and the server is there still.
    """
    while True:
        try:
            writer.step(by_fsync=by_fsync)
        except (OSError, VfsmapError):
            if _is_alive(writer.directory):
                raise
            return writer.record()


def _is_alive(directory: int) -> bool:
    try:
        os.statvfs(directory)
    except OSError as exc:
        return exc.errno not in _GONE
    return True
