"""What a store keeps, a module or a kernel, behind the one face that the loader needs."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

from vfsmap.errors import NotFound
from vfsmap.kmod.bind import Placed, bases_from, bind, place_for
from vfsmap.kmod.branches import Callers
from vfsmap.kmod.host import Host
from vfsmap.kmod.image import Image
from vfsmap.kmod.kernel import Kernel, bind_kernel
from vfsmap.kmod.layout import Area, Layout
from vfsmap.kmod.module import Module
from vfsmap.kmod.pack import COPIED
from vfsmap.kmod.plan import kernel_write_set, keys_of, module_names, write_set
from vfsmap.kmod.relocate import Resolver
from vfsmap.kmod.tables import Site

CallersOf = Callable[[Host], Callers]
"""What the modules of a host call, as far as they are at hand."""


class Rebound(NamedTuple):
    """A subject bound to a host."""

    start: int
    """The address of its text there."""
    text: bytes
    planned: list[Site]
    """Every place in text that loading it may write."""
    data: dict[Area, tuple[int, bytes]]
    """Address and content of everything else that it needs at run time."""


class Subject(Protocol):
    """A module or a kernel, where a store has it."""

    @property
    def image(self) -> Image:
        """Its memory and tables, before anything is patched."""
        ...

    def bind(self, host: Host) -> Rebound:
        """Return it as a host would have it in memory.

        Raises:
            VfsmapError: it can't be bound to that host.
        """
        ...

    def keys(self) -> dict[str, int]:
        """Return the keys that its jump labels follow, by name."""
        ...

    def address_of(self, name: str) -> int:
        """Return the address of a symbol.

        Raises:
            NotFound: it has no such symbol.
        """
        ...


class ModuleSubject:
    """A module of a store."""

    def __init__(
        self,
        module: Module,
        host: Host,
        bases: dict[Area, int],
        resolve: Resolver,
        thunk_pages: list[int],
        callers: CallersOf,
    ) -> None:
        """Place it where the store has it, for the host it was bound to."""
        self._callers = callers
        self._module = module
        self._bases = bases
        self._resolve = resolve
        self._thunk_pages = thunk_pages
        self.placed: Placed = place_for(module, host, bases, resolve)

    @property
    def image(self) -> Image:
        """Its memory and tables, before anything is patched."""
        return self.placed.image

    def bind(self, host: Host) -> Rebound:
        """Bind it anew: where the host has it, else where the store has it."""
        try:
            bases = bases_from(host, self._module, Layout(self._module))
        except NotFound:
            bases = self._bases
        bound = bind(
            self._module,
            host,
            bases,
            resolve=self._resolve,
            thunk_pages=self._thunk_pages,
            callers=self._callers(host),
        )
        placed = bound.placed
        wanted = (Area.RODATA, *(area for area in COPIED if not area.is_init))
        data = {
            area: (placed.bases[area], placed.area(area))
            for area in wanted
            if placed.layout.sizes[area]
        }
        return Rebound(placed.image.text.start, placed.area(Area.TEXT), write_set(placed), data)

    def keys(self) -> dict[str, int]:
        """Return the keys that its jump labels follow, by name."""
        return keys_of(self.image, module_names(self.placed))

    def address_of(self, name: str) -> int:
        """Return the address of a symbol."""
        return self.placed.address_of_symbol(name)


class KernelSubject:
    """A kernel of a store."""

    def __init__(self, kernel: Kernel, callers: CallersOf = lambda _: {}) -> None:
        """Take a kernel as it was built, and what tells which of its functions modules call."""
        self._kernel = kernel
        self._callers = callers
        self.image: Image = kernel.image()

    @classmethod
    def open(cls, path: Path) -> "KernelSubject":
        """Read a kernel from a file."""
        return cls(Kernel.open(path))

    def bind(self, host: Host) -> Rebound:
        """Bind it anew."""
        image = bind_kernel(self._kernel, host, self._callers(host)).image
        start = image.text.start
        text = image.memory.read(start, len(image.text))
        planned = kernel_write_set(self.image, self._names())
        if distance := start - self.image.text.start:
            moves = [site for site in self._kernel.moves() if site.address in self.image.text]
            planned = [
                site._replace(address=site.address + distance) for site in (*planned, *moves)
            ]
        return Rebound(start, text, planned, {})

    def _names(self) -> list[tuple[int, int, str]]:
        return sorted((value, 0, name) for name, value in self._kernel.symbols.items())

    def keys(self) -> dict[str, int]:
        """Return the keys that its jump labels follow, by name."""
        return keys_of(self.image, self._names())

    def address_of(self, name: str) -> int:
        """Return the address of a symbol."""
        try:
            return self._kernel.symbols[name]
        except KeyError:
            raise NotFound(f"the kernel has no symbol {name!r}") from None
