"""The command ``explain``: why a file is mapped by the page sizes it is, and what would mend it.

It works on a file of a mount, where the extents come from the mapping daemon, and on any file of
ext4, xfs, tmpfs or hugetlbfs, which is mapped through the file's own descriptor.
"""

import os
import platform
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import click

import vfsmap
from vfsmap.errors import Invalid, NotFound
from vfsmap.mapping.layout import levels_of
from vfsmap.mapping.plan import Reason, remedy
from vfsmap.mapping.window import Window
from vfsmap.pmem.medium import Medium, detect
from vfsmap.pmem.mountinfo import mount_of
from vfsmap.units import KIB, LEVELS, PTE, Extent, align_up, format_size
from vfsmap_tools.console import (
    errors_exit,
    json_option,
    page_sizes_text,
    print_json,
    print_line,
    print_table,
)
from vfsmap_tools.fiemap import data_ranges, placed_extents
from vfsmap_tools.mounts import mounted_pools

_SOCKET: Final = "user.vfsmap.socket"
_THP: Final = Path("/sys/kernel/mm/transparent_hugepage")
_HUGE_PAGES: Final = Path("/sys/kernel/mm/hugepages")
_SHOWN: Final = 20


class Finding(NamedTuple):
    """A part of the file that entries of one size map."""

    offset: int
    length: int
    entry: int
    reason: str | None
    """Why the entries are not of the largest size that the medium has."""
    mend: str | None
    """What would change that."""


class Placed(NamedTuple):
    """An extent, and where it starts on the device or in the pool."""

    offset: int
    start: int
    length: int
    aligned: int
    """The largest level that both offsets are multiples of."""


class Explanation(NamedTuple):
    """All that the command says, in the order it says it."""

    path: str
    size: int
    filesystem: str
    medium: dict[str, object]
    direct: bool
    """The window is the pool itself, not the kernel's page cache."""
    extents: list[Placed]
    settings: dict[str, str]
    planned: dict[int, int]
    mapped: dict[int, int]
    """As the kernel mapped it, once each page was touched."""
    findings: list[Finding]


def open_window(path: Path) -> Window:
    """Map a file read-only: by its daemon, else through its own descriptor.

    Raises:
        NotFound: there is no such file.
        Invalid: it is not a regular file.
    """
    try:
        status = path.stat()
    except FileNotFoundError as exc:
        raise NotFound(f"{path}: there is no such file") from exc
    if not stat.S_ISREG(status.st_mode):
        raise Invalid(f"{path} is not a regular file; only those can be mapped")
    if _SOCKET in _attribute(path, _SOCKET):
        window: Window = vfsmap.map(path)
        return window
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        medium = detect(fd)
        extents = list(_own_extents(fd, status, medium))
        return Window(fd, extents, status.st_size, medium, direct=False)
    finally:
        os.close(fd)


def explain_file(
    path: Path, *, touch: bool = True, opener: Callable[[Path], Window] = open_window
) -> Explanation:
    """Map a file, touch each page, and say what became of it and why.

    Raises:
        VfsmapError: it can't be mapped; and as :func:`open_window`.
    """
    with opener(path) as window:
        if touch:
            window.view()[:: PTE.size].tobytes()
        kind, options = _filesystem(path)
        return Explanation(
            path=str(path),
            size=window.length,
            filesystem=f"{kind} ({options})",
            medium={
                "name": window.medium.name,
                "page_size": window.medium.page_size,
                "largest": levels_of(window.medium)[-1].size,
                "policy": window.medium.huge or None,
            },
            direct=window.direct,
            extents=_extents(path, window),
            settings=_settings(window.medium),
            planned=window.plan().page_sizes(),
            mapped=window.page_sizes(),
            findings=list(_findings(window, kind, path)) if touch else [],
        )


def _attribute(path: Path, name: str) -> dict[str, bytes]:
    try:
        return {name: os.getxattr(path, name)}
    except OSError:
        return {}


def _own_extents(fd: int, status: os.stat_result, medium: Medium) -> Iterator[Extent]:
    """Yield a file's extents in itself; the holes of a tmpfs are left out, touching fills them."""
    page = medium.page_size
    if medium.name == "page cache" or status.st_blocks * 512 >= status.st_size:
        yield Extent(0, 0, align_up(status.st_size, page))
        return
    for start, end in data_ranges(fd, status.st_size):
        yield Extent(start, start, align_up(end, page) - start)


def _filesystem(path: Path) -> tuple[str, str]:
    """Return the type and the options of the file system that holds a file."""
    mount = mount_of(path.stat().st_dev)
    return (mount.kind, mount.options) if mount else ("unknown", "")


def _extents(path: Path, window: Window) -> list[Placed]:
    extents: list[Extent] | None = list(window.extents)
    if not window.direct:
        with path.open("rb") as file:
            extents = placed_extents(file.fileno(), window.length)
    return [Placed(*extent, aligned=_aligned(extent)) for extent in extents or []]


def _aligned(extent: Extent) -> int:
    """Return the largest level that both of an extent's offsets are multiples of."""
    both = extent.offset | extent.start
    return max(level.size for level in LEVELS if level == PTE or both % level.size == 0)


