"""The systemd units, started by a real systemd in a machine of its own."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vfsmap.testing.commands import vfsmap
from vfsmap.testing.machine import Machine, systemd
from vfsmap.testing.media import tmpfs

MOUNT = "vfsmap-mount@test.service"
SERVE = "vfsmap-serve@test"


class Site:
    """A machine with the installed units, and a pool."""

    def __init__(self, machine: Machine, base: Path) -> None:
        self.machine = machine
        self.base = base
        self.pool = base / "pool.pmem"
        self.directory = base / "mnt"

    def systemctl(self, *words: object, check: bool = True) -> str:
        result = self.machine.run("systemctl", "--no-pager", *words, check=check)
        return result.stdout + result.stderr

    def show(self, unit: str, name: str) -> str:
        return self.systemctl("show", "--value", "-p", name, unit).strip()

    def is_mounted(self) -> bool:
        return bool(self.machine.mount_line(self.directory))

    def see(self, name: str) -> Path:
        return self.machine.path(self.directory / name)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        os.sched_yield()


@pytest.fixture
def site(installed: Path) -> Iterator[Site]:
    with tmpfs(size="256M") as base:
        etc, drop_ins = base / "etc", base / "units"
        for path in (etc / "vfsmap", drop_ins, base / "mnt", base / "by-fstab"):
            path.mkdir(parents=True)
        pool = base / "pool.pmem"
        vfsmap("format", pool, "--size", "64M")
        (etc / "vfsmap/test.conf").write_text(
            f"POOL={pool}\nDIRECTORY={base}/mnt\nOPTIONS=noatime,group=daemon\n"
        )
        # the same units, impatient
        for name in ("vfsmap-mount@.service.d", "vfsmap-serve@.service.d"):
            (drop_ins / name).mkdir()
            (drop_ins / name / "test.conf").write_text(
                "[Service]\nWatchdogSec=3\nRestartSec=100ms\n"
            )
        fstab = base / "fstab"
        fstab.write_text(f"{pool} {base}/by-fstab fuse.vfsmap noauto,_netdev,noatime 0 0\n")
        units = [drop_ins, installed / "usr/local/lib/systemd/system"]
        layers = {Path("/sbin"): installed / "sbin", Path("/etc"): etc}
        with systemd(units, layers, fstab) as machine:
            yield Site(machine, base)


def test_the_units_are_what_systemd_analyze_expects(installed: Path) -> None:
    units = installed / "usr/local/lib/systemd/system"
    names = sorted(units.iterdir())
    assert len(names) == 3
    result = subprocess.run(
        [
            "systemd-analyze",
            "verify",
            "--man=no",
            "--recursive-errors=yes",
            *(str(name).replace("@.", "@test.") for name in names),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("kind", ["sysusers", "tmpfiles"])
def test_systemd_takes_the_snippets(installed: Path, tmp_path: Path, kind: str) -> None:
    snippet = installed / f"usr/local/lib/{kind}.d/vfsmap.conf"
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").write_text("root:x:0:0::/:/bin/sh\n")
    (tmp_path / "etc/group").write_text("root:x:0:\n")
    extra = ["--create"] if kind == "tmpfiles" else []
    subprocess.run([f"systemd-{kind}", f"--root={tmp_path}", *extra, snippet], check=True)
    if kind == "sysusers":
        assert re.search(r"^vfsmap:x:\d+:$", (tmp_path / "etc/group").read_text(), re.MULTILINE)
    else:
        assert (tmp_path / "run/vfsmap").stat().st_mode & 0o7777 == 0o755


def test_the_mount_starts_when_it_answers_and_stops_when_all_is_written(site: Site) -> None:
    site.systemctl("start", MOUNT)
    assert site.is_mounted()
    assert site.show(MOUNT, "StatusText") == f"{site.pool} on {site.directory}"
    site.see("file").write_bytes(b"text")
    site.systemctl("restart", MOUNT)
    assert site.see("file").read_bytes() == b"text"
    site.systemctl("stop", MOUNT)
    assert not site.is_mounted()
    assert site.show(MOUNT, "Result") == "success"
    assert site.show(MOUNT, "NRestarts") == "0"
    site.systemctl("start", MOUNT)
    assert site.see("file").read_bytes() == b"text"


@pytest.mark.parametrize("whom", ["main", "all"])
def test_the_mount_is_there_again_after_its_server_was_killed(site: Site, whom: str) -> None:
    site.systemctl("start", MOUNT)
    site.see("file").write_bytes(b"text")
    for number in (1, 2):
        site.systemctl("kill", "--signal=KILL", f"--kill-who={whom}", MOUNT)
        # mypy gives a lambda's default no type
        wait_for(lambda n=number: site.show(MOUNT, "NRestarts") == str(n))  # type: ignore[misc]
        wait_for(lambda: site.show(MOUNT, "ActiveState") == "active")
        assert site.see("file").read_bytes() == b"text"
    site.systemctl("stop", MOUNT)
    assert not site.is_mounted()


def test_a_server_that_hangs_is_ended_by_the_watchdog_and_comes_back(site: Site) -> None:
    site.systemctl("start", MOUNT)
    site.see("file").write_bytes(b"text")
    pid = site.show(MOUNT, "MainPID")
    site.systemctl("kill", "--signal=STOP", "--kill-who=main", MOUNT)
    wait_for(lambda: site.show(MOUNT, "NRestarts") == "1")
    wait_for(lambda: site.show(MOUNT, "ActiveState") == "active")
    assert site.show(MOUNT, "MainPID") != pid
    assert site.see("file").read_bytes() == b"text"


def test_a_server_that_works_is_left_alone_by_the_watchdog(site: Site) -> None:
    site.systemctl("start", MOUNT)
    began = time.monotonic()
    while time.monotonic() < began + 5:
        site.see("file").write_bytes(b"text")
    assert site.show(MOUNT, "NRestarts") == "0"


def test_a_pool_that_is_damaged_is_not_tried_again_and_again(site: Site) -> None:
    site.pool.write_bytes(b"not a pool" * 1000)
    assert "failed" in site.systemctl("start", MOUNT, check=False)
    assert site.show(MOUNT, "ExecMainStatus") == "3"
    assert site.show(MOUNT, "ActiveState") == "failed"
    assert site.show(MOUNT, "NRestarts") == "0"


def call(site: Site) -> str:
    """Ask the daemon behind the socket of the unit who it is."""
    code = (
        "from vfsmap.daemon.client import Client; from pathlib import Path;"
        "print(Client(Path('/run/vfsmap/test.socket')).call('GetInfo')[0]['uuid'])"
    )
    return site.machine.run(sys.executable, "-c", code).stdout.strip()


def test_the_daemon_starts_with_its_first_client_and_its_socket_outlives_it(site: Site) -> None:
    site.systemctl("start", f"{SERVE}.socket")
    assert site.machine.path("/run/vfsmap/test.socket").stat().st_mode & 0o777 == 0o666
    assert site.show(f"{SERVE}.service", "ActiveState") == "inactive"
    uuid = call(site)
    assert site.show(f"{SERVE}.service", "ActiveState") == "active"
    site.systemctl("stop", f"{SERVE}.service")
    assert call(site) == uuid
    site.systemctl("kill", "--signal=KILL", f"{SERVE}.service")
    assert call(site) == uuid
    site.systemctl("stop", f"{SERVE}.socket", f"{SERVE}.service")
    assert not site.machine.path("/run/vfsmap/test.socket").exists()


def test_systemd_mounts_what_fstab_says(site: Site) -> None:
    directory = site.base / "by-fstab"
    unit = site.machine.run("systemd-escape", "--path", "--suffix=mount", directory).stdout.strip()
    for _ in range(2):
        site.systemctl("start", unit)
        assert site.machine.mount_line(directory).startswith("fuse.vfsmap rw,noatime")
        site.systemctl("stop", unit)
        assert not site.machine.mount_line(directory)
    assert site.show(unit, "Result") == "success"
