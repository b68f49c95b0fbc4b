"""The tests under every supported version of torch and of Python: `nox`, or `nox -s "tests(torch='2.11.0')"` for one.

Other versions than the pinned one come with gigabytes of CUDA packages, so this is not part of `make test`. What
follows `--` goes to pytest.
"""

import nox

VERSIONS = ["2.11.0", "2.12.1", "2.13.0", "2.14.1", "2.15.0"]
PYTHONS = ["3.11", "3.12", "3.13"]


@nox.session
@nox.parametrize("torch", VERSIONS)
def tests(session: nox.Session, torch: str) -> None:
    """The test suite of this folder, against fpsim installed in an environment of its own with this torch."""
    session.install(f"torch=={torch}", "--editable", ".[dev,docs,paper]")
    run_tests(session)


@nox.session(python=PYTHONS)
def pythons(session: nox.Session) -> None:
    """The test suite under this Python, at the versions in ``constraints.txt``."""
    session.install("--constraint", "constraints.txt", "--editable", ".[dev,docs,paper]")
    run_tests(session)


def run_tests(session: nox.Session) -> None:
    command = ("python", "-m", "pytest", "-n", "2", "-m", "not exhaustive")
    session.run(*command, *session.posargs, env={"OMP_NUM_THREADS": "1"})
