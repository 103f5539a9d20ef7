"""A crash record at every store that makes it: what is there if the machine stops right then."""

from collections.abc import Callable
from typing import Any

import pytest

from vfsmap.pstore import Geometry, Region, format_region
from vfsmap.pstore.record import parse_title
from vfsmap.pstore.zone import Zone
from vfsmap.units import KIB

STORES = ("zap", "poke", "publish")


def images_of(
    region: bytearray, monkeypatch: pytest.MonkeyPatch, action: Callable[[], Any]
) -> list[bytes]:
    """Return the region as it is after each step that stores, while ``action`` runs."""
    images = [bytes(region)]

    def spied(name: str) -> Callable[..., None]:
        real = getattr(Zone, name)

        def store(zone: Zone, *args: Any) -> None:
            real(zone, *args)
            images.append(bytes(region))

        return store

    with monkeypatch.context() as patched:
        for name in STORES:
            patched.setattr(Zone, name, spied(name))
        action()
    return images


def numbers(image: bytes, geometry: Geometry) -> list[int]:
    with Region.over(image, geometry) as region:
        titles = [parse_title(file.data) for file in region.files() if file.kind == "dmesg"]
    assert None not in titles, "a record is torn"
    return sorted(title.number for title in titles if title)


@pytest.mark.parametrize("ecc", [0, 16])
@pytest.mark.parametrize("before", [0, 1, 4])
def test_crash_record_is_whole_or_absent_and_its_number_is_never_used_twice(
    ecc: int, before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    geometry = Geometry(64 * KIB, 8 * KIB, 16 * KIB, 16 * KIB, ecc=ecc)
    buffer = bytearray(64 * KIB)
    format_region(buffer, geometry, overwrite=True)
    with Region.over(buffer, geometry) as region:
        for _ in range(before):
            region.put("Oops", b"text\n")
        images = images_of(buffer, monkeypatch, lambda: region.put("Panic", b"the new one\n"))
    assert len(images) > 5
    old, new = list(range(1, before + 1)), before + 1
    kept = old[1:] if before == 4 else old
    for image in images:
        found = numbers(image, geometry)
        assert found in (old, kept, [*kept, new])
        with Region.over(bytearray(image), geometry) as later:
            counter = later.ledger.counter
            assert counter >= max(found, default=0)
            if len(found) < len(old):  # gone for the new one: then it is counted
                assert later.ledger.overwritten == 1
            later.put("Oops", b"after the crash\n")
            assert later.ledger.counter == counter + 1
    assert numbers(images[-1], geometry) == [*kept, new]


def test_ledger_is_the_old_or_the_new_one_at_every_store(monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = Geometry(64 * KIB, 8 * KIB, 16 * KIB, 16 * KIB)
    buffer = bytearray(64 * KIB)
    format_region(buffer, geometry)
    with Region.over(buffer, geometry) as region:
        images = images_of(buffer, monkeypatch, lambda: region.set_policy(overwrite=True))
    policies = []
    for image in images:
        with Region.over(image, geometry) as region:
            policies.append(region.ledger.overwrite)
    assert policies == sorted(policies)
    assert (policies[0], policies[-1]) == (False, True)
