"""Notebooks show every result as HTML: its numbers, escaped, without a style sheet."""

from __future__ import annotations

import html
import re
from dataclasses import is_dataclass

import pytest
import torch
from torch import nn

import fpsim
from fpsim import curvature, sharpness
from fpsim.compile_backend import Audit, Plan, Profile
from fpsim.evaluate import Accuracy, Comparison, SearchResult, Sensitivity
from fpsim.evaluate.logit_sharpness import Report
from fpsim.recipes import Recipe
from fpsim.sharpness.streaming import LogitSummary
from fpsim.showing import Shown, render
from fpsim.verify import verify

TYPES = (
    Plan, Audit, Profile, fpsim.Policy, Recipe, Accuracy, Comparison, SearchResult, Sensitivity, Report, LogitSummary,
    curvature.EigenResult, curvature.TraceResult, curvature.DensityResult, sharpness.CriticalResult,
    curvature.KroneckerFactors, curvature.CurvatureHistory, curvature.LayerCurvature, curvature.Symmetry,
    curvature.Determinism, sharpness.KeskarResult, sharpness.SamResult, sharpness.LogitMetrics,
    sharpness.Slice1D, sharpness.Slice2D,
)  # fmt: skip


def text_of(page: str) -> str:
    """The text that a browser shows."""
    assert page.startswith("<pre") and page.rstrip().endswith("</pre>") and "<style" not in page
    return html.unescape(re.sub(r"<[^>]*>", "", page))


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.__name__)
def test_every_result_type_shows_itself_in_notebooks(kind: type) -> None:
    assert is_dataclass(kind) and issubclass(kind, Shown)


def test_results_with_tables_show_their_tables() -> None:
    model, x = nn.Linear(4, 2), torch.randn(3, 4)
    plan = fpsim.explain(model, x, policy="mxfp8")
    assert text_of(plan._repr_html_()).split() == render(plan, width=240).split()
    profile = fpsim.profile(model, x, policy={"format": "e4m3fn"})
    assert text_of(profile._repr_html_()).split() == render(profile, width=240).split()
    result = fpsim.evaluate.accuracy(torch.tanh, "e4m3fn", low=0.5, high=1)
    assert text_of(result._repr_html_()).split() == render(result, width=240).split()


def test_the_table_of_a_profile_has_all_its_columns_in_a_notebook() -> None:
    model = nn.ModuleDict({"a_module_with_a_long_name": nn.Linear(4, 2)})
    model.forward = lambda x: model["a_module_with_a_long_name"](x)
    lines = text_of(fpsim.profile(model, torch.randn(3, 4), policy={"format": "e4m3fn"})._repr_html_()).splitlines()
    heads = "module operator kind role cast zero underflow subnormal saturated ovf/inf/NaN amax SQNR dB error exponents"
    assert lines[2].replace("┃", "").split() == heads.split()
    assert [line.split()[1] for line in lines if "aten." in line] == ["a_module_with_a_long_name"] * 4


def test_a_history_shows_a_row_for_each_step() -> None:
    history = curvature.CurvatureHistory()
    for step in (0, 10):
        history = history.add(step, curvature.eigenpairs(torch.diag(torch.tensor([2.0 + step, 1.0]))))
    words = re.findall(r"[^\s│┃━─┏┳┓┡╇┩└┴┘]+", text_of(history._repr_html_()))
    title = "curvature at 2 steps, 4 products, cost of 0 gradients"
    heads = "step products cost converged eigenvalue 1 residual 1"
    assert " ".join(words[:18]) == f"{title} {heads}"
    assert words[18:23] == ["0", "2", "0", "True", "2"] and words[24:29] == ["10", "2", "0", "True", "12"]


def test_policies_show_their_stated_fields_and_recipes_their_text() -> None:
    shown = text_of(fpsim.Policy(format="e4m3fn", skip=["<head>", "layers.[0]"])._repr_html_())
    assert "e4m3fn/nearest_even/sat_finite" in shown and "<head>" in shown and "layers.[0]" in shown
    assert "weight" not in shown
    recipe = fpsim.recipes.te_current()
    assert text_of(recipe._repr_html_()) == str(recipe)


def test_other_results_show_their_fields() -> None:
    loss = lambda params: (params["x"] ** 4).sum()  # noqa: E731
    params = {"x": torch.tensor([1.0, 2.0], dtype=torch.float64)}
    found = curvature.eigenpairs(curvature.hessian(loss, params), k=1, generator=torch.Generator().manual_seed(0))
    shown = text_of(found._repr_html_())
    assert "EigenResult" in shown and "eigenvalues" in shown and f"float64, 1: {found.eigenvalues.tolist()}" in shown
    (verdict,) = [verify("e2m1fn", samples=16, paths=["eager"])]
    assert text_of(verdict._repr_html_()) == str(verdict)
