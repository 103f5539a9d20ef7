"""The mount itself: made, served, and taken away again whatever happens."""

import logging
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import pyfuse3
import trio

from vfsmap.errors import Busy, Denied, Invalid, NotADirectory, NotFound, Unsupported
from vfsmap.fs import FileSystem, FollowedFileSystem
from vfsmap.pmem.libc import syncfs
from vfsmap.tally import Tallies
from vfsmap.units import KIB
from vfsmap_fuse import heap, keeper
from vfsmap_fuse.following import FollowingOperations
from vfsmap_fuse.operations import Operations, Sync
from vfsmap_fuse.poll import busy_polling
from vfsmap_fuse.splicing import Splicing
from vfsmap_fuse.xattr import Seal

log = logging.getLogger("vfsmap.fuse")
READ_AHEAD: Final = 512 * KIB
"""What the kernel reads before it is asked to.  More leaves the processors' caches before it is
copied out of the page cache.  MiB/s with 128K (the kernel's default), 512K, 1M and 4M, medians of
31 alternating rounds in a virtual machine: read() of 1 MiB 2,872, 3,575, 3,194, 2,878; of 128 KiB
2,901, 3,405, 3,318, 2,952; of 4 KiB 2,205, 2,174, 2,083, 2,049; a map touched from start to end, of
which half is read behind the fault, 1,323, 1,262, 1,585, 1,503."""
DIRECT: Final = "vfsmap"
FOLLOWED: Final = "vfsmap-follow"
"""What the kernel's mount table calls a mount, behind ``fuse.``"""
_PATIENCE: Final = 30
"""Seconds that a mount may take to answer, or to write back what the kernel still keeps."""
_KERNEL_OPTIONS: Final = frozenset(
    ("dev", "nodev", "suid", "nosuid", "exec", "noexec", "atime", "noatime", "sync", "dirsync")
)
_OWN_OPTIONS: Final = frozenset(
    ("ro", "follow", "allow_other", "writeback", "nobusypoll", "sloppy")
)
_PASSED_OVER: Final = frozenset(
    ("rw", "defaults", "default_permissions", "async", "relatime", "loud", "silent")
)
"""How we mount anyway."""
_OF_FSTAB: Final = frozenset(
    ("auto", "noauto", "user", "nouser", "users", "owner", "group", "nofail", "_netdev")
)
"""What speaks to mount(8) alone; so does what begins as follows."""
_OF_FSTAB_PREFIXES: Final = ("x-", "X-", "comment=", "user=")


@dataclass(frozen=True)
class MountOptions:
    """How a pool is mounted."""

    read_only: bool = False
    follow: bool = False
    """Follow what another process writes to the pool; read-only, and without a mapping daemon."""
    allow_other: bool = False
    """Let other users in; root always does, as with any file system that root mounts."""
    writeback: bool = False
    """Let the kernel keep writes for a while: they are in the pool only after fsync."""
    busy_poll: bool = True
    """Wait for requests awake while they come thick and fast."""
    kernel: frozenset[str] = frozenset()
    """Options that the kernel understands by itself."""

    @classmethod
    def parse(cls, words: Iterable[str]) -> Self:
        """Return the options that the words behind -o name.

        Raises:
            Invalid: there is no such option.
        """
        given = {
            word
            for word in words
            if word not in _PASSED_OVER | _OF_FSTAB and not word.startswith(_OF_FSTAB_PREFIXES)
        }
        known = _OWN_OPTIONS | _KERNEL_OPTIONS
        unknown = sorted(given - known)
        if unknown and "sloppy" not in given:
            raise Invalid(
                f"there is no mount option {unknown[0]!r}; use {', '.join(sorted(known))}"
            )
        return cls(
            read_only=not given.isdisjoint(("ro", "follow")),
            follow="follow" in given,
            allow_other="allow_other" in given,
            writeback="writeback" in given,
            busy_poll="nobusypoll" not in given,
            kernel=frozenset(given & _KERNEL_OPTIONS),
        )

    def words(self, pool: Path) -> set[str]:
        """Return the options as libfuse takes them."""
        # libfuse cuts its options at commas
        source = str(pool).replace("\\", "\\\\").replace(",", "\\,")
        kind = FOLLOWED if self.follow else DIRECT
        words = {"default_permissions", f"fsname={source}", f"subtype={kind}"}
        if self.read_only:
            words.add("ro")
        if self.allow_other or os.geteuid() == 0:
            words.add("allow_other")
        if os.geteuid() == 0:  # of a file system that root mounts that is expected
            words |= {word for word in ("dev", "suid") if f"no{word}" not in self.kernel}
        return words | self.kernel


