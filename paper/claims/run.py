"""Measuring claims: each seed once, kept in one JSON file per claim, and the table of verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fpsim.suggestions import did_you_mean

from ..storage import OtherVersion, put_aside, read_results, write_results
from .claim import Claim, Outcome, judge, registered


def chosen(names: Sequence[str], claims: Mapping[str, Claim]) -> list[Claim]:
    """The claims of these names, or of the recipes of these names; all of them for no names.

    Raises:
        ValueError: a name that is neither.
    """
    if not names:
        return list(claims.values())
    found: dict[str, Claim] = {}
    recipes = {claim.recipe for claim in claims.values()}
    for name in names:
        matching = {key: claim for key, claim in claims.items() if name in (key, claim.recipe)}
        if not matching:
            valid = sorted({*claims, *recipes})
            raise ValueError(
                f"no claim and no recipe with claims {name!r}{did_you_mean(name, valid)}: {', '.join(valid)}"
            )
        found |= matching
    return list(found.values())


def measure(claim: Claim, folder: Path) -> tuple[Outcome, int]:
    """Measure the seeds of ``claim`` that ``folder`` lacks, and judge all of them.

    A file of another version of fpsim is put aside, since its numbers may differ.

    Returns:
        The outcome, and the number of seeds that were computed.
    """
    by = registered(claim.name)
    path = folder / f"{claim.name}.json"
    try:
        kept = read_results(path, "seeds")
    except OtherVersion:
        put_aside(path)
        kept = {}
    missing = [seed for seed in by.seeds if str(seed) not in kept]
    for seed in missing:
        kept[str(seed)] = dict(claim.measure(seed))
        write_results(path, "seeds", kept)
    return judge([kept[str(seed)] for seed in by.seeds], by), len(missing)


def markdown(outcomes: Mapping[str, Outcome], claims: Mapping[str, Claim]) -> str:
    """The table of verdicts, in Markdown: one row per claim."""
    rows = [
        "| recipe | claim | test bed | verdict | marks | control |",
        "|---|---|---|---|---|---|",
    ]
    for name, outcome in outcomes.items():
        claim = claims[name]
        cells = [
            f"`{claim.recipe}`",
            f"{claim.statement} ({claim.source})",
            f"`{name}`: {claim.bed}; {len(registered(name).seeds)} seeds",
            f"**{outcome.verdict}**",
            "; ".join(map(str, outcome.holds)),
            "; ".join(map(str, outcome.control)),
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"
