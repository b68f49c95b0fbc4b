"""Operators whose second derivatives torch computes wrong: they are replaced or refused.

`python -m tests.curvature.double_backward` compares the second derivatives of torch's operators with differences of
first gradients. `WRONG` lists those that disagree. `fpsim.curvature.checked_nodes` lists the nodes of autograd graphs
that agree. Any other node, such as a custom operator's, is compared with differences when a loss contains it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fpsim.curvature.checked_nodes import CHECKED


class CurvatureError(RuntimeError):
    """A function cannot be differentiated twice; the message names the operation and a remedy."""


def _always(node: Any) -> bool:
    return True


def _multiplies(node: Any) -> bool:
    return getattr(node, "_saved_reduce", "prod") == "prod"


def _is_singular(node: Any) -> bool:
    return bool((node._saved_result == 0).any())


@dataclass(frozen=True)
class Wrong:
    """An operator whose second derivative is wrong.

    Attributes:
        node: the name of its node in an autograd graph, without the number at its end.
        modes: the modes of `fpsim.curvature.hessian` in which it is wrong; ``gauss_newton_forward`` and
            ``gauss_newton_reverse`` are those of `fpsim.curvature.gauss_newton`.
        operator: the operator, as the message names it.
        why: what is wrong.
        remedy: what to use instead.
        torch: the version of torch in which it was found wrong.
        applies: whether a node of that name is a wrong one.
    """

    node: str
    modes: tuple[str, ...]
    operator: str
    why: str
    remedy: str
    torch: str = "2.13.0"
    applies: Callable[[Any], bool] = _always


_REVERSE = ("reverse", "double_backward")
_FORWARD = ("forward",)
_USE_REVERSE = "use mode='reverse'"

WRONG: tuple[Wrong, ...] = (
    Wrong(
        "WeightNormInterfaceBackward",
        (*_REVERSE, "forward"),
        "torch._weight_norm_interface",
        "its double backward takes the norms as constants",
        "call torch._weight_norm from Python, which is replaced, or write the weight as g * v / v.norm(...)",
    ),
    Wrong(
        "GeneratedBackwardFor_torch_nn__linear_cross_entropy",
        (*_REVERSE, "forward"),
        "linear_cross_entropy with chunks",
        "its backward returns a gradient that the forward pass stored, as a constant",
        "use linear_cross_entropy without chunks, or cross_entropy(linear(...))",
    ),
    Wrong(
        "IndexReduceBackward",
        _REVERSE,
        "index_reduce(reduce='prod')",
        "its double backward is wrong where a factor is zero",
        "use prod, or scatter_reduce(reduce='prod') with mode='reverse'",
        applies=_multiplies,
    ),
    Wrong(
        "ScatterReduceBackward",
        (*_FORWARD, "gauss_newton_forward"),
        "scatter_reduce(reduce='prod')",
        "its forward-mode derivative is wrong",
        _USE_REVERSE,
        applies=_multiplies,
    ),
    Wrong(
        "LogcumsumexpBackward",
        (*_FORWARD, "gauss_newton_forward", "gauss_newton_reverse"),
        "logcumsumexp",
        "the derivative of its backward is wrong at zero gradients and for entries too far apart for exp",
        _USE_REVERSE,
    ),
    Wrong(
        "CholeskyInverseBackward",
        (*_FORWARD, "gauss_newton_forward"),
        "cholesky_inverse",
        "its forward-mode derivative is wrong",
        _USE_REVERSE,
    ),
    Wrong(
        "TriangularSolveBackward",
        _FORWARD,
        "triangular_solve",
        "the forward-mode derivative of its backward is wrong",
        f"use torch.linalg.solve_triangular, or {_USE_REVERSE.removeprefix('use ')}",
    ),
    Wrong(
        "SincBackward",
        _FORWARD,
        "sinc",
        "the forward-mode derivative of its backward is zero at zero, where it is -pi**2 / 3",
        "use another function that is smooth at zero",
    ),
    Wrong(
        "LinalgDetBackward",
        (*_FORWARD, "gauss_newton_forward", "gauss_newton_reverse"),
        "linalg.det",
        "its derivatives are zero at singular matrices, but for that of reverse mode",
        "take a point at which the matrix is regular, or hessian with mode='reverse'",
        applies=_is_singular,
    ),
)


def nodes_of(*values: Tensor) -> Iterator[Any]:
    """The nodes of the autograd graph that ends at ``values``, each once."""
    seen: set[Any] = set()
    waiting = [value.grad_fn for value in values]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        waiting.extend(following for following, _ in node.next_functions)


def refuse_wrong(value: Tensor, mode: str) -> frozenset[str]:
    """Raise a `CurvatureError` if the graph of ``value`` has an operator that is wrong in ``mode``.

    Returns:
        The names of the nodes that nobody has checked.
    """
    unknown = set()
    for node in nodes_of(value):
        name = node.name()
        for entry in WRONG:
            if mode in entry.modes and name.rstrip("0123456789").startswith(entry.node) and entry.applies(node):
                or_else = "" if mode.startswith("gauss_newton") else ", or use mode='finite_difference' (approximate)"
                raise CurvatureError(
                    f"the loss contains {entry.operator}, whose derivative torch computes wrong: {entry.why} "
                    f"(torch {entry.torch}). To avoid it, {entry.remedy}{or_else}"
                )
        if name.removeprefix("torch::autograd::").removesuffix("_copy") not in CHECKED:
            unknown.add(name)
    return frozenset(unknown)


class RightDerivatives(TorchFunctionMode):
    """Replaces operators, while a loss runs, by others with the same values and right derivatives in ``mode``.

    It also refuses derivatives inside the loss that `torch.func` would silently take as zero.
    """

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.mode != "finite_difference":
            if func in (torch._weight_norm, torch.ops.aten._weight_norm, torch.ops.aten._weight_norm.default):
                return _weight_norm(*args, **kwargs)
            if func in (
                torch._weight_norm_interface,
                torch.ops.aten._weight_norm_interface,
                torch.ops.aten._weight_norm_interface.default,
            ):
                return _weight_norm_interface(*args, **kwargs)
        if self.mode == "forward" and func is functional.mse_loss:
            return _mse_loss(*args, **kwargs)
        if self.mode == "forward" and func in (torch.ops.aten.mse_loss, torch.ops.aten.mse_loss.default):
            return _aten_mse_loss(*args, **kwargs)
        if self.mode in ("reverse", "forward") and func is torch.autograd.grad:
            _refuse_outside(*args, **kwargs)
        return func(*args, **kwargs)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return _weight_norm_interface(v, g, dim)[0]


def _weight_norm_interface(v: Tensor, g: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    if dim == -1:  # torch's sign for the norm of all entries
        norms = torch.linalg.vector_norm(v)
    else:
        others = [other for other in range(v.dim() + 1) if other != dim]  # never empty, which would mean all
        norms = torch.linalg.vector_norm(v.unsqueeze(-1), dim=others, keepdim=True).squeeze(-1)
    return v * (g / norms), norms


def _mse_loss(input: Tensor, target: Tensor, *deprecated: Any, reduction: str = "mean", **others: Any) -> Tensor:
    if deprecated or any(value is not None for value in others.values()):
        return functional.mse_loss(input, target, *deprecated, reduction=reduction, **others)  # type: ignore[misc]
    squares = (input - target) ** 2
    return squares.mean() if reduction == "mean" else squares.sum() if reduction == "sum" else squares


def _aten_mse_loss(self: Tensor, target: Tensor, reduction: int = 1) -> Tensor:
    return _mse_loss(self, target, reduction=("none", "mean", "sum")[reduction])


def _refuse_outside(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> None:
    """Refuse derivatives with respect to tensors from outside the transform: torch.func takes them as constants."""
    ends, starts = ((value,) if isinstance(value, Tensor) else value for value in (outputs, inputs))
    if any(map(_is_transformed, ends)) and not all(map(_is_transformed, starts)):
        raise CurvatureError(INNER_DERIVATIVES)


def _is_transformed(value: object) -> bool:
    return isinstance(value, Tensor) and torch._C._functorch.is_gradtrackingtensor(value)


INNER_DERIVATIVES = (
    "the loss takes derivatives itself by torch.autograd (as physics-informed losses do), which torch.func does not "
    "support: use mode='double_backward', or take the inner derivative by torch.func.grad or torch.func.jvp, which "
    "works in every mode"
)
