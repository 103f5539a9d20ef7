"""The guard of persistent text: a write to it is refused, or redirected to a private copy.

A poke names an address in the image's own terms, the bytes to store, and the bytes that should be
there.  Under the policy ``refuse`` nothing is stored and the caller is told; under ``redirect``
the blocks it touches, of 4 KiB or 2 MiB, are copied for this process and changed there, so that
the medium stays as it is.  What is refused becomes an event of the mapping daemon; whoever else
wants to know, a crash log's recorder say, is called with it.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, Literal, NamedTuple

from vfsmap.errors import Invalid, NotFound, Sealed, VfsmapError
from vfsmap.mapping.overlay import PrivateWindow
from vfsmap.mapping.window import Window
from vfsmap.pmem import libc
from vfsmap.units import PMD, PTE, Level, align_down

Policy = Literal["refuse", "redirect"]
POLICIES: Final[tuple[Policy, ...]] = ("refuse", "redirect")
_SHOWN: Final = 16
_TOLD: Final = 16  # pokes of one batch that are events of their own; the rest is one


class Poke(NamedTuple):
    """A write to text."""

    address: int
    new: bytes
    expected: bytes | None = None
    """What should be there before; None: never mind."""


class Violation(NamedTuple):
    """A poke that was refused."""

    image: str
    address: int
    offset: int
    """In the window, bytes."""
    new: bytes

    def __str__(self) -> str:
        """Return one line, for a log."""
        shown = self.new[:_SHOWN].hex() + ("..." if len(self.new) > _SHOWN else "")
        return (
            f"refused to write {len(self.new)} bytes at {self.address:#x} of {self.image}: {shown}"
        )


class TextGuard:
    """Stands before the text of one image.

    Args:
        window: what is guarded; for ``redirect`` a private one whose blocks are of ``granularity``.
        policy: what happens to a poke.
        granularity: the size of the blocks that are copied.
        base: the address of the window's first byte in the image's terms; by default where the
            window is in this process.
        name: the image's, for messages.
        name_at: tells the image's name by an address, where the window holds several images.
        executable: blocks laid over the window are to be run, not only read.
        on_violation: is called with every poke that is refused.

    Raises:
        Invalid: an unknown policy, or a window that can't be redirected so.
    """

    def __init__(
        self,
        window: Window,
        policy: Policy = "refuse",
        granularity: Level = PTE,
        *,
        base: int | None = None,
        name: str = "image",
        name_at: Callable[[int], str] | None = None,
        executable: bool = False,
        on_violation: Callable[[Violation], None] | None = None,
    ) -> None:
        if policy not in POLICIES:
            raise Invalid(f"policy {policy!r}: one of {', '.join(POLICIES)} is expected")
        if granularity not in (PTE, PMD):
            raise Invalid(f"text is copied in blocks of 4K or 2M, not {granularity}")
        if policy == "redirect":
            if not isinstance(window, PrivateWindow):
                raise Invalid("redirecting needs a private window: map it with private=True")
            if window.cow != granularity:
                raise Invalid(f"the window copies blocks of {window.cow}, not {granularity}")
            if executable and window.writable:
                raise Invalid("what is executable takes no plain stores: use stores=False")
        self.window = window
        self.policy = policy
        self.granularity = granularity
        self.base = window.address if base is None else base
        self.name = name
        self._name_at = name_at or (lambda _: name)
        self.refused = self.redirected = 0
        """Pokes, so far."""
        self._blocks: set[int] = set()  # addresses of blocks that were copied
        self._executable = executable
        self._on_violation = on_violation

    @property
    def span(self) -> range:
        """The addresses it guards, in the image's terms."""
        return range(self.base, self.base + self.window.length)

    @property
    def overlaid(self) -> int:
        """Bytes that private copies lie over."""
        return self.window.owned() if isinstance(self.window, PrivateWindow) else 0

    def overlaid_in(self, span: range) -> int:
        """Return how many bytes of a range of addresses private copies lie over."""
        size = self.granularity.size
        covered = (min(b + size, span.stop) - max(b, span.start) for b in self._blocks)
        return sum(part for part in covered if part > 0)

    def poke(self, address: int, new: bytes, expected: bytes | None = None) -> int:
        """Store bytes, if the policy lets it; return the bytes copied for it.

        Raises:
            Sealed: the policy is to refuse.
            Invalid: the range is not in the image, or something else than expected is there.
        """
        return self.apply([Poke(address, new, expected)])

    def apply(self, pokes: Sequence[Poke]) -> int:
        """Store many pokes, each block copied once; return the bytes copied.

        All are stored or none, unless memory or mappings run out in the middle.  Of pokes that
        overlap the later one wins.

        Raises:
            Sealed: the policy is to refuse; every poke was reported.
            NoMemory, TooManyMappings: the first ones are stored.
            Invalid: as :meth:`poke`.
        """
        with self.window.view() as view:
            for poke in pokes:
                self._check(poke, view)
            if self.policy == "refuse" and pokes:
                self._refuse(pokes)
            patches = list(self._patches(pokes, view))
        copied = 0
        for offset, data in patches:
            copied += self._store(offset, data)
        self.redirected += len(pokes)
        return copied

    def _check(self, poke: Poke, view: memoryview) -> None:
        offset = poke.address - self.base
        if offset < 0 or offset + len(poke.new) > self.window.length:
            raise Invalid(
                f"{len(poke.new)} bytes at {poke.address:#x} are not inside {self.name}, which "
                f"ends at {self.span.stop:#x}"
            )
        if poke.expected is not None:
            found = bytes(view[offset : offset + len(poke.expected)])
            if found != poke.expected:
                raise Invalid(
                    f"{self._name_at(poke.address)} has {found.hex()} at {poke.address:#x}, not "
                    f"{poke.expected.hex()}: it was not bound as this poke believes"
                )

    def _refuse(self, pokes: Sequence[Poke]) -> None:
        for number, poke in enumerate(pokes):
            self.refused += 1
            image, offset = self._name_at(poke.address), poke.address - self.base
            violation = Violation(image, poke.address, offset, poke.new)
            if self._on_violation is not None:
                self._on_violation(violation)
            if number < _TOLD:
                self._report(violation.offset, len(poke.new), str(violation))
        if rest := pokes[_TOLD:]:
            low = min(poke.address for poke in rest) - self.base
            high = max(poke.address + len(poke.new) for poke in rest) - self.base
            self._report(low, high - low, f"refused {len(rest)} more writes to {self.name}")
        more = f" and {len(pokes) - 1} more" if len(pokes) > 1 else ""
        first = pokes[0]
        raise Sealed(
            f"{self._name_at(first.address)} is persistent text and is never written: the poke of "
            f"{len(first.new)} bytes at {first.address:#x}{more} is refused; load it with the "
            f"policy redirect to have private copies"
        )

    def _report(self, offset: int, length: int, detail: str) -> None:
        """Make it an event of the daemon that granted the window, if there still is one."""
        if self.window.grantor is not None:
            with contextlib.suppress(VfsmapError):  # a poke is refused whoever hears of it
                self.window.grantor.report(offset, length, detail)

    def _patches(self, pokes: Sequence[Poke], view: memoryview) -> Iterator[tuple[int, bytes]]:
        """Yield one run of bytes for each block: from its first poke to the end of its last."""
        size = self.granularity.size
        blocks: dict[int, list[tuple[int, bytes]]] = {}
        for poke in pokes:
            for offset, piece in _split(poke.address - self.base, poke.new, self._phase, size):
                block = align_down(offset + self._phase, size)
                blocks.setdefault(block, []).append((offset, piece))
        for pieces in blocks.values():
            first = min(offset for offset, _ in pieces)
            last = max(offset + len(piece) for offset, piece in pieces)
            run = bytearray(view[first:last])
            for offset, piece in pieces:
                run[offset - first : offset - first + len(piece)] = piece
            yield first, bytes(run)

    @property
    def _phase(self) -> int:
        """How far the window's first byte lies behind the start of a block."""
        return self.window.address % self.granularity.size

    def _store(self, offset: int, data: bytes) -> int:
        assert isinstance(self.window, PrivateWindow)
        copied = self.window.write(offset, data)
        block = align_down(offset + self._phase, self.granularity.size) - self._phase
        self._blocks.add(self.base + block)
        if self._executable:
            low, length = self.window.mapped
            address = self.window.address + offset
            size = max(self.granularity.size, self.window.medium.page_size)
            start = max(align_down(address, size), low)
            end = min(align_down(address + len(data) - 1, size) + size, low + length)
            libc.mprotect(start, end - start, libc.PROT_READ | libc.PROT_EXEC)
        return copied


