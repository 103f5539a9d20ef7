"""Followed mounts beside a real writer: what is finished there shows here within a second."""

import errno
import mmap
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

import vfsmap
from vfsmap.errors import Invalid, Unsupported
from vfsmap.pmem import lock_holder
from vfsmap.pool import Pool
from vfsmap.testing.commands import Server, served_pool
from vfsmap.testing.commands import vfsmap as command
from vfsmap.testing.media import ext4_loop, hugetlbfs, tmpfs
from vfsmap.units import MIB
from vfsmap_tools.mounts import find_mount

WITHIN = 1.0
"""Seconds within which a follower shows what its writer has finished."""


class Pair:
    """A pool that a server writes, and a mount that follows it."""

    def __init__(self, writer: Server, follower: Path) -> None:
        self.writer = writer
        self.there = writer.directory
        self.here = follower
        self.slowest = 0.0

    def follow(self) -> None:
        command("mount", "--follow", self.writer.pool, self.here, "--log", f"{self.here}.log")

    def unfollow(self) -> None:
        if find_mount(self.here):
            command("umount", self.here)

    def shows(self, condition: Callable[[], object], within: float = WITHIN) -> None:
        """Check that a condition comes to hold on the follower soon enough."""
        begin = time.monotonic()
        while True:
            with suppress(OSError):
                if condition():
                    break
            took = time.monotonic() - begin
            assert took < within, "the follower does not show it"
        self.slowest = max(self.slowest, time.monotonic() - begin)

    def has(self, name: str, content: bytes, within: float = WITHIN) -> None:
        """Write a file on the writer's mount, and check that the follower shows it."""
        (self.there / name).write_bytes(content)
        self.shows(partial(self.holds, name, content), within)

    def holds(self, name: str, content: bytes) -> bool:
        return (self.here / name).read_bytes() == content

    def lists(self, names: list[str]) -> bool:
        return sorted(os.listdir(self.here)) == sorted(names)

    def lists_more_than(self, count: int) -> bool:
        return len(os.listdir(self.here)) > count

    @property
    def epoch(self) -> int:
        """How often the superblock was written: each change of halves does."""
        with Pool.open(self.writer.pool, "r") as pool:
            return int(pool.journal.superblock.epoch)


@contextmanager
def paired(medium: Path, size: str = "128M") -> Iterator[Pair]:
    with served_pool(medium, size) as writer:
        here = medium / "here"
        here.mkdir()
        pair = Pair(writer, here)
        pair.follow()
        try:
            yield pair
        finally:
            pair.unfollow()
        log = Path(f"{here}.log").read_text()
        assert "ERROR" not in log, log


@pytest.fixture(scope="module")
def shared() -> Iterator[Pair]:
    with tmpfs(size="1G") as medium, paired(medium) as pair:
        yield pair


@pytest.fixture
def pair(shared: Pair) -> Pair:
    """A pool without files, served and followed."""
    for mounted, mount in (
        (shared.there, shared.writer.mount),
        (shared.here, shared.follow),
    ):
        if not find_mount(mounted):
            mount()
    for path in shared.there.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    shared.shows(lambda: not os.listdir(shared.here))
    shared.slowest = 0
    return shared


def followers(pool: Path) -> list[str]:
    """Return the numbers of the processes that follow a pool."""
    found = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = process.read_bytes().split(b"\0")
            if os.fsencode(pool) in words and b"follow" in b",".join(words):
                found.append(process.parent.name)
    return found


def is_stale(call: Callable[[], object]) -> bool:
    try:
        call()
    except OSError as exc:
        return exc.errno == errno.ESTALE
    return False


@contextmanager
def churn(pair: Pair, code: str) -> Iterator[None]:
    """Have another process do something over and over on the writer's mount."""
    program = f"import os\nn = 0\nprint(flush=True)\nwhile True:\n    n += 1\n    {code}\n"
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=pair.there, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield
            assert process.poll() is None
        finally:
            process.kill()


