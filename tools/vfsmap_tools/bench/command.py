"""``vfsmap bench``: run scenarios, keep what they find, say which promises are kept."""

import importlib
import os
import sys
import time
from pathlib import Path
from typing import Final

import click
from rich.console import Console
from rich.table import Table

from vfsmap.errors import Denied
from vfsmap_tools.bench.handover import round_trip
from vfsmap_tools.bench.page import build, number
from vfsmap_tools.bench.results import Result, machine, now
from vfsmap_tools.console import (
    complain,
    errors_exit,
    interruptible,
    json_option,
    print_json,
)

SCENARIOS: Final = (
    "fuse",
    "mapping",
    "faults",
    "sizes",
    "counts",
    "ageing",
    "cow",
    "pstore",
    "kmod",
    "kmod_memory",
    "hostile",
)
"""The modules of this package that have a ``run(quick) -> Result``, in the order of the page."""
_HOME: Final = Path("docs/benchmarks")


@click.command("bench")
@click.argument("scenarios", nargs=-1, type=click.Choice(SCENARIOS))
@click.option("--quick", is_flag=True, help="About a minute in all: fewer rounds, smaller files.")
@click.option(
    "--results",
    type=click.Path(path_type=Path, file_okay=False),
    default=_HOME,
    show_default=True,
    help="Where the documents and the page are kept.",
)
@click.option("--page", is_flag=True, help="Measure nothing: make the page from what is there.")
@json_option
@errors_exit
def bench(
    scenarios: tuple[str, ...], quick: bool, results: Path, page: bool, as_json: bool
) -> None:
    """Measure vfsmap beside its peers; all SCENARIOS, or some.

    Each scenario leaves a JSON document; at the end all documents that are there become a page
    with plots, index.md. Needs root: for a tmpfs of its own, huge pages and loop devices. Exits
    with 1 when a promise is not kept, or a scenario failed.
    """
    if page:
        print(build(results, SCENARIOS))
        return
    if os.geteuid() != 0:
        raise Denied("benchmarks mount file systems and set huge pages aside: run them as root")
    results.mkdir(parents=True, exist_ok=True)
    found, failed = [], []
    for name in scenarios or SCENARIOS:
        try:
            with interruptible():
                result = measured(name, quick=quick)
        except Exception as exc:
            complain(f"{name}: {exc or type(exc).__name__}")
            failed.append(name)
            continue
        result.save(results)
        found.append(result)
        if not as_json:
            show(result)
    if as_json:
        print_json([_plain(result) for result in found])
    try:
        page_path = build(results, SCENARIOS)
    except Exception as exc:
        complain(str(exc))
    else:
        print(f"\nthe page: {page_path}", file=sys.stderr)
    if failed:
        complain(f"these scenarios failed: {', '.join(failed)}")
    if failed or not all(result.met for result in found):
        sys.exit(1)


def measured(name: str, *, quick: bool) -> Result:
    """Run a scenario."""
    print(f"== {name}", file=sys.stderr, flush=True)
    began = time.monotonic()
    before = round_trip()
    result: Result = importlib.import_module(f"vfsmap_tools.bench.{name}").run(quick)
    after = round_trip()
    result.quick, result.when, result.machine = quick, now(), machine()
    if before is not None and after is not None:
        result.machine["to another core and back"] = f"{before:.2f} us, at the end {after:.2f} us"
    result.seconds = round(time.monotonic() - began, 1)
    return result


def _plain(result: Result) -> dict[str, object]:
    return {
        "scenario": result.scenario,
        "met": result.met,
        "seconds": result.seconds,
        "medians": {
            each.measure: {peer: each.median(peer) for peer in each.rounds} for each in result.rates
        },
        "promises": [
            {
                "what": verdict.what,
                "measured": verdict.measured,
                "bound": verdict.bound,
                "at_most": verdict.at_most,
                "met": verdict.met,
            }
            for verdict in result.verdicts
        ],
    }


def show(result: Result) -> None:
    """Print a result for people."""
    console = Console(highlight=False)
    console.print(f"[bold]{result.title}[/] ({result.seconds:.0f} s)")
    for reason in result.left_out:
        console.print(f"  [yellow]left out:[/] {reason}")
    if result.rates:
        peers = list(dict.fromkeys(peer for each in result.rates for peer in each.rounds))
        table = Table("measure", *peers, box=None)
        for each in result.rates:
            cells = [number(each.median(p)) if p in each.rounds else "" for p in peers]
            table.add_row(f"{each.measure}, {each.unit}", *cells)
        console.print(table)
    for grid in result.grids:
        table = Table(*grid.columns, title=grid.title, title_justify="left", box=None)
        for row in grid.rows:
            table.add_row(*(v if isinstance(v, str) else number(v) for v in row))
        console.print(table)
    for verdict in result.verdicts:
        colour, word = ("green", "kept") if verdict.met else ("red", "missed")
        bound = f"{'at most' if verdict.at_most else 'at least'} {number(verdict.bound)}"
        console.print(f"  [{colour}]{word}[/] {verdict.what}: {number(verdict.measured)}, {bound}")
