"""A call of a compiled model that Dynamo would run without fpsim is rounded, or an error, or a warning: not silent."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch._dynamo import config as dynamo_config
from torch._dynamo.eval_frame import OptimizeContext
from torch._dynamo.exc import BackendCompilerFailed, Unsupported
from torch.utils.flop_counter import FlopCounterMode

import fpsim
from fpsim.compile_backend import UnroundedError, UnroundedWarning

FORMAT = "e8m1"
X = torch.randint(-16, 17, (3, 6), generator=torch.Generator().manual_seed(0)) / 8


class Model(nn.Module):
    """Two layers, with small integers over 16 as parameters: sums of their products are exact."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 5, bias=False), nn.Linear(5, 4, bias=False)
        generator = torch.Generator().manual_seed(1)
        for p in self.parameters():
            p.data = torch.randint(-16, 17, p.shape, generator=generator) / 16

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x)))


def rounded(x: Tensor) -> Tensor:
    return fpsim.round(x, FORMAT)


def by_hand(model: Model, x: Tensor) -> Tensor:
    """The outputs of ``model`` with all operands rounded."""
    hidden = torch.relu(rounded(x) @ rounded(model.first.weight).T)
    return rounded(hidden) @ rounded(model.last.weight).T


def compiled(model: Callable, backend: str = "fpsim_eager", **arguments: object) -> Callable:
    return torch.compile(model, backend=backend, options={"format": FORMAT}, **arguments)


