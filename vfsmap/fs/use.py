"""Who uses an inode: what keeps it, and keeps its bytes where they are."""


class Use:
    """Who keeps an inode: open handles and kernel references, writers, leases."""

    __slots__ = ("cached_writers", "holds", "pins", "writable_pins", "writers")

    def __init__(self) -> None:
        self.holds = 0
        self.writers = 0
        """Open handles that write through the mount."""
        self.cached_writers = 0
        """Those of them through which the kernel may have dirty pages."""
        self.pins: dict[int, Pin] = {}
        self.writable_pins = 0
        """How many leases may store into the file."""


class Pin:
    """A lease's grip on a range of a file."""

    __slots__ = ("end", "ino", "offset", "writable")

    def __init__(self, ino: int, offset: int, end: int, *, writable: bool) -> None:
        self.ino = ino
        self.offset = offset
        self.end = end
        self.writable = writable
