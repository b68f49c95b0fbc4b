"""One training run as a pure function of a frozen configuration and the data.

The recipe is that of nanoGPT and TinyLlama, the code bases the paper names: AdamW with betas (0.9, 0.95), weight decay
0.1 on matrices, gradient norm clipped at 1, linear warmup, cosine decay to a tenth. Precision enters only through
`compile_loss`: a run without a policy is plain Inductor, any other is ``torch.compile(backend="fpsim")``.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fpsim.policy import Policy

from .config import RunConfig, run_key
from .data import Data, batches, check_vocabulary, load, validation_batches
from .measures import hessian_eigenvalue, logit_signals, range_shares
from .models import LanguageModel, LossAndLogits, build
from .parallel import Parallel

#: Inputs and targets to the loss, or to the loss and the logits of last tokens.
Loss = Callable[..., Any]
#: A module and the policy's options (None: no simulation) to the compiled loss; the seam for other compilers.
Compile = Callable[[nn.Module, Mapping[str, object] | None], Loss]

#: Span of the moving average of the loss, in steps: a share of the run, and at least this many.
SMOOTHING_SHARE, SMOOTHING_LEAST = 0.01, 10


@dataclass(frozen=True)
class Record:
    """What one step left behind. Losses are nats per token; a diverged run has non-finite ones.

    What was not measured at a step is None. Logits are those of the last token of each window of the batch.

    Attributes:
        step: updates made so far, from 1.
        loss: training loss of this step's batch, before its update.
        gradient_norm: 2-norm of the whole gradient, before clipping.
        learning_rate: of this update.
        validation_loss: after this update; None at steps without validation.
        seconds: of forward, backward and update, without data and validation. Not part of equality.
        smoothed_loss: exponential moving average of the losses so far, over 1 % of the run's steps and at least ten.
        sharpness_5e4, sharpness_1e3: logit sharpness in boxes of half-width 5e-4 and 1e-3, exact, mean over tokens.
        lbfgsb_5e4, lbfgsb_1e3: the same by ten iterations of L-BFGS-B.
        max_abs_logit: largest |z| of all.
        mean_logit: mean of z.
        hessian_eigenvalue: the largest one, before this update.
        saturated_activation, saturated_weight, saturated_gradient: share of the values rounded in that role that lie
            beyond the format's largest finite value.
        underflowed_activation, underflowed_weight, underflowed_gradient: share that is not zero and is rounded to it.
        sharpness_seconds: of measuring the logits. Not part of equality.
    """

    step: int
    loss: float
    gradient_norm: float
    learning_rate: float
    validation_loss: float | None
    seconds: float = field(compare=False)
    smoothed_loss: float | None = None
    sharpness_5e4: float | None = None
    sharpness_1e3: float | None = None
    lbfgsb_5e4: float | None = None
    lbfgsb_1e3: float | None = None
    max_abs_logit: float | None = None
    mean_logit: float | None = None
    hessian_eigenvalue: float | None = None
    saturated_activation: float | None = None
    saturated_weight: float | None = None
    saturated_gradient: float | None = None
    underflowed_activation: float | None = None
    underflowed_weight: float | None = None
    underflowed_gradient: float | None = None
    sharpness_seconds: float | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Checkpoint:
    """Where a run leaves its state, so that another process can go on from there.

    Attributes:
        path: of the one file, replaced in one piece; it holds weights, optimizer and the records so far.
        seconds: the least time between two writes; 0 writes after every step.
    """

    path: Path
    seconds: float = 30.0


def learning_rate(step: int, *, peak: float, warmup: int, steps: int, floor: float = 0.1) -> float:
    """Rate of update number ``step`` (from 0): linear to ``peak``, then cosine to ``floor * peak`` at ``steps``.

    The schedule of nanoGPT: ``peak * (step + 1) / (warmup + 1)`` during warmup.
    """
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def records(
    config: RunConfig,
    data: Data | None = None,
    *,
    compile: Compile | None = None,
    checkpoint: Checkpoint | None = None,
    parallel: Parallel | None = None,
) -> Iterator[Record]:
    """Train step by step, yielding one `Record` per step: a generator, so that runs can be interleaved.

    The records depend on the configuration and the data alone: same bits, on one machine, with one number of threads
    (and of processes). Non-finite losses are recorded like any other, and end the run only if it asks for that.

    Args:
        data: tokens on the CPU, both parts longer than ``config.model.context``; None loads ``config.data``.
        compile: from the module and ``config.options`` to the loss; None means `compile_loss`.
        checkpoint: where to leave the state. If the file is there already, the records in it are yielded first and the
            run goes on after them: the same bits as without interruption.
        parallel: how the processes of ``torchrun`` share the work; None is a single process.

    Raises:
        ValueError: a checkpoint of another run, tokens that the model lacks, a batch that the processes cannot share.
    """
    parallel = parallel or Parallel()
    data = load(config.data, context=config.model.context) if data is None else data
    check_vocabulary(data, config.model.vocabulary)
    trainer = _Trainer(config, compile, parallel)
    shape = {"batch": config.batch, "context": config.model.context}
    held_out = [
        parallel.share(_to(batch, config.device))
        for batch in validation_batches(data.validation, count=config.validation_batches, **shape)
    ]
    key = run_key(config) if checkpoint else ""
    history = _resume(trainer, checkpoint.path, key) if checkpoint else []
    yield from history
    written = time.monotonic()
    shape["batch"] *= config.accumulate
    stream = batches(data.train, seed=config.seed, start=len(history), **shape)
    for index in range(len(history), config.steps):
        if _is_lost(history, config):
            break
        smoothed = history[-1].smoothed_loss if history else None
        history.append(trainer.step(index, _to(next(stream), config.device), held_out, smoothed))
        yield history[-1]
        if checkpoint and parallel.agreed(time.monotonic() - written >= checkpoint.seconds):
            trainer.save(checkpoint.path, key, history)
            written = time.monotonic()


def run(
    config: RunConfig,
    data: Data | None = None,
    *,
    compile: Compile | None = None,
    checkpoint: Checkpoint | None = None,
) -> list[Record]:
    """The whole run: all of `records`."""
    return list(records(config, data, compile=compile, checkpoint=checkpoint))


def evaluate(loss_of: Loss, held_out: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Mean loss over ``held_out``, batches of one shape, in nats per token.

    Gradients stay enabled although none is taken: without them the compiler would build the whole graph anew.
    """
    return math.fsum(float(_loss_and_logits(loss_of(*batch))[0].detach()) for batch in held_out) / len(held_out)


