"""A machine within the machine: mounts and processes of its own, and a real systemd on request.

Nothing that is mounted or started in it is seen outside or outlives it, so tests can put helpers
into /sbin, write /etc/fstab and have systemd start units.
"""

import os
import pwd
import select
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from vfsmap.pmem.mountinfo import mounts

_SYSTEMD: Final = Path("/lib/systemd/systemd")
_GENERATOR: Final = Path("/lib/systemd/system-generators/systemd-fstab-generator")
_PATIENCE: Final = 60
_BARE_TARGETS: Final = (
    *(
        "basic",
        "sysinit",
        "shutdown",
        "umount",
        "local-fs",
        "local-fs-pre",
        "sockets",
        "multi-user",
    ),
    *("remote-fs", "remote-fs-pre", "network", "network-online", "swap", "paths", "timers"),
)
"""Targets that units speak of; all others of the host stay out."""

_INIT: Final = """
set -eu
mount --make-rslave /
mount -t tmpfs vfsmap-test "$SCRATCH"
number=0
for pair in $LAYERS; do
    number=$((number + 1))
    mkdir "$SCRATCH/upper$number" "$SCRATCH/work$number"
    mount -t overlay vfsmap-test "${pair#*=}" -o "lowerdir=${pair%=*}:${pair#*=},\
upperdir=$SCRATCH/upper$number,workdir=$SCRATCH/work$number"
done
[ -z "$FSTAB" ] || mount --bind "$FSTAB" /etc/fstab
mkdir -p /run/vfsmap
mount -t tmpfs -o mode=755 none /run/vfsmap  # sockets of servers that end with the machine
if [ "$1" = systemd ]; then
    umount -R /sys/fs/cgroup
    mount -t cgroup2 none /sys/fs/cgroup
    mount -t tmpfs none /run
    mkdir -p /run/lock
    mount --bind /proc/sys /proc/sys
    mount -o remount,bind,ro /proc/sys  # an init sets what belongs to everybody
    exec env -i PATH=/usr/sbin:/usr/bin container=vfsmap NOTIFY_SOCKET="$NOTIFY" \
        SYSTEMD_UNIT_PATH="$UNITS" SYSTEMD_GENERATOR_PATH="$GENERATORS" \
        "$SYSTEMD" --system --unit=test.target --log-target=console --show-status=0
fi
echo ready
exec sleep infinity
"""


class Machine:
    """A machine that runs."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        """Its first process, as seen from outside."""

    def run(
        self, *command: object, check: bool = True, user: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in it."""
        words = list(map(str, command))
        if user:
            entry = pwd.getpwnam(user)
            identity = f"--reuid={entry.pw_uid}", f"--regid={entry.pw_gid}", "--clear-groups"
            words = ["setpriv", *identity, *words]
        enter = ["nsenter", "-t", str(self.pid), "-m", "-p", "-C", "-u", "--"]
        result = subprocess.run([*enter, *words], capture_output=True, text=True, check=False)
        if check and result.returncode:
            raise AssertionError(f"{' '.join(words)}: {result.stderr or result.stdout}")
        return result

    def path(self, inside: Path | str) -> Path:
        """Return where a path of the machine is seen from outside."""
        return Path(f"/proc/{self.pid}/root{inside}")

    def mount_line(self, directory: Path) -> str:
        """Return the type and the options of what is mounted on a directory; empty: nothing."""
        command = ("findmnt", "-n", "-o", "FSTYPE,OPTIONS", "-M", directory)
        return self.run(*command, check=False).stdout.strip()


@contextmanager
def machine(layers: Mapping[Path, Path], fstab: Path | None = None) -> Iterator[Machine]:
    """Yield a machine.

    Args:
        layers: directories and what to lay over each; changes are the machine's own.
        fstab: its /etc/fstab.
    """
    with _booted(["bare"], layers, fstab, {}) as (made, process):
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield made


@contextmanager
def systemd(
    units: Sequence[Path], layers: Mapping[Path, Path], fstab: Path | None = None
) -> Iterator[Machine]:
    """Yield a machine whose first process is systemd.

    Args:
        units: directories of unit files, besides which it knows empty targets and its fstab.
        layers: directories and what to lay over each; changes are the machine's own.
        fstab: its /etc/fstab.
    """
    with (
        tempfile.TemporaryDirectory(prefix="vfsmap-") as name,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready,
        _cgroup(),
    ):
        own, generators = Path(name, "units"), Path(name, "generators")
        own.mkdir()
        generators.mkdir()
        for target in (*_BARE_TARGETS, "test"):
            (own / f"{target}.target").write_text("[Unit]\nDefaultDependencies=no\n")
        (generators / "fstab").symlink_to(_GENERATOR)
        ready.bind(f"{name}/ready")
        ready.settimeout(_PATIENCE)
        known = [*units, own, Path("/run/systemd/generator")]
        settings = {
            "UNITS": ":".join(map(str, known)),
            "GENERATORS": str(generators),
            "NOTIFY": f"{name}/ready",
            "SYSTEMD": str(_SYSTEMD),
        }
        with _booted(["systemd"], layers, fstab, settings) as (made, _):
            while b"READY=1" not in ready.recv(4096):
                pass
            yield made


@contextmanager
def _booted(
    kind: list[str], layers: Mapping[Path, Path], fstab: Path | None, settings: dict[str, str]
) -> Iterator[tuple[Machine, subprocess.Popen[str]]]:
    pairs = " ".join(f"{upper}={os.path.realpath(lower)}" for lower, upper in layers.items())
    spaces = ["--mount", "--pid", "--cgroup", "--uts", "--fork", "--mount-proc", "--kill-child"]
    environment = {**os.environ, "LAYERS": pairs, "FSTAB": str(fstab or ""), **settings}
    with (
        tempfile.TemporaryDirectory(prefix="vfsmap-") as scratch,
        subprocess.Popen(
            ["unshare", *spaces, "sh", "-c", _INIT, "init", *kind],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            env={**environment, "SCRATCH": scratch},
        ) as process,
    ):
        first = _child_of(process)
        pidfd = os.pidfd_open(first)
        try:
            yield Machine(first), process
        finally:
            process.kill()  # first, for it complains of how its child has ended
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)  # and so everything in it
            select.select([pidfd], [], [])
            os.close(pidfd)


def _child_of(process: subprocess.Popen[str]) -> int:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not (pids := children.read_text().split()):
        assert process.poll() is None, "unshare failed"
        os.sched_yield()
    return int(pids[0])


@contextmanager
def _cgroup() -> Iterator[None]:
    """Go into a control group of our own, for as long as the block lasts."""
    mounted = next(Path(each.directory) for each in mounts() if each.kind == "cgroup2")
    before = Path("/proc/self/cgroup").read_text().rpartition("0::/")[2].strip()
    own = mounted / before / f"vfsmap-test-{os.getpid()}"
    own.mkdir()
    try:
        (own / "cgroup.procs").write_text(str(os.getpid()))
        yield
    finally:
        (mounted / before / "cgroup.procs").write_text(str(os.getpid()))
        for path in sorted(own.rglob("*/"), reverse=True):
            path.rmdir()
        own.rmdir()


def is_possible() -> bool:
    """Tell whether a machine with systemd can be had here."""
    return os.geteuid() == 0 and _SYSTEMD.exists() and shutil.which("nsenter") is not None
