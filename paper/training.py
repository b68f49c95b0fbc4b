"""One training run as a pure function of a frozen configuration and the data.

The recipe is that of nanoGPT and TinyLlama, the code bases the paper names: AdamW with betas (0.9, 0.95), weight decay
0.1 on matrices, gradient norm clipped at 1, linear warmup, cosine decay to a tenth. Precision enters only through
`compile_loss`: a run without a policy is plain Inductor, any other is ``torch.compile(backend="fpsim")``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .data import Data, batches, validation_batches
from .models import LanguageModel, ModelConfig, llama

#: Inputs and targets to the loss.
Loss = Callable[[Tensor, Tensor], Tensor]
#: A module and the policy's options (None: no simulation) to the compiled loss; the seam for other compilers.
Compile = Callable[[nn.Module, Mapping[str, object] | None], Loss]


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run, apart from the text.

    Attributes:
        model: sizes of the network.
        options: fields of the simulated policy, as ``torch.compile(backend="fpsim", options=...)`` takes them;
            ``{}`` is the backend's default, None is no simulation: plain Inductor in float32.
        steps: optimizer steps, at least 1.
        batch: windows per step.
        learning_rate: peak of the schedule.
        warmup: steps of linear warmup.
        weight_decay: AdamW's, for parameters with two or more dimensions.
        clip: largest gradient norm.
        loss_scale: factor on the loss in the backward pass, divided out of the gradients before they are clipped. It
            keeps small gradients above the smallest number of a narrow format. A power of two changes no bit of a run
            whose gradients neither over- nor underflow.
        validate_every: steps between validations; the last step is always validated.
        validation_batches: fixed batches per validation.
        seed: of the weights and the order of the data.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    options: Mapping[str, object] | None = field(default=None, hash=False)
    steps: int = 100
    batch: int = 8
    learning_rate: float = 3e-3
    warmup: int = 15
    weight_decay: float = 0.1
    clip: float = 1.0
    loss_scale: float = 1.0
    validate_every: int = 25
    validation_batches: int = 8
    seed: int = 1337

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "validate_every", "validation_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.loss_scale > 0:
            raise ValueError(f"loss_scale must be above 0, got {self.loss_scale}")


@dataclass(frozen=True)
class Record:
    """What one step left behind. Losses are nats per token; a diverged run has non-finite ones.

    Attributes:
        step: updates made so far, from 1.
        loss: training loss of this step's batch, before its update.
        gradient_norm: 2-norm of the whole gradient, before clipping.
        learning_rate: of this update.
        validation_loss: after this update; None at steps without validation.
        seconds: of forward, backward and update, without data and validation. Not part of equality.
    """

    step: int
    loss: float
    gradient_norm: float
    learning_rate: float
    validation_loss: float | None
    seconds: float = field(compare=False)


def learning_rate(step: int, *, peak: float, warmup: int, steps: int, floor: float = 0.1) -> float:
    """Rate of update number ``step`` (from 0): linear to ``peak``, then cosine to ``floor * peak`` at ``steps``.

    The schedule of nanoGPT: ``peak * (step + 1) / (warmup + 1)`` during warmup.
    """
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def records(config: RunConfig, data: Data, *, compile: Compile | None = None) -> Iterator[Record]:
    """Train step by step, yielding one `Record` per step: a generator, so that runs can be interleaved.

    The records depend on the arguments alone: same configuration, same data, same bits (on one machine, with one
    number of threads). Non-finite losses are recorded like any other and do not stop the run.

    Args:
        data: tokens on the CPU, both parts longer than ``config.model.context``.
        compile: from the module and ``config.options`` to the loss; None means `compile_loss`.
    """
    model = LanguageModel(llama(config.model, seed=config.seed))
    loss_of = (compile or compile_loss)(model, config.options)
    optimizer = _adamw(model, config)
    shape = {"batch": config.batch, "context": config.model.context}
    held_out = validation_batches(data.validation, count=config.validation_batches, **shape)
    stream = batches(data.train, seed=config.seed, **shape)
    for index, (inputs, targets) in zip(range(config.steps), stream, strict=False):
        rate = learning_rate(index, peak=config.learning_rate, warmup=config.warmup, steps=config.steps)
        with _reproducible():
            start = time.perf_counter()
            loss, norm = _update(model, loss_of, optimizer, inputs, targets, rate, config)
            seconds = time.perf_counter() - start
            due = (index + 1) % config.validate_every == 0 or index + 1 == config.steps
            validation = evaluate(loss_of, held_out) if due else None
        yield Record(index + 1, loss, norm, rate, validation, seconds)


def run(config: RunConfig, data: Data, *, compile: Compile | None = None) -> list[Record]:
    """The whole run: all of `records`."""
    return list(records(config, data, compile=compile))


def evaluate(loss_of: Loss, held_out: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Mean loss over ``held_out``, batches of one shape, in nats per token.

    Gradients stay enabled although none is taken: without them the compiler would build the whole graph anew.
    """
    return math.fsum(float(loss_of(inputs, targets).detach()) for inputs, targets in held_out) / len(held_out)


def step_seconds(history: Sequence[Record]) -> float:
    """Median seconds of a step, the first (it compiles) left out; NaN if there is no other."""
    return median(record.seconds for record in history[1:]) if len(history) > 1 else math.nan


def compile_loss(model: nn.Module, options: Mapping[str, object] | None) -> Loss:
    """``model`` compiled by the fpsim backend under the policy ``options``, or by plain Inductor if they are None.

    The simulated default opens attention (its inner products are rounded), so plain Inductor gets the same attention,
    opened: otherwise the two would differ in more than rounding.
    """
    if options is None:
        return torch.compile(OpenAttention(model), fullgraph=True, dynamic=False)
    return torch.compile(model, backend="fpsim", options=dict(options), fullgraph=True, dynamic=False)  # type: ignore[arg-type]


class OpenAttention(nn.Module):
    """``module`` with scaled_dot_product_attention as products and a softmax, not as one fused kernel.

    The choice is made inside ``forward`` so that it is part of the compiled graph: made around the call it is missing
    from the key of torch's compile cache, which then hands back code compiled with fused attention (torch 2.13).
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Tensor) -> Tensor:
        """What ``module`` returns."""
        with sdpa_kernel(SDPBackend.MATH):
            return self.module(*args)


def _adamw(model: nn.Module, config: RunConfig) -> torch.optim.AdamW:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)


def _update(
    model: nn.Module,
    loss_of: Loss,
    optimizer: torch.optim.Optimizer,
    inputs: Tensor,
    targets: Tensor,
    rate: float,
    config: RunConfig,
) -> tuple[float, float]:
    """One optimizer step at learning rate ``rate``; the loss and the gradient norm before clipping."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    loss = loss_of(inputs, targets)
    loss.backward(torch.full_like(loss, config.loss_scale))
    torch._foreach_div_([p.grad for p in model.parameters() if p.grad is not None], config.loss_scale)
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    optimizer.step()
    return float(loss.detach()), float(norm)


@contextmanager
def _reproducible() -> Iterator[None]:
    """Deterministic kernels, and room for many compiled runs in one process; the caller's settings come back after.

    Without it Inductor adds up the gradient of the embedding by atomics, in an order that varies between runs.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        torch.use_deterministic_algorithms(True)
        with torch._dynamo.config.patch(recompile_limit=256):  # all runs share the code object of forward
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
