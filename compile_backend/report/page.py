"""The page that `Profile.to_html` writes: one file, which needs no network.

This file computes the text, the numbers and the positions in the plots. ``page.html.jinja`` writes them as HTML and
inline SVG. ``page.css`` is the style. ``page.js`` sorts and filters the rows, and draws the large histogram of a row
that is opened.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

import jinja2
from jinja2.utils import htmlsafe_json_dumps

from fpsim.compile_backend.observe.recorder import ProductStatistics
from fpsim.compile_backend.observe.rounding_statistics import COUNTS, Histogram, severity
from fpsim.compile_backend.plan import Gap, Site
from fpsim.compile_backend.report.units import decibel, percent
from fpsim.rounding.carriers import CARRIERS

#: One site as `Profile.rows` gives it, and its ``number``.
_Row = dict[str, Any]

#: Colours of roles, from the palette of Okabe and Ito for colour-blind readers.
_COLOURS = {
    "activation": "#0072b2",
    "weight": "#009e73",
    "gradient": "#d55e00",
    "output": "#cc79a7",
    "result": "#8a6d00",
    "saved": "#56b4e9",
}

_CARRIERS = {str(dtype).removeprefix("torch."): format for dtype, format in CARRIERS.items()}


class _Column(NamedTuple):
    key: str
    heading: str
    explanation: str
    is_text: bool = False


_COLUMNS = (
    _Column("number", "#", "Position in the graph: forward, then backward."),
    _Column("path", "module", "Path of the module.", True),
    _Column("operator", "operator", "Operator of aten.", True),
    _Column(
        "kind",
        "kind",
        "fprop, dgrad (gradient of an activation), wgrad (gradient of a weight); forward, backward.",
        True,
    ),
    _Column(
        "role",
        "role",
        "Role of the value in its product; output: result of a product; result: result of another operation; saved: "
        "activation that is kept for backward.",
        True,
    ),
    _Column("shape", "shape", "Shape of the value.", True),
    _Column("cast", "cast", "Format, rounding and overflow mode; default modes are left out.", True),
    _Column(
        "exponents",
        "exponents",
        "Binary exponents of the inputs (bars) and of the results (line), all rows on one axis; shaded below the "
        "smallest normal number of the format.",
        True,
    ),
    _Column("sqnr", "SQNR dB", "10 log10 of the energy of the inputs over that of their changes. 6 dB are one bit."),
    _Column(
        "relative_error",
        "product error",
        "Frobenius norm of the product minus the float64 product of the unrounded operands, over the norm of the "
        "latter; for large products an estimate, unless exact_products is set.",
    ),
    _Column("amax", "amax", "Largest magnitude of a finite input."),
    _Column("zeros", "zero", "Share of inputs that are zero."),
    _Column("underflows", "underflow", "Share of nonzero inputs that became zero."),
    _Column("subnormals", "subnormal", "Share of results that are subnormal numbers of the format."),
    _Column("saturations", "saturated", "Share of finite inputs beyond the largest finite value that stayed finite."),
    _Column("overflows", "overflow", "Share of finite inputs that became an infinity or NaN."),
    _Column("infinities", "inf in", "Share of inputs that are infinite."),
    _Column("nans", "NaN in", "Share of inputs that are NaN."),
)


def page(
    rows: Sequence[dict[str, Any]],
    sites: Sequence[Site],
    products: Sequence[ProductStatistics],
    gaps: Sequence[Gap],
    title: str,
) -> str:
    """The page of a profile, as HTML.

    Args:
        rows: the result of `Profile.rows`.
        sites, products, gaps: the fields of the profile.
        title: the heading of the page.
    """
    rows = [
        row | {"number": number, "kind": site.step, "format": site.cast.format if site.cast else _CARRIERS[site.dtype]}
        for number, (row, site) in enumerate(zip(rows, sites, strict=True))
    ]
    low, high = _axis([row["exponents"] for row in rows])
    return _template().render(
        title=title,
        style=_file("page.css"),
        script=_file("page.js"),
        colours=_COLOURS,
        columns=_COLUMNS,
        decibel=decibel,
        tiles=list(_tiles(rows, products, gaps)),
        overview=_overview(rows),
        rows=rows,
        table=[(row, [_cell(column.key, row, low, high) for column in _COLUMNS]) for row in rows],
        gaps=gaps,
        facts=htmlsafe_json_dumps([_facts(row, products) for row in rows], allow_nan=False),
    )


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(_file("page.html.jinja"))


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text("utf-8")


# -- tiles and overview ------------------------------------------------------------------------------------------------


class _Tile(NamedTuple):
    """A number above the table, with a note or a link to ``row``."""

    heading: str
    value: str
    note: str = ""
    row: _Row | None = None
    severity: int = 0


def _tiles(rows: Sequence[_Row], products: Sequence[ProductStatistics], gaps: Sequence[Gap]) -> Iterable[_Tile]:
    rounded = [row for row in rows if row["cast"]]
    yield _Tile("sites", str(len(rows)), f"{len(rounded)} of them rounded")
    yield _Tile("matrix products", str(len(products)), f"{len(gaps)} gaps")
    if rounded:
        worst = min(rounded, key=lambda row: row["sqnr"])
        level = severity("sqnr", worst["sqnr"])
        yield _Tile("worst SQNR", f"{decibel(worst['sqnr'])} dB", row=worst, severity=level)
    for key, heading in (("underflows", "most underflow"), ("saturations", "most saturated")):
        if rows and (share := max(row[f"{key}_share"] for row in rows)):
            yield _Tile(heading, percent(share), row=_worst(rows, key), severity=severity(key, share))
    for key, heading in (("overflows", "overflowed"), ("infinities", "infinite inputs"), ("nans", "NaN inputs")):
        if total := sum(row[key] for row in rows):
            yield _Tile(heading, str(total), row=_worst(rows, key), severity=2)
    if products:
        error = max(product.relative_error for product in products)
        number = next(i for i, product in enumerate(products) if product.relative_error == error or error != error)
        site = next(row for row in rows if row["product"] == number)
        level = severity("relative_error", error)
        yield _Tile("worst product error", f"{error:.3g}", row=site, severity=level)


def _worst(rows: Sequence[_Row], count: str) -> _Row:
    return max(rows, key=lambda row: row[f"{count}_share"])


def _overview(rows: Sequence[_Row]) -> dict[str, Any]:
    """The plot of the signal-to-noise ratios of all rounded sites, in the order of the graph."""
    width, height, left, top, bottom = 1160, 230, 46, 26, 24
    finite = [row["sqnr"] for row in rows if math.isfinite(row["sqnr"])]
    low = 10 * math.floor(min([0, *finite]) / 10)
    high = 10 * math.ceil(max([40, *finite]) / 10)

    def x(number: int) -> float:
        return left + (width - left - 12) * (number + 0.5) / max(len(rows), 1)

    def y(value: float) -> float:
        return (
            top - 14 if value == math.inf else top + (height - top - bottom) * (high - max(value, low)) / (high - low)
        )

    rounded = [row for row in rows if row["cast"]]
    return {
        "width": width,
        "height": height,
        "left": left,
        "top": top,
        "grid": [(value, y(value)) for value in range(low, high + 1, 10)],
        "points": [(row, x(row["number"]), y(row["sqnr"])) for row in rounded],
        "roles": list(dict.fromkeys(row["role"] for row in rounded)),
    }


# -- the table ---------------------------------------------------------------------------------------------------------


class _Sparkline(NamedTuple):
    """A small plot of exponents: positions and sizes in pixels."""

    width: int
    height: int
    colour: str
    bars: list[tuple[float, float, float]]  # x, y and height of each
    bar_width: float
    line: str
    subnormal: float  # the width of the shade


class _Cell(NamedTuple):
    """A cell of the table, with its CSS classes and its sort key. If ``sort`` is None, the text is the sort key."""

    text: str = ""
    style: str = ""
    sort: str | float | None = None
    plot: _Sparkline | None = None


def _cell(key: str, row: _Row, low: int, high: int) -> _Cell:
    value = row[key]
    if key in COUNTS:
        share = row[f"{key}_share"]
        return _number(key, share, percent(share))
    if key == "exponents":
        return _Cell(style="plot", sort=_mean_exponent(value), plot=_sparkline(row, low, high))
    if key == "shape":
        return _Cell(" × ".join(map(str, value)) or "scalar", "text", row["elements"])
    if key == "cast":
        return _Cell(row["label"], "text" if value else "text s1")
    if key == "sqnr":
        return _number(key, value, decibel(value))
    if key in ("amax", "number", "relative_error"):
        return _Cell(sort=-1) if value is None else _number(key, value, f"{value:.3g}")
    return _Cell(str(value) or "(root)", "text")


def _number(key: str, value: float, text: str) -> _Cell:
    style = ("none" if text == "0" else "", "s1", "s2")[severity(key, value)]
    return _Cell(text, style, repr(value).replace("inf", "Infinity").replace("nan", "NaN"))  # as JavaScript reads it


def _axis(histograms: Sequence[Histogram]) -> tuple[int, int]:
    """The least and the greatest exponent of the small plots, without the outermost thousandths of each histogram."""
    lows, highs = [0], [0]
    for histogram in histograms:
        total, seen = sum(count for _, count in histogram), 0
        inner = []
        for exponent, count in histogram:
            if seen + count > total / 1000 and seen < total * 0.999:
                inner.append(exponent)
            seen += count
        lows, highs = lows + inner[:1], highs + inner[-1:]
    return min(lows), max(highs)


def _mean_exponent(histogram: Histogram) -> float:
    total = sum(count for _, count in histogram)
    return sum(exponent * count for exponent, count in histogram) / total if total else -1e9


def _sparkline(row: _Row, low: int, high: int) -> _Sparkline:
    """Bars for the inputs and a line for the results. Exponents beyond the axis are counted at its ends."""
    width, height = 168, 30
    step = width / (high - low + 1)
    before, after = (_binned(row[name], low, high) for name in ("exponents", "rounded_exponents"))
    scale = (height - 2) / (max(before + after) or 1)
    levels = [round(height - count * scale, 1) for count in after]
    return _Sparkline(
        width,
        height,
        _COLOURS[row["role"]],
        [(round(i * step, 1), round(height - n * scale, 1), round(n * scale, 1)) for i, n in enumerate(before) if n],
        round(max(step - 0.6, 0.4), 1),
        " ".join(f"{i * step:.1f},{y} {(i + 1) * step:.1f},{y}" for i, y in enumerate(levels)),
        round(min((row["format"].emin - low) * step, width), 1),
    )


def _binned(histogram: Histogram, low: int, high: int) -> list[int]:
    bins = [0] * (high - low + 1)
    for exponent, count in histogram:
        bins[min(max(exponent, low), high) - low] += count
    return bins


# -- the histogram of a row that is opened -----------------------------------------------------------------------------


def _facts(row: _Row, products: Sequence[ProductStatistics]) -> dict[str, Any]:
    """The text and numbers from which the script draws the histogram of ``row``."""
    format, product = row["format"], row["product"]
    facts = {
        "name": f"{row['path'] or '(root)'}: {row['role']} of {row['kind']} {row['operator']}",
        "cast": row["cast"] or f"unrounded {row['dtype']}",
        "colour": _COLOURS[row["role"]],
        "elements": row["elements"],
        "counts": {name: row[name] for name in COUNTS},
        "before": row["exponents"],
        "after": row["rounded_exponents"],
        "least": math.frexp(format.smallest_subnormal)[1] - 1,
        "emin": format.emin,
        "emax": format.max_exponent,
    }
    if product is not None:
        statistics = products[product]
        shapes = " by ".join(" × ".join(map(str, shape)) for shape in statistics.shapes)
        facts["product"] = f"{shapes}; runs: {statistics.runs}; relative error {statistics.relative_error:.4g}"
        if statistics.sum is not None:
            lost, share = statistics.sum, statistics.sum.stagnated_share
            facts["product"] += f"; of the sums in {lost.accumulator} {lost.relative_error:.4g}"
            facts["product"] += "" if share is None else f", {percent(share)} of them stagnated"
    return facts
