"""The page of all results: ``index.md`` and its pictures, from the documents in a directory."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from vfsmap.errors import Invalid, Unsupported
from vfsmap_tools.bench.results import Grid, Rates, Result, Verdict, load


def build(directory: Path, order: Sequence[str]) -> Path:
    """Write the page of the results in a directory, and return where it is.

    Raises:
        Invalid: there are no results.
        Unsupported: the pictures can't be drawn, since matplotlib is missing.
    """
    results = found_in(directory, order)
    if not results:
        raise Invalid(f"there are no results in {directory}; measure first: vfsmap bench")
    try:
        from vfsmap_tools.bench.plots import draw
    except ImportError as exc:
        raise Unsupported(
            "the page needs matplotlib; install it: pip install vfsmap[bench]"
        ) from exc
    for result in results:
        draw(result, directory)
    page = directory / "index.md"
    page.write_text(text(results))
    return page


def found_in(directory: Path, order: Sequence[str]) -> list[Result]:
    """Return the results in a directory, in the order of scenarios."""
    results = [result for path in directory.glob("*.json") if (result := load(path))]
    return sorted(
        results,
        key=lambda r: (order.index(r.scenario) if r.scenario in order else len(order), r.scenario),
    )


def text(results: Sequence[Result]) -> str:
    """Return the page as Markdown."""
    parts = [*_head(results)]
    for result in results:
        parts += _section(result)
    return "\n".join(parts).rstrip() + "\n"


def _head(results: Sequence[Result]) -> Iterable[str]:
    verdicts = [verdict for result in results for verdict in result.verdicts]
    met = sum(verdict.met for verdict in verdicts)
    yield "# Benchmarks"
    yield ""
    yield "Made by `vfsmap bench` from the JSON documents beside it; `make bench` measures anew."
    yield "Peers take turns within each round, so that a slow minute of the machine meets all of"
    yield "them; figures are medians, and the spread is that of the quartiles."
    yield "Requests of the mount pass from one core to another and back. The last column tells how"
    yield "long that takes by itself; a virtual machine's cores may be moved apart at any time."
    yield ""
    if verdicts:
        yield f"**{met} of {len(verdicts)} promises are kept.**"
        yield ""
        yield "| scenario | promise | measured | bound | |"
        yield "|---|---|--:|--:|---|"
        for result in results:
            for verdict in result.verdicts:
                yield _verdict(result, verdict)
        yield ""
    yield "| scenario | when | how | machine |"
    yield "|---|---|---|---|"
    for result in results:
        how = f"{'quick, ' if result.quick else ''}{result.seconds:.0f} s"
        machine = ", ".join(f"{name} {value}" for name, value in result.machine.items())
        yield f"| {_link(result)} | {result.when} | {how} | {machine} |"
    yield ""


def _link(result: Result) -> str:
    anchor = "".join(c for c in result.title.lower().replace(" ", "-") if c.isalnum() or c in "-_")
    return f"[{result.scenario}](#{anchor})"


def _verdict(result: Result, verdict: Verdict) -> str:
    bound = f"{'at most' if verdict.at_most else 'at least'} {number(verdict.bound)}"
    met = "kept" if verdict.met else "**missed**"
    return f"| {_link(result)} | {verdict.what} | {number(verdict.measured)} | {bound} | {met} |"


def _section(result: Result) -> Iterable[str]:
    yield f"## {result.title}"
    yield ""
    yield result.about
    yield ""
    for reason in result.left_out:
        yield f"Left out: {reason}."
        yield ""
    if result.rates:
        yield from _rates(result.rates)
    for grid in result.grids:
        yield from _grid(grid)
    for title, name in result.pictures():
        yield f"![{title}]({name})"
        yield ""


def _rates(measures: Sequence[Rates]) -> Iterable[str]:
    peers = list(dict.fromkeys(peer for each in measures for peer in each.rounds))
    yield f"| measure | {' | '.join(peers)} |"
    yield "|---|" + "--:|" * len(peers)
    for each in measures:
        cells = [_cell(each, peer) if peer in each.rounds else "" for peer in peers]
        yield f"| {each.measure}, {each.unit} | {' | '.join(cells)} |"
    yield ""


def _cell(rates: Rates, peer: str) -> str:
    low, high = rates.spread(peer)
    return f"{number(rates.median(peer))} ({number(low)} to {number(high)})"


def _grid(grid: Grid) -> Iterable[str]:
    if grid.title:
        yield f"**{grid.title}**"
        yield ""
    yield f"| {' | '.join(grid.columns)} |"
    numeric = [
        all(not isinstance(row[at], str) for row in grid.rows) for at in range(len(grid.columns))
    ]
    yield "|" + "|".join("--:" if each else "---" for each in numeric) + "|"
    for row in grid.rows:
        yield f"| {' | '.join(v if isinstance(v, str) else number(v) for v in row)} |"
    yield ""


def number(value: float) -> str:
    """Return a figure with as many digits as are worth reading."""
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"
