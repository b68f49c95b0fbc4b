"""Training on microcontrollers in 16 bits."""

from __future__ import annotations

from fpsim.policy import Policy
from fpsim.recipes.recipe import Recipe
from fpsim.recipes.rounded_state import RoundedState


def mcu_fp16(*, format: str = "bf16", order: str = "sequential", accumulator: str | None = None) -> Recipe:
    """Every operand, partial sum, result, gradient and weight in 16 bits, without master weights and loss scaling.

    Args:
        format: ``"bf16"``, which the library's type ``fp16`` is by default (float16alt), or ``"fp16"``, which it says.
        order: how a product adds up in the accumulator: ``"sequential"`` rounds after every fused multiply-add,
            ``"multiply_add"`` also rounds the products.
        accumulator: the format of sums in place of ``format``; ``"fp32"`` is the control.

    Raises: the errors of `fpsim.Policy`.
    """
    return Recipe(
        name="mcu_fp16",
        source="Nadalini et al., Reduced Precision Floating-Point Optimization for Deep Neural Network On-Device "
        "Learning on MicroControllers, FGCS 2023; pulp-platform/pulp-trainlib",
        policy=Policy(format=format, output=format, elementwise=format, accumulator=accumulator or format, order=order),
        optimizer=RoundedState(weights=format),
        notes=(
            "The library's fp16 is a typedef for float16alt, which is bfloat16, unless it is built otherwise.",
            "Kernels with vectors add two partial sums, of even and of odd products. This has one sum, as scalar "
            "kernels have.",
            "The library computes the loss in float32, on batches of one example: compile the model without its loss. "
            "Updates are w - lr g, rounded once.",
            "Sums are simulated on the CPU only.",
        ),
    )
