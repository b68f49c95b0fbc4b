"""The derivative of `fpsim.round` is right in every order, by every way of differentiation that torch has.

Two peculiarities of torch make this necessary. `torch.compile` of `torch.func` transforms silently ignores registered
derivatives, and ``x + (q(x) - x).detach()`` loses -0, infinities and large values.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

import fpsim
from fpsim.formats import ROUNDINGS, parse_format
from fpsim.tensor_functions import GRADIENTS
from tests.shared.judge import CARRIERS, assert_result, assert_same_bits, interesting, suits

pytestmark = pytest.mark.usefixtures("one_thread")

# e4m3fn has numbers up to 448. The bounds belong to the range; larger numbers that round down to them do not.
X = torch.tensor([0.3, -0.3, 0.0, -0.0, 1e-9, -1e-9, 447.0, 448.0, -448.0, 448.5, 463.0, 500.0, -1e9, 3e38, 1e-44])
WITHIN = (X.abs() <= 448).float()
V = torch.arange(1.0, len(X) + 1)
DERIVATIVE = {"straight_through": torch.ones_like(X), "clipped": WITHIN, "zero": torch.zeros_like(X)}
Q = fpsim.round(X, "e4m3fn")


@pytest.fixture(params=GRADIENTS)
def gradient(request) -> str:
    return request.param


def rounded(gradient: str) -> Callable[[Tensor], Tensor]:
    return lambda x: fpsim.round(x, "e4m3fn", gradient=gradient)  # type: ignore[arg-type]


def cubes(gradient: str) -> Callable[[Tensor], Tensor]:
    """The sum of q(x)**3 + x**2. With d = q'(x), its first derivative is 3 q**2 d + 2 x, its second 6 q d**2 + 2.

    The second term keeps x in the graph where d is zero.
    """
    return lambda x: (rounded(gradient)(x) ** 3 + x**2).sum()


def first(gradient: str) -> Tensor:
    return 3 * Q**2 * DERIVATIVE[gradient] + 2 * X


def second(gradient: str) -> Tensor:
    """The product of the Hessian, which is diagonal, with `V`."""
    return (6 * Q * DERIVATIVE[gradient] + 2) * V


def assert_equal(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


# -- first order ---------------------------------------------------------------------------------------------------


def test_autograd(gradient):
    x = X.clone().requires_grad_()
    y = rounded(gradient)(x)
    assert y.requires_grad == (gradient != "zero")
    if y.requires_grad:
        y.backward(V)
        assert_same_bits(x.grad, V * DERIVATIVE[gradient], X)


def test_autograd_through_other_operations(gradient):
    x = X.clone().requires_grad_()
    (got,) = torch.autograd.grad(cubes(gradient)(x), x)
    assert_equal(got, first(gradient))


def test_func_grad(gradient):
    assert_equal(grad(cubes(gradient))(X), first(gradient))
    assert_same_bits(grad(lambda x: (rounded(gradient)(x) * V).sum())(X), V * DERIVATIVE[gradient], X)


def test_jvp(gradient):
    value, tangent = jvp(rounded(gradient), (X,), (V,))
    assert_same_bits(value, Q, X)
    assert_same_bits(tangent, V * DERIVATIVE[gradient], X)


def test_vjp(gradient):
    value, pullback = vjp(rounded(gradient), X)
    assert_same_bits(value, Q, X)
    assert_same_bits(pullback(V)[0], V * DERIVATIVE[gradient], X)


def test_forward_mode_dual_numbers(gradient):
    with forward_ad.dual_level():
        value, tangent = forward_ad.unpack_dual(rounded(gradient)(forward_ad.make_dual(X, V)))
    assert_same_bits(value, Q, X)
    assert_same_bits(torch.zeros_like(X) if tangent is None else tangent, V * DERIVATIVE[gradient], X)


def test_linearize(gradient):
    value, pushforward = linearize(rounded(gradient), X)
    assert_same_bits(value, Q, X)
    assert_same_bits(pushforward(V), V * DERIVATIVE[gradient], X)
    value, pushforward = linearize(grad(cubes(gradient)), X)
    assert_equal(pushforward(V), second(gradient))


@pytest.mark.parametrize("jacobian", [jacrev, jacfwd])
def test_jacobians(jacobian, gradient):
    assert_same_bits(jacobian(rounded(gradient))(X), torch.diag(DERIVATIVE[gradient]))


# -- batches -------------------------------------------------------------------------------------------------------

no_fallback = pytest.mark.filterwarnings("error::UserWarning")  # torch warns where it loops because a rule is missing
BATCH = torch.stack([X, -X, X.flip(0)])


@no_fallback
def test_vmap(gradient):
    want = fpsim.round(BATCH, "e4m3fn")
    assert_same_bits(vmap(rounded(gradient))(BATCH), want)
    assert_same_bits(vmap(rounded(gradient), in_dims=1, out_dims=1)(BATCH), want)
    assert_same_bits(vmap(vmap(rounded(gradient)))(BATCH), want)
    assert_same_bits(vmap(rounded(gradient), in_dims=1)(BATCH), want.T.contiguous())
    assert_same_bits(vmap(lambda x, y: rounded(gradient)(x) * y, in_dims=(None, 0))(X, BATCH), Q * BATCH)


@no_fallback
def test_vmap_of_grad(gradient):
    got = vmap(grad(cubes(gradient)))(BATCH)
    assert_equal(got[0], first(gradient))
    assert_equal(got[2], first(gradient).flip(0))


def test_grad_of_vmap(gradient):
    assert_equal(grad(lambda batch: vmap(cubes(gradient))(batch).sum())(BATCH)[0], first(gradient))


# -- second order --------------------------------------------------------------------------------------------------


def test_autograd_twice(gradient):
    x = X.clone().requires_grad_()
    (once,) = torch.autograd.grad(cubes(gradient)(x), x, create_graph=True)
    (twice,) = torch.autograd.grad(once, x, V)
    assert_equal(twice, second(gradient))


def test_hessian_vector_products(gradient):
    loss = cubes(gradient)
    assert_equal(jvp(grad(loss), (X,), (V,))[1], second(gradient))
    assert_equal(vjp(grad(loss), X)[1](V)[0], second(gradient))
    assert_equal(grad(lambda x: jvp(loss, (x,), (V,))[1])(X), second(gradient))
    assert_equal(grad(lambda x: (grad(loss)(x) * V).sum())(X), second(gradient))


@no_fallback
def test_batches_of_hessian_vector_products(gradient):
    got = vmap(lambda v: jvp(grad(cubes(gradient)), (X,), (v,))[1])(torch.stack([V, 2 * V]))
    assert_equal(got[1], 2 * second(gradient))


def test_hessian(gradient):
    assert_equal(hessian(cubes(gradient))(X) @ V, second(gradient))


# -- the value while it is differentiated --------------------------------------------------------------------------

VALUE_CASES = [(name, dtype) for name in ("e4m3fn", "e5m2", "e2m1fn", "e8m0fnu", "e4m3fnuz", "e5m2:bias=130", "bf16")
               for dtype in CARRIERS if suits(parse_format(name), dtype)]  # fmt: skip


@pytest.mark.parametrize(("name", "dtype"), VALUE_CASES, ids=str)
def test_the_value_is_exact_while_it_is_differentiated(name, dtype, gradient):
    """This holds for -0, infinities, NaN, subnormals and huge numbers too, and derivatives are never NaN."""
    x = interesting(parse_format(name), dtype).sample(3000).tensor
    for rounding in ROUNDINGS:

        def function(x: Tensor, rounding: str = rounding) -> Tensor:
            return fpsim.round(x, name, rounding=rounding, gradient=gradient)  # type: ignore[arg-type]

        leaf = x.clone().requires_grad_()
        value = function(leaf)
        assert_result(value, x, name, rounding)
        if value.requires_grad:
            value.backward(torch.ones_like(x))
            assert bool(leaf.grad.isfinite().all()) and leaf.grad.dtype == dtype
        value, tangent = jvp(function, (x,), (torch.ones_like(x),))
        assert_result(value, x, name, rounding)
        assert bool(tangent.isfinite().all())
        value, _ = vjp(function, x)
        assert_result(value, x, name, rounding)
        assert_result(vmap(function)(x), x, name, rounding)


@pytest.mark.parametrize("dtype", CARRIERS, ids=str)
def test_the_derivative_is_one_up_to_the_largest_number_of_the_carrier(dtype):
    x = torch.tensor([torch.finfo(dtype).max, -torch.finfo(dtype).max, torch.finfo(dtype).tiny, 0.0], dtype=dtype)
    for name in ("e4m3fn", "e5m2", "e2m1fn"):
        leaf = x.clone().requires_grad_()
        fpsim.round(leaf, name).sum().backward()
        assert leaf.grad.tolist() == [1, 1, 1, 1]


def test_infinities_and_nan_have_the_derivative_zero():
    """The derivative comes from adding a finite zero, which they do not have: see `fpsim.round`."""
    for gradient in GRADIENTS:
        x = torch.tensor([float("inf"), -float("inf"), float("nan")])
        assert jvp(rounded(gradient), (x,), (torch.ones(3),))[1].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("name", "within", "beyond"),
    [
        ("e4m3fn", [448.0, -448.0, 1e-30], [448.0625, -1e9]),
        ("e5m2", [57344.0, -57344.0], [57345.0, 61440.0]),
        ("e8m0fnu", [1.0, 2.0**127], [-1.0, -1e-30]),
        ("e4m3:unsigned", [0.0, 240.0], [-1e-30, 240.5]),
        ("e2m1fn", [6.0, -6.0], [6.5, 7.0]),
    ],
)
def test_clipped_means_within_the_finite_range(name, within, beyond):
    x = torch.tensor(within + beyond, requires_grad=True)
    fpsim.round(x, name, gradient="clipped").backward(torch.ones_like(x))
    assert x.grad.tolist() == [1.0] * len(within) + [0.0] * len(beyond)


def test_without_gradient_nothing_is_recorded():
    x = torch.ones(3, requires_grad=True)
    with torch.no_grad():
        assert not fpsim.round(x, "e4m3fn").requires_grad
    assert not fpsim.round(x.detach(), "e4m3fn").requires_grad
    assert fpsim.round(x, "e4m3fn").requires_grad


def test_the_operator_alone_is_a_value_function():
    """`fpsim.round` passes only detached tensors to it."""
    x = torch.ones(3, requires_grad=True)
    assert not torch.ops.fpsim.round(x.detach(), "e4m3fn", "nearest_even", "sat_finite").requires_grad


# -- compiled ------------------------------------------------------------------------------------------------------


def value_and_backward(gradient: str) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        y = torch.compile(lambda x: rounded(gradient)(x) ** 3 + x**2, fullgraph=True, backend="aot_eager")(x)
        y.sum().backward()
        return y.detach(), x.grad

    return function


TRANSFORMS: dict[str, tuple[Callable[[str], Callable[[Tensor], Tensor]], Callable[[str], Tensor]]] = {
    "value": (rounded, lambda gradient: Q),
    "grad": (lambda gradient: grad(cubes(gradient)), first),
    "jvp": (
        lambda gradient: lambda x: jvp(rounded(gradient), (x,), (V,))[1],
        lambda gradient: V * DERIVATIVE[gradient],
    ),
    "vmap": (lambda gradient: lambda x: vmap(rounded(gradient))(x), lambda gradient: Q),
    "vmap of grad": (lambda gradient: lambda x: vmap(grad(cubes(gradient)))(x), first),
    "jvp of grad": (lambda gradient: lambda x: jvp(grad(cubes(gradient)), (x,), (V,))[1], second),
    "vjp of grad": (lambda gradient: lambda x: vjp(grad(cubes(gradient)), x)[1](V)[0], second),
    "vmap of jvp of grad": (
        lambda gradient: lambda x: vmap(lambda v: jvp(grad(cubes(gradient)), (x,), (v,))[1])(torch.stack([V, V]))[1],
        second,
    ),
}


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_compiled_transforms(transform, gradient, fresh_compiler):
    function, want = TRANSFORMS[transform]
    compiled = torch.compile(function(gradient), fullgraph=True, backend="aot_eager")
    assert_equal(compiled(X), want(gradient))
    assert_equal(function(gradient)(X), want(gradient))


def test_compiled_backward(gradient, fresh_compiler):
    value, derivative = value_and_backward(gradient)(X)
    assert_equal(value, Q**3 + X**2)
    assert_equal(derivative, first(gradient))


def test_compiled_by_inductor(fresh_compiler):
    """Values bit for bit, among them infinities, NaNs and -0, and derivatives of both orders."""
    x = interesting(parse_format("e5m2"), torch.float32).sample(2001).tensor

    def function(x: Tensor) -> Tensor:
        return fpsim.round(x, "e5m2", rounding="up") * 3 + fpsim.round(x, "e4m3fn", gradient="clipped")

    eager, compiled = x.clone().requires_grad_(), x.clone().requires_grad_()
    want, got = function(eager), torch.compile(function, fullgraph=True)(compiled)
    assert_same_bits(got, want, x)
    want.sum().backward()
    got.sum().backward()
    assert_same_bits(compiled.grad, eager.grad, x)
    product = torch.compile(lambda x: jvp(grad(cubes("clipped")), (x,), (V,))[1], fullgraph=True)
    assert_equal(product(X), second("clipped"))


def test_code_compiled_without_a_derivative_is_not_used_if_one_is_needed() -> None:
    """Code without a derivative leaves its arithmetic out, so a guard must check whether a derivative is needed."""
    x = torch.tensor([0.3, 1.7, -2.2])
    compiled = torch.compile(lambda x: fpsim.round(x, "e4m3fn") * 2, backend="aot_eager")
    compiled(x)
    twos = torch.full((3,), 2.0)
    assert torch.equal(torch.func.grad(lambda x: compiled(x).sum())(x), twos)
    assert torch.equal(torch.func.jvp(compiled, (x,), (torch.ones(3),))[1], twos)
    with forward_ad.dual_level():
        assert torch.equal(forward_ad.unpack_dual(compiled(forward_ad.make_dual(x, torch.ones(3)))).tangent, twos)
    leaf = x.clone().requires_grad_()
    with torch.no_grad():
        compiled(leaf)
    compiled(leaf).sum().backward()
    assert torch.equal(leaf.grad, twos)
