"""Which operators of torch have a wrong second derivative: Hessian products against differences of first gradients.

    python -m tests.curvature.double_backward [NAME ...] [--samples 80] [--seconds 15] [--nodes]

It goes through the operators (`op_db`) and the modules (`module_db`) of `torch.testing`, and through operators that
both lack, in float64; NAME selects those whose names contain it. For each sample it makes a scalar function of the
floating-point inputs, and multiplies its Hessian with a random vector in three ways: autograd twice, ``vjp(grad)`` and
``jvp(grad)``. It does so at the sample's own point, and at points with zeros and with equal entries, where formulas
have their exceptions. The judge is the central difference of first gradients, which shares no formula with second
derivatives. A point counts only if the function is smooth there: differences with two steps, and to one side, must
agree, the first gradient must be the slope of the function, and where a product is wrong, differences must add up.

It prints a line for each operator that is wrong: at which point, in which way, by how much, and how far from symmetric;
then what `fpsim.curvature` does in each mode (nothing is printed if it is right): ``refused`` if it raises a
`CurvatureError`, ``not finite`` if the product shows NaN, or ``WRONG``, in which case the exit status is 1. ``--nodes``
prints the names for `fpsim.curvature.checked_nodes`. All takes about ten minutes on one core.
"""

from __future__ import annotations

import argparse
import sys
import time
import types
import unittest
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from fpsim.curvature import CurvatureError, gauss_newton, hessian
from fpsim.curvature.second_derivatives import nodes_of

Function = Callable[[Tensor], Tensor]

#: A relative error above this is wrong. Differences of smooth functions reach 1e-7.
WRONG = 1e-4
WAYS = ("double_backward", "reverse", "forward")


@dataclass(frozen=True)
class Sample:
    """A function of tensors, and a point."""

    function: Callable[..., Any]
    point: tuple[Tensor, ...]


def outputs_of(sample: Sample) -> tuple[Function, Tensor]:
    """All floating-point outputs of the sample as one flat real vector, a function of one flat vector; its point."""
    shapes = [value.shape for value in sample.point]
    sizes = [value.numel() for value in sample.point]

    def function(vector: Tensor) -> Tensor:
        pieces = [piece.view(shape) for piece, shape in zip(vector.split(sizes), shapes, strict=True)]
        torch.manual_seed(0)
        outputs = [x for x in pytree.tree_leaves(sample.function(*pieces)) if isinstance(x, Tensor)]
        # the factor gives backward a tensor of its own, which can be viewed as complex numbers
        real = [torch.view_as_real(x.resolve_conj()) * 1.0 if x.is_complex() else x for x in outputs]
        return torch.cat([vector.new_zeros(1), *(x.reshape(-1) for x in real if x.dtype == torch.float64)])

    return function, torch.cat([value.detach().reshape(-1) for value in sample.point])


def scalar(sample: Sample) -> tuple[Function, Tensor]:
    """The sample as a scalar function of one flat vector, with linear and quadratic terms of all outputs; its point."""
    outputs, point = outputs_of(sample)

    def function(vector: Tensor) -> Tensor:
        found = outputs(vector)
        generator = torch.Generator().manual_seed(1)
        linear, square = torch.randn(2, len(found), generator=generator, dtype=torch.float64)
        return (linear * found + 0.5 * square * found**2).sum()

    return function, point


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
        and float((rises[2] - rises[0]).norm()) <= 2e-3 * scale  # no kink of the gradient
        and abs(slope - float(first @ vector)) <= 1e-5 * (1 + abs(slope))
    )
    return rises[0] if smooth else None  # NaN is not smooth


def verdicts(sample: Sample) -> dict[str, str] | None:
    """For each way, and for fpsim in each mode, what came out if it is not right; None: the function is not smooth."""
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
    outputs, _ = outputs_of(sample)
    tangent = (outputs(point + 1e-6 * v) - outputs(point - 1e-6 * v)).detach() / 2e-6
    variable = point.clone().requires_grad_()
    (pulled,) = torch.autograd.grad(outputs(variable), variable, tangent, materialize_grads=True)
    for mode in ("reverse", "forward"):
        operator = gauss_newton(outputs, lambda x: 0.5 * x.square().sum(), point, mode=mode)
        found["fpsim gauss_newton " + mode] = _verdict(operator.matvec, v, w, pulled)
    wrong = {name: verdict for name, verdict in found.items() if verdict != "right"}
    if any(verdict.startswith("WRONG") for verdict in wrong.values()):
        # relu of a product is smooth along each line through zero, but has no Hessian there
        others = [judged(function, point, along) for along in (w, v + w)]
        if any(other is None for other in others) or float((want + others[0] - others[1]).norm()) > 1e-3 * (
            1 + float(want.norm())
        ):
            return None
    return wrong


def _verdict(multiply: Callable[[Tensor], Tensor], v: Tensor, w: Tensor, want: Tensor) -> str:
    try:
        got = multiply(v)
    except CurvatureError:
        return "refused"
    except ValueError as error:
        return "right" if "does not depend" in str(error) and not want.any() else "ValueError"
    except Exception as error:
        return type(error).__name__
    if not float(got.abs().max()) < 1e15:  # a formula with a tiny constant in a denominator
        return "not finite"
    error = float((got - want).norm()) / (1e-3 + float(want.norm()))
    if error <= WRONG:
        return "right"
    other = multiply(w)
    asymmetry = abs(float(w @ got - v @ other)) / (1e-30 + float(w.norm() * got.norm()))
    return f"WRONG by {error:.0e}, asymmetry {asymmetry:.0e}"


