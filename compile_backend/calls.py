"""Calls of models that were compiled with fpsim: a call that runs without fpsim is an error or a warning.

Dynamo calls a backend only for the code that it compiles. It runs all other code as it is, mostly without a word: under
a transform of `torch.func`, after a graph break that it cannot resume from, when it is switched off. That code computes
without rounding. For many causes Dynamo also remembers its decision, and never compiles that code again. So every
callable that `torch.compile` returns for backend ``"fpsim"`` or ``"fpsim_eager"`` is wrapped in `watched`.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Generator, Mapping
from types import FrameType, MethodType
from typing import Any

import torch
from torch import Tensor
from torch._dynamo import config as dynamo_config
from torch._dynamo import eval_frame
from torch._dynamo.utils import counters
from torch.autograd import forward_ad
from torch.utils import _python_dispatch
from torch.utils import _pytree as pytree

from fpsim.compile_backend.errors import UnroundedError
from fpsim.compile_backend.scale_states import ScaleStates
from fpsim.compile_backend.watching import Calls, Gradients, call_runs, listed, thread, warn, warn_of_backward, witness
from fpsim.compile_backend.witness import CAN_WATCH
from fpsim.policy import Policy

#: The module of the backends whose callables are watched.
_BACKENDS = "fpsim.compile_backend.backend"

#: Remedies for transforms of `torch.func`.
_DERIVATIVES = (
    "Take derivatives by backward() or torch.autograd.grad of the compiled model's results. For torch.func there are "
    "fpsim.curvature.functional_loss and functional_outputs of the uncompiled model, which round and can be transformed"
)
_EXAMPLES = "Compile the function that calls torch.vmap, instead of the function that torch.vmap calls"

_WHERE = "fullgraph=True shows where and why, and fpsim.audit lists what ran unrounded"


def policy_options(model: Any) -> tuple[Mapping[str, Any] | None] | None:
    """The options under which the whole of ``model`` is compiled by fpsim, in a tuple; None if it is not."""
    return _noted(model, "_fpsim_options")


def scale_states(model: Any) -> ScaleStates:
    """The states of the scales of ``model``, which is compiled by fpsim.

    Raises:
        TypeError: it is not.
    """
    found = _noted(model, "_fpsim_scales")
    if found is None:
        raise TypeError(
            f"{type(model).__name__} is not compiled by fpsim: give what torch.compile(..., backend='fpsim') returned"
        )
    return found[0]


def _noted(model: Any, name: str) -> tuple[Any] | None:
    """The attribute that `watched` gave the function which runs ``model``, in a tuple; None if there is none."""
    own = getattr(model, "__dict__", {})  # a compiled module looks other attributes up in the module that it wraps
    for part in (model, own.get("forward"), own.get("_compiled_call_impl")):
        if name in getattr(part, "__dict__", ()):
            return (part.__dict__[name],)
    return None


def is_ours(backend: Any) -> bool:
    """Whether ``backend``, as it stands or as torch has wrapped it, is a backend of fpsim."""
    return getattr(_layers(backend)[-1], "__module__", None) == _BACKENDS


def options_of(backend: Any) -> Mapping[str, Any] | None:
    """The options that ``backend``, as torch has wrapped it, passes to a backend of fpsim."""
    given = [getattr(layer, "kwargs", getattr(layer, "keywords", None)) for layer in _layers(backend)]
    options = next((each["options"] for each in given if isinstance(each, Mapping) and "options" in each), None)
    return split_mode(options, None)[0]


def split_mode(options: Mapping[str, Any] | None, mode: str | None) -> tuple[Mapping[str, Any] | None, str | None]:
    """``options`` without the key ``mode``, and the mode, given by this key or on its own.

    Raises:
        ValueError: it is given in both ways.
    """
    if not isinstance(options, Mapping) or "mode" not in options:
        return options, mode
    if mode is not None:
        raise ValueError(f"the mode is given twice, {mode!r} and {options['mode']!r} among the options: leave one out")
    return {key: value for key, value in options.items() if key != "mode"} or None, options["mode"]


def _layers(backend: Any) -> list[Any]:
    """``backend`` and what it wraps: in Dynamo's wrappers, in that of `torch.compile`, in a partial."""
    layers, names = [backend], ("_torchdynamo_orig_backend", "compiler_fn", "func")
    while (inner := next((getattr(layers[-1], name) for name in names if hasattr(layers[-1], name)), None)) is not None:
        layers.append(inner)
    return layers


