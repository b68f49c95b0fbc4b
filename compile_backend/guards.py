"""What the backend refuses before it looks at any product, so that nothing stays unrounded without a word."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._inductor import config as inductor_config
from torch.nn.parallel import DistributedDataParallel

from fpsim.casts import Cast
from fpsim.compile_backend.errors import UnroundedError
from fpsim.compile_backend.graph.nodes import stack_path
from fpsim.formats import FloatFormat
from fpsim.policy import Policy
from fpsim.policy.globs import matches
from fpsim.suggestions import near_names, suggest

# The options of every compiled model, kept alive so that no other takes over the identity, and what they said first.
_first_said: dict[int, tuple[Mapping[str, Any], Policy]] = {}


def check_options(options: Mapping[str, Any] | None, mode: str | None) -> None:
    """Refuse a mode, and options that were changed after a model was compiled with them.

    `torch.compile` keeps the mapping it is given and hands it over whenever it compiles: for another shape, in
    training after inference. Changed in between, one model would run under two policies.
    """
    if mode not in (None, "default"):
        raise ValueError(
            f"backend 'fpsim' has no mode {mode!r}: leave mode out, and set Inductor's own config if needed"
        )
    policy = Policy.from_options(options)
    if options is not None and _first_said.setdefault(id(options), (options, policy))[1] != policy:
        raise ValueError(
            f"the options {dict(options)} have changed since a model was compiled with them: give every torch.compile "
            "a mapping of its own, or a Policy, which cannot change"
        )


def refuse_settings(policy: Policy) -> None:
    """Refuse settings of torch under which products would not be those that the policy describes."""
    if inductor_config.freezing and policy.is_stochastic:
        raise ValueError(
            "torch._inductor.config.freezing makes constants of rounded weights, drawn once for all calls: set it to "
            "False, or round deterministically"
        )
    precision = torch.get_float32_matmul_precision()
    if precision != "highest" and not all(_fits(cast, precision) for cast in policy.operand_casts()):
        raise ValueError(
            f"float32 products are computed from shortened operands here: torch.get_float32_matmul_precision() is "
            f"{precision!r}, and the policy has operands with more bits. Call "
            "torch.set_float32_matmul_precision('highest')"
        )


def _fits(cast: Cast | None, precision: str) -> bool:
    """Whether a rounded operand (None: unrounded) is exact in what products use instead: TF32 or bfloat16."""
    return cast is not None and cast.format.is_subset_of(FloatFormat(8, 10 if precision == "high" else 7))


def refuse_inner_gradients(gm: fx.GraphModule) -> None:
    """Refuse a function that takes derivatives itself, by `torch.func`; `torch.vmap` is none of these."""
    for node in gm.graph.nodes:
        target = f"{getattr(node.target, '__module__', '')} {node.target}"
        if "_functorch" in target and not re.search("vmap|batch_dim|lazy_load_decompositions", target):
            raise UnroundedError(
                f"the compiled function takes derivatives itself ({node.name}), so that forward and backward products "
                "cannot be told apart: compile the model, and take the derivative of the compiled model"
            )


def check_globs(gm: fx.GraphModule, policy: Policy) -> None:
    """Refuse a glob of modules that matches none: a slip, or a part of the model compiled on its own.

    There (a layer compiled by itself, code after a graph break within a module) paths start at that part, and a rule
    meant for the whole model would silently not hold.
    """
    paths = module_paths(gm)
    for glob in unmatched_globs(policy, paths):
        raise ValueError(
            f"{glob!r} matches no module that computes anything in this graph{suggest(near_modules(glob, paths))}"
            f", whose modules are {_listed(sorted(paths - {''}))}. If it is right for the whole model, this is a part "
            "compiled on its own (after a graph break, or by layer.compile()): compile the whole model with "
            "fullgraph=True"
        )


def check_gaps(policy: Policy) -> None:
    """Refuse a glob of operators that matches none that is registered.

    One of a library whose operators are not registered (yet) is let be.
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
    """The names of all operators that are registered, as gaps name them: ``aten.mm``."""
    names = torch._C._dispatch_get_all_op_names()
    return frozenset(name.partition(".")[0].replace("::", ".") for name in names)


def near_modules(glob: str, paths: Iterable[str]) -> list[str]:
    """Up to three paths, or globs of the last part of paths, that ``glob`` may be a slip of."""
    paths = sorted(set(paths) - {""})
    near = near_names(glob, paths, cutoff=0.7)
    names = {path.rpartition(".")[2]: path for path in paths}
    for name in near_names(glob.rpartition(".")[2], names, cutoff=0.7):
        near.append(f"*.{name}" if "." in names[name] else name)
    return list(dict.fromkeys(near))[:3]


def _listed(names: Sequence[str], most: int = 30) -> str:
    if not names:
        return "none"
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def unmatched_globs(policy: Policy, paths: set[str]) -> list[str]:
    """The globs of ``skip`` and ``modules`` that match none of ``paths``."""
    return [glob for glob in policy.globs if not any(matches(glob, path) for path in paths)]


def module_paths(gm: fx.GraphModule) -> set[str]:
    """The paths of the modules in whose forward anything of a Dynamo graph arose, and of all that contain them.

    Of the parts into which Dynamo splits a DistributedDataParallel model, those of the whole model.
    """
    return {path for node in gm.graph.nodes for path in _paths(node)} | set(_paths_in_parallel_model())


def _paths(node: fx.Node) -> Iterator[str]:
    for path, _ in (node.meta.get("nn_module_stack") or {}).values():
        yield stack_path(path)


def _paths_in_parallel_model() -> Iterator[str]:
    parallel = DistributedDataParallel._get_active_ddp_module()
    if parallel is not None:
        yield from (name for name, _ in parallel.module.named_modules())
