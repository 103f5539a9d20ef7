"""The composition root of a follower: a mount, read-only, of a pool that somebody else writes.

There is no mapping daemon: the writer would not know of its leases, and use their bytes again.
"""

from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

import trio

from vfsmap.daemon.stats import Statistics
from vfsmap.errors import Invalid
from vfsmap.fs import FollowedFileSystem
from vfsmap.pool import Pool
from vfsmap_fuse.following import keep_current
from vfsmap_fuse.mount import mounted
from vfsmap_tools.server import ServerOptions, answering_prometheus, run_until_done, stop_on_signal


def run_follower(
    path: Path, mountpoint: Path, options: ServerOptions, ready: Callable[[], None]
) -> None:
    """Serve a followed pool until SIGTERM, SIGINT or its unmounting; ``ready``: it answers.

    Raises:
        Invalid: an option makes no sense here.
        VfsmapError: the pool can't be opened or followed, or the mount can't be made.
    """
    if options.mount.writeback:
        raise Invalid("a followed mount is read-only: leave writeback out")
    if options.socket or options.listener or options.group:
        raise Invalid("a followed mount has no mapping daemon: leave --socket and --group out")
    run_until_done(_follow, path, mountpoint, options, ready)


async def _follow(
    path: Path, mountpoint: Path, options: ServerOptions, ready: Callable[[], None]
) -> None:
    async with AsyncExitStack() as stack:
        pool = Pool.open(path, "r", promise=options.promise)
        stack.callback(pool.close)
        fs = FollowedFileSystem(pool)
        nursery = await stack.enter_async_context(trio.open_nursery())
        stack.callback(nursery.cancel_scope.cancel)
        nursery.start_soon(stop_on_signal, nursery.cancel_scope)
        statistics = Statistics(fs)
        await stack.enter_async_context(answering_prometheus(options, pool, statistics))
        tallies = statistics.requests
        mount = await stack.enter_async_context(
            mounted(fs, mountpoint, options.mount, sync=_nothing, seal=_nothing, tallies=tallies)
        )
        # of its own, so that it is over before the mount is: it talks to the kernel
        polling = await stack.enter_async_context(trio.open_nursery())
        stack.callback(polling.cancel_scope.cancel)
        polling.start_soon(keep_current, fs)
        ready()
        await mount.wait_unmounted()


async def _nothing(*_: object) -> None:
    """Do nothing: what a follower shows is as durable as it will be."""