def _split(offset: int, data: bytes, phase: int, size: int) -> Iterator[tuple[int, bytes]]:
    """Yield the pieces of a range that lie in different blocks."""
    at = 0
    while at < len(data):
        room = size - (offset + at + phase) % size
        yield offset + at, data[at : at + room]
        at += room


class Guards:
    """The guards of several images: a poke goes to the one whose addresses it names."""

    def __init__(self, guards: Iterable[TextGuard] = ()) -> None:
        self._guards = list(guards)

    def add(self, guard: TextGuard) -> None:
        """Add an image.

        Raises:
            Invalid: another image has some of its addresses.
        """
        for other in self._guards:
            if guard.span.start < other.span.stop and other.span.start < guard.span.stop:
                raise Invalid(f"{guard.name} and {other.name} share addresses")
        self._guards.append(guard)

    def __iter__(self) -> Iterator[TextGuard]:
        return iter(self._guards)

    def find(self, address: int) -> TextGuard:
        """Return the guard of an address.

        Raises:
            NotFound: no image has that address.
        """
        for guard in self._guards:
            if address in guard.span:
                return guard
        raise NotFound(f"no image holds the address {address:#x}")

    def poke(self, address: int, new: bytes, expected: bytes | None = None) -> int:
        """Store bytes in the image that holds the address; return the bytes copied for it.

        Raises:
            NotFound: no image has that address.
            Sealed, Invalid: as :meth:`TextGuard.poke`.
        """
        return self.find(address).poke(address, new, expected)

    def apply(self, pokes: Iterable[Poke]) -> int:
        """Store many pokes, each in the image that holds it; return the bytes copied.

        Raises:
            NotFound, Sealed, Invalid: as :meth:`poke`; images before that one are changed.
        """
        routed: dict[int, list[Poke]] = {}
        guards: dict[int, TextGuard] = {}
        for poke in pokes:
            guard = self.find(poke.address)
            guards[id(guard)] = guard
            routed.setdefault(id(guard), []).append(poke)
        return sum(guards[key].apply(batch) for key, batch in routed.items())
