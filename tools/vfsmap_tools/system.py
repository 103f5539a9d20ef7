"""The commands ``system install`` and ``system uninstall``: what the system finds us by."""

import os
import shutil
import sysconfig
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Final, NamedTuple

import click

from vfsmap.errors import NotFound
from vfsmap_tools.completion import script
from vfsmap_tools.console import errors_exit, print_line
from vfsmap_tools.manpages import pages

_UNITS: Final = ("vfsmap-mount@.service", "vfsmap-serve@.service", "vfsmap-serve@.socket")
_HELPERS: Final = ("mount.fuse.vfsmap", "umount.fuse.vfsmap")
_COMPLETIONS: Final = {
    "bash": "share/bash-completion/completions/vfsmap",
    "zsh": "share/zsh/site-functions/_vfsmap",
    "fish": "share/fish/vendor_completions.d/vfsmap.fish",
}
_PATH: Final = click.Path(path_type=Path)


class Piece(NamedTuple):
    """A file, or a symbolic link, to be installed."""

    path: Path
    text: str = ""
    target: Path | None = None

    def is_installed(self) -> bool:
        """Tell whether it is there, as it is now."""
        if self.target:
            return self.path.is_symlink() and self.path.readlink() == self.target
        return self.path.is_file() and self.path.read_text(errors="replace") == self.text

    def install(self) -> None:
        """Put it in place; whoever looks sees the old one or the new one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(f".{self.path.name}.new")
        beside.unlink(missing_ok=True)
        if self.target:
            beside.symlink_to(self.target)
        else:
            beside.write_text(self.text)
            beside.chmod(0o644)
        beside.rename(self.path)


@click.group("system")
def system() -> None:
    """Make vfsmap known to mount(8), systemd, man and shells."""


def _places(command: click.decorators.FC) -> click.decorators.FC:
    for option in (
        click.option(
            "--root", type=_PATH, default=Path("/"), help="Where the system's / is, for packagers."
        ),
        click.option(
            "--prefix",
            type=_PATH,
            default=Path("/usr/local"),
            help="Where all but the helpers of mount(8) goes: /usr/local (default) or /usr.",
        ),
    ):
        command = option(command)
    return command


@system.command("install")
@_places
@errors_exit
def install(root: Path, prefix: Path) -> None:
    """Install mount helpers, systemd units, manual pages and shell completion.

    \b
    /sbin/mount.fuse.vfsmap, /sbin/umount.fuse.vfsmap     for mount(8), umount(8) and fstab(5)
    PREFIX/bin/vfsmap                                     a link, unless it is there
    PREFIX/lib/systemd/system/vfsmap-*                    units
    PREFIX/lib/sysusers.d, PREFIX/lib/tmpfiles.d          the group vfsmap, and /run/vfsmap
    PREFIX/share/man/man1, completions of bash, zsh, fish

    They name this very installation of vfsmap; after it has moved, install again.
    """
    for piece in _pieces(root, prefix):
        piece.install()
        print_line(str(piece.path))
    if root == Path("/") and Path("/run/systemd/system").exists():
        print_line(
            "now run: systemctl daemon-reload && systemd-sysusers && systemd-tmpfiles --create"
        )


@system.command("uninstall")
@_places
@errors_exit
def uninstall(root: Path, prefix: Path) -> None:
    """Remove what ``install`` has installed; what was changed since then stays."""
    for piece in _pieces(root, prefix):
        if piece.is_installed():
            piece.path.unlink()
            print_line(str(piece.path))
        elif os.path.lexists(piece.path):
            print_line(f"{piece.path} is not as it was installed, and stays")


def _pieces(root: Path, prefix: Path) -> Iterator[Piece]:
    from vfsmap_tools.cli import main  # here, not above: it is what imports us

    program = Path(sysconfig.get_path("scripts")) / "vfsmap"
    if not program.exists():
        raise NotFound(f"{program} does not exist; install the package vfsmap with pip")
    words = {"@VFSMAP@": str(program), "@FUSERMOUNT@": shutil.which("fusermount3") or "fusermount3"}
    base = root / prefix.relative_to("/") if prefix.is_absolute() else root / prefix
    for name in _HELPERS:
        yield Piece(root / "sbin" / name, target=program)
    if base / "bin/vfsmap" != program:
        yield Piece(base / "bin/vfsmap", target=program)
    for name in _UNITS:
        yield Piece(base / "lib/systemd/system" / name, _shipped(name, words))
    for kind in ("sysusers", "tmpfiles"):
        yield Piece(base / f"lib/{kind}.d/vfsmap.conf", _shipped(f"{kind}.conf", words))
    for name, text in pages(main).items():
        yield Piece(base / "share/man/man1" / name, text)
    for shell, place in _COMPLETIONS.items():
        yield Piece(base / place, script(shell) + "\n")


def _shipped(name: str, words: dict[str, str]) -> str:
    text = files("vfsmap_tools").joinpath("shipped", name).read_text()
    for word, meaning in words.items():
        text = text.replace(word, meaning)
    return text