def step_seconds(history: Sequence[Record]) -> float:
    """Median seconds of a step, the first (it compiles) left out; NaN if there is no other."""
    return median(record.seconds for record in history[1:]) if len(history) > 1 else math.nan


def compile_loss(
    model: nn.Module,
    options: Mapping[str, object] | None,
    *,
    attention: str | None = None,
    interpret: bool = False,
) -> Loss:
    """``model`` compiled by the fpsim backend under the policy ``options``, or by plain Inductor if they are None.

    The simulated default opens attention (its inner products are rounded), so plain Inductor gets the same attention,
    opened: otherwise the two would differ in more than rounding.

    Args:
        attention: ``opened`` or ``fused``, whatever the policy says; None leaves it to the policy.
        interpret: run operator by operator, without a compiler.
    """
    if options is None:
        plain = model if attention == "fused" else OpenAttention(model)
        return plain if interpret else torch.compile(plain, fullgraph=True, dynamic=False)
    chosen = dict(options)
    if attention is not None:
        chosen = {
            **Policy.from_options(options).to_dict(),
            "attention": {"opened": "round", "fused": "keep"}[attention],
        }
    backend = "fpsim_eager" if interpret else "fpsim"
    return torch.compile(model, backend=backend, options=chosen, fullgraph=True, dynamic=False)  # type: ignore[arg-type]


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


