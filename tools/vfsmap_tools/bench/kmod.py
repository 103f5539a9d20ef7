"""Loading modules in place, beside copying them: time, and memory of their own.

Four ways to have the text of a host's modules in memory: bound to this host (nothing is written),
bound to another one (what differs is laid over, in blocks of 4 KiB or 2 MiB), not bound at all
(relocated and patched when loaded, over the same text), and the kernel's own way, a copy in RAM.
The modules are those of a kernel package that the tests have fetched.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, NamedTuple

import vfsmap
from vfsmap.guard import TextGuard
from vfsmap.kmod.bind import bind
from vfsmap.kmod.host import Host
from vfsmap.kmod.layout import Area
from vfsmap.kmod.loader import Loader, forbid_stores
from vfsmap.kmod.module import Module, find_modules
from vfsmap.kmod.pack import in_units, write_file
from vfsmap.kmod.plan import pokes_between, trace_pokes, write_set
from vfsmap.kmod.store import Store
from vfsmap.units import KIB, PMD, PTE, Level, format_size
from vfsmap_tools.bench.results import Grid, Result
from vfsmap_tools.bench.runner import Goal, Measure, alternate, judge

_MEDIUM: Final = Path("/dev/shm")
_MODULES: Final = Path(".cache/debian/61")
_HERE: Final = Path("tests/data/kmod/61max/host.json.xz")
_THERE: Final = Path("tests/data/kmod/61off/host.json.xz")
GOALS: Final = (Goal("load", "not bound 4K", 1.0), Goal("load", "not bound 2M", 1.0))


class Way(NamedTuple):
    """One way to load: does it once and returns the bytes of text that are the process's own."""

    name: str
    load: Callable[[], int]


class Bench:
    """A store with modules bound to one host, and another host."""

    def __init__(self, directory: Path, modules: Path, here: Path, there: Path) -> None:
        self.here, self.there = Host.open(here), Host.open(there)
        self.store = Store(directory / "store")
        paths = {
            path.name.partition(".")[0].replace("-", "_"): path for path in find_modules(modules)
        }
        self.modules = [Module.open(paths[name]) for name in self.here.modules]
        self.store.add(self.modules, self.here)
        raw = [(m, bind(m, self.here).placed) for m in self.modules]
        parts = []
        for module, placed in raw:
            content = bytearray(placed.layout.sizes[Area.TEXT])
            for number, spot in placed.layout.places.items():
                if spot.area is Area.TEXT:
                    section = module.elf.content(module.elf.sections[number])
                    content[spot.offset : spot.offset + len(section)] = section
            parts.append((placed.image.text.start, bytes(content)))
        self.start, content = in_units(parts, "text")
        self.raw = directory / "raw.img"
        write_file(self.raw, content, self.start)

    def ways(self) -> list[Way]:
        """Return the ways, the one that is promised to be best first."""
        return [
            Way("bound here", lambda: self._load(self.here, PTE)),
            Way("bound there 4K", lambda: self._load(self.there, PTE)),
            Way("bound there 2M", lambda: self._load(self.there, PMD)),
            Way("not bound 4K", lambda: self._relocate(PTE)),
            Way("not bound 2M", lambda: self._relocate(PMD)),
            Way("copied", self._copy),
        ]

    def _load(self, host: Host, granularity: Level) -> int:
        loader = Loader(self.store, host, vfsmap.map, policy="redirect", granularity=granularity)
        for module in self.modules:
            loader.load(module.name)
        own = {guard.name: guard.overlaid for guard in loader.guards}
        loader.close()
        return sum(own.values())

    def _relocate(self, granularity: Level) -> int:
        with self._guarded(granularity) as guard:
            for module in self.modules:
                placed = bind(module, self.here).placed
                text = placed.image.text
                with guard.window.view() as view:
                    old = view[text.start - self.start : text.stop - self.start]
                    pokes = pokes_between(
                        module.name, text.start, old, placed.area(Area.TEXT), write_set(placed)
                    )
                    old.release()
                guard.apply(pokes)
            return guard.overlaid

    @contextmanager
    def _guarded(self, granularity: Level) -> Iterator[TextGuard]:
        with vfsmap.map(self.raw, private=True, cow=granularity) as window:
            forbid_stores(window)
            yield TextGuard(window, "redirect", granularity, base=self.start)

    def _copy(self) -> int:
        return sum(len(bind(module, self.here).placed.area(Area.TEXT)) for module in self.modules)

    def pokes(self, granularity: Level) -> float:
        """Return how many pokes a second one after the other are redirected."""
        placed = bind(self.modules[-1], self.here).placed
        pokes = trace_pokes(placed.image, self.here, True)[:500]
        with self._guarded(granularity) as guard:
            start = time.perf_counter()
            for poke in pokes:
                guard.poke(poke.address, poke.new)
            return len(pokes) / (time.perf_counter() - start)


def run(quick: bool) -> Result:
    """Measure loading."""
    result = Result(
        "kmod",
        "Kernel modules loaded in place",
        "The text of nine modules: bound to this host nothing of it is written; bound to another "
        "host what differs is laid over; not bound, it is relocated and patched when loaded; "
        "copied, as the kernel does it.",
    )
    if not _MODULES.is_dir():
        result.left_out.append(f"everything: {_MODULES} is not there; `make test` fetches it")
        return result
    with TemporaryDirectory(dir=_MEDIUM) as place:
        bench = Bench(Path(place), _MODULES, _HERE, _THERE)
        ways = {way.name: way for way in bench.ways()}
        text = bench._copy()
        own = {name: way.load() for name, way in ways.items()}
        columns = ["way", "own text, KiB", "% of text"]
        rows: list[list[str | int | float]] = [
            [name, size // KIB, round(100 * size / text, 1)] for name, size in own.items()
        ]
        title = f"Text of their own: {len(bench.modules)} modules, {format_size(text)} of text"
        result.grids.append(Grid(title, columns, rows))
        result.promise("bound here: bytes of text written", own["bound here"], 0, at_most=True)
        pokes: list[list[str | int | float]] = [
            [format_size(level.size), round(bench.pokes(level))] for level in (PTE, PMD)
        ]
        result.grids.append(Grid("Single pokes", ["blocks", "a second"], pokes))

        def loads(name: str) -> float:
            start = time.perf_counter()
            ways[name].load()
            return 1 / (time.perf_counter() - start)

        measures = [Measure("load", "1/s", loads)]
        result.rates = alternate(measures, {name: name for name in ways}, 1 if quick else 5)
        judge(result, GOALS)
    return result
