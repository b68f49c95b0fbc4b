"""Kronecker-factored approximations of the Gauss-Newton matrix, layer by layer.

Martens and Grosse 2015, section 3; convolutions and other layers that share weights in the settings *expand* and
*reduce* of Eschenhagen, Immer, Turner, Schneider, Hennig 2023, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from fpsim.curvature.data import NO_DATA, Data, Weight, Witness
from fpsim.curvature.linear import Operator
from fpsim.curvature.losses import CrossEntropy, functional_outputs
from fpsim.curvature.monte_carlo import draw_labels, generator_of
from fpsim.curvature.vectors import Layout, Select, layout
from fpsim.showing import Shown

Sharing = Literal["expand", "reduce"]


@dataclass(frozen=True, eq=False)
class _Call:
    """One call of a layer.

    Attributes:
        module: the layer.
        inputs: a copy of what the weight multiplied, float64, shape ``(samples, positions, inputs)``.
        edge: where autograd gives the gradient of the layer's output, even if the output is overwritten later.
    """

    module: nn.Module
    inputs: Tensor
    edge: Any


@dataclass(frozen=True, eq=False)
class KroneckerFactors(Shown):
    """The approximation ``B kron A`` of the block of each weight, and ``B`` of each bias.

    Attributes:
        activations: A by the name of the weight, float64, shape ``(inputs, inputs)``: the mean of ``a a^T`` over
            samples and positions (``reduce``: over samples, where a is the mean over positions). For a convolution a is
            one patch: channels, then taps.
        gradients: B by the name of the weight or bias, float64, shape ``(outputs, outputs)``: the sum of ``g g^T`` over
            samples and positions (``reduce``: over samples, where g is the sum over positions), for gradients g of the
            mean loss, in expectation over the model's own labels, which are independent from token to token.
        layout: the parameters that are covered, in the order of the model.
        missing: the names of the others: those of norms and embeddings, of grouped or transposed convolutions, and of
            subclasses of layers.
        gradient_count: how many gradients the factors cost; those of the outputs count as whole ones.
    """

    activations: Mapping[str, Tensor] = field(repr=False)
    gradients: Mapping[str, Tensor] = field(repr=False)
    layout: Layout = field(repr=False)
    missing: tuple[str, ...]
    gradient_count: int

    @property
    def cost(self) -> float:
        """The cost in gradients: `gradient_count`."""
        return float(self.gradient_count)

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
    sharing: Sharing = "expand",
    samples: int = 0,
    seed: int = 0,
) -> KroneckerFactors:
    """The Kronecker factors of the Gauss-Newton matrix, for linear layers and convolutions.

    They are exact for one sample if no position shares a weight, and for networks of linear layers without
    nonlinearities under the squared error: in the setting ``expand`` if each position has its own output, and in the
    setting ``reduce`` if the outputs are means over positions. Otherwise they are an approximation of unknown error:
    compare a product with that of `gauss_newton`.

    Args:
        model: its forward pass calls the layers. A layer that is called several times counts as sharing its weight.
        loss: a `CrossEntropy`, or ``"squared"``: half the squared error, summed over the last dimension and averaged
            over the others.
        batches, weight: as for `gauss_newton`, and as for `functional_outputs`. The first axis of the outputs is that
            of the samples, which the model treats apart.
        select: the parameters to cover, as for `layout`; None takes all that linear layers and convolutions have.
        sharing: how a layer that shares its weight over positions is approximated: ``expand`` (language models) or
            ``reduce`` (models that pool; the first axis of each layer's input is then that of the samples).
        samples: 0 takes the expectation over labels exactly. Otherwise how many labels are drawn for each token, as by
            `monte_carlo_fisher`; the expectation of B over seeds is the exact one.
        seed: of the labels.

    Returns:
        `KroneckerFactors`. For each batch they cost one gradient, which checks the layers, and one for each output of a
        sample (tokens times classes), or one for each of ``samples``.

    Raises:
        ValueError: another loss or setting; a parameter in ``select`` that has no factors, or that does not act by the
            calls of its layer alone; a model without linear layers, that is not deterministic (dropout), or that mixes
            samples (batch_norm in training mode); or as `gauss_newton`.
        FloatingPointError: an output, or its derivative by that of a layer, has infinities or NaN.
    """
    if not (isinstance(loss, CrossEntropy) or loss == "squared"):
        raise ValueError(f"factors are known for a CrossEntropy and 'squared', got {loss!r}")
    if sharing not in ("expand", "reduce"):
        raise ValueError(f"unknown sharing {sharing!r}: use 'expand' or 'reduce'")
    if samples < 0:
        raise ValueError(f"samples must not be negative, got {samples}: 0 takes the expectation exactly")
    data = Data.of(batches, weight)
    params = dict(model.named_parameters())
    of_layer, covered = _covered(model, params, select)
    outputs, total, count = functional_outputs(model), 0.0, 0
    activations: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}
    for batch, own in data:
        if not own:
            continue
        found, calls = _run(outputs, params, batch, list(of_layer))
        pulled = _Pulled(found, calls)
        _check_calls(pulled, of_layer, params, sharing)
        for module, names in of_layer.items():
            a = _inputs([call.inputs for call in calls if call.module is module], sharing)
            for name in names:
                if params[name].dim() > 1:
                    _add(activations, name, own * (a.T @ a) / len(a))
        count += 1
        draw = generator_of(seed, batch)
        for column in _columns(loss, batch, found.detach(), samples, draw):
            count += 1
            for module, rows in pulled.gradients(column).items():
                g = rows.flatten(0, 1) if sharing == "expand" else rows.sum(1)
                for name in of_layer[module]:
                    _add(gradients, name, own * (g.T @ g))
        total += own
    if not total:
        raise ValueError(NO_DATA)
    return KroneckerFactors(
        {name: matrix / total for name, matrix in activations.items()},
        {name: matrix / total for name, matrix in gradients.items()},
        covered,
        tuple(name for name in params if name not in covered.names),
        count,
    )


def _covered(
    model: nn.Module, params: Mapping[str, Tensor], select: Select
) -> tuple[dict[nn.Module, list[str]], Layout]:
    """The names of the parameters of each layer, and their layout."""
    owners = _owners(model)
    if select is None and not owners:
        raise ValueError(
            "the model has no linear layer or convolution that owns its weights alone (tied weights and subclasses of "
            "layers have no factors): use diagonal(gauss_newton(...))"
        )
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
    return of_layer, covered


def _owners(model: nn.Module) -> dict[str, nn.Module]:
    """The layer of each parameter that has factors: linear layers and plain convolutions own it alone."""
    uses: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            uses.setdefault(id(parameter), []).append((module, name))
    found = {}
    for name, parameter in model.named_parameters():
        (module, own), *others = uses[id(parameter)]
        if not others and own in ("weight", "bias") and _has_factors(module):
            found[name] = module
    return found


def _has_factors(module: nn.Module) -> bool:
    if type(module) is nn.Conv1d or type(module) is nn.Conv2d:
        return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return type(module) is nn.Linear


def _run(
    outputs: Callable[..., Tensor], params: Mapping[str, Tensor], batch: Any, modules: list[nn.Module]
) -> tuple[Tensor, list[_Call]]:
    """The outputs, and the calls of ``modules``.

    Raises:
        FloatingPointError: an output has infinities or NaN.
        ValueError: a second run has other outputs.
    """
    with _recorded(modules) as calls, torch.enable_grad():
        found = outputs(params, batch)
    if not torch.isfinite(found).all():
        raise FloatingPointError("the outputs have infinities or NaN: there is no curvature to measure")
    witness = Witness()
    witness.value(None, found)
    with torch.no_grad():
        witness.value(None, outputs(params, batch))
    if witness.reasons:
        raise ValueError(witness.reasons[0])
    return found, calls


@contextmanager
def _recorded(modules: list[nn.Module]) -> Iterator[list[_Call]]:
    """The calls of ``modules`` while the context is open."""
    calls: list[_Call] = []

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if not output.requires_grad:
            raise ValueError(f"the model calls {module} under torch.no_grad(): it has no curvature there")
        calls.append(_Call(module, _patches(module, inputs[0].detach()), get_gradient_edge(output)))

    handles = [module.register_forward_hook(record) for module in modules]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True, eq=False)
class _Pulled:
    """The outputs of a batch, which can be differentiated with respect to those of its layers' calls."""

    outputs: Tensor
    calls: list[_Call]

    def each(self, column: Tensor, others: list[Tensor] | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """The gradients ``(samples, positions, outputs)`` of all calls, float64, and those of ``others``."""
        edges: list[Any] = [*(call.edge for call in self.calls), *(others or [])]
        found = torch.autograd.grad(self.outputs, edges, column, retain_graph=True, allow_unused=True)
        rows = [
            call.inputs.new_zeros(*call.inputs.shape[:2], _width(call.module)) if g is None else _rows(call.module, g)
            for call, g in zip(self.calls, found, strict=False)
        ]
        rest = found[len(self.calls) :]
        return rows, [torch.zeros_like(p) if g is None else g for p, g in zip(others or [], rest, strict=True)]

    def gradients(self, column: Tensor) -> dict[nn.Module, Tensor]:
        """The gradients of each layer, with all its calls as further positions, or samples if these differ."""
        of_module: dict[nn.Module, list[Tensor]] = {}
        for call, rows in zip(self.calls, self.each(column)[0], strict=True):
            of_module.setdefault(call.module, []).append(rows)
        return {module: _joined(parts) for module, parts in of_module.items()}


def _check_calls(
    pulled: _Pulled, of_layer: Mapping[nn.Module, list[str]], params: Mapping[str, Tensor], sharing: str
) -> None:
    """Compare the gradients of the layers' calls with those of the weights, and with those of another sample.

    Raises:
        ValueError: a layer is not called, a parameter acts in another way than by its layer's calls, or a sample acts
            on the outputs of another one.
    """
    names = [name for own in of_layer.values() for name in own]
    idle = next(
        (own[0] for layer, own in of_layer.items() if all(call.module is not layer for call in pulled.calls)), ""
    )
    if idle:
        raise ValueError(f"the model does not call the layer of {idle}: leave it out of select")
    shape, outputs = pulled.outputs.shape, pulled.outputs
    batch = shape[0] if len(shape) > 1 else 1
    column = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(outputs)
    if batch > 1:
        column[1:] = 0
    rows, whole = pulled.each(column, [params[name] for name in names])
    expected = dict(zip(names, whole, strict=True))
    for layer, own in of_layer.items():
        parts = [(call.inputs, g) for call, g in zip(pulled.calls, rows, strict=True) if call.module is layer]
        for name in own:
            if params[name].dim() > 1:
                got = sum((g.flatten(0, 1).T @ a.flatten(0, 1) for a, g in parts), torch.zeros(()))
            else:
                got = sum((g.sum((0, 1)) for _, g in parts), torch.zeros(()))
            want = expected[name].double().reshape(got.shape)
            if float((got - want).norm()) > torch.finfo(params[name].dtype).eps ** 0.5 * float(
                got.norm() + want.norm()
            ):
                raise ValueError(
                    f"{name} does not act by the calls of its layer alone: the model uses it elsewhere too, or a hook "
                    "changes what the layer returns. Leave it out: name the other parameters in select"
                )
        for a, g in parts:
            if not torch.isfinite(g).all():
                raise FloatingPointError(
                    f"the derivative of the outputs by those of the layer of {own[0]} has infinities or NaN: there is "
                    "no curvature to measure"
                )
            if len(a) != batch and sharing == "reduce":
                raise ValueError(
                    f"the layer of {own[0]} gets {len(a)} rows for {batch} samples: sharing='reduce' needs the samples "
                    "as the first axis of each layer's input; use sharing='expand'"
                )
            if len(a) == batch > 1 and g[1:].any():
                raise ValueError(
                    f"the outputs of one sample depend on the others in the layer of {own[0]}, as through batch_norm "
                    "in training mode: call model.eval(), or give batches whose first axis is that of the samples"
                )


def _joined(parts: list[Tensor]) -> Tensor:
    """Rows of several calls: as further positions, or as further samples if their numbers differ."""
    if len({len(part) for part in parts}) == 1:
        return torch.cat(parts, dim=1)
    return torch.cat([part.flatten(0, 1) for part in parts]).unsqueeze(1)


def _inputs(parts: list[Tensor], sharing: str) -> Tensor:
    """What the weight multiplied: one row for each sample and position, or the mean over positions."""
    rows = _joined(parts)
    return rows.flatten(0, 1) if sharing == "expand" else rows.mean(1)


def _patches(module: nn.Module, x: Tensor) -> Tensor:
    """What the weight multiplies, as a float64 copy: shape ``(samples, positions, inputs)``."""
    if isinstance(module, nn.Linear):
        return _with_positions(x).to(torch.float64, copy=True)
    assert isinstance(module, nn.Conv1d | nn.Conv2d)
    lifted = x if isinstance(module, nn.Conv2d) else x.unsqueeze(-2)
    lifted = lifted if lifted.dim() == 4 else lifted.unsqueeze(0)
    sizes = {
        name: tuple(getattr(module, name)) if isinstance(module, nn.Conv2d) else (least, *getattr(module, name))
        for name, least in (("kernel_size", 1), ("dilation", 1), ("padding", 0), ("stride", 1))
    }
    return nn.functional.unfold(lifted.double(), **sizes).transpose(1, 2)


def _rows(module: nn.Module, gradient: Tensor) -> Tensor:
    """The gradients of a layer's outputs: float64, shape ``(samples, positions, outputs)``."""
    gradient = gradient.double()
    if isinstance(module, nn.Linear):
        return _with_positions(gradient)
    spatial = 2 if isinstance(module, nn.Conv2d) else 1
    batched = gradient if gradient.dim() == spatial + 2 else gradient.unsqueeze(0)
    return batched.flatten(2).transpose(1, 2)


def _with_positions(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0] if x.dim() > 1 else 1, -1, x.shape[-1])


def _width(module: nn.Module) -> int:
    assert isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)
    return module.weight.shape[0]


