"""Typed objects: a program's own structures, told apart by a tag made from their layout."""

import ctypes
import zlib
from functools import cache
from typing import NewType

from vfsmap.pool.layout import USER_TAG

Oid = NewType("Oid", int)
"""The number of an object; never used twice in a pool."""


@cache
def tag_of(kind: type[ctypes.Structure]) -> int:
    """Return the tag of a typed object: it changes with the name and with the layout of a type.

    So an object stored by a program whose structure was another is refused, not misread.
    """
    fields = ",".join(
        f"{field[0]}:{field[1].__name__}:{getattr(kind, field[0]).offset}"
        for field in kind._fields_
    )
    return USER_TAG | zlib.crc32(f"{kind.__name__}({fields})".encode())
