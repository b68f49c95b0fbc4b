"""Profiles as values: the statistics of every site of a model, to add up, to show, and to hand on."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from fpsim.casts import parse_cast
from fpsim.compile_backend.observe.lost_sums import SumStatistics, merge_sums
from fpsim.compile_backend.observe.recorder import ProductStatistics, ReductionStatistics, SiteStatistics
from fpsim.compile_backend.observe.rounding_statistics import (
    COUNTS,
    GROUP_COUNTS,
    Histogram,
    Statistics,
    merge,
    severity,
)
from fpsim.compile_backend.plan import Gap, Site
from fpsim.compile_backend.report.page import page
from fpsim.compile_backend.report.units import decibel, percent
from fpsim.json_text import parse_json
from fpsim.policy.policy import KINDS
from fpsim.showing import Shown, render
from fpsim.suggestions import did_you_mean
from fpsim.transforms.names import parse_transform

if TYPE_CHECKING:
    import pandas

#: Version of the JSON form.
JSON_VERSION = 2


@dataclass(frozen=True)
class Profile(Shown):
    """Statistics of rounding at every site of a model, in one step or several.

    ``str(profile)`` and ``rich.print(profile)`` show a table with the worst sites first. `to_pandas`, `to_dict`,
    `to_json` and `to_html` export it. Profiles of the same model under the same policy add up: ``sum(profiles)``.

    Attributes:
        sites: every operand of every matrix product that ran, rounded or not, and every other value that was rounded.
        products: every matrix product that ran.
        gaps: the operators that multiply matrices and are not rounded, as `fpsim.explain` lists them.
        reductions: every other sum that has an accumulator (`fpsim.Policy.reductions`).
    """

    sites: tuple[SiteStatistics, ...]
    products: tuple[ProductStatistics, ...]
    gaps: tuple[Gap, ...] = ()
    reductions: tuple[ReductionStatistics, ...] = ()

    def relative_error(self, site: SiteStatistics) -> float | None:
        """The relative error of the product with the operand ``site``; None if ``site`` is no operand."""
        return None if site.product is None else self.products[site.product].relative_error

    # -- several steps -----------------------------------------------------------------------------------------------

    def __add__(self, other: Profile) -> Profile:
        if not isinstance(other, Profile):
            return NotImplemented
        return Profile.merge([self, other])

    def __radd__(self, other: object) -> Profile:
        return self if other == 0 else NotImplemented  # sum() begins with 0

    @classmethod
    def merge(cls, profiles: Iterable[Profile]) -> Profile:
        """The profile of all steps of ``profiles`` together.

        Sizes that differ between steps (a smaller last batch) are ``"*"`` in the shapes.

        Raises:
            ValueError: no profiles, or profiles with different sites.
        """
        profiles = list(profiles)
        if not profiles:
            raise ValueError("there are no profiles to merge")
        first = profiles[0]
        for other in profiles[1:]:
            _check_same_sites(first, other)
        sites = tuple(_merged_sites(same) for same in zip(*(profile.sites for profile in profiles), strict=True))
        products = tuple(
            _merged_products(same) for same in zip(*(profile.products for profile in profiles), strict=True)
        )
        gaps = tuple(dict.fromkeys(gap for profile in profiles for gap in profile.gaps))
        reductions = tuple(map(_merged_reductions, zip(*(profile.reductions for profile in profiles), strict=True)))
        return cls(sites, products, gaps, reductions)

    # -- exporting ---------------------------------------------------------------------------------------------------

    def rows(self) -> list[dict[str, Any]]:
        """One flat mapping per site.

        A row holds the fields of the `Site` (``cast`` as text, and ``label``, its short form), counts, shares
        (``zeros_share``), ``amax``, ``sqnr`` in dB, the ``relative_error`` of its product (None if it is no operand),
        and the two histograms as tuples of pairs.
        """
        return [self._row(site) for site in self.sites]

    def _row(self, site: SiteStatistics) -> dict[str, Any]:
        facts = {field.name: getattr(site, field.name) for field in fields(Site)}
        facts["cast"] = None if site.cast is None else site.cast.written
        facts["transform"] = None if site.transform is None else str(site.transform)
        facts["label"] = "unrounded" if site.cast is None else site.cast.label
        numbers = {field.name: getattr(site.statistics, field.name) for field in fields(Statistics)}
        shares = {f"{name}_share": site.statistics.share(name) for name in COUNTS}
        derived = {"sqnr": site.statistics.sqnr, "relative_error": self.relative_error(site)}
        return facts | {"product": site.product} | numbers | shares | derived

    def to_dict(self) -> dict[str, Any]:
        """``sites`` (`rows`), ``products``, ``gaps`` and ``reductions`` as lists of mappings."""
        products, reductions = (
            [asdict(each) | {"relative_error": each.relative_error} for each in part]
            for part in (self.products, self.reductions)
        )
        gaps = [asdict(gap) for gap in self.gaps]
        return {"sites": self.rows(), "products": products, "gaps": gaps, "reductions": reductions}

    def to_json(self) -> str:
        """`to_dict` as JSON; numbers that JSON lacks are the strings ``"inf"``, ``"-inf"`` and ``"nan"``."""
        return json.dumps({"fpsim_profile": JSON_VERSION} | _spelled(self.to_dict()), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Profile:
        """The profile that `to_json` wrote.

        Raises:
            ValueError: ``text`` is no such JSON.
        """
        return _profile_of(text)

    def to_pandas(self) -> pandas.DataFrame:
        """`rows` as a data frame.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError(
                "Profile.to_pandas needs pandas: pip install pandas, or use to_dict or to_json"
            ) from error
        return pandas.DataFrame(self.rows())

    def to_html(self, path: str | Path, *, title: str = "fpsim profile") -> Path:
        """Write a page to ``path`` that needs no network: a table to sort and filter, and plots. Returns the path."""
        path = Path(path)
        path.write_text(page(self.rows(), self.sites, self.products, self.gaps, title), encoding="utf-8")
        return path

    # -- showing -----------------------------------------------------------------------------------------------------

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.table()
        if self.reductions or any(product.sum for product in self.products):
            yield self.table_of_sums()
        if self.gaps:
            yield Text(f"{len(self.gaps)} gaps are not in this table: fpsim.explain lists them", style="yellow")

    def __str__(self) -> str:
        return render(self, width=200)

    def table(self, sort: str = "sqnr", limit: int | None = None) -> Table:
        """A table for rich.

        Args:
            sort: the number of the `rows` to sort by, the worst first: ``sqnr``, ``relative_error``, ``amax``, a count
                or its share.
            limit: the greatest number of rows; None shows all.

        Raises:
            ValueError: ``sort`` is no such number.
        """
        rows = _sorted(self.rows(), sort)
        table = Table(title=f"{len(rows)} sites, {len(self.products)} matrix products", title_justify="left")
        table.add_column("module", overflow="fold", min_width=16)
        for name in ("operator", "kind", "role", "cast"):
            table.add_column(name, no_wrap=True)
        for name in ("zero", "underflow", "subnormal", "saturated", "ovf/inf/NaN", "amax", "SQNR dB", "error"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("exponents", no_wrap=True)
        for row in rows[:limit]:
            table.add_row(*_cells(row))
        return table

    def table_of_sums(self) -> Table:
        """A table for rich of the products and other sums with accumulators, those that lost most first.

        Its numbers are the relative error of the sums, the share of sums that had a step which changed nothing, and the
        share of such steps (`SumStatistics`).
        """
        every: tuple[ProductStatistics | ReductionStatistics, ...] = (*self.products, *self.reductions)
        sums = [(product, product.sum) for product in every if product.sum is not None]
        others = f", {len(self.reductions)} other sums" if self.reductions else ""
        title = f"{len(sums) - len(self.reductions)} products with accumulators{others}"
        table = Table(title=title, title_justify="left")
        for name in ("module", "operator", "kind", "accumulator"):
            table.add_column(name, overflow="fold")
        for name in ("error of sums", "stagnated sums", "idle steps"):
            table.add_column(name, justify="right", no_wrap=True)
        for product, lost in sorted(sums, key=lambda pair: -pair[1].relative_error):
            words = (product.path or "(root)", product.operator, product.kind, lost.accumulator)
            shares = ["-" if share is None else percent(share) for share in (lost.stagnated_share, lost.idle_share)]
            table.add_row(*map(Text, (*words, f"{lost.relative_error:.2g}", *shares)))
        return table


def _cells(row: dict[str, Any]) -> list[Text]:
    words = [row["path"] or "(root)", row["operator"], row["kind"] or row["direction"], row["role"]]
    cast = Text(row["label"], style="green" if row["cast"] else "yellow")
    shares = [
        _coloured(name, row[f"{name}_share"], percent(row[f"{name}_share"]))
        for name in ("zeros", "underflows", "subnormals")
    ]
    saturated = _coloured("saturations", row["saturations_share"], percent(row["saturations_share"]))
    specials = [f"{row[name]} {word}" for name, word in _SPECIALS.items() if row[name]]
    error = row["relative_error"]
    return [
        *map(Text, words),
        cast,
        *shares,
        saturated,
        Text(" ".join(specials) or "-", style="bold red" if specials else ""),
        Text(f"{row['amax']:.3g}"),
        _coloured("sqnr", row["sqnr"], decibel(row["sqnr"])),
        Text("") if error is None else _coloured("relative_error", error, f"{error:.2g}"),
        Text(bars(row["exponents"])),
    ]


_SPECIALS = {"overflows": "ovf", "infinities": "inf", "nans": "NaN"}
_STYLES = ("", "yellow", "bold red")


def _coloured(name: str, value: float, text: str) -> Text:
    return Text(text, style=_STYLES[severity(name, value)])


def bars(histogram: Histogram, width: int = 16) -> str:
    """A histogram of exponents as one line: the least exponent, bars, the greatest exponent."""
    if not histogram:
        return "-"
    low, high = histogram[0][0], histogram[-1][0]
    step = (high - low) // width + 1
    heights = [0] * ((high - low) // step + 1)
    for exponent, count in histogram:
        heights[(exponent - low) // step] += count
    top = max(heights)
    return f"{low} {''.join(_BARS[math.ceil(8 * height / top)] for height in heights)} {high}"


_BARS = " ▁▂▃▄▅▆▇█"


def _sorted(rows: list[dict[str, Any]], by: str) -> list[dict[str, Any]]:
    """``rows`` with the worst first: the lowest signal-to-noise ratios, or the highest values of any other number."""
    numbers = [name for name, value in (rows[0] if rows else {by: 0}).items() if isinstance(value, int | float)]
    if by != "relative_error" and by not in numbers:
        hint = did_you_mean(by, numbers)
        raise ValueError(f"cannot sort by {by!r}{hint}: use one of {', '.join([*numbers, 'relative_error'])}")
    sign = 1 if by == "sqnr" else -1
    return sorted(rows, key=lambda row: math.inf if row[by] is None else sign * row[by])


# -- merging and reading -----------------------------------------------------------------------------------------------


def _identity(site: SiteStatistics) -> tuple[Any, ...]:
    """The facts of a site that must agree between steps: everything except sizes and statistics."""
    return site.path, site.operator, site.step, site.role, len(site.shape), site.dtype, site.cast, site.product


def _summed(profile: Profile) -> list[tuple[str, ...]]:
    return [(each.path, each.operator, each.kind, each.sum.accumulator) for each in profile.reductions]


def have_same_sites(a: Profile, b: Profile) -> bool:
    return list(map(_identity, a.sites)) == list(map(_identity, b.sites)) and _summed(a) == _summed(b)


def _check_same_sites(a: Profile, b: Profile) -> None:
    for one, other in zip_longest(a.sites, b.sites):
        if one is None or other is None or _identity(one) != _identity(other):
            raise ValueError(
                f"profiles of different sites do not add up: one has {_words(one)} where another has {_words(other)}. "
                "Merge profiles of the same model under the same policy, of whole steps"
            )
    if _summed(a) != _summed(b):
        raise ValueError("profiles with different sums (reductions) do not add up: merge those of the same policy")


def _words(site: SiteStatistics | None) -> str:
    if site is None:
        return "nothing"
    return f"{site.step} {site.role} of {site.operator} in {site.path or '(root)'!r} cast to {site.cast}"


def _merged_sites(sites: Sequence[SiteStatistics]) -> SiteStatistics:
    statistics = merge(site.statistics for site in sites)
    return replace(sites[0], shape=_common([site.shape for site in sites]), statistics=statistics)


def _merged_products(products: Sequence[ProductStatistics]) -> ProductStatistics:
    shapes = tuple(_common(pair) for pair in zip(*(product.shapes for product in products), strict=True))
    runs = sum(product.runs for product in products)
    error = math.hypot(*(product.error for product in products))
    reference = math.hypot(*(product.reference for product in products))
    lost = merge_sums(product.sum for product in products)
    return replace(products[0], shapes=shapes, runs=runs, error=error, reference=reference, sum=lost)


def _merged_reductions(same: Sequence[ReductionStatistics]) -> ReductionStatistics:
    lost = merge_sums(each.sum for each in same)
    assert lost is not None, "there is one profile at least"
    return replace(same[0], sum=lost)


def _common(shapes: Sequence[tuple[int | str, ...]]) -> tuple[int | str, ...]:
    return tuple(sizes[0] if len(set(sizes)) == 1 else "*" for sizes in zip(*shapes, strict=True))


def side_by_side(profiles: Sequence[Profile]) -> Profile:
    """One profile with the sites of different graphs one after the other."""
    sites: list[SiteStatistics] = []
    products: list[ProductStatistics] = []
    for profile in profiles:
        shift = len(products)
        sites += [
            site if site.product is None else replace(site, product=site.product + shift) for site in profile.sites
        ]
        products += profile.products
    gaps = dict.fromkeys(gap for profile in profiles for gap in profile.gaps)
    reductions = [reduction for profile in profiles for reduction in profile.reductions]
    return Profile(tuple(sites), tuple(products), tuple(gaps), tuple(reductions))


def _spelled(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _spelled(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_spelled(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _profile_of(text: str) -> Profile:
    try:
        facts = parse_json(text)
        if facts["fpsim_profile"] > JSON_VERSION:
            raise ValueError(f"it was written by a newer version of fpsim (form {facts['fpsim_profile']})")
        sites = [_site_of(_of_this_version(row)) for row in facts["sites"]]
        products = [_product_of(row) for row in facts["products"]]
        gaps = [Gap(**row) for row in facts["gaps"]]
        reductions = [_reduction_of(row) for row in facts.get("reductions", ())]  # older profiles lack them
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"this is no profile that Profile.to_json wrote: {error}") from error
    return Profile(tuple(sites), tuple(products), tuple(gaps), tuple(reductions))


def _of_this_version(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A site's row in the form of this version. Version 1 had directions among the kinds, and no axes."""
    if "direction" in row:
        return row
    kind = row["kind"] if row["kind"] in KINDS else None
    direction = row["kind"] if kind is None else "forward" if kind == "fprop" else "backward"
    return {**row, "kind": kind, "direction": direction, "contracted": ()}


def _site_of(row: Mapping[str, Any]) -> SiteStatistics:
    numbers: dict[str, Any] = {name: row[name] for name in ("elements", *COUNTS)}
    numbers |= {name: float(row[name]) for name in ("amax", "signal", "noise")}
    numbers |= {name: row.get(name, 0) for name in GROUP_COUNTS}
    histograms = ("exponents", "rounded_exponents", "scale_exponents")
    numbers |= {name: tuple(map(tuple, row.get(name, ()))) for name in histograms}
    row = {"epilogue": False, **row}  # older profiles lack it
    values: dict[str, Any] = {field.name: row[field.name] for field in fields(Site) if field.name != "transform"}
    values["transform"] = parse_transform(row.get("transform"))
    values |= {name: tuple(values[name]) for name in ("shape", "contracted")}
    values["cast"] = None if values["cast"] is None else parse_cast(values["cast"])
    return SiteStatistics(**values, product=row["product"], statistics=Statistics(**numbers))


def _product_of(row: Mapping[str, Any]) -> ProductStatistics:
    row = {"sum": None, **row}  # older profiles lack it
    values = {field.name: row[field.name] for field in fields(ProductStatistics)}
    values["sum"] = None if values["sum"] is None else _sum_of(values["sum"])
    shapes = tuple(map(tuple, row["shapes"]))
    return ProductStatistics(
        **values | {"shapes": shapes, "error": float(row["error"]), "reference": float(row["reference"])}
    )


def _reduction_of(row: Mapping[str, Any]) -> ReductionStatistics:
    return ReductionStatistics(row["path"], row["operator"], row["kind"], _sum_of(row["sum"]))


def _sum_of(row: Mapping[str, Any]) -> SumStatistics:
    lost = {field.name: row[field.name] for field in fields(SumStatistics)}
    return SumStatistics(**lost | {name: float(lost[name]) for name in ("error", "reference")})
