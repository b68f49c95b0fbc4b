"""Calls as a typed user writes them: `make types` checks this file; it is not run."""

import torch
from torch import nn

import fpsim
from fpsim import FloatFormat, Policy
from fpsim.casts import Cast, parse_cast
from fpsim.scaling.scale import Scale

cast = parse_cast("e4m3fn/power_of_two")
assert cast is not None

Policy()
Policy(format="e8m3", activation=FloatFormat(4, 3), weight=cast, gradient="none", output="bf16")
Policy(fprop={"weight": "bf16", "activation": None}, dgrad="e5m2", wgrad=[("gradient", FloatFormat(8, 7))])
Policy(elementwise={"forward": "bf16"}, products="weights", rounding="stochastic:8", overflow="sat_finite")
Policy(scale="power_of_two", skip="lm_head", gaps=["aten._cdist*"], attention="keep")
Policy(
    scale=Scale("power_of_two"),
    skip=["a", "b"],
    modules={"a": "bf16", "b": None, "c": Policy(), "d": {"weight": "e4m3"}},
)
policy: Policy = Policy.preset("paper:e8m3").with_modules({"lm_head": "bf16"})
weight: Cast | None = policy.cast("fprop", "weight")
text: str = policy.to_json()

x: torch.Tensor = fpsim.round(torch.ones(3), FloatFormat(5, 2), rounding="up", scale="power_of_two")
codes: torch.Tensor = fpsim.encode(x, "e5m2")
plan = fpsim.explain(nn.Linear(3, 3), torch.ones(2, 3), policy=policy)
casts: list[Cast | None] = [site.cast for site in plan.sites]
