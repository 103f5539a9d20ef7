"""The command ``top``: what a mount does right now, from its daemon's counters."""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from vfsmap.daemon.client import Client, connect
from vfsmap.errors import VfsmapError
from vfsmap.tally import quantile
from vfsmap.units import MIB, format_size
from vfsmap_tools.console import errors_exit, interruptible, json_option, print_json
from vfsmap_tools.escaping import printable

_LINES: Final = 6
"""Leases and events that are shown."""
_BAR: Final = 40
_COLUMNS: Final = ("", "/s", "MiB/s", "busy", "median us", "99 % us", "errors/s", "in all")


@click.command("top")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--interval",
    type=click.FloatRange(min=0.05, max=3600),
    default=1.0,
    show_default=True,
    help="Seconds between two looks.",
)
@click.option("--count", type=click.IntRange(min=1), help="Look so often, then end.")
@json_option
@errors_exit
def top(directory: Path, interval: float, count: int | None, as_json: bool) -> None:
    """Show live what the pool mounted on a directory does; until interrupted.

    Requests are what the kernel asks the server for: what it answers from its caches is not among
    them. Times are the server's own work. With --json, one sample of one interval.
    """
    with connect(directory) as client, contextlib.suppress(KeyboardInterrupt), interruptible():
        if as_json:
            print_json(next(samples(client, interval)))
            return
        news = _News(directory)
        console = Console(highlight=False)
        shown = enumerate(samples(client, interval), 1)
        if not console.is_terminal:
            for number, sample in shown:
                console.print(_view(directory, sample, leases(client), news.lines))
                if number == count:
                    return
        with Live(console=console, screen=True, auto_refresh=False) as live:
            live.update(Text("looking ..."), refresh=True)
            for number, sample in shown:
                view = _view(directory, sample, leases(client), news.lines)
                live.update(view, refresh=True)
                if number == count:
                    return


# samples


def samples(client: Client, interval: float) -> Iterator[dict[str, Any]]:
    """Yield what has happened in each interval."""
    before, _ = client.call("Stats", coverage=True)
    due = time.monotonic()
    while True:
        due = max(due + interval, time.monotonic())
        time.sleep(max(due - time.monotonic(), 0))
        after, _ = client.call("Stats", coverage=True)
        yield difference(before, after)
        before = after


def leases(client: Client) -> list[dict[str, Any]]:
    """Return the youngest leases, the youngest first."""
    return list(deque(client.leases(), maxlen=_LINES))[::-1]


