"""The page that `Profile.to_html` writes: one file, no network, readable without scripts.

Python writes the table, its small histograms and the overview as HTML and inline SVG; the script sorts and filters
rows, and draws the large histogram of a row that is opened. All colours stand on white with dark text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from html import escape
from string import Template
from typing import TYPE_CHECKING, Any

from fpsim.casts import parse_cast
from fpsim.compile_backend.observe.statistics import COUNTS, severity
from fpsim.rounding.carriers import CARRIERS

if TYPE_CHECKING:
    from fpsim.compile_backend.report.profile import Profile

#: Colours of roles, of Okabe and Ito's palette for the colour-blind.
_COLOURS = {
    "activation": "#0072b2",
    "weight": "#009e73",
    "gradient": "#d55e00",
    "output": "#cc79a7",
    "result": "#8a6d00",
}

_CARRIERS = {str(dtype).removeprefix("torch."): format for dtype, format in CARRIERS.items()}

#: The columns: key, heading, explanation.
_COLUMNS = (
    ("number", "#", "Place in the order of the graph: forward, then backward."),
    ("path", "module", "Path of the module."),
    ("operator", "operator", "Operator of aten."),
    ("kind", "kind", "fprop, dgrad (gradient of an activation), wgrad (gradient of a weight); forward, backward."),
    ("role", "role", "What the value is in its product; output: of a product; result: of another operation."),
    ("shape", "shape", "Of the value."),
    ("cast", "cast", "Format, rounding and overflow mode; those that are usual are left out."),
    (
        "exponents",
        "exponents",
        "Binary exponents of the inputs (bars) and of the results (line), all rows on one axis; shaded below the "
        "smallest normal number of the format.",
    ),
    ("sqnr", "SQNR dB", "10 log10 of the energy of the inputs over that of their changes. 6 dB are one bit."),
    (
        "relative_error",
        "product error",
        "Frobenius norm of the product less that of the unrounded operands in float64, over the norm of the latter; "
        "of large products an estimate, unless exact products were asked for.",
    ),
    ("amax", "amax", "Largest magnitude of a finite input."),
    ("zeros", "zero", "Share of inputs that are zero."),
    ("underflows", "underflow", "Share of inputs other than zero that became zero."),
    ("subnormals", "subnormal", "Share of results that are subnormal numbers of the format."),
    ("saturations", "saturated", "Share of finite inputs beyond the largest finite value that stayed finite."),
    ("overflows", "overflow", "Share of finite inputs that became an infinity or NaN."),
    ("infinities", "inf in", "Share of inputs that are infinite."),
    ("nans", "NaN in", "Share of inputs that are NaN."),
)
#: Those of words, and the plot.
_TEXTS = ("path", "operator", "kind", "role", "shape", "cast", "exponents")


def page(profile: Profile, title: str) -> str:
    """The page for ``profile``, as HTML."""
    rows = [row | {"number": number} for number, row in enumerate(profile.rows())]
    low, high = _axis([row["exponents"] for row in rows])
    body = "\n".join(_table_row(row, low, high) for row in rows)
    return _PAGE.substitute(
        title=escape(title),
        style=_STYLE,
        script=_SCRIPT,
        tiles="".join(_tiles(rows, profile)),
        overview=_overview(rows),
        heads="".join(_head(*column) for column in _COLUMNS),
        kinds=_options(row["kind"] for row in rows),
        roles=_options(row["role"] for row in rows),
        rows=body,
        gaps=_gaps(profile),
        glossary="".join(f"<dt>{escape(head)}</dt><dd>{escape(text)}</dd>" for _, head, text in _COLUMNS),
        data=json.dumps([_facts(row, profile) for row in rows], allow_nan=False).replace("<", "\\u003c"),
    )


# -- the table ---------------------------------------------------------------------------------------------------------


def _head(key: str, head: str, text: str) -> str:
    label = ' class="text"' if key in _TEXTS else ""
    return (
        f'<th scope="col"{label} data-key="{key}" title="{escape(text, quote=True)}" aria-sort="none">'
        f'<button type="button">{escape(head)}</button></th>'
    )


def _table_row(row: dict[str, Any], low: int, high: int) -> str:
    cells = "".join(_cell(key, row, low, high) for key, _, _ in _COLUMNS)
    return f'<tr id="site-{row["number"]}" data-kind="{row["kind"]}" data-role="{row["role"]}">{cells}</tr>'


def _cell(key: str, row: dict[str, Any], low: int, high: int) -> str:
    value = row[key]
    if key in COUNTS:
        share = row[f"{key}_share"]
        return _number(key, share, percent(share))
    if key == "exponents":
        return f'<td class="plot" data-value="{_center(value)}">{_sparkline(row, low, high)}</td>'
    if key == "shape":
        return f'<td class="text" data-value="{row["elements"]}">{escape(" × ".join(map(str, value)) or "scalar")}</td>'
    if key == "cast":
        label = parse_cast(value).label if value else "unrounded"  # type: ignore[union-attr]
        return f'<td class="text{"" if value else " s1"}">{escape(label)}</td>'
    if key == "sqnr":
        return _number(key, value, decibel(value))
    if key in ("amax", "number", "relative_error"):
        return '<td data-value="-1"></td>' if value is None else _number(key, value, f"{value:.3g}")
    return f'<td class="text">{escape(str(value) or "(root)")}</td>'


def _number(key: str, value: float, text: str) -> str:
    level = severity(key, value)
    label = (' class="none"' if text == "0" else "", ' class="s1"', ' class="s2"')[level]
    return f'<td{label} data-value="{_script_number(value)}">{escape(text)}</td>'


def _script_number(value: float) -> str:
    """A number as JavaScript's Number() reads it."""
    return repr(value).replace("inf", "Infinity").replace("nan", "NaN")


