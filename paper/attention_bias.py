"""Why attention in bfloat16 errs to one side, without any training.

Low-precision training of GPT-2 explodes because rounding errors inside attention have one sign (arXiv 2510.04212).
Where several scores of a row equal its maximum, as many exponentials are exactly 1, and the sum of P V carries beyond
the significand of bfloat16. `sums` measures that sum alone, for r repeated maxima: r exponentials are 1, and the others
are 0, or so small that they only break ties. `attentions` measures whole attention as kernels compute it
(`fpsim.FlashAttention`): the error of O, and of delta, the row sums of dO * O, through which it enters the gradients.

All values of V have one sign, and all of dO have one. An error is signed, in units of the last place of the exact
number in bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import fpsim

from . import require
from .figures import colours

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Numbers of equal largest scores in a row.
REPEATED = (1, 2, 3, 4, 8)
#: What the other exponentials of a row are.
RESTS = ("zero", "small")
KEYS = 64
_SMALL = (10.0, 11.0)  # the other scores lie so far below the maximum
_MAXIMA = (2.0, 6.0)  # of the scores, for the cure, which takes twice the maximum
_CURE = 2.0

#: How the sum of P V is rounded, and whether the maximum is replaced by the cure.
SUMS: dict[str, tuple[str, bool]] = {
    "truncated": ("toward_zero", False),
    "nearest": ("nearest_even", False),
    "stochastic": ("stochastic", False),
    "nearest, cured": ("nearest_even", True),
}

#: bfloat16 for P and the accumulator of O; row sums, O and delta stay in float32.
_ONLY_ACCUMULATOR = {"inputs": "bf16", "exponentials": "bf16", "accumulator": "bf16"}
#: The roundings of whole attention.
ATTENTIONS: dict[str, Any] = {
    "all_bf16": "all_bf16",
    "all_bf16, cured": {"preset": "all_bf16", "cure": _CURE},
    "accumulator": _ONLY_ACCUMULATOR,
    "accumulator, cured": {**_ONLY_ACCUMULATOR, "cure": _CURE},
    "accumulator, truncated": {**_ONLY_ACCUMULATOR, "accumulator": "bf16/toward_zero"},
    "accumulator, stochastic": {**_ONLY_ACCUMULATOR, "accumulator": "bf16/stochastic"},
    "flash2_bf16": "flash2_bf16",
}
_WIDTH = 4  # of the head


@dataclass(frozen=True)
class Bias:
    """The mean signed error of one quantity.

    Attributes:
        repeated: the number of equal largest scores.
        rest: what the other exponentials are, one of `RESTS`.
        rounding: the key of `SUMS` or `ATTENTIONS`.
        quantity: ``sum of P V``, ``O`` or ``delta``.
        mean: in units of the last place of the exact number in bfloat16; above zero means an error towards +infinity.
        error: the standard error of the mean.
    """

    repeated: int
    rest: str
    rounding: str
    quantity: str
    mean: float
    error: float


def sums(rows: int = 50_000, seed: int = 0, repeated: Sequence[int] = REPEATED) -> list[Bias]:
    """The errors of the sum of P V over 64 keys, rounded once to bfloat16; V is uniform in -(1, 2), in bfloat16.

    P is rounded to bfloat16, to nearest. The sum is exact before it is rounded.

    Args:
        rows: the number of rows, each with its own V.
        seed: of the random numbers.
        repeated: the numbers of equal largest scores.
    """
    generator = torch.Generator().manual_seed(seed)
    values = _values(rows, generator)
    found: list[Bias] = []
    for r in repeated:
        for rest in RESTS:
            below, largest = _scores(rows, r, rest, generator)
            exact: dict[bool, Tensor] = {}
            for name, (rounding, is_cured) in SUMS.items():
                if is_cured not in exact:
                    shift = (_CURE - 1) * largest if is_cured and r > 1 else 0.0
                    p = fpsim.round(torch.exp(below - shift), "bf16")
                    exact[is_cured] = (p.double() * values.double()).sum(-1)
                drawn: dict[str, Any] = {"seed": seed, "salt": len(found)} if rounding == "stochastic" else {}
                rounded = fpsim.round(exact[is_cured], "bf16", rounding=rounding, **drawn)
                found.append(_bias(r, rest, name, "sum of P V", rounded, exact[is_cured]))
    return found


def attentions(rows: int = 2_000, seed: int = 0, repeated: Sequence[int] = REPEATED) -> list[Bias]:
    """The errors of O and of delta in whole attention, of one query and 64 keys; the head has 4 elements.

    V is as in `sums`, and dO is uniform in (1, 2), in bfloat16. The exact O is that of the same scores and V. The exact
    delta has the same dO. Delta is rounded as the attention says.

    Args:
        rows: the number of rows; each of their 4 elements of O is measured.
        seed, repeated: as for `sums`.
    """
    generator = torch.Generator().manual_seed(seed)
    values = _values(rows * _WIDTH, generator).reshape(rows, _WIDTH, KEYS).transpose(1, 2).double()
    gradient = fpsim.round(1 + torch.rand(rows, 1, _WIDTH, generator=generator), "bf16").double()
    none = torch.zeros(rows, 1, 1, dtype=torch.float64)
    found: list[Bias] = []
    for r in repeated:
        for rest in RESTS:
            below, largest = _scores(rows, r, rest, generator)
            scores = fpsim.round(below + largest, "bf16").unsqueeze(1).double()
            exact = torch.softmax(scores, -1) @ values
            exact_delta = (gradient * exact).sum(-1)
            for name, given in ATTENTIONS.items():
                drawn: dict[str, Any] = {"seed": seed, "salt": len(found)} if name.endswith("stochastic") else {}
                output = fpsim.flash_attention(none, none.expand(-1, KEYS, -1), values, scores, steps=given, **drawn)
                found.append(_bias(r, rest, name, "O", output, exact))
                narrow = name.startswith("all_bf16")
                products = fpsim.round(gradient * output, "bf16") if narrow else gradient * output
                delta = fpsim.round(products.sum(-1), "bf16" if narrow else "fp32")
                found.append(_bias(r, rest, name, "delta", delta, exact_delta))
    return found


def _values(rows: int, generator: torch.Generator) -> Tensor:
    return fpsim.round(-1 - torch.rand(rows, KEYS, generator=generator), "bf16")


def _scores(rows: int, repeated: int, rest: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Scores minus the largest of each row, and these largest scores, which are multiples of 1/16."""
    low, high = _SMALL
    below = torch.full((rows, KEYS), -torch.inf)
    if rest == "small":
        below = -low - (high - low) * torch.rand(rows, KEYS, generator=generator)
    below[:, :repeated] = 0.0
    first, last = (int(16 * each) for each in _MAXIMA)
    return below, torch.randint(first, last, (rows, 1), generator=generator) / 16


