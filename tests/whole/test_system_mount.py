"""mount(8), umount(8) and fstab(5): a pool as any other file system, tried with the real ones."""

import os
import pwd
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vfsmap.testing.commands import vfsmap
from vfsmap.testing.machine import Machine, machine
from vfsmap.testing.media import tmpfs

USER = "nobody"
USER_ID = pwd.getpwnam(USER).pw_uid


class Place:
    """A machine with vfsmap's helpers, a pool, a directory to mount it on, and an fstab."""

    def __init__(self, machine: Machine, base: Path) -> None:
        self.machine = machine
        self.pool = base / "pool.pmem"
        self.directory = base / "mnt"
        self.fstab = base / "fstab"

    def run(self, *command: object, check: bool = True) -> str:
        result = self.machine.run(*command, check=check)
        return result.stdout + result.stderr

    def options(self) -> set[str]:
        """What the kernel says of the mount; empty: there is none."""
        kind, _, options = self.machine.mount_line(self.directory).partition(" ")
        assert kind in ("", "fuse.vfsmap")
        return set(filter(None, options.split(",")))

    def write_fstab(self, options: str) -> None:
        self.fstab.write_text(f"{self.pool} {self.directory} fuse.vfsmap {options} 0 0\n")

    def see(self, name: str) -> Path:
        """Return where a file on the mount is seen from outside."""
        return self.machine.path(self.directory / name)


@pytest.fixture
def place(installed: Path) -> Iterator[Place]:
    with tmpfs(size="128M") as base:
        (base / "mnt").mkdir()
        vfsmap("format", base / "pool.pmem", "--size", "64M")
        with machine({Path("/sbin"): installed / "sbin"}) as made:
            yield Place(made, base)


def test_mount_by_type_mounts_again_at_once_after_umount(place: Place) -> None:
    place.run("mount", "-t", "fuse.vfsmap", place.pool, place.directory)
    place.see("file").write_bytes(b"text")
    assert place.options() >= {"rw", "allow_other", "default_permissions"}
    place.run("umount", place.directory)
    assert not place.options()
    for _ in range(3):  # nobody has to wait for a server that is about to end
        place.run("mount", "-t", "fuse.vfsmap", place.pool, place.directory)
        assert place.see("file").read_bytes() == b"text"
        place.run("umount", place.directory)
    place.run("mount", "-t", "fuse.vfsmap", "-o", "ro", place.pool, place.directory)
    assert place.see("file").read_bytes() == b"text"
    assert "ro" in place.options()
    place.run("umount", place.directory)


def test_umount_waits_for_the_server_where_it_asks_the_helper(place: Place) -> None:
    sock = place.fstab.with_name("daemon.socket")
    for options in (("-c",), ("-f",)):  # -c is what systemd says
        place.run("mount", "-t", "fuse.vfsmap", "-o", f"socket={sock}", place.pool, place.directory)
        assert sock.is_socket()
        place.run("umount", *options, place.directory)
        assert not sock.exists()


def test_fstab_mounts_with_the_options_of_mount_and_systemd_let_pass(place: Place) -> None:
    place.write_fstab(
        "defaults,nofail,_netdev,noatime,nosuid,nodev,allow_other,default_permissions,user,"
        "x-systemd.automount,x-systemd.requires=network.target,X-mount.mkdir,comment=ours"
    )
    place.run("mount", "-T", place.fstab, "-a")
    assert place.options() >= {"rw", "noatime", "nosuid", "nodev", "noexec", "allow_other"}
    assert "already mounted" in place.run("mount", "-T", place.fstab, "-a", "-v")
    place.run("umount", place.directory)


def test_fstab_carries_the_options_of_the_server(place: Place) -> None:
    sock, log = place.fstab.with_name("daemon.socket"), place.fstab.with_name("log")
    place.write_fstab(f"noauto,group=daemon,promise=process,verbose,socket={sock},log={log}")
    place.run("mount", "-T", place.fstab, "-a")
    assert not place.options()
    place.run("mount", "-T", place.fstab, place.directory)
    assert sock.is_socket()
    place.run("umount", place.directory)
    assert log.exists()
    place.write_fstab("promise=power")
    assert "power" in place.run("mount", "-T", place.fstab, place.directory, check=False)
    place.write_fstab("promise=eternal")
    assert "'eternal' is not one of" in place.run("mount", "-T", place.fstab, "-a", check=False)


def test_fstab_mounts_followers_beside_the_writer(place: Place) -> None:
    second = place.directory.with_name("second")
    second.mkdir()
    place.write_fstab("defaults")
    with place.fstab.open("a") as fstab:
        fstab.write(f"{place.pool} {second} fuse.vfsmap follow,nofail 0 0\n")
    place.run("mount", "-T", place.fstab, "-a")
    place.see("file").write_bytes(b"text")
    followed = place.machine.path(second / "file")
    while not followed.exists():
        os.sched_yield()
    assert place.run("mount", "-T", place.fstab, "-a", "-v").count("already mounted") == 2
    place.run("umount", second)  # does not wait for the writer
    assert place.see("file").read_bytes() == b"text"
    place.run("umount", place.directory)


@pytest.mark.parametrize("command", [("-f",), ("-f", "-v", "-n")])
def test_a_mount_that_is_only_pretended_does_nothing(place: Place, command: list[str]) -> None:
    place.run("mount", "-t", "fuse.vfsmap", *command, place.pool, place.directory)
    assert not place.options()