def percent(share: float) -> str:
    """A share for people: ``0``, ``<0.01 %``, ``12.3 %``."""
    if share == 0:
        return "0"
    return "<0.01 %" if share < 1e-4 else f"{100 * share:.3g} %"


def decibel(value: float) -> str:
    """A ratio in dB for people; ``exact`` where there is no noise."""
    return "exact" if value == math.inf else "-inf" if value == -math.inf else f"{value:.1f}"


def _options(values: Iterable[str]) -> str:
    return "".join(f"<option>{escape(value)}</option>" for value in dict.fromkeys(values))


def _gaps(profile: Profile) -> str:
    if not profile.gaps:
        return "<p>None: every matrix product of the model is in the table.</p>"
    rows = "".join(
        f"<tr><td>{escape(gap.path or '(root)')}</td><td>{escape(gap.operator)}</td><td>{escape(gap.reason)}</td></tr>"
        for gap in profile.gaps
    )
    heads = "".join(f"<th>{head}</th>" for head in ("module", "operator", "reason"))
    return f'<table class="gaps"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>'


# -- what stands above the table ---------------------------------------------------------------------------------------


def _tiles(rows: Sequence[dict[str, Any]], profile: Profile) -> Iterable[str]:
    rounded = [row for row in rows if row["cast"]]
    yield _tile("sites", str(len(rows)), f"{len(rounded)} of them rounded")
    yield _tile("matrix products", str(len(profile.products)), f"{len(profile.gaps)} gaps")
    if rounded:
        worst = min(rounded, key=lambda row: row["sqnr"])
        yield _tile("worst SQNR", f"{decibel(worst['sqnr'])} dB", _link(worst), severity("sqnr", worst["sqnr"]))
    for key, head in (("underflows", "most underflow"), ("saturations", "most saturated")):
        if rows and (share := max(row[f"{key}_share"] for row in rows)):
            worst = max(rows, key=lambda row: row[f"{key}_share"])
            yield _tile(head, percent(share), _link(worst), severity(key, share))
    for key, head in (("overflows", "overflowed"), ("infinities", "infinite inputs"), ("nans", "NaN inputs")):
        if total := sum(row[key] for row in rows):
            worst = max(rows, key=lambda row: row[f"{key}_share"])
            yield _tile(head, str(total), _link(worst), 2)
    if profile.products:
        error = max(product.relative_error for product in profile.products)
        number = next(
            i for i, product in enumerate(profile.products) if product.relative_error == error or error != error
        )
        site = next(row for row in rows if row["product"] == number)
        yield _tile("worst product error", f"{error:.3g}", _link(site), severity("relative_error", error))


