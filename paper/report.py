"""The report on a sweep: one self-contained HTML file and its figures as PNG, made from the stored runs alone."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fpsim.compile_backend.observe.rounding_statistics import LIMITS

from . import figures, require
from .comparison import compare_recipes, pairs
from .conclusions import conclude
from .config import RunConfig, to_dict
from .figures import Judged, Line
from .hypotheses import judge_hypotheses, too_few_seeds
from .intervals import compare, share
from .prediction import SIGNALS, Prediction, predict, signal_values, warn
from .ranges import COLUMNS, table_rows
from .sensitivity import AXES, Difference, Sensitivity, differences, next_sizes, sensitivities, series
from .storage import replace_file
from .sweeps import read_sweep
from .verdicts import judge, preregistration, rules, trained

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SENSITIVITY = (
    "Learning-rate sensitivity (arXiv 2309.14322): the mean over learning rates, uniform in their logarithm, of the "
    "smaller of final loss and loss at initialisation, minus the least of these losses; nats per token. Small is good."
)
_RANGES = [f"{what}_{role}" for what in ("saturated", "underflowed") for role in ("activation", "weight", "gradient")]


@dataclass(frozen=True)
class Table:
    """A table of the report: its heading, an explanation, column names and rows of text."""

    heading: str
    note: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A figure of the report: its file's name, its heading, an explanation, and the function that draws it."""

    name: str
    heading: str
    note: str
    draw: Callable[[], Figure]


def report(folder: Path, out: Path | None = None) -> Path:
    """Write the report on the sweep in ``folder`` and return the path of the HTML file.

    Files: ``report.html``, which needs no other file, ``figures/*.png``, and ``outcomes.json``, the numbers of the
    tables.

    Args:
        out: the folder to write to; None is ``folder``.

    Raises:
        FileNotFoundError: no sweep there, or no finished run.
        ModuleNotFoundError: matplotlib, jinja2 or pyarrow is not installed.
    """
    jinja = require("jinja2")
    out = out or folder
    runs, facts = read_sweep(folder)
    judged = judge_sweep(runs, facts)
    predictions = _predictions(judged)
    tables = _tables(judged, facts, predictions)
    images = [(picture, _png(picture, out / "figures")) for picture in _pictures(judged, predictions)]
    template = resources.files(__package__).joinpath("report.html.jinja").read_text()
    page = jinja.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(template)
    path = out / "report.html"
    content = page.render(
        facts=facts,
        conclusions=conclude(judged),
        summary=_summary(judged, facts),
        images=images,
        tables=tables,
        configuration=_configuration([run.config for run in runs]),
        versions=_versions(judged),
        rules=_rules(judged.reference),
        preregistration=preregistration() if "experiment" in facts else None,
    )
    replace_file(path, content.encode())
    numbers = {table.heading: [dict(zip(table.columns, row, strict=True)) for row in table.rows] for table in tables}
    replace_file(out / "outcomes.json", (json.dumps(numbers, indent=1) + "\n").encode())
    return path


def judge_sweep(runs: Sequence[Any], facts: Mapping[str, Any]) -> Judged:
    """The runs with their verdicts; the reference condition is that of the experiment, or else the first."""
    reference = facts.get("experiment", {}).get("reference") or runs[0].condition
    verdicts = [judge(run) for run in runs]
    return Judged(runs, verdicts, trained(runs, verdicts, reference), reference)


def _png(picture: Picture, folder: Path) -> str:
    buffer = io.BytesIO()
    picture.draw().savefig(buffer, format="png")
    replace_file(folder / f"{picture.name}.png", buffer.getvalue())
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _summary(judged: Judged, facts: Mapping[str, Any]) -> list[str]:
    total, diverged = len(judged.runs), sum(verdict.diverged for verdict in judged.verdicts)
    sentences = [
        f"{total} of {len(facts['plan'])} planned runs are finished, {len(facts['failures'])} were given up.",
        f"{diverged} diverged, {sum(verdict.spiked for verdict in judged.verdicts)} spiked, "
        f"{sum(judged.trained)} trained (reference: {judged.reference}).",
    ]
    undecided = sum(verdict.undecided for verdict in judged.verdicts)
    if undecided:
        sentences.append(
            f"{undecided} ended while the loss rose, too early to call it divergence: run them for more steps."
        )
    if facts.get("experiment", {}).get("is_registered") is False:
        sentences.append("The setting is not the registered one, so the registered claims are not judged.")
    if not diverged:
        sentences.append("No run diverged: this sweep says nothing about what predicts divergence.")
    return sentences


