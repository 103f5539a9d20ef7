"""Commands about a crash log: ``vfsmap pstore ...``."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal

import click

from vfsmap.errors import Invalid
from vfsmap.pstore import File, Geometry, Recorder, Region, format_region
from vfsmap.pstore.geometry import Order
from vfsmap.pstore.kallsyms import Symbols
from vfsmap.pstore.transfer import copy_region, extract
from vfsmap.units import MIB, format_size
from vfsmap_tools.console import (
    errors_exit,
    json_option,
    print_facts,
    print_json,
    print_line,
    print_table,
)
from vfsmap_tools.pstore_follow import follow_zone
from vfsmap_tools.pstore_options import (
    KINDS,
    find_geometry,
    geometry_options,
    make_geometry,
    open_region,
    open_to_read,
)
from vfsmap_tools.pstore_run import leave_with, run_recorded

PATH: Final = click.Path(path_type=Path)
Kept = Literal["keep", "overwrite"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def pstore() -> None:
    """Keep a crash log that the Linux kernel's ramoops can read and write.

    FILE is a file of a mounted pool, mapped straight out of it, or any other region file.  The
    geometry of a region is found out by itself; what the options say of it goes before.
    """


@pstore.command("format")
@click.argument("file", type=PATH)
@geometry_options
@click.option(
    "--policy",
    type=click.Choice(["keep", "overwrite"]),
    default="keep",
    help="When all crash records are unread: keep them, or overwrite the oldest.",
)
@click.option("--force", is_flag=True, help="Destroy what the file holds.")
@json_option
@errors_exit
def format_command(
    file: Path, geometry: dict[str, Any], policy: Kept, force: bool, as_json: bool
) -> None:
    """Make an empty region.

    Unless told otherwise 1M large, with records, console and pmsg of 128K each.
    """
    made = make_geometry(geometry, MIB)
    format_region(file, made, overwrite=policy == "overwrite", force=force)
    if as_json:
        print_json(geometry_facts(made))
    else:
        print_line(f"{file}: {made.records} crash records, {format_size(made.size)} in all")


@pstore.command("ls")
@click.argument("file", type=PATH)
@geometry_options
@json_option
@errors_exit
def ls(file: Path, geometry: dict[str, Any], as_json: bool) -> None:
    """List what /sys/fs/pstore would show."""
    with open_to_read(file, geometry) as region:
        unread = region.unread()
        facts = [file_facts(shown, unread) for shown in region.files()]
    if as_json:
        print_json(facts)
        return
    columns = ("name", "size", "time", "read", "corrected", "bad")
    print_table(columns, [[fact[column] for column in columns] for fact in facts])


@pstore.command()
@click.argument("file", type=PATH)
@click.argument("name", required=False)
@geometry_options
@click.option("--follow", "-f", is_flag=True, help="Go on as the console or pmsg zone grows.")
@click.option("--kallsyms", type=PATH, help="A copy of /proc/kallsyms, for the names in ftrace.")
@click.option("--peek", is_flag=True, help="Don't mark crash records as read.")
@json_option
@errors_exit
def show(
    file: Path,
    name: str | None,
    geometry: dict[str, Any],
    follow: bool,
    kallsyms: Path | None,
    peek: bool,
    as_json: bool,
) -> None:
    """Print one file, or all of them, and mark the crash records among them as read."""
    if follow:
        kind = (name or "console").removesuffix("-ramoops-0")
        with open_to_read(file, geometry) as region, until_stopped():
            follow_zone(region, kind, as_json=as_json)
        return
    symbols = Symbols.load(kallsyms) if kallsyms else None
    with open_to_read(file, geometry) as region:
        files = [region.file(name, symbols)] if name else region.files(symbols)
        unread = region.unread()
        if as_json:
            facts = [file_facts(shown, unread) | content_facts(shown) for shown in files]
            print_json(facts[0] if name else facts)
        else:
            print_files(files, titled=not name)
        if not peek:
            mark_read(region, files)


@pstore.command()
@click.argument("file", type=PATH)
@click.argument("names", metavar="[NAME]...", nargs=-1)
@geometry_options
@click.option("--all", "everything", is_flag=True, help="Erase everything.")
@json_option
@errors_exit
def erase(
    file: Path, names: tuple[str, ...], geometry: dict[str, Any], everything: bool, as_json: bool
) -> None:
    """Erase files, as unlinking them in /sys/fs/pstore does."""
    if everything == bool(names):
        raise Invalid("name the files to erase, or give --all")
    with open_region(file, geometry, writable=True) as region:
        erased = [shown.name for shown in region.files()] if everything else list(names)
        if everything:
            region.erase_all()
        for name in names:
            region.erase(name)
    if as_json:
        print_json({"erased": erased})


@pstore.command()
@click.argument("file", type=PATH)
@geometry_options
@click.option(
    "--to", "zone", type=click.Choice(["pmsg", "console"]), default="pmsg", help="Which zone."
)
@json_option
@errors_exit
def log(file: Path, geometry: dict[str, Any], zone: str, as_json: bool) -> None:
    """Record the lines of the standard input, by default to the pmsg zone."""
    with Recorder(file, find_geometry(file, geometry), watch=False) as recorder:
        store = recorder.console if zone == "console" else recorder.pmsg
        lines = 0
        with until_stopped():
            for line in sys.stdin.buffer:
                store(line)
                lines += 1
        recorder.persist()
    if as_json:
        print_json({"lines": lines})


@pstore.command(context_settings={"ignore_unknown_options": True})
@click.argument("file", type=PATH)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@geometry_options
@json_option
@errors_exit
def run(file: Path, command: tuple[str, ...], geometry: dict[str, Any], as_json: bool) -> None:
    """Run a command, record what it prints, and leave a crash record if it fails.

    Output and exit status, or signal, are passed on.  Write: run FILE -- COMMAND...  With --json,
    the last line of the error stream tells the status and the record's name.
    """
    with Recorder(file, find_geometry(file, geometry), watch=False) as recorder:
        status, record = run_recorded(recorder, command)
    if as_json:
        print_json({"status": status, "record": record}, indent=None, file=sys.stderr)
    leave_with(status)


@pstore.command("import")
@click.argument("region", type=PATH)
@click.argument("file", type=PATH)
@geometry_options
@click.option("--force", is_flag=True, help="Destroy what FILE holds.")
@json_option
@errors_exit
def import_command(
    region: Path, file: Path, geometry: dict[str, Any], force: bool, as_json: bool
) -> None:
    """Copy a region from anywhere into FILE."""
    with open_region(region, geometry, writable=False) as source:
        size = copy_region(source, file, force=force)
    print_facts({"copied": size}, as_json=as_json)


@pstore.command()
@click.argument("file", type=PATH)
@click.argument("region", type=PATH)
@geometry_options
@click.option("--force", is_flag=True, help="Destroy what REGION holds.")
@json_option
@errors_exit
def export(file: Path, region: Path, geometry: dict[str, Any], force: bool, as_json: bool) -> None:
    """Copy FILE to a plain region, for a kernel or another tool."""
    with open_to_read(file, geometry) as source:
        size = copy_region(source, region, force=force)
    print_facts({"copied": size}, as_json=as_json)


@pstore.command("extract")
@click.argument("file", type=PATH)
@click.argument("directory", type=PATH)
@geometry_options
@click.option("--kallsyms", type=PATH, help="A copy of /proc/kallsyms, for the names in ftrace.")
@click.option("--peek", is_flag=True, help="Don't mark crash records as read.")
@json_option
@errors_exit
def extract_command(
    file: Path,
    directory: Path,
    geometry: dict[str, Any],
    kallsyms: Path | None,
    peek: bool,
    as_json: bool,
) -> None:
    """Write every file that the kernel would show to a directory."""
    symbols = Symbols.load(kallsyms) if kallsyms else None
    with open_to_read(file, geometry) as region:
        files = region.files(symbols)
        extract(files, directory)
        if not peek:
            mark_read(region, files)
    names = [str(directory / shown.name) for shown in files]
    if as_json:
        print_json(names)
    else:
        for each in names:
            print_line(each)


@pstore.command("policy")
@click.argument("file", type=PATH)
@click.argument("kept", metavar="keep|overwrite", type=click.Choice(["keep", "overwrite"]))
@geometry_options
@json_option
@errors_exit
def policy_command(file: Path, kept: Kept, geometry: dict[str, Any], as_json: bool) -> None:
    """Say what happens when all crash records are unread.

    keep: a new one is refused, and counted.  overwrite: the oldest makes room, and is counted.
    """
    with open_region(file, geometry, writable=True) as region:
        region.set_policy(overwrite=kept == "overwrite")
    if as_json:
        print_json({"policy": kept})


@pstore.command("info")
@click.argument("file", type=PATH)
@geometry_options
@json_option
@errors_exit
def info_command(file: Path, geometry: dict[str, Any], as_json: bool) -> None:
    """Tell a region's geometry, the counts it keeps, and how full its zones are."""
    with open_to_read(file, geometry) as region:
        ledger = region.ledger
        facts = geometry_facts(region.geometry) | {
            "policy": "overwrite" if ledger.overwrite else "keep",
            "counter": ledger.counter,
            "unread": len(region.unread()),
            "overwritten": ledger.overwritten,
            "refused": ledger.refused,
            "kernel": kernel_parameters(region.geometry),
        }
        zones = [
            {
                "zone": f"{zone.place.kind} {zone.place.number}",
                "offset": zone.place.offset,
                "size": zone.place.size,
                "capacity": zone.capacity,
                "used": zone.size if zone.valid else 0,
                "state": "valid" if zone.valid else "damaged" if zone.signed else "no zone",
            }
            for zone in region.zones
        ]
    if as_json:
        print_json(facts | {"zones": zones})
        return
    print_facts(facts, as_json=False)
    print_line()
    print_table(list(zones[0]), [list(zone.values()) for zone in zones])


