"""Matrix-free linear operators, the input of the algorithms of this package.

An `Operator` multiplies flat vectors and knows nothing about networks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fpsim.curvature.vectors import Layout, Select, dot, gaussian, norm, seeded

if TYPE_CHECKING:
    import numpy as np
    from scipy.sparse.linalg import LinearOperator

CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class Operator:
    """A square matrix that is known by its products with vectors.

    Algebra makes new operators and costs no products: ``-A``, ``A + B``, ``A - B``, ``2 * A``, ``A + s`` (the scalar
    ``s`` times the identity), ``A.deflate(...)``, ``A.block(...)``; ``A @ v`` is `matvec` or `matmat`.

    Attributes:
        size: the number of rows and of columns.
        multiply: ``v -> A v`` on tensors of shape ``(size,)`` in ``dtype`` on ``device``.
        dtype: the dtype of vectors, float32 or float64.
        device: the device of vectors.
        layout: which parameters the entries of a vector belong to; None if they are not parameters.
        name: the name in messages and plots.
        doubts: why the operator is not the matrix of one function, as far as its products have shown: the loss or
            the data changed. Results that have doubts have not converged.
        cost: the cost of a product in gradients of the same loss on the same data, counted in multiplications: those
            of a network of linear layers. Times have about the same ratio. 0 for a matrix.
    """

    size: int
    multiply: Callable[[Tensor], Tensor] = field(repr=False)
    dtype: torch.dtype = torch.float64
    device: torch.device = CPU
    layout: Layout | None = field(default=None, repr=False)
    name: str = "operator"
    doubts: Callable[[], tuple[str, ...]] = field(default=tuple, repr=False)
    cost: float = 0.0

    @classmethod
    def of_matrix(cls, matrix: Tensor) -> Operator:
        """The operator of a dense square ``matrix``, shape ``(size, size)``, float32 or float64.

        Raises:
            ValueError: the matrix is not square, or has another dtype.

        >>> Operator.of_matrix(torch.eye(2)) @ torch.tensor([1.0, 2.0])
        tensor([1., 2.])
        """
        if matrix.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"a matrix is float32 or float64, got {matrix.dtype}: pass matrix.double()")
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"an operator is square, got a matrix of shape {tuple(matrix.shape)}")
        return cls(matrix.shape[0], lambda v: matrix @ v, matrix.dtype, matrix.device, name="matrix")

    def matvec(self, vector: Tensor) -> Tensor:
        """``A v``: shape ``(size,)``, in the operator's dtype and on its device.

        Args:
            vector: shape ``(size,)``, any floating-point dtype, any device. `Layout.flatten` makes one of a pytree.

        Raises:
            ValueError: ``vector`` has another shape.
        """
        if not isinstance(vector, Tensor) or vector.shape != (self.size,):
            got = f"shape {tuple(vector.shape)}" if isinstance(vector, Tensor) else type(vector).__name__
            raise ValueError(f"expected a vector of shape ({self.size},), got {got}: use operator.layout.flatten(tree)")
        return self.multiply(vector.detach().to(dtype=self.dtype, device=self.device))

    def matmat(self, matrix: Tensor) -> Tensor:
        """``A V``, one product per column; both have shape ``(size, k)``.

        The columns are not batched: with a kept graph, vmap over columns saves no time on CPUs and costs memory
        (measured: 2.05 to 2.2 gradients per vector at every width).
        """
        if matrix.ndim != 2 or matrix.shape[0] != self.size:
            raise ValueError(f"expected a matrix of shape ({self.size}, k), got {tuple(matrix.shape)}")
        if matrix.shape[1] == 0:
            return torch.empty(self.size, 0, dtype=self.dtype, device=self.device)
        return torch.stack([self.matvec(column) for column in matrix.T], dim=1)

    def __matmul__(self, other: Tensor) -> Tensor:
        return self.matvec(other) if other.ndim == 1 else self.matmat(other)

    def __neg__(self) -> Operator:
        return -1.0 * self

    def __mul__(self, scale: float) -> Operator:
        return replace(self, multiply=lambda v: self.multiply(v) * scale, name=f"{scale:g} * {self.name}")

    __rmul__ = __mul__

    def __add__(self, other: float | Operator) -> Operator:
        """``A + B``; for a number ``s``, the shifted operator ``A + s I``."""
        if isinstance(other, Operator):
            if other.size != self.size:
                raise ValueError(f"cannot add operators of sizes {self.size} and {other.size}")
            added = lambda v: self.multiply(v) + other.matvec(v).to(dtype=self.dtype, device=self.device)  # noqa: E731
            return replace(
                self,
                multiply=added,
                name=f"({self.name} + {other.name})",
                doubts=lambda: (*self.doubts(), *other.doubts()),
                cost=self.cost + other.cost,
            )
        return replace(self, multiply=lambda v: self.multiply(v) + other * v, name=f"({self.name} + {other:g} I)")

    __radd__ = __add__

    def __sub__(self, other: float | Operator) -> Operator:
        return self + (-other)

    def deflate(self, vectors: Tensor, values: Tensor | Sequence[float]) -> Operator:
        """``A - V diag(values) V^T``: without the given eigenpairs, so that others have the extreme eigenvalues.

        Args:
            vectors: shape ``(size, k)``, orthonormal columns, as `EigenResult.eigenvectors`.
            values: the ``k`` eigenvalues.
        """
        basis = vectors.to(dtype=self.dtype, device=self.device)
        scale = torch.as_tensor(values, dtype=self.dtype, device=self.device)
        if basis.ndim != 2 or basis.shape[0] != self.size or scale.shape != (basis.shape[1],):
            raise ValueError(
                f"deflation needs vectors of shape ({self.size}, k) and k values, "
                f"got {tuple(basis.shape)} and {tuple(scale.shape)}"
            )
        return replace(
            self,
            multiply=lambda v: self.multiply(v) - basis @ (scale * (basis.T @ v)),
            name=f"deflated {self.name}",
        )

    def block(self, select: Select) -> Operator:
        """The diagonal block of the parameters that ``select`` names; its vectors have only their entries.

        A product costs as much as one with the whole operator; an operator made with ``select`` has cheaper products.
        `layers` groups parameters by module.

        Raises:
            ValueError: a glob matches no name, or the operator's entries are not parameters.
        """
        if self.layout is None:
            raise ValueError(f"{self.name} has no layout of parameters, which a block by name needs")
        mask, inner = self.layout.mask(select), self.layout.block(select)

        def multiply(vector: Tensor) -> Tensor:
            padded = torch.zeros(self.size, dtype=self.dtype, device=self.device)
            padded[mask] = vector
            return self.multiply(padded)[mask]

        return replace(self, size=inner.size, multiply=multiply, layout=inner, name=f"block of {self.name}")

    def to_dense(self) -> Tensor:
        """The matrix, shape ``(size, size)``; it takes ``size`` products."""
        return self.matmat(torch.eye(self.size, dtype=self.dtype, device=self.device))

    def to_scipy(self, dtype: str | type[np.generic] = "float64") -> LinearOperator:
        """A `scipy.sparse.linalg.LinearOperator` on numpy vectors of ``dtype``, for `eigsh`, `cg`, `minres`.

        It is declared to be its own adjoint. Where gradients are rounded, check `symmetry_error` first.
        """
        import numpy as np
        from scipy.sparse.linalg import LinearOperator

        def multiply(vector: np.ndarray) -> np.ndarray:
            tensor = torch.from_numpy(np.ascontiguousarray(vector).reshape(self.size))
            return self.matvec(tensor).cpu().numpy().astype(dtype)

        return LinearOperator((self.size, self.size), matvec=multiply, rmatvec=multiply, dtype=np.dtype(dtype))

    def symmetry_error(self, *, pairs: int = 1, generator: torch.Generator | None = None) -> float:
        """An estimate of ``|A - A^T| / |A|`` (Frobenius norms) from two products per pair of random vectors.

        For standard normal v and w, ``v.Aw - w.Av`` has variance ``|A - A^T|^2`` and ``|Av|^2`` has mean ``|A|^2``, so
        the ratio of root mean squares estimates the relative asymmetry at every size. Floating-point errors alone give
        about 1e-16 in float64 and 1e-6 in float32. For a loss with rounded gradients, the estimate has the size of
        the rounding errors.

        Args:
            pairs: the number of pairs; the estimate's relative spread is about ``1 / sqrt(2 * pairs)``.
            generator: the source of the vectors; None is a fresh one with seed 0.
        """
        generator = seeded(generator)
        numerator = denominator = 0.0
        for _ in range(pairs):
            v, w = (gaussian(self.size, self.dtype, self.device, generator) for _ in range(2))
            av, aw = self.matvec(v), self.matvec(w)
            numerator += (dot(v, aw) - dot(w, av)) ** 2
            denominator += (norm(av) ** 2 + norm(aw) ** 2) / 2
        return (numerator / denominator) ** 0.5 if denominator else 0.0


#: The largest asymmetry, `Operator.symmetry_error`, that rounding errors explain, by the dtype of the parameters.
_SYMMETRY = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def symmetry_tolerance(operator: Operator) -> float:
    """The largest relative asymmetry of ``operator`` that rounding errors explain."""
    dtypes = [operator.dtype] if operator.layout is None else [value.dtype for value in operator.layout.values]
    return max(_SYMMETRY.get(dtype, 1e-1) for dtype in dtypes)


def parameters_of(operator: Operator) -> Layout:
    """The parameters that the entries of ``operator`` belong to.

    Raises:
        ValueError: they are not parameters, or it is a matrix and no operator.
    """
    layout = getattr(operator, "layout", None)
    if not isinstance(layout, Layout):
        name = getattr(operator, "name", None) or type(operator).__name__
        raise ValueError(f"{name} has no layout of parameters: make it with hessian(...) or gauss_newton(...)")
    return layout
