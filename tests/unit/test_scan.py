from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from vfsmap.fs.check import check
from vfsmap.pmem import Medium, Pmem
from vfsmap.pool import scan as module
from vfsmap.pool.log import LogHalf
from vfsmap.pool.scan import Batch, scan
from vfsmap.testing.pools import GROUPED, STORED, make_fs, make_pool, open_pmem, scratch
from vfsmap.units import MIB


@pytest.fixture
def directory() -> Iterator[Path]:
    with scratch() as path:
        yield path


def test_a_scan_that_a_writer_overtakes_looks_again(directory: Path) -> None:
    fs = make_fs(directory / "pool", 8 * MIB)
    batches = module._batches
    turns: list[int] = []

    def overtaken(pmem: Pmem, half: LogHalf) -> Iterator[Batch]:
        if not turns:
            turns.append(1)
            fs.create(1, b"new", 0o600, 0, 0)
            for _ in range(2):  # now the half that is being read holds something else
                fs.pool.journal.compact()
        return batches(pmem, half)

    with mock.patch.object(module, "_batches", overtaken):
        found = scan(open_pmem(fs.pool.path))
    assert found.superblock.epoch == fs.pool.journal.superblock.epoch
    assert found.objects == fs.pool.objects
    assert check(found).findings == []
    fs.close()


@pytest.mark.parametrize("medium", [STORED, GROUPED], ids=["stored", "grouped"])
def test_an_empty_pool_that_lost_its_first_batch_is_damaged(
    directory: Path, medium: Medium
) -> None:
    pool = make_pool(directory / "pool", 8 * MIB, medium)
    start = pool.journal.log.place.start
    pool.pmem.store(start, bytes(8))
    pool.pmem.close()
    assert scan(open_pmem(directory / "pool", medium)).damaged
