"""Inductor's Triton code for GPUs, generated, compiled to PTX and interpreted on a machine without a GPU.

    python tests/compile_backend/inductor_triton.py generate FOLDER
    TRITON_INTERPRET=1 python tests/compile_backend/inductor_triton.py interpret FOLDER

The first command pretends that there is an H100, lets Inductor generate code for it, and checks the PTX that Triton
compiles. The second command runs the same code in Triton's interpreter, and checks its numbers.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch._inductor import config as inductor_config
from torch._inductor.debug import DebugContext
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.select_algorithm import AlgorithmSelectorCache
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._triton import has_triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import fpsim
import fpsim.rounding.inductor
from fpsim.formats import full_rounding, parse_format, resolve_overflow
from fpsim.rounding.ops import SOURCE, random_key_op, round_op, round_stochastic_op

COUNT = 5000
ROUNDINGS = ("nearest_even", "nearest_away", "toward_zero", "up", "down", "to_odd", "stochastic")
CASES = [
    *(("e4m3fn", rounding, None, "float32") for rounding in ROUNDINGS),
    ("e4m3fn", "up", "ovf_inf", "float32"),
    *(
        ("e5m2", rounding, None, dtype)
        for dtype in ("float32", "bfloat16")
        for rounding in ("nearest_even", "stochastic")
    ),
    *(("e8m0fnu", rounding, None, "float32") for rounding in ("nearest_even", "down")),
]
#: The formats of the operands and of the result of a matrix product, and the carrier. Triton's interpreter (3.7)
#: truncates to bfloat16, so that float16 stands for the dtypes in which a sum has more bits than a result.
TEMPLATES = [("e4m3fn", "e5m2", "float32"), ("e4m3fn", "e5m2", "float16")]
ROWS, INNER, COLUMNS = 96, 64, 80

HEADER = """\
import triton
import triton.language as tl
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.triton_helpers import libdevice, math as tl_math


"""


def rounded(case: tuple[str, ...]) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """A product, rounded, and a sum, which a compiler might contract to a fused multiply-add."""
    format, rounding, overflow, _ = case
    fmt = parse_format(format)
    arguments = (fmt.name, full_rounding(rounding), resolve_overflow(fmt, overflow), SOURCE)
    if rounding == "stochastic":
        return lambda a, b, c, key: round_stochastic_op(a * b, key, *arguments) + c
    return lambda a, b, c, key: round_op(a * b, *arguments) + c


def inputs(case: tuple[str, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator, dtype = torch.Generator().manual_seed(0), getattr(torch, case[3])
    a, b, c = (torch.randn(COUNT, generator=generator, dtype=dtype) for _ in range(3))
    a = a * 2.0 ** torch.randint(-20, 20, [COUNT], generator=generator).to(dtype)
    a[:8] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45, -1e-45, 3e38], dtype=dtype)
    if dtype == torch.bfloat16:  # to which Triton's interpreter (3.7) truncates: no number may need it
        b, c = torch.ones_like(b), torch.zeros_like(c)
    return a, b, c, random_key_op(torch.tensor(5), 0)


def product(template: tuple[str, ...]) -> Callable[[Tensor, Tensor], Tensor]:
    """A matrix product whose operands and result are rounded."""
    operand, result = (
        (fmt.name, "nearest_even", resolve_overflow(fmt, None), SOURCE) for fmt in map(parse_format, template[:2])
    )
    return lambda a, b: round_op(round_op(a, *operand) @ round_op(b, *operand), *result)


def operands(template: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """Integers whose products are exact, added in any order, in the sums but not in the results."""
    generator, dtype = torch.Generator().manual_seed(0), getattr(torch, template[2])
    shapes = ((ROWS, INNER), (INNER, COLUMNS))
    a, b = (torch.randint(-30, 31, shape, generator=generator).to(dtype) for shape in shapes)
    return a, b


# -- generating --------------------------------------------------------------------------------------------------------


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """Pretend that there is an H100, in all that Inductor asks for while it generates code."""
    numbers: dict[str, Any] = {
        "multi_processor_count": 132,
        "major": 9,
        "regs_per_multiprocessor": 65536,
        "max_threads_per_multi_processor": 2048,
        "max_threads_per_block": 1024,
        "warp_size": 32,
    }
    described = {"name": "NVIDIA H100", "total_memory": 80 << 30, "minor": 0}
    properties = DeviceProperties(type="cuda", index=0, cc=90, **numbers)
    triton.runtime.driver.set_active(
        SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0)
    )
    replaced: list[tuple[Any, str, Any]] = [
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "device_count", lambda: 1),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "get_device_capability", lambda *_: (9, 0)),
        (torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(**described, **numbers)),
        (DeviceProperties, "create", lambda _: properties),
    ]
    with ExitStack() as stack:
        for owner, name, value in replaced:
            stack.enter_context(mock.patch.object(owner, name, value))
        has_triton.cache_clear()
        yield


def generated_code(function: Callable[..., Tensor], arguments: Sequence[Tensor]) -> str:
    """The code that Inductor generates with the settings of fpsim's backend."""
    with FakeTensorMode() as fake, pretended_gpu():
        tensors = [torch.empty_like(x, device="cuda") for x in map(fake.from_tensor, arguments)]
        module = make_fx(function)(*tensors)
        graph = GraphLowering(module, example_inputs=tensors)
        with (
            V.set_debug_handler(DebugContext()),
            V.set_graph_handler(graph),
            inductor_config.patch(emulate_precision_casts=True),
        ):
            graph.run(*tensors)
            return str(graph.codegen()[0].value)


