"""Each promise of fpsim names tests that exist, and `make quick` runs them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.promises import PROMISES


class Collected:
    """Keeps the names of the tests that pytest would run."""

    names: frozenset[str] = frozenset()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.names = frozenset(item.nodeid for item in session.items)


def test_every_test_that_a_promise_names_is_run_by_make_quick() -> None:
    collected = Collected()
    folder = str(Path(__file__).parent)
    code = pytest.main(["--collect-only", "-qq", "-m", "promise and not exhaustive", folder], plugins=[collected])
    assert code == 0
    run = collected.names | {name.split("[")[0] for name in collected.names}
    assert all(PROMISES.values())
    assert [test for tests in PROMISES.values() for test in tests if f"tests/{test}" not in run] == []
