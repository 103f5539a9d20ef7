"""How the kernel really maps a range of addresses: page-table entries, not promises.

Two sources.  The PAGEMAP_SCAN ioctl (Linux 6.7, Documentation/admin-guide/mm/pagemap.rst) walks
the page tables and tells for each stretch whether it is present, huge and still the file's own;
the size of a hugetlbfs entry comes from its mapping's KernelPageSize in smaps.  Before 6.7 the
totals of smaps must do: they are per mapping, so a range that covers only part of one is counted
in proportion.
"""

import ctypes
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from vfsmap.units import KIB, PMD, PTE

_IS_FILE: Final = 1 << 2
_IS_PRESENT: Final = 1 << 3
_IS_ZERO: Final = 1 << 5
_IS_HUGE: Final = 1 << 6
_REGIONS: Final = 512


class _Region(ctypes.Structure):
    # struct page_region, include/uapi/linux/fs.h
    _fields_ = (
        ("start", ctypes.c_uint64),
        ("end", ctypes.c_uint64),
        ("categories", ctypes.c_uint64),
    )


class _ScanArg(ctypes.Structure):
    # struct pm_scan_arg, include/uapi/linux/fs.h
    _fields_ = (
        ("size", ctypes.c_uint64),
        ("flags", ctypes.c_uint64),
        ("start", ctypes.c_uint64),
        ("end", ctypes.c_uint64),
        ("walk_end", ctypes.c_uint64),
        ("vec", ctypes.c_uint64),
        ("vec_len", ctypes.c_uint64),
        ("max_pages", ctypes.c_uint64),
        ("category_inverted", ctypes.c_uint64),
        ("category_mask", ctypes.c_uint64),
        ("category_anyof_mask", ctypes.c_uint64),
        ("return_mask", ctypes.c_uint64),
    )


# _IOWR('f', 16, struct pm_scan_arg)
_PAGEMAP_SCAN: Final = 3 << 30 | ctypes.sizeof(_ScanArg) << 16 | ord("f") << 8 | 16


class Run(NamedTuple):
    """A stretch of addresses that entries of one size and kind map."""

    start: int
    length: int
    entry_size: int
    """Bytes that one of its page-table entries maps."""
    file: bool
    """The pages are the file's (or shared memory's) own, no private copies."""
    zero: bool = False
    """All of it is the kernel's one page of zeros."""


class Area(NamedTuple):
    """One mapping of a process, as smaps describes it."""

    start: int
    end: int
    page_size: int
    """KernelPageSize: 4 KiB, on hugetlbfs the size of its page."""
    fields: dict[str, int]
    """The sizes smaps gives (Rss, AnonHugePages, ...), bytes."""

    @property
    def on_hugetlbfs(self) -> bool:
        """Tell whether its pages are hugetlbfs pages."""
        return self.page_size > PTE.size


def page_sizes(address: int, length: int, pid: int | None = None) -> dict[int, int]:
    """Return the bytes of the range that entries of each size map, largest size first.

    The sizes of 2 MiB and 4 KiB are always there; what was never touched is in none of them.
    ``pid`` names another process; the caller needs the right to trace it.
    """
    try:
        found = runs(address, length, pid)
    except OSError as exc:
        if exc.errno != errno.ENOTTY:  # the kernel is older than 6.7
            raise
        return _from_smaps(address, length, pid)
    sizes = {PMD.size: 0, PTE.size: 0}
    for run in found:
        sizes[run.entry_size] = sizes.get(run.entry_size, 0) + run.length
    return dict(sorted(sizes.items(), reverse=True))


def runs(address: int, length: int, pid: int | None = None) -> list[Run]:
    """Return what is mapped in the range, in order of address; what was never touched is left out.

    OSError with ENOTTY: the kernel is older than 6.7.
    """
    regions = list(_scan(address, address + length, pid))
    huge = any(categories & _IS_HUGE for _, _, categories in regions)
    # smaps is slow: it is read only to tell the sizes of huge entries apart
    big = [a for a in areas(address, length, pid) if a.on_hugetlbfs] if huge else []
    found: list[Run] = []
    for start, end, categories in regions:
        size = PTE.size
        if categories & _IS_HUGE:
            size = next((a.page_size for a in big if a.start <= start < a.end), PMD.size)
        file, zero = bool(categories & _IS_FILE), bool(categories & _IS_ZERO)
        last = found[-1] if found else None
        if last and last.start + last.length == start and last[2:] == (size, file, zero):
            found[-1] = last._replace(length=last.length + end - start)
        else:
            found.append(Run(start, end - start, size, file, zero))
    return found


def areas(address: int, length: int, pid: int | None = None) -> list[Area]:
    """Return the mappings that overlap the range, in order of address."""
    wanted: list[Area] = []
    current: Area | None = None
    with Path(f"/proc/{pid or 'self'}/smaps").open(errors="surrogateescape") as lines:
        for line in lines:
            name, _, rest = line.partition(":")
            if " " in name:  # the head line of a mapping: addresses, rights, file
                bounds = name.split(" ", 1)[0].split("-")
                start, end = int(bounds[0], 16), int(bounds[1], 16)
                current = None
                if start < address + length and end > address:
                    current = Area(start, end, PTE.size, {})
                    wanted.append(current)
            elif current and rest.endswith("kB\n"):
                current.fields[name] = int(rest[:-3]) * KIB
    return [area._replace(page_size=area.fields["KernelPageSize"]) for area in wanted]


def _scan(start: int, end: int, pid: int | None) -> Iterator[tuple[int, int, int]]:
    """Yield start, end and categories of each present stretch."""
    found = (_Region * _REGIONS)()
    fd = os.open(f"/proc/{pid or 'self'}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        while start < end:
            arg = _ScanArg(
                size=ctypes.sizeof(_ScanArg),
                start=start,
                end=end,
                vec=ctypes.addressof(found),
                vec_len=_REGIONS,
                category_mask=_IS_PRESENT,
                return_mask=_IS_PRESENT | _IS_FILE | _IS_HUGE | _IS_ZERO,
            )
            count = fcntl.ioctl(fd, _PAGEMAP_SCAN, arg)
            for region in found[:count]:
                yield region.start, region.end, region.categories
            start = arg.walk_end
    finally:
        os.close(fd)


def _from_smaps(address: int, length: int, pid: int | None) -> dict[int, int]:
    sizes = {PMD.size: 0, PTE.size: 0}
    for area in areas(address, length, pid):
        inside = min(area.end, address + length) - max(area.start, address)
        share = inside / (area.end - area.start)
        for size, amount in _totals(area).items():
            sizes[size] = sizes.get(size, 0) + int(amount * share)
    return dict(sorted(sizes.items(), reverse=True))


def _totals(area: Area) -> dict[int, int]:
    fields = area.fields
    if area.on_hugetlbfs:
        return {area.page_size: fields["Shared_Hugetlb"] + fields["Private_Hugetlb"]}
    names = ("AnonHugePages", "ShmemPmdMapped", "FilePmdMapped")
    huge = sum(fields.get(name, 0) for name in names)
    return {PMD.size: huge, PTE.size: fields["Rss"] - huge}
