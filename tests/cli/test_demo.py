"""``fpsim demo`` hands its options on."""

import sys
import types

from tests.shared.command_line import run


def test_demo_hands_its_options_on(monkeypatch, tmp_path):
    calls = []
    module = types.ModuleType("fpsim.paper.demo")
    module.demo = lambda **options: calls.append(options)
    monkeypatch.setitem(sys.modules, "fpsim.paper.demo", module)
    text, out = tmp_path / "text.txt", tmp_path / "out"
    formats = ("--format", "bf16", "--format", "e4m3fn+e5m2")
    run("demo", "--steps", "3", *formats, "--text", str(text), "--out", str(out), "--loss-scale", "8")
    assert calls == [
        {"steps": 3, "formats": ["bf16", "e4m3fn+e5m2"], "text": text, "out": out, "loss_scale": 8.0},
    ]


def test_demo_without_its_extras_says_what_to_install(monkeypatch):
    module = types.ModuleType("fpsim.paper.demo")

    def demo(**options):
        raise ModuleNotFoundError("'transformers' is missing; the demo needs it: pip install 'fpsim-torch[paper]'")

    module.demo = demo
    monkeypatch.setitem(sys.modules, "fpsim.paper.demo", module)
    assert "pip install 'fpsim-torch[paper]'" in run("demo", code=2)
