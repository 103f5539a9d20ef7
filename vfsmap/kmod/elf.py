"""ELF files for x86-64, read with every size and offset checked before it is used.

Tables are handed out as the tuples :mod:`struct` makes of them: a package of modules holds millions
of relocations.  Source: the System V ABI, chapter 4, and its x86-64 supplement.
"""

import struct
from collections.abc import Iterator
from functools import cached_property
from typing import Final, NamedTuple

from vfsmap.errors import Damaged, NotFound, Unsupported

ET_REL, ET_EXEC = 1, 2
SHT_SYMTAB, SHT_STRTAB, SHT_RELA, SHT_NOBITS, SHT_REL = 2, 3, 4, 8, 9
SHF_WRITE, SHF_ALLOC, SHF_EXECINSTR, SHF_COMPRESSED = 0x1, 0x2, 0x4, 0x800
SHN_UNDEF, SHN_LORESERVE, SHN_ABS, SHN_COMMON = 0, 0xFF00, 0xFFF1, 0xFFF2
STB_LOCAL, STB_WEAK = 0, 2
STT_FUNC, STT_SECTION = 2, 3
_EM_X86_64: Final = 62

_HEADER: Final = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION: Final = struct.Struct("<IIQQQQIIQQ")
_SEGMENT: Final = struct.Struct("<IIQQQQQQ")
SYMBOL: Final = struct.Struct("<IBBHQQ")
RELA: Final = struct.Struct("<QQq")


class Section(NamedTuple):
    """A section header, its name looked up."""

    number: int
    name: str
    kind: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    info: int
    align: int
    entry_size: int

    @property
    def is_loaded(self) -> bool:
        """Whether it takes memory when the image runs."""
        return bool(self.flags & SHF_ALLOC)


class Segment(NamedTuple):
    """A program header."""

    kind: int
    flags: int
    offset: int
    address: int
    physical: int
    file_size: int
    size: int
    align: int


class Symbol(NamedTuple):
    """A symbol, its name looked up."""

    name: str
    kind: int
    binding: int
    section: int
    value: int
    size: int


