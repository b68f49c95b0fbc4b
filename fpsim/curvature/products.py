"""Products of second derivatives with vectors: each way to differentiate twice is one short function.

Such a function takes a scalar function of a tuple of tensors, and the values of these tensors. It returns the linear
map ``v -> H v`` on tuples of tensors. We measured which transforms may be nested: with torch 2.13 ``vjp(grad)`` and
``jvp(grad)`` are right for every operator that we tried. ``torch.func.hessian``, ``jvp(jacrev)`` and ``grad(jvp)`` are
silently wrong for layer_norm and for batch_norm in training mode (pytorch#196699, #196700): do not "simplify" to them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, cast

import torch
from torch import Tensor, func
from torch.func import grad
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fpsim.curvature.second_derivatives import INNER_DERIVATIVES, CurvatureError

Tensors = tuple[Tensor, ...]
#: A scalar function of the varying tensors.
Function = Callable[[Tensors], Tensor]
#: A linear map between tuples of tensors of the parameters' shapes.
Product = Callable[[Tensors], Tensors]

#: From outputs to the map ``u -> B u``, where B acts on tensors of the outputs' shape.
OutputProduct = Callable[[Tensor], Callable[[Tensor], Tensor]]

Mode = Literal["reverse", "forward", "double_backward", "finite_difference"]
MODES: tuple[str, ...] = ("reverse", "forward", "double_backward", "finite_difference")


def vjp(function: Callable[..., Any], *values: Any) -> tuple[Any, Callable[..., Any]]:
    """`torch.func.vjp` with the right annotation: torch's own does not say that it returns a pair."""
    value, pull = cast(tuple[Any, Callable[..., Any]], func.vjp(function, *values))
    return value, pull


