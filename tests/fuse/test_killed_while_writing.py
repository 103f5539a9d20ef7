"""A real mount whose server is killed under eight writers; the whole is ``make test-kill``."""

import errno
import mmap
import os
import stat

import pytest

from vfsmap.testing.commands import served_pool
from vfsmap.testing.killing import MEDIA, opened, run
from vfsmap.testing.media import ext4_loop, tmpfs
from vfsmap.testing.posix import refused
from vfsmap.testing.trees import Node, Record, Tree, observe
from vfsmap.testing.writing import Writer
from vfsmap.units import PTE

FILE = stat.S_IFREG | 0o600


@pytest.mark.parametrize("medium", MEDIA)
def test_what_was_finished_is_there_after_every_kill_and_nothing_else_is_left(medium: str) -> None:
    tally = run(medium, seed=1000, rounds=3)
    assert tally.failures == []
    assert tally.rounds == 3
    assert tally.operations > 0


@pytest.mark.parametrize("flags", [os.O_SYNC, os.O_DSYNC, os.O_DSYNC | os.O_DIRECT])
@pytest.mark.parametrize("access", [os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_APPEND])
def test_a_synchronous_write_is_there_after_a_kill_however_the_file_was_opened(
    access: int, flags: int
) -> None:
    with (
        ext4_loop("64M") as place,
        served_pool(place, "32M") as server,
        mmap.mmap(-1, PTE.size) as page,
    ):
        page.write(b"written")
        path = server.directory / "it"
        fd = os.open(path, os.O_CREAT | access | flags)
        assert os.write(fd, page) == PTE.size
        server.kill()
        with refused(errno.ENOTCONN, errno.ECONNABORTED):
            os.close(fd)
        server.mount()
        assert path.read_bytes() == page[:]


@pytest.mark.parametrize("access", [os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_APPEND])
@pytest.mark.parametrize("how", ["-o sync", "RWF_DSYNC"])
def test_a_write_that_the_mount_or_the_call_makes_synchronous_is_there_after_a_kill(
    access: int, how: str
) -> None:
    options = ("-o", "sync") if how == "-o sync" else ()
    with ext4_loop("64M") as place, served_pool(place, "32M", *options) as server:
        path = server.directory / "it"
        fd = os.open(path, os.O_CREAT | access)
        flags = 0 if options else os.RWF_DSYNC
        assert os.pwritev(fd, [b"written"], 0, flags) == 7
        server.kill()
        with refused(errno.ENOTCONN, errno.ECONNABORTED):
            os.close(fd)
        server.mount()
        assert path.read_bytes() == b"written"


def tree(**contents: bytes) -> Tree:
    """Return a tree of files with these contents; a file's number is its name's first byte."""
    names = {name: ord(name[0]) for name in contents}
    return Tree(names, {names[n]: Node(FILE, content) for n, content in contents.items()})


BEFORE, AFTER = tree(a=b"aaaa", b=b"b"), tree(a=b"aaAAAA", b=b"b")
WRITING = Record([BEFORE, AFTER], [("write a", ord("a"))], finished=0, total=1)
WRITTEN = WRITING._replace(finished=1)


@pytest.mark.parametrize("content", [b"aaaa", b"aaAAAA", b"aaAA", b"aaAa", b"aaAAA"])
def test_a_write_that_was_under_way_may_be_there_in_part(content: bytes) -> None:
    assert WRITING.complaint(tree(a=content, b=b"b"), by_fsync=False) is None


@pytest.mark.parametrize("by_fsync", [False, True])
@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (tree(a=b"aa", b=b"b"), "2 bytes"),
        (tree(a=b"aaAAAAA", b=b"b"), "7 bytes"),
        (tree(a=b"aaxA", b=b"b"), "nobody wrote"),
        (tree(a=b"aaAA", b=b"x"), "nobody wrote"),
        (tree(a=b"aaaa"), "names"),
        (tree(a=b"aaaa", b=b"b", c=b""), "names"),
        (Tree({"a": 97, "b": 97}, {97: Node(FILE, b"aaaa")}), "another file's name"),
        (tree(a=b"aaaa", b=b"b").with_node(98, Node(FILE, b"b", b"note")), "attribute"),
    ],
)
def test_whatever_else_is_found_is_a_loss(found: Tree, reason: str, by_fsync: bool) -> None:
    assert reason in (WRITING.complaint(found, by_fsync=by_fsync) or "")


def test_a_write_that_has_ended_is_there_unless_only_fsync_promises_it() -> None:
    assert WRITTEN.complaint(AFTER, by_fsync=False) is None
    assert "4 bytes" in (WRITTEN.complaint(BEFORE, by_fsync=False) or "")
    assert WRITTEN.complaint(BEFORE, by_fsync=True) is None
    fsynced = Record([AFTER], [], finished=0, total=1)
    assert fsynced.complaint(BEFORE, by_fsync=True) is not None


def test_a_writer_knows_what_it_did() -> None:
    with tmpfs(size="80M") as place, served_pool(place, "64M"), opened(place / "mnt") as fd:
        for seed in range(3):
            writer = Writer(fd, seed)
            for _ in range(5):
                for _ in range(20):
                    writer.step(by_fsync=False)
                assert writer.record().complaint(observe(fd), by_fsync=False) is None


def test_a_writer_writes_to_no_unlinked_file_whose_cut_a_crash_may_undo() -> None:
    unlinked = "unlink open "
    with tmpfs(size="80M") as place, served_pool(place, "64M"), opened(place / "mnt") as fd:
        for seed in range(8):
            writer = Writer(fd, seed)
            for _ in range(60):
                writer.step(by_fsync=True)
                trees, steps, *_ = writer.record()
                if not steps or not (name := steps[-1][0]).startswith(unlinked):
                    continue
                node = trees[-2].names[name.removeprefix(unlinked)]
                sizes = [len(t.nodes[node].content) for t in trees[:-1] if node in t.nodes]
                assert max(sizes) == sizes[-1]
