"""Commands that watch the daemon: ``leases``, ``events``."""

import time
from pathlib import Path

import click

from vfsmap.daemon.client import connect
from vfsmap.units import format_size
from vfsmap_tools.console import errors_exit, json_option, print_json, print_line, print_table

PATH = click.Path(path_type=Path)


@click.command("leases")
@click.argument("directory", type=PATH)
@json_option
@errors_exit
def leases(directory: Path, as_json: bool) -> None:
    """List who maps what of the pool mounted on a directory."""
    found = list(connect(directory).leases())
    if as_json:
        print_json(found)
        return
    print_table(
        ("lease", "pid", "user", "inode", "offset", "length", "rights", "since", "holder"),
        (
            (
                lease["lease"],
                lease["pid"],
                lease["uid"],
                lease["inode"],
                f"{lease['offset']:#x}",
                format_size(lease["length"]),
                "read, write" if lease["writable"] else "read",
                _clock(lease["granted_ns"]),
                "gone, bytes still mapped" if lease["orphaned"] else "connected",
            )
            for lease in found
        ),
    )


@click.command("events")
@click.argument("directory", type=PATH)
@json_option
@errors_exit
def events(directory: Path, as_json: bool) -> None:
    """Tell what happens: leases granted, ended and refused, violations; until interrupted.

    With --json, one object a line.
    """
    try:
        for event in connect(directory).events():
            if as_json:
                print_json(event, indent=None)
                continue
            lease = f" lease {event['lease']}" if event.get("lease") else ""
            inode = f" inode {event['inode']}" if event.get("inode") else ""
            who = f" by process {event['pid']}, user {event['uid']}"
            detail = f": {event['detail']}" if event.get("detail") else ""
            print_line(
                f"{_clock(event['time_ns'])} {event['kind']}{lease}{inode}{who}{detail}", flush=True
            )
    except KeyboardInterrupt:
        pass


def _clock(time_ns: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time_ns / 1e9))
