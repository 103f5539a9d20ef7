"""Loading images: text mapped in place from the store, data copied, differences laid over.

On the host that an image was bound to, its text is mapped and nothing is written.  On any other it
is bound anew in memory, and each site that differs is poked through the guard.
"""

import ctypes
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

from vfsmap.errors import Damaged
from vfsmap.guard import Guards, Policy, TextGuard, Violation
from vfsmap.kmod.host import Host
from vfsmap.kmod.index import Variant, host_digest
from vfsmap.kmod.layout import Area
from vfsmap.kmod.pack import COPIED, DATA, RODATA, TEXT, Mapper, damaged_blocks
from vfsmap.kmod.plan import pokes_between, toggle_pokes, trace_pokes
from vfsmap.kmod.store import Store
from vfsmap.kmod.subject import Subject
from vfsmap.mapping.window import Window
from vfsmap.pmem import libc
from vfsmap.units import PTE, Level, align_down, align_up


class Report(NamedTuple):
    """What loading an image took, in bytes."""

    name: str
    bound_here: bool
    """Whether the store has it bound to this very host."""
    text: int
    in_place: int
    """Text and read-only data that is mapped from the store."""
    copied: int
    """Data that is this process's own."""
    overlaid: int
    """Text that private copies lie over."""
    differing_sites: int
    page_sizes: dict[int, int]
    """How the kernel maps the text of the image's pack: bytes by size of the entries."""


class Loaded:
    """An image that has been loaded."""

    def __init__(
        self,
        variant: Variant,
        subject: Callable[[], Subject],
        guard: TextGuard,
        data: dict[Area, Any],
    ) -> None:
        self.variant = variant
        self._subject = subject
        self.guard = guard
        self.data = data
        self.bound_here = True
        self.differing = 0
        self.in_place = 0
        self.copied = sum(len(part) for part in data.values())

    @cached_property
    def subject(self) -> Subject:
        """What the image was before it was patched: read only when somebody asks for it."""
        return self._subject()

    @property
    def text(self) -> bytes:
        """The text as it is mapped now."""
        start = self.variant.text.start - self.guard.base
        with self.guard.window.view() as view:
            return bytes(view[start : start + len(self.variant.text)])


