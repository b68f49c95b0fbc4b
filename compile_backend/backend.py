"""The compiler backends: ``torch.compile(model, backend="fpsim")`` and its interpreted twin ``"fpsim_eager"``.

torch imports this module when it looks up a backend, before it traces a model. The settings of `torch_settings` must
change at that moment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from fpsim.compile_backend import guards
from fpsim.compile_backend.compiling import compile_with_rounding
from fpsim.compile_backend.torch_settings import apply_settings

apply_settings()


def fpsim(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Backend ``"fpsim"``: Inductor, with the operands of all matrix products rounded.

    Args:
        gm, example_inputs: a graph and examples of its inputs, as Dynamo passes them to a backend.
        options: the fields of `fpsim.Policy`, or ``{"policy": policy}``. None stands for the FP8 hybrid.
        mode: ``"reduce-overhead"``, ``"max-autotune"`` or ``"max-autotune-no-cudagraphs"``, whose settings of Inductor
            hold for this model; None or ``"default"`` for none. `torch.compile` takes options or a mode: write the mode
            among the options (``{"format": "e4m3fn", "mode": "max-autotune"}``). On a CPU no mode changes a bit.

    Raises:
        ValueError: an unknown mode, option or value, a glob that matches no module or no operator, options that have
            changed since a model was compiled with them, or a policy that differs from that of another rank.
        UnroundedError: an operator multiplies matrices, cannot be rounded, and is not listed in ``gaps``.
    """
    policy, own_mode = guards.check_options(options, mode)
    run = compile_with_rounding(gm, example_inputs, policy, settings=guards.settings_of_mode(own_mode))
    return guards.watching(run, options, mode)


def fpsim_eager(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Backend ``"fpsim_eager"``: the same rewritten graphs as ``"fpsim"``, interpreted operator by operator.

    It is meant for differential tests, for debugging, and for machines without a compiler. It takes the arguments of
    `fpsim` and raises the same errors. Modes are about the compiler, and are an error here.
    """
    policy, own_mode = guards.check_options(options, mode)
    if own_mode not in (None, "default"):
        raise ValueError(f"backend 'fpsim_eager' compiles nothing: leave mode={own_mode!r} out, or use backend='fpsim'")
    return guards.watching(compile_with_rounding(gm, example_inputs, policy, interpret=True), options, mode)