@pytest.fixture(autouse=True)
def no_other_warning() -> Iterator[None]:
    """Every warning of fpsim that a test does not expect is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnroundedWarning)
        yield


def test_rounded_and_unrounded_results_differ() -> None:
    model = Model()
    assert torch.equal(compiled(model)(X), by_hand(model, X))
    assert not torch.equal(model(X), by_hand(model, X))


# -- transforms of torch.func ------------------------------------------------------------------------------------------


def square(x: Tensor) -> Tensor:
    return (x @ x.T).sum()


@pytest.mark.parametrize("backend", ["fpsim", "fpsim_eager"])
@pytest.mark.parametrize(
    "transform",
    [
        lambda f: torch.func.grad(f)(X),
        lambda f: torch.func.grad_and_value(f)(X),
        lambda f: torch.func.vjp(f, X),
        lambda f: torch.func.jvp(f, (X,), (X,)),
        lambda f: torch.func.jacrev(f)(X),
        lambda f: torch.func.jacfwd(f)(X),
        lambda f: torch.func.hessian(f)(X),
        lambda f: torch.func.vmap(f)(X[None]),
        lambda f: torch.vmap(f)(X[None]),
        lambda f: torch.func.functionalize(f)(X),
        lambda f: torch.func.vmap(torch.func.grad(f))(X[None]),
        lambda f: torch.autograd.functional.jacobian(torch.func.vmap(f), X[None]),
    ],
)
def test_a_transform_over_a_compiled_model_is_an_error_and_leaves_it_rounded(transform: Callable, backend: str) -> None:
    def product(x: Tensor) -> Tensor:  # with code of its own, which Dynamo might remember to leave out
        return square(x)

    function = compiled(product, backend)
    with pytest.raises(UnroundedError, match=r"torch\.func.* compiled by fpsim") as caught:
        transform(function)
    assert "functional_loss" in str(caught.value) or "Compile the function that calls torch.vmap" in str(caught.value)
    assert function(X) == (rounded(X) @ rounded(X).T).sum()


def test_the_remedies_of_these_errors_round() -> None:
    w = Model().first.weight.detach()
    outer = compiled(lambda x: torch.vmap(lambda row: w @ row)(x))
    assert torch.equal(outer(X), rounded(X) @ rounded(w).T)
    x = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(compiled(lambda x: x @ w.T)(x).sum(), x)
    assert torch.equal(gradient, torch.ones(3, 5) @ rounded(w))
    layer = nn.Linear(6, 5, bias=False)
    target = torch.zeros(3, 5)
    loss = fpsim.curvature.functional_loss(layer, F.mse_loss, batch=(X, target), policy={"format": FORMAT})
    gradient = torch.func.grad(loss)({"weight": w})["weight"]
    torch.testing.assert_close(gradient, 2 / 15 * (rounded(X) @ rounded(w).T).T @ rounded(X))


def test_functional_call_with_other_parameters_is_rounded() -> None:
    model, other = Model(), Model()
    for p in other.parameters():
        p.data = p.data.flip(0)
    function = compiled(model)
    names = {f"_orig_mod.{name}": p for name, p in other.named_parameters()}
    assert torch.equal(torch.func.functional_call(function, names, (X,)), by_hand(other, X))
    assert torch.equal(function(X), by_hand(model, X))


# -- derivatives inside the graph --------------------------------------------------------------------------------------


def step_of(model: nn.Module) -> Callable[[Tensor], None]:
    return lambda x: model(x).sum().backward()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters()}


def gradients_by_hand(model: Model) -> dict[str, Tensor]:
    h = rounded(X) @ rounded(model.first.weight).T
    ones = torch.ones(3, 4)
    inner = rounded(ones @ rounded(model.last.weight) * (h > 0))
    return {"first.weight": inner.T @ rounded(X), "last.weight": ones.T @ rounded(torch.relu(h))}


@pytest.mark.parametrize("backend", ["fpsim", "fpsim_eager"])
def test_a_step_with_backward_in_it_is_rounded_without_a_word(backend: str) -> None:
    model = Model()
    compiled(step_of(model), backend)(X)
    torch.testing.assert_close(gradients(model), gradients_by_hand(model), rtol=0, atol=0)


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize(
    "step",
    [
        lambda m: step_of(m),
        lambda m: lambda x: torch.autograd.grad(m(x).sum(), list(m.parameters())),
        lambda m: (
            lambda x: torch.utils.checkpoint.checkpoint(
                lambda x: torch.autograd.grad(m(x).sum(), list(m.parameters())), x, use_reentrant=False
            )
        ),
    ],
)
def test_backward_traced_inside_the_graph_is_refused(step: Callable, fullgraph: bool) -> None:
    errors = (BackendCompilerFailed, Unsupported)
    with dynamo_config.patch(trace_autograd_ops=True), pytest.raises(errors) as caught:
        compiled(step(Model()), fullgraph=fullgraph)(X)
    if isinstance(caught.value, BackendCompilerFailed):
        assert "torch._dynamo.config.trace_autograd_ops to False" in str(caught.value)


@pytest.mark.parametrize("set_before", [True, False])
def test_compiled_autograd_is_refused(set_before: bool) -> None:
    model = Model()
    with dynamo_config.patch(compiled_autograd=set_before):
        step = compiled(step_of(model))
    with dynamo_config.patch(compiled_autograd=True), pytest.raises(UnroundedError, match="compiled_autograd to False"):
        step(X)
    if not set_before:
        step(X)
        torch.testing.assert_close(gradients(model), gradients_by_hand(model), rtol=0, atol=0)


def test_a_backward_pass_given_to_fpsim_by_compiled_autograd_is_refused() -> None:
    outputs = compiled(Model())(X)
    refused = pytest.raises(BackendCompilerFailed, match="hands a backward pass to fpsim")
    with compiled_autograd._enable(torch.compile(backend="fpsim_eager")), refused:
        outputs.sum().backward()


def test_compiled_autograd_of_another_backend_keeps_the_rounding() -> None:
    model = Model()
    outputs = compiled(model)(X)
    with compiled_autograd._enable(torch.compile(backend="eager")):
        outputs.sum().backward()
    torch.testing.assert_close(gradients(model), gradients_by_hand(model), rtol=0, atol=0)


def test_forward_mode_inside_the_graph_is_refused() -> None:
    from torch.autograd import forward_ad

    def tangent(x: Tensor) -> Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(square(forward_ad.make_dual(x, x))).tangent

    with pytest.raises(BackendCompilerFailed, match="takes derivatives itself"):
        compiled(tangent)(X)


def test_dual_numbers_are_refused_and_leave_the_model_rounded() -> None:
    """Compiled code would drop the tangents, also those of parameters."""
    from torch.autograd import forward_ad

    model = Model()
    function = compiled(model)
    with forward_ad.dual_level(), pytest.raises(UnroundedError, match=r"dual_level.*functional_loss"):
        function(forward_ad.make_dual(X, X))
    assert torch.equal(function(X), by_hand(model, X))


# -- second derivatives ------------------------------------------------------------------------------------------------


def cubes(x: Tensor) -> Tensor:
    """A function whose gradient depends on its input only through what forward keeps."""
    return ((x @ x.new_ones(6)) ** 3).sum()


@pytest.mark.parametrize(
    "second",
    [
        lambda f: torch.autograd.functional.hessian(f, X),
        lambda f: torch.autograd.functional.hvp(f, X, X),
        lambda f: torch.autograd.functional.vhp(f, X, X),
        lambda f: torch.autograd.functional.jvp(f, X, X),
        lambda f: second_gradient(f, lambda g, x: torch.autograd.grad(g, x)),
        lambda f: second_gradient(f, lambda g, x: torch.autograd.grad(g, x, allow_unused=True)),
        lambda f: second_gradient(f, lambda g, x: g.backward()),
        lambda f: second_gradient(f, lambda g, x: g.backward(inputs=[x])),
    ],
)
def test_second_derivatives_of_a_compiled_model_are_an_error_with_the_remedy(second: Callable) -> None:
    function = compiled(cubes)
    with pytest.raises(RuntimeError, match=r"no second derivatives.*functional_loss"):
        second(function)
    x, other = X.clone().requires_grad_(), torch.ones(2, requires_grad=True)
    gradient, unused = torch.autograd.grad(function(x), (x, other), create_graph=True, allow_unused=True)
    by_sums = 3 * (rounded(X) @ torch.ones(6)) ** 2
    assert torch.equal(gradient.detach(), rounded(by_sums)[:, None].expand(3, 6))
    assert unused is None


def second_gradient(function: Callable, derive: Callable) -> None:
    x = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(x), x, create_graph=True)
    derive(gradient.sum(), x)


# -- models of which nothing is compiled -------------------------------------------------------------------------------


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))


def with_hook(register: str, where: int | None = 2) -> nn.Module:
    model = layers()
    getattr(model if where is None else model[where], register)(lambda *_: None)
    return model


def of_which_the_first_part_is(change: Callable[[nn.Module], nn.Module]) -> nn.Module:
    model = layers()
    model[0] = change(model[0])
    return model


def with_disabled_forward() -> nn.Module:
    model = Model()
    model.forward = torch.compiler.disable(model.forward)
    return model


class OfSparse(nn.Module):
    """A weight in a sparse layout, which Dynamo does not trace."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.first, self.weight = nn.Linear(6, 6), nn.Parameter(getattr(torch.eye(3), f"to_sparse{layout}")())

    def forward(self, x: Tensor) -> Tensor:
        return self.weight @ self.first(x)


