"""docs/format.md says what vfsmap/pool/layout.py does, for every byte."""

import ctypes
import re
from pathlib import Path

import pytest

from vfsmap.pool import layout
from vfsmap.pool.layout import BATCH_MAGIC, MAGIC, Structure

TEXT = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
SECTIONS = {
    "Superblock": layout.Superblock,
    "Half": layout.Half,
    "Batch": layout.BatchHeader,
    "Record": layout.RecordHeader,
    "Root": layout.Root,
    "Extent": layout.ExtentRecord,
    "Tree extent": layout.TreeExtentRecord,
    "Inode": layout.InodeRecord,
    "Dirent": layout.DirentRecord,
    "Symlink": layout.SymlinkRecord,
    "Xattr": layout.XattrRecord,
    "Seal": layout.SealRecord,
}


def section(name: str) -> str:
    found = re.search(rf"^##+ {name}(: tag \d+)?\n(.*?)(?=^##|\Z)", TEXT, re.MULTILINE | re.DOTALL)
    assert found, f"docs/format.md has no section {name}"
    return found[0]


@pytest.mark.parametrize("name", SECTIONS)
def test_offsets_and_sizes_are_documented(name: str) -> None:
    kind = SECTIONS[name]
    rows = re.findall(r"^\| (\d+) \| *(\d*) *\| (\w+) \| (.*) \|$", section(name), re.MULTILINE)
    documented = [(int(offset), int(size or 0), field) for offset, size, field, _ in rows]
    fields = [(getattr(kind, f[0]).offset, getattr(kind, f[0]).size, f[0]) for f in kind._fields_]
    assert documented == [*fields, (ctypes.sizeof(kind), 0, "end")]
    assert all(meaning for *_, field, meaning in rows if field != "end")


def test_every_structure_is_documented_with_its_tag() -> None:
    kinds = {k for k in vars(layout).values() if isinstance(k, type) and issubclass(k, Structure)}
    assert kinds - {Structure} == set(SECTIONS.values())
    for name, kind in SECTIONS.items():
        tag = getattr(kind, "TAG", None)
        assert tag is None or f": tag {tag}\n" in section(name)


def test_the_magics_are_documented() -> None:
    assert MAGIC.hex(" ") in TEXT
    assert BATCH_MAGIC.to_bytes(4, "little").hex(" ") in TEXT
