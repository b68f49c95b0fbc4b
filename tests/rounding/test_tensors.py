"""The tensors that are rounded, encoded, decoded and scaled as they stand, and the refusal of all others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.masked import masked_tensor
from torch.testing._internal.two_tensor import TwoTensor

import fpsim
from fpsim.rounding import definitions
from tests.shared.judge import assert_same_bits

X = torch.tensor([[1.3, -2.2], [0.0, 500.0]])
ROUNDED = torch.tensor([[1.25, -2.25], [0.0, 448.0]])  # in e4m3fn
CODES = torch.tensor([[0x3A, 0xC1], [0, 0x7E]], dtype=torch.uint8)

CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "round": lambda x: fpsim.round(x, "e4m3fn"),
    "encode": lambda x: fpsim.encode(x, "e4m3fn"),
    "scale": lambda x: fpsim.power_of_two_scale(x, "e4m3fn"),
}


class Plain(torch.Tensor):
    """A subclass that leaves the operators alone."""


def with_negative_bit() -> Tensor:
    return torch.complex(torch.zeros(2, 2), -X).conj().imag


@pytest.mark.parametrize(
    "x",
    [
        X,
        nn.Parameter(X.clone()),
        nn.Buffer(X.clone()),
        X.as_subclass(Plain),
        X.T.contiguous().T,
        X.repeat(1, 2)[:, :2],
        with_negative_bit(),
        X[None].expand(1, 2, 2)[0],
    ],
    ids=["plain", "parameter", "buffer", "subclass", "transposed", "slice", "negative bit", "expanded"],
)
def test_dense_tensors_are_rounded(x: Tensor) -> None:
    assert_same_bits(fpsim.round(x, "e4m3fn").detach().as_subclass(Tensor), ROUNDED)
    assert torch.equal(fpsim.encode(x, "e4m3fn").as_subclass(Tensor), CODES)
    assert float(fpsim.power_of_two_scale(x, "e4m3fn")) == 0.5
    leaf = x.detach().requires_grad_()
    assert_same_bits(fpsim.round(leaf, "e4m3fn").detach().as_subclass(Tensor), ROUNDED)
    assert_same_bits(fpsim.decode(fpsim.encode(x, "e4m3fn"), "e4m3fn").as_subclass(Tensor), ROUNDED)


def test_tensors_without_data_have_results_without_data() -> None:
    meta = X.to("meta")
    with FakeTensorMode():
        fake = torch.empty(2, 2)
    for x in (meta, fake):
        assert (fpsim.round(x, "e4m3fn").shape, fpsim.round(x, "e4m3fn").dtype) == ((2, 2), torch.float32)
        assert (fpsim.encode(x, "e4m3fn").shape, fpsim.encode(x, "e4m3fn").dtype) == ((2, 2), torch.uint8)
        assert fpsim.power_of_two_scale(x, "e4m3fn").shape == ()
    assert fpsim.encode(torch.empty(2**31 + 5, device="meta"), "e4m3fn").shape == (2**31 + 5,)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: X.to_sparse(), "layout torch.sparse_coo: .* x.to_dense"),
        (lambda: X.to_sparse_csr(), "layout torch.sparse_csr"),
        (lambda: X.to_sparse_csc(), "layout torch.sparse_csc"),
        (lambda: X.to_sparse_bsr((1, 1)), "layout torch.sparse_bsr"),
        (lambda: X.to_mkldnn(), "layout torch._mkldnn: .* x.to_dense"),
        (lambda: torch.nested.nested_tensor([X[0], X[1, :1]]), "a nested tensor: .* x.unbind"),
        (lambda: torch.nested.nested_tensor([X[0], X[1, :1]], layout=torch.jagged), "a nested tensor"),
        (lambda: masked_tensor(X, X > 0), "type MaskedTensor, whose operators are its own"),
        (lambda: TwoTensor(X, X), "type TwoTensor, whose operators are its own"),
        (lambda: X.to(torch.complex64), "torch.complex64"),
        (lambda: X.to(torch.float8_e4m3fn), "torch.float8_e4m3fn"),
        (lambda: CODES.view(torch.float8_e8m0fnu), "torch.float8_e8m0fnu"),
        (lambda: CODES.view(torch.float4_e2m1fn_x2), "torch.float4_e2m1fn_x2"),
        (lambda: torch.quantize_per_tensor(X, 0.1, 0, torch.qint8), "torch.qint8"),
        (lambda: X > 0, "torch.bool"),
        (lambda: X.int(), "torch.int32"),
        (lambda: X.tolist(), "x must be a torch.Tensor, got list"),
        (lambda: X.numpy(), "x must be a torch.Tensor, got ndarray"),
        (lambda: None, "x must be a torch.Tensor, got NoneType"),
        (lambda: 1.5, "x must be a torch.Tensor, got float"),
    ],
)
def test_other_tensors_are_refused_with_a_remedy(call: str, make: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        CALLS[call](make())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["mxfp8", "nvfp4", "int8", "int8/row", "uint8/row:asymmetric", "nf4", "dynamic8"])
def test_other_dtypes_are_refused_by_formats_of_every_kind(name: str) -> None:
    others = torch.complex64, torch.float8_e4m3fn, torch.bool, torch.int32
    for x in (*(X.to(dtype) for dtype in others), torch.quantize_per_tensor(X, 0.1, 0, torch.qint8)):
        with pytest.raises(TypeError, match=f"cannot round a tensor of {x.dtype}: convert it to one of"):
            fpsim.round(x, name)


@pytest.mark.filterwarnings("ignore")
def test_codes_of_other_layouts_and_dtypes_are_refused() -> None:
    for codes in (CODES.int().to_sparse(), torch.nested.nested_tensor([CODES[0], CODES[1, :1]], layout=torch.jagged)):
        with pytest.raises(TypeError, match="cannot decode a"):
            fpsim.decode(codes, "e4m3fn")
    for codes in (torch.quantize_per_tensor(X, 0.1, 0, torch.quint8), CODES.view(torch.float4_e2m1fn_x2), CODES > 0):
        with pytest.raises(TypeError, match="codes must be an integer tensor"):
            fpsim.decode(codes, "e4m3fn")
    for dtype in (torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64, torch.uint64):
        assert_same_bits(fpsim.decode(CODES.to(dtype), "e4m3fn"), ROUNDED)


@pytest.mark.filterwarnings("ignore")
def test_optimizers_of_other_tensors_are_refused_before_anything_changes() -> None:
    for x in (X.to_sparse(), X.to_mkldnn()):
        optimizer = torch.optim.SGD([nn.Parameter(x)], lr=0.1)
        with pytest.raises(TypeError, match="cannot round a tensor of layout"):
            fpsim.round_optimizer(optimizer, weights="bf16")
        assert not optimizer._optimizer_step_post_hooks


# -- in pieces -----------------------------------------------------------------------------------------------------


def test_long_tensors_are_coded_in_pieces_with_the_same_results(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(7, 30, 11).mul(100)
    layouts = (x, x.permute(2, 0, 1), x[:, ::3], x[:1].expand(9, 30, 11), x[0, 0, 0], x[:0])
    packed = torch.arange(256, dtype=torch.uint8).view(4, 64)

    def results() -> list[Tensor]:
        coded = [(c := fpsim.encode(y, "e4m3fn"), fpsim.decode(c, "e4m3fn", torch.float64)) for y in layouts]
        stochastic = fpsim.encode(x, "e5m2", rounding="stochastic", seed=3)
        scales = [fpsim.power_of_two_scale(y, "e4m3fn") for y in layouts]
        fours = fpsim.unpack(packed, "e2m1fn")
        sixes = fpsim.unpack(packed[:, :63], "e2m3fn")
        flat = fpsim.pack(fours.flatten(), "e2m1fn"), fpsim.unpack(packed.flatten(), "e2m1fn")
        both = fpsim.pack(fours, "e2m1fn"), fpsim.pack(sixes, "e2m3fn")
        return [*sum(coded, ()), stochastic, *scales, fours, *flat, *both]

    whole = results()
    assert torch.equal(whole[-2], packed)
    monkeypatch.setattr(definitions, "CHUNK", 50)
    for got, want in zip(results(), whole, strict=True):
        assert torch.equal(got, want) and got.stride() == want.stride()
    monkeypatch.setattr(definitions, "CHUNK", 5)
    with pytest.raises(ValueError, match="code 300 is not one of e4m3fn"):
        fpsim.decode(torch.tensor([1] * 40 + [300]), "e4m3fn")


@pytest.mark.exhaustive
def test_more_than_2_to_the_31_elements_are_encoded() -> None:
    """It takes 10 GB."""
    values = torch.tensor([1.0, -448.0, 0.3], dtype=torch.bfloat16)
    x = values.expand(2**31 // 3 + 1, 3)
    codes = fpsim.encode(x, "e4m3fn")
    assert codes.numel() > 2**31 and codes.dtype == torch.uint8
    for place in (0, 2**30 // 3, len(codes) - 1):
        assert codes[place].tolist() == fpsim.encode(values, "e4m3fn").tolist()
