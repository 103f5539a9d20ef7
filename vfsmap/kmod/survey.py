"""How much of modules' text is written at load: sites, relocations and pages, counted.

A module is laid out and relocated as the kernel would, at an address of no matter; what its tables
and relocations then touch is counted in pages of 4 KiB.
"""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Final, NamedTuple

from vfsmap.kmod.bind import ALL_AREAS
from vfsmap.kmod.elf import SHN_LORESERVE
from vfsmap.kmod.host import MODULE_AREA
from vfsmap.kmod.image import JUMPS, STATIC_CALLS, TABLES, Image
from vfsmap.kmod.kernel import Kernel
from vfsmap.kmod.layout import Area, Layout
from vfsmap.kmod.module import Module
from vfsmap.kmod.relocate import NAMES, NONE, PC64, R_64, place, relocate, symbol_values
from vfsmap.kmod.tables import Site, sites, static_calls
from vfsmap.units import PTE

DATA_TABLES: Final = {".orc_unwind_ip": 4, "__bug_table": 12, "__ex_table": 12}
"""Tables about text that nobody patches by, and the size of an entry."""
TIERS: Final = {
    "T0": "nothing is done before loading",
    "T1": "distances inside it, thunks and tracer are bound",
    "T2": "and addresses inside it, at a fixed place",
    "T3": "and calls of the kernel, by way of stubs",
    "T4": "all is bound, to one host",
}
_THUNKS: Final = ("__fentry__", "__x86_return_thunk")
_INDIRECT: Final = "__x86_indirect_thunk_"
_RELATIVE: Final = ("PC32", "PLT32", "PC64")
_WIDE: Final = (R_64, PC64)
_SHORT_JUMP: Final = 2


class Kind(NamedTuple):
    """What one table does to text."""

    sites: int
    pages: int
    """Pages of core text that its sites lie in."""


class Survey:
    """Counts over one module, a kernel, or many modules."""

    def __init__(self) -> None:
        self.modules = 0
        self.largest = ("", 0)
        self.text_sizes: list[int] = []
        self.text_bytes = self.text_pages = self.init_bytes = 0
        self.relocations: Counter[str] = Counter()
        self.sites: Counter[str] = Counter()
        self.pages: Counter[str] = Counter()
        self.tail_calls = 0
        self.is_kernel = False
        self.tier_pages: Counter[str] = Counter()
        self.patched_pages = self.touched_pages = self.toggled_pages = self.untouched = 0

    def add(self, other: "Survey") -> None:
        """Add the counts of another survey."""
        for name, value in vars(other).items():
            mine = getattr(self, name)
            if name == "largest":
                self.largest = max(mine, value, key=lambda entry: entry[1])
            elif isinstance(mine, Counter):
                mine.update(value)
            else:
                setattr(self, name, mine + value)

    @property
    def kinds(self) -> dict[str, Kind]:
        """What each table does, tables without entries left out."""
        return {
            name: Kind(self.sites[name], self.pages[name])
            for name in (*TABLES, *DATA_TABLES)
            if self.sites[name]
        }

    def as_dict(self) -> dict[str, object]:
        """Return all counts, for JSON."""
        return {
            "modules": self.modules,
            "text_bytes": self.text_bytes,
            "init_text_bytes": self.init_bytes,
            "text_pages": self.text_pages,
            "largest": {"module": self.largest[0], "text_bytes": self.largest[1]},
            "median_text_bytes": median(self.text_sizes) if self.text_sizes else 0,
            "modules_of_one_page": sum(0 < size <= PTE.size for size in self.text_sizes),
            "modules_of_16_pages": sum(size <= 16 * PTE.size for size in self.text_sizes),
            "relocations": {"total": self.relocations.total(), **self.relocations},
            "kinds": {name: kind._asdict() for name, kind in self.kinds.items()},
            "tail_static_calls": self.tail_calls,
            "relocated_pages": self.tier_pages["T0"],
            "patched_pages": self.patched_pages,
            "touched_pages": self.touched_pages,
            "toggled_pages": self.toggled_pages,
            "untouched_modules": self.untouched,
            "tiers": {tier: self.tier_pages[tier] for tier in TIERS},
        }


def survey_file(path: Path) -> Survey:
    """Survey one module."""
    return survey_module(Module.open(path))


