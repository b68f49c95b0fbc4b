"""The algebra of operators, and the layout of parameters in vectors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import eigsh
from torch import nn

from fpsim.curvature import Operator, eigenpairs, hessian, layers, layout
from tests.curvature.small_models import network_spectrum, spectrum_matrix

MATRICES = st.tuples(st.integers(1, 6), st.integers(0, 10_000)).map(
    lambda t: torch.randn(t[0], t[0], dtype=torch.float64, generator=torch.Generator().manual_seed(t[1]))
)


@settings(max_examples=50, deadline=None)
@given(MATRICES, st.floats(-3, 3))
def test_algebra_is_that_of_matrices(matrix, s):
    a, b = Operator.of_matrix(matrix), Operator.of_matrix(matrix.T)
    eye = torch.eye(len(matrix)).double()
    for got, want in (
        (-a, -matrix),
        (a + s, matrix + s * eye),
        (s + a, matrix + s * eye),
        (a - s, matrix - s * eye),
        (a + b, matrix + matrix.T),
        (a - b, matrix - matrix.T),
        (s * a, s * matrix),
        (a * s, s * matrix),
    ):
        torch.testing.assert_close(got.to_dense(), want)
    torch.testing.assert_close(a @ matrix, matrix @ matrix)


def test_deflation_removes_the_pair():
    values = network_spectrum(60)
    operator = Operator.of_matrix(spectrum_matrix(values))
    first = eigenpairs(operator, tol=1e-12)
    second = eigenpairs(operator.deflate(first.eigenvectors, first.eigenvalues), tol=1e-12)
    assert abs(float(second.eigenvalues[0]) - float(values[-2])) < 1e-10


def test_scipy_finds_the_same_eigenvalues():
    values = network_spectrum(60)
    operator = Operator.of_matrix(spectrum_matrix(values)).to_scipy()
    assert abs(eigsh(operator, k=1, which="LA")[0][0] - float(values[-1])) < 1e-10
    assert operator.dtype == "float64" and operator.shape == (60, 60)


def test_symmetry_error_estimates_the_relative_frobenius_norm():
    matrix = torch.randn(80, 80, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for asymmetry in (1e-8, 1e-3, 1.0):
        skew = matrix - matrix.T
        mixed = matrix + matrix.T + asymmetry * skew
        want = float((mixed - mixed.T).norm() / mixed.norm())
        got = Operator.of_matrix(mixed).symmetry_error(pairs=200)
        assert 0.8 < got / want < 1.25
    assert Operator.of_matrix(torch.zeros(3, 3)).symmetry_error() == 0


def test_impossible_operators_are_errors():
    a = Operator.of_matrix(torch.eye(3))
    with pytest.raises(ValueError, match="square"):
        Operator.of_matrix(torch.ones(2, 3))
    with pytest.raises(ValueError, match="sizes 3 and 2"):
        a + Operator.of_matrix(torch.eye(2))
    with pytest.raises(ValueError, match="no layout"):
        a.block("x")
    with pytest.raises(ValueError, match=r"matrix of shape \(3, k\)"):
        a.matmat(torch.ones(2, 2))
    with pytest.raises(ValueError, match="deflation needs"):
        a.deflate(torch.ones(3, 2), [1.0])
    assert a.matmat(torch.ones(3, 0)).shape == (3, 0)


TREES = st.recursive(
    st.integers(0, 3).map(lambda n: torch.arange(float(n))),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.sampled_from("abc"), children, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(TREES)
def test_layouts_round_trip(tree):
    tree = {"some": torch.ones(1), "tree": tree}
    arranged = layout(tree)
    vector = torch.randn(arranged.size)
    assert torch.equal(arranged.flatten(arranged.unflatten(vector)), vector)
    assert torch.equal(arranged.flatten(arranged.point(vector)), vector)
    assert torch.equal(arranged.flatten(tree), arranged.join(arranged.values))
    assert len(arranged.names) == len(set(arranged.names)) == len(arranged.values)


def test_constant_leaves_are_zero_in_a_direction_and_unchanged_in_a_point():
    params = {"a": torch.ones(2), "b": torch.full((2,), 5.0), "n": torch.arange(3)}
    arranged = layout(params, select="a")
    vector = torch.tensor([1.0, 2.0])
    direction, point = arranged.unflatten(vector), arranged.point(vector)
    assert torch.equal(direction["b"], torch.zeros(2)) and torch.equal(direction["n"], torch.zeros(3, dtype=torch.long))
    assert torch.equal(point["b"], params["b"]) and torch.equal(point["n"], params["n"])


def test_a_tensor_in_two_places_is_one_variable():
    shared = torch.tensor([1.0, 2.0])
    params = {"a": shared, "b": shared}
    operator = hessian(lambda p: (p["a"] * p["b"]).sum(), params)
    torch.testing.assert_close(operator.to_dense(), 2 * torch.eye(2))


def test_layers_group_names_by_module():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))
    params = dict(model.named_parameters())
    assert layers(params) == {
        "0": ("0.weight", "0.bias"),
        "1.0": ("1.0.weight", "1.0.bias"),
        "1.1": ("1.1.weight", "1.1.bias"),
    }
    assert list(layers(params, depth=1)) == ["0", "1"]


def test_blocks_per_layer_are_the_diagonal_blocks():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    params = dict(model.named_parameters())
    x = torch.randn(4, 2).double()
    operator = hessian(lambda p: torch.func.functional_call(model, p, (x,)).pow(2).sum(), params)
    dense = operator.to_dense()
    for names in layers(params).values():
        mask = operator.layout.mask(names)
        torch.testing.assert_close(operator.block(names).to_dense(), dense[mask][:, mask])


def test_wrong_trees_and_vectors_are_errors():
    arranged = layout({"a": torch.ones(2)})
    with pytest.raises(ValueError, match="another structure"):
        arranged.flatten({"b": torch.ones(2)})
    with pytest.raises(ValueError, match=r"shape \(2,\), got shape \(3,\)"):
        arranged.split(torch.ones(3))
    with pytest.raises(ValueError, match="did you mean a"):
        layout({"a": torch.ones(2)}, select="aa*")
