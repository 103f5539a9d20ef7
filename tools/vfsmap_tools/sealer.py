"""Sealing: the digest computed in worker threads, a slice at a time, then fixed in the pool."""

from collections.abc import Awaitable, Callable

import trio

from vfsmap.fs import FileSystem
from vfsmap.units import MIB
from vfsmap.verity import DEFAULT, Descriptor, Hasher, Parameters, Verifier

_SLICE = 8 * MIB


async def seal_file(
    fs: FileSystem,
    sync: Callable[[], Awaitable[None]],
    ino: int,
    parameters: Parameters = DEFAULT,
) -> Descriptor:
    """Fix a file's content for ever, and return what fixes it; durable when it returns.

    What is sealed can't move any more, so on a medium of large pages it is moved into whole pages
    first, that it can be mapped.

    Raises:
        Exists, Busy: it can't be sealed now.
        NoSpace, ReadOnly, MediumError.

    Crash: sealed, with its whole tree, or not sealed.
    """
    with fs.frozen(ino) as inode:
        for unit in fs.unmappable_units(ino):
            fs.make_mappable(ino, unit)
            await trio.lowlevel.checkpoint()
        hasher = Hasher(
            parameters.algorithm, block_size=parameters.block_size, salt=parameters.salt
        )
        for offset in range(0, inode.size, _SLICE):
            piece = fs.read(ino, offset, _SLICE)
            await trio.to_thread.run_sync(hasher.feed, piece)
        descriptor, tree = await trio.to_thread.run_sync(hasher.finish)
        fs.seal(ino, descriptor.encode(), [tree])
    await sync()
    return descriptor


def damaged_blocks(fs: FileSystem, ino: int) -> list[int]:
    """Return the numbers of a sealed file's blocks that differ from what was sealed.

    Raises:
        Damaged: the tree itself is.
        NotFound: the file is not sealed.
    """
    descriptor = Descriptor.decode(fs.seal_of(ino) or b"")
    view = fs.pool.pmem.view
    tree = b"".join(view[e.start : e.start + e.length] for e in fs.tree_extents(ino))
    verifier = Verifier(descriptor, tree)
    wrong = []
    for offset in range(0, fs.get(ino).size, _SLICE):
        wrong += verifier.damaged(offset, fs.read(ino, offset, _SLICE))
    return wrong