def _rules(reference: str) -> list[tuple[str, str]]:
    """The words of the verdicts, with the numbers by which they were given."""
    diverged, spiked, trained = rules().diverged, rules().spiked, rules().trained
    return [
        (
            "diverged",
            f"A loss or gradient norm is not finite, or the smoothed loss stays {diverged['rise']:g} nat above its own "
            f"minimum so far for {100 * diverged['steps_share']:.3g} % of the steps, and at least for "
            f"{diverged['steps_least']:g}.",
        ),
        ("undecided", "The run ended while the smoothed loss was that high, before it had been so for long enough."),
        (
            "spiked",
            f"After the warmup, the loss of a step is {spiked['rise']:g} nat, and {spiked['deviations']:g} standard "
            "deviations, above the smoothed loss of the step before. Spikes less than "
            f"{spiked['apart']:g} steps apart are one.",
        ),
        (
            "trained",
            f"Neither diverged nor undecided, and the final smoothed loss is at most {trained['margin']:g} nat above "
            f"the median of {reference} at the same learning rate; at its best rate where all its runs diverged.",
        ),
        (
            "underflow, saturate",
            f"A share of a role, or of a layer, is beyond the limit above {100 * LIMITS['underflows'][1]:g} % that "
            f"underflow or {100 * LIMITS['saturations'][1]:g} % that saturate. Shares of roles are the largest over "
            "the counted steps and the runs in question: those that did not train, or else all.",
        ),
        (
            "would mend",
            "After the last step, remedies were tried by rising cost on a batch of validation data. The cheapest is "
            "named that leaves no layer beyond the limits, in the run with the worst layer. No run trained with it.",
        ),
    ]


def _predictions(judged: Judged) -> list[Prediction]:
    signals = [s for s in SIGNALS if any(np.isfinite(signal_values(run, s)).any() for run in judged.runs)]
    if not any(verdict.diverged for verdict in judged.verdicts):
        return []
    return [predict(judged.runs, judged.verdicts, s, score=score) for score in ("value", "rise") for s in signals]


def _pictures(judged: Judged, predictions: Sequence[Prediction]) -> list[Picture]:
    pictures = []
    if _has_recipes(judged):
        note = f"Final loss minus that of {judged.reference}, mean over pairs with 95 % intervals."
        pictures.append(
            Picture(
                "recipes",
                "Recipes",
                note,
                lambda: figures.gaps(
                    [(c.condition, c.gap.mean, c.gap.low, c.gap.high) for c in compare_recipes(judged)]
                ),
            )
        )
    note = "Smoothed training loss: mean over seeds, band from the lowest to the highest."
    pictures.append(Picture("loss", "Loss curves", note, lambda: figures.loss_curves(judged)))
    if overlapping := _trained_pairs(judged):
        note = (
            f"Smoothed training loss minus that of {judged.reference} with the same seed and learning rate, where both "
            "runs trained: mean over pairs, band from the lowest to the highest. The axis spans the steps after the "
            "warmup."
        )
        pictures.append(
            Picture("loss_differences", "Loss differences", note, lambda: figures.loss_differences(judged, overlapping))
        )
    if len(judged.rates) > 1:
        note = "Final smoothed loss of every run, in nats per token; a cross where it diverged."
        pictures.append(Picture("heat_maps", "Seed by learning rate", note, lambda: figures.heat_maps(judged)))
    if found := sensitivities(judged):
        pictures += sensitivity_pictures(found)
    if any(np.isfinite(run["sharpness_5e4"]).any() for run in judged.runs):
        note = (
            "Every run; a dotted line where it diverged. Logits of the last token of each window of the step's batch."
        )
        pictures.append(
            Picture("sharpness", "Sharpness against loss", note, lambda: figures.sharpness_and_loss(judged))
        )
    if any(math.isfinite(found.auc) for found in predictions):
        horizon = rules().prediction["main_horizon"]
        note = f"Divergence within the next {predictions[0].horizon} steps, told from the signal at one step."
        pictures.append(
            Picture("roc", "Who predicts divergence", note, lambda: figures.roc_curves(judged, predictions, horizon))
        )
    return pictures