def warn_disabled() -> None:
    """Warn that `torch.compile` returns the model as it is."""
    warn(
        "torch.compile returns the model as it is, and it runs unrounded: disable=True was given, or "
        "TORCHDYNAMO_DISABLE=1 is set. Remove it to simulate a format"
    )


def watched(compiled: Callable[..., Any], options: Mapping[str, Any] | None) -> Callable[..., Any]:
    """``compiled``, a function that Dynamo returned, with an error or a warning for calls that run without fpsim.

    While Dynamo still compiles parts of it, calls are watched by a `Witness`, and a warning names the products that ran
    beside the graphs that fpsim rewrote. Later calls cost a few microseconds more.

    Args:
        options: those of the backend. They become the attribute ``_fpsim_options``.
    """
    original = getattr(compiled, "_torchdynamo_orig_callable", compiled)
    name = _name(original)
    calls = Calls(name)
    states = ScaleStates(original)

    def call(*args: Any, **kwargs: Any) -> Any:
        if thread.is_quiet:
            with states.copied().running():
                return compiled(*args, **kwargs)
        _refuse_call(name)
        _refuse_other_policy(original, options)
        if dynamo_config.disable:  # Dynamo, if it were called, would leave this code out in later calls too
            warn(f"{name} runs unrounded: torch._dynamo.config.disable is on. Set it to False")
            return original(*args, **kwargs)
        graphs, frames = thread.graphs, Counter(counters["frames"])
        gradients = None if calls.settled and calls.differentiated else Gradients(calls, (args, kwargs))
        with states.running(), call_runs(), contextlib.nullcontext() if calls.settled else witness(gradients) as seen:
            result = compiled(*args, **kwargs)
        new_frames = Counter(counters["frames"]) - frames
        calls.settled = thread.graphs > graphs and not new_frames
        if gradients is not None and not (seen.products if seen else calls.escaped):  # one warning is enough
            gradients.cover(result)
            warn_of_backward(gradients)
        if thread.graphs > graphs:
            if seen is not None and seen.products not in (Counter(), calls.escaped):
                calls.escaped = seen.products
                products = listed(calls.escaped)
                warn(f"{products} ran unrounded in {name}, outside of the graphs that fpsim rewrote: {_WHERE}")
        elif isinstance(result, Generator | AsyncGenerator):
            raise UnroundedError(
                f"{name} is a generator, which Dynamo does not compile: it would run unrounded. Compile the "
                "function that computes one item"
            )
        elif (
            seen.computed
            if seen is not None
            else new_frames["total"] > new_frames["ok"] or _is_new(result, args, kwargs)
        ):
            _report_eager_call(name)
        return result

    # Other compiled code would inline the function, under another backend or policy. It calls what is disabled instead.
    outside = torch.compiler.disable(call, reason="it is compiled by fpsim, under a policy of its own")
    marks = {"_torchdynamo_wrapper_id": id(outside), "_torchdynamo_disable_msg": outside._torchdynamo_disable_msg}
    functools.update_wrapper(outside, compiled)
    outside.__dict__.update(marks, _fpsim_options=options, _fpsim_scales=states)
    outside.__dict__.pop("_torchdynamo_inline", None)
    return outside


def watched_method(method: Callable[..., Any]) -> Callable[..., Any]:
    """``method`` of a compiled module, which torch runs uncompiled, with a warning of the products in it."""

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        with contextlib.nullcontext() if thread.is_quiet else witness() as seen:
            result = method(*args, **kwargs)
        if seen is not None and seen.products:
            name = _name(method)
            warn(
                f"{listed(seen.products)} ran unrounded in {name}.{method.__name__}: torch.compile compiles the "
                f"forward method alone. Compile this one too: torch.compile(model.{method.__name__}, backend='fpsim')"
            )
        return result

    return call