@contextmanager
def until_stopped() -> Iterator[None]:
    """Do what goes on until it is told to end: then SIGINT and SIGTERM are a good end."""
    old = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, old)


def geometry_facts(geometry: Geometry) -> dict[str, Any]:
    """Return a geometry as facts, sizes in bytes."""
    order: Order = geometry.order
    sizes = {name: getattr(geometry, name) for name in ("size", *KINDS)}
    return sizes | {
        "ecc": geometry.ecc,
        "cpus": geometry.cpus,
        "order": order,
        "records": geometry.records,
    }


def kernel_parameters(geometry: Geometry) -> str:
    """Return what a kernel's ramoops is to be told, beside the address."""
    return (
        f"mem_size={geometry.size:#x} record_size={geometry.record:#x}"
        f" console_size={geometry.console:#x} ftrace_size={geometry.ftrace:#x}"
        f" pmsg_size={geometry.pmsg:#x} ecc={geometry.ecc}"
    )


def file_facts(shown: File, unread: set[str]) -> dict[str, Any]:
    """Return what there is to say about a file."""
    record = shown.name.removesuffix(".enc.z")
    when = "" if shown.time_ns is None else format_time(shown.time_ns)
    return {
        "name": shown.name,
        "kind": shown.kind,
        "size": len(shown.data),
        "time": when,
        "read": "" if shown.kind != "dmesg" else "no" if record in unread else "yes",
        "corrected": shown.corrected,
        "bad": shown.bad,
    }


def format_time(time_ns: int) -> str:
    """Return a record's time; nonsense as the number it is."""
    with suppress(ValueError, OverflowError, OSError):
        return datetime.fromtimestamp(time_ns / 1e9, UTC).isoformat(timespec="milliseconds")
    return str(time_ns // 1_000_000_000)


def content_facts(shown: File) -> dict[str, str]:
    """Return a file's content as JSON can hold it."""
    try:
        return {"text": shown.data.decode()}
    except UnicodeDecodeError:
        return {"hex": shown.data.hex()}


def print_files(files: list[File], *, titled: bool) -> None:
    """Write files to the standard output, byte for byte."""
    out = sys.stdout.buffer
    for shown in files:
        if titled:
            out.write(f"==> {shown.name} <==\n".encode())
        out.write(shown.data)
        if titled:
            out.write(b"\n")
    out.flush()


def mark_read(region: Region, files: list[File]) -> None:
    """Mark crash records as read, where the region can be written."""
    if region.writable:
        region.mark_read(*files)


if __name__ == "__main__":
    pstore()