def difference(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Return rates and latencies between two answers of Stats, and what there is now."""
    seconds = (after["time_ns"] - before["time_ns"]) / 1e9
    facts = ("size", "free", "inodes", "leases", "writable_leases", "events", "coverage")
    return {
        "seconds": round(seconds, 6),
        "running": round((after["time_ns"] - after["started_ns"]) / 1e9, 3),
        "requests_per_second": _rate(before["requests"], after["requests"], seconds),
        "requests": _operations(before["requests"], after["requests"], seconds),
        "calls_per_second": _rate(before["calls"], after["calls"], seconds),
        "calls": _operations(before["calls"], after["calls"], seconds),
        **{name: after.get(name) for name in facts},
    }


def _rate(before: list[dict[str, Any]], after: list[dict[str, Any]], seconds: float) -> float:
    done: int = sum(each["count"] for each in after) - sum(each["count"] for each in before)
    return round(done / seconds, 1)


def _operations(
    before: list[dict[str, Any]], after: list[dict[str, Any]], seconds: float
) -> list[dict[str, Any]]:
    """Return each operation's rates, the most frequent first."""
    known = {each["name"]: each for each in before}
    nothing = {"count": 0, "errors": 0, "bytes": 0, "time_ns": 0, "latency": []}
    found = []
    for now in after:
        old = known.get(now["name"], nothing)
        latency = list(now["latency"])
        for at, count in enumerate(old["latency"]):
            latency[at] -= count
        found.append(
            {
                "name": now["name"],
                "count": now["count"],
                "per_second": round((now["count"] - old["count"]) / seconds, 1),
                "bytes_per_second": round((now["bytes"] - old["bytes"]) / seconds),
                "errors_per_second": round((now["errors"] - old["errors"]) / seconds, 1),
                "busy": round((now["time_ns"] - old["time_ns"]) / 1e9 / seconds, 4),
                "median_us": round(quantile(latency, 0.5) / 1e3, 1),
                "p99_us": round(quantile(latency, 0.99) / 1e3, 1),
            }
        )
    return sorted(found, key=lambda each: (-each["per_second"], -each["count"]))


class _News:
    """The last events, listened to beside."""

    def __init__(self, directory: Path) -> None:
        self.lines: deque[str] = deque(maxlen=_LINES)
        threading.Thread(target=self._listen, args=(directory,), daemon=True).start()

    def _listen(self, directory: Path) -> None:
        with contextlib.suppress(VfsmapError), connect(directory) as client:
            for event in client.events():
                if event["kind"] == "ready":
                    continue
                clock = time.strftime("%H:%M:%S", time.localtime(event["time_ns"] / 1e9))
                lease = f" lease {event['lease']}" if event.get("lease") else ""
                inode = f" inode {event['inode']}" if event.get("inode") else ""
                detail = f": {event['detail']}" if event.get("detail") else ""
                who = f" by process {event['pid']}"
                self.lines.append(f"{clock} {event['kind']}{lease}{inode}{who}{detail}")


# the view


def _view(
    directory: Path, sample: dict[str, Any], held: list[dict[str, Any]], news: deque[str]
) -> RenderableType:
    parts: list[RenderableType] = [_head(directory, sample), _coverage(sample), Text()]
    parts.append(_table("request", sample["requests"]))
    parts += [Text(), _table("call", sample["calls"])]
    if held:
        parts += [Text(), _leases(held)]
    if news:
        parts += [Text(), Text("events", style="bold"), *(Text(printable(line)) for line in news)]
    return Group(*parts)


def _head(directory: Path, sample: dict[str, Any]) -> Text:
    used = sample["size"] - sample["free"]
    words = (
        f"{printable(str(directory))}: {format_size(used)} of {format_size(sample['size'])} used, "
        f"{sample['inodes']:,} inodes\n"
        f"{sample['requests_per_second']:,.0f} requests/s, "
        f"{sample['calls_per_second']:,.0f} calls/s, "
        f"{sample['leases']} leases, {sample['writable_leases']} of them writable"
    )
    return Text(words, style="bold")


def _coverage(sample: dict[str, Any]) -> Text:
    counted = sample["coverage"]
    if not counted or not counted["large"]:
        return Text("huge: no file of 2 MiB or more")
    share = counted["huge"] / counted["large"]
    full = round(share * _BAR)
    free = counted["free_huge"] / counted["free"] if counted["free"] else 0
    return Text.assemble(
        "huge: ",
        ("█" * full, "green"),
        ("░" * (_BAR - full), "yellow"),
        f" {share:.1%} of large files ({format_size(counted['large'])}), "
        f"{free:.0%} of what is free",
    )


def _table(what: str, operations: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in (what, *_COLUMNS[1:]):
        table.add_column(column, justify="left" if column == what else "right", no_wrap=True)
    for each in operations:
        if each["count"]:
            table.add_row(
                each["name"],
                f"{each['per_second']:,.0f}",
                f"{each['bytes_per_second'] / MIB:,.1f}" if each["bytes_per_second"] else "",
                f"{each['busy']:.1%}",
                f"{each['median_us']:,.1f}" if each["per_second"] else "",
                f"{each['p99_us']:,.1f}" if each["per_second"] else "",
                f"{each['errors_per_second']:,.0f}" if each["errors_per_second"] else "",
                f"{each['count']:,}",
                style="" if each["per_second"] else "dim",
            )
    return table


def _leases(held: list[dict[str, Any]]) -> Table:
    table = Table("lease", "process", "user", "inode", "length", "rights", box=None, pad_edge=False)
    for lease in held:
        table.add_row(
            str(lease["lease"]),
            str(lease["pid"]),
            str(lease["uid"]),
            str(lease["inode"]),
            format_size(lease["length"]),
            ("read, write" if lease["writable"] else "read")
            + (", holder gone" if lease["orphaned"] else ""),
        )
    return table
