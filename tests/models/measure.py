"""Measurements of one architecture: sites, gaps, graph breaks, escapes, training, and the bits of one step."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch._inductor import config as inductor_config

import fpsim
from fpsim.compile_backend import Audit, Plan

from .architectures import Architecture, Inputs
from .emulation import Results, emulated_step, results

STEPS, LEARNING_RATE = 3, 1e-2

#: The operator of a graph break in the gaps of `fpsim.explain`.
GRAPH_BREAK = "(graph break)"


@dataclass
class Row:
    """The measurements of one architecture; None if an error prevented one.

    Attributes:
        architecture: the model.
        parameters: the number of its parameters.
        plan: the result of `fpsim.explain`.
        aten_equal: whether loss and gradients with `atens_kernels` are those of ``fpsim_eager``, bit for bit.
        difference: `largest_difference` of loss and gradients from those of ``fpsim_eager`` when Inductor generates its
            own kernels; 0 only if all bits are equal.
        emulated: `largest_difference` of ``fpsim_eager`` from `emulated_step`; 0 only if all bits are equal.
        losses: the loss of each training step.
        audit: the result of `fpsim.audit`.
        errors: the name of a failed attempt -> the first line of its error.
    """

    architecture: Architecture
    parameters: int = 0
    plan: Plan | None = None
    aten_equal: bool | None = None
    difference: float | None = None
    emulated: float | None = None
    losses: tuple[float, ...] = ()
    audit: Audit | None = None
    errors: dict[str, str] = field(default_factory=dict)

    @property
    def gaps(self) -> Counter[tuple[str, str]]:
        """How often each (operator, reason) occurs among the gaps, without graph breaks."""
        gaps = self.plan.gaps if self.plan else ()
        return Counter((gap.operator, gap.reason) for gap in gaps if gap.operator != GRAPH_BREAK)

    @property
    def breaks(self) -> list[str]:
        """The reason of each graph break."""
        gaps = self.plan.gaps if self.plan else ()
        return [gap.reason.split(": code there runs")[0] for gap in gaps if gap.operator == GRAPH_BREAK]

    @property
    def rounded(self) -> int:
        """The number of operands that are rounded."""
        return sum(site.cast is not None for site in self.plan.sites) if self.plan else 0

    @property
    def escaped(self) -> int:
        """The number of matrix products of one step that were not rounded."""
        return sum(escape.count for escape in self.audit.escaped) if self.audit else 0

    @property
    def trains(self) -> bool:
        """Whether the loss is finite and falls."""
        return len(self.losses) == STEPS and all(map(math.isfinite, self.losses)) and self.losses[-1] < self.losses[0]

    @contextlib.contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Record an error of the block in `errors`, and go on."""
        try:
            yield
        except Exception as error:  # every error of a model or a compiler is a row of the table
            self.errors[name] = first_line(error)


def first_line(error: Exception) -> str:
    """The first line of the error that `torch.compile` may have wrapped."""
    inner = getattr(error, "inner_exception", None) or error
    return f"{type(inner).__name__}: {(str(inner).strip().splitlines() or [''])[0]}"


def measure(architecture: Architecture, report: Callable[[str], None] = lambda stage: None) -> Row:
    """The row of ``architecture``; ``report`` gets the name of each stage."""
    row = Row(architecture)
    with deterministic():
        with row.attempt("explain"):
            report("explain")
            model, inputs = architecture.build()
            row.parameters = sum(parameter.numel() for parameter in model.parameters())
            torch._dynamo.reset()
            row.plan = fpsim.explain(model, **inputs)
        with row.attempt("compile"):
            report("interpret")
            interpreted = first_step(architecture, "fpsim_eager")
            report("emulate")
            row.emulated = difference(interpreted, emulated_step(architecture)[0])
            report("compile for aten")
            with atens_kernels():
                row.aten_equal = same_bits(first_step(architecture, "fpsim"), interpreted)
            report("compile and train")
            _train(row, interpreted)
    return row


def _train(row: Row, interpreted: Results) -> None:
    """Fill in the measurements of a compiled model."""
    torch._dynamo.reset()
    model, inputs = row.architecture.build()
    compiled = torch.compile(model, backend="fpsim")
    row.audit = fpsim.audit(compiled, **inputs)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
    for _ in range(STEPS):
        computed = step(model, compiled, inputs)
        if not row.losses:
            row.difference = difference(computed, interpreted)
        row.losses += (float(computed["loss"]),)
        optimizer.step()


def first_step(architecture: Architecture, backend: str) -> Results:
    """Loss and gradients of a newly built and compiled model."""
    torch._dynamo.reset()
    model, inputs = architecture.build()
    return step(model, torch.compile(model, backend=backend), inputs)


def step(model: nn.Module, compiled: Callable[..., Tensor], inputs: Inputs) -> Results:
    """Loss and gradients of ``model``, computed by ``compiled``."""
    model.zero_grad(set_to_none=True)
    loss = compiled(**inputs)
    loss.backward()
    return results(model, loss)


def same_bits(ours: Results, others: Results) -> bool:
    """Whether all results have the same bits, signs of zeros and NaNs included."""
    if ours.keys() != others.keys():
        return False
    return all(torch.equal(ours[name].view(torch.int32), others[name].view(torch.int32)) for name in ours)


def difference(ours: Results, others: Results) -> float:
    """0 if all bits are equal, else `largest_difference`."""
    return 0.0 if same_bits(ours, others) else largest_difference(ours, others)


def largest_difference(ours: Results, others: Results) -> float:
    """The relative difference of the losses, or the largest difference of gradients relative to the largest element.

    The largest element is that of all gradients. Some gradients, such as that of a bias before a normalisation, are
    zero up to rounding errors, so a difference relative to their own tensor means nothing.
    """
    differences = {name: float((ours[name] - other).abs().max()) for name, other in others.items()}
    loss = differences.pop("loss") / float(others["loss"].abs())
    return max(loss, max(differences.values()) / max(float(others[name].abs().max()) for name in differences))


def atens_kernels() -> contextlib.AbstractContextManager[None]:
    """Inductor calls aten's kernels on tensors with the model's layout, so that sums have the interpreter's order."""
    return inductor_config.patch(fallback_by_default=True, layout_optimization=False)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Deterministic algorithms and one thread."""
    threads, before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.set_num_threads(threads)
