"""Which operators of torch have a wrong second derivative: Hessian products against differences of first gradients.

    python -m tests.curvature.double_backward [NAME ...] [--samples 8]

It goes through the operators (`op_db`) and the modules (`module_db`) of `torch.testing`, and through operators that both
lack, in float64. For each sample it makes a scalar function of the floating-point inputs, and multiplies its Hessian with
a random vector in three ways: autograd twice, ``vjp(grad)`` and ``jvp(grad)``. The judge is the central difference of
first gradients, which shares no formula with second derivatives. A sample counts only if the function is smooth there:
differences with two steps must agree, and the first gradient must be the slope of the function.

It prints a line for each operator with an error: which way is wrong, by how much, whether the matrix is symmetric, and
what `fpsim.curvature.hessian` does (right, refused, or WRONG). It ends with exit status 1 if there is a WRONG.
"""

from __future__ import annotations

import argparse
import sys
import types
import unittest
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from fpsim.curvature import CurvatureError, hessian

Function = Callable[[Tensor], Tensor]

#: A relative error above this is wrong. Differences of smooth functions reach 1e-7.
WRONG = 1e-4
WAYS = ("double_backward", "reverse", "forward")


@dataclass(frozen=True)
class Sample:
    """A function of tensors, and a point."""

    function: Callable[..., Any]
    point: tuple[Tensor, ...]


def scalar(sample: Sample) -> tuple[Function, Tensor]:
    """The sample as a scalar function of one flat vector, with linear and quadratic terms of all outputs; its point."""
    shapes = [value.shape for value in sample.point]
    sizes = [value.numel() for value in sample.point]

    def function(vector: Tensor) -> Tensor:
        pieces = [piece.view(shape) for piece, shape in zip(vector.split(sizes), shapes, strict=True)]
        torch.manual_seed(0)
        outputs = pytree.tree_leaves(sample.function(*pieces))
        total = vector.new_zeros(())
        generator = torch.Generator().manual_seed(1)
        for output in outputs:
            if not isinstance(output, Tensor) or not (output.is_floating_point() or output.is_complex()):
                continue
            parts = torch.view_as_real(output.resolve_conj()) if output.is_complex() else output
            linear, square = torch.randn(2, *parts.shape, generator=generator, dtype=torch.float64)
            total = total + (linear * parts + 0.5 * square * parts**2).sum()
        return total

    return function, torch.cat([value.detach().reshape(-1) for value in sample.point])


def gradient(function: Function, point: Tensor) -> Tensor:
    variable = point.clone().requires_grad_()
    (found,) = torch.autograd.grad(function(variable), variable, materialize_grads=True)
    return found.detach()


def product(way: str, function: Function, point: Tensor, vector: Tensor) -> Tensor:
    """H v by torch alone."""
    if way == "reverse":
        return torch.func.vjp(torch.func.grad(function), point)[1](vector)[0]
    if way == "forward":
        return torch.func.jvp(torch.func.grad(function), (point,), (vector,))[1]
    variable = point.clone().requires_grad_()
    (first,) = torch.autograd.grad(function(variable), variable, create_graph=True, materialize_grads=True)
    if not first.requires_grad:
        return torch.zeros_like(point)
    return torch.autograd.grad(first, variable, vector, materialize_grads=True)[0]


def judged(function: Function, point: Tensor, vector: Tensor) -> Tensor | None:
    """H v by differences of first gradients, or None where the function is not smooth."""

    def difference(of: Callable[[Tensor], Any], ahead: float, behind: float) -> Any:
        return (of(point + ahead * vector) - of(point - behind * vector)) / (ahead + behind)

    first = gradient(function, point)
    rises = [difference(lambda x: gradient(function, x), *steps) for steps in ((1e-5, 1e-5), (2e-5, 2e-5), (1e-5, 0))]
    scale = 1 + float(rises[0].norm())
    slope = float(difference(lambda x: function(x).detach(), 1e-5, 1e-5))
    smooth = (
        float((rises[1] - rises[0]).norm()) <= 1e-5 * scale
        and float((rises[2] - rises[0]).norm()) <= 1e-2 * scale  # no kink of the gradient
        and abs(slope - float(first @ vector)) <= 1e-5 * (1 + abs(slope))
    )
    return rises[0] if smooth else None  # NaN is not smooth


