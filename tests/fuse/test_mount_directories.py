"""Listings on a real mount: whole, stable while names come and go, and of any size."""

import os
import shutil
import subprocess
from pathlib import Path


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
