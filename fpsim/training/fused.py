"""Fused steps of torch's optimizers on the CPU, compiled so that each state is rounded as it is written.

torch's own fused kernels leave a state unrounded, and rounding it afterwards reads and writes it once more. `FUSED`
holds the arithmetic of these kernels in tensor operations. Inductor compiles a step and the rounding of its results
into one loop. The order of operations and the fused multiply-adds are those of torch's kernels for vectors, so the bits
are those of torch's kernel followed by rounding. Each compiled step is first compared with torch's kernel.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer
from torch.overrides import TorchFunctionMode

from fpsim.casts import Cast
from fpsim.training.in_place import COMPILE_FROM, compile_alone, in_batches, write

#: The optimizers whose ``step`` calls a kernel of `FUSED` and does nothing with the state after it.
OPTIMIZERS = (Adam, AdamW, Adagrad, SGD)

# torch's kernels compute the last elements of a tensor, which fill no vector, by scalar code with other roundings.
_VECTOR = 16
# Tensors with fewer elements are left to torch's kernel, because a call of compiled code costs tens of microseconds.
_LARGE = 1 << 16

# The number of tensors that one call of compiled code takes. More would compile for longer.
_BATCH = 2

Options = Mapping[str, Any]


@dataclass(frozen=True)
class FusedStep:
    """A fused kernel of torch, written in tensor operations.

    Attributes:
        states: the names of the kernel's states, in the order of its arguments after parameters and gradients.
        update: the new parameter and states of one tensor: a function of the old ones (parameter, gradient, states),
            of the numbers, and of the facts.
        numbers: the numbers of a step, as a function of the kernel's options and the count of steps. torch computes
            them in float64.
        facts: the options that select operations, as arguments of ``update``.
        counts: whether the kernel has an argument for the counts of steps.
    """

    states: tuple[str, ...]
    update: Callable[..., tuple[Tensor, ...]]
    numbers: Callable[[Options, int], list[float]]
    facts: Callable[[Options], dict[str, bool]]
    counts: bool = True


# -- the arithmetic of torch's kernels ---------------------------------------------------------------------------------


def _fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """``a * b + c``, rounded once."""
    return torch.ops.prims.fma(a, b, c)


def _adam(
    p: Tensor,
    g: Tensor,
    states: Sequence[Tensor],
    numbers: Sequence[Tensor],
    *,
    amsgrad: bool,
    maximize: bool,
    decays: bool,
    is_light: bool,
    is_decoupled: bool = False,
) -> tuple[Tensor, ...]:
    m, v, *maximum = states
    decay, weight, beta2, weight2, correction, eps, rate = numbers
    if maximize:
        g = g * -1
    if decays and is_decoupled:
        p = p * decay
    elif decays:
        g = _fma(p, decay, g)
    m = _fma(weight, g - m, m) if is_light else _fma(weight - 1, g - m, g)
    v = _fma(weight2 * g, g, v * beta2)
    new = (m, v, torch.maximum(maximum[0], v)) if amsgrad else (m, v)
    return p + rate * m / (new[-1].sqrt() / correction + eps), *new


def _adam_numbers(options: Options, step: int) -> list[float]:
    beta1, beta2 = options["beta1"], options["beta2"]
    return [
        float(options["weight_decay"]),
        1 - beta1,
        beta2,
        1 - beta2,
        math.sqrt(1 - beta2**step),
        options["eps"],
        -(float(options["lr"]) / (1 - beta1**step)),
    ]


def _adamw_numbers(options: Options, step: int) -> list[float]:
    return [1 - float(options["lr"]) * options["weight_decay"], *_adam_numbers(options, step)[1:]]


def _adam_facts(options: Options) -> dict[str, bool]:
    return {
        "amsgrad": options["amsgrad"],
        "maximize": options["maximize"],
        "decays": options["weight_decay"] != 0,
        "is_light": 1 - options["beta1"] < 0.5,
    }


def _sgd(
    p: Tensor,
    g: Tensor,
    states: Sequence[Tensor],
    numbers: Sequence[Tensor],
    *,
    maximize: bool,
    decays: bool,
    nesterov: bool,
) -> tuple[Tensor, ...]:
    decay, momentum, weight, rate = numbers
    if maximize:
        g = g * -1
    if decays:
        g = _fma(p, decay, g)
    m = _fma(g, weight, states[0] * momentum)
    return _fma(_fma(m, momentum, g) if nesterov else m, rate, p), m


def _sgd_numbers(options: Options, step: int) -> list[float]:
    return [options["weight_decay"], options["momentum"], 1 - options["dampening"], -float(options["lr"])]


def _sgd_facts(options: Options) -> dict[str, bool]:
    return {name: options[name] for name in ("maximize", "nesterov")} | {"decays": options["weight_decay"] != 0}


def _adagrad(
    p: Tensor, g: Tensor, states: Sequence[Tensor], numbers: Sequence[Tensor], *, maximize: bool, decays: bool
) -> tuple[Tensor, ...]:
    decay, eps, rate = numbers
    if maximize:
        g = g * -1
    if decays:
        g = _fma(p, decay, g)
    total = _fma(g, g, states[0])
    return p - rate * g / (total.sqrt() + eps), total


def _adagrad_numbers(options: Options, step: int) -> list[float]:
    rate = float(options["lr"]) / (1 + (step - 1) * options["lr_decay"])
    return [options["weight_decay"], options["eps"], rate]


def _adagrad_facts(options: Options) -> dict[str, bool]:
    return {"maximize": options["maximize"], "decays": options["weight_decay"] != 0}


_ADAM_STATES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")

#: The kernels by their names in `torch`.
FUSED = {
    "_fused_adam_": FusedStep(_ADAM_STATES, _adam, _adam_numbers, _adam_facts),
    "_fused_adamw_": FusedStep(
        _ADAM_STATES, _adam, _adamw_numbers, lambda options: {**_adam_facts(options), "is_decoupled": True}
    ),
    "_fused_adagrad_": FusedStep(("sum",), _adagrad, _adagrad_numbers, _adagrad_facts),
    "_fused_sgd_": FusedStep(("momentum_buffer",), _sgd, _sgd_numbers, _sgd_facts, counts=False),
}


# -- compiled steps ----------------------------------------------------------------------------------------------------

#: Options of all kernels, to compare a compiled step with torch's kernel.
_EXAMPLE = {
    "lr": 0.01,
    "beta1": 0.9,
    "beta2": 0.97,
    "weight_decay": 0.03,
    "eps": 1e-8,
    "momentum": 0.9,
    "dampening": 0.1,
    "lr_decay": 0.1,
}


Group = tuple[Tensor, ...]


def _step_batch(
    groups: Sequence[Group], numbers: Tensor, keys: Tensor | None, update: Any, facts: Any, casts: Any
) -> None:
    """Steps of some tensors.

    ``casts`` holds for each state whether its rounding is stochastic, and the arguments of its cast (None for a state
    that is left unrounded).
    """
    for i, (p, g, *states) in enumerate(groups):
        new_p, *new = update(p, g, states, numbers[i].unbind(), **dict(facts))
        p.copy_(new_p)
        for j, (state, value, (is_drawn, arguments)) in enumerate(zip(states, new, casts, strict=True)):
            write(state, value, keys[i, j] if keys is not None and is_drawn else None, arguments)


@cache
def _compiled_step(
    name: str, facts: tuple[tuple[str, bool], ...], casts: tuple[Cast | None, ...], dtype: torch.dtype
) -> Callable[..., None] | None:
    """The compiled step of a kernel, or None if its bits are not those of torch's kernel on this machine.

    The function takes pairs of a group (the parameter, the gradient and the states, of shape (vectors, `_VECTOR`)), its
    numbers, and its keys of shape (states, 2).
    """
    import torch._inductor.inductor_prims  # defines the operator of `_fma`

    if not hasattr(torch.ops.prims, "fma"):
        return None
    step = FUSED[name]
    arguments = tuple((False, None) if cast is None else (cast.is_stochastic, cast.arguments) for cast in casts)
    is_drawn = any(drawn for drawn, _ in arguments)
    compiled = compile_alone(_step_batch, "_".join((name.strip("_"), *map(str, casts))))
    count = len(step.numbers(_EXAMPLE, 1))

    def run_batch(groups: Sequence[Group], numbers: Sequence[Tensor], keys: Sequence[Tensor]) -> None:
        compiled(
            groups,
            torch.stack(list(numbers)),
            torch.stack(list(keys)) if is_drawn else None,
            step.update,
            facts,
            arguments,
        )

    def example(length: int) -> tuple[Group, Tensor, Tensor]:
        tensors = tuple(torch.zeros(length, _VECTOR, dtype=dtype) for _ in range(2 + len(casts)))
        for tensor in tensors:
            torch._dynamo.mark_static(tensor, 1)  # so no elements remain after the vectors
        return tensors, torch.ones(count, dtype=dtype), torch.zeros(len(casts), 2, dtype=torch.int32)

    run = in_batches(run_batch, example, _BATCH)
    return run if _agrees(run, name, dict(facts), casts, dtype) else None


def _agrees(
    run: Callable[..., None], name: str, facts: Options, casts: tuple[Cast | None, ...], dtype: torch.dtype
) -> bool:
    """Whether a compiled step has the bits of torch's kernel, followed by rounding, for numbers of all magnitudes.

    Parameters are not rounded, and where they are small, each bit of the other results shows in them.
    """
    step, generator, length, count = FUSED[name], torch.Generator().manual_seed(0), 4096, 3
    options = {**_EXAMPLE, "weight_decay": _EXAMPLE["weight_decay"] * facts["decays"]}
    options |= {} if facts.get("is_light", True) else {"beta1": 0.3}
    options |= {"dampening": 0.0} if facts.get("nesterov") else {}
    p, g, *states = torch.randn(2 + len(casts), length, generator=generator, dtype=dtype)
    p = p * 10 ** (-8 * torch.rand(length, generator=generator, dtype=dtype))
    states = [state if name == "exp_avg" else state.abs() for state, name in zip(states, step.states, strict=False)]
    ours, theirs = ([x.clone() for x in (p, g, *states)] for _ in range(2))

    lists: list[list[Tensor]] = [[x] for x in theirs] + [[] for _ in range(len(step.states) - len(casts))]
    names = {argument.name for argument in getattr(torch.ops.aten, name).default._schema.arguments}
    given = {key: value for key, value in {**options, **facts, "is_first_step": False}.items() if key in names}
    getattr(torch, name)(*lists, *([[torch.tensor(float(count))]] if step.counts else []), **given)
    keys = torch.arange(2 * len(casts), dtype=torch.int32).view(-1, 2)
    for state, cast, key in zip(theirs[2:], casts, keys, strict=True):
        if cast is not None:
            write(state, state, key if cast.is_stochastic else None, cast.arguments)
    run([(tuple(x.view(-1, _VECTOR) for x in ours), _as_tensor(step.numbers(options, count), dtype), keys)])
    as_integer = torch.int32 if dtype == torch.float32 else torch.int64
    return all(torch.equal(a.view(as_integer), b.view(as_integer)) for a, b in zip(ours, theirs, strict=True))


# -- taking the place of torch's kernels -------------------------------------------------------------------------------


def step_and_round(
    name: str,
    lists: Sequence[Sequence[Tensor]],
    options: Options,
    casts: Mapping[str, Cast],
    key_of: Callable[[Tensor, str], Tensor | None],
    compiled: bool | None,
) -> list[int]:
    """Take the step of a fused kernel of torch, with states rounded, for the tensors for which this can be compiled.

    Args:
        name: the name of the kernel, a key of `FUSED`.
        lists, options: the kernel's arguments.
        casts: the casts of the states by name.
        key_of: the key of the random numbers for a parameter and the name of its state.
        compiled: as in `fpsim.round_optimizer`.

    Returns:
        The positions in ``lists`` of the tensors whose step was taken. The others are left to torch's kernel.
    """
    step = FUSED[name]
    names = [name for name, each in zip(step.states, lists[2:], strict=False) if each]
    rounded = sum(p.numel() for p in lists[0]) * sum(name in casts for name in names)
    if compiled is False or (compiled is None and rounded < COMPILE_FROM) or not rounded:
        return []
    if any(casts[name].has_axis for name in names if name in casts):
        return []  # the compiled step sees vectors, and not the axes along which scales lie
    if options["grad_scale"] is not None or options["found_inf"] is not None or options.get("is_first_step"):
        return []
    groups = list(zip(*lists[: 2 + len(names)], strict=True))
    taken = [i for i, group in enumerate(groups) if _is_plain(group)]
    dtypes = {groups[i][0].dtype for i in taken}
    if len(dtypes) != 1:
        return []
    facts = tuple(sorted(step.facts(options).items()))
    run = _compiled_step(name, facts, tuple(casts.get(name) for name in names), *dtypes)
    if run is None:
        return []

    counts = [int(lists[-1][i]) if step.counts else 1 for i in taken]
    numbers = {count: _as_tensor(step.numbers(options, count), *dtypes) for count in set(counts)}
    no_key = torch.zeros(2, dtype=torch.int32)
    items = []
    for i, count in zip(taken, counts, strict=True):
        keys = [key_of(groups[i][0], name) if name in casts else None for name in names]
        draws = torch.stack([no_key if key is None else key for key in keys])
        items.append((tuple(x.detach().view(-1, _VECTOR) for x in groups[i]), numbers[count], draws))
    run(items)
    return taken


def _as_tensor(numbers: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Numbers computed in float64, rounded to ``dtype``."""
    return torch.tensor(numbers, dtype=torch.float64).to(dtype)