def watch_parts(part: torch.nn.Module, whole: torch.nn.Module) -> None:
    """Let calls of ``part`` of a compiled module ``whole``, or of modules in it, warn of the products in them.

    Torch runs them uncompiled. The first such call warns. Calls within a call of ``whole`` do not.
    """
    for module in part.modules():
        if module._compiled_call_impl is None:
            module._compiled_call_impl = functools.partial(_call_part, module, whole)


def _call_part(part: torch.nn.Module, whole: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_compiling() or thread.is_quiet or thread.calls or thread.is_watched or _runs(whole):
        return part._call_impl(*args, **kwargs)
    for module in part.modules():
        if getattr(module._compiled_call_impl, "func", None) is _call_part:
            module._compiled_call_impl = None
    with witness() as seen:
        result = part(*args, **kwargs)
    if seen is not None and seen.products:
        warn(
            f"{listed(seen.products)} ran unrounded in {type(part).__name__}, a part of the compiled module "
            f"{type(whole).__name__}: torch.compile compiles calls of the whole module alone. Compile the part too: "
            "torch.compile(part, backend='fpsim')"
        )
    return result


def _runs(module: torch.nn.Module) -> bool:
    """Whether a call of ``module`` is under way in this thread."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is torch.nn.Module._call_impl.__code__ and frame.f_locals["self"] is module:
            return True
        frame = frame.f_back
    return False


def keep_in_other_code(module: torch.nn.Module) -> None:
    """Let other compiled code call ``module``, which is compiled in place by fpsim, instead of inlining it.

    Dynamo inlines the class's forward method without a look at what `torch.nn.Module.compile` has made, unless the
    module has a forward method of its own.
    """
    vars(module).setdefault("forward", _own_forward(module))


def _own_forward(module: torch.nn.Module) -> MethodType:
    """The method forward of the class of ``module``."""
    return MethodType(type(module).forward, module)


def watched_hooks(call: Callable[..., Any]) -> Callable[..., Any]:
    """``call`` of a module that `torch.compile` returned, with a warning of the products in hooks of that module."""

    @functools.wraps(call)
    def and_watch(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        hooks = module._forward_hooks or module._forward_pre_hooks
        if not hooks or thread.is_quiet or policy_options(module) is None:
            return call(module, *args, **kwargs)
        with witness() as seen:
            result = call(module, *args, **kwargs)
        if seen is not None and seen.products:
            warn(
                f"{listed(seen.products)} ran unrounded in {type(module._orig_mod).__name__} or in hooks of the "
                "compiled module, which run outside of it: register hooks on the module before torch.compile"
            )
        return result

    return and_watch


def warn_of_replacement(model: Any) -> None:
    """Warn that `torch.compile` of ``model``, which fpsim has compiled, compiles what is inside for another backend."""
    own = getattr(model, "__dict__", {})
    is_unwrapped = "_fpsim_options" in own or "_orig_mod" in own.get("_modules", ())
    if is_unwrapped and policy_options(model) is not None and not thread.is_quiet:
        name = _name(own.get("_torchdynamo_orig_callable") or own["forward"]._torchdynamo_orig_callable)
        warn(
            f"torch.compile replaces the code of {name}, which fpsim has compiled, by that of another backend, and it "
            "runs unrounded: call the compiled model as it is"
        )


def copied_state(module: torch.nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """``state``, of which a copy of ``module`` is made, with a warning if the copy is not compiled as the module is."""
    if "_fpsim_options" not in getattr(vars(module).get("_compiled_call_impl"), "__dict__", ()):
        return state
    if not thread.is_quiet:
        warn(
            f"a copy of {type(module).__name__} is not compiled, and runs unrounded: torch leaves out what "
            "module.compile() made when it copies or saves a module. Call compile() of the copy too"
        )
    return {name: value for name, value in state.items() if name != "forward" or value != _own_forward(module)}


def _refuse_call(name: str) -> None:
    """Refuse a call that Dynamo would run without the backend, before Dynamo remembers to leave the code out."""
    transform = torch._C._functorch.peek_interpreter_stack()
    if transform is not None:
        kind = transform.key().name.lower()
        raise UnroundedError(
            f"torch.func.{kind} over {name}, which is compiled by fpsim: Dynamo would run it unrounded, in this call "
            f"and in all later ones. {_EXAMPLES if kind == 'vmap' else _DERIVATIVES}"
        )
    if forward_ad._current_level >= 0:
        raise UnroundedError(
            f"{name} is called within forward_ad.dual_level: compiled code would drop the tangents of dual numbers, "
            f"those of arguments and of parameters. {_DERIVATIVES}"
        )
    if torch.compiler.is_exporting():
        raise UnroundedError(
            f"torch.export of {name}, which is compiled by fpsim: the exported program would not round. Export the "
            "uncompiled model, and compile the exported program's module() with fpsim"
        )
    if dynamo_config.compiled_autograd:
        raise UnroundedError(
            f"compiled autograd traces the backward pass of {name} again, and fpsim could not tell forward from "
            "backward products: set torch._dynamo.config.compiled_autograd to False. Backward is then compiled with "
            "forward"
        )
    if _any_mode():
        raise UnroundedError(
            f"{name} is called under a TorchDispatchMode, where Dynamo would run it unrounded, in this call and in all "
            "later ones. Use the mode on the uncompiled model"
        )


def _refuse_other_policy(function: Callable[..., Any], options: Mapping[str, Any] | None) -> None:
    """Refuse to call a module that is compiled in place with other options: these would hold, and not ``options``."""
    module = getattr(function, "__self__", None)
    in_place = getattr(module, "__dict__", {}).get("_compiled_call_impl")
    if function == getattr(module, "_call_impl", None) or not hasattr(in_place, "_fpsim_options"):
        return
    options_in_place = in_place._fpsim_options  # type: ignore[union-attr]
    if Policy.from_options(options_in_place) != Policy.from_options(options):
        raise UnroundedError(
            f"{type(module).__name__} is compiled twice by fpsim: with the options {options}, and by compile() of the "
            f"module with {options_in_place}, which would hold. Compile it once"
        )


def _any_mode() -> bool:
    """Whether a mode is on under which Dynamo compiles nothing."""
    modes: list[Any] = getattr(_python_dispatch, "_get_current_dispatch_mode_stack", list)()
    return (
        any(not mode.is_infra_mode() and not mode.ignore_compile_internals() for mode in modes) if CAN_WATCH else False
    )


def _report_eager_call(name: str) -> None:
    """Report a call that ran no rewritten graph: an error, or a warning where the user has asked torch for it."""
    stance = getattr(eval_frame, "_stance", None)
    if stance is not None and (stance.stance != "default" or stance.backend is not None):
        asked = f"backend {stance.backend!r}" if stance.stance == "default" else repr(stance.stance)
        warn(f"{name} ran unrounded, as torch.compiler.set_stance asks ({asked}). Set the stance 'default'")
        return
    raise UnroundedError(
        f"nothing of {name} was compiled in this call, so that it ran unrounded. Dynamo leaves out code that it cannot "
        "trace (hooks for backward, scripted or sparse parts, graph breaks within try or with), code that is disabled, "
        "and code that it has left out once (torch._dynamo.reset() forgets that). A layer of torch.nn in a wrapper, "
        f"such as DistributedDataParallel, is compiled if it stands in a module of your own. {_WHERE}"
    )


def _is_new(result: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether ``result`` holds a tensor that was not given."""
    given = {id(leaf) for leaf in pytree.tree_leaves((args, dict(kwargs)))}
    return any(isinstance(leaf, Tensor) and id(leaf) not in given for leaf in pytree.tree_leaves(result))


def _name(function: Callable[..., Any]) -> str:
    owner = getattr(function, "__self__", getattr(function, "__wrapped__", None))
    if isinstance(owner, torch.nn.Module):
        return type(owner).__name__
    return getattr(function, "__qualname__", "the compiled model")
