"""How bad is a format for a model, where, and what is the cheapest that will do; and how wrong is a function.

- `compare`: the loss, the perplexity or a metric under several policies, side by side.
- `sensitivity`: the change of the loss for each module or site that is rounded.
- `search`: the cheapest policy within a tolerance, or the best within a budget.
- `accuracy`: the error of an elementwise function, in units of the last place of a format.
"""

from fpsim.evaluate.comparison import Comparison, compare
from fpsim.evaluate.function_errors import Accuracy, accuracy
from fpsim.evaluate.searching import SearchResult, search
from fpsim.evaluate.sensitivities import Sensitivity, sensitivity

__all__ = [
    "Accuracy",
    "Comparison",
    "SearchResult",
    "Sensitivity",
    "accuracy",
    "compare",
    "search",
    "sensitivity",
]


def __dir__() -> list[str]:
    return sorted(__all__)
