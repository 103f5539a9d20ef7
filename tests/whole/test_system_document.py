"""What docs/howto/system.md says: its commands run, its tables are complete."""

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

from vfsmap.testing.commands import served_pool, vfsmap
from vfsmap.testing.machine import Machine, systemd
from vfsmap_fuse.mount import MountOptions

DOCUMENT = (Path(__file__).parents[2] / "docs/howto/system.md").read_text()
COMMANDS = re.findall(r"^\$ (.*)$", DOCUMENT, re.MULTILINE)
FSTAB = re.search(r"^/mnt/huge/data.pmem .*$", DOCUMENT, re.MULTILINE)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Machine]:
    vfsmap("system", "install", "--root", tmp_path)
    assert FSTAB
    fstab = tmp_path / "fstab"
    fstab.write_text(f"{FSTAB[0]}\n")
    (tmp_path / "empty").mkdir()
    layers = {
        Path("/sbin"): tmp_path / "sbin",
        Path("/usr/local"): tmp_path / "usr/local",
        Path("/etc"): tmp_path / "empty",
    }
    units = tmp_path / "usr/local/lib/systemd/system"
    with systemd([units], layers, fstab) as made:
        made.run("mount", "-t", "tmpfs", "tmpfs", "/mnt")
        made.run("groupadd", "--force", "--system", "vfsmap")
        yield made


def test_its_commands_run_one_after_the_other(host: Machine) -> None:
    assert len(COMMANDS) > 15
    for command in COMMANDS:
        # what "enable" would change are links that the machine's systemd does not look at
        command = command.replace("enable --now", "start")
        if command != "vfsmap system install":
            host.run("bash", "-c", f"PATH=/usr/local/bin:$PATH; {command}")
        if command.startswith(("mount -t fuse", "mount /mnt", "vfsmap mount")):
            assert host.mount_line(Path("/mnt/pool")).startswith("fuse.vfsmap")
        if command.startswith(("umount", "vfsmap umount", "systemctl stop vfsmap-mount")):
            assert not host.mount_line(Path("/mnt/pool"))


def test_every_metric_is_in_its_table(tmp_path: Path) -> None:
    listed = set(re.findall(r"`(vfsmap_\w+)`", DOCUMENT.split("| metric |")[1].split("\n\n")[0]))
    with served_pool(tmp_path, "16M", "--metrics", "0") as server:
        (server.directory / "file").write_bytes(b"text")
        url = server.log.read_text().rpartition(" at ")[2].strip()
        with urlopen(url) as answer:
            text = answer.read().decode()
    # names as they are asked for: counters end in _total
    told = {
        family.name + ("_total" if family.type == "counter" else "")
        for family in text_string_to_metric_families(text)
        if family.name.startswith("vfsmap")
    }
    assert listed == {name.replace("vfsmap_info_info", "vfsmap_info") for name in told}


def test_every_mount_option_of_its_table_is_understood() -> None:
    table = DOCUMENT.split("| option |")[1].split("\n\n")[0]
    options = re.findall(r"`([^`]+)`", "\n".join(row.split(" | ")[0] for row in table.splitlines()))
    assert len(options) > 20
    words = [
        option.replace("*", "it").removesuffix("=") + ("=it" if option.endswith("=") else "")
        for option in options
        if option not in ("setuid=USER", "mount -s", "verbose")
        and option not in {f"{name}=" for name in ("socket", "group", "promise", "metrics", "log")}
    ]
    MountOptions.parse([word for word in words if word != "sloppy"])
