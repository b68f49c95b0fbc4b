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
    """The verdicts in Markdown: a table with a row per claim, then a section per claim with its marks."""
    rows = ["| recipe | claim | verdict | test |", "|---|---|---|---|"]
    for name, outcome in outcomes.items():
        claim = claims[name]
        rows.append(f"| `{claim.recipe}` | {claim.statement} | **{outcome.verdict}** | [{name}](#{name}) |")
    sections = [_section(claims[name], outcome) for name, outcome in outcomes.items()]
    return "\n".join([*rows, "", *sections])


def _section(claim: Claim, outcome: Outcome) -> str:
    lines = [
        f"### {claim.name}",
        "",
        f"- Claim: {claim.statement} ({claim.source}).",
        f"- Test bed: {claim.bed}; {len(registered(claim.name).seeds)} seeds.",
        f"- Verdict: **{outcome.verdict}**.",
        "",
        "| mark | mean and 95 % interval | |",
        "|---|---|---|",
    ]
    marks = [("", judged) for judged in outcome.holds] + [("control: ", judged) for judged in outcome.control]
    lines += [f"| {part}`{judged.mark}` | {judged.numbers} | {judged.word} |" for part, judged in marks]
    return "\n".join(lines) + "\n"
