"""The influence of training examples on a test loss (Koh and Liang 2017, equation 2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fpsim.curvature.inverses import InverseResult, inverse
from fpsim.curvature.linear import Operator, parameters_of
from fpsim.curvature.losses import INDEPENDENT, scalar_loss
from fpsim.curvature.results import new_axes
from fpsim.curvature.vectors import Layout, Params, dot
from fpsim.showing import Shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes


#: Why the influence on a loss that changes is no number.
_MOVED = "two gradients of the test loss differ: turn dropout off (model.eval()), or fix the random numbers"


@dataclass(frozen=True, eq=False)
class InfluenceResult(Shown):
    """How much each training example changes the test loss.

    Attributes:
        values: float64, shape ``(examples,)``: the derivative of the test loss to the weight of the example in the
            training loss. An example with a negative value helps. To remove one of N examples from a mean changes the
            test loss by about ``-value / N``.
        solve: the solution ``(A + damping I)^-1 g`` for the gradient g of the test loss, with its residual.
        gradients: the number of gradients: two for the test loss and one for each example.
        products: the number of products with the operator.
        cost: that of the products in gradients (`Operator.cost`), and of the gradients.
        repeats: whether the two gradients of the test loss are equal.
        converged: whether the solution has converged, for a loss that repeats.
        reasons: why ``converged`` is False, in words; empty if it is True.
    """

    values: Tensor
    solve: InverseResult = field(repr=False)
    gradients: int
    products: int
    cost: float
    repeats: bool
    converged: bool
    reasons: tuple[str, ...]

    def plot(self, axes: Axes | None = None) -> Axes:
        """The influences, sorted: the most helpful examples first."""
        axes = axes or new_axes()
        axes.bar(range(len(self.values)), self.values.sort().values.numpy())
        axes.set(xlabel="training example, sorted", ylabel="influence on the test loss")
        return axes


def influence(
    operator: Operator,
    loss: Callable[[Params, Any], Tensor],
    examples: Iterable[Any],
    *,
    test: Any,
    damping: float,
    tol: float = 1e-6,
    max_products: int | None = None,
    progress: bool = False,
) -> InfluenceResult:
    """The influence of each of ``examples`` on the loss of ``test``: ``-g_test . (A + damping I)^-1 g_example``.

    It is exact to first order at a minimum of the training loss whose curvature is A. At other points, and with
    damping, it is the change after one damped Newton step.

    Args:
        operator: the curvature A of the training loss, from `hessian` or `gauss_newton`.
        loss: ``loss(params, batch) -> scalar tensor``, as for `hessian`; `functional_loss` makes it from a module.
        examples: batches of one example each.
        test: the batch of the test loss.
        damping, tol, max_products, progress: as for `inverse`.

    Returns:
        An `InfluenceResult`. It costs the products of one `inverse`, a gradient for each example, and two for the test.

    Raises:
        TypeError: a loss is no scalar.
        ValueError: the operator's entries are not parameters, there is no example, a loss does not depend on the
            parameters, or as `inverse`.
        FloatingPointError: a loss or its gradient has infinities or NaN.
    """
    layout = parameters_of(operator)
    given = list(examples)
    if not given:
        raise ValueError("there is no example: give at least one batch")
    of_test = gradient(layout, loss, test)
    repeats = torch.equal(of_test, gradient(layout, loss, test))
    solve = inverse(
        operator,
        of_test,
        damping=damping,
        tol=tol,
        max_products=max_products,
        progress=progress,
    )
    values = [-dot(gradient(layout, loss, example), solve.solution) for example in given]
    gradients = 2 + len(given)
    moved = () if repeats else (_MOVED,)
    return InfluenceResult(
        torch.tensor(values, dtype=torch.float64),
        solve,
        gradients,
        solve.products,
        solve.cost + gradients,
        repeats,
        solve.converged and repeats,
        (*solve.reasons, *moved),
    )


def gradient(layout: Layout, loss: Callable[[Params, Any], Tensor], batch: Any) -> Tensor:
    """The gradient of ``loss`` on ``batch`` at the layout's parameters: shape ``(size,)``.

    Raises:
        TypeError: the loss is no scalar.
        ValueError: the loss does not depend on the parameters.
        FloatingPointError: the loss or its gradient has infinities or NaN.
    """
    values = tuple(value.detach().requires_grad_() for value in layout.values)
    with torch.enable_grad():
        value = scalar_loss(loss(layout.substitute(values), batch))
    if not value.requires_grad:
        raise ValueError(INDEPENDENT)
    found = layout.join(torch.autograd.grad(value, values, materialize_grads=True))
    if not (torch.isfinite(value) and torch.isfinite(found).all()):
        raise FloatingPointError(
            f"the loss is {float(value.detach())}, and it or its gradient is not finite: look for overflow"
        )
    return found
