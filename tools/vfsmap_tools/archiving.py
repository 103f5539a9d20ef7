"""The commands ``export`` and ``import``: a tree as a tar archive, with all that vfsmap knows."""

import os
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import click

from vfsmap.errors import Invalid, NotFound
from vfsmap.pmem.libc import syncfs
from vfsmap_tools import archive
from vfsmap_tools.archive_reader import Reader, members, tar_errors
from vfsmap_tools.archive_writer import Member, Source, Writer, sources
from vfsmap_tools.console import complain, errors_exit, json_option, print_json, progress

PATH = click.Path(path_type=Path)
_STANDARD = Path("-")


def _options(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--quiet", "-q", is_flag=True, help="No progress bar.")(command)


@click.command("export")
@click.argument("directory", type=PATH)
@click.argument("archive_path", metavar="ARCHIVE", type=PATH)
@_options
@json_option
@errors_exit
def export(directory: Path, archive_path: Path, quiet: bool, as_json: bool) -> None:
    """Write a mounted tree into a tar archive, with attributes, hints and seals.

    ARCHIVE is written as ARCHIVE.part, and gets its name when it is whole; an export that was
    interrupted goes on with what is whole there. - writes to standard output.

    Any tar can unpack the archive; vfsmap import also checks every file's digest, and seals what
    was sealed.
    """
    if not directory.is_dir():
        raise NotFound(f"{directory} is not a directory")
    if archive_path == _STANDARD:
        if as_json:
            raise Invalid("--json and an archive on standard output: leave one out")
        if sys.stdout is None:
            raise Invalid("standard output is closed")
        _report(_export(directory, sys.stdout.buffer, None, quiet=quiet), as_json=None)
        sys.stdout.buffer.flush()
        return
    archive_path = Path(os.path.realpath(archive_path))
    if archive_path.exists() and not archive_path.is_file():
        raise Invalid(f"{archive_path} is not a regular file; - writes to standard output")
    if archive_path.is_relative_to(directory.resolve()):
        raise Invalid(f"{archive_path} lies inside {directory}, which it is to hold")
    unfinished = archive_path.with_name(archive_path.name + ".part")
    # of a descriptor
    with open(os.open(unfinished, os.O_RDWR | os.O_CREAT, 0o600), "r+b") as file:  # noqa: PTH123
        facts = _export(directory, file, unfinished, quiet=quiet or as_json)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(archive_path)
    _sync(archive_path.absolute().parent, os.fsync)
    _report(facts, as_json=as_json)


def _export(
    directory: Path, file: IO[bytes], unfinished: Path | None, *, quiet: bool
) -> dict[str, Any]:
    with progress(hidden=quiet) as bar:
        task = bar.add_task("exporting", total=None)
        found = list(sources(directory))
        regular = sum(s.status.st_blocks * 512 for s in found if s.path.is_file())
        bar.update(task, total=regular)
        writer = Writer(file, lambda size: bar.advance(task, size))
        done = _take_over(file, unfinished, writer, found) if unfinished else 0
        if not done:
            writer.begin()
        for source in found[done:]:
            writer.add(source)
        writer.end(directory)
    return {
        "members": writer.members,
        "resumed_at": done,
        "sockets_left_out": writer.skipped,
    }


def _take_over(file: IO[bytes], path: Path, writer: Writer, found: list[Source]) -> int:
    """Go behind what an export that was interrupted has left whole; return how much that is."""
    end = done = 0
    for source, member in zip(found, _whole_members(path), strict=False):
        if not writer.take_over(source, member):
            break
        done += 1
        end = member.end
    file.seek(end)
    file.truncate()
    return done


def _whole_members(path: Path) -> Iterator[Member]:
    """Yield the members at the beginning of an archive that are whole and undamaged."""
    size = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            while (info := tar.next()) is not None:
                end = tar.offset
                if end > size or archive.MEMBERS in info.pax_headers:
                    return
                if info.isreg():
                    content = archive.content_of(tar, info)
                    digest = archive.digest_of(content, archive.data_runs(info), info.size)
                    if digest != info.pax_headers.get(archive.SHA256):
                        return
                yield Member(info, end)
    except (tarfile.TarError, ValueError, EOFError):
        return


@click.command("import")
@click.argument("directory", type=PATH)
@click.argument("archive_path", metavar="ARCHIVE", type=PATH)
@_options
@json_option
@errors_exit
def import_command(directory: Path, archive_path: Path, quiet: bool, as_json: bool) -> None:
    """Unpack an archive that export wrote into a directory, and check every digest.

    What is there already, the same by size, time and digest, is left alone: an import that was
    interrupted goes on where it was. - reads from standard input.

    A name that leads out of the directory, or through a symbolic link, is refused, and so is an
    archive that is damaged or not whole: exit code 3.
    """
    if not directory.is_dir():
        raise NotFound(f"{directory} is not a directory; make it first")
    with ExitStack() as stack:
        bar = stack.enter_context(progress(hidden=quiet or as_json))
        file: IO[bytes] = sys.stdin.buffer
        total = None
        if archive_path != _STANDARD:
            file = stack.enter_context(archive_path.open("rb"))
            total = os.fstat(file.fileno()).st_size
        task = bar.add_task("importing", total=total)
        reader = Reader(directory, lambda size: bar.advance(task, size))
        with tar_errors():
            for tar, info in members(file):
                reader.unpack(tar, info)
        reader.finish()
    _sync(directory, syncfs)
    facts = {"files": reader.files, "there_already": reader.kept, "left_out": reader.left_out}
    _report(facts, as_json=as_json)


def _sync(directory: Path, sync: Callable[[int], object]) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        sync(fd)
    finally:
        os.close(fd)


def _report(facts: dict[str, Any], *, as_json: bool | None) -> None:
    """Tell what was done: as JSON; or only what was left out, as people need no more."""
    if as_json:
        print_json(facts)
        return
    for name in ("sockets_left_out", "left_out"):
        if facts.get(name):
            what = name.replace("_", " ")
            complain(f"{len(facts[name])} {what}, among them {facts[name][0]}")
