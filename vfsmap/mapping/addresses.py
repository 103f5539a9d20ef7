"""Addresses: taken out of use in one aligned piece, and what it means when there are none."""

from pathlib import Path
from typing import Final

from vfsmap.errors import NoMemory, TooManyMappings
from vfsmap.mapping.layout import Layout
from vfsmap.pmem import libc
from vfsmap.pmem.medium import Medium
from vfsmap.units import format_size

_MAX_MAP_COUNT: Final = Path("/proc/sys/vm/max_map_count")
_MARGIN: Final = 8  # mremap(2) gives up that early, since it may split mappings at both ends


def reserve(layout: Layout) -> int:
    """Take addresses of the layout's length and alignment out of use; return the first."""
    align = layout.level.size
    flags = libc.MAP_PRIVATE | libc.MAP_ANONYMOUS | libc.MAP_NORESERVE
    try:
        found = libc.mmap(0, layout.length + align, libc.PROT_NONE, flags)
    except OSError as exc:
        raise out_of_memory(f"can't reserve {format_size(layout.length)}", 1, None) from exc
    base = found + (layout.residue - found) % align
    end = base + layout.length
    if base > found:
        libc.munmap(found, base - found)
    libc.munmap(end, found + layout.length + align - end)
    return base


def out_of_memory(what: str, calls: int, medium: Medium | None) -> NoMemory:
    """Tell which of the three things the kernel calls ENOMEM it was."""
    limit = int(_MAX_MAP_COUNT.read_text())
    with Path("/proc/self/maps").open("rb") as lines:
        count = sum(1 for _ in lines)
    if count + _MARGIN >= limit:
        return TooManyMappings(
            f"{what} in {calls} pieces: the process has {count} mappings and vm.max_map_count is "
            f"{limit}; raise it with sysctl, or map less at a time"
        )
    if medium and medium.name == "hugetlbfs":
        size = format_size(medium.page_size)
        return NoMemory(
            f"{what}: too few free huge pages of {size}, of which plain stores to a private window "
            "need as many again; raise nr_hugepages"
        )
    return NoMemory(f"{what}: no memory or addresses; look at ulimit -v and vm.overcommit_memory")
