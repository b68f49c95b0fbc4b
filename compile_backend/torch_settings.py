"""All settings of torch that fpsim changes for the whole process, and the differences between versions of torch.

Importing fpsim changes nothing. The settings change when a model is first compiled: when torch looks up the backend
``"fpsim"`` or ``"fpsim_eager"``, or when `fpsim.explain`, `fpsim.audit`, `fpsim.profile` or
`fpsim.curvature.functional_loss` trace a model. ``docs/torch_settings.md`` lists them for users.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any

import torch
from torch._dynamo import config as dynamo_config
from torch._dynamo.eval_frame import OptimizeContext, OptimizedModule
from torch._inductor import config as inductor_config
from torch._inductor.codegen.cpp import CppKernel
from torch._inductor.dtype_propagation import DtypePropagationOpsHandler
from torch._inductor.utils import op_dtype_propagation_rules
from torch.optim.optimizer import register_optimizer_step_post_hook

from fpsim.compile_backend.calls import (
    copied_state,
    is_ours,
    keep_in_other_code,
    options_of,
    policy_options,
    warn_disabled,
    warn_of_replacement,
    watch_parts,
    watched,
    watched_hooks,
    watched_method,
)
from fpsim.compile_backend.covariance import covariance
from fpsim.compile_backend.scale_states import after_optimizer_step
from fpsim.compile_backend.watching import watched_backward, whole_second_derivatives
from fpsim.rounding.cpp_functions import inline_functions_in_cpp
from fpsim.rounding.vector_casts import cast_whole_vectors_in_cpp

#: Major and minor version of torch.
TORCH = tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:2])

#: How often Dynamo may recompile one function (for other policies, shapes, modes) before it raises an error.
RECOMPILE_LIMIT = 128


def fail_at_recompile_limit() -> None:
    """Raise Dynamo's recompile limit, and turn exceeding it into an error.

    Beyond its own limit (8) Dynamo only warns, and runs the model eagerly, unrounded. In a sweep over nine policies in
    one process, the ninth would run unrounded.
    """
    dynamo_config.fail_on_recompile_limit_hit = True
    dynamo_config.recompile_limit = max(dynamo_config.recompile_limit, RECOMPILE_LIMIT)


@lru_cache(maxsize=1)
def trace_recurrent_layers() -> None:
    """Let Dynamo trace `nn.RNN`, `nn.GRU` and `nn.LSTM`.

    By default Dynamo leaves the whole function that calls such a layer uncompiled, and calls no backend for it.
    """
    dynamo_config.allow_rnn = True


@lru_cache(maxsize=1)
def keep_precision_casts_in_cpp() -> None:
    """Make C++ code of Inductor before 2.13 round 16-bit numbers under ``emulate_precision_casts``, as 2.13 does.

    Earlier versions remember the float32 number that was converted to 16 bits, and compute with that number. Sums of
    bfloat16 numbers then have more bits than in the model.
    """
    if TORCH >= (2, 13):
        return
    remember = CppKernel.cache_dtype_convert

    def unless_emulated(kernel: CppKernel, *conversion: object) -> None:
        if not inductor_config.emulate_precision_casts:
            remember(kernel, *conversion)

    CppKernel.cache_dtype_convert = unless_emulated  # type: ignore[method-assign]


@lru_cache(maxsize=1)
def keep_dtype_rules() -> None:
    """Let Inductor keep its table of dtype rules, which it rebuilds for each operation in generated code.

    A rounding consists of many small operations. Rebuilding the table is a large part of the time that a policy adds
    to compilation.
    """
    build = DtypePropagationOpsHandler.__init__
    built_from: dict[str, object] = {}

    def build_once(self: DtypePropagationOpsHandler) -> None:
        if built_from != op_dtype_propagation_rules:
            build(self)
            built_from.clear()
            built_from.update(op_dtype_propagation_rules)

    DtypePropagationOpsHandler.__init__ = build_once  # type: ignore[method-assign]


@lru_cache(maxsize=1)
def trace_covariances() -> None:
    """Let Dynamo trace `torch.cov` and `torch.corrcoef`, whose kernel looks at values.

    By default it leaves out the code around them, and their product runs unrounded. Only tracing uses the other kernel.
    """
    key, op = torch._C.DispatchKey, torch.ops.aten.cov.default
    for composed in (key.CompositeImplicitAutograd, key.FuncTorchBatchedDecomposition):
        if op.has_kernel_for_dispatch_key(composed) and composed not in op.py_kernels:
            op.py_impl(composed)(covariance)


@lru_cache(maxsize=1)
def watch_compiled_calls() -> None:
    """Let a call of a model compiled with fpsim be an error, or a warning, if Dynamo runs it without fpsim.

    Dynamo says nothing when it leaves code out, when a method other than forward or a part of a compiled module is
    called, or when a module is copied or inlined without what `torch.nn.Module.compile` has made. Callables of other
    backends stay as they are.
    """
    compile_callable, optimize, attribute, state = (
        OptimizeContext.__call__,
        torch._dynamo.optimize,
        OptimizedModule.__getattr__,
        torch.nn.Module.__getstate__,
    )
    run_backward = watched_backward(whole_second_derivatives(torch.autograd._engine_run_backward))

    @wraps(compile_callable)
    def and_watch(context: OptimizeContext, fn: Any) -> Any:
        if not is_ours(context.callback):
            warn_of_replacement(fn)
        compiled = compile_callable(context, fn)
        is_function = hasattr(compiled, "__code__")  # a module or a class holds functions that came through here
        if is_function and is_ours(context.callback):
            if inspect.ismethod(fn) and fn.__func__ is torch.nn.Module._call_impl:
                keep_in_other_code(fn.__self__)  # type: ignore[arg-type]
            return watched(compiled, options_of(context.callback))
        return compiled

    @wraps(optimize)
    def or_warn(*args: Any, **kwargs: Any) -> Any:
        context = optimize(*args, **kwargs)
        if not isinstance(context, OptimizeContext) and is_ours(kwargs.get("backend")):
            warn_disabled()
        return context

    @wraps(attribute)
    def or_watched_method(module: OptimizedModule, name: str) -> Any:
        value = attribute(module, name)
        if name == "_orig_mod" or policy_options(module) is None:
            return value
        if isinstance(value, torch.nn.Module):
            watch_parts(value, module._orig_mod)
        is_method = inspect.ismethod(value) and isinstance(value.__self__, torch.nn.Module)
        return watched_method(value) if is_method else value

    @wraps(state)
    def or_warn_of_copy(module: torch.nn.Module) -> Any:
        return copied_state(module, state(module))

    OptimizeContext.__call__ = and_watch  # type: ignore[method-assign, assignment]
    OptimizedModule.__getattr__ = or_watched_method  # type: ignore[method-assign]
    OptimizedModule.__call__ = watched_hooks(OptimizedModule.__call__)  # type: ignore[method-assign]
    torch.nn.Module.__getstate__ = or_warn_of_copy  # type: ignore[method-assign]
    torch._dynamo.optimize = or_warn
    torch.autograd._engine_run_backward = run_backward


@lru_cache(maxsize=1)
def end_steps_after_optimizers() -> None:
    """Let delayed scales of MS-AMP end a step when an optimizer has stepped. Others are not affected."""
    register_optimizer_step_post_hook(after_optimizer_step)


#: Every change, in the order in which they are made.
SETTINGS: tuple[Callable[[], None], ...] = (
    fail_at_recompile_limit,
    trace_recurrent_layers,
    trace_covariances,
    keep_precision_casts_in_cpp,
    keep_dtype_rules,
    cast_whole_vectors_in_cpp,
    inline_functions_in_cpp,
    watch_compiled_calls,
    end_steps_after_optimizers,
)


def apply_settings() -> None:
    """Make all changes, before anything is traced: the first at every compilation, the others once per process."""
    for change in SETTINGS:
        change()