def _columns(
    loss: CrossEntropy | str, batch: Any, outputs: Tensor, samples: int, draw: torch.Generator
) -> Iterator[Tensor]:
    """Tensors s of the outputs' shape: the sum of ``s s^T`` is the Hessian of the loss, or its expectation is.

    A column of the exact sum has one token of each sample, because tokens of a sample may meet in a layer.
    """
    rows = outputs.reshape(-1, outputs.shape[-1])
    if isinstance(loss, CrossEntropy):
        counted = loss.counted(loss.targets_of(batch), outputs).reshape(-1)
        p = rows.softmax(-1)
        scale = (counted.to(p.dtype) / counted.sum()).sqrt().unsqueeze(-1)
    else:
        p, scale = None, outputs.new_tensor(1 / max(1, len(rows)) ** 0.5)
    classes = rows.shape[-1]
    if samples:
        labels = None if p is None else draw_labels(rows, samples, draw)
        for index in range(samples):
            if p is None or labels is None:
                part = torch.randn(rows.shape, dtype=rows.dtype, generator=draw).to(rows.device)
            else:
                part = nn.functional.one_hot(labels[:, index], classes) - p
            yield (part * scale / samples**0.5).to(outputs.dtype).view_as(outputs)
        return
    batch_size = outputs.shape[0] if outputs.dim() > 1 else 1
    token = torch.arange(len(rows), device=outputs.device).remainder(max(1, len(rows) // batch_size))
    units = torch.eye(classes, dtype=outputs.dtype, device=outputs.device)
    for place in token.unique():
        here = (token == place).to(outputs.dtype).unsqueeze(-1)
        for c in range(classes):
            part = units[c].expand_as(rows) if p is None else p[:, c : c + 1].sqrt() * (units[c] - p)
            yield (part * scale * here).view_as(outputs)


def _add(sums: dict[str, Tensor], name: str, term: Tensor) -> None:
    sums[name] = sums[name] + term if name in sums else term
