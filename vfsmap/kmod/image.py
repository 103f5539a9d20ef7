"""An image in memory with its patch tables: a relocated module, or a whole kernel."""

from typing import Final, NamedTuple

from vfsmap.kmod.memory import Memory


class Dialect(NamedTuple):
    """What differs between the kernels whose patching is known; told by what an image contains."""

    name: str
    alternative_size: int
    """Bytes of an entry of ``.altinstructions``."""
    longest_nop: int
    relocates: bool
    """Alternatives are relocated instruction by instruction, in a copy."""
    its_feature: int
    """The feature that asks for thunks against indirect target selection."""


OLD: Final = Dialect("6.1", 12, 8, False, 21 * 32 + 5)
NEW: Final = Dialect("6.12", 14, 11, True, 21 * 32 + 6)


class Span(NamedTuple):
    """Where a table lies in an image's memory."""

    address: int
    size: int


ALTERNATIVES: Final = ".altinstructions"
PARAVIRT: Final = ".parainstructions"
RETPOLINES: Final = ".retpoline_sites"
RETURNS: Final = ".return_sites"
CALLS: Final = ".call_sites"
ENDBR: Final = ".ibt_endbr_seal"
LOCKS: Final = ".smp_locks"
JUMPS: Final = "__jump_table"
STATIC_CALLS: Final = ".static_call_sites"
FTRACE: Final = "__mcount_loc"

TABLES: Final = (
    ALTERNATIVES,
    PARAVIRT,
    RETPOLINES,
    RETURNS,
    CALLS,
    ENDBR,
    LOCKS,
    JUMPS,
    STATIC_CALLS,
    FTRACE,
)
"""The tables of places in text that the kernel patches, in the order in which it does."""


class Image:
    """Memory, tables, and which addresses are text."""

    def __init__(
        self,
        memory: Memory,
        dialect: Dialect,
        text: range,
        init_text: range = range(0),
        *,
        is_kernel: bool = False,
    ) -> None:
        self.memory = memory
        self.dialect = dialect
        self.text = text
        self.init_text = init_text
        self.lock_text = text
        """Where lock prefixes are taken out: before Linux 6.4 only in the section ``.text``."""
        self.is_kernel = is_kernel
        self.tables: dict[str, Span] = {}
        self.runtime_constants: dict[str, Span] = {}
        self.trampolines: range = range(0)
        """Where the trampolines of static calls lie (of a kernel)."""

    @property
    def name(self) -> str:
        """The name for messages."""
        return self.memory.name
