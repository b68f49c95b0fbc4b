"""The reference judges the tensor code, so it shares nothing with it but the description of the formats."""

import subprocess
import sys

#: Imports every module of the reference where torch and numpy cannot be imported, and prints what it took of fpsim.
PROGRAM = """
import importlib, pkgutil, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "numpy"):
            raise ImportError(f"{name} was imported")

sys.meta_path.insert(0, Refuse())
import fpsim.reference
for module in pkgutil.iter_modules(fpsim.reference.__path__, "fpsim.reference."):
    importlib.import_module(module.name)
print(*sorted(name for name in sys.modules if name.startswith("fpsim.")))
"""
ALLOWED = ("fpsim.formats", "fpsim.reference", "fpsim.suggestions")


def test_the_reference_imports_no_torch_no_numpy_and_of_fpsim_only_the_formats():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    modules = done.stdout.split()
    assert "fpsim.reference.arithmetic" in modules and "fpsim.reference.flags" in modules
    assert [name for name in modules if not f"{name}.".startswith(tuple(f"{root}." for root in ALLOWED))] == []
