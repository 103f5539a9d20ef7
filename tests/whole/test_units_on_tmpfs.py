"""Units handed out on a real tmpfs: what is stored into them is what everybody reads."""

import os
from pathlib import Path

import pytest

from vfsmap.pool import Pool
from vfsmap.testing.media import tmpfs
from vfsmap.units import MIB, PMD


@pytest.mark.parametrize("policy", ["always", "within_size", "advise", "never"])
def test_stores_into_a_fresh_unit_are_read_by_every_other_way(policy: str) -> None:
    with tmpfs(huge=policy, size="200M") as place, Pool.create(place / "pool", "128M") as pool:
        for _ in range(2):  # the second time the units have been used before
            starts = [pool.space.take(2 * MIB, PMD)[0] for _ in range(8)]
            for start in starts:
                assert not any(read(place / "pool", start, 2 * MIB))
                pool.pmem.store(start, b"first")
                pool.pmem.store(start + 2 * MIB - 4, b"last")
            for start in starts:
                raw = read(place / "pool", start, 2 * MIB)
                assert (raw[:5], raw[-4:], any(raw[5:-4])) == (b"first", b"last", False)
                pool.space.free(start, 2 * MIB)


def read(path: Path, offset: int, length: int) -> bytes:
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.pread(fd, length, offset)
    finally:
        os.close(fd)