class BrokenInTry(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        try:
            torch._dynamo.graph_break()
            return x @ self.weight
        finally:
            pass


LEFT_OUT = {
    "a full backward hook": lambda: with_hook("register_full_backward_hook"),
    "a full backward hook on the model": lambda: with_hook("register_full_backward_hook", None),
    "a backward pre-hook": lambda: with_hook("register_full_backward_pre_hook"),
    "an old backward hook": lambda: with_hook("register_backward_hook"),
    "a scripted part": lambda: of_which_the_first_part_is(torch.jit.script),
    "a traced model": lambda: torch.jit.trace(layers(), X),
    "a sparse weight": lambda: OfSparse(""),
    "a sparse weight in rows": lambda: OfSparse("_csr"),
    "a disabled forward": with_disabled_forward,
    "a graph break in try": BrokenInTry,
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning")
@pytest.mark.parametrize("name", LEFT_OUT)
def test_a_model_of_which_nothing_is_compiled_is_an_error_in_every_call(name: str) -> None:
    function = compiled(LEFT_OUT[name]())
    for _ in range(3):
        with pytest.raises(UnroundedError, match=r"nothing of \w+ was compiled.*fullgraph=True.*fpsim\.audit"):
            function(X)


@pytest.mark.parametrize("backend", ["fpsim", "fpsim_eager"])
def test_a_layer_of_torch_compiled_in_place_is_rounded_or_an_error(backend: str) -> None:
    """Torch before 2.14 silently compiles nothing there."""
    layer = nn.Linear(6, 5, bias=False)
    layer.compile(backend=backend, options={"format": FORMAT})
    try:
        assert torch.equal(layer(X), rounded(X) @ rounded(layer.weight).T)
    except UnroundedError as error:
        assert "nothing of Linear was compiled" in str(error)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_model_is_an_error_of_torch() -> None:
    with pytest.raises(RuntimeError, match=r"does not support compiling torch\.jit\.script"):
        compiled(torch.jit.script(layers()))


def test_products_beside_the_graphs_are_a_warning_once() -> None:
    class Hooked(Model):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    model = Hooked()
    model.last.register_full_backward_hook(lambda *_: None)
    function = compiled(model)
    with pytest.warns(UnroundedWarning, match=r"fpsim: 1 aten\.mm ran unrounded in Hooked.*fpsim\.audit") as caught:
        function(X)
    assert caught[0].filename == __file__
    function(X)  # has warned


def test_products_in_a_disabled_helper_are_a_warning() -> None:
    helper = torch.compiler.disable(lambda x: torch.linalg.solve(torch.eye(3), x))
    with pytest.warns(UnroundedWarning, match=r"1 aten\._linalg_solve_ex ran unrounded"):
        compiled(lambda x: helper(x @ torch.eye(6)))(X)


def test_a_graph_break_with_a_later_shape_is_an_error_for_all_shapes() -> None:
    """Dynamo then leaves the whole function out, the code for the first shape included."""

    def function(x: Tensor) -> Tensor:
        if x.shape[0] != 3:
            try:
                torch._dynamo.graph_break()
                return x @ x.T
            finally:
                pass
        return x @ x.T

    call = compiled(function, dynamic=False)
    assert torch.equal(call(X), rounded(X) @ rounded(X).T)
    for x in (X[:2], X, X[:2]):
        with pytest.raises(UnroundedError, match="nothing of"):
            call(x)


def test_another_owner_of_the_code_cannot_leave_it_out_for_fpsim_silently() -> None:
    def product(x: Tensor) -> Tensor:
        return x @ x.T

    ours, others = compiled(product), torch.compile(product, backend="eager", dynamic=False)
    ours(X), ours(X)
    with dynamo_config.patch(disable=True):
        others(X[:2])  # Dynamo now leaves out the code of `product`
    try:
        result = ours(X)
    except UnroundedError:
        return
    assert torch.equal(result, rounded(X) @ rounded(X).T)


@pytest.mark.parametrize(
    "function",
    [lambda x: x, lambda x: x.shape, lambda x: None, lambda x: x.T, lambda x: [x, 1], lambda x: {"x": x[:, :2]}],
)
def test_functions_without_arithmetic_are_no_escape(function: Callable) -> None:
    call = compiled(function)
    for _ in range(3):
        call(X)


def test_returning_early_is_no_escape() -> None:
    call = compiled(lambda x, n: x if n == 0 else x @ x.T)
    for n in (1, 1, 0, 0, 1):
        call(X, n)


# -- switches of torch -------------------------------------------------------------------------------------------------


def test_a_stance_that_runs_the_model_unrounded_is_a_warning() -> None:
    model = Model()
    function = compiled(model)
    asked = r"fpsim: Model ran unrounded, as torch\.compiler\.set_stance asks"
    for arguments in ({"stance": "force_eager"}, {"stance": "eager_on_recompile"}, {"force_backend": "eager"}):
        stance = torch.compiler.set_stance(**{"stance": "default"} | arguments)
        with stance, pytest.warns(UnroundedWarning, match=asked):
            assert torch.equal(function(X), model(X))
        assert torch.equal(function(X), by_hand(model, X))
        torch._dynamo.reset()


def test_stances_warn_with_fullgraph_and_after_many_calls() -> None:
    model = Model()
    function = compiled(model, fullgraph=True, dynamic=False)
    for _ in range(3):
        function(X)
    with torch.compiler.set_stance("eager_on_recompile"):
        assert torch.equal(function(X), by_hand(model, X))
        with pytest.warns(UnroundedWarning, match="eager_on_recompile"):
            function(X[:2])
    with torch.compiler.set_stance("force_eager"), pytest.warns(UnroundedWarning, match="force_eager"):
        function(X)


def test_to_fail_on_recompiling_is_an_error_of_torch() -> None:
    with torch.compiler.set_stance("fail_on_recompile"), pytest.raises(RuntimeError, match="fail_on_recompile"):
        compiled(Model())(X)


@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_disabled_dynamo_is_a_warning_and_is_not_remembered(fullgraph: bool) -> None:
    model = Model()
    function = compiled(model, fullgraph=fullgraph)
    with dynamo_config.patch(disable=True), pytest.warns(UnroundedWarning, match=r"config\.disable is on"):
        assert torch.equal(function(X), model(X))
    assert torch.equal(function(X), by_hand(model, X))


def test_a_model_that_torch_compile_returns_as_it_is_is_a_warning() -> None:
    with pytest.warns(UnroundedWarning, match="disable=True was given"):
        compiled(Model(), disable=True)
    with pytest.warns(UnroundedWarning, match="disable=True was given"):
        torch.compile(backend="fpsim", disable=True)(square)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.compile(square, backend="eager", disable=True)


def test_the_environment_that_disables_dynamo_is_a_warning() -> None:
    program = "import torch; torch.compile(torch.nn.Linear(2, 2), backend='fpsim')(torch.ones(1, 2))"
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={"TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "UnroundedWarning: fpsim: torch.compile returns the model as it is" in run.stderr


def test_suppressed_errors_are_no_silent_fallback() -> None:
    function = compiled(lambda x: torch.cdist(x, x))  # refused by the backend
    with dynamo_config.patch(suppress_errors=True), pytest.raises(UnroundedError, match="nothing of"):
        function(X)


def test_a_mode_that_keeps_dynamo_from_compiling_is_an_error_and_leaves_the_model_rounded() -> None:
    model = Model()
    function = compiled(model)
    with FlopCounterMode(display=False), pytest.raises(UnroundedError, match="under a TorchDispatchMode"):
        function(X)
    assert torch.equal(function(X), by_hand(model, X))


# -- export, and other compilers around the model ----------------------------------------------------------------------


class Around(nn.Module):
    def __init__(self, inner: Callable) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + 0


@pytest.mark.parametrize("around", [lambda c: c, Around])
@pytest.mark.parametrize("strict", [False, True])
def test_exporting_a_compiled_model_is_an_error(around: Callable, strict: bool) -> None:
    kinds = (UnroundedError, Unsupported, torch._dynamo.exc.UserError)
    with pytest.raises(kinds, match="compiled by fpsim") as caught:
        torch.export.export(around(compiled(Model())), (X,), strict=strict)
    if not strict:
        assert "Export the uncompiled model" in str(caught.value)


def test_the_remedy_of_exporting_rounds() -> None:
    model = Model()
    exported = torch.export.export(model, (X,)).module()
    assert torch.equal(compiled(exported)(X), by_hand(model, X))


def in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="fpsim_eager", options={"format": FORMAT})
    return model


def by_its_forward(model: nn.Module) -> nn.Module:
    model.forward = compiled(model.forward)
    return model


@pytest.mark.parametrize("outer", ["eager", "aot_eager", "inductor", "fpsim_eager"])
@pytest.mark.parametrize("inner", [compiled, in_place, by_its_forward, lambda m: compiled(lambda x: m(x))])
def test_a_compiled_model_inside_other_compiled_code_keeps_its_policy(outer: str, inner: Callable) -> None:
    model = Model()
    function = inner(model)
    step = torch.compile(lambda x: function(x) * 2, backend=outer)
    for _ in range(3):
        assert torch.equal(step(X), by_hand(model, X) * 2)


class Sum(nn.Module):
    """A layer, and a part with another policy."""

    def __init__(self, part: Callable) -> None:
        super().__init__()
        self.first, self.part = nn.Linear(6, 6, bias=False), part
        self.first.weight.data = torch.eye(6) * 1.25

    def forward(self, x: Tensor) -> Tensor:
        return self.part(self.first(x))


@pytest.mark.parametrize("inner", [compiled, in_place, by_its_forward])
@pytest.mark.parametrize("outer", [{"backend": "eager"}, {"backend": "fpsim_eager", "options": {"format": "e8m2"}}])
def test_a_part_that_is_compiled_on_its_own_keeps_its_policy_in_a_compiled_model(inner: Callable, outer: dict) -> None:
    model = Model()
    step = torch.compile(Sum(inner(model)), **outer)
    for _ in range(3):
        y = step(X)
        assert torch.equal(y, by_hand(model, (fpsim.round(X, "e8m2") if "options" in outer else X) * 1.25))
    y.sum().backward()
    assert model.last.weight.grad is not None


def test_a_part_compiled_in_place_after_the_model_has_run_keeps_its_policy() -> None:
    model = Model()
    step = torch.compile(Sum(model), backend="eager")
    assert torch.equal(step(X), model(X * 1.25))
    in_place(model)
    assert torch.equal(step(X), by_hand(model, X * 1.25))


@pytest.mark.parametrize("first_in_place", [False, True])
def test_a_module_compiled_twice_with_different_options_is_an_error(first_in_place: bool) -> None:
    model = Model()
    compiling = [lambda: in_place(model), lambda: torch.compile(model, backend="fpsim_eager")]
    functions = [compile_it() for compile_it in (compiling if first_in_place else compiling[::-1])]
    whole = next(function for function in functions if function is not model)
    with pytest.raises(UnroundedError, match=r"with the options None, .* module with {'format': 'e8m1'}, which would"):
        whole(X)
    assert torch.equal(model(X), by_hand(model, X))
    assert torch.equal(compiled(model)(X), by_hand(model, X))  # the same options


def test_a_part_compiled_in_place_inside_a_whole_graph_is_an_error_that_names_fpsim() -> None:
    with pytest.raises(Unsupported, match="compiled by fpsim"):
        torch.compile(Sum(in_place(Model())), backend="eager", fullgraph=True)(X)


def test_a_compiled_model_inside_a_whole_graph_is_an_error_that_names_fpsim() -> None:
    function = compiled(Model())
    with pytest.raises(Unsupported, match="compiled by fpsim"):
        torch.compile(lambda x: function(x), backend="eager", fullgraph=True)(X)


# -- callables stay what they were -------------------------------------------------------------------------------------


def test_callables_of_other_backends_are_not_wrapped() -> None:
    compiled(Model())  # makes the settings
    function = torch.compile(square, backend="eager")
    plain = OptimizeContext.__call__.__wrapped__(function_context("eager"), square)
    assert function.__code__ is plain.__code__


def function_context(backend: str) -> OptimizeContext:
    return torch._dynamo.optimize(backend)


def test_a_watched_function_keeps_its_name_and_what_torch_reads_from_it() -> None:
    function = compiled(square)
    assert function.__name__ == "square" and function._torchdynamo_orig_callable is square
    assert torch._dynamo.eval_frame.innermost_fn(function) is square
    replaced = (
        r"replaces the code of square, which fpsim has compiled, by that of another backend, and it runs unrounded"
    )
    with pytest.warns(UnroundedWarning, match=replaced) as caught:
        again = torch.compile(function, backend="eager")
    assert caught[0].filename == __file__ and torch.equal(again(X), square(X))
    again = torch.compile(function, backend="fpsim_eager", options={"format": "e8m2"})
    assert torch.equal(again(X), square(fpsim.round(X, "e8m2")))
    with pytest.warns(UnroundedWarning, match="replaces the code of Model"):
        torch.compile(compiled(Model()), backend="eager")


def test_copies_and_methods_are_watched_too() -> None:
    class Decorated(Model):
        @torch.compile(backend="fpsim_eager", options={"format": FORMAT})
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    model = Decorated()
    assert torch.equal(model(X), by_hand(model, X))
    copied = copy.deepcopy(compiled(Model()))
    assert torch.equal(copied(X), by_hand(copied._orig_mod, X))
    for function in (model, copied):
        with pytest.raises(UnroundedError, match=r"torch\.func\.vmap"):
            torch.vmap(function)(X[None])


class WithMethods(Model):
    def encode(self, x: Tensor) -> Tensor:
        return self.first(x)

    def shape(self, x: Tensor) -> torch.Size:
        return (x + 1).shape


def test_another_method_of_a_compiled_module_is_a_warning() -> None:
    model = WithMethods()
    function = compiled(model)
    with pytest.warns(
        UnroundedWarning, match=r"1 aten\.mm ran unrounded in WithMethods\.encode: .*model\.encode"
    ) as caught:
        assert torch.equal(function.encode(X), model.first(X))
    assert caught[0].filename == __file__
    assert function.shape(X) == X.shape  # without a product in it
    assert torch.equal(compiled(model.encode)(X), rounded(X) @ rounded(model.first.weight).T)  # the remedy
    assert torch.compile(model, backend="eager").encode == model.encode


def test_a_copy_of_a_module_compiled_in_place_is_a_warning() -> None:
    model = Model()
    model.compile(backend="fpsim_eager", options={"format": FORMAT})
    with pytest.warns(UnroundedWarning, match="a copy of Model is not compiled") as caught:
        copied = copy.deepcopy(model)
    assert caught[0].filename == __file__
    assert torch.equal(copied(X), Model.forward(model, X)) and torch.equal(model(X), by_hand(model, X))
    assert vars(copied).keys() == vars(Model()).keys()
    copied.compile(backend="fpsim_eager", options={"format": FORMAT})  # the remedy
    assert torch.equal(copied(X), by_hand(copied, X))
    copy.deepcopy(Model()), copy.deepcopy(compiled(Model()))  # without a warning
    other = Model()
    other.compile(backend="eager")
    copy.deepcopy(other)


def items(x: Tensor) -> Iterator[Tensor]:
    yield x @ x.T


class Items(nn.Module):
    def forward(self, x: Tensor) -> Iterator[Tensor]:
        yield x @ x.T


@pytest.mark.parametrize("function", [items, Items()])
def test_a_generator_is_an_error(function: Callable) -> None:
    with pytest.raises(UnroundedError, match="is a generator, which Dynamo does not compile"):
        next(compiled(function)(X))


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_products_in_hooks_of_a_compiled_module_are_a_warning(register: str) -> None:
    def gram(_: nn.Module, *values: object) -> None:
        X @ X.T

    model = Model()
    function = compiled(model)
    handle = getattr(function, register)(gram)
    for _ in range(2):
        with pytest.warns(UnroundedWarning, match=r"1 aten\.mm ran unrounded in Model or in hooks"):
            assert torch.equal(function(X), by_hand(model, X))
    handle.remove()
    function.register_forward_hook(lambda module, inputs, outputs: outputs + 1)  # without a product
    assert torch.equal(function(X), by_hand(model, X) + 1)


# -- parts of a compiled module ----------------------------------------------------------------------------------------


class WithParts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model, self.layers = Model(), nn.ModuleList([nn.Linear(4, 4), nn.ReLU()])

    def forward(self, x: Tensor) -> Tensor:
        x = self.model(x)
        for layer in self.layers:
            x = layer(x)
        return x


PARTS: dict[str, tuple[Callable, str]] = {
    "a layer": (
        lambda c: c.model.first(X),
        "1 aten.mm ran unrounded in Linear, a part of the compiled module WithParts",
    ),
    "layers": (lambda c: c.model(X), "2 aten.mm ran unrounded in Model, a part of the compiled module WithParts"),
    "by its name": (lambda c: c.get_submodule("model.last")(X[:, :5]), "1 aten.mm ran unrounded in Linear"),
    "of a list": (lambda c: [layer(X[:, :4]) for layer in c.layers], "1 aten.addmm ran unrounded in Linear"),
}


@pytest.mark.parametrize("name", PARTS)
def test_a_call_of_a_part_of_a_compiled_module_is_a_warning(name: str) -> None:
    call, message = PARTS[name]
    function = compiled(WithParts())
    for _ in range(2):
        with pytest.warns(UnroundedWarning) as caught:
            call(function)
        assert str(caught[0].message).startswith(f"fpsim: {message}") and len(caught) == 1
        assert caught[0].filename == __file__


def test_a_part_that_is_kept_warns_once() -> None:
    function = compiled(WithParts())
    part = function.model
    function(X), function._orig_mod(X)  # calls of the whole module
    with pytest.warns(UnroundedWarning, match=r"Compile the part too: torch\.compile\(part, backend='fpsim'\)"):
        part(X)
    part(X)
    assert torch.equal(compiled(part)(X), by_hand(part, X))  # the remedy


def test_parts_that_are_only_looked_at_change_nothing() -> None:
    model = WithParts()
    model.model.first.register_forward_hook(
        lambda module, inputs, outputs: outputs * 1
    )  # Dynamo traces more calls then
    function = compiled(model, fullgraph=True)
    before = function(X)
    function.model.first.weight, function.layers[1](X)  # a part without a product
    for _ in range(2):
        assert torch.equal(function(X), before)
    model(X), copy.deepcopy(model), copy.deepcopy(function)
    in_place(model.model)
    assert torch.equal(model.model(X), by_hand(model.model, X))


# -- backward passes ---------------------------------------------------------------------------------------------------

SQUARE = torch.arange(36.0).reshape(6, 6).remainder(7) / 8


class ProductInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        return g @ SQUARE


def multiply(tensor: Tensor) -> None:
    tensor @ SQUARE


class Between(nn.Module):
    """Two layers, and a function between them."""

    def __init__(self, between: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        self.first, self.last, self.between = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False), between

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x)))


