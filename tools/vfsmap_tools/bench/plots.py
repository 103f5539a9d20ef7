"""Results as pictures: SVG, the same for the same figures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vfsmap.units import format_size
from vfsmap_tools.bench.results import Curve, Plot, Rates, Result

_FIRST: Final = "#1f6feb"
_OTHERS: Final = ("#8b949e", "#d29922", "#2da44e", "#a371f7", "#e5534b", "#57606a", "#b08800")
_SETTINGS: Final[Any] = {
    "svg.hashsalt": "vfsmap",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def draw(result: Result, directory: Path) -> None:
    """Draw all pictures of a result."""
    with matplotlib.rc_context(_SETTINGS):
        figures = [_bars(result.rates)] if result.rates else []
        figures += [_curves(plot) for plot in result.plots]
        for figure, (_, name) in zip(figures, result.pictures(), strict=True):
            _save(figure, directory / name)


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def _colours(names: Sequence[str]) -> dict[str, str]:
    colours = {name: _OTHERS[at % len(_OTHERS)] for at, name in enumerate(names[1:])}
    return {names[0]: _FIRST, **colours} if names else {}


def _bars(measures: list[Rates]) -> Figure:
    columns = min(len(measures), 2)
    rows = -(-len(measures) // columns)
    peers = max(len(each.rounds) for each in measures)
    size = (4.6 * columns, (0.7 + 0.24 * peers) * rows)
    figure = Figure(figsize=size, layout="constrained")
    for at, rates in enumerate(measures):
        _bar(figure.add_subplot(rows, columns, at + 1), rates)
    return figure


def _bar(axes: Axes, rates: Rates) -> None:
    names = list(rates.rounds)
    medians = [rates.median(name) for name in names]
    spreads = [rates.spread(name) for name in names]
    below = [median - low for median, (low, _) in zip(medians, spreads, strict=True)]
    above = [high - median for median, (_, high) in zip(medians, spreads, strict=True)]
    colours = _colours(names)
    axes.barh(names, medians, xerr=(below, above), color=[colours[name] for name in names])
    axes.invert_yaxis()
    axes.set_title(f"{rates.measure}, {rates.unit}", loc="left", fontsize=9)
    axes.margins(x=0.15)


def _curves(plot: Plot) -> Figure:
    figure = Figure(figsize=(7.2, 3.8), layout="constrained")
    axes = figure.add_subplot()
    colours = _colours([curve.label for curve in plot.curves])
    for curve in plot.curves:
        _curve(axes, curve, colours[curve.label])
    if plot.log_x:
        axes.set_xscale("log", base=2 if plot.bytes_x else 10)
    if plot.log_y:
        axes.set_yscale("log")
    if plot.bytes_x:
        axes.xaxis.set_major_formatter(lambda value, _: format_size(round(value)))
    axes.set_xlabel(plot.x)
    axes.set_ylabel(plot.y)
    axes.grid(visible=True, alpha=0.3)
    if plot.curves:
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _curve(axes: Axes, curve: Curve, colour: str) -> None:
    style: dict[str, Any] = {"marker": "o", "markersize": 3} if len(curve.x) < 30 else {}
    axes.plot(curve.x, curve.y, label=curve.label, color=colour, **style)
