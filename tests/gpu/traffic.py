"""The memory traffic that rounding adds to a training step of GPT-2's shape on a GPU, from Inductor's generated code.

    python -m tests.gpu.traffic [--layers N] [--dtype bfloat16|float32]

It needs no GPU: Inductor generates code for a simulated one. The table counts the kernels that a step launches, without
matrix products, and the bytes that all kernels read and write, by Inductor's own count. It does not measure time. A
step that moves 10 % more bytes takes 10 % longer if memory bounds all of it, and less if the matrix products, which are
the same, bound a part of it.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import fx, nn
from torch._dynamo.utils import detect_fake_mode
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import (
    _recursive_post_grad_passes,
    compile_fx,
    record_original_output_strides,
    view_to_reshape,
)
from torch._inductor.debug import DebugContext
from torch._inductor.fx_passes import fuse_attention
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

from fpsim.compile_backend import compiling
from fpsim.paper.compiled_loss import OpenAttention
from tests.compile_backend.inductor_triton import kernels_of, pretended_gpu
from tests.gpu.benchmarks import GPT2, Size

GPU = torch.device("cuda", 0)


@dataclass(frozen=True)
class Code:
    """Inductor's code for one graph, and the bytes that its kernels and matrix products read and write."""

    text: str
    bytes: int

    @property
    def launches(self) -> int:
        """The number of kernel launches, without the matrix products of a library."""
        return len(re.findall(r"\btriton_\w+\.run\(", self.text))


class Captured:
    """Replaces Inductor's compiler: it keeps each graph, and runs it on fake tensors."""

    def __init__(self) -> None:
        self.graphs: list[tuple[fx.GraphModule, Sequence[Any], bool]] = []

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any], **named: Any) -> Callable[..., Any]:
        self.graphs.append((gm, list(inputs), named.get("is_backward", False)))

        def run(arguments: list[Any]) -> Any:
            given = list(arguments)
            arguments.clear()
            return gm(*given)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run


def step(size: Size, dtype: torch.dtype, options: dict[str, Any] | None, opened: bool) -> list[Code]:
    """The code of forward and backward.

    Args:
        size: of the model.
        dtype: of the parameters.
        options: of the backend; None for plain Inductor.
        opened: whether plain Inductor gets opened attention.
    """
    captured = Captured()
    torch._dynamo.reset()
    with mock.patch.object(compiling, "interpreter", lambda *_: captured), FakeTensorMode():
        with torch.device("meta"):
            model = GPT2(size)
        for module in model.modules():
            for name, p in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(torch.empty(p.shape, dtype=dtype)))
        if options is not None:
            compiled: Any = torch.compile(model, backend="fpsim_eager", options=options or None, dynamic=False)
        else:
            plain = OpenAttention(model) if opened else model
            compiled = torch.compile(plain, backend=lambda gm, x: compile_fx(gm, x, inner_compile=captured))
        compiled(*(torch.empty((size.batch, size.context), dtype=torch.int64) for _ in range(2))).backward()
    for gm, inputs, _ in captured.graphs:
        record_original_output_strides(gm)
        view_to_reshape(gm)
        with V.set_fake_mode(detect_fake_mode(inputs)):
            _recursive_post_grad_passes(gm, is_inference=False)
    return [code_for_a_gpu(*graph) for graph in captured.graphs]


def code_for_a_gpu(gm: fx.GraphModule, inputs: Sequence[Any], is_backward: bool) -> Code:
    """The code of a graph that was traced on the CPU, generated as if it had been traced on a GPU."""
    fake_mode = detect_fake_mode(inputs)
    for node in gm.graph.nodes:
        node.args = tuple(GPU if isinstance(argument, torch.device) else argument for argument in node.args)
        node.kwargs = {name: GPU if name == "device" else value for name, value in node.kwargs.items()}
    for value in tree_leaves([[node.meta.get("val") for node in gm.graph.nodes], inputs]):
        if isinstance(value, FakeTensor):
            value.fake_device = GPU
    with ExitStack() as stack:
        for context in (
            pretended_gpu(),
            mock.patch.object(torch.version, "cuda", "12.8"),
            inductor_config.patch(emulate_precision_casts=True),
        ):
            stack.enter_context(context)
        graph = GraphLowering(gm, example_inputs=inputs, is_backward=is_backward)
        for context in (V.set_fake_mode(fake_mode), V.set_debug_handler(DebugContext()), V.set_graph_handler(graph)):
            stack.enter_context(context)
        graph.run(*inputs)
        text = str(graph.codegen()[0].value)
        kernels_of(text)  # refuses code that calls a rounding instead of fusing it
        return Code(text, graph.count_bytes()[0])


CASES: dict[str, tuple[dict[str, Any] | None, bool]] = {
    "plain Inductor, attention fused": (None, False),
    "fpsim, attention kept fused": ({"policy": "fp8_hybrid", "attention": "keep"}, False),
    "plain Inductor, attention opened": (None, True),
    "fpsim, everything rounded": ({}, True),
}


def steps(size: Size, dtype: torch.dtype) -> dict[str, list[Code]]:
    """The code of each case."""
    # Without this patch, plain Inductor would fuse the opened attention again.
    with mock.patch.object(fuse_attention, "_sfdp_init", lambda *_, **__: None):
        return {name: step(size, dtype, *case) for name, case in CASES.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=Size.layers)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    arguments = parser.parse_args()
    size = replace(Size(), layers=arguments.layers)
    table = Table(title=f"GPT-2's shape, {size.layers} layers, {size.batch} x {size.context} tokens, {arguments.dtype}")
    for column in ("case", "launches", "more", "GB moved", "ratio"):
        table.add_column(column, justify="left" if column == "case" else "right")
    base = (0, 1)
    for name, codes in steps(size, getattr(torch, arguments.dtype)).items():
        launches, moved = sum(code.launches for code in codes), sum(code.bytes for code in codes)
        base = (launches, moved) if name.startswith("plain") else base
        table.add_row(name, str(launches), str(launches - base[0]), f"{moved / 1e9:.1f}", f"{moved / base[1]:.3f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