def of_custom_function() -> tuple[nn.Module, Callable]:
    model = Between(torch.compiler.disable(ProductInBackward.apply))
    return model, lambda y: y.sum().backward()


def by_grad() -> tuple[nn.Module, Callable]:
    model, _ = of_custom_function()
    return model, lambda y: torch.autograd.grad(y.sum(), list(model.parameters()))


def of_parameter_hook() -> tuple[nn.Module, Callable]:
    model = Between()
    model.first.weight.register_hook(multiply)
    return model, lambda y: y.sum().backward()


def of_hook_after_accumulation() -> tuple[nn.Module, Callable]:
    model = Between()
    model.first.weight.register_post_accumulate_grad_hook(multiply)
    return model, lambda y: y.sum().backward()


def of_hook_of_results() -> tuple[nn.Module, Callable]:
    def backward(y: Tensor) -> None:
        y.register_hook(multiply)
        y.sum().backward()

    return Between(), backward


IN_BACKWARD = [of_custom_function, by_grad, of_parameter_hook, of_hook_after_accumulation, of_hook_of_results]


@pytest.mark.parametrize("make", IN_BACKWARD)
@pytest.mark.parametrize("before", ["nothing", "inference", "forward"])
def test_products_that_run_in_backward_beside_the_graphs_are_a_warning_once(make: Callable, before: str) -> None:
    model, backward = make()
    function = compiled(model)
    with torch.set_grad_enabled(before == "forward"):
        for _ in range(0 if before == "nothing" else 3):
            function(X)
    message = r"1 aten\.mm ran unrounded in the backward pass of Between, .* hooks of tensors, or in derivatives.*audit"
    caught = []
    for _ in range(4):
        with warnings.catch_warnings(record=True) as here:
            warnings.simplefilter("always")
            backward(function(X))
        caught += [each for each in here if issubclass(each.category, UnroundedWarning)]
    (warning,) = caught
    assert re.search(message, str(warning.message)) and warning.filename == __file__


