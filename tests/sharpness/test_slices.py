"""Slices are the loss at each point, along directions with the documented norms."""

from __future__ import annotations

import sys

import pytest
import torch

import fpsim
from fpsim.curvature import eigenpairs, hessian
from fpsim.sharpness import slice_1d, slice_2d


@pytest.fixture
def params(generator):
    shapes = {"conv": (4, 3, 2, 2), "linear": (5, 6), "bias": (5,), "gain": ()}
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def loss(params):
    return sum((p**3).sum().sin() for p in params.values())


def along(params, direction, step):
    return {name: p + step * direction[name] for name, p in params.items()}


def random_like(params, seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(p.shape, generator=generator, dtype=torch.float64) for name, p in params.items()}


def flat(tree):
    return torch.cat([p.flatten() for p in tree.values()])


def test_a_line_is_the_loss_at_its_points(params):
    direction = random_like(params, 1)
    line = slice_1d(loss, params, direction, x=[-0.5, 0.0, 2.0])
    want = [loss(along(params, direction, step)).item() for step in (-0.5, 0.0, 2.0)]
    assert line.losses.tolist() == pytest.approx(want, rel=1e-13)
    assert line.losses[1] == loss(params)
    assert line.evaluations == 3
    vector = slice_1d(loss, params, flat(direction), x=[-0.5, 0.0, 2.0])
    assert torch.equal(vector.losses, line.losses)


def test_a_plane_has_rows_of_y_and_columns_of_x(params):
    first, second = random_like(params, 1), random_like(params, 2)
    plane = slice_2d(loss, params, (first, second), x=[-1, 0, 0.3], y=[0, 0.1])
    assert plane.losses.shape == (2, 3)
    assert plane.evaluations == 6
    for i, y in enumerate(plane.y.tolist()):
        for j, x in enumerate(plane.x.tolist()):
            want = loss(along(along(params, first, x), second, y)).item()
            assert plane.losses[i, j].item() == pytest.approx(want, rel=1e-12)


def test_defaults_are_centred_at_the_parameters(params, generator):
    line = slice_1d(loss, params, generator=generator)
    assert (len(line.x), line.x[0], line.x[20], line.x[-1]) == (41, -1, 0, 1)
    assert line.losses[20] == loss(params)
    plane = slice_2d(loss, params, generator=generator)
    assert plane.losses.shape == (21, 21)
    assert plane.losses[10, 10] == loss(params)


def test_filter_normalisation_gives_every_filter_its_own_norm(params, generator):
    direction = slice_1d(loss, params, x=[0], generator=generator).direction
    for name in ("conv", "linear"):
        got, want = (tree[name].flatten(1).norm(dim=1) for tree in (direction, params))
        torch.testing.assert_close(got, want)
        assert not torch.allclose(direction[name], params[name])
    assert not direction["bias"].any()
    assert not direction["gain"].any()


def test_layer_normalisation_gives_every_tensor_its_own_norm(params, generator):
    direction = slice_1d(loss, params, x=[0], normalize="layer", generator=generator).direction
    for name in params:
        torch.testing.assert_close(direction[name].norm(), params[name].norm())


def test_given_directions_are_normalised_only_on_request(params):
    direction = random_like(params, 3)
    assert slice_1d(loss, params, direction, x=[0]).direction["bias"].equal(direction["bias"])
    scaled = {name: 100 * part for name, part in direction.items()}
    one, other = (slice_1d(loss, params, d, x=[0.3], normalize="filter") for d in (direction, scaled))
    torch.testing.assert_close(one.losses, other.losses)


def test_along_eigenvectors_the_loss_bends_by_the_eigenvalues(params):
    found = eigenpairs(hessian(loss, params), 2, tol=1e-9, generator=torch.Generator().manual_seed(0))
    step = 1e-4
    plane = slice_2d(loss, params, tuple(found.eigenvectors.T), x=[-step, 0, step], y=[-step, 0, step])
    bends = [row[0] - 2 * row[1] + row[2] for row in (plane.losses[1], plane.losses[:, 1])]
    assert (torch.stack(bends) / step**2).tolist() == pytest.approx(found.eigenvalues.tolist(), rel=1e-4)


def test_filters_of_zeros_do_not_move():
    params = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    direction = slice_1d(
        torch.sum, params, torch.tensor([[1.0, 1.0], [0.0, 0.0]]), x=[1.0], normalize="filter"
    ).direction
    assert torch.equal(direction, torch.zeros(2, 2))


def test_random_directions_repeat_with_the_generator_in_any_dtype(params):
    def measure(params, seed):
        return slice_2d(loss, params, x=[0.1], y=[0.2], generator=torch.Generator().manual_seed(seed))

    assert torch.equal(measure(params, 1).losses, measure(params, 1).losses)
    assert not torch.equal(measure(params, 1).losses, measure(params, 2).losses)
    narrow = measure({name: p.float() for name, p in params.items()}, 1)
    torch.testing.assert_close(narrow.losses, measure(params, 1).losses, rtol=1e-4, atol=1e-5)


def test_under_rounding_a_slice_shows_the_steps_of_the_rounded_loss():
    line = slice_1d(
        lambda x: fpsim.round(x, "e4m3fn").sum(), torch.tensor([1.0]), torch.tensor([1.0]), x=[0, 0.05, 0.1]
    )
    assert line.losses.tolist() == [1.0, 1.0, 1.125]


def test_narrow_parameters_are_rounded_once():
    x = torch.tensor([1.0], dtype=torch.bfloat16)
    line = slice_1d(lambda p: p.float().sum(), x, torch.tensor([1.0]), x=[2**-9, 2**-7])
    assert line.losses.tolist() == [1.0, 1.0078125]


def test_progress_counts_the_points(params):
    told = []
    slice_2d(loss, params, (params, params), x=[0, 1], y=[0], progress=lambda *state: told.append(state))
    assert told == [(1, 2), (2, 2)]


def test_plots_draw_on_given_axes_or_new_ones(params, generator):
    figure = pytest.importorskip("matplotlib.figure")
    line = slice_1d(loss, params, generator=generator, x=[-1, 0, 1])
    axes = line.plot(color="black")
    assert axes.lines[0].get_ydata().tolist() == line.losses.tolist()
    given = figure.Figure().subplots()
    assert slice_2d(loss, params, generator=generator, x=[-1, 0, 1], y=[-1, 0, 1]).plot(given) is given
    assert given.get_xlabel()


def test_plots_name_the_extra_that_is_missing(params, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'fpsim-torch\[paper\]'"):
        slice_1d(loss, params, params, x=[0]).plot()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: slice_1d(loss, p), "random directions need a generator"),
        (
            lambda p: slice_1d(loss, p, p, normalize="rows"),
            "unknown normalization 'rows': use one of filter",
        ),
        (lambda p: slice_1d(loss, p, p, x=[[0.0]]), r"x must be one row of numbers, got shape \(1, 1\)"),
        (lambda p: slice_2d(loss, p, (p,)), "directions must be two, got 1"),
        (lambda p: slice_2d(loss, p, (p, torch.ones(3))), r"directions\[1\] must be a pytree like params"),
    ],
)
def test_errors_name_the_value_and_the_remedy(params, call, message):
    with pytest.raises(ValueError, match=message):
        call(params)