class _AnyBytes(str):
    """A word for pyfuse3, which encodes words as ASCII; the path of a pool may have any bytes."""

    __slots__ = ()

    def encode(self, encoding: str = "", errors: str = "") -> bytes:
        return os.fsencode(str(self))  # a str proper, whose encode() is its own


class Mount:
    """A mounted file system that answers."""

    def __init__(self, mountpoint: Path) -> None:
        self.mountpoint = mountpoint
        self.device = 0
        """The device number that stat(2) tells of files on it."""
        self._unmounted = trio.Event()
        self._splicing = Splicing()

    async def wait_unmounted(self) -> None:
        """Return when the mount is gone, whoever unmounted it."""
        await self._unmounted.wait()

    async def run(self) -> None:
        """Answer requests until the mount is gone or :func:`pyfuse3.terminate` is called."""
        self._splicing.forbid()
        try:
            # requests end by themselves, never by cancellation: a client waits for each of them
            with trio.CancelScope(shield=True):
                await pyfuse3.main()
        finally:
            self._splicing.permit()
            self._unmounted.set()

    async def settle(self) -> None:
        """Wait until the mount answers; set its read-ahead where permitted.

        Raises:
            Busy: it does not answer.
        """
        with trio.move_on_after(_PATIENCE) as scope:
            status = await trio.to_thread.run_sync(os.stat, self.mountpoint, abandon_on_cancel=True)
        self._splicing.permit()
        if scope.cancelled_caught:
            raise Busy(f"the mount on {self.mountpoint} has not answered for {_PATIENCE} seconds")
        self.device = status.st_dev
        bdi = Path(f"/sys/class/bdi/{os.major(self.device)}:{os.minor(self.device)}")
        try:
            (bdi / "read_ahead_kb").write_text(str(READ_AHEAD // KIB))
        except OSError as exc:
            log.debug("read-ahead stays at the kernel's default: %s", exc)

    async def stop(self) -> None:
        """Have the kernel write back what it keeps, and end :meth:`run`."""
        if self._unmounted.is_set():
            return
        with trio.CancelScope(shield=True, deadline=trio.current_time() + _PATIENCE):
            try:
                await trio.to_thread.run_sync(_write_back, self.mountpoint, abandon_on_cancel=True)
            except OSError as exc:
                log.warning("%s was not written back: %s", self.mountpoint, exc)
        pyfuse3.terminate()
        with trio.CancelScope(shield=True):
            await self._unmounted.wait()


class Keeper:
    """The process that takes mount and socket away when the server dies; there before they are."""

    def __init__(self, mountpoint: Path, socket: Path | None) -> None:
        """Start it."""
        self._process: subprocess.Popen[bytes] | None = None
        self._mountpoint = mountpoint
        arguments = [str(os.getpid()), os.path.realpath(mountpoint)]
        arguments.append(str(socket.absolute()) if socket else "")
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", keeper.__file__, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                start_new_session=True,
                bufsize=0,
            )
        except OSError as exc:
            log.warning("nobody will unmount %s if this server is killed: %s", mountpoint, exc)

    def watch(self, device: int) -> None:
        """Tell it the device number of the mount, now that it is known."""
        self._tell(b"%d\n" % os.minor(device))

    def close(self) -> None:
        """Have it end: there is no mount any more, or never was.

        Of a connection that was ended by its control file libfuse leaves the mount behind, and so
        that is what the process has to take away.
        """
        with suppress(OSError):
            os.statvfs(self._mountpoint)
            self._tell(keeper.END)
        if self._process:
            self._process.communicate()

    def _tell(self, text: bytes) -> None:
        if self._process and self._process.stdin:
            with suppress(BrokenPipeError):  # somebody has killed it
                self._process.stdin.write(text)


@asynccontextmanager
async def mounted(
    fs: FileSystem,
    mountpoint: Path,
    options: MountOptions,
    *,
    sync: Sync,
    seal: Seal,
    socket: Path | None = None,
    tallies: Tallies | None = None,
) -> AsyncIterator[Mount]:
    """Mount a file system for as long as the block lasts; it answers when the block begins.

    Args:
        fs: what to mount; from now on it belongs to this loop's thread.
        mountpoint: a directory.
        options: how.
        sync: makes everything done so far durable, without keeping the loop waiting.
        seal: seals a file, without keeping the loop waiting.
        socket: where the mapping daemon listens, for those who ask a file of the mount.
        tallies: where requests are counted, for those who want to know.

    Raises:
        Unsupported: there is no FUSE here, or no fusermount3, which a user needs.
        NotFound, NotADirectory: the mount point is no directory.
        Denied: this user may not mount there.
        Busy: a mount was left behind there; or the mount failed, or did not answer.
    """
    fs.noatime = "noatime" in options.kernel
    kind = FollowingOperations if isinstance(fs, FollowedFileSystem) else Operations
    operations = kind(
        fs, sync=sync, seal=seal, socket=socket, writeback=options.writeback, tallies=tallies
    )
    _require_mountable(mountpoint, options)
    watcher = Keeper(mountpoint, socket)
    if not options.read_only:
        heap.use_huge_pages()
    try:
        words = options.words(fs.pool.path.absolute())
        pyfuse3.init(operations, str(mountpoint), {_AnyBytes(word) for word in words})
    except RuntimeError as exc:
        watcher.close()
        # libfuse, or fusermount3, has said why on stderr
        raise Busy(f"can't mount on {mountpoint}: {exc}") from exc
    fs.invalidators.append(_invalidate)
    try:
        with busy_polling() if options.busy_poll else nullcontext():
            async with trio.open_nursery() as nursery:
                mount = Mount(mountpoint)
                nursery.start_soon(mount.run)
                nursery.start_soon(operations.end_forgotten_soon)
                try:
                    await mount.settle()
                    watcher.watch(mount.device)
                    yield mount
                finally:
                    await mount.stop()
                    nursery.cancel_scope.cancel()
    finally:
        fs.invalidators.remove(_invalidate)
        pyfuse3.close()
        watcher.close()
        operations.forget_all()


def _require_mountable(mountpoint: Path, options: MountOptions) -> None:
    user = os.geteuid()
    if not Path("/dev/fuse").exists():
        raise Unsupported("/dev/fuse is missing; load the kernel's module: modprobe fuse")
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        raise Denied("this user may not open /dev/fuse; root can allow it: chmod 666 /dev/fuse")
    if user and shutil.which("fusermount3") is None:
        raise Unsupported("fusermount3 is missing; install the package fuse3")
    try:
        status = mountpoint.stat()
        os.statvfs(mountpoint)  # of a dead server's mount the kernel may know the attributes still
    except FileNotFoundError as exc:
        raise NotFound(f"{mountpoint} does not exist; make it with: mkdir {mountpoint}") from exc
    except OSError as exc:  # ENOTCONN: a server died, and nobody has unmounted
        raise Busy(
            f"{mountpoint} can't be reached ({exc.strerror}); if a mount was left behind there, "
            f"remove it: fusermount3 -u -z {mountpoint}"
        ) from exc
    if not stat.S_ISDIR(status.st_mode):
        raise NotADirectory(f"{mountpoint} is not a directory; mount on one")
    if user and status.st_uid != user:
        raise Denied(f"{mountpoint} belongs to somebody else; mount on a directory of your own")
    if user and options.allow_other and not _others_allowed():
        raise Denied("allow_other needs the line user_allow_other in /etc/fuse.conf, or root")


def _others_allowed() -> bool:
    try:
        lines = Path("/etc/fuse.conf").read_text().splitlines()
    except OSError:
        return False
    return any(line.strip() == "user_allow_other" for line in lines)


def _invalidate(ino: int) -> None:
    """Drop what the kernel caches of a file; blocks while it writes back what is dirty."""
    with suppress(FileNotFoundError):  # the kernel does not know the inode
        pyfuse3.invalidate_inode(ino)


def _write_back(mountpoint: Path) -> None:
    fd = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY)
    try:
        syncfs(fd)  # pyfuse3's own keeps the interpreter's lock, and so the handlers from running
    finally:
        os.close(fd)
