"""`fpsim.export`: a model under a policy as a program of `torch.export`.

The program holds the forward graph that the backend rewrites, with fpsim's operators in it. The pass, the plan and the
guards are those of backend ``"fpsim_eager"``.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from fpsim.compile_backend.calls import policy_options, scale_states
from fpsim.compile_backend.compiling import SETTINGS_OF_INDUCTOR
from fpsim.compile_backend.errors import UnroundedError
from fpsim.compile_backend.functional import Traced, trace
from fpsim.compile_backend.scale_states import ScaleStates, timed_factor_op
from fpsim.policy import Policy
from fpsim.rounding.ops import draw_seed


def export(
    model: nn.Module,
    args: tuple[Any, ...],
    policy: Policy | Mapping[str, Any] | str | None = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    scales: Mapping[str, Mapping[str, Any]] | None = None,
) -> ExportedProgram:
    """``model`` under ``policy`` as a program that `torch.export.save` writes and AOTInductor compiles.

    The program is for inference. Its values are those of the model compiled by backend ``"fpsim_eager"``, bit for bit.
    Its roundings are calls of fpsim's operators: import `fpsim.operators` where the program is loaded. Compiled by
    `package` it has the bits of backend ``"fpsim"``.

    Args:
        model: a module, in the mode in which it will be used (`torch.nn.Module.eval`). If `torch.compile` has compiled
            it with fpsim, its own policy and scales hold, and ``policy`` and ``scales`` must be None.
        args: example inputs, a tuple. Only their shapes and dtypes matter.
        policy: a `Policy`, a mapping of its fields, the name of a preset, or None for the FP8 hybrid. Under stochastic
            rounding each run of the program draws one seed from torch's generator, as the compiled model does.
        kwargs: example inputs that are passed by keyword.
        dynamic_shapes: the sizes that may vary, as for `torch.export.export`.
        scales: the state of scales that other steps determine (``history``, ``every``, ``calibrated``), which
            `fpsim.scale_state` or `fpsim.calibrate` returned. They become constants of the program.

    Returns:
        A program with the names of the model's parameters and buffers. No parameter needs a gradient.

    Raises:
        UnroundedError: a product that cannot be rounded, or a module that was compiled in place.
        ValueError: a bad policy, a model that torch cannot trace as one graph or that allows fewer sizes than
            ``dynamic_shapes``, two sizes that vary and have the same example, a size that is derived from another one,
            a scale without a state in ``scales`` or one that this step renews.
        RuntimeError: a calibrated scale without a state in ``scales``.

    >>> model = torch.nn.Linear(4, 2).eval()
    >>> program = export(model, (torch.randn(3, 4),), {"format": "e4m3fn"})
    >>> [str(node.target) for node in program.graph.nodes if "fpsim" in str(node.target)]
    ['fpsim.round.default', 'fpsim.round.default']
    """
    if not isinstance(args, tuple):
        raise TypeError(f"args is a tuple of example inputs, got {type(args).__name__}: write (x,)")
    model, policy, states = _resolved(model, policy, scales)
    kwargs = dict(kwargs or {})
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    try:
        ranges = {} if dynamic_shapes is None else _ranges(model, args, kwargs, dynamic_shapes, len(state))
        with torch.no_grad(), states.running():
            traced = trace(model, policy, (state, args, kwargs), ranges=ranges)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        raise error.inner_exception from error
    except (torch._dynamo.exc.Unsupported, torch._dynamo.exc.UserError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"torch cannot trace {type(model).__name__} as one graph: {reason}. torch.compile(model, fullgraph=True) "
            "shows where"
        ) from error
    _fix_scales(traced.graph, states)
    with torch.no_grad():
        rounded = _Rounded(model, traced, state)
        program = torch.export.export(rounded, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
    _check_roundings(traced.graph, program)
    return program


def package(program: ExportedProgram, path: str, *, inductor_configs: Mapping[str, Any] | None = None) -> str:
    """Compile a program of `export` by AOTInductor, with the settings under which it has the bits of backend "fpsim".

    Without them Inductor keeps 16-bit values in float32 between fused operators, so that a rounding sees numbers that
    the model never had, and draws other random numbers than torch.

    Args:
        program: a program of `export`.
        path: the file to write, which ends in ``.pt2``. `torch._inductor.aoti_load_package` reads it.
        inductor_configs: more settings, as for `torch._inductor.aoti_compile_and_package`.

    Returns:
        The path.
    """
    settings = {**(inductor_configs or {}), **SETTINGS_OF_INDUCTOR, "fallback_random": True}
    return torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=settings)


class _Rounded(nn.Module):
    """A traced graph as a module with the parameters, the buffers and the signature of the model."""

    def __init__(self, model: nn.Module, traced: Traced, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        names, parameters = list(state), dict(model.named_parameters())
        for name, value in state.items():
            home: nn.Module = self
            *parts, own = name.split(".")
            for part in parts:
                if part not in home._modules:
                    home.add_module(part, nn.Module())
                home = home.get_submodule(part)
            if name in parameters:
                home.register_parameter(own, nn.Parameter(value.detach(), requires_grad=False))
            else:
                home.register_buffer(own, value)
        device = next((value.device for value in state.values()), torch.device("cpu"))

        def forward(*args: Any, **kwargs: Any) -> Any:
            own = {name: self.get_parameter(name) if name in parameters else self.get_buffer(name) for name in names}
            leaves = pytree.tree_leaves((own, args, kwargs))
            return traced([*leaves, draw_seed(device)] if traced.has_seed else leaves)

        forward.__signature__ = inspect.signature(model.forward)  # type: ignore[attr-defined]
        self.forward = forward


def _resolved(
    model: nn.Module,
    policy: Policy | Mapping[str, Any] | str | None,
    scales: Mapping[str, Mapping[str, Any]] | None,
) -> tuple[nn.Module, Policy, ScaleStates]:
    """The uncompiled model, the policy, and the states of its scales."""
    options = policy_options(model)
    if options is None:
        states = ScaleStates()
        states.load(scales or {})
        if not isinstance(model, nn.Module):
            raise TypeError(f"fpsim.export takes a torch.nn.Module, got {type(model).__name__}")
        return model, Policy.from_options(policy if policy is None else {"policy": policy}), states
    if policy is not None or scales is not None:
        raise ValueError("the model is compiled and keeps its policy and its scales: leave policy and scales out")
    plain = getattr(model, "_orig_mod", None)
    if not isinstance(plain, nn.Module):
        raise UnroundedError(
            f"{type(model).__name__} was compiled in place, by its method compile, or is no module: give a module that "
            "is not compiled, with its policy"
        )
    states = ScaleStates()
    states.load(scale_states(model).to_dict())
    return plain, Policy.from_options(options[0]), states


def _ranges(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any, first: int
) -> dict[tuple[int, int], tuple[int, int]]:
    """The sizes of inputs that vary: from a leaf (the inputs begin at ``first``) and its axis to the bounds.

    torch's export of the unrounded model finds them.
    """
    with torch.no_grad():
        program = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
    named = {node.name: node.meta["val"] for node in program.graph.find_nodes(op="placeholder")}
    leaves = pytree.tree_leaves((args, kwargs))
    symbols: dict[int, str] = {}
    ranges: dict[tuple[int, int], tuple[int, int]] = {}
    for position, (name, leaf) in enumerate(zip(program.graph_signature.user_inputs, leaves, strict=True), first):
        if not isinstance(leaf, Tensor):
            continue
        for axis, size in enumerate(named[str(name)].shape):
            if not isinstance(size, torch.SymInt):
                continue
            symbol, example = size.node.expr, leaf.shape[axis]
            if symbol not in program.range_constraints:
                raise ValueError(
                    f"axis {axis} of input {name} has the size {symbol}, derived from another one: let it vary "
                    "on its own, or not at all"
                )
            if symbols.setdefault(example, str(symbol)) != str(symbol):
                raise ValueError(
                    f"two sizes that vary on their own have the same example, {example}: give examples of different "
                    "sizes, or one Dim for both"
                )
            bounds = program.range_constraints[symbol]
            ranges[position, axis] = int(max(bounds.lower, 2)), int(min(bounds.upper, 2**62))
    return ranges


def _fix_scales(gm: fx.GraphModule, states: ScaleStates) -> None:
    """Replace the factors in use of scales that other steps determine by constants."""
    for number, node in enumerate(gm.graph.find_nodes(op="call_function", target=timed_factor_op)):
        _, _, site, phase, element, scale, *_ = node.args
        name = f"fpsim_scale_{number}"
        gm.register_buffer(name, states.settled_factor(site, phase, element, scale))
        with gm.graph.inserting_before(node):
            constant = gm.graph.get_attr(name)
        node.replace_all_uses_with(constant)
        gm.graph.erase_node(node)
    gm.graph.eliminate_dead_code()
    gm.recompile()


def _check_roundings(gm: fx.GraphModule, program: ExportedProgram) -> None:
    """Check that the program has all operators of fpsim that the graph has."""
    counts = [
        sum(getattr(node.target, "namespace", None) == "fpsim" for node in graph.nodes)
        for graph in (gm.graph, program.graph)
    ]
    if counts[0] != counts[1]:
        raise UnroundedError(f"torch.export kept {counts[1]} of the {counts[0]} operators of fpsim in the graph")