def jvp(function: Callable[..., Any], values: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    """`torch.func.jvp` with the right annotation."""
    value, tangent = cast(tuple[Any, Any], func.jvp(function, values, tangents))
    return value, tangent


def reverse(function: Function, values: Tensors) -> Product:
    """``vjp(grad)`` with a kept graph: 2.2 gradients per product; it covers the most operators."""
    with differentiable("reverse"):
        _, pull = vjp(grad(function), values)

    def product(vector: Tensors) -> Tensors:
        with differentiable("reverse"):
            return pull(vector, create_graph=False)[0]

    return product


def forward(function: Function, values: Tensors) -> Product:
    """``jvp(grad)``, computed anew for each product: it keeps no graph."""

    def product(vector: Tensors) -> Tensors:
        with differentiable("forward"), PaddingIsConstant(), torch.no_grad():
            return jvp(grad(function), (values,), (vector,))[1]

    return product


def double_backward(function: Function, values: Tensors) -> Product:
    """Autograd twice with a kept graph: for code that `torch.func` refuses, such as gradient checkpointing."""
    variables = tuple(value.detach().requires_grad_() for value in values)
    with differentiable("double_backward"), torch.enable_grad():
        gradient = torch.autograd.grad(function(variables), variables, create_graph=True, materialize_grads=True)
    pairs = [index for index, piece in enumerate(gradient) if piece.requires_grad]

    def product(vector: Tensors) -> Tensors:
        if not pairs:  # the function is linear
            return tuple(torch.zeros_like(value) for value in values)
        with differentiable("double_backward"):
            return torch.autograd.grad(
                [gradient[index] for index in pairs],
                variables,
                [vector[index] for index in pairs],
                retain_graph=True,
                materialize_grads=True,
            )

    return product


def finite_difference(function: Function, values: Tensors, step: float | None = None) -> Product:
    """Central differences of the gradient along the normalised vector: approximate, two gradients per product.

    Any attention kernel may be used.

    Args:
        function: the scalar function.
        values: the point at which to differentiate; float32 or float64.
        step: the Euclidean length of the step; None is ``eps**(1/3) * max(1, |values|)``.
    """
    narrow = {value.dtype for value in values} - {torch.float32, torch.float64}
    if narrow:
        raise ValueError(f"finite differences of parameters in {narrow.pop()} are noise: use mode='reverse'")
    if step is None:
        step = _step(values)

    def gradient(scale: float, vector: Tensors) -> Tensors:
        moved = _moved(values, vector, scale)
        fixed = list(zip(moved, values, strict=True))
        with differentiable("finite_difference"), PaddingIsConstant(fixed):
            return _value_and_gradient(function, moved)[1]

    def product(vector: Tensors) -> Tensors:
        length = _length(vector)
        if length == 0:
            return tuple(torch.zeros_like(v) for v in vector)
        plus, minus = gradient(step / length, vector), gradient(-step / length, vector)
        return tuple((a - b) * (length / (2 * step)) for a, b in zip(plus, minus, strict=True))

    return product


def _step(values: Tensors) -> float:
    """The Euclidean length of a step at which differences of gradients have about the least error."""
    return max(torch.finfo(value.dtype).eps for value in values) ** (1 / 3) * max(1.0, _length(values))


def _moved(values: Tensors, vector: Tensors, scale: float) -> Tensors:
    """``values + scale * vector`` as variables of autograd."""
    return tuple((v.detach() + scale * t).requires_grad_() for v, t in zip(values, vector, strict=True))


def _value_and_gradient(function: Function, variables: Tensors) -> tuple[float, Tensors]:
    with torch.enable_grad():
        value = function(variables)
        return float(value.detach()), torch.autograd.grad(value, variables, materialize_grads=True)


#: A product counts as wrong if it differs from differences by this part of their length.
_CONTRADICTION = {torch.float64: 1e-3, torch.float32: 0.1}


def refuse_contradicted(function: Function, values: Tensors, product: Product, names: Sequence[str], mode: str) -> None:
    """Raise a `CurvatureError` if differences of gradients contradict ``product``, the Hessian's.

    Differences judge only where the function is smooth: its first gradient must be its slope, and two steps must agree.
    So a straight-through derivative, which is no slope, is never judged.

    Args:
        function, values, product: a scalar function, a point, and the map ``v -> H v`` there.
        names: the nodes whose second derivatives nobody has checked, for the message.
        mode: the mode of ``product``.
    """
    dtypes = {value.dtype for value in values}
    if not dtypes <= set(_CONTRADICTION):
        return
    limit = max(_CONTRADICTION[dtype] for dtype in dtypes)
    generator = torch.Generator().manual_seed(0)
    vector = tuple(
        torch.randn(value.shape, dtype=value.dtype, generator=generator).to(value.device) for value in values
    )
    step = _step(values)
    near, far = (finite_difference(function, values, scale * step)(vector) for scale in (1, 2))
    size, length = _length(near), _length(vector)
    _, gradient = _value_and_gradient(function, _moved(values, vector, 0.0))
    above, below = (_value_and_gradient(function, _moved(values, vector, s * step / length))[0] for s in (1, -1))
    rise = (above - below) * length / (2 * step)
    slope = sum(float((g * t).sum(dtype=torch.float64)) for g, t in zip(gradient, vector, strict=True))
    smooth = _distance(near, far) <= limit / 3 * size and abs(slope - rise) <= limit * abs(slope)
    if not smooth or size == 0:
        return
    error = _distance(product(vector), near) / size
    if error > limit:
        raise CurvatureError(
            f"the second derivative of the loss is wrong in mode={mode!r}: it differs by {error:.0%} from differences "
            f"of gradients, which are right. Nobody has checked {', '.join(names[:5])}; the backward of one of them is "
            "probably not differentiable: write it with operators of torch, or use mode='finite_difference' "
            "(approximate)"
        )


def _distance(a: Tensors, b: Tensors) -> float:
    return _length(tuple(x - y for x, y in zip(a, b, strict=True)))


def _length(tensors: Tensors) -> float:
    return sum(float(torch.linalg.vector_norm(t, dtype=torch.float64)) ** 2 for t in tensors) ** 0.5


def gauss_newton_reverse(
    outputs: Callable[[Tensors], Tensor],
    output_product: OutputProduct,
    values: Tensors,
) -> Product:
    """``v -> J^T B J v`` with kept graphs, where J is the Jacobian of ``outputs`` and B acts on outputs.

    J v comes from the transpose of the linear map ``u -> J^T u``. Two reverse passes compute it, so no operator needs
    a forward-mode rule.

    Args:
        outputs: a tensor-valued function.
        output_product: at given outputs, the map ``u -> B u``.
        values: the point at which to differentiate.
    """
    with differentiable("reverse"):
        predictions, pull = vjp(outputs, values)
        # The pull is linear in u, so any point serves; autograd only has to see that the result depends on u.
        _, push = vjp(lambda u: pull(u)[0], torch.zeros_like(predictions))
    middle = output_product(predictions.detach())

    def product(vector: Tensors) -> Tensors:
        with differentiable("reverse"):
            tangent = push(vector, create_graph=False)[0].detach()
            return pull(middle(tangent), create_graph=False)[0]

    return product


def gauss_newton_forward(
    outputs: Callable[[Tensors], Tensor],
    output_product: OutputProduct,
    values: Tensors,
) -> Product:
    """`gauss_newton_reverse` with J v by forward mode, computed anew for each product."""

    def product(vector: Tensors) -> Tensors:
        with differentiable("forward"), PaddingIsConstant():
            predictions, tangent = jvp(outputs, (values,), (vector,))
        middle = output_product(predictions.detach())
        with differentiable("forward"), PaddingIsConstant():
            _, pull = vjp(outputs, values)
            return pull(middle(tangent.detach()), create_graph=False)[0]

    return product


def hessian_of_output(loss: Callable[[Tensor], Tensor]) -> OutputProduct:
    """The output product whose B is the Hessian of ``loss`` with respect to the outputs."""

    def at(predictions: Tensor) -> Callable[[Tensor], Tensor]:
        with torch.no_grad():
            loss(predictions)  # an error of the loss itself, such as one of its labels, is no matter of derivatives
        with differentiable("reverse"):
            _, pull = vjp(grad(loss), predictions)
        return lambda tangent: pull(tangent, create_graph=False)[0]

    return at


def attention_kernel(mode: str) -> AbstractContextManager[Any]:
    """Makes `scaled_dot_product_attention` differentiable twice, as its fused kernels are not."""
    return nullcontext() if mode == "finite_difference" else sdpa_kernel(SDPBackend.MATH)


class PaddingIsConstant(TorchFunctionMode):
    """Makes the row of an embedding at its ``padding_idx`` a constant.

    Reverse mode gives this row no gradient. Forward mode (torch 2.13) nevertheless propagates its tangent, so without
    this mode the two would multiply with different matrices, and forward mode with one that is not symmetric.

    Args:
        fixed: pairs of a parameter that finite differences have moved, and the parameter before the move.
    """

    def __init__(self, fixed: Sequence[tuple[Tensor, Tensor]] = ()) -> None:
        super().__init__()
        self.fixed = fixed

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is functional.embedding:
            given = dict(zip(("input", "weight", "padding_idx"), args, strict=False)) | kwargs
            indices, padding = given["input"], given.get("padding_idx")
        elif func is torch.ops.aten.embedding.default:  # in a graph that was traced, as under a policy
            given = dict(zip(("weight", "indices", "padding_idx"), args, strict=False)) | kwargs
            indices, padding = given["indices"], given.get("padding_idx", -1)
            padding = None if padding < 0 else padding
        else:
            return result
        if padding is None:
            return result
        weight = given["weight"]
        padding = padding % weight.shape[0]
        origin = next((origin for moved, origin in self.fixed if moved is weight), None)
        constant = result.detach() if origin is None else origin[padding]
        return torch.where((indices == padding).unsqueeze(-1), constant, result)


class OperationsSeen(TorchDispatchMode):
    """Records the names of the operators that run inside it, such as ``aten::bernoulli_.float``.

    Attributes:
        names: of all operators.
        calls: name and arguments of each call of a batch normalisation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        if func.name().startswith("aten::native_batch_norm"):
            self.calls.append((func.name(), args))
        return func(*args, **(kwargs or {}))


def operations(function: Function, values: Tensors) -> OperationsSeen:
    """The operators of one forward pass of ``function``, which may take derivatives itself."""
    variables = tuple(value.detach().requires_grad_() for value in values)
    with torch.enable_grad():
        function(variables)  # a function under a policy traces itself at its first call, which fails inside the mode
        with OperationsSeen() as seen:
            function(variables)
    return seen


#: The mode to try where torch fails in another one.
_OTHER_MODE = {
    "forward": "use mode='reverse'",
    "reverse": "use mode='double_backward', or mode='finite_difference' (approximate)",
    "double_backward": "use mode='reverse', or mode='finite_difference' (approximate)",
    "finite_difference": "use mode='reverse'",
}

_REMEDIES: tuple[tuple[str, str], ...] = (
    (
        r"Tensor\.requires_grad_\(\)|setting \.requires_grad|backward\(\) called inside a functorch|"
        r"appears to not have been used in the graph|does not require grad and does not have a grad_fn",
        INNER_DERIVATIVES,
    ),
    (
        r"backward through the graph a second time",
        "the loss takes a derivative itself and frees its graph: pass create_graph=True to its torch.autograd.grad, or "
        "detach that derivative if it is a constant",
    ),
    (
        r"Nested forward mode AD",
        "the loss takes a forward-mode derivative itself, which mode='forward' cannot differentiate again: use "
        "mode='reverse'",
    ),
    (
        r"don't yet support saved tensor hooks",
        "torch.func cannot differentiate through gradient checkpointing (torch.utils.checkpoint) or other saved-tensor "
        "hooks: use mode='double_backward' with use_reentrant=False, or switch checkpointing off",
    ),
    (
        r"mutate a captured Tensor",
        "the loss writes to a tensor that it captures, as batch_norm in training mode writes its running statistics: "
        "make the loss with fpsim.curvature.functional_loss, which gives each call its own buffers",
    ),
    (
        r"double backward|compiled (?:function|autograd)",
        "compiled code cannot be differentiated twice: pass the module as it was before torch.compile "
        "(module._orig_mod); Hessian products themselves compile with mode='forward', compile=True",
    ),
    (
        r"use_reentrant=True",
        "reentrant gradient checkpointing cannot be differentiated twice: pass use_reentrant=False, and use "
        "mode='double_backward'",
    ),
    (
        r"setup_context staticmethod|must implement the jvp|generate_vmap_rule",
        "the loss contains a torch.autograd.Function that torch.func cannot transform (reentrant checkpointing is one: "
        "pass use_reentrant=False): use mode='double_backward'",
    ),
)


@contextmanager
def differentiable(mode: str) -> Iterator[None]:
    """Selects an attention kernel that fits, and turns torch's errors into a `CurvatureError` with a remedy.

    The loss itself has run before without an error, so an error inside is one of the mode.
    """
    try:
        with attention_kernel(mode):
            yield
    except (CurvatureError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, NotImplementedError) as error:
        text = str(error)
        missing = re.search(r"derivative for '?([\w:.]+)'? is not implemented|forward AD with ([\w:.]+)", text)
        if missing:
            raise CurvatureError(_underivable(missing[1] or missing[2], mode)) from error
        for pattern, remedy in _REMEDIES:
            if re.search(pattern, text, re.DOTALL):
                raise CurvatureError(f"{remedy} (torch: {text.splitlines()[0]})") from error
        raise CurvatureError(
            f"torch cannot differentiate the loss in mode={mode!r}: {_OTHER_MODE[mode]} (torch: {text.splitlines()[0]})"
        ) from error


def _underivable(name: str, mode: str) -> str:
    if "attention" in name:
        why = (
            "the loss selects a fused attention kernel, which has no second derivative: "
            "remove its sdpa_kernel(...), or set attn_implementation='eager'"
        )
    elif mode == "forward":
        why = "it has no forward-mode derivative: use mode='reverse'"
    else:
        why = "it has no second derivative: write it with other operators"
    return f"cannot differentiate twice through {name}: {why}, or use mode='finite_difference' (approximate)"
