"""Measures in parameter space under a policy: every loss is the rounded model's, judged by torch's casts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fpsim.curvature import functional_loss
from fpsim.sharpness import adaptive, critical, keskar, sam, slice_1d, slice_2d


class Case:
    """Two linear layers in float32, and their loss with operands rounded to e5m2 by torch's own casts."""

    def __init__(self, generator: torch.Generator) -> None:
        self.model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.batch = torch.randn(16, 6, generator=generator), torch.randint(0, 4, (16,), generator=generator)
        self.params = {name: value.detach().clone() for name, value in self.model.named_parameters()}
        self.loss = functional_loss(self.model, functional.cross_entropy, batch=self.batch, policy={"format": "e5m2"})

    def judged(self, params: dict[str, Tensor]) -> float:
        def layer(x: Tensor, name: str) -> Tensor:
            return cast(x) @ cast(params[f"{name}.weight"]).T + params[f"{name}.bias"]

        hidden = torch.tanh(layer(self.batch[0], "0"))
        return float(functional.cross_entropy(layer(hidden, "2"), self.batch[1]))

    def moved(self, direction: dict[str, Tensor], step: float = 1.0) -> dict[str, Tensor]:
        return {name: torch.add(value, direction[name], alpha=step) for name, value in self.params.items()}

    def unrounded(self) -> float:
        return float(functional.cross_entropy(self.model(self.batch[0]), self.batch[1]).detach())


def cast(x: Tensor) -> Tensor:
    return x.to(torch.float8_e5m2).float()


def close(value: float) -> Any:
    return pytest.approx(value, rel=1e-6)


@pytest.fixture
def case(generator) -> Case:
    return Case(generator)


def test_the_rounded_model_is_another_one(case):
    assert abs(case.judged(case.params) / case.unrounded() - 1) > 1e-3


def test_the_best_point_of_a_box_is_the_rounded_models(case):
    for method in ("pga", "lbfgsb"):
        found = keskar(case.loss, case.params, epsilon=0.05, method=method)
        assert found.loss == close(case.judged(case.params))
        assert found.maximum == close(case.judged(case.moved(found.perturbation)))
        assert found.sharpness == pytest.approx(100 * (found.maximum - found.loss) / (1 + found.loss), rel=1e-12)
        assert found.maximum > found.loss


def test_a_step_of_sam_is_the_rounded_models(case):
    for found in (sam(case.loss, case.params, rho=0.5), adaptive(case.loss, case.params, rho=1.0)):
        assert found.loss == close(case.judged(case.params))
        assert found.perturbed_loss == close(case.judged(case.moved(found.perturbation)))
        assert found.sharpness > 0


def test_slices_are_the_rounded_models(case, generator):
    line = slice_1d(case.loss, case.params, x=[-0.5, 0.0, 0.3], generator=generator)
    for step, loss in zip(line.x.tolist(), line.losses.tolist(), strict=True):
        assert loss == close(case.judged(case.moved(line.direction, step)))
    plane = slice_2d(case.loss, case.params, x=[0.0, 0.2], y=[0.0, -0.2], generator=generator)
    assert plane.losses[0, 1] == close(case.judged(case.moved(plane.directions[0], 0.2)))
    assert plane.losses[1, 0] == close(case.judged(case.moved(plane.directions[1], -0.2)))


def test_the_critical_rate_is_the_rounded_models(case):
    direction = sam(case.loss, case.params, rho=1.0).perturbation  # uphill: steps along it are subtracted
    found = critical(case.loss, case.params, direction)
    start = case.judged(case.params)
    assert found.loss == close(start)
    assert found.lower_loss == close(case.judged(case.moved(direction, -found.lower)))
    assert found.converged and 0 < found.lower < found.upper < math.inf
    assert case.judged(case.moved(direction, -found.lower)) < start < case.judged(case.moved(direction, -found.upper))