class Autocast(nn.Module):
    """``module`` under PyTorch's own mixed precision; inside the graph, as `OpenAttention`."""

    def __init__(self, module: nn.Module, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.module, self.dtype, self.device = module, dtype, device

    def forward(self, *args: Tensor) -> Any:
        """What ``module`` returns."""
        with torch.autocast(self.device, self.dtype):
            return self.module(*args)


class _Trainer:
    """The weights and the optimizer of one run: all that changes while it goes on."""

    def __init__(self, config: RunConfig, compile: Compile | None, parallel: Parallel) -> None:
        self.config, self.parallel = config, parallel
        self.compile = compile or partial(
            compile_loss, attention=config.attention, interpret=config.backend == "interpreted"
        )
        network = build(config.model, seed=config.seed).to(config.device, getattr(torch, config.dtype))
        self.model = (LossAndLogits if config.measure_every else LanguageModel)(network)
        self.loss_of: Loss
        self.optimizer: torch.optim.Optimizer | None = None
        self.stage = 0
        self._enter(0)

    def _enter(self, index: int) -> None:
        """Compile for the stage that the step ``index`` is in, unless that has been done."""
        config = self.config
        stage = sum(start <= index for start, _ in config.stages)
        if self.optimizer is not None and stage == self.stage:
            return
        module: nn.Module = self.model
        if config.autocast:
            module = Autocast(module, getattr(torch, config.autocast), torch.device(config.device).type)
        compiled = self.compile(module, config.options_at(index))
        self.stage = stage
        if self.optimizer is not None:
            self.loss_of = self.parallel.exchange(self.loss_of, compiled)
            return
        self.loss_of = self.parallel.wrap(compiled)
        self.optimizer = _adamw(self.model, config)  # sharding has replaced the parameters by now

    def step(
        self,
        index: int,
        batch: tuple[Tensor, Tensor],
        held_out: Sequence[tuple[Tensor, Tensor]],
        smoothed: float | None,
    ) -> Record:
        """Update number ``index`` (from 0) on ``batch``, and what is measured beside it."""
        config = self.config
        rate = learning_rate(
            index,
            peak=config.learning_rate,
            warmup=config.warmup,
            steps=config.steps,
            floor=1.0 if config.schedule == "constant" else config.floor,
        )
        with _reproducible(config, index):
            self._enter(index)
            micro_batches = _micro_batches(batch, config.batch)
            parts = [self.parallel.share(part) for part in micro_batches]
            measured = self._measure_before(index, micro_batches[0], parts[0])
            start = time.perf_counter()
            loss, norm, logits = self._update(parts, rate)
            seconds = time.perf_counter() - start
            if logits is not None and _due(index, config.measure_every):
                targets = torch.cat([part[1][:, -1] for part in parts])
                lbfgsb = _due(index, config.lbfgsb_every)
                measured |= self.parallel.reduce_signals(logit_signals(torch.cat(logits), targets, lbfgsb=lbfgsb))
                measured["sharpness_seconds"] = time.perf_counter() - start - seconds
            validate = _due(index, config.validate_every) or index + 1 == config.steps
            validation = self.parallel.mean(evaluate(self.loss_of, held_out)) if validate else None
        return Record(
            index + 1, loss, norm, rate, validation, seconds, _smooth(smoothed, loss, index, config), **measured
        )

    def _measure_before(
        self, index: int, batch: tuple[Tensor, Tensor], part: tuple[Tensor, Tensor]
    ) -> dict[str, float]:
        """What is due before the update: the Hessian's eigenvalue of ``batch``, ranges of this process's ``part``."""
        config, parallel, options = self.config, self.parallel, self.config.options_at(index)
        measured: dict[str, float] = {}
        if _due(index, config.hessian_every):
            loss = OpenAttention(LanguageModel(self.model.network))
            with parallel.whole_parameters(self.loss_of):
                measured["hessian_eigenvalue"] = hessian_eigenvalue(loss, batch, seed=config.seed)
        if _due(index, config.ranges_every) and options is not None:
            interpreted = compile_loss(self.model, options, attention=config.attention, interpret=True)
            with parallel.whole_parameters(self.loss_of):
                shares = range_shares(self.model, interpreted, part, loss_scale=config.loss_scale)
            measured |= parallel.reduce_signals(shares)
        return measured

    def _update(self, parts: Sequence[tuple[Tensor, Tensor]], rate: float) -> tuple[float, float, list[Tensor] | None]:
        """One optimizer step at learning rate ``rate``: the loss, the gradient norm before clipping, and logits."""
        config, optimizer = self.config, self.optimizer
        assert optimizer is not None
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        losses, logits = [], []
        for part in parts:
            loss, last = _loss_and_logits(self.loss_of(*part))
            loss.backward(torch.full_like(loss, config.loss_scale))
            losses.append(loss.detach())
            logits += [] if last is None else [last]
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        torch._foreach_div_(gradients, config.loss_scale * len(parts))
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), math.inf if config.clip is None else config.clip)
        optimizer.step()
        mean = self.parallel.mean(math.fsum(float(loss) for loss in losses) / len(losses))
        return mean, self.parallel.whole(norm), logits or None

    def save(self, path: Path, key: str, history: Sequence[Record]) -> None:
        """Write the state of the run ``key`` to ``path`` in one piece; of several processes the first one writes."""
        assert self.optimizer is not None
        state = self.parallel.state(self.model, self.optimizer)
        if not self.parallel.is_first:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_path = path.with_name(f"{path.name}.{os.getpid()}")
        torch.save({"key": key, "records": [asdict(record) for record in history], **state}, partial_path)
        os.replace(partial_path, path)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up what `save` wrote."""
        assert self.optimizer is not None
        self._enter(len(state["records"]))
        self.parallel.load(self.model, self.optimizer, state)


def _resume(trainer: _Trainer, path: Path, key: str) -> list[Record]:
    """The records in the checkpoint at ``path``, whose state ``trainer`` takes up; none if there is no file."""
    if not path.exists():
        return []
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state["key"] != key:
        raise ValueError(
            f"{path} is the checkpoint of run {state['key']}, not of {key}: name another file or remove it"
        )
    known = {entry.name for entry in fields(Record)}
    history = [Record(**{name: value for name, value in row.items() if name in known}) for row in state["records"]]
    trainer.restore(state)
    return history


def _is_lost(history: Sequence[Record], config: RunConfig) -> bool:
    """Whether the run has had no finite loss for as many steps as it may."""
    last = history[-config.stop_nonfinite :] if config.stop_nonfinite else []
    return 0 < config.stop_nonfinite == len(last) and not any(math.isfinite(record.loss) for record in last)


def _due(index: int, every: int) -> bool:
    return every > 0 and (index + 1) % every == 0


def _to(batch: tuple[Tensor, Tensor], device: str) -> tuple[Tensor, Tensor]:
    inputs, targets = batch
    return inputs.to(device), targets.to(device)


def _micro_batches(batch: tuple[Tensor, Tensor], size: int) -> list[tuple[Tensor, Tensor]]:
    inputs, targets = batch
    return list(zip(inputs.split(size), targets.split(size), strict=True))


def _loss_and_logits(outputs: Any) -> tuple[Tensor, Tensor | None]:
    return outputs if isinstance(outputs, tuple) else (outputs, None)


def _smooth(before: float | None, loss: float, index: int, config: RunConfig) -> float:
    """The moving average after step ``index``, of weight 2 / (span + 1) for the newest and a plain mean at first."""
    if before is None:
        return loss
    span = smoothing_span(config.steps)
    weight = max(2 / (span + 1), 1 / (index + 1))
    return before + weight * (loss - before)


def smoothing_span(steps: int) -> int:
    """Steps over which losses are averaged in a run of ``steps``."""
    return max(SMOOTHING_LEAST, round(SMOOTHING_SHARE * steps))


def _adamw(model: nn.Module, config: RunConfig) -> torch.optim.AdamW:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)


@contextmanager
def _reproducible(config: RunConfig, index: int) -> Iterator[None]:
    """Deterministic kernels, random numbers of this step's own, and room for many compiled runs in one process.

    Random numbers (stochastic rounding, dropout) depend on the seed and the step alone, so that a run may be resumed or
    interleaved with others. Without deterministic kernels Inductor adds up the gradient of the embedding by atomics, in
    an order that varies between runs. The caller's settings come back after.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    digest = hashlib.sha256(f"{config.seed}/{index}".encode()).digest()
    devices = [config.device] if torch.device(config.device).type == "cuda" else []
    try:
        torch.use_deterministic_algorithms(True)
        with (
            # All runs share the code object of forward. A graph is not split for the sake of DDP: policies name modules
            # by their paths from the whole model.
            torch._dynamo.config.patch(recompile_limit=256, optimize_ddp=False),
            torch.random.fork_rng(devices=devices),
        ):
            torch.manual_seed(int.from_bytes(digest[:7]))
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