MANY_FILES = "open(f'f{n % 7000}', 'w').close() if n < 9000 else os.utime('f1', ns=(n, n))"


def test_each_operation_of_the_writer_shows_within_a_second(pair: Pair) -> None:
    there, here = pair.there, pair.here
    pair.has("file", b"first")
    pair.has("file", b"overwritten, and longer than it was before")
    with (there / "file").open("r+b") as file:
        file.write(b"OVER")
    pair.shows(lambda: (here / "file").read_bytes().startswith(b"OVERwritten"))
    os.truncate(there / "file", 4)
    pair.shows(lambda: (here / "file").read_bytes() == b"OVER")
    os.truncate(there / "file", 100_000)
    pair.shows(lambda: (here / "file").read_bytes() == b"OVER" + bytes(99_996))
    assert not (here / "dir").exists()  # the kernel remembers that
    (there / "dir").mkdir()
    pair.shows((here / "dir").is_dir)
    (there / "file").rename(there / "dir/moved")
    pair.shows(lambda: os.listdir(here / "dir") == ["moved"] and not (here / "file").exists())
    (there / "dir/second").hardlink_to(there / "dir/moved")
    pair.shows(lambda: (here / "dir/second").stat().st_nlink == 2)
    (there / "link").symlink_to("dir/second")
    pair.shows(lambda: (here / "link").stat().st_size == 100_000)
    (there / "dir/second").chmod(0o640)
    pair.shows(lambda: (here / "link").stat().st_mode & 0o777 == 0o640)
    os.utime(there / "dir/moved", ns=(1, 1_234_567_890_123_456_789))
    pair.shows(lambda: (here / "link").stat().st_mtime_ns == 1_234_567_890_123_456_789)
    os.setxattr(there / "dir", "user.name", b"value")
    pair.shows(lambda: os.getxattr(here / "dir", "user.name") == b"value")
    os.removexattr(there / "dir", "user.name")
    pair.shows(lambda: os.listxattr(here / "dir") == [])
    os.setxattr(there / "dir/moved", "user.vfsmap.seal", b"1")
    digest = os.getxattr(there / "dir/moved", "user.vfsmap.seal")
    pair.shows(lambda: os.getxattr(here / "dir/moved", "user.vfsmap.seal") == digest)
    (there / "link").unlink()
    pair.shows(lambda: not os.path.lexists(here / "link"))
    for name in ("moved", "second"):
        (there / "dir" / name).unlink()
    (there / "dir").rmdir()
    pair.shows(lambda: os.listdir(here) == [])
    pair.shows(lambda: os.statvfs(here).f_bfree == os.statvfs(there).f_bfree)


def test_pages_that_were_mapped_on_the_follower_show_what_is_stored_later(pair: Pair) -> None:
    pair.has("file", b"a" * 10_000)
    with (pair.here / "file").open("rb") as file, mmap.mmap(file.fileno(), 0, prot=1) as mapped:
        assert mapped[:10_000] == b"a" * 10_000
        with (pair.there / "file").open("r+b") as writer:
            writer.write(b"b" * 10_000)
        pair.shows(lambda: mapped[:10_000] == b"b" * 10_000)
        with vfsmap.map(pair.there / "file", writable=True) as window:
            window.view()[:3] = b"new"
            window.publish()
            pair.shows(lambda: mapped[:3] == b"new")


def test_an_open_file_that_the_writer_has_deleted_is_stale(pair: Pair) -> None:
    pair.has("file", b"content")
    with (pair.here / "file").open("rb", buffering=0) as file:
        (pair.there / "file").unlink()
        pair.shows(lambda: not (pair.here / "file").exists())
        pair.shows(lambda: is_stale(lambda: os.fstat(file.fileno())))
        assert is_stale(lambda: os.pread(file.fileno(), 1, 1 << 20))


