"""The time of `fpsim.evaluate.sensitivity`, and `fpsim.evaluate.search` beside ModelOpt's ``auto_quantize``.

    python -m tests.benchmarks.evaluate sensitivity [--by site] [--policy e4m3fn] [--batches 4]
    python -m tests.benchmarks.evaluate search [--bits 8 9 12]

``sensitivity`` takes a GPT-2 of 12 layers of width 128 over bytes, with random weights, and windows of 128 tokens.

``search`` trains a Llama of 2 layers of width 64 on Shakespeare. Both searches choose INT8, FP8 (e4m3fn) or no rounding
for each of its linear layers, on the same batches, for the same mean bits of a weight. As in ModelOpt's configurations
``INT8_DEFAULT_CFG`` and ``FP8_DEFAULT_CFG``, weights have a scale per output channel (INT8) or per tensor (FP8), inputs
one per tensor, and an unrounded weight counts 16 bits. The table has the change of the loss on the batches of the
search and on others: of ModelOpt's choice as ModelOpt simulates it (its inputs have calibrated scales), of ModelOpt's
choice as fpsim simulates it, and of fpsim's choice. ModelOpt runs on the CPU: ``pip install nvidia-modelopt``.

Measured on 28 November 2026 on 2 shared cores of an Intel Xeon, torch 2.13.0, one thread: ``sensitivity`` by module
under e4m3fn took 109 s, 108 s of the processor, for 4 windows (61 forward and 61 backward units), before graphs with
switches ran without torch.fx.Interpreter. The results
of ``search``, with ModelOpt 0.47.0, stand in ``docs/evaluate.md``.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fpsim.casts import Cast
from fpsim.compile_backend.plan import Site
from fpsim.evaluate import compare, search, sensitivity
from fpsim.evaluate.batches import Mean, mean
from fpsim.evaluate.costs import Operands
from fpsim.paper.data import DataConfig, batches, load, validation_batches
from fpsim.paper.models import LanguageModel, ModelConfig, build
from fpsim.policy import Policy
from tests.benchmarks.timing import cpu_seconds

#: The formats of both searches, by ModelOpt's names.
FORMATS = {
    "INT8_DEFAULT_CFG": {"weight": "int8/row", "activation": "int8/tensor:fp32", "products": "weights"},
    "FP8_DEFAULT_CFG": {"weight": "e4m3fn/tensor:fp32", "activation": "e4m3fn/tensor:fp32", "products": "weights"},
}
#: The bits of an unrounded weight, as ModelOpt counts them.
UNROUNDED_BITS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    first = parts.add_parser("sensitivity")
    first.add_argument("--by", default="module", choices=("module", "site"))
    first.add_argument("--policy", default="e4m3fn")
    first.add_argument("--batches", type=int, default=4)
    second = parts.add_parser("search")
    second.add_argument("--bits", type=float, nargs="+", default=[8.0, 9.0, 12.0])
    second.add_argument("--steps", type=int, default=300, help="of the training before")
    args = parser.parse_args()
    if args.part == "sensitivity":
        time_of_sensitivity(args.by, args.policy, args.batches)
    else:
        beside_modelopt(args.bits, args.steps)


def time_of_sensitivity(by: Any, policy: str, count: int) -> None:
    """Print the seconds of the wall and of the processor."""
    config = ModelConfig(layers=12, hidden=128, heads=4, mlp=512, context=128, family="gpt2", tied=True)
    model = LanguageModel(build(config, seed=0)).eval()
    tokens = torch.randint(256, (count, 1, 129), generator=torch.Generator().manual_seed(0))
    data = [(window[:, :-1].contiguous(), window[:, 1:].contiguous()) for window in tokens]
    wall, processor = time.perf_counter(), cpu_seconds()
    found = sensitivity(model, data, policy=policy, by=by)
    wall, processor = time.perf_counter() - wall, cpu_seconds() - processor
    print(
        f"sensitivity by {by} under {policy}: {len(found.forward)} forward and {len(found.backward)} backward units, "
        f"{count} windows, {torch.get_num_threads()} threads: {wall:.0f} s of wall, {processor:.0f} s of processor"
    )


class Logits(nn.Module):
    """A network of the study as a function from tokens to logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, tokens: Tensor) -> Tensor:
        return self.network(tokens, use_cache=False).logits