def survey_module(module: Module) -> Survey:
    """Survey one module.

    Raises:
        Damaged, Unsupported: the file can't be read; the message says why.
    """
    layout = Layout(module)
    bases = layout.follow(MODULE_AREA, ALL_AREAS)
    bases[Area.PERCPU] = 0
    image = place(module, layout, {a: b for a, b in bases.items() if a is not Area.PERCPU})
    relocate(module, layout, bases, image, symbol_values(module, layout, bases, lambda _: 0))
    found = Survey()
    found.modules = 1
    found.text_bytes = layout.sizes[Area.TEXT]
    found.init_bytes = layout.sizes[Area.INIT_TEXT]
    found.text_pages = layout.pages(Area.TEXT)
    found.text_sizes = [found.text_bytes]
    found.largest = (module.name, found.text_bytes)
    touched = _count_relocations(module, layout, found)
    for name, size in DATA_TABLES.items():
        section = module.elf.by_name.get(name)
        found.sites[name] = section.size // size if section is not None else 0
    patched = _count_sites(image, found)
    found.touched_pages = len(patched | touched)
    found.untouched = int(bool(found.text_pages) and not patched | touched)
    return found


def survey_kernel(kernel: Kernel) -> Survey:
    """Survey a kernel; of its relocations those that moving it would need."""
    found = Survey()
    image = kernel.image()
    found.is_kernel = True
    found.modules = 1
    found.text_bytes = len(image.text)
    found.text_pages = -(-found.text_bytes // PTE.size)
    found.text_sizes = [found.text_bytes]
    found.largest = (kernel.elf.name, found.text_bytes)
    low = image.text.start & 0xFFFF_FFFF
    moved: set[int] = set()
    for name, words in zip(("64", "32 percpu", "32"), kernel.words, strict=True):
        places = [at for word in words if 0 <= (at := (word & 0xFFFF_FFFF) - low) < len(image.text)]
        found.relocations[name] = len(places)
        moved.update(at // PTE.size for at in places)
    found.tier_pages["T0"] = len(moved)
    patched = _count_sites(image, found)
    found.touched_pages = len(patched)
    return found


def _pages(image: Image, found: Iterable[Site]) -> set[int]:
    """Return the numbers of the pages of core text that sites lie in."""
    start = image.text.start
    return {
        page
        for address, length in found
        if address in image.text
        for page in range(
            (address - start) // PTE.size, (address - start + max(length, 1) - 1) // PTE.size + 1
        )
    }


def _count_sites(image: Image, found: Survey) -> set[int]:
    """Count each table's sites and pages; return the pages of all."""
    touched: set[int] = set()
    toggled: set[int] = set()
    for name in TABLES:
        of_kind = sites(image, name)
        if name == JUMPS:  # counted by their shortest form, as which any of them may be built
            of_kind = [site._replace(length=_SHORT_JUMP) for site in of_kind]
        pages = _pages(image, of_kind)
        if image.is_kernel:
            of_kind = [site for site in of_kind if site.address in image.text]
        found.sites[name] = len(of_kind)
        found.pages[name] = len(pages)
        touched |= pages
        if name in (JUMPS, STATIC_CALLS):
            toggled |= pages
    found.tail_calls = sum(call.tail for call in static_calls(image))
    found.patched_pages, found.toggled_pages = len(touched), len(toggled)
    return touched


def _count_relocations(module: Module, layout: Layout, found: Survey) -> set[int]:
    """Count the relocations of core text, and the pages that each tier leaves to be written."""
    pages: dict[str, set[int]] = {tier: set() for tier in TIERS}
    rows = module.elf.symbol_rows
    of_cpus = {n for n, spot in layout.places.items() if spot.area is Area.PERCPU}
    for number, spot in layout.places.items():
        if spot.area is not Area.TEXT:
            continue
        for offset, info, _ in module.elf.relocations(module.elf.sections[number]):
            kind = info & 0xFFFF_FFFF
            found.relocations[NAMES[kind]] += 1
            if kind == NONE:
                continue
            at = spot.offset + offset
            last = at + (7 if kind in _WIDE else 3)
            for tier in _tiers(module, rows[info >> 32], NAMES[kind], of_cpus):
                pages[tier].update((at // PTE.size, last // PTE.size))
    for tier, touched in pages.items():
        found.tier_pages[tier] = len(touched)
    return pages["T0"]


def _tiers(
    module: Module, row: tuple[int, int, int, int, int, int], kind: str, of_cpus: set[int]
) -> tuple[str, ...]:
    """Return the tiers under which a relocation still has to be done at load.

    ``of_cpus`` are sections of variables of each CPU, whose place is chosen at load.
    """
    if row[3] in of_cpus:
        return ("T0", "T1", "T2", "T3")
    if 0 < row[3] < SHN_LORESERVE:
        return ("T0",) if kind in _RELATIVE else ("T0", "T1")
    name = module.elf.symbol_name(row)
    if name in _THUNKS or name.startswith(_INDIRECT):
        return ("T0",)
    return ("T0", "T1", "T2") if kind == "PLT32" else ("T0", "T1", "T2", "T3")