def points_of(sample: Sample) -> Iterator[tuple[str, Sample]]:
    """The sample at its own point, and at points where formulas have their exceptions."""
    yield "drawn", sample
    for name, place in (
        ("some zeros", lambda x: x.where(torch.arange(x.numel()).view(x.shape) % 3 > 0, 0.0)),
        ("zero", torch.zeros_like),
        ("equal", lambda x: torch.full_like(x, 0.5)),
    ):
        yield name, Sample(sample.function, tuple(place(value) for value in sample.point))


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
        if drawn.forward_input is None or "Lazy" in info.name:
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


def _random(*shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes)


#: Functions whose operators neither list of torch.testing has, or has not in this form, and the shapes of their inputs.
MORE: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "_weight_norm dim=0": (lambda v, g: torch._weight_norm(v, g, 0), ((3, 4), (3, 1))),
    "_weight_norm dim=1": (lambda v, g: torch._weight_norm(v, g, 1), ((3, 4), (1, 4))),
    "_weight_norm dim=-1": (lambda v, g: torch._weight_norm(v, g, -1), ((3, 4), ())),
    "_weight_norm of a convolution": (lambda v, g: torch._weight_norm(v, g, 0), ((3, 2, 2), (3, 1, 1))),
    "_weight_norm of a vector": (lambda v, g: torch._weight_norm(v, g, 0), ((3,), (3,))),
    "_weight_norm_interface": (lambda v, g: torch._weight_norm_interface(v, g, 0)[0], ((3, 4), (3, 1))),
    "norm_except_dim": (lambda v: torch.norm_except_dim(v, 2, 0), ((3, 4),)),
    "max_pool2d": (lambda x: functional.max_pool2d(x, 2), ((1, 2, 4, 4),)),
    "antialiased bicubic": (
        lambda x: functional.interpolate(x, scale_factor=0.5, mode="bicubic", antialias=True),
        ((1, 1, 4, 4),),
    ),
    "conv_tbc": (lambda x, w, b: torch.conv_tbc(x, w, b), ((4, 2, 3), (2, 3, 2), (2,))),
    "rms_norm": (lambda x, w: functional.rms_norm(x, (4,), w), ((3, 4), (4,))),
    "packed sequence": (
        lambda x: nn.utils.rnn.pack_padded_sequence(x, torch.tensor([3, 2])).data,
        ((3, 2, 2),),
    ),
    "ctc_loss": (
        lambda x: functional.ctc_loss(
            x.log_softmax(-1), torch.tensor([[1, 2]]), torch.tensor([5]), torch.tensor([2]), reduction="sum"
        ),
        ((5, 1, 3),),
    ),
    "cdist at zero distance": (lambda x: torch.cdist(x, x), ((3, 2),)),
    "lstm_cell": (
        lambda x, h, c, w, u: torch.lstm_cell(x, (h, c), w, u),
        ((2, 3), (2, 2), (2, 2), (8, 3), (8, 2)),
    ),
    "bilinear": (lambda x, y, w: functional.bilinear(x, y, w), ((2, 3), (2, 2), (4, 3, 2))),
}


def more_samples() -> Iterator[tuple[str, Callable[[], Iterator[Sample]]]]:
    """The functions of `MORE`."""
    for name, (function, shapes) in MORE.items():
        yield name, lambda function=function, shapes=shapes: iter([Sample(function, _random(*shapes))])


def sweep(
    name: str, draw: Callable[[], Iterator[Sample]], samples: int, seconds: float, nodes: set[str]
) -> dict[str, str]:
    """The verdicts other than right for the samples of one operator; its autograd nodes are added to ``nodes``."""
    worst: dict[str, str] = {}
    end = time.monotonic() + seconds
    for count, drawn in enumerate(draw()):
        if count == samples or time.monotonic() > end:
            break
        if sum(value.numel() for value in drawn.point) > 3000:
            continue
        for where, sample in points_of(drawn):
            try:
                found = verdicts(sample)
            except Exception as error:
                if where == "drawn":
                    worst.setdefault("judge", f"{type(error).__name__}: {str(error)[:80]}")
                continue
            if found is None:
                continue
            function, point = scalar(sample)
            nodes |= {node.name().removesuffix("_copy") for node in nodes_of(function(point.requires_grad_()))}
            for way, verdict in found.items():
                if way not in worst or ("WRONG" in verdict and "WRONG" not in worst[way]):
                    worst[way] = f"{verdict} ({where})" if "WRONG" in verdict else verdict
    return worst


def main() -> int:
    """Runs the sweep and prints its findings; 1 if `fpsim.curvature` is wrong somewhere."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="parts of names of operators; all if omitted")
    parser.add_argument("--samples", type=int, default=80, help="the most samples of each operator")
    parser.add_argument("--seconds", type=float, default=15, help="the most seconds for each operator")
    parser.add_argument("--nodes", action="store_true", help="print the nodes of the graphs that were checked")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    nodes: set[str] = set()
    total = wrong = 0
    for source in (more_samples, operator_samples, module_samples):
        for name, draw in source():
            if options.names and not any(part in name for part in options.names):
                continue
            total += 1
            found = sweep(name, draw, options.samples, options.seconds, nodes)
            wrong += any("WRONG" in verdict for way, verdict in found.items() if way.startswith("fpsim"))
            if found:
                print(f"{name}: " + "; ".join(f"{way}: {verdict}" for way, verdict in found.items()), flush=True)
    if options.nodes:
        print(*sorted(nodes))
    print(f"torch {torch.__version__}: {total} operators, fpsim.curvature is wrong for {wrong}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