@contextmanager
def autotuned() -> Iterator[None]:
    """Pretend that the first Triton template is the fastest matrix product in Inductor's measurements."""
    settings = {"max_autotune": True, "max_autotune_gemm_backends": "TRITON", "benchmark_epilogue_fusion": False}
    replaced: list[tuple[Any, str, Any]] = [
        (AlgorithmSelectorCache, "benchmark", lambda _, choices, *__, **___: {c: i for i, c in enumerate(choices)}),
        (AlgorithmSelectorCache, "make_precompile_fn", lambda *_, **__: lambda: None),
        (AlgorithmSelectorCache, "log_results", lambda *_, **__: None),
        (torch.version, "cuda", "12.8"),
    ]
    with ExitStack() as stack:
        for owner, name, value in replaced:
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(inductor_config.patch(settings))
        yield


def generate(folder: Path) -> None:
    """Write the code of each case to a file, and check the PTX that Triton compiles."""
    for i, case in enumerate(CASES):
        code = generated_code(rounded(case), inputs(case))
        (folder / f"case_{i}.txt").write_text(code)
        (compiled,) = compiled_kernels(code, folder)
        # The product and the sum, nothing else; with .rn written out, the assembler may not contract them either.
        assert floating(compiled) == {"mul.rn.f32", "add.rn.f32"}, (case, floating(compiled))
    for i, template in enumerate(TEMPLATES):
        with autotuned():
            code = generated_code(product(template), operands(template))
        (folder / f"template_{i}.txt").write_text(code)
        *before, last = compiled_kernels(code, folder)
        assert "extern_kernels." not in code and "tl.dot(" in kernels_of(code)[-1][1], "no template"
        # Operands are rounded in the template, or by kernels before it; the result is always rounded in it.
        assert len(before) == (0 if template[2] == "float32" else 2), (template, len(before))
        assert not set().union(*map(floating, before)), template
        assert floating(last) <= {"fma.rn.f32", "add.rn.f32", "mul.rn.f32"}, (template, floating(last))