def _trained_pairs(judged: Judged) -> dict[str, list[tuple[int, int]]]:
    """For each condition but the reference the pairs of which both runs trained; none where there is no such pair."""
    others = [name for name in judged.conditions if name != judged.reference]
    found = {n: [pair for pair in pairs(judged, n) if all(judged.trained[i] for i in pair)] for n in others}
    return {name: chosen for name, chosen in found.items() if chosen}


def sensitivity_pictures(found: Sequence[Sensitivity]) -> list[Picture]:
    """Loss against learning rate, and sensitivity against the bits of formats and the sizes of models."""
    curves = [(each.precision, each.model.size, each.rates, each.losses) for each in found]
    note = (
        "Final smoothed loss, at most the loss at initialisation: mean over seeds, band from the lowest to the highest."
    )
    pictures = [Picture("loss_by_rate", "Loss against learning rate", note, lambda: figures.loss_by_rate(curves))]
    panels = {}
    if len({each.bits for each in found}) > 1:
        by_size = {size: [each for each in found if each.model.size == size] for _, size, *_ in curves}
        panels["bits of an operand"] = [
            _line(size, sorted(own, key=lambda each: each.bits), lambda each: each.bits, "o")
            for size, own in by_size.items()
        ]
    for axis, field in AXES.items():
        if groups := series(found, axis):
            panels[axis] = [
                _line(group[0].precision, group, lambda each, field=field: getattr(each.model, field))  # type: ignore[misc]
                for group in groups
            ]
    if panels:
        note = f"Mean over seeds with bootstrap intervals. {_SENSITIVITY}"
        pictures.append(
            Picture("sensitivity", "Learning-rate sensitivity", note, lambda: figures.sensitivity_lines(panels))
        )
    return pictures


def _line(label: str, group: Sequence[Sensitivity], x: Callable[[Sensitivity], float], look: str = "o-") -> Line:
    values, lows, highs = ([getattr(each, name) for each in group] for name in ("value", "low", "high"))
    return Line(label, [x(each) for each in group], values, lows, highs, look=look)


# -- tables ------------------------------------------------------------------------------------------------------------


def _tables(judged: Judged, facts: Mapping[str, Any], predictions: Sequence[Prediction]) -> list[Table]:
    found = sensitivities(judged)
    tables = [_recipes(judged), _conditions(judged), _by_rate(judged), _comparisons(judged, facts)]
    tables += [_sensitivity_table(found), _difference_table(found, judged.reference), _next_size_table(found)]
    tables += [_hypothesis_table(judged, facts)]
    if predictions:
        tables += [_prediction_table(predictions), _warning_table(judged)]
    tables += [_range_table(judged), _misfit_table(judged), _failures(facts)]
    return [table for table in tables if table.rows]


def _conditions(judged: Judged) -> Table:
    rows = []
    for name in judged.conditions:
        chosen = judged.of(name)
        verdicts = [judged.verdicts[index] for index in chosen]
        rows.append(
            [
                name,
                str(share([verdict.diverged for verdict in verdicts])),
                str(sum(verdict.undecided for verdict in verdicts)),
                str(share([verdict.spiked for verdict in verdicts])),
                f"{np.mean([len(verdict.spikes) for verdict in verdicts]):.2f}",
                str(share([judged.trained[index] for index in chosen])),
                _median([verdict.final_loss for verdict in verdicts if not verdict.diverged]),
                _median([verdict.final_validation_loss for verdict in verdicts if not verdict.diverged]),
            ]
        )
    note = (
        "Shares with exact 95 % intervals (Clopper and Pearson). Undecided: runs that end while the loss rises, before "
        "the rules call it divergence. Trained: the robustness region, the share of seeds "
        "and learning rates that train. Losses: median [lowest, highest] over runs that did not diverge, nats per "
        "token."
    )
    columns = [
        "condition",
        "diverged",
        "undecided",
        "spiked",
        "spikes per run",
        "trained",
        "final loss",
        "validation loss",
    ]
    return Table("Conditions", note, columns, rows)


