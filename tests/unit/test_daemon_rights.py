"""Who may do what, and which file a call names."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vfsmap.daemon import files
from vfsmap.daemon.client import Client
from vfsmap.errors import (
    Busy,
    Denied,
    Invalid,
    IsADirectory,
    NameTooLong,
    NotADirectory,
    NotFound,
    ProtocolError,
    Untrusted,
)
from vfsmap.fs import ROOT, FileSystem
from vfsmap.testing.daemon import (
    Daemon,
    FakeMount,
    close_all,
    daemon,
    make,
    map_it,
    pattern,
)
from vfsmap.testing.users import as_user
from vfsmap.units import KIB, MIB

NOBODY = 65534


@pytest.fixture
def mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeMount:
    (tmp_path / "mount").mkdir()
    made = FakeMount(tmp_path / "mount")
    monkeypatch.setattr(files, "statx_nosync", made.statx_nosync)
    return made


@contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags)
    yield fd
    os.close(fd)


def call_as_stranger(path: Path) -> list[str]:
    refused = []
    with Client(path) as client:
        assert client.call("GetInfo")[0]["trusted"] is False
        for method, parameters in (
            ("Map", {"path": "/file"}),
            ("Extents", {"path": "/file"}),
            ("Allocate", {"path": "/file", "length": 4096}),
            ("Seal", {"path": "/file"}),
            ("Leases", {}),
            ("Stats", {}),
        ):
            with pytest.raises(Untrusted, match="user 65534 is not trusted"):
                client.call(method, **parameters)
            refused.append(method)
        for method in ("Release", "Publish"):
            with pytest.raises(NotFound):
                client.call(method, lease=1)
        with pytest.raises(Untrusted):
            next(client.events())
    return refused


def test_who_is_not_trusted_may_ask_for_the_info_and_no_more(
    fs: FileSystem, served: Daemon, tmp_path: Path
) -> None:
    served.run(make, fs, b"file", pattern(8 * KIB))
    with served.client() as client:
        map_it(client, path="/file")
        open_the_way(tmp_path)
        assert len(as_user(NOBODY, call_as_stranger, served.socket)) == 6


def open_the_way(path: Path) -> None:
    for directory in (path, *path.parents[:3]):
        if directory.stat().st_uid == os.geteuid() and directory != Path("/"):
            directory.chmod(directory.stat().st_mode | 0o011)


def am_i_trusted(path: Path) -> bool:
    with Client(path) as client:
        trusted: bool = client.call("GetInfo")[0]["trusted"]
        return trusted


def test_members_of_the_group_are_trusted_where_there_is_a_mount(
    fs: FileSystem, tmp_path: Path
) -> None:
    open_the_way(tmp_path)
    with daemon(fs, tmp_path / "s", group="daemon", mount_device=FakeMount.DEVICE) as running:
        assert as_user(NOBODY, am_i_trusted, running.socket, groups=(1,)) is True
        assert as_user(NOBODY, am_i_trusted, running.socket, groups=(2,)) is False
    # without one, nobody has checked what they may read
    with daemon(fs, tmp_path / "s", group="daemon") as running:
        assert as_user(NOBODY, am_i_trusted, running.socket, groups=(1,)) is False


def test_the_pools_owner_is_trusted(fs: FileSystem, tmp_path: Path) -> None:
    open_the_way(tmp_path)
    os.chown(fs.pool.path, 12345, 12345)
    with daemon(fs, tmp_path / "s") as running:
        assert as_user(12345, am_i_trusted, running.socket) is True
        assert as_user(NOBODY, am_i_trusted, running.socket) is False


def test_a_group_that_does_not_exist_is_said_at_once(fs: FileSystem, tmp_path: Path) -> None:
    with (
        pytest.raises(Invalid, match="there is no group 'no-such-group'"),
        daemon(fs, tmp_path / "s", group="no-such-group"),
    ):
        pass


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/dir/file", None),
        ("dir/file", None),
        ("//dir/./file", None),
        ("/dir/../dir/file", None),
        ("/../../dir/file", None),
        ("/absolute", None),
        ("/dir/relative", None),
        ("/dir/upwards/dir/file", None),
        ("/missing", NotFound),
        ("/missing/file", NotFound),
        ("/dir/file/", None),
        ("/dir/file/x", NotADirectory),
        ("/loop", Invalid),
        ("/dangling", NotFound),
        ("/" + "x" * 300, NameTooLong),
        ("/nul\0byte", Invalid),
        ("/dir", IsADirectory),
        ("/", IsADirectory),
        ("", IsADirectory),
    ],
)
def test_a_path_is_followed_inside_the_pool_and_never_out_of_it(
    fs: FileSystem, served: Daemon, client: Client, path: str, expected: type[Exception] | None
) -> None:
    def make_tree() -> int:
        directory = fs.mkdir(ROOT, b"dir", 0o755, 0, 0).ino
        ino = fs.create(directory, b"file", 0o644, 0, 0).ino
        fs.symlink(ROOT, b"absolute", b"/dir/file", 0, 0)
        fs.symlink(directory, b"relative", b"../dir/file", 0, 0)
        fs.symlink(directory, b"upwards", b"..", 0, 0)
        fs.symlink(ROOT, b"loop", b"loop", 0, 0)
        fs.symlink(ROOT, b"dangling", b"gone", 0, 0)
        return ino

    ino = served.run(make_tree)
    if expected is None:
        assert client.call("Extents", path=path)[0]["inode"] == ino
    else:
        with pytest.raises(expected):
            client.call("Extents", path=path)


def test_a_daemon_without_a_mount_wants_paths_and_nothing_else(
    fs: FileSystem, served: Daemon, client: Client
) -> None:
    served.run(make, fs, b"file", pattern(8 * KIB))
    for wanted in ({}, {"file": 0}, {"file": 0, "path": "/file"}):
        with pytest.raises(Invalid, match="name the file by path"):
            client.call("Extents", **wanted)


def test_a_daemon_with_a_mount_wants_descriptors_and_nothing_else(
    fs: FileSystem, tmp_path: Path, mount: FakeMount
) -> None:
    data = pattern(64 * KIB)
    shown = mount.show("file", make(fs, b"file", data))
    with (
        daemon(fs, tmp_path / "s", mount_device=FakeMount.DEVICE) as running,
        running.client() as client,
        opened(shown, os.O_RDONLY) as fd,
    ):
        answer, (pool,) = client.call("Map", (fd,), file=0)
        assert os.pread(pool, 64 * KIB, answer["extents"][0]["start"]) == data
        os.close(pool)
        for wanted in ({}, {"path": "/file"}, {"path": "/file", "file": 0}):
            with pytest.raises(Invalid, match="index of its descriptor"):
                client.call("Map", (fd,), **wanted)
        for index in (1, -1, 1 << 40):
            with pytest.raises(ProtocolError, match=r"InvalidParameter.*file"):
                client.call("Map", (fd,), file=index)
        with pytest.raises(Denied, match="O_RDWR"):
            client.call("Map", (fd,), file=0, writable=True)
        with pytest.raises(Denied, match="O_RDWR"):
            client.call("Allocate", (fd,), file=0, length=MIB)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (os.O_PATH, "O_PATH gives no right"),
        (os.O_WRONLY, "not opened for reading"),
    ],
)
def test_a_descriptor_that_can_not_read_gives_nothing(
    fs: FileSystem, tmp_path: Path, mount: FakeMount, flags: int, complaint: str
) -> None:
    shown = mount.show("file", make(fs, b"file", pattern(8 * KIB)))
    with (
        daemon(fs, tmp_path / "s", mount_device=FakeMount.DEVICE) as running,
        running.client() as client,
        opened(shown, flags) as fd,
    ):
        for method in ("Map", "Extents", "Seal"):
            with pytest.raises(Denied, match=complaint):
                client.call(method, (fd,), file=0)


def test_a_descriptor_of_something_else_gives_nothing(
    fs: FileSystem, tmp_path: Path, mount: FakeMount
) -> None:
    reader, writer = os.pipe()
    with (
        daemon(fs, tmp_path / "s", mount_device=FakeMount.DEVICE) as running,
        running.client() as client,
        opened(tmp_path / "pool", os.O_RDWR) as pool,
        opened(tmp_path, os.O_RDONLY) as directory,
    ):
        for fd in (reader, writer, pool, directory):
            with pytest.raises(Denied, match="not of a file on this daemon's mount"):
                client.call("Map", (fd,), file=0)
    os.close(reader)
    os.close(writer)


def test_a_writable_lease_is_refused_while_the_file_has_a_cached_writer(
    fs: FileSystem, tmp_path: Path, mount: FakeMount
) -> None:
    ino = make(fs, b"file", pattern(8 * KIB))
    shown = mount.show("file", ino)
    with (
        daemon(fs, tmp_path / "s", mount_device=FakeMount.DEVICE) as running,
        running.client() as client,
        opened(shown, os.O_RDWR) as fd,
    ):
        running.run(lambda: fs.hold(ino, writer=True, cached=True))
        with pytest.raises(Busy, match="through the mount's cache"):
            client.call("Map", (fd,), file=0, writable=True)
        map_it(client, (fd,), file=0)
        running.run(lambda: fs.drop(ino, writer=True, cached=True))
        map_it(client, (fd,), file=0, writable=True)


def test_a_descriptor_that_may_be_dirty_is_closed_before_the_reply(
    fs: FileSystem, tmp_path: Path, mount: FakeMount
) -> None:
    shown = mount.show("file", make(fs, b"file", pattern(8 * KIB)))
    ours = f"/proc/self/fd/{os.open(shown, os.O_RDONLY)}"
    with (
        daemon(fs, tmp_path / "s", mount_device=FakeMount.DEVICE) as running,
        running.client() as client,
    ):
        for method, wanted in (("Allocate", {"length": 4096}), ("Map", {"writable": True})):
            with opened(shown, os.O_RDWR) as fd:
                close_all(client.call(method, (fd,), file=0, **wanted)[1])
                assert count_descriptors(shown) == 2
    os.close(int(Path(ours).name))


def count_descriptors(path: Path) -> int:
    found = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            found += os.readlink(f"/proc/self/fd/{name}") == str(path)
        except OSError:
            continue
    return found


def test_sealing_is_for_root_and_the_files_owner(fs: FileSystem, tmp_path: Path) -> None:
    sealed: list[int] = []

    async def seal(ino: int) -> str:
        sealed.append(ino)
        return "sha256:abc"

    ino = make(fs, b"file", pattern(8 * KIB))
    fs.setattr(ino, uid=777)
    open_the_way(tmp_path)
    os.chown(fs.pool.path, 12345, 12345)
    with daemon(fs, tmp_path / "s", seal=seal) as running:
        with running.client() as client:
            assert client.call("Seal", path="/file")[0] == {"digest": "sha256:abc"}
        assert sealed == [ino]
        assert "user 777, may seal" in as_user(12345, complaint_of_sealing, running.socket)
    assert sealed == [ino]


def complaint_of_sealing(path: Path) -> str:
    with Client(path) as client, pytest.raises(Denied) as refused:
        client.call("Seal", path="/file")
    return str(refused.value)
