"""The claims of published recipes, each with a test bed and a registered pass mark: ``fpsim study claims``."""

from __future__ import annotations

from . import after_training, arithmetic, integers, over_time, states, training, training_states
from .claim import Claim

#: All claims by name.
CLAIMS: dict[str, Claim] = {
    claim.name: claim
    for module in (arithmetic, states, after_training, over_time, integers, training, training_states)
    for claim in module.CLAIMS
}
