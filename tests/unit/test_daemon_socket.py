import os
import socket
import stat
from pathlib import Path

import pytest

from vfsmap.daemon.listening import listening
from vfsmap.errors import Busy, Denied, Invalid


def leave_stale_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


def test_everybody_may_connect_and_the_name_goes_in_the_end(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with listening(path), socket.socket(socket.AF_UNIX) as client:
        assert stat.S_IMODE(path.stat().st_mode) == 0o666
        client.connect(str(path))
    assert list(tmp_path.iterdir()) == []


def test_a_socket_that_a_killed_daemon_left_behind_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "s"
    leave_stale_socket(path)
    leave_stale_socket(tmp_path / ".s.new")  # one that was killed in the middle
    with listening(path), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    assert list(tmp_path.iterdir()) == []


def test_the_socket_of_a_living_daemon_is_left_to_it(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with listening(path) as first:
        with pytest.raises(Busy, match="another daemon listens"), listening(path):
            pass
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            accepted, _ = first.accept()
            accepted.close()


def test_a_daemon_too_busy_to_accept_is_a_living_one(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as sock, socket.socket(socket.AF_UNIX) as waiting:
        sock.bind(str(path))
        sock.listen(0)
        waiting.connect(str(path))
        with pytest.raises(Busy), listening(path):
            pass


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_what_is_no_socket_is_never_replaced(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "s"
    if kind == "file":
        path.write_text("precious")
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Invalid, match="is not a socket"), listening(path):
        pass
    assert path.lstat()


def test_a_socket_that_took_the_name_later_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with listening(path):
        path.unlink()
        leave_stale_socket(path)
    assert path.is_socket()


def test_a_directory_where_others_could_put_another_socket_is_refused(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(Denied, match="others could replace"), listening(shared / "s"):
        pass
    shared.chmod(0o1777)  # as /tmp: there only the owner can
    with listening(shared / "s"):
        pass


def test_a_directory_of_somebody_else_is_refused(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    os.chown(theirs, 65534, 65534)
    with pytest.raises(Denied, match="others could replace"), listening(theirs / "s"):
        pass


def test_a_missing_directory_and_a_name_too_long_are_refused_with_a_way_out(
    tmp_path: Path,
) -> None:
    with pytest.raises(Invalid, match="--socket"), listening(tmp_path / "missing" / "s"):
        pass
    with pytest.raises(Invalid, match="too long"), listening(tmp_path / ("x" * 100)):
        pass
