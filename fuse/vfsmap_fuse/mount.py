"""The mount itself: made, served, and taken away again whatever happens."""

import logging
import os
import shutil
import stat
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
from vfsmap.units import KIB, MIB
from vfsmap_fuse.following import FollowingOperations
from vfsmap_fuse.operations import Operations, Sync
from vfsmap_fuse.poll import busy_polling
from vfsmap_fuse.xattr import Seal

log = logging.getLogger("vfsmap.fuse")
READ_AHEAD: Final = 4 * MIB
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
        words = {"default_permissions", "auto_unmount", f"fsname={source}", f"subtype={kind}"}
        if self.read_only:
            words.add("ro")
        if self.allow_other or os.geteuid() == 0:
            words.add("allow_other")
        return words | self.kernel

    def rights(self) -> set[str]:
        """Return what root's mount allows and fusermount3, which auto_unmount needs, does not."""
        if os.geteuid():
            return set()
        return {word for word in ("dev", "suid") if f"no{word}" not in self.kernel}


class Mount:
    """A mounted file system that answers."""

    def __init__(self, mountpoint: Path) -> None:
        self.mountpoint = mountpoint
        self.device = 0
        """The device number that stat(2) tells of files on it."""
        self._unmounted = trio.Event()

    async def wait_unmounted(self) -> None:
        """Return when the mount is gone, whoever unmounted it."""
        await self._unmounted.wait()

    async def run(self) -> None:
        """Answer requests until the mount is gone or :func:`pyfuse3.terminate` is called."""
        try:
            # requests end by themselves, never by cancellation: a client waits for each of them
            with trio.CancelScope(shield=True):
                await pyfuse3.main()
        finally:
            self._unmounted.set()

    async def settle(self, rights: set[str]) -> None:
        """Wait until the mount answers; raise its rights and its read-ahead where permitted.

        Raises:
            Busy: it does not answer.
        """
        with trio.move_on_after(_PATIENCE) as scope:
            status = await trio.to_thread.run_sync(os.stat, self.mountpoint, abandon_on_cancel=True)
        if scope.cancelled_caught:
            raise Busy(f"the mount on {self.mountpoint} has not answered for {_PATIENCE} seconds")
        self.device = status.st_dev
        if rights:
            words = ",".join(("remount", "bind", *sorted(rights)))
            command = ["mount", "-o", words, str(self.mountpoint)]
            done = await trio.run_process(command, check=False, capture_stderr=True)
            if done.returncode:
                reason = done.stderr.decode(errors="replace").strip()
                log.warning("%s stays without %s: %s", self.mountpoint, ", ".join(rights), reason)
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


class Unmounter:
    """Sees to it that fusermount3 takes the mount away when the server dies, however it dies.

    It hears of the death when the kernel closes a socket that libfuse has opened after the session,
    and then takes a mount away that answers ENOTCONN.  A dying process's descriptors are released
    from the highest down, so it would look before the session has ended, and leave the mount there.
    """

    def __init__(self) -> None:
        """Keep a low number free; to be made before the session is."""
        self._lower = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        self._before = _sockets()
        self._socket = -1

    def tell_last(self) -> None:
        """Have the session's end come before the socket's."""
        for fd in _sockets() - self._before:
            self._socket = fd
            # the number stays taken: libfuse believes it to be its own
            low = os.dup(self._lower)
            os.dup2(fd, self._lower, inheritable=False)
            os.dup2(low, fd, inheritable=False)
            os.close(low)

    def close(self) -> None:
        """Let fusermount3 end."""
        for fd in (self._lower, self._socket):
            if fd >= 0:
                os.close(fd)


def _sockets() -> set[int]:
    found = set()
    for fd in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):  # that of the listing itself
            if stat.S_ISSOCK(os.fstat(fd).st_mode):
                found.add(fd)
    return found


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
        Unsupported: there is no FUSE here, or no fusermount3.
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
    unmounter = Unmounter()
    try:
        pyfuse3.init(operations, str(mountpoint), options.words(fs.pool.path.absolute()))
    except RuntimeError as exc:
        unmounter.close()
        # libfuse, or fusermount3, has said why on stderr
        raise Busy(f"can't mount on {mountpoint}: {exc}") from exc
    unmounter.tell_last()
    fs.invalidators.append(_invalidate)
    try:
        with busy_polling() if options.busy_poll else nullcontext():
            async with trio.open_nursery() as nursery:
                mount = Mount(mountpoint)
                nursery.start_soon(mount.run)
                nursery.start_soon(operations.end_forgotten_soon)
                try:
                    await mount.settle(options.rights())
                    yield mount
                finally:
                    await mount.stop()
                    nursery.cancel_scope.cancel()
    finally:
        fs.invalidators.remove(_invalidate)
        pyfuse3.close()
        unmounter.close()
        operations.forget_all()


def _require_mountable(mountpoint: Path, options: MountOptions) -> None:
    user = os.geteuid()
    if not Path("/dev/fuse").exists():
        raise Unsupported("/dev/fuse is missing; load the kernel's module: modprobe fuse")
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        raise Denied("this user may not open /dev/fuse; root can allow it: chmod 666 /dev/fuse")
    if shutil.which("fusermount3") is None:
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
