"""Kronecker-factored approximations of the Gauss-Newton matrix, layer by layer.

Martens and Grosse 2015, section 3; convolutions and other layers that share weights in the setting *expand* of
Eschenhagen, Immer, Turner, Schneider, Hennig 2023, section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fpsim.curvature.data import Data, Weight
from fpsim.curvature.linear import Operator
from fpsim.curvature.losses import CrossEntropy, functional_outputs
from fpsim.curvature.vectors import Layout, Select, layout

#: The input and output of each call of a layer.
_Calls = list[tuple[nn.Module, Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class KroneckerFactors:
    """The approximation ``B kron A`` of the block of each weight, and ``B`` of each bias.

    Attributes:
        activations: A by the name of the weight, float64, shape ``(inputs, inputs)``: the mean of ``a a^T`` over
            samples and positions. For a convolution a is one patch: channels, then taps.
        gradients: B by the name of the weight or bias, float64, shape ``(outputs, outputs)``: the sum of ``g g^T`` over
            samples and positions, for gradients g of the mean loss, in expectation over the model's own labels.
        layout: the parameters that are covered, in the order of the model.
        missing: the names of the others: those of norms and embeddings, and of grouped or transposed convolutions.
        gradient_count: how many gradients the factors cost.
    """

    activations: Mapping[str, Tensor] = field(repr=False)
    gradients: Mapping[str, Tensor] = field(repr=False)
    layout: Layout = field(repr=False)
    missing: tuple[str, ...]
    gradient_count: int

    def operator(self) -> Operator:
        """The block-diagonal matrix of all blocks; its vectors have the entries of `layout`."""
        return self._operator(lambda b, a, piece: b @ piece @ a if a is not None else b @ piece, "Kronecker factors")

    def inverse(self, damping: float) -> Operator:
        """The inverse of ``operator() + damping I``, exactly, such as a preconditioner.

        Args:
            damping: the multiple of the identity, positive, in units of the eigenvalues.

        Raises:
            ValueError: the damping is not positive.
        """
        if not damping > 0:
            raise ValueError(f"the factors are singular: damping must be positive, got {damping}")
        spectra = {id(m): torch.linalg.eigh(m) for m in (*self.activations.values(), *self.gradients.values())}

        def divide(b: Tensor, a: Tensor | None, piece: Tensor) -> Tensor:
            values, vectors = spectra[id(b)]
            if a is None:
                return vectors @ (vectors.T @ piece / (values + damping))
            others, basis = spectra[id(a)]
            return vectors @ (vectors.T @ piece @ basis / (torch.outer(values, others) + damping)) @ basis.T

        return self._operator(divide, "inverse of the Kronecker factors")

    def _operator(self, apply: Callable[[Tensor, Tensor | None, Tensor], Tensor], name: str) -> Operator:
        def multiply(vector: Tensor) -> Tensor:
            pieces = []
            for each, piece in zip(self.layout.names, self.layout.split(vector), strict=True):
                a = self.activations.get(each)
                matrix = piece.double() if a is None else piece.double().flatten(1)
                pieces.append(apply(self.gradients[each], a, matrix))
            return self.layout.join(pieces)

        return Operator(self.layout.size, multiply, self.layout.dtype, self.layout.device, self.layout, name)


def kronecker_factors(
    model: nn.Module,
    loss: CrossEntropy | Literal["squared"],
    batches: Iterable[Any],
    *,
    weight: Weight = None,
    select: Select = None,
) -> KroneckerFactors:
    """The Kronecker factors of the Gauss-Newton matrix, for linear layers and convolutions.

    They are exact for one sample, and for networks of linear layers without nonlinearities under the squared error; in
    both cases if no position shares a weight. Otherwise they are an approximation of unknown error: compare a product
    with that of `gauss_newton`.

    Args:
        model: its forward pass calls the layers. A layer that is called several times counts as sharing its weight.
        loss: a `CrossEntropy`, or ``"squared"``: half the squared error, summed over the last dimension and averaged
            over the others.
        batches, weight: as for `gauss_newton`, and as for `functional_outputs`.
        select: the parameters to cover, as for `layout`; None takes all that linear layers and convolutions have.

    Returns:
        `KroneckerFactors`. They cost one gradient for each output (class) and batch.

    Raises:
        ValueError: another loss, a weight that several modules share, a parameter in ``select`` that has no factors, a
            model without linear layers, or as `gauss_newton`.
        FloatingPointError: an output has infinities or NaN.
    """
    if not (isinstance(loss, CrossEntropy) or loss == "squared"):
        raise ValueError(f"factors are known for a CrossEntropy and 'squared', got {loss!r}")
    data = Data.of(batches, weight)
    params = dict(model.named_parameters())
    owners = _owners(model)
    covered = layout(params, select=select if select is not None else lambda name: name in owners)
    strange = [name for name in covered.names if name not in owners]
    if strange:
        raise ValueError(
            f"{', '.join(strange[:3])} belongs to no linear layer or convolution, or to several modules: leave it out "
            "of select, and use diagonal(gauss_newton(...))"
        )
    of_layer: dict[nn.Module, list[str]] = {}
    for name in covered.names:
        of_layer.setdefault(owners[name], []).append(name)
    outputs, total, count = functional_outputs(model), 0.0, 0
    activations: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}
    for batch, own in data:
        with _recorded(list(of_layer)) as calls, torch.enable_grad():
            found = outputs(params, batch)
        if not torch.isfinite(found).all():
            raise FloatingPointError("the outputs have infinities or NaN: there is no curvature to measure")
        for module, names in of_layer.items():
            used = [(x, y) for each, x, y in calls if each is module]
            if not used:
                raise ValueError(f"the model does not call the layer of {names[0]}: leave it out of select")
            rows = torch.cat([_patches(module, x) for x, _ in used]).double()
            for name in names:
                if params[name].dim() > 1:
                    _add(activations, name, float(own) * (rows.T @ rows) / len(rows))
        for column in _columns(loss, batch, found.detach()):
            count += 1
            pulled = torch.autograd.grad(found, [y for _, _, y in calls], column, retain_graph=True)
            for (module, _, _), gradient in zip(calls, pulled, strict=True):
                rows = _rows(module, gradient).double()
                for name in of_layer[module]:
                    _add(gradients, name, float(own) * (rows.T @ rows))
        total += float(own)
    return KroneckerFactors(
        {name: matrix / total for name, matrix in activations.items()},
        {name: matrix / total for name, matrix in gradients.items()},
        covered,
        tuple(name for name in params if name not in covered.names),
        count,
    )


def _owners(model: nn.Module) -> dict[str, nn.Module]:
    """The layer of each parameter that has factors: linear layers and plain convolutions own it alone."""
    uses: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            uses.setdefault(id(parameter), []).append(module)
    found = {}
    for name, parameter in model.named_parameters():
        modules = uses[id(parameter)]
        if len(modules) == 1 and _has_factors(modules[0]):
            found[name] = modules[0]
    return found


def _has_factors(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return type(module) is nn.Linear


@contextmanager
def _recorded(modules: list[nn.Module]) -> Iterator[_Calls]:
    """The calls of ``modules`` while the context is open."""
    calls: _Calls = []
    handles = [
        module.register_forward_hook(lambda each, inputs, output: calls.append((each, inputs[0].detach(), output)))
        for module in modules
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _patches(module: nn.Module, x: Tensor) -> Tensor:
    """What the weight multiplies: shape ``(samples and positions, inputs)``."""
    if isinstance(module, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    assert isinstance(module, nn.Conv1d | nn.Conv2d)
    lifted = x if isinstance(module, nn.Conv2d) else x.unsqueeze(-2)
    sizes = {
        name: tuple(getattr(module, name)) if isinstance(module, nn.Conv2d) else (least, *getattr(module, name))
        for name, least in (("kernel_size", 1), ("dilation", 1), ("padding", 0), ("stride", 1))
    }
    return nn.functional.unfold(lifted, **sizes).transpose(1, 2).flatten(0, 1)


def _rows(module: nn.Module, gradient: Tensor) -> Tensor:
    """The gradients of a layer's outputs: shape ``(samples and positions, outputs)``."""
    return (
        gradient.flatten(0, -2) if isinstance(module, nn.Linear) else gradient.flatten(2).transpose(1, 2).flatten(0, 1)
    )


def _columns(loss: CrossEntropy | str, batch: Any, outputs: Tensor) -> Iterator[Tensor]:
    """Tensors s_c of the outputs' shape: the sum of ``s_c s_c^T`` is the Hessian of each token's part of the loss."""
    classes = outputs.shape[-1]
    units = torch.eye(classes, dtype=outputs.dtype, device=outputs.device)
    if not isinstance(loss, CrossEntropy):
        for unit in units:
            yield unit.expand_as(outputs) / max(1, outputs[..., 0].numel()) ** 0.5
        return
    counted = loss.counted(loss.targets_of(batch), outputs)
    p = outputs.softmax(-1)
    scale = (counted.to(p.dtype) / counted.sum()).sqrt().unsqueeze(-1)
    for c in range(classes):
        yield p[..., c : c + 1].sqrt() * (units[c] - p) * scale


def _add(sums: dict[str, Tensor], name: str, term: Tensor) -> None:
    sums[name] = sums[name] + term if name in sums else term
