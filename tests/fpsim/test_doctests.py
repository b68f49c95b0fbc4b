"""Every example in a docstring gives what it says."""

import doctest
import importlib
import pkgutil

import pytest

import fpsim


def modules_with_examples() -> list[str]:
    names = [module.name for module in pkgutil.walk_packages(fpsim.__path__, "fpsim.")]
    return [name for name in names if ">>> " in (importlib.util.find_spec(name).loader.get_source(name) or "")]


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_in_docstrings(name: str) -> None:
    known = {"parse_format": fpsim.parse_format}
    tried = doctest.testmod(importlib.import_module(name), extraglobs=known, optionflags=doctest.ELLIPSIS)
    assert not tried.failed
