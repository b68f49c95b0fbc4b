"""A model whose roundings are switched on and off, compiled once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo import config as dynamo_config

from fpsim.compile_backend.compiling import compile_with_rounding
from fpsim.compile_backend.report.running import ISOLATED
from fpsim.compile_backend.switches import Place, Switches
from fpsim.compile_backend.torch_settings import apply_settings
from fpsim.evaluate.running import check_backend
from fpsim.policy import Policy


class SwitchedModel:
    """``model`` with the roundings of ``policies``, of which any choice of places may be on. It is compiled once.

    Places are known after the first call. Under `torch.no_grad` the backward pass has none.

    Args:
        model: an uncompiled module, which torch can compile as one graph.
        policies: the policies that a place may follow, one at a time.
        backend: ``fpsim_eager`` or ``fpsim``.
    """

    def __init__(self, model: nn.Module, policies: Sequence[Policy], backend: str = "fpsim_eager") -> None:
        check_backend(backend)
        self.switches = Switches(policies)

        def compiled(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
            interpret = backend == "fpsim_eager"
            return compile_with_rounding(gm, example_inputs, policies[0], interpret=interpret, switches=self.switches)

        apply_settings()
        self._call = torch.compile(model, backend=compiled, fullgraph=True, dynamic=False, **ISOLATED)

    @property
    def places(self) -> list[Place]:
        """The places in the order in which the graph has them."""
        return list(self.switches.numbers)

    def turn(self, places: Collection[Place]) -> None:
        """Turn ``places`` on, and all others off."""
        self.switches.turn(places)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        calls = {function for function in vars(logging.Logger).values() if callable(function)}
        with dynamo_config.patch(ignore_logger_methods=calls):  # a logged warning must not break the graph
            try:
                return self._call(*args, **kwargs)
            except torch._dynamo.exc.Unsupported as error:
                reason = str(error).strip().splitlines()[0]
                raise ValueError(
                    f"torch cannot compile the model as one graph, in which roundings can be switched: {reason}. "
                    "torch.compile(model, fullgraph=True) shows where"
                ) from error