def kernels_of(code: str) -> list[tuple[str, str]]:
    """The names and sources of the kernels in generated code."""
    assert not re.search(r"torch\.ops\.fpsim\.round", re.sub(r"^\s*#.*$", "", code, flags=re.MULTILINE)), "not fused"
    return re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)'''", code, re.DOTALL)


def load(name: str, source: str, folder: Path) -> Any:
    """The kernel with this source, which Triton reads from a file."""
    path = folder / f"{name}_{hashlib.sha256(source.encode()).hexdigest()[:8]}.py"
    path.write_text(HEADER + source[source.index("@triton.jit") :])
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def compiled_kernels(code: str, folder: Path) -> list[str]:
    """The PTX of each kernel, checked for instructions that Triton has miscompiled: 8-bit numbers, minima of NaNs."""
    made = []
    for name, source in kernels_of(code):
        (signature,) = re.findall(r"'signature': (\{.*?\})", source)
        options = {"enable_fp_fusion": "'enable_fp_fusion': False" not in source}
        constexprs = {} if name.startswith("triton_tem") else {"XBLOCK": 256}
        kernel = ASTSource(load(name, source, folder), ast.literal_eval(signature), constexprs=constexprs)
        ptx = str(triton.compile(kernel, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"])
        assert not re.search(r"\.ftz|e4m3|e5m2|\b(min|max)\S*\.NaN|\bst\.global\S*b8\b", ptx), name
        made.append(ptx)
    return made


def floating(ptx: str) -> set[str]:
    """The scalar floating-point operations in PTX."""
    return set(re.findall(r"\b((?:add|sub|mul|fma|mad|div|min|max)\.(?:\w+\.)*b?f(?:16x2|16|32))\b", ptx))


# -- interpreting ------------------------------------------------------------------------------------------------------


def interpret(folder: Path) -> None:
    """Run the generated code of each case on its inputs, and compare the bits with those expected."""
    for i, case in enumerate(CASES):
        got = run((folder / f"case_{i}.txt").read_text(), inputs(case), folder)
        assert_same_bits(got, rounded(case)(*inputs(case)), case)
    for i, template in enumerate(TEMPLATES):
        got = run((folder / f"template_{i}.txt").read_text(), operands(template), folder)
        a, b = (fpsim.round(x.double(), template[0]) for x in operands(template))
        assert not torch.equal(a, operands(template)[0].double()), "rounding the operands would not show"
        result = (a @ b).to(got.dtype)
        if got.dtype != torch.float32:
            wide = fpsim.round(a @ b, template[1])
            assert not torch.equal(wide, fpsim.round(result, template[1]).double()), "a wide sum would not show"
        assert_same_bits(got, fpsim.round(result, template[1]), template)


def assert_same_bits(got: Tensor, want: Tensor, what: object) -> None:
    integer = torch.int32 if want.dtype == torch.float32 else torch.int16
    differ = (got.view(integer) != want.view(integer)) & ~(got.isnan() & want.isnan())
    assert not differ.any(), (what, int(differ.sum()), got[differ][:3], want[differ][:3])


def run(code: str, arguments: Sequence[Tensor], folder: Path) -> Tensor:
    """The results of the function `call` of generated code, with its kernels interpreted."""
    block = 1 << 13
    kernels = {name: load(name, source, folder) for name, source in kernels_of(code)}
    (body,) = re.findall(r"def call\(self, args\):\n(.*?return .*?)\n", code, re.DOTALL)
    (names,) = re.findall(r"^ +(.+) = args$", body, re.MULTILINE)
    tensors: dict[str, Tensor] = dict(zip(names.rstrip(",").split(", "), arguments, strict=True))
    for line in map(str.strip, body.splitlines()):
        if made := re.fullmatch(r"(\w+) = empty_strided_cuda\((.*)\)", line):
            size, stride, dtype = eval(made[2])
            tensors[made[1]] = torch.empty_strided(size, stride, dtype=dtype)
        elif again := re.match(r"(\w+) = (\w+); del \2", line):
            tensors[again[1]] = tensors[again[2]]
        elif launch := re.match(r"(\w+)\.run\((.*), stream=", line):
            given = [tensors[name] if name in tensors else int(name) for name in launch[2].split(", ")]
            if launch[1].startswith("triton_tem"):
                kernels[launch[1]][tuple(given[-3:])](*given[:-3])
            else:
                kernels[launch[1]][(-(-given[-1] // block),)](*given, XBLOCK=block)
    (result,) = re.findall(r"return \((\w+), \)", body)
    return tensors[result]


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"generate": generate, "interpret": interpret}[sys.argv[1]](Path(sys.argv[2]))
    print(f"{len(CASES)} kernels and {len(TEMPLATES)} templates as they should be")
