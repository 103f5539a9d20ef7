"""The commands check and dump, as a person types them: what they find, mend, say and exit with."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vfsmap.fs import FileSystem
from vfsmap.fs.inode import ROOT, Inode
from vfsmap.pool import Pool, Transaction
from vfsmap.pool.layout import BATCH, EXTENT, RECORD, SUPERBLOCKS, ExtentRecord, InodeRecord
from vfsmap.pool.scan import scan
from vfsmap.testing.commands import vfsmap
from vfsmap.testing.pools import open_pmem
from vfsmap.testing.workload import Context, Number, seal_file

CONTENT = os.urandom(5000)


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    path = tmp_path / "pool"
    vfsmap("format", path, "--size", "16M", "--label", "checked")
    with open_files(path) as fs:
        home = fs.mkdir(ROOT, b"dir", 0o755, 0, 0).ino
        fs.mkdir(home, b"sub", 0o755, 0, 0)
        for parent, name in ((ROOT, b"plain"), (home, b"inner"), (ROOT, b"sealed")):
            fs.write(fs.create(parent, name, 0o644, 0, 0).ino, 0, CONTENT)
        fs.symlink(ROOT, b"way", b"dir/inner", 0, 0)
        fs.setxattr(fs.lookup(ROOT, b"plain").ino, b"user.note", b"kept")
        # the committer is not used
        seal_file(Context(fs, None), "sealed")  # type: ignore[arg-type]
        with fs.pool.transaction() as tx:
            tx.new(Number())
    return path


def open_files(path: Path) -> FileSystem:
    return FileSystem(Pool.open(path))


def ino_of(fs: FileSystem, path: str) -> int:
    at = ROOT
    for name in path.encode().split(b"/"):
        at = fs.lookup(at, name).ino
    return at


def spoil(path: Path, change: Callable[[FileSystem, Transaction], object]) -> None:
    """Write records that no file system would write, in batches with valid checksums."""
    with open_files(path) as fs, fs.pool.transaction() as tx:
        change(fs, tx)


def no_name(path: str) -> Callable[[FileSystem, Transaction], object]:
    """Take a name away, and nothing else."""
    parent, _, name = path.rpartition("/")

    def change(fs: FileSystem, tx: Transaction) -> None:
        home = ino_of(fs, parent) if parent else ROOT
        tx.end(next(oid for oid, found, _ in fs.entries(home) if found == name.encode()))

    return change


def changed_inode(path: str, **fields: int) -> Callable[[FileSystem, Transaction], object]:
    def change(fs: FileSystem, tx: Transaction) -> None:
        inode = Inode.decode(fs.pool.objects[ino_of(fs, path)])
        for name, value in fields.items():
            setattr(inode, name, value)
        tx.put(inode.ino, InodeRecord.TAG, inode.encode())

    return change


def inside_itself(fs: FileSystem, tx: Transaction) -> None:
    """Let a directory be in its own subdirectory, and nowhere else."""
    outer, inner = ino_of(fs, "dir"), ino_of(fs, "dir/sub")
    no_name("dir")(fs, tx)
    fs._put_name(tx, inner, b"round", fs.get(outer))


def shared_extent(fs: FileSystem, tx: Transaction) -> None:
    """Give a file the pool bytes of another."""
    theirs = fs.extents(ino_of(fs, "plain"))[0]
    fields = ino_of(fs, "dir/inner"), 1 << 20, theirs.start, theirs.length
    tx.put(tx.new_oid(), ExtentRecord.TAG, EXTENT.pack(*fields))


DAMAGES: dict[str, tuple[Callable[[FileSystem, Transaction], object], set[str], set[str]]] = {
    "file-without-a-name": (no_name("plain"), {"lost"}, {"plain"}),
    "directory-without-a-name": (no_name("dir"), {"lost", "links"}, {"dir"}),
    "directory-inside-itself": (inside_itself, {"lost", "links"}, {"dir/sub"}),
    "inode-lost": (lambda fs, tx: tx.end(ino_of(fs, "plain")), {"inode"}, set()),
    "links": (changed_inode("plain", nlink=7), {"links"}, set()),
    "size": (changed_inode("plain", size=1 << 63), {"inode"}, set()),
    "type": (changed_inode("plain", mode=0o030644), {"inode"}, set()),
    "digest-lost": (lambda fs, tx: tx.end(fs._seals[ino_of(fs, "sealed")]), {"seal"}, set()),
    "target-lost": (lambda fs, tx: tx.end(fs._symlinks[ino_of(fs, "way")]), {"symlink"}, set()),
    "bytes-twice": (shared_extent, {"overlap"}, set()),
    "root-lost": (lambda fs, tx: tx.end(ROOT), {"root"}, set()),
    "unknown-record": (lambda fs, tx: tx.put(tx.new_oid(), 200, b"x"), {"object"}, set()),
}


def checked(*arguments: object, code: int) -> dict[str, Any]:
    result = vfsmap("check", *arguments, "--json", check=False)
    assert result.returncode == code, result
    assert result.stderr == ""
    document = json.loads(result.stdout)
    assert isinstance(document, dict)
    return document


def test_a_clean_pool_is_called_clean_and_not_touched(pool: Path) -> None:
    before = pool.read_bytes()
    for options in ((), ("--repair",), ("--repair", "--dry-run")):
        assert vfsmap("check", pool, *options).stdout == f"{pool}: clean, 7 files, 3 extents\n"
        document = checked(pool, *options, code=0)
        assert (document["clean"], document["repaired"], document["findings"]) == (True, False, [])
        assert pool.read_bytes() == before


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_foretold_mended_and_then_gone(pool: Path, damage: str) -> None:
    change, codes, lost = DAMAGES[damage]
    with open_files(pool) as fs:
        numbers = {name: ino_of(fs, name) for name in ("plain", "dir", "dir/sub")}
    spoil(pool, change)
    before = pool.read_bytes()

    found = checked(pool, code=3)
    assert {finding["code"] for finding in found["findings"]} >= codes
    assert not found["clean"]
    assert not found["repaired"]
    assert checked(pool, "--repair", "--dry-run", code=3) == found
    assert pool.read_bytes() == before  # neither has written

    mended = checked(pool, "--repair", code=0)
    assert mended["repaired"]
    assert mended["findings"] == found["findings"]
    assert checked(pool, code=0)["findings"] == []
    with open_files(pool) as fs:
        names = {name for _, name, _ in fs.entries(ROOT)}
        inside = fs.entries(ino_of(fs, "lost+found")) if b"lost+found" in names else []
        assert {name for _, name, _ in inside} == {b"#%d" % numbers[name] for name in lost}
        assert {number for _, _, number in inside} == {numbers[name] for name in lost}


def test_what_lands_in_lost_and_found_has_its_bytes_and_what_is_below_it(pool: Path) -> None:
    spoil(pool, lambda fs, tx: (no_name("plain")(fs, tx), no_name("dir")(fs, tx)))
    said = vfsmap("check", pool, "--repair").stdout
    assert "things mended" in said
    with open_files(pool) as fs:
        home = ino_of(fs, "lost+found")
        assert fs.get(home).mode & 0o7777 == 0o700
        for _, name, ino in fs.entries(home):
            assert f"inode {ino}: it has no name; name it lost+found/{name.decode()}" in said
            at = fs.lookup(ino, b"inner").ino if fs.get(ino).is_directory else ino
            assert bytes(fs.read(at, 0, 9000)) == CONTENT
        assert bytes(fs.read(ino_of(fs, "sealed"), 0, 9000)) == CONTENT


def test_a_damaged_batch_is_told_with_its_place_and_mended(pool: Path) -> None:
    found = scan(open_pmem(pool, writable=False))
    batch = found.batches[len(found.batches) // 2]
    with pool.open("r+b") as file:
        file.seek(batch.at + BATCH.size + RECORD.size + 3)
        file.write(b"\xff\xff")
    said = vfsmap("check", pool, check=False)
    assert said.returncode == 3
    where = f"log at {batch.at:#x}: batch {batch.sequence} of the log"
    assert where in said.stdout
    assert f"mend it with: vfsmap check --repair {pool}" in said.stdout
    assert where in vfsmap("check", pool, "--repair").stdout
    assert vfsmap("check", pool).stdout.startswith(f"{pool}: clean")


def test_one_bad_superblock_is_a_note_and_renewed(pool: Path) -> None:
    with pool.open("r+b") as file:
        file.seek(SUPERBLOCKS[1] + 20)
        file.write(b"\xff" * 8)
    said = vfsmap("check", pool).stdout
    assert said.startswith("note: ")
    assert f"{pool}: clean" in said
    (note,) = checked(pool, "--repair", code=0)["findings"]
    assert note["code"] == "superblock-copy"
    assert note["harmless"]
    assert checked(pool, code=0)["findings"] == []


def test_a_broken_seal_is_damage_that_no_repair_mends(pool: Path) -> None:
    with open_files(pool) as fs:
        ino = ino_of(fs, "sealed")
        place = fs.extents(ino)[0].start + 2000
    with pool.open("r+b") as file:
        file.seek(place)
        file.write(bytes([CONTENT[2000] ^ 1]))
    for options in ((), ("--repair",)):
        (finding,) = checked(pool, *options, code=3)["findings"]
        assert (finding["code"], finding["where"]) == ("seal", f"inode {ino}")
        assert "1 blocks differ" in finding["what"]
        assert finding["remedy"] == "restore it from a copy"
    assert "1 findings that no repair mends" in vfsmap("check", pool, check=False).stdout
    said = vfsmap("check", pool, "--repair", check=False).stdout
    assert said.endswith("0 things mended, 7 files, 3 extents; 1 can't be mended\n")


@pytest.mark.parametrize("options", [(), ("--repair",), ("--repair", "--dry-run"), ("--json",)])
def test_what_nothing_can_be_read_of_is_refused_with_3_and_left_alone(
    pool: Path, options: tuple[str, ...]
) -> None:
    with pool.open("r+b") as file:
        for at in SUPERBLOCKS:
            file.seek(at + 8)
            file.write(b"\xff" * 240)
    before = pool.read_bytes()
    said = vfsmap("check", pool, *options, check=False)
    assert said.returncode == 3
    assert said.stderr.count("\n") == 1
    assert said.stdout == ""
    assert pool.read_bytes() == before


def test_a_log_of_which_nothing_is_left_is_damage_and_no_repair_guesses(pool: Path) -> None:
    found = scan(open_pmem(pool, writable=False))
    start = found.halves[found.superblock.active].start
    with pool.open("r+b") as file:
        file.seek(start)
        file.write(bytes(found.tail - start))
    before = pool.read_bytes()
    assert checked(pool, code=3)["findings"][0]["code"] == "log"
    said = vfsmap("check", "--repair", pool, check=False)
    assert said.returncode == 3
    assert "restore it from a copy" in said.stderr
    assert pool.read_bytes() == before


def test_a_pool_in_use_can_be_checked_and_not_repaired(pool: Path) -> None:
    with open_files(pool) as fs:
        fs.create(ROOT, b"new", 0o600, 0, 0)
        fs.pool.sync()
        assert "clean" in vfsmap("check", pool).stdout
        said = vfsmap("check", "--repair", pool, check=False)
        assert said.returncode == 1
        assert f"process {os.getpid()}" in said.stderr
    assert "8 files" in vfsmap("check", "--repair", pool).stdout


def test_wrong_usage_exits_with_2_and_a_missing_pool_with_1(tmp_path: Path) -> None:
    assert vfsmap("check", check=False).returncode == 2
    assert vfsmap("check", "--mend", tmp_path, check=False).returncode == 2
    assert vfsmap("check", tmp_path / "missing", check=False).returncode == 1
    assert vfsmap("dump", check=False).returncode == 2
    assert vfsmap("dump", tmp_path / "missing", check=False).returncode == 1


# dump


def test_a_dump_has_a_line_for_everything_and_writes_nothing(pool: Path) -> None:
    before = pool.read_bytes()
    lines = vfsmap("dump", pool).stdout.splitlines()
    with open_files(pool) as fs:
        plain, home, sealed = (ino_of(fs, name) for name in ("plain", "dir", "sealed"))
        extent = fs.extents(plain)[0]
    for line in (
        "superblock label: checked",
        "superblock version: 1",
        "log damage: []",
        f"name 1/plain -> {plain}",
        f"name {home}/sub -> {home + 2}",
        f"attribute user.note of {plain}",
        f"extent of {plain}: 0x0 at {extent.start:#x}+{extent.length:#x}",
    ):
        assert line in lines
    (inode,) = (line for line in lines if line.startswith(f"inode {sealed} "))
    assert {"mode=100644", "size=5000", "nlink=1", "sealed=True"} <= set(inode.split())
    assert any(line.startswith(f"tree extent of {sealed}: ") for line in lines)
    assert any(line.startswith("object ") and line.endswith(" bytes") for line in lines)
    assert pool.read_bytes() == before


def test_a_dump_as_json_says_the_same(pool: Path) -> None:
    document = json.loads(vfsmap("dump", pool, "--json").stdout)
    assert document["superblock"]["label"] == "checked"
    assert document["superblock"]["size"] == pool.stat().st_size
    assert document["log"]["damage"] == document["undecodable"] == []
    names = {row["name"]: row for row in document["names"]}
    assert set(names) == {"dir", "sub", "plain", "inner", "sealed", "way"}
    inodes = {row["ino"]: row for row in document["inodes"]}
    assert inodes[names["plain"]["inode"]]["size"] == len(CONTENT)
    assert inodes[names["way"]["inode"]]["mode"] == "120777"
    assert [row["owner"] for row in document["tree_extents"]] == [names["sealed"]["inode"]]
    assert {row["owner"] for row in document["extents"]} == {
        names[name]["inode"] for name in ("plain", "inner", "sealed")
    }
    assert [row["name"] for row in document["attributes"]] == ["user.note"]
    assert len(document["typed"]) == 1


def test_a_damaged_pool_is_dumped_as_far_as_it_can_be_read(pool: Path) -> None:
    found = scan(open_pmem(pool, writable=False))
    batch = found.batches[len(found.batches) // 2]
    with pool.open("r+b") as file:
        file.seek(batch.at + BATCH.size)
        file.write(b"\xff")
    spoiled = json.loads(vfsmap("dump", pool, "--json").stdout)
    assert len(spoiled["log"]["damage"]) == 1
    assert spoiled["names"]
    assert f"batch {batch.sequence} of the log" in vfsmap("dump", pool).stdout
