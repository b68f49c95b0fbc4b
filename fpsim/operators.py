"""Importing this module registers all operators of fpsim with torch: programs of `fpsim.export` call them."""

from __future__ import annotations

import fpsim.accumulators.ops
import fpsim.accumulators.parts
import fpsim.accumulators.sums
import fpsim.attention.ops
import fpsim.rounding.ops
import fpsim.scaling.ops
import fpsim.transforms.ops  # noqa: F401
