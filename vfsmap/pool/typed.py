"""Typed objects: a program's own structures, told apart by a tag made from their layout."""

import ctypes
import zlib
from functools import cache
from typing import Any, NewType

from vfsmap.pool.layout import USER_TAG

Oid = NewType("Oid", int)
"""The number of an object; never used twice in a pool."""


@cache
def tag_of(kind: type[ctypes.Structure]) -> int:
    """Return the tag of a typed object: it changes with the name and with the layout of a type.

    So an object stored by a program whose structure was another is refused, not misread.
    """
    return USER_TAG | zlib.crc32(_layout(kind).encode())


def _layout(kind: Any) -> str:
    """Return a type's name with its size and, for all it is made of, names, types and places."""
    if issubclass(kind, ctypes.Array):
        return f"{kind._length_}*{_layout(kind._type_)}"
    parts = []
    for base in reversed(kind.__mro__):
        for name, part, *bits in vars(base).get("_fields_", ()):
            parts.append(f"{name}:{_layout(part)}:{getattr(kind, name).offset}{bits}")
    return f"{kind.__name__}:{ctypes.sizeof(kind)}({','.join(parts)})"
