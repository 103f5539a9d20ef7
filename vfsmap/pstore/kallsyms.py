"""The kernel's symbols, from a copy of /proc/kallsyms: an address becomes a name."""

import re
from bisect import bisect_right
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple, Self

from vfsmap.errors import Invalid

_LINE: Final = re.compile(r"([0-9a-f]{8,16}) \S (\S+)(?:\t\[(\S+)\])?$")


class Symbol(NamedTuple):
    """What an address lies in."""

    name: str
    module: str
    """Empty for the kernel itself."""
    offset: int
    """Of the address in the symbol."""
    size: int
    """Bytes up to the next symbol."""


class Symbols:
    """Symbols by address."""

    def __init__(self, symbols: list[tuple[int, str, str]]) -> None:
        # The first of several names for one address is the one that the kernel prints.
        first: dict[int, tuple[str, str]] = {}
        for address, name, module in symbols:
            first.setdefault(address, (name, module))
        self._addresses = sorted(first)
        self._names = first
        self.find = cache(self._find)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the text of /proc/kallsyms.

        Raises:
            Invalid: a line is not one of kallsyms, or the addresses were hidden.
        """
        symbols = []
        for line in text.splitlines():
            match = _LINE.match(line)
            if not match:
                raise Invalid(f"{line[:80]!r} is no line of kallsyms: ADDRESS TYPE NAME [MODULE]")
            symbols.append((int(match[1], 16), match[2], match[3] or ""))
        if not any(address for address, _, _ in symbols):
            raise Invalid("the kallsyms file has no addresses; read /proc/kallsyms as root")
        return cls(symbols)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a copy of /proc/kallsyms.

        Raises:
            Invalid: it is not one, or can't be read.
        """
        try:
            return cls.parse(path.read_text())
        except (OSError, UnicodeDecodeError) as exc:
            raise Invalid(f"{path} can't be read as a kallsyms file: {exc}") from exc

    def _find(self, address: int) -> Symbol | None:
        at = bisect_right(self._addresses, address)
        if not 0 < at < len(self._addresses):
            return None
        start, end = self._addresses[at - 1], self._addresses[at]
        name, module = self._names[start]
        return Symbol(name, module, address - start, end - start)

    def format_name(self, address: int) -> str:
        """Return what printk's ``%ps`` makes of an address."""
        symbol = self.find(address)
        return _named(symbol, symbol.name) if symbol else f"{address:#x}"

    def format_place(self, address: int) -> str:
        """Return what printk's ``%pS`` makes of an address."""
        symbol = self.find(address)
        if not symbol:
            return f"{address:#x}"
        return _named(symbol, f"{symbol.name}+{symbol.offset:#x}/{symbol.size:#x}")


def _named(symbol: Symbol, text: str) -> str:
    return f"{text} [{symbol.module}]" if symbol.module else text