@dataclass
class Output:
    """A result that torch's pytrees do not know."""

    value: Tensor
    node: str = "of no graph"


def test_results_of_any_kind_and_gradient_edges_are_followed() -> None:
    model, _ = of_custom_function()
    function = compiled(lambda x: Output(model(x)))
    with pytest.warns(UnroundedWarning, match="in the backward pass of"):
        function(X).value.sum().backward()
    function = compiled(lambda x: {"y": [model(x), "text"]})
    edge = torch.autograd.graph.get_gradient_edge(function(X)["y"][0])
    with pytest.warns(UnroundedWarning, match="in the backward pass of"):
        torch.autograd.backward([edge], [torch.ones(3, 6)])


def test_compiled_code_warns_of_backward_too() -> None:
    model, backward = of_custom_function()
    with pytest.warns(UnroundedWarning, match=r"1 aten\.mm ran unrounded in the backward pass of Between"):
        backward(compiled(model, "fpsim")(X))


def test_each_backward_pass_is_watched_whatever_runs_first() -> None:
    (clean, _), (model, backward) = (Between(), None), of_parameter_hook()
    first, second = compiled(clean)(X), compiled(model)(X)
    backward(first)
    with pytest.warns(UnroundedWarning, match="in the backward pass of Between"):
        backward(second)


