"""Our ELF reader and pyelftools see the same in real modules."""

import io

import pytest
from elftools.elf.elffile import ELFFile
from elftools.elf.relocation import RelocationSection
from elftools.elf.sections import SymbolTableSection

from vfsmap.kmod.elf import SHN_LORESERVE, STT_SECTION, Elf
from vfsmap.kmod.module import Module
from vfsmap.testing.kernels import modules

NAMES = (
    "crc7",
    "reed_solomon",
    "libcrc32c",
    "nf_defrag_ipv6",
    "lz4_compress",
    "ramoops",
    "irqbypass",
)


@pytest.mark.parametrize("key", ["61", "612"])
@pytest.mark.parametrize("name", NAMES)
def test_sections_symbols_and_relocations_are_those_that_pyelftools_finds(
    key: str, name: str
) -> None:
    ours: Elf = Module.open(modules(key)[name]).elf
    theirs = ELFFile(io.BytesIO(bytes(ours.data)))

    assert [
        (s.name, s.flags, s.address, s.offset, s.size, s.link, s.info, s.align, s.entry_size)
        for s in ours.sections
    ] == [
        (
            s.name,
            s["sh_flags"],
            s["sh_addr"],
            s["sh_offset"],
            s["sh_size"],
            s["sh_link"],
            s["sh_info"],
            s["sh_addralign"],
            s["sh_entsize"],
        )
        for s in theirs.iter_sections()
    ]
    table = theirs.get_section_by_name(".symtab")
    assert isinstance(table, SymbolTableSection)
    assert [
        (s.value, s.size, ours.sections[s.section].name if s.section < SHN_LORESERVE else "")
        for s in ours.symbols
    ] == [
        (
            s["st_value"],
            s["st_size"],
            theirs.get_section(s["st_shndx"]).name if isinstance(s["st_shndx"], int) else "",
        )
        for s in table.iter_symbols()
    ]
    assert [s.name for s in ours.symbols if s.kind != STT_SECTION] == [
        s.name for s in table.iter_symbols() if s["st_info"]["type"] != "STT_SECTION"
    ]
    for section in theirs.iter_sections():
        if isinstance(section, RelocationSection):
            found = [
                (offset, info >> 32, info & 0xFFFFFFFF, addend)
                for offset, info, addend in ours.relocations(ours.sections[section["sh_info"]])
            ]
            assert found == [
                (r["r_offset"], r["r_info_sym"], r["r_info_type"], r["r_addend"])
                for r in section.iter_relocations()
            ]
