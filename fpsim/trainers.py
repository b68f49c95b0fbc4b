"""Statistics of rounding in the log of other people's training loops: Hugging Face's Trainer, Lightning, your own.

A model that was compiled in place (``model.compile(backend="fpsim", ...)``) needs nothing of this file to train there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fpsim.compile_backend.calls import policy_options
from fpsim.compile_backend.observe.rounding_statistics import merge
from fpsim.compile_backend.report.profiler import profile
from fpsim.compile_backend.report.profiles import Profile
from fpsim.policy import Policy

__all__ = ["StepStatistics", "log_rounding", "shares"]


class StepStatistics:
    """Counts what rounding does to the latest training batch of a module that was compiled in place by fpsim.

    It keeps the arguments of the module's latest call with gradients. `measure` runs the module on them once more, by
    `fpsim.profile`. This changes no parameter, buffer, gradient and random state, so that training has the same bits as
    without it. It costs one interpreted forward and backward pass with statistics: several times the time of a compiled
    step, and the memory of one more batch. Steps that are not measured cost nothing.

    Args:
        module: a module on which ``module.compile(backend="fpsim", options=...)`` was called. Its policy holds. Its
            class is not one of ``torch.nn``: torch compiles nothing of those in place.

    Attributes:
        arguments: the positional and the keyword arguments of the latest call with gradients; None before it.

    Raises:
        TypeError: ``module`` is not a module that was compiled in place by fpsim.

    >>> class Model(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.linear = nn.Linear(4, 2)
    ...     def forward(self, x):
    ...         return self.linear(x)
    >>> module = Model()
    >>> module.compile(backend="fpsim_eager", options={"format": "e4m3fn"})
    >>> statistics = StepStatistics(module)
    >>> module(torch.full((8, 4), 1000.0)).sum().backward()
    >>> statistics.measure()["fpsim/activation_saturated"]
    1.0
    """

    def __init__(self, module: nn.Module) -> None:
        compiled: Any = getattr(module, "_compiled_call_impl", None)
        if not isinstance(module, nn.Module) or not hasattr(compiled, "_fpsim_options"):
            raise TypeError(
                f"{type(module).__name__} is not compiled in place by fpsim: call module.compile(backend='fpsim', "
                "options=...) first"
            )
        options = policy_options(module)
        assert options is not None, "it has the attribute"
        self._module, self._policy = module, Policy.from_options(options[0])
        self.arguments: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._compiled = compiled

        @functools.wraps(compiled)
        def call(*args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled():
                self.arguments, self._autocast = (args, kwargs), _autocast(module)
            return compiled(*args, **kwargs)

        module._compiled_call_impl = call

    def close(self) -> None:
        """Leave the module as it was before."""
        self._module._compiled_call_impl = self._compiled
        self.arguments = None

    def profile(self, loss: Callable[[Any], Tensor] | None = None) -> Profile:
        """The profile of the latest training batch, with the module's present parameters.

        Args:
            loss: from the module's outputs to the number that is differentiated, as for `fpsim.profile`.

        Raises:
            RuntimeError: the module has not been called with gradients yet.
        """
        if self.arguments is None:
            raise RuntimeError(f"{type(self._module).__name__} has not been called with gradients yet: measure later")
        args, kwargs = self.arguments
        device, dtype, enabled = self._autocast
        with torch.enable_grad(), torch.autocast(device, dtype, enabled):
            return profile(self._module._call_impl, *args, policy=self._policy, loss=loss, **kwargs)

    def measure(self, loss: Callable[[Any], Tensor] | None = None) -> dict[str, float]:
        """The shares of rounded numbers that saturated and that underflowed to zero, by role, in the latest batch.

        Args, Raises: as `profile`.

        Returns:
            ``fpsim/ROLE_saturated`` and ``fpsim/ROLE_underflow`` for every role (`Site.role`) that is rounded, as
            shares from 0 to 1. A number that became an infinity or NaN counts as saturated.
        """
        return shares(self.profile(loss))


def shares(measured: Profile) -> dict[str, float]:
    """The numbers that `StepStatistics.measure` returns, for a profile."""
    rounded = [site for site in measured.sites if site.cast is not None]
    result: dict[str, float] = {}
    for role in dict.fromkeys(site.role for site in rounded):
        total = merge(site.statistics for site in rounded if site.role == role)
        result[f"fpsim/{role}_saturated"] = total.share("saturations") + total.share("overflows")
        result[f"fpsim/{role}_underflow"] = total.share("underflows")
    return result


def log_rounding(trainer: Any, *, every: int = 100) -> None:
    """Let a Hugging Face ``Trainer`` log what rounding does: `StepStatistics.measure` in every ``every``-th step.

    The numbers are those of the step's last batch and of the parameters before the update. They go to the Trainer's own
    log, and from there to all that it reports to. The loss is the model's output ``loss``, divided by the steps of
    gradient accumulation unless the model counts items itself, and multiplied by the scale of the GradScaler: these
    decide whether gradients underflow.

    Args:
        trainer: a ``transformers.Trainer`` whose model was compiled in place:
            ``model.compile(backend="fpsim", options=...)`` before ``Trainer(model, ...)``.
        every: steps between measurements. A measurement costs several steps (`StepStatistics`).

    Raises:
        TypeError: the model is not compiled in place by fpsim.
        ValueError: ``every`` is below 1.
    """
    from transformers import TrainerCallback

    if every < 1:
        raise ValueError(f"every={every} is a number of steps: use 1 or more")
    StepStatistics(trainer.model).close()  # an error now, and not when training begins

    class LogRounding(TrainerCallback):
        def __init__(self) -> None:
            self.measured: dict[str, float] = {}

        def loss(self, outputs: Any) -> Tensor:
            value = outputs["loss"] if isinstance(outputs, dict) else outputs[0]
            scaler = trainer.accelerator.scaler
            assert self.statistics.arguments is not None
            counts_items = self.statistics.arguments[1].get("num_items_in_batch") is not None
            value = value if counts_items else value / trainer.args.gradient_accumulation_steps
            return value if scaler is None else value * scaler.get_scale()

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.statistics = StepStatistics(trainer.model)

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if (state.global_step + 1) % every == 0:
                self.measured = self.statistics.measure(self.loss)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if self.measured:
                due = control.should_log
                trainer.log(self.measured)
                control.should_log = due  # `log` clears it, and the Trainer would leave out its own loss
                self.measured = {}

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.statistics.close()

    trainer.add_callback(LogRounding())


def _autocast(module: nn.Module) -> tuple[str, torch.dtype, bool]:
    """The device of ``module``, and the dtype and the state of autocast there."""
    device = next((parameter.device.type for parameter in module.parameters()), "cpu")
    return device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)


def __dir__() -> list[str]:
    return sorted(__all__)