def test_compactions_are_followed(pair: Pair) -> None:
    pair.has("marker", b"0")
    epoch = pair.epoch
    with churn(pair, "os.utime('marker', ns=(n, n))"):
        number = 0
        while pair.epoch < epoch + 3:
            number += 1
            pair.has(f"m{number % 5}", b"%d" % number)
    print(f"slowest of {number}: {pair.slowest:.3f} s")


def test_a_log_that_moves_to_larger_halves_is_followed(pair: Pair) -> None:
    with Pool.open(pair.writer.pool, "r") as pool:
        halves = pool.journal.halves
    with churn(pair, MANY_FILES):
        number = 0
        while True:
            number += 1
            pair.has(f"m{number % 5}", b"%d" % number)
            with Pool.open(pair.writer.pool, "r") as pool:
                if pool.journal.halves[0].length > halves[0].length:
                    break
    count = len(os.listdir(pair.there))
    pair.shows(lambda: len(os.listdir(pair.here)) == count)
    print(f"slowest of {number}: {pair.slowest:.3f} s")


def test_under_load_every_finished_operation_shows_within_a_second(pair: Pair) -> None:
    with (
        churn(pair, "open(f'a{n % 500}', 'wb').write(bytes(n % 50_000))"),
        churn(pair, "open(f'b{n % 50}', 'wb').write(bytes(1_000_000)); os.unlink(f'b{n % 50}')"),
    ):
        for number in range(100):
            pair.has(f"m{number % 5}", b"%d" % number)
    print(f"slowest of 100: {pair.slowest:.3f} s")


def test_a_reader_never_sees_bytes_of_another_file(pair: Pair) -> None:
    """Files full of their own number come and go; the pool is so small that space is reused."""
    code = (
        "name = b'%07d' % n; f = open(b'f' + name, 'wb'); f.write((name + b' ') * 40_000);"
        " f.close(); os.unlink(b'f%07d' % (n - 20)) if n > 20 else 0"
    )
    read = 0
    end = time.monotonic() + 5
    with churn(pair, code):
        while time.monotonic() < end:
            for name in os.listdir(pair.here):
                try:
                    content = (pair.here / name).read_bytes()
                except OSError as exc:  # deleted meanwhile
                    gone = exc.errno in (errno.ENOENT, errno.ESTALE)
                    content = b"" if gone else str(exc).encode()
                own = name[1:].encode() + b" "
                assert content == (own * 40_000)[: len(content)], name
                read += bool(content)
    assert read > 50


def test_a_writer_that_is_killed_and_comes_back_is_followed(pair: Pair) -> None:
    pair.has("before", b"1")
    with (pair.there / "orphan").open("wb") as orphan:
        orphan.write(b"x" * 100_000)
        orphan.flush()
        (pair.there / "orphan").unlink()
        (pair.there / "last").write_bytes(b"2")
        pair.writer.kill()
    pair.shows(lambda: (pair.here / "last").read_bytes() == b"2")
    pair.writer.mount()
    pair.has("after", b"3")
    assert sorted(os.listdir(pair.here)) == ["after", "before", "last"]
    pair.shows(lambda: os.statvfs(pair.here).f_bfree == os.statvfs(pair.there).f_bfree)


def test_a_writer_that_is_killed_in_the_middle_of_its_work_is_followed(pair: Pair) -> None:
    for round_ in range(2):
        followed = False
        # the one that churns fails when the writer is killed
        with suppress(AssertionError), churn(pair, "open(f'f{n % 2000}', 'wb').write(b'%d' % n)"):
            wanted = len(os.listdir(pair.here)) + 30
            pair.shows(partial(pair.lists_more_than, wanted), within=10)
            followed = True
            pair.writer.kill()
        assert followed
        pair.writer.mount()
        pair.has("after", b"%d" % round_)
        names = os.listdir(pair.there)
        pair.shows(partial(pair.lists, names))
        for name in names[:200]:
            assert (pair.here / name).read_bytes() == (pair.there / name).read_bytes()


