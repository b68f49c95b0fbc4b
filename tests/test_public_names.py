"""The names that ``fpsim`` hands on: all are visible, all are there, and importing them costs little."""

from __future__ import annotations

import importlib
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

import fpsim

ROOT = Path(__file__).parents[1]

NAMES = [
    "CodebookFormat", "FlashAttention", "FloatFormat", "IntegerFormat", "Policy", "Profiler", "audit", "calibrate",
    "check_same_policy", "curvature", "decode", "decode_blocks", "encode", "encode_blocks", "evaluate", "explain",
    "export", "flash_attention", "load_scale_state", "matmul", "pack", "package", "parse_format", "posttraining",
    "power_of_two_scale", "profile", "recipes", "reference", "round", "round_gradients_hook", "round_optimizer",
    "round_parameters", "scale_state", "sharpness", "testing", "trainers", "unpack",
]  # fmt: skip


def test_dir_shows_the_public_names_and_nothing_else() -> None:
    assert dir(fpsim) == NAMES == sorted(fpsim.__all__)


@pytest.mark.parametrize(
    "name",
    ["curvature", "evaluate", "formats", "posttraining", "recipes", "reference", "sharpness", "trainers", "verify"],
)
def test_dir_of_a_package_shows_its_public_names_and_nothing_else(name: str) -> None:
    package = importlib.import_module(f"fpsim.{name}")
    assert dir(package) == sorted(package.__all__) and all(hasattr(package, each) for each in package.__all__)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_what_its_own_module_has(name: str) -> None:
    value = getattr(fpsim, name)
    if name in ("curvature", "evaluate", "posttraining", "recipes", "reference", "sharpness", "testing", "trainers"):
        assert value is importlib.import_module(f"fpsim.{name}")
    else:
        assert value.__name__ == name and value is getattr(importlib.import_module(value.__module__), name)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'fpsim' has no attribute 'ronud'"):
        fpsim.ronud  # noqa: B018


def test_sources_without_an_installation_say_what_to_do() -> None:
    """``-S`` leaves out what is installed, as if Python found the clone before an installed package."""
    done = subprocess.run([sys.executable, "-S", "-c", "import fpsim"], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == (
        f"ImportError: {ROOT / 'fpsim'} holds sources of fpsim, which are not whole without an installation: "
        "start Python in another folder, or install the clone by pip install --editable '.[paper]'"
    )


def test_all_names_of_the_backend_are_there() -> None:
    from fpsim import compile_backend

    assert dir(compile_backend) == sorted(compile_backend.__all__)
    assert all(getattr(compile_backend, name) is not None for name in compile_backend.__all__)
    with pytest.raises(AttributeError, match=r"module 'fpsim\.compile_backend' has no attribute 'fpsmi'"):
        compile_backend.fpsmi  # noqa: B018


def test_documented_packages_are_attributes_without_an_import_of_their_own() -> None:
    program = (
        "import fpsim; print(fpsim.formats.split_rounding('stochastic:8'), fpsim.policy.Policy is fpsim.Policy, "
        "fpsim.compile_backend.explain is fpsim.explain, fpsim.scaling.__name__, fpsim.rounding.__name__)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "('stochastic', 8) True True fpsim.scaling fpsim.rounding"


def test_import_fpsim_imports_neither_torch_nor_numpy() -> None:
    program = "import sys, fpsim, fpsim.formats; print(sorted({'torch', 'numpy', 'rich', 'mpmath'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_import_fpsim_takes_less_than_0_3_s() -> None:
    seconds = []
    for program in ("import fpsim", "pass"):
        best = 1e9
        for _ in range(3):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", program], check=True)
            best = min(best, time.perf_counter() - start)
        seconds.append(best)
    assert seconds[0] - seconds[1] < 0.3


def test_every_package_is_installed() -> None:
    """The list of packages in ``pyproject.toml`` names every folder with sources."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {
        "fpsim": "fpsim",
        "reference": "fpsim.reference",
        "compile_backend": "fpsim.compile_backend",
        "paper": "fpsim.paper",
    }
    found = {
        ".".join([package, *init.parent.relative_to(ROOT / folder).parts])
        for folder, package in folders.items()
        for init in (ROOT / folder).rglob("__init__.py")
    }
    assert found == set(settings["packages"])
    with_sources = {file.parent for folder in folders for file in (ROOT / folder).rglob("*.py")}
    assert all((folder / "__init__.py").exists() for folder in with_sources)


def test_no_module_has_the_name_of_one_of_the_standard_library() -> None:
    folders = ("fpsim", "reference", "compile_backend", "paper")
    stems = {file.stem for folder in folders for file in (ROOT / folder).rglob("*.py")} - {"__init__"}
    assert not stems & sys.stdlib_module_names