def _tile(head: str, value: str, text: str, level: int = 0) -> str:
    return f'<div class="tile l{level}"><b>{escape(value)}</b><span>{escape(head)}</span><small>{text}</small></div>'


def _link(row: dict[str, Any]) -> str:
    name = f"{row['path'] or '(root)'}, {row['kind']} {row['role']}"
    return f'<a href="#site-{row["number"]}">{escape(name)}</a>'


def _overview(rows: Sequence[dict[str, Any]]) -> str:
    """The signal-to-noise ratio of every rounded site, in the order of the graph."""
    width, height, left, top, bottom = 1160, 230, 46, 26, 24
    finite = [row["sqnr"] for row in rows if math.isfinite(row["sqnr"])]
    low = 10 * math.floor(min([0, *finite]) / 10)
    high = 10 * math.ceil(max([40, *finite]) / 10)

    def x(number: int) -> float:
        return left + (width - left - 12) * (number + 0.5) / max(len(rows), 1)

    def y(value: float) -> float:
        return top + (height - top - bottom) * (high - value) / (high - low)

    marks = []
    for value in range(low, high + 1, 10):
        marks.append(f'<line x1="{left}" x2="{width}" y1="{y(value):.1f}" y2="{y(value):.1f}" class="grid"/>')
        marks.append(f'<text x="{left - 6}" y="{y(value) + 4:.1f}" class="left">{value}</text>')
    marks.append(f'<text x="{left - 6}" y="{top - 10}" class="left">exact</text>')
    marks.append(f'<text x="{left}" y="{height - 6}">sites, in the order of the graph: forward, then backward</text>')
    for row in rows:
        if row["cast"] is None:
            continue
        level = top - 14 if row["sqnr"] == math.inf else y(max(row["sqnr"], low))
        text = f"{row['path'] or '(root)'}: {row['kind']} {row['role']}, {decibel(row['sqnr'])} dB"
        marks.append(
            f'<a href="#site-{row["number"]}"><circle cx="{x(row["number"]):.1f}" cy="{level:.1f}" r="3.5" '
            f'fill="{_COLOURS[row["role"]]}"><title>{escape(text)}</title></circle></a>'
        )
    present = dict.fromkeys(row["role"] for row in rows if row["cast"])
    keys = "".join(f'<span><i style="background:{_COLOURS[role]}"></i>{role}</span>' for role in present)
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="signal-to-noise ratio of every site">'
        f'{"".join(marks)}</svg><p class="keys">{keys}</p>'
    )


# -- histograms --------------------------------------------------------------------------------------------------------


def _axis(histograms: Sequence[Sequence[tuple[int, int]]]) -> tuple[int, int]:
    """From which exponent to which the small histograms go: all but the outermost thousandths of their elements."""
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


def _center(histogram: Sequence[tuple[int, int]]) -> float:
    """The mean exponent, by which the column is sorted."""
    total = sum(count for _, count in histogram)
    return sum(exponent * count for exponent, count in histogram) / total if total else -1e9


