"""Rounding the parameters of a module, once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from fpsim.casts import Cast, CastLike, check_cast, parse_cast
from fpsim.policy.globs import matches
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
        module: its parameters are float64, float32, bfloat16 or float16 where they are rounded.
        format: of all parameters, or a mapping from globs of parameter names to formats (``{"*.weight": "e4m3fn",
            "lm_head": "none"}``): a glob matches a parameter, or a module with all its parameters; the first that
            matches decides, and what none matches stays unrounded. A format may be a cast,
            ``format/rounding/overflow/scale``; every parameter, and every shard of one, has a scale of its own.
        rounding, overflow: where a cast names none.
        seed: for stochastic rounding, and only for it: parameter ``i`` is rounded as by ``fpsim.round(..., seed=s +
            i)``, where ``s`` is `draw_of_step` of the seed and 0.

    Raises:
        ValueError: an unknown format or mode, a glob that matches no parameter, a format with values that a parameter's
            dtype lacks, stochastic rounding without a seed or a seed without it. Nothing has been rounded then.
        TypeError: a parameter to be rounded that is not of one of the four dtypes.
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
        check_cast(job.tensor.dtype, job.cast)
    round_in_place(jobs, None if seed is None else draw_of_step(seed, 0))


def _casts_by_glob(
    format: CastLike | Mapping[str, CastLike], rounding: str, overflow: str | None, names: Sequence[str]
) -> dict[str, Cast | None]:
    if not isinstance(format, Mapping):
        return {"*": parse_cast(format, rounding, overflow)}
    modules = {name.rpartition(".")[0] for name in names} - {""}
    for glob in format:
        if not any(matches(glob, name) for name in names):
            raise ValueError(f"{glob!r} matches no parameter: {_nearest(glob, [*names, *sorted(modules)])}")
    return {glob: parse_cast(text, rounding, overflow) for glob, text in format.items()}


def _nearest(name: str, known: Sequence[str]) -> str:
    """The nearest of the ``known`` names, or else all (at most twenty) of them."""
    near = near_names(name, known)
    if near:
        return f"did you mean {' or '.join(map(repr, near))}?"
    return f"use one of {', '.join(map(repr, known[:20]))}{', ...' if len(known) > 20 else ''}"