def _is_plain(group: Sequence[Tensor]) -> bool:
    """Whether the tensors are large, have one dtype, and lie element by element in the CPU's memory."""
    size, dtype = group[0].numel(), group[0].dtype
    fits = size >= _LARGE and size % _VECTOR == 0 and dtype in (torch.float32, torch.float64)
    return fits and all(
        type(x) in (Tensor, torch.nn.Parameter)
        and (x.numel(), x.dtype, x.device.type, x.layout) == (size, dtype, "cpu", torch.strided)
        and x.is_contiguous()
        for x in group
    )


class _FusedKernels(TorchFunctionMode):
    """Hand the calls of torch's fused kernels to a function of the kernel's name, its lists and its options.

    The function returns the positions of the tensors whose step it took. The kernel gets the others.
    """

    def __init__(self, take: Callable[[str, Sequence[Sequence[Tensor]], Options], list[int]]) -> None:
        super().__init__()
        self.take = take

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in FUSED:
            with torch._C.DisableTorchFunction():  # the compiled code is no business of the user's modes
                taken = set(self.take(func.__name__, args, kwargs))
            args = [[x for i, x in enumerate(each) if i not in taken] for each in args]
            if not args[0]:
                return None
        return func(*args, **kwargs)


@dataclass(frozen=True)
class Interception:
    """The step of an optimizer whose fused kernels another function may take over."""

    optimizer: Optimizer
    before: Any
    active: list[bool]

    def remove(self) -> None:
        self.active.clear()
        if self.optimizer.__dict__.get("step") is self.before[0]:
            del self.optimizer.step
            self.optimizer.__dict__.update(self.before[1])


def intercept(
    optimizer: Optimizer, take: Callable[[str, Sequence[Sequence[Tensor]], Options], list[int]]
) -> Interception:
    """Let ``take`` see each call of a fused kernel in ``optimizer.step()``, until the result's ``remove()``."""
    own, kernels, active = optimizer.step, _FusedKernels(take), [True]

    @functools.wraps(getattr(own, "__func__", own))
    def step(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        # A closure runs the user's code, and a scaler's argument may skip the step.
        if not active or args or kwargs or torch.compiler.is_compiling():
            return own(*args, **kwargs)
        with kernels:
            return own()

    before = {"step": own} if "step" in vars(optimizer) else {}
    method = MethodType(step, optimizer)
    optimizer.step = method  # type: ignore[method-assign]
    return Interception(optimizer, (method, before), active)