def test_products_in_backward_outside_of_the_model_are_no_escape() -> None:
    before, model = nn.Linear(6, 6), Between()
    before.weight.register_hook(multiply)
    function = compiled(model)
    for _ in range(3):
        (function(before(X)) @ SQUARE).sum().backward()
        torch.utils.checkpoint.checkpoint(function, X.clone().requires_grad_(), use_reentrant=False).sum().backward()


def test_what_a_compiled_step_runs_in_backward_is_compiled_too() -> None:
    """Dynamo compiles the hooks and functions that autograd calls in such a step."""
    seen: list[tuple[Tensor, Tensor]] = []
    model = Between()
    model.first.weight.register_hook(lambda g: seen.append((g, g @ SQUARE)))
    step = compiled(step_of(model))
    for _ in range(3):
        step(X)
    assert len(seen) == 3 and all(torch.equal(y, rounded(g) @ rounded(SQUARE)) for g, y in seen)


def test_a_hook_that_dynamo_traces_is_rounded() -> None:
    def hooked(x: Tensor) -> Tensor:
        x.register_hook(lambda g: g @ SQUARE)
        return x

    model = Between(hooked)
    compiled(model)(X).sum().backward()
    gradient = rounded(torch.ones(3, 6) @ rounded(model.last.weight)) @ rounded(SQUARE)
    torch.testing.assert_close(model.first.weight.grad, rounded(gradient).T @ rounded(X), rtol=0, atol=0)