class Elf:
    """An ELF file held in memory.

    Raises:
        Damaged: it is not ELF, or a header points outside the file.
        Unsupported: it is for another machine, or of 32 bits.
    """

    def __init__(self, data: bytes, name: str = "file") -> None:
        self.name = name
        self.data = memoryview(data)
        if len(data) < _HEADER.size or data[:4] != b"\x7fELF":
            raise Damaged(f"{name} is not an ELF file")
        header = _HEADER.unpack_from(data)
        ident, self.kind, machine = header[0], header[1], header[2]
        if ident[4] != 2 or ident[5] != 1 or machine != _EM_X86_64:
            bits = {1: 32, 2: 64}.get(ident[4], 0)
            order = "" if ident[5] == 1 else ", most significant byte first,"
            raise Unsupported(
                f"{name} is for machine {machine} of {bits} bits{order}, not for x86-64"
            )
        self._segment_offset, section_offset = header[5], header[6]
        self._segment_size, self._segment_count = header[9], header[10]
        size, count, names = header[11:14]
        self.sections = self._read_sections(section_offset, size, count, names)
        self.by_name: dict[str, Section] = {}
        for section in self.sections:
            self.by_name.setdefault(section.name, section)

    def _read_sections(self, offset: int, size: int, count: int, names: int) -> list[Section]:
        if size != _SECTION.size or not 0 < names < count:
            raise Damaged(f"{self.name}: the section table makes no sense")
        if offset + size * count > len(self.data):
            raise Damaged(f"{self.name} ends before its section table at {offset:#x}")
        rows = list(_SECTION.iter_unpack(self.data[offset : offset + size * count]))
        strings = self._slice("section names", rows[names][4], rows[names][5])
        sections = []
        for index, row in enumerate(rows):
            name = self._string(strings, row[0], f"section {index}")
            section = Section(index, name, *row[1:])
            if section.kind != SHT_NOBITS and index:
                self._slice(f"section {name}", section.offset, section.size)
            if section.align & (section.align - 1):
                named = name or f"number {index}"
                raise Damaged(f"{self.name}: section {named} has the alignment {section.align}")
            sections.append(section)
        return sections

    def _slice(self, what: str, offset: int, size: int) -> memoryview:
        if offset + size > len(self.data):
            raise Damaged(f"{self.name}: {what} ends at {offset + size:#x}, outside the file")
        return self.data[offset : offset + size]

    def _string(self, strings: memoryview, at: int, what: str) -> str:
        if at >= len(strings):
            raise Damaged(
                f"{self.name}: the name of {what} is at {at:#x}, outside its string table"
            )
        raw = bytes(strings[at : at + 1024])
        return raw[: raw.find(0)].decode("ascii", "backslashreplace")

    @cached_property
    def segments(self) -> list[Segment]:
        """The program headers."""
        if self._segment_count and self._segment_size != _SEGMENT.size:
            raise Damaged(f"{self.name}: the program headers make no sense")
        raw = self._slice(
            "the program headers", self._segment_offset, _SEGMENT.size * self._segment_count
        )
        segments = [Segment(*row) for row in _SEGMENT.iter_unpack(raw)]
        for number, segment in enumerate(segments):
            self._slice(f"segment {number}", segment.offset, segment.file_size)
        return segments

    @property
    def sections_end(self) -> int:
        """Where the section header table ends in the file."""
        offset, count = struct.unpack_from("<Q", self.data, 40)[0], len(self.sections)
        return int(offset) + count * _SECTION.size

    def content(self, section: Section) -> memoryview:
        """Return the bytes of a section; none when it only reserves room."""
        if section.kind == SHT_NOBITS:
            return self.data[:0]
        return self.data[section.offset : section.offset + section.size]

    def require(self, name: str) -> Section:
        """Return the section of that name.

        Raises:
            NotFound: there is none.
        """
        try:
            return self.by_name[name]
        except KeyError:
            raise NotFound(f"{self.name} has no section {name}") from None

    @cached_property
    def symbol_rows(self) -> list[tuple[int, int, int, int, int, int]]:
        """Symbols as they are in the file: name, info, other, section, value, size."""
        table = self._symbol_table
        if table is None:
            return []
        rows = list(SYMBOL.iter_unpack(self.content(table)))
        count = len(self.sections)
        for row in rows:
            if SHN_LORESERVE > row[3] >= count:
                raise Damaged(f"{self.name}: {self.symbol_name(row)} is in section {row[3]}")
        return rows

    @cached_property
    def _symbol_table(self) -> Section | None:
        tables = [s for s in self.sections if s.kind == SHT_SYMTAB]
        if len(tables) > 1:
            raise Damaged(f"{self.name} has {len(tables)} symbol tables")
        if not tables:
            return None
        if tables[0].size % SYMBOL.size or tables[0].link >= len(self.sections):
            raise Damaged(f"{self.name}: the symbol table {tables[0].name} makes no sense")
        return tables[0]

    @cached_property
    def _strings(self) -> memoryview:
        table = self._symbol_table
        return self.data[:0] if table is None else self.content(self.sections[table.link])

    def symbol_name(self, row: tuple[int, int, int, int, int, int]) -> str:
        """Return the name of a symbol; of a section's symbol, the section's."""
        if not row[0] and row[1] & 15 == STT_SECTION and row[3] < len(self.sections):
            return self.sections[row[3]].name
        return self._string(self._strings, row[0], f"a symbol of section {row[3]}")

    @cached_property
    def symbols(self) -> list[Symbol]:
        """All symbols, in the file's order."""
        return [
            Symbol(self.symbol_name(row), row[1] & 15, row[1] >> 4, row[3], row[4], row[5])
            for row in self.symbol_rows
        ]

    def relocation_sections(self) -> Iterator[tuple[Section, Section]]:
        """Yield each table of relocations with the section it applies to.

        Raises:
            Damaged: a table is not made of whole entries, or names no section.
        """
        for section in self.sections:
            if section.kind not in (SHT_RELA, SHT_REL):
                continue
            if section.info >= len(self.sections) or section.size % RELA.size:
                raise Damaged(f"{self.name}: relocations {section.name} make no sense")
            target = self.sections[section.info]
            if target.is_loaded and section.kind == SHT_REL:
                raise Damaged(f"{self.name}: {section.name} has no addends, x86-64 wants them")
            if section.kind == SHT_RELA:
                yield section, target

    def relocations(self, target: Section) -> Iterator[tuple[int, int, int]]:
        """Yield offset, symbol << 32 | type, and addend of what applies to one section."""
        for table in self._relocated.get(target.number, ()):
            yield from RELA.iter_unpack(self.content(table))

    @cached_property
    def _relocated(self) -> dict[int, list[Section]]:
        found: dict[int, list[Section]] = {}
        for table, target in self.relocation_sections():
            found.setdefault(target.number, []).append(table)
        return found
