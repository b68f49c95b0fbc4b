"""The Triton code that Inductor generates for GPUs, made, compiled to PTX and interpreted on a machine without one.

    python tests/compile_backend/inductor_triton.py generate FOLDER
    TRITON_INTERPRET=1 python tests/compile_backend/inductor_triton.py interpret FOLDER

The first pretends that there is an H100, lets Inductor generate code for functions of tensors on it, and checks what
Triton compiles of it. The second runs the same code in Triton's interpreter, and checks its numbers.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterator
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
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import fpsim
import fpsim.rounding_lowering  # noqa: F401
from fpsim.formats import full_rounding, parse_format, resolve_overflow
from fpsim.rounding_op import KERNEL, random_key_op, round_op, round_stochastic_op

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


HEADER = """\
import triton
import triton.language as tl
from torch._inductor.runtime import triton_helpers


"""


def rounded(case: tuple[str, ...]) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """A product, rounded, and a sum: what a compiler would like to contract."""
    format, rounding, overflow, _ = case
    fmt = parse_format(format)
    arguments = (fmt.name, full_rounding(rounding), resolve_overflow(fmt, overflow), KERNEL)
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


# -- generating --------------------------------------------------------------------------------------------------------


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """As much of an H100 as Inductor asks for while it generates code."""
    numbers: dict[str, Any] = {
        "multi_processor_count": 132,
        "major": 9,
        "regs_per_multiprocessor": 65536,
        "max_threads_per_multi_processor": 2048,
        "max_threads_per_block": 1024,
        "warp_size": 32,
    }
    properties = DeviceProperties(type="cuda", index=0, cc=90, **numbers)
    triton.runtime.driver.set_active(
        SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0)
    )
    replaced: list[tuple[Any, str, Any]] = [
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "device_count", lambda: 1),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "get_device_capability", lambda *_: (9, 0)),
        (torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(minor=0, **numbers)),
        (DeviceProperties, "create", lambda _: properties),
    ]
    with ExitStack() as stack:
        for owner, name, value in replaced:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def generated_code(case: tuple[str, ...]) -> str:
    """What Inductor generates for `rounded`, with the settings of fpsim's backend."""
    with FakeTensorMode() as fake, pretended_gpu():
        tensors = [torch.empty_like(x, device="cuda") for x in map(fake.from_tensor, inputs(case))]
        module = make_fx(rounded(case))(*tensors)
        graph = GraphLowering(module, example_inputs=tensors)
        with (
            V.set_debug_handler(DebugContext()),
            V.set_graph_handler(graph),
            inductor_config.patch(emulate_precision_casts=True),
        ):
            graph.run(*tensors)
            return str(graph.codegen()[0].value)


def generate(folder: Path) -> None:
    """Write the kernel of each case to a file, and check what Triton compiles of it."""
    kept = []
    for i, case in enumerate(CASES):
        code = generated_code(case)
        assert not re.search(r"torch\.ops\.fpsim\.round", re.sub(r"^\s*#.*$", "", code, flags=re.MULTILINE)), (
            "not fused"
        )
        (kernel,) = re.findall(r"async_compile\.triton\('\w+', '''(.*?)'''", code, re.DOTALL)
        (launch,) = re.findall(r"\.run\((.*), stream=", code)
        (signature,) = re.findall(r"'signature': (\{.*?\})", kernel)
        fusion = "'enable_fp_fusion': False" not in kernel
        source = kernel[kernel.index("@triton.jit") :]
        header = "import triton\nimport triton.language as tl\nfrom torch._inductor.runtime import triton_helpers\n"
        path = folder / f"kernel_{i}.py"
        path.write_text(
            f"{header}from torch._inductor.runtime.triton_helpers import libdevice, math as tl_math\n\n\n{source}"
        )
        kept.append({"case": case, "path": str(path), "signature": ast.literal_eval(signature), "launch": launch})
        code = ptx(load(path), ast.literal_eval(signature), fusion)
        floating = set(re.findall(r"\b((?:add|sub|mul|fma|mad|div|min|max)\.(?:\w+\.)*b?f(?:16x2|16|32))\b", code))
        # The product and the sum, nothing else; with .rn written out, the assembler may not contract them either.
        assert floating == {"mul.rn.f32", "add.rn.f32"}, (case, floating)
    (folder / "kernels.json").write_text(json.dumps(kept))


def load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return next(value for name, value in vars(module).items() if name.startswith("triton_poi"))


def ptx(kernel: Any, signature: dict[str, str], fusion: bool) -> str:
    source = ASTSource(kernel, signature, constexprs={"XBLOCK": 256})
    return str(
        triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": fusion}).asm["ptx"]
    )


# -- interpreting ------------------------------------------------------------------------------------------------------


def interpret(folder: Path) -> None:
    """Run each kernel on the inputs of its case, and compare bits with eager rounding on the CPU."""
    block = 1 << 13
    for entry in json.loads((folder / "kernels.json").read_text()):
        case = tuple(entry["case"])
        tensors = dict(zip(("a_1", "b_1", "c_1", "key_1"), inputs(case), strict=True))
        arguments = [
            int(name) if name.isdigit() else tensors.get(name, torch.empty_like(tensors["a_1"]))
            for name in entry["launch"].split(", ")
        ]
        out = next(i for i, name in enumerate(entry["signature"]) if name.startswith(("out_ptr", "in_out_ptr")))
        load(Path(entry["path"]))[(-(-COUNT // block),)](*arguments, XBLOCK=block)
        got, want = arguments[out], rounded(case)(*inputs(case))
        integer = torch.int32 if want.dtype == torch.float32 else torch.int16
        differ = (got.view(integer) != want.view(integer)) & ~(got.isnan() & want.isnan())
        assert not differ.any(), (case, int(differ.sum()), got[differ][:3], want[differ][:3])


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"generate": generate, "interpret": interpret}[sys.argv[1]](Path(sys.argv[2]))
    print(f"{len(CASES)} kernels as they should be")
