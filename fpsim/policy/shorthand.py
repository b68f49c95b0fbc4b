"""Policies in one word, for command lines, tables and the conditions of a sweep: ``bf16``, ``e4m3fn+e5m2``."""

from __future__ import annotations

from typing import Any

from fpsim.casts import parse_cast
from fpsim.policy.policy import Policy, is_preset

#: The word for no simulation.
UNSIMULATED = "fp32"


def parse_shorthand(text: str) -> dict[str, Any] | None:
    """The options of ``torch.compile(backend="fpsim")`` that ``text`` stands for; None for ``fp32``.

    - ``fp32``: no simulation.
    - A cast for all operands of all matrix products: ``bf16``, ``e8m3/toward_zero``. It is spelled as in
      `fpsim.Policy`: a format, then optionally ``/`` and a rounding, ``/`` and an overflow mode, ``/`` and a scale.
      ``bf16`` and ``fp16`` are casts here, not the presets of that name: results of products stay unrounded.
    - Two casts joined by ``+``, for activations and weights and for gradients: ``e4m3fn+e5m2``.
    - A preset (`fpsim.Policy.preset`) that has not the name of a format: ``fp8_hybrid``, ``paper:FORMAT``.

    Raises:
        ValueError: a part of ``text`` is none of these; the message names it.

    >>> parse_shorthand("e4m3fn+e5m2/toward_zero")
    {'activation': 'e4m3fn', 'weight': 'e4m3fn', 'gradient': 'e5m2/toward_zero'}
    """
    name = text.strip().lower()
    if name == UNSIMULATED:
        return None
    if is_preset(name):
        return Policy.preset(name).to_dict()
    casts = [part.strip() for part in name.split("+")]
    try:
        if len(casts) > 2:
            raise ValueError(f"{len(casts)} casts joined by '+'")
        for cast in casts:
            parse_cast(cast)
    except ValueError as error:
        raise ValueError(
            f"cannot read the format {text!r}: {error}. Write a cast for all operands, such as bf16 or "
            "e8m3/toward_zero, or one for activations and weights and one for gradients, such as e4m3fn+e5m2"
        ) from None
    if len(casts) == 1:
        return {"format": casts[0]}
    forward, gradient = casts
    return {"activation": forward, "weight": forward, "gradient": gradient}
