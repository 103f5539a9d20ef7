import json
import os
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from vfsmap.errors import Invalid, NotFound
from vfsmap.mapping.window import Window
from vfsmap.pmem import libc
from vfsmap.pmem.medium import detect
from vfsmap.testing import media
from vfsmap.units import KIB, MIB, PMD, PTE, Extent
from vfsmap_tools.explain import Explanation, explain, explain_file
from vfsmap_tools.fiemap import data_ranges, placed_extents

PAGE = 4 * KIB
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


def reserved(path: Path, size: int) -> Path:
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)
    return path


def reasons(found: Explanation) -> list[tuple[int, int, str]]:
    return [(f.offset, f.length, f.reason) for f in found.findings if f.reason]


@needs_root
def test_a_file_on_a_huge_tmpfs_has_nothing_to_mend() -> None:
    with media.tmpfs("always") as directory:
        found = explain_file(reserved(directory / "file", 8 * MIB))
    assert found.mapped == found.planned == {PMD.size: 8 * MIB, PTE.size: 0}
    assert reasons(found) == []
    assert found.medium == {
        "name": "tmpfs",
        "page_size": PAGE,
        "largest": PMD.size,
        "policy": "always",
    }


@needs_root
@pytest.mark.parametrize("policy", ["never", "advise"])
def test_a_small_paged_tmpfs_is_told_to_be_remounted_and_that_mends_it(policy: str) -> None:
    with media.tmpfs(policy) as directory:
        path = reserved(directory / "file", 4 * MIB)
        (finding,) = explain_file(path).findings
        assert finding.reason == "the huge-page policy of the tmpfs gives it small pages"
        assert finding.mend == (
            f"mount -o remount,huge=always {directory}, then cp {path} {path}.new "
            f"&& mv {path}.new {path}"
        )
        for command in finding.mend.split(", then "):
            subprocess.run(command, shell=True, check=True)
        assert explain_file(path).mapped[PMD.size] == 4 * MIB


@needs_root
def test_a_split_unit_is_found_and_copying_mends_it() -> None:
    with media.tmpfs("always") as directory:
        path = reserved(directory / "file", 6 * MIB)
        with path.open("r+b") as file:
            punch = libc.FALLOC_FL_PUNCH_HOLE | libc.FALLOC_FL_KEEP_SIZE
            libc.fallocate(file.fileno(), punch, 2 * MIB, PAGE)
            libc.fallocate(file.fileno(), 0, 2 * MIB, PAGE)
        found = explain_file(path)
        assert found.planned != found.mapped
        ((offset, length, reason),) = reasons(found)
        assert (offset, length) == (2 * MIB, 2 * MIB)
        assert reason.startswith("its unit is held in small pages")
        subprocess.run(str(found.findings[1].mend), shell=True, check=True)
        assert reasons(explain_file(path)) == []


@needs_root
def test_an_end_inside_a_unit_is_found_and_its_mend_works() -> None:
    with media.tmpfs("always") as directory:
        path = reserved(directory / "file", 3 * MIB)
        found = explain_file(path)
        ((offset, length, reason),) = reasons(found)
        assert (offset, length) == (2 * MIB, MIB)
        assert "ends inside the unit" in reason
        subprocess.run(str(found.findings[-1].mend).split(",")[0], shell=True, check=True)
        assert explain_file(path).mapped[PMD.size] == 4 * MIB


@needs_root
def test_a_hugetlbfs_file_shows_its_pages_and_the_kernels_stock() -> None:
    with media.hugetlbfs("2M", 4) as directory:
        found = explain_file(reserved(directory / "file", 6 * MIB))
    assert found.mapped == {PMD.size: 6 * MIB, PTE.size: 0}
    assert int(found.settings["hugepages-2048kB/nr_hugepages"]) >= 4
    assert reasons(found) == []


