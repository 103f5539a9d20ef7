"""Page tables as pure arithmetic: one entry for every level, no function that names one."""

from vfsmap.pgtable.architecture import (
    ARCHITECTURES,
    ARM64_4K,
    ARM64_16K,
    ARM64_64K,
    NO_SPECIAL_BIT,
    RISCV64_SV39,
    RISCV64_SV48,
    RISCV64_SV57,
    X86_64,
    X86_64_5,
    Architecture,
    Bits,
)
from vfsmap.pgtable.entry import Entry, decode, encode
from vfsmap.pgtable.run import Run
from vfsmap.pgtable.table import Copy, PageTable, Statistics, Step

__all__ = [
    "ARCHITECTURES",
    "ARM64_4K",
    "ARM64_16K",
    "ARM64_64K",
    "NO_SPECIAL_BIT",
    "RISCV64_SV39",
    "RISCV64_SV48",
    "RISCV64_SV57",
    "X86_64",
    "X86_64_5",
    "Architecture",
    "Bits",
    "Copy",
    "Entry",
    "PageTable",
    "Run",
    "Statistics",
    "Step",
    "decode",
    "encode",
]
