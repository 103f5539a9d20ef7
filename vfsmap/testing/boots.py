"""Real kernels booted in qemu, their memory kept: what binding is checked against.

A guest's RAM is a file; after power-off its text is found there through its own page tables.  The
guest tells over a second serial port where it put everything.
"""

import contextlib
import lzma
import mmap
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from vfsmap.testing.kernels import modules, vmlinuz

_INIT: Final = """#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev
/bin/busybox mount -t proc none /proc
/bin/busybox mount -t sysfs none /sys
/bin/busybox mount -t devtmpfs none /dev
for name in MODULES; do /bin/busybox insmod /$name.ko || echo "insmod $name failed"; done
cd /sys/module
exec 3>/dev/ttyS1
echo '== sections' >&3
for file in */sections/.[!.]* */sections/[!.]*; do
    [ -f $file ] && echo "$file $(/bin/busybox cat $file)" >&3
done
echo '== kallsyms' >&3
/bin/busybox cat /proc/kallsyms >&3
echo '== iomem' >&3
/bin/busybox cat /proc/iomem >&3
echo '== cpuinfo' >&3
/bin/busybox cat /proc/cpuinfo >&3
echo '== vulnerabilities' >&3
cd /sys/devices/system/cpu/vulnerabilities
for file in *; do echo "$file:$(/bin/busybox cat $file)" >&3; done
echo '== end' >&3
exec 3>&-
/bin/busybox sleep 1
/bin/busybox poweroff -f
"""
_PRESENT, _HUGE = 1, 0x80
_FRAME: Final = 0x000F_FFFF_FFFF_F000
_KERNEL_MAP: Final = 0xFFFF_FFFF_8000_0000
_KERNEL_END: Final = 0xFFFF_FFFF_C000_0000


class Guest(NamedTuple):
    """A guest that has been switched off: what it told, and its RAM."""

    told: dict[str, list[str]]
    ram: memoryview
    symbols: dict[str, int]
    root: int
    levels: int
    physical: int
    """What is subtracted from an address of the kernel's image to have its place in RAM."""

    def read(self, address: int, size: int) -> bytes:
        """Return bytes at a virtual address."""
        found = bytearray()
        while size:
            part = min(size, 4096 - address % 4096)
            place = self._physical(address)
            found += self.ram[place : place + part]
            address += part
            size -= part
        return bytes(found)

    def _physical(self, address: int) -> int:
        if _KERNEL_MAP <= address < _KERNEL_END:
            return address - self.physical
        table = self.root
        for level in range(self.levels - 1, -1, -1):
            shift = 12 + 9 * level
            (entry,) = struct.unpack_from("<Q", self.ram, table + (address >> shift & 511) * 8)
            assert entry & _PRESENT, f"{address:#x} is not mapped"
            if level == 0 or entry & _HUGE:
                page = (1 << shift) - 1
                return int(entry & _FRAME & ~page | address & page)
            table = entry & _FRAME
        raise AssertionError

    def u64(self, address: int) -> int:
        """Return a number of 64 bits."""
        return int(struct.unpack("<Q", self.read(address, 8))[0])


@contextlib.contextmanager
def booted(
    key: str,
    names: list[str],
    *,
    cpu: str = "max",
    options: str = "",
    cpus: int = 2,
    memory: int = 1 << 29,
    timeout: int = 300,
    kaslr: bool = False,
) -> Iterator[Guest]:
    """Boot the kernel ``61`` or ``612``, load modules in the order given, switch it off."""
    with tempfile.TemporaryDirectory(prefix="vfsmap-boot-") as place:
        directory = Path(place)
        _write_initramfs(directory / "initramfs", key, names)
        serial, ram = directory / "told", directory / "ram"
        ram.touch()
        os.truncate(ram, memory)
        command = [
            *("qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", cpu),
            *("-machine", "q35,memory-backend=ram", "-m", str(memory >> 20), "-smp", str(cpus)),
            *("-object", f"memory-backend-file,id=ram,share=on,mem-path={ram},size={memory}"),
            *("-kernel", str(vmlinuz(key)), "-initrd", str(directory / "initramfs")),
            *("-append", f"console=ttyS0,115200 {'' if kaslr else 'nokaslr'} {options}"),
            *("-display", "none", "-no-reboot", "-monitor", "none", "-nodefaults"),
            *("-serial", f"file:{directory / 'console'}", "-serial", f"file:{serial}"),
        ]
        done = subprocess.run(command, timeout=timeout, capture_output=True, check=False)
        told = _sections(serial.read_text() if serial.exists() else "")
        console = (directory / "console").read_text(errors="replace")
        assert "end" in told, f"the guest did not come to its end: {done.stderr!r}\n{console}"
        told["console"] = console.splitlines()
        symbols: dict[str, int] = {}
        for line in told["kallsyms"]:
            if "[" not in line:
                address, _, name = line.split()[:3]
                symbols.setdefault(name, int(address, 16))
        with ram.open("rb") as stream:
            content = mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ)
            levels = 5 if "la57" in " ".join(told["cpuinfo"]).split() else 4
            code = next(line for line in told["iomem"] if "Kernel code" in line)
            physical = symbols["_text"] - int(code.split("-")[0], 16)
            top = symbols["init_top_pgt"] - physical
            yield Guest(told, memoryview(content), symbols, top, levels, physical)


def _sections(text: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if line.startswith("== "):
            lines = found.setdefault(line[3:], [])
        else:
            lines.append(line)
    return found


def _write_initramfs(target: Path, key: str, names: list[str]) -> None:
    files: dict[str, bytes] = {"init": _INIT.replace("MODULES", " ".join(names)).encode()}
    busybox = shutil.which("busybox")
    assert busybox is not None, "busybox-static is needed to boot a kernel"
    files["bin/busybox"] = Path(busybox).read_bytes()
    for name in names:
        path = modules(key)[name]
        raw = path.read_bytes()
        files[f"{name}.ko"] = lzma.decompress(raw) if path.suffix == ".xz" else raw
    target.write_bytes(_cpio({"bin": None, "dev": None, **files}))


def _cpio(files: dict[str, bytes | None]) -> bytes:
    """Return an archive as the kernel unpacks it at boot; None stands for a directory."""
    archive = bytearray()
    for number, (name, content) in enumerate([*files.items(), ("TRAILER!!!", b"")], 1):
        mode = 0o040755 if content is None else 0o100755
        fields = [number, mode, 0, 0, 1, 0, len(content or b""), 0, 0, 0, 0, len(name) + 1, 0]
        archive += b"070701" + b"".join(b"%08X" % field for field in fields)
        archive += name.encode() + b"\0"
        archive += bytes(-len(archive) % 4)
        archive += content or b""
        archive += bytes(-len(archive) % 4)
    return bytes(archive)