def _settings(medium: Medium) -> dict[str, str]:
    """Return the kernel's settings that decide about this medium."""
    found = {"kernel": platform.release()}
    if medium.name == "hugetlbfs":
        pool = _HUGE_PAGES / f"hugepages-{medium.page_size // KIB}kB"
        for name in ("nr_hugepages", "free_hugepages"):
            found[f"{pool.name}/{name}"] = (pool / name).read_text().strip()
    else:
        names = ["enabled"] if medium.name == "page cache" else ["shmem_enabled"]
        for path in (_THP / name for name in names):
            if path.exists():
                text = path.read_text()
                found[str(path)] = text[text.index("[") + 1 : text.index("]")]
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("THP_enabled:"):
                found["huge pages in this process"] = "yes" if line.endswith("1") else "no (prctl)"
    found["vm.max_map_count"] = Path("/proc/sys/vm/max_map_count").read_text().strip()
    return found


def _findings(window: Window, kind: str, path: Path) -> Iterator[Finding]:
    """Yield the ranges of the plan that follows from how the kernel holds the medium."""
    skip = window.layout.skip
    for part in window.plan(window.backing()).ranges():
        start = max(part.at, skip)
        end = min(part.at + part.length, skip + window.length)
        if start >= end:
            continue
        reason = part.reason and part.reason.value
        mend = part.reason and _mend(part.reason, window, kind, path)
        yield Finding(start - skip, end - start, part.level.size, reason, mend)


def _mend(reason: Reason, window: Window, kind: str, path: Path) -> str:
    """Return the command or the option that would give larger pages."""
    again = f"cp {path} {path}.new && mv {path}.new {path}"
    match reason:
        case Reason.CACHE if kind.startswith("fuse"):
            return "map it through its daemon as root or in its group: the pool itself is huge"
        case Reason.CACHE:
            return (
                f"dd of={path} oflag=nocache conv=notrunc,fdatasync count=0, then map it with "
                "MADV_HUGEPAGE, as vfsmap does (ext4 since Linux 6.16, xfs); or vfsmap cp it "
                "into a pool"
            )
        case Reason.POLICY:
            where = _mount_point(_pool_of(path) if window.direct else path)
            return f"mount -o remount,huge=always {where}, then {again}"
        case Reason.SPLIT:
            return again
        case Reason.END if not window.direct:
            return f"truncate -s %2M {path}, if zeros at its end do no harm"
        case Reason.END | Reason.SHORT | Reason.COLOUR if window.direct:
            return f"vfsmap map --level 2M {path} moves it into units of its own"
        case _:
            return remedy(reason)


def _pool_of(path: Path) -> Path:
    """Return the pool that the file is in; without one, the file."""
    parents = path.resolve().parents
    return next((m.pool for m in mounted_pools() if m.directory in parents), path)


def _mount_point(path: Path) -> Path:
    place = path.resolve()
    while not place.is_mount():
        place = place.parent
    return place


@click.command("explain")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--touch/--no-touch", default=True, help="Read a byte of each page first.")
@json_option
@errors_exit
def explain(file: Path, touch: bool, as_json: bool) -> None:
    """Tell why FILE is mapped by the page sizes it is, and what would mend it.

    FILE may be in a mounted pool, or on ext4, xfs, tmpfs or hugetlbfs.
    """
    found = explain_file(file, touch=touch)
    if as_json:
        print_json(_plain(found))
    else:
        _print(found)


def _plain(found: Explanation) -> dict[str, Any]:
    plain = found._asdict()
    plain["extents"] = [extent._asdict() for extent in found.extents]
    plain["findings"] = [finding._asdict() for finding in found.findings]
    return plain


def _print(found: Explanation) -> None:
    name = found.medium["name"]
    kind = "the kernel's page cache" if name == "page cache" else f"the pages of {name} themselves"
    if found.direct:
        kind = f"the pool itself, on {name}"
    largest = found.medium["largest"]
    assert isinstance(largest, int)
    print_line(f"{found.path}: {format_size(found.size)} on {found.filesystem}")
    print_line(f"mapped from {kind}; the largest entries there are {format_size(largest)}")
    for name, value in found.settings.items():
        print_line(f"  {name}: {value}")
    if found.extents:
        _print_extents(found.extents)
    unsure = (
        ", or larger where the cache holds it so" if found.medium["name"] == "page cache" else ""
    )
    print_line(f"planned: {page_sizes_text(found.planned)}{unsure}")
    print_line(f"mapped:  {page_sizes_text(found.mapped)}")
    poor = [finding for finding in found.findings if finding.reason]
    for finding in poor[:_SHOWN]:
        where = f"{format_size(finding.length)} at {finding.offset:#x}"
        print_line(f"{where} in {format_size(finding.entry)}: {finding.reason}")
        print_line(f"  mend: {finding.mend}")
    _more(len(poor), "ranges")


def _print_extents(extents: list[Placed]) -> None:
    rows = [
        (f"{e.offset:#x}", f"{e.start:#x}", format_size(e.length), format_size(e.aligned))
        for e in extents[:_SHOWN]
    ]
    print_table(("file offset", "start", "length", "aligned to"), rows)
    _more(len(extents), "extents")


def _more(count: int, what: str) -> None:
    if count > _SHOWN:
        print_line(f"... and {count - _SHOWN} {what} more; --json has them all")
