"""Name a file, get its bytes as aligned huge pages, with rights and a lifetime.

``vfsmap.map(path)`` is the way in; it finds the mapping daemon by itself.
"""

from typing import TYPE_CHECKING, Any

from vfsmap.units import PMD, PTE, PUD, Level

if TYPE_CHECKING:
    from vfsmap.daemon.attach import map as map
    from vfsmap.mapping.window import Window as Window

__version__ = "0.1.0"
__all__ = ["PMD", "PTE", "PUD", "Level", "Window", "map"]

_HOMES = {"map": "vfsmap.daemon.attach", "Window": "vfsmap.mapping.window"}


def __getattr__(name: str) -> Any:
    """Import what is heavy when it is first asked for, once."""
    if name in _HOMES:
        from importlib import import_module

        found = globals()[name] = getattr(import_module(_HOMES[name]), name)
        return found
    raise AttributeError(f"module 'vfsmap' has no attribute {name!r}")
