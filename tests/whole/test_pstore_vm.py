"""Real kernels and regions in a mounted pool: what one writes, the other reads."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from vfsmap.pstore import Geometry, Recorder, Region, format_region
from vfsmap.pstore.geometry import Order
from vfsmap.pstore.reader import read_files
from vfsmap.testing.commands import served_pool
from vfsmap.testing.guest import NVDIMM, SEND, TOLD, run_guest
from vfsmap.testing.media import tmpfs
from vfsmap.testing.spoilt import spoil_region
from vfsmap.units import KIB, MIB
from vfsmap_tools.pstore import kernel_parameters

pytestmark = pytest.mark.vm

ORDERS: dict[str, Order] = {"61": "6.1", "612": "6.12"}

PANIC = "echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger; sleep 60"
TELL = f"""
{SEND}
cd /sys/fs/pstore
for file in *; do [ -f "$file" ] && send "$file"; done > {TOLD}
"""


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    """Where the region files are: in a mounted pool."""
    with tmpfs(huge="always", size="400M") as place, served_pool(place, "256M") as server:
        yield server.directory


@pytest.fixture(params=["61", "612"])
def key(request: pytest.FixtureRequest) -> str:
    """Which kernel."""
    return str(request.param)


@pytest.fixture(params=[0, 16], ids=["plain", "ecc"])
def geometry(request: pytest.FixtureRequest, key: str) -> Geometry:
    """A region that has its wrinkles: records of a size that is no power of two."""
    return Geometry(2 * MIB, 256 * KIB, 128 * KIB, 64 * KIB, ecc=request.param, order=ORDERS[key])


def boot(key: str, geometry: Geometry, file: Path, script: str) -> dict[str, bytes]:
    """Boot a kernel on a region, run a script, and return the files that it sent."""
    ramoops = f"insmod /ramoops.ko mem_address={NVDIMM:#x} {kernel_parameters(geometry)}"
    start = f"insmod /reed_solomon.ko && {ramoops} && mount -t pstore none /sys/fs/pstore\n"
    told = run_guest(key, start + script, ["reed_solomon", "ramoops"], nvdimm=file)
    assert "pstore: Registered ramoops as persistent store backend" in told.console
    return told.files


def shown(file: Path) -> dict[str, bytes]:
    with Region.open(file) as region:
        return {file.name: file.data for file in region.files()}


def test_panic_of_a_kernel_is_read_from_the_pool_as_the_kernel_reads_it(
    key: str, geometry: Geometry, directory: Path
) -> None:
    file = directory / f"panic-{key}-{geometry.ecc}"
    format_region(file, geometry)
    boot(key, geometry, file, PANIC)

    files = shown(file)

    assert set(files) == {"dmesg-ramoops-0"}
    assert files["dmesg-ramoops-0"].startswith(b"Panic#1 Part1\n<")
    assert b"sysrq triggered crash" in files["dmesg-ramoops-0"]
    with Region.open(file) as region:
        assert region.geometry == geometry
        assert region.unread() == {"dmesg-ramoops-0"}
    assert boot(key, geometry, file, TELL) == files


def test_region_written_here_is_shown_by_a_kernel_byte_for_byte(
    key: str, geometry: Geometry, directory: Path
) -> None:
    file = directory / f"ours-{key}-{geometry.ecc}"
    format_region(file, geometry)
    with Recorder(file, watch=False) as recorder:
        for n in range(3000):  # the ring turns
            recorder.console(f"[{n:5}.000000] a line of the console\n")
            recorder.pmsg(f"message {n} of a program\n")
        recorder.dmesg("Oops", "something went wrong\n")
        recorder.dmesg("Panic", "x" * 300000)
    with Recorder(file, compression="none", watch=False) as recorder:
        recorder.dmesg("Emergency", b"\xff\xfe not text at all\n" * 20000)
    files = shown(file)
    assert len(files) == 5

    script = f"{TELL}\nrm /sys/fs/pstore/dmesg-ramoops-1"
    assert boot(key, geometry, file, script) == files

    # a kernel takes console and pmsg at boot, and what it is told to remove
    assert set(shown(file)) == {"dmesg-ramoops-0", "dmesg-ramoops-2"}
    with Recorder(file, watch=False) as recorder:
        assert recorder.region.ledger.counter == 3
        assert recorder.dmesg("Oops", "again\n") == "dmesg-ramoops-1"
    assert shown(file)["dmesg-ramoops-1"].startswith(b"Oops#4 Part1\nagain\n")


SMALL = 64 * KIB
BOOTED = f"""
insmod /reed_solomon.ko
i=0
while [ $i -lt COUNT ]; do
    insmod /ramoops.ko mem_address=$(({NVDIMM} + i * {SMALL})) PARAMETERS
    mount -t pstore none /sys/fs/pstore
    cd /sys/fs/pstore
    for file in *; do
        [ -f "$file" ] && {{ echo "== $i/$file"; base64 "$file"; echo "== end"; }}
    done > {TOLD}
    cd /
    umount /sys/fs/pstore
    rmmod ramoops
    i=$((i + 1))
done
"""


@pytest.mark.parametrize("ecc", [0, 16, 5])
def test_regions_spoilt_in_every_way_are_shown_as_a_kernel_shows_them(
    key: str, ecc: int, directory: Path
) -> None:
    geometry = Geometry(SMALL, 8 * KIB, 8 * KIB, 8 * KIB, ecc=ecc, order=ORDERS[key])
    regions = [spoil_region(geometry, random.Random(100 * ecc + seed)) for seed in range(32)]
    file = directory / f"spoilt-{key}-{ecc}"
    file.write_bytes(b"".join(regions))
    script = BOOTED.replace("COUNT", str(len(regions)))
    script = script.replace("PARAMETERS", kernel_parameters(geometry))

    told = run_guest(key, script, ["reed_solomon", "ramoops"], nvdimm=file).files

    ours = {
        f"{number}/{shown.name}": shown.data
        for number, region in enumerate(regions)
        for shown in read_files(region, geometry)
    }
    assert len(told) > 100
    assert told == ours
