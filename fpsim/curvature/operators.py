"""Curvature operators: Hessian, generalised Gauss-Newton and empirical Fisher of a loss, as matrix-free linear maps.

The functions here make an `Operator` from a loss that is a function of a pytree of parameters. The data are one batch
or several. Several batches are summed with the caller's weights (usually numbers of tokens), because a plain mean over
uneven batches is the curvature of another loss.

Under simulated precision (`fpsim.round` inside the loss), derivatives are those of the straight-through surrogate: the
values are rounded, and the derivative of a rounding is that of the identity. The Hessian of the surrogate is symmetric
if only the forward pass is rounded; `Operator.symmetry_error` measures it.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fpsim.curvature import products
from fpsim.curvature.data import NO_BATCH, NO_DATA, Data, Weight, Witness, call
from fpsim.curvature.linear import Operator
from fpsim.curvature.losses import INDEPENDENT, scalar_loss
from fpsim.curvature.products import MODES, Function, Mode, OutputProduct, Product, Tensors
from fpsim.curvature.second_derivatives import RightDerivatives, nodes_of, refuse_wrong
from fpsim.curvature.vectors import Layout, Params, Select, layout

#: Takes the value of the loss, or the outputs, at each evaluation.
Look = Callable[[Tensor], None]
#: From one batch to its map ``v -> A v``.
Linearise = Callable[[Any, Look], Product]


def hessian(
    loss: Callable[..., Tensor],
    params: Params,
    *,
    batches: Iterable[Any] | None = None,
    weight: Weight = None,
    select: Select = None,
    mode: Mode = "reverse",
    keep: bool | None = None,
    compile: bool = False,
    step: float | None = None,
    vector_dtype: torch.dtype | None = None,
    vector_device: torch.device | str | None = None,
) -> Operator:
    """The Hessian of ``loss`` at ``params``; for a loss that rounds, the Hessian of its straight-through surrogate.

    Args:
        loss: ``loss(params) -> scalar tensor``, or ``loss(params, batch)`` if ``batches`` are given. It depends on
            its arguments only; `functional_loss` makes such a function from a module.
        params: any pytree, usually ``dict(model.named_parameters())``; `layout` says which leaves vary. It is neither
            changed nor copied, and must not change while the operator is in use.
        batches: the data of every product: a list, or a loader that gives the same batches each time it is read. The
            operator is that of ``sum(w_b loss_b) / sum(w_b)``.
        weight: the weight of each batch: a function ``batch -> number`` (`label_count` counts a language model's
            tokens), a sequence of numbers, or ``"equal"``. Several batches require it.
        select: the parameters that vary, as for `layout`; the others are constants.
        mode: ``reverse``: vjp of grad, with a graph kept between products. ``forward``: jvp of grad, without a kept
            graph; only this mode can be compiled. ``double_backward``: autograd twice, for code that torch.func
            refuses (gradient checkpointing). ``finite_difference``: central differences of gradients, approximate
            (relative error about 1e-4 in float32, 1e-9 in float64), for fused attention kernels and operators without
            second derivatives.
        keep: whether graphs are kept between products (``reverse`` and ``double_backward``). A kept graph reduces the
            cost of a product from 3 to 2 gradients in multiplications (from 3.4 to 2.2 in time) and takes the memory
            of one graph per batch. None keeps the graph if there is one batch.
        compile: whether torch.compile compiles the product (``forward`` only), once per shape of a batch. It pays off
            after hundreds of products.
        step: the Euclidean length of the step (``finite_difference`` only); None chooses it from the dtype.
        vector_dtype: the dtype of vectors, float32 or float64; None is the widest dtype of the parameters, at least
            float32.
        vector_device: the device of vectors; None is the parameters' device. ``"cpu"`` keeps the vectors of an
            algorithm off the accelerator.

    Returns:
        An `Operator` of the parameters that vary, in the order of the tree. Parameters without influence on the loss
        have rows and columns of zeros.

    Raises:
        ValueError: the mode is unknown, options exclude each other, several batches have no weight, the batches can be
            read only once, or finite differences are asked for of a loss that rounds (they see its steps, not its
            slope).
        CurvatureError: at a product, if an operation in the loss cannot be differentiated twice in this mode, or if
            torch computes its second derivative wrong; the message names a remedy.
        FloatingPointError: at a product, if the loss is infinite or NaN.

    >>> quadratic = hessian(lambda p: (p["x"] ** 3).sum(), {"x": torch.tensor([1.0, 2.0])})
    >>> quadratic @ torch.ones(2)
    tensor([ 6., 12.])
    """
    _check_options(mode, compile, keep, step)
    arranged = layout(params, select=select, dtype=vector_dtype, device=vector_device)
    data = Data.of(batches, weight)

    def function(batch: Any, look: Look) -> Function:
        def value_at(values: Tensors) -> Tensor:
            with RightDerivatives(mode):
                value = scalar_loss(call(loss, arranged.substitute(values), batch))
            look(value)
            return value

        return value_at

    if mode == "finite_difference":
        _refuse_rounding(function(data.first(), _overlook), arranged.values)

    def linearise(batch: Any, look: Look) -> Product:
        if mode == "reverse":
            return products.reverse(function(batch, look), arranged.values)
        if mode == "double_backward":
            return products.double_backward(function(batch, look), arranged.values)
        if mode == "finite_difference":
            return products.finite_difference(function(batch, _refuse_nonfinite), arranged.values, step)
        return products.forward(function(batch, look), arranged.values)

    def examine(batch: Any, look: Look) -> None:
        unknown = _examined(function(batch, look), arranged.values, mode)
        if mode == "finite_difference":  # its evaluations are elsewhere, so this one shows whether the loss changes
            _examined(function(batch, look), arranged.values, mode)
        elif unknown:
            products.refuse_contradicted(
                function(batch, _overlook), arranged.values, linearise(batch, _overlook), sorted(unknown), mode
            )

    chosen = _compiled(loss, arranged) if compile else linearise
    kept = _keeps(mode, keep, data)
    return operator_of(chosen, examine, arranged, data, keep=kept, name="Hessian", cost=_HESSIAN_COST[mode, kept])


def gauss_newton(
    outputs: Callable[..., Tensor],
    loss: Callable[..., Tensor] | str,
    params: Params,
    *,
    batches: Iterable[Any] | None = None,
    weight: Weight = None,
    select: Select = None,
    mode: Mode = "reverse",
    keep: bool | None = None,
    vector_dtype: torch.dtype | None = None,
    vector_device: torch.device | str | None = None,
) -> Operator:
    """The generalised Gauss-Newton matrix ``J^T H J`` of ``loss(outputs(params))``.

    J is the Jacobian of the outputs; for a model that rounds, the Jacobian of its straight-through surrogate. H is the
    Hessian of the loss with respect to the outputs, at the rounded model's outputs (Schraudolph 2002, equation 4.1).
    The matrix is positive semidefinite if the loss is convex in the outputs. For cross-entropy it is the Fisher matrix.

    Args:
        outputs: ``outputs(params)`` or ``outputs(params, batch)``: a tensor, usually logits. `functional_outputs`
            makes such a function from a module.
        loss: ``loss(outputs)`` or ``loss(outputs, batch)``, a scalar tensor. Or ``"squared"``: half the squared error,
            summed over the last dimension and averaged over the others; its Hessian does not depend on the targets.
            Or a `CrossEntropy`, whose Hessian is known in closed form, for language models with large vocabularies.
        mode: ``reverse`` (two kept reverse graphs) or ``forward`` (J v by jvp, no kept graph).
        params, batches, weight, select, keep, vector_dtype, vector_device: as for `hessian`.

    Raises:
        ValueError, CurvatureError, FloatingPointError: as `hessian`.
    """
    output_product = _output_product(loss)
    if mode not in ("reverse", "forward"):
        raise ValueError(f"Gauss-Newton and Fisher products have the modes 'reverse' and 'forward', got {mode!r}")
    build = products.gauss_newton_reverse if mode == "reverse" else products.gauss_newton_forward
    arranged = layout(params, select=select, dtype=vector_dtype, device=vector_device)
    data = Data.of(batches, weight)

    def function(batch: Any, look: Look) -> Function:
        def outputs_at(values: Tensors) -> Tensor:
            with RightDerivatives(mode):
                found = call(outputs, arranged.substitute(values), batch)
            if not isinstance(found, Tensor) or not found.is_floating_point():
                kind = found.dtype if isinstance(found, Tensor) else type(found).__name__
                raise TypeError(f"the outputs must be one real floating-point tensor, got {kind}")
            look(found)
            return found

        return outputs_at

    def linearise(batch: Any, look: Look) -> Product:
        return build(function(batch, look), output_product(batch), arranged.values)

    def examine(batch: Any, look: Look) -> None:
        _examined(function(batch, look), arranged.values, f"gauss_newton_{mode}")

    kept = _keeps(mode, keep, data)
    cost = _GAUSS_NEWTON_COST[mode, kept]
    return operator_of(linearise, examine, arranged, data, keep=kept, name="Gauss-Newton", cost=cost)


def empirical_fisher(
    losses: Callable[..., Tensor],
    params: Params,
    *,
    batches: Iterable[Any] | None = None,
    weight: Weight = None,
    select: Select = None,
    mode: Mode = "reverse",
    keep: bool | None = None,
    vector_dtype: torch.dtype | None = None,
    vector_device: torch.device | str | None = None,
) -> Operator:
    """The mean outer product of per-sample gradients, ``(1/N) sum g_n g_n^T`` (Kunstner et al. 2019, equation 3).

    For losses that round, the gradients are those of the straight-through surrogate.

    Args:
        losses: ``losses(params)`` or ``losses(params, batch)``: the losses of the samples (or tokens), a tensor of
            any shape. Each element is one sample.
        mode: ``reverse`` or ``forward``, as for `gauss_newton`.
        params, batches, weight, select, keep, vector_dtype, vector_device: as for `hessian`. The weight of a batch
            should be its number of samples.

    Raises:
        ValueError, CurvatureError, FloatingPointError: as `hessian`.
    """

    operator = gauss_newton(
        losses,
        _MeanOfTerms(),
        params,
        batches=batches,
        weight=weight,
        select=select,
        mode=mode,
        keep=keep,
        vector_dtype=vector_dtype,
        vector_device=vector_device,
    )
    return replace(operator, name="empirical Fisher")


#: The cost of a product with the Hessian in gradients, counted in multiplications, by mode and whether graphs are kept.
#: A gradient has three of each layer: one forward and two backward. A product with a kept graph has six.
_HESSIAN_COST = {
    ("reverse", True): 2.0,
    ("reverse", False): 3.0,
    ("double_backward", True): 2.0,
    ("double_backward", False): 3.0,
    ("forward", False): 3.0,
    ("finite_difference", False): 2.0,
}

#: That of a product with a Gauss-Newton or Fisher matrix.
_GAUSS_NEWTON_COST = {("reverse", True): 4 / 3, ("reverse", False): 7 / 3, ("forward", False): 2.0}

#: The doubt about an operator whose graph is older than its parameters.
_PARAMETERS_MOVED = "the parameters changed in place after the first product, whose graph is kept: make a new operator"


def operator_of(
    linearise: Linearise,
    examine: Callable[[Any, Look], None],
    arranged: Layout,
    data: Data,
    *,
    keep: bool,
    name: str,
    cost: float,
) -> Operator:
    """The operator ``sum(w_b P_b) / sum(w_b)`` of the products ``P_b = linearise(batch)``.

    Before the first product, ``examine`` evaluates the loss of the first batch once, so that even a graph that is
    computed only once shows whether the loss changes from call to call. A graph that is kept is that of the parameters
    at the first product: parameters that changed in place since then are a doubt.
    """
    kept: list[tuple[Product, float]] = []
    witness = Witness()
    examined = moved = False
    versions: list[int] = []

    def terms() -> Iterator[tuple[Product, float]]:
        nonlocal examined
        witness.begin()
        for place, (batch, weight) in enumerate(data):
            witness.batch(batch)
            if not weight:
                continue
            look = partial(witness.value, place)
            if not examined:
                examine(batch, look)
                examined = True
            yield linearise(batch, look), weight

    def multiply(vector: Tensor) -> Tensor:
        nonlocal moved
        pieces = arranged.split(vector)
        total, result = 0.0, None
        moved = moved or (bool(kept) and versions != [value._version for value in arranged.values])
        if keep and not kept:
            kept.extend(terms())
            versions.extend(value._version for value in arranged.values)
            witness.begin()
            for batch, _ in data:
                witness.batch(batch)
        for product, weight in kept or terms():
            term = arranged.join(product(pieces))
            if result is None:
                result, total, only = term.mul_(weight) if data.count != 1 else term, weight, data.count == 1
            else:
                result.add_(term, alpha=weight)
                total += weight
        if result is None:
            raise ValueError(NO_DATA)
        return result if only else result.div_(total)

    def doubts() -> tuple[str, ...]:
        return (*witness.reasons, *([_PARAMETERS_MOVED] if moved else []))

    return Operator(arranged.size, multiply, arranged.dtype, arranged.device, arranged, name, doubts, cost)


def _examined(function: Function, values: Tensors, mode: str) -> frozenset[str]:
    """Evaluates ``function`` once and refuses operators with wrong second derivatives; the unknown ones.

    Raises:
        CurvatureError: an operator has a wrong second derivative in ``mode``.
        ValueError: the result does not depend on ``values``.
    """
    variables = tuple(value.detach().requires_grad_() for value in values)
    with torch.enable_grad(), products.attention_kernel(mode):
        found = function(variables)
    unknown = refuse_wrong(found, mode)
    reached = {id(getattr(node, "variable", None)) for node in nodes_of(found)}
    if not found.requires_grad or not (unknown or reached & {id(variable) for variable in variables}):
        raise ValueError(INDEPENDENT)
    return unknown


def _overlook(value: Tensor) -> None:
    """Pays no attention to a value of the loss."""


def _refuse_nonfinite(value: Tensor) -> None:
    Witness().value(None, value)


def _output_product(loss: Callable[..., Tensor] | str) -> Callable[[Any], OutputProduct]:
    """From a batch to the product with the Hessian of ``loss`` with respect to the outputs."""
    if isinstance(loss, str):
        if loss != "squared":
            raise ValueError(f"unknown loss {loss!r}: pass a function of the outputs, or 'squared'")
        return lambda batch: lambda predictions: lambda tangent: tangent / max(1, predictions[..., 0].numel())
    closed_form = getattr(loss, "output_product", None)
    if closed_form is not None:
        return closed_form

    def of_batch(batch: Any) -> OutputProduct:
        def value_at(outputs: Tensor) -> Tensor:
            with RightDerivatives("reverse"):
                value = scalar_loss(call(loss, outputs, batch))
            _refuse_nonfinite(value)
            return value

        return products.hessian_of_output(value_at)

    return of_batch


class _MeanOfTerms:
    """The loss with which `gauss_newton` gives the empirical Fisher: ``B = I / N`` for N outputs."""

    def __call__(self, terms: Tensor, batch: Any = None) -> Tensor:
        return terms.mean()

    def output_product(self, batch: Any) -> OutputProduct:
        return lambda terms: lambda tangent: tangent / max(1, terms.numel())


def _compiled(loss: Callable[..., Tensor], arranged: Layout) -> Linearise:
    """`products.forward` compiled by torch.compile; all data are arguments, so that one graph serves every batch.

    Shapes are constants (``dynamic=False``): forward mode does not trace with symbolic shapes (torch 2.13), and by
    default torch makes shapes symbolic when it sees a second one.
    """

    def product_of(values: Tensors, vector: Tensors, batch: Any) -> tuple[Tensors, Tensor]:
        def function(moved: Tensors) -> Tensor:
            with RightDerivatives("forward"):
                return call(loss, arranged.substitute(moved), batch)

        (_, value), (product, _) = products.jvp(torch.func.grad_and_value(function), (values,), (vector,))
        return product, value

    def without_batch(values: Tensors, vector: Tensors) -> tuple[Tensors, Tensor]:
        return product_of(values, vector, NO_BATCH)

    compiled = torch.compile(_with_its_own_code(product_of), fullgraph=True, dynamic=False)
    compiled_without_batch = torch.compile(_with_its_own_code(without_batch), fullgraph=True, dynamic=False)

    def linearise(batch: Any, look: Look) -> Product:
        def product(vector: Tensors) -> Tensors:
            with products.differentiable("forward"), products.PaddingIsConstant(), torch.no_grad():
                try:
                    if batch is NO_BATCH:
                        found, value = compiled_without_batch(arranged.values, vector)
                    else:
                        found, value = compiled(arranged.values, vector, batch)
                except torch._dynamo.exc.FailOnRecompileLimitHit as error:
                    raise products.CurvatureError(
                        f"the batches have more than {torch._dynamo.config.recompile_limit} shapes, each compiled "
                        "apart: pad them to a few shapes, raise torch._dynamo.config.recompile_limit, or omit compile"
                    ) from error
            look(value)
            return found

        return product

    return linearise


def _with_its_own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of ``function`` with a code object of its own: Dynamo counts and limits compilations per code object."""
    assert isinstance(function, types.FunctionType)
    return types.FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, None, function.__closure__
    )


def _check_options(mode: str, compile: bool, keep: bool | None, step: float | None) -> None:
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}: use one of {', '.join(MODES)}")
    if compile and mode != "forward":
        raise ValueError(f"compile=True needs mode='forward', got mode={mode!r}: kept graphs cannot be compiled")
    if keep and mode not in ("reverse", "double_backward"):
        raise ValueError(f"mode={mode!r} has no graph to keep: omit keep")
    if step is not None and mode != "finite_difference":
        raise ValueError(f"step is for mode='finite_difference', got mode={mode!r}")


def _keeps(mode: str, keep: bool | None, data: Data) -> bool:
    if mode not in ("reverse", "double_backward"):
        return False
    return data.count == 1 if keep is None else keep


def _refuse_rounding(function: Function, values: Tensors) -> None:
    rounding = sorted(name for name in products.operations(function, values).names if name.startswith("fpsim::"))
    if rounding:
        raise ValueError(
            f"the loss rounds ({', '.join(rounding)}), so finite differences see its steps and not its slope: "
            "use mode='reverse', which differentiates the straight-through surrogate"
        )