def _recipes(judged: Judged) -> Table:
    rows = []
    for found in compare_recipes(judged) if _has_recipes(judged) else []:
        memory = found.memory
        rows.append(
            [
                found.condition,
                _interval(found.gap.mean, found.gap.low, found.gap.high)
                if found.condition != judged.reference
                else "-",
                str(found.diverged),
                "-" if math.isnan(found.sharpness) else f"{found.sharpness:.3g}",
                *(
                    ("-", "-", "-")
                    if memory is None
                    else (f"{memory.weights:.3g}", f"{memory.moments:.3g}", f"{memory.activation:.3g}")
                ),
                f"{found.cost:.2f}",
            ]
        )
    note = (
        f"Gap: final smoothed loss minus that of {judged.reference} over pairs with the same seed and learning rate, "
        "mean with its 95 % interval (Student), nats per token; pairs in which a run diverged are left out. Sharpness: "
        "median of the last measurement. Memory: bytes that hardware would keep for a parameter (weight with master "
        "copy; moments of AdamW) and for an activation of a rounded linear layer, with the share of its scales. Cost: "
        "time of a simulated step over that of the reference."
    )
    columns = ["condition", "gap", "diverged", "sharpness", "weight", "moments", "activation", "cost"]
    return Table("Recipes", note, columns, rows)


def _has_recipes(judged: Judged) -> bool:
    return any(run.config.recipe is not None for run in judged.runs)


def _by_rate(judged: Judged) -> Table:
    rows = []
    for name in judged.conditions if len(judged.rates) > 1 else []:
        cells = []
        for rate in judged.rates:
            chosen = judged.of(name, rate)
            diverged = sum(judged.verdicts[index].diverged for index in chosen)
            spiked = sum(judged.verdicts[index].spiked for index in chosen)
            finals = [judged.verdicts[i].final_loss for i in chosen if not judged.verdicts[i].diverged]
            cells.append(f"{diverged}, {spiked} of {len(chosen)}; {_median(finals)}")
        rows.append([name, *cells])
    note = "Runs that diverged, that spiked, of all; final smoothed loss as above."
    return Table("By learning rate", note, ["condition", *(f"{rate:g}" for rate in judged.rates)], rows)


def _comparisons(judged: Judged, facts: Mapping[str, Any]) -> Table:
    compared = facts.get("experiment", {}).get("pairs") or [
        (name, judged.reference) for name in judged.conditions if name != judged.reference
    ]
    rows = []
    for first, second in compared:
        if not judged.of(first) or not judged.of(second):
            continue
        for what, flags in (
            ("diverged", [verdict.diverged for verdict in judged.verdicts]),
            ("spiked", [verdict.spiked for verdict in judged.verdicts]),
            ("did not train", [not good for good in judged.trained]),
        ):
            found = compare(*([flags[index] for index in judged.of(name)] for name in (first, second)))
            rows.append(
                [
                    f"{first} against {second}",
                    what,
                    str(found.first),
                    str(found.second),
                    "-" if math.isnan(found.odds_ratio) else f"{found.odds_ratio:.3g}",
                    f"{found.p_greater:.3g}",
                    f"{found.p_two_sided:.3g}",
                ]
            )
    note = "Fisher's exact test over runs, learning rates pooled."
    if "experiment" in facts:
        note += " The paper's 18/188 against 0/70 has p = 0.0027 (one-sided)."
    columns = ["comparison", "outcome", "first", "second", "odds ratio", "p, first more often", "p, two-sided"]
    return Table("Fisher's exact test", note, columns, rows)


