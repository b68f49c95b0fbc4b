"""Published ways to train or run a model in low precision, by name.

Each function returns a frozen `Recipe`. Its method ``apply`` changes a model and its optimizer by public calls.

>>> import fpsim
>>> recipe = fpsim.recipes.te_current()
>>> recipe.policy.cast("dgrad", "gradient").written
'e5m2/nearest_even/sat_finite/tensor:fp32'
"""

from __future__ import annotations

from collections.abc import Callable

from fpsim.recipes.exclusions import Exclusions
from fpsim.recipes.recipe import Recipe
from fpsim.recipes.rounded_state import RoundedState
from fpsim.recipes.te import te_current

#: The recipes by name. Each takes its options as keyword arguments, and has a default for each.
RECIPES: dict[str, Callable[..., Recipe]] = {
    "te_current": te_current,
}

__all__ = ["RECIPES", "Exclusions", "Recipe", "RoundedState", *RECIPES]


def __dir__() -> list[str]:
    return sorted(__all__)
