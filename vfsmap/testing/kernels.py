"""Debian's kernel packages, fetched once by apt and kept, for tests on real modules."""

import functools
import hashlib
import os
import subprocess
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from vfsmap.kmod.module import find_modules


class Package(NamedTuple):
    """A package of one kernel: where its parts are once it is unpacked."""

    name: str
    version: str
    sha256: str
    release: str


PACKAGES: Final = {
    "61": Package(
        "linux-image-6.1.0-56-cloud-amd64",
        "6.1.192-2",
        "e7d02b943971edcb8790e256c02cfab3bca6c3d37c1bf25392a57c71300615ee",
        "6.1.0-56-cloud-amd64",
    ),
    "612": Package(
        "linux-image-6.12.117+deb12-cloud-amd64",
        "6.12.117-1~deb12u1",
        "5195b288dec79e2981d6b84457f38b7ce7310a2d702930ec7d07209c7f78ce37",
        "6.12.117+deb12-cloud-amd64",
    ),
    "61-amd64": Package(
        "linux-image-6.1.0-56-amd64",
        "6.1.192-2",
        "a86e2049672f52354c4536a089203b6c82639420424d31c91cf31a181fd4d8f1",
        "6.1.0-56-amd64",
    ),
    "612-amd64": Package(
        "linux-image-6.12.117+deb12-amd64",
        "6.12.117-1~deb12u1",
        "803d36a7cda13355ae8152122470288b2636f19f1cb58162dd9d8b408af9b1b4",
        "6.12.117+deb12-amd64",
    ),
}

_GONE: Final = ("was not found", "Unable to locate", "404", "Can't find a source")


def cache() -> Path:
    """Return the directory that keeps what was fetched: ``.cache`` of the working directory."""
    return Path(os.environ.get("VFSMAP_TEST_CACHE", ".cache")).resolve() / "debian"


@functools.cache
def kernel(key: str) -> Path:
    """Return where a package of :data:`PACKAGES` is unpacked; skip the test if it is no more."""
    package = PACKAGES[key]
    target = cache() / key
    if not target.is_dir():
        archive = _download(package)
        unpacking = target.with_name(f"{key}.{os.getpid()}")
        subprocess.run(["dpkg-deb", "-x", archive, unpacking], check=True)
        try:
            unpacking.rename(target)
        except OSError:  # another test run was quicker
            subprocess.run(["rm", "-rf", unpacking], check=True)
    return target


def _download(package: Package) -> Path:
    cache().mkdir(parents=True, exist_ok=True)
    found = sorted(cache().glob(f"{package.name}_*.deb"))
    if not found:
        done = subprocess.run(
            ["apt-get", "download", f"{package.name}={package.version}"],
            cwd=cache(),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode and any(word in done.stderr for word in _GONE):
            pytest.skip(f"the archive has moved on from {package.name} {package.version}")
        assert done.returncode == 0, done.stderr
        found = sorted(cache().glob(f"{package.name}_*.deb"))
    digest = hashlib.sha256(found[0].read_bytes()).hexdigest()
    assert digest == package.sha256, f"{found[0]} has the sha256 {digest}"
    return found[0]


@functools.cache
def modules(key: str) -> dict[str, Path]:
    """Return all modules of a package by the names the kernel gives them."""
    return {
        path.name.partition(".")[0].replace("-", "_"): path for path in find_modules(kernel(key))
    }


def vmlinuz(key: str) -> Path:
    """Return a package's packed kernel."""
    return kernel(key) / "boot" / f"vmlinuz-{PACKAGES[key].release}"
