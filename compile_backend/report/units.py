"""The spelling of a profile's numbers in tables and pages."""

from __future__ import annotations

import math


def percent(share: float) -> str:
    """A share between 0 and 1 as a percentage.

    >>> percent(0), percent(1e-5), percent(0.12345)
    ('0', '<0.01 %', '12.3 %')
    """
    if share == 0:
        return "0"
    return "<0.01 %" if share < 1e-4 else f"{100 * share:.3g} %"


def decibel(ratio: float) -> str:
    """A signal-to-noise ratio, given in dB. An infinite ratio, without noise, is ``exact``.

    >>> decibel(31.26), decibel(math.inf), decibel(-math.inf)
    ('31.3', 'exact', '-inf')
    """
    return "exact" if ratio == math.inf else "-inf" if ratio == -math.inf else f"{ratio:.1f}"
