"""The claims of published recipes, each with a test bed and a registered pass mark: ``fpsim study claims``."""

from __future__ import annotations

from . import after_training, arithmetic, over_time, training
from .claim import Claim

#: All claims by name.
CLAIMS: dict[str, Claim] = {
    claim.name: claim for claim in (*arithmetic.CLAIMS, *after_training.CLAIMS, *over_time.CLAIMS, *training.CLAIMS)
}
