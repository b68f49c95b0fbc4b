"""The test bed of sorted keys gives the numbers that NumPy gave, apart from fpsim."""

from __future__ import annotations

import pytest

from fpsim.paper.claims.after_training import sorted_keys


def test_sorting_gains_decibels_where_a_block_is_shorter_than_a_head() -> None:
    measured = sorted_keys(3)
    assert measured["gain_128"] == pytest.approx(8.9 - 8.9, abs=1e-9)
    assert measured["gain_64"] == pytest.approx(11.6 - 10.4, abs=0.4)
    assert measured["gain_32"] == pytest.approx(14.2 - 12.4, abs=0.4)
    assert abs(measured["gain_64_without_outliers"]) < 0.2
