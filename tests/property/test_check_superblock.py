"""Every byte of a superblock is summed, and two damaged copies may make a whole."""

import ctypes
import random

from hypothesis import given
from hypothesis import strategies as st

from vfsmap.pool import superblock
from vfsmap.pool.layout import MAGIC, SUPERBLOCKS, Superblock
from vfsmap.pool.scan import scan
from vfsmap.testing.recording import MEDIA, Memory, RecordingPmem
from vfsmap.testing.workload import POOL_SIZE, base

SIZE = ctypes.sizeof(Superblock)


def planted() -> Memory:
    return Memory(base("store")[0])


def test_no_bit_of_a_superblock_can_change_unseen() -> None:
    whole = bytes(planted().view[:SIZE])
    assert superblock.problem(whole, POOL_SIZE) == ""
    for bit in range(8 * SIZE):
        raw = bytearray(whole)
        raw[bit // 8] ^= 1 << bit % 8
        assert superblock.problem(bytes(raw), POOL_SIZE), f"bit {bit} is not covered"


@given(st.integers(0, 1 << 30), st.integers(1, 4))
def test_two_copies_damaged_in_different_words_make_the_superblock(seed: int, count: int) -> None:
    rng = random.Random(seed)
    memory = planted()
    whole = bytes(memory.view[:SIZE])
    words = rng.sample(range(len(MAGIC), SIZE, 8), 2 * count)
    for at, hit in ((SUPERBLOCKS[0], words[:count]), (SUPERBLOCKS[1], words[count:])):
        for word in hit:
            memory.view[at + word : at + word + 8] = rng.randbytes(8)
    found = scan(RecordingPmem(memory, POOL_SIZE, MEDIA["store"]))
    assert found.rebuilt
    assert bytes(found.superblock) == whole
