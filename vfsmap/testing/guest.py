"""Boot a kernel in qemu, with a file as its persistent memory, and hear what it has to tell.

The guest's whole user space is busybox and one script.  What it echoes to :data:`TOLD` comes back
as text; files come back by :data:`SEND`.  That is a port of virtio, since the emulated UART loses
bytes when the host is busy.  The file appears at :data:`NVDIMM`, as memory that no driver of the
guest has claimed.
"""

import base64
import lzma
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

from vfsmap.testing.kernels import modules, vmlinuz

NVDIMM: Final = 0x1_0000_0000
"""Where the guest finds the file; the RAM lies below 4 GiB."""

TOLD: Final = "/dev/vport0p1"
"""Where the script writes what it has to tell."""

SEND: Final = 'send() { echo "== $1"; base64 "$1"; echo "== end"; }'
"""A shell function that writes a file so that :attr:`Told.files` has it again."""

_SENT: Final = re.compile(r"^== (?!end$)(.+?)\n(.*?)^== end$", re.M | re.S)

_START: Final = """#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mkdir -p /proc /sys
mount -t proc none /proc
mount -t sysfs none /sys
mount -t devtmpfs none /dev
"""
# Modules of kernel 6.1, in the order in which they load; built into 6.12.
_PORT: Final = (
    *("virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci"),
    "virtio_console",
)
# The test of the timer panics when the host is busy.
_OPTIONS: Final = "console=ttyS0,115200 panic=-1 no_timer_check"


class Told(NamedTuple):
    """What a guest left behind."""

    console: str
    text: str
    """What it wrote to :data:`TOLD`."""

    @property
    def files(self) -> dict[str, bytes]:
        """The files it sent."""
        return {name: base64.b64decode(body) for name, body in _SENT.findall(self.text)}


def run_guest(
    key: str,
    script: str,
    names: list[str],
    *,
    nvdimm: Path | None = None,
    options: str = "",
    timeout: int = 300,
) -> Told:
    """Boot Debian's kernel ``61`` or ``612`` and run a script of busybox's shell in it.

    ``names`` are modules that the script finds as ``/NAME.ko``.  The guest ends when the script
    does, or when the kernel panics.
    """
    port = [name for name in _PORT if name in modules(key)]
    files = {f"{name}.ko": _module(key, name) for name in {*names, *port}}
    start = _START + "".join(f"insmod /{name}.ko\n" for name in port)
    files["init"] = f"{start}{script}\npoweroff -f\n".encode()
    busybox = shutil.which("busybox")
    assert busybox is not None, "booting a kernel needs busybox: install busybox-static"
    files["bin/busybox"] = Path(busybox).read_bytes()
    with tempfile.TemporaryDirectory(prefix="vfsmap-guest-") as place:
        directory = Path(place)
        (directory / "initramfs").write_bytes(make_cpio(files))
        console, told = directory / "console", directory / "told"
        command = [
            *("qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "1"),
            *("-machine", "q35,nvdimm=on", "-m", "512M,slots=2,maxmem=4G"),
            *("-kernel", str(vmlinuz(key)), "-initrd", str(directory / "initramfs")),
            *("-append", f"{_OPTIONS} {options}"),
            *("-display", "none", "-no-reboot", "-monitor", "none", "-nodefaults"),
            *("-serial", f"file:{console}", "-chardev", f"file,id=told,path={told}"),
            *("-device", "virtio-serial-pci", "-device", "virtserialport,chardev=told"),
        ]
        if nvdimm:
            size = nvdimm.stat().st_size
            memory = f"memory-backend-file,id=mem,share=on,mem-path={nvdimm},size={size}"
            command += ["-object", memory, "-device", "nvdimm,memdev=mem"]
        done = subprocess.run(command, timeout=timeout, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        texts = [path.read_bytes().replace(b"\r\n", b"\n") for path in (console, told)]
        return Told(*(text.decode(errors="replace") for text in texts))


def make_cpio(files: Mapping[str, bytes]) -> bytes:
    """Return an archive as the kernel unpacks it at boot (newc), all files executable."""
    folders = {parent for name in files for parent in map(str, Path(name).parents)} - {"."}
    entries: list[tuple[str, int, bytes]] = [
        *((folder, 0o040755, b"") for folder in sorted(folders | {"dev"})),
        *((name, 0o100755, content) for name, content in files.items()),
        ("TRAILER!!!", 0, b""),
    ]
    archive = bytearray()
    for number, (name, mode, content) in enumerate(entries, 1):
        fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0)
        archive += b"070701" + b"".join(b"%08X" % field for field in fields)
        for part in (name.encode() + b"\0", content):
            archive += part
            archive += bytes(-len(archive) % 4)
    return bytes(archive)


def _module(key: str, name: str) -> bytes:
    path = modules(key)[name]
    raw = path.read_bytes()
    return lzma.decompress(raw) if path.suffix == ".xz" else raw
