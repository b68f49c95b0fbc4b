"""``fpsim sharpness`` hands its options on and prints the table of the measurement."""

import sys
import types

from rich.table import Table

from tests.shared.command_line import run


def test_sharpness_hands_its_options_on_and_prints_the_table(monkeypatch, tmp_path):
    calls = []
    module = types.ModuleType("fpsim.evaluate.logit_sharpness")

    def measure_checkpoint(*arguments, progress, **options):
        progress(1, 2)
        calls.append((*arguments, options))
        return types.SimpleNamespace(table=lambda: Table("sharpness of this"))

    module.measure_checkpoint, module.EPSILONS = measure_checkpoint, (5e-4, 1e-3)
    monkeypatch.setitem(sys.modules, "fpsim.evaluate.logit_sharpness", module)
    model, text = tmp_path / "model", tmp_path / "text.txt"
    formats = ("--format", "e4m3fn", "--format", "e8m3/toward_zero")
    output = run("sharpness", str(model), str(text), *formats, "--windows", "3", "--context", "8", "--no-gradients")
    assert "sharpness of this" in output
    options = {"windows": 3, "context": 8, "gradients": False, "method": "exact", "epsilons": (5e-4, 1e-3)}
    assert calls == [(model, text, {"formats": ["e4m3fn", "e8m3/toward_zero"], **options})]


def test_sharpness_of_a_folder_that_is_not_there_is_an_error(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be")
    assert str(tmp_path / "missing") in run("sharpness", str(tmp_path / "missing"), str(text), code=2)
