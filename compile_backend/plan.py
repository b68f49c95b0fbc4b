"""The plan of a model under a policy, as values: sites that are rounded, and gaps that are not."""

from __future__ import annotations

from dataclasses import dataclass, field

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from fpsim.casts import Cast
from fpsim.policy.policy import KINDS
from fpsim.scaling.groups import count
from fpsim.scaling.scale import NV_RULES
from fpsim.showing import Shown, render
from fpsim.transforms.transform import Transform


@dataclass(frozen=True)
class Site:
    """An operand, or the result, of a matrix product, the result of another operation, or an activation that is saved.

    Attributes:
        path: the module, ``""`` for the root.
        operator: the aten operator, such as ``aten.mm``; for a saved activation the first that reads it in backward.
        kind: ``fprop``, ``dgrad`` or ``wgrad`` for a product; None for another operation.
        direction: ``forward`` or ``backward``.
        role: ``activation``, ``weight``, ``gradient`` or ``output`` for a value of a product; ``result`` for the result
            of another operation; ``saved`` for an activation that is kept for backward.
        shape: the shape of the value; symbolic sizes are text.
        dtype: the dtype of the value, its carrier.
        cast: how the value is rounded; None where the policy leaves it unrounded.
        contracted: the axes of an operand along which its product sums; for results and saved activations with
            scales of rows or blocks the last axis, along which these lie; empty for others.
        transform: the transform of both operands of the product before they are rounded, or None.
        epilogue: whether the scale of an operand, for NVFP4 the scale of the tensor, multiplies the result of the
            product instead of the operand.
    """

    path: str
    operator: str
    kind: str | None
    direction: str
    role: str
    shape: tuple[int | str, ...]
    dtype: str
    cast: Cast | None
    contracted: tuple[int, ...]
    transform: Transform | None = field(default=None, kw_only=True)
    epilogue: bool = field(default=False, kw_only=True)

    @property
    def scales(self) -> str:
        """The number of scales, and the axes along which they lie: ``84 along 1``.

        The number is ``?`` if a size is symbolic. The text is empty without a scale.
        """
        if self.cast is None or self.cast.scale is None:
            return ""
        sizes = [size for size in self.shape if isinstance(size, int)]
        axes = [axis for axis in self.contracted if axis < len(self.shape)]
        number = str(count(sizes, self.cast.scale, axes)) if len(sizes) == len(self.shape) else "?"
        text = f"{number} along {', '.join(map(str, axes))}" if self.cast.has_axis and axes else number
        if not self.epilogue:
            return text
        return f"{text}, 1 in the epilogue" if self.cast.scale.rule in NV_RULES else f"{text}, in the epilogue"

    @property
    def step(self) -> str:
        """The kind of the product, or the direction of another operation: one word for tables."""
        return self.kind or self.direction


@dataclass(frozen=True)
class Gap:
    """An operator that multiplies matrices and is not rounded.

    Attributes:
        path: the module, ``""`` for the root.
        operator: the operator, such as ``aten._cdist_forward``.
        reason: why it is not rounded, and how to change that.
    """

    path: str
    operator: str
    reason: str


@dataclass(frozen=True)
class Sum:
    """A matrix product whose sum has a narrow accumulator, or another sum.

    Attributes:
        path, operator: as in `Site`.
        kind: ``fprop``, ``dgrad`` or ``wgrad`` for a product, ``forward`` or ``backward`` for another sum.
        accumulator: the accumulator as text: ``hopper_fp8 promote=128``.
    """

    path: str
    operator: str
    kind: str
    accumulator: str


@dataclass(frozen=True)
class Plan(Shown):
    """All sites and gaps of a model under a policy, and the sums that have narrow accumulators.

    ``str(plan)`` and ``rich.print(plan)`` show them as tables.
    """

    sites: tuple[Site, ...]
    gaps: tuple[Gap, ...]
    sums: tuple[Sum, ...] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        rounded = sum(site.cast is not None for site in self.sites)
        table = Table(title=f"{rounded} of {len(self.sites)} values rounded", title_justify="left")
        has_scales = any(site.scales for site in self.sites)
        has_transforms = any(site.transform for site in self.sites)
        more = ["scales"] * has_scales + ["transform"] * has_transforms
        for name in ("module", "operator", "kind", "role", "shape", "carrier", "cast", *more):
            table.add_column(name, overflow="fold")
        for site in self.sites:
            shape = " x ".join(map(str, site.shape)) or "scalar"
            cast = Text(site.cast.written, style="green") if site.cast else Text("unrounded", style="yellow")
            words = (site.path or "(root)", site.operator, site.step, site.role, shape, site.dtype)
            extra = [site.scales] * has_scales + [str(site.transform or "")] * has_transforms
            table.add_row(*map(Text, words), cast, *map(Text, extra))
        yield table
        if self.sums:
            of_products = sum(each.kind in KINDS for each in self.sums)
            counts = (of_products, "products"), (len(self.sums) - of_products, "other sums")
            title = " and ".join(f"{number} {what}" for number, what in counts if number)
            sums = Table(title=f"{title} with accumulators", title_justify="left")
            for name in ("module", "operator", "kind", "accumulator"):
                sums.add_column(name, overflow="fold")
            for each in self.sums:
                sums.add_row(*map(Text, (each.path or "(root)", each.operator, each.kind, each.accumulator)))
            yield sums
        if not self.gaps:
            yield Text("no gaps: every matrix product is covered", style="green")
            return
        gaps = Table(title=f"{len(self.gaps)} gaps", title_justify="left")
        for name in ("module", "operator", "reason"):
            gaps.add_column(name, overflow="fold")
        for gap in self.gaps:
            gaps.add_row(*map(Text, (gap.path or "(root)", gap.operator, gap.reason)))  # as text: "[" is no markup
        yield gaps

    def __str__(self) -> str:
        return render(self)
