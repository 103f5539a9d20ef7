"""Where a store puts modules: where their host has them, or side by side in free units."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from vfsmap.errors import Exists, Invalid
from vfsmap.kmod.bind import Bound, bases_at, bases_from, bind, pages_in, thunk_space
from vfsmap.kmod.branches import Callers
from vfsmap.kmod.host import KERNEL_AREA, MODULE_AREA, Host
from vfsmap.kmod.index import host_digest
from vfsmap.kmod.layout import Area, Layout
from vfsmap.kmod.module import Module
from vfsmap.kmod.pack import arrange, end_of
from vfsmap.kmod.userspace import IMAGES, IMAGES_END
from vfsmap.units import PMD, PTE, align_up

if TYPE_CHECKING:
    from vfsmap.kmod.store import Store

_MODULES_END: Final = 0xFFFF_FFFF_FF00_0000


class Place(NamedTuple):
    """Addresses for a module."""

    bases: dict[Area, int]
    thunk_pages: list[int]
    """For as many pages of thunks as it may need, where the host's document names none."""


def places_for(
    store: "Store", modules: Sequence[Module], host: Host, at: int | None
) -> list[Place]:
    """Return where modules go that are added together.

    Raises:
        Exists: something of the store's is there.
        Invalid: nothing can be put there.
        Damaged: the host has the modules where these files' would not fit.
    """
    layouts = [Layout(module) for module in modules]
    if at is None and all(module.name in host.modules for module in modules):
        return [
            Place(bases_from(host, module, layout), [])
            for module, layout in zip(modules, layouts, strict=True)
        ]
    start = _free_unit(store, host) if at is None else at
    spare = [thunk_space(module, host) for module in modules]
    places = arrange(layouts, start, spare)
    _require_reachable(host, start, places, layouts)
    _require_free(store, host, places, layouts)
    return [
        Place(place, pages_in(align_up(place[Area.TEXT] + layout.sizes[Area.TEXT], PTE.size), size))
        for layout, place, size in zip(layouts, places, spare, strict=True)
    ]


def _require_reachable(
    host: Host, start: int, places: Sequence[dict[Area, int]], layouts: Sequence[Layout]
) -> None:
    first = PMD.size if host.user_space else KERNEL_AREA
    limit = IMAGES_END if host.user_space else _MODULES_END
    placed = zip(layouts, places, strict=True)
    end = max(base + lay.sizes[area] for lay, place in placed for area, base in place.items())
    if start < first or end > limit:
        raise Invalid(
            f"modules from {start:#x} to {end:#x} are outside the addresses that they can be "
            f"reached at, {first:#x} to {limit:#x}"
        )


def _free_unit(store: "Store", host: Host) -> int:
    """Return the first unit of 2 MiB behind everything this host has."""
    end = max([_behind(host), *(span.stop for _, span in _taken(store, host))])
    return align_up(end, PMD.size)


def _behind(host: Host) -> int:
    """Return the first unit of 2 MiB behind the modules that the host has loaded."""
    end = IMAGES if host.user_space else MODULE_AREA
    for resident in host.modules.values():
        end = max(end, *resident.sections.values(), resident.text.stop)
    return align_up(end, PMD.size)


def bind_at(
    module: Module, host: Host, at: int | None = None, callers: Callers | None = None
) -> Bound:
    """Return a module that a host has not loaded as it would be at an address, or behind the rest.

    Raises:
        NotFound, Invalid, Damaged, Unsupported: it can't be bound so.
    """
    layout = Layout(module)
    bases = bases_at(_behind(host) if at is None else at, layout)
    pages = pages_in(end_of([bases], [layout]), thunk_space(module, host))
    return bind(module, host, bases, thunk_pages=pages, callers=callers)


def _taken(store: "Store", host: Host) -> Iterator[tuple[str, range]]:
    """Yield the addresses that a store's modules have on a host, and their names."""
    digest = host_digest(host)
    for variant in store.index.variants:
        if variant.is_kernel or not (variant.host == digest or host.user_space):
            continue
        for area, base in variant.bases.items():
            if host.user_space and base >= KERNEL_AREA:
                continue  # a process can have nothing there
            if area != Area.PERCPU.value and variant.sizes[area]:
                yield variant.name, range(base, base + variant.sizes[area])
        for page in variant.thunk_pages:
            yield variant.name, range(page, page + PTE.size)


def _require_free(
    store: "Store", host: Host, places: Sequence[dict[Area, int]], layouts: Sequence[Layout]
) -> None:
    """Check that nothing of the store's lies between the first address and the last."""
    start = min(min(place[a] for a in place if a is not Area.PERCPU) for place in places)
    end = end_of(places, layouts)
    for name, span in _taken(store, host):
        if span.start < end and start < span.stop:
            raise Exists(
                f"{store.directory} holds {name} at {span.start:#x}; put it elsewhere with --at"
            )
