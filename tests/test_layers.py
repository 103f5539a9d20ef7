"""Imports point down this list, never up and never sideways."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOMES = (ROOT / "tools", ROOT / "fuse", ROOT)
LAYERS = (
    ("vfsmap.testing",),
    ("vfsmap_tools.bench",),
    ("vfsmap_tools",),
    ("vfsmap.fsspec",),
    ("vfsmap.daemon", "vfsmap_fuse"),
    ("vfsmap.kmod",),
    ("vfsmap.guard", "vfsmap.verity", "vfsmap.pstore"),
    ("vfsmap.mapping",),
    ("vfsmap.fs",),
    ("vfsmap.pool",),
    ("vfsmap.pgtable", "vfsmap.pmem", "vfsmap.alloc"),
    ("vfsmap.units", "vfsmap.tally"),
    ("vfsmap.errors",),
)
HEIGHT = {name: -row for row, names in enumerate(LAYERS) for name in names}
ASYNC = ("vfsmap.daemon", "vfsmap_fuse", "vfsmap_tools", "vfsmap_tools.bench", "vfsmap.testing")
ONLY_IN = {
    "pyfuse3": ("vfsmap_fuse", "vfsmap_tools.bench"),
    "trio": ASYNC,
    "asyncio": (),
}
SOURCES = [p for home in HOMES for p in sorted(home.glob("vfsmap*/**/*.py"))]


def layer(module: str) -> str | None:
    return next((n for n in HEIGHT if f"{module}.".startswith(f"{n}.")), None)


def home_layer(path: Path) -> str | None:
    home = next(h for h in HOMES if path.is_relative_to(h))
    return layer(".".join(path.relative_to(home).with_suffix("").parts))


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def complaints(here: str | None, names: Iterator[str]) -> Iterator[str]:
    for name in names:
        there = layer(name)
        if here and there and here != there and HEIGHT[there] >= HEIGHT[here]:
            yield f"{here} may not import {name}"
        allowed = ONLY_IN.get(name.partition(".")[0])
        if allowed is not None and here not in allowed:
            yield f"{here} may not import {name}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    assert list(complaints(home_layer(path), imported(path))) == []


@pytest.mark.parametrize(
    ("here", "name"),
    [
        ("vfsmap.pool", "vfsmap.fs.tree"),
        ("vfsmap.pmem", "vfsmap.alloc"),
        ("vfsmap.daemon", "vfsmap_fuse.edge"),
        ("vfsmap.pool", "trio"),
        ("vfsmap.daemon", "pyfuse3"),
    ],
)
def test_an_upward_a_sideways_and_a_forbidden_import_are_found(here: str, name: str) -> None:
    assert list(complaints(here, iter([name])))
