"""What docs/kmod-host.md lists is what a document can hold."""

import re
from pathlib import Path

import msgspec
import pytest

from vfsmap.kmod.host import Document, ModuleDocument

TEXT = (Path(__file__).parents[2] / "docs/kmod-host.md").read_text()


@pytest.mark.parametrize(
    ("heading", "kind"), [("## The kernel", Document), ("## A module", ModuleDocument)]
)
def test_every_field_of_a_hosts_document_is_described(
    heading: str, kind: type[msgspec.Struct]
) -> None:
    table = TEXT.split(heading)[1].split("\n## ")[0]
    cells = re.findall(r"^\| (`[^|]*`) \|", table, re.MULTILINE)
    named = [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(named) == sorted(field.name for field in msgspec.structs.fields(kind))
