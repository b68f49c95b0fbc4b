"""Compiled rounding gives the bits of eager calls, which other tests judge, and its code has no opaque call."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

import fpsim
from fpsim.formats import NAMED_FORMATS, ROUNDINGS, parse_format, resolve_overflow
from tests.shared.formats import overflows
from tests.shared.judge import (
    CARRIERS,
    Inputs,
    assert_result,
    assert_same_bits,
    interesting,
    random_inputs,
    specials,
    suits,
)

Mode = tuple[str, str, str | None]  # format, rounding, overflow


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def rounds(modes: list[Mode]) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """A function that rounds its argument in each of the modes."""

    def function(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(fpsim.round(x, name, rounding=rounding, overflow=overflow) for name, rounding, overflow in modes)  # type: ignore[arg-type]

    return function


def inputs_for(modes: list[Mode], dtype: torch.dtype, count: int = 1500) -> Tensor:
    """Specials, NaNs, and numbers near the formats' boundaries; an odd count, so that the last vector is not full."""
    if dtype.itemsize == 2:
        return Inputs(np.arange(1 << 16), dtype).tensor[:-1]
    inputs = specials(dtype)
    for fmt in {parse_format(name) for name, _, _ in modes}:
        inputs |= interesting.__wrapped__(fmt, dtype).sample(count) | random_inputs(fmt, dtype, count // 4)
    return inputs.tensor[: len(inputs) - 1 + len(inputs) % 2]


def assert_compiles(modes: list[Mode], x: Tensor, **options) -> None:
    compiled = torch.compile(rounds(modes), fullgraph=True, **options)
    for mode, got, want in zip(modes, compiled(x), rounds(modes)(x), strict=True):
        assert_same_bits(got, want, x, mode)


FLOAT32: dict[str, list[Mode]] = {
    "signed, with subnormals": [
        ("e4m3fn", "nearest_even", None),
        ("e4m3fn", "nearest_away", "ovf_inf"),
        ("e4m3fn", "to_odd", "sat_propagate"),
        ("e5m2", "nearest_even", None),
        ("e5m2", "toward_zero", None),
        ("e5m2", "up", None),
        ("e5m2", "down", "sat_propagate"),
        ("e4m3fnuz", "nearest_even", "ovf_inf"),
        ("e4m3fnuz", "down", None),
        ("e2m1fn", "nearest_even", None),
        ("e3m2fn", "to_odd", None),
        ("fp16", "nearest_away", None),
    ],
    "exponents of float32": [
        ("bf16", "nearest_even", None),
        ("bf16", "up", None),
        ("bf16", "down", "sat_finite"),
        ("tf32", "nearest_away", None),
        ("tf32", "to_odd", "sat_propagate"),
        ("e8m3", "toward_zero", None),
        ("e8m22", "nearest_even", None),
        ("fp32", "nearest_even", None),
        ("fp32", "up", None),
        ("fp32", "to_odd", None),
        ("e8m0", "nearest_even", None),
    ],
    "values that are subnormal in float32": [
        *(("e5m2:bias=130", rounding, None) for rounding in ROUNDINGS),
        ("e5m2:bias=140", "nearest_even", "sat_propagate"),
        ("e4m3fn:bias=126", "up", "ovf_inf"),
        ("e4m3:bias=129:nosubnormals", "nearest_even", None),
        ("e4m3:bias=127:nosubnormals", "down", None),
    ],
    "no zero, no sign, no subnormals, no mantissa": [
        *(("e8m0fnu", rounding, "ovf_inf") for rounding in ("nearest_even", "up", "down")),
        ("e8m0fnu", "nearest_away", None),
        ("e8m0fnu", "to_odd", "sat_propagate"),
        ("e4m3fn:nosubnormals:unsigned:nozero", "nearest_even", None),
        ("e5m0:unsigned", "nearest_even", None),
        ("e4m3:unsigned", "nearest_even", "ovf_inf"),
        ("e4m3:unsigned", "to_odd", "sat_propagate"),
        ("e4m3finite:unsigned", "up", None),
        ("e4m3:nosubnormals", "nearest_even", None),
        ("e4m3:nosubnormals", "up", None),
        ("e5m0", "nearest_even", None),
        ("e5m0", "to_odd", None),
        ("e5m0", "up", None),
    ],
}


@pytest.mark.parametrize("group", FLOAT32)
def test_float32(group):
    assert_compiles(FLOAT32[group], inputs_for(FLOAT32[group], torch.float32))


FLOAT64: list[Mode] = [
    ("e4m3fn", "nearest_even", None),
    ("e5m2", "up", None),
    ("e2m1fn", "to_odd", None),
    ("fp32", "nearest_even", None),
    ("fp32", "down", "sat_propagate"),
    ("bf16", "nearest_away", None),
    ("e8m0fnu", "nearest_even", "ovf_inf"),
    ("e11m20", "nearest_even", None),
    ("e11m52", "toward_zero", None),
    ("e11m51:nosubnormals", "to_odd", None),
    ("e5m2:bias=1040", "nearest_even", None),
    ("e4m3fnuz", "up", "ovf_inf"),
]
BFLOAT16: list[Mode] = [
    ("e4m3fn", "nearest_even", None),
    ("e5m2", "up", None),
    ("e8m0fnu", "nearest_away", "ovf_inf"),
    ("bf16", "nearest_even", None),
    ("e8m3", "to_odd", "sat_propagate"),
    ("e5m2:bias=130", "down", None),
    ("e2m1fn", "toward_zero", None),
]
FLOAT16: list[Mode] = [
    ("e4m3fn", "nearest_even", None),
    ("e5m2", "down", None),
    ("fp16", "nearest_even", None),
    ("e5m9", "to_odd", None),
    ("e4m3fnuz", "nearest_away", "ovf_inf"),
    ("e2m1fn", "up", None),
]


@pytest.mark.parametrize(
    ("dtype", "modes"),
    [(torch.float64, FLOAT64), (torch.bfloat16, BFLOAT16), (torch.float16, FLOAT16)],
    ids=["float64", "bfloat16", "float16"],
)
def test_other_carriers(dtype, modes):
    assert_compiles(modes, inputs_for(modes, dtype))


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", CARRIERS, ids=str)
@pytest.mark.parametrize("name", NAMED_FORMATS)
def test_every_mode_of_every_named_format(name, dtype):
    fmt = parse_format(name)
    if not suits(fmt, dtype):
        pytest.skip("no subset of the dtype")
    modes: list[Mode] = [(name, r, o) for r, o in itertools.product(ROUNDINGS, overflows(fmt))]
    x = inputs_for(modes, dtype, 100_000)
    for i in range(0, len(modes), 9):
        assert_compiles(modes[i : i + 9], x)


# -- shapes --------------------------------------------------------------------------------------------------------


def test_any_size_from_one_compilation():
    """With dynamic shapes, the vector loop, its tail and tensors shorter than a vector need no second compilation."""
    modes: list[Mode] = [("e4m3fn", "nearest_even", None), ("e5m0", "up", None), ("bf16", "to_odd", None)]
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    function = torch.compile(rounds(modes), fullgraph=True, dynamic=True, backend=counter)
    all_inputs = inputs_for(modes, torch.float32)
    generator = torch.Generator().manual_seed(0)
    for size in (4099, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 1000):
        x = all_inputs[torch.randperm(len(all_inputs), generator=generator)[:size]]
        for (name, rounding, overflow), got in zip(modes, function(x), strict=True):
            assert_result(got, x, name, rounding, overflow)
    assert counter.frame_count == 1


def test_any_layout():
    def function(x: Tensor, y: Tensor, z: Tensor, empty: Tensor, column: Tensor, wide: Tensor) -> tuple[Tensor, ...]:
        return tuple(fpsim.round(t, "e4m3fn", rounding="up") for t in (x, y, z, empty, column, wide))

    base = torch.randn(7, 9) * 20
    layouts = (base, base.T, base[1, 2], base[:0], base[:, 3], base[:, :1].expand(7, 5))
    for x, got in zip(layouts, torch.compile(function, fullgraph=True)(*layouts), strict=True):
        assert_result(got, x, "e4m3fn", "up")


@pytest.mark.parametrize("name", ["e5m0", "e4m3fn", "bf16"])
def test_nans_and_infinities_where_there_are_no_vectors(name):
    """Compiled scalars are C++ integers, whose overflow is undefined: g++ 12 once turned NaN into a number."""
    modes: list[Mode] = [
        (name, rounding, overflows(parse_format(name))[0]) for rounding in ("nearest_even", "up", "to_odd")
    ]
    x = Inputs([0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0xFFC00000, 0xFFFFFFFF], torch.float32).tensor

    def function(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(result for one in x.unbind() for result in rounds(modes)(one))

    results = torch.compile(function, fullgraph=True)(x)
    for got, (one, mode) in zip(results, itertools.product(x.unbind(), modes), strict=True):
        assert_result(got, one, *mode)


# -- fusion with what comes before and after -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_operands_have_the_precision_of_their_dtype(dtype):
    """Inductor keeps 16-bit intermediates in float32, where a product would be rounded once instead of twice."""
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randn(1 << 14, generator=generator).to(dtype) for _ in range(2))

    def function(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return fpsim.round(x * y, "e4m3fn"), fpsim.round(x * y, "e4m3fn", rounding="up") * y, fpsim.round(x + y, "e5m2")

    for got, want in zip(torch.compile(function, fullgraph=True)(x, y), function(x, y), strict=True):
        assert_same_bits(got, want, x)
    once = fpsim.round(x.float() * y.float(), "e4m3fn").to(dtype)
    assert not torch.equal(once, function(x, y)[0]), "the inputs tell the two apart"


def test_rounding_between_operations_survives():
    """The compiler does not remove it, and contracts no operations across it."""

    def function(x: Tensor, y: Tensor) -> Tensor:
        product = fpsim.round(x * y, "bf16")
        total = fpsim.round(product + x, "bf16")
        return fpsim.round(total, "bf16") - product

    x, y = torch.randn(5003), torch.randn(5003)
    assert_same_bits(torch.compile(function, fullgraph=True)(x, y), function(x, y), x)


def test_the_generated_code_has_no_opaque_call():
    def function(x: Tensor, y: Tensor) -> Tensor:
        return fpsim.round(fpsim.round(x * y, "e4m3fn").relu(), "e5m2", rounding="up") + y

    x, y = torch.randn(1000), torch.randn(1000)
    got, codes = run_and_get_code(torch.compile(function, fullgraph=True), x, y)
    assert_same_bits(got, function(x, y), x)
    code = "\n".join(line for line in "\n".join(codes).splitlines() if not line.lstrip().startswith(("#", "//")))
    assert "async_compile" in code, "this is the generated code"
    assert "torch.ops.fpsim" not in code and "fpsim.round" not in code
    assert "float8" not in code.lower(), "no cast of torch to 8 bits takes part"
    assert code.count("async_compile.cpp_pybinding") == 1, "all of it is one kernel"


def test_the_format_may_be_an_object_and_the_modes_arguments():
    fmt = parse_format("e5m2:bias=10")

    def function(x: Tensor, rounding: str) -> Tensor:
        return fpsim.round(x, fmt, rounding=rounding)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    x = torch.randn(100)
    for rounding in ("up", "down"):
        assert_result(compiled(x, rounding), x, "e5m2:bias=10", rounding)


def test_a_module_rounds_its_weights():
    class Rounded(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return fpsim.round(
                torch.nn.functional.linear(fpsim.round(x, "e4m3fn"), fpsim.round(self.weight, "e4m3fn")), "bf16"
            )

    layer, x = Rounded(8, 8, bias=False), torch.randn(4, 8)
    eager = layer(x)
    assert_same_bits(torch.compile(layer, fullgraph=True)(x), eager)


def test_export_keeps_the_operator():
    class Rounding(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return fpsim.round(x, "e4m3fn")

    x = torch.randn(7)
    program = torch.export.export(Rounding(), (x,))
    assert any("fpsim.round" in str(node.target) for node in program.graph.nodes)
    assert_result(program.module()(x), x, "e4m3fn")


# -- the operator --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", CARRIERS, ids=str)
def test_the_operator_is_well_formed(dtype):
    for x in (torch.randn(5, 3).to(dtype), torch.randn(6, 4).to(dtype).T[1:], torch.randn(()).to(dtype)):
        torch.library.opcheck(torch.ops.fpsim.round.default, (x, "e4m3fn", "nearest_even", "sat_finite"))


@pytest.mark.parametrize("wrong", ["format", "rounding", "carrier"])
def test_errors_are_raised_while_compiling(wrong):
    name, rounding = {"format": ("e4m3nf", "up"), "rounding": ("e4m3fn", "upp"), "carrier": ("fp64", "up")}[wrong]
    messages = {"format": "unknown format 'e4m3nf'", "rounding": "unknown rounding 'upp'", "carrier": "torch.float64"}
    compiled = torch.compile(lambda x: fpsim.round(x, name, rounding=rounding), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=messages[wrong]):
        compiled(torch.ones(3))


def test_the_overflow_mode_in_the_graph_is_the_resolved_one():
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch.compile(lambda x: fpsim.round(x, "e5m2", gradient="zero"), fullgraph=True, backend=backend)(torch.ones(2))
    (call,) = [node for node in graphs[0].graph.nodes if "fpsim" in str(node.target)]
    assert call.args[1:4] == ("e5m2", "nearest_even", resolve_overflow(parse_format("e5m2"), None))


@pytest.fixture
def subnormals_kept_after() -> Iterator[None]:
    """Code compiled with unsafe mathematics makes the processor flush subnormals; later tests must not inherit that."""
    yield
    torch.set_flush_denormal(False)


#: Options of Inductor's C++ compiler under which sums of floating-point numbers may be computed in another way.
FAST = {"cpp.enable_floating_point_contract_flag": "fast"}
UNSAFE = {"cpp.enable_unsafe_math_opt_flag": True}
#: To compile the headers once for all kernels takes as long as three kernels that read them.
HEADERS_READ = {"cpp_cache_precompile_headers": False}


@pytest.mark.usefixtures("subnormals_kept_after")
@pytest.mark.parametrize("flags", [FAST, UNSAFE, FAST | UNSAFE], ids=["contraction", "unsafe", "both"])
def test_contraction_and_unsafe_mathematics_change_nothing(flags: dict[str, Any]) -> None:
    names = ("e4m3fn", "e5m2", "e8m3")

    def function(x: Tensor) -> list[Tensor]:
        return [fpsim.round(x * 0.75, name) * 4 - fpsim.round(x, name) for name in names]

    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 8
    with torch._inductor.config.patch(flags | HEADERS_READ):
        got = torch.compile(function, fullgraph=True)(x)
    for name, result in zip(names, got, strict=True):
        assert torch.equal(result, fpsim.round(x * 0.75, name) * 4 - fpsim.round(x, name)), name


_BOTH_WIDTHS = """
import torch, fpsim
x = torch.cat([torch.randint(-(2**31), 2**31 - 1, (4099,)).int().view(torch.float32), torch.randn(77)])
tiny = x[x.isfinite()] * 2.0**-126  # its scale is as large as scales become
casts = [("e4m3fn", r, o) for r in ("nearest_even", "up", "to_odd") for o in ("ovf_inf", "sat_propagate")]
casts += [("e5m2", r, "ovf_inf") for r in ("nearest_even", "nearest_away", "toward_zero", "down")]
casts += [("e8m3", "nearest_away", "ovf_inf"), ("e5m0:unsigned", "up", "sat_propagate"), ("fp16", "to_odd", "ovf_inf")]

def rounded(x):
    plain = [fpsim.round(x, f, rounding=r, overflow=o) for f, r, o in casts]
    drawn = [fpsim.round(x, f, rounding=r, seed=3) for f in ("e4m3fn", "e8m3") for r in ("stochastic", "stochastic_c")]
    scaled = [fpsim.round(y, "e4m3fn", rounding=r, scale="power_of_two")
              for y in (x[-77:], tiny) for r in ("up", "nearest_even")]
    return [*plain, *drawn, *scaled, fpsim.round(x.double(), "e4m3fn"), fpsim.round(x.bfloat16(), "e5m2")]

compiled = torch.compile(rounded)
for number, (got, want) in enumerate(zip(compiled(x), rounded(x), strict=True)):
    assert torch.equal(got.nan_to_num(5e4).double(), want.nan_to_num(5e4).double()), number
    assert torch.equal(got.view(torch.uint8), want.view(torch.uint8)) or got.dtype == torch.bfloat16, number
torch.set_flush_denormal(True)
for number, (got, want) in enumerate(zip(compiled(x)[:-2], rounded(x), strict=False)):
    assert torch.equal(got.view(torch.uint8), want.view(torch.uint8)), number
print(torch.backends.cpu.get_cpu_capability())
"""


def test_code_for_either_vector_width_gives_the_bits_of_eager_code(tmp_path: Path) -> None:
    """Both processes share one cache. Inductor's own key does not tell their code apart."""
    widths = []
    for capability in ("avx2", None):
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        environment |= {"TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        environment.pop("ATEN_CPU_CAPABILITY", None)
        if capability is not None:
            environment["ATEN_CPU_CAPABILITY"] = capability
        run = subprocess.run([sys.executable, "-c", _BOTH_WIDTHS], env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        widths.append(run.stdout.split()[-1])
    assert widths[1] == torch.backends.cpu.get_cpu_capability()