def test_a_follower_that_was_remounted_for_writing_refuses_to_write_and_goes_on(
    pair: Pair,
) -> None:
    pair.has("file", b"1")
    subprocess.run(["mount", "-i", "-o", "remount,rw", pair.here], check=True)
    for flags in (os.O_WRONLY, os.O_RDWR):
        fd = os.open(pair.here / "file", flags)
        with pytest.raises(OSError, match="Read-only"):
            os.write(fd, b"2")
        os.close(fd)
    pair.has("file", b"3")
    assert followers(pair.writer.pool)
    log = Path(f"{pair.here}.log")
    before = log.read_text()
    fd = os.open(pair.here / "file", os.O_WRONLY)
    subprocess.run(["umount", "-i", "-f", "-l", pair.here], check=True)
    with suppress(OSError):
        os.close(fd)
    pair.shows(lambda: not followers(pair.writer.pool), within=10)
    assert log.read_text() == before


def test_a_pool_that_is_made_larger_is_followed(pair: Pair) -> None:
    pair.has("before", b"1")
    pair.writer.unmount()
    command("resize", pair.writer.pool, "192M")
    pair.writer.mount()
    content = os.urandom(MIB) * 140
    pair.has("large", content, within=5)
    assert os.statvfs(pair.here).f_blocks == os.statvfs(pair.there).f_blocks


def test_the_follower_holds_no_lock_and_the_writer_need_not_be_there(pair: Pair) -> None:
    pair.has("file", b"1")
    pair.writer.unmount()
    assert lock_holder(pair.writer.pool) is None
    assert (pair.here / "file").read_bytes() == b"1"
    pair.unfollow()
    pair.follow()
    assert (pair.here / "file").read_bytes() == b"1"
    pair.writer.mount()
    pair.has("file", b"2")
    pair.unfollow()  # at once, though the writer goes on
    assert pair.writer.pid
    pair.follow()


def test_nothing_is_written_through_a_follower(pair: Pair) -> None:
    pair.has("file", b"1")
    for change in (
        lambda: (pair.here / "file").write_bytes(b"2"),
        lambda: (pair.here / "new").touch(),
        lambda: (pair.here / "file").unlink(),
        lambda: (pair.here / "file").chmod(0o777),
        lambda: os.setxattr(pair.here / "file", "user.vfsmap.seal", b"1"),
    ):
        with pytest.raises(OSError, match="Read-only file system"):
            change()


def test_a_follower_maps_no_bytes_of_the_pool(pair: Pair) -> None:
    pair.has("file", b"x" * 5 * MIB)
    with pytest.raises(Unsupported, match="follows another process"):
        vfsmap.map(pair.here / "file", direct=True)
    with vfsmap.map(pair.here / "file") as window:
        assert not window.direct
        assert bytes(window.view()[:3]) == b"xxx"
    refused = command("leases", pair.here, check=False)
    assert refused.returncode == Invalid.exit_code
    assert "follows another process" in refused.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [(("--socket", "/run/x"), "leave --socket"), (("-o", "writeback"), "leave writeback out")],
)
def test_options_that_make_no_sense_are_refused(
    pair: Pair, options: tuple[str, str], words: str
) -> None:
    pair.unfollow()
    refused = command("mount", "--follow", pair.writer.pool, pair.here, *options, check=False)
    assert refused.returncode == Invalid.exit_code
    assert words in refused.stderr
    pair.follow()


def test_a_pool_on_hugetlbfs_is_followed() -> None:
    with hugetlbfs(pages=80) as medium, paired(medium, "128M") as pair:
        pair.has("file", b"1" * 3 * MIB)
        (pair.there / "file").unlink()
        pair.has("file", b"2" * 3 * MIB)


def test_a_pool_on_a_disk_is_followed_as_it_is_synced() -> None:
    with ext4_loop() as medium, paired(medium) as pair:
        for number in range(3):
            content = b"%d" % number * 100_000
            with (pair.there / "file").open("wb") as file:
                file.write(content)
                os.fsync(file.fileno())
            pair.shows(partial(pair.holds, "file", content))
