"""What the backend did to a model, as values: sites that are rounded, gaps that are not."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class Site:
    """One operand, or the result, of one matrix product, or a result of another operation.

    Attributes:
        path: the module, ``""`` for the root.
        operator: the aten operator, such as ``aten.mm``.
        kind: ``fprop``, ``dgrad`` or ``wgrad``; of another operation ``forward`` or ``backward``.
        role: ``activation``, ``weight``, ``gradient`` or ``output``; of another operation ``result``.
        shape: of the value; symbolic sizes as text.
        dtype: of the value, the carrier.
        cast: ``format/rounding/overflow``; None where the policy leaves it unrounded.
    """

    path: str
    operator: str
    kind: str
    role: str
    shape: tuple[int | str, ...]
    dtype: str
    cast: str | None


@dataclass(frozen=True)
class Gap:
    """Something that multiplies matrices and is not rounded.

    Attributes:
        path: the module, ``""`` for the root.
        operator: the operator.
        reason: why it is not rounded, and what would change that.
    """

    path: str
    operator: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """All sites and gaps of a model under a policy; ``str(plan)`` and ``rich.print(plan)`` show them as tables."""

    sites: tuple[Site, ...]
    gaps: tuple[Gap, ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        rounded = sum(site.cast is not None for site in self.sites)
        table = Table(title=f"{rounded} of {len(self.sites)} values rounded", title_justify="left")
        for name in ("module", "operator", "kind", "role", "shape", "carrier", "cast"):
            table.add_column(name, overflow="fold")
        for site in self.sites:
            shape = " x ".join(map(str, site.shape)) or "scalar"
            cast = Text(site.cast, style="green") if site.cast else Text("unrounded", style="yellow")
            words = (site.path or "(root)", site.operator, site.kind, site.role, shape, site.dtype)
            table.add_row(*map(Text, words), cast)
        yield table
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


def render(value: object, width: int = 140) -> str:
    """A rich renderable as plain text."""
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(value)
    return capture.get().rstrip()
