"""Binding: a module as one host would have it in memory after loading it.

The order is the kernel's: place, relocate, then patch table by table; a later patch may overwrite
an earlier one.  Source: load_module() and module_finalize().
"""

from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from vfsmap.errors import Damaged, Invalid, NotFound
from vfsmap.kmod.alternatives import apply_alternatives
from vfsmap.kmod.branches import (
    CallDepth,
    Callers,
    Thunks,
    apply_paravirt,
    apply_retpolines,
    apply_returns,
    counts_calls,
    drop_locks,
    drop_tracing,
    most_thunk_pages,
    seal_entries,
)
from vfsmap.kmod.host import Host
from vfsmap.kmod.image import RETPOLINES, Image
from vfsmap.kmod.keys import apply_jumps, apply_static_calls, unknown_keys
from vfsmap.kmod.layout import CORE, INIT, PERCPU, Area, Layout
from vfsmap.kmod.memory import Memory, Region
from vfsmap.kmod.module import Module
from vfsmap.kmod.relocate import Resolver, place, relocate, symbol_values
from vfsmap.kmod.sort import sort_tables
from vfsmap.units import PTE

ALL_AREAS: Final = (*CORE, *INIT)


class Placed(NamedTuple):
    """A module at its addresses: relocated, not patched yet."""

    module: Module
    layout: Layout
    image: Image
    bases: dict[Area, int]
    values: list[int]
    """The value of each symbol, in the file's order."""

    def area(self, area: Area) -> bytes:
        """Return an area's bytes; none when the module has no such area."""
        for region in self.image.memory.regions:
            if region.name == area.value:
                return bytes(region.data)
        return b""

    def address_of(self, name: str) -> int:
        """Return the address of a function.

        Raises:
            NotFound: the module has no such function.
        """
        self.module.function(name)
        return self.address_of_symbol(name)

    def address_of_symbol(self, name: str) -> int:
        """Return the address of anything the module defines.

        Raises:
            NotFound: the module defines no such symbol.
        """
        for row, value in zip(self.module.elf.symbol_rows, self.values, strict=True):
            if row[3] and self.module.elf.symbol_name(row) == name:
                return value
        raise NotFound(f"{self.module.name} defines no symbol {name!r}")


class Bound(NamedTuple):
    """A module bound to a host."""

    placed: Placed
    thunk_pages: list[Region]
    elsewhere: dict[int, bytes]
    """Writes into other images that loading it brings with it."""
    doubts: list[str]
    """What the host's document leaves open, and what was taken for true."""


class Patched(NamedTuple):
    """What patching an image's text brings with it."""

    elsewhere: dict[int, bytes]
    """Writes into other images."""
    doubts: list[str]


def bases_from(host: Host, module: Module, layout: Layout) -> dict[Area, int]:
    """Return where a host has a module's areas.

    Raises:
        NotFound: the host has not loaded the module.
        Invalid: it was built for another kernel.
        Damaged: the host's sections don't lie as this file's would.
    """
    resident = host.modules.get(module.name)
    if resident is None:
        raise NotFound(f"the host has no module {module.name}; give an address to bind it to")
    module.require_vermagic(host.release)  # of another build nothing would lie right
    bases: dict[Area, int] = {Area.PERCPU: resident.percpu_base}
    for index, spot in layout.places.items():
        name = module.elf.sections[index].name
        if name not in resident.sections or name == PERCPU:
            continue
        base = resident.sections[name] - spot.offset
        if bases.setdefault(spot.area, base) != base:
            raise Damaged(
                f"{module.file_name}: section {name} is at {resident.sections[name]:#x} on the "
                f"host, not where this file's would be; is it another build?"
            )
    for area in ALL_AREAS:
        if layout.sizes[area] and area not in bases:
            # sections without symbols are not listed; nothing can refer to them from outside
            bases[area] = _after(bases, layout)
    return bases


def _after(bases: dict[Area, int], layout: Layout) -> int:
    """Return the first page behind everything that has been placed."""
    end = max((base + layout.sizes[area] for area, base in bases.items()), default=0)
    return (end + PTE.size - 1) & -PTE.size


def bases_at(start: int, layout: Layout) -> dict[Area, int]:
    """Return the areas one behind the other from an address on, each starting on a page."""
    bases = layout.follow(start, ALL_AREAS)
    bases[Area.PERCPU] = 0
    return bases


