"""What mount(8) and umount(8) call for file systems of the type ``fuse.vfsmap``.

mount(8) runs ``/sbin/mount.fuse.vfsmap POOL DIR [-sfnv] [-N NAMESPACE] [-o OPTIONS] [-t TYPE]``
where there is such a program, and ``/sbin/mount.fuse`` otherwise, which runs
``vfsmap POOL DIR -o OPTIONS``.  umount(8) runs ``/sbin/umount.fuse.vfsmap DIR [-flnrv] ...`` where
there is one and it looks for it (not for an absolute path without options, whose type it takes
from statfs(2)), and unmounts by itself otherwise.  All of them are the command ``vfsmap``, which
tells by its own name, or by a first argument that is a path, what it is called for.
"""

import os
import pwd
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import click

from vfsmap.errors import Denied, Invalid
from vfsmap_tools.console import errors_exit
from vfsmap_tools.mounting import mount, unmount_and_wait
from vfsmap_tools.mounts import FILESYSTEM_TYPE

_PATH: Final = click.Path(path_type=Path)


def _ignored(command: Callable[..., Any]) -> Callable[..., Any]:
    """Take what has no meaning here: mtab, namespace (mount(8) has entered it), type."""
    for option in (
        click.option("-n", "no_mtab", is_flag=True, expose_value=False),
        click.option("-v", "verbose", is_flag=True, expose_value=False),
        click.option("-N", "namespace", expose_value=False),
        click.option("-t", "kind", expose_value=False),
    ):
        command = option(command)
    return command


@click.command(f"mount.{FILESYSTEM_TYPE}", hidden=True)
@click.argument("pool", type=_PATH)
@click.argument("directory", type=_PATH)
@click.option("-o", "options", multiple=True)
@click.option("-f", "fake", is_flag=True)
@click.option("-s", "sloppy", is_flag=True)
@_ignored
@click.pass_context
@errors_exit
def mount_fuse_vfsmap(
    context: click.Context,
    pool: Path,
    directory: Path,
    options: tuple[str, ...],
    fake: bool,
    sloppy: bool,
) -> None:
    """Mount a pool, for mount(8)."""
    words = [word for option in options for word in option.split(",") if word]
    if fake:
        return
    if "remount" in words:
        _remount(directory, words)
        return
    for word in [word for word in words if word.startswith("setuid=")]:
        words.remove(word)
        _become(word.removeprefix("setuid="))
    if sloppy:
        words.append("sloppy")
    context.invoke(mount, pool=pool, directory=directory, options=(",".join(words),))


@click.command(f"umount.{FILESYSTEM_TYPE}", hidden=True)
@click.argument("directory", type=_PATH)
@click.option("-f", "force", is_flag=True)
@click.option("-l", "lazy", is_flag=True)
@click.option("-r", "read_only", is_flag=True, expose_value=False)
@_ignored
@errors_exit
def umount_fuse_vfsmap(directory: Path, force: bool, lazy: bool) -> None:
    """Unmount a pool, for umount(8), and wait for its server."""
    unmount_and_wait(directory, force=force, lazy=lazy)


def _remount(directory: Path, words: list[str]) -> None:
    """Have the kernel change the options that it keeps by itself, such as ro."""
    command = ["mount", "-i", "-o", ",".join(words), str(directory)]
    sys.exit(subprocess.run(command, check=False).returncode)


def _become(user: str) -> None:
    """Go on as somebody else; only root can.

    Raises:
        Invalid: there is no such user.
        Denied: we are not root.
    """
    try:
        entry = pwd.getpwnam(user)
    except KeyError as exc:
        raise Invalid(f"setuid={user}: there is no such user; make it, or name another") from exc
    if os.geteuid():
        raise Denied(f"setuid={user}: only root can mount as somebody else")
    os.initgroups(user, entry.pw_gid)
    os.setgid(entry.pw_gid)
    os.setuid(entry.pw_uid)
    os.environ["HOME"] = entry.pw_dir
    os.environ.pop("XDG_RUNTIME_DIR", None)
