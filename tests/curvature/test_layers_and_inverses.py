"""Inverses, diagonals, sampled Fisher matrices, layers, influences and histories, against dense float64 matrices."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from fpsim import curvature
from fpsim.curvature import (
    CrossEntropy,
    CurvatureHistory,
    Operator,
    alignment,
    diagonal,
    eigenpairs,
    functional_loss,
    functional_outputs,
    gauss_newton,
    hessian,
    influence,
    inverse,
    monte_carlo_fisher,
    per_layer,
)
from tests.curvature.small_models import case, dense_hessian, relative, spectrum_matrix, token_loss

FAMILIES = ("gelu", "group norm and convolution", "tied", "attention", "padding row", "encoder layer")


def counted(operator: Operator) -> tuple[Operator, list[int]]:
    """The operator, and a list with the number of its products."""
    calls = [0]

    def multiply(vector):
        calls[0] += 1
        return operator.multiply(vector)

    return replace(operator, multiply=multiply), calls


def right_hand_sides(size: int, count: int = 2) -> torch.Tensor:
    return torch.randn(size, count, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


# -- inverse -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_inverse_is_the_dense_one(name):
    small = case(name)
    dense = dense_hessian(small.loss, small.params)
    damping = 0.1 - float(torch.linalg.eigvalsh(dense)[0])
    operator, calls = counted(hessian(small.loss, small.params))
    b = right_hand_sides(operator.size)
    found = inverse(operator, b, damping=damping, tol=1e-12)
    want = torch.linalg.solve(dense + damping * torch.eye(len(dense), dtype=torch.float64), b)
    assert found.converged and relative(found.solution, want) <= 1e-10
    assert found.products == calls[0] and found.residuals.max() <= 1e-12
    single = inverse(operator, b[:, 0], damping=damping, tol=1e-12)
    assert single.solution.shape == b[:, 0].shape and torch.equal(single.solution, found.solution[:, 0])


def test_conjugate_gradients_take_one_step_for_each_different_eigenvalue():
    matrix = spectrum_matrix(torch.tensor([4.0, 4.0, 2.0, 1.0, 1.0, 1.0], dtype=torch.float64))
    found = inverse(matrix, right_hand_sides(6, 1)[:, 0], damping=0.0, tol=1e-10)
    assert found.products == 3 + 1


def test_inverse_of_zero_is_zero_and_costs_nothing():
    found = inverse(torch.eye(3), torch.zeros(3), damping=1.0)
    assert (found.solution.tolist(), found.products, found.converged) == ([0.0] * 3, 0, True)


def test_inverse_names_the_damping_that_is_missing():
    matrix = torch.diag(torch.tensor([2.0, 1.0, -0.5], dtype=torch.float64))
    with pytest.raises(ValueError, match=r"curvature -0\.5 along a direction.* clearly above 0\.5"):
        inverse(matrix, torch.tensor([0.0, 0.0, 1.0]), damping=0.25)
    with pytest.raises(ValueError, match=r"curvature 0 along a direction.*positive damping"):
        inverse(torch.diag(torch.tensor([1.0, 0.0])), torch.tensor([0.0, 1.0]), damping=0.0)
    assert inverse(matrix, torch.tensor([1.0, 1.0, 0.0]), damping=0.0).solution.tolist() == pytest.approx([0.5, 1.0, 0])


def test_inverse_of_rounded_products_says_that_they_are_rounded():
    matrix = spectrum_matrix(torch.linspace(1, 3, 20, dtype=torch.float64))
    rounded = Operator(20, lambda v: (matrix @ v).bfloat16().double())
    found = inverse(rounded, right_hand_sides(20), damping=0.0)
    assert not found.converged and found.products < 200
    assert found.reasons[0].startswith(
        "the residuals of 2 of 2 right-hand sides exceed 1e-06 although the iteration has"
    )


def test_inverse_that_is_not_done_says_so():
    matrix = spectrum_matrix(torch.logspace(0, 6, 40, dtype=torch.float64))
    found = inverse(matrix, right_hand_sides(40), damping=0.0, max_products=5)
    assert not found.converged and found.products == 10
    assert "2 of 2 right-hand sides exceed 1e-06 after 5 products each: raise max_products" in found.reasons[0]
    b = right_hand_sides(40)
    residual = torch.linalg.vector_norm(b - matrix @ found.solution, dim=0) / torch.linalg.vector_norm(b, dim=0)
    assert torch.allclose(found.residuals, residual)


@pytest.mark.parametrize(
    ("vectors", "options", "message"),
    [
        (torch.ones(4), {"damping": 1.0}, r"have shape \(3,\) or \(3, k\), got \(4,\)"),
        (torch.ones(3), {"damping": -1.0}, "damping must be finite and not negative"),
        (torch.ones(3), {"damping": 1.0, "tol": 0.0}, "tol must be positive"),
        (torch.ones(3), {"damping": 1.0, "max_products": 1}, "max_products at least 2"),
    ],
)
def test_inverse_refuses_bad_arguments(vectors, options, message):
    with pytest.raises(ValueError, match=message):
        inverse(torch.eye(3), vectors, **options)


# -- diagonal ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_diagonal_is_that_of_the_dense_matrix(name):
    small = case(name)
    dense = dense_hessian(small.loss, small.params)
    operator, calls = counted(hessian(small.loss, small.params))
    found = diagonal(operator, method="exact")
    assert relative(found.estimate, dense.diagonal()) <= 1e-10 and not found.stderr.any()
    assert found.products == calls[0] == operator.size and found.converged
    parts = found.by_parameter()
    assert list(parts) == list(operator.layout.names)
    assert all(part.shape == small.params[part_name].shape for part_name, part in parts.items())


def test_probes_of_the_diagonal_have_their_mean_and_their_standard_error():
    """Errors over standard errors of 50 entries have a mean square near 1; the variance is that of the formula."""
    matrix = spectrum_matrix(torch.linspace(1, 3, 50, dtype=torch.float64))
    found = diagonal(matrix, probes=400)
    assert found.products == 400 and found.converged
    scores = (found.estimate - matrix.diagonal()) / found.stderr
    assert 0.6 <= float(scores.square().mean()) <= 1.5
    variance = (matrix.square().sum(1) - matrix.diagonal().square()) / 400
    assert torch.allclose(found.stderr.square(), variance, rtol=0.3)
    rough = diagonal(matrix, probes=2, tol=1e-6)
    assert not rough.converged and "use more probes" in rough.reasons[0]


def test_diagonal_refuses_bad_arguments():
    with pytest.raises(ValueError, match="unknown method 'exakt': use 'exact' or 'probes'"):
        diagonal(torch.eye(2), method="exakt")
    with pytest.raises(ValueError, match="probes must be at least 2"):
        diagonal(torch.eye(2), probes=1)
    with pytest.raises(ValueError, match="no layout of parameters"):
        diagonal(torch.eye(2)).by_parameter()


# -- Monte-Carlo Fisher ------------------------------------------------------------------------------------------------


def fisher_of_labels(small, labels):
    """The mean outer product of the gradients at ``labels``, shape (tokens, samples), densely."""
    tokens, targets = small.batch
    names, counts = list(small.params), targets.flatten() != -100

    def logits(*values):
        return functional_call(small.model, dict(zip(names, values, strict=True)), (tokens,)).flatten(0, -2)

    jacobians = torch.autograd.functional.jacobian(logits, tuple(small.params.values()))
    jacobian = torch.cat([part.flatten(2) for part in jacobians], dim=2)  # tokens, classes, parameters
    p = logits(*small.params.values()).softmax(-1).detach()
    total = torch.zeros(jacobian.shape[2], jacobian.shape[2], dtype=torch.float64)
    for n in counts.nonzero().flatten():
        for label in labels[n]:
            g = (p[n] - nn.functional.one_hot(label, p.shape[1])) @ jacobian[n]
            total += torch.outer(g, g)
    return total / (counts.sum() * labels.shape[1])


@pytest.mark.parametrize("name", ["gelu", "tied", "group norm and convolution"])
def test_sampled_fisher_is_the_mean_over_its_labels(name, monkeypatch):
    """At labels that the test gives. The mean over 100 seeds is the Gauss-Newton matrix, within 4 standard errors."""
    small = case(name)
    targets = small.batch[1]
    outputs, loss = functional_outputs(small.model, batch=small.batch), CrossEntropy(targets)
    labels = torch.randint(0, 5, (targets.numel(), 3), generator=torch.Generator().manual_seed(0))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "multinomial", lambda p, count, **_: labels[:, :count])
        dense = monte_carlo_fisher(outputs, loss, small.params, samples=3).to_dense()
    assert relative(dense, fisher_of_labels(small, labels)) <= 1e-12

    vector = torch.randn(len(dense), dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    forms = [
        float(vector @ (monte_carlo_fisher(outputs, loss, small.params, seed=seed, samples=2) @ vector))
        for seed in range(100)
    ]
    want = float(vector @ (gauss_newton(outputs, loss, small.params) @ vector))
    values = torch.tensor(forms)
    assert abs(float(values.mean()) - want) <= 4 * float(values.std()) / 10
    assert len(set(forms)) == 100


def test_sampled_fisher_of_the_squared_error_converges_to_gauss_newton():
    model = nn.Linear(3, 2).double()
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    outputs, params = functional_outputs(model, batch=(x, None)), dict(model.named_parameters())
    exact = gauss_newton(outputs, "squared", params).to_dense()
    errors = [
        relative(monte_carlo_fisher(outputs, "squared", params, samples=n, seed=1).to_dense(), exact)
        for n in (10, 10000)
    ]
    assert errors[1] <= 0.03 < errors[0]


def test_draws_depend_on_seed_and_batch_and_labels_that_do_not_count_are_left_out():
    small = case("gelu")
    tokens, targets = small.batch
    ignored = targets.clone()
    ignored[0] = -100
    outputs = functional_outputs(small.model, batch=small.batch)
    operators = [
        monte_carlo_fisher(outputs, CrossEntropy(t), small.params, seed=seed)
        for t, seed in ((targets, 0), (targets, 0), (targets, 1), (ignored, 0))
    ]
    vector = torch.ones(operators[0].size, dtype=torch.float64)
    products = [operator @ vector for operator in operators]
    assert torch.equal(products[0], products[1]) and torch.equal(products[0], operators[0] @ vector)
    assert not torch.equal(products[0], products[2])
    only = monte_carlo_fisher(
        functional_outputs(small.model, batch=(tokens[1:], targets[1:])), CrossEntropy(targets[1:]), small.params
    )
    assert torch.linalg.matrix_rank(operators[3].to_dense()) <= targets[1:].numel()
    assert only.size == operators[3].size
    batches = [(tokens, targets), (tokens.flip(0), targets.flip(0))]
    loss = CrossEntropy(lambda batch: batch[1])
    both = monte_carlo_fisher(functional_outputs(small.model), loss, small.params, batches=batches, weight="equal")
    each = [monte_carlo_fisher(functional_outputs(small.model), loss, small.params, batches=[b]) for b in batches]
    assert relative(both @ vector, (each[0] @ vector + each[1] @ vector) / 2) <= 1e-12


def test_sampled_fisher_refuses_other_losses():
    with pytest.raises(ValueError, match="labels are drawn for a CrossEntropy or 'squared', got 'cubed'"):
        monte_carlo_fisher(lambda p: p["x"], "cubed", {"x": torch.ones(2)})
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        monte_carlo_fisher(lambda p: p["x"], "squared", {"x": torch.ones(2)}, samples=0)
    for wrong in ({"samples": 1.5}, {"samples": True}, {"seed": "a"}):
        with pytest.raises(TypeError, match=f"{next(iter(wrong))} must be an int, got {next(iter(wrong.values()))!r}"):
            monte_carlo_fisher(lambda p: p["x"], "squared", {"x": torch.ones(2)}, **wrong)


# -- layers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["group norm and convolution", "tied", "padding row"])
def test_each_layer_has_the_numbers_of_its_dense_block(name):
    small = case(name)
    dense = dense_hessian(small.loss, small.params)
    operator, calls = counted(hessian(small.loss, small.params))
    found = per_layer(operator, tol=1e-8, trace_products=2000, steps=40, probes=2, max_products=200)
    assert found.products == calls[0]
    assert [n for layer in found.layers for n in layer.parameters] == list(operator.layout.names)
    for layer in found.layers:
        mask = operator.layout.mask(list(layer.parameters))
        block = dense[mask][:, mask]
        values = torch.linalg.eigvalsh(block)
        scale = float(values.abs().max()) or 1.0
        assert abs(float(layer.eigen.eigenvalues[0] - values[-1])) <= 1e-10 * scale
        assert abs(layer.trace.estimate - float(block.trace())) <= 1e-10 * scale * len(block)
        assert layer.size == len(block) and layer.density.nodes.max() <= values[-1] + 1e-9 * scale
    total = sum(layer.trace.estimate for layer in found.layers)
    assert total == pytest.approx(float(dense.trace()), rel=1e-9)
    grid, heights = found.heat(50)
    assert heights.shape == (len(found.layers), 50) and torch.allclose(
        torch.trapezoid(heights, grid), torch.ones(len(heights), dtype=torch.float64), atol=0.6
    )


def test_layers_as_a_table_a_heat_map_and_by_name():
    small = case("gelu")
    operator = hessian(small.loss, small.params)
    found = per_layer(operator, depth=1, steps=5, probes=2)
    assert [layer.name for layer in found.layers] == ["embed", "inner", "head"] and found["inner"].size == 58
    assert found.to_pandas()["layer"].tolist() == ["embed", "inner", "head"]
    assert "largest eigenvalue" in str(found)
    axes = found.plot()
    assert [text.get_text() for text in axes.get_yticklabels()] == ["embed (20)", "inner (58)", "head (25)"]
    named = per_layer(operator, groups={"ends": ["embed.*", "head.*"]})
    assert named["ends"].size == 45 and named.plot().get_xlabel() == "largest eigenvalue"
    with pytest.raises(KeyError, match="there is no layer 'body': there are ends"):
        named["body"]
    with pytest.raises(ValueError, match="no densities: pass steps=60"):
        named.heat()
    with pytest.raises(ValueError, match="no layout of parameters"):
        per_layer(Operator.of_matrix(torch.eye(2)))
    with pytest.raises(ValueError, match="fits no parameter: did you mean"):
        per_layer(operator, groups={"x": ["embd.weight"]})


# -- influence ---------------------------------------------------------------------------------------------------------


def test_influence_is_that_of_a_dense_solve_and_of_training_without_the_example():
    """A ridge regression: without an example the loss of the test moves by ``-value / N`` to first order."""
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 4, dtype=torch.float64, generator=draw), torch.randn(40, dtype=torch.float64, generator=draw)
    test = (x[:3] + 0.5, y[:3] - 0.2)

    def loss(params, batch):
        return ((batch[0] @ params["w"] - batch[1]) ** 2).mean() / 2

    def fitted(rows):
        a, b = x[rows], y[rows]
        return torch.linalg.solve(a.T @ a / len(a) + 1e-2 * torch.eye(4, dtype=torch.float64), a.T @ b / len(a))

    params = {"w": fitted(torch.arange(40))}
    examples = [(x[i : i + 1], y[i : i + 1]) for i in range(40)]
    operator, calls = counted(hessian(loss, params, batches=[(x, y)]))
    found = influence(operator, loss, examples, test=test, damping=1e-2, tol=1e-12)
    dense = x.T @ x / 40 + 1e-2 * torch.eye(4, dtype=torch.float64)
    slope = test[0].T @ (test[0] @ params["w"] - test[1]) / 3
    solved = torch.linalg.solve(dense, slope)
    want = torch.stack([-solved @ (a.T @ (a @ params["w"] - b)) for a, b in examples])
    assert relative(found.values, want) <= 1e-10
    assert found.converged and found.gradients == 42 and found.products == calls[0]
    moved = [float(loss({"w": fitted(torch.arange(40) != i)}, test) - loss(params, test)) for i in range(40)]
    assert torch.corrcoef(torch.stack([-found.values / 40, torch.tensor(moved, dtype=torch.float64)]))[0, 1] > 0.98
    assert found.plot().get_ylabel() == "influence on the test loss"


def test_influence_of_a_network_is_that_of_a_dense_solve():
    small = case("attention")
    tokens, targets = small.batch
    loss = functional_loss(small.model, token_loss)
    operator = gauss_newton(functional_outputs(small.model, batch=small.batch), CrossEntropy(targets), small.params)
    examples = [(tokens[i : i + 1], targets[i : i + 1]) for i in range(len(tokens))]
    found = influence(operator, loss, examples, test=(tokens.flip(1), targets), damping=0.3, tol=1e-12)

    def gradient(batch):
        value = token_loss(small.model(batch[0]), batch[1])
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(small.params.values()))])

    dense = operator.to_dense() + 0.3 * torch.eye(operator.size, dtype=torch.float64)
    solved = torch.linalg.solve(dense, gradient((tokens.flip(1), targets)))
    assert relative(found.values, torch.stack([-solved @ gradient(example) for example in examples])) <= 1e-10


def test_influence_refuses_what_has_no_answer():
    operator = hessian(lambda p, b: (p["x"] ** 2).sum() * b, {"x": torch.ones(2)}, batches=[1.0])
    with pytest.raises(ValueError, match="there is no example"):
        influence(operator, lambda p, b: p["x"].sum(), [], test=1.0, damping=1.0)
    with pytest.raises(FloatingPointError, match="not finite: look for overflow"):
        influence(operator, lambda p, b: p["x"].sum() / b, [1.0], test=0.0, damping=1.0)
    with pytest.raises(ValueError, match="no layout of parameters"):
        influence(Operator.of_matrix(torch.eye(2)), lambda p, b: p["x"].sum(), [1.0], test=1.0, damping=1.0)
    with pytest.raises(ValueError, match="the loss does not depend on the params that it gets"):
        influence(operator, lambda p, b: torch.tensor(1.0), [1.0], test=1.0, damping=1.0)
    with pytest.raises(TypeError, match=r"groups has the text 'x' for 'all': give a list of names or globs, \['x'\]"):
        per_layer(operator, groups={"all": "x"})
    for function in (per_layer, lambda matrix: influence(matrix, lambda p, b: p, [1.0], test=1.0, damping=1.0)):
        with pytest.raises(ValueError, match="Tensor has no layout of parameters: make it with hessian"):
            function(torch.eye(3))


def test_influence_with_a_loss_that_moves_has_not_converged():
    operator = hessian(lambda p, b: (p["x"] ** 2).sum() * b, {"x": torch.ones(2)}, batches=[1.0])
    factors = iter(range(1, 9))
    found = influence(operator, lambda p, b: p["x"].sum() * next(factors), [1.0], test=1.0, damping=1.0)
    assert found.solve.converged and not found.converged
    assert found.reasons[0].startswith("two gradients of the test loss differ: turn dropout off")


# -- histories ---------------------------------------------------------------------------------------------------------


def test_alignment_of_a_gradient_with_eigenvectors():
    matrix = spectrum_matrix(torch.tensor([5.0, 3.0, 1.0, 0.5], dtype=torch.float64), seed=3)
    found = eigenpairs(matrix, k=2, tol=1e-12)
    vectors = torch.linalg.eigh(matrix).eigenvectors
    gradient = vectors @ torch.tensor([1.0, 2.0, -2.0, 4.0], dtype=torch.float64)  # ascending eigenvalues
    aligned = alignment(gradient, found)
    assert torch.allclose(aligned.cosines, torch.tensor([4 / 5, 2 / 5], dtype=torch.float64), atol=1e-10)
    assert aligned.share == pytest.approx(20 / 25, abs=1e-10)
    with pytest.raises(ValueError, match="it has no direction"):
        alignment(torch.zeros(4), found)
    with pytest.raises(ValueError, match=r"shape \(4,\), got \(3,\)"):
        alignment(torch.ones(3), found)


def test_a_history_keeps_the_numbers_of_each_step_and_plots_them():
    history = CurvatureHistory()
    for step, top in ((0, 2.0), (5, 3.0), (10, 8.0)):
        found = eigenpairs(torch.diag(torch.tensor([top, 1.0, 0.0])), k=2)
        history = history.add(step, found, torch.tensor([3.0, 0.0, 4.0]))
    assert [row["eigenvalue 1"] for row in history.rows()] == pytest.approx([2.0, 3.0, 8.0])
    assert [row["share of gradient"] for row in history.rows()] == pytest.approx([0.36] * 3)
    assert history.to_pandas()["step"].tolist() == [0, 5, 10] and not history.eigen[0].eigenvectors.numel()
    axes = history.plot(rate=0.5)
    assert [line.get_label() for line in axes.lines] == ["eigenvalue 1", "eigenvalue 2", "2 / learning rate"]
    assert axes.lines[2].get_ydata()[0] == 4.0
    with pytest.raises(ValueError, match="step 10 does not follow step 10"):
        history.add(10, found)
    with pytest.raises(ValueError, match="step 11 has 1 eigenvalue and the steps before have 2"):
        history.add(11, eigenpairs(torch.eye(3)))
    with pytest.raises(ValueError, match="step 11 has an operator of size 4 and the steps before of size 3"):
        history.add(11, eigenpairs(torch.eye(4), k=2))
    with pytest.raises(ValueError, match=r"step 11 has eigenvalues with which=smallest and .* with which=largest"):
        history.add(11, eigenpairs(torch.diag(torch.tensor([8.0, 1.0, 0.0])), k=2, which="smallest"))
    other = replace(Operator.of_matrix(torch.diag(torch.tensor([8.0, 1.0, 0.0]))), name="Hessian")
    with pytest.raises(
        ValueError, match=r"step 11 has eigenvalues of the Hessian and .* eigenvalues of the matrix: begin"
    ):
        history.add(11, eigenpairs(other, k=2))
    lines = str(history).splitlines()
    title = f"curvature at 3 steps, {3 * found.products} products, cost of 3 gradients"  # those that are given
    assert lines[0].rstrip() == title
    assert [line.split("│")[1].strip() for line in lines if line.startswith("│")] == ["0", "5", "10"]
    assert "eigenvalue 2" in history._repr_html_() and str(CurvatureHistory()).startswith("curvature at 0 steps")
    for step in (math.nan, 11.5, True):
        with pytest.raises(TypeError, match="a step is an integer, got"):
            history.add(step, found)


def test_matrices_of_other_dtypes_are_refused():
    for dtype in (torch.int64, torch.bfloat16):
        with pytest.raises(ValueError, match=f"a matrix is float32 or float64, got {dtype}"):
            eigenpairs(torch.eye(3, dtype=dtype))


def test_numbers_that_are_not_finite_are_named():
    identity, infinite = torch.eye(2), torch.tensor([math.inf, 1.0])
    with pytest.raises(FloatingPointError, match="right-hand sides have infinities or NaN"):
        curvature.inverse(identity, infinite, damping=1.0)
    with pytest.raises(ValueError, match="damping must be finite and not negative"):
        curvature.inverse(identity, torch.ones(2), damping=math.inf)
    with pytest.raises(ValueError, match="the norm of the gradient is inf"):
        curvature.alignment(infinite, curvature.eigenpairs(torch.diag(torch.tensor([3.0, 1.0])), k=1))


# -- costs -------------------------------------------------------------------------------------------------------------


def test_a_product_costs_as_many_gradients_as_its_multiplications_say():
    """The multiplications of a deep network of linear layers, counted by torch; its ends make a small difference."""
    torch.manual_seed(0)
    layers = [part for _ in range(12) for part in (nn.Linear(16, 16), nn.Tanh())]
    model = nn.Sequential(*layers, nn.Linear(16, 3))
    batch = (torch.randn(8, 16), torch.randint(0, 3, (8,)))
    loss, outputs = functional_loss(model, nn.functional.cross_entropy), functional_outputs(model)
    params, cross_entropy = dict(model.named_parameters()), CrossEntropy(lambda batch: batch[1])

    def multiplications(function) -> int:
        with FlopCounterMode(display=False) as count:
            function()
        return count.get_total_flops()

    gradient = multiplications(lambda: torch.autograd.grad(loss(params, batch), list(params.values())))

    def losses(params, batch):
        return nn.functional.cross_entropy(outputs(params, batch), batch[1], reduction="none")

    modes = [("reverse", True), ("reverse", False), ("double_backward", True), ("double_backward", False),
             ("forward", None), ("finite_difference", None)]  # fmt: skip
    operators = [
        *(hessian(loss, params, batches=[batch], mode=mode, keep=keep) for mode, keep in modes),
        *(
            gauss_newton(outputs, cross_entropy, params, batches=[batch], mode=mode, keep=keep)
            for mode, keep in (("reverse", True), ("reverse", False), ("forward", None))
        ),
        monte_carlo_fisher(outputs, cross_entropy, params, batches=[batch], samples=3),
        curvature.empirical_fisher(losses, params, batches=[batch]),
    ]
    for operator in operators:
        vector = torch.ones(operator.size)
        operator @ vector  # the first product makes the graph
        counted_cost = multiplications(lambda op=operator, v=vector: op @ v) / gradient
        assert operator.cost == pytest.approx(counted_cost, rel=0.05), operator
    kept = operators[0]
    assert (kept + operators[4]).cost == 5 and (2 * kept + 1.0).cost == kept.block(["0.*"]).cost == 2
    assert Operator.of_matrix(torch.eye(2)).cost == 0


def test_every_result_shows_the_products_and_gradients_that_it_cost(monkeypatch):
    small = case("gelu")
    operator, calls = counted(hessian(small.loss, small.params))  # 2 gradients each

    def measured(function):
        calls[0] = 0
        return function(), calls[0]

    found = [
        measured(lambda: eigenpairs(operator, 2, tol=1e-6)),
        measured(lambda: eigenpairs(operator, method="lobpcg")),
        measured(lambda: eigenpairs(operator, method="power", which="magnitude", max_products=9)),
        measured(lambda: curvature.trace(operator, max_products=40)),
        measured(lambda: curvature.function_trace(operator, torch.cos, steps=4, max_probes=3)),
        measured(lambda: curvature.log_determinant(operator, shift=9.0, steps=4, max_probes=3)),
        measured(lambda: curvature.density(operator, steps=4, probes=2, max_probes=5, tol=1e-9)),
        measured(lambda: inverse(operator, torch.ones(operator.size), damping=9.0)),
        measured(lambda: diagonal(operator, probes=3)),
        measured(lambda: curvature.check_symmetry(operator, pairs=3)),
        measured(lambda: per_layer(operator, depth=1, steps=3, probes=2, max_probes=5, density_tol=1e-9)),
    ]
    layered = found[-1][0]
    assert all(len(layer.density.nodes) == 3 for layer in layered.layers)  # the first 2 of 5 probes chose the number
    for result, products in found:
        assert result.products == products > 0 and result.cost == 2 * products
        assert f"{products} products" in str(result) or f"products={products}" in repr(result)
        for shown in (result, *getattr(result, "layers", ())):
            assert all(str(number) in shown._repr_html_() for number in (shown.products, f"{shown.cost:g}"))
    moment = found[6][0].integrate(torch.cos)
    assert (moment.products, moment.cost) == (found[6][0].products, found[6][0].cost)

    gradients = [0]

    def loss(params, batch):
        gradients[0] += 1
        return small.loss(params) * batch

    influences, products = measured(lambda: influence(operator, loss, [1.0, 2.0], test=3.0, damping=9.0))
    assert influences.products == products and influences.gradients == gradients[0] == 4
    assert influences.cost == 2 * products + 4 and f"cost={influences.cost}" in repr(influences)
    assert str(influences.cost) in influences._repr_html_()

    pulled = [0]

    def grad(*args, **kwargs):
        pulled[0] += 1
        return autograd_grad(*args, **kwargs)

    autograd_grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", grad)
    factors = curvature.kronecker_factors(small.model, CrossEntropy(small.batch[1]), [small.batch])
    assert factors.cost == factors.gradient_count == pulled[0] > 1
    assert f"gradient_count={pulled[0]}" in repr(factors) and f"{pulled[0]}" in factors._repr_html_()
    monkeypatch.undo()

    eigen, products = measured(lambda: eigenpairs(operator))
    aligned = alignment(torch.ones(operator.size), eigen)
    assert aligned.cost == 2 * products + 1 and f"cost={aligned.cost}" in repr(aligned)
    history = CurvatureHistory().add(0, eigen).add(1, eigen, torch.ones(operator.size))
    assert (history.products, history.cost) == (2 * products, 4 * products + 1)
    assert [row["cost"] for row in history.rows()] == [2 * products, 2 * products + 1]
