"""Where the kernel's loader puts each section of a module.

Sections are walked in the file's order, once for each area.  A section lies at the area's end,
rounded up to its own alignment; areas start on pages.  Before Linux 6.4 the four areas of a core
(and those of its init part) follow each other in one allocation, since then each is its own.

Source: layout_sections() in kernel/module/main.c; checked against the sections of modules in the
memory of running kernels.
"""

from enum import Enum
from typing import Final, NamedTuple

from vfsmap.errors import Damaged
from vfsmap.kmod.elf import SHF_EXECINSTR, SHF_WRITE, Section
from vfsmap.kmod.module import Module
from vfsmap.units import GIB, PTE, align_up


class Area(Enum):
    """A part of a loaded module whose pages all have the same rights."""

    TEXT = "text"
    RODATA = "rodata"
    RO_AFTER_INIT = "ro_after_init"
    DATA = "data"
    INIT_TEXT = "init_text"
    INIT_RODATA = "init_rodata"
    INIT_DATA = "init_data"
    PERCPU = "percpu"

    @property
    def is_init(self) -> bool:
        """Whether it is given back when the module has started."""
        return self.value.startswith("init_")


CORE: Final = (Area.TEXT, Area.RODATA, Area.RO_AFTER_INIT, Area.DATA)
INIT: Final = (Area.INIT_TEXT, Area.INIT_RODATA, Area.INIT_DATA)
EXECUTABLE: Final = (Area.TEXT, Area.INIT_TEXT)

PERCPU: Final = ".data..percpu"
_DROPPED: Final = (".modinfo", "__versions")
_RO_AFTER_INIT: Final = (".data..ro_after_init", "__jump_table")
_LARGEST_ALIGN: Final = PTE.size


class Place(NamedTuple):
    """Where a section lies: an area, and bytes from its start."""

    area: Area
    offset: int


class Layout:
    """The places of a module's sections, and how large each area is."""

    def __init__(self, module: Module) -> None:
        """Place every section that is loaded.

        Raises:
            Damaged: the areas would exceed 1 GiB, which is all the room modules have, or a section
                wants to be aligned to more than a page.
        """
        self.places: dict[int, Place] = {}
        self.sizes: dict[Area, int] = dict.fromkeys(Area, 0)
        by_area: dict[Area, list[Section]] = {area: [] for area in Area}
        for section in module.elf.sections:
            if section.is_loaded and section.name not in _DROPPED:
                by_area[area_of(section)].append(section)
        for area, sections in by_area.items():
            for section in sections:
                self._append(module, area, section)

    def _append(self, module: Module, area: Area, section: Section) -> None:
        if section.align > _LARGEST_ALIGN:
            raise Damaged(
                f"{module.file_name}: section {section.name} wants to be aligned to "
                f"{section.align} bytes, a page has {_LARGEST_ALIGN}"
            )
        offset = align_up(self.sizes[area], section.align or 1)
        self.places[section.number] = Place(area, offset)
        self.sizes[area] = offset + section.size
        if sum(self.sizes.values()) > GIB:
            raise Damaged(
                f"{module.file_name}: section {section.name} has {section.size} bytes, more than "
                f"there is room for modules"
            )

    def pages(self, area: Area) -> int:
        """Return how many 4 KiB pages an area takes."""
        return -(-self.sizes[area] // PTE.size)

    def follow(self, start: int, areas: tuple[Area, ...]) -> dict[Area, int]:
        """Return the address of each area when they follow each other from ``start`` on."""
        bases = {}
        for area in areas:
            bases[area] = start
            start += align_up(self.sizes[area], PTE.size)
        return bases


def area_of(section: Section) -> Area:
    """Return the area that a loaded section belongs to."""
    init = section.name.startswith(".init")
    if section.name == PERCPU:
        return Area.PERCPU
    if section.flags & SHF_EXECINSTR:
        return Area.INIT_TEXT if init else Area.TEXT
    if not section.flags & SHF_WRITE:
        return Area.INIT_RODATA if init else Area.RODATA
    if init:
        return Area.INIT_DATA
    return Area.RO_AFTER_INIT if section.name in _RO_AFTER_INIT else Area.DATA
