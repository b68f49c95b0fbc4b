"""An emulation of the default policy that shares no code with fpsim: plain eager PyTorch, operator by operator.

A `TorchDispatchMode` sees every operator of one step as autograd calls it. It rounds the operands of the operators that
multiply matrices with PyTorch's own conversions to FP8. An operand is a gradient if it was computed from the gradient
of the loss; the mode follows this gradient from operator to operator. Other operators run as Inductor decomposes them,
so that they sum in the order of a graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor.decomposition import select_decomp_table
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .architectures import Architecture

#: The loss and the gradients of one step.
Results = dict[str, Tensor]

aten = torch.ops.aten

#: An operator that computes one product -> the positions of its two operands.
PRODUCTS = {
    aten.mm.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.mv.default: (0, 1),
    aten.dot.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.baddbmm.default: (1, 2),
    aten.convolution.default: (0, 1),
}


class Family:
    """Tensors and all that is computed from them, known by their storage, so that views belong to the family."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._tensors: dict[int, Tensor] = {}  # the tensors stay alive, so that no address of a storage recurs
        for tensor in tensors:
            self.add(tensor)

    def add(self, tensor: Tensor) -> None:
        self._tensors[tensor.untyped_storage().data_ptr()] = tensor.detach()

    def __contains__(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._tensors


class Emulation(TorchDispatchMode):
    """Rounds the operands of matrix products: gradients to E5M2, all others to E4M3, saturating.

    A product of constants alone, such as the angles of rotary embeddings, is not rounded.

    Attributes:
        operands: the number of operands rounded so far. A call that computes two products of a convolution has four.
    """

    def __init__(self, data: Iterable[Tensor]) -> None:
        """``data``: the parameters and the inputs of the model; all other tensors that it starts with are constants."""
        super().__init__()
        self.operands = 0
        self._decompositions = select_decomp_table()
        self._data, self._gradients = Family(data), Family(())

    def begin_backward(self, gradient: Tensor) -> None:
        """Follow the gradient of the loss from here on."""
        self._data.add(gradient)
        self._gradients.add(gradient)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        parents = _tensors((args, kwargs))
        results = self._call(func, list(args), kwargs)
        for family in (self._data, self._gradients):
            if any(parent in family for parent in parents):
                for child in _tensors(results):
                    family.add(child)
        return results

    def _call(self, func: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        if func is aten.convolution_backward.default:
            return self._convolution_backward(args)
        if func not in PRODUCTS:
            return self._decomposed(func, args, kwargs)
        first, second = PRODUCTS[func]
        if args[first] not in self._data and args[second] not in self._data:
            return self._decomposed(func, args, kwargs)
        args[first], args[second] = self._rounded(args[first]), self._rounded(args[second])
        self.operands += 2
        return self._decomposed(func, args, kwargs)

    def _decomposed(self, func: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """The results of ``func`` as Inductor's decomposition computes them, if there is one."""
        if func in self._decompositions:
            with self:
                results = self._decompositions[func](*args, **kwargs)
            if results is not NotImplemented:
                return results
        return func(*args, **kwargs)

    def _convolution_backward(self, args: list[Any]) -> Any:
        rounded = [self._rounded(operand) for operand in args[:3]]
        wanted = args[-1]
        self.operands += 2 * (wanted[0] + wanted[1])
        dx, dw, _ = aten.convolution_backward.default(*rounded, *args[3:-1], [wanted[0], wanted[1], False])
        return dx, dw, args[0].sum([0, *range(2, args[0].dim())]) if wanted[2] else None

    def _rounded(self, operand: Tensor) -> Tensor:
        dtype = torch.float8_e5m2 if operand in self._gradients else torch.float8_e4m3fn
        largest = torch.finfo(dtype).max
        return operand.detach().clamp(-largest, largest).to(dtype).to(operand.dtype)


def _tensors(tree: Any) -> list[Tensor]:
    """The tensors in nested arguments or results that have elements."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.numel()]


@contextlib.contextmanager
def _products_only(model: nn.Module) -> Iterator[None]:
    """Attention and LSTMs call operators that multiply matrices, not fused ones; oneDNN would compute a whole LSTM."""
    has_lstm = any(isinstance(module, nn.LSTM) for module in model.modules())
    onednn = torch.backends.mkldnn.flags(enabled=False) if has_lstm else contextlib.nullcontext()
    with onednn, sdpa_kernel(SDPBackend.MATH):
        yield


def emulated_step(architecture: Architecture) -> tuple[Results, int]:
    """Loss and gradients of one step of a new model, and the number of operands that the emulation rounded."""
    model, inputs = architecture.build()
    with _products_only(model), Emulation([*model.parameters(), *inputs.values()]) as emulation:
        loss = model(**inputs)
        seed = torch.ones_like(loss)
        emulation.begin_backward(seed)
        loss.backward(seed)
    return results(model, loss), emulation.operands


def results(model: nn.Module, loss: Tensor) -> Results:
    """The loss, and the gradients of the parameters that have one."""
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}
