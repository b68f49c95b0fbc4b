"""The state of one run and its training step, on one process.

The recipe is that of nanoGPT and TinyLlama, the code bases the paper names: AdamW with betas (0.9, 0.95), weight decay
0.1 on matrices, gradient norm clipped at 1, linear warmup, cosine decay to a tenth. Precision enters only through
`fpsim.paper.compiled_loss.compile_loss`: a run without a policy is plain Inductor, any other is
``torch.compile(backend="fpsim")``.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fpsim.compile_backend import load_scale_state, scale_state
from fpsim.compile_backend.report.profiler import Profiler
from fpsim.policy import Policy
from fpsim.recipes import Recipe
from fpsim.training.schedules import ScheduleState

from .compiled_loss import Autocast, Compile, Loss, OpenAttention, compile_loss, with_attention
from .config import Options, RunConfig
from .measurements import hessian_eigenvalue, logit_signals, max_attention_logit, range_shares
from .models import LanguageModel, LossAndLogits, build
from .ranges import Examination, examine
from .record import Record, smoothed_loss

#: Tokens and the tokens one later: int64, shape (batch, context).
Batch = tuple[Tensor, Tensor]


class Update(NamedTuple):
    """The result of `Trainer.update`.

    Attributes:
        loss: mean over the micro-batches before the update, nats per token.
        gradient_norm: 2-norm of the whole gradient, before clipping.
        last_tokens: per micro-batch, logits of the last token of each window, shape (batch, vocabulary), and its
            targets, shape (batch,); empty where the model returns the loss alone.
    """

    loss: float
    gradient_norm: float
    last_tokens: list[tuple[Tensor, Tensor]]


class Trainer:
    """The weights and the optimizer of one run: everything that changes during it.

    The loop calls `step`, `state_if`, `precision_state` and `resume`. `fpsim.paper.parallel.ParallelTrainer` overrides
    the methods whose work or result several processes share: `install`, `update`, `clip_gradients`, `validation_loss`,
    the four measurements, `state_if`, `precision_state`, `resume` and `load`.

    Args:
        config: the run.
        compile: from the module and the options of a policy to the loss; None means `compile_loss`.
    """

    def __init__(self, config: RunConfig, compile: Compile | None) -> None:
        self.config = config
        self.compile = compile or partial(
            compile_loss, attention=config.attention, interpret=config.backend == "interpreted"
        )
        network = build(config.model, seed=config.seed).to(config.device, getattr(torch, config.dtype))
        self.model = (LossAndLogits if config.measure_every else LanguageModel)(network, config.z_loss)
        self.recipe = recipe_of(config)
        if self.recipe is not None and self.recipe.preparation is not None:
            prepared = self.recipe.preparation.apply(self.model, None)
            assert isinstance(prepared, LanguageModel), "a preparation changes layers, and leaves the model around them"
            self.model = prepared
        self.trained: nn.Module = self.model
        if config.autocast:
            self.trained = Autocast(self.model, getattr(torch, config.autocast), torch.device(config.device).type)
        self.base = None if self.recipe is None else self.recipe.policy_for(self.trained)
        schedule = None if self.recipe is None else self.recipe.schedule
        self.schedule_state = ScheduleState() if schedule is None else schedule.start()
        self.codes: dict[Policy | None, Loss] = {}
        self._enter(0)
        optimizer = _adamw(self.model, config)  # after `install`, which may replace the parameters
        part = None if self.recipe is None else self.recipe.optimizer
        self.optimizer = optimizer if part is None else part.apply(optimizer, self.model)

    def _enter(self, index: int) -> None:
        """Train the step ``index`` under its options; each policy is compiled once."""
        options = self._options_at(index)
        if self.codes and options == self.options:
            return
        self.options: Options = options
        self.has_timed_scales = options is not None and Policy.from_options(options).is_timed
        self.profiler: Profiler | None = None
        self.install(self._code(options))

    def _code(self, options: Options) -> Loss:
        policy = None if options is None else Policy.from_options(options)
        if policy not in self.codes:
            self.codes[policy] = self.compile(self.trained, options)
        return self.codes[policy]

    def _options_at(self, index: int) -> Options:
        """The options of the step ``index``: those of the configuration, or the policy of its recipe."""
        if self.recipe is None:
            return self.config.options_at(index)
        policy = self.base
        if self.recipe.schedule is not None:
            policy = self.recipe.schedule.policy(self.schedule_state, policy)
        return None if policy is None else {"policy": policy}

    def install(self, compiled: Loss) -> None:
        """Train by ``compiled`` from now on."""
        self.loss_of = compiled

    def step(self, index: int, batch: Batch, held_out: Sequence[Batch], smoothed: float | None) -> Record:
        """Update number ``index`` (from 0) on ``batch``, with the measurements that are due.

        Args:
            batch: all micro-batches of the step together.
            held_out: batches for the validation loss.
            smoothed: the smoothed loss after the previous step; None at the first.
        """
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
            micro_batches = list(zip(*(part.split(config.batch) for part in batch), strict=True))
            measured: dict[str, float | None] = {}
            if _due(index, config.hessian_every):
                measured["hessian_eigenvalue"] = self.hessian_eigenvalue(micro_batches[0])
            if _due(index, config.ranges_every) and self.options is not None and not self.has_timed_scales:
                measured |= self.range_shares(micro_batches[0])
            if _due(index, config.attention_every):
                measured["max_attention_logit"] = self.max_attention_logit(micro_batches[0])
            if self.scales_loss:
                measured["loss_scale"] = self.loss_scale
            start = time.perf_counter()
            update = self.update(micro_batches, rate)
            seconds = time.perf_counter() - start
            if self.recipe is not None and self.recipe.schedule is not None:
                self.schedule_state = self.recipe.schedule.after(self.schedule_state, update.loss)
            if update.last_tokens and _due(index, config.measure_every):
                measured |= self.logit_signals(update.last_tokens, lbfgsb=_due(index, config.lbfgsb_every))
                measured["sharpness_seconds"] = time.perf_counter() - start - seconds
            validate = _due(index, config.validate_every) or index + 1 == config.steps
            validation = self.validation_loss(held_out) if validate else None
        average = smoothed_loss(smoothed, update.loss, step=index + 1, steps=config.steps)
        return Record(index + 1, update.loss, update.gradient_norm, rate, validation, seconds, average, **measured)

    def update(self, micro_batches: Sequence[Batch], rate: float) -> Update:
        """One optimizer step at learning rate ``rate`` on the mean gradient of ``micro_batches``."""
        config, optimizer = self.config, self.optimizer
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        kept = self.loss_scale
        losses, last_tokens = [], []
        for inputs, targets in micro_batches:
            loss, logits = _loss_and_logits(self.loss_of(inputs, targets))
            loss.backward(torch.full_like(loss, config.loss_scale * kept))
            losses.append(loss.detach())
            if logits is not None:
                last_tokens.append((logits, targets[:, -1]))
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        torch._foreach_div_(gradients, config.loss_scale * len(micro_batches))
        norm = float(self.clip_gradients()) / kept
        optimizer.step()
        return Update(math.fsum(float(loss) for loss in losses) / len(losses), norm, last_tokens)

    @property
    def scales_loss(self) -> bool:
        """Whether the optimizer of the recipe scales the loss, and skips a step whose gradients overflow."""
        return "loss_scale" in self.optimizer.param_groups[0]

    @property
    def loss_scale(self) -> float:
        """The factor of the gradients that the optimizer itself expects: 1 unless a recipe scales the loss."""
        return float(self.optimizer.param_groups[0].get("loss_scale", 1.0))

    def clip_gradients(self) -> Tensor:
        """Scale the gradients down to the norm ``config.clip``, if they exceed it; returns their norm before.

        Both norms are those of gradients times `loss_scale`.
        """
        limit = math.inf if self.config.clip is None else self.config.clip * self.loss_scale
        return nn.utils.clip_grad_norm_(self.model.parameters(), limit)

    def validation_loss(self, held_out: Sequence[Batch]) -> float:
        """Mean loss over ``held_out``, nats per token.

        Scales of earlier steps are used and stay as they are: a call with gradients would count as a step.
        """
        with torch.set_grad_enabled(not self.has_timed_scales):
            return evaluate(self.loss_of, held_out)

    # -- measurements ------------------------------------------------------------------------------------------------

    def hessian_eigenvalue(self, batch: Batch) -> float:
        """The largest eigenvalue of the Hessian of the unrounded model on ``batch``."""
        loss = LanguageModel(self.model.network, self.config.z_loss)
        return hessian_eigenvalue(OpenAttention(loss), batch, seed=self.config.seed)

    def max_attention_logit(self, batch: Batch) -> float | None:
        """The largest attention logit of the unrounded network on ``batch``; None if it has no attention."""
        return max_attention_logit(self.model.network, batch[0])

    def range_shares(self, batch: Batch) -> dict[str, float]:
        """`fpsim.paper.measurements.range_shares` on ``batch``, under the policy of the current stage.

        The policy has no scales of earlier steps: a profile would begin with others.
        """
        if self.profiler is None:
            self.profiler = Profiler(self.trained, policy=with_attention(self.options or {}, self.config.attention))
        return range_shares(self.trained, self.profiler, batch, loss_scale=self.config.loss_scale * self.loss_scale)

    def examination(self, batch: Batch) -> Examination:
        """The layers that saturate or underflow on ``batch`` under the policy of the current stage, and remedies."""
        policy = Policy.from_options(with_attention(self.options or {}, self.config.attention))
        return examine(self.trained, policy, batch, loss_scale=self.config.loss_scale * self.loss_scale)

    def logit_signals(self, last_tokens: Sequence[tuple[Tensor, Tensor]], *, lbfgsb: bool) -> dict[str, float]:
        """`fpsim.paper.measurements.logit_signals` of the last tokens of all micro-batches."""
        logits, targets = map(torch.cat, zip(*last_tokens, strict=True))
        return logit_signals(logits, targets, lbfgsb=lbfgsb)

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def state_if(self, is_due: bool) -> dict[str, Any] | None:
        """The weights and the optimizer's state if a checkpoint ``is_due``; None if this process has none to write."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()} if is_due else None

    def precision_state(self) -> dict[str, Any]:
        """What the precision of the next steps depends on: the state of a schedule, and scales of earlier steps.

        All processes have the same.
        """
        scales = {
            policy.to_json(): scale_state(code)
            for policy, code in self.codes.items()
            if policy is not None and policy.is_timed
        }
        return {"schedule": asdict(self.schedule_state), "scales": scales}

    def resume(self, index: int, state: Mapping[str, Any], precision: Mapping[str, Any]) -> None:
        """Continue before the step ``index`` from what `state_if` and `precision_state` returned there."""
        self.schedule_state = ScheduleState(**precision["schedule"])
        for policy, scales in precision["scales"].items():
            load_scale_state(self._code({"policy": Policy.from_json(policy)}), scales)
        self._enter(index)
        self.load(state)

    def load(self, state: Mapping[str, Any]) -> None:
        """Set the weights and the optimizer to ``state``."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


def recipe_of(config: RunConfig) -> Recipe | None:
    """The recipe of a run, or None."""
    return None if config.recipe is None else Recipe.from_json(json.dumps(config.recipe))


def learning_rate(step: int, *, peak: float, warmup: int, steps: int, floor: float = 0.1) -> float:
    """Rate of update number ``step`` (from 0): linear to ``peak``, then cosine to ``floor * peak`` at ``steps``.

    The schedule of nanoGPT: ``peak * (step + 1) / (warmup + 1)`` during warmup.
    """
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def evaluate(loss_of: Loss, held_out: Sequence[Batch]) -> float:
    """Mean loss over ``held_out``, batches of one shape, in nats per token.

    Gradients may stay enabled although none is computed: without them torch compiles the whole graph again.
    """
    return math.fsum(float(_loss_and_logits(loss_of(*batch))[0].detach()) for batch in held_out) / len(held_out)


def _due(index: int, every: int) -> bool:
    return every > 0 and (index + 1) % every == 0


def _loss_and_logits(outputs: Any) -> tuple[Tensor, Tensor | None]:
    return outputs if isinstance(outputs, tuple) else (outputs, None)


def _adamw(model: nn.Module, config: RunConfig) -> torch.optim.AdamW:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)


@contextmanager
def _reproducible(config: RunConfig, index: int) -> Iterator[None]:
    """Deterministic kernels, this step's own random numbers, and a recompile limit for many runs in one process.

    Random numbers (stochastic rounding, dropout) depend on the seed and the step alone, so that a run may be resumed or
    interleaved with others. Without deterministic kernels Inductor adds up the gradient of the embedding by atomics, in
    an order that varies between runs. The caller's settings are restored afterwards.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    digest = hashlib.sha256(f"{config.seed}/{index}".encode()).digest()
    devices = [config.device] if torch.device(config.device).type == "cuda" else []
    try:
        torch.use_deterministic_algorithms(True)
        with (
            # All runs share the code object of forward. DDP must not split a graph: policies name modules by their
            # paths from the whole model.
            torch._dynamo.config.patch(recompile_limit=256, optimize_ddp=False),
            torch.random.fork_rng(devices=devices),
        ):
            # torch.manual_seed also formats the stack for each kind of device: a tenth of a small step.
            torch.default_generator.manual_seed(int.from_bytes(digest[:7]))
            if devices:
                torch.cuda.manual_seed_all(int.from_bytes(digest[:7]))
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
