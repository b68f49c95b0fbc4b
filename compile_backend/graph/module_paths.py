"""The modules in which a graph arose, and corrections of globs that match none of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import fx
from torch.nn.parallel import DistributedDataParallel

from fpsim.compile_backend.graph.dynamo import all_nodes
from fpsim.compile_backend.graph.nodes import stack_path
from fpsim.suggestions import near_names


def module_paths(gm: fx.GraphModule) -> set[str]:
    """The paths of the modules whose forward contributes nodes to a Dynamo graph, and of the modules around them.

    Dynamo splits a DistributedDataParallel model into parts. For such a part the paths are those of the whole model.
    """
    return {path for node in all_nodes(gm) for path in _paths(node)} | set(_paths_in_parallel_model())


def _paths(node: fx.Node) -> Iterator[str]:
    for path, _ in (node.meta.get("nn_module_stack") or {}).values():
        yield stack_path(path)


def _paths_in_parallel_model() -> Iterator[str]:
    parallel = DistributedDataParallel._get_active_ddp_module()
    if parallel is not None:
        yield from (name for name, _ in parallel.module.named_modules())


def near_modules(glob: str, paths: Iterable[str]) -> list[str]:
    """Up to three corrections of ``glob``: paths, or globs of the last part of paths."""
    paths = sorted(set(paths) - {""})
    near = near_names(glob, paths, cutoff=0.7)
    names = {path.rpartition(".")[2]: path for path in paths}
    for name in near_names(glob.rpartition(".")[2], names, cutoff=0.7):
        near.append(f"*.{name}" if "." in names[name] else name)
    return list(dict.fromkeys(near))[:3]
