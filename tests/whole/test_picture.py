"""Pictures of pools: each unit is what it is."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

import vfsmap as library
from vfsmap.fs import ROOT, FileSystem
from vfsmap.pool import Pool
from vfsmap.testing.commands import Server, served_pool, vfsmap
from vfsmap.testing.media import tmpfs
from vfsmap.units import KIB, MIB
from vfsmap_tools.picture import KINDS, UNIT, Picture, svg, taken_of

SIZE = 64 * MIB
_SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with tmpfs(huge="always", size="200M") as place, served_pool(place, "64M") as served:
        (served.directory / "small").write_bytes(bytes(1900 * KIB))
        (served.directory / "large").write_bytes(bytes(6 * MIB))
        (served.directory / "sealed").write_bytes(bytes(4 * MIB))
        vfsmap("seal", served.directory / "sealed")
        yield served


def units(picture: Picture, kind: str) -> int:
    return picture.units.count(kind)


def test_every_unit_of_a_mounted_pool_is_what_it_is(server: Server) -> None:
    picture = taken_of(server.directory)
    assert (units(picture, "huge"), units(picture, "sealed")) == (3, 2)
    assert units(picture, "log") >= 1
    assert units(picture, "fragmented") >= 1
    assert units(picture, "free") == SIZE // UNIT - sum(
        units(picture, kind.name) for kind in KINDS if kind.name != "free"
    )
    assert sorted(picture.owners.values()) == ["/large"] * 3 + ["/sealed"] * 2
    assert taken_of(server.pool) == picture


def test_what_a_window_maps_is_leased(server: Server) -> None:
    with library.map(server.directory / "large", offset=0, length=3 * MIB):
        picture = taken_of(server.directory)
        assert (units(picture, "leased"), units(picture, "huge")) == (2, 1)
        shown = vfsmap("map", "--picture", server.directory).stdout
        assert "leased" in shown
    assert "leased" not in vfsmap("map", "--picture", server.directory).stdout


def test_a_strip_of_characters_has_one_for_each_unit_and_says_what_they_mean(
    server: Server,
) -> None:
    strip, _, legend = vfsmap("map", "--picture", server.pool).stdout.partition("\n\n")
    assert len(strip.replace("\n", "")) == SIZE // UNIT
    assert "64M, a character is 2M" in legend
    assert all(name in legend for name in ("log", "sealed", "huge", "fragmented", "free"))


def test_json_adds_up_to_the_pool(server: Server) -> None:
    found = json.loads(vfsmap("map", "--picture", server.pool, "--json").stdout)
    assert sum(found["bytes"].values()) == found["size"] == SIZE
    assert sum(run["count"] for run in found["runs"]) == SIZE // UNIT


def test_the_svg_has_a_tile_for_all_units_and_names_who_owns_them(
    server: Server, tmp_path: Path
) -> None:
    path = tmp_path / "pool.svg"
    vfsmap("map", server.directory, "--svg", path)
    root = ElementTree.parse(path).getroot()
    told = [each.text or "" for each in root.findall(f"{_SVG}rect/{_SVG}title")]
    assert any(text.endswith("6M: huge, /large") for text in told)
    tiles = [each for each in root.findall(f"{_SVG}rect") if each.find(f"{_SVG}title") is not None]
    assert sum(int(each.get("width", "0")) + 1 for each in tiles) == SIZE // UNIT * 8


def test_the_last_unit_of_a_pool_may_be_short_and_a_name_may_be_anything(tmp_path: Path) -> None:
    path = tmp_path / "pool"
    with FileSystem.format(Pool.create(path, 8 * MIB + 12 * KIB)) as fs:
        ino = fs.create(ROOT, b"<&\xff\x1b>", 0o644, 0, 0).ino
        fs.write(ino, 0, bytes(2 * MIB))
    picture = taken_of(path)
    assert len(picture.units) == 5
    assert picture.units[-1] in ("free", "fragmented")
    assert sum(picture.bytes_of().values()) == 8 * MIB + 12 * KIB
    ElementTree.fromstring(svg(picture, "a & \udcff\x1b"))


def test_a_very_large_pool_has_a_few_units_to_a_tile() -> None:
    picture = Picture(1 << 40, ["free"] * (1 << 19), {})
    root = ElementTree.fromstring(svg(picture, "large"))
    assert len(root.findall(f"{_SVG}rect")) < 1000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--picture", "/"), "no pool is mounted"),
        (("--picture", os.devnull), "pool"),
        (("--picture", "/", "--populate"), "--picture goes with"),
    ],
)
def test_what_can_not_be_shown_is_refused_in_one_line(
    arguments: tuple[str, ...], words: str
) -> None:
    failed = vfsmap("map", *arguments, check=False)
    assert failed.returncode in (1, 2, 3)
    assert words in failed.stderr
    assert len(failed.stderr.splitlines()) == 1