def _sensitivity_table(found: Sequence[Sensitivity]) -> Table:
    rows = []
    for each in found:
        bound = "at least " if each.is_lower_bound else ""
        stable = each.largest_stable
        rows.append(
            [
                each.condition,
                bound + _interval_or_value(each.value, each.low, each.high),
                f"all up to {each.rates[-1]:g}" if stable is None else f"{stable:.3g}",
                f"{each.rates[int(each.losses.mean(0).argmin())]:g}",
                f"{each.losses.mean(0).min():.3f}",
                f"{len(each.seeds)}" + (f" ({each.left_out} incomplete)" if each.left_out else ""),
            ]
        )
    note = (
        f"{_SENSITIVITY} Mean over seeds with a bootstrap interval over seeds, which few seeds make too narrow. At "
        "least: no rate of the sweep is unstable, so that larger rates would raise it. Largest stable rate: where the "
        "mean loss, taken as linear in the logarithm of the rate, exceeds the least one by "
        f"{rules().sensitivity['margin']:g} nat."
    )
    columns = ["condition", "sensitivity", "largest stable rate", "best rate", "loss there", "seeds"]
    return Table("Learning-rate sensitivity", note, columns, rows)


def _difference_table(found: Sequence[Sensitivity], reference: str) -> Table:
    rows = []
    for each in differences(found, reference):
        test = each.test
        rows.append(
            [
                f"{each.first} minus {each.second}",
                _interval_or_value(test.mean, test.low, test.high),
                "-" if math.isnan(test.p) else f"{test.p:.3g}",
                str(test.seeds),
                "-" if math.isnan(test.detectable) else f"{test.detectable:.3f}",
                _told_apart(each),
            ]
        )
    share = rules().sensitivity["power"]
    note = (
        "Paired by seed, mean with its 95 % interval and p-value (Student, two-sided; one test per row). Detectable: "
        f"the least true difference that so many seeds show with probability {share:g}, for the spread seen here."
    )
    columns = ["sensitivity of", "difference", "p", "seeds", "detectable", "verdict"]
    return Table("Differences of sensitivity", note, columns, rows)


def _told_apart(each: Difference) -> str:
    if each.test.p < 1 - rules().prediction["level"]:
        words = "higher" if each.test.mean > 0 else "lower"
        return words + (" over the rates of the sweep, which do not reach instability in both" if each.is_bound else "")
    return too_few_seeds(each.test)


def _hypothesis_table(judged: Judged, facts: Mapping[str, Any]) -> Table:
    experiment = facts.get("experiment", {})
    found = judge_hypotheses(judged, experiment["number"]) if experiment.get("is_registered") else []
    rows = [[each.text, each.numbers, each.verdict] for each in found]
    note = "Judged on the registered seeds, by the rules at the end of this page."
    return Table("Registered claims", note, ["claim", "numbers", "verdict"], rows)


def _next_size_table(found: Sequence[Sensitivity]) -> Table:
    rows = []
    for each in next_sizes(found):
        measured = "beyond the largest rate" if each.measured is None else f"{each.measured:.3g}"
        known = not each.why_not and each.measured is not None
        rows.append(
            [
                each.precision,
                each.axis,
                f"{', '.join(model.size for model in each.smaller)} to {each.model.size}",
                each.why_not or _interval_or_value(each.predicted, each.low, each.high, ".3g"),
                measured,
                f"{each.predicted / (each.measured or math.nan):.2f}" if known else "-",
            ]
        )
    note = (
        "The largest stable rate of the largest model, foretold from the smaller ones by a line through logarithms, "
        "with a bootstrap interval over seeds."
    )
    columns = ["precision", "growth", "models", "foretold", "measured", "foretold over measured"]
    return Table("Largest stable rate of the next size", note, columns, rows)


