"""The checks before any product is looked at. They refuse whatever would leave products unrounded without an error."""

from __future__ import annotations

import copy
import fnmatch
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._dynamo import compiled_autograd
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options

from fpsim.casts import Cast
from fpsim.compile_backend.calls import split_mode
from fpsim.compile_backend.errors import UnroundedError
from fpsim.compile_backend.graph.dynamo import all_nodes
from fpsim.compile_backend.graph.module_paths import module_paths, near_modules
from fpsim.formats import FloatFormat
from fpsim.policy import Policy
from fpsim.policy.globs import matches
from fpsim.scaling.scale import POWERS_OF_TWO
from fpsim.suggestions import did_you_mean, near_names, suggest

#: Settings of Inductor under which it changes the operands of products, and how.
_REWRITES = {
    "freezing": "multiplies constants into rounded weights, and draws stochastically rounded weights only once",
    "efficient_conv_bn_eval_fx_passes": "multiplies the factors of a batch norm into a weight before it is rounded",
}
#: Functions in graphs that belong to transforms of `torch.func` or to forward mode, and those of `torch.vmap`.
_DERIVATIVE = re.compile(r"_functorch|torch\.autograd\.forward_ad|_(make|unpack)_dual|_(enter|exit)_dual_level")
_EXAMPLES = re.compile("vmap|batch_dim|lazy_load_decompositions")
#: The function around ``x.requires_grad_()`` in a graph; a transform has other ones besides.
_REQUIRES_GRAD = "set_inplace_requires_grad_allowed"

#: The modes of `torch.compile` whose settings may stand beside rounding.
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")

# By identity: the options of every compiled model, and the policy and the mode that they described when they were first
# seen. The options are kept alive, so that no other mapping gets the same identity.
_first_policies: dict[int, tuple[Mapping[str, Any], tuple[Policy, str | None]]] = {}


def settings_of_mode(mode: str | None) -> dict[str, Any]:
    """The settings of Inductor that a mode of `torch.compile` stands for.

    Matrix products stay those of ATen under all modes. A template that tuning picks would add in another order, and in
    another one on another day.

    Raises:
        ValueError: there is no such mode, or its settings leave rounding out.
    """
    if mode is None or mode in MODES:
        settings = dict(list_mode_options(mode or "default"))
        return {**settings, "max_autotune_gemm_backends": "ATEN"} if settings.get("max_autotune") else settings
    raise ValueError(
        f"backend 'fpsim' has no mode {mode!r}{did_you_mean(mode, MODES)}: use one of {', '.join(MODES)}, or set "
        "single settings, such as torch._inductor.config.coordinate_descent_tuning = True, before the first call"
    )


def check_options(options: Mapping[str, Any] | None, mode: str | None) -> tuple[Policy, str | None]:
    """The policy and the mode of ``options``, which must not have changed since a model was compiled with them.

    `torch.compile` keeps the mapping that it is given, and passes it to the backend at every compilation: for another
    shape, or in training after inference. If the mapping changed in between, one model would run under two policies.
    """
    own, mode = split_mode(options, mode)
    found = Policy.from_options(own), mode
    if options is not None and _first_policies.setdefault(id(options), (options, found))[1] != found:
        raise ValueError(
            f"the options {dict(options)} have changed since a model was compiled with them: give every torch.compile "
            "a mapping of its own, or a Policy, which cannot change"
        )
    return found


def watching(run: Callable[..., Any], options: Mapping[str, Any] | None, mode: str | None) -> Callable[..., Any]:
    """``run``, the compiled code of a model, which calls `check_options` whenever ``options`` look changed.

    Dynamo takes code that it has compiled with the same mapping for another model of the same class, without a call of
    the backend: it would run under the policy that the mapping described before.
    """
    if options is None:
        return run
    before = copy.deepcopy(dict(options))

    @functools.wraps(run)
    def checked(*args: Any) -> Any:
        if options != before:
            check_options(options, mode)
        return run(*args)

    return checked