def _bias(repeated: int, rest: str, rounding: str, quantity: str, got: Tensor, exact: Tensor) -> Bias:
    unit = torch.exp2(torch.frexp(exact).exponent.double() - 8)  # bfloat16 has 8 significant bits
    errors = ((got - exact) / unit).flatten()
    return Bias(
        repeated, rest, rounding, quantity, float(errors.mean()), float(errors.std()) / math.sqrt(errors.numel())
    )


# -- the report --------------------------------------------------------------------------------------------------------


def markdown(found: Sequence[Bias]) -> str:
    """Tables of the errors with their standard errors: a row for each number of repeated maxima."""
    lines: list[str] = []
    for quantity in dict.fromkeys(each.quantity for each in found):
        for rest in RESTS:
            cells = [each for each in found if (each.quantity, each.rest) == (quantity, rest)]
            names = list(dict.fromkeys(each.rounding for each in cells))
            lines += [f"Error of {quantity} in units of the last place, the other exponentials {rest}:", ""]
            lines += [f"| repeated maxima | {' | '.join(names)} |", f"|{'---|' * (len(names) + 1)}"]
            for r in dict.fromkeys(each.repeated for each in cells):
                means = [each for each in cells if each.repeated == r]
                lines.append(f"| {r} | {' | '.join(f'{each.mean:.4f} ± {each.error:.4f}' for each in means)} |")
            lines.append("")
    return "\n".join(lines)


def figure(found: Sequence[Bias]) -> Figure:
    """The mean error against the number of repeated maxima: solid with a small remainder, dashed without."""
    panels = list(dict.fromkeys(each.quantity for each in found))
    drawn = require("matplotlib.figure").Figure(figsize=(4.2 * len(panels), 3.8), dpi=110, layout="constrained")
    for axes, quantity in zip(drawn.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name, rest, line, colour in _lines([each for each in found if each.quantity == quantity]):
            axes.errorbar(
                range(len(line)),
                [each.mean for each in line],
                [2 * each.error for each in line],
                color=colour,
                linestyle="-" if rest == "small" else ":",
                marker="o",
                markersize=3,
                label=name if rest == "small" else None,
            )
            axes.set_xticks(range(len(line)), [str(each.repeated) for each in line])
        axes.axhline(0, color="0.8", linewidth=0.8)
        axes.set(title=quantity, xlabel="repeated maxima", ylabel="mean error (units of the last place)")
        axes.legend(fontsize=7)
    return drawn


def _lines(cells: Sequence[Bias]) -> Iterator[tuple[str, str, list[Bias], str]]:
    paint = colours(list(dict.fromkeys(each.rounding for each in cells)))
    for name, colour in paint.items():
        for rest in RESTS:
            yield name, rest, [each for each in cells if (each.rounding, each.rest) == (name, rest)], colour
