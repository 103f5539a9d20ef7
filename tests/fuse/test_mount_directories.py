"""Listings on a real mount: whole, stable while names come and go, and of any size."""

import ctypes
import os
import random
import select
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


def test_a_listing_has_every_name_once_with_its_inode_and_kind(here: Path) -> None:
    for number in range(500):
        name = Path(f"name-{number:04}-{'x' * (number % 200)}")
        name.touch() if number % 3 else name.mkdir()
    with os.scandir() as entries:
        found = list(entries)
    assert len({entry.name for entry in found}) == len(found) == 500
    for entry in found:
        assert entry.inode() == os.lstat(entry.name).st_ino
        assert entry.is_dir() == Path(entry.name).is_dir()


def test_a_listing_begins_with_the_directory_and_its_parent(here: Path) -> None:
    os.makedirs("dir/sub")
    out = subprocess.run(["ls", "-aifU", "dir/sub"], check=True, capture_output=True, text=True)
    rows = [line.split() for line in out.stdout.splitlines()]
    assert [name for _, name in rows] == [".", ".."]
    assert [int(ino) for ino, _ in rows] == [os.stat("dir/sub").st_ino, os.stat("dir").st_ino]


def test_removing_while_listing_skips_nothing(here: Path) -> None:
    for number in range(1000):
        Path(f"{number}").touch()
    with os.scandir() as entries:
        for entry in entries:
            os.unlink(entry.name)
    assert os.listdir() == []


def test_names_that_stay_are_listed_once_while_others_come_and_go(here: Path) -> None:
    kept = {f"kept-{number}" for number in range(400)}
    for name in sorted(kept):
        Path(name).touch()
        Path(f"old-{name}").touch()
    seen = []
    with os.scandir() as entries:
        for count, entry in enumerate(entries):
            seen.append(entry.name)
            Path(f"new-{count}").touch()
            if count < 400:
                Path(f"old-kept-{count}").unlink()
            if count == 100:
                os.rename("kept-399", "kept-399-renamed")
    names = [name for name in seen if name in kept - {"kept-399"}]
    assert sorted(names) == sorted(kept - {"kept-399"})
    assert len(seen) == len(set(seen))


def test_a_directory_read_again_shows_what_is_new(here: Path) -> None:
    fd = os.open(".", os.O_RDONLY)
    assert os.listdir(fd) == []
    Path("new").touch()
    assert os.listdir(fd) == ["new"]  # listdir() begins anew
    os.unlink("new")
    assert os.listdir(fd) == []
    os.close(fd)


def test_a_large_directory_is_listed_with_attributes_and_removed(here: Path) -> None:
    os.mkdir("large")
    for number in range(5000):
        os.mknod(f"large/{number}")
    with os.scandir("large") as entries:
        assert sum(entry.stat().st_nlink for entry in entries) == 5000
    shutil.rmtree("large")
    assert os.listdir() == []


class Directory:
    """An open directory as the C library has it."""

    def __init__(self, path: str) -> None:
        self.libc = ctypes.CDLL(None, use_errno=True)
        for name in ("opendir", "readdir"):
            getattr(self.libc, name).restype = ctypes.c_void_p
        self.libc.telldir.restype = ctypes.c_long
        self.stream = ctypes.c_void_p(self.libc.opendir(path.encode()))
        assert self.stream

    def read(self) -> str | None:
        """Return the next name."""
        entry = self.libc.readdir(self.stream)
        return None if entry is None else ctypes.string_at(entry + 19).decode()

    def rest(self) -> list[str]:
        return list(iter(self.read, None))

    def tell(self) -> int:
        place: int = self.libc.telldir(self.stream)
        return place

    def seek(self, place: int) -> None:
        self.libc.seekdir(self.stream, ctypes.c_long(place))

    def rewind(self) -> None:
        self.libc.rewinddir(self.stream)

    def close(self) -> None:
        assert self.libc.closedir(self.stream) == 0


@pytest.fixture(params=[300, pytest.param(100_000, marks=pytest.mark.slow)])
def large(here: Path, request: pytest.FixtureRequest) -> Iterator[Directory]:
    """A large directory, "large", that is open."""
    os.mkdir("large")
    for number in range(request.param):
        os.mknod(f"large/{number}")
    directory = Directory("large")
    yield directory
    directory.close()
    shutil.rmtree("large")


def test_a_place_in_a_listing_can_be_told_and_gone_back_to(large: Directory) -> None:
    places, names = [], []
    while True:
        places.append(large.tell())
        if (name := large.read()) is None:
            break
        names.append(name)
    assert len(set(places)) == len(places)
    assert len(set(names)) == len(names) == len(os.listdir("large")) + 2
    for at in random.Random(1).sample(range(len(names)), 100):
        large.seek(places[at])
        assert [large.read(), large.read()][: len(names) - at] == names[at : at + 2]
    large.rewind()
    assert large.rest() == names
    gone = set(names[100:200:2])
    for name in gone:
        os.unlink(f"large/{name}")
    large.seek(places[100])
    assert large.rest() == [name for name in names[100:] if name not in gone]
    large.rewind()
    assert set(large.rest()) == set(names) - gone


def test_a_listing_has_what_stays_once_while_another_process_adds_and_removes(
    large: Directory,
) -> None:
    stay = {*large.rest(), "."}
    large.rewind()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        number = 0
        while not select.select([reader], [], [], 0)[0]:
            os.mknod(f"large/new-{number}")
            if number > 20:
                os.unlink(f"large/new-{number - 20}")
            number += 1
        os._exit(0)
    try:
        for _ in range(3):
            listed = large.rest()
            assert sorted(name for name in listed if name in stay) == sorted(stay)
            assert len(set(listed)) == len(listed)
            large.rewind()
    finally:
        os.write(writer, b"x")
        os.waitpid(child, 0)
        os.close(reader)
        os.close(writer)


def test_a_deep_tree_can_be_made_walked_and_removed(here: Path) -> None:
    deep = Path(*["d" * 30] * 100)
    deep.mkdir(parents=True)
    (deep / "file").touch()
    walked = list(os.walk("."))
    assert len(walked) == 101
    assert walked[-1][2] == ["file"]
    shutil.rmtree("d" * 30)


def test_find_and_du_agree_with_what_is_there(here: Path) -> None:
    for number in range(30):
        Path(f"dir-{number}").mkdir()
        Path(f"dir-{number}/file").write_bytes(b"x" * 5000)
    found = subprocess.run(["find", "."], check=True, capture_output=True, text=True).stdout
    assert len(found.splitlines()) == 1 + 30 + 30
    used = subprocess.run(["du", "-s", "-B1", "."], check=True, capture_output=True, text=True)
    assert int(used.stdout.split()[0]) >= 30 * 8192
