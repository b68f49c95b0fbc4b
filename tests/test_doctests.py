"""Every example in a docstring gives what it says."""

import doctest
import importlib
import pkgutil

import pytest

import fpsim

#: Where an editable install has subpackages beside the folder of the package.
FOLDERS = ("compile_backend", "paper", "reference")


def modules_with_examples() -> list[str]:
    packages = [importlib.import_module(name) for name in ("fpsim", *(f"fpsim.{folder}" for folder in FOLDERS))]
    names = {
        module.name
        for package in packages
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    }
    return [name for name in sorted(names) if ">>> " in (importlib.util.find_spec(name).loader.get_source(name) or "")]


class Finder(doctest.DocTestFinder):
    """Also finds the functions that a decorator of another module made."""

    def _from_module(self, module, object) -> bool:
        return getattr(object, "__module__", None) == module.__name__ or super()._from_module(module, object)


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_in_docstrings(name: str) -> None:
    known = {"parse_format": fpsim.parse_format}
    found = Finder().find(importlib.import_module(name), extraglobs=known)
    assert any(test.examples for test in found)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for test in found:
        runner.run(test)
    assert not runner.failures
