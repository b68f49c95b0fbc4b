"""K-sort: keys in block floating point, with channels sorted by magnitude."""

from __future__ import annotations

from fpsim.recipes.post_training import RoundedAttention
from fpsim.recipes.recipe import Recipe


def k_sort(*, block: int = 32, key_bits: int = 4, query_bits: int | None = 8, sort: bool = True) -> Recipe:
    """Keys and queries are integers that share an exponent in each block along the head; values stay as they are.

    Args:
        block: how many channels share an exponent. A block as long as a head gains nothing by sorting.
        key_bits: the width of the integers of keys, 2 to 16: 4 is BFP12, 8 is BFP16.
        query_bits: that of queries, or None to leave them.
        sort: whether the channels of keys are sorted.
    """
    return Recipe(
        name="k_sort",
        source="Trukhanov and Soloveychik, Accurate Block Quantization in LLMs with Outliers, arXiv 2403.20137; the "
        "formats: d-matrix-ai/dmx-compressor, numerical/format.py",
        policy=None,
        preparation=RoundedAttention(
            query=None if query_bits is None else _block_float(query_bits, block),
            key=_block_float(key_bits, block),
            sort_keys=sort,
        ),
        notes=(
            "An exponent is floor(log2(amax)), and the largest numbers of a block saturate, as in the code.",
            "The code rounds halves towards plus infinity, this rounds ties to even.",
            "Pairs of channels that rotary embedding turns together become neighbours. The paper says no more than "
            "that the tables of cosines and sines are permuted.",
            "All else, values included, keeps the dtype of the model (16 bits in the paper).",
        ),
    )


def _block_float(bits: int, block: int) -> str:
    return f"int{bits}:unit={2 - bits}/mx:{block}:floor"
