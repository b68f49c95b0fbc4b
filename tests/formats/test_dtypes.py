"""A dtype of torch stands for the format of its values wherever a format is named."""

from __future__ import annotations

import pytest
import torch

import fpsim
from fpsim.accumulators.accumulator import parse_accumulator
from fpsim.casts import parse_cast
from fpsim.evaluate.policies import named_policies
from fpsim.formats import format_name

#: Every floating-point dtype of torch, with the name of its format as OCP, ml_dtypes and IEEE 754 have it.
FORMATS = {
    "float64": "e11m52", "float32": "e8m23", "bfloat16": "e8m7", "float16": "e5m10", "float8_e4m3fn": "e4m3fn",
    "float8_e5m2": "e5m2", "float8_e4m3fnuz": "e4m3fnuz", "float8_e5m2fnuz": "e5m2fnuz", "float8_e8m0fnu": "e8m0fnu",
    "float4_e2m1fn_x2": "e2m1fn",
}  # fmt: skip


def floating_dtypes() -> list[torch.dtype]:
    dtypes = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    return sorted((dtype for dtype in dtypes if "float" in str(dtype)), key=str)


@pytest.mark.parametrize("dtype", floating_dtypes(), ids=str)
def test_every_floating_dtype_is_the_format_of_its_values(dtype: torch.dtype) -> None:
    name = FORMATS[str(dtype).removeprefix("torch.")]
    assert fpsim.parse_format(dtype) == fpsim.parse_format(name)
    assert format_name(dtype) == str(dtype).removeprefix("torch.")
    if dtype.itemsize == 1 and "x2" not in str(dtype):  # torch's own decoding of all codes
        codes = torch.arange(256, dtype=torch.uint8)
        torch.testing.assert_close(
            fpsim.decode(codes, dtype), codes.view(dtype).float(), rtol=0, atol=0, equal_nan=True
        )


def test_dtypes_are_taken_by_every_function_that_takes_a_format() -> None:
    x = torch.tensor([0.3, -3.3, 500.0])
    e4m3fn, half = torch.float8_e4m3fn, torch.float16
    assert torch.equal(fpsim.round(x, e4m3fn), torch.tensor([0.3125, -3.25, 448.0]))
    assert fpsim.encode(x, e4m3fn).tolist() == [0x2A, 0xC5, 0x7E]
    assert torch.equal(fpsim.decode(torch.tensor([0x2A]), e4m3fn), torch.tensor([0.3125]))
    compiled = torch.compile(lambda x: fpsim.round(x, e4m3fn), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), torch.tensor([0.3125, -3.25, 448.0]))
    assert fpsim.reference.round(1e6, half) == fpsim.reference.round(1e6, "fp16")
    assert fpsim.reference.block_scale([957.0], e4m3fn) == fpsim.reference.block_scale([957.0], "e4m3fn")
    assert parse_cast(e4m3fn) == parse_cast("e4m3fn") and parse_cast(e4m3fn).written.startswith("float8_e4m3fn/")
    assert parse_accumulator(half, chunk=4) == parse_accumulator("fp16", chunk=4)
    a, b = torch.randn(3, 5), torch.randn(5, 2)
    want = fpsim.matmul(a, b, accumulator="fp16", format="e4m3fn")
    assert torch.equal(fpsim.matmul(a, b, accumulator=half, format=e4m3fn), want)


def test_policies_take_dtypes_in_every_field_and_keep_them_in_json() -> None:
    bf16 = torch.bfloat16
    given = fpsim.Policy(format=torch.float8_e4m3fn, output=bf16, wgrad={"gradient": bf16}, elementwise=bf16,
                         dgrad=torch.float8_e5m2, modules={"head": bf16}, accumulator=torch.float16,
                         attention={"preset": "flash2_bf16", "output": torch.float16})  # fmt: skip
    named = fpsim.Policy(format="e4m3fn", output="bf16", wgrad={"gradient": "bf16"}, elementwise="bf16", dgrad="e5m2",
                         modules={"head": {"format": "bf16"}}, accumulator="fp16",
                         attention={"preset": "flash2_bf16", "output": "fp16"})  # fmt: skip
    assert given.canonical() == named.canonical() and given == named
    assert fpsim.Policy.from_json(given.to_json()) == given
    # A dtype is a format alone; the preset bf16 rounds results too.
    assert (
        named_policies([bf16]) == {"bfloat16": fpsim.Policy(format="bf16")} != {"bfloat16": fpsim.Policy.preset("bf16")}
    )


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.complex64])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    for call in (
        fpsim.parse_format,
        parse_cast,
        lambda d: fpsim.Policy(format=d),
        lambda d: fpsim.round(torch.ones(2), d),
    ):
        with pytest.raises(ValueError, match=rf"{dtype} is no floating-point dtype: .*'int8'"):
            call(dtype)
