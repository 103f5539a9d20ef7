"""The table of mounts, with names that are hard to read."""

import os
import subprocess
from pathlib import Path

import pytest

import vfsmap
from vfsmap.pmem import pages
from vfsmap.pmem.mountinfo import mount_of
from vfsmap_tools.mounts import mounted_pools


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
@pytest.mark.parametrize("name", [b"bad\xff", "a\u2028b\x0bc\x85d".encode(), b"a b\\c\nd"])
def test_names_of_any_bytes_are_told_apart_from_the_rest_of_the_table(
    tmp_path: Path, name: bytes
) -> None:
    directory = os.path.join(os.fsencode(tmp_path), name)
    os.mkdir(directory)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "huge=advise", b"x y", directory], check=True)
    try:
        path = os.path.join(directory, b"file")
        Path(os.fsdecode(path)).write_bytes(b"hello")
        found = mount_of(os.stat(directory).st_dev)
        assert found is not None
        assert (found.kind, found.source) == ("tmpfs", "x y")
        assert os.fsencode(found.directory) == os.path.realpath(directory)
        assert "huge=advise" in found.options
        with vfsmap.map(os.fsdecode(path)) as window:
            assert bytes(window.view()) == b"hello"
            assert window.medium.name == "tmpfs"
        mounted_pools()
    finally:
        subprocess.run(["umount", directory], check=True)


def test_a_mapped_file_of_any_name_is_in_nobodys_way(tmp_path: Path) -> None:
    path = os.fsdecode(os.path.join(os.fsencode(tmp_path), b"lib\xff.so"))
    Path(path).write_bytes(bytes(4096))
    with vfsmap.map(path, populate=True) as window:
        assert pages.areas(window.address, 4096)
        assert sum(window.page_sizes().values()) == 4096
