import json
import mmap
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vfsmap.mapping.overlay import PrivateWindow
from vfsmap.mapping.window import Window
from vfsmap.pmem.medium import detect
from vfsmap.testing.commands import served_pool, vfsmap
from vfsmap.testing.media import hugetlbfs, tmpfs
from vfsmap.units import KIB, MIB, PMD, PTE, Extent
from vfsmap_tools.explain import explain_file

LARGE = 5 * MIB + 300 * KIB


@pytest.fixture(scope="module", params=["tmpfs", "hugetlbfs"])
def mounted(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A mounted pool of huge pages, with a large file and a small one."""
    medium = tmpfs() if request.param == "tmpfs" else hugetlbfs("2M", 64)
    with medium as directory, served_pool(directory, "64M") as server:
        (server.directory / "large").write_bytes(b"v" * LARGE)
        (server.directory / "small").write_bytes(b"v" * 5000)
        yield server.directory


def explained(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(vfsmap("explain", path, "--json").stdout)
    return found


def test_a_large_file_of_a_pool_is_huge_to_its_end(mounted: Path) -> None:
    found = explained(mounted / "large")
    assert found["direct"]
    assert found["filesystem"].startswith("fuse.vfsmap")
    assert found["planned"] == found["mapped"] == {str(PMD.size): 6 * MIB, str(PTE.size): 0}
    assert [finding["reason"] for finding in found["findings"]] == [None]
    assert all(extent["aligned"] >= PMD.size for extent in found["extents"])
    text = vfsmap("explain", mounted / "large").stdout
    assert "mapped from the pool itself" in text
    assert "mapped:  6M in 2M" in text


def test_the_mend_of_a_small_file_mends_it(mounted: Path) -> None:
    path = mounted / "small"
    (finding,) = explained(path)["findings"]
    if finding["reason"] is None:
        assert finding["entry"] == PMD.size  # a pool on hugetlbfs has no smaller entries
        return
    assert finding["mend"] == f"vfsmap map --level 2M {path} moves it into units of its own"
    vfsmap(*shlex.split(finding["mend"])[1:5])
    assert explained(path)["mapped"] == {str(PMD.size): 2 * MIB, str(PTE.size): 0}


def test_the_same_file_through_the_mount_is_small_and_explained(mounted: Path) -> None:
    def through_the_cache(path: Path) -> Window:
        with path.open("rb") as file:
            extents = [Extent(0, 0, LARGE)]
            return Window(file.fileno(), extents, LARGE, detect(file.fileno()), direct=False)

    found = explain_file(mounted / "large", opener=through_the_cache)
    assert found.mapped[PMD.size] == 0
    assert {finding.reason for finding in found.findings} == {
        "the page cache holds it in small pages",
        "the file, or what was asked of it, ends inside the unit",
    }
    assert "through its daemon" in str(found.findings[0].mend)


def test_a_private_window_over_a_pools_file_changes_no_byte_of_it(mounted: Path) -> None:
    path = mounted / "large"
    extents = json.loads(vfsmap("map", path, "--json").stdout)["extents"]
    fd = os.open(mounted.parent / "test.pmem", os.O_RDONLY)
    private = PrivateWindow(
        fd,
        [Extent(**extent) for extent in extents],
        LARGE,
        detect(fd),
        cow=PMD,
        stores=False,
        populate=True,
    )
    os.close(fd)
    with private:
        assert private.write(3 * MIB, b"mine") == 2 * MIB
        assert bytes(private.view()[3 * MIB - 1 : 3 * MIB + 5]) == b"vminev"
        assert private.page_sizes() == {PMD.size: 6 * MIB, PTE.size: 0}
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as shared:
        assert shared[:] == b"v" * LARGE
