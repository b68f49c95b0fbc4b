"""Rounding commutes with rearrangement: a value and its rearrangements share one rounding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

import fpsim

REARRANGED: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda x: x.view(6, 4),
    "reshape": lambda x: x.reshape(2, 12),
    "permute": lambda x: x.permute(1, 0),
    "t": lambda x: x.t(),
    "transpose": lambda x: x.transpose(0, 1),
    "unsqueeze": lambda x: x.unsqueeze(0),
    "squeeze": lambda x: x.view(1, 4, 6).squeeze(0),
    "expand": lambda x: x.expand(2, 4, 6),
    "detach": lambda x: x.detach(),
    "clone": lambda x: x.clone(),
    "several": lambda x: x.clone().view(2, 2, 6).transpose(0, 1).reshape(6, 4),
}


@pytest.mark.parametrize("name", REARRANGED)
def test_a_value_and_its_rearrangements_share_one_rounding(name: str, graphs: list[fx.Graph]) -> None:
    def model(x: Tensor) -> tuple[Tensor, Tensor]:
        other = REARRANGED[name](x)
        return x @ x.mT, other @ other.mT

    x = torch.randint(-40, 41, (4, 6), generator=torch.Generator().manual_seed(0)).float()
    got = torch.compile(model, backend="fpsim_eager", options={"format": "e4m3fn"})(x)
    assert all(map(torch.equal, got, model(fpsim.round(x, "e4m3fn"))))
    (rounding,) = graphs[0].find_nodes(op="call_function", target=torch.ops.fpsim.round.default)
    assert rounding.args[0].op == "placeholder"


def test_a_part_of_a_value_is_rounded_itself(graphs: list[fx.Graph]) -> None:
    """It may have another scale; and the rest of the value need not be rounded."""
    x = torch.randn(4, 6)
    torch.compile(lambda x: x[:2] @ x[2:].mT, backend="fpsim_eager", options={"format": "e4m3fn"})(x)
    roundings = graphs[0].find_nodes(op="call_function", target=torch.ops.fpsim.round.default)
    assert [node.args[0].target for node in roundings] == [torch.ops.aten.slice.Tensor] * 2