class Loader:
    """Loads images of one store for one host."""

    def __init__(
        self,
        store: Store,
        host: Host,
        mapper: Mapper,
        *,
        policy: Policy = "refuse",
        granularity: Level = PTE,
        resident: bool = False,
        on_violation: Callable[[Violation], None] | None = None,
    ) -> None:
        """Prepare; ``resident`` puts images at their own addresses and lets their text run."""
        self.store = store
        self.host = host
        self.guards = Guards()
        self.images: dict[str, Loaded] = {}
        self._digest = host_digest(host)
        self._map = mapper
        self._policy = policy
        self._granularity = granularity
        self._resident = resident
        self._on_violation = on_violation
        self._texts: dict[str, TextGuard] = {}
        self._rodata: dict[str, Window] = {}

    def load(self, name: str) -> Loaded:
        """Load a module; return what it has become.

        Raises:
            NotFound: the store has no such module.
            Sealed: it was bound to another host, and the policy is to refuse private copies.
            Damaged: its file is not what was sealed.
        """
        variant = self.store.find(name, self.host)[0]
        if variant.name in self.images:
            return self.images[variant.name]
        guard = self._text(variant)
        if variant.host == self._digest:
            subject = partial(self.store.subject, variant)
            loaded = Loaded(variant, subject, guard, self._stored_data(variant))
            loaded.in_place = self._map_rodata(variant)
        else:
            loaded = self._adapt(variant, guard)
        loaded.in_place += align_up(len(variant.text), PTE.size)
        self.images[variant.name] = loaded
        return loaded

    def report(self, loaded: Loaded, *, page_sizes: bool = True) -> Report:
        """Return what loading an image took, by now; without page sizes the kernel is not asked."""
        variant = loaded.variant
        pages = range(variant.text.start, align_up(variant.text.stop, PTE.size))
        overlaid = loaded.guard.overlaid_in(pages)
        return Report(
            name=variant.name,
            bound_here=loaded.bound_here,
            text=len(variant.text),
            in_place=loaded.in_place - overlaid,
            copied=loaded.copied,
            overlaid=overlaid,
            differing_sites=loaded.differing,
            page_sizes=loaded.guard.window.page_sizes() if page_sizes else {},
        )

    def toggle(self, loaded: Loaded, key: int, enabled: bool) -> int:
        """Switch a key's jump labels; return how many there are.

        Raises:
            NotFound: no jump label follows that key.
            Sealed: the policy is to refuse.
        """
        pokes = toggle_pokes(loaded.subject.image, key, enabled)
        self.guards.apply(pokes)
        return len(pokes)

    def trace(self, loaded: Loaded, enabled: bool) -> int:
        """Let each function call the tracer, or leave it alone; return how many there are.

        Raises:
            Sealed: the policy is to refuse.
        """
        pokes = trace_pokes(loaded.subject.image, self.host, enabled)
        self.guards.apply(pokes)
        return len(pokes)

    def close(self) -> None:
        """Unmap what can be unmapped; images that are resident stay until the process ends."""
        if not self._resident:
            for window in [*self._rodata.values(), *(g.window for g in self._texts.values())]:
                window.close()

    def _text(self, variant: Variant) -> TextGuard:
        """Map the text of a variant's pack, checked against its digest."""
        if variant.pack in self._texts:
            return self._texts[variant.pack]
        recorded = self.store.index.packs[variant.pack].files[TEXT]
        path = self.store.file(variant.pack, TEXT)
        redirect = self._policy == "redirect"
        if redirect:
            from_store = self._map(path, private=True, cow=self._granularity)
            forbid_stores(from_store)
        else:
            from_store = self._map(path, sealed=not self._resident)
        self._check(path, recorded.size, from_store, variant)
        if self._resident:
            make_resident(from_store, recorded.address, executable=True, seal=not redirect)
        guard = TextGuard(
            from_store,
            self._policy,
            self._granularity,
            base=recorded.address,
            name=f"the pack of {variant.name}",
            name_at=self.store.names_of(variant.pack),
            executable=self._resident,
            on_violation=self._on_violation,
        )
        self.guards.add(guard)
        self._texts[variant.pack] = guard
        return guard

    def _check(self, path: Path, size: int, window: Window, variant: Variant) -> None:
        """Check the blocks that hold a file's content before anything of it is used."""
        name = path.stem
        recorded = self.store.index.packs[variant.pack].files[name]
        if window.length != size:
            raise Damaged(f"{path} has {window.length} bytes, {size} were sealed")
        with window.view() as view:
            wrong = damaged_blocks(path, recorded, view)
        if wrong:
            named = ", ".join(map(str, wrong[:10]))
            raise Damaged(f"{path} is not what was sealed: blocks {named} differ")

    def _map_rodata(self, variant: Variant) -> int:
        """Map read-only data; return the bytes of the variant's that are mapped in place."""
        size = variant.sizes[Area.RODATA.value]
        recorded = self.store.index.packs[variant.pack].files[RODATA]
        if size and variant.pack not in self._rodata:
            path = self.store.file(variant.pack, RODATA)
            window = self._map(path)
            self._check(path, recorded.size, window, variant)
            if self._resident:
                make_resident(window, recorded.address)
            self._rodata[variant.pack] = window
        return align_up(size, PTE.size)

    def _stored_data(self, variant: Variant) -> dict[Area, Any]:
        """Return this process's own copies of an image's data."""
        path = self.store.file(variant.pack, DATA)
        found: dict[Area, Any] = {}
        with path.open("rb") as stream:
            for area in COPIED:
                size = variant.sizes[area.value]
                if size and not area.is_init:
                    stream.seek(variant.offsets[area.value])
                    found[area] = self._own(variant.areas[area], stream.read(size))
        return found

    def _own(self, address: int, content: bytes) -> Any:
        """Return a writable copy, at its address if images are resident."""
        if not self._resident:
            return bytearray(content)
        length = align_up(len(content), PTE.size)
        flags = libc.MAP_PRIVATE | libc.MAP_ANONYMOUS | libc.MAP_FIXED_NOREPLACE
        libc.mmap(address, length, libc.PROT_READ | libc.PROT_WRITE, flags)
        ctypes.memmove(address, content, len(content))
        return (ctypes.c_char * len(content)).from_address(address)

    def _adapt(self, variant: Variant, guard: TextGuard) -> Loaded:
        """Bind an image anew, and poke the sites that differ."""
        subject = self.store.subject(variant)
        bound = subject.bind(self.host)
        start = variant.text.start - guard.base
        with guard.window.view() as view:
            old = view[start : start + len(variant.text)]
            pokes = pokes_between(variant.name, bound.start, old, bound.text, bound.planned)
            old.release()
        shift = bound.start - variant.text.start
        guard.apply([poke._replace(address=poke.address - shift) for poke in pokes])
        data = {area: self._own(*part) for area, part in bound.data.items()}
        loaded = Loaded(variant, lambda: subject, guard, data)
        loaded.bound_here = False
        loaded.differing = len(pokes)
        return loaded


def forbid_stores(window: Window) -> None:
    """Let a private window be changed by its own methods only; a stray store to it dies."""
    if window.writable:
        libc.mprotect(*window.mapped, libc.PROT_READ)
        window.writable = False


def make_resident(
    window: Window, address: int, *, executable: bool = False, seal: bool = False
) -> None:
    """Move a window to an address, for as long as the process lives.

    Raises:
        OSError: the addresses are taken, or the medium's pages can't be moved there.
    """
    base, length = window.mapped
    target = address - (window.address - base)
    flags = libc.MAP_PRIVATE | libc.MAP_ANONYMOUS | libc.MAP_NORESERVE | libc.MAP_FIXED_NOREPLACE
    libc.mmap(target, length, libc.PROT_NONE, flags)  # nothing else lies there
    for call in window.layout.calls:
        libc.mremap(
            base + call.at,
            call.length,
            call.length,
            libc.MREMAP_MAYMOVE | libc.MREMAP_FIXED,
            target + call.at,
        )
    window._base = target  # the window follows its pages
    if executable:
        libc.mprotect(target, length, libc.PROT_READ | libc.PROT_EXEC)
    if seal:
        libc.mseal(align_down(target, PTE.size), length)
        window.sealed = True