def thunk_space(module: Module, host: Host) -> int:
    """Return the most bytes that a module's pages of thunks may take on a host."""
    section = module.elf.by_name.get(RETPOLINES)
    sites = 0 if section is None else section.size // 4
    return most_thunk_pages(sites, host) * PTE.size


def pages_in(start: int, size: int) -> list[int]:
    """Return the pages of a range that starts on one."""
    return list(range(start, start + size, PTE.size))


def place_for(
    module: Module,
    host: Host,
    bases: dict[Area, int] | None = None,
    resolve: Resolver | None = None,
) -> Placed:
    """Return a module relocated for a host, its areas where the host has them or at ``bases``.

    ``resolve`` supplies symbols that the host's document does not have.

    Raises:
        Invalid: it was built for another kernel, or an address is not aligned.
        NotFound: a symbol, or the module's place on the host, is not known.
        Damaged: the module breaks a rule; the message names the section or symbol.
    """
    if not host.user_space:
        module.require_vermagic(host.release)
    layout = Layout(module)
    bases = bases_from(host, module, layout) if bases is None else bases
    for area, base in bases.items():
        if area is not Area.PERCPU and layout.sizes[area] and base % PTE.size:
            raise Invalid(f"{module.file_name}: {area.value} can't start at {base:#x}, off a page")
        if area is not Area.PERCPU and base + layout.sizes[area] > 1 << 64:
            raise Invalid(f"{module.file_name}: {area.value} at {base:#x} has no end")
    image = place(module, layout, {a: b for a, b in bases.items() if a is not Area.PERCPU})

    def find(name: str) -> int | None:
        found = host.import_of(module.name, name)
        return resolve(name) if found is None and resolve is not None else found

    values = symbol_values(module, layout, bases, find)
    relocate(module, layout, bases, image, values)
    return Placed(module, layout, image, bases, values)


def bind(
    module: Module,
    host: Host,
    bases: dict[Area, int] | None = None,
    *,
    resolve: Resolver | None = None,
    others: Sequence[Memory] = (),
    thunk_pages: Sequence[int] = (),
    callers: Callers | None = None,
) -> Bound:
    """Return a module as ``host`` would have it in memory.

    Arguments and errors are those of :func:`place_for`.  ``others`` are images that it calls, to
    tell whether calls can be counted there; ``thunk_pages`` are addresses for pages of thunks, in
    case the host's document names none; ``callers`` tell what other modules call, see
    :func:`called_by`.
    """
    placed = place_for(module, host, bases, resolve)
    resident = host.modules.get(module.name)
    pages = resident.its_pages if resident and resident.its_pages else list(thunk_pages)
    thunks = Thunks(placed.image, pages)
    patched = patch(placed.image, host, thunks, others, callers)
    sort_tables(module, placed.layout, placed.bases, placed.image)
    return Bound(placed, thunks.regions, *patched)


def called_by(modules: Iterable[Bound]) -> Callers:
    """Return what modules call in other images of the same host, where calls are counted."""
    return {
        bound.placed.module.name: {pad + CallDepth.PAD for pad in bound.elsewhere}
        for bound in modules
    }


def patch(
    image: Image,
    host: Host,
    thunks: Thunks,
    others: Sequence[Memory] = (),
    callers: Callers | None = None,
) -> Patched:
    """Patch an image's text for a host, in place.

    Where calls are counted, modules of the host that are not among ``callers`` are taken to call
    every function that they import.
    """
    apply_paravirt(image, host)
    apply_retpolines(image, host, thunks)
    apply_returns(image, host)
    apply_alternatives(image, host)
    depth = None
    if image.dialect.relocates and counts_calls(host):
        depth = CallDepth(image, host, others, callers)
        depth.apply()
    seal_entries(image)
    if host.uniproc:
        drop_locks(image)
    drop_tracing(image, host)
    apply_jumps(image, host)
    apply_static_calls(image, host, depth)
    doubts = [] if host.user_space else unknown_keys(image, host)
    if depth is None:
        return Patched({}, doubts)
    count, names = depth.guess()
    if count:
        doubts.append(
            f"calls are counted on this host, and whether {count} functions of {image.name} are "
            f"called depends on modules that are not at hand: {', '.join(names)}; they are taken "
            f"to call all they import, unless you name their files with --with"
        )
    return Patched(depth.elsewhere, doubts)