def loss(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


Batch = tuple[Tensor, Tensor]


def beside_modelopt(bits: Sequence[float], steps: int) -> None:
    """Print the changes of the loss by both choices, for each number of bits."""
    try:
        import modelopt.torch.quantization as mtq
    except ModuleNotFoundError as error:
        raise SystemExit(f"{error.name} is not installed: pip install nvidia-modelopt") from None
    model, own, others = trained(steps)
    layers = {path: layer.weight.numel() for path, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    table = Table(title="change of the loss at equal bits, in nats per token")
    for column in ("bits", "choice of", "simulated by", "INT8, FP8, none", "same batches", "other batches", "seconds"):
        table.add_column(column, justify="right")

    def changes(policy: Policy) -> list[str]:
        return [str(compare(model, data, {"it": policy}, loss=loss)["it"].difference) for data in (own, others)]

    for each in bits:
        start = time.perf_counter()
        quantized, choices = auto_quantize(mtq, model, own, each)
        seconds = time.perf_counter() - start
        told = [str(change(model, quantized, data)) for data in (own, others)]
        table.add_row(f"{each:g}", "ModelOpt", "ModelOpt", counted(choices), *told, f"{seconds:.1f}")
        policy = Policy(format="none", modules={path: FORMATS.get(name) for path, name in choices.items()})
        table.add_row("", "ModelOpt", "fpsim", counted(choices), *changes(policy), "")
        start = time.perf_counter()
        found = search(
            model,
            own,
            formats={**FORMATS, "none": None},
            budget=each * sum(layers.values()),
            loss=loss,
            cost=cost,
            alike=(),
            trials=50,
        )
        seconds = time.perf_counter() - start
        table.add_row(
            "",
            "fpsim",
            "fpsim",
            counted({path: found.choices[path] for path in layers}),
            *changes(found.policy),
            f"{seconds:.1f}",
        )
    Console(width=140).print(table)


def trained(steps: int) -> tuple[nn.Module, list[Batch], list[Batch]]:
    """A Llama of 2 layers of width 64 after some steps on Shakespeare, batches for the searches, and others."""
    config = ModelConfig(layers=2, hidden=64, heads=4, mlp=176, context=64)
    model = build(config, seed=0)
    data = load(DataConfig(), context=config.context)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    stream = batches(data.train, seed=0, batch=8, context=config.context)
    for _ in range(steps):
        inputs, targets = next(stream)
        optimizer.zero_grad()
        loss(Logits(model)(inputs), targets).backward()
        optimizer.step()
    held_out = validation_batches(data.validation, count=8, batch=8, context=config.context)
    return Logits(model).eval(), held_out[::2], held_out[1::2]


def auto_quantize(mtq: Any, model: nn.Module, data: Sequence[Batch], bits: float) -> tuple[nn.Module, dict[str, str]]:
    """The model as ModelOpt rounds it, and the name of the format of each linear layer."""
    quantized, _ = mtq.auto_quantize(
        copy.deepcopy(model),
        constraints={"effective_bits": bits},
        quantization_formats=[getattr(mtq, name) for name in FORMATS],
        data_loader=data,
        forward_step=lambda network, batch: network(batch[0]),
        loss_func=lambda logits, batch: loss(logits, batch[1]),
        num_calib_steps=len(data),
        num_score_steps=len(data),
    )
    return quantized.eval(), {path: _format_of(layer) for path, layer in quantized.named_modules() if is_linear(layer)}


def is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) and hasattr(layer, "weight_quantizer")


def _format_of(layer: Any) -> str:
    quantizer = layer.weight_quantizer
    if not quantizer.is_enabled:
        return "none"
    return "INT8_DEFAULT_CFG" if quantizer.num_bits == 8 else "FP8_DEFAULT_CFG"


def counted(choices: Mapping[str, str]) -> str:
    """How many layers have each format."""
    count = Counter(name for name in choices.values())
    return ", ".join(str(count[name]) for name in (*FORMATS, "none"))


@torch.no_grad()
def change(model: nn.Module, other: nn.Module, data: Sequence[Batch]) -> Mean:
    """The change of the loss from ``model`` to ``other``."""
    pairs = [[float(loss(each(inputs), targets)) for each in (model, other)] for inputs, targets in data]
    return mean([after - before for before, after in pairs], [1.0] * len(pairs))


def cost(operands: Operands) -> float:
    """The bits of a weight as ModelOpt counts them: of its elements alone."""
    pairs: Iterable[tuple[Site, Cast | None]] = zip(*operands, strict=True)
    return sum(
        torch.Size(map(int, site.shape)).numel() * (UNROUNDED_BITS if cast is None else cast.format.bits)
        for site, cast in pairs
        if site.role == "weight"
    )


if __name__ == "__main__":
    main()
