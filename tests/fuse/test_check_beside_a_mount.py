"""``vfsmap check`` beside a mount whose files change all the time: it never cries wolf."""

import errno
import multiprocessing
import os
import random
from contextlib import suppress
from pathlib import Path

import pytest
from click.testing import CliRunner

from vfsmap.fs import FileSystem
from vfsmap.pool import Pool
from vfsmap.testing.commands import served_pool
from vfsmap.testing.killing import MEDIA
from vfsmap.testing.waiting import wait_until
from vfsmap_tools.check import check_command

WRITERS, CHECKS = 3, 150


def change(directory: Path, seed: int) -> None:
    """Change files, and seal and delete some, until the mount is gone."""
    chance = random.Random(seed)
    directory.mkdir()
    while True:
        path, other = (directory / f"{chance.randrange(6)}" for _ in range(2))
        try:
            change_something(path, other, chance)
        except OSError as exc:
            if exc.errno in (errno.ENOTCONN, errno.ECONNABORTED):
                return


def change_something(path: Path, other: Path, chance: random.Random) -> None:
    match chance.randrange(8):
        case 0:
            path.write_bytes(chance.randbytes(chance.choice((10, 5000, 300_000, 2_000_000))))
        case 1:
            path.rename(other)
        case 2:
            path.unlink()
        case 3:
            os.setxattr(path, "user.a", chance.randbytes(chance.choice((10, 30_000))))
        case 4:
            os.truncate(path, chance.randrange(500_000))
        case 5:
            os.link(path, other)
        case 6:
            with path.open("rb") as file:
                os.fsync(file.fileno())
        case _:
            sealed = path.with_name(f"sealed-{chance.randrange(3)}")
            with suppress(FileNotFoundError):
                sealed.unlink()
            sealed.write_bytes(chance.randbytes(chance.choice((5000, 1_000_000))))
            os.setxattr(sealed, "user.vfsmap.seal", b"1")


@pytest.mark.parametrize("medium", MEDIA)
def test_a_check_beside_a_mount_under_load_is_clean_every_time(medium: str) -> None:
    fork = multiprocessing.get_context("fork")
    with MEDIA[medium]() as place, served_pool(place, "128M") as server:
        writers = [
            fork.Process(target=change, args=(server.directory / f"writer-{n}", n))
            for n in range(WRITERS)
        ]
        try:
            for writer in writers:
                writer.start()
            for _ in range(CHECKS):
                done = CliRunner().invoke(check_command, [str(server.pool)])
                assert done.exit_code == 0, done.output
                assert "clean" in done.output
            assert all(writer.is_alive() for writer in writers)
        finally:
            for writer in writers:
                writer.kill()
                writer.join()


@pytest.mark.parametrize("deleted", [False, True])
def test_a_sealed_file_that_is_deleted_while_it_is_checked_is_no_damage(
    monkeypatch: pytest.MonkeyPatch, deleted: bool
) -> None:
    with MEDIA["tmpfs"]() as place, served_pool(place, "64M") as server:
        path = server.directory / "sealed"
        path.write_bytes(b"text")
        os.setxattr(path, "user.vfsmap.seal", b"1")

        def sealed() -> list[int]:
            with FileSystem(Pool.open(server.pool, "r")) as fs:
                return fs.sealed_inodes()

        def damaged_blocks(*_: object) -> list[int]:
            if deleted:
                path.unlink()
                wait_until(lambda: not sealed())
            return [0]

        monkeypatch.setattr("vfsmap_tools.check.damaged_blocks", damaged_blocks)
        done = CliRunner().invoke(check_command, [str(server.pool)])
        assert ("differ from what was sealed" in done.output) == (not deleted)
        assert done.exit_code == (0 if deleted else 3)