def _prediction_table(predictions: Sequence[Prediction]) -> Table:
    rows = [
        [
            SIGNALS[found.signal],
            found.score,
            _interval(found.auc, found.low, found.high),
            str(found.positives),
            str(found.negatives),
            str(found.runs),
        ]
        for found in predictions
    ]
    note = (
        f"Area under the ROC curve for divergence within the next {predictions[0].horizon} steps, over steps with "
        "measurements after the warmup; 95 % intervals from resampled runs. Pooled over conditions and learning rates: "
        "a signal that only tells conditions apart scores too; by rise, a signal is compared with its own past."
    )
    columns = ["signal", "score", "AUC", "steps before divergence", "calm steps", "diverging runs"]
    return Table("Prediction", note, columns, rows)


def _warning_table(judged: Judged) -> Table:
    found = [warn(judged.runs, judged.verdicts, signal) for signal in SIGNALS]
    rows = [
        [
            SIGNALS[warning.signal],
            f"{warning.threshold:.4g}",
            str(warning.warned),
            "-" if math.isnan(warning.lead) else f"{warning.lead:.0f}",
            str(warning.false_alarms),
        ]
        for warning in found
        if warning is not None
    ]
    note = (
        "The alarm is raised above the 99 % quantile of the signal in runs that do not diverge. Lead: median, in steps."
    )
    columns = ["signal", "threshold", "diverging runs warned", "lead", "false alarms in other runs"]
    return Table("Who warns first", note, columns, rows)


def _range_table(judged: Judged) -> Table:
    rows = []
    for name in judged.conditions:
        cells = []
        for column in _RANGES:
            values = [np.nanmax(judged.runs[i][column]) for i in judged.of(name) if _any(judged.runs[i][column])]
            cells.append(f"{100 * max(values):.3g} %" if values else "-")
        if any(cell != "-" for cell in cells):
            rows.append([name, *cells])
    note = "Largest share, over steps and runs, of the values rounded in a role that saturate or underflow."
    return Table("Ranges", note, ["condition", *(name.replace("_", ", ") for name in _RANGES)], rows)


def _misfit_table(judged: Judged) -> Table:
    examined = [(run.condition, run.facts["ranges"]) for run in judged.runs if "ranges" in run.facts]
    note = (
        "The layers of which too many operands saturate or underflow after the last step, on a validation batch, in "
        "the worst run of each condition; and the cheapest remedy that leaves none. Remedies were tried by rising cost."
    )
    return Table("What does not fit, and the cheapest fix", note, COLUMNS, table_rows(examined))


def _any(values: np.ndarray) -> bool:
    return bool(np.isfinite(values).any())


def _failures(facts: Mapping[str, Any]) -> Table:
    rows = [
        [entry["key"], entry["condition"], str(entry["tries"]), (entry["text"].strip().splitlines() or ["nothing"])[-1]]
        for entry in facts["failures"]
    ]
    return Table("Runs given up or broken", "", ["run", "condition", "tries", "what happened"], rows)


def _median(values: Sequence[float]) -> str:
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return "-"
    return f"{np.median(finite):.3f} [{min(finite):.3f}, {max(finite):.3f}]"


def _interval(value: float, low: float, high: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _interval_or_value(value: float, low: float, high: float, digits: str = ".3f") -> str:
    """The value, with its interval where there is one."""
    return f"{value:{digits}}" + ("" if math.isnan(low) else f" [{low:{digits}}, {high:{digits}}]")


def _configuration(configs: Sequence[RunConfig]) -> list[tuple[str, str]]:
    """Every field, and its values over all runs."""
    plain = [to_dict(config) for config in configs]
    rows = []
    for name in plain[0]:
        values = list(dict.fromkeys(json.dumps(entry[name]) for entry in plain))
        shown = ", ".join(values[:12]) + (f", ... ({len(values)} in all)" if len(values) > 12 else "")
        rows.append((name, shown))
    return rows


def _versions(judged: Judged) -> list[str]:
    """The different environments in which the runs were computed."""
    keys = ("packages", "source", "git", "machine", "threads")
    return list(dict.fromkeys(json.dumps({key: run.facts.get(key) for key in keys}) for run in judged.runs))
