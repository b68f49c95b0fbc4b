"""NVFP4 pretraining: 4-bit operands in blocks of 16, as in Transformer Engine."""

from __future__ import annotations

from fpsim.policy import Policy
from fpsim.recipes.exclusions import Exclusions
from fpsim.recipes.parts import LINEAR, by_role, kept_in, results
from fpsim.recipes.recipe import Recipe
from fpsim.scaling.scale import FOUR_OVER_SIX_RULES

_FOUR_OVER_SIX_NOTES = (
    "Four Over Six has Transformer Engine's order of operations. That code chooses for weights and activations, by "
    "absolute errors unless told otherwise, and refuses the rotation beside it; this rotates wgrad before it chooses. "
    "The authors' code (mit-han-lab/fouroversix) takes squared errors, and chooses for gradients too, by the errors "
    "after stochastic rounding.",
)
#: The blocks of the paper's 12B model, and those at its ends that stay high.
_BLOCKS, _FIRST, _LAST = 62, 2, 8


def nvfp4(
    *,
    square_weights: bool = True,
    hadamard: bool = True,
    stochastic: bool = True,
    four_over_six: str | None = None,
    first_blocks: float = _FIRST / _BLOCKS,
    last_blocks: float = _LAST / _BLOCKS,
    blocks: str | None = None,
    head: bool | str = True,
    high: str | None = "bf16",
) -> Recipe:
    """NVFP4: e2m1fn under an e4m3fn scale for every 16 elements, under one float32 scale for the tensor.

    Activations and gradients have blocks of 16 along the axis that a product sums over, weights tiles of 16 by 16.
    Both operands of wgrad are rotated along the tokens in blocks of 16 by a Hadamard matrix with fixed signs, and the
    rotated tensors have scales of their own. Gradients are rounded stochastically, with the 8 random bits of the
    hardware. The gradients of weights stay in float32.

    Args:
        square_weights, hadamard, stochastic: False leaves out the tiles, the rotation, or stochastic rounding.
        four_over_six: ``"mae"`` or ``"mse"``: the largest magnitude of each block of activations and weights becomes 6
            or 4, by the smaller sum of errors or of their squares (Four Over Six, arXiv 2512.02010). None: always 6.
        first_blocks, last_blocks: how many blocks at the ends stay high, or their share. By default the shares of the
            paper, 2 and 8 of 62 (it finds that the last 4 suffice).
        blocks: the path of the list of blocks; None finds it.
        head: whether the output layer stays high: True finds it, or the glob of its path.
        high: the format of results and of what stays high; None leaves both in the model's dtype.

    Raises:
        ValueError: ``four_over_six`` is neither. Otherwise the errors of `fpsim.Policy`, and from `Recipe.apply` those
            of `Exclusions`.
    """
    if four_over_six not in (None, *FOUR_OVER_SIX_RULES):
        raise ValueError(f"four_over_six={four_over_six!r}: use 'mae', 'mse' or None")
    rule = "" if four_over_six is None else f":{four_over_six}"
    policy = Policy(
        **by_role(
            f"e2m1fn/nv{rule}",
            f"e2m1fn/nv{':16x16' * square_weights}{rule}",
            "nvfp4/stochastic:8" if stochastic else "nvfp4",
        ),
        transform={"wgrad": "hadamard:16:te"} if hadamard else {},
        **results(high, "fprop", "dgrad"),
        **LINEAR,
    )
    return Recipe(
        name="nvfp4",
        source="NVIDIA, Pretraining Large Language Models with NVFP4, arXiv 2509.25149; "
        "NVIDIA/TransformerEngine d0067d0",
        policy=policy,
        notes=(
            "The paper keeps the first 2 and last 8 of 62 blocks and the head in bf16. The code leaves that to the "
            "user: this follows the paper, by shares.",
            "The signs of the rotation are those of the code, the same for all layers and the whole run.",
            *_FOUR_OVER_SIX_NOTES * (four_over_six is not None),
            "A one-shot error of wgrad does not show the rotation's merit; compare training losses.",
        ),
        exclusions=Exclusions(
            head=head, first_blocks=first_blocks, last_blocks=last_blocks, blocks=blocks, policy=kept_in(high)
        ),
    )
