"""Curvature layer by layer: the diagonal blocks of an operator, one for each module."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fpsim.curvature.eigen import eigenpairs
from fpsim.curvature.linear import Operator, parameters_of
from fpsim.curvature.results import DensityResult, EigenResult, TraceResult, new_axes, smoothed
from fpsim.curvature.spectral_density import density
from fpsim.curvature.traces import trace
from fpsim.curvature.vectors import layers, seeded
from fpsim.showing import Shown, counted, render

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes
    from rich.table import Table


@dataclass(frozen=True, eq=False)
class LayerCurvature(Shown):
    """The curvature of one layer, with all other parameters fixed.

    Attributes:
        name: the layer.
        parameters: the names of its parameters.
        size: the number of its elements.
        eigen: the largest eigenvalues of its block.
        trace: the trace of its block.
        density: the spectral density of its block; None if it was not asked for.
    """

    name: str
    parameters: tuple[str, ...]
    size: int
    eigen: EigenResult
    trace: TraceResult
    density: DensityResult | None = None

    @property
    def products(self) -> int:
        """The number of products with the operator."""
        return self.eigen.products + self.trace.products + (self.density.products if self.density else 0)

    @property
    def cost(self) -> float:
        """The cost of the products in gradients (`Operator.cost`)."""
        return self.eigen.cost + self.trace.cost + (self.density.cost if self.density else 0.0)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why a number has not converged, in words; empty if all have."""
        return (*self.eigen.reasons, *self.trace.reasons, *(self.density.reasons if self.density else ()))

    def to_dict(self) -> dict[str, Any]:
        """Name, size, largest eigenvalue, trace with standard error, and cost."""
        return {
            "layer": self.name,
            "size": self.size,
            "largest eigenvalue": float(self.eigen.eigenvalues[0]),
            "trace": self.trace.estimate,
            "standard error": self.trace.stderr,
            "products": self.products,
            "cost": self.cost,
            "converged": not self.reasons,
        }


@dataclass(frozen=True, eq=False)
class LayersResult(Shown):
    """The curvature of each layer. ``print(result)`` shows a table.

    Attributes:
        layers: one for each layer, in the order of the parameters.
    """

    layers: tuple[LayerCurvature, ...]

    @property
    def products(self) -> int:
        """The number of products with the operator, for all layers together."""
        return sum(layer.products for layer in self.layers)

    @property
    def cost(self) -> float:
        """The cost of the products in gradients (`Operator.cost`)."""
        return sum(layer.cost for layer in self.layers)

    @property
    def converged(self) -> bool:
        """Whether all numbers of all layers have converged."""
        return not any(layer.reasons for layer in self.layers)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why ``converged`` is False, layer by layer, in words; empty if it is True."""
        return tuple(f"{layer.name}: {reason}" for layer in self.layers for reason in layer.reasons)

    def __getitem__(self, name: str) -> LayerCurvature:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(f"there is no layer {name!r}: there are {', '.join(layer.name for layer in self.layers)}")

    def rows(self) -> list[dict[str, Any]]:
        """`LayerCurvature.to_dict` of each layer."""
        return [layer.to_dict() for layer in self.layers]

    def to_pandas(self) -> pandas.DataFrame:
        """`rows` as a data frame.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError("LayersResult.to_pandas needs pandas: pip install pandas, or use rows") from error
        return pandas.DataFrame(self.rows())

    def __str__(self) -> str:
        return render(self)

    def __rich__(self) -> Table:
        from rich.table import Table

        title = (
            f"curvature of {counted(len(self.layers), 'layer')}, {counted(self.products, 'product')}, cost of "
            f"{self.cost:.4g} gradients"
        )
        table = Table(title=title, title_justify="left")
        for name, value in self.rows()[0].items():
            table.add_column(name, justify="right" if isinstance(value, int | float) else "left", overflow="fold")
        for row in self.rows():
            table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
        return table

    def plot(self, axes: Axes | None = None) -> Axes:
        """A heat map of the spectral densities, in decades; without densities, bars of the largest eigenvalues."""
        axes = axes or new_axes()
        names = [f"{layer.name} ({layer.size})" for layer in self.layers]
        if any(layer.density is None for layer in self.layers):
            axes.barh(names, [float(layer.eigen.eigenvalues[0]) for layer in self.layers])
            axes.set(xlabel="largest eigenvalue")
            axes.invert_yaxis()
            return axes
        points, heights = self.heat()
        image = axes.imshow(
            heights.clamp(min=1e-6 * float(heights.max())).log10().numpy(),
            aspect="auto",
            extent=(float(points[0]), float(points[-1]), len(names) - 0.5, -0.5),
        )
        axes.set_yticks(range(len(names)), names)
        axes.set(xlabel="eigenvalue")
        figure = axes.figure
        figure.colorbar(image, ax=axes, label="log10 of the density")
        return axes

    def heat(self, points: int = 400) -> tuple[Tensor, Tensor]:
        """The densities of all layers on one grid of eigenvalues.

        Returns:
            The grid, float64, shape ``(points,)``, and the densities, float64, shape ``(layers, points)``.

        Raises:
            ValueError: the densities were not asked for.
        """
        found = [layer.density for layer in self.layers if layer.density is not None]
        if len(found) < len(self.layers):
            raise ValueError("these layers have no densities: pass steps=60 to per_layer")
        low, high = (float(f([float(g(each.grid)) for each in found])) for f, g in ((min, torch.min), (max, torch.max)))
        grid = torch.linspace(low, high, points, dtype=torch.float64)
        width = max((high - low) / points, *(each.sigma for each in found), 0.0) or math.inf
        return grid, torch.stack([smoothed(grid, each.nodes, each.weights, width).mean(0) for each in found])