def test_an_unknown_option_is_refused_unless_mount_is_to_be_sloppy(place: Place) -> None:
    mount = ("mount", "-t", "fuse.vfsmap", "-o", "fast", place.pool, place.directory)
    result = place.machine.run(*mount, check=False)
    assert result.returncode == 2
    assert "no mount option 'fast'" in result.stderr
    assert not place.options()
    place.run(*mount, "-s")
    assert place.options()
    place.run("umount", place.directory)


def test_remounting_changes_what_the_kernel_keeps(place: Place) -> None:
    place.run("mount", "-t", "fuse.vfsmap", place.pool, place.directory)
    place.run("mount", "-o", "remount,ro", place.directory)
    assert "Read-only" in place.run("touch", place.directory / "file", check=False)
    place.run("mount", "-o", "remount,rw", place.directory)
    place.run("touch", place.directory / "file")
    place.run("umount", place.directory)


def test_a_busy_mount_is_left_alone_and_goes_lazily(place: Place) -> None:
    place.run("mount", "-t", "fuse.vfsmap", place.pool, place.directory)
    with place.see("file").open("wb"):
        result = place.machine.run("umount", place.directory, check=False)
        assert result.returncode
        assert "busy" in result.stderr
        assert place.options()
        place.run("umount", "-l", place.directory)
        assert not place.options()


def test_without_a_helper_of_our_own_mount_fuse3_finds_vfsmap(
    place: Place, installed: Path
) -> None:
    layers = {Path("/usr/local/bin"): installed / "usr/local/bin"}
    with machine(layers) as bare:
        bare.run("mount", "-t", "fuse.vfsmap", "-o", "ro", place.pool, place.directory)
        assert bare.mount_line(place.directory).startswith("fuse.vfsmap ro,")
        bare.run("umount", place.directory)
        bare.run("mount", "-t", "fuse", f"vfsmap#{place.pool}", place.directory)
        assert bare.mount_line(place.directory).startswith("fuse.vfsmap rw,")
        bare.run("umount", place.directory)


def test_what_a_killed_server_left_behind_is_mounted_over(place: Place) -> None:
    mount = ("mount", "-t", "fuse.vfsmap", place.pool, place.directory)
    place.run(*mount)
    place.see("file").write_bytes(b"text")
    # all at once, so that nobody is left to unmount
    pids = place.run("pgrep", "-f", "vfsmap_tools.cli|keeper.py").split()
    place.run("kill", "-KILL", *pids)
    while place.machine.run("pgrep", "-f", "vfsmap_tools.cli", check=False).stdout:
        os.sched_yield()
    assert "not connected" in place.run("ls", place.directory, check=False)
    assert place.options()
    place.run(*mount)
    assert place.see("file").read_bytes() == b"text"
    assert place.run("findmnt", "-n", "-o", "SOURCE", place.directory).count("\n") == 1
    place.run("umount", place.directory)


def test_a_second_mount_on_the_same_directory_is_refused_with_the_cure(place: Place) -> None:
    place.run("mount", "-t", "fuse.vfsmap", place.pool, place.directory)
    other = place.pool.with_name("other.pmem")
    vfsmap("format", other, "--size", "16M")
    for extra in ([], ["--foreground"]):
        command = ("vfsmap_tools.cli", "mount", other, place.directory, *extra)
        text = place.run(sys.executable, "-m", *command, check=False)
        assert f"unmount it: vfsmap umount {place.directory}" in text
    place.run("umount", place.directory)


@pytest.fixture
def own(place: Place) -> Place:
    """A pool and a directory of an ordinary user's, who may open /dev/fuse as udev has it."""
    place.fstab.parent.chmod(0o755)
    for path in (place.fstab.parent, place.pool, place.directory):
        os.chown(path, USER_ID, USER_ID)
    place.run("mount", "-t", "tmpfs", "-o", "dev", "none", "/run")
    place.run("cp", "-a", "/dev/fuse", "/run/fuse")
    place.run("chmod", "666", "/run/fuse")
    place.run("mount", "--bind", "/run/fuse", "/dev/fuse")
    # the interpreter may be kept where only root may look
    for parent in map(Path, {*Path(sys.base_prefix).parents, *Path(sys.prefix).parents}):
        if not parent.stat().st_mode & stat.S_IXOTH:
            open_ = place.fstab.with_name("open")
            open_.mkdir(exist_ok=True)
            options = f"lowerdir={open_}:{parent}"
            place.run("mount", "-t", "overlay", "-o", options, "none", parent)
    format_ = (sys.executable, "-m", "vfsmap_tools.cli", "format", "--force", "--size", "64M")
    place.machine.run(*format_, place.pool, user=USER)
    return place


def test_a_user_mounts_and_unmounts_what_fstab_allows(own: Place) -> None:
    own.write_fstab("noauto,user")
    # mount(8) lets users use no other than the system's own
    own.run("mount", "--bind", own.fstab, "/etc/fstab")
    own.machine.run("mount", own.directory, user=USER)
    assert own.options() >= {"nosuid", "nodev", "noexec", f"user_id={USER_ID}"}
    own.machine.run("touch", own.directory / "file", user=USER)
    assert "denied" in own.run("ls", own.directory, check=False)
    own.machine.run("umount", own.directory, user=USER)
    assert not own.options()


def test_root_mounts_as_somebody_else(own: Place) -> None:
    mount = ("mount", "-t", "fuse.vfsmap", own.pool, own.directory, "-o")
    assert "no such user" in own.run(*mount, "setuid=nobodyatall", check=False)
    own.run(*mount, f"setuid={USER}")
    assert f"user_id={USER_ID}" in own.options()
    own.machine.run("touch", own.directory / "file", user=USER)
    own.run("umount", own.directory)
    assert not own.options()