def _sparkline(row: dict[str, Any], low: int, high: int) -> str:
    """Bars for the inputs and a line for the results; what is beyond the axis stands at its ends."""
    width, height = 168, 30
    step = width / (high - low + 1)
    before, after = (_binned(row[name], low, high) for name in ("exponents", "rounded_exponents"))
    top = max(before + after) or 1
    bars = "".join(
        f'<rect x="{i * step:.1f}" y="{height - h * (height - 2) / top:.1f}" width="{max(step - 0.6, 0.4):.1f}" '
        f'height="{h * (height - 2) / top:.1f}"/>'
        for i, h in enumerate(before)
        if h
    )
    levels = [f"{height - h * (height - 2) / top:.1f}" for h in after]
    line = " ".join(f"{i * step:.1f},{y} {(i + 1) * step:.1f},{y}" for i, y in enumerate(levels))
    subnormal = (_format_of(row).emin - low) * step
    shade = (
        f'<rect class="sub" x="0" y="0" width="{min(subnormal, width):.1f}" height="{height}"/>'
        if subnormal > 0
        else ""
    )
    return (
        f'<svg class="spark" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'fill="{_COLOURS[row["role"]]}" aria-hidden="true">{shade}{bars}<polyline points="{line}"/></svg>'
    )


def _binned(histogram: Sequence[tuple[int, int]], low: int, high: int) -> list[int]:
    bins = [0] * (high - low + 1)
    for exponent, count in histogram:
        bins[min(max(exponent, low), high) - low] += count
    return bins


def _format_of(row: dict[str, Any]) -> Any:
    by = parse_cast(row["cast"]) if row["cast"] else None
    return by.format if by else _CARRIERS[row["dtype"]]


def _facts(row: dict[str, Any], profile: Profile) -> dict[str, Any]:
    """What the script needs to draw a row that is opened."""
    format, product = _format_of(row), row["product"]
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
        of = profile.products[product]
        shapes = " by ".join(" × ".join(map(str, shape)) for shape in of.shapes)
        facts["product"] = f"{shapes}; runs: {of.runs}; relative error {of.relative_error:.4g}"
    return facts


# -- the text of the page ----------------------------------------------------------------------------------------------

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$style</style>
</head>
<body>
<h1>$title</h1>
<section class="tiles">$tiles</section>
<h2>Signal-to-quantization-noise ratio in dB</h2>
<section class="overview">$overview</section>
<h2>Sites</h2>
<form id="filter" onsubmit="return false">
<label>module or operator <input id="words" type="search" placeholder="such as attn or aten.mm"></label>
<label>kind <select id="kind"><option value="">all</option>$kinds</select></label>
<label>role <select id="role"><option value="">all</option>$roles</select></label>
<label><input id="marked" type="checkbox"> doubtful or bad only</label>
<output id="shown"></output>
</form>
<p class="hint">Click a heading to sort, a row to see its histogram.
<span class="s1">doubtful</span> <span class="s2">bad</span></p>
<div class="scroll"><table id="sites"><thead><tr>$heads</tr></thead>
<tbody>
$rows
</tbody></table></div>
<h2>Gaps</h2>
$gaps
<h2>Words</h2>
<dl>$glossary</dl>
<script type="application/json" id="facts">$data</script>
<script>$script</script>
</body>
</html>
""")

_STYLE = """
:root { color-scheme: light; }
body { font: 13px/1.45 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; color: #1a1a1a; background: #fff;
  margin: 1.5rem auto; max-width: 1720px; padding: 0 1.2rem; }
h1 { font-size: 1.5rem; margin: 0 0 .8rem; } h2 { font-size: 1.1rem; margin: 1.6rem 0 .5rem; }
.tiles { display: flex; flex-wrap: wrap; gap: .7rem; }
.tile { border: 1px solid #cfd4da; border-left: 5px solid #6b7785; border-radius: 6px; padding: .45rem .8rem;
  min-width: 9rem; }
