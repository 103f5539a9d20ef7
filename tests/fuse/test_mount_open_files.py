"""Open files on a real mount: without a name, shared, locked, and opened in every way."""

import errno
import fcntl
import os
import select
from pathlib import Path

import pytest

from vfsmap.testing.posix import refused


def test_an_unlinked_open_file_lives_until_it_is_closed(here: Path) -> None:
    free = os.statvfs(".").f_bfree
    with Path("it").open("w+b") as file:
        file.write(b"x" * 100_000)
        file.flush()
        os.unlink("it")
        assert os.listdir() == []
        assert os.fstat(file.fileno()).st_nlink == 0
        file.write(b"y" * 100_000)
        file.seek(0)
        assert file.read() == b"x" * 100_000 + b"y" * 100_000
        os.fchmod(file.fileno(), 0o600)
        os.ftruncate(file.fileno(), 10)
        assert os.fstat(file.fileno()).st_size == 10
    assert free - os.statvfs(".").f_bfree <= 1


def test_a_file_replaced_by_rename_stays_readable_where_it_is_open(here: Path) -> None:
    Path("old").write_bytes(b"old")
    Path("new").write_bytes(b"new")
    with Path("old").open("rb") as file:
        os.rename("new", "old")
        assert file.read() == b"old"
        assert os.fstat(file.fileno()).st_nlink == 0
    assert Path("old").read_bytes() == b"new"


def test_a_path_descriptor_keeps_an_unlinked_file(here: Path) -> None:
    Path("it").write_bytes(b"text")
    fd = os.open("it", os.O_PATH)
    os.unlink("it")
    assert os.fstat(fd).st_size == 4
    with Path(f"/proc/self/fd/{fd}").open("rb") as again:
        assert again.read() == b"text"
    os.close(fd)


def test_a_removed_directory_stays_usable_as_the_current_one_but_takes_no_names(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkdir("dir")
    monkeypatch.chdir("dir")
    os.rmdir("../dir")
    assert os.stat(".").st_nlink == 0
    assert os.listdir(".") == []
    with refused(errno.ENOENT):
        Path("file").touch()
    with refused(errno.ENOENT):
        os.mkdir("x")
    with refused(errno.ENOENT):
        os.symlink("x", "y")


def test_an_unlinked_file_can_be_given_no_new_name(here: Path) -> None:
    with Path("it").open("wb") as file:
        os.unlink("it")
        directory = os.open(".", os.O_RDONLY)  # with one, Python calls linkat(), which can follow
        with refused(errno.ENOENT):
            os.link(f"/proc/self/fd/{file.fileno()}", "again", src_dir_fd=directory)
        os.close(directory)


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC])
def test_a_directory_can_not_be_opened_for_writing(here: Path, flags: int) -> None:
    os.mkdir("dir")
    with refused(errno.EISDIR):
        os.close(os.open("dir", flags))
    with refused(errno.EISDIR):
        os.close(os.open("dir", flags | os.O_CREAT))


def test_only_a_directory_can_be_opened_as_one(here: Path) -> None:
    Path("file").touch()
    with refused(errno.ENOTDIR):
        os.close(os.open("file", os.O_RDONLY | os.O_DIRECTORY))
    with refused(errno.ENOTDIR):
        os.stat("file/")
    fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
    with refused(errno.EISDIR):
        os.read(fd, 1)
    with refused(errno.EBADF):
        os.write(fd, b"x")
    os.close(fd)


def test_a_descriptor_allows_only_what_it_was_opened_for(here: Path) -> None:
    Path("it").write_bytes(b"x")
    fd = os.open("it", os.O_RDONLY)
    with refused(errno.EBADF):
        os.write(fd, b"y")
    with refused(errno.EINVAL, errno.EBADF):
        os.ftruncate(fd, 0)
    os.close(fd)
    fd = os.open("it", os.O_WRONLY)
    with refused(errno.EBADF):
        os.read(fd, 1)
    os.close(fd)


def test_truncating_at_open_empties_the_file_and_keeps_the_inode(here: Path) -> None:
    Path("it").write_bytes(b"x" * 10_000)
    ino = os.stat("it").st_ino
    os.utime("it", (1, 1))
    os.close(os.open("it", os.O_WRONLY | os.O_TRUNC))
    found = os.stat("it")
    assert (found.st_size, found.st_blocks, found.st_ino) == (0, 0, ino)
    assert found.st_mtime > 1


def test_creating_at_open_keeps_what_is_there(here: Path) -> None:
    Path("it").write_bytes(b"text")
    fd = os.open("it", os.O_RDWR | os.O_CREAT, 0o600)
    assert os.read(fd, 10) == b"text"
    os.close(fd)
    with refused(errno.ENOENT):
        os.close(os.open("missing/it", os.O_RDWR | os.O_CREAT))


def test_a_file_made_read_only_can_be_written_by_the_one_who_made_it(here: Path) -> None:
    fd = os.open("it", os.O_WRONLY | os.O_CREAT, 0o400)
    assert os.write(fd, b"text") == 4
    os.close(fd)
    assert Path("it").read_bytes() == b"text"


def test_whole_file_locks_exclude_each_other(here: Path) -> None:
    with Path("it").open("w") as one, Path("it").open("w") as other:
        fcntl.flock(one, fcntl.LOCK_SH)
        fcntl.flock(other, fcntl.LOCK_SH)
        with refused(errno.EWOULDBLOCK):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(one, fcntl.LOCK_UN)
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_record_locks_exclude_other_processes(here: Path) -> None:
    with Path("it").open("w+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX, 10, 0)
        child = os.fork()
        if child == 0:
            status = 1
            with Path("it").open("r+b") as mine:
                fcntl.lockf(mine, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 10)
                try:
                    fcntl.lockf(mine, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 5)
                except OSError:
                    status = 0
            os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_regular_file_is_always_ready(here: Path) -> None:
    with Path("it").open("w+b") as file:
        readable, writable, _ = select.select([file], [file], [], 0)
        assert (readable, writable) == ([file], [file])


def test_a_program_on_the_mount_can_be_run(here: Path) -> None:
    Path("program").write_text("#!/bin/sh\nexit 7\n")
    os.chmod("program", 0o755)
    assert os.waitstatus_to_exitcode(os.system("./program")) == 7
    os.chmod("program", 0o644)
    with refused(errno.EACCES):
        os.execv("./program", ["./program"])


def test_a_running_program_can_not_be_written(here: Path) -> None:
    Path("sleep").write_bytes(Path("/bin/sleep").read_bytes())
    os.chmod("sleep", 0o755)
    child = os.posix_spawn("./sleep", ["sleep", "60"], {})
    try:
        with refused(errno.ETXTBSY):
            os.close(os.open("sleep", os.O_WRONLY))
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