def refuse_settings(policy: Policy) -> None:
    """Refuse settings of torch under which products would differ from those that the policy describes."""
    for name, effect in _REWRITES.items():
        if getattr(inductor_config, name, False):
            raise ValueError(
                f"torch._inductor.config.{name} {effect}, so that the model would not compute what the policy says: "
                "set it to False"
            )
    precision = torch.get_float32_matmul_precision()
    if precision != "highest" and not all(_fits(cast, precision) for cast in policy.operand_casts()):
        raise ValueError(
            f"torch shortens the operands of float32 products: torch.get_float32_matmul_precision() is {precision!r}, "
            "and the policy has operands with more bits. Call torch.set_float32_matmul_precision('highest')"
        )


def _fits(cast: Cast | None, precision: str) -> bool:
    """Whether the format to which torch shortens operands, TF32 or bfloat16, holds all values of ``cast``.

    None stands for an unrounded operand.
    """
    if cast is None or cast.grid is None or (cast.scale is not None and cast.scale.rule not in POWERS_OF_TWO):
        return False
    return cast.grid.is_subset_of(FloatFormat(8, 10 if precision == "high" else 7))


def refuse_inner_gradients(gm: fx.GraphModule) -> None:
    """Refuse a graph that takes derivatives itself, in which forward and backward products cannot be told apart.

    `torch.func` takes derivatives in a graph, and so do `torch.autograd` if ``torch._dynamo.config.trace_autograd_ops``
    is set and compiled autograd. `torch.vmap` is accepted.
    """
    if getattr(compiled_autograd, "in_compiled_autograd_region", False):
        raise UnroundedError(
            "compiled autograd hands a backward pass to fpsim, which cannot tell forward from backward products in it: "
            "compile the forward pass with fpsim, and leave torch._dynamo.config.compiled_autograd off"
        )
    for node in all_nodes(gm):
        target = f"{getattr(node.target, '__module__', '')} {node.target}"
        if node.target in (torch.autograd.grad, torch.autograd.backward, "backward"):
            remedy = "set torch._dynamo.config.trace_autograd_ops to False; backward then runs compiled, outside"
        elif _DERIVATIVE.search(target) and not _EXAMPLES.search(target) and _REQUIRES_GRAD not in target:
            remedy = (
                "compile the model alone, and call backward() or torch.autograd.grad on its results, or transform "
                "fpsim.curvature.functional_loss of the uncompiled model by torch.func"
            )
        else:
            continue
        raise UnroundedError(
            f"the compiled function takes derivatives itself ({node.name}), so that forward and backward products "
            f"cannot be told apart: {remedy}"
        )


def check_globs(gm: fx.GraphModule, policy: Policy) -> None:
    """Refuse a glob of modules that matches no module of the graph.

    Either the glob is misspelt, or the graph is a part of the model that is compiled on its own: a layer, or the code
    after a graph break. Module paths then start at that part, and a rule for the whole model would silently not apply.
    """
    paths = module_paths(gm)
    for glob in policy.unmatched_globs(paths):
        inside = " and to which the rule around it applies" if any(matches(glob, path) for path in paths) else ""
        raise ValueError(
            f"{glob!r} matches no module that computes anything in this graph{inside}"
            f"{suggest(near_modules(glob, paths))}, whose modules are {_listed(sorted(paths - {''}))}. If it is right "
            "for the whole model, this is a part compiled on its own (after a graph break, or by layer.compile()): "
            "compile the whole model with fullgraph=True"
        )


def check_gaps(policy: Policy) -> None:
    """Refuse a glob of operators that matches no registered operator.

    A glob for a library that has registered no operators (yet) is accepted.
    """
    known = operator_names() if policy.all_gaps else frozenset()
    for glob in policy.all_gaps:
        namespace, dot, _ = glob.partition(".")
        is_open = dot and namespace not in {name.partition(".")[0] for name in known}
        if not is_open and not any(fnmatch.fnmatchcase(name, glob) for name in known):
            written_out = glob if dot else f"aten.{glob}"
            near = near_names(written_out, known, cutoff=0.7)
            raise ValueError(
                f"gaps has {glob!r}, which matches no operator{suggest(near)}: operators are named with their "
                "namespace, such as 'aten._cdist_forward'; globs such as 'aten._cdist*' match several"
            )


def operator_names() -> frozenset[str]:
    """The names of all registered operators, in the spelling of gaps: ``aten.mm``."""
    names = torch._C._dispatch_get_all_op_names()
    return frozenset(name.partition(".")[0].replace("::", ".") for name in names)


def _listed(names: Sequence[str], most: int = 30) -> str:
    if not names:
        return "none"
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