def per_layer(
    operator: Operator,
    *,
    groups: Mapping[str, Sequence[str]] | None = None,
    depth: int | None = None,
    k: int = 1,
    tol: float = 1e-2,
    max_products: int = 100,
    trace_tol: float = 0.1,
    trace_products: int = 60,
    steps: int = 0,
    probes: int = 4,
    max_probes: int | None = None,
    density_tol: float = 0.05,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> LayersResult:
    """The largest eigenvalues, the trace and the spectral density of the block of each layer.

    A block is the curvature when only this layer's parameters move. The traces of all layers add up to the trace of the
    operator, and no block has a larger eigenvalue than the operator.

    Args:
        operator: from `hessian`, `gauss_newton` or a Fisher matrix.
        groups: layer -> names of its parameters, or globs; None is one group for each module, as `layers` finds them.
        depth: as for `layers`, if there are no ``groups``.
        k: how many eigenvalues (largest first), at most the size of the smallest layer.
        tol, max_products: those of `eigenpairs`, for each layer.
        trace_tol, trace_products: ``tol`` and ``max_products`` of `trace`, for each layer. A layer of no more elements
            than ``trace_products / 2`` gets its exact trace.
        steps, probes, max_probes: those of `density`, for each layer; 0 steps leave it out.
        density_tol: ``tol`` of `density`, for each layer.
        generator: the source of random vectors; None is a fresh one with seed 0.
        progress: whether to show progress bars.

    Returns:
        A `LayersResult`. A product with a block costs as much as one with the operator (`Operator.cost`).
        `LayersResult.products` counts them.

    Raises:
        TypeError: a group is a text and no list.
        ValueError: the operator's entries are not parameters, a group names no parameter, or as the functions above.
    """
    layout = parameters_of(operator)
    given = groups
    if given is None:
        given = layers(dict(zip(layout.names, layout.values, strict=True)), depth=depth)
    if not given:
        raise ValueError("groups is empty: name at least one layer, or omit it")
    generator = seeded(generator)
    found = []
    for name, names in given.items():
        if isinstance(names, str):
            raise TypeError(f"groups has the text {names!r} for {name!r}: give a list of names or globs, [{names!r}]")
        block = operator.block(list(names))
        eigen = eigenpairs(
            block, min(k, block.size), tol=tol, max_products=max_products, generator=generator, progress=progress
        )
        sketch = block.size if 2 * block.size <= trace_products else None
        total = trace(
            block, tol=trace_tol, max_products=trace_products, sketch=sketch, generator=generator, progress=progress
        )
        spectrum = None
        if steps:
            spectrum = density(
                block,
                steps=min(steps, block.size),
                probes=probes,
                max_probes=max_probes,
                tol=density_tol,
                generator=generator,
                progress=progress,
            )
        assert block.layout is not None
        found.append(LayerCurvature(name, block.layout.names, block.size, eigen, total, spectrum))
    return LayersResult(tuple(found))