@needs_root
def test_ext4_is_told_to_drop_its_cache_and_that_gives_huge_pages_where_the_kernel_can() -> None:
    with media.ext4_loop("64M") as directory:
        path = directory / "file"
        with path.open("wb", buffering=0) as file:
            for _ in range(4 * MIB // PAGE):
                file.write(b"v" * PAGE)
        found = explain_file(path)
        ((offset, length, reason),) = reasons(found)
        assert (offset, length, reason) == (0, 4 * MIB, "the page cache holds it in small pages")
        assert sum(extent.length for extent in found.extents) == 4 * MIB
        mend = str(found.findings[0].mend)
        subprocess.run(mend.split(",")[0] + ",fdatasync count=0", shell=True, check=True)
        assert explain_file(path).mapped[PMD.size] in (0, 4 * MIB)


@needs_root
def test_holes_of_a_sparse_tmpfs_file_are_named_and_not_filled() -> None:
    with media.tmpfs("always") as directory:
        path = directory / "sparse"
        with path.open("wb") as file:
            file.truncate(8 * MIB)
            os.pwrite(file.fileno(), b"v" * 2 * MIB, 4 * MIB)
        before = path.stat().st_blocks
        found = explain_file(path)
        assert path.stat().st_blocks == before
        holes = [(f.offset, f.length) for f in found.findings if f.reason and "hole" in f.reason]
        assert holes == [(0, 4 * MIB), (6 * MIB, 2 * MIB)]


@needs_root
def test_a_window_from_elsewhere_is_explained_by_its_extents() -> None:
    with media.tmpfs("always") as directory:
        path = reserved(directory / "pool", 16 * MIB)

        def opener(_: Path) -> Window:
            extents = [Extent(0, 0, 4 * MIB), Extent(4 * MIB, 6 * MIB + PAGE, 4 * MIB)]
            with path.open("rb") as file:
                return Window(file.fileno(), extents, 8 * MIB, detect(file.fileno()))

        found = explain_file(path, opener=opener)
    assert found.direct
    assert [(e.start, e.aligned) for e in found.extents] == [(0, 1 << 30), (6 * MIB + PAGE, PAGE)]
    ((offset, length, reason),) = reasons(found)
    assert (offset, length) == (4 * MIB, 4 * MIB)
    assert "do not agree" in reason
    assert "vfsmap map --level 2M" in str(found.findings[-1].mend)


def test_json_has_everything_that_the_text_has(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"v" * 10_000)
    done = CliRunner().invoke(explain, [str(path), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert found["size"] == 10_000
    assert sum(found["mapped"].values()) == 12 * KIB
    assert sum(finding["length"] for finding in found["findings"]) == 10_000
    text = CliRunner().invoke(explain, [str(path)])
    assert text.exit_code == 0, text.output
    assert found["findings"][0]["reason"] in text.output
    assert found["findings"][0]["mend"] in text.output
    assert "mapped:  12K in 4K" in text.output


def test_an_empty_file_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "empty"
    path.touch()
    assert explain_file(path).findings == []


def test_untouched_pages_are_not_counted(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(PAGE))
    found = explain_file(path, touch=False)
    assert sum(found.mapped.values()) == 0
    assert found.findings == []


def test_what_is_no_file_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="there is no such file"):
        explain_file(tmp_path / "missing")
    with pytest.raises(Invalid, match="not a regular file"):
        explain_file(tmp_path)
    done = CliRunner().invoke(explain, [str(tmp_path)])
    assert done.exit_code == 2


@needs_root
def test_fiemap_tells_where_ext4_put_a_file_and_tmpfs_has_no_answer() -> None:
    with media.ext4_loop("64M") as directory:
        path = directory / "file"
        path.write_bytes(b"v" * 3 * MIB)
        with path.open("rb") as file:
            extents = placed_extents(file.fileno(), 3 * MIB)
            assert extents is not None
            assert extents[0].offset == 0
            assert sum(extent.length for extent in extents) == 3 * MIB
            assert all(extent.start % PAGE == 0 and extent.start > 0 for extent in extents)
            os.sync()
            image = next(iter(_devices(directory)))
        with image.open("rb") as device:
            device.seek(extents[-1].start)
            assert device.read(extents[-1].length) == b"v" * extents[-1].length
    with media.tmpfs() as directory, reserved(directory / "file", PAGE).open("rb") as file:
        assert placed_extents(file.fileno(), PAGE) is None


def _devices(directory: Path) -> list[Path]:
    lines = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    return [Path(fields[0]) for fields in lines if fields[1] == str(directory)]


def test_more_extents_than_one_call_returns_are_all_found(tmp_path: Path) -> None:
    path = tmp_path / "comb"
    with path.open("w+b") as file:
        for number in range(600):
            os.pwrite(file.fileno(), b"v" * PAGE, number * 2 * PAGE)
        size = 1199 * PAGE
        assert len(list(data_ranges(file.fileno(), size))) == 600
        extents = placed_extents(file.fileno(), size)
        assert extents is None or len(extents) == 600