.tile b { display: block; font-size: 1.25rem; } .tile span { display: block; } .tile small { color: #444; }
.l1 { border-left-color: #e0a800; background: #fffaf0; } .l2 { border-left-color: #b3261e; background: #fff5f4; }
a { color: #0b5394; }
.overview svg { width: 100%; max-width: 1400px; height: auto; font-size: 11px; } .grid { stroke: #e3e6ea; }
svg text { fill: #333; } svg text.left { text-anchor: end; } svg text.mid { text-anchor: middle; }
.keys { margin: 0; } .keys span { margin-right: 1.1rem; }
.keys i { display: inline-block; width: .7rem; height: .7rem; border-radius: 50%; margin-right: .35rem; }
form { display: flex; flex-wrap: wrap; gap: 1.1rem; align-items: center; }
input, select { font: inherit; color: inherit; } #words { width: 15rem; }
.hint { margin: .4rem 0; color: #444; } .hint span { padding: 0 .4rem; border-radius: 3px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .4rem; border-bottom: 1px solid #e3e6ea; text-align: right; white-space: nowrap; }
th { position: sticky; top: 0; background: #f3f5f7; border-bottom: 2px solid #b8c0c8; }
th button { font: inherit; font-weight: 600; color: inherit; background: none; border: 0; padding: 0; cursor: pointer; }
th[aria-sort="ascending"] button::after { content: " \\25B2"; }
th[aria-sort="descending"] button::after { content: " \\25BC"; }
th.text, td.text, .gaps td, .gaps th { text-align: left; } .gaps td { white-space: normal; }
.s1 { background: #fff0c2; } .s2 { background: #f9d2cf; color: #7a0c06; font-weight: 600; }
#sites tbody tr { cursor: pointer; } #sites tbody tr:hover { background: #f6f9fc; }
tr:target td { background: #e5f0fb; } td.none { color: #767676; } tr { scroll-margin-top: 4rem; }
.plot { padding: .1rem .5rem; } .spark { display: block; background: #fafbfc; }
.spark polyline { fill: none; stroke: #1a1a1a; stroke-width: .9; } .sub { fill: #ece6f5; }
tr.detail, tr.detail:hover { background: #fbfcfd; cursor: auto; }
tr.detail td { text-align: left; white-space: normal; padding: .6rem 1.2rem; }
tr.detail div:first-child { font-weight: 600; } tr.detail svg { margin-top: .5rem; max-width: 100%; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; }
dt { font-weight: 600; } dd { margin: 0; }
"""

_SCRIPT = """
'use strict';
const facts = JSON.parse(document.getElementById('facts').textContent);
const table = document.getElementById('sites'), body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
const rows = [...body.rows];
const svgNames = 'http://www.w3.org/2000/svg';

function valueOf(row, column) {
  const cell = row.cells[column];
  return cell.dataset.value === undefined ? cell.textContent : Number(cell.dataset.value);
}
function compare(a, b) {
  if (typeof a === 'string') return a.localeCompare(b, undefined, {numeric: true});
  if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b);
  return a < b ? -1 : a > b ? 1 : 0;
}
// The worst first at the first click: text, the number and the ratio ascending, all else descending.
function sortBy(column, descending) {
  closeAll();
  const order = descending ? 'descending' : 'ascending';
  heads.forEach((head, i) => head.setAttribute('aria-sort', i === column ? order : 'none'));
  const sign = descending ? -1 : 1;
  rows.sort((a, b) => sign * compare(valueOf(a, column), valueOf(b, column)));
  body.append(...rows);
}
heads.forEach((head, column) => head.firstElementChild.addEventListener('click', () => {
  const state = head.getAttribute('aria-sort');
  const isText = rows.length && typeof valueOf(rows[0], column) === 'string';
  const upwards = isText || head.dataset.key === 'sqnr' || head.dataset.key === 'number';
  sortBy(column, state === 'none' ? !upwards : state === 'ascending');
}));

const words = document.getElementById('words'), marked = document.getElementById('marked');
const kind = document.getElementById('kind'), role = document.getElementById('role');
function filter() {
  closeAll();
  const wanted = words.value.toLowerCase().split(' ').filter(Boolean);
  let shown = 0;
  for (const row of rows) {
    const text = row.textContent.toLowerCase();
    row.hidden = !((!kind.value || row.dataset.kind === kind.value) && (!role.value || row.dataset.role === role.value)
      && (!marked.checked || row.querySelector('.s1, .s2')) && wanted.every(word => text.includes(word)));
    shown += !row.hidden;
  }
  document.getElementById('shown').textContent = shown + ' of ' + rows.length + ' sites';
}
for (const control of [words, marked, kind, role]) control.addEventListener('input', filter);

function element(parent, name, attributes, text) {
  const made = document.createElementNS(svgNames, name);
  for (const key in attributes) made.setAttribute(key, attributes[key]);
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
}
// Shares by exponent, on a logarithmic scale, with what the format can hold.
function draw(site) {
  const all = site.before.concat(site.after), width = 900, height = 220, left = 60, bottom = 34, top = 16;
  const exponents = all.map(pair => pair[0]).concat([site.emax]);
  const low = Math.min(...exponents, site.before.length ? site.least : site.emin) - 1;
  const high = Math.max(...exponents) + 2;
  const step = (width - left) / (high - low), x = e => left + (e - low) * step;
  const least = Math.log10(1 / Math.max(site.elements, 10)), span = height - top - bottom;
  const y = count => top + span * (Math.log10(count / site.elements) / (1.15 * least));
  const svg = document.createElementNS(svgNames, 'svg');
  svg.setAttribute('viewBox', [0, 0, width, height].join(' '));
  svg.setAttribute('width', width);
  svg.style.fontSize = '11px';
  const zone = (from, to, colour) => { if (to > from) element(svg, 'rect',
    {x: x(from), width: (to - from) * step, y: top, height: span, fill: colour}); };
  zone(low, Math.max(site.least, low), '#fbe3e1');
  zone(Math.max(site.least, low), Math.max(site.emin, low), '#ece6f5');
  zone(site.emax + 1, high, '#fbe3e1');
  for (let tenth = 0; tenth >= least * 1.15; tenth--) {
    const at = top + span * tenth / (1.15 * least);
    element(svg, 'line', {x1: left, x2: width, y1: at, y2: at, class: 'grid'});
    element(svg, 'text', {x: left - 6, y: at + 4, class: 'left'}, tenth === 0 ? '100 %' : '1e' + tenth);
  }
  for (const [e, count] of site.before) {
    const bar = {x: x(e) + .5, width: Math.max(step - 1, .5), y: y(count), height: top + span - y(count)};
    const made = element(svg, 'rect', {...bar, fill: site.colour, 'fill-opacity': .55});
    element(made, 'title', {}, '2^' + e + ': ' + count + ' inputs');
  }
  for (const [e, count] of site.after) element(svg, 'path', {d: 'M' + x(e) + ' ' + y(count) + 'h' + step,
    stroke: '#1a1a1a', 'stroke-width': 2});
  const every = Math.ceil((high - low) / 22);
  for (let e = low; e <= high; e++) if (e % every === 0)
    element(svg, 'text', {x: x(e) + step / 2, y: height - bottom + 15, class: 'mid'}, e);
  element(svg, 'text', {x: left, y: height - 4},
    'binary exponent; bars: inputs, black: results; violet: subnormal numbers, red: below and beyond the format');
  return svg;
}
function closeAll() { for (const open of body.querySelectorAll('tr.detail')) open.remove(); }
body.addEventListener('click', event => {
  const row = event.target.closest('tr');
  if (!row || row.classList.contains('detail')) return;
  const next = row.nextElementSibling;
  if (next && next.classList.contains('detail')) { next.remove(); return; }
  const site = facts[Number(row.id.slice(5))];
  const detail = document.createElement('tr'), cell = document.createElement('td');
  detail.className = 'detail';
  cell.colSpan = heads.length;
  const counts = Object.entries(site.counts).map(pair => pair.join(': ')).join(', ');
  const lines = [site.name, site.cast, 'elements: ' + site.elements + ', ' + counts, site.product];
  for (const line of lines.filter(Boolean)) {
    const text = document.createElement('div');
    text.textContent = line;
    cell.append(text);
  }
  cell.append(draw(site));
  detail.append(cell);
  row.after(detail);
});
filter();
"""