def verdicts(sample: Sample) -> dict[str, str] | None:
    """For each way and for fpsim in each mode: ``right``, ``wrong ERROR ASYMMETRY``, or ``refused``; None: not smooth."""
    function, point = scalar(sample)
    if not point.numel():
        return None
    v, w = torch.randn(2, len(point), dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    want = judged(function, point, v)
    if want is None:
        return None
    found = {}
    for way in WAYS:
        found[way] = _verdict(lambda x, way=way: product(way, function, point, x), v, w, want)
        found["fpsim " + way] = _verdict(hessian(function, point, mode=way).matvec, v, w, want)
    return found


def _verdict(multiply: Callable[[Tensor], Tensor], v: Tensor, w: Tensor, want: Tensor) -> str:
    try:
        got = multiply(v)
    except CurvatureError:
        return "refused"
    except Exception as error:
        return f"raw {type(error).__name__}"
    error = float((got - want).norm()) / (1e-3 + float(want.norm()))
    if error <= WRONG:
        return "right"
    other = multiply(w)
    asymmetry = abs(float(w @ got - v @ other)) / (1e-30 + float(w.norm() * got.norm()))
    return f"wrong {error:.1e} {asymmetry:.0e}"


def operator_samples() -> Iterator[tuple[str, Callable[[], Iterator[Sample]]]]:
    """The operators of `op_db`, each with a function that draws its samples."""
    sys.modules.setdefault("expecttest", types.SimpleNamespace(TestCase=unittest.TestCase))  # torch.testing imports it
    from torch.testing._internal.common_methods_invocations import op_db

    for operator in op_db:
        if operator.supports_autograd and torch.float64 in operator.dtypes:
            name = operator.name + (f".{operator.variant_test_name}" if operator.variant_test_name else "")
            yield name, lambda operator=operator: _drawn(operator)


def _drawn(operator: Any) -> Iterator[Sample]:
    for drawn in operator.sample_inputs("cpu", torch.float64, requires_grad=True):
        leaves, spec = pytree.tree_flatten((drawn.input, drawn.args, drawn.kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if not places or any(leaves[i].is_complex() or leaves[i].layout != torch.strided for i in places):
            continue

        def function(*values: Tensor, leaves=leaves, spec=spec, places=places, drawn=drawn) -> Any:
            filled = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            for place, value in zip(places, values, strict=True):
                filled[place] = value
            first, args, kwargs = pytree.tree_unflatten(filled, spec)
            called = operator.gradcheck_wrapper(operator.get_op(), first, *args, **kwargs)
            return drawn.output_process_fn_grad(called)

        yield Sample(function, tuple(leaves[i].detach() for i in places))


def module_samples() -> Iterator[tuple[str, Callable[[], Iterator[Sample]]]]:
    """The modules of `module_db`, as functions of their parameters and their inputs."""
    sys.modules.setdefault("expecttest", types.SimpleNamespace(TestCase=unittest.TestCase))
    from torch.testing._internal.common_modules import module_db

    for info in module_db:
        for training in (False, True):
            yield f"{info.name} {'training' if training else 'eval'}", lambda i=info, t=training: _built(i, t)


def _built(info: Any, training: bool) -> Iterator[Sample]:
    for drawn in info.module_inputs_func(info, "cpu", torch.float64, True, training):
        if drawn.forward_input is None:
            continue
        built = drawn.constructor_input
        module = info.module_cls(*built.args, **built.kwargs).double().train(training)
        names, parameters = zip(*module.named_parameters(), strict=True) if list(module.parameters()) else ((), ())
        leaves, spec = pytree.tree_flatten((drawn.forward_input.args, drawn.forward_input.kwargs))
        places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.requires_grad and not x.is_complex()]

        def function(*values: Tensor, module=module, names=names, leaves=leaves, spec=spec, places=places) -> Any:
            filled = list(leaves)
            for place, value in zip(places, values[len(names) :], strict=True):
                filled[place] = value
            args, kwargs = pytree.tree_unflatten(filled, spec)
            buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
            state = buffers | dict(zip(names, values, strict=False))
            return torch.func.functional_call(module, state, args, kwargs)

        yield Sample(function, (*(p.detach() for p in parameters), *(leaves[i].detach() for i in places)))


def _random(*shapes: tuple[int, ...], seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in shapes)
