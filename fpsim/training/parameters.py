"""Rounding the parameters of a module, once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from fpsim.casts import Cast, CastLike, check_cast, parse_cast, refuse_timed
from fpsim.policy.globs import matches
from fpsim.rounding.carriers import check_tensor
from fpsim.suggestions import near_names
from fpsim.training.in_place import Job, check_seed, draw_of_step, round_in_place
from fpsim.training.shards import local, shard_number


@torch.no_grad()
def round_parameters(
    module: nn.Module,
    format: CastLike | Mapping[str, CastLike],
    *,
    rounding: str = "nearest_even",
    overflow: str | None = None,
    seed: int | None = None,
) -> None:
    """Round the parameters of ``module`` in place, once. Buffers stay as they are.

    Args:
        module: the module. The parameters to round are float64, float32, bfloat16 or float16.
        format: the format of all parameters, or a mapping from globs of parameter names to formats
            (``{"*.weight": "e4m3fn", "lm_head": "none"}``). A glob matches a parameter, or a module with all its
            parameters. The first glob that matches decides; parameters that no glob matches are not rounded. A format
            may be a cast, ``format/rounding/overflow/scale``. Every parameter, and every shard of one, has its own
            scale.
        rounding, overflow: the modes of a cast that names none.
        seed: for stochastic rounding, and only for it. Parameter ``i`` is rounded by ``fpsim.round(..., seed=s + i)``,
            where ``s`` is ``draw_of_step(seed, 0)``.

    Raises:
        ValueError: a format or mode is unknown, a glob matches no parameter, a format has values that a parameter's
            dtype lacks, or a seed is missing or has no stochastic rounding to seed. Nothing is rounded in these cases.
        TypeError: a parameter to round does not have one of the four dtypes.
    """
    parameters = dict(module.named_parameters())
    casts = _casts_by_glob(format, rounding, overflow, list(parameters))
    chosen = {name: next((cast for glob, cast in casts.items() if matches(glob, name)), None) for name in parameters}
    check_seed(seed, [cast for cast in casts.values() if cast])
    jobs = [
        Job(local(p), cast, i + len(parameters) * shard_number(p))
        for i, (name, p) in enumerate(parameters.items())
        if (cast := chosen[name]) is not None
    ]
    for job in jobs:
        check_cast(check_tensor(job.tensor), job.cast)
    round_in_place(jobs, None if seed is None else draw_of_step(seed, 0))


def _casts_by_glob(
    format: CastLike | Mapping[str, CastLike], rounding: str, overflow: str | None, names: Sequence[str]
) -> dict[str, Cast | None]:
    if not isinstance(format, Mapping):
        return {"*": _cast(format, rounding, overflow)}
    modules = {name.rpartition(".")[0] for name in names} - {""}
    for glob in format:
        if not any(matches(glob, name) for name in names):
            raise ValueError(f"{glob!r} matches no parameter: {_nearest(glob, [*names, *sorted(modules)])}")
    return {glob: _cast(text, rounding, overflow) for glob, text in format.items()}


def _cast(text: CastLike, rounding: str, overflow: str | None) -> Cast | None:
    cast = parse_cast(text, rounding, overflow)
    refuse_timed(cast, "fpsim.round_parameters")
    return cast


def _nearest(name: str, known: Sequence[str]) -> str:
    """A phrase for a message: the ``known`` names most similar to ``name``, or else the first twenty."""
    near = near_names(name, known)
    if near:
        return f"did you mean {' or '.join(map(repr, near))}?"
    return f"use one of {', '.join(map(repr, known[:20]))}{', ...' if len(known) > 20 else ''}"
